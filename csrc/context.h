// What an op's checks and copies share while it fills the params structs.
#pragma once

#include <string>
#include <vector>

#include "allocation.h"

namespace rnnfast {

using Tensors = std::vector<Tensor>;

inline Tensor as_contiguous(const char* op, const char* name, const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : contiguous_copy(op, name, tensor);
}
inline const void* data_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* mutable_data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Row-major with any row stride.
struct Matrix {
  const void* data;
  int64_t stride;
};

// A view of one number, or of none, has any size: what is multiplied later must not overflow.
inline void check_sizes(const char* op, const char* name, const Tensor& tensor) {
  constexpr int64_t kFarBeyondMemory = int64_t{1} << 48;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    RNNFAST_CHECK(tensor.size(i) < kFarBeyondMemory, op, ": ", name, ": expected sizes below 2^48, got shape ",
                  shape_text(tensor.sizes().data(), tensor.dim()));
}

struct Context {
  Context(const char* op_, const char* like_name_, const Tensor& like_) : op(op_), like_name(like_name_), like(like_) {
    keep.reserve(16);
  }

  const char* op;
  const char* like_name;
  const Tensor& like;            // the op's first tensor: has the dtype, the device and the rows of all
  Tensors keep;                  // contiguous copies must live as long as the pointers to them
  std::vector<int64_t> numbers;  // batch_sizes, or the lengths of CPU tensors
  int64_t row_count = 0;
  // The data are one step, (B, width): states have no dimension for directions, and h_n is the output.
  bool one_step = false;

  const void* hold(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    keep.push_back(as_contiguous(op, name, *tensor));
    return data_of(keep.back());
  }
  Matrix hold_rows(const char* name, const Tensor& tensor) {
    const bool usable = tensor.stride(1) == 1 || tensor.size(1) <= 1;
    if (usable) return {data_of(tensor), tensor.stride(0)};
    keep.push_back(contiguous_copy(op, name, tensor));
    return {data_of(keep.back()), tensor.size(1)};
  }
  // Whoever else has a tensor of the caller's may change it during the call: what steers a kernel's addresses is copied
  // first, and the copy is what is checked and used.
  const int64_t* copied(const char* name, const Tensor& tensor) {
    const auto* from = static_cast<const int64_t*>(hold(name, tensor));
    numbers.resize(static_cast<size_t>(tensor.size(0)));
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    return numbers.data();
  }

  // Of the op's dtype and device, and of this shape.
  void check(const char* name, const Tensor& tensor, std::initializer_list<int64_t> shape) const {
    check_shape(op, name, tensor, shape);
    check_like(op, name, tensor, like);
  }
  // (rows..., width).
  void check_rows(const char* name, const Tensor& tensor, int64_t width) const {
    if (like.dim() == 2)
      check(name, tensor, {like.size(0), width});
    else
      check(name, tensor, {like.size(0), like.size(1), width});
  }
  // (D, B, width), of one step (B, width).
  void check_state(const char* name, const Tensor& tensor, const Recurrence& r, int64_t width) const {
    if (one_step)
      check(name, tensor, {r.rows.batch, width});
    else
      check(name, tensor, {r.directions, r.rows.batch, width});
  }
};

}  // namespace rnnfast

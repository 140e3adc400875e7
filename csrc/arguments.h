// From the ops' arguments to the params structs, for every backend: checks, contiguous copies, pointers.
#pragma once

#include <string>
#include <vector>

#include "allocation.h"
#include "places.h"

namespace rnnfast {

using Tensors = std::vector<Tensor>;

inline Tensor as_contiguous(const char* op, const char* name, const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : contiguous_copy(op, name, tensor);
}
inline const void* data_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* mutable_data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Row-major with any row stride; other layouts are copied. `keep` owns the copy.
struct Matrix {
  const void* data;
  int64_t stride;
};
inline Matrix row_major(const char* op, const char* name, const Tensor& tensor, Tensors& keep) {
  const bool usable = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  if (usable) return {data_of(tensor), tensor.stride(0)};
  keep.push_back(contiguous_copy(op, name, tensor));
  return {data_of(keep.back()), tensor.size(1)};
}

// The arguments that forward, backward and inference share.
struct Context {
  explicit Context(const char* name) : op(name) {}

  const char* op;
  Recurrence r;
  Tensors keep;                  // contiguous copies must live as long as the pointers to them
  std::vector<int64_t> numbers;  // batch_sizes, or the lengths of CPU tensors: see fill_rows
  int64_t row_count = 0;
  // The data are one step, (B, width): states have no dimension for directions, and h_n is the output.
  bool one_step = false;

  const void* hold(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    keep.push_back(as_contiguous(op, name, *tensor));
    return data_of(keep.back());
  }
  // Whoever else has a tensor of the caller's may change it during the call: what steers a kernel's addresses is copied
  // first, and the copy is what is checked and used.
  const int64_t* copied(const char* name, const Tensor& tensor) {
    const auto* from = static_cast<const int64_t*>(hold(name, tensor));
    numbers.resize(static_cast<size_t>(tensor.size(0)));
    for (size_t i = 0; i < numbers.size(); ++i) numbers[i] = __atomic_load_n(from + i, __ATOMIC_RELAXED);
    return numbers.data();
  }
  void check_state(const char* name, const Tensor& tensor, const Tensor& model, int64_t width) const {
    if (one_step)
      check_shape(op, name, tensor, {r.rows.batch, width});
    else
      check_shape(op, name, tensor, {r.directions, r.rows.batch, width});
    check_like(op, name, tensor, model);
  }
};

struct Arguments {
  const char* op;
  const std::string& mode;
  const char* model_name;
  const Tensor& model;  // dtype, device and leading sizes; its last dimension is D * width
  const Places& places;
  const OptionalTensor& hx;
  const OptionalTensor& cx;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
  const OptionalTensor& resets;
  bool batch_first;
};

// A view of one number, or of none, has any size: what is multiplied below must not overflow.
inline void check_sizes(const char* op, const char* name, const Tensor& tensor) {
  constexpr int64_t kFarBeyondMemory = int64_t{1} << 48;
  for (int64_t i = 0; i < tensor.dim(); ++i)
    RNNFAST_CHECK(tensor.size(i) < kFarBeyondMemory, op, ": ", name, ": expected sizes below 2^48, got shape ",
                  shape_text(tensor.sizes().data(), tensor.dim()));
}

inline void fill_rows(const Arguments& a, Context& context) {
  RowLayout& rows = context.r.rows;
  const Tensor& model = a.model;
  check_sizes(a.op, a.model_name, model);
  if (a.batch_sizes) {
    RNNFAST_CHECK(model.dim() == 2, a.op, ": ", a.model_name,
                  ": expected packed rows, of 2 dimensions, with batch_sizes, got ", model.dim());
    RNNFAST_CHECK(
        a.batch_sizes->is_cpu() && a.batch_sizes->scalar_type() == ScalarType::Long && a.batch_sizes->dim() == 1, a.op,
        ": batch_sizes: expected a 1-D int64 tensor on the CPU");
    RNNFAST_CHECK(!a.lengths && !a.resets, a.op, ": lengths and resets go with dense rows, not with batch_sizes");
    rows.batch_sizes = context.copied("batch_sizes", *a.batch_sizes);
    rows.steps = a.batch_sizes->size(0);
    rows.batch = rows.steps ? rows.batch_sizes[0] : 0;
    context.row_count = model.size(0);
    // Counted down, so that no sum of them overflows.
    int64_t left = context.row_count;
    for (int64_t t = 0; t < rows.steps; ++t) {
      RNNFAST_CHECK(rows.batch_sizes[t] > 0 && (t == 0 || rows.batch_sizes[t] <= rows.batch_sizes[t - 1]), a.op,
                    ": batch_sizes: expected positive sizes that do not increase, got ", rows.batch_sizes[t],
                    " at step ", t);
      RNNFAST_CHECK(rows.batch_sizes[t] <= left, a.op, ": batch_sizes: expected a sum of ", context.row_count,
                    ", got more at step ", t);
      left -= rows.batch_sizes[t];
    }
    RNNFAST_CHECK(left == 0, a.op, ": batch_sizes: expected a sum of ", context.row_count, ", got ",
                  context.row_count - left);
    return;
  }
  if (model.dim() == 2) {
    RNNFAST_CHECK(context.r.directions == 1 && !a.lengths && !a.resets, a.op, ": ", a.model_name,
                  ": expected 3 dimensions, got 2: one step, which has one direction and neither lengths nor resets");
    context.one_step = true;
    rows.steps = 1;
    rows.batch = rows.step_stride = context.row_count = model.size(0);
    rows.batch_stride = 1;
    return;
  }
  RNNFAST_CHECK(model.dim() == 3, a.op, ": ", a.model_name, ": expected 2 or 3 dimensions, got ", model.dim());
  rows.steps = model.size(a.batch_first ? 1 : 0);
  rows.batch = model.size(a.batch_first ? 0 : 1);
  rows.step_stride = a.batch_first ? 1 : rows.batch;
  rows.batch_stride = a.batch_first ? rows.steps : 1;
  RNNFAST_CHECK(!__builtin_mul_overflow(rows.steps, rows.batch, &context.row_count), a.op, ": ", a.model_name,
                ": so many rows that 64 bits do not count them: ", rows.steps, " * ", rows.batch);
  if (a.lengths) {
    RNNFAST_CHECK(a.lengths->device() == model.device() && a.lengths->scalar_type() == ScalarType::Long, a.op,
                  ": lengths: expected an int64 tensor on the device of the data");
    check_shape(a.op, "lengths", *a.lengths, {rows.batch});
    // On another device the values cannot be read without waiting for it: there the kernels clamp them.
    rows.lengths = model.is_cpu() ? context.copied("lengths", *a.lengths)
                                  : static_cast<const int64_t*>(context.hold("lengths", a.lengths));
    for (int64_t b = 0; b < rows.batch && model.is_cpu(); ++b)
      RNNFAST_CHECK(rows.lengths[b] >= 0 && rows.lengths[b] <= rows.steps, a.op,
                    ": lengths: expected values from 0 to ", rows.steps, ", got ", rows.lengths[b], " for row ", b);
  }
  if (a.resets) {
    RNNFAST_CHECK(a.resets->device() == model.device() && a.resets->scalar_type() == ScalarType::Bool, a.op,
                  ": resets: expected a bool tensor on the device of the data");
    check_shape(a.op, "resets", *a.resets, {model.size(0), model.size(1)});
    rows.resets = static_cast<const uint8_t*>(context.hold("resets", a.resets));
  }
}

// Everything but the layer's own input. Leaves contiguous copies in context.keep.
inline void fill(const Arguments& a, Context& context) {
  Recurrence& r = context.r;
  r.mode = mode_of(a.op, a.mode);
  r.dtype = dtype_of(a.op, a.model);
  r.directions = a.places.directions();
  r.projected = present(a.op, "weight_hr", a.places, &Parameters::weight_hr);
  RNNFAST_CHECK(!r.projected || r.mode == Mode::lstm, a.op, ": weight_hr: expected None but for an LSTM");
  const Tensor& first = required(a.op, "weight_hh", 0, a.places[0].weight_hh);
  RNNFAST_CHECK(first.dim() == 2, a.op, ": weight_hh: expected 2 dimensions, got ", first.dim());
  check_sizes(a.op, "weight_hh", first);
  const int64_t gates = traits(r.mode).gates;
  r.hidden_size = first.size(0) / gates;
  r.state_size = first.size(1);
  context.keep.reserve(16);
  for (int64_t d = 0; d < r.directions; ++d) {
    const Tensor& weight_hh = required(a.op, "weight_hh", d, a.places[d].weight_hh);
    const std::string name = place_name("weight_hh", d);
    check_shape(a.op, name.c_str(), weight_hh, {gates * r.hidden_size, r.projected ? r.state_size : r.hidden_size});
    check_like(a.op, name.c_str(), weight_hh, a.model);
    const Matrix hh = row_major(a.op, "weight_hh", weight_hh, context.keep);
    r.weight_hh[d] = hh.data;
    r.weight_hh_stride[d] = hh.stride;
    if (!r.projected) continue;
    const Tensor& weight_hr = *a.places[d].weight_hr;
    check_shape(a.op, "weight_hr", weight_hr, {r.state_size, r.hidden_size});
    check_like(a.op, "weight_hr", weight_hr, a.model);
    const Matrix hr = row_major(a.op, "weight_hr", weight_hr, context.keep);
    r.weight_hr[d] = hr.data;
    r.weight_hr_stride[d] = hr.stride;
  }
  fill_rows(a, context);
  if (a.hx) {
    context.check_state("hx", *a.hx, a.model, r.state_size);
    r.hx = context.hold("hx", a.hx);
  }
  if (a.cx && r.mode == Mode::lstm) {
    context.check_state("cx", *a.cx, a.model, r.hidden_size);
    r.cx = context.hold("cx", a.cx);
  }
}

inline void fill_biases(const char* op, const char* kind, const Places& places, OptionalTensor Parameters::* member,
                        const Tensor& model, Context& context, const void** to) {
  if (!present(op, kind, places, member)) return;
  const Recurrence& r = context.r;
  for (int64_t d = 0; d < r.directions; ++d) {
    const Tensor& bias = *(places[d].*member);
    check_shape(op, kind, bias, {traits(r.mode).gates * r.hidden_size});
    check_like(op, kind, bias, model);
    to[d] = context.hold(kind, bias);
  }
}

// Of the op input_projection. Returns the number of rows of weight_ih, G*H.
inline int64_t check_gate_arguments(const char* op, Mode mode, const Tensor& input, const Places& places) {
  const Tensor& first = required(op, "weight_ih", 0, places[0].weight_ih);
  RNNFAST_CHECK(first.dim() == 2, op, ": weight_ih: expected 2 dimensions, got ", first.dim());
  RNNFAST_CHECK(first.size(0) % traits(mode).gates == 0, op, ": weight_ih: expected a multiple of ", traits(mode).gates,
                " rows, got ", first.size(0));
  RNNFAST_CHECK(input.dim() == 2 || input.dim() == 3, op, ": input: expected 2 or 3 dimensions, got ", input.dim());
  const int64_t width = first.size(0);
  check_sizes(op, "weight_ih", first);
  check_sizes(op, "input", input);
  int64_t rows = input.size(0);
  RNNFAST_CHECK(input.dim() == 2 || !__builtin_mul_overflow(rows, input.size(1), &rows), op,
                ": input: so many rows that 64 bits do not count them");
  for (int64_t d = 0; d < places.directions(); ++d) {
    const std::string name = place_name("weight_ih", d);
    const Tensor& weight = required(op, "weight_ih", d, places[d].weight_ih);
    check_shape(op, name.c_str(), weight, {width, input.size(input.dim() - 1)});
    check_like(op, name.c_str(), weight, input);
    const auto check_bias = [&](const char* kind, OptionalTensor Parameters::* member) {
      if (!present(op, kind, places, member)) return;
      check_shape(op, kind, *(places[d].*member), {width});
      check_like(op, kind, *(places[d].*member), input);
    };
    check_bias("bias_ih", &Parameters::bias_ih);
    check_bias("bias_hh", &Parameters::bias_hh);
  }
  return width;
}

inline void check_matmul_arguments(const char* op, const Tensor& a, const Tensor& b) {
  RNNFAST_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": expected (M, K) and (K, N), got ",
                shape_text(a.sizes().data(), a.dim()), " and ", shape_text(b.sizes().data(), b.dim()));
  check_like(op, "b", b, a);
}

}  // namespace rnnfast

// Argument checks of the ops, shared by every backend. The messages that users see are raised in Python; these guard
// direct callers.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "recurrence.h"

namespace rnnfast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Our own words alone: torch's STD_TORCH_CHECK puts a path of the machine that built the library before them.
template <class... Parts> [[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}
#define RNNFAST_CHECK(condition, ...)                                \
  do {                                                               \
    if (!(condition)) [[unlikely]] { ::rnnfast::fail(__VA_ARGS__); } \
  } while (false)

inline std::string shape_text(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

inline bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> expected) {
  if (tensor.dim() != static_cast<int64_t>(expected.size())) return false;
  int64_t i = 0;
  for (const int64_t size : expected)
    if (tensor.size(i++) != size) return false;
  return true;
}

inline void check_shape(const char* op, const char* argument, const Tensor& tensor,
                        std::initializer_list<int64_t> expected) {
  if (has_shape(tensor, expected)) return;
  const auto sizes = tensor.sizes();
  fail(op, ": ", argument, ": expected shape ", shape_text(expected.begin(), static_cast<int64_t>(expected.size())),
       ", got ", shape_text(sizes.data(), static_cast<int64_t>(sizes.size())));
}

inline void check_like(const char* op, const char* argument, const Tensor& tensor, const Tensor& like) {
  RNNFAST_CHECK(tensor.scalar_type() == like.scalar_type(), op, ": ", argument,
                ": expected the dtype of the first tensor, got another");
  RNNFAST_CHECK(tensor.device() == like.device(), op, ": ", argument,
                ": expected the device of the first tensor, got another");
}

// What a type is computed with.
inline ScalarType compute_type(DType dtype) { return dtype == DType::float64 ? ScalarType::Double : ScalarType::Float; }

inline DType dtype_of(const char* op, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::float32;
    case ScalarType::Double: return DType::float64;
    case ScalarType::BFloat16: return DType::bfloat16;
    case ScalarType::Half: return DType::float16;
    default: fail(op, ": expected a tensor of dtype float32, float64, bfloat16 or float16");
  }
}

inline Mode mode_of(const char* op, const std::string& name) {
  for (const CellTraits& cell : kCells)
    if (name == cell.name) return cell.mode;
  std::string known;
  for (const CellTraits& cell : kCells) known += (known.empty() ? "" : ", ") + std::string(cell.name);
  fail(op, ": mode: expected one of ", known, ", got ", name);
}

}  // namespace rnnfast

// From the ops' arguments to the params structs, for every backend: checks, contiguous copies, pointers.
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
  Tensors keep;  // contiguous copies must live as long as the pointers to them
  int64_t row_count = 0;

  const void* hold(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    keep.push_back(as_contiguous(op, name, *tensor));
    return data_of(keep.back());
  }
};

struct Arguments {
  const char* op;
  const std::string& mode;
  const Tensor& model;  // dtype, device and leading sizes; its last dimension is D * width
  const Tensors& weight_hh;
  const Tensors& weight_hr;
  const OptionalTensor& hx;
  const OptionalTensor& cx;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
  const OptionalTensor& resets;
  bool batch_first;
};

inline void fill_rows(const Arguments& a, Context& context) {
  RowLayout& rows = context.r.rows;
  const Tensor& model = a.model;
  if (a.batch_sizes) {
    RNNFAST_CHECK(model.dim() == 2, a.op, ": with batch_sizes rows are packed: expected 2 dimensions, got ",
                  model.dim());
    RNNFAST_CHECK(
        a.batch_sizes->is_cpu() && a.batch_sizes->scalar_type() == ScalarType::Long && a.batch_sizes->dim() == 1, a.op,
        ": batch_sizes: expected a 1-D int64 tensor on the CPU");
    RNNFAST_CHECK(!a.lengths && !a.resets, a.op, ": lengths and resets go with dense rows, not with batch_sizes");
    rows.batch_sizes = static_cast<const int64_t*>(context.hold("batch_sizes", a.batch_sizes));
    rows.steps = a.batch_sizes->size(0);
    rows.batch = rows.steps ? rows.batch_sizes[0] : 0;
    context.row_count = model.size(0);
    int64_t sum = 0;
    for (int64_t t = 0; t < rows.steps; ++t) {
      RNNFAST_CHECK(rows.batch_sizes[t] > 0 && (t == 0 || rows.batch_sizes[t] <= rows.batch_sizes[t - 1]), a.op,
                    ": batch_sizes: expected positive sizes that do not increase");
      sum += rows.batch_sizes[t];
    }
    RNNFAST_CHECK(sum == context.row_count, a.op, ": batch_sizes: expected a sum of ", context.row_count, ", got ",
                  sum);
    return;
  }
  RNNFAST_CHECK(model.dim() == 3, a.op, ": expected 3 dimensions, got ", model.dim());
  rows.steps = model.size(a.batch_first ? 1 : 0);
  rows.batch = model.size(a.batch_first ? 0 : 1);
  rows.step_stride = a.batch_first ? 1 : rows.batch;
  rows.batch_stride = a.batch_first ? rows.steps : 1;
  context.row_count = rows.steps * rows.batch;
  if (a.lengths) {
    RNNFAST_CHECK(a.lengths->device() == model.device() && a.lengths->scalar_type() == ScalarType::Long, a.op,
                  ": lengths: expected an int64 tensor on the device of the data");
    check_shape(a.op, "lengths", *a.lengths, {rows.batch});
    rows.lengths = static_cast<const int64_t*>(context.hold("lengths", a.lengths));
    // On another device the values cannot be read without waiting for it: there the kernels clamp them.
    for (int64_t b = 0; b < rows.batch && model.is_cpu(); ++b)
      RNNFAST_CHECK(rows.lengths[b] >= 0 && rows.lengths[b] <= rows.steps, a.op,
                    ": lengths: expected values from 0 to ", rows.steps, ", got ", rows.lengths[b], " for row ", b);
  }
  if (a.resets) {
    RNNFAST_CHECK(a.resets->device() == model.device() && a.resets->scalar_type() == ScalarType::Bool, a.op,
                  ": resets: expected a bool tensor on the device of the data");
    check_shape(a.op, "resets", *a.resets, {model.size(0), model.size(1)});
    rows.resets = static_cast<const bool*>(context.hold("resets", a.resets));
  }
}

// Everything but the layer's own input. Leaves contiguous copies in context.keep.
inline void fill(const Arguments& a, Context& context) {
  Recurrence& r = context.r;
  r.mode = mode_of(a.op, a.mode);
  r.dtype = dtype_of(a.op, a.model);
  r.directions = static_cast<int64_t>(a.weight_hh.size());
  RNNFAST_CHECK(r.directions == 1 || r.directions == 2, a.op, ": weight_hh: expected 1 or 2 tensors, got ",
                r.directions);
  r.projected = !a.weight_hr.empty();
  RNNFAST_CHECK(!r.projected || (r.mode == Mode::lstm && a.weight_hr.size() == a.weight_hh.size()), a.op,
                ": weight_hr: expected none, or for an LSTM one for each direction");
  RNNFAST_CHECK(a.weight_hh[0].dim() == 2, a.op, ": weight_hh: expected 2 dimensions");
  const int64_t gates = gates_of(r.mode);
  r.hidden_size = a.weight_hh[0].size(0) / gates;
  r.state_size = a.weight_hh[0].size(1);
  context.keep.reserve(16);
  for (int64_t d = 0; d < r.directions; ++d) {
    check_shape(a.op, "weight_hh", a.weight_hh[d], {gates * r.hidden_size, r.projected ? r.state_size : r.hidden_size});
    check_like(a.op, "weight_hh", a.weight_hh[d], a.model);
    const Matrix hh = row_major(a.op, "weight_hh", a.weight_hh[d], context.keep);
    r.weight_hh[d] = hh.data;
    r.weight_hh_stride[d] = hh.stride;
    if (!r.projected) continue;
    check_shape(a.op, "weight_hr", a.weight_hr[d], {r.state_size, r.hidden_size});
    check_like(a.op, "weight_hr", a.weight_hr[d], a.model);
    const Matrix hr = row_major(a.op, "weight_hr", a.weight_hr[d], context.keep);
    r.weight_hr[d] = hr.data;
    r.weight_hr_stride[d] = hr.stride;
  }
  fill_rows(a, context);
  if (a.hx) {
    check_shape(a.op, "hx", *a.hx, {r.directions, r.rows.batch, r.state_size});
    check_like(a.op, "hx", *a.hx, a.model);
    r.hx = context.hold("hx", a.hx);
  }
  if (a.cx && r.mode == Mode::lstm) {
    check_shape(a.op, "cx", *a.cx, {r.directions, r.rows.batch, r.hidden_size});
    check_like(a.op, "cx", *a.cx, a.model);
    r.cx = context.hold("cx", a.cx);
  }
}

inline void fill_biases(const char* op, const char* argument, const Tensors& biases, const Tensor& model,
                        Context& context, const void** to) {
  if (biases.empty()) return;
  const Recurrence& r = context.r;
  RNNFAST_CHECK(static_cast<int64_t>(biases.size()) == r.directions, op, ": ", argument,
                ": expected none, or one for each direction");
  for (int64_t d = 0; d < r.directions; ++d) {
    check_shape(op, argument, biases[d], {gates_of(r.mode) * r.hidden_size});
    check_like(op, argument, biases[d], model);
    to[d] = context.hold(argument, biases[d]);
  }
}

// Of the op input_gates.
inline void check_gate_arguments(const char* op, const Tensor& input, const Tensors& weight_ih, const Tensors& bias_ih,
                                 const Tensors& bias_hh) {
  RNNFAST_CHECK(!weight_ih.empty() && weight_ih[0].dim() == 2, op,
                ": weight_ih: expected 1 or 2 tensors of 2 dimensions");
  RNNFAST_CHECK((bias_ih.empty() || bias_ih.size() == weight_ih.size()) &&
                    (bias_hh.empty() || bias_hh.size() == weight_ih.size()),
                op, ": bias_ih, bias_hh: expected none, or one for each direction");
  RNNFAST_CHECK(input.dim() == 2 || input.dim() == 3, op, ": input: expected 2 or 3 dimensions, got ", input.dim());
  for (size_t d = 0; d < weight_ih.size(); ++d) {
    check_shape(op, "weight_ih", weight_ih[d], {weight_ih[0].size(0), input.size(input.dim() - 1)});
    check_like(op, "weight_ih", weight_ih[d], input);
    const auto check_bias = [&](const char* argument, const Tensors& biases) {
      if (biases.empty()) return;
      check_shape(op, argument, biases[d], {weight_ih[0].size(0)});
      check_like(op, argument, biases[d], input);
    };
    check_bias("bias_ih", bias_ih);
    check_bias("bias_hh", bias_hh);
  }
}

inline void check_matmul_arguments(const char* op, const Tensor& a, const Tensor& b) {
  RNNFAST_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": expected (M, K) and (K, N), got ",
                shape_text(a.sizes().data(), a.dim()), " and ", shape_text(b.sizes().data(), b.dim()));
  check_like(op, "b", b, a);
}

}  // namespace rnnfast

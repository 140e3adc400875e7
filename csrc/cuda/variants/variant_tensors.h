// The workspaces of a call with options as tensors, and its products through ATen: by cuBLAS, in the emulator on the
// host.
#pragma once

#include "../../variants/ops.h"
#include "../aten.h"
#include "variant_loop.h"

namespace rnnfast::gpu {

class VariantTensors {
 public:
  VariantTensors(const Context& context, const VariantParams& call, const Tensor& weight_hh, void* stream)
      : op_(context.op), like_(context.like), call_(call), stream_(stream), weights_(by_heads(weight_hh)) {}
  // The products refer to it.
  VariantTensors(const VariantTensors&) = delete;
  VariantTensors& operator=(const VariantTensors&) = delete;

  VariantStepForward forward(const VariantForward& call) {
    const int64_t B = call.rows.batch, H = call.hidden_size;
    VariantStepForward step;
    step.call = call;
    const Tensor entering = make(storage(), {B, H}, step.entering), sums = of_heads(compute(), first(), step.sums);
    products.gates = product(parted(entering), sums, rows_of_weights(0, first()), true);
    if (call.reset_first) {
      const Tensor state = make(storage(), {B, H}, step.reset_state);
      const Tensor reset_sums = of_heads(compute(), H, step.reset_sums);
      products.reset = product(parted(state), reset_sums, rows_of_weights(first(), H), true);
    }
    if (call.has_cell()) make(compute(), {B, H}, step.carry_c);
    if (call.exponential) make(compute(), {B, H}, step.carry_l);
    if (call.cell_norm != CellNorm::none) make(compute(), {B, H}, step.fresh_c);
    return step;
  }

  VariantStepBackward backward(const VariantBackward& call) {
    const int64_t B = call.rows.batch, H = call.hidden_size;
    VariantStepBackward step;
    step.call = call;
    const Tensor gradients = of_heads(storage(), first(), step.sum_gradients), back = of_heads(compute(), H, step.back);
    products.gates = product(gradients, back, rows_of_weights(0, first()), false);
    if (call.reset_first) {
      const Tensor reset = of_heads(storage(), H, step.reset_gradients);
      products.reset = product(reset, back, rows_of_weights(first(), H), false);
    }
    make(compute(), {B, H}, step.carry_h);
    if (call.has_cell()) make(compute(), {B, H}, step.carry_c);
    if (call.exponential) make(compute(), {B, H}, step.carry_l);
    if (call.gate_norm != GateNorm::none) make(compute(), {B, call.width()}, step.of_gates);
    if (call.cell_norm != CellNorm::none)
      for (void** to : {&step.raw_c, &step.of_normed, &step.beside}) make(compute(), {B, H}, *to);
    place_vectors(step);
    for (void** to : {&step.vectors_now, &step.vectors_before}) make(compute(), {B, step.vectors}, *to);
    return step;
  }

  VariantProducts products;

 private:
  ScalarType storage() const { return like_.scalar_type(); }
  ScalarType compute() const { return compute_type(call_.dtype); }
  // Rows of W_hh that a step's first product has.
  int64_t first() const { return call_.first_width(); }

  Tensor make(ScalarType type, std::initializer_list<int64_t> sizes, void*& pointer) {
    keep_.push_back(workspace_of(op_, Sizes(sizes.begin(), sizes.size()), type, like_));
    pointer = mutable_data_of(keep_.back());
    return keep_.back();
  }
  // What products make and take: (heads, B, width / heads), of one head without that dimension.
  Tensor of_heads(ScalarType type, int64_t width, void*& pointer) {
    const int64_t B = call_.rows.batch;
    if (call_.heads == 1) return make(type, {B, width}, pointer);
    return make(type, {call_.heads, B, width / call_.heads}, pointer);
  }
  // The same view of (B, H).
  Tensor parted(const Tensor& state) const {
    if (call_.heads == 1) return state;
    const int64_t sizes[3] = {call_.rows.batch, call_.heads, call_.head_size()};
    return torch::stable::transpose(torch::stable::view(state, Sizes(sizes, 3)), 0, 1);
  }

  // W_hh, (G*H, H), or of heads (heads, G*H / heads, H / heads): a copy, in which each head's rows stand together.
  Tensor by_heads(const Tensor& weight_hh) {
    const Tensor matrix = detached(weight_hh);
    const int64_t size = call_.head_size();
    if (call_.heads == 1) {
      const bool usable = matrix.stride(1) == 1 || matrix.size(1) <= 1;
      return usable ? matrix : contiguous_copy(op_, "weight_hh", matrix);
    }
    const int64_t parts[4] = {call_.gates, call_.heads, size, size},
                  together[3] = {call_.heads, call_.gates * size, size};
    const Tensor by_gates = torch::stable::view(as_contiguous(op_, "weight_hh", matrix), Sizes(parts, 4));
    const Tensor by_heads = contiguous_copy(op_, "weight_hh by heads", torch::stable::transpose(by_gates, 0, 1));
    return torch::stable::view(by_heads, Sizes(together, 3));
  }
  // Of `width` rows from `from` on, over all heads.
  Tensor rows_of_weights(int64_t from, int64_t width) const {
    if (width == call_.width()) return weights_;
    Tensor weights = weights_;
    return torch::stable::narrow(weights, -2, from / call_.heads, width / call_.heads);
  }

  std::function<std::string()> product(const Tensor& from, const Tensor& sums, const Tensor& weights, bool transposed) {
    const Tensor by = transposed ? torch::stable::transpose(weights, -2, -1) : weights;
    return [this, from, sums, by] {
#if defined(RNNFAST_EMULATED)
      // The host is to read what kernels have written.
      if (std::string error = synchronize(stream_); !error.empty()) return error;
#endif
      step_product_into(sums, op_, call_.heads == 1 ? "aten::mm" : "aten::bmm", from, by);
      return std::string();
    };
  }

  const char* const op_;
  const Tensor& like_;
  const VariantParams& call_;
  void* const stream_;
  const Tensor weights_;
  Tensors keep_;
};

}  // namespace rnnfast::gpu

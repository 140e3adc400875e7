// Where the gradient of h_t comes from: for backward, and for the projection's part of it.
#pragma once

#include "block.cuh"

namespace rnnfast::gpu {

// The gates' gradients of the step after, that of W_hh h; null where nothing comes back from there.
template <int kGates, class Block>
RNNFAST_DEVICE const typename Block::Storage* later_gradient(const Block& block, const RowTurn& r) {
  const StepBackward& p = block.p;
  if (!r.is_followed()) return nullptr;
  const void* gradients = p.grad_gates_hh ? p.grad_gates_hh : p.grad_gates;
  return at<typename Block::Storage>(gradients, block.in_rows(r.after_row, kGates * p.hidden_size, 0));
}

// What reaches h_t beside the product: from the output and, in a sequence's last step, from h_n.
template <class Block>
RNNFAST_DEVICE typename Block::Compute outer_gradient(const Block& block, const RowTurn& r, int64_t b, int64_t unit) {
  const StepBackward& p = block.p;
  typename Block::Compute dh = block.read(p.grad_output, block.in_rows(r.row, p.state_size, unit));
  if (!r.after()) dh += block.read(p.grad_h_n, block.in_state(b, p.state_size, unit));
  return dh;
}

}  // namespace rnnfast::gpu

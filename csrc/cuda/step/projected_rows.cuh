// Where a row of a projected layer is no step: what the kernels that make and take h_t hand on, whichever they are.
#pragma once

#include "../elements.cuh"
#include "../rows.cuh"
#include "step.h"

namespace rnnfast::gpu {

// hx through a sequence without any step, and zeros for the row.
template <class Block>
RNNFAST_DEVICE void projected_no_step(const Block& block, const RowTurn& r, int64_t b, int64_t unit) {
  const StepForward& p = block.p;
  const int64_t state_at = block.in_state(b, p.state_size, unit);
  if (r.empty() && is_first_turn(p.rows, block.d)) block.write(p.h_n, state_at, block.read(p.hx, state_at));
  if (r.in_memory()) block.write(p.output, block.in_rows(r.row, p.state_size, unit), 0);
}

// back: what has come back to h_{t-1}. On to hx, or through such a sequence; and zeros for the row.
template <class Block>
RNNFAST_DEVICE void projected_backward_no_step(const Block& block, const RowTurn& r, int64_t b, int64_t unit,
                                               typename Block::Compute back) {
  const StepBackward& p = block.p;
  const int64_t state_at = block.in_state(b, p.state_size, unit);
  if (r.has_left())
    block.write(p.grad_hx, state_at, back);
  else if (r.empty() && is_last_turn(p.rows, block.d))
    block.write(p.grad_hx, state_at, block.read(p.grad_h_n, state_at));
  if (r.in_memory()) block.write(p.grad_projected, block.in_rows(r.row, p.state_size, unit), 0);
}

}  // namespace rnnfast::gpu

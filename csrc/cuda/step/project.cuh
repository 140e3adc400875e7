// The projection: a launch of its own after the cell, since each unit of h_t needs all hidden units; in backward
// before.
#pragma once

#include "gradients.cuh"

namespace rnnfast::gpu {

// h_t = W_hr (o tanh(c)), after step_forward of the same step. weight: W_hr (P, H).
template <class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((UnitProduct<Type, kBatchTiles>::kThreads),
                                     1) void step_project_forward(RNNFAST_GRID_CONSTANT const StepForward p) {
  using Storage = typename Type::Storage;
  using Product = UnitProduct<Type, kBatchTiles>;
  allow_next_grid();
  const Block<Type, StepForward, Product::kBatch> block(p);
  const int64_t state_size = p.state_size;

  // ---- product ----
  multiply<Product>(
      block, p.hidden_size, [&](int i) { return block.weight_row(block.first_unit + i, state_size); },
      [&](int n) -> const Storage* {
        const void* hidden = p.hidden;
        if (!block.row_turn(n).active) return nullptr;
        return at<Storage>(hidden, block.in_state(block.first_b + n, p.hidden_size, 0));
      });

  // ---- state ----
  for_elements<Product>([&](int, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    const RowTurn r = block.row_turn(n);
    if (!r.in_batch || unit >= state_size) return;
    const int64_t state_at = block.in_state(b, state_size, unit), row_at = block.in_rows(r.row, state_size, unit);
    if (r.active) {
      const auto h = Product::at(u, n);
      block.write(p.output, row_at, h);
      if (!r.after) block.write(p.h_n, state_at, h);
      return;
    }
    if (r.empty && is_first_turn(p.rows, block.d)) block.write(p.h_n, state_at, block.read(p.hx, state_at));
    if (r.in_memory) block.write(p.output, row_at, 0);
  });
}

// The gradient of h_t (and of hx), before step_backward of the same step. weight: W_hh^T (P, G*H).
template <Family kFamily, class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((UnitProduct<Type, kBatchTiles>::kThreads),
                                     1) void step_project_backward(RNNFAST_GRID_CONSTANT const StepBackward p) {
  using Compute = typename Type::Compute;
  using Product = UnitProduct<Type, kBatchTiles>;
  constexpr int kGates = FamilyCell<kFamily>::Constants::kGates;
  allow_next_grid();
  const Block<Type, StepBackward, Product::kBatch> block(p);
  const int64_t state_size = p.state_size;

  // ---- product ----
  const bool multiplied = multiply<Product>(
      block, kGates * p.hidden_size, [&](int i) { return block.weight_row(block.first_unit + i, state_size); },
      [&](int n) { return later_gradient<kGates>(block, block.row_turn(n)); });

  // ---- state ----
  for_elements<Product>([&](int, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    const RowTurn r = block.row_turn(n);
    if (!r.in_batch || unit >= state_size) return;
    const int64_t state_at = block.in_state(b, state_size, unit), row_at = block.in_rows(r.row, state_size, unit);
    const Compute back = multiplied && r.is_followed() ? Product::at(u, n) : Compute(0);
    if (r.active) {
      block.write(p.grad_projected, row_at, back + outer_gradient(block, r, b, unit));
      return;
    }
    if (r.has_left())
      block.write(p.grad_hx, state_at, back);
    else if (r.empty && is_last_turn(p.rows, block.d))
      block.write(p.grad_hx, state_at, block.read(p.grad_h_n, state_at));
    if (r.in_memory) block.write(p.grad_projected, row_at, 0);
  });
}

}  // namespace rnnfast::gpu

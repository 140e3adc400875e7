// The projection: a launch of its own after the cell, since each unit of h_t needs all hidden units; in backward
// before.
#pragma once

#include "gradients.cuh"
#include "projected_rows.cuh"

namespace rnnfast::gpu {

// h_t = W_hr (o tanh(c)), after step_forward of the same step. weight: W_hr (P, H).
template <class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((UnitProduct<Type, kBatchTiles>::kThreads),
                                     2) void step_project_forward(RNNFAST_GRID_CONSTANT const StepForward p) {
  using Storage = typename Type::Storage;
  using Product = UnitProduct<Type, kBatchTiles>;
  allow_next_grid();
  const Block<Type, StepForward, Product::kBatch> block(p);
  const int64_t state_size = p.state_size;

  RowTurn turns[kSlots<Product>];
  for_elements<Product>([&](int slot, int n, int) { turns[slot] = block.row_turn(n); });

  // ---- product ----
  multiply<Product>(
      block, p.hidden_size, [&](int i) { return block.weight_row(block.first_unit + i, state_size); },
      [&](int n) -> const Storage* {
        const void* hidden = p.hidden;
        if (!block.row_turn(n).active()) return nullptr;
        return at<Storage>(hidden, block.in_state(block.first_b + n, p.hidden_size, 0));
      },
      [] {});

  // ---- state ----
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    const RowTurn& r = turns[slot];
    if (!r.in_batch() || unit >= state_size) return;
    if (!r.active()) {
      projected_no_step(block, r, b, unit);
      return;
    }
    const auto h = Product::at(u, n);
    block.write(p.output, block.in_rows(r.row, state_size, unit), h);
    if (!r.after()) block.write(p.h_n, block.in_state(b, state_size, unit), h);
  });
}

// The gradient of h_t (and of hx), before step_backward of the same step. weight: W_hh^T (P, G*H).
template <Family kFamily, class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((UnitProduct<Type, kBatchTiles>::kThreads),
                                     2) void step_project_backward(RNNFAST_GRID_CONSTANT const StepBackward p) {
  using Compute = typename Type::Compute;
  using Product = UnitProduct<Type, kBatchTiles>;
  constexpr int kGates = FamilyCell<kFamily>::Constants::kGates;
  allow_next_grid();
  const Block<Type, StepBackward, Product::kBatch> block(p);
  const int64_t state_size = p.state_size;

  struct Given {
    RowTurn r;
    Compute outer = 0;
  };
  Given given[kSlots<Product>];
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    Given& own = given[slot];
    own.r = block.row_turn(n);
    if (own.r.active() && unit < state_size) own.outer = outer_gradient(block, own.r, b, unit);
  });

  // ---- product ----
  const bool multiplied = multiply<Product>(
      block, kGates * p.hidden_size, [&](int i) { return block.weight_row(block.first_unit + i, state_size); },
      [&](int n) { return later_gradient<kGates>(block, block.row_turn(n)); }, [] {});

  // ---- state ----
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    const RowTurn& r = given[slot].r;
    if (!r.in_batch() || unit >= state_size) return;
    const Compute back = multiplied && r.is_followed() ? Product::at(u, n) : Compute(0);
    if (!r.active()) {
      projected_backward_no_step(block, r, b, unit, back);
      return;
    }
    block.write(p.grad_projected, block.in_rows(r.row, state_size, unit), back + given[slot].outer);
  });
}

}  // namespace rnnfast::gpu

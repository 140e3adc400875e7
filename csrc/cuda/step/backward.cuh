// Backward: product and cell in one launch.
#pragma once

#include "gradients.cuh"

namespace rnnfast::gpu {

// Where a row is no step: gradients go on to hx and cx, or through a sequence without any; and zeros for the row.
// back: what has come back to h_{t-1}, carry: and to c_{t-1}.
template <class Constants, class Block>
RNNFAST_DEVICE void backward_no_step(const Block& block, const RowTurn& r, int64_t b, int64_t unit,
                                     typename Block::Compute back, typename Block::Compute carry) {
  const StepBackward& p = block.p;
  constexpr int kGates = Constants::kGates;
  const int64_t H = p.hidden_size, state_at = block.in_state(b, H, unit);
  if (r.has_left()) {
    if (!p.projected) block.write(p.grad_hx, state_at, back);
    if constexpr (Constants::kHasCell) block.write(p.grad_cx, state_at, carry);
  } else if (r.empty() && is_last_turn(p.rows, block.d)) {
    if (!p.projected) block.write(p.grad_hx, state_at, block.read(p.grad_h_n, state_at));
    if constexpr (Constants::kHasCell) block.write(p.grad_cx, state_at, block.read(p.grad_c_n, state_at));
  }
  if (!r.in_memory()) return;
  RNNFAST_UNROLL
  for (int g = 0; g < kGates; ++g) {
    const int64_t gate_at = block.in_rows(r.row, kGates * H, g * H + unit);
    block.write(p.grad_gates, gate_at, 0);
    if constexpr (Constants::kSplitGradient) block.write(p.grad_gates_hh, gate_at, 0);
  }
}

// weight: W_hh^T (H, G*H), or with projection W_hr^T (H, P) and the gradient of h_t comes from step_project_backward.
template <Family kFamily, class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((UnitProduct<Type, kBatchTiles>::kThreads),
                                     2) void step_backward(RNNFAST_GRID_CONSTANT const StepBackward p) {
  using Compute = typename Type::Compute;
  using Storage = typename Type::Storage;
  using Constants = typename FamilyCell<kFamily>::Constants;
  using Product = UnitProduct<Type, kBatchTiles>;
  constexpr int kGates = Constants::kGates;
  allow_next_grid();
  const Block<Type, StepBackward, Product::kBatch> block(p);
  const int64_t H = p.hidden_size;

  // Of each element what the cell needs: all that forward saved and the gradients from outside before the wait, what
  // the later step handed back right after it.
  struct Given {
    RowTurn r;
    Compute reserve[Constants::kReserve ? Constants::kReserve : 1];
    UnitState<Compute> previous, now;
    Compute dh, dc, carry;
  };
  const auto product_state = [&](const RowTurn& r) -> const Storage* {
    if (!p.projected) return later_gradient<kGates>(block, r);
    const void* projected = p.grad_projected;
    return r.active() ? at<Storage>(projected, block.in_rows(r.row, p.state_size, 0)) : nullptr;
  };
  Given given[kSlots<Product>];
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    Given& own = given[slot];
    own = Given{};
    own.r = block.row_turn(n);
    const RowTurn& r = own.r;
    if (!r.active() || unit >= H) return;
    const int64_t state_at = block.in_state(b, H, unit);
    RNNFAST_UNROLL
    for (int i = 0; i < Constants::kReserve; ++i)
      own.reserve[i] = block.read(p.reserve, block.in_rows(r.row, Constants::kReserve * H, i * H + unit));
    const auto before = [&](const void* rows, const void* initial) {
      if (r.cut_before()) return Compute(0);
      return r.before() ? block.read(rows, block.in_rows(r.before_row, H, unit)) : block.read(initial, state_at);
    };
    if constexpr (Constants::kHasCell) {
      own.now.c = block.read(p.cell_states, block.in_rows(r.row, H, unit));
      own.previous.c = before(p.cell_states, p.cx);
      own.dc = block.read(p.grad_cell_states, block.in_rows(r.row, H, unit));
      if (!r.after()) own.dc += block.read(p.grad_c_n, state_at);
    }
    if constexpr (Constants::kNeedsPreviousH) own.previous.h = before(p.output, p.hx);
    if constexpr (Constants::kReserve == 0) own.now.h = block.read(p.output, block.in_rows(r.row, H, unit));
    if (!p.projected) own.dh = outer_gradient(block, r, b, unit);
  });

  const auto load_written = [&] {
    if constexpr (Constants::kCarries) {
      for_elements<Product>([&](int slot, int n, int u) {
        const int64_t b = block.first_b + n, unit = block.first_unit + u;
        if (given[slot].r.is_followed() && unit < H)
          given[slot].carry = *at<Compute>(p.carry, block.in_state(b, H, unit));
      });
    }
  };

  // ---- product ----
  const bool multiplied = multiply<Product>(
      block, p.projected ? p.state_size : kGates * H, [&](int i) { return block.weight_row(block.first_unit + i, H); },
      [&](int n) { return product_state(block.row_turn(n)); }, load_written);

  // ---- cell ----
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    const Given& own = given[slot];
    const RowTurn& r = own.r;
    if (!r.in_batch() || unit >= H) return;
    Compute carry = own.carry, dh = own.dh;
    if (multiplied && (p.projected ? r.active() : r.is_followed())) dh += Product::at(u, n);
    if constexpr (!Constants::kHasCell) dh += carry;
    if (!r.active()) {
      backward_no_step<Constants>(block, r, b, unit, dh, carry);
      return;
    }
    Compute dgates[kGates], d_rec_split = 0;
    if constexpr (Constants::kHasCell) carry += own.dc;
    const UnitGradients<Compute> at_step{own.reserve, own.previous, own.now, dh};
    FamilyCell<kFamily>::template backward<ScalarMath<Compute>>(p.mode, at_step, carry, dgates, d_rec_split);
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t gate_at = block.in_rows(r.row, kGates * H, g * H + unit);
      block.write(p.grad_gates, gate_at, dgates[g]);
      if constexpr (Constants::kSplitGradient)
        block.write(p.grad_gates_hh, gate_at, g == Constants::kSplitGate ? d_rec_split : dgates[g]);
    }
    if constexpr (Constants::kCarries) *at<Compute>(p.carry, block.in_state(b, H, unit)) = carry;
  });
}

}  // namespace rnnfast::gpu

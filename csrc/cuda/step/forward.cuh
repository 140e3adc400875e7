// Forward: product and cell in one launch.
#pragma once

#include "block.cuh"

namespace rnnfast::gpu {

// A tile for each gate. Warps: as kUsualWarps says; with a large batch there are many partial sums a warp.
template <Family kFamily, class Type, int kBatchTiles>
using ForwardProduct = BlockProduct<Type, FamilyCell<kFamily>::Constants::kGates, kBatchTiles,
                                    kBatchTiles == 1 && sizeof(typename Type::Compute) == 4 ? kUsualWarps : 4>;

// Whether a row's h_{t-1} may be anything but zero.
template <class Block> RNNFAST_DEVICE bool has_previous_h(const Block& block, const RowTurn& r) {
  return r.active() && !r.cut_before() && (r.before() || block.p.hx);
}

// h_{t-1} as it lies in memory; null where it is zero.
template <class Block>
RNNFAST_DEVICE const typename Block::Storage* previous_h(const Block& block, const RowTurn& r, int64_t b) {
  using Storage = typename Block::Storage;
  const StepForward& p = block.p;
  if (!has_previous_h(block, r)) return nullptr;
  const void* output = p.output;
  return r.before() ? at<Storage>(output, block.in_rows(r.before_row, p.state_size, 0))
                    : at<Storage>(p.hx, block.in_state(b, p.state_size, 0));
}

// Where a row is no step: what a sequence without any hands through, and zeros for the row.
template <class Constants, class Block>
RNNFAST_DEVICE void forward_no_step(const Block& block, const RowTurn& r, int64_t b, int64_t unit) {
  const StepForward& p = block.p;
  const int64_t H = p.hidden_size, state_at = block.in_state(b, H, unit), row_at = block.in_rows(r.row, H, unit);
  if (r.empty() && is_first_turn(p.rows, block.d)) {
    if (!p.projected) block.write(p.h_n, state_at, block.read(p.hx, state_at));
    block.write(p.c_n, state_at, block.read(p.cx, state_at));
  }
  if (!r.in_memory()) return;
  if (!p.projected) block.write(p.output, row_at, 0);
  block.write(p.cell_states, row_at, 0);
  for (int i = 0; i < Constants::kReserve; ++i)
    block.write(p.reserve, block.in_rows(r.row, Constants::kReserve * H, i * H + unit), 0);
}

// weight: W_hh (G*H, P or H).
template <Family kFamily, class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((ForwardProduct<kFamily, Type, kBatchTiles>::kThreads),
                                     2) void step_forward(RNNFAST_GRID_CONSTANT const StepForward p) {
  using Compute = typename Type::Compute;
  using Constants = typename FamilyCell<kFamily>::Constants;
  using Product = ForwardProduct<kFamily, Type, kBatchTiles>;
  constexpr int kGates = Constants::kGates;
  static_assert(Product::kWeights == kGates * kUnits, "ForwardProduct must have kGates weight tiles: gate g is tile g");
  allow_next_grid();
  const Block<Type, StepForward, Product::kBatch> block(p);
  const int64_t H = p.hidden_size;

  // Of each element what the cell needs. All of it is on its way before the product begins: what no launch of the call
  // writes before the wait, the state that the step before wrote right after it.
  struct Given {
    RowTurn r;
    Compute x[kGates]{}, bias = 0;
    UnitState<Compute> previous{0, 0};
  };
  Given given[kSlots<Product>];
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    Given& own = given[slot];
    own.r = block.row_turn(n);
    if (!own.r.active() || unit >= H) return;
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) own.x[g] = block.read(p.gates, block.in_rows(own.r.row, kGates * H, g * H + unit));
    if constexpr (Constants::kSplitGradient) own.bias = block.read(p.bias_split[block.d], unit);
    if constexpr (Constants::kHasCell) {
      if (!own.r.before() && !own.r.cut_before()) own.previous.c = block.read(p.cx, block.in_state(b, H, unit));
    }
  });
  const auto load_written = [&] {
    for_elements<Product>([&](int slot, int n, int u) {
      const int64_t b = block.first_b + n, unit = block.first_unit + u;
      Given& own = given[slot];
      if (!own.r.active() || unit >= H) return;
      if constexpr (Constants::kNeedsPreviousH) own.previous.h = block.read(previous_h(block, own.r, b), unit);
      if constexpr (Constants::kHasCell) {
        if (own.r.follows()) own.previous.c = *at<Compute>(p.carry, block.in_state(b, H, unit));
      }
    });
  };

  // ---- product ----
  const auto weight_row = [&](int i) {
    const int64_t unit = block.first_unit + i % kUnits;
    return block.weight_row(unit < H ? i / kUnits * H + unit : 0, kGates * H);
  };
  const auto state = [&](int n) { return previous_h(block, block.row_turn(n), block.first_b + n); };
  const bool multiplied = multiply<Product>(block, p.state_size, weight_row, state, load_written);

  // ---- cell ----
  for_elements<Product>([&](int slot, int n, int u) {
    const int64_t b = block.first_b + n, unit = block.first_unit + u;
    const Given& own = given[slot];
    const RowTurn& r = own.r;
    if (!r.in_batch() || unit >= H) return;
    if (!r.active()) {
      forward_no_step<Constants>(block, r, b, unit);
      return;
    }
    const bool multiplies = multiplied && has_previous_h(block, r);
    const int64_t state_at = block.in_state(b, H, unit), row_at = block.in_rows(r.row, H, unit);
    Compute rec[kGates];
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) rec[g] = multiplies ? Product::at(g * kUnits + u, n) : Compute(0);
    if constexpr (Constants::kSplitGradient) rec[Constants::kSplitGate] += own.bias;
    Compute reserve[Constants::kReserve ? Constants::kReserve : 1];
    const UnitState<Compute> now = FamilyCell<kFamily>::template forward<ScalarMath<Compute>>(
        p.mode, UnitInputs<Compute>{own.x, rec}, own.previous, reserve);
    if (p.projected) {
      block.write(p.hidden, state_at, now.h);
    } else {
      block.write(p.output, row_at, now.h);
      if (!r.after()) block.write(p.h_n, state_at, now.h);
    }
    if constexpr (Constants::kHasCell) {
      *at<Compute>(p.carry, state_at) = now.c;
      block.write(p.cell_states, row_at, now.c);
      if (!r.after()) block.write(p.c_n, state_at, now.c);
    }
    if (p.reserve) {
      RNNFAST_UNROLL
      for (int i = 0; i < Constants::kReserve; ++i)
        block.write(p.reserve, block.in_rows(r.row, Constants::kReserve * H, i * H + unit), reserve[i]);
    }
  });
}

}  // namespace rnnfast::gpu

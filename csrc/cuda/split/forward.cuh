// Forward: the cell of a row, after the product of all rows; and the projected h_t, after that of W_hr.
#pragma once

#include "../step/forward.cuh"
#include "../step/projected_rows.cuh"
#include "row.cuh"

namespace rnnfast::gpu {

template <Family kFamily, class Type, int kWidth>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads, 2) void split_forward(RNNFAST_GRID_CONSTANT const SplitForward p) {
  using Compute = typename Type::Compute;
  using Constants = typename FamilyCell<kFamily>::Constants;
  constexpr int kGates = Constants::kGates, kReserve = Constants::kReserve;
  using OwnRow = Row<Type, SplitForward, kWidth>;
  const OwnRow row(p);
  const RowTurn& r = row.turn;
  const int64_t H = p.hidden_size, b = row.b;

  Compute x[kGates][kWidth] = {}, bias_split[kWidth] = {};
  const auto read_given = [&](int64_t unit) {
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) row.read(p.gates, row.in_rows(r.row, kGates * H, g * H + unit), x[g]);
    if constexpr (Constants::kSplitGradient) row.read(p.bias_split[row.d], unit, bias_split);
  };
  int64_t unit = row.first_unit();
  if (r.active() && unit < H) read_given(unit);
  wait_for_previous_grid();
  if (!r.active()) {
    row.for_units(H, [&](int64_t each) { forward_no_step<Constants>(row, r, b, each); });
    return;
  }

  const bool multiplied = has_previous_h(row, r);
  const PlainSums<OwnRow> sums(multiplied ? p.sums : nullptr, row.in_state(b, kGates * H, 0));
  while (unit < H) {
    const int64_t state_at = row.in_state(b, H, unit), row_at = row.in_rows(r.row, H, unit);
    Compute rec[kGates][kWidth], previous_c[kWidth] = {}, previous[kWidth] = {};
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) sums.read(g * H + unit, rec[g]);
    if constexpr (Constants::kNeedsPreviousH) row.read(multiplied ? p.states : nullptr, state_at, previous);
    if constexpr (Constants::kHasCell) {
      if (r.before() && !r.cut_before())
        row.read_compute(p.carry, state_at, previous_c);
      else
        row.read(r.cut_before() ? nullptr : p.cx, state_at, previous_c);
    }
    Compute h[kWidth], c[kWidth], reserve[kReserve ? kReserve : 1][kWidth];
    RNNFAST_UNROLL
    for (int v = 0; v < kWidth; ++v) {
      Compute x_of_unit[kGates], rec_of_unit[kGates], reserve_of_unit[kReserve ? kReserve : 1];
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g) {
        x_of_unit[g] = x[g][v];
        rec_of_unit[g] = rec[g][v];
      }
      if constexpr (Constants::kSplitGradient) rec_of_unit[Constants::kSplitGate] += bias_split[v];
      const UnitState<Compute> now = FamilyCell<kFamily>::template forward<SplitMath<Type>>(
          p.mode, UnitInputs<Compute>{x_of_unit, rec_of_unit}, UnitState<Compute>{previous[v], previous_c[v]},
          reserve_of_unit);
      h[v] = now.h;
      c[v] = now.c;
      RNNFAST_UNROLL
      for (int i = 0; i < kReserve; ++i) reserve[i][v] = reserve_of_unit[i];
    }
    if (p.projected) {
      row.write(p.hidden, state_at, h);
    } else {
      row.write(p.states, state_at, h);
      row.write(p.output, row_at, h);
      if (!r.after()) row.write(p.h_n, state_at, h);
    }
    if constexpr (Constants::kHasCell) {
      row.write_compute(p.carry, state_at, c);
      row.write(p.cell_states, row_at, c);
      if (!r.after()) row.write(p.c_n, state_at, c);
    }
    RNNFAST_UNROLL
    for (int i = 0; i < kReserve; ++i) row.write(p.reserve, row.in_rows(r.row, kReserve * H, i * H + unit), reserve[i]);
    unit += row.unit_stride();
    if (unit < H) read_given(unit);
  }
}

// h_t from W_hr (o tanh(c)).
template <class Type, int kWidth>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void split_project_forward(RNNFAST_GRID_CONSTANT const SplitForward p) {
  using OwnRow = Row<Type, SplitForward, kWidth>;
  const OwnRow row(p);
  const RowTurn& r = row.turn;
  const int64_t width = p.state_size, b = row.b;
  wait_for_previous_grid();
  if (!r.active()) {
    row.for_units(width, [&](int64_t unit) { projected_no_step(row, r, b, unit); });
    return;
  }
  for (int64_t unit = row.first_unit(); unit < width; unit += row.unit_stride()) {
    const int64_t state_at = row.in_state(b, width, unit);
    typename OwnRow::Values h;
    row.read_compute(p.sums, state_at, h);
    row.write(p.states, state_at, h);
    row.write(p.output, row.in_rows(r.row, width, unit), h);
    if (!r.after()) row.write(p.h_n, state_at, h);
  }
}

}  // namespace rnnfast::gpu

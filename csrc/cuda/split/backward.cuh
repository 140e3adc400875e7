// Backward: the cell of a row, after the product that brings the later step's gradients back; and what reaches a
// projected h_t, before the product with W_hr.
#pragma once

#include "../step/backward.cuh"
#include "../step/projected_rows.cuh"
#include "row.cuh"

namespace rnnfast::gpu {

// What reaches h_t beside the product.
template <class Row> RNNFAST_DEVICE void read_outer_gradient(const Row& row, int64_t unit, typename Row::Values& dh) {
  const auto& p = row.p;
  row.read(p.grad_output, row.in_rows(row.turn.row, p.state_size, unit), dh);
  if (row.turn.after()) return;
  typename Row::Values last;
  row.read(p.grad_h_n, row.in_state(row.b, p.state_size, unit), last);
  RNNFAST_UNROLL
  for (int v = 0; v < Row::kWidth; ++v) dh[v] += last[v];
}

template <Family kFamily, class Type, int kWidth>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads, 2) void split_backward(RNNFAST_GRID_CONSTANT const SplitBackward p) {
  using Compute = typename Type::Compute;
  using Constants = typename FamilyCell<kFamily>::Constants;
  constexpr int kGates = Constants::kGates, kReserve = Constants::kReserve;
  using OwnRow = Row<Type, SplitBackward, kWidth>;
  const OwnRow row(p);
  const RowTurn& r = row.turn;
  const int64_t H = p.hidden_size, b = row.b;

  // All that forward saved and the gradients from outside.
  Compute reserve[kReserve ? kReserve : 1][kWidth] = {}, dh[kWidth] = {}, dc[kWidth] = {};
  Compute previous_h[kWidth] = {}, previous_c[kWidth] = {}, now_h[kWidth] = {}, now_c[kWidth] = {};
  const auto read_given = [&](int64_t unit) {
    const int64_t state_at = row.in_state(b, H, unit), row_at = row.in_rows(r.row, H, unit);
    RNNFAST_UNROLL
    for (int i = 0; i < kReserve; ++i) row.read(p.reserve, row.in_rows(r.row, kReserve * H, i * H + unit), reserve[i]);
    const auto read_before = [&](const void* rows, const void* initial, Compute(&values)[kWidth]) {
      if (r.cut_before())
        row.read(nullptr, 0, values);
      else if (r.before())
        row.read(rows, row.in_rows(r.before_row, H, unit), values);
      else
        row.read(initial, state_at, values);
    };
    if constexpr (Constants::kHasCell) {
      row.read(p.cell_states, row_at, now_c);
      read_before(p.cell_states, p.cx, previous_c);
      Compute last[kWidth];
      row.read(p.grad_cell_states, row_at, dc);
      row.read(r.after() ? nullptr : p.grad_c_n, state_at, last);
      RNNFAST_UNROLL
      for (int v = 0; v < kWidth; ++v) dc[v] += last[v];
    }
    if constexpr (Constants::kNeedsPreviousH) read_before(p.output, p.hx, previous_h);
    if constexpr (kReserve == 0) row.read(p.output, row_at, now_h);
    if (!p.projected) read_outer_gradient(row, unit, dh);
  };
  int64_t unit = row.first_unit();
  if (r.active() && unit < H) read_given(unit);
  wait_for_previous_grid();
  if (!r.active()) {
    row.for_units(H, [&](int64_t each) {
      const int64_t state_at = row.in_state(b, H, each);
      Compute carry = 0, back = 0;
      if (r.is_followed()) {
        if constexpr (Constants::kCarries) carry = *at<Compute>(p.carry, state_at);
        if (!p.projected) back = *at<Compute>(p.sums, state_at);
        if constexpr (!Constants::kHasCell) back += carry;
      }
      backward_no_step<Constants>(row, r, b, each, back, carry);
    });
    return;
  }

  const PlainSums<OwnRow> sums(p.projected || r.is_followed() ? p.sums : nullptr, row.in_state(b, H, 0));
  while (unit < H) {
    const int64_t state_at = row.in_state(b, H, unit);
    Compute back[kWidth], carry[kWidth] = {};
    sums.read(unit, back);
    if constexpr (Constants::kCarries) row.read_compute(r.is_followed() ? p.carry : nullptr, state_at, carry);
    Compute dgates[kGates][kWidth], d_rec_split[kWidth];
    RNNFAST_UNROLL
    for (int v = 0; v < kWidth; ++v) {
      Compute reserve_of_unit[kReserve ? kReserve : 1] = {}, of_unit[kGates], split = 0;
      RNNFAST_UNROLL
      for (int i = 0; i < kReserve; ++i) reserve_of_unit[i] = reserve[i][v];
      const Compute all = dh[v] + back[v] + (Constants::kHasCell ? Compute(0) : carry[v]);
      if constexpr (Constants::kHasCell) carry[v] += dc[v];
      const UnitGradients<Compute> at_step{reserve_of_unit, {previous_h[v], previous_c[v]}, {now_h[v], now_c[v]}, all};
      FamilyCell<kFamily>::template backward<SplitMath<Type>>(p.mode, at_step, carry[v], of_unit, split);
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g) dgates[g][v] = of_unit[g];
      d_rec_split[v] = split;
    }
    RNNFAST_UNROLL
    for (int g = 0; g < kGates; ++g) {
      const int64_t gate_at = row.in_rows(r.row, kGates * H, g * H + unit);
      const auto& recurrent = g == Constants::kSplitGate ? d_rec_split : dgates[g];
      row.write(p.grad_gates, gate_at, dgates[g]);
      if constexpr (Constants::kSplitGradient) row.write(p.grad_gates_hh, gate_at, recurrent);
      row.write(p.gate_gradients, row.in_state(b, kGates * H, g * H + unit), recurrent);
    }
    if constexpr (Constants::kCarries) row.write_compute(p.carry, state_at, carry);
    unit += row.unit_stride();
    if (unit < H) read_given(unit);
  }
}

// The gradient of a projected h_t (and of hx).
template <class Type, int kWidth>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void split_project_backward(RNNFAST_GRID_CONSTANT const SplitBackward p) {
  using OwnRow = Row<Type, SplitBackward, kWidth>;
  const OwnRow row(p);
  const RowTurn& r = row.turn;
  const int64_t width = p.state_size, b = row.b;
  wait_for_previous_grid();
  if (!r.active()) {
    row.for_units(width, [&](int64_t unit) {
      const auto back = r.is_followed() ? *at<typename Type::Compute>(p.sums, row.in_state(b, width, unit)) : 0;
      projected_backward_no_step(row, r, b, unit, back);
    });
    return;
  }
  for (int64_t unit = row.first_unit(); unit < width; unit += row.unit_stride()) {
    const int64_t state_at = row.in_state(b, width, unit);
    typename OwnRow::Values dh, back;
    read_outer_gradient(row, unit, dh);
    row.read_compute(r.is_followed() ? p.sums : nullptr, state_at, back);
    RNNFAST_UNROLL
    for (int v = 0; v < kWidth; ++v) dh[v] += back[v];
    row.write(p.grad_projected, row.in_rows(r.row, width, unit), dh);
    row.write(p.state_gradients, state_at, dh);
  }
}

}  // namespace rnnfast::gpu

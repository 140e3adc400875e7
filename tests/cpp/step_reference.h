// A layer's time loop in float64, row by row, straight from its definition (docs/design.md): the truth for test_step
// and test_persistent. It shares the cells' equations (csrc/cells.h, checked by cell_truth.h) and nothing else with the
// kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cells.h"
#include "device_array.h"

namespace rnnfast::test {

using Values = std::vector<double>;

struct Shape {
  Mode mode = Mode::lstm;
  int64_t T = 4, B = 3, H = 5, P = 0, D = 1;
  bool batch_first = false, packed = false, lengths = false, resets = false, initial = true;
  bool state_gradients = true;  // of h_n, c_n and the cell states, beside the output's

  const CellTraits& cell() const { return traits(mode); }
  int64_t state() const { return P ? P : H; }
  int64_t gates() const { return cell().gates; }
};

// "LSTM T=3 B=3 H=5 D=2 lengths resets".
inline std::string text_of(const Shape& shape) {
  std::string text = shape.cell().name;
  const auto size = [&](const char* name, int64_t value) {
    text += std::string(" ") + name + "=" + std::to_string(value);
  };
  size("T", shape.T);
  size("B", shape.B);
  size("H", shape.H);
  if (shape.P) size("P", shape.P);
  size("D", shape.D);
  if (shape.batch_first) text += " batch_first";
  if (shape.packed) text += " packed";
  if (shape.lengths) text += " lengths";
  if (shape.resets) text += " resets";
  if (!shape.initial) text += " no initial state";
  if (!shape.state_gradients) text += " no gradients of states";
  return text;
}

// A random call: what goes in, and room for what comes out, all as float64.
struct Call {
  Shape shape;
  std::vector<int64_t> batch_sizes, offsets;
  Array<int64_t> lengths;
  Array<char> resets;  // bool by row
  int64_t row_count = 0;
  // (rows, D*G*H); by direction (G*H, S), (P, H); (D, G*H); (D, B, S), (D, B, H)
  Values gates, weight_hh, weight_hr, bias_hh, hx, cx;
  Values output, h_n, c_n, cell_states, reserve;
  Values grad_output, grad_h_n, grad_c_n, grad_cell_states;
  Values grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected;

  int64_t row(int64_t t, int64_t b) const {
    if (shape.packed) return offsets[static_cast<size_t>(t)] + b;
    return shape.batch_first ? b * shape.T + t : t * shape.B + b;
  }
  // "step 2, batch 1".
  std::string name_of_row(int64_t number) const {
    for (int64_t t = 0; t < shape.T; ++t)
      for (int64_t b = 0; b < (shape.packed ? batch_sizes[static_cast<size_t>(t)] : shape.B); ++b)
        if (row(t, b) == number) return "step " + std::to_string(t) + ", batch " + std::to_string(b);
    return "no row";
  }
  int64_t length(int64_t b) const {
    if (shape.lengths) return lengths[static_cast<size_t>(b)];
    if (!shape.packed) return shape.T;
    int64_t count = 0;
    while (count < shape.T && b < batch_sizes[static_cast<size_t>(count)]) ++count;
    return count;
  }
};

inline Values random_values(std::mt19937_64& random, int64_t count, double bound) {
  std::uniform_real_distribution<double> uniform(-bound, bound);
  Values values(static_cast<size_t>(count));
  for (double& value : values) value = uniform(random);
  return values;
}

inline Call random_call(const Shape& shape, uint64_t seed) {
  std::mt19937_64 random(seed);
  Call call;
  call.shape = shape;
  const int64_t T = shape.T, B = shape.B, H = shape.H, S = shape.state(), D = shape.D, G = shape.gates();
  const auto whole = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  call.row_count = T * B;
  if (shape.packed) {
    call.row_count = 0;
    int64_t active = B;
    for (int64_t t = 0; t < T; ++t) {
      if (t) active = whole(1, active);
      call.offsets.push_back(call.row_count);
      call.batch_sizes.push_back(active);
      call.row_count += active;
    }
  }
  // The first row has no step at all, the last has all of them.
  for (int64_t b = 0; b < B && shape.lengths; ++b) call.lengths.push_back(b == B - 1 ? T : b == 0 ? 0 : whole(0, T));
  for (int64_t i = 0; i < call.row_count && shape.resets; ++i) call.resets.push_back(whole(0, 3) == 0);
  const double bound = 1 / std::sqrt(static_cast<double>(H));
  const int64_t rows = call.row_count;
  call.gates = random_values(random, rows * D * G * H, 1.5);
  call.weight_hh = random_values(random, D * G * H * S, bound);
  call.weight_hr = random_values(random, D * shape.P * H, bound);
  if (shape.cell().split_gate != kNoGate) call.bias_hh = random_values(random, D * G * H, bound);
  if (shape.initial) call.hx = random_values(random, D * B * S, 1);
  if (shape.initial && shape.cell().has_cell_state) call.cx = random_values(random, D * B * H, 1);
  call.grad_output = random_values(random, rows * D * S, 0.5);
  if (shape.state_gradients) call.grad_h_n = random_values(random, D * B * S, 0.5);
  if (shape.state_gradients && shape.cell().has_cell_state) {
    call.grad_c_n = random_values(random, D * B * H, 0.5);
    call.grad_cell_states = random_values(random, rows * D * H, 0.5);
  }
  return call;
}

inline double at_or_zero(const Values& values, size_t index) { return values.empty() ? 0 : values[index]; }

// One batch row of one direction: its steps in order, and the indices of its elements.
struct RowWalk {
  const Call& call;
  int64_t d, b;

  int64_t steps() const { return call.length(b); }
  int64_t time(int64_t step) const { return d == 1 ? steps() - 1 - step : step; }
  int64_t row(int64_t step) const { return call.row(time(step), b); }
  // Whether the state is dropped before this step.
  bool cut_before(int64_t step) const {
    if (call.resets.empty()) return false;
    if (d == 1) return step > 0 && call.resets[static_cast<size_t>(call.row(time(step) + 1, b))];
    return call.resets[static_cast<size_t>(row(step))];
  }
  size_t in_rows(int64_t step, int64_t width, int64_t u) const {
    return static_cast<size_t>((row(step) * call.shape.D + d) * width + u);
  }
  size_t in_state(int64_t width, int64_t u) const { return static_cast<size_t>((d * call.shape.B + b) * width + u); }
};

template <class Cell> constexpr int kReserveRoom = Cell::kReserve ? Cell::kReserve : 1;

template <class Cell> void reference_row_forward(Call& call, const RowWalk& walk) {
  const Shape& s = call.shape;
  const int64_t H = s.H, S = s.state();
  Values h(static_cast<size_t>(S)), c(static_cast<size_t>(H)), hidden(static_cast<size_t>(H));
  for (int64_t u = 0; u < S; ++u) h[static_cast<size_t>(u)] = at_or_zero(call.hx, walk.in_state(S, u));
  for (int64_t u = 0; u < H; ++u) c[static_cast<size_t>(u)] = at_or_zero(call.cx, walk.in_state(H, u));
  for (int64_t step = 0; step < walk.steps(); ++step) {
    if (walk.cut_before(step)) {
      h.assign(h.size(), 0);
      c.assign(c.size(), 0);
    }
    for (int64_t u = 0; u < H; ++u) {
      double x[Cell::kGates], rec[Cell::kGates], reserve[kReserveRoom<Cell>];
      for (int g = 0; g < Cell::kGates; ++g) {
        x[g] = call.gates[walk.in_rows(step, s.gates() * H, g * H + u)];
        rec[g] = 0;
        for (int64_t k = 0; k < S; ++k)
          rec[g] += call.weight_hh[static_cast<size_t>(((walk.d * s.gates() + g) * H + u) * S + k)] *
                    h[static_cast<size_t>(k)];
      }
      if constexpr (Cell::kSplitGradient) {
        constexpr int kGate = Cell::kSplitGate;
        rec[kGate] += at_or_zero(call.bias_hh, static_cast<size_t>((walk.d * s.gates() + kGate) * H + u));
      }
      const auto unit = static_cast<size_t>(u);
      const double previous_h = s.P ? 0 : h[unit];
      const auto now = Cell::forward({x, rec}, {previous_h, c[unit]}, reserve);
      hidden[unit] = now.h;
      c[unit] = now.c;
      if (Cell::kHasCell) call.cell_states[walk.in_rows(step, H, u)] = now.c;
      for (int i = 0; i < Cell::kReserve; ++i)
        call.reserve[walk.in_rows(step, Cell::kReserve * H, i * H + u)] = reserve[i];
    }
    h = hidden;
    if (s.P) {
      h.assign(static_cast<size_t>(S), 0);
      for (int64_t u = 0; u < S; ++u)
        for (int64_t k = 0; k < H; ++k)
          h[static_cast<size_t>(u)] +=
              call.weight_hr[static_cast<size_t>((walk.d * S + u) * H + k)] * hidden[static_cast<size_t>(k)];
    }
    for (int64_t u = 0; u < S; ++u) call.output[walk.in_rows(step, S, u)] = h[static_cast<size_t>(u)];
  }
  for (int64_t u = 0; u < S; ++u) call.h_n[walk.in_state(S, u)] = h[static_cast<size_t>(u)];
  for (int64_t u = 0; u < H && Cell::kHasCell; ++u) call.c_n[walk.in_state(H, u)] = c[static_cast<size_t>(u)];
}

template <class Cell> void reference_row_backward(Call& call, const RowWalk& walk) {
  const Shape& s = call.shape;
  const int64_t H = s.H, S = s.state(), G = s.gates();
  Values dh(static_cast<size_t>(S)), carry(static_cast<size_t>(H));
  for (int64_t u = 0; u < S; ++u) dh[static_cast<size_t>(u)] = at_or_zero(call.grad_h_n, walk.in_state(S, u));
  for (int64_t u = 0; u < H && Cell::kHasCell; ++u)
    carry[static_cast<size_t>(u)] = at_or_zero(call.grad_c_n, walk.in_state(H, u));
  for (int64_t step = walk.steps() - 1; step >= 0; --step) {
    const bool cut = walk.cut_before(step);
    for (int64_t u = 0; u < S; ++u) {
      dh[static_cast<size_t>(u)] += call.grad_output[walk.in_rows(step, S, u)];
      if (s.P) call.grad_projected[walk.in_rows(step, S, u)] = dh[static_cast<size_t>(u)];
    }
    Values earlier(static_cast<size_t>(S));
    for (int64_t u = 0; u < H; ++u) {
      const auto unit = static_cast<size_t>(u);
      double hidden_gradient = s.P ? 0 : dh[unit];
      for (int64_t k = 0; k < s.P; ++k)
        hidden_gradient += call.weight_hr[static_cast<size_t>((walk.d * S + k) * H + u)] * dh[static_cast<size_t>(k)];
      const auto before = [&](const Values& rows, const Values& initial) {
        if (cut) return 0.0;
        if (step == 0) return at_or_zero(initial, walk.in_state(H, u));
        return rows[walk.in_rows(step - 1, H, u)];
      };
      UnitState<double> previous{0, 0}, now{0, 0};
      if (!s.P) {
        previous.h = before(call.output, call.hx);
        now.h = call.output[walk.in_rows(step, H, u)];
      }
      if (Cell::kHasCell) {
        previous.c = before(call.cell_states, call.cx);
        now.c = call.cell_states[walk.in_rows(step, H, u)];
        carry[unit] += at_or_zero(call.grad_cell_states, walk.in_rows(step, H, u));
      }
      double reserve[kReserveRoom<Cell>], dgates[Cell::kGates], d_rec_split = 0;
      for (int i = 0; i < Cell::kReserve; ++i)
        reserve[i] = call.reserve[walk.in_rows(step, Cell::kReserve * H, i * H + u)];
      Cell::backward({reserve, previous, now, hidden_gradient}, carry[unit], dgates, d_rec_split);
      for (int64_t g = 0; g < G; ++g) {
        const size_t at = walk.in_rows(step, G * H, g * H + u);
        const double through_hh = g == Cell::kSplitGate ? d_rec_split : dgates[g];
        call.grad_gates[at] = dgates[g];
        if (Cell::kSplitGradient) call.grad_gates_hh[at] = through_hh;
        for (int64_t k = 0; k < S; ++k)
          earlier[static_cast<size_t>(k)] +=
              call.weight_hh[static_cast<size_t>(((walk.d * G + g) * H + u) * S + k)] * through_hh;
      }
      if (Cell::kNeedsPreviousH) earlier[unit] += carry[unit];
    }
    dh = cut ? Values(dh.size()) : earlier;
    if (cut) carry.assign(carry.size(), 0);
  }
  for (int64_t u = 0; u < S && !call.grad_hx.empty(); ++u)
    call.grad_hx[walk.in_state(S, u)] = dh[static_cast<size_t>(u)];
  for (int64_t u = 0; u < H && !call.grad_cx.empty(); ++u)
    call.grad_cx[walk.in_state(H, u)] = carry[static_cast<size_t>(u)];
}

// Fills in the results and, from them, the gradients. Rows beyond their length stay zero.
template <class Cell> void run_reference(Call& call) {
  const Shape& s = call.shape;
  const int64_t H = s.H, S = s.state(), rows = call.row_count * s.D, states = s.D * s.B;
  const auto zeros = [](int64_t count) { return Values(static_cast<size_t>(count)); };
  call.output = zeros(rows * S);
  call.h_n = zeros(states * S);
  if (Cell::kHasCell) call.c_n = zeros(states * H);
  if (Cell::kHasCell) call.cell_states = zeros(rows * H);
  call.reserve = zeros(rows * Cell::kReserve * H);
  call.grad_gates = zeros(rows * s.gates() * H);
  if (Cell::kSplitGradient) call.grad_gates_hh = call.grad_gates;
  call.grad_hx = zeros(static_cast<int64_t>(call.hx.size()));
  call.grad_cx = zeros(static_cast<int64_t>(call.cx.size()));
  if (s.P) call.grad_projected = zeros(rows * S);
  for (int64_t d = 0; d < s.D; ++d)
    for (int64_t b = 0; b < s.B; ++b) {
      reference_row_forward<Cell>(call, {call, d, b});
      reference_row_backward<Cell>(call, {call, d, b});
    }
}

// What cells.h calls.
struct HostMath {
  using Value = double;
  RNNFAST_HOST_DEVICE static double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
  RNNFAST_HOST_DEVICE static double tanh(double x) { return std::tanh(x); }
  RNNFAST_HOST_DEVICE static double relu(double x) { return x > 0 ? x : 0; }
  RNNFAST_HOST_DEVICE static double where_positive(double h, double value) { return h > 0 ? value : 0; }
};

inline void run_reference(Call& call) {
  with_mode(call.shape.mode, [&](auto mode) { run_reference<Cell<HostMath, decltype(mode)::value>>(call); });
}

}  // namespace rnnfast::test

// The cells' equations (csrc/cells.h) against the definitions that papers and torch.nn give, written down a second time
// here on purpose: every other test in C++ counts on cells.h. Derivatives are checked against differences.
#pragma once

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "cells.h"
#include "check.h"
#include "step_reference.h"

namespace rnnfast::test {

// One hidden unit: x and rec as in UnitInputs, h and c of the step before. Gates in torch's order.
struct UnitCase {
  std::vector<double> x, rec;
  double h, c;
};

// LSTM (Hochreiter and Schmidhuber 1997 with forget gate), GRU (Cho et al. 2014 as in torch.nn.GRU), MGU (Zhou et al.
// 2016), Elman's RNN with each function.
inline UnitState<double> cell_truth(Mode mode, const UnitCase& in) {
  const auto sigmoid = [](double a) { return 1 / (1 + std::exp(-a)); };
  const auto sum = [&](size_t gate) { return in.x[gate] + in.rec[gate]; };
  switch (mode) {
    case Mode::lstm: {
      const double c = sigmoid(sum(1)) * in.c + sigmoid(sum(0)) * std::tanh(sum(2));
      return {sigmoid(sum(3)) * std::tanh(c), c};
    }
    case Mode::gru: {
      const double reset = sigmoid(sum(0)), update = sigmoid(sum(1));
      return {(1 - update) * std::tanh(in.x[2] + reset * in.rec[2]) + update * in.h, in.c};
    }
    case Mode::mgu: {
      const double forget = sigmoid(sum(0));
      return {(1 - forget) * in.h + forget * std::tanh(in.x[1] + forget * in.rec[1]), in.c};
    }
    case Mode::rnn_tanh: return {std::tanh(sum(0)), in.c};
    case Mode::rnn_relu: return {std::max(sum(0), 0.0), in.c};
    case Mode::rnn_sigmoid: return {sigmoid(sum(0)), in.c};
    case Mode::rnn_identity: return {sum(0), in.c};
  }
  return {};
}

// The derivative of dh h_t + dc c_t by each input, from differences.
struct UnitDifferences {
  std::vector<double> x, rec;
  double h, c;
};
inline UnitDifferences cell_differences(Mode mode, const UnitCase& at, double dh, double dc) {
  const auto slope = [&](auto&& input_of) {
    constexpr double kStep = 1e-6;
    UnitCase more = at, less = at;
    input_of(more) += kStep;
    input_of(less) -= kStep;
    const UnitState<double> high = cell_truth(mode, more), low = cell_truth(mode, less);
    return (dh * (high.h - low.h) + dc * (high.c - low.c)) / (2 * kStep);
  };
  UnitDifferences result{at.x, at.rec, slope([](UnitCase& in) -> double& { return in.h; }),
                         slope([](UnitCase& in) -> double& { return in.c; })};
  for (size_t g = 0; g < at.x.size(); ++g) {
    result.x[g] = slope([g](UnitCase& in) -> double& { return in.x[g]; });
    result.rec[g] = slope([g](UnitCase& in) -> double& { return in.rec[g]; });
  }
  return result;
}

template <class Cell> void check_cell_equations(Mode mode) {
  std::mt19937_64 random(0);
  std::uniform_real_distribution<double> uniform(-2, 2);
  const auto close = [&](const std::string& what, double actual, double expected, double tolerance) {
    CHECK_MESSAGE(std::abs(actual - expected) <= tolerance,
                  what + " is " + std::to_string(actual) + ", by definition " + std::to_string(expected));
  };
  const auto of_gate = [](const char* what, int g) { return what + std::string(" of gate ") + std::to_string(g); };
  for (int number = 0; number < 20; ++number) {
    UnitCase in{std::vector<double>(Cell::kGates), std::vector<double>(Cell::kGates), uniform(random), uniform(random)};
    for (double& value : in.x) value = uniform(random);
    for (double& value : in.rec) value = uniform(random);
    double reserve[kReserveRoom<Cell>], dgates[Cell::kGates], d_rec_split = 0;
    const UnitState<double> previous{in.h, in.c}, expected = cell_truth(mode, in);
    const UnitState<double> now = Cell::forward({in.x.data(), in.rec.data()}, previous, reserve);
    constexpr double kRounding = 1e-14, kDifferences = 1e-8;
    close("h", now.h, expected.h, kRounding);
    close("c", now.c, expected.c, kRounding);
    const double dh = uniform(random), dc = Cell::kHasCell ? uniform(random) : 0;
    double carry = dc;
    Cell::backward({reserve, previous, now, dh}, carry, dgates, d_rec_split);
    const UnitDifferences slopes = cell_differences(mode, in, dh, dc);
    for (int g = 0; g < Cell::kGates; ++g) {
      close(of_gate("the gradient of x", g), dgates[g], slopes.x[static_cast<size_t>(g)], kDifferences);
      const double through_rec = g == Cell::kSplitGate ? d_rec_split : dgates[g];
      close(of_gate("the gradient of W_hh h", g), through_rec, slopes.rec[static_cast<size_t>(g)], kDifferences);
    }
    if (Cell::kHasCell) close("the gradient of c_{t-1}", carry, slopes.c, kDifferences);
    if (Cell::kNeedsPreviousH) close("the gradient of h_{t-1} past the gates", carry, slopes.h, kDifferences);
  }
}

inline void check_cell_equations(Mode mode) {
  const check::Note note("the equations in csrc/cells.h");
  with_mode(mode, [&](auto known) { check_cell_equations<Cell<HostMath, decltype(known)::value>>(mode); });
}

}  // namespace rnnfast::test

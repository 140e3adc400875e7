// The equations of cells with options and their derivatives, of single units: for scalars on the GPU and vectors on the
// CPU, as csrc/cells.h has those of plain cells. What needs a whole row, the sums of norms, stands with each backend
// between them; peepholes, masks and zoneout are added there too. Sources: rnnfast/variants/reference.py.
//
// `Math` is what cells.h calls so, with a type `Scalar` of its numbers and log_sigmoid beside.
#pragma once

#include <cmath>
#include <limits>

#include "../cells.h"

namespace rnnfast {

// The gates' activation, and its derivative from its value.
template <class Math> struct GateActivation {
  using Value = typename Math::Value;
  using Scalar = typename Math::Scalar;
  bool hard;

  RNNFAST_CELL Value operator()(Value x) const {
    if (!hard) return Math::sigmoid(x);
    const Value line = x * Scalar(0.2) + Scalar(0.5), least = line < 0 ? Value{} : line;  // a NaN stays
    return least > 1 ? Value{} + 1 : least;
  }
  RNNFAST_CELL Value slope(Value value) const {
    if (!hard) return value * (1 - value);
    const Value inside = value > 0 ? Value{} + Scalar(0.2) : Value{};
    return value < 1 ? inside : Value{};
  }
};

// c_t = f c_{t-1} + i g; what of it the tanh sees, `seen`, is up to the norm of c; h_t = o tanh(seen).
template <class Math> struct VariantLstm {
  using Value = typename Math::Value;
  bool coupled;  // f = 1 - i
  GateActivation<Math> gate;

  struct Gates {
    Value i, f, g;
  };
  // From their sums; that of f may be anything where they are coupled.
  RNNFAST_CELL Gates gates(Value sum_i, Value sum_f, Value sum_g) const {
    const Value i = gate(sum_i);
    return {i, coupled ? 1 - i : gate(sum_f), Math::tanh(sum_g)};
  }
  // mask: what g is multiplied by.
  RNNFAST_CELL static inline Value cell_state(const Gates& at, Value mask, Value c) {
    return at.f * c + at.i * (at.g * mask);
  }

  struct OutputGradients {
    Value o, seen;  // of the sum of o
  };
  RNNFAST_CELL OutputGradients output_backward(Value o, Value seen, Value dh) const {
    const Value tanh_c = Math::tanh(seen);
    return {dh * tanh_c * gate.slope(o), dh * o * (1 - tanh_c * tanh_c)};
  }

  struct GateGradients {
    Value i, f, g;  // of their sums; with coupled gates that of f is nothing
    Value c;        // of c_{t-1}
  };
  // dc: gradient of cell_state's.
  RNNFAST_CELL GateGradients gates_backward(const Gates& at, Value mask, Value c, Value dc) const {
    const Value dropped = at.g * mask;
    return {dc * (coupled ? dropped - c : dropped) * gate.slope(at.i), dc * c * gate.slope(at.f),
            dc * at.i * mask * (1 - at.g * at.g), dc * at.f};
  }
};

// The sLSTM. c_t / n_t is the mean of c_{t-1} / n_{t-1} and z with weights alpha and 1 - alpha: what the stabiliser is
// for drops out. l is log n_t, as if it had never been divided by exp(m_t). reserve: alpha, sigmoid(f), z, o.
template <class Math> struct ExponentialLstm {
  using Value = typename Math::Value;

  struct State {
    Value h, c, l;
  };
  RNNFAST_CELL static inline State forward(const Value* sums, Value c, Value l, Value* reserve) {
    const Value i = sums[0], f = sums[1], z = Math::tanh(sums[2]), o = Math::sigmoid(sums[3]);
    const Value a = Math::log_sigmoid(f) + l - i, alpha = Math::sigmoid(a);
    c = z + alpha * (c - z);
    reserve[0] = alpha;
    reserve[1] = Math::sigmoid(f);
    reserve[2] = z;
    reserve[3] = o;
    return {o * c, c, i - Math::log_sigmoid(-a)};
  }
  // c: before the step. dc, dl: of c_t and l_t on entry, of those before on return.
  RNNFAST_CELL static inline void backward(const Value* reserve, Value c, Value dh, Value& dc, Value& dl,
                                           Value* dgates) {
    const Value alpha = reserve[0], f = reserve[1], z = reserve[2], o = reserve[3];
    const Value now = z + alpha * (c - z);
    dc += dh * o;
    const Value of_mean = dc * (c - z) * alpha * (1 - alpha), d_a = of_mean + dl * alpha;
    dgates[0] = dl * (1 - alpha) - of_mean;
    dgates[1] = d_a * (1 - f);
    dgates[2] = dc * (1 - alpha) * (1 - z * z);
    dgates[3] = dh * now * o * (1 - o);
    dc = dc * alpha;
    dl = d_a;
  }
};

// n = tanh(x_n + r rec_n), or with relu in place of tanh; h_t = (1 - z) n + z h_{t-1}.
template <class Math> struct VariantGru {
  using Value = typename Math::Value;
  bool relu;
  GateActivation<Math> gate;

  // r: 1 where there is none, or where it was in the product.
  RNNFAST_CELL Value candidate(Value x, Value r, Value rec) const {
    const Value sum = x + r * rec;
    return relu ? Math::relu(sum) : Math::tanh(sum);
  }
  // mask: what n is multiplied by.
  RNNFAST_CELL static inline Value state(Value z, Value n, Value mask, Value h) {
    const Value dropped = n * mask;
    return dropped + z * (h - dropped);
  }

  struct Gradients {
    Value z, n;  // of their sums
    Value h;     // of h_{t-1}, past the gates
  };
  RNNFAST_CELL Gradients backward(Value z, Value n, Value mask, Value h, Value dh) const {
    const Value of_candidate = dh * (1 - z) * mask;
    return {dh * (h - n * mask) * gate.slope(z),
            relu ? Math::where_positive(n, of_candidate) : of_candidate * (1 - n * n), dh * z};
  }
};

// phi of the RNNs, and its derivative from its value: those of cells.h, of the cell whose mode it is.
template <class Math> struct VariantRnn {
  using Value = typename Math::Value;

  template <int kIndex = 0> RNNFAST_CELL static inline Value forward(Mode mode, Value sum) {
    if constexpr (kIndex < kModes) {
      if constexpr (kCells[kIndex].family == Family::rnn) {
        const Value none{};
        if (mode == kCells[kIndex].mode)
          return Cell<Math, kCells[kIndex].mode>::forward({&sum, &none}, {none, none}, nullptr).h;
      }
      return forward<kIndex + 1>(mode, sum);
    }
    return sum;
  }
  template <int kIndex = 0> RNNFAST_CELL static inline Value backward(Mode mode, Value h, Value dh) {
    if constexpr (kIndex < kModes) {
      if constexpr (kCells[kIndex].family == Family::rnn) {
        Value none{}, da;
        if (mode == kCells[kIndex].mode) {
          Cell<Math, kCells[kIndex].mode>::backward({nullptr, {none, none}, {h, none}, dh}, none, &da, none);
          return da;
        }
      }
      return backward<kIndex + 1>(mode, h, dh);
    }
    return dh;
  }
};

// N(x) = (x - mean) * scale, before weight and bias; of RMS the mean is taken for 0.
template <class Scalar> struct NormOf {
  // Not in the function below, where nvcc would take the calls for the card's.
  static constexpr Scalar kLargest = std::numeric_limits<Scalar>::max(),
                          kNan = std::numeric_limits<Scalar>::quiet_NaN();
  Scalar mean, scale;

  template <class Value> RNNFAST_CELL Value operator()(Value x) const { return (x - mean) * scale; }

  // 1 / deviation, from the mean square of x - mean.
  RNNFAST_CELL static inline Scalar scale_of(Scalar mean_square, double eps) {
    // What overflowed has no norm: 1 / infinity would make zeros of it, and hide that.
    return mean_square <= kLargest ? 1 / std::sqrt(mean_square + static_cast<Scalar>(eps)) : kNan;
  }
};

// From the gradient g of N(x) to that of x, with means over the row: of g (of RMS taken for 0), and of g N(x).
template <class Scalar> struct NormGradient {
  Scalar mean_g, mean_g_normed, scale;

  template <class Value> RNNFAST_CELL Value operator()(Value g, Value normed) const {
    return (g - mean_g - normed * mean_g_normed) * scale;
  }
};

}  // namespace rnnfast

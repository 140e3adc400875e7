// What a row of a layer with options is made of: sums over its units, normalisation and its derivative, gates.
#pragma once

#include <limits>

#include "../tile.h"
#include "params.h"

namespace rnnfast::cpu {
namespace {

template <class Compute> RNNFAST_INLINE Compute sum_of_lanes(Vector<Compute> value) {
  Compute total = 0;
  for (int i = 0; i < kLanes<Compute>; ++i) total += value[i];
  return total;
}

// The first `count` lanes, zeros behind them.
template <class Compute> RNNFAST_INLINE Vector<Compute> first_of(Vector<Compute> value, int64_t count) {
  if (count >= kLanes<Compute>) return value;
  for (int64_t i = count > 0 ? count : 0; i < kLanes<Compute>; ++i) value[i] = 0;
  return value;
}

// use(unit, left) for each vector of a row of `count` values, of which `left` are there from `unit` on.
template <class Compute, class Use> RNNFAST_INLINE void for_vectors(int64_t count, const Use& use) {
  for (int64_t unit = 0; unit < count; unit += kLanes<Compute>) use(unit, count - unit);
}

// N(x) = (x - mean) * scale, before weight and bias; with `rms` the mean is taken for 0.
template <class Compute> struct NormOf {
  Compute mean, scale;

  RNNFAST_INLINE Vector<Compute> operator()(Vector<Compute> x) const { return (x - mean) * scale; }
};

// Of a row: in two passes, so that a mean far from 0 costs no digits.
template <class Compute> inline NormOf<Compute> norm_of(const Compute* x, int64_t count, bool rms, double eps) {
  Vector<Compute> sum{}, squares{};
  if (!rms) for_vectors<Compute>(count, [&](int64_t i, int64_t left) { sum += load<Compute>(x + i, left); });
  const Compute mean = rms ? Compute(0) : sum_of_lanes<Compute>(sum) / static_cast<Compute>(count);
  for_vectors<Compute>(count, [&](int64_t i, int64_t left) {
    const Vector<Compute> off = first_of<Compute>(load<Compute>(x + i, left) - mean, left);
    squares += off * off;
  });
  const Compute mean_square = sum_of_lanes<Compute>(squares) / static_cast<Compute>(count);
  // What overflowed has no norm: 1 / infinity would make zeros of it, and hide that.
  if (!(mean_square <= std::numeric_limits<Compute>::max())) return {mean, std::numeric_limits<Compute>::quiet_NaN()};
  return {mean, static_cast<Compute>(1 / __builtin_sqrt(mean_square + eps))};
}

// Of y = normed * weight + bias, from what was summed over a row: of g = dy * weight, and of g * normed.
template <class Compute> struct NormGradient {
  Compute mean_g, mean_g_normed, scale;

  NormGradient(Vector<Compute> sum_g, Vector<Compute> sum_g_normed, Compute scale_, int64_t count, bool rms)
      : mean_g(rms ? Compute(0) : sum_of_lanes<Compute>(sum_g) / static_cast<Compute>(count)),
        mean_g_normed(sum_of_lanes<Compute>(sum_g_normed) / static_cast<Compute>(count)),
        scale(scale_) {}

  // The gradient of the row's values before N.
  RNNFAST_INLINE Vector<Compute> operator()(Vector<Compute> g, Vector<Compute> normed) const {
    return (g - mean_g - normed * mean_g_normed) * scale;
  }
};

// The gates' activation, and its derivative from its value.
template <class Compute> struct GateActivation {
  using Value = Vector<Compute>;
  bool hard;

  RNNFAST_INLINE Value operator()(Value x) const {
    if (!hard) return VectorMath<Compute>::sigmoid(x);
    return at_most(at_least(x * Compute(0.2) + Compute(0.5), Compute(0)), Compute(1));
  }
  RNNFAST_INLINE Value slope(Value value) const {
    if (!hard) return value * (1 - value);
    const Value inside = value > 0 ? broadcast<Compute>(Compute(0.2)) : Value{};
    return value < 1 ? inside : Value{};
  }
};

// Zoneout: which part of the old value a step keeps.
template <class Compute> struct Zoneout {
  using Value = Vector<Compute>;
  const uint8_t* kept;  // of the row, or null
  Compute share;        // where there is no mask

  Zoneout(const uint8_t* mask, int64_t row, int64_t hidden_size, double share_)
      : kept(mask ? mask + row * hidden_size : nullptr), share(static_cast<Compute>(share_)) {}

  RNNFAST_INLINE bool is_on() const { return kept || share != 0; }
  RNNFAST_INLINE Value part(int64_t unit, int64_t left) const {
    if (!kept) return broadcast<Compute>(share);
    typedef uint8_t Bytes __attribute__((vector_size(kLanes<Compute>)));
    Bytes bytes{};
    if (left >= kLanes<Compute>)
      std::memcpy(&bytes, kept + unit, sizeof bytes);
    else
      std::memcpy(&bytes, kept + unit, static_cast<size_t>(left));
    const Value value = __builtin_convertvector(bytes, Value);
    return value > 0 ? broadcast<Compute>(1) : Value{};
  }
  // A choice where there is a mask, so that what is not chosen may be infinite.
  RNNFAST_INLINE Value mix(Value old, Value fresh, Value part) const {
    if (!kept) return old * part + fresh * (1 - part);
    return part > 0 ? old : fresh;
  }
};

// log(1 + u) for u from 0 to 1: 2 atanh(s) with s = u / (2 + u), at most 1 / 3, whose series ends where it no longer
// counts.
template <class Compute> RNNFAST_INLINE Vector<Compute> log1p_of_part(Vector<Compute> u) {
  constexpr int kTerms = sizeof(Compute) == 4 ? 9 : 18;
  const Vector<Compute> s = u / (u + 2), square = s * s;
  Vector<Compute> sum = broadcast<Compute>(Compute(1) / (2 * kTerms - 1));
#pragma GCC unroll 18
  for (int k = kTerms - 2; k >= 0; --k) sum = sum * square + Compute(1) / (2 * k + 1);
  return 2 * s * sum;
}

// log sigmoid(x) = min(x, 0) - log(1 + exp(-|x|)).
template <class Compute> RNNFAST_INLINE Vector<Compute> log_sigmoid(Vector<Compute> x) {
  using Math = VectorMath<Compute>;
  const Vector<Compute> below = x > 0 ? -x : x;  // a NaN stays
  const auto e = Math::template split_exp<0>(at_least(below, ExpConstants<Compute>::kExpMin));
  const Vector<Compute> least = x > 0 ? Vector<Compute>{} : x;
  return least - log1p_of_part<Compute>(e.scale * e.minus_one + e.scale);
}

// phi of the RNNs, and its derivative from its value.
template <class Compute> RNNFAST_INLINE Vector<Compute> nonlinearity(Mode mode, Vector<Compute> x) {
  using Math = VectorMath<Compute>;
  if (mode == Mode::rnn_tanh) return Math::tanh(x);
  if (mode == Mode::rnn_relu) return Math::relu(x);
  if (mode == Mode::rnn_sigmoid) return Math::sigmoid(x);
  return x;
}
template <class Compute>
RNNFAST_INLINE Vector<Compute> nonlinearity_gradient(Mode mode, Vector<Compute> value, Vector<Compute> grad) {
  if (mode == Mode::rnn_tanh) return grad * (1 - value * value);
  if (mode == Mode::rnn_relu) return VectorMath<Compute>::where_positive(value, grad);
  if (mode == Mode::rnn_sigmoid) return grad * value * (1 - value);
  return grad;
}

// How many values a vector has, 0 where there is none.
inline int64_t vector_size(const VariantParams& p, int vector) {
  const int64_t H = p.hidden_size, sizes[kVariantVectors] = {H, (p.gates - 1) * H, p.width(), p.width(), H, H};
  return p.vectors[vector] ? sizes[vector] : 0;
}

}  // namespace
}  // namespace rnnfast::cpu

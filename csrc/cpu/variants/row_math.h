// What a row of a layer with options is made of: sums over its units for the norms, zoneout; and the functions that the
// equations (csrc/variants/cells.h) call.
#pragma once

#include "../../variants/cells.h"
#include "../../variants/params.h"
#include "../tile.h"

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
  return {mean, NormOf<Compute>::scale_of(mean_square, eps)};
}

// Of y = normed * weight + bias, from what was summed over a row: of g = dy * weight, and of g * normed.
template <class Compute>
inline NormGradient<Compute> norm_gradient(Vector<Compute> sum_g, Vector<Compute> sum_g_normed, Compute scale,
                                           int64_t count, bool rms) {
  return {rms ? Compute(0) : sum_of_lanes<Compute>(sum_g) / static_cast<Compute>(count),
          sum_of_lanes<Compute>(sum_g_normed) / static_cast<Compute>(count), scale};
}

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
  // Its derivative: the old value's share of a gradient, and the new one's.
  struct Shares {
    Value old, fresh;
  };
  RNNFAST_INLINE Shares shares(Value grad, Value part) const {
    if (!kept) return {grad * part, grad * (1 - part)};
    return {part > 0 ? grad : Value{}, part > 0 ? Value{} : grad};
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

// What variants/cells.h calls.
template <class Compute> struct VariantMath : VectorMath<Compute> {
  using Scalar = Compute;
  RNNFAST_INLINE static Vector<Compute> log_sigmoid(Vector<Compute> x) { return cpu::log_sigmoid<Compute>(x); }
};

}  // namespace
}  // namespace rnnfast::cpu

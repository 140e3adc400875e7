// Number types of the kernels and the conversions between them. 16-bit conversions round to nearest, ties to even, keep
// subnormals, and turn every NaN into the canonical one (0x7fff), as cvt.rn does (PTX ISA, "cvt").
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "platform.h"

#if !defined(RNNFAST_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace rnnfast::gpu {

// Tag for float32 inputs that are multiplied in TF32.
struct tf32 {};

#if defined(RNNFAST_EMULATED)

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

inline uint16_t bits_of(bfloat16 value) { return value.bits; }
inline uint16_t bits_of(float16 value) { return value.bits; }

inline float to_float(bfloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }

inline float to_float(float16 value) {
  const uint32_t sign = uint32_t(value.bits & 0x8000) << 16;
  const uint32_t magnitude = value.bits & 0x7fff;
  // Exponent 0: a multiple of 2^-24.
  if (magnitude < 0x0400) return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(float(magnitude) * 0x1p-24f));
  // Exponent 31: infinity and NaN.
  if (magnitude >= 0x7c00) return std::bit_cast<float>(sign | 0x7f800000 | (magnitude & 0x03ff) << 13);
  return std::bit_cast<float>(sign | ((magnitude << 13) + ((127u - 15u) << 23)));
}

namespace emulated {

// `magnitude` without its low `drop` bits, rounded to nearest, ties to even. A carry into the exponent is what is
// wanted.
inline uint32_t round_away_bits(uint32_t magnitude, unsigned drop) {
  const uint32_t odd = magnitude >> drop & 1;
  return (magnitude + ((1u << (drop - 1)) - 1) + odd) >> drop;
}

inline bfloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  return {uint16_t((bits >> 31 << 15) | round_away_bits(bits & 0x7fffffff, 16))};
}

inline float16 to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return {0x7fff};
  const uint32_t sign = bits >> 31 << 15;
  const uint32_t magnitude = bits & 0x7fffffff;
  // From halfway between the largest number and the next power of two on: infinity.
  if (magnitude >= std::bit_cast<uint32_t>(65520.0f)) return {uint16_t(sign | 0x7c00)};
  // Below 2^-14 the result is a multiple of 2^-24, the last place of a float in [0.5, 1): let that addition round.
  if (magnitude < std::bit_cast<uint32_t>(0x1p-14f)) {
    const uint32_t sum = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f);
    return {uint16_t(sign | (sum - std::bit_cast<uint32_t>(0.5f)))};
  }
  return {uint16_t(sign | round_away_bits(magnitude - ((127u - 15u) << 23), 13))};
}

}  // namespace emulated

#else

using bfloat16 = __nv_bfloat16;
using float16 = __half;

RNNFAST_DEVICE uint16_t bits_of(bfloat16 value) { return __bfloat16_as_ushort(value); }
RNNFAST_DEVICE uint16_t bits_of(float16 value) { return __half_as_ushort(value); }

RNNFAST_DEVICE float to_float(bfloat16 value) { return __bfloat162float(value); }
RNNFAST_DEVICE float to_float(float16 value) { return __half2float(value); }

#endif

RNNFAST_DEVICE float to_float(float value) { return value; }
// float64 is computed in float64 (ComputeOf); this is for what is wanted in float32 all the same.
RNNFAST_DEVICE float to_float(double value) { return static_cast<float>(value); }

template <class T> inline constexpr bool is_16bit = std::is_same_v<T, bfloat16> || std::is_same_v<T, float16>;

template <class T> RNNFAST_DEVICE T from_float(float value) {
  if constexpr (is_16bit<T>) {
#if defined(RNNFAST_EMULATED)
    if constexpr (std::is_same_v<T, bfloat16>)
      return emulated::to_bfloat16(value);
    else
      return emulated::to_float16(value);
#else
    if constexpr (std::is_same_v<T, bfloat16>)
      return __float2bfloat16_rn(value);
    else
      return __float2half_rn(value);
#endif
  } else {
    static_assert(std::is_floating_point_v<T>, "from_float: a number type of the kernels");
    return static_cast<T>(value);
  }
}

// What a value of type T is computed in.
template <class T> struct ComputeOf {
  using type = float;
};
template <> struct ComputeOf<double> {
  using type = double;
};
template <class T> using Compute = typename ComputeOf<T>::type;

template <class To, class From> RNNFAST_DEVICE To convert(From from) {
  // By way of float it would round twice.
  static_assert(!(is_16bit<To> && std::is_same_v<From, double>), "convert: no direct way from float64 to 16 bits");
  if constexpr (std::is_same_v<To, From>)
    return from;
  else if constexpr (std::is_floating_point_v<To> && std::is_floating_point_v<From>)
    return static_cast<To>(from);
  else
    return from_float<To>(to_float(from));
}

// Two 16-bit values in a register, the first in the lower half: the order of mma fragments and of memory.
template <class T> RNNFAST_DEVICE uint32_t pack(T low, T high) {
  static_assert(is_16bit<T>);
  return uint32_t(bits_of(low)) | uint32_t(bits_of(high)) << 16;
}

}  // namespace rnnfast::gpu

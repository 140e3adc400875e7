// The 16-bit number types of csrc/cuda/primitives/types.h and their conversions.
#pragma once

#include <bit>
#include <cstdint>

namespace rnnfast::emulator {

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

}  // namespace rnnfast::emulator

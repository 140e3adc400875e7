// Number types of the kernels and the conversions between them. 16-bit conversions round to nearest, ties to even, keep
// subnormals, and turn every NaN into the canonical one (0x7fff), as cvt.rn does (PTX ISA, "cvt").
#pragma once

#include <cstdint>
#include <type_traits>

#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include "../../emulator/primitives/types.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace rnnfast::gpu {

// Tag for float32 inputs that are multiplied in TF32.
struct tf32 {};

#if defined(RNNFAST_EMULATED)

using emulator::bfloat16;
using emulator::bits_of;
using emulator::float16;
using emulator::to_float;

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
      return emulator::to_bfloat16(value);
    else
      return emulator::to_float16(value);
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

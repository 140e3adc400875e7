// The card's approximate functions (PTX ISA, "ex2.approx", "rcp.approx"): one instruction each. The
// emulator computes them exactly. NaN stays NaN, infinities are what one expects.
#pragma once

#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include <cmath>
#endif

namespace rnnfast::gpu {

// 2^x within 2 ulp; subnormal results are zero.
RNNFAST_DEVICE float approximate_exp2(float x) {
#if defined(RNNFAST_EMULATED)
  return std::exp2(x);
#else
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

// 1/x within 1 ulp; subnormal results are zero.
RNNFAST_DEVICE float approximate_reciprocal(float x) {
#if defined(RNNFAST_EMULATED)
  return 1 / x;
#else
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#endif
}

}  // namespace rnnfast::gpu

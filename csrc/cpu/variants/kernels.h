// The kernels of layers with options, and which of them are compiled. No torch header here.
#pragma once

#include "../../variants/params.h"
#include "../team.h"

namespace rnnfast::cpu {

// What they return is 0, or the bytes of a workspace that there was no memory for: then nothing was computed.
struct VariantKernels {
  int64_t (*forward)(const VariantForward&, Team&);
  int64_t (*backward)(const VariantBackward&, Team&);
};

// Each is what variants/kernels.cpp makes of one compilation. In the order of DType; setup.py has the same lists.
#define RNNFAST_DECLARE_VARIANTS(isa)                                                           \
  extern const VariantKernels variant_kernels_##isa##_float32, variant_kernels_##isa##_float64, \
      variant_kernels_##isa##_bfloat16, variant_kernels_##isa##_float16;
#define RNNFAST_VARIANTS_OF(isa)                                                                          \
  {&variant_kernels_##isa##_float32, &variant_kernels_##isa##_float64, &variant_kernels_##isa##_bfloat16, \
   &variant_kernels_##isa##_float16}
RNNFAST_DECLARE_VARIANTS(portable)
#if defined(__x86_64__)
RNNFAST_DECLARE_VARIANTS(avx2)
RNNFAST_DECLARE_VARIANTS(avx512)
#endif

}  // namespace rnnfast::cpu

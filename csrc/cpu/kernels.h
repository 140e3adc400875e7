// The CPU kernels of one ISA and type, as the rest of the library sees them.
#pragma once

#include "../recurrence.h"

namespace rnnfast::cpu {

// Bytes that 64 bits do not count.
constexpr int64_t kUncountable = INT64_MAX;

// What they return is 0, or the bytes of a workspace that there was no memory for: then nothing was computed.
struct Kernels {
  int64_t (*forward)(const ForwardParams&, int threads);
  int64_t (*backward)(const BackwardParams&, int threads);
  int64_t (*matmul)(const MatmulParams&, int threads);
};

// Each is what kernels.cpp makes of one compilation. In the order of DType; setup.py has the same lists.
#define RNNFAST_DECLARE_KERNELS(isa)                                                               \
  extern const Kernels kernels_##isa##_float32, kernels_##isa##_float64, kernels_##isa##_bfloat16, \
      kernels_##isa##_float16;
#define RNNFAST_KERNELS_OF(isa) \
  {&kernels_##isa##_float32, &kernels_##isa##_float64, &kernels_##isa##_bfloat16, &kernels_##isa##_float16}
RNNFAST_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
RNNFAST_DECLARE_KERNELS(avx2)
RNNFAST_DECLARE_KERNELS(avx512)
#endif

// Splits [0, slots) over the threads of torch's pool and calls body(begin, end, context) on each; returns when all have
// returned. Defined beside the ops, because the kernels include no torch header.
void parallel_region(int64_t slots, void (*body)(int64_t begin, int64_t end, void* context), void* context);

}  // namespace rnnfast::cpu

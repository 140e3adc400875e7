// The CPU kernels of one ISA, as the rest of the library sees them.
#pragma once

#include "../recurrence.h"

namespace rnnfast::cpu {

// Bytes that 64 bits do not count.
constexpr int64_t kUncountable = INT64_MAX;

// What they return is 0, or the bytes of a workspace that there was no memory for: then nothing was computed.
struct Kernels {
  const char* isa;
  int64_t (*forward)(const ForwardParams&, int threads);
  int64_t (*backward)(const BackwardParams&, int threads);
  int64_t (*matmul)(const MatmulParams&, int threads);
};

extern const Kernels kKernelsPortable;
#if defined(__x86_64__)
extern const Kernels kKernelsAvx2;
extern const Kernels kKernelsAvx512;
#endif

// Splits [0, slots) over the threads of torch's pool and calls body(begin, end, context) on each; returns when all have
// returned. Defined beside the ops, because the kernels include no torch header.
void parallel_region(int64_t slots, void (*body)(int64_t begin, int64_t end, void* context), void* context);

}  // namespace rnnfast::cpu

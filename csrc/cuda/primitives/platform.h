// What differs between nvcc and the emulator before any instruction does: the words that mark functions, kernels and
// loops. Kernel code compiles with either; with RNNFAST_EMULATED no CUDA header is seen.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(RNNFAST_EMULATED)

#include "../../emulator/emulator.h"

#define RNNFAST_DEVICE [[gnu::always_inline]] inline
#define RNNFAST_KERNEL
#define RNNFAST_LAUNCH_BOUNDS(threads, blocks)
#define RNNFAST_GRID_CONSTANT
#define RNNFAST_UNROLL
#define RNNFAST_UNROLL_BY(times)
// The last parameter of a synchronising function: the line that calls it, known to the emulator only. _ALONE where it
// is the only one; RNNFAST_PASS_SITE hands it on. Functions of a kernel that wrap a synchronisation may take it too.
#define RNNFAST_SITE_ALONE [[maybe_unused]] ::rnnfast::emulator::Site site = ::rnnfast::emulator::Site::current()
#define RNNFAST_SITE , RNNFAST_SITE_ALONE
#define RNNFAST_PASS_SITE_ALONE site
#define RNNFAST_PASS_SITE , site

#else

#include <cuda_runtime.h>

#if defined(__CUDACC__)
#define RNNFAST_DEVICE __device__ __forceinline__
#define RNNFAST_KERNEL __global__
#define RNNFAST_LAUNCH_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define RNNFAST_GRID_CONSTANT __grid_constant__
#endif
#define RNNFAST_UNROLL _Pragma("unroll")
// By so many; 1: not at all.
#define RNNFAST_PRAGMA(words) _Pragma(#words)
#define RNNFAST_UNROLL_BY(times) RNNFAST_PRAGMA(unroll times)
#define RNNFAST_SITE_ALONE
#define RNNFAST_SITE
#define RNNFAST_PASS_SITE_ALONE
#define RNNFAST_PASS_SITE

#endif

// Bodies for Hopper and later stand under this; elsewhere they trap.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define RNNFAST_SM90 1
#else
#define RNNFAST_SM90 0
#endif

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)
using emulator::Dim3;
using emulator::kAllLanes;
using emulator::kWarpSize;
#else
struct Dim3 {
  unsigned x = 1, y = 1, z = 1;
};
constexpr unsigned kWarpSize = 32;
constexpr uint32_t kAllLanes = 0xffffffffu;
#endif
// Legal: these alone. Kernels, shuffles and fragments count on them.
static_assert(kWarpSize == 32 && kAllLanes == 0xffffffffu,
              "kWarpSize must be 32, kAllLanes a bit for each: the cards'");

}  // namespace rnnfast::gpu

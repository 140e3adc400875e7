// The CPU kernels of one ISA and type, as the rest of the library sees them.
#pragma once

#include "../recurrence.h"
#include "panels.h"
#include "team.h"

namespace rnnfast::cpu {

// Bytes that 64 bits do not count.
constexpr int64_t kUncountable = INT64_MAX;

// The sum over all rows of what meets a bias: (G*H). Null: nobody asks.
struct BiasGradient {
  void* result{};
  // Where several chunks' sum is kept that is wider than the result, so that it is rounded once; else null.
  void* sum{};
};

// For a backward pass that hands its gradients of each step on while they are in cache, some turns at a time, and
// writes those of the next turns over them. A turn is one step in each direction, of direction 0 first T - 1, of
// direction 1 first 0.
//
// The tensors of BackwardParams that have a row for each step then have a chunk's: (D, rows, stride of a row), in the
// order of (t, length), and none for a row that has no such step. Of grad_gates_hh it is the split gate alone (H),
// which is all that is not in grad_gates.
struct Chunks {
  int64_t turns;         // of each, but for the last
  int64_t rows;          // that the largest has
  double alone_seconds;  // as Team's, for one of them
  void* hidden{};        // with projection: o tanh(c), as grad_projected
  BiasGradient grad_bias_ih[kMaxDirections], grad_bias_hh[kMaxDirections];
  // Called after each, when all that it left is there; false: no more of them.
  bool (*use)(void* context, int64_t first_turn, int64_t last_turn){};
  void* context{};
};
// Elements from a row to the next: whole lines, and one more where long rows would share the same cache sets.
constexpr int64_t chunk_row_stride(int64_t width, int64_t element_size) {
  constexpr int64_t kLine = 64, kLong = 1024;
  const int64_t bytes = (width * element_size + kLine - 1) / kLine * kLine;
  return (bytes % kLong == 0 ? bytes + kLine : bytes) / element_size;
}

// c (M, N) = a (M, K) b (K, N), or with `accumulates` c += a b; strides in elements. c is row-major with row stride
// `c_row`.
struct MatmulParams {
  DType dtype{};
  bool accumulates = false;
  int64_t m = 0, n = 0, k = 0;
  const void* a{};
  int64_t a_row = 0, a_col = 0;
  const void* b{};
  int64_t b_row = 0, b_col = 0;
  // Null, where there are sums, until the last of them.
  void* c{};
  int64_t c_row = 0;
  // For what is summed over several calls and narrower than float32, so that it is rounded once: (M, N), contiguous.
  // With `accumulates` they are added to. Without c they keep what comes of it, with c they are used up.
  float* sums{};
};

// What they return is 0, or the bytes of a workspace that there was no memory for: then nothing was computed.
struct Kernels {
  int64_t (*forward)(const ForwardParams&, Team&);
  int64_t (*backward)(const BackwardParams&, Team&, const Chunks*);  // null: all at once
  int64_t (*matmul)(const MatmulParams&, Team&);
};

// The forward pass in float32 with W_ih, W_hh and W_hr in panels.
using PanelForward = int64_t (*)(const ForwardParams&, Team&);

// Each is what kernels.cpp or panel_kernels.cpp makes of one compilation. In the order of DType and of PanelType;
// setup.py has the same lists.
#define RNNFAST_DECLARE_KERNELS(isa)                                                               \
  extern const Kernels kernels_##isa##_float32, kernels_##isa##_float64, kernels_##isa##_bfloat16, \
      kernels_##isa##_float16;
#define RNNFAST_KERNELS_OF(isa) \
  {&kernels_##isa##_float32, &kernels_##isa##_float64, &kernels_##isa##_bfloat16, &kernels_##isa##_float16}
#define RNNFAST_DECLARE_PANELS(isa) \
  extern const PanelForward panel_forward_##isa##_float32, panel_forward_##isa##_bfloat16, panel_forward_##isa##_int8;
#define RNNFAST_PANELS_OF(isa) \
  {&panel_forward_##isa##_float32, &panel_forward_##isa##_bfloat16, &panel_forward_##isa##_int8}
RNNFAST_DECLARE_KERNELS(portable)
RNNFAST_DECLARE_PANELS(portable)
#if defined(__x86_64__)
RNNFAST_DECLARE_KERNELS(avx2)
RNNFAST_DECLARE_PANELS(avx2)
RNNFAST_DECLARE_KERNELS(avx512)
RNNFAST_DECLARE_PANELS(avx512)
// With AVX512-VNNI, of which int8 alone makes use.
extern const PanelForward panel_forward_avx512_vnni_int8;
// With AVX512-BF16 and with AMX-BF16; those of float32 round to bfloat16 as they multiply.
extern const Kernels kernels_avx512_bf16_bfloat16, kernels_amx_bf16_bfloat16;
extern const Kernels kernels_avx512_bf16_float32, kernels_amx_bf16_float32;
#endif

}  // namespace rnnfast::cpu

// The CPU kernels of one ISA and type, as the rest of the library sees them.
#pragma once

#include "../recurrence.h"
#include "panels.h"
#include "team.h"

namespace rnnfast::cpu {

// Bytes that 64 bits do not count.
constexpr int64_t kUncountable = INT64_MAX;

// What they return is 0, or the bytes of a workspace that there was no memory for: then nothing was computed.
struct Kernels {
  int64_t (*forward)(const ForwardParams&, Team&);
  int64_t (*backward)(const BackwardParams&, Team&);
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

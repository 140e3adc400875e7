// Layers with options, one direction of one layer: what their row kernels are given, and the table of instances. As
// split/split.h has it, a step is a product of all rows by a library, then a kernel that sees whole rows; where r
// multiplies h itself (GRU) both twice. A kernel is compiled for a family and a type, and looks at all options while it
// runs. Plain host code, no torch, no CUDA.
#pragma once

#include "../../variants/params.h"
#include "../step/step.h"

namespace rnnfast::gpu {

// Scratch in device memory, named for what is in it. Unless it says otherwise in the compute type.
struct VariantStepForward {
  VariantForward call;
  TurnRows rows;                        // the call's rows at the turn
  int64_t directions = kMaxDirections;  // turns are told of both; a call has one
  void* entering{};                     // (B, H), storage type: of each row h_{t-1}, times its mask
  void* sums{};                         // (heads, B, G*H / heads), with reset_first of r and z: W_hh times that
  void* reset_state{};                  // with reset_first: (B, H), storage type: r times it
  void* reset_sums{};                   // (heads, B, H / heads): W_hn times that
  void *carry_c{}, *carry_l{};          // (B, H): c_{t-1}, of the sLSTM l_{t-1}
  void* fresh_c{};                      // with a norm of c: (B, H)
};

struct VariantStepBackward {
  VariantBackward call;
  TurnRows rows;
  int64_t directions = kMaxDirections;
  void* sum_gradients{};                    // (heads, B, G*H / heads), storage type: the latest of each row's W_hh h
  void* reset_gradients{};                  // with reset_first: (heads, B, H / heads), storage type: of W_hn (r h)
  void* back{};                             // (heads, B, H / heads): what the latest product brings back to h
  void *carry_h{}, *carry_c{}, *carry_l{};  // (B, H): what reaches h_{t-1} beside the product; c_{t-1}; l_{t-1}
  void* of_gates{};                         // with a norm of the gates: (B, G*H): gradients of what it gave
  void *raw_c{}, *of_normed{}, *beside{};  // with a norm of c: (B, H): c_t before it; gradients of what it gave, of c_t
  // (B, V): what each row adds to the vectors' gradients: in the turns under way, and before. They begin with zeros.
  void *vectors_now{}, *vectors_before{};
  int64_t vector_begin[kVariantVectors]{};
  int64_t vectors = 0;  // V
  int64_t turns_summed = kTurnsSummed;
};

// Where each vector's gradient lies among all.
inline void place_vectors(VariantStepBackward& step) {
  step.vectors = 0;
  for (int i = 0; i < kVariantVectors; ++i) {
    step.vector_begin[i] = step.vectors;
    step.vectors += vector_size(step.call, i);
  }
}

struct VariantKernels {
  StepKernel<VariantStepForward> begin;  // hx into `entering`
  StepKernel<VariantStepForward> reset;  // of the GRU: r h
  StepKernel<VariantStepForward> forward;
  StepKernel<VariantStepBackward> backward;
  StepKernel<VariantStepBackward> reset_backward;
  StepKernel<VariantStepBackward> sum_vectors;  // behind the last step: over the rows
};

// The other families have no kernels here.
constexpr bool has_options(Family family) {
  return family == Family::lstm || family == Family::gru || family == Family::rnn;
}
template <Family kFamily, class Type> struct VariantInstance {
  static VariantKernels kernels() { return {}; }
};
// launch.cuh has the body; setup.py writes the units that instantiate it.
template <Family kFamily, class Type>
  requires(has_options(kFamily))
struct VariantInstance<kFamily, Type> {
  static VariantKernels kernels();
};
// How float32 is multiplied is the library's business.
template <Family kFamily>
  requires(has_options(kFamily))
struct VariantInstance<kFamily, Tf32> : VariantInstance<kFamily, Float32> {};

}  // namespace rnnfast::gpu

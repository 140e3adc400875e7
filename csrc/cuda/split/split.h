// A product of all rows a step, by a library, and a kernel that sees whole rows for the cell: what these row kernels
// are given, and the table of instances. Plain host code, no torch, no CUDA.
//
// The phases of a step are those of step/step.h, but each product is a launch of its own. It reads and writes
// workspaces that lie in the same place at every step, so that it is the same call each time.
#pragma once

#include "../step/step.h"

namespace rnnfast::gpu {

struct SplitForward : StepForward {
  const void* sums{};  // (D, B, G*H), of the projection (D, B, P), in the compute type: the product before this kernel
  void* states{};      // (D, B, P or H): the latest h_t of each row, before its first step hx
  bool wide = false;   // all tensors allow for accesses of several units at once: widest() of them
};

struct SplitBackward : StepBackward {
  // (D, B, P or H): what comes back through W_hh; to a projected layer's cell (D, B, H), through W_hr.
  const void* sums{};
  void* gate_gradients{};   // (D, B, G*H): the latest gradients of each row's W_hh h
  void* state_gradients{};  // (D, B, P): the same of its projected h_t
  bool wide = false;
};

// Units that one access takes, 16 bytes at most: in the storage type, and 16-bit types have sums of 32 bits.
constexpr int widest(int element_bytes) { return element_bytes == 8 ? 2 : 4; }

struct SplitKernels {
  StepKernel<SplitForward> forward;
  StepKernel<SplitBackward> backward;
  // Of a family that may be projected, else null.
  StepKernel<SplitForward> project_forward;
  StepKernel<SplitBackward> project_backward;
};

// launch.cuh has the body; setup.py writes the units that instantiate it.
template <Family kFamily, class Type> struct SplitInstance {
  static SplitKernels kernels();
};
// How float32 is multiplied is the library's business.
template <Family kFamily> struct SplitInstance<kFamily, Tf32> : SplitInstance<kFamily, Float32> {};

}  // namespace rnnfast::gpu

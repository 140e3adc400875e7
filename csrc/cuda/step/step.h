// One launch a step, or a few: what these kernels are given, and the table of instances. Plain host code, no torch, no
// CUDA.
//
// A step has phases, forward in this order, backward in the reverse:
//   product   W_hh h of all gates
//   cell      the cell's equations
//   project   with projection: h_t = W_hr (o tanh(c))
// Phases share a launch as long as a unit's value needs no other unit's value of the phase before: so product and cell
// do, and project is a launch of its own. What the next launch needs stands in a workspace, as `hidden` does here.
#pragma once

#include <string>

#include "../instances.h"
#include "../rows.h"
#include "../tensors.h"

namespace rnnfast::gpu {

// Sizes and inputs of every step kernel. `weight` is the matrix of the kernel's product, one row for each of its
// results, contiguous along the sum.
struct StepShared {
  Mode mode{};
  TurnRows rows;
  int64_t hidden_size = 0, state_size = 0, directions = 1;
  bool projected = false;
  bool aligned = false;  // every row of weight and of what it is multiplied with starts at a multiple of 16 bytes
  const void* weight[kMaxDirections]{};
  int64_t weight_stride[kMaxDirections]{};
  const void* hx{};
  const void* cx{};
  void* carry{};   // workspace (D, B, H) in the compute type: c_t; backward: what reaches the earlier step (cells.h)
  void* hidden{};  // workspace (D, B, H), forward with projection: o tanh(c)
};

struct StepForward : StepShared, ForwardTensors {};

struct StepBackward : StepShared, BackwardTensors {
  void* grad_projected{};
};

// How a launch is made; the grid follows from the sizes.
struct StepLaunch {
  void* stream{};
  bool dependent = false;  // may start before its predecessor has ended: the kernels wait where they must
  int sms = 1;             // of the device
};

// Launches one kernel; "" or what went wrong.
template <class Params> using StepKernel = std::string (*)(const Params&, const StepLaunch&);

// The launches of a step, of one family and type.
struct StepKernels {
  StepKernel<StepForward> forward;    // product and cell
  StepKernel<StepBackward> backward;  // product and cell
  // Of a family that may be projected, else null.
  StepKernel<StepForward> project_forward;
  StepKernel<StepBackward> project_backward;  // the product with the gates' gradients too: forward's W_hh h
};

// launch.cuh has the body; setup.py writes the units that instantiate it.
template <Family kFamily, class Type> struct StepInstance {
  static StepKernels kernels();
};

}  // namespace rnnfast::gpu

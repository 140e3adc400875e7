// The tensors of a call as kernels are given them, whichever run it. Plain host code, no torch, no CUDA.
#pragma once

#include "../recurrence.h"
#include "instances.h"

namespace rnnfast::gpu {

struct ForwardTensors {
  const void* gates{};
  const void* bias_split[kMaxDirections]{};  // b_hh of the split gate (H,), or null
  void* output{};
  void* h_n{};
  void* c_n{};
  void* cell_states{};
  void* reserve{};
};

struct BackwardTensors {
  const void* grad_output{};
  const void* grad_h_n{};
  const void* grad_c_n{};
  const void* grad_cell_states{};
  const void* output{};
  const void* cell_states{};
  const void* reserve{};
  void* grad_gates{};
  void* grad_gates_hh{};
  void* grad_hx{};
  void* grad_cx{};
};

// p.gates is given.
inline void fill_tensors(const ForwardParams& p, ForwardTensors& tensors) {
  tensors.gates = p.gates;
  tensors.output = p.output;
  tensors.h_n = p.h_n;
  tensors.c_n = p.c_n;
  tensors.cell_states = p.cell_states;
  tensors.reserve = p.reserve;
  const int split_gate = traits(p.mode).split_gate;
  for (int64_t d = 0; d < p.directions && split_gate != kNoGate; ++d) {
    const char* bias = static_cast<const char*>(p.parameters[Kind::bias_hh].data[d]);
    tensors.bias_split[d] = bias ? bias + split_gate * p.hidden_size * size_of(p.dtype) : nullptr;
  }
}

inline void fill_tensors(const BackwardParams& p, BackwardTensors& tensors) {
  tensors.grad_output = p.grad_output;
  tensors.grad_h_n = p.grad_h_n;
  tensors.grad_c_n = p.grad_c_n;
  tensors.grad_cell_states = p.grad_cell_states;
  tensors.output = p.output;
  tensors.cell_states = p.cell_states;
  tensors.reserve = p.reserve;
  tensors.grad_gates = p.grad_gates;
  tensors.grad_gates_hh = p.grad_gates_hh;
  tensors.grad_hx = p.grad_hx;
  tensors.grad_cx = p.grad_cx;
}

}  // namespace rnnfast::gpu

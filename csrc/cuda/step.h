// One launch a step: what its kernels are given, and the table of instances. Plain host code, no torch, no CUDA.
#pragma once

#include <string>

#include "../recurrence.h"

namespace rnnfast::gpu {

// What one direction does in one launch. `before` and `after` are its neighbours in the order in which the direction
// takes its steps: for the reversed one, before is time + 1.
struct Turn {
  int64_t time = 0;  // in backward's last turn outside [0, T): there rows only hand on the gradients of hx and cx
  int64_t row = 0, before_row = 0, after_row = 0;        // of batch index 0 at each of the three steps
  int64_t alive = 0, before_alive = 0, after_alive = 0;  // rows that have such a step, where lengths do not say more
};

struct StepRows {
  int64_t steps = 0, batch = 0, batch_stride = 0;  // T, B, rows from batch index b to b + 1
  const int64_t* lengths{};                        // device memory, or null
  const uint8_t* resets{};                         // device memory, or null
  Turn turn[kMaxDirections];
};

// Sizes and inputs of every step kernel. `weight` is the matrix of the kernel's product, one row for each of its
// results, contiguous along the sum.
struct StepShared {
  Mode mode{};
  StepRows rows;
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

struct StepForward : StepShared {
  const void* gates{};
  const void* bias_n[kMaxDirections]{};  // GRU: b_hn (H,) or null
  void* output{};
  void* h_n{};
  void* c_n{};
  void* cell_states{};
  void* reserve{};
};

struct StepBackward : StepShared {
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
  void* grad_projected{};
};

// How a launch is made; the grid follows from the sizes.
struct StepLaunch {
  void* stream{};
  bool dependent = false;  // may start before its predecessor has ended: the kernels wait where they must
};

// The kernels of one cell and type. Each launches one kernel and returns "" or what went wrong.
struct StepKernels {
  std::string (*forward)(const StepForward&, const StepLaunch&);
  std::string (*backward)(const StepBackward&, const StepLaunch&);
  std::string (*project_forward)(const StepForward&, const StepLaunch&);    // LSTM only: h_t from o tanh(c)
  std::string (*project_backward)(const StepBackward&, const StepLaunch&);  // LSTM only: the gradient of h_t
};

// How a type is multiplied: float32 has two ways.
enum class Arithmetic { float64, float32, tf32, bfloat16, float16 };

extern const StepKernels kStepLstmFloat64, kStepLstmFloat32, kStepLstmTf32, kStepLstmBfloat16, kStepLstmFloat16;
extern const StepKernels kStepGruFloat64, kStepGruFloat32, kStepGruTf32, kStepGruBfloat16, kStepGruFloat16;
extern const StepKernels kStepRnnFloat64, kStepRnnFloat32, kStepRnnTf32, kStepRnnBfloat16, kStepRnnFloat16;

}  // namespace rnnfast::gpu

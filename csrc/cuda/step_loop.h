// The time loop around the step kernels: one turn a step, both directions in it, two launches a turn with a projection.
// Plain host code; fills what the kernels are given and launches.
#pragma once

#include <string>
#include <vector>

#include "step.h"

namespace rnnfast::gpu {

// Scratch in device memory. The transposed weights and `carry` matter to backward, `hidden` to a projected forward.
struct StepWorkspace {
  void* carry{};                              // (D, B, H) in the compute type: float64 for float64, else float32
  void* hidden{};                             // (D, B, H) in the storage type
  const void* weight_hh_t[kMaxDirections]{};  // (P or H, G*H)
  const void* weight_hr_t[kMaxDirections]{};  // (H, P)
};

struct StepDevice {
  void* stream{};
  bool dependent_launch = false;  // sm_90 and later
};

inline const StepKernels& step_kernels(Mode mode, Arithmetic arithmetic) {
  static const StepKernels* const table[3][5] = {
      {&kStepLstmFloat64, &kStepLstmFloat32, &kStepLstmTf32, &kStepLstmBfloat16, &kStepLstmFloat16},
      {&kStepGruFloat64, &kStepGruFloat32, &kStepGruTf32, &kStepGruBfloat16, &kStepGruFloat16},
      {&kStepRnnFloat64, &kStepRnnFloat32, &kStepRnnTf32, &kStepRnnBfloat16, &kStepRnnFloat16}};
  return *table[mode == Mode::lstm ? 0 : mode == Mode::gru ? 1 : 2][static_cast<int>(arithmetic)];
}

inline Arithmetic arithmetic_of(DType dtype, bool allow_tf32) {
  switch (dtype) {
    case DType::float64: return Arithmetic::float64;
    case DType::bfloat16: return Arithmetic::bfloat16;
    case DType::float16: return Arithmetic::float16;
    default: return allow_tf32 ? Arithmetic::tf32 : Arithmetic::float32;
  }
}

inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }
inline int64_t compute_size_of(DType dtype) { return dtype == DType::float64 ? 8 : 4; }

// Where the rows of each step lie, for the turns of a call.
class Turns {
 public:
  explicit Turns(const RowLayout& rows) : rows_(rows) {
    if (!rows.batch_sizes) return;
    offsets_.reserve(static_cast<size_t>(rows.steps));
    int64_t sum = 0;
    for (int64_t t = 0; t < rows.steps; ++t) {
      offsets_.push_back(sum);
      sum += rows.batch_sizes[t];
    }
  }

  StepRows rows() const {
    StepRows result;
    result.steps = rows_.steps;
    result.batch = rows_.batch;
    result.batch_stride = rows_.batch_sizes ? 1 : rows_.batch_stride;
    result.lengths = rows_.lengths;
    result.resets = rows_.resets;
    return result;
  }
  Turn turn(int64_t time, bool reversed) const {
    const int64_t before = reversed ? time + 1 : time - 1, after = reversed ? time - 1 : time + 1;
    return {time, row(time), row(before), row(after), alive(time), alive(before), alive(after)};
  }

 private:
  bool exists(int64_t t) const { return t >= 0 && t < rows_.steps; }
  int64_t row(int64_t t) const {
    if (!exists(t)) return 0;
    return rows_.batch_sizes ? offsets_[static_cast<size_t>(t)] : t * rows_.step_stride;
  }
  int64_t alive(int64_t t) const {
    if (!exists(t)) return 0;
    return rows_.batch_sizes ? rows_.batch_sizes[t] : rows_.batch;
  }

  RowLayout rows_;
  std::vector<int64_t> offsets_;
};

// Whether rows at this base, `stride` elements apart, all start at multiples of 16 bytes.
inline bool rows_aligned(const void* base, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

inline void fill_shared(const Recurrence& r, const StepWorkspace& workspace, const Turns& turns, StepShared& shared) {
  shared.mode = r.mode;
  shared.rows = turns.rows();
  shared.hidden_size = r.hidden_size;
  shared.state_size = r.state_size;
  shared.directions = r.directions;
  shared.projected = r.projected;
  shared.hx = r.hx;
  shared.cx = r.cx;
  shared.carry = workspace.carry;
  shared.hidden = workspace.hidden;
}

// The matrix of a kernel's product, and whether all rows that meet in it are aligned: `states` rows are `width` apart.
inline void set_weight(StepShared& shared, const void* const* weight, const int64_t* stride, const void* states,
                       int64_t width, DType dtype) {
  shared.aligned = rows_aligned(states, width, dtype);
  for (int64_t d = 0; d < shared.directions; ++d) {
    shared.weight[d] = weight[d];
    shared.weight_stride[d] = stride[d];
    shared.aligned = shared.aligned && rows_aligned(weight[d], stride[d], dtype);
  }
}

// Launches every step; "" or what went wrong. `p.gates` are given (not from_input).
inline std::string run_steps_forward(const ForwardParams& p, const StepWorkspace& workspace, bool allow_tf32,
                                     const StepDevice& device) {
  const StepKernels& kernels = step_kernels(p.mode, arithmetic_of(p.dtype, allow_tf32));
  const Turns turns(p.rows);
  StepForward step;
  fill_shared(p, workspace, turns, step);
  step.gates = p.gates;
  step.output = p.output;
  step.h_n = p.h_n;
  step.c_n = p.c_n;
  step.cell_states = p.cell_states;
  step.reserve = p.reserve;
  for (int64_t d = 0; d < p.directions && p.mode == Mode::gru; ++d) {
    const char* bias = static_cast<const char*>(p.bias_hh[d]);
    step.bias_n[d] = bias ? bias + 2 * p.hidden_size * size_of(p.dtype) : nullptr;
  }
  set_weight(step, p.weight_hh, p.weight_hh_stride, p.output, p.state_size, p.dtype);
  step.aligned = step.aligned && (!p.hx || rows_aligned(p.hx, p.state_size, p.dtype));
  StepForward project = step;
  if (p.projected) set_weight(project, p.weight_hr, p.weight_hr_stride, workspace.hidden, p.hidden_size, p.dtype);

  StepLaunch how{device.stream, false};
  // Without any step one turn all the same: hx and cx are handed through.
  const int64_t turns_count = p.rows.steps ? p.rows.steps : 1;
  for (int64_t turn = 0; turn < turns_count; ++turn) {
    for (int64_t d = 0; d < p.directions; ++d)
      step.rows.turn[d] = turns.turn(d == 1 ? p.rows.steps - 1 - turn : turn, d == 1);
    std::string error = kernels.forward(step, how);
    // Only the first launch follows something that is not one of ours.
    how.dependent = device.dependent_launch;
    if (error.empty() && p.projected) {
      project.rows = step.rows;
      error = kernels.project_forward(project, how);
    }
    if (!error.empty()) return error;
  }
  return "";
}

inline std::string run_steps_backward(const BackwardParams& p, const StepWorkspace& workspace, bool allow_tf32,
                                      const StepDevice& device) {
  const StepKernels& kernels = step_kernels(p.mode, arithmetic_of(p.dtype, allow_tf32));
  const Turns turns(p.rows);
  const int64_t gates_width = traits(p.mode).gates * p.hidden_size;
  StepBackward step;
  fill_shared(p, workspace, turns, step);
  step.grad_output = p.grad_output;
  step.grad_h_n = p.grad_h_n;
  step.grad_c_n = p.grad_c_n;
  step.grad_cell_states = p.grad_cell_states;
  step.output = p.output;
  step.cell_states = p.cell_states;
  step.reserve = p.reserve;
  step.grad_gates = p.grad_gates;
  step.grad_gates_hh = p.grad_gates_hh;
  step.grad_hx = p.grad_hx;
  step.grad_cx = p.grad_cx;
  step.grad_projected = p.grad_projected;
  const int64_t hh_strides[kMaxDirections] = {gates_width, gates_width};
  const int64_t hr_strides[kMaxDirections] = {p.state_size, p.state_size};
  const void* gradients = p.grad_gates_hh ? p.grad_gates_hh : p.grad_gates;
  set_weight(step, workspace.weight_hh_t, hh_strides, gradients, gates_width, p.dtype);
  StepBackward project = step;
  if (p.projected) set_weight(step, workspace.weight_hr_t, hr_strides, p.grad_projected, p.state_size, p.dtype);

  StepLaunch how{device.stream, false};
  // One turn more than there are steps: rows whose first step is done hand their gradients on to hx and cx.
  const int64_t turns_count = p.rows.steps + (p.grad_hx || p.grad_cx ? 1 : 0);
  for (int64_t turn = 0; turn < turns_count; ++turn) {
    for (int64_t d = 0; d < p.directions; ++d)
      step.rows.turn[d] = turns.turn(d == 1 ? turn : p.rows.steps - 1 - turn, d == 1);
    std::string error;
    if (p.projected) {
      project.rows = step.rows;
      error = kernels.project_backward(project, how);
      how.dependent = device.dependent_launch;
    }
    if (error.empty()) error = kernels.backward(step, how);
    how.dependent = device.dependent_launch;
    if (!error.empty()) return error;
  }
  return "";
}

}  // namespace rnnfast::gpu

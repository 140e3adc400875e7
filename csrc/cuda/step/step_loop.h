// The time loop around the step kernels: one turn a step, both directions in it, a launch for each of the step's phases
// that needs its own (step.h). The split kernels' is the same, of other phases (split/split_loop.h). Plain host code;
// fills what the kernels are given and launches.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "../properties.h"
#include "step.h"

namespace rnnfast::gpu {

// Scratch in device memory. `hidden` matters to a projected forward, the transposed weights to backward, and `carry` to
// forward of a cell with a cell state and to backward of one that carries (cells.h).
struct StepWorkspace {
  void* carry{};        // (D, B, H) in the compute type: float64 for float64, else float32
  void* hidden{};       // (D, B, H) in the storage type
  Operands transposed;  // of kinds that multiplies_steps()
};

struct StepDevice {
  void* stream{};
  bool dependent_launch = false;  // sm_90 and later
  int sms = 0;                    // how many tiles are chosen for; 0: those that the current device has
};

inline const StepKernels& step_kernels(Mode mode, Arithmetic arithmetic) {
  return InstanceTable<StepInstance>::of(traits(mode).family, arithmetic);
}

// Whether rows at this base, `stride` elements apart, all start at multiples of 16 bytes.
inline bool rows_aligned(const void* base, int64_t stride, DType dtype) {
  return reinterpret_cast<uintptr_t>(base) % 16 == 0 && stride * size_of(dtype) % 16 == 0;
}

inline void fill_shared(const Recurrence& r, const StepWorkspace& workspace, const Turns& turns, StepShared& shared) {
  shared.mode = r.mode;
  shared.rows.layout = turns.layout();
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
inline void set_weight(StepShared& shared, const Operand& weight, const void* states, int64_t width, DType dtype) {
  shared.aligned = rows_aligned(states, width, dtype);
  for (int64_t d = 0; d < shared.directions; ++d) {
    shared.weight[d] = weight.data[d];
    shared.weight_stride[d] = weight.stride[d];
    shared.aligned = shared.aligned && rows_aligned(weight.data[d], weight.stride[d], dtype);
  }
}

// A launch of every step: some of its phases. It may be of somebody else's kernel.
template <class Params> struct StepPhases {
  std::function<std::string(const Params&, const StepLaunch&)> launch;
  Params params;
};

// Launches every turn; "" or what went wrong. turn_of(turn, d): where direction d is at it.
template <class Params, class TurnOf>
std::string run_turns(int64_t count, std::vector<StepPhases<Params>>& step, const StepDevice& device,
                      const TurnOf& turn_of) {
  StepLaunch how{device.stream, false, device.sms};
  if (!how.sms) {
    DeviceProperties properties;
    // They only choose among tiles: a device that does not say is taken for a Hopper card.
    constexpr int kHopperSms = 132;
    how.sms = current_properties(properties).empty() ? properties.sms : kHopperSms;
  }
  for (int64_t turn = 0; turn < count; ++turn) {
    for (StepPhases<Params>& phases : step) {
      for (int64_t d = 0; d < phases.params.directions; ++d) phases.params.rows.turn[d] = turn_of(turn, d);
      std::string error = phases.launch(phases.params, how);
      if (!error.empty()) return error;
    }
    // Before the second step some launch may follow what the call was given, which kernels read before they wait.
    how.dependent = device.dependent_launch;
  }
  return "";
}

// How many turns a pass has, and what direction d does at one.
// Forward, without any step one turn all the same: hx and cx are handed through.
template <class Call> int64_t forward_turns(const Call& p) { return p.rows.steps ? p.rows.steps : 1; }
template <class Call> auto forward_turn(const Call& p, const Turns& turns) {
  return [&p, &turns](int64_t turn, int64_t d) { return turns.turn(d == 1 ? p.rows.steps - 1 - turn : turn, d == 1); };
}
// Backward, one turn more than there are steps: rows whose first step is done hand their gradients on to hx and cx.
inline int64_t backward_turns(const BackwardParams& p) { return p.rows.steps + (p.grad_hx || p.grad_cx ? 1 : 0); }
template <class Call> auto backward_turn(const Call& p, const Turns& turns) {
  return [&p, &turns](int64_t turn, int64_t d) { return turns.turn(d == 1 ? turn : p.rows.steps - 1 - turn, d == 1); };
}

// p.gates is given.
inline std::string run_steps_forward(const ForwardParams& p, const StepWorkspace& workspace, bool allow_tf32,
                                     const StepDevice& device) {
  const StepKernels& kernels = step_kernels(p.mode, arithmetic_of(p.dtype, allow_tf32));
  const Turns turns(p.rows);
  StepForward shared;
  fill_shared(p, workspace, turns, shared);
  fill_tensors(p, shared);

  std::vector<StepPhases<StepForward>> step;
  // A phase between product and cell that needs all units of a row, as layer normalisation of W_hh h does, does not fit
  // in here: the kernels of layers with options see whole rows (variants/row.cuh).
  step.push_back({kernels.forward, shared});
  StepForward& cell = step.back().params;
  set_weight(cell, p.parameters[Kind::weight_hh], p.output, p.state_size, p.dtype);
  cell.aligned = cell.aligned && (!p.hx || rows_aligned(p.hx, p.state_size, p.dtype));
  if (p.projected) {
    step.push_back({kernels.project_forward, shared});
    StepForward& project = step.back().params;
    set_weight(project, p.parameters[Kind::weight_hr], workspace.hidden, p.hidden_size, p.dtype);
  }

  return run_turns(forward_turns(p), step, device, forward_turn(p, turns));
}

inline std::string run_steps_backward(const BackwardParams& p, const StepWorkspace& workspace, bool allow_tf32,
                                      const StepDevice& device) {
  const StepKernels& kernels = step_kernels(p.mode, arithmetic_of(p.dtype, allow_tf32));
  const Turns turns(p.rows);
  StepBackward shared;
  fill_shared(p, workspace, turns, shared);
  fill_tensors(p, shared);
  shared.grad_projected = p.grad_projected;

  const int64_t gates_width = traits(p.mode).gates * p.hidden_size;
  const void* gradients = p.grad_gates_hh ? p.grad_gates_hh : p.grad_gates;
  const auto multiply_gradients = [&](StepBackward& params) {
    set_weight(params, workspace.transposed[Kind::weight_hh], gradients, gates_width, p.dtype);
  };
  std::vector<StepPhases<StepBackward>> step;
  if (p.projected) {
    step.push_back({kernels.project_backward, shared});
    multiply_gradients(step.back().params);
  }
  // A phase that needs all units of a row follows the cell here: a launch that reads the gradients which the cell has
  // written for the step, and replaces them by those of W_hh h.
  step.push_back({kernels.backward, shared});
  StepBackward& cell = step.back().params;
  if (p.projected)
    set_weight(cell, workspace.transposed[Kind::weight_hr], p.grad_projected, p.state_size, p.dtype);
  else
    multiply_gradients(cell);

  return run_turns(backward_turns(p), step, device, backward_turn(p, turns));
}

}  // namespace rnnfast::gpu

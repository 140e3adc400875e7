// The time loop of the split kernels: the phases of a step, products among them (step/step_loop.h has the loop itself).
// Plain host code.
#pragma once

#include <functional>
#include <initializer_list>
#include <utility>

#include "../device.h"
#include "../step/step_loop.h"
#include "split.h"

namespace rnnfast::gpu {

// The product of a step with a matrix of the recurrence, for all rows.
struct SplitProduct {
  void* from{};  // (D, B, columns of the matrix), backward (D, B, rows), in the storage type
  void* sums{};  // (D, B, rows of the matrix), backward (D, B, columns), in the compute type
  // Launches it on the device's stream: from `from` to `sums` by W^T, backward by W. "" or what went wrong.
  std::function<std::string()> run;
};
constexpr Kind kOfState = multiplier_of(Size::state), kOfProjected = multiplier_of(Size::hidden);

// Scratch in device memory.
struct SplitWorkspace {
  void* carry{};  // as in StepWorkspace
  PerKind<SplitProduct> products;
};

// Whether kernels may take several units at a time: every tensor begins at a multiple of such an access.
inline bool starts_wide(DType dtype, std::initializer_list<const void*> tensors) {
  const int size = static_cast<int>(size_of(dtype));
  for (const void* tensor : tensors)
    if (reinterpret_cast<uintptr_t>(tensor) % static_cast<uintptr_t>(size * widest(size)) != 0) return false;
  return true;
}

template <class Params> StepPhases<Params> product_phase(const Params& shared, std::function<std::string()> product) {
  return {[product = std::move(product)](const Params&, const StepLaunch&) { return product(); }, shared};
}
// But at the first turn, where there is nothing to multiply.
inline std::function<std::string()> from_second_turn(std::function<std::string()> product) {
  return [product = std::move(product), first = true]() mutable {
    return std::exchange(first, false) ? std::string() : product();
  };
}

inline const SplitKernels& split_kernels(Mode mode, Arithmetic arithmetic) {
  return InstanceTable<SplitInstance>::of(traits(mode).family, arithmetic);
}

// p.gates is given. There is a step.
inline std::string run_split_forward(const ForwardParams& p, const SplitWorkspace& workspace, bool allow_tf32,
                                     const StepDevice& device) {
  const SplitKernels& kernels = split_kernels(p.mode, arithmetic_of(p.dtype, allow_tf32));
  const SplitProduct &of_state = workspace.products[kOfState], &of_projected = workspace.products[kOfProjected];
  const Turns turns(p.rows);
  SplitForward shared;
  fill_shared(p, {workspace.carry, of_projected.from, {}}, turns, shared);
  fill_tensors(p, shared);
  shared.states = of_state.from;
  shared.wide = starts_wide(p.dtype, {p.gates, p.output, p.h_n, p.c_n, p.cell_states, p.reserve, p.cx,
                                      shared.bias_split[0], shared.bias_split[1]});
  if (p.hx) {
    const int64_t bytes = p.directions * p.rows.batch * p.state_size * size_of(p.dtype);
    if (std::string error = copy_on_device(of_state.from, p.hx, bytes, device.stream); !error.empty()) return error;
  }
  std::vector<StepPhases<SplitForward>> step;
  step.push_back(product_phase(shared, p.hx ? of_state.run : from_second_turn(of_state.run)));
  shared.sums = of_state.sums;
  step.push_back({kernels.forward, shared});
  if (p.projected) {
    step.push_back(product_phase(shared, of_projected.run));
    shared.sums = of_projected.sums;
    step.push_back({kernels.project_forward, shared});
  }
  return run_turns(forward_turns(p), step, device, forward_turn(p, turns));
}

inline std::string run_split_backward(const BackwardParams& p, const SplitWorkspace& workspace, bool allow_tf32,
                                      const StepDevice& device) {
  const SplitKernels& kernels = split_kernels(p.mode, arithmetic_of(p.dtype, allow_tf32));
  const SplitProduct &of_state = workspace.products[kOfState], &of_projected = workspace.products[kOfProjected];
  const Turns turns(p.rows);
  SplitBackward shared;
  fill_shared(p, {workspace.carry, nullptr, {}}, turns, shared);
  fill_tensors(p, shared);
  shared.grad_projected = p.grad_projected;
  shared.gate_gradients = of_state.from;
  shared.state_gradients = of_projected.from;
  shared.wide =
      starts_wide(p.dtype, {p.grad_output, p.grad_h_n, p.grad_c_n, p.grad_cell_states, p.output, p.cell_states,
                            p.reserve, p.grad_gates, p.grad_gates_hh, p.grad_projected, p.hx, p.cx});
  std::vector<StepPhases<SplitBackward>> step;
  // Nothing comes back to the last step.
  step.push_back(product_phase(shared, from_second_turn(of_state.run)));
  shared.sums = of_state.sums;
  if (p.projected) {
    step.push_back({kernels.project_backward, shared});
    step.push_back(product_phase(shared, of_projected.run));
    shared.sums = of_projected.sums;
  }
  step.push_back({kernels.backward, shared});
  return run_turns(backward_turns(p), step, device, backward_turn(p, turns));
}

}  // namespace rnnfast::gpu

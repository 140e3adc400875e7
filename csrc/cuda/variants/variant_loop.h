// The time loop of the row kernels of layers with options: the phases of a step, products among them
// (split/split_loop.h has the same for plain layers). Plain host code.
#pragma once

#include "../split/split_loop.h"
#include "variant.h"

namespace rnnfast::gpu {

// The products of a step, for all rows; "" or what went wrong. Forward they multiply by W_hh^T, backward by W_hh, from
// and to the workspaces that kernels are given.
struct VariantProducts {
  std::function<std::string()> gates;  // `entering` to `sums`; `sum_gradients` to `back`
  std::function<std::string()> reset;  // with reset_first, by W_hn: `reset_state` to `reset_sums`; `reset_gradients`
};

inline const VariantKernels& variant_kernels(const VariantParams& call) {
  return InstanceTable<VariantInstance>::of(traits(call.mode).family, arithmetic_of(call.dtype, false));
}

template <class Step> void fill_call(const Turns& turns, Step& shared) {
  shared.rows.layout = turns.layout();
  shared.call.rows = turns.layout();
}

// shared: the call, and where the workspaces are.
inline std::string run_variant_forward(VariantStepForward shared, const VariantProducts& products,
                                       const StepDevice& device) {
  const VariantForward call = shared.call;
  if (call.rows.batch == 0 || call.hidden_size == 0) return "";
  const VariantKernels& kernels = variant_kernels(call);
  const Turns turns(call.rows);
  fill_call(turns, shared);
  std::vector<StepPhases<VariantStepForward>> step;
  // Without a step there is nothing to multiply.
  if (call.rows.steps) {
    if (call.hx)
      if (std::string error = kernels.begin(shared, {device.stream, false, 1}); !error.empty()) return error;
    step.push_back(product_phase(shared, call.hx ? products.gates : from_second_turn(products.gates)));
    if (call.reset_first) {
      step.push_back({kernels.reset, shared});
      step.push_back(product_phase(shared, products.reset));
    }
  }
  step.push_back({kernels.forward, shared});
  return run_turns(forward_turns(call), step, device, forward_turn(call, turns));
}

inline std::string run_variant_backward(VariantStepBackward shared, const VariantProducts& products,
                                        const StepDevice& device) {
  const VariantBackward call = shared.call;
  if (call.hidden_size == 0) return "";
  const VariantKernels& kernels = variant_kernels(call);
  const Turns turns(call.rows);
  fill_call(turns, shared);
  for (void* sums : {shared.vectors_now, shared.vectors_before}) {
    const int64_t bytes = call.rows.batch * shared.vectors * (call.dtype == DType::float64 ? 8 : 4);
    if (!bytes) continue;
    if (std::string error = zero_on_device(sums, bytes, device.stream); !error.empty()) return error;
  }
  std::vector<StepPhases<VariantStepBackward>> step;
  // Nothing comes back to the last step.
  step.push_back(product_phase(shared, from_second_turn(products.gates)));
  step.push_back({kernels.backward, shared});
  if (call.reset_first) {
    step.push_back(product_phase(shared, products.reset));
    step.push_back({kernels.reset_backward, shared});
  }
  // One turn more than there are steps: rows whose first step is done hand their gradients on to the initial states.
  const int64_t count = call.rows.steps + (call.grad_hx || call.grad_cx || call.grad_lx ? 1 : 0);
  if (call.rows.batch)
    if (std::string error = run_turns(count, step, device, backward_turn(call, turns)); !error.empty()) return error;
  return shared.vectors ? kernels.sum_vectors(shared, {device.stream, false, 1}) : "";
}

}  // namespace rnnfast::gpu

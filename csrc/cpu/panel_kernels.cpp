// The forward pass with weights in panels, for one ISA and one type of weights: compiled as kernels.cpp is, with
// RNNFAST_PANEL as the type's name.
#include "forward.h"
#include "kernels.h"
#include "panel_weights.h"

namespace rnnfast::cpu {
namespace {

template <Mode kMode, int kWide> int64_t run(const ForwardParams& params, Team& team) {
  using Weights = PanelWeights<PanelType::RNNFAST_PANEL, traits(kMode).gates, kWide>;
  return ForwardLoop<kMode, float, Weights::kBlocks, Weights>(params, team.planned()).run(team);
}

int64_t forward(const ForwardParams& params, Team& team) {
  if (has_empty_results(params)) return 0;
  return with_mode(params.mode, [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    constexpr int kGates = traits(kMode).gates;
    // Where there are enough of them for every thread, as for the other weights (kernels.cpp).
    if constexpr (kGates == 1)
      if (params.hidden_size > kPanelRows * (team.planned() / params.directions)) return run<kMode, 2>(params, team);
    return run<kMode, 1>(params, team);
  });
}

}  // namespace

#define RNNFAST_FORWARD_(isa, type) panel_forward_##isa##_##type
#define RNNFAST_FORWARD(isa, type) RNNFAST_FORWARD_(isa, type)
extern const PanelForward RNNFAST_FORWARD(RNNFAST_ISA, RNNFAST_PANEL);
const PanelForward RNNFAST_FORWARD(RNNFAST_ISA, RNNFAST_PANEL) = &forward;

}  // namespace rnnfast::cpu

// The kernels of one ISA and type. Compiled once for each pair, with that ISA's compiler flags and RNNFAST_ISA and
// RNNFAST_DTYPE as the pair's names: many short compilations, which run side by side.
#include "kernels.h"

#include <type_traits>

#include "backward.h"
#include "call_weights.h"
#include "forward.h"
#include "matmul.h"

namespace rnnfast::cpu {
namespace {

using Storage = StorageOf<DType::RNNFAST_DTYPE>::type;

// Loops whose tile holds one vector a block of units take two blocks, so that each broadcast feeds two products;
// float32, whose speed matters most, has one block too, for sizes that two would not share out among the threads.
template <template <Mode, class, int> class Loop, Mode kMode, class Params>
inline int64_t run_with_blocks(const Params& params, int64_t units, Team& team) {
  if constexpr (std::is_same_v<Storage, float>) {
    const int64_t blocks = divide_up(units, kLanes<float>), per_direction = team.planned() / params.directions;
    if (blocks == 1 || divide_up(blocks, 2) < per_direction)
      return Loop<kMode, Storage, 1>(params, team.planned()).run(team);
  }
  return Loop<kMode, Storage, 2>(params, team.planned()).run(team);
}

template <Mode kMode, class S, int kBlocks>
using Forward = ForwardLoop<kMode, S, kBlocks, CallWeights<S, traits(kMode).gates, kBlocks>>;

int64_t forward(const ForwardParams& params, Team& team) {
  if (has_empty_results(params)) return 0;
  return with_mode(params.mode, [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    // A forward tile holds every gate of a block.
    if constexpr (traits(kMode).gates > 1)
      return Forward<kMode, Storage, 1>(params, team.planned()).run(team);
    else
      return run_with_blocks<Forward, kMode>(params, params.hidden_size, team);
  });
}

int64_t backward(const BackwardParams& params, Team& team) {
  if (has_empty_results(params)) return 0;
  return with_mode(params.mode, [&](auto mode) {
    return run_with_blocks<BackwardLoop, decltype(mode)::value>(params, params.state_size, team);
  });
}

int64_t matmul(const MatmulParams& params, Team& team) { return MatmulLoop<Storage>(params).run(team); }

}  // namespace

#define RNNFAST_TABLE_(isa, dtype) kernels_##isa##_##dtype
#define RNNFAST_TABLE(isa, dtype) RNNFAST_TABLE_(isa, dtype)
extern const Kernels RNNFAST_TABLE(RNNFAST_ISA, RNNFAST_DTYPE);
const Kernels RNNFAST_TABLE(RNNFAST_ISA, RNNFAST_DTYPE) = {&forward, &backward, &matmul};

}  // namespace rnnfast::cpu

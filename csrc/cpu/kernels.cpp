// The kernels of one ISA and type. Compiled once for each pair, with that ISA's compiler flags and RNNFAST_ISA and
// RNNFAST_DTYPE as the pair's names: many short compilations, which run side by side.
#include "kernels.h"

#include <type_traits>

#include "backward.h"
#include "call_weights.h"
#include "column_weights.h"
#include "forward.h"
#include "matmul.h"
#include "pair_matmul.h"
#include "pairs.h"
#include "sanitized.h"
#include "turned_weights.h"

namespace rnnfast::cpu {
namespace {

using Storage = StorageOf<DType::RNNFAST_DTYPE>::type;

// Loops whose tile holds one vector a block of units take two blocks, so that each broadcast feeds two products;
// float32, whose speed matters most, has one block too, for sizes that two would not share out among the threads.
template <template <Mode, class, int> class Loop, Mode kMode, class Params, class... Others>
inline int64_t run_with_blocks(const Params& params, int64_t units, Team& team, Others... others) {
  if constexpr (std::is_same_v<Storage, float>) {
    const int64_t blocks = divide_up(units, kLanes<float>), per_direction = team.planned() / params.directions;
    if (blocks == 1 || divide_up(blocks, 2) < per_direction)
      return Loop<kMode, Storage, 1>(params, team.planned(), others...).run(team);
  }
  return Loop<kMode, Storage, 2>(params, team.planned(), others...).run(team);
}

using Plain = PlainProducts<ComputeOf<Storage>::type>;
// What multiplies a layer's rows and weights. Of the ISAs that have pairs, the kernels for float32 are those that may
// round to bfloat16 (isa.h).
#if defined(__AVX512BF16__)
using Usual = PairProducts;
#else
using Usual = Plain;
#endif

template <class Products> struct Loops {
  template <Mode kMode, class S, int kBlocks>
  using Forward = ForwardLoop<kMode, S, kBlocks, CallWeights<Products, S, traits(kMode).gates, kBlocks>>;
  template <Mode kMode, class S, int kBlocks>
  using Backward = BackwardLoop<kMode, S, kBlocks, ColumnWeights<Products, S, kBlocks>>;
};

template <class Products> int64_t run_forward(const ForwardParams& params, Team& team) {
  return with_mode(params.mode, [&](auto mode) {
    constexpr Mode kMode = decltype(mode)::value;
    if constexpr (std::is_same_v<Products, Plain> && sizeof(Storage) >= sizeof(float))
      if (is_worth_turning<Storage>(params))
        return ForwardLoop<kMode, Storage, 1, TurnedWeights<Storage, traits(kMode).gates>>(params, team.planned())
            .run(team);
    // A forward tile holds every gate of a block.
    if constexpr (traits(kMode).gates > 1)
      return typename Loops<Products>::template Forward<kMode, Storage, 1>(params, team.planned()).run(team);
    else
      return run_with_blocks<Loops<Products>::template Forward, kMode>(params, params.hidden_size, team);
  });
}

// Of each product of a call. So few take some microseconds, and waking the unit that makes them takes longer than it
// saves; where float32 may be rounded, small calls so stay exact. Measured, as kFewRows.
[[maybe_unused]] constexpr double kFewFlops = 3e6;

// Whether a pass with `products` products, with `columns` columns of weights together, is worth packing pairs for.
// Fewer rows meet the weights as they lie.
bool is_worth_pairs([[maybe_unused]] const Recurrence& r, [[maybe_unused]] int64_t columns,
                    [[maybe_unused]] int products) {
#if defined(RNNFAST_SANITIZED)
  return true;  // the fuzzer's calls are small
#else
  constexpr double kFewRows = 8;
  const double rows = 1.0 * r.rows.steps * r.rows.batch;
  return rows >= kFewRows &&
         2.0 * r.directions * traits(r.mode).gates * r.hidden_size * columns * rows >= products * kFewFlops;
#endif
}

int64_t forward(const ForwardParams& params, Team& team) {
  if (has_empty_results(params)) return 0;
  if constexpr (!std::is_same_v<Usual, Plain>)
    if (!is_worth_pairs(params, params.input_size + params.state_size, 2)) return run_forward<Plain>(params, team);
  return run_forward<Usual>(params, team);
}

template <class Products> int64_t run_backward(const BackwardParams& params, Team& team, const Chunks* chunks) {
  return with_mode(params.mode, [&](auto mode) {
    return run_with_blocks<Loops<Products>::template Backward, decltype(mode)::value>(params, params.state_size, team,
                                                                                      chunks);
  });
}

int64_t backward(const BackwardParams& params, Team& team, const Chunks* chunks) {
  if (has_empty_results(params)) return 0;
  if constexpr (!std::is_same_v<Usual, Plain>)
    if (!is_worth_pairs(params, params.state_size, 1)) return run_backward<Plain>(params, team, chunks);
  return run_backward<Usual>(params, team, chunks);
}

int64_t matmul(const MatmulParams& params, Team& team) {
#if defined(__AVX512BF16__)
  if (sizeof(Storage) < sizeof(float) || 2.0 * params.m * params.n * params.k >= kFewFlops)
    return PairMatmul<Storage>(params).run(team);
#endif
  return MatmulLoop<Storage>(params).run(team);
}

}  // namespace

#define RNNFAST_TABLE_(isa, dtype) kernels_##isa##_##dtype
#define RNNFAST_TABLE(isa, dtype) RNNFAST_TABLE_(isa, dtype)
extern const Kernels RNNFAST_TABLE(RNNFAST_ISA, RNNFAST_DTYPE);
const Kernels RNNFAST_TABLE(RNNFAST_ISA, RNNFAST_DTYPE) = {&forward, &backward, &matmul};

}  // namespace rnnfast::cpu

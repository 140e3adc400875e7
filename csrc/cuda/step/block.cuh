// What the step kernels share: a block's tile of results, and the phase of a step that multiplies. A block takes 16
// units (of the hidden units, or of the projected state) of some batch indices of one direction; each thread then
// finishes units of its own. State passes from launch to launch in global memory: h_t in `output`, c_t in a workspace.
// What no earlier launch of the call writes is loaded before the kernel waits for them.
#pragma once

#include "../cell.cuh"
#include "../elements.cuh"
#include "../plan/step_tiles.h"
#include "../primitives/dependent_launch.h"
#include "../product.cuh"
#include "../rows.cuh"
#include "step.h"

namespace rnnfast::gpu {

// Units a block. Legal: 16 alone, a tile's weights. Row i of a tile is the weight row of unit i, and gate g's results
// are tile g: two tiles of 16 for a block of 32 units would need another order of rows in weight_row() and at().
constexpr int kUnits = 16;
static_assert(kUnits == kTileWeights,
              "kUnits must be kTileWeights (16): a block's units are the weight rows of one tile");
static_assert(kUnits == kStepUnits, "kStepUnits must be kUnits: the host counts blocks by it");
// Warps a block. Legal: 1 to 32, of them those whose rings fit shared memory (BlockProduct says so). The more warps,
// the more loads are under way.
constexpr int kUsualWarps = 8;

// Of a kernel with one result for each unit.
template <class Type, int kBatchTiles> using UnitProduct = BlockProduct<Type, 1, kBatchTiles, kUsualWarps>;
static_assert(UnitProduct<Float32, 1>::kWeights == kUnits, "UnitProduct must have one weight tile: a result a unit");

template <class Type, class Params, int kBatch> struct Block : Elements<Type, Params> {
  using typename Elements<Type, Params>::Storage;
  const int64_t first_b = static_cast<int64_t>(block_index().x) * kBatch;
  const int64_t first_unit = static_cast<int64_t>(block_index().y) * kUnits;

  RNNFAST_DEVICE explicit Block(const Params& p) : Elements<Type, Params>{p, block_index().z} {}

  // Of the block's batch index n.
  RNNFAST_DEVICE RowTurn row_turn(int n) const { return gpu::row_turn(this->p.rows, this->d, first_b + n); }
  // Row `i` of the `count` of the weights, a readable one where there is none; results of such rows are not used.
  RNNFAST_DEVICE const Storage* weight_row(int64_t i, int64_t count) const {
    return at<Storage>(this->p.weight[this->d], (i < count ? i : 0) * this->p.weight_stride[this->d]);
  }
};

// The phase that multiplies, and the one wait for the earlier launches in it. state(n): what the weights' rows are
// multiplied with for batch index n, null where that is zeros; only its address is asked for, before the wait.
// load_written(): loads what else the earlier launches wrote, so that it is on its way beside the states. Afterwards
// Product::at gives the results, unless no batch index of the block has anything to multiply: then false in every
// thread.
template <class Product, class Block, class WeightRow, class State, class Load>
RNNFAST_DEVICE bool multiply(const Block& block, int64_t length, const WeightRow& weight_row, const State& state,
                             const Load& load_written) {
  bool lane_has_state = false;  // of those that this lane fetches; a warp's lanes fetch all
  Product product(length, block.p.aligned, weight_row, [&](int n) {
    const auto* row = state(n);
    lane_has_state = lane_has_state || row;
    return row ? row : block.weight_row(0, 1);
  });
  const bool multiplied = any(lane_has_state);
  // Everything the earlier launches wrote is there from here on.
  wait_for_previous_grid();
  if (multiplied) product.fetch_first_states();
  load_written();
  if (multiplied) {
    product.run();
    sync_threads();  // every warp's partial sums are in shared memory
  } else {
    product.abandon();
  }
  return multiplied;
}

// Elements of a (kBatch, kUnits) tile that a thread takes.
template <class Product> constexpr int kSlots = (Product::kBatch * kUnits + Product::kThreads - 1) / Product::kThreads;

// Runs body(slot, n, unit) for this thread's elements of the tile; slot counts them.
template <class Product, class Body> RNNFAST_DEVICE void for_elements(const Body& body) {
  RNNFAST_UNROLL
  for (int slot = 0; slot < kSlots<Product>; ++slot) {
    const int element = slot * Product::kThreads + static_cast<int>(thread_index());
    if (element < Product::kBatch * kUnits) body(slot, element / kUnits, element % kUnits);
  }
}

}  // namespace rnnfast::gpu

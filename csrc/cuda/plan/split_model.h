// The cost model of the split kernels: products of a library, and kernels that see whole rows. Plain host code, no
// torch, no CUDA.
#pragma once

#include <algorithm>
#include <cmath>

#include "model.h"

namespace rnnfast::gpu {

// How a library lays a product out.
struct LibraryTiles {
  int rows = 0, columns = 0, parts = 1;  // of a tile; of the sum, each a block's
  double blocks = 0;
  double l2_bytes = 0;  // what leaves L2 for all blocks
};

struct SplitCost {
  LibraryTiles tiles;  // of the product with W_hh
  Prediction prediction;
};

// A product of the library: (rows, length) times (length, columns) of each direction. It chooses among tiles and ways
// to share a sum; here the cheapest, of sizes that libraries have.
inline LibraryTiles add_library_product(const Request& r, const DeviceProperties& device, const Costs& costs,
                                        double rows, double columns, double length, Prediction& p) {
  constexpr int kRows[] = {16, 32, 64, 96, 128, 192, 256}, kColumns[] = {64, 128, 256}, kLargest = 128 * 256;
  constexpr int kMostParts = 16;
  const int size = element_bytes(r.arithmetic);
  // Multiply-adds a clock of an SM.
  const double most = size == 2                                            ? costs[Constant::library_mma]
                      : size == 8                                          ? costs[Constant::library_fma64]
                      : r.arithmetic == Arithmetic::tf32 && r.library_tf32 ? costs[Constant::library_mma] / 2
                                                                           : costs[Constant::fma32];
  const double rate = most * costs[Constant::library_part];
  const Limit multiply = size == 2 || rate > costs[Constant::fma32] ? Limit::mma : Limit::issue;
  // Weights that L2 does not keep come from memory every step.
  const double weights = columns * length * size * double(r.directions);
  const double memory = weights > double(device.l2_bytes) ? costs.moved(weights, Constant::hbm_bandwidth) : 0;
  Prediction best;
  LibraryTiles chosen;
  const auto look_at = [&](LibraryTiles tile) {
    const double tiles = std::ceil(rows / tile.rows) * std::ceil(columns / tile.columns) * double(r.directions);
    const double on_busiest = std::ceil(tiles * tile.parts / device.sms), part = length / tile.parts;
    const double block_bytes = (std::min<double>(tile.rows, rows) + tile.columns) * part * size;
    tile.blocks = tiles * tile.parts;
    tile.l2_bytes = tile.blocks * block_bytes * costs[Constant::library_l2_part];
    Prediction way;
    way.phase(Limit::launch, costs[Constant::graph_launch]);
    // Until the first operands are there, and the last sums are written.
    way.phase(Limit::latency, 2 * costs[Constant::l2_latency]);
    way.phase({{multiply, costs.clocks(on_busiest * tile.rows * tile.columns * part / rate)},
               {Limit::l2, std::max(costs.moved(tile.l2_bytes, Constant::l2_bandwidth),
                                    costs.moved_by_sm(on_busiest * block_bytes, Constant::l2_to_sm))},
               {Limit::hbm, memory}});
    if (tile.parts > 1) {
      // A sum in parts is added up by a kernel of its own.
      way.phase(Limit::launch, costs[Constant::graph_launch]);
      const double sums = (tile.parts + 1) * rows * columns * double(r.directions) * 4;
      way.phase(Limit::l2, 2 * costs[Constant::l2_latency] + costs.moved(sums, Constant::l2_bandwidth));
    }
    if (best.us() > 0 && way.us() >= best.us()) return;
    best = way;
    chosen = tile;
  };
  for (const int tile_rows : kRows)
    for (const int tile_columns : kColumns)
      for (int parts = 1; parts <= kMostParts && tile_rows * tile_columns <= kLargest; parts *= 2)
        look_at({tile_rows, tile_columns, parts});
  p.add(best);
  return chosen;
}

// A row kernel: `compute_elements` of each unit pass through L2 in the compute type, each once written and once read.
inline void add_row_kernel(const Request& r, const DeviceProperties& device, const Costs& costs, double units,
                           double compute_elements, double instructions, int chain, Prediction& p) {
  const double rows = double(r.batch) * double(r.directions);
  const double bytes = 2 * rows * units * compute_elements * std::max(element_bytes(r.arithmetic), 4);
  // Of the rows on the busiest SM; a sub-core has a quarter of the warps.
  const double warps_a_core = std::ceil(rows / device.sms) * std::ceil(units / 32) / 4;
  p.phase(Limit::launch, costs[Constant::graph_launch]);
  p.phase(Limit::latency, 2 * costs[Constant::l2_latency] + costs.clocks(chain * costs[Constant::function_latency]));
  p.phase({{Limit::l2, costs.moved(bytes, Constant::l2_bandwidth)},
           {Limit::issue, costs.clocks(warps_a_core * instructions)}});
}

// The phases of split/split_loop.h. The device follows the host, which is ahead as long as a step takes it less time
// than the device; in a graph nobody waits for it.
inline SplitCost split_cost(const Request& r, const DeviceProperties& device) {
  const Costs costs(device);
  const CellTraits& cell = traits(r.mode);
  const double hidden = double(r.hidden_size), state = double(r.projection_size ? r.projection_size : r.hidden_size);
  const double rows = double(r.batch), gates = cell.gates * hidden;
  CellWork work = cell_work(r, costs, element_bytes(r.arithmetic) != 2);
  // Four units a thread share their addresses: 102 and 127 instructions a unit are counted (docs/predicted.md) where
  // other kernels have 210 and 300.
  constexpr double kShared = 0.5, kCopyInstructions = 20;
  work.instructions *= kShared;
  SplitCost cost;
  Prediction& p = cost.prediction;
  if (r.backward) {
    cost.tiles = add_library_product(r, device, costs, rows, state, gates, p);
    if (r.projection_size) {
      add_row_kernel(r, device, costs, state, 1, kCopyInstructions, 0, p);
      add_library_product(r, device, costs, rows, hidden, state, p);
    }
    add_row_kernel(r, device, costs, hidden, carries(cell) ? 2 : 1, work.instructions, work.chain, p);
  } else {
    cost.tiles = add_library_product(r, device, costs, rows, gates, state, p);
    add_row_kernel(r, device, costs, hidden, cell.gates + (cell.has_cell_state ? 1 : 0), work.instructions, work.chain,
                   p);
    if (r.projection_size) {
      add_library_product(r, device, costs, rows, state, hidden, p);
      add_row_kernel(r, device, costs, state, 1, kCopyInstructions, 0, p);
    }
  }
  p.beside(Limit::hbm, costs.moved(step_traffic(r), Constant::hbm_bandwidth));
  if (!r.in_graph)
    p.beside(Limit::launch, (r.projection_size ? 2 : 1) * (costs[Constant::library_launch] + costs[Constant::launch]));
  return cost;
}

}  // namespace rnnfast::gpu

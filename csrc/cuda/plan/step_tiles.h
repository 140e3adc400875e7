// Which tile the blocks of a step kernel's launch take: the launch decides by it, and the cost model of the plan knows
// the same. Few batch indices a block put more SMs to work, many read the weights fewer times. Plain host code.
#pragma once

#include <algorithm>
#include <cstdint>

namespace rnnfast::gpu {

constexpr int kStepUnits = 16;  // units a block (step/block.cuh)

// A kernel's block.
struct StepTile {
  int rows = 0;   // of the weights
  int batch = 0;  // indices
  int threads = 0;
  int element_bytes = 0;
  bool tensor_cores = false;
};

// What a launch multiplies: `results` units, vectors of `length` elements, for a batch in each direction.
struct StepWork {
  int64_t results = 0, length = 0, batch = 0, directions = 1;

  int64_t blocks(const StepTile& tile) const {
    return (batch + tile.batch - 1) / tile.batch * ((results + kStepUnits - 1) / kStepUnits) * directions;
  }
};

// Cells that one sub-core of an SM goes through for a block, a warp's as one.
inline int64_t cells_a_core(const StepTile& tile, int64_t batch) {
  const int64_t cells = std::min<int64_t>(batch, tile.batch) * kStepUnits;
  const int64_t rounds = (cells + tile.threads - 1) / tile.threads;
  return rounds * ((std::min<int64_t>(cells, tile.threads) + 127) / 128);
}

// Clocks of the SM with the most blocks: roughly, for tiles to be compared by. The constants are a Hopper card's from
// costs.h, and a cell's instructions, whatever the card: kMeasured does not reach them. Tensor cores are never what
// such a block waits for.
inline double step_clocks(const StepTile& tile, const StepWork& work, int sms) {
  constexpr double kSmBytes = 64, kL2Bytes = 24, kCell = 300;  // a clock; a clock and SM where all ask; instructions
  const auto blocks = double(work.blocks(tile)), busiest = double((work.blocks(tile) + sms - 1) / sms);
  const double states = double(std::min<int64_t>(work.batch, tile.batch));
  const double bytes = (tile.rows + states) * double(work.length) * tile.element_bytes;
  double product = std::max(busiest * bytes / kSmBytes, blocks * bytes / (kL2Bytes * sms));
  if (!tile.tensor_cores) {
    const double adds_a_clock = tile.element_bytes == 4 ? 128 : 64;
    product = std::max(product, busiest * tile.rows * tile.batch * double(work.length) / adds_a_clock);
  }
  return product + busiest * double(cells_a_core(tile, work.batch)) * kCell;
}

inline bool takes_large(const StepTile& small, const StepTile& large, const StepWork& work, int sms) {
  return step_clocks(large, work, sms) < step_clocks(small, work, sms);
}

}  // namespace rnnfast::gpu

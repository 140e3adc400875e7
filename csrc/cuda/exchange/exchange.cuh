// How the blocks that share a recurrence hand on what the next step multiplies. Two kinds, and each exchange has both,
// made of the kernel's arguments and, for errors, its name:
//
// Gather, forward: every block needs h_t of all units.
//   put(turn, n, u, value)   by all lanes of a warp: h of the own unit u of batch index n, multiplied in that turn
//   send(turn)               after all of a thread's put()
//   receive(turn)            returns when all units' values of that turn are in shared memory
//   operands(turn)           where: a row for each batch index
// Scatter, backward: every block has a part of dh_t of all units, and needs the sum of all parts of its own units.
//   send(turn, tile, sums)   by all lanes of a warp: sums of the units 16 tile to 16 tile + 15, as mma lays them out
//   sent(turn)               after all of a thread's send()
//   receive(turn)            returns when all parts of that turn's sums are in shared memory
//   sum(turn, u, n)          of the own unit u, the parts added in a fixed order
//
// Nothing but the data orders the turns: whoever sends for turn t + 1 has received all of turn t, and every block sends
// for turn t + 1 once all its threads are done with what they received for turn t - 1. So two buffers suffice where
// others write into them, one where the block alone does.
#pragma once

#include "../persistent/slice.cuh"
#include "../primitives/shared.h"

namespace rnnfast::gpu {

// Division by a number that is known when the kernel starts: exact for numerators below 65536.
class Divisor {
 public:
  RNNFAST_DEVICE explicit Divisor(int by) : by_(by), factor_(0xffffffffu / static_cast<unsigned>(by) + 1) {}
  RNNFAST_DEVICE int divide(int value) const {
    return by_ == 1 ? value : static_cast<int>(static_cast<uint64_t>(static_cast<unsigned>(value)) * factor_ >> 32);
  }
  RNNFAST_DEVICE int by() const { return by_; }

 private:
  int by_;
  unsigned factor_;
};

// A block's place in its group, and its shared memory.
template <class Type> struct Place {
  using Storage = typename Type::Storage;
  static constexpr int kBytes = static_cast<int>(sizeof(Storage));

  const PersistentShared& p;
  const int rank = static_cast<int>(block_index().x);  // a group's blocks stand side by side

  RNNFAST_DEVICE int units() const { return p.layout.units; }
  RNNFAST_DEVICE int group() const { return p.layout.group; }
  RNNFAST_DEVICE int64_t group_index() const {
    return static_cast<int64_t>(block_index().z) * grid_size().y + block_index().y;
  }
  RNNFAST_DEVICE std::byte* operands(int buffer) const {
    return shared_memory() + p.shape.map.operands + buffer * p.shape.map.operand_bytes;
  }
  // Where the value of unit u of the whole group belongs.
  RNNFAST_DEVICE std::byte* operand(int buffer, int n, int u) const {
    return operands(buffer) + n * p.shape.map.operand_stride + u * kBytes;
  }
  RNNFAST_DEVICE float* sums() const { return reinterpret_cast<float*>(shared_memory() + p.shape.map.sums); }
};

RNNFAST_DEVICE uint64_t two_words(uint32_t first, uint32_t second) {
  return static_cast<uint64_t>(second) << 32 | first;
}
RNNFAST_DEVICE Word16 word_of(uint64_t first, uint64_t second) {
  return {{static_cast<uint32_t>(first), static_cast<uint32_t>(first >> 32), static_cast<uint32_t>(second),
           static_cast<uint32_t>(second >> 32)}};
}

// The part of a warp's tile that a lane sends, of one batch tile: one unit's sums of four batch indices side by side.
// Neighbours trade: even lanes get the upper rows of both, odd lanes the lower ones.
struct UnitSums {
  int octet;  // of the group
  int u, n;   // unit in the octet; first batch index
  Word16 sums;
};
RNNFAST_DEVICE UnitSums unit_sums(int tile, int batch_tile, const float (&sums)[4]) {
  const bool odd = lane() % 2 != 0;
  const auto pair = [&](bool lower) {
    return two_words(bits_of(lower ? sums[2] : sums[0]), bits_of(lower ? sums[3] : sums[1]));
  };
  const uint64_t mine = pair(odd), others = shuffle_xor(pair(!odd), 1);
  return {2 * tile + odd, static_cast<int>(lane() / 4), batch_tile * kBatchTile + static_cast<int>(lane() % 4 / 2) * 4,
          odd ? word_of(others, mine) : word_of(mine, others)};
}

template <Exchange kExchange, class Type, int kBatch> class Gather;
template <Exchange kExchange, class Type, int kBatch> class Scatter;

}  // namespace rnnfast::gpu

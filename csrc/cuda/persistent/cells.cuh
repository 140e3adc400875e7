// What both time loops share: the cells that a thread owns, and where they are in the sequence.
#pragma once

#include "../cell.cuh"
#include "../elements.cuh"
#include "../primitives/execution.h"
#include "../primitives/memory.h"
#include "../primitives/shared.h"
#include "../rows.cuh"
#include "persistent.h"

namespace rnnfast::gpu {

// A unit of a batch index, of this block. Small numbers: they stay in registers beside the weights.
struct OwnCell {
  int n = 0, u = 0;          // in the block
  RowSteps steps = {-1, 0};  // of the batch index; none where the tensors have no such unit or batch index

  RNNFAST_DEVICE bool exists() const { return steps.length >= 0; }
};

// Which cells a thread has, always the same ones: neighbouring lanes have neighbouring units. Whole warps have a cell
// or have none, so that lanes may meet inside for_each. Names their elements in the tensors, too.
template <class Type, class Params, int kBatch> class OwnCells {
  using Storage = typename Type::Storage;

 public:
  const unsigned d = block_index().z;

  RNNFAST_DEVICE explicit OwnCells(const Params& p)
      : p_(p),
        first_unit_(block_index().x * static_cast<unsigned>(p.layout.units)),
        H_(static_cast<uint32_t>(p.hidden_size)),
        directions_(static_cast<uint32_t>(p.directions)) {
    const int units = p.layout.units, threads = static_cast<int>(block_threads());
    const int before_warp = static_cast<int>(thread_index() - lane());
    count_ = uniform(divide_up(units * kBatch > before_warp ? units * kBatch - before_warp : 0, threads));
    RNNFAST_UNROLL
    for (int i = 0; i < kMostCells; ++i) {
      if (i >= count_) break;
      const int index = i * threads + static_cast<int>(thread_index());
      OwnCell& cell = cells_[i];
      cell.n = index / units;
      cell.u = index % units;
      if (first_unit_ + static_cast<unsigned>(cell.u) < H_) cell.steps = row_steps(p.rows, b(cell));
    }
  }

  // body(i, cell)
  template <class Body> RNNFAST_DEVICE void for_each(const Body& body) const {
    RNNFAST_UNROLL
    for (int i = 0; i < kMostCells; ++i)
      if (i < count_) body(i, cells_[i]);
  }

  // Which turn this is for all rows, counted from the direction's first one: forward takes the steps in the direction's
  // order, backward in the reverse, and one turn more than there are steps.
  RNNFAST_DEVICE TurnStep turn(int number, bool backward) const {
    const bool reversed = d == 1;
    return turn_step(p_.rows, reversed != backward ? steps() - 1 - number : number, reversed);
  }
  RNNFAST_DEVICE int steps() const { return static_cast<int>(p_.rows.layout.steps); }
  // Whether the row is in the tensors: padded ones are, beyond their length.
  RNNFAST_DEVICE bool in_memory(const OwnCell& cell, const TurnStep& at) const {
    return p_.rows.offsets ? cell.steps.active(at) : cell.exists() && at.time >= 0 && at.time < steps();
  }

  // Index in a tensor of rows with `width` values a unit, of the first one; the next is H further.
  RNNFAST_DEVICE uint64_t in_rows(const OwnCell& cell, uint32_t row, uint32_t width) const {
    const uint32_t place = (row + cell.steps.row) * directions_ + d;
    return static_cast<uint64_t>(place) * (width * H_) + unit(cell);
  }
  // In (D, B, H).
  RNNFAST_DEVICE int64_t in_state(const OwnCell& cell) const {
    return (d * p_.rows.layout.batch + b(cell)) * p_.hidden_size + unit(cell);
  }
  RNNFAST_DEVICE uint32_t unit(const OwnCell& cell) const { return first_unit_ + static_cast<unsigned>(cell.u); }

 private:
  RNNFAST_DEVICE int64_t b(const OwnCell& cell) const { return (p_.first_tile + block_index().y) * kBatch + cell.n; }

  const Params& p_;
  const uint32_t first_unit_, H_, directions_;
  int count_ = 0;
  OwnCell cells_[kMostCells];
};

// Announces to L2 what the block's cells will read of a tensor of rows some turns from now: each thread asks for some
// bytes that no other asks for.
constexpr int kPrefetchTurns = 2;
template <class Type, int kBatch> class Prefetch {
 public:
  // width: values a unit.
  template <class Params> RNNFAST_DEVICE Prefetch(const Params& p, int width) {
    // 32 bytes, or more where there are not as many threads.
    int asked = 32 / static_cast<int>(sizeof(typename Type::Storage)), parts = divide_up(p.layout.units, asked);
    while (parts > 1 && parts * width * kBatch > static_cast<int>(block_threads()))
      parts = divide_up(p.layout.units, asked *= 2);
    const int id = static_cast<int>(thread_index()), n = id / parts / width;
    const int unit = static_cast<int>(block_index().x) * p.layout.units + id % parts * asked;
    if (n >= kBatch || unit >= p.hidden_size) return;
    steps_ = row_steps(p.rows, (p.first_tile + block_index().y) * kBatch + n);
    in_row_ = static_cast<uint32_t>(id / parts % width * p.hidden_size + unit);
  }
  template <class Params>
  RNNFAST_DEVICE void ask(const Params& p, const void* tensor, int width, const TurnStep& at) const {
    if (!steps_.active(at)) return;
    const uint32_t place = (at.row + steps_.row) * static_cast<uint32_t>(p.directions) + block_index().z;
    const uint64_t index = static_cast<uint64_t>(place) * static_cast<uint32_t>(width * p.hidden_size) + in_row_;
    prefetch_l2(static_cast<const typename Type::Storage*>(tensor) + index);
  }

 private:
  RowSteps steps_ = {-1, 0};
  uint32_t in_row_ = 0;
};

// Row of the hidden unit's gate in a slice: octets of units, each with all its gates.
template <int kGates> RNNFAST_DEVICE int slice_row(int u, int gate) {
  return (u / kOctet * kGates + gate) * kOctet + u % kOctet;
}

// Whatever stands behind the last unit is multiplied with zeros, and must be a number. Before the exchange begins.
RNNFAST_DEVICE void clear_operands(const PersistentShared& p) {
  std::byte* const operands = shared_memory() + p.shape.map.operands;
  for (int word = static_cast<int>(thread_index()) * 16; word < p.shape.map.sums - p.shape.map.operands;
       word += static_cast<int>(block_threads()) * 16)
    *reinterpret_cast<Word16*>(operands + word) = Word16{};
}

// The block's part of W_hh, whose rows are all gates of its units; zeros beyond. As fragments of 16 rows and 32 bytes
// of the sum: of the four registers of a lane the first has its row, lane / 4, at its place in the sum, the second
// eight rows below, the other two the same half of the sum further.
template <class Type, int kGates> class SliceWeights {
  using Storage = typename Type::Storage;
  static constexpr int kPart = 4 / static_cast<int>(sizeof(Storage));  // elements of a register
  static constexpr int kHalf = 4 * kPart;                              // of the sum

 public:
  template <class Params>
  RNNFAST_DEVICE explicit SliceWeights(const Params& p)
      : weight_(static_cast<const Storage*>(p.weight[block_index().z])),
        stride_(p.weight_stride[block_index().z]),
        H_(static_cast<int>(p.hidden_size)),
        first_unit_(static_cast<int>(block_index().x) * p.layout.units),
        units_(p.layout.units) {}

  template <bool kBackward> RNNFAST_DEVICE Word16 word(int first_row, int first_k) const {
    const int row = first_row + static_cast<int>(lane() / 4), k = first_k + static_cast<int>(lane() % 4) * kPart;
    return kBackward ? along_gates(row, k) : along_units(row, k);
  }

 private:
  // Forward: rows are gates, and the sum goes over the units of h_{t-1}.
  RNNFAST_DEVICE Word16 along_units(int row, int k) const {
    Word16 word;
    RNNFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const Storage* gate = of_gate(row + 8 * i);
      word.x[i] = part(gate, k, gate ? H_ : 0);
      word.x[2 + i] = part(gate, k + kHalf, gate ? H_ : 0);
    }
    return word;
  }
  RNNFAST_DEVICE static uint32_t part(const Storage* gate, int k, int end) {
    if constexpr (kPart == 1) {
      return k < end ? bits_of(gate[k]) : 0;
    } else {
      if (k + 1 < end && reinterpret_cast<uintptr_t>(gate) % 4 == 0)
        return *reinterpret_cast<const uint32_t*>(gate + k);
      return pack(k < end ? gate[k] : zero(), k + 1 < end ? gate[k + 1] : zero());
    }
  }

  // Backward: rows are units of h_{t-1}, and the sum goes over the block's gates: the same weights the other way round.
  RNNFAST_DEVICE Word16 along_gates(int row, int k) const {
    Word16 word;
    RNNFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      const Storage* gate = of_gate(k + half * kHalf);
      // The next row, if the register has it, is one of the same octet.
      const bool next = kPart == 2 && gate && first_unit_ + unit_of(k + half * kHalf) + 1 < H_;
      RNNFAST_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int at = row + 8 * i;
        const Storage value = gate && at < H_ ? gate[at] : zero();
        if constexpr (kPart == 1)
          word.x[2 * half + i] = bits_of(value);
        else
          word.x[2 * half + i] = pack(value, next && at < H_ ? gate[stride_ + at] : zero());
      }
    }
    return word;
  }

  RNNFAST_DEVICE static Storage zero() { return convert<Storage>(0.0f); }
  // Of a gate's row: its unit, of the block.
  RNNFAST_DEVICE static int unit_of(int row) { return row / kOctet / kGates * kOctet + row % kOctet; }
  RNNFAST_DEVICE const Storage* of_gate(int row) const {
    const int unit = first_unit_ + unit_of(row);
    if (unit_of(row) >= units_ || unit >= H_) return nullptr;
    return weight_ + static_cast<int64_t>(row / kOctet % kGates * H_ + unit) * stride_;
  }

  const Storage* const weight_;
  const int64_t stride_;
  const int H_, first_unit_, units_;
};

}  // namespace rnnfast::gpu

// A group of blocks as a cluster: each stores into the shared memory of all, where an mbarrier counts the bytes. The
// cluster meets at the start only: whatever is sent to a block it receives before it ends.
#pragma once

#include "../primitives/async_copy.h"
#include "../primitives/cluster.h"
#include "../primitives/mbarrier.h"
#include "exchange.cuh"

namespace rnnfast::gpu {

// Two barriers, one for each buffer, whose phases are turns.
class TurnBarriers {
 public:
  // Before the cluster meets.
  RNNFAST_DEVICE void initialise() {
    if (thread_index() != 0) return;
    mbarrier_init(&of(0), 1);
    mbarrier_init(&of(1), 1);
    fence_mbarrier_init();
  }
  RNNFAST_DEVICE static mbarrier& of(int turn) { return reinterpret_cast<mbarrier*>(shared_memory())[turn & 1]; }
  // Once a turn and block.
  RNNFAST_DEVICE static void expect(int turn, int bytes) {
    if (thread_index() == 0) mbarrier_arrive_expect_tx(&of(turn), static_cast<uint32_t>(bytes));
  }
  RNNFAST_DEVICE static void wait(int turn) { mbarrier_wait(&of(turn), static_cast<uint32_t>(turn >> 1) & 1); }
};

// What neighbouring lanes have, side by side in 16 bytes, in each of them: 8 lanes of 16 bits, or 4 of 32.
template <class Storage> constexpr int kWordLanes = 16 / static_cast<int>(sizeof(Storage));
template <class Storage> RNNFAST_DEVICE Word16 word_of_neighbours(Storage value) {
  unsigned distance = 1;
  uint32_t item;
  if constexpr (sizeof(Storage) == 2) {
    const uint32_t mine = bits_of(value), other = shuffle_xor(mine, distance);
    item = lane() & distance ? other | mine << 16 : mine | other << 16;
    distance = 2;
  } else {
    item = bits_of(value);
  }
  const uint32_t other_item = shuffle_xor(item, distance);
  const uint64_t two = lane() & distance ? two_words(other_item, item) : two_words(item, other_item);
  const uint64_t others = shuffle_xor(two, 2 * distance);
  return lane() & 2 * distance ? word_of(others, two) : word_of(two, others);
}

template <class Type, int kBatch> class Gather<Exchange::cluster, Type, kBatch> {
  using Storage = typename Type::Storage;

 public:
  RNNFAST_DEVICE Gather(const PersistentShared& p, const char* /*kernel*/) : place_{p} { barriers_.initialise(); }
  // No block may send before the others' barriers are there.
  RNNFAST_DEVICE void begin() { cluster_sync(); }
  // Whatever is sent to a block it receives before it ends.
  RNNFAST_DEVICE void end() {}

  // The lanes that share a word send it to different blocks.
  RNNFAST_DEVICE void put(int turn, int n, int u, Storage value) {
    const Word16 word = word_of_neighbours(value);
    constexpr int kLanes = kWordLanes<Storage>;
    auto* to =
        reinterpret_cast<Word16*>(place_.operand((turn & 1), n, place_.rank * place_.units() + u / kLanes * kLanes));
    mbarrier* bar = &barriers_.of(turn);
    // A lane's word speaks for others: what they have read of the step's sums the next step may overwrite.
    sync_warp();
    for (int rank = static_cast<int>(lane()) % kLanes; rank < place_.group(); rank += kLanes) {
      const auto peer = static_cast<unsigned>(rank);
      st_async(word, map_to_rank(to, peer), map_to_rank(bar, peer));
    }
  }
  RNNFAST_DEVICE void send(int turn) {
    barriers_.expect(turn, place_.group() * place_.units() * kBatch * static_cast<int>(sizeof(Storage)));
  }
  // What follows is done by whole warps: a wait may end in one lane before another.
  RNNFAST_DEVICE void receive(int turn) {
    barriers_.wait(turn);
    converge_warp();
  }
  RNNFAST_DEVICE const std::byte* operands(int turn) const { return place_.operands((turn & 1)); }

 private:
  const Place<Type> place_;
  TurnBarriers barriers_;
};

template <class Type, int kBatch> class Scatter<Exchange::cluster, Type, kBatch> {
 public:
  RNNFAST_DEVICE Scatter(const PersistentShared& p, const char* /*kernel*/)
      : place_{p}, octets_(p.layout.units / kOctet) {
    barriers_.initialise();
  }
  RNNFAST_DEVICE void begin() { cluster_sync(); }
  RNNFAST_DEVICE void end() {}

  RNNFAST_DEVICE void send(int turn, int tile, const float (&sums)[kBatch / kBatchTile][4]) {
    RNNFAST_UNROLL
    for (int j = 0; j < kBatch / kBatchTile; ++j) {
      const UnitSums part = unit_sums(tile, j, sums[j]);
      const int owner = octets_.divide(part.octet);
      if (owner >= place_.group()) continue;
      const int u = (part.octet - owner * octets_.by()) * kOctet + part.u;
      auto* to = reinterpret_cast<Word16*>(slot(turn, place_.rank) + u * sum_row(kBatch) + part.n);
      const auto peer = static_cast<unsigned>(owner);
      st_async(part.sums, map_to_rank(to, peer), map_to_rank(&barriers_.of(turn), peer));
    }
  }
  RNNFAST_DEVICE void sent(int /*turn*/) {}
  RNNFAST_DEVICE void receive(int turn) {
    barriers_.expect(turn, place_.group() * place_.units() * kBatch * static_cast<int>(sizeof(float)));
    barriers_.wait(turn);
  }
  RNNFAST_DEVICE float sum(int turn, int u, int n) const {
    float sum = 0;
    RNNFAST_UNROLL_BY(4)
    for (int source = 0; source < place_.group(); ++source) sum += slot(turn, source)[u * sum_row(kBatch) + n];
    return sum;
  }

 private:
  RNNFAST_DEVICE float* slot(int turn, int source) const {
    return place_.sums() + ((turn & 1) * place_.group() + source) * place_.units() * sum_row(kBatch);
  }
  const Place<Type> place_;
  const Divisor octets_;
  TurnBarriers barriers_;
};

}  // namespace rnnfast::gpu

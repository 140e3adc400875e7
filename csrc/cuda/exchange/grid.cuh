// A group of blocks that run at the same time, anywhere on the card: what they hand on goes through L2, in words that
// carry their own tag, so that whoever finds the tag has the data, in one trip. Two buffers in global memory, zeros at
// first. With PersistentLayout::barrier the same words are made visible by a flag for each block: three trips, to
// compare with.
#pragma once

#include "exchange.cuh"

namespace rnnfast::gpu {

// Words that a thread has under way at once while it waits.
constexpr int kPolled = 4;

// A group's part of the memory that its blocks share.
class GridMemory {
 public:
  // words: of one buffer.
  RNNFAST_DEVICE GridMemory(const PersistentShared& p, const char* kernel, int64_t group_index, int64_t words)
      : kernel_(kernel),
        barrier_(p.layout.barrier),
        group_(p.layout.group),
        words_(words),
        first_(static_cast<Word16*>(p.words) + group_index * (2 * words + group_)) {}

  RNNFAST_DEVICE Word16* buffer(int turn) const { return first_ + (turn & 1) * words_; }

  // With the barrier a plain store, which the flag makes visible.
  template <class Word> RNNFAST_DEVICE void store(Word* to, const Word& word) const {
    if (barrier_)
      *to = word;
    else
      store_relaxed(to, word);
  }

  // Words that others store: as soon as all have arrived; with the barrier they have, once wait() is over.
  template <class Arrived>
  RNNFAST_DEVICE void load(const Word16* const (&from)[kPolled], const Arrived& arrived,
                           Word16 (&words)[kPolled]) const {
    if (!barrier_) return poll_all(from, arrived, words, kernel_);
    RNNFAST_UNROLL
    for (int i = 0; i < kPolled; ++i) words[i] = load_global(from[i]);
  }

  RNNFAST_DEVICE void raise(int turn, int rank) const {
    sync_threads();  // all threads' words are stored before the one flag
    if (thread_index() == 0) store_release(flag(rank), static_cast<uint32_t>(turn) + 1);
  }
  RNNFAST_DEVICE void wait(int turn) const {
    // A block may be one turn ahead.
    const auto raised = [turn](uint32_t found) {
      return static_cast<int32_t>(found - (static_cast<uint32_t>(turn) + 1)) >= 0;
    };
    for (int rank = static_cast<int>(thread_index()); rank < group_; rank += static_cast<int>(block_threads()))
      static_cast<void>(poll_acquire(flag(rank), raised, kernel_));
    sync_threads();  // what a thread has acquired all may load
  }

 private:
  RNNFAST_DEVICE uint32_t* flag(int rank) const { return reinterpret_cast<uint32_t*>(first_ + 2 * words_ + rank); }

  const char* const kernel_;
  const bool barrier_;
  const int group_;
  const int64_t words_;
  Word16* const first_;
};

// A word has three items and the number of its turn (persistent.h).
template <class Type, int kBatch> class Gather<Exchange::grid, Type, kBatch> {
  using Storage = typename Type::Storage;
  static constexpr int kItemUnits = 4 / static_cast<int>(sizeof(Storage)), kUnitWords = unit_words(kBatch);

 public:
  RNNFAST_DEVICE Gather(const PersistentShared& p, const char* kernel)
      : place_{p},
        words_(slice_words(p.layout.units, kBatch, static_cast<int>(sizeof(Storage)))),
        memory_(p, kernel, place_.group_index(), static_cast<int64_t>(p.layout.group) * words_) {}
  RNNFAST_DEVICE void begin() { sync_threads(); }  // after clear_operands()
  RNNFAST_DEVICE void end() {}

  RNNFAST_DEVICE void put(int /*turn*/, int n, int u, Storage value) {
    *reinterpret_cast<Storage*>(place_.operand(0, n, place_.rank * place_.units() + u)) = value;
  }
  RNNFAST_DEVICE void send(int turn) {
    sync_threads();  // all threads' put() before a word is made of several
    Word16* words = memory_.buffer(turn);
    const int first = place_.rank * words_;
    for (int w = static_cast<int>(thread_index()); w < words_; w += static_cast<int>(block_threads())) {
      Word16 word{{0, 0, 0, static_cast<uint32_t>(turn) + 1}};
      for_items(first + w, [&](int j, uint32_t* item) { word.x[j] = *item; });
      memory_.store(words + first + w, word);
    }
    if (place_.p.layout.barrier) memory_.raise(turn, place_.rank);
  }
  RNNFAST_DEVICE void receive(int turn) {
    if (place_.p.layout.barrier) memory_.wait(turn);
    const Word16* words = memory_.buffer(turn);
    // The own words, left out, are the last of a range that begins behind them.
    const int threads = static_cast<int>(block_threads()), begin = (place_.rank + 1) * words_;
    const int count = (place_.group() - 1) * words_, all = count + words_;
    const auto arrived = [turn](const Word16& word) { return word.x[3] == static_cast<uint32_t>(turn) + 1; };
    for (int first = static_cast<int>(thread_index()); first < count; first += kPolled * threads) {
      const Word16* from[kPolled];
      int index[kPolled];
      RNNFAST_UNROLL
      for (int i = 0; i < kPolled; ++i) {
        // Behind the last: the first once more.
        index[i] = begin + (first + i * threads < count ? first + i * threads : first);
        if (index[i] >= all) index[i] -= all;
        from[i] = words + index[i];
      }
      Word16 found[kPolled];
      memory_.load(from, arrived, found);
      RNNFAST_UNROLL
      for (int i = 0; i < kPolled; ++i) {
        if (first + i * threads >= count) break;
        for_items(index[i], [&](int j, uint32_t* item) { *item = found[i].x[j]; });
      }
    }
    sync_threads();  // all words are in place before the product; and whoever sends on has done with its polls
  }
  RNNFAST_DEVICE const std::byte* operands(int /*turn*/) const { return place_.operands(0); }

 private:
  // body(j, item j of a word of the group, where the product reads it)
  template <class Body> RNNFAST_DEVICE void for_items(int word, const Body& body) const {
    const int units = word / kUnitWords, n = (word - units * kUnitWords) * kWordItems;
    std::byte* item = place_.operand(0, n, units * kItemUnits);
    RNNFAST_UNROLL
    for (int j = 0; j < kWordItems; ++j, item += place_.p.shape.map.operand_stride)
      if (n + j < kBatch) body(j, reinterpret_cast<uint32_t*>(item));
  }

  const Place<Type> place_;
  const int words_;  // a block's
  const GridMemory memory_;
};

// Each float has its tag in the last bit, where it is a rounding error (infinities become NaN, and a zero may become
// the smallest number): the buffer's other content, that of two turns before or the zeros of the beginning, has the
// other tag.
template <class Type, int kBatch> class Scatter<Exchange::grid, Type, kBatch> {
 public:
  RNNFAST_DEVICE Scatter(const PersistentShared& p, const char* kernel)
      : place_{p},
        quads_(p.layout.units * kBatch / 4),
        parts_(source_parts(p.layout.group)),
        memory_(p, kernel, place_.group_index(), static_cast<int64_t>(p.layout.group) * p.layout.group * quads_.by()) {}
  RNNFAST_DEVICE void begin() { sync_threads(); }  // after clear_operands()
  RNNFAST_DEVICE void end() {}

  RNNFAST_DEVICE void send(int turn, int tile, const float (&sums)[kBatch / kBatchTile][4]) {
    // As the lanes have them, two batch indices of two units: the tags make words of any size whole.
    const int unit = tile * 16 + static_cast<int>(lane() / 4), pair = static_cast<int>(lane() % 4);
    uint64_t* const to = reinterpret_cast<uint64_t*>(slot(turn, 0, place_.rank)) + unit * (kBatch / 2) + pair;
    const int units = place_.group() * place_.units();
    RNNFAST_UNROLL
    for (int half = 0; half < 2; ++half) {
      if (unit + 8 * half >= units) break;
      RNNFAST_UNROLL
      for (int j = 0; j < kBatch / kBatchTile; ++j) {
        uint32_t first = bits_of(sums[j][2 * half]), second = bits_of(sums[j][2 * half + 1]);
        if (!place_.p.layout.barrier) {
          first = (first & ~1u) | tag(turn);
          second = (second & ~1u) | tag(turn);
        }
        memory_.store(to + 8 * half * (kBatch / 2) + j * (kBatchTile / 2), two_words(first, second));
      }
    }
  }
  RNNFAST_DEVICE void sent(int turn) {
    if (place_.p.layout.barrier) memory_.raise(turn, place_.rank);
  }
  // Each thread adds up some batch indices of a unit over a part of the sources.
  RNNFAST_DEVICE void receive(int turn) {
    if (place_.p.layout.barrier) memory_.wait(turn);
    const uint32_t expected = tag(turn);
    const auto arrived = [expected](const Word16& word) {
      uint32_t differ = 0;
      RNNFAST_UNROLL
      for (const uint32_t bits : word.x) differ |= bits ^ expected;
      return (differ & 1) == 0;
    };
    const int group = place_.group();
    for (int id = static_cast<int>(thread_index()); id < quads_.by() * parts_;
         id += static_cast<int>(block_threads())) {
      const int part = quads_.divide(id), quad = id - part * quads_.by();
      float sums[4] = {};
      for (int first = part; first < group; first += kPolled * parts_) {
        const Word16* from[kPolled];
        RNNFAST_UNROLL
        for (int i = 0; i < kPolled; ++i) {
          const int source = first + i * parts_;
          from[i] = slot(turn, place_.rank, source < group ? source : first) + quad;
        }
        Word16 found[kPolled];
        memory_.load(from, arrived, found);
        RNNFAST_UNROLL
        for (int i = 0; i < kPolled; ++i) {
          if (first + i * parts_ >= group) break;
          RNNFAST_UNROLL
          for (int n = 0; n < 4; ++n) sums[n] += float_of(found[i].x[n]);
        }
      }
      const int u = quad / (kBatch / 4), n = quad % (kBatch / 4) * 4;
      const Word16 word{{bits_of(sums[0]), bits_of(sums[1]), bits_of(sums[2]), bits_of(sums[3])}};
      *reinterpret_cast<Word16*>(at(part, u, n)) = word;
    }
    sync_threads();  // all parts' sums before they are added up; and whoever sends on has done with its polls
  }
  RNNFAST_DEVICE float sum(int /*turn*/, int u, int n) const {
    float sum = 0;
    RNNFAST_UNROLL_BY(4)
    for (int part = 0; part < parts_; ++part) sum += *at(part, u, n);
    return sum;
  }

 private:
  RNNFAST_DEVICE static uint32_t tag(int turn) { return static_cast<uint32_t>(turn >> 1 & 1) ^ 1; }
  // What a block sends lies side by side, all units in their order.
  RNNFAST_DEVICE Word16* slot(int turn, int owner, int source) const {
    return memory_.buffer(turn) + (static_cast<int64_t>(source) * place_.group() + owner) * quads_.by();
  }
  RNNFAST_DEVICE float* at(int part, int u, int n) const {
    return place_.sums() + (part * place_.units() + u) * sum_row(kBatch) + n;
  }

  const Place<Type> place_;
  const Divisor quads_;  // of a block
  const int parts_;
  const GridMemory memory_;
};

}  // namespace rnnfast::gpu

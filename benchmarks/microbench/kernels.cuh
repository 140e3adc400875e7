// The kernels of microbench.cu. Each is as small as what it measures allows, and each computes something that the host
// computes too: a way of passing data on that loses a word is not a fast way. They run in the emulator as well
// (tests/cpp/test_microbench.cpp).
#pragma once

#include "cuda/primitives/async_copy.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/dependent_launch.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/mbarrier.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/mma.h"
#include "cuda/primitives/platform.h"
#include "cuda/primitives/shared.h"
#include "cuda/primitives/types.h"

namespace rnnfast::microbench {

using namespace gpu;

#if defined(__CUDACC__)
#define RNNFAST_BOTH __host__ __device__ __forceinline__
#else
#define RNNFAST_BOTH inline
#endif

// ---- passing a state on ---------------------------------------------------------------------------------------------
// The state is `count` words of 16 bytes: 14 bytes of data and in the upper half of the last 32 bits the number of the
// step. Word w of step t is made of one word of step t - 1, half the state away, so of another block's; but nothing of
// step t is passed on before all of step t - 1 is there, as in a recurrence.

RNNFAST_BOTH uint32_t mix(uint32_t value, uint32_t place, uint32_t step) {
  uint32_t x = value * 0x9e3779b1u + place * 0x85ebca77u + step * 0xc2b2ae3du + 1;
  x ^= x >> 15;
  x *= 0x2c1b3c6du;
  return x ^ x >> 13;
}

RNNFAST_BOTH unsigned source_of(unsigned w, unsigned count, unsigned step) {
  const unsigned from = w + (count / 2 + step) % count;
  return from < count ? from : from - count;
}

RNNFAST_BOTH Word16 advance(const Word16& from, unsigned w, unsigned step) {
  Word16 word;
  for (unsigned i = 0; i < 4; ++i) word.x[i] = mix(from.x[i], 4 * w + i, step);
  word.x[3] = (word.x[3] & 0xffffu) | step << 16;
  return word;
}

RNNFAST_BOTH bool is_of_step(const Word16& word, unsigned step) { return word.x[3] >> 16 == (step & 0xffffu); }

// A block's words: an equal share of the state.
struct Share {
  unsigned begin, end;
};
RNNFAST_DEVICE Share share_of(unsigned block, unsigned blocks, unsigned count) {
  const unsigned each = (count + blocks - 1) / blocks, begin = block * each;
  return {begin < count ? begin : count, begin + each < count ? begin + each : count};
}

// Reads the first state into buffer 0 of shared memory.
RNNFAST_DEVICE Word16* begin_state(const Word16* first, unsigned count) {
  auto* buffers = reinterpret_cast<Word16*>(shared_memory());
  for (unsigned w = thread_index(); w < count; w += block_threads()) buffers[w] = load_read_only(first + w);
  sync_threads();
  return buffers;
}

RNNFAST_DEVICE void end_state(Word16* last, const Word16* state, unsigned count) {
  if (block_index().x != 0) return;
  for (unsigned w = thread_index(); w < count; w += block_threads()) store_global(last + w, state[w]);
}

// Grid, by polling: who finds the step's number in a word has its data. Cooperative; `published`: Word16[2][count],
// zeros at first; shared memory: the same. Two buffers: a block publishes step t + 1 when its threads have read all of
// step t, and nobody overwrites step t before having read all blocks' step t + 1.
RNNFAST_KERNEL void exchange_by_polling(Word16* last, const Word16* first, Word16* published, unsigned count,
                                        unsigned steps) {
  // Loads that a thread has under way at once: one trip to L2 serves them all.
  constexpr unsigned kAtOnce = 8;
  Word16* buffers = begin_state(first, count);
  const Share own = share_of(block_index().x, grid_size().x, count);
  for (unsigned t = 1; t <= steps; ++t) {
    const Word16* before = buffers + (t - 1) % 2 * count;
    Word16* now = buffers + t % 2 * count;
    Word16* out = published + size_t(t % 2) * count;
    for (unsigned w = own.begin + thread_index(); w < own.end; w += block_threads())
      store_relaxed(out + w, advance(before[source_of(w, count, t)], w, t));
    for (unsigned base = thread_index(); base < count; base += kAtOnce * block_threads()) {
      Word16 found[kAtOnce];
      RNNFAST_UNROLL
      for (unsigned i = 0; i < kAtOnce; ++i) {
        const unsigned w = base + i * block_threads();
        if (w < count) found[i] = load_relaxed(out + w);
      }
      RNNFAST_UNROLL
      for (unsigned i = 0; i < kAtOnce; ++i) {
        const unsigned w = base + i * block_threads();
        if (w >= count) continue;
        if (!is_of_step(found[i], t)) found[i] = poll(out + w, [t](const Word16& word) { return is_of_step(word, t); });
        now[w] = found[i];
      }
    }
    sync_threads();  // all of step t is in shared memory, and nobody reads step t - 1 any more
  }
  end_state(last, buffers + steps % 2 * count, count);
}

// Grid, by a barrier and a load. Cooperative; `published` and shared memory as above.
RNNFAST_KERNEL void exchange_by_grid_barrier(Word16* last, const Word16* first, Word16* published, unsigned count,
                                             unsigned steps) {
  Word16* buffers = begin_state(first, count);
  const Share own = share_of(block_index().x, grid_size().x, count);
  for (unsigned t = 1; t <= steps; ++t) {
    const Word16* before = buffers + (t - 1) % 2 * count;
    Word16* now = buffers + t % 2 * count;
    Word16* out = published + size_t(t % 2) * count;
    for (unsigned w = own.begin + thread_index(); w < own.end; w += block_threads())
      store_global(out + w, advance(before[source_of(w, count, t)], w, t));
    grid_sync();  // every block's words of step t can be read, and all have read step t - 1
    for (unsigned w = thread_index(); w < count; w += block_threads()) now[w] = load_global(out + w);
    sync_threads();  // all of step t is in shared memory
  }
  end_state(last, buffers + steps % 2 * count, count);
}

// Grid, by a flag for each block: one release, one acquire and a load. Cooperative; `flags`: uint32_t[blocks], zeros at
// first; the rest as above.
RNNFAST_KERNEL void exchange_by_flags(Word16* last, const Word16* first, Word16* published, uint32_t* flags,
                                      unsigned count, unsigned steps) {
  Word16* buffers = begin_state(first, count);
  const Share own = share_of(block_index().x, grid_size().x, count);
  for (unsigned t = 1; t <= steps; ++t) {
    const Word16* before = buffers + (t - 1) % 2 * count;
    Word16* now = buffers + t % 2 * count;
    Word16* out = published + size_t(t % 2) * count;
    for (unsigned w = own.begin + thread_index(); w < own.end; w += block_threads())
      store_global(out + w, advance(before[source_of(w, count, t)], w, t));
    sync_threads();  // the release below passes on all that the block has written
    if (thread_index() == 0) store_release(flags + block_index().x, t);
    // A block may be a step ahead: it does not overwrite what is read here before this block's next flag.
    for (unsigned block = thread_index(); block < grid_size().x; block += block_threads())
      poll_acquire(flags + block, [t](uint32_t flag) { return flag >= t; });
    sync_threads();  // what one thread has acquired, all may read
    for (unsigned w = thread_index(); w < count; w += block_threads()) now[w] = load_global(out + w);
    sync_threads();  // all of step t is in shared memory
  }
  end_state(last, buffers + steps % 2 * count, count);
}

// Cluster, by st.async: each word goes into every block's shared memory, whose mbarrier counts the bytes. Every cluster
// runs a recurrence of its own on the same state; the first writes the result. Shared memory: mbarrier[2],
// Word16[2][count]. Only warps that have something to send take part, and their lanes stay together: a thread that
// sends nothing could fall two phases behind, and would then wait for ever.
RNNFAST_KERNEL void exchange_by_st_async(Word16* last, const Word16* first, unsigned count, unsigned steps) {
  auto* full = reinterpret_cast<mbarrier*>(shared_memory());
  auto* buffers = reinterpret_cast<Word16*>(full + 2);
  const unsigned ranks = cluster_size();
  const Share own = share_of(cluster_rank(), ranks, count);
  for (unsigned w = thread_index(); w < count; w += block_threads()) buffers[w] = load_read_only(first + w);
  if (thread_index() == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    fence_mbarrier_init();
  }
  cluster_sync();  // the barriers and the first state are there in every block
  if (warp() * kWarpSize < own.end - own.begin) {
    for (unsigned t = 1; t <= steps; ++t) {
      const Word16* before = buffers + (t - 1) % 2 * count;
      Word16* now = buffers + t % 2 * count;
      mbarrier* bar = &full[t % 2];
      if (thread_index() == 0) mbarrier_arrive_expect_tx(bar, count * static_cast<unsigned>(sizeof(Word16)));
      for (unsigned w = own.begin + thread_index(); w < own.end; w += block_threads()) {
        const Word16 word = advance(before[source_of(w, count, t)], w, t);
        for (unsigned rank = 0; rank < ranks; ++rank)
          st_async(word, map_to_rank(now + w, rank), map_to_rank(bar, rank));
      }
      // All of step t is there. Nobody sends step t + 2, which overwrites it, before this thread has sent step t + 1.
      mbarrier_wait(bar, (t - 1) / 2 % 2);
      sync_warp();  // no lane sends step t + 1 while another still waits for step t
    }
  }
  cluster_sync();  // no block may end while others send to it; and threads that took no part may read the state
  end_state(last, buffers + steps % 2 * count, count);
}

// Cluster, by plain stores into the peers' shared memory and the cluster's barrier. Shared memory: Word16[2][count].
RNNFAST_KERNEL void exchange_by_cluster_barrier(Word16* last, const Word16* first, unsigned count, unsigned steps) {
  Word16* buffers = begin_state(first, count);
  const unsigned ranks = cluster_size();
  const Share own = share_of(cluster_rank(), ranks, count);
  cluster_sync();  // no block may store into one that has not started
  for (unsigned t = 1; t <= steps; ++t) {
    const Word16* before = buffers + (t - 1) % 2 * count;
    Word16* now = buffers + t % 2 * count;
    for (unsigned w = own.begin + thread_index(); w < own.end; w += block_threads()) {
      const Word16 word = advance(before[source_of(w, count, t)], w, t);
      for (unsigned rank = 0; rank < ranks; ++rank) *map_to_rank(now + w, rank) = word;
    }
    cluster_sync();  // all of step t is there, and nobody reads step t - 1 any more
  }
  end_state(last, buffers + steps % 2 * count, count);
}

// ---- products -------------------------------------------------------------------------------------------------------
// The product of a step, over and over: a warp owns 16 * kRowTiles rows of a weight matrix, 16 * kChunks columns, and
// multiplies them with 8 * kTiles rows of a state in shared memory. The weights stay in registers, or are read from
// shared memory each time. Matrices lie there as tiles of 8 x 8 (128 bytes), as ldmatrix takes them without conflict.

constexpr unsigned kMmaWarps = 8;

// What the matrices hold: small integers, so that every sum is exact.
RNNFAST_BOTH int weight_at(unsigned row, unsigned k) { return static_cast<int>((row * 7 + k * 3) % 5) - 2; }
RNNFAST_BOTH int state_at(unsigned n, unsigned k) { return static_cast<int>((n * 11 + k * 5) % 7) - 3; }

template <unsigned kRowTiles_, unsigned kChunks_, unsigned kTiles_, bool kShared_> struct MmaShape {
  static constexpr unsigned kRowTiles = kRowTiles_, kChunks = kChunks_, kTiles = kTiles_;
  static constexpr bool kShared = kShared_;
  static constexpr unsigned kRows = 16 * kRowTiles * kMmaWarps, kDepth = 16 * kChunks, kBatch = 8 * kTiles;
  static constexpr size_t kStateBytes = size_t(kBatch) * kDepth * 2;
  static constexpr size_t kWeightBytes = size_t(kRows) * kDepth * 2;
  static constexpr size_t kSharedBytes = kStateBytes + (kShared ? kWeightBytes : 0);
  static constexpr double kFlops = 2.0 * kRows * kDepth * kBatch;  // of a block, each step
};

// result: float[kRows][kBatch] of block 0, `steps` times the product.
template <class Shape>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kMmaWarps * 32, 1) void mma_rate(float* result, unsigned steps) {
  constexpr unsigned kRowTiles = Shape::kRowTiles, kChunks = Shape::kChunks, kTiles = Shape::kTiles;
  // [chunk][n tile][k half] tiles of the state, then [warp][row tile][chunk][k half][row half] of the weights.
  auto* states = reinterpret_cast<bfloat16*>(shared_memory());
  bfloat16* weights = states + Shape::kBatch * Shape::kDepth + warp() * (kRowTiles * kChunks * 256);
  for (unsigned i = thread_index(); i < Shape::kBatch * Shape::kDepth; i += block_threads()) {
    const unsigned tile = i / 64, n = tile / 2 % kTiles * 8 + i % 64 / 8;
    const unsigned k = tile / 2 / kTiles * 16 + tile % 2 * 8 + i % 8;
    states[i] = convert<bfloat16>(static_cast<float>(state_at(n, k)));
  }
  const auto weight = [](unsigned tile, unsigned chunk, unsigned row, unsigned k) {
    const int value = weight_at((warp() * kRowTiles + tile) * 16 + row, chunk * 16 + k);
    return convert<bfloat16>(static_cast<float>(value));
  };
  uint32_t kept[Shape::kShared ? 1 : kRowTiles][Shape::kShared ? 1 : kChunks][4];
  if constexpr (Shape::kShared) {
    for (unsigned i = lane(); i < kRowTiles * kChunks * 256; i += 32) {
      const unsigned matrix = i / 64 % 4, row = matrix % 2 * 8 + i % 64 / 8, k = matrix / 2 * 8 + i % 8;
      weights[i] = weight(i / 256 / kChunks, i / 256 % kChunks, row, k);
    }
  } else {
    RNNFAST_UNROLL
    for (unsigned r = 0; r < kRowTiles; ++r) {
      RNNFAST_UNROLL
      for (unsigned c = 0; c < kChunks; ++c) {
        RNNFAST_UNROLL
        for (unsigned i = 0; i < 4; ++i) {
          const unsigned row = lane() / 4 + i % 2 * 8, k = lane() % 4 * 2 + i / 2 * 8;
          kept[r][c][i] = pack(weight(r, c, row, k), weight(r, c, row, k + 1));
        }
      }
    }
  }
  sync_threads();

  float sums[kRowTiles][kTiles][4] = {};
  for (unsigned step = 0; step < steps; ++step) {
    RNNFAST_UNROLL
    for (unsigned c = 0; c < kChunks; ++c) {
      uint32_t b[kTiles][2];
      if constexpr (kTiles == 1) {
        ldmatrix_x2(b[0], states + c * 128 + lane() % 16 * 8);
      } else {
        RNNFAST_UNROLL
        for (unsigned n = 0; n < kTiles; n += 2) {
          uint32_t both[4];
          ldmatrix_x4(both, states + (c * kTiles + n) * 128 + lane() * 8);
          RNNFAST_UNROLL
          for (unsigned i = 0; i < 4; ++i) b[n + i / 2][i % 2] = both[i];
        }
      }
      RNNFAST_UNROLL
      for (unsigned r = 0; r < kRowTiles; ++r) {
        uint32_t a[4];
        if constexpr (Shape::kShared) {
          ldmatrix_x4(a, weights + (r * kChunks + c) * 256 + lane() * 8);
        } else {
          RNNFAST_UNROLL
          for (unsigned i = 0; i < 4; ++i) a[i] = kept[r][c][i];
        }
        RNNFAST_UNROLL
        for (unsigned n = 0; n < kTiles; ++n) mma_m16n8k16<bfloat16>(sums[r][n], a, b[n]);
      }
    }
  }
  if (block_index().x != 0) return;
  RNNFAST_UNROLL
  for (unsigned r = 0; r < kRowTiles; ++r) {
    RNNFAST_UNROLL
    for (unsigned n = 0; n < kTiles; ++n) {
      RNNFAST_UNROLL
      for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = (warp() * kRowTiles + r) * 16 + lane() / 4 + i / 2 * 8;
        result[row * Shape::kBatch + n * 8 + lane() % 4 * 2 + i % 2] = sums[r][n][i];
      }
    }
  }
}

// ---- launches -------------------------------------------------------------------------------------------------------

// As little as a kernel of a time loop does: waits for the one before, changes a value a thread.
RNNFAST_KERNEL void chain_link(uint32_t* values, unsigned step) {
  allow_next_grid();
  const unsigned i = block_index().x * block_threads() + thread_index();
  wait_for_previous_grid();  // what the launch before wrote is there
  values[i] = mix(values[i], i, step);
}

}  // namespace rnnfast::microbench

// Three ways for the threads that share a recurrence to pass h_t on, each as small as it can be: within a block, within
// a cluster, across the grid. The recurrence is h_t[i] = mix(sum of all h_{t-1}, i, t) in 32-bit integers, so that any
// lost, stale or torn value changes everything after it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/primitives/async_copy.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/mbarrier.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/platform.h"
#include "cuda/primitives/shared.h"

namespace rnnfast::exchange {

using namespace gpu;

#if defined(__CUDACC__)
#define RNNFAST_HOST_DEVICE __host__ __device__
#else
#define RNNFAST_HOST_DEVICE
#endif

RNNFAST_HOST_DEVICE inline uint32_t mix(uint32_t sum, uint32_t unit, uint32_t step) {
  uint32_t x = sum * 0x9e3779b1u + unit * 0x85ebca77u + step * 0xc2b2ae3du + 1;
  x ^= x >> 15;
  x *= 0x2c1b3c6du;
  return x ^ x >> 13;
}

// One block a recurrence; one unit a thread. Two buffers, so that one barrier a step is enough: whoever writes h_{t+1}
// over h_{t-1} has passed the barrier that all readers of h_{t-1} have come to. Shared memory: uint32_t[2][threads].
RNNFAST_KERNEL void block_exchange(uint32_t* h_n, const uint32_t* h_0, unsigned steps) {
  const unsigned units = block_threads(), unit = thread_index();
  const size_t row = size_t(block_index().x) * units;
  auto* buffers = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t h = h_0[row + unit];
  buffers[unit] = h;
  sync_threads();
  for (unsigned t = 0; t < steps; ++t) {
    const uint32_t* now = buffers + t % 2 * units;
    uint32_t sum = 0;
    for (unsigned j = 0; j < units; ++j) sum += now[j];
    h = mix(sum, unit, t);
    buffers[(t + 1) % 2 * units + unit] = h;
    sync_threads();
  }
  h_n[row + unit] = h;
}

// One cluster a recurrence; one unit a thread. Each thread stores its h into every block's buffer; the buffer's barrier
// counts the bytes. Two buffers and no barrier of the cluster in the loop: whoever sends h_{t+1} has received all of
// h_t, and every thread sends its h_t after it has read h_{t-1}, which h_{t+1} overwrites. Rank 0 writes the last h for
// all. Shared memory: mbarrier[2], uint32_t[2][cluster * threads].
RNNFAST_KERNEL void cluster_exchange(uint32_t* h_n, const uint32_t* h_0, unsigned steps) {
  const unsigned threads = block_threads(), ranks = cluster_size(), units = ranks * threads;
  const unsigned unit = cluster_rank() * threads + thread_index();
  const size_t row = size_t(block_index().x / ranks) * units;
  auto* full = reinterpret_cast<mbarrier*>(shared_memory());
  auto* buffers = reinterpret_cast<uint32_t*>(full + 2);
  if (thread_index() == 0) {
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    fence_mbarrier_init();
  }
  // No block may send before the others' barriers are there.
  cluster_sync();
  uint32_t h = h_0[row + unit];
  for (unsigned t = 0; t < steps; ++t) {
    mbarrier* bar = &full[t % 2];
    uint32_t* now = buffers + t % 2 * units;
    if (thread_index() == 0) mbarrier_arrive_expect_tx(bar, units * sizeof(uint32_t));
    for (unsigned rank = 0; rank < ranks; ++rank) {
      st_async(h, map_to_rank(now + unit, rank), map_to_rank(bar, rank));
    }
    mbarrier_wait(bar, t / 2 % 2);
    uint32_t sum = 0;
    for (unsigned j = 0; j < units; ++j) sum += now[j];
    h = mix(sum, unit, t);
  }
  // The buffer that the last step has not read: nobody reads it any more, nor does anything arrive in it.
  uint32_t* last = buffers + steps % 2 * units;
  last[unit] = h;
  cluster_sync();
  if (cluster_rank() == 0) {
    for (unsigned rank = 0; rank < ranks; ++rank) {
      const unsigned theirs = rank * threads + thread_index();
      h_n[row + theirs] = *map_to_rank(last + theirs, rank);
    }
  }
  // No block may end, and its shared memory with it, before rank 0 has read it.
  cluster_sync();
}

// All blocks of a cooperative launch one recurrence; three units a thread. A 16-byte word carries them and the number
// of its step, so that no fence and no flag is needed: who finds the number has the data. Two buffers in global memory,
// all zero at first: whoever publishes h_{t+1} has read all of h_t, and a block publishes h_t when all its threads have
// read h_{t-1}, which h_{t+1} overwrites. Shared memory: uint32_t[2][3 * blocks * threads].
RNNFAST_KERNEL void grid_exchange(uint32_t* h_n, const uint32_t* h_0, Word16* words, unsigned steps) {
  constexpr unsigned kPerWord = 3;
  const unsigned threads = block_threads(), count = grid_size().x * threads;
  const unsigned mine = block_index().x * threads + thread_index();
  auto* buffers = reinterpret_cast<uint32_t*>(shared_memory());
  uint32_t h[kPerWord];
  for (unsigned k = 0; k < kPerWord; ++k) h[k] = h_0[mine * kPerWord + k];
  for (unsigned t = 0; t < steps; ++t) {
    Word16* published = words + size_t(t % 2) * count;
    uint32_t* now = buffers + t % 2 * count * kPerWord;
    store_relaxed(published + mine, Word16{{h[0], h[1], h[2], t + 1}});
    for (unsigned w = thread_index(); w < count; w += threads) {
      const Word16 word = poll(published + w, [t](const Word16& found) { return found.x[3] == t + 1; });
      for (unsigned k = 0; k < kPerWord; ++k) now[w * kPerWord + k] = word.x[k];
    }
    sync_threads();
    uint32_t sum = 0;
    for (unsigned j = 0; j < count * kPerWord; ++j) sum += now[j];
    for (unsigned k = 0; k < kPerWord; ++k) h[k] = mix(sum, mine * kPerWord + k, t);
  }
  for (unsigned k = 0; k < kPerWord; ++k) h_n[mine * kPerWord + k] = h[k];
}

}  // namespace rnnfast::exchange

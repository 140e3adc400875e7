// Who a thread is, how threads of a warp, a block, a cluster and a grid meet, and how grids follow one another.
#include <string>
#include <vector>

#include "check.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/shared.h"
#include "dependent_kernels.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;

constexpr unsigned kFewSeeds = 5;

RNNFAST_DEVICE int* shared_ints() { return reinterpret_cast<int*>(shared_memory()); }

RNNFAST_KERNEL void identity_kernel(int* out) {
  const Dim3 block = block_index(), grid = grid_size();
  const unsigned linear = (block.z * grid.y + block.y) * grid.x + block.x;
  out[linear * block_threads() + thread_index()] = static_cast<int>(linear * 1000 + warp() * 32 + lane());
}

void identity() {
  for_each_seed(3, [] {
    Array<int> out(2 * 3 * 4 * 70, -1);
    LaunchConfig config = blocks(2, 70);
    config.grid = {2, 3, 4};
    CHECK_NO_ERROR(run(config, identity_kernel, out.device()));
    for (size_t i = 0; i < out.size(); ++i) CHECK_EQUAL(out[i], static_cast<int>(i / 70 * 1000 + i % 70));
  });
}

// Warp 0 produces, warp 1 consumes, over two named barriers: full (sync by the consumer) and empty.
RNNFAST_KERNEL void producer_consumer_kernel(int* out, int rounds) {
  int* shared = shared_ints();
  for (int i = 0; i < rounds; ++i) {
    if (warp() == 0) {
      if (i > 0) barrier_sync(2, 64);
      shared[lane()] = i * 100 + static_cast<int>(lane());
      barrier_arrive(1, 64);
    } else {
      barrier_sync(1, 64);
      out[i * 32 + static_cast<int>(lane())] = shared[31 - lane()];
      if (i + 1 < rounds) barrier_arrive(2, 64);
    }
  }
}

void named_barriers() {
  for_each_seed(kUsualSeeds, [] {
    Array<int> out(32 * 5, -1);
    CHECK_NO_ERROR(run(blocks(1, 64, 32 * sizeof(int)), producer_consumer_kernel, out.device(), 5));
    for (int i = 0; i < 5 * 32; ++i) CHECK_EQUAL(out[static_cast<size_t>(i)], i / 32 * 100 + 31 - i % 32);
  });
}

// Halves of a warp that meet apart.
RNNFAST_KERNEL void half_warp_kernel(int* out) {
  int* shared = shared_ints();
  shared[thread_index()] = static_cast<int>(thread_index());
  const uint32_t mask = lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  sync_warp(mask);
  out[thread_index()] = shared[thread_index() ^ 15];
}

void half_warps() {
  for_each_seed(kFewSeeds, [] {
    Array<int> out(32, -1);
    CHECK_NO_ERROR(run(blocks(1, 32, 128), half_warp_kernel, out.device()));
    for (int i = 0; i < 32; ++i) CHECK_EQUAL(out[static_cast<size_t>(i)], i ^ 15);
  });
}

// ---- clusters and grids ----

RNNFAST_KERNEL void cluster_kernel(int* out) {
  int* shared = shared_ints();
  const unsigned rank = cluster_rank(), size = cluster_size();
  shared[thread_index()] = static_cast<int>(block_index().x * 1000 + thread_index());
  cluster_sync();
  out[block_index().x * block_threads() + thread_index()] = map_to_rank(shared, (rank + 1) % size)[thread_index()];
  // A block may not end while a peer reads its shared memory.
  cluster_arrive();
  cluster_wait();
}

void clusters_of(unsigned size) {
  constexpr unsigned kBlocks = 16, kThreads = 32;
  for_each_seed(kFewSeeds, [size] {
    Array<int> out(kBlocks * kThreads, -1);
    CHECK_NO_ERROR(run(blocks(kBlocks, kThreads, kThreads * sizeof(int), size), cluster_kernel, out.device()));
    for (unsigned i = 0; i < kBlocks * kThreads; ++i) {
      const unsigned block = i / kThreads, next = block / size * size + (block % size + 1) % size;
      CHECK_EQUAL(out[i], static_cast<int>(next * 1000 + i % kThreads));
    }
  });
}

void clusters() {
  for (const unsigned size : {1u, 2u, 4u, 8u}) clusters_of(size);
}
// Larger than what every card with clusters grants.
void clusters_of_16() { clusters_of(16); }

RNNFAST_KERNEL void grid_kernel(int* ring, int rounds) {
  const unsigned count = grid_size().x, block = block_index().x;
  for (int i = 0; i < rounds; ++i) {
    int* now = ring + static_cast<unsigned>(i % 2) * count;
    if (thread_index() == 0) now[block] = i * 100 + static_cast<int>(block);
    grid_sync();
    if (thread_index() == 1) ring[2 * count + block] = now[(block + 1) % count];
  }
}

void grids() {
  constexpr unsigned kBlocks = 9;
  for_each_seed(kFewSeeds, [] {
    Array<int> ring(3 * kBlocks, -1);
    CHECK_NO_ERROR(run(cooperative(kBlocks, 32), grid_kernel, ring.device(), 5));
    for (unsigned i = 0; i < kBlocks; ++i)
      CHECK_EQUAL(ring[2 * kBlocks + i], static_cast<int>(400 + (i + 1) % kBlocks));
  });
}

// ---- launches ----

void dependent_launches() {
  CHECK_EQUAL(stale_after_dependent_launch<true>(true, kUsualSeeds), 0);
  CHECK_EQUAL(stale_after_dependent_launch<false>(false, kUsualSeeds), 0);
}

void long_chains() {
  static constexpr int kSteps = 300;
  for_each_seed(3, [] {
    Array<int> rows((kSteps + 1) * 32);
    int* on_rows = rows.device();
    LaunchConfig config = blocks(1, 32);
    config.dependent = true;
    for (int step = 0; step < kSteps; ++step)
      CHECK_NO_ERROR(launch(config, chain_kernel, on_rows + step * 32, on_rows + (step + 1) * 32));
    CHECK_NO_ERROR(finish());
    for (size_t i = 0; i < 32; ++i) CHECK_EQUAL(rows[kSteps * 32 + i], kSteps);
  });
}

}  // namespace

CHECK_CASES(execution) {
  return {{"identity", identity},
          {"named-barriers", named_barriers},
          {"half-warps", half_warps},
          {"clusters", clusters},
          {"clusters-of-16", clusters_of_16},
          {"grids", grids},
          {"dependent-launches", dependent_launches},
          {"long-chains", long_chains}};
}

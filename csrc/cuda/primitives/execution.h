// Who a thread is, and how threads of a warp, a block and a grid meet. Blocks have one dimension. Shuffles and votes
// order no memory; sync_warp, sync_threads, the named barriers and grid_sync do.
#pragma once

#include <type_traits>

#include "platform.h"

#if !defined(RNNFAST_EMULATED)
#include <cooperative_groups.h>
#endif

namespace rnnfast::gpu {

RNNFAST_DEVICE unsigned thread_index() {
#if defined(RNNFAST_EMULATED)
  return emulator::self().linear_thread;
#else
  return threadIdx.x;
#endif
}

RNNFAST_DEVICE Dim3 block_index() {
#if defined(RNNFAST_EMULATED)
  return emulator::self().block_index;
#else
  return {blockIdx.x, blockIdx.y, blockIdx.z};
#endif
}

RNNFAST_DEVICE Dim3 grid_size() {
#if defined(RNNFAST_EMULATED)
  return emulator::self().grid_size;
#else
  return {gridDim.x, gridDim.y, gridDim.z};
#endif
}

RNNFAST_DEVICE unsigned block_threads() {
#if defined(RNNFAST_EMULATED)
  return emulator::self().block_size.x;
#else
  return blockDim.x;
#endif
}

RNNFAST_DEVICE unsigned lane() { return thread_index() % kWarpSize; }
RNNFAST_DEVICE unsigned warp() { return thread_index() / kWarpSize; }

RNNFAST_DEVICE void sync_threads(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "sync_threads")) return;
  emulator::block_barrier(0, block_threads(), true, "sync_threads", site);
#else
  __syncthreads();
#endif
}

RNNFAST_DEVICE void sync_warp(uint32_t mask = kAllLanes RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "sync_warp")) return;
  emulator::exchange_bytes(mask, nullptr, nullptr, 0, true, "sync_warp", site);
#else
  __syncwarp(mask);
#endif
}

// Brings the lanes of a warp together again after a loop that may end in one before another, for what whole warps do.
// Orders nothing that kernels may count on; the emulator's lanes meet by themselves.
RNNFAST_DEVICE void converge_warp() {
#if !defined(RNNFAST_EMULATED)
  __syncwarp();
#endif
}

// Named barriers 0 to 15: `count` threads, a multiple of 32, by whole warps; some wait, some only arrive. What a thread
// wrote before either is seen by those that wait.
RNNFAST_DEVICE void barrier_sync(unsigned id, unsigned count RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "barrier_sync")) return;
  emulator::block_barrier(id, count, true, "barrier_sync", site);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

RNNFAST_DEVICE void barrier_arrive(unsigned id, unsigned count RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "barrier_arrive")) return;
  emulator::block_barrier(id, count, false, "barrier_arrive", site);
#else
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
#endif
}

// All lanes of the warp take part in shuffles and votes. T: 4 or 8 bytes.
template <class T> RNNFAST_DEVICE T shuffle(T value, unsigned from RNNFAST_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
#if defined(RNNFAST_EMULATED)
  return emulator::exchange(kAllLanes, value, false, "shuffle", site)[from % kWarpSize];
#else
  return __shfl_sync(kAllLanes, value, static_cast<int>(from));
#endif
}

template <class T> RNNFAST_DEVICE T shuffle_xor(T value, unsigned mask RNNFAST_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
#if defined(RNNFAST_EMULATED)
  return emulator::exchange(kAllLanes, value, false, "shuffle_xor", site)[(lane() ^ mask) % kWarpSize];
#else
  return __shfl_xor_sync(kAllLanes, value, static_cast<int>(mask));
#endif
}

// A value that all lanes of the warp agree on anyway: so the compiler knows it too, and branches without guarding what
// lanes do together.
template <class T> RNNFAST_DEVICE T uniform(T value RNNFAST_SITE) {
  return gpu::shuffle(value, 0 RNNFAST_PASS_SITE);  // qualified: std::shuffle would be found by the site's type
}

// From `delta` lanes further up; the last `delta` lanes keep their own value.
template <class T> RNNFAST_DEVICE T shuffle_down(T value, unsigned delta RNNFAST_SITE) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8));
#if defined(RNNFAST_EMULATED)
  const unsigned from = lane() + delta;
  return emulator::exchange(kAllLanes, value, false, "shuffle_down", site)[from < kWarpSize ? from : lane()];
#else
  return __shfl_down_sync(kAllLanes, value, delta);
#endif
}

// One bit a lane.
RNNFAST_DEVICE uint32_t ballot(bool vote RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  const auto votes = emulator::exchange(kAllLanes, vote, false, "ballot", site);
  uint32_t bits = 0;
  for (unsigned i = 0; i < kWarpSize; ++i) bits |= static_cast<uint32_t>(votes[i]) << i;
  return bits;
#else
  return __ballot_sync(kAllLanes, vote);
#endif
}

RNNFAST_DEVICE bool any(bool vote RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  return ballot(vote, site) != 0;
#else
  return __any_sync(kAllLanes, vote) != 0;
#endif
}

RNNFAST_DEVICE bool all(bool vote RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  return ballot(vote, site) == kAllLanes;
#else
  return __all_sync(kAllLanes, vote) != 0;
#endif
}

// Every block of a cooperative launch.
RNNFAST_DEVICE void grid_sync(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "grid_sync")) return;
  emulator::grid_barrier(site);
#else
  cooperative_groups::this_grid().sync();
#endif
}

}  // namespace rnnfast::gpu

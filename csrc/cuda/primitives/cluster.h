// Thread block clusters (sm_90 and later): rank, size, the shared memory of the other blocks, and their barrier.
#pragma once

#include "platform.h"

#if !defined(RNNFAST_EMULATED)
#include <cuda/ptx>
#endif

namespace rnnfast::gpu {

RNNFAST_DEVICE unsigned cluster_rank() {
#if defined(RNNFAST_EMULATED)
  return emulator::self().cluster_rank;
#elif RNNFAST_SM90
  return cuda::ptx::get_sreg_cluster_ctarank();
#else
  return 0;
#endif
}

// Whether this code has clusters; where it has not, a kernel that needs them ends the launch with an error.
RNNFAST_DEVICE bool require_clusters() {
#if defined(RNNFAST_EMULATED) || RNNFAST_SM90
  return true;
#else
  __trap();
  return false;
#endif
}

RNNFAST_DEVICE unsigned cluster_size() {
#if defined(RNNFAST_EMULATED)
  return emulator::self().cluster_size;
#elif RNNFAST_SM90
  return cuda::ptx::get_sreg_cluster_nctarank();
#else
  return 1;
#endif
}

// The same place in the shared memory of block `rank` of this cluster, as a generic address. The peer must have started
// and must not have ended: cluster_sync() at the start and at the end of a kernel sees to both.
template <class T> RNNFAST_DEVICE T* map_to_rank(T* shared, unsigned rank) {
#if defined(RNNFAST_EMULATED)
  emulator::require_peer(rank);
  return static_cast<T*>(emulator::in_peer(shared, rank));
#elif RNNFAST_SM90
  uint64_t peer;
  asm("mapa.u64 %0, %1, %2;" : "=l"(peer) : "l"(shared), "r"(rank));
  return reinterpret_cast<T*>(peer);
#else
  return shared;
#endif
}

// What a thread wrote before its arrival is seen by whoever has waited. Each thread arrives once, then waits once.
RNNFAST_DEVICE void cluster_arrive(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "cluster_arrive")) return;
  emulator::cluster_barrier(true, false, site);
#elif RNNFAST_SM90
  cuda::ptx::barrier_cluster_arrive(cuda::ptx::sem_release);
#else
  __trap();
#endif
}

RNNFAST_DEVICE void cluster_wait(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "cluster_wait")) return;
  emulator::cluster_barrier(false, true, site);
#elif RNNFAST_SM90
  cuda::ptx::barrier_cluster_wait(cuda::ptx::sem_acquire);
#else
  __trap();
#endif
}

RNNFAST_DEVICE void cluster_sync(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "cluster_sync")) return;
  emulator::cluster_barrier(true, true, site);
#else
  cluster_arrive();
  cluster_wait();
#endif
}

}  // namespace rnnfast::gpu

// Barriers in shared memory that count arrivals and, from sm_90 on, bytes of asynchronous copies (PTX ISA, "mbarrier").
// A phase ends when all arrivals of it and all announced bytes have come; the next begins at once. Phases are told
// apart by their parity: the first has parity 0. mbarrier_wait sees what arrived from the own block and what
// asynchronous copies brought; mbarrier_wait_cluster also sees what peers wrote before mbarrier_arrive_remote, and
// costs an invalidation of the L1 cache for it.
#pragma once

#include <cstdint>

#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include "../../emulator/primitives/mbarrier.h"
#else
#include <cuda/ptx>
#endif

namespace rnnfast::gpu {

using mbarrier = uint64_t;

// One thread initialises; the others use the barrier after a sync_threads, or a cluster_sync.
RNNFAST_DEVICE void mbarrier_init(mbarrier* bar, uint32_t arrivals RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_init(bar, arrivals, site);
#else
  cuda::ptx::mbarrier_init(bar, arrivals);
#endif
}

// Makes the barriers that this thread has initialised visible to copies and peers; the sync must still follow.
RNNFAST_DEVICE void fence_mbarrier_init(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::fence_mbarrier_init(site);
#elif RNNFAST_SM90
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
#endif
}

RNNFAST_DEVICE void mbarrier_arrive(mbarrier* bar RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_arrive(bar, site);
#else
  cuda::ptx::mbarrier_arrive(bar);
#endif
}

// Announces bytes that copies will bring in the current phase (sm_90).
RNNFAST_DEVICE void mbarrier_expect_tx(mbarrier* bar, uint32_t bytes RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_expect_tx(bar, bytes, site);
#elif RNNFAST_SM90
  cuda::ptx::mbarrier_expect_tx(cuda::ptx::sem_relaxed, cuda::ptx::scope_cta, cuda::ptx::space_shared, bar, bytes);
#else
  __trap();
#endif
}

RNNFAST_DEVICE void mbarrier_arrive_expect_tx(mbarrier* bar, uint32_t bytes RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_arrive_expect_tx(bar, bytes, site);
#elif RNNFAST_SM90
  cuda::ptx::mbarrier_arrive_expect_tx(cuda::ptx::sem_release, cuda::ptx::scope_cta, cuda::ptx::space_shared, bar,
                                       bytes);
#else
  __trap();
#endif
}

// Arrives at a barrier of a block of the cluster; the address is from map_to_rank.
RNNFAST_DEVICE void mbarrier_arrive_remote(mbarrier* peer_bar RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_arrive_remote(peer_bar, site);
#elif RNNFAST_SM90
  cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cluster, cuda::ptx::space_cluster, peer_bar);
#else
  __trap();
#endif
}

// Whether the phase of this parity is over (the current one has the other parity).
RNNFAST_DEVICE bool mbarrier_test_wait(mbarrier* bar, uint32_t parity RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  return emulator::mbarrier_test_wait(bar, parity, site);
#else
  return cuda::ptx::mbarrier_test_wait_parity(bar, parity);
#endif
}

// Returns when the phase of this parity is over.
RNNFAST_DEVICE void mbarrier_wait(mbarrier* bar, uint32_t parity RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_wait(bar, parity, site);
#elif RNNFAST_SM90
  while (!cuda::ptx::mbarrier_try_wait_parity(bar, parity)) {}
#else
  while (!cuda::ptx::mbarrier_test_wait_parity(bar, parity)) {}
#endif
}

RNNFAST_DEVICE void mbarrier_wait_cluster(mbarrier* bar, uint32_t parity RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::mbarrier_wait_cluster(bar, parity, site);
#elif RNNFAST_SM90
  while (!cuda::ptx::mbarrier_try_wait_parity(cuda::ptx::sem_acquire, cuda::ptx::scope_cluster, bar, parity)) {}
#else
  __trap();
#endif
}

}  // namespace rnnfast::gpu

// Barriers in shared memory that count arrivals and, from sm_90 on, bytes of asynchronous copies (PTX ISA, "mbarrier").
// A phase ends when all arrivals of it and all announced bytes have come; the next begins at once. Phases are told
// apart by their parity: the first has parity 0. mbarrier_wait sees what arrived from the own block and what
// asynchronous copies brought; mbarrier_wait_cluster also sees what peers wrote before mbarrier_arrive_remote, and
// costs an invalidation of the L1 cache for it.
#pragma once

#include <cstdint>

#include "address.h"
#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include <bit>
#include <string>
#else
#include <cuda/ptx>
#endif

namespace rnnfast::gpu {

using mbarrier = uint64_t;

#if defined(RNNFAST_EMULATED)

namespace emulated {

inline constexpr uint32_t kMaxArrivals = (1u << 20) - 1;
inline constexpr int kMaxBytes = (1 << 20) - 1;

// What the 64 bits hold. Poisoned memory (all ones) and zeros are neither kFresh nor kVisible.
struct MbarrierState {
  static constexpr uint64_t kFresh = 1;    // initialised
  static constexpr uint64_t kVisible = 2;  // to copies and peers too: fence_mbarrier_init has followed
  uint64_t pending : 20;                   // arrivals to come in this phase
  uint64_t arrivals : 20;                  // of a phase
  int64_t bytes : 21;   // announced and not yet come; below zero when they came before they were announced
  uint64_t parity : 1;  // of the current phase
  uint64_t stage : 2;
};
static_assert(sizeof(MbarrierState) == sizeof(mbarrier));

// The scheduler and the copy engines use barriers as well; these accesses are theirs, and no race.
__attribute__((noinline, no_sanitize("thread"))) inline MbarrierState peek_state(const mbarrier* bar) {
  return std::bit_cast<MbarrierState>(*static_cast<const volatile mbarrier*>(bar));
}
__attribute__((noinline, no_sanitize("thread"))) inline void poke_state(mbarrier* bar, MbarrierState state) {
  *static_cast<volatile mbarrier*>(bar) = std::bit_cast<mbarrier>(state);
}

// A thread's look at a barrier: a relaxed atomic, so that only the plain write of mbarrier_init can race with it.
inline MbarrierState load_state(const mbarrier* bar, const char* what) {
  const auto state = std::bit_cast<MbarrierState>(__atomic_load_n(bar, __ATOMIC_RELAXED));
  if (state.stage != MbarrierState::kFresh && state.stage != MbarrierState::kVisible) {
    emulator::fail(std::string(what) + ": an mbarrier that was not initialised");
  }
  return state;
}
// The same for copies and for threads of other blocks.
inline MbarrierState load_visible_state(const mbarrier* bar, const char* what) {
  const MbarrierState state = load_state(bar, what);
  if (state.stage != MbarrierState::kVisible) {
    emulator::fail(std::string(what) + ": an mbarrier without fence_mbarrier_init after mbarrier_init");
  }
  return state;
}

// The barriers initialised last and by whom, for fence_mbarrier_init. Plain arrays, touched here only, because the race
// detector must not see them.
struct FreshBarrier {
  mbarrier* bar;
  const void* thread;
};
inline constexpr unsigned kFreshBarriers = 4096;
inline FreshBarrier fresh_barriers[kFreshBarriers];
inline unsigned next_fresh_barrier = 0;

__attribute__((noinline, no_sanitize("thread"))) inline void note_fresh(mbarrier* bar, const void* thread) {
  fresh_barriers[next_fresh_barrier++ % kFreshBarriers] = {bar, thread};
}
// The next barrier that the thread has initialised, null if there is none; each is given once.
__attribute__((noinline, no_sanitize("thread"))) inline mbarrier* take_fresh(const void* thread) {
  for (FreshBarrier& fresh : fresh_barriers) {
    if (fresh.thread != thread) continue;
    fresh.thread = nullptr;
    return fresh.bar;
  }
  return nullptr;
}

// Keys of the race detector, inside the barrier: by parity, so that who waits for a phase is not ordered after early
// arrivals of the next.
enum class Arrival { kBlock = 0, kCopy = 2, kPeer = 4 };
inline const void* order_key(const mbarrier* bar, Arrival arrival, unsigned parity) {
  return reinterpret_cast<const std::byte*>(bar) + static_cast<int>(arrival) + parity;
}

inline void finish_phase_if_complete(MbarrierState& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.parity ^= 1;
  state.pending = state.arrivals;
}

inline void check_bytes(int64_t bytes, const char* what) {
  if (bytes < -kMaxBytes || bytes > kMaxBytes) {
    emulator::fail(std::string(what) + ": more than 2^20 - 1 bytes under way to one mbarrier");
  }
}

inline void expect_bytes(mbarrier* bar, uint32_t bytes, const char* what) {
  MbarrierState state = load_state(bar, what);
  check_bytes(state.bytes + int64_t(bytes), what);
  state.bytes += int64_t(bytes);
  poke_state(bar, state);
}

inline void arrive(mbarrier* bar, Arrival arrival, const char* what) {
  MbarrierState state = arrival == Arrival::kPeer ? load_visible_state(bar, what) : load_state(bar, what);
  if (state.pending == 0) {
    emulator::fail(std::string(what) + ": more arrivals in a phase than the mbarrier was initialised for");
  }
  emulator::drain_stores();
  emulator::release(order_key(bar, arrival, state.parity));
  state = peek_state(bar);
  --state.pending;
  finish_phase_if_complete(state);
  poke_state(bar, state);
}

// Called by the copy engines. The phase may have been chosen wrongly, never the barrier: whoever issued has looked.
inline void complete_bytes(mbarrier* bar, uint32_t bytes) {
  MbarrierState state = peek_state(bar);
  state.bytes -= int64_t(bytes);
  finish_phase_if_complete(state);
  poke_state(bar, state);
}

inline bool phase_is_over(MbarrierState state, uint32_t parity) { return state.parity != (parity & 1); }

inline void acquire_phase(const mbarrier* bar, uint32_t parity, bool peers) {
  emulator::acquire(order_key(bar, Arrival::kBlock, parity & 1));
  emulator::acquire(order_key(bar, Arrival::kCopy, parity & 1));
  if (peers) emulator::acquire(order_key(bar, Arrival::kPeer, parity & 1));
}

inline void wait_phase(const mbarrier* bar, uint32_t parity, bool peers, const char* what, const emulator::Site& site) {
  require_own_shared(bar, sizeof(mbarrier), 8, what);
  if (!phase_is_over(load_state(bar, what), parity)) {
    emulator::wait_until([bar, parity] { return phase_is_over(peek_state(bar), parity); }, what, site);
  }
  acquire_phase(bar, parity, peers);
}

}  // namespace emulated

#endif

// One thread initialises; the others use the barrier after a sync_threads, or a cluster_sync.
RNNFAST_DEVICE void mbarrier_init(mbarrier* bar, uint32_t arrivals RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_init")) return;
  emulated::require_own_shared(bar, sizeof(mbarrier), 8, "mbarrier_init");
  if (arrivals == 0 || arrivals > emulated::kMaxArrivals) {
    emulator::fail("mbarrier_init: the number of arrivals must be 1 to 2^20 - 1");
  }
  *bar = std::bit_cast<mbarrier>(emulated::MbarrierState{arrivals, arrivals, 0, 0, emulated::MbarrierState::kFresh});
  emulated::note_fresh(bar, &emulator::self());
#else
  cuda::ptx::mbarrier_init(bar, arrivals);
#endif
}

// Makes the barriers that this thread has initialised visible to copies and peers; the sync must still follow.
RNNFAST_DEVICE void fence_mbarrier_init(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "fence_mbarrier_init")) return;
  while (mbarrier* bar = emulated::take_fresh(&emulator::self())) {
    // A barrier of a kernel that has ended may still be noted.
    if (!emulated::in_own_shared(bar, sizeof(mbarrier))) continue;
    emulated::MbarrierState state = emulated::peek_state(bar);
    if (state.stage != emulated::MbarrierState::kFresh) continue;
    state.stage = emulated::MbarrierState::kVisible;
    emulated::poke_state(bar, state);
  }
#elif RNNFAST_SM90
  cuda::ptx::fence_mbarrier_init(cuda::ptx::sem_release, cuda::ptx::scope_cluster);
#endif
}

RNNFAST_DEVICE void mbarrier_arrive(mbarrier* bar RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_arrive")) return;
  emulated::require_own_shared(bar, sizeof(mbarrier), 8, "mbarrier_arrive");
  emulated::arrive(bar, emulated::Arrival::kBlock, "mbarrier_arrive");
#else
  cuda::ptx::mbarrier_arrive(bar);
#endif
}

// Announces bytes that copies will bring in the current phase (sm_90).
RNNFAST_DEVICE void mbarrier_expect_tx(mbarrier* bar, uint32_t bytes RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_expect_tx")) return;
  emulated::require_own_shared(bar, sizeof(mbarrier), 8, "mbarrier_expect_tx");
  emulated::expect_bytes(bar, bytes, "mbarrier_expect_tx");
#elif RNNFAST_SM90
  cuda::ptx::mbarrier_expect_tx(cuda::ptx::sem_relaxed, cuda::ptx::scope_cta, cuda::ptx::space_shared, bar, bytes);
#else
  __trap();
#endif
}

RNNFAST_DEVICE void mbarrier_arrive_expect_tx(mbarrier* bar, uint32_t bytes RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_arrive_expect_tx")) return;
  emulated::require_own_shared(bar, sizeof(mbarrier), 8, "mbarrier_arrive_expect_tx");
  emulated::expect_bytes(bar, bytes, "mbarrier_arrive_expect_tx");
  emulated::arrive(bar, emulated::Arrival::kBlock, "mbarrier_arrive_expect_tx");
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
  if (emulator::skipped(site, "mbarrier_arrive_remote")) return;
  emulated::require_cluster_shared(peer_bar, sizeof(mbarrier), 8, "mbarrier_arrive_remote");
  emulated::arrive(peer_bar, emulated::Arrival::kPeer, "mbarrier_arrive_remote");
#elif RNNFAST_SM90
  cuda::ptx::mbarrier_arrive(cuda::ptx::sem_release, cuda::ptx::scope_cluster, cuda::ptx::space_cluster, peer_bar);
#else
  __trap();
#endif
}

// Whether the phase of this parity is over (the current one has the other parity).
RNNFAST_DEVICE bool mbarrier_test_wait(mbarrier* bar, uint32_t parity RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_test_wait")) return true;
  emulated::require_own_shared(bar, sizeof(mbarrier), 8, "mbarrier_test_wait");
  if (!emulated::phase_is_over(emulated::load_state(bar, "mbarrier_test_wait"), parity)) {
    emulator::yield();
    return false;
  }
  emulated::acquire_phase(bar, parity, false);
  return true;
#else
  return cuda::ptx::mbarrier_test_wait_parity(bar, parity);
#endif
}

// Returns when the phase of this parity is over.
RNNFAST_DEVICE void mbarrier_wait(mbarrier* bar, uint32_t parity RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_wait")) return;
  emulated::wait_phase(bar, parity, false, "mbarrier_wait", site);
#elif RNNFAST_SM90
  while (!cuda::ptx::mbarrier_try_wait_parity(bar, parity)) {}
#else
  while (!cuda::ptx::mbarrier_test_wait_parity(bar, parity)) {}
#endif
}

RNNFAST_DEVICE void mbarrier_wait_cluster(mbarrier* bar, uint32_t parity RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "mbarrier_wait_cluster")) return;
  emulated::wait_phase(bar, parity, true, "mbarrier_wait_cluster", site);
#elif RNNFAST_SM90
  while (!cuda::ptx::mbarrier_try_wait_parity(cuda::ptx::sem_acquire, cuda::ptx::scope_cluster, bar, parity)) {}
#else
  __trap();
#endif
}

}  // namespace rnnfast::gpu

// The emulated bodies of csrc/cuda/primitives/mbarrier.h.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include "address.h"

namespace rnnfast::emulator {

using Mbarrier = uint64_t;

// ---- what a barrier holds -------------------------------------------------------------------------------------------

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
static_assert(sizeof(MbarrierState) == sizeof(Mbarrier));

// The scheduler and the copy engines use barriers as well; these accesses are theirs, and no race.
__attribute__((noinline, no_sanitize("thread"))) inline MbarrierState peek_state(const Mbarrier* bar) {
  return std::bit_cast<MbarrierState>(*static_cast<const volatile Mbarrier*>(bar));
}
__attribute__((noinline, no_sanitize("thread"))) inline void poke_state(Mbarrier* bar, MbarrierState state) {
  *static_cast<volatile Mbarrier*>(bar) = std::bit_cast<Mbarrier>(state);
}

// A thread's look at a barrier: a relaxed atomic, so that only the plain write of mbarrier_init can race with it.
inline MbarrierState load_state(const Mbarrier* bar, const char* what) {
  const auto state = std::bit_cast<MbarrierState>(__atomic_load_n(bar, __ATOMIC_RELAXED));
  if (state.stage != MbarrierState::kFresh && state.stage != MbarrierState::kVisible) {
    fail(std::string(what) + ": an mbarrier that was not initialised");
  }
  return state;
}
// The same for copies and for threads of other blocks.
inline MbarrierState load_visible_state(const Mbarrier* bar, const char* what) {
  const MbarrierState state = load_state(bar, what);
  if (state.stage != MbarrierState::kVisible) {
    fail(std::string(what) + ": an mbarrier without fence_mbarrier_init after mbarrier_init");
  }
  return state;
}

// The barriers initialised last and by whom, for fence_mbarrier_init. Plain arrays, touched here only, because the race
// detector must not see them.
struct FreshBarrier {
  Mbarrier* bar;
  const void* thread;
};
inline constexpr unsigned kFreshBarriers = 4096;
inline FreshBarrier fresh_barriers[kFreshBarriers];
inline unsigned next_fresh_barrier = 0;

__attribute__((noinline, no_sanitize("thread"))) inline void note_fresh(Mbarrier* bar, const void* thread) {
  fresh_barriers[next_fresh_barrier++ % kFreshBarriers] = {bar, thread};
}
// The next barrier that the thread has initialised, null if there is none; each is given once.
__attribute__((noinline, no_sanitize("thread"))) inline Mbarrier* take_fresh(const void* thread) {
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
inline const void* order_key(const Mbarrier* bar, Arrival arrival, unsigned parity) {
  return reinterpret_cast<const std::byte*>(bar) + static_cast<int>(arrival) + parity;
}

inline void finish_phase_if_complete(MbarrierState& state) {
  if (state.pending != 0 || state.bytes != 0) return;
  state.parity ^= 1;
  state.pending = state.arrivals;
}

inline void check_bytes(int64_t bytes, const char* what) {
  if (bytes < -kMaxBytes || bytes > kMaxBytes) {
    fail(std::string(what) + ": more than 2^20 - 1 bytes under way to one mbarrier");
  }
}

inline void expect_bytes(Mbarrier* bar, uint32_t bytes, const char* what) {
  MbarrierState state = load_state(bar, what);
  check_bytes(state.bytes + int64_t(bytes), what);
  state.bytes += int64_t(bytes);
  poke_state(bar, state);
}

inline void arrive(Mbarrier* bar, Arrival arrival, const char* what) {
  MbarrierState state = arrival == Arrival::kPeer ? load_visible_state(bar, what) : load_state(bar, what);
  if (state.pending == 0) {
    fail(std::string(what) + ": more arrivals in a phase than the mbarrier was initialised for");
  }
  drain_stores();
  release(order_key(bar, arrival, state.parity));
  state = peek_state(bar);
  --state.pending;
  finish_phase_if_complete(state);
  poke_state(bar, state);
}

// Called by the copy engines. The phase may have been chosen wrongly, never the barrier: whoever issued has looked.
inline void complete_bytes(Mbarrier* bar, uint32_t bytes) {
  MbarrierState state = peek_state(bar);
  state.bytes -= int64_t(bytes);
  finish_phase_if_complete(state);
  poke_state(bar, state);
}

inline bool phase_is_over(MbarrierState state, uint32_t parity) { return state.parity != (parity & 1); }

inline void acquire_phase(const Mbarrier* bar, uint32_t parity, bool peers) {
  acquire(order_key(bar, Arrival::kBlock, parity & 1));
  acquire(order_key(bar, Arrival::kCopy, parity & 1));
  if (peers) acquire(order_key(bar, Arrival::kPeer, parity & 1));
}

inline void wait_phase(const Mbarrier* bar, uint32_t parity, bool peers, const char* what, const Site& site) {
  require_own_shared(bar, sizeof(Mbarrier), 8, what);
  if (!phase_is_over(load_state(bar, what), parity)) {
    wait_until([bar, parity] { return phase_is_over(peek_state(bar), parity); }, what, site);
  }
  acquire_phase(bar, parity, peers);
}

// ---- the primitives -------------------------------------------------------------------------------------------------

inline void mbarrier_init(Mbarrier* bar, uint32_t arrivals, const Site& site) {
  if (skipped(site, "mbarrier_init")) return;
  require_own_shared(bar, sizeof(Mbarrier), 8, "mbarrier_init");
  if (arrivals == 0 || arrivals > kMaxArrivals) fail("mbarrier_init: the number of arrivals must be 1 to 2^20 - 1");
  *bar = std::bit_cast<Mbarrier>(MbarrierState{arrivals, arrivals, 0, 0, MbarrierState::kFresh});
  note_fresh(bar, &self());
}

inline void fence_mbarrier_init(const Site& site) {
  if (skipped(site, "fence_mbarrier_init")) return;
  while (Mbarrier* bar = take_fresh(&self())) {
    // A barrier of a kernel that has ended may still be noted.
    if (!in_own_shared(bar, sizeof(Mbarrier))) continue;
    MbarrierState state = peek_state(bar);
    if (state.stage != MbarrierState::kFresh) continue;
    state.stage = MbarrierState::kVisible;
    poke_state(bar, state);
  }
}

inline void mbarrier_arrive(Mbarrier* bar, const Site& site) {
  if (skipped(site, "mbarrier_arrive")) return;
  require_own_shared(bar, sizeof(Mbarrier), 8, "mbarrier_arrive");
  arrive(bar, Arrival::kBlock, "mbarrier_arrive");
}

inline void mbarrier_expect_tx(Mbarrier* bar, uint32_t bytes, const Site& site) {
  if (skipped(site, "mbarrier_expect_tx")) return;
  require_own_shared(bar, sizeof(Mbarrier), 8, "mbarrier_expect_tx");
  expect_bytes(bar, bytes, "mbarrier_expect_tx");
}

inline void mbarrier_arrive_expect_tx(Mbarrier* bar, uint32_t bytes, const Site& site) {
  if (skipped(site, "mbarrier_arrive_expect_tx")) return;
  require_own_shared(bar, sizeof(Mbarrier), 8, "mbarrier_arrive_expect_tx");
  expect_bytes(bar, bytes, "mbarrier_arrive_expect_tx");
  arrive(bar, Arrival::kBlock, "mbarrier_arrive_expect_tx");
}

inline void mbarrier_arrive_remote(Mbarrier* peer_bar, const Site& site) {
  if (skipped(site, "mbarrier_arrive_remote")) return;
  require_cluster_shared(peer_bar, sizeof(Mbarrier), 8, "mbarrier_arrive_remote");
  arrive(peer_bar, Arrival::kPeer, "mbarrier_arrive_remote");
}

inline bool mbarrier_test_wait(const Mbarrier* bar, uint32_t parity, const Site& site) {
  if (skipped(site, "mbarrier_test_wait")) return true;
  require_own_shared(bar, sizeof(Mbarrier), 8, "mbarrier_test_wait");
  if (!phase_is_over(load_state(bar, "mbarrier_test_wait"), parity)) {
    yield();
    return false;
  }
  acquire_phase(bar, parity, false);
  return true;
}

inline void mbarrier_wait(const Mbarrier* bar, uint32_t parity, const Site& site) {
  if (skipped(site, "mbarrier_wait")) return;
  wait_phase(bar, parity, false, "mbarrier_wait", site);
}

inline void mbarrier_wait_cluster(const Mbarrier* bar, uint32_t parity, const Site& site) {
  if (skipped(site, "mbarrier_wait_cluster")) return;
  wait_phase(bar, parity, true, "mbarrier_wait_cluster", site);
}

}  // namespace rnnfast::emulator

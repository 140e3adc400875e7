// Copies that run beside the threads. cp_async and bulk stores are waited for by whoever issued them, in groups;
// bulk_copy and st_async report their bytes to an mbarrier. Their data is visible to the waiting thread then, and to
// others after a barrier. bulk_* need sm_90 and read and write through the asynchronous proxy: what threads have
// written to the source, or to the destination, needs fence_async_proxy before.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "address.h"
#include "mbarrier.h"
#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include <memory>
#include <string>
#include <utility>
#include <vector>
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif
#else
#include <cuda/ptx>
#endif

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)

namespace emulated {

// How many copies of a group are under way. The scheduler looks and the engines count down: no race.
__attribute__((noinline, no_sanitize("thread"))) inline int peek_count(const int* count) {
  return *static_cast<const volatile int*>(count);
}
__attribute__((noinline, no_sanitize("thread"))) inline void add_to_count(int* count, int by) {
  volatile int* place = count;
  *place = *place + by;
}

inline void require_global(const void* address, size_t alignment, const char* what) {
  require_aligned(address, alignment, what);
  if (in_own_shared(address, 1)) emulator::fail(std::string(what) + ": a shared address where a global one is due");
}

// Joins the copy to the open group of the thread. The group outlives the copy: it stays with the thread until it has
// been waited for, and the emulator keeps threads while copies are under way. (No shared_ptr in the lambda: the race
// detector would take its atomic count for an order between the engine and the threads.)
template <class Effect> void issue_in_group(emulator::CopyGroups& groups, Effect effect, bool after_issuer = true) {
  int* group = groups.open.get();
  add_to_count(group, 1);
  emulator::issue(effect, [group] { add_to_count(group, -1); }, group, after_issuer);
}

inline void commit_group(emulator::CopyGroups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open = std::make_shared<int>(0);
}

inline void wait_for_groups(emulator::CopyGroups& groups, size_t may_stay, const char* what,
                            const emulator::Site& site) {
  while (groups.committed.size() > may_stay) {
    const int* oldest = groups.committed.front().get();
    if (peek_count(oldest) != 0) {
      emulator::wait_until([oldest] { return peek_count(oldest) == 0; }, what, site);
    }
    emulator::acquire(oldest);
    groups.committed.pop_front();
  }
}

inline void require_bulk(const void* shared, const void* global, uint32_t bytes, const char* what) {
  if (bytes % 16 != 0) emulator::fail(std::string(what) + ": not a multiple of 16 bytes");
  require_own_shared(shared, bytes, 16, what);
  require_global(global, 16, what);
}

// Copies that report to a barrier belong to the phase that is current as they are issued.
template <class Effect>
void issue_to_barrier(mbarrier* bar, uint32_t bytes, const char* what, Effect effect, bool after_issuer = true) {
  const unsigned parity = load_visible_state(bar, what).parity;
  emulator::issue(
      effect, [bar, bytes] { complete_bytes(bar, bytes); }, order_key(bar, Arrival::kCopy, parity), after_issuer);
}

// A bulk copy reads its source through the asynchronous proxy. Under even seeds it sees what happened before it was
// issued, so that a missing barrier is a race; under odd seeds its source is seen as far as fence_async_proxy has made
// it visible, so that a missing fence is one. (Its destination needs no fence where threads have only read it.)
inline const char async_proxy_key = 0;

inline void acquire_in_engine([[maybe_unused]] const void* key) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(const_cast<void*>(key));
#endif
}

inline void copy_by_proxy(void* to, const void* from, uint32_t bytes, const void* issuer) {
  acquire_in_engine(&async_proxy_key);
  const auto* source = static_cast<const std::byte*>(from);
  const std::vector<std::byte> data(source, source + bytes);
  acquire_in_engine(issuer);
  std::memcpy(to, data.data(), bytes);
}

// Calls `issue` with the effect of a bulk copy and with whether that is ordered after all the thread has done.
template <class Issue> void issue_bulk(void* to, const void* from, uint32_t bytes, const Issue& issue) {
  if (emulator::options().seed % 2 == 0) {
    issue([=] { std::memcpy(to, from, bytes); }, true);
    return;
  }
  const void* issuer = &emulator::self().bulk_stores;
  emulator::release(issuer);
  // What the lambda has captured is the thread's, with which the engine is not ordered yet.
  issue([=]() __attribute__((noinline, no_sanitize("thread"))) { copy_by_proxy(to, from, bytes, issuer); }, false);
}

}  // namespace emulated

#endif

// Copies 4, 8 or 16 bytes, which both addresses are multiples of, from global to shared memory; writes zeros and does
// not read if not `valid`.
template <int bytes> RNNFAST_DEVICE void cp_async(void* shared, const void* global, bool valid = true) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if defined(RNNFAST_EMULATED)
  emulated::require_own_shared(shared, bytes, bytes, "cp_async");
  if (valid) emulated::require_global(global, bytes, "cp_async");
  emulated::issue_in_group(emulator::self().copies, [shared, global, valid] {
    if (valid)
      std::memcpy(shared, global, bytes);
    else
      std::memset(shared, 0, bytes);
  });
#else
  const uint32_t destination = shared_address(shared);
  const uint64_t source = __cvta_generic_to_global(global);
  // What is written beyond source_bytes are zeros.
  const uint32_t source_bytes = valid ? bytes : 0;
  // Only 16 bytes may go past the L1 cache, where no second reader would profit from them.
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

// Ends the group of the copies issued since the last commit.
RNNFAST_DEVICE void cp_async_commit(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "cp_async_commit")) return;
  emulated::commit_group(emulator::self().copies);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when at most the newest N groups of this thread are under way.
template <int N> RNNFAST_DEVICE void cp_async_wait(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "cp_async_wait")) return;
  emulated::wait_for_groups(emulator::self().copies, N, "cp_async_wait", site);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Copies a multiple of 16 bytes from global to shared memory; the barrier of the own block counts them.
RNNFAST_DEVICE void bulk_copy(void* shared, const void* global, uint32_t bytes, mbarrier* bar) {
#if defined(RNNFAST_EMULATED)
  emulated::require_bulk(shared, global, bytes, "bulk_copy");
  emulated::require_own_shared(bar, sizeof(mbarrier), 8, "bulk_copy");
  emulated::issue_bulk(shared, global, bytes, [&](auto effect, bool after_issuer) {
    emulated::issue_to_barrier(bar, bytes, "bulk_copy", effect, after_issuer);
  });
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, shared, global, bytes, bar);
#else
  __trap();
#endif
}

// Copies a multiple of 16 bytes from shared to global memory.
RNNFAST_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes) {
#if defined(RNNFAST_EMULATED)
  emulated::require_bulk(shared, global, bytes, "bulk_store");
  emulated::issue_bulk(global, shared, bytes, [](auto effect, bool after_issuer) {
    emulated::issue_in_group(emulator::self().bulk_stores, effect, after_issuer);
  });
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, global, shared, bytes);
#else
  __trap();
#endif
}

RNNFAST_DEVICE void bulk_commit(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "bulk_commit")) return;
  emulated::commit_group(emulator::self().bulk_stores);
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk_commit_group();
#else
  __trap();
#endif
}

// Returns when at most the newest N groups of this thread's bulk stores are not yet in global memory.
template <int N> RNNFAST_DEVICE void bulk_wait(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "bulk_wait")) return;
  emulated::wait_for_groups(emulator::self().bulk_stores, N, "bulk_wait", site);
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<N>{});
#else
  __trap();
#endif
}

// Stores a value of 4, 8 or 16 bytes in the shared memory of a block of the cluster; a barrier there counts the bytes.
// Both addresses are from map_to_rank, of the same rank.
template <class T> RNNFAST_DEVICE void st_async(std::type_identity_t<T> value, T* peer_shared, mbarrier* peer_bar) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  static_assert(std::is_trivially_copyable_v<T>);
#if defined(RNNFAST_EMULATED)
  const unsigned rank = emulated::require_cluster_shared(peer_shared, sizeof(T), sizeof(T), "st_async");
  if (emulated::require_cluster_shared(peer_bar, sizeof(mbarrier), 8, "st_async") != rank) {
    emulator::fail("st_async: the mbarrier is in another block than the data");
  }
  emulated::issue_to_barrier(peer_bar, sizeof(T), "st_async",
                             [=] { std::memcpy(static_cast<void*>(peer_shared), &value, sizeof(T)); });
#elif RNNFAST_SM90
  if constexpr (sizeof(T) == 4) {
    uint32_t word;
    memcpy(&word, &value, sizeof(T));
    cuda::ptx::st_async(reinterpret_cast<uint32_t*>(peer_shared), word, peer_bar);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t word;
    memcpy(&word, &value, sizeof(T));
    cuda::ptx::st_async(reinterpret_cast<uint64_t*>(peer_shared), word, peer_bar);
  } else {
    uint32_t words[4];
    memcpy(words, &value, sizeof(T));
    cuda::ptx::st_async(reinterpret_cast<uint32_t*>(peer_shared), words, peer_bar);
  }
#else
  __trap();
#endif
}

// Makes what this thread has written, and seen written, visible to bulk copies; a barrier comes between this and
// another thread's copy.
RNNFAST_DEVICE void fence_async_proxy(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  if (emulator::skipped(site, "fence_async_proxy")) return;
  emulator::release(&emulated::async_proxy_key);
#elif RNNFAST_SM90
  cuda::ptx::fence_proxy_async();
#endif
}

}  // namespace rnnfast::gpu

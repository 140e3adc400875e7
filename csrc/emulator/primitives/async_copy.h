// The emulated bodies of csrc/cuda/primitives/async_copy.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "address.h"
#include "mbarrier.h"

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

namespace rnnfast::emulator {

// ---- groups, barriers and proxies -----------------------------------------------------------------------------------

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
  if (in_own_shared(address, 1)) fail(std::string(what) + ": a shared address where a global one is due");
}

// Joins the copy to the open group of the thread. The group outlives the copy: it stays with the thread until it has
// been waited for, and the emulator keeps threads while copies are under way. (No shared_ptr in the lambda: the race
// detector would take its atomic count for an order between the engine and the threads.)
template <class Effect> void issue_in_group(CopyGroups& groups, Effect effect, bool after_issuer = true) {
  int* group = groups.open.get();
  add_to_count(group, 1);
  issue(effect, [group] { add_to_count(group, -1); }, group, after_issuer);
}

inline void commit_group(CopyGroups& groups) {
  groups.committed.push_back(std::move(groups.open));
  groups.open = std::make_shared<int>(0);
}

inline void wait_for_groups(CopyGroups& groups, size_t may_stay, const char* what, const Site& site) {
  while (groups.committed.size() > may_stay) {
    const int* oldest = groups.committed.front().get();
    if (peek_count(oldest) != 0) {
      wait_until([oldest] { return peek_count(oldest) == 0; }, what, site);
    }
    acquire(oldest);
    groups.committed.pop_front();
  }
}

inline void require_bulk(const void* shared, const void* global, uint32_t bytes, const char* what) {
  if (bytes % 16 != 0) fail(std::string(what) + ": not a multiple of 16 bytes");
  require_own_shared(shared, bytes, 16, what);
  require_global(global, 16, what);
}

// Copies that report to a barrier belong to the phase that is current as they are issued.
template <class Effect>
void issue_to_barrier(Mbarrier* bar, uint32_t bytes, const char* what, Effect effect, bool after_issuer = true) {
  const unsigned parity = load_visible_state(bar, what).parity;
  issue(effect, [bar, bytes] { complete_bytes(bar, bytes); }, order_key(bar, Arrival::kCopy, parity), after_issuer);
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
  if (options().seed % 2 == 0) {
    issue([=] { std::memcpy(to, from, bytes); }, true);
    return;
  }
  const void* issuer = &self().bulk_stores;
  release(issuer);
  // What the lambda has captured is the thread's, with which the engine is not ordered yet.
  issue([=]() __attribute__((noinline, no_sanitize("thread"))) { copy_by_proxy(to, from, bytes, issuer); }, false);
}

// ---- the primitives -------------------------------------------------------------------------------------------------

template <int bytes> void cp_async(void* shared, const void* global, bool valid, const Site& site) {
  at(site, "cp_async");
  require_own_shared(shared, bytes, bytes, "cp_async");
  if (valid) require_global(global, bytes, "cp_async");
  issue_in_group(self().copies, [shared, global, valid] {
    if (valid)
      std::memcpy(shared, global, bytes);
    else
      std::memset(shared, 0, bytes);
  });
}

inline void cp_async_commit(const Site& site) {
  if (skipped(site, "cp_async_commit")) return;
  commit_group(self().copies);
}

template <int N> void cp_async_wait(const Site& site) {
  if (skipped(site, "cp_async_wait")) return;
  wait_for_groups(self().copies, N, "cp_async_wait", site);
}

inline void bulk_copy(void* shared, const void* global, uint32_t bytes, Mbarrier* bar, const Site& site) {
  at(site, "bulk_copy");
  require_bulk(shared, global, bytes, "bulk_copy");
  require_own_shared(bar, sizeof(Mbarrier), 8, "bulk_copy");
  issue_bulk(shared, global, bytes,
             [&](auto effect, bool after_issuer) { issue_to_barrier(bar, bytes, "bulk_copy", effect, after_issuer); });
}

inline void bulk_store(void* global, const void* shared, uint32_t bytes, const Site& site) {
  at(site, "bulk_store");
  require_bulk(shared, global, bytes, "bulk_store");
  issue_bulk(global, shared, bytes,
             [](auto effect, bool after_issuer) { issue_in_group(self().bulk_stores, effect, after_issuer); });
}

inline void bulk_commit(const Site& site) {
  if (skipped(site, "bulk_commit")) return;
  commit_group(self().bulk_stores);
}

template <int N> void bulk_wait(const Site& site) {
  if (skipped(site, "bulk_wait")) return;
  wait_for_groups(self().bulk_stores, N, "bulk_wait", site);
}

template <class T> void st_async(const T& value, T* peer_shared, Mbarrier* peer_bar, const Site& site) {
  at(site, "st_async");
  const unsigned rank = require_cluster_shared(peer_shared, sizeof(T), sizeof(T), "st_async");
  if (require_cluster_shared(peer_bar, sizeof(Mbarrier), 8, "st_async") != rank) {
    fail("st_async: the mbarrier is in another block than the data");
  }
  issue_to_barrier(peer_bar, sizeof(T), "st_async",
                   [=] { std::memcpy(static_cast<void*>(peer_shared), &value, sizeof(T)); });
}

inline void fence_async_proxy(const Site& site) {
  if (skipped(site, "fence_async_proxy")) return;
  release(&async_proxy_key);
}

}  // namespace rnnfast::emulator

// The emulated bodies of csrc/cuda/primitives/memory.h. (Calls among them name the namespace: the primitives, which
// take the same arguments, would be found as well.)
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "address.h"

namespace rnnfast::emulator {

[[gnu::always_inline]] inline void check_aligned(const void* address, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(address) % bytes != 0) fail("misaligned " + std::to_string(bytes) + "-byte access");
}

// Tells the sanitizers of an access that the emulator makes where or when they cannot see it: TSan of an atomic one,
// ASan of the bytes. What it writes is what is there.
enum class Access { read, write };
[[gnu::always_inline]] inline void show_access([[maybe_unused]] const void* address, [[maybe_unused]] size_t bytes,
                                               [[maybe_unused]] Access access) {
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
  auto* words = static_cast<uint32_t*>(const_cast<void*>(address));
  for (size_t i = 0; i < bytes / 4; ++i) {
    if (access == Access::read)
      static_cast<void>(__atomic_load_n(words + i, __ATOMIC_RELAXED));
    else
      static_cast<void>(__atomic_fetch_add(words + i, 0, __ATOMIC_RELAXED));
  }
#endif
}

template <class T> [[gnu::always_inline]] inline T strong_load(const T* address, bool acquires) {
  check_aligned(address, sizeof(T));
  show_access(address, sizeof(T), Access::read);
  T value;
  forwarded_load(address, &value, sizeof(T), acquires);
  return value;
}

template <class T> [[gnu::always_inline]] inline void strong_store(T* address, const T& value, bool releases) {
  check_aligned(address, sizeof(T));
  show_access(address, sizeof(T), Access::write);
  delayed_store(address, &value, sizeof(T), releases);
}

template <class T> [[gnu::always_inline]] inline T load_relaxed(const T* address, const Site& site) {
  at(site, "load_relaxed");
  return strong_load(address, false);
}

template <class T> [[gnu::always_inline]] inline void store_relaxed(T* address, const T& value) {
  strong_store(address, value, false);
}

template <class T> [[gnu::always_inline]] inline T load_acquire(const T* address, const Site& site) {
  return strong_load(address, !skipped(site, "load_acquire"));
}

template <class T> [[gnu::always_inline]] inline void store_release(T* address, const T& value, const Site& site) {
  strong_store(address, value, !skipped(site, "store_release"));
}

[[gnu::always_inline]] inline void fence_gpu(const Site& site) {
  if (skipped(site, "fence_gpu")) return;
  fence();
}

template <class T, class Predicate>
[[gnu::always_inline]] inline T poll(const T* address, Predicate predicate, const Site& site) {
  if (skipped(site, "poll")) return emulator::load_relaxed(address, site);
  // A poll that ends only with another thread's store waits for it, so that a value that never comes is a deadlock.
  for (;;) {
    const T value = emulator::load_relaxed(address, site);
    if (predicate(value)) return value;
    wait_until(
        [address, predicate] {
          T now;
          std::memcpy(&now, address, sizeof(T));
          return static_cast<bool>(predicate(now));
        },
        "poll", site);
  }
}

template <class T, class Predicate>
[[gnu::always_inline]] inline T poll_acquire(const T* address, Predicate predicate, const Site& site) {
  for (;;) {
    static_cast<void>(emulator::poll(address, predicate, site));
    const T value = emulator::load_acquire(address, site);
    if (predicate(value)) return value;
  }
}

}  // namespace rnnfast::emulator

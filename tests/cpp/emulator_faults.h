// Kernels that are wrong on purpose: those that the emulator must end with an error, and those that only TSan or ASan
// can catch.
#pragma once

#include <atomic>
#include <memory>

#include "cuda/primitives/cluster.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/shared.h"
#include "emulator/emulator.h"

namespace rnnfast::test {

using namespace gpu;

template <class T> RNNFAST_DEVICE T* shared_as() { return reinterpret_cast<T*>(shared_memory()); }

// How many are alive: every thread's locals are destroyed when its launch is given up.

struct Counted {
  static inline std::atomic<int> alive{0};
  Counted() { alive.fetch_add(1, std::memory_order_relaxed); }
  ~Counted() { alive.fetch_sub(1, std::memory_order_relaxed); }
};

inline RNNFAST_KERNEL void deadlock_kernel() {
  const Counted counted;
  if (thread_index() < 40) sync_threads();
  if (thread_index() == 63) barrier_sync(3, 64);
}

inline RNNFAST_KERNEL void polling_kernel(const int* flag, bool spins) {
  if (thread_index() != 0) return;
  if (spins) {
    while (load_relaxed(flag) == 0) {}
  } else {
    static_cast<void>(poll(flag, [](int value) { return value != 0; }));
  }
}

enum class Wrong { lines, barrier_count, part_of_warp, twice, mask, shuffle_lines, exception, wait_alone };

inline RNNFAST_KERNEL void wrong_kernel(Wrong wrong) {
  const Counted counted;
  switch (wrong) {
    case Wrong::lines:
      if (thread_index() < 32)
        sync_threads();
      else
        sync_threads();
      break;
    case Wrong::barrier_count: barrier_sync(1, thread_index() < 32 ? 64 : 32); break;
    case Wrong::part_of_warp:
      if (thread_index() % 32 < 16) barrier_sync(1, 32);
      break;
    case Wrong::twice:
      barrier_arrive(1, 64);
      if (thread_index() == 0) barrier_arrive(1, 64);
      break;
    case Wrong::mask: sync_warp(lane() < 16 ? 0xffffffffu : 0xffff0000u); break;
    case Wrong::shuffle_lines:
      if (lane() < 16)
        static_cast<void>(shuffle(1, 0));
      else
        static_cast<void>(shuffle(1, 0));
      break;
    case Wrong::exception:
      if (thread_index() == 5) emulator::fail("on purpose");
      sync_threads();
      break;
    case Wrong::wait_alone: cluster_wait(); break;
  }
}

// ---- for the sanitizers ----

inline RNNFAST_KERNEL void missing_barrier_kernel(int* out) {
  int* shared = shared_as<int>();
  shared[thread_index()] = 1;
  out[thread_index()] = shared[thread_index() ^ 32];
}

// A shuffle orders nothing.
inline RNNFAST_KERNEL void shuffle_orders_nothing_kernel(int* out) {
  int* shared = shared_as<int>();
  shared[thread_index()] = 1;
  static_cast<void>(shuffle(1, 0));
  out[thread_index()] = shared[thread_index() ^ 1];
}

inline RNNFAST_KERNEL void between_blocks_kernel(int* data) { data[0] += static_cast<int>(thread_index()) + 1; }

// Peers write each other's shared memory without a cluster barrier between.
inline RNNFAST_KERNEL void peer_kernel() {
  int* shared = shared_as<int>();
  shared[0] = 1;
  *map_to_rank(shared, cluster_rank() ^ 1) = 2;
  cluster_sync();
}

// Reads the copy before it has waited for it.
inline RNNFAST_KERNEL void hasty_kernel(const int* source, int* out) {
  int* shared = shared_as<int>();
  auto done = std::make_shared<int>(0);
  emulator::issue([=] { shared[0] = source[0]; }, [done] { *done = 1; }, done.get());
  emulator::wait_until([done] { return *done == 1; }, "copy", emulator::Site::current());
  out[0] = shared[0];
}

inline RNNFAST_KERNEL void overrun_kernel() { shared_as<int>()[thread_index() + 1] = 0; }

inline RNNFAST_KERNEL void ended_peer_kernel(int* out) {
  int* peer = map_to_rank(shared_as<int>(), cluster_rank() ^ 1);
  shared_as<int>()[0] = 1;
  cluster_sync();
  if (cluster_rank() == 1) return;
  for (int i = 0; i < 300; ++i) emulator::yield();
  *out = *peer;
}

// ---- what ends a program, and what does not end ----

inline RNNFAST_KERNEL void crash_kernel(int* nowhere) {
  if (thread_index() == 3) *static_cast<volatile int*>(nowhere) = 1;
}

// Waits outside of the primitives, where the emulator cannot see it.
inline RNNFAST_KERNEL void loop_kernel(const volatile int* flag) {
  sync_threads();
  if (thread_index() == 2)
    while (*flag == 0) {}
}

}  // namespace rnnfast::test

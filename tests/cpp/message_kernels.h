// One block hands data to another through a flag, with this or that to order the two: with enough of it in test_memory,
// with too little in test_misuse.
#pragma once

#include "cuda/primitives/execution.h"
#include "cuda/primitives/memory.h"
#include "run_kernel.h"

namespace rnnfast::test {

using namespace gpu;

enum class Order { relaxed, release_acquire, fences, release_only, acquire_only };

// Thread 0 of block 0 stores data and then a flag; thread 0 of block 1 polls the flag and then loads data.
template <Order order> RNNFAST_KERNEL void message_kernel(int* data, int* flag, int* out) {
  if (thread_index() != 0) return;
  if (block_index().x == 0) {
    store_relaxed(data, 42);
    if constexpr (order == Order::fences) fence_gpu();
    if constexpr (order == Order::release_acquire || order == Order::release_only)
      store_release(flag, 1);
    else
      store_relaxed(flag, 1);
  } else {
    const auto set = [](int value) { return value == 1; };
    // The reader has seen the old value before, as a loop over steps has.
    static_cast<void>(load_relaxed(data));
    if constexpr (order == Order::release_acquire || order == Order::acquire_only)
      static_cast<void>(poll_acquire(flag, set));
    else
      static_cast<void>(poll(flag, set));
    if constexpr (order == Order::fences) fence_gpu();
    *out = load_relaxed(data);
  }
}

// How many of the runs, one under each seed, lost the message.
template <Order order> int lost_messages(unsigned seeds) {
  int lost = 0;
  for_all_seeds(seeds, [&] {
    Array<int> data{0}, flag{0}, out{-1};
    CHECK_NO_ERROR(run(cooperative(2, 32), message_kernel<order>, data.device(), flag.device(), out.device()));
    CHECK(out[0] == 42 || out[0] == 0);
    lost += out[0] != 42;
    if (seed() == 0) CHECK_EQUAL(out[0], 42);
  });
  return lost;
}

template <bool releases> RNNFAST_KERNEL void flag_kernel(int* data, int* flag) {
  if (block_index().x == 0) {
    *data = 1;
    if (releases)
      store_release(flag, 1);
    else
      store_relaxed(flag, 1);
  } else {
    static_cast<void>(poll_acquire(flag, [](int value) { return value == 1; }));
    *data += 1;
  }
}
template <bool releases> void flag_case() {
  Array<int> data{0}, flag{0};
  CHECK_NO_ERROR(run(cooperative(2, 1), flag_kernel<releases>, data.device(), flag.device()));
  CHECK_EQUAL(data[0], 2);
}

}  // namespace rnnfast::test

// Grids that start before their predecessor has ended: with a wait in test_execution, without one in test_emulator.
#pragma once

#include "cuda/primitives/dependent_launch.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/memory.h"
#include "run_kernel.h"

namespace rnnfast::test {

using namespace gpu;

RNNFAST_KERNEL void first_kernel(int* data) {
  allow_next_grid();
  sync_threads();
  data[block_index().x * block_threads() + thread_index()] += 1;
}

template <bool waits> RNNFAST_KERNEL void second_kernel(const int* data, int* out) {
  if (waits) wait_for_previous_grid();
  const unsigned i = block_index().x * block_threads() + thread_index();
  out[i] = load_relaxed(data + i);
}

RNNFAST_KERNEL void chain_kernel(const int* in, int* out) {
  wait_for_previous_grid();
  allow_next_grid();
  out[thread_index()] = in[thread_index()] + 1;
}

// How many values of the first grid the second has not seen, over all seeds.
template <bool waits> int stale_after_dependent_launch(bool dependent, unsigned seeds) {
  int stale = 0;
  for_all_seeds(seeds, [&] {
    Array<int> data(4 * 32), out(4 * 32, -1);
    int *on_data = data.device(), *on_out = out.device();
    LaunchConfig config = blocks(4, 32);
    CHECK_NO_ERROR(launch(config, first_kernel, on_data));
    config.dependent = dependent;
    CHECK_NO_ERROR(launch(config, second_kernel<waits>, on_data, on_out));
    CHECK_NO_ERROR(finish());
    for (int value : out) {
      CHECK(value == 0 || value == 1);
      stale += value == 0;
    }
  });
  return stale;
}

}  // namespace rnnfast::test

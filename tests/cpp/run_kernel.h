// What the tests of kernels share: a launch with its end awaited, and repetition under shuffled schedules.
#pragma once

#include <cstdio>
#include <string>

#include "cuda/primitives/launch.h"
#include "emulator/emulator.h"

namespace rnnfast::test {

// Runs a kernel to its end; the error text, empty if all went well.
template <class... P, class... Args>
std::string run(const gpu::LaunchConfig& config, void (*kernel)(P...), Args... args) {
  const std::string error = gpu::launch(config, kernel, args...);
  return error.empty() ? gpu::synchronize(nullptr) : error;
}

// Whether it ran without an error, which is printed.
template <class... P, class... Args> bool runs(const gpu::LaunchConfig& config, void (*kernel)(P...), Args... args) {
  const std::string error = run(config, kernel, args...);
  if (!error.empty()) std::printf("%s\n", error.c_str());
  return error.empty();
}

inline gpu::LaunchConfig blocks(unsigned grid, unsigned threads, size_t shared_bytes = 0, unsigned cluster = 1) {
  gpu::LaunchConfig config;
  config.grid = {grid, 1, 1};
  config.threads = threads;
  config.shared_bytes = shared_bytes;
  config.cluster = cluster;
  config.name = "test";
  return config;
}

// Seed 0 is the plain schedule.
template <class Body> void for_each_seed(unsigned seeds, Body body) {
  const uint64_t before = emulator::options().seed;
  for (unsigned seed = 0; seed < seeds; ++seed) {
    emulator::options().seed = seed;
    body();
  }
  emulator::options().seed = before;
}

}  // namespace rnnfast::test

// What the tests of kernels share: a launch with its end awaited, and repetition, in the emulator under shuffled
// schedules.
#pragma once

#include <cstdint>
#include <cstdio>
#include <optional>
#include <string>

#include "check.h"
#include "cuda/primitives/launch.h"
#include "device_array.h"

namespace rnnfast::test {

// The emulator's; on a card, where schedules are what they are, only a number.
inline uint64_t& seed() {
#if defined(RNNFAST_EMULATED)
  return emulator::options().seed;
#else
  static uint64_t number = 0;
  return number;
#endif
}

// Waits for all that was launched: `error` is what the launches said, and the result that or what went wrong since.
inline std::string finish(std::string error = "") {
  if (error.empty()) error = gpu::synchronize(nullptr);
  if (error.empty())
    fetch_arrays();
  else
    forget_arrays();
  ++check::progress();
  return error;
}

// Runs a kernel to its end; the error text, empty if all went well.
template <class... P, class... Args>
std::string run(const gpu::LaunchConfig& config, void (*kernel)(P...), Args... args) {
  return finish(gpu::launch(config, kernel, args...));
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

// All blocks at once.
inline gpu::LaunchConfig cooperative(unsigned grid, unsigned threads, size_t shared_bytes = 0) {
  gpu::LaunchConfig config = blocks(grid, threads, shared_bytes);
  config.cooperative = true;
  return config;
}

// How many schedules show what depends on them. The race detector takes long for each, and needs less luck.
#if defined(__SANITIZE_THREAD__)
constexpr unsigned kUsualSeeds = 10, kManySeeds = 100;
#else
constexpr unsigned kUsualSeeds = 40, kManySeeds = 200;
#endif

// While it lives this is the seed.
class SeedScope {
 public:
  explicit SeedScope(uint64_t number) {
    seed() = number;
    check::state().seed = number;
  }
  ~SeedScope() {
    seed() = seed_;
    check::state().seed = told_;
  }
  SeedScope(const SeedScope&) = delete;
  SeedScope& operator=(const SeedScope&) = delete;

 private:
  const uint64_t seed_ = seed();
  const std::optional<uint64_t> told_ = check::state().seed;
};

// Under all of them, whatever was asked for: for what is counted over schedules. Seed 0 is the plain schedule.
template <class Body> void for_all_seeds(unsigned seeds, Body body) {
  for (unsigned n = 0; n < seeds; ++n) {
    const SeedScope scope(n);
    body();
  }
}

// Under all of them, or under the one that was asked for.
template <class Body> void for_each_seed(unsigned seeds, Body body) {
  const auto& only = check::state().only_seed;
  if (!only) return for_all_seeds(seeds, body);
  const SeedScope scope(*only);
  body();
}

}  // namespace rnnfast::test

// The three exchanges (exchange_kernels.h) against a loop on the host, under many schedules.
#include <string>
#include <vector>

#include "check.h"
#include "exchange_kernels.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;
using rnnfast::exchange::mix;

constexpr unsigned kSeeds = 20;
constexpr unsigned kSteps = 5;

// The recurrence of each row of `units` values.
std::vector<uint32_t> expected(std::vector<uint32_t> h, unsigned units) {
  for (size_t row = 0; row < h.size(); row += units) {
    for (unsigned t = 0; t < kSteps; ++t) {
      uint32_t sum = 0;
      for (unsigned i = 0; i < units; ++i) sum += h[row + i];
      for (unsigned i = 0; i < units; ++i) h[row + i] = mix(sum, i, t);
    }
  }
  return h;
}

// Values to start from, where they end, and a check of that.
struct Recurrence {
  Array<uint32_t> h_0, h_n;

  explicit Recurrence(size_t count) : h_0(count), h_n(count) {
    for (size_t i = 0; i < count; ++i) h_0[i] = mix(uint32_t(i), 17, 0);
  }
  void check(const std::string& error, unsigned units) const {
    CHECK_NO_ERROR(error);
    CHECK(h_n == expected(h_0, units));
  }
};

void block() {
  constexpr unsigned kBlocks = 2, kThreads = 64;
  for_each_seed(kSeeds, [] {
    Recurrence r(kBlocks * kThreads);
    LaunchConfig config = blocks(kBlocks, kThreads, 2 * kThreads * sizeof(uint32_t));
    config.name = "block_exchange";
    r.check(run(config, rnnfast::exchange::block_exchange, r.h_n.device(), r.h_0.device(), kSteps), kThreads);
  });
}

void cluster() {
  constexpr unsigned kClusters = 2, kRanks = 3, kThreads = 16, kUnits = kRanks * kThreads;
  for_each_seed(kSeeds, [] {
    Recurrence r(kClusters * kUnits);
    LaunchConfig config =
        blocks(kClusters * kRanks, kThreads, 2 * sizeof(mbarrier) + 2 * kUnits * sizeof(uint32_t), kRanks);
    config.name = "cluster_exchange";
    r.check(run(config, rnnfast::exchange::cluster_exchange, r.h_n.device(), r.h_0.device(), kSteps), kUnits);
  });
}

void grid() {
  constexpr unsigned kBlocks = 6, kThreads = 32, kWords = kBlocks * kThreads, kUnits = 3 * kWords;
  for_each_seed(kSeeds, [] {
    Recurrence r(kUnits);
    Array<Word16> words(2 * kWords);
    LaunchConfig config = cooperative(kBlocks, kThreads, 2 * kUnits * sizeof(uint32_t));
    config.name = "grid_exchange";
    r.check(run(config, rnnfast::exchange::grid_exchange, r.h_n.device(), r.h_0.device(), words.device(), kSteps),
            kUnits);
  });
}

}  // namespace

CHECK_CASES(exchange) { return {{"block", block}, {"cluster", cluster}, {"grid", grid, check::Kind::polls}}; }

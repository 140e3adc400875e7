// The three exchanges (exchange_kernels.h) against a loop on the host, under many schedules.
//   test_exchange [kernel]                      runs all, or one of block, cluster, grid; exit status 1: something
//   differs test_exchange --list [kernel]               prints the synchronisation sites as file:line test_exchange
//   --skip file:line [kernel]     leaves one of them out; exit status 1: this was noticed
#include <cstdio>
#include <string>
#include <vector>

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

std::vector<uint32_t> initial(size_t count) {
  std::vector<uint32_t> h(count);
  for (size_t i = 0; i < count; ++i) h[i] = mix(uint32_t(i), 17, 0);
  return h;
}

// What went wrong, empty if nothing did.
std::string compare(const std::string& error, const std::vector<uint32_t>& h_n,
                    const std::vector<uint32_t>& reference) {
  if (!error.empty()) return error;
  for (size_t i = 0; i < h_n.size(); ++i) {
    if (h_n[i] != reference[i]) return "wrong value at " + std::to_string(i);
  }
  return {};
}

std::string run_block() {
  constexpr unsigned kBlocks = 2, kThreads = 64;
  const std::vector<uint32_t> h_0 = initial(kBlocks * kThreads);
  std::vector<uint32_t> h_n(h_0.size());
  LaunchConfig config = blocks(kBlocks, kThreads, 2 * kThreads * sizeof(uint32_t));
  config.name = "block_exchange";
  const std::string error = run(config, rnnfast::exchange::block_exchange, h_n.data(), h_0.data(), kSteps);
  return compare(error, h_n, expected(h_0, kThreads));
}

std::string run_cluster() {
  constexpr unsigned kClusters = 2, kRanks = 3, kThreads = 16, kUnits = kRanks * kThreads;
  const std::vector<uint32_t> h_0 = initial(kClusters * kUnits);
  std::vector<uint32_t> h_n(h_0.size());
  LaunchConfig config =
      blocks(kClusters * kRanks, kThreads, 2 * sizeof(mbarrier) + 2 * kUnits * sizeof(uint32_t), kRanks);
  config.name = "cluster_exchange";
  const std::string error = run(config, rnnfast::exchange::cluster_exchange, h_n.data(), h_0.data(), kSteps);
  return compare(error, h_n, expected(h_0, kUnits));
}

std::string run_grid() {
  constexpr unsigned kBlocks = 6, kThreads = 32, kWords = kBlocks * kThreads, kUnits = 3 * kWords;
  const std::vector<uint32_t> h_0 = initial(kUnits);
  std::vector<uint32_t> h_n(h_0.size());
  std::vector<Word16> words(2 * kWords);
  LaunchConfig config = blocks(kBlocks, kThreads, 2 * kUnits * sizeof(uint32_t));
  config.name = "grid_exchange";
  config.cooperative = true;
  const std::string error = run(config, rnnfast::exchange::grid_exchange, h_n.data(), h_0.data(), words.data(), kSteps);
  return compare(error, h_n, expected(h_0, kUnits));
}

struct Exchange {
  const char* name;
  std::string (*run)();
};
constexpr Exchange kExchanges[] = {{"block", run_block}, {"cluster", run_cluster}, {"grid", run_grid}};

}  // namespace

int main(int argc, char** argv) {
  auto& options = rnnfast::emulator::options();
  unsigned seeds = kSeeds;
  std::string only;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--list") {
      options.list_sites = true;
      seeds = 1;
    } else if (argument == "--skip" && i + 1 < argc) {
      options.skip = argv[++i];
    } else if (argument == "--seeds" && i + 1 < argc) {
      seeds = unsigned(std::stoul(argv[++i]));
    } else {
      only = argument;
    }
  }
  unsigned runs = 0, failures = 0;
  for (const Exchange& exchange : kExchanges) {
    if (!only.empty() && only != exchange.name) continue;
    for_each_seed(seeds, [&] {
      // Noticed once is enough.
      if (!options.skip.empty() && failures > 0) return;
      ++runs;
      const std::string error = exchange.run();
      if (error.empty()) return;
      ++failures;
      std::fprintf(stderr, "%s exchange, seed %llu: %s\n", exchange.name, static_cast<unsigned long long>(options.seed),
                   error.c_str());
    });
  }
  if (runs == 0) {
    std::fprintf(stderr, "no exchange is called %s\n", only.c_str());
    return 2;
  }
  std::fprintf(stderr, "%u runs, %u wrong\n", runs, failures);
  return failures != 0;
}

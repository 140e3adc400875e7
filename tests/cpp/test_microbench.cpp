// The kernels of benchmarks/microbench against the host, in the emulator under shuffled schedules.
#include <cstring>
#include <string>
#include <vector>

#include "../../benchmarks/microbench/kernels.cuh"
#include "check.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::microbench;
using namespace rnnfast::test;

constexpr unsigned kSeeds = 4, kSteps = 5;

Array<Word16> first_state(unsigned count) {
  Array<Word16> state(count);
  for (unsigned w = 0; w < count; ++w) state[w] = advance(Word16{}, w, 0);
  return state;
}

std::vector<Word16> expected_state(unsigned count) {
  std::vector<Word16> state = first_state(count);
  for (unsigned t = 1; t <= kSteps; ++t) {
    std::vector<Word16> next(count);
    for (unsigned w = 0; w < count; ++w) next[w] = advance(state[source_of(w, count, t)], w, t);
    state = next;
  }
  return state;
}

// `launch` runs the kernel with (last, first); counts that blocks share evenly and not, and fewer words than blocks.
template <class Launch> void check_exchange(Launch launch) {
  for (const unsigned count : {3u, 64u, 301u}) {
    const Array<Word16> first = first_state(count);
    const std::vector<Word16> expected = expected_state(count);
    for_each_seed(kSeeds, [&] {
      Array<Word16> last(count);
      CHECK_NO_ERROR(launch(last.device(), first.device(), count));
      CHECK(std::memcmp(last.data(), expected.data(), count * sizeof(Word16)) == 0);
    });
  }
}

template <class Kernel> void check_grid(Kernel kernel) {
  check_exchange([&](Word16* last, const Word16* first, unsigned count) {
    Array<Word16> published(2 * count);
    const LaunchConfig config = cooperative(4, 32, 2 * count * sizeof(Word16));
    return run(config, kernel, last, first, published.device(), count, kSteps);
  });
}

void test_polling() { check_grid(exchange_by_polling); }
void test_grid_barrier() { check_grid(exchange_by_grid_barrier); }

void test_flags() {
  check_exchange([&](Word16* last, const Word16* first, unsigned count) {
    Array<Word16> published(2 * count);
    Array<uint32_t> raised(4);
    const LaunchConfig config = cooperative(4, 32, 2 * count * sizeof(Word16));
    return run(config, exchange_by_flags, last, first, published.device(), raised.device(), count, kSteps);
  });
}

// Two clusters: the second computes the same and writes nothing.
template <class Kernel> void check_cluster(Kernel kernel, size_t barriers) {
  check_exchange([&](Word16* last, const Word16* first, unsigned count) {
    return run(blocks(6, 64, barriers + 2 * count * sizeof(Word16), 3), kernel, last, first, count, kSteps);
  });
}

void test_st_async() { check_cluster(exchange_by_st_async, 2 * sizeof(mbarrier)); }
void test_cluster_barrier() { check_cluster(exchange_by_cluster_barrier, 0); }

template <class Shape> void check_mma() {
  constexpr unsigned kTimes = 3;
  Array<float> result(Shape::kRows * Shape::kBatch, -1.0f);
  CHECK(runs(blocks(2, kMmaWarps * 32, Shape::kSharedBytes), mma_rate<Shape>, result.device(), kTimes));
  for (unsigned row = 0; row < Shape::kRows; ++row) {
    for (unsigned n = 0; n < Shape::kBatch; ++n) {
      int sum = 0;
      for (unsigned k = 0; k < Shape::kDepth; ++k) sum += weight_at(row, k) * state_at(n, k);
      CHECK_EQUAL(result[row * Shape::kBatch + n], static_cast<float>(sum * static_cast<int>(kTimes)));
    }
  }
}

void test_mma() {
  check_mma<MmaShape<2, 3, 1, false>>();
  check_mma<MmaShape<2, 3, 2, false>>();
  check_mma<MmaShape<1, 2, 4, false>>();
  check_mma<MmaShape<2, 3, 1, true>>();
  check_mma<MmaShape<1, 2, 4, true>>();
}

void test_chain() {
  constexpr unsigned kBlocks = 3, kThreads = 32;
  for_each_seed(kSeeds, [&] {
    Array<uint32_t> values(kBlocks * kThreads);
    std::vector<uint32_t> expected(values.size());
    LaunchConfig config = blocks(kBlocks, kThreads);
    uint32_t* device = values.device();
    for (unsigned step = 0; step < kSteps; ++step) {
      for (unsigned i = 0; i < expected.size(); ++i) expected[i] = mix(expected[i], i, step);
      config.dependent = step > 0;
      CHECK_NO_ERROR(launch(config, chain_link, device, step));
    }
    CHECK_NO_ERROR(finish());
    CHECK(values == expected);
  });
}

}  // namespace

CHECK_CASES(microbench) {
  constexpr auto kPolls = check::Kind::polls;
  return {{"polling", test_polling, kPolls},
          {"grid_barrier", test_grid_barrier},
          {"flags", test_flags, kPolls},
          {"st_async", test_st_async},
          {"cluster_barrier", test_cluster_barrier},
          {"mma", test_mma},
          {"chain", test_chain}};
}

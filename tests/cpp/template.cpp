// A kernel of one's own, its test, and a race planted in it: copy this to tests/cpp/test_<name>.cpp, and see
// docs/kernels.md. Here each block adds up one row in a tree.
#include <cstdint>
#include <random>
#include <vector>

#include "check.h"
#include "compare.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/shared.h"
#include "device_array.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;

constexpr unsigned kThreads = 64;

// sums[row] = sum of data[row][0..count); a block a row, shared memory: float[block_threads()], a power of 2.
template <bool kWaits> RNNFAST_KERNEL void row_sums(float* sums, const float* data, int64_t count) {
  auto* shared = reinterpret_cast<float*>(shared_memory());
  const float* row = data + block_index().x * count;
  float sum = 0;
  for (int64_t i = thread_index(); i < count; i += block_threads()) sum += row[i];
  shared[thread_index()] = sum;
  for (unsigned half = block_threads() / 2; half > 0; half /= 2) {
    // The other half's sums of the round before: without the barrier they may not be there yet.
    if (kWaits) sync_threads();
    if (thread_index() < half) shared[thread_index()] += shared[thread_index() + half];
  }
  if (thread_index() == 0) sums[block_index().x] = shared[0];
}

template <bool kWaits> void check_row_sums(int64_t rows, int64_t count) {
  const check::Note note("rows " + std::to_string(rows) + ", count " + std::to_string(count));
  std::mt19937_64 random(seed());
  std::uniform_real_distribution<float> uniform(-1, 1);
  Array<float> data(static_cast<size_t>(rows * count)), sums(static_cast<size_t>(rows));
  std::vector<double> expected(static_cast<size_t>(rows));
  for (size_t i = 0; i < data.size(); ++i) {
    data[i] = uniform(random);
    expected[i / static_cast<size_t>(count)] += static_cast<double>(data[i]);
  }
  LaunchConfig config = blocks(static_cast<unsigned>(rows), kThreads, kThreads * sizeof(float));
  config.name = "row_sums";
  if (!CHECK_NO_ERROR(run(config, row_sums<kWaits>, sums.device(), data.device(), count))) return;
  expect_close("sums", [&](size_t i) { return sums[i]; }, sums.size(), expected, 1e-6, {{"row", rows}});
}

void sums() {
  for_each_seed(kUsualSeeds, [] {
    check_row_sums<true>(3, 200);
    check_row_sums<true>(1, 7);
  });
}

}  // namespace

CHECK_CASES(template) {
  return {
      {"sums", sums},
      // Without the barrier TSan must report it.
      {"race-no-barrier", [] { check_row_sums<false>(1, 200); }, check::Kind::by_name_only},
  };
}

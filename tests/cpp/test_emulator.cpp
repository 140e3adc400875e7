// The emulator itself: what is ordered, what is reported. Small kernels, each for one promise of docs/emulator.md. The
// cases by name only are wrong on purpose: a sanitizer must say so.
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <thread>

#include "check.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/shared.h"
#include "dependent_kernels.h"
#include "emulator_faults.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;
namespace emulator = rnnfast::emulator;

// Runs once with the seed, and leaves the options as they were.
class Seed {
 public:
  explicit Seed(uint64_t seed) { emulator::options().seed = seed; }
  ~Seed() { emulator::options() = before_; }

 private:
  emulator::Options before_ = emulator::options();
};

LaunchConfig config(unsigned blocks, unsigned threads, size_t shared_bytes = 0, const char* name = "kernel") {
  LaunchConfig result;
  result.grid = {blocks, 1, 1};
  result.threads = threads;
  result.shared_bytes = shared_bytes;
  result.name = name;
  return result;
}

// ---- barriers ----

RNNFAST_KERNEL void rotate_kernel(int* out, int rounds) {
  int* shared = shared_as<int>();
  const unsigned n = block_threads();
  int value = static_cast<int>(thread_index());
  for (int i = 0; i < rounds; ++i) {
    shared[thread_index()] = value;
    sync_threads();
    value = shared[(thread_index() + 1) % n];
    sync_threads();
  }
  out[block_index().x * n + thread_index()] = value;
}

void barriers() {
  constexpr int kThreads = 96, kBlocks = 5, kRounds = 7;
  for (int seed = 0; seed < 5; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    std::vector<int> out(kThreads * kBlocks, -1);
    CHECK_NO_ERROR(run(config(kBlocks, kThreads, kThreads * sizeof(int)), rotate_kernel, out.data(), kRounds));
    for (int i = 0; i < kThreads * kBlocks; ++i) CHECK_EQUAL(out[i], (i + kRounds) % kThreads);
  }
}

// ---- memory ----

RNNFAST_KERNEL void poison_kernel(float* out) { out[thread_index()] = shared_as<float>()[thread_index()]; }

void poison() {
  std::vector<float> out(32, 0);
  CHECK_NO_ERROR(run(config(1, 32, 128), poison_kernel, out.data()));
  for (float value : out) CHECK(std::isnan(value));
}

// An asynchronous operation takes effect some time later and not before: the copy is not there without a wait.
RNNFAST_KERNEL void asynchronous_kernel(const int* source, int* out) {
  int* shared = shared_as<int>();
  auto done = std::make_shared<int>(0);
  emulator::issue([=] { shared[0] = source[0]; }, [done] { *done = 1; }, done.get());
  out[0] = *done;
  emulator::wait_until([done] { return *done == 1; }, "copy", emulator::Site::current());
  emulator::acquire(done.get());
  out[1] = shared[0];
}

void asynchronous() {
  for (int seed = 0; seed < 5; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    const int source = 7;
    int out[2] = {-1, -1};
    CHECK_NO_ERROR(run(config(1, 1, 4), asynchronous_kernel, &source, out));
    CHECK_EQUAL(out[0], 0);
    CHECK_EQUAL(out[1], 7);
  }
}

// ---- launches ----

// Not under TSan, which reports it.
void dependent_without_wait() { CHECK(stale_after_dependent_launch<false>(true, kUsualSeeds) > 0); }

RNNFAST_KERNEL void empty_kernel() {}

void bad_configurations() {
  CHECK_CONTAINS(run(config(1, 1025), empty_kernel), "1 to 1024 threads a block, not 1025");
  CHECK_CONTAINS(run(config(0, 32), empty_kernel), "an empty grid");
  CHECK_CONTAINS(run(config(1, 32, 300 << 10), empty_kernel), "bytes of shared memory");
  const auto grid_sync_kernel = +[] { grid_sync(); };
  CHECK_CONTAINS(run(config(2, 32), grid_sync_kernel), "grid_sync needs a cooperative launch");
  LaunchConfig c = config(6, 32, 0, "clustered");
  c.cluster = 4;
  CHECK_CONTAINS(run(c, empty_kernel), "kernel clustered: clusters of 4 do not divide the grid (6,1,1)");
  CHECK_NO_ERROR(run(config(1, 32), empty_kernel));
}

void host_threads() {
  std::atomic<int> errors{0};
  const auto work = [&] {
    for (int i = 0; i < 20; ++i) {
      std::vector<int> out(64, -1);
      if (!run(config(1, 64, 256), rotate_kernel, out.data(), 3).empty()) ++errors;
      for (int t = 0; t < 64; ++t) errors += out[t] != (t + 3) % 64;
    }
  };
  std::thread other(work);
  work();
  other.join();
  CHECK_EQUAL(errors.load(), 0);
}

// ---- errors ----

void deadlocks() {
  for (int seed = 0; seed < 3; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    const std::string error = run(config(2, 64, 0, "stuck"), deadlock_kernel);
    CHECK_CONTAINS(error, "deadlock");
    CHECK_CONTAINS(error, "kernel stuck, block (1,0,0)");
    CHECK_CONTAINS(error, "threads 0-39: waits: sync_threads at ");
    CHECK_CONTAINS(error, "emulator_faults.h:");
    CHECK_CONTAINS(error, "thread 63: waits: barrier_sync at");
    CHECK_CONTAINS(error, "threads 40-62: ended");
    CHECK_CONTAINS(error, "barrier 0: 40 of 64 threads have arrived");
    CHECK_EQUAL(Counted::alive.load(), 0);
    // The emulator is usable afterwards.
    std::vector<int> out(64, -1);
    CHECK_NO_ERROR(run(config(1, 64, 256), rotate_kernel, out.data(), 1));
    CHECK_EQUAL(out[63], 0);
  }
}

void polls_for_ever() {
  int flag = 0;
  const std::string error = run(config(1, 32, 0, "waiter"), polling_kernel, &flag, false);
  CHECK_CONTAINS(error, "no thread can go on");
  CHECK_CONTAINS(error, "thread 0: waits: poll at");
  CHECK_CONTAINS(run(config(1, 32, 0, "spinner"), polling_kernel, &flag, true),
                 "threads poll memory that nobody writes");
}

void wrong_uses() {
  const auto error = [](Wrong wrong) { return run(config(3, 64, 0, "wrong"), wrong_kernel, wrong); };
  for (int seed = 0; seed < 3; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    CHECK_CONTAINS(error(Wrong::lines), "threads of the block diverge: others are at sync_threads");
    CHECK_CONTAINS(error(Wrong::barrier_count), "threads, but for");
    CHECK_CONTAINS(error(Wrong::part_of_warp), "only a part of warp");
    CHECK_CONTAINS(error(Wrong::twice), "a second time");
    CHECK_CONTAINS(error(Wrong::mask), "lanes of the warp disagree");
    CHECK_CONTAINS(error(Wrong::shuffle_lines), "lanes of the warp diverge: others are at shuffle");
    CHECK_CONTAINS(error(Wrong::exception), "thread 5");
    CHECK_CONTAINS(error(Wrong::exception), "on purpose");
    CHECK_CONTAINS(error(Wrong::wait_alone), "cluster_wait without cluster_arrive");
    CHECK_EQUAL(Counted::alive.load(), 0);
  }
}

// Leaving a synchronisation out by name: the result changes.
void skips() {
  const emulator::Options before = emulator::options();
  std::vector<int> out(64, -1);
  int line = 0;
  // The first barrier of rotate_kernel.
  for (line = 1; line < 2000; ++line) {
    emulator::options().skip = "tests/cpp/test_emulator.cpp:" + std::to_string(line);
    std::fill(out.begin(), out.end(), -1);
    if (!run(config(1, 64, 256), rotate_kernel, out.data(), 1).empty() || out[0] != 1) break;
  }
  emulator::options() = before;
  CHECK(line < 2000);
  CHECK_NO_ERROR(run(config(1, 64, 256), rotate_kernel, out.data(), 1));
  CHECK_EQUAL(out[0], 1);
}

// ---- wrong on purpose ----

void race_missing_barrier() {
  std::vector<int> out(64);
  run(config(1, 64, 256), missing_barrier_kernel, out.data());
}

void race_shuffle() {
  std::vector<int> out(32);
  run(config(1, 32, 128), shuffle_orders_nothing_kernel, out.data());
}

void race_blocks() {
  int data = 0;
  emulator::options().resident_blocks = 1;
  run(config(2, 1), between_blocks_kernel, &data);
}

void race_dependent_launch() {
  std::vector<int> data(32, 0), out(32);
  LaunchConfig c = config(1, 32);
  launch(c, chain_kernel, out.data(), data.data());
  c.dependent = true;
  launch(c, second_kernel<false>, data.data(), out.data());
  synchronize(nullptr);
}

void race_peer() {
  LaunchConfig c = config(2, 1, 4);
  c.cluster = 2;
  run(c, peer_kernel);
}

void race_asynchronous() {
  const int source = 1;
  int out = 0;
  run(config(1, 1, 4), hasty_kernel, &source, &out);
}

void overrun_shared() { run(config(1, 32, 128), overrun_kernel); }

void overrun_ended_peer() {
  int out = 0;
  LaunchConfig c = config(2, 1, 4);
  c.cluster = 2;
  run(c, ended_peer_kernel, &out);
}

void crash_after_failure() {
  CHECK_EQUAL(1, 2);
  run(config(1, 32), crash_kernel, static_cast<int*>(nullptr));
}

void hang_in_loop() {
  // Whoever is to end it may have ended before.
  alarm(60);
  const int flag = 0;
  run(config(1, 32), loop_kernel, static_cast<const volatile int*>(&flag));
}

}  // namespace

CHECK_CASES(emulator) {
  constexpr auto kByNameOnly = check::Kind::by_name_only;
  std::vector<check::Case> cases = {
      {"barriers", barriers},
      {"poison", poison},
      {"asynchronous", asynchronous},
      {"bad-configurations", bad_configurations},
      {"host-threads", host_threads},
      {"deadlocks", deadlocks},
      {"polls-for-ever", polls_for_ever},
      {"wrong-uses", wrong_uses},
      {"race-missing-barrier", race_missing_barrier, kByNameOnly},
      {"race-shuffle", race_shuffle, kByNameOnly},
      {"race-blocks", race_blocks, kByNameOnly},
      {"race-dependent-launch", race_dependent_launch, kByNameOnly},
      {"race-peer", race_peer, kByNameOnly},
      {"race-asynchronous", race_asynchronous, kByNameOnly},
      {"overrun-shared", overrun_shared, kByNameOnly},
      {"overrun-ended-peer", overrun_ended_peer, kByNameOnly},
      {"crash-after-failure", crash_after_failure, kByNameOnly},
      {"hang-in-loop", hang_in_loop, kByNameOnly},
  };
#if defined(__SANITIZE_THREAD__)
  // Races by design, with a result that the other builds check.
  constexpr auto kRacy = kByNameOnly;
#else
  constexpr auto kRacy = check::Kind::usual;
#endif
  cases.push_back({"dependent-without-wait", dependent_without_wait, kRacy});
  cases.push_back({"skips", skips, kRacy});
  return cases;
}

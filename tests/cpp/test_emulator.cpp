// The emulator itself: what meets, what is ordered, what is reported. Small kernels, each for one promise of
// docs/emulator.md. The cases by name only are wrong on purpose: a sanitizer must say so.
#include <atomic>
#include <cmath>
#include <thread>

#include "check.h"
#include "cuda/primitives/cluster.h"
#include "cuda/primitives/dependent_launch.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/launch.h"
#include "cuda/primitives/memory.h"
#include "cuda/primitives/shared.h"
#include "emulator_faults.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;
namespace emulator = rnnfast::emulator;

#if defined(__SANITIZE_THREAD__)
constexpr int kSeeds = 10;
#else
constexpr int kSeeds = 40;
#endif

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

// Launches and waits; the error of either.
template <class... P, class... Args> std::string run(const LaunchConfig& config, void (*kernel)(P...), Args... args) {
  const std::string error = launch(config, kernel, args...);
  return error.empty() ? synchronize(nullptr) : error;
}

// ---- who is who ----

RNNFAST_KERNEL void identity_kernel(int* out) {
  const Dim3 block = block_index(), grid = grid_size();
  const unsigned linear = (block.z * grid.y + block.y) * grid.x + block.x;
  out[linear * block_threads() + thread_index()] = static_cast<int>(linear * 1000 + warp() * 32 + lane());
}

void identity() {
  std::vector<int> out(2 * 3 * 4 * 70, -1);
  LaunchConfig c = config(2, 70);
  c.grid = {2, 3, 4};
  for (uint64_t seed : {0, 1, 2}) {
    const Seed scope(seed);
    CHECK_EQUAL(run(c, identity_kernel, out.data()), "");
    for (size_t i = 0; i < out.size(); ++i) CHECK_EQUAL(out[i], static_cast<int>(i / 70 * 1000 + i % 70));
  }
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
    CHECK_EQUAL(run(config(kBlocks, kThreads, kThreads * sizeof(int)), rotate_kernel, out.data(), kRounds), "");
    for (int i = 0; i < kThreads * kBlocks; ++i) CHECK_EQUAL(out[i], (i + kRounds) % kThreads);
  }
}

// Warp 0 produces, warp 1 consumes, over two named barriers: full (sync by the consumer) and empty.
RNNFAST_KERNEL void producer_consumer_kernel(int* out, int rounds) {
  int* shared = shared_as<int>();
  for (int i = 0; i < rounds; ++i) {
    if (warp() == 0) {
      if (i > 0) barrier_sync(2, 64);
      shared[lane()] = i * 100 + static_cast<int>(lane());
      barrier_arrive(1, 64);
    } else {
      barrier_sync(1, 64);
      out[i * 32 + static_cast<int>(lane())] = shared[31 - lane()];
      if (i + 1 < rounds) barrier_arrive(2, 64);
    }
  }
}

void named_barriers() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    std::vector<int> out(32 * 5, -1);
    CHECK_EQUAL(run(config(1, 64, 32 * sizeof(int)), producer_consumer_kernel, out.data(), 5), "");
    for (int i = 0; i < 5 * 32; ++i) CHECK_EQUAL(out[i], i / 32 * 100 + 31 - i % 32);
  }
}

// ---- warps ----

struct WarpResults {
  int from_three[64], butterfly[64], down[64];
  double wide[64];
  uint32_t ballot[64];
  bool any_odd[64], all_small[64], any_huge[64];
};

RNNFAST_KERNEL void warp_kernel(WarpResults* out) {
  const unsigned t = thread_index();
  const int value = static_cast<int>(t * 10);
  out->from_three[t] = shuffle(value, 3);
  out->butterfly[t] = shuffle_xor(value, 5);
  out->down[t] = shuffle_down(value, 4);
  out->wide[t] = shuffle(value * 0.5, 31);
  out->ballot[t] = rnnfast::gpu::ballot(lane() % 3 == 0);
  out->any_odd[t] = rnnfast::gpu::any(lane() == 17);
  out->all_small[t] = rnnfast::gpu::all(lane() < 31);
  out->any_huge[t] = rnnfast::gpu::any(lane() > 31);
}

void warps() {
  for (int seed = 0; seed < 5; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    WarpResults out{};
    CHECK_EQUAL(run(config(1, 64), warp_kernel, &out), "");
    uint32_t thirds = 0;
    for (unsigned i = 0; i < 32; i += 3) thirds |= 1u << i;
    for (int t = 0; t < 64; ++t) {
      const int first = t / 32 * 32, in_warp = t % 32;
      CHECK_EQUAL(out.from_three[t], (first + 3) * 10);
      CHECK_EQUAL(out.butterfly[t], (first + (in_warp ^ 5)) * 10);
      CHECK_EQUAL(out.down[t], (in_warp + 4 < 32 ? t + 4 : t) * 10);
      CHECK_EQUAL(out.wide[t], (first + 31) * 5.0);
      CHECK_EQUAL(out.ballot[t], thirds);
      CHECK(out.any_odd[t] && !out.all_small[t] && !out.any_huge[t]);
    }
  }
}

// Halves of a warp that meet apart.
RNNFAST_KERNEL void half_warp_kernel(int* out) {
  int* shared = shared_as<int>();
  shared[thread_index()] = static_cast<int>(thread_index());
  const uint32_t mask = lane() < 16 ? 0x0000ffffu : 0xffff0000u;
  sync_warp(mask);
  out[thread_index()] = shared[thread_index() ^ 15];
}

void half_warps() {
  for (int seed = 0; seed < 5; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    std::vector<int> out(32, -1);
    CHECK_EQUAL(run(config(1, 32, 128), half_warp_kernel, out.data()), "");
    for (int i = 0; i < 32; ++i) CHECK_EQUAL(out[i], i ^ 15);
  }
}

// ---- clusters and grids ----

RNNFAST_KERNEL void cluster_kernel(int* out) {
  int* shared = shared_as<int>();
  const unsigned rank = cluster_rank(), size = cluster_size();
  shared[thread_index()] = static_cast<int>(block_index().x * 1000 + thread_index());
  cluster_sync();
  out[block_index().x * block_threads() + thread_index()] = map_to_rank(shared, (rank + 1) % size)[thread_index()];
  // A block may not end while a peer reads its shared memory.
  cluster_arrive();
  cluster_wait();
}

void clusters() {
  constexpr unsigned kBlocks = 8, kThreads = 32;
  for (const unsigned size : {1u, 2u, 4u, 8u}) {
    for (int seed = 0; seed < 5; ++seed) {
      const Seed scope(static_cast<uint64_t>(seed));
      std::vector<int> out(kBlocks * kThreads, -1);
      LaunchConfig c = config(kBlocks, kThreads, kThreads * sizeof(int));
      c.cluster = size;
      CHECK_EQUAL(run(c, cluster_kernel, out.data()), "");
      for (unsigned i = 0; i < kBlocks * kThreads; ++i) {
        const unsigned block = i / kThreads, next = block / size * size + (block % size + 1) % size;
        CHECK_EQUAL(out[i], static_cast<int>(next * 1000 + i % kThreads));
      }
    }
  }
}

RNNFAST_KERNEL void grid_kernel(int* ring, int rounds) {
  const unsigned blocks = grid_size().x, block = block_index().x;
  for (int i = 0; i < rounds; ++i) {
    int* now = ring + (i % 2) * blocks;
    if (thread_index() == 0) now[block] = i * 100 + static_cast<int>(block);
    grid_sync();
    if (thread_index() == 1) ring[2 * blocks + block] = now[(block + 1) % blocks];
  }
}

void grids() {
  constexpr unsigned kBlocks = 9;
  for (int seed = 0; seed < 5; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    std::vector<int> ring(3 * kBlocks, -1);
    LaunchConfig c = config(kBlocks, 32);
    c.cooperative = true;
    CHECK_EQUAL(run(c, grid_kernel, ring.data(), 5), "");
    for (unsigned i = 0; i < kBlocks; ++i)
      CHECK_EQUAL(ring[2 * kBlocks + i], static_cast<int>(400 + (i + 1) % kBlocks));
  }
  std::vector<int> ring(6);
  CHECK_CONTAINS(run(config(2, 32), grid_kernel, ring.data(), 1), "grid_sync needs a cooperative launch");
}

// ---- memory ----

RNNFAST_KERNEL void poison_kernel(float* out) { out[thread_index()] = shared_as<float>()[thread_index()]; }

void poison() {
  std::vector<float> out(32, 0);
  CHECK_EQUAL(run(config(1, 32, 128), poison_kernel, out.data()), "");
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
    CHECK_EQUAL(run(config(1, 1, 4), asynchronous_kernel, &source, out), "");
    CHECK_EQUAL(out[0], 0);
    CHECK_EQUAL(out[1], 7);
  }
}

// ---- launches ----

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

template <bool waits> int stale_after_dependent_launch(bool dependent) {
  int stale = 0;
  for (int seed = 0; seed < kSeeds; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    std::vector<int> data(4 * 32, 0), out(4 * 32, -1);
    LaunchConfig c = config(4, 32, 0, "first");
    CHECK_EQUAL(launch(c, first_kernel, data.data()), "");
    c.dependent = dependent;
    c.name = "second";
    CHECK_EQUAL(launch(c, second_kernel<waits>, data.data(), out.data()), "");
    CHECK_EQUAL(synchronize(nullptr), "");
    for (int value : out) {
      CHECK(value == 0 || value == 1);
      stale += value == 0;
    }
  }
  return stale;
}

void dependent_launches() {
  CHECK_EQUAL(stale_after_dependent_launch<true>(true), 0);
  CHECK_EQUAL(stale_after_dependent_launch<false>(false), 0);
}

// Not under TSan, which reports it.
void dependent_without_wait() { CHECK(stale_after_dependent_launch<false>(true) > 0); }

RNNFAST_KERNEL void chain_kernel(const int* in, int* out) {
  wait_for_previous_grid();
  allow_next_grid();
  out[thread_index()] = in[thread_index()] + 1;
}

void long_chains() {
  constexpr int kSteps = 300;
  for (int seed = 0; seed < 3; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    std::vector<int> rows((kSteps + 1) * 32, 0);
    LaunchConfig c = config(1, 32);
    c.dependent = true;
    for (int step = 0; step < kSteps; ++step)
      CHECK_EQUAL(launch(c, chain_kernel, &rows[step * 32], &rows[(step + 1) * 32]), "");
    CHECK_EQUAL(synchronize(nullptr), "");
    for (int i = 0; i < 32; ++i) CHECK_EQUAL(rows[kSteps * 32 + i], kSteps);
  }
}

RNNFAST_KERNEL void empty_kernel() {}

void bad_configurations() {
  CHECK_CONTAINS(run(config(1, 1025), empty_kernel), "1 to 1024 threads a block, not 1025");
  CHECK_CONTAINS(run(config(0, 32), empty_kernel), "an empty grid");
  CHECK_CONTAINS(run(config(1, 32, 300 << 10), empty_kernel), "bytes of shared memory");
  LaunchConfig c = config(6, 32, 0, "clustered");
  c.cluster = 4;
  CHECK_CONTAINS(run(c, empty_kernel), "kernel clustered: clusters of 4 do not divide the grid (6,1,1)");
  CHECK_EQUAL(run(config(1, 32), empty_kernel), "");
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
    CHECK_EQUAL(run(config(1, 64, 256), rotate_kernel, out.data(), 1), "");
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
  CHECK_EQUAL(run(config(1, 64, 256), rotate_kernel, out.data(), 1), "");
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

}  // namespace

int main(int argc, char** argv) {
  std::vector<check::Case> cases = {
      {"identity", identity},
      {"barriers", barriers},
      {"named-barriers", named_barriers},
      {"warps", warps},
      {"half-warps", half_warps},
      {"clusters", clusters},
      {"grids", grids},
      {"poison", poison},
      {"asynchronous", asynchronous},
      {"dependent-launches", dependent_launches},
      {"long-chains", long_chains},
      {"bad-configurations", bad_configurations},
      {"host-threads", host_threads},
      {"deadlocks", deadlocks},
      {"polls-for-ever", polls_for_ever},
      {"wrong-uses", wrong_uses},
      {"race-missing-barrier", race_missing_barrier, true},
      {"race-shuffle", race_shuffle, true},
      {"race-blocks", race_blocks, true},
      {"race-dependent-launch", race_dependent_launch, true},
      {"race-peer", race_peer, true},
      {"race-asynchronous", race_asynchronous, true},
      {"overrun-shared", overrun_shared, true},
      {"overrun-ended-peer", overrun_ended_peer, true},
  };
#if defined(__SANITIZE_THREAD__)
  // Races by design, with a result that the other builds check.
  constexpr bool kByName = true;
#else
  constexpr bool kByName = false;
#endif
  cases.push_back({"dependent-without-wait", dependent_without_wait, kByName});
  cases.push_back({"skips", skips, kByName});
  return check::main(argc, argv, cases);
}

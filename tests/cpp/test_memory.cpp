// Strong loads and stores of the emulator: every order that the PTX memory model allows shows on some seed, and none
// that it forbids on any. The case by name only is a race that TSan must report.
#include "check.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/memory.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using rnnfast::test::blocks;
using rnnfast::test::run;
namespace emulator = rnnfast::emulator;

#if defined(__SANITIZE_THREAD__)
constexpr int kSeeds = 10, kManySeeds = 100;
#else
constexpr int kSeeds = 40, kManySeeds = 200;
#endif

// Runs once with the seed, and leaves the options as they were.
class Seed {
 public:
  explicit Seed(uint64_t seed) { emulator::options().seed = seed; }
  ~Seed() { emulator::options() = before_; }

 private:
  emulator::Options before_ = emulator::options();
};

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

template <Order order> int failures_of_message() {
  int failures = 0;
  for (int seed = 0; seed < kManySeeds; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    int data = 0, flag = 0, out = -1;
    LaunchConfig c = blocks(2, 32);
    c.cooperative = true;
    CHECK_EQUAL(run(c, message_kernel<order>, &data, &flag, &out), "");
    CHECK(out == 42 || out == 0);
    failures += out != 42;
    if (seed == 0) CHECK_EQUAL(out, 42);
  }
  return failures;
}

void message_passing() {
  CHECK(failures_of_message<Order::relaxed>() > 0);
  CHECK(failures_of_message<Order::release_only>() > 0);
  CHECK(failures_of_message<Order::acquire_only>() > 0);
  CHECK_EQUAL(failures_of_message<Order::release_acquire>(), 0);
  CHECK_EQUAL(failures_of_message<Order::fences>(), 0);
}

// Order is handed on: block 1 has acquired what block 0 released, and block 2 what block 1 released after a barrier
// that another of its threads has met.
RNNFAST_KERNEL void chain_kernel(int* data, int* flags, int* out) {
  const auto set = [](int value) { return value == 1; };
  const bool first = thread_index() == 0, last = thread_index() == 31;
  if (block_index().x == 0) {
    if (first) store_relaxed(data, 7);
    sync_warp();
    if (last) store_release(flags, 1);
  } else if (block_index().x == 1) {
    if (first) static_cast<void>(poll_acquire(flags, set));
    sync_threads();
    if (last) store_release(flags + 4, 1);
  } else if (first) {
    static_cast<void>(load_relaxed(data));
    static_cast<void>(poll_acquire(flags + 4, set));
    *out = load_relaxed(data);
  }
}

void chains() {
  for (int seed = 0; seed < kManySeeds; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    int data = 0, flags[8] = {}, out = -1;
    LaunchConfig c = blocks(3, 32);
    c.cooperative = true;
    CHECK_EQUAL(run(c, chain_kernel, &data, flags, &out), "");
    CHECK_EQUAL(out, 7);
  }
}

// A word that carries its own flag needs no order: 16 bytes are one access.
RNNFAST_KERNEL void tagged_word_kernel(Word16* word, int* torn, int steps) {
  if (thread_index() != 0) return;
  for (int step = 1; step <= steps; ++step) {
    const auto tag = static_cast<uint32_t>(step);
    if (block_index().x == 0) {
      store_relaxed(word, Word16{{tag * 3, tag * 5, tag * 7, tag}});
      // The consumer's answer, so that no step is overwritten before it is read.
      static_cast<void>(poll(word + 1, [&](const Word16& w) { return w.x[3] == tag; }));
    } else {
      const Word16 got = poll(word, [&](const Word16& w) { return w.x[3] == tag; });
      if (got.x[0] != tag * 3 || got.x[1] != tag * 5 || got.x[2] != tag * 7) ++*torn;
      store_relaxed(word + 1, Word16{{0, 0, 0, tag}});
    }
  }
}

void tagged_words() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    Word16 words[2]{};
    int torn = 0;
    LaunchConfig c = blocks(2, 32);
    c.cooperative = true;
    CHECK_EQUAL(run(c, tagged_word_kernel, words, &torn, 10), "");
    CHECK_EQUAL(torn, 0);
    CHECK_EQUAL(words[0].x[3], 10u);
  }
}

// Coherence: a thread sees its own stores, and never a location going back.
RNNFAST_KERNEL void coherence_kernel(int* location, int* errors) {
  if (thread_index() != 0) return;
  if (block_index().x == 0) {
    for (int i = 1; i <= 50; ++i) {
      store_relaxed(location, i);
      if (load_relaxed(location) != i) ++*errors;
    }
  } else {
    int last = 0;
    while (last < 50) {
      const int now = load_relaxed(location);
      if (now < last) ++*errors;
      last = now;
    }
  }
}

void coherence() {
  for (int seed = 0; seed < kSeeds; ++seed) {
    const Seed scope(static_cast<uint64_t>(seed));
    int location = 0, errors[1] = {0};
    LaunchConfig c = blocks(2, 32);
    c.cooperative = true;
    CHECK_EQUAL(run(c, coherence_kernel, &location, errors), "");
    CHECK_EQUAL(errors[0], 0);
    CHECK_EQUAL(location, 50);
  }
}

RNNFAST_KERNEL void misaligned_kernel(char* bytes) { store_global(bytes + 4, load_global(bytes + 4)); }

void misaligned() {
  alignas(16) char bytes[64] = {};
  CHECK_CONTAINS(run(blocks(1, 1), misaligned_kernel, bytes), "misaligned 16-byte access");
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
  int data = 0, flag = 0;
  LaunchConfig c = blocks(2, 1);
  c.cooperative = true;
  CHECK_EQUAL(run(c, flag_kernel<releases>, &data, &flag), "");
  CHECK_EQUAL(data, 2);
}

}  // namespace

int main(int argc, char** argv) {
  return check::main(argc, argv,
                     {{"message-passing", message_passing},
                      {"chains", chains},
                      {"tagged-words", tagged_words},
                      {"coherence", coherence},
                      {"misaligned", misaligned},
                      {"flag-with-release", flag_case<true>},
                      {"race-relaxed-flag", flag_case<false>, true}});
}

// Strong loads and stores: nothing that the PTX memory model forbids shows, under any seed. (What it allows must show
// in the emulator: test_misuse.cpp.)
#include "check.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/memory.h"
#include "message_kernels.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;

void message_passing() {
  CHECK_EQUAL(lost_messages<Order::release_acquire>(kManySeeds), 0);
  CHECK_EQUAL(lost_messages<Order::fences>(kManySeeds), 0);
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
  for_each_seed(kManySeeds, [] {
    Array<int> data{0}, flags(8), out{-1};
    CHECK_NO_ERROR(run(cooperative(3, 32), chain_kernel, data.device(), flags.device(), out.device()));
    CHECK_EQUAL(out[0], 7);
  });
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
  for_each_seed(kUsualSeeds, [] {
    Array<Word16> words(2);
    Array<int> torn{0};
    CHECK_NO_ERROR(run(cooperative(2, 32), tagged_word_kernel, words.device(), torn.device(), 10));
    CHECK_EQUAL(torn[0], 0);
    CHECK_EQUAL(words[0].x[3], 10u);
  });
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
  for_each_seed(kUsualSeeds, [] {
    Array<int> location{0}, errors{0};
    CHECK_NO_ERROR(run(cooperative(2, 32), coherence_kernel, location.device(), errors.device()));
    CHECK_EQUAL(errors[0], 0);
    CHECK_EQUAL(location[0], 50);
  });
}

}  // namespace

CHECK_CASES(memory) {
  constexpr auto kPolls = check::Kind::polls;
  return {{"message-passing", message_passing, kPolls},
          {"chains", chains, kPolls},
          {"tagged-words", tagged_words, kPolls},
          {"coherence", coherence, kPolls},
          {"flag-with-release", flag_case<true>, kPolls}};
}

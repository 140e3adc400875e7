// How far apart the cores are on which the threads run: the time that a cache line takes from one to the next.
#pragma once

#include <atomic>

#include "pool.h"
#include "waiting.h"

namespace rnnfast::cpu {
namespace {

// More rounds add nothing to a mean, and nobody could end them: microseconds each, more where other programs run.
constexpr int64_t kMostRounds = 10'000;

// Who goes round: threads of the pool as they come, until all are there or the patience is over. A region may get fewer
// than it asked for.
class Circle {
 public:
  explicit Circle(int64_t slots) : slots_(slots) {}

  // Takes a place for `slots` of the region's slots and waits until it begins. The place, or -1 if it has begun before.
  int join(int64_t slots) {
    uint64_t state = state_.load(std::memory_order_relaxed), joined;
    do {
      if (state & kBegun) return -1;
      joined = state + (static_cast<uint64_t>(slots) << 32) + 1;
      if (static_cast<int64_t>(joined >> 32) == slots_) joined |= kBegun;
    } while (!state_.compare_exchange_weak(state, joined, std::memory_order_acq_rel));
    const int64_t deadline = now_ns() + kPatienceNs;
    for (Spinner spin; !(state_.load(std::memory_order_acquire) & kBegun);) {
      spin();
      if (now_ns() > deadline) state_.fetch_or(kBegun, std::memory_order_acq_rel);
    }
    return static_cast<int>(state & kMembers);
  }
  int64_t members() const { return static_cast<int64_t>(state_.load(std::memory_order_relaxed) & kMembers); }

 private:
  static constexpr uint64_t kBegun = 1u << 31, kMembers = kBegun - 1;
  static constexpr int64_t kPatienceNs = 50'000'000;

  const int64_t slots_;
  std::atomic<uint64_t> state_{0};  // slots joined << 32 | begun << 31 | members
};

// Seconds in which a word that one thread wrote is read by the next, mean over `rounds` rounds through all threads of
// the pool. 0 where there is one thread. On a virtual machine it changes while a program runs, as its processors move
// to other cores; what synchronises every step becomes faster or slower with it.
inline double core_to_core_seconds(int threads, int64_t rounds) {
  if (threads < 2) return 0;
  struct Relay {
    Circle circle;
    const int64_t rounds;
    alignas(128) std::atomic<int64_t> word{0};
    alignas(128) double seconds = 0;
  } relay{Circle(threads), rounds};
  const auto run = [](int64_t begin, int64_t end, void* raw) {
    Relay& relay = *static_cast<Relay*>(raw);
    const int place = relay.circle.join(end - begin);
    const int64_t members = relay.circle.members(), last = relay.rounds * members;
    if (place < 0 || members < 2) return;
    const auto await = [&](int64_t turn) {
      for (Spinner spin; relay.word.load(std::memory_order_acquire) != turn;) spin();
    };
    const int64_t start = now_ns();
    for (int64_t turn = place; turn < last; turn += members) {
      await(turn);
      relay.word.store(turn + 1, std::memory_order_release);
    }
    if (place != 0) return;
    await(last);
    relay.seconds = 1e-9 * static_cast<double>(now_ns() - start) / static_cast<double>(last);
  };
  parallel_region(threads, run, &relay);
  return relay.seconds;
}

}  // namespace
}  // namespace rnnfast::cpu

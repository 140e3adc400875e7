// How threads wait for each other, and the clock.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <cstdint>

namespace rnnfast::cpu {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

inline int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
}

// Spins for as long as threads that are all running usually wait for each other, then sleeps for moments: the one
// waited for may need this core. (Not sched_yield: who yields to a busy process loses its turn, milliseconds, and here
// it is the one that the others wait for next. A helper between two pieces may: give_way_in_time.)
class Spinner {
 public:
  // patience() is the time to spin in nanoseconds, asked for when a part of kLeastNs is over.
  template <class Patience> void operator()(const Patience& patience) {
    relax();
    if (++turns_ % kTurns) return;
    const int64_t now = now_ns();
    if (!start_) start_ = now;
    waited_ = now - start_;
    if (waited_ < kLeastNs) return;
    if (!patience_) patience_ = std::max(patience(), kLeastNs);
    if (waited_ < patience_) return;
    timespec moment{0, 20'000};
    nanosleep(&moment, nullptr);
  }
  void operator()() {
    (*this)([] { return kLeastNs; });
  }

  int64_t turns() const { return turns_; }
  // Nanoseconds, if it had to sleep.
  int64_t long_wait() const { return patience_ && waited_ > patience_ ? waited_ : 0; }

 private:
  static constexpr int kTurns = 32;
  static constexpr int64_t kLeastNs = 50'000;
  int64_t turns_ = 0, start_ = 0, waited_ = 0, patience_ = 0;
};

// Schedulers take a core away after a millisecond or more, wherever the thread is. Who gives it up by itself before
// that chooses where; if nobody else wants the core, it comes back at once. For threads that call this now and then,
// where they hold nothing that others wait for; the time then.
inline int64_t give_way_in_time(int64_t now) {
  constexpr int64_t kTurnNs = 1'000'000;
  thread_local int64_t turn_begin = 0;
  if (now - turn_begin < kTurnNs) return now;
  sched_yield();
  return turn_begin = now_ns();
}

}  // namespace rnnfast::cpu

// The threads that work on one call: who takes part, and how they wait for each other.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cstdint>

#include "kernels.h"

namespace rnnfast::cpu {
namespace {

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins for some microseconds, then offers the core to others: with more threads than cores the one waited for may need
// it.
class Spinner {
 public:
  // False when it is time to sleep instead.
  bool operator()() {
    if (++turns_ < kSpins)
      relax();
    else
      sched_yield();
    return turns_ < kSpins + kYields;
  }

 private:
  static constexpr int kSpins = 1000, kYields = 20;
  int turns_ = 0;
};

// Counts the members in; the last to arrive opens it for all. Everything written before wait() is visible after it.
class alignas(64) Barrier {
 public:
  void wait(int members) {
    if (members == 1) return;
    const int32_t generation = __atomic_load_n(&generation_, __ATOMIC_RELAXED);
    // Acquire and release: the last to arrive sees what the others wrote, and its release of the generation passes it
    // on.
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == members) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      // Sequentially consistent with the sleeper's own pair below: either it sees the new generation, or it is seen
      // sleeping.
      __atomic_store_n(&generation_, generation + 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST) > 0) futex(FUTEX_WAKE_PRIVATE, INT32_MAX);
      return;
    }
    Spinner spin;
    while (__atomic_load_n(&generation_, __ATOMIC_ACQUIRE) == generation) {
      if (spin()) continue;
      __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
      if (__atomic_load_n(&generation_, __ATOMIC_SEQ_CST) == generation) futex(FUTEX_WAIT_PRIVATE, generation);
      __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_RELAXED);
    }
  }

 private:
  void futex(int operation, int32_t value) { syscall(SYS_futex, &generation_, operation, value, nullptr, nullptr, 0); }

  int32_t arrived_ = 0;
  alignas(64) int32_t generation_ = 0;
  int32_t sleepers_ = 0;
};

// A parallel region may get fewer threads than it asked for (nested regions, a busy pool), and a barrier that counts
// threads which never come would hang. So threads join as they come; the team is closed when all slots are accounted
// for, or after a time-out with those who are there. Who comes later finds it closed and has nothing to do.
class Team {
 public:
  explicit Team(int64_t slots) : slots_(slots) {}

  // Joins for `slots` of the region's slots. Returns the member's number, or -1 if the team has started without it.
  int join(int64_t slots) {
    uint64_t state = __atomic_load_n(&state_, __ATOMIC_RELAXED);
    uint64_t joined;
    do {
      if (state & kClosed) return -1;
      joined = state + (static_cast<uint64_t>(slots) << 32) + 1;
      if (static_cast<int64_t>(joined >> 32) == slots_) joined |= kClosed;
    } while (!__atomic_compare_exchange_n(&state_, &state, joined, false, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED));
    const int member = static_cast<int>(state & kMembers);
    if (joined & kClosed) return member;
    const int64_t deadline = now_ns() + kPatienceNs;
    Spinner spin;
    for (int turn = 1; !((state = __atomic_load_n(&state_, __ATOMIC_ACQUIRE)) & kClosed); ++turn) {
      spin();
      if (turn % 256 == 0 && now_ns() > deadline) __atomic_fetch_or(&state_, kClosed, __ATOMIC_ACQ_REL);
    }
    return member;
  }

  // Valid after join.
  int members() const { return static_cast<int>(__atomic_load_n(&state_, __ATOMIC_RELAXED) & kMembers); }
  void wait() { barrier_.wait(members()); }

 private:
  static constexpr uint64_t kClosed = 1u << 31;
  static constexpr uint64_t kMembers = kClosed - 1;
  static constexpr int64_t kPatienceNs = 50'000'000;

  static int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000LL + now.tv_nsec;
  }

  int64_t slots_;
  uint64_t state_ = 0;  // slots joined << 32 | closed << 31 | members
  Barrier barrier_;
};

// MXCSR has, beside the mode, which exceptions there were.
[[maybe_unused]] constexpr uint32_t kExceptionsSeen = 0x3f;

// How a thread's arithmetic rounds, and whether it takes denormals for zeros (torch.set_flush_denormal).
inline uint64_t float_control() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr() & ~kExceptionsSeen;
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
#else
  return 0;
#endif
}

inline void set_float_control([[maybe_unused]] uint64_t control) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<uint32_t>(control) | (__builtin_ia32_stmxcsr() & kExceptionsSeen));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

// While it lives the thread computes under `control`. Threads of a pool have a mode of their own: without this, results
// would depend on which of them takes which part.
class FloatControlOf {
 public:
  explicit FloatControlOf(uint64_t control) : own_(float_control()), differs_(own_ != control) {
    if (differs_) set_float_control(control);
  }
  ~FloatControlOf() {
    if (differs_) set_float_control(own_);
  }
  FloatControlOf(const FloatControlOf&) = delete;
  FloatControlOf& operator=(const FloatControlOf&) = delete;

 private:
  const uint64_t own_;
  const bool differs_;
};

// Runs body(team, member) on up to `threads` threads, all under the caller's float control.
template <class Body> inline void run_team(int threads, const Body& body) {
  Team team(threads);
  struct Context {
    Team& team;
    const Body& body;
    const uint64_t control = float_control();
  } context{team, body};
  parallel_region(
      threads,
      [](int64_t begin, int64_t end, void* raw) {
        auto& self = *static_cast<Context*>(raw);
        const FloatControlOf callers(self.control);
        const int member = self.team.join(end - begin);
        if (member >= 0) self.body(self.team, member);
      },
      &context);
}

}  // namespace
}  // namespace rnnfast::cpu

#include "pool.h"

#include <pthread.h>

#include "waiting.h"

namespace rnnfast::cpu {

namespace {

std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork_installed = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

}  // namespace

bool is_forked() { return forked.load(std::memory_order_relaxed); }

int64_t PoolThreads::run(Job& job, int members, int64_t& own_end) {
  struct Region {
    Job& job;
    int64_t waited = 0, own_end = 0;
    std::atomic<clockid_t> clock{0};
    std::atomic<bool> has_clock{false};
  } region{job};
  // A thread that is given more than one of the slots is one member: nobody has to be there.
  parallel_region(
      members,
      [](int64_t begin, int64_t, void* raw) {
        Region& self = *static_cast<Region*>(raw);
        const int member = static_cast<int>(begin);
        const int64_t waited = self.job.take_part(member);
        if (member == 0) {
          self.waited = waited;
          self.own_end = now_ns();
        } else if (clockid_t clock = 0; pthread_getcpuclockid(pthread_self(), &clock) == 0) {
          // Of whichever thread leaves last.
          self.clock.store(clock, std::memory_order_relaxed);
          self.has_clock.store(true, std::memory_order_relaxed);
        }
      },
      &region);
  known_ = region.has_clock.load(std::memory_order_relaxed);
  clock_ = region.clock.load(std::memory_order_relaxed);
  own_end = region.own_end;
  return region.waited;
}

}  // namespace rnnfast::cpu

// The threads of torch's pool, of which a calling thread has its own.
#pragma once

#include <time.h>

#include <atomic>

#include "job.h"

namespace rnnfast::cpu {

// Splits [0, slots) over the threads of torch's pool and calls body(begin, end, context) on each; returns when all have
// returned, so that a thread that is kept from running is waited for. Defined beside the ops: nothing else here
// includes a header of torch.
void parallel_region(int64_t slots, void (*body)(int64_t begin, int64_t end, void* context), void* context);

// Whether the process was forked. Neither torch's pool nor the helpers survive that: their threads are not there in the
// child, and a region of the pool would wait for them for ever. A forked process works on one thread.
bool is_forked();

// What is known of them since they were last used.
class PoolThreads {
 public:
  bool known() const { return known_; }

  // Whether a thread of it runs now. The system says for how long a thread has run: one that runs has run longer at the
  // second look. What it does is taken for waiting for work: the caller, whose pool it is, is here. (So it is with
  // libgomp, which torch is built with. With a pool that callers share it may be working, and the caller does more by
  // itself.) A pool whose thread has ended is forgotten.
  bool running() {
    const int64_t before = processor_ns(), after = processor_ns();
    if (before < 0) known_ = false;
    return after > before;
  }

  // The job on `members` threads, if the pool gives as many. The nanoseconds that the caller waited; own_end: when it
  // had no more work.
  int64_t run(Job& job, int members, int64_t& own_end);

 private:
  int64_t processor_ns() const {
    timespec time;
    if (clock_gettime(clock_, &time) != 0) return -1;
    return time.tv_sec * 1'000'000'000LL + time.tv_nsec;
  }

  bool known_ = false;   // a thread of it has been seen
  clockid_t clock_ = 0;  // how long a thread of the pool has run
};

}  // namespace rnnfast::cpu

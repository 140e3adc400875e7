// A call's work as its members share it: which pieces are begun and which are done.
#pragma once

#include <atomic>

#include "team.h"

namespace rnnfast::cpu {

// Rounds of one share that were begun and that are done, on cache lines of their own: `begun` is tried by all who look
// for work, `done` is polled by all who wait. (Two lines apart: processors fetch them in pairs.)
struct alignas(128) Progress {
  std::atomic<int64_t> begun{0};
  alignas(128) std::atomic<int64_t> done{0};
};

// Owned by the caller and by each helper that was called: one that comes when all is done finds the counts, although
// the call and its data are gone. So it looks at the data of the call only after it has begun a piece: the caller does
// not return before that piece is done.
class Job {
 public:
  // Null where there is no memory.
  static Job* create(const Work& work, int members);
  void release();
  void share_with_another() { owners_.fetch_add(1, std::memory_order_relaxed); }

  // Takes part until all is done. The nanoseconds that this thread waited for others, beyond what is usual. One that
  // gives way lets others have its core between two pieces now and then, so that they do not take it from within one,
  // for which the rest of the team would wait.
  int64_t take_part(int member, bool gives_way = false);

 private:
  class Member;

  Job(const Work& work, int members);
  Progress* progress(int stage, int64_t group) {
    return progress_ + first_[stage] + group * work_.stages[stage].shares;
  }

  const Work work_;
  const int members_;
  const uint64_t float_control_;  // the caller's: results must not depend on who does what
  std::atomic<int> owners_{1};
  int64_t first_[kMostStages];
  Progress* progress_ = nullptr;
};

}  // namespace rnnfast::cpu

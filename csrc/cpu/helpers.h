// Threads of the library's own. They sleep, are called to a job and are not waited for: one that comes late, because
// its core is taken, finds nothing left to do. After a job they stay awake for a moment, so that a call that follows at
// once costs no wake-up.
#pragma once

#include "job.h"

namespace rnnfast::cpu {

// Until when helpers stay awake after a job.
constexpr int64_t kAwakeNs = 300'000;

class alignas(128) Helper {
 public:
  // One that nobody else has called; null if there is none. One that is asleep, or a new one if there are not yet so
  // many, only where that is wanted.
  static Helper* reserve(bool asleep_too, int most_helpers);
  // A reserved one that is not needed.
  void cancel();
  // To a reserved one. It owns a part of the job from now on.
  void call(Job* job, int member, bool gives_way);

 private:
  enum State : int32_t { idle, asleep, reserved, reserved_asleep, called };

  static Helper* create(int most_helpers);
  static void* main(void* self);
  void wait_for_call(bool gives_way);
  void futex(int operation, int32_t value);

  std::atomic<int32_t> state_{reserved};
  unsigned long thread_ = 0;
  Job* job_ = nullptr;
  int member_ = 0;
  bool gives_way_ = true;
};

}  // namespace rnnfast::cpu

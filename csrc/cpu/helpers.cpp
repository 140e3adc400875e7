#include "helpers.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <mutex>
#include <new>

#include "waiting.h"

namespace rnnfast::cpu {
namespace {

// Never freed: helpers live as long as the process, and may sleep while it ends.
std::atomic<Helper*> all[kMostMembers];
std::atomic<int> count{0};

// The cores that this thread may use, without the one that it is on: a kernel that wakes a thread beside the one that
// woke it lets the two take turns, for milliseconds, while other cores are idle. (Set at each waking: the caller may
// be another one, or have moved.)
bool other_cores(cpu_set_t& cores) {
  if (sched_getaffinity(0, sizeof cores, &cores) != 0) return false;
  const int here = sched_getcpu();
  if (here >= 0 && here < CPU_SETSIZE) CPU_CLR(here, &cores);
  return CPU_COUNT(&cores) > 0;
}

}  // namespace

void Helper::futex(int operation, int32_t value) {
  syscall(SYS_futex, reinterpret_cast<int32_t*>(&state_), operation, value, nullptr, nullptr, 0);
}

Helper* Helper::reserve(bool asleep_too, int most_helpers) {
  const int there = count.load(std::memory_order_acquire);
  for (int i = 0; i < there; ++i) {
    Helper* const helper = all[i].load(std::memory_order_relaxed);
    int32_t state = idle;
    if (helper->state_.load(std::memory_order_relaxed) == idle &&
        helper->state_.compare_exchange_strong(state, reserved, std::memory_order_acquire))
      return helper;
  }
  if (!asleep_too) return nullptr;
  for (int i = 0; i < there; ++i) {
    Helper* const helper = all[i].load(std::memory_order_relaxed);
    int32_t state = asleep;
    if (helper->state_.compare_exchange_strong(state, reserved_asleep, std::memory_order_acquire)) return helper;
  }
  return create(most_helpers);
}

Helper* Helper::create(int most_helpers) {
  static std::mutex growing;
  const std::lock_guard<std::mutex> lock(growing);
  const int there = count.load(std::memory_order_relaxed);
  if (there >= most_helpers || there == kMostMembers) return nullptr;
  Helper* const helper = new (std::nothrow) Helper;
  if (!helper) return nullptr;
  // Signals are for the threads of the program. (Not a fault of this one: whoever reports faults is to see it.)
  sigset_t others, before;
  sigfillset(&others);
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGSYS}) sigdelset(&others, fault);
  pthread_sigmask(SIG_SETMASK, &others, &before);
  pthread_t thread;
  const int failed = pthread_create(&thread, nullptr, &Helper::main, helper);
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (failed) {
    delete helper;
    return nullptr;
  }
  pthread_detach(thread);
  pthread_setname_np(thread, "rnnfast");
  helper->thread_ = thread;
  all[there].store(helper, std::memory_order_relaxed);
  count.store(there + 1, std::memory_order_release);
  return helper;
}

void Helper::cancel() {
  const bool was_asleep = state_.load(std::memory_order_relaxed) == reserved_asleep;
  state_.store(was_asleep ? asleep : idle, std::memory_order_release);
}

void Helper::call(Job* job, int member, bool gives_way) {
  job_ = job;
  member_ = member;
  gives_way_ = gives_way;
  // The order that a release gives is enough for the helper; the exchange tells whether it has to be woken.
  if (state_.exchange(called, std::memory_order_acq_rel) != reserved_asleep) return;
  cpu_set_t cores;
  if (other_cores(cores)) pthread_setaffinity_np(thread_, sizeof cores, &cores);
  futex(FUTEX_WAKE_PRIVATE, 1);
}

void Helper::wait_for_call(bool gives_way) {
  const int64_t start = now_ns();
  for (int turn = 1;; ++turn) {
    int32_t state = state_.load(std::memory_order_acquire);
    if (state == called) return;
    if (state == asleep || state == reserved_asleep) {
      futex(FUTEX_WAIT_PRIVATE, state);
    } else if (turn % 64 == 0 && state == idle) {
      const int64_t now = gives_way ? give_way_in_time(now_ns()) : now_ns();
      if (now - start > kAwakeNs) state_.compare_exchange_strong(state, asleep, std::memory_order_relaxed);
    } else {
      relax();
    }
  }
}

void* Helper::main(void* self) {
  Helper& helper = *static_cast<Helper*>(self);
  for (bool gives_way = true;;) {
    helper.wait_for_call(gives_way);
    Job* const job = helper.job_;
    gives_way = helper.gives_way_;
    job->take_part(helper.member_, gives_way);
    job->release();
    helper.state_.store(idle, std::memory_order_release);
  }
  return nullptr;
}

}  // namespace rnnfast::cpu

// Which threads a call can count on. Both sources may be asleep, or kept from running by others' work; the calling
// thread is neither, since it calls. So a team is chosen anew for each call, from what can be seen cheaply:
//   the pool, if its threads are running (they spin for milliseconds after each region of torch's): whoever else is
//       given the work would share cores with them;
//   helpers that are still awake from the last call;
//   helpers that have to be woken, where the call is long enough to gain by it.
// A helper that gets no core is not waited for, so nothing has to be known of how busy the cores are. The pool is: its
// regions end when all of its threads have been there. After a call that waited for it, it is left out for a while.
#include "team.h"

#include <sched.h>
#include <sys/resource.h>

#include <atomic>
#include <iterator>

#include "helpers.h"
#include "pool.h"
#include "waiting.h"

namespace rnnfast::cpu {
namespace {

enum class Choice { automatic, alone, pool, helpers };
constexpr std::string_view kChoices[] = {"auto", "alone", "pool", "helpers"};

// Whether there is a choice of that name, which `choice` then is.
bool find_choice(std::string_view name, Choice& choice) {
  for (size_t i = 0; i < std::size(kChoices); ++i)
    if (name == kChoices[i]) {
      choice = static_cast<Choice>(i);
      return true;
    }
  return false;
}

std::atomic<Choice> in_force{Choice::automatic};

// What a caller loses by waking a thread, and when that is there. Seconds, of virtual machines, where they are longest.
constexpr double kWakeSeconds = 60e-6;
constexpr double kUntilAwake = 100e-6;
// With which call a thread makes the acquaintance of its pool, and again if it was not there: a thread that lives for
// one request would have one made, and wait for it.
constexpr int kCallsUntilPool = 8, kCallsUntilPoolAgain = 64;
// Calls that follow each other so fast find all as the last one left it.
constexpr int64_t kAtOnceNs = 20'000;
// Waiting that counts as being kept from work: so long, and that part of the call.
constexpr int64_t kLongWaitNs = 300'000;
constexpr int64_t kWaitPart = 4;
// How long a pool that had to be waited for is left out: the first time, and at most.
constexpr int64_t kFirstRetreatNs = 20'000'000, kLongestRetreatNs = 1'000'000'000;
// So many calls without waiting, and the next time is a first time again.
constexpr int kGoodCalls = 16;
// The caller shares its core with others if it was taken from it once in so long, looked at in such intervals.
constexpr int64_t kTakenOnceInNs = 15'000'000, kLookAtCoreNs = 20'000'000;

// What a calling thread knows from its earlier calls.
struct Experience {
  int64_t last_end = 0;
  ThreadSource last_source = ThreadSource::none;
  PoolThreads pool;
  int calls_until_pool = kCallsUntilPool;
  double alone_seconds = 0;  // of calls that followed each other without all that they could have used
  int64_t no_pool_until = 0, retreat = 0;
  int good_calls = 0;
  bool shares_core = false;
  int allowed_cores = 0;  // more threads than that gain nothing

  void look_at_cores(int64_t now) {
    if (now - looked_at_core_ < kLookAtCoreNs) return;
    cpu_set_t cores;
    allowed_cores = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : kMostMembers;
    rusage usage;
    if (getrusage(RUSAGE_THREAD, &usage) != 0) return;
    shares_core = (usage.ru_nivcsw - taken_) * kTakenOnceInNs > now - looked_at_core_;
    taken_ = usage.ru_nivcsw;
    looked_at_core_ = now;
  }

  // Whether the pool's threads run. To see it takes two system calls.
  bool pool_is_there(int64_t now) {
    if (now < no_pool_until) return false;
    if (now - last_end < kAtOnceNs && last_source != ThreadSource::none) return last_source == ThreadSource::pool;
    if (pool.known()) return pool.running();
    if (--calls_until_pool > 0) return false;
    calls_until_pool = kCallsUntilPoolAgain;
    return true;
  }

 private:
  int64_t looked_at_core_ = 0, taken_ = 0;
};
thread_local Experience experience;

}  // namespace

std::string_view use_team(std::string_view name) {
  Choice chosen = in_force.load(std::memory_order_relaxed);
  if (!name.empty()) {
    if (!find_choice(name, chosen)) return "";
    in_force.store(chosen, std::memory_order_relaxed);
  }
  return kChoices[static_cast<int>(chosen)];
}

Team::Team(int planned, double alone_seconds) : planned_(planned < kMostMembers ? planned : kMostMembers) {
  if (planned_ < 2 || is_forked()) return;
  switch (in_force.load(std::memory_order_relaxed)) {
    case Choice::alone: break;
    case Choice::pool: take_pool(); break;
    case Choice::helpers: reserve(planned_, true, kMostMembers); break;
    case Choice::automatic: choose(alone_seconds);
  }
}

void Team::choose(double alone_seconds) {
  Experience& my = experience;
  const int64_t now = now_ns();
  my.look_at_cores(now);
  const int most = planned_ < my.allowed_cores ? planned_ : my.allowed_cores;
  // The pool has as many threads as torch was told to use, and would have all of them share the cores.
  if (most == planned_ && my.pool_is_there(now)) return take_pool();
  reserve(most, false, 0);
  if (size_ >= most) return;
  // Others have to be woken, as many as gain more than that takes the caller. They stay awake: calls that follow each
  // other, each of them too short, count as one.
  if (now - my.last_end > kAwakeNs) my.alone_seconds = 0;
  my.alone_seconds += alone_seconds;
  int members = size_;
  while (members < most && (my.alone_seconds - kUntilAwake) / (members * (members + 1)) > kWakeSeconds) ++members;
  if (members == size_) return;
  my.alone_seconds = 0;
  reserve(members, true, my.allowed_cores - 1);
}

void Team::take_pool() {
  size_ = planned_;
  source_ = ThreadSource::pool;
}

// More helpers, until the team has `wanted` members.
void Team::reserve(int wanted, bool asleep_too, int most_helpers) {
  while (size_ < wanted) {
    Helper* const helper = Helper::reserve(asleep_too, most_helpers);
    if (!helper) return;
    helpers_[size_++ - 1] = helper;
    source_ = ThreadSource::helpers;
  }
}

void Team::cancel() {
  for (int i = 0; source_ == ThreadSource::helpers && i < size_ - 1; ++i) helpers_[i]->cancel();
  size_ = 1;
  source_ = ThreadSource::none;
}

void Team::run(const Work& work) {
  const int64_t start = now_ns();
  Job* const job = size_ > 1 ? Job::create(work, size_) : nullptr;
  int64_t waited = 0;
  if (!job) {
    cancel();
    run_alone(work);
  } else if (source_ == ThreadSource::pool) {
    int64_t own_end = 0;
    waited = experience.pool.run(*job, size_, own_end);
    const int64_t for_the_pool = now_ns() - own_end;
    if (for_the_pool > kLongWaitNs) waited += for_the_pool;
  } else {
    for (int i = 0; i < size_ - 1; ++i) {
      job->share_with_another();
      // A caller that is kept from its core as often as they are from theirs gains more by helpers that keep them.
      helpers_[i]->call(job, i + 1, !experience.shares_core);
    }
    job->take_part(0);
  }
  if (job) job->release();
  const ThreadSource source = source_;
  // They are others' again, or the pool's.
  size_ = 1;
  source_ = ThreadSource::none;
  Experience& my = experience;
  const int64_t end = now_ns();
  my.last_end = end;
  my.last_source = source;
  if (waited > kLongWaitNs && waited > (end - start) / kWaitPart) {
    my.retreat = my.retreat ? 2 * my.retreat : kFirstRetreatNs;
    if (my.retreat > kLongestRetreatNs) my.retreat = kLongestRetreatNs;
    my.no_pool_until = end + my.retreat;
    my.good_calls = 0;
  } else if (source == ThreadSource::pool && ++my.good_calls == kGoodCalls) {
    my.good_calls = 0;
    my.retreat = 0;
  }
}

void Team::run_alone(const Work& work) const {
  for (int stage = 0; stage < work.stage_count; ++stage)
    for (int64_t group = 0; group < work.stages[stage].groups; ++group)
      for (int64_t round = 0; round < work.stages[stage].rounds; ++round)
        for (int64_t share = 0; share < work.stages[stage].shares; ++share)
          work.body(work.context, {stage, group, round, share, 0});
}

}  // namespace rnnfast::cpu

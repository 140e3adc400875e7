#include "job.h"

#include <algorithm>
#include <bitset>
#include <cassert>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "float_control.h"
#include "split.h"
#include "waiting.h"

namespace rnnfast::cpu {

Job::Job(const Work& work, int members) : work_(work), members_(members), float_control_(float_control()) {}

Job* Job::create(const Work& work, int members) {
  assert(work.stage_count <= kMostStages);
  int64_t first[kMostStages] = {}, shares = 0;
  for (int i = 0; i < work.stage_count; ++i) {
    assert(work.stages[i].shares <= kMostShares);
    first[i] = shares;
    shares += work.stages[i].groups * work.stages[i].shares;
  }
  constexpr size_t kHead = (sizeof(Job) + alignof(Progress) - 1) / alignof(Progress) * alignof(Progress);
  void* memory = std::aligned_alloc(alignof(Progress), kHead + static_cast<size_t>(shares) * sizeof(Progress));
  if (!memory) return nullptr;
  Job* job = new (memory) Job(work, members);
  job->progress_ = reinterpret_cast<Progress*>(static_cast<char*>(memory) + kHead);
  for (int64_t i = 0; i < shares; ++i) new (job->progress_ + i) Progress();
  std::copy_n(first, kMostStages, job->first_);
  return job;
}

void Job::release() {
  static_assert(std::is_trivially_destructible_v<Job>);
  // Who releases last must see all that the others did before they let go.
  if (owners_.fetch_sub(1, std::memory_order_acq_rel) == 1) std::free(this);
}

class Job::Member {
 public:
  Member(Job& job, int number, bool gives_way) : job_(job), number_(number), gives_way_(gives_way) {}

  int64_t work_through() {
    for (stage_ = 0; stage_ < job_.work_.stage_count; ++stage_) {
      const Stage& stage = job_.work_.stages[stage_];
      const int64_t count = stage.groups * stage.shares;
      Range own{0, 0};
      if (count >= job_.members_)
        own = share_of(count, number_, job_.members_);
      else if (number_ < count)
        own = {number_, number_ + 1};
      for (int64_t share = own.first; share < own.last; share += stage.shares - share % stage.shares)
        carry(share / stage.shares, share % stage.shares);
      // Groups whose members are not there; then those that others have begun, in case that they are kept from it.
      for (const bool begun : {false, true})
        for (int64_t g = 0; g < stage.groups; ++g)
          if (begun || !has_begun(g)) carry(g, 0, begun);
    }
    return waited_;
  }

 private:
  // Turns of waiting (some 20 ns each) before a look at what others have not begun. To look takes the line from who is
  // about to begin; in a group of others more is lost by it than won.
  static constexpr int64_t kPatience = 32, kPatienceWithOthers = 512;
  // How often to ask for the time: about every so many nanoseconds, in pieces at most.
  static constexpr int64_t kLookNs = 100'000, kMostUnseen = 128;

  bool has_begun(int64_t group) const {
    return job_.progress(stage_, group)->begun.load(std::memory_order_relaxed) > 0;
  }

  // A group, from where it is to its end. What has no member that works on it is begun by this one; shares that were
  // found begun are left to others from then on, and found not begun after some waiting they are not.
  void carry(int64_t group, int64_t first_share, bool of_others = false) {
    const Stage& stage = job_.work_.stages[stage_];
    Progress* const progress = job_.progress(stage_, group);
    left_to_others_.reset();
    if (of_others) left_to_others_.set();
    patience_ = of_others ? kPatienceWithOthers : kPatience;
    carry_begin_ = now_ns();
    int64_t round = progress->done.load(std::memory_order_acquire);
    first_round_ = round > 0 ? round - 1 : 0;
    if (round > 0) wait(group, round - 1);
    for (; round < stage.rounds; ++round) {
      for (int64_t i = 0; i < stage.shares; ++i) {
        const int64_t share = (first_share + i) % stage.shares;
        if (!left_to_others_[share] && !begin(group, round, share)) left_to_others_[share] = true;
      }
      wait(group, round);
    }
  }

  // Does a share, unless someone else has begun it.
  bool begin(int64_t group, int64_t round, int64_t share) {
    Progress& progress = job_.progress(stage_, group)[share];
    int64_t begun = round;
    if (progress.begun.load(std::memory_order_relaxed) != round ||
        !progress.begun.compare_exchange_strong(begun, round + 1, std::memory_order_relaxed))
      return false;
    job_.work_.body(job_.work_.context, {stage_, group, round, share, number_});
    progress.done.store(round + 1, std::memory_order_release);
    if (gives_way_ && --pieces_until_look_ == 0) give_way();
    return true;
  }

  // To ask for the time takes as long as a small piece.
  void give_way() {
    const int64_t now = now_ns(), pieces = now - last_look_ < kLookNs ? 2 * look_every_ : look_every_ / 2;
    look_every_ = pieces < 1 ? 1 : pieces > kMostUnseen ? kMostUnseen : pieces;
    pieces_until_look_ = look_every_;
    last_look_ = give_way_in_time(now);
  }

  // Until all shares of the round are done.
  void wait(int64_t group, int64_t round) {
    const int64_t shares = job_.work_.stages[stage_].shares;
    Progress* const progress = job_.progress(stage_, group);
    Spinner spin;
    // Large pieces end further apart than small ones: a quarter of what a round has taken so far.
    const auto spins = [&] { return (now_ns() - carry_begin_) / (round - first_round_ + 1) / 4; };
    for (int64_t first = 0;;) {
      while (first < shares && progress[first].done.load(std::memory_order_acquire) > round) ++first;
      if (first == shares) break;
      spin(spins);
      if (spin.turns() % patience_) continue;
      for (int64_t share = first; share < shares; ++share) {
        if (!begin(group, round, share)) continue;
        left_to_others_[share] = false;
        waited_ += spin.long_wait();
        spin = Spinner();
      }
    }
    waited_ += spin.long_wait();
  }

  Job& job_;
  const int number_;
  int stage_ = 0;
  int64_t waited_ = 0;
  // Of the group at hand.
  std::bitset<kMostShares> left_to_others_;
  int64_t patience_ = kPatience;
  int64_t carry_begin_ = 0, first_round_ = 0;  // when and with which round this member came to it
  const bool gives_way_;
  int64_t last_look_ = 0, look_every_ = 1, pieces_until_look_ = 1;
};

int64_t Job::take_part(int member, bool gives_way) {
  const FloatControlOf callers(float_control_);
  return Member(*this, member, gives_way).work_through();
}

}  // namespace rnnfast::cpu

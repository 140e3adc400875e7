// A call's work, and the threads that do it. The calling thread needs nobody: it can do all of it, and whoever else is
// really running makes it faster. Nobody waits for a thread, only for a piece of work that a thread has begun. (But for
// regions of torch's pool, which end when all its threads have been there: hence team.cpp's choice.)
//
// Work is cut into stages, one after the other. A stage has groups, which know nothing of each other; a group has
// rounds, one after the other (the steps of a sequence, say); and a round has shares, which any member may do, at the
// same time. Each member begins at shares of its own and takes what nobody has begun.
#pragma once

#include <cstdint>
#include <string_view>

namespace rnnfast::cpu {

constexpr int kMostMembers = 128;
// Shares for each member where nothing ties them to one: enough for a member that comes late to find some.
constexpr int kSharesPerMember = 4;
constexpr int kMostShares = kSharesPerMember * kMostMembers;
constexpr int64_t shares_for(int members) { return members == 1 ? 1 : kSharesPerMember * members; }
constexpr int kMostStages = 4;

struct Stage {
  int64_t groups = 1;
  int64_t shares = 1;  // of each round of a group, at most kMostShares
  int64_t rounds = 1;
};

// One share of a round. `member` is below the team's size and of one thread alone: for what a thread keeps to itself.
struct Piece {
  int stage;
  int64_t group, round, share;
  int member;
};

struct Work {
  Stage stages[kMostStages];
  int stage_count;
  void (*body)(const void* context, const Piece& piece);
  const void* context;
};

// Where the members besides the caller come from.
enum class ThreadSource {
  none,
  pool,     // torch's pool, whose threads were running anyway
  helpers,  // threads of the library's own, which nobody waits for
};

class Helper;

// Those that a call may count on: of at most `planned` threads, as many as are expected to shorten a call that takes
// the caller `alone_seconds` by itself. The work is cut for `planned`, whoever comes: how sums are rounded depends on
// the cut, and results must not depend on who was there.
class Team {
 public:
  Team(int planned, double alone_seconds);
  ~Team() { cancel(); }
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int planned() const { return planned_; }
  int size() const { return size_; }
  ThreadSource source() const { return source_; }

  // body(piece) for every piece; returns when all are done. Everything that a round wrote is visible in the next.
  // Afterwards the team is the caller alone.
  template <class Body> void run(const Stage* stages, int stage_count, const Body& body) {
    Work work{{},
              stage_count,
              [](const void* context, const Piece& piece) { (*static_cast<const Body*>(context))(piece); },
              &body};
    for (int i = 0; i < stage_count; ++i) work.stages[i] = stages[i];
    run(work);
  }

 private:
  void run(const Work& work);
  void run_alone(const Work& work) const;
  void cancel();
  void choose(double alone_seconds);
  void take_pool();
  void reserve(int wanted, bool asleep_too, int most_helpers);

  const int planned_;
  int size_ = 1;
  ThreadSource source_ = ThreadSource::none;
  Helper* helpers_[kMostMembers];  // the first size_ - 1, of ThreadSource::helpers
};

// How teams are chosen: "auto"; "alone"; "pool" and "helpers": always these, as many threads as are useful, for tests
// and measurements. An empty name asks. The choice in force, or "" for a name that is none.
std::string_view use_team(std::string_view name);

}  // namespace rnnfast::cpu

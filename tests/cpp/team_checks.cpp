// Teams (csrc/cpu/team.h) without torch: a pool of plain threads in place of torch's. Every piece is done once, rounds
// come one after the other, nothing of a call is touched after it, and nobody is needed but the caller. The data are
// plain memory, so that TSan and ASan see what is not in order.
//
//     team_checks MODE SECONDS SEED       MODE: one of random, alone, late, stuck, choice
#include <pthread.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "helpers.h"
#include "pool.h"
#include "waiting.h"

namespace rnnfast::cpu {

std::atomic<int> pool_size{8};  // the members that a region gets, at most
std::atomic<int> regions{0};

// As torch's: the caller is one of the threads, and each gets one stretch of the slots.
void parallel_region(int64_t slots, void (*body)(int64_t, int64_t, void*), void* context) {
  ++regions;
  const int64_t threads = std::min<int64_t>(slots, pool_size), length = (slots + threads - 1) / threads;
  std::vector<std::thread> others;
  for (int64_t begin = length; begin < slots; begin += length)
    others.emplace_back([=] { body(begin, std::min(begin + length, slots), context); });
  body(0, std::min(length, slots), context);
  for (std::thread& other : others) other.join();
}

}  // namespace rnnfast::cpu

namespace {

using namespace rnnfast::cpu;

void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "team_checks: %s\n", what);
  std::exit(1);
}

uint64_t mixed(uint64_t a, uint64_t b) {
  a ^= b + 0x9e3779b97f4a7c15 + (a << 6) + (a >> 2);
  return a * 0xbf58476d1ce4e5b9;
}

// Each share of a round makes a number of all numbers of the round before, and the second stage of all of the first.
struct Chain {
  std::vector<Stage> stages;
  std::vector<std::vector<uint64_t>> values;  // of a stage: [group][parity of the round][share]
  std::vector<std::vector<int>> times;        // of a stage: [group][round][share], how often it was done
  std::vector<int> in_use;                    // of each member, which one thread at a time may have
  unsigned pause_one_of = 0;                  // pieces that take a rest, as if others had taken the core

  Chain(std::vector<Stage> wanted, int members) : stages(std::move(wanted)), in_use(static_cast<size_t>(members)) {
    for (const Stage& stage : stages) {
      values.emplace_back(static_cast<size_t>(2 * stage.groups * stage.shares), 1);
      times.emplace_back(static_cast<size_t>(stage.groups * stage.shares * stage.rounds));
    }
  }

  void operator()(const Piece& piece) {
    const Stage& stage = stages[static_cast<size_t>(piece.stage)];
    auto& mine = values[static_cast<size_t>(piece.stage)];
    const auto value = [&](int64_t round, int64_t share) -> uint64_t& {
      return mine[static_cast<size_t>((piece.group * 2 + round % 2) * stage.shares + share)];
    };
    ++in_use[static_cast<size_t>(piece.member)];
    uint64_t sum = static_cast<uint64_t>(piece.share);
    for (int64_t share = 0; share < stage.shares; ++share) sum = mixed(sum, value(piece.round + 1, share));
    if (piece.round == 0 && piece.stage > 0)
      for (uint64_t earlier : values[static_cast<size_t>(piece.stage) - 1]) sum = mixed(sum, earlier);
    if (pause_one_of && sum % pause_one_of == 0) usleep(static_cast<useconds_t>(sum / pause_one_of % 300));
    value(piece.round, piece.share) = sum;
    ++times[static_cast<size_t>(piece.stage)]
           [static_cast<size_t>((piece.group * stage.rounds + piece.round) * stage.shares + piece.share)];
  }

  void check_times() const {
    for (const auto& stage : times)
      for (const int count : stage) check(count == 1, "a piece was not done once");
  }
};

std::vector<std::vector<uint64_t>> serial(const std::vector<Stage>& stages) {
  Chain chain(stages, 1);
  for (size_t stage = 0; stage < stages.size(); ++stage)
    for (int64_t group = 0; group < stages[stage].groups; ++group)
      for (int64_t round = 0; round < stages[stage].rounds; ++round)
        for (int64_t share = 0; share < stages[stage].shares; ++share)
          chain({static_cast<int>(stage), group, round, share, 0});
  return chain.values;
}

void run_one(std::mt19937& random, std::string_view source) {
  const auto pick = [&](std::initializer_list<int> from) { return from.begin()[random() % from.size()]; };
  const int planned = pick({2, 2, 3, 4, 8, 16});
  std::vector<Stage> stages = {{1, shares_for(planned), pick({1, 1, 3})}};
  const int groups = pick({1, 1, 2, 3, planned});
  if (random() % 4) stages.push_back({groups, std::max(1, planned / groups), pick({0, 1, 5, 40, 200})});
  // As two directions that run one after the other, and a stage that a call has no use for.
  if (random() % 2) stages.push_back({groups, std::max(1, planned / groups), pick({1, 40})});
  if (random() % 2) stages.push_back({0, shares_for(planned), 1});
  pool_size = pick({1, 2, 8});
  if (!source.empty()) check(use_team(source) == source, "use_team");
  // Gone when the call is over, for ASan.
  const auto chain = std::make_unique<Chain>(stages, planned);
  chain->pause_one_of = static_cast<unsigned>(pick({0, 0, 50, 500}));
  {
    Team team(planned, 1.0);
    check(team.planned() == planned && team.size() >= 1 && team.size() <= planned, "the team's size");
    team.run(stages.data(), static_cast<int>(stages.size()), [&](const Piece& piece) { (*chain)(piece); });
  }
  chain->check_times();
  check(chain->values == serial(stages), "a piece did not see what came before it");
}

void random_calls(double seconds, unsigned seed) {
  // Several callers at once, as in a service with a thread for each request.
  std::vector<std::thread> callers;
  for (unsigned caller = 0; caller < 3; ++caller)
    callers.emplace_back([=] {
      std::mt19937 random(seed + caller);
      const std::string_view sources[] = {"alone", "pool", "helpers", "helpers", "auto", "auto"};
      const int64_t end = now_ns() + static_cast<int64_t>(seconds * 1e9);
      for (int calls = 0; calls == 0 || now_ns() < end; ++calls) {
        // use_team is the process's: what the others ask for meanwhile is as good.
        run_one(random, caller == 0 ? sources[random() % 6] : std::string_view());
        if (random() % 8 == 0) usleep(200);
      }
    });
  for (std::thread& caller : callers) caller.join();
}

struct Counted {
  Chain chain;
  Job* job;

  explicit Counted(std::vector<Stage> stages, int members) : chain(stages, members) {
    Work work{
        {},
        static_cast<int>(stages.size()),
        [](const void* context, const Piece& piece) { (*static_cast<Chain*>(const_cast<void*>(context)))(piece); },
        &chain};
    for (size_t i = 0; i < stages.size(); ++i) work.stages[i] = stages[i];
    job = Job::create(work, members);
  }
};

// The caller finishes although none of the others comes; who comes later touches nothing.
void late(unsigned seed) {
  const std::vector<Stage> stages = {{1, 16, 1}, {2, 2, 50}};
  auto call = std::make_unique<Counted>(stages, 4);
  Job* const job = call->job;
  for (int i = 0; i < 3; ++i) job->share_with_another();
  job->take_part(0);
  call->chain.check_times();
  check(call->chain.values == serial(stages), "the caller alone");
  job->release();
  call.reset();
  std::vector<std::thread> others;
  for (int member = 1; member < 4; ++member)
    others.emplace_back([=] {
      usleep(seed % 7 * 100);
      job->take_part(member);
      job->release();
    });
  for (std::thread& other : others) other.join();
}

// One that is put to sleep inside a piece costs that piece: the others do all that does not need it.
void stuck() {
  struct Stuck {
    std::atomic<bool> asleep{false}, go_on{false};
    std::atomic<int> others_done{0};
  } stuck;
  Work work{{{4, 1, 10}},
            1,
            [](const void* context, const Piece& piece) {
              Stuck& stuck = *static_cast<Stuck*>(const_cast<void*>(context));
              if (piece.group == 2 && piece.round == 3) {
                stuck.asleep = true;
                for (int i = 0; !stuck.go_on; ++i) {
                  check(i < 100'000, "what did not need the sleeper was not done while it slept");
                  usleep(100);
                }
              } else if (piece.group != 2) {
                // Not before the sleeper sleeps: the caller might be the first at that piece.
                while (!stuck.asleep) usleep(100);
                if (++stuck.others_done == 30) stuck.go_on = true;
              }
            },
            &stuck};
  Job* const job = Job::create(work, 2);
  job->share_with_another();
  std::thread other([&] {
    job->take_part(1);
    job->release();
  });
  job->take_part(0);
  other.join();
  job->release();
}

// What is chosen, as far as the machine's load does not decide.
void choice() {
  use_team("auto");
  const Stage stage{1, 2, 20};
  const auto call = [&](bool wait_for_the_other) {
    const pthread_t caller = pthread_self();
    usleep(100);  // at once after a call all is as that left it
    Team team(2, 1.0);
    const ThreadSource source = team.source();
    std::atomic<bool> other_came{false};
    team.run(&stage, 1, [&](const Piece&) {
      if (pthread_equal(pthread_self(), caller)) {
        while (wait_for_the_other && !other_came) usleep(50);
      } else if (!other_came.exchange(true)) {
        usleep(wait_for_the_other ? 30'000 : 0);
      }
    });
    return source;
  };
  std::thread([&] {
    for (int i = 0; i < 7; ++i) check(call(false) != ThreadSource::pool, "the pool of a thread that may not live long");
    check(call(false) == ThreadSource::pool, "the pool's acquaintance is made");
    // These threads end with the region.
    usleep(1000);
    check(call(false) != ThreadSource::pool, "a pool whose threads have ended");
  }).join();
  std::thread([&] {
    for (int i = 0; i < 7; ++i) call(false);
    use_team("pool");
    call(true);
    const int64_t waited = now_ns();
    use_team("auto");
    call(false);  // would find that the threads have ended, so that the next call would make new acquaintance
    const ThreadSource source = call(false);
    if (now_ns() - waited < 15'000'000) check(source != ThreadSource::pool, "a pool that the last call waited for");
    usleep(30'000);
    call(false);
    check(call(false) == ThreadSource::pool, "a pool after some time");
  }).join();
  check(Team(1, 1.0).size() == 1 && Team(0, 1.0).size() == 1, "one thread is the caller");
  check(use_team("nobody").empty() && use_team("") == "auto", "a name that is none");
  use_team("helpers");
  {
    Team never_run(4, 1.0);
    check(never_run.size() > 1 && never_run.source() == ThreadSource::helpers, "helpers on request");
  }
  std::mt19937 random(1);
  for (int i = 0; i < 10; ++i) run_one(random, "helpers");
  use_team("alone");
  check(Team(4, 1.0).size() == 1, "alone on request");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 4) return 2;
  const std::string mode = argv[1];
  const unsigned seed = static_cast<unsigned>(std::atoi(argv[3]));
  if (mode == "random")
    random_calls(std::atof(argv[2]), seed);
  else if (mode == "late")
    late(seed);
  else if (mode == "stuck")
    stuck();
  else if (mode == "choice")
    choice();
  else
    return 2;
  std::printf("%s: passed\n", argv[1]);
  return 0;
}

// How far apart the cores are on which the threads run: the time that a cache line takes from one to the next.
#pragma once

#include <time.h>

#include "team.h"

namespace rnnfast::cpu {
namespace {

// More rounds add nothing to a mean, and nobody could end them: microseconds each, more where other programs run.
constexpr int64_t kMostRounds = 10'000;

// Seconds in which a word that one thread wrote is read by the next, mean over `rounds` rounds through all threads of
// the pool. 0 where there is one thread. On a virtual machine it changes while a program runs, as its processors move
// to other cores; what synchronises every step becomes faster or slower with it.
inline double core_to_core_seconds(int threads, int64_t rounds) {
  if (threads < 2) return 0;
  struct alignas(64) Word {
    int64_t value = 0;
  } word;
  double seconds = 0;
  run_team(threads, [&](Team& team, int member) {
    const int64_t members = team.members();
    if (members < 2) return;
    // The clock starts when all have arrived. The word itself orders everything after that.
    team.wait();
    timespec start, end;
    if (member == 0) clock_gettime(CLOCK_MONOTONIC, &start);
    for (int64_t turn = member; turn < rounds * members; turn += members) {
      Spinner spin;
      while (__atomic_load_n(&word.value, __ATOMIC_ACQUIRE) != turn) spin();
      __atomic_store_n(&word.value, turn + 1, __ATOMIC_RELEASE);
    }
    if (member != 0) return;
    Spinner spin;
    while (__atomic_load_n(&word.value, __ATOMIC_ACQUIRE) != rounds * members) spin();
    clock_gettime(CLOCK_MONOTONIC, &end);
    const double elapsed =
        static_cast<double>(end.tv_sec - start.tv_sec) + 1e-9 * static_cast<double>(end.tv_nsec - start.tv_nsec);
    seconds = elapsed / static_cast<double>(rounds * members);
  });
  return seconds;
}

}  // namespace
}  // namespace rnnfast::cpu

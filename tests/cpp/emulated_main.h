// main of a test program in the emulator: says how to have a failure again, and refuses what the emulator's variables
// ask for in vain. Exit code 2: a variable makes no sense; of a synchronisation to be left out, 3: nothing reached it;
// 5: nothing noticed.
#pragma once

#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "check.h"
#include "emulator/emulator.h"

extern "C" [[gnu::weak]] void __sanitizer_set_death_callback(void (*callback)());

namespace check {

constexpr int kSkipNotReached = 3, kSkipNotNoticed = 5;

// Where the program is, as its last words.
inline void tell_where() {
  std::fflush(stdout);
  if (const std::string thread = rnnfast::emulator::who_runs(); !thread.empty())
    std::fprintf(stderr, "  %s\n", thread.c_str());
  std::fprintf(stderr, "%s", whereabouts().c_str());
}

// A crash, or Ctrl-C where something hangs, ends the program as it would have, after the last words. On a stack of its
// own: a kernel's may be at its end.
inline void end_with_words(int signal) {
  std::fprintf(stderr, "%s\n", strsignal(signal));
  tell_where();
  if (signal == SIGINT) rnnfast::emulator::print_threads();
  std::raise(signal);
}
inline void catch_signals() {
  static std::byte stack[256 << 10];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof(stack);
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_handler = end_with_words;
  action.sa_flags = static_cast<int>(SA_ONSTACK | SA_RESETHAND | SA_NODEFER);
  for (const int signal : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGABRT, SIGINT}) sigaction(signal, &action, nullptr);
}

inline std::string again_in_emulator(const std::string& program, const Case& chosen, std::optional<uint64_t> seed) {
  std::string command = "make kernel-test K=" + program + " CASE=" + chosen.name;
  if (seed) command += " SEED=" + std::to_string(*seed);
#if defined(__SANITIZE_THREAD__)
  command += " SAN=thread";
#elif defined(__SANITIZE_ADDRESS__)
  command += " SAN=address";
#endif
  if (const std::string& skip = rnnfast::emulator::options().skip; !skip.empty()) command += " SKIP=" + skip;
  return command;
}

inline int emulated_main(const char* source, int argc, char** argv, const std::vector<Case>& cases) {
  namespace emulator = rnnfast::emulator;
  const std::string file(source), stem = file.substr(file.rfind('/') + 1), program = stem.substr(0, stem.rfind('.'));
  try {
    const emulator::Options& options = emulator::options();
    if (options.seed_given) state().only_seed = options.seed;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s: %s\n", program.c_str(), error.what());
    return 2;
  }
  state().again = [program](const Case& chosen, std::optional<uint64_t> seed) {
    return again_in_emulator(program, chosen, seed);
  };
  // A sanitizer that has reported something ends the program.
  if (__sanitizer_set_death_callback) {
    __sanitizer_set_death_callback(tell_where);
  } else {
    catch_signals();
  }
  Hooks hooks;
  hooks.start = [] {
    if (state().only_seed) emulator::options().seed = *state().only_seed;
    return 0;
  };
  const int code = main(argc, argv, cases, hooks);
  if (const std::string problem = emulator::skip_problem(); code != 2 && !problem.empty()) {
    std::fprintf(stderr, "%s: %s\n", program.c_str(), problem.c_str());
    return kSkipNotReached;
  }
  if (const std::string& skip = emulator::options().skip; code == 0 && !skip.empty()) {
    std::fprintf(stderr, "%s: nothing noticed that the synchronisation at %s was left out\n", program.c_str(),
                 skip.c_str());
    return kSkipNotNoticed;
  }
  return code;
}

}  // namespace check

// Checks and named cases for the C++ test programs. Without arguments a program runs every case but those that are
// meant to fail under a sanitizer; with arguments, the cases named, where `a` names all of a/... and `-a` leaves them
// out; with --list, it prints all names. Exit code 1: a check failed; 2: no such case.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <exception>
#include <functional>
#include <sstream>
#include <string>
#include <vector>

namespace check {

enum class Kind {
  usual,
  by_name_only,  // races or overruns on purpose
  polls,         // blocks wait for each other's stores, so that a mistake hangs: on a card these come last
};

struct Case {
  std::string name;
  std::function<void()> body;
  Kind kind = Kind::usual;
};

struct State {
  long checks = 0;
  long failures = 0;
};
inline State& state() {
  static State instance;
  return instance;
}

// Counts whatever shows that a case still moves: for whoever watches over it.
inline std::atomic<unsigned long>& progress() {
  static std::atomic<unsigned long> count{0};
  return count;
}

inline bool verify(bool good, const char* file, int line, const std::string& text) {
  ++state().checks;
  if (good) return true;
  constexpr long kShown = 20;
  if (++state().failures <= kShown) std::printf("%s:%d: %s\n", file, line, text.c_str());
  return false;
}

template <class A, class B> bool verify_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  if (a == b) return verify(true, file, line, "");
  std::ostringstream out;
  out.precision(17);
  out << text << ": " << a << " and " << b;
  return verify(false, file, line, out.str());
}

inline bool verify_contains(const std::string& text, const std::string& part, const char* file, int line) {
  return verify(text.find(part) != std::string::npos, file, line, "'" + part + "' is not in: " + text);
}

// What a program does around its cases.
struct Hooks {
  std::function<int()> start = [] { return 0; };                 // an exit code, where no case can run
  std::function<void(const Case&)> before = [](const Case&) {};  // each case
  std::function<std::string()> after = [] {
    return std::string();
  };  // each case: why the next ones are worthless, or ""
};

inline bool chooses(const std::string& argument, const std::string& name) {
  return name == argument || name.rfind(argument + "/", 0) == 0;
}

inline bool run(const Case& chosen) {
  const State before = state();
  try {
    chosen.body();
  } catch (const std::exception& error) {
    verify(false, chosen.name.c_str(), 0, std::string("exception: ") + error.what());
  }
  const bool good = state().failures == before.failures;
  std::printf("%-40s %s, %ld checks\n", chosen.name.c_str(), good ? "ok" : "FAILED", state().checks - before.checks);
  std::fflush(stdout);
  return good;
}

inline int main(int argc, char** argv, const std::vector<Case>& cases, const Hooks& hooks = {}) {
  const std::vector<std::string> names(argv + 1, argv + argc);
  if (names.size() == 1 && names[0] == "--list") {
    for (const Case& c : cases)
      std::printf("%s%s\n", c.name.c_str(), c.kind == Kind::by_name_only ? " (by name only)" : "");
    return 0;
  }
  std::vector<const Case*> chosen;
  const bool all = std::all_of(names.begin(), names.end(), [](const std::string& name) { return name[0] == '-'; });
  for (const Case& c : cases)
    if (all && c.kind != Kind::by_name_only) chosen.push_back(&c);
  for (const std::string& name : names) {
    const size_t before = chosen.size();
    if (name[0] == '-') {
      std::erase_if(chosen, [&](const Case* c) { return chooses(name.substr(1), c->name); });
    } else {
      for (const Case& c : cases)
        if (chooses(name, c.name)) chosen.push_back(&c);
    }
    if (chosen.size() != before) continue;
    std::printf("no case %s; --list shows them\n", name.c_str());
    return 2;
  }
  if (const int code = hooks.start()) return code;
  size_t run_cases = 0, failed = 0;
  for (const Case* c : chosen) {
    hooks.before(*c);
    ++run_cases;
    failed += !run(*c);
    const std::string worthless = hooks.after();
    if (worthless.empty()) continue;
    std::printf("after %s: %s: the %zu cases that follow are not run\n", c->name.c_str(), worthless.c_str(),
                chosen.size() - run_cases);
    ++state().failures;
    break;
  }
  std::printf("%zu cases, %zu failed\n", run_cases, failed);
  return state().failures == 0 ? 0 : 1;
}

}  // namespace check

// CHECK_CASES(name) { return {...}; } gives the cases of test_<name>.cpp: to a program of its own in the emulator, to
// card_tests.cpp on a card.
#if defined(RNNFAST_EMULATED)
#define CHECK_CASES(name)                                                                \
  static std::vector<check::Case> cases_of_##name();                                     \
  int main(int argc, char** argv) { return check::main(argc, argv, cases_of_##name()); } \
  static std::vector<check::Case> cases_of_##name()
#else
#define CHECK_CASES(name)                     \
  std::vector<check::Case> cases_of_##name(); \
  std::vector<check::Case> cases_of_##name()
#endif

// Each argument is evaluated once.
#define CHECK(condition) check::verify(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_MESSAGE(condition, message) \
  check::verify(static_cast<bool>(condition), __FILE__, __LINE__, std::string(#condition) + ": " + (message))
#define CHECK_EQUAL(a, b) check::verify_equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define CHECK_CONTAINS(text, part) check::verify_contains((text), (part), __FILE__, __LINE__)

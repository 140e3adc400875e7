// Checks and named cases for the C++ test programs. Without arguments a program runs every case but those that are
// meant to fail under a sanitizer; with arguments, the cases named; with --list, it prints all names. Exit code 1: a
// check failed; 2: no such case.
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <functional>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

namespace check {

struct Case {
  const char* name;
  std::function<void()> body;
  bool by_name_only = false;  // races or overruns on purpose
};

struct State {
  long checks = 0;
  long failures = 0;
};
inline State& state() {
  static State instance;
  return instance;
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

inline int main(int argc, char** argv, const std::vector<Case>& cases) {
  std::vector<std::string> names(argv + 1, argv + argc);
  if (names.size() == 1 && names[0] == "--list") {
    for (const Case& c : cases) std::printf("%s%s\n", c.name, c.by_name_only ? " (by name only)" : "");
    return 0;
  }
  if (names.empty()) {
    for (const Case& c : cases)
      if (!c.by_name_only) names.emplace_back(c.name);
  }
  for (const std::string& name : names) {
    const Case* chosen = nullptr;
    for (const Case& c : cases)
      if (name == c.name) chosen = &c;
    if (!chosen) {
      std::printf("no case %s; --list shows them\n", name.c_str());
      return 2;
    }
    const State before = state();
    try {
      chosen->body();
    } catch (const std::exception& error) { verify(false, chosen->name, 0, std::string("exception: ") + error.what()); }
    const long failures = state().failures - before.failures;
    std::printf("%-40s %s, %ld checks\n", chosen->name, failures == 0 ? "ok" : "FAILED",
                state().checks - before.checks);
    std::fflush(stdout);
  }
  return state().failures == 0 ? 0 : 1;
}

}  // namespace check

// Each argument is evaluated once.
#define CHECK(condition) check::verify(static_cast<bool>(condition), __FILE__, __LINE__, #condition)
#define CHECK_MESSAGE(condition, message) \
  check::verify(static_cast<bool>(condition), __FILE__, __LINE__, std::string(#condition) + ": " + (message))
#define CHECK_EQUAL(a, b) check::verify_equal((a), (b), __FILE__, __LINE__, #a " == " #b)
#define CHECK_CONTAINS(text, part) check::verify_contains((text), (part), __FILE__, __LINE__)

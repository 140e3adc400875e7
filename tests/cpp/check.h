// Checks and named cases for the C++ test programs. Without arguments a program runs every case but those that are
// meant to fail under a sanitizer; with arguments, the cases named, where `a` names all of a/... and `-a` leaves them
// out; with --list, it prints all names; with --seed N first, cases run under that seed alone (run_kernel.h). Exit code
// 1: a check failed; 2: wrong arguments.
#pragma once

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <functional>
#include <optional>
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

class Note;

struct State {
  long checks = 0;
  long failures = 0;
  const Case* running = nullptr;
  std::optional<uint64_t> only_seed;  // --seed
  std::optional<uint64_t> seed;       // under which the case runs now
  std::vector<const Note*> notes;     // what it works on now, from the whole to the part
  std::string told;                   // what was said of these last
  // The command that runs the case again, under the seed if there is one.
  std::function<std::string(const Case&, std::optional<uint64_t>)> again;
};
inline State& state() {
  static State instance;
  return instance;
}

// What is worked on as long as this lives, such as a shape: failures tell it.
class Note {
 public:
  explicit Note(std::string text) : text_(std::move(text)) { state().notes.push_back(this); }
  ~Note() { state().notes.pop_back(); }
  Note(const Note&) = delete;
  Note& operator=(const Note&) = delete;
  const std::string& text() const { return text_; }

 private:
  std::string text_;
};

// Case, notes, seed, and how to have just these again; "" outside a case.
inline std::string whereabouts() {
  const State& now = state();
  if (!now.running) return "";
  std::string text = "  in " + now.running->name;
  for (const Note* note : now.notes) text += ", " + note->text();
  const std::optional<uint64_t> seed = now.seed ? now.seed : now.only_seed;
  if (seed) text += ", seed " + std::to_string(*seed);
  text += "\n";
  if (now.again) text += "  again: " + now.again(*now.running, seed) + "\n";
  return text;
}

// Counts whatever shows that a case still moves: for whoever watches over it.
inline std::atomic<unsigned long>& progress() {
  static std::atomic<unsigned long> count{0};
  return count;
}

inline bool verify(bool good, const char* file, int line, const std::string& text) {
  ++state().checks;
  if (good) return true;
  constexpr long kShown = 8;
  if (++state().failures > kShown) return false;
  std::printf("%s:%d: %s\n", file, line, text.c_str());
  // The next kernel may crash.
  std::fflush(stdout);
  // Once for the failures of the same shape and seed.
  if (const std::string where = whereabouts(); where != state().told) {
    std::printf("%s", where.c_str());
    state().told = where;
  }
  return false;
}

template <class A, class B> bool verify_equal(const A& a, const B& b, const char* file, int line, const char* text) {
  if (a == b) return verify(true, file, line, "");
  std::ostringstream out;
  out.precision(17);
  out << text << ": " << a << " and " << b;
  return verify(false, file, line, out.str());
}

inline bool verify_no_error(const std::string& error, const char* file, int line) {
  return verify(error.empty(), file, line, error);
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
  State& now = state();
  const long checks = now.checks, failures = now.failures;
  now.running = &chosen;
  try {
    chosen.body();
  } catch (const std::exception& error) {
    verify(false, chosen.name.c_str(), 0, std::string("exception: ") + error.what());
  } catch (...) { verify(false, chosen.name.c_str(), 0, "an exception that is no std::exception"); }
  now.running = nullptr;
  const bool good = now.failures == failures;
  const std::string failed = good ? "" : std::to_string(now.failures - failures) + " of ";
  std::printf("%-40s %s, %s%ld checks\n", chosen.name.c_str(), good ? "ok" : "FAILED", failed.c_str(),
              now.checks - checks);
  std::fflush(stdout);
  return good;
}

// A whole number, or nothing.
inline std::optional<uint64_t> number(const std::string& text) {
  uint64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

inline int main(int argc, char** argv, const std::vector<Case>& cases, const Hooks& hooks = {}) {
  std::vector<std::string> names(argv + 1, argv + argc);
  if (!names.empty() && names[0] == "--seed") {
    const std::string text = names.size() > 1 ? names[1] : "";
    state().only_seed = number(text);
    if (!state().only_seed) {
      std::printf("--seed: expected a whole number from 0 to 2^64 - 1, got '%s'\n", text.c_str());
      return 2;
    }
    names.erase(names.begin(), names.begin() + 2);
  }
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
#include "emulated_main.h"
#define CHECK_CASES(name)                                                                                   \
  static std::vector<check::Case> cases_of_##name();                                                        \
  int main(int argc, char** argv) { return check::emulated_main(__FILE__, argc, argv, cases_of_##name()); } \
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
// Of a function that returns what went wrong, or "".
#define CHECK_NO_ERROR(error) check::verify_no_error((error), __FILE__, __LINE__)
#define CHECK_CONTAINS(text, part) check::verify_contains((text), (part), __FILE__, __LINE__)

// Options, the list of synchronisation sites, and the words of error messages.
#include <algorithm>
#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <set>
#include <stdexcept>
#include <string_view>
#include <tuple>

#include "internal.h"

namespace rnnfast::emulator {
namespace {

constexpr size_t kMaxLines = 40;

const char* value(const char* name) { return std::getenv(name); }

// The variable as a whole number, where it is set.
template <class Number> bool read(const char* name, Number& number, Number least) {
  const char* text = value(name);
  if (!text) return false;
  const char* end = text + std::strlen(text);
  const auto [stopped, error] = std::from_chars(text, end, number);
  if (error != std::errc() || stopped != end || number < least)
    throw std::invalid_argument(std::string(name) + ": expected a whole number from " + std::to_string(least) + " to " +
                                std::to_string(std::numeric_limits<Number>::max()) + ", got '" + text + "'");
  return true;
}

// The line in "file:line", and where the file ends; 0 where that is not what it says.
unsigned line_of(const std::string& skip, size_t& file) {
  file = skip.rfind(':');
  unsigned line = 0;
  if (file == std::string::npos || file == 0) return 0;
  const char* end = skip.data() + skip.size();
  const auto [stopped, error] = std::from_chars(skip.data() + file + 1, end, line);
  return error == std::errc() && stopped == end ? line : 0;
}

Options from_environment() {
  Options options;
  options.seed_given = read("RNNFAST_EMULATOR_SEED", options.seed, uint64_t{0});
  read("RNNFAST_EMULATOR_RESIDENT", options.resident_blocks, 1);
  read("RNNFAST_EMULATOR_DEVICE_BLOCKS", options.device_blocks, 0);
  constexpr size_t kLeastStack = 16 << 10;
  read("RNNFAST_EMULATOR_STACK", options.stack_bytes, kLeastStack);
  if (const char* text = value("RNNFAST_EMULATOR_SKIP"); text && *text) {
    options.skip = text;
    size_t file = 0;
    if (line_of(options.skip, file) == 0)
      throw std::invalid_argument("RNNFAST_EMULATOR_SKIP: expected file:line of a synchronisation, got '" +
                                  options.skip + "'");
  }
  unsigned list_sites = 0;
  read("RNNFAST_EMULATOR_LIST_SITES", list_sites, 0u);
  options.list_sites = list_sites != 0;
  return options;
}

// Without the detours of #include "../".
std::string name_of_file(const Site& site) {
  return std::filesystem::path(site.file_name()).lexically_normal().string();
}

// Options::skip is "file:line"; the file may leave out leading folders.
bool named_by(const std::string& skip, const Site& site) {
  size_t file = 0;
  if (line_of(skip, file) != site.line()) return false;
  const std::string full = name_of_file(site);
  const std::string_view end(skip.data(), file);
  return full.ends_with(end) && (full.size() == end.size() || full[full.size() - end.size() - 1] == '/');
}

// The synchronisations that this process has reached, where somebody asks for them, in their order.
struct Sites {
  // A header's name has an address in each file that includes it.
  std::set<std::tuple<const char*, unsigned, const char*>> seen;
  std::vector<std::string> known;
  std::set<std::string> left_out;  // the values of Options::skip under which one was left out

  // Whether it is a new one.
  bool add(const Site& site, const char* what) {
    if (!seen.emplace(site.file_name(), site.line(), what).second) return false;
    const std::string text = text_of(site) + " " + what;
    if (std::find(known.begin(), known.end(), text) != known.end()) return false;
    known.push_back(text);
    return true;
  }
};
Sites& sites() {
  static Sites instance;
  return instance;
}

// "0-31, 40"
std::string ranges(const std::vector<unsigned>& numbers) {
  std::string text;
  for (size_t i = 0; i < numbers.size();) {
    size_t last = i;
    while (last + 1 < numbers.size() && numbers[last + 1] == numbers[last] + 1) ++last;
    if (!text.empty()) text += ", ";
    text += std::to_string(numbers[i]);
    if (last > i) text += "-" + std::to_string(numbers[last]);
    i = last + 1;
  }
  return text;
}

std::string state_of(const Fiber& fiber) {
  if (fiber.ended) return "ended";
  if (!fiber.started) return "not begun";
  std::string text = fiber.waits ? "waits: " : "runs, last at: ";
  text += fiber.what;
  if (fiber.site.line() != 0) text += " at " + text_of(fiber.site);
  return text;
}

}  // namespace

Options& options() {
  static Options instance = from_environment();
  return instance;
}

std::string skip_problem() {
  const std::string& skip = options().skip;
  if (skip.empty() || sites().left_out.count(skip)) return "";
  std::string text = "no synchronisation at " + skip + " was reached; known sites:";
  for (const std::string& site : sites().known) text += "\n  " + site;
  return text + (sites().known.empty() ? " none" : "");
}

void at(const Site& site, const char* what) {
  Fiber& me = running();
  me.site = site;
  me.what = what;
}

bool skipped(const Site& site, const char* what) {
  Fiber& me = running();
  if (me.unwinding) return true;
  me.site = site;
  me.what = what;
  const Options& current = options();
  Scheduler& s = scheduler();
  if (current.list_sites || !current.skip.empty()) {
    Quiet quiet;
    if (sites().add(site, what) && current.list_sites) std::fprintf(stderr, "site %s\n", sites().known.back().c_str());
    if (!current.skip.empty() && named_by(current.skip, site)) {
      sites().left_out.insert(current.skip);
      return true;
    }
  }
  // A thread may be overtaken before each synchronisation.
  constexpr uint64_t kOvertaken = 8;
  if (s.shuffled && s.random.below(kOvertaken) == 0) yield();
  return false;
}

std::string text_of(const Site& site) { return name_of_file(site) + ":" + std::to_string(site.line()); }

std::string text_of(const Dim3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string name_of(const Fiber& fiber) {
  return "kernel " + fiber.block->grid->name + ", block " + text_of(fiber.block_index) + ", thread " +
         std::to_string(fiber.linear_thread);
}

std::string short_name_of(const Fiber& fiber) {
  return text_of(fiber.block_index) + " " + std::to_string(fiber.linear_thread) + " of " + fiber.block->grid->name;
}

std::string who_runs() {
  const Fiber* fiber = scheduler().current;
  if (!fiber || !fiber->block) return "";
  return name_of(*fiber) +
         (fiber->site.line() ? std::string(", last at ") + fiber->what + " " + text_of(fiber->site) : "");
}

void print_threads() { std::fprintf(stderr, "%s\n", where_all_are("threads now").c_str()); }

std::string where_all_are(const std::string& heading) {
  std::string text = heading;
  size_t lines = 0;
  for (const auto& grid : scheduler().grids) {
    for (const auto& cluster : grid->clusters) {
      for (const auto& block : cluster->blocks) {
        if (++lines > kMaxLines) return text + "\n  ...";
        text += "\n  kernel " + grid->name + ", block " + text_of(block->index) + ":";
        std::map<std::string, std::vector<unsigned>> states;
        for (const auto& fiber : block->threads) states[state_of(*fiber)].push_back(fiber->linear_thread);
        for (const auto& [state, threads] : states) {
          if (++lines > kMaxLines) return text + "\n  ...";
          text += std::string("\n    thread") + (threads.size() > 1 ? "s " : " ") + ranges(threads) + ": " + state;
        }
        for (size_t id = 0; id < block->barriers.size(); ++id) {
          const Barrier& barrier = block->barriers[id];
          if (barrier.arrived == 0) continue;
          text += "\n    barrier " + std::to_string(id) + ": " + std::to_string(barrier.arrived) + " of " +
                  std::to_string(barrier.count) + " threads have arrived";
        }
      }
    }
    if (grid->started_blocks < grid->blocks && grid->started_blocks > 0)
      text += "\n  kernel " + grid->name + ": " + std::to_string(grid->blocks - grid->started_blocks) +
              " blocks have not started";
  }
  return text;
}

}  // namespace rnnfast::emulator

// Options, the list of synchronisation sites, and the words of error messages.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <set>

#include "internal.h"

namespace rnnfast::emulator {
namespace {

constexpr size_t kMaxLines = 40;

Options from_environment() {
  Options options;
  const auto value = [](const char* name) { return std::getenv(name); };
  if (const char* text = value("RNNFAST_EMULATOR_SEED")) options.seed = std::strtoull(text, nullptr, 10);
  if (const char* text = value("RNNFAST_EMULATOR_RESIDENT")) options.resident_blocks = std::atoi(text);
  if (const char* text = value("RNNFAST_EMULATOR_STACK")) options.stack_bytes = std::strtoull(text, nullptr, 10);
  if (const char* text = value("RNNFAST_EMULATOR_SKIP")) options.skip = text;
  if (const char* text = value("RNNFAST_EMULATOR_LIST_SITES")) options.list_sites = *text && *text != '0';
  return options;
}

// Options::skip is "file:line"; the file may leave out leading folders.
bool named_by(const std::string& skip, const Site& site) {
  const size_t colon = skip.rfind(':');
  if (colon == std::string::npos) return false;
  if (std::strtoul(skip.c_str() + colon + 1, nullptr, 10) != site.line()) return false;
  const std::string file = skip.substr(0, colon), full = site.file_name();
  if (full.size() < file.size() || full.compare(full.size() - file.size(), file.size(), file) != 0) return false;
  return full.size() == file.size() || full[full.size() - file.size() - 1] == '/';
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
  if (current.list_sites) {
    Quiet quiet;
    static std::set<std::string> listed;
    const std::string line = text_of(site) + " " + what;
    if (listed.insert(line).second) std::fprintf(stderr, "site %s\n", line.c_str());
  }
  if (!current.skip.empty()) {
    Quiet quiet;
    if (named_by(current.skip, site)) return true;
  }
  // A thread may be overtaken before each synchronisation.
  constexpr uint64_t kOvertaken = 8;
  if (s.shuffled && s.random.below(kOvertaken) == 0) yield();
  return false;
}

std::string text_of(const Site& site) { return std::string(site.file_name()) + ":" + std::to_string(site.line()); }

std::string text_of(const Dim3& index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}

std::string name_of(const Fiber& fiber) {
  return "kernel " + fiber.block->grid->name + ", block " + text_of(fiber.block_index) + ", thread " +
         std::to_string(fiber.linear_thread);
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

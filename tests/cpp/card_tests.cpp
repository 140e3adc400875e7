// The test programs that make sense on silicon as one program for a card; compiled by tests/build_card.py.
//   card_tests [--seconds N] [--seed N] [case ... | -case ... | --list]
// Runs all cases by default, from the safest to those that could hang; under a slow tool it is worth while to leave out
// step/large, persistent/large and split/large. Exit codes as in check.h, and 77: there is no CUDA device; 3: a case
// made no progress for N seconds (30).
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cuda/device.h"
#include "cuda/primitives/launch.h"

std::vector<check::Case> cases_of_primitives();
std::vector<check::Case> cases_of_execution();
std::vector<check::Case> cases_of_product();
std::vector<check::Case> cases_of_step();
std::vector<check::Case> cases_of_async();
std::vector<check::Case> cases_of_exchange();
std::vector<check::Case> cases_of_memory();
std::vector<check::Case> cases_of_persistent();
std::vector<check::Case> cases_of_split();
std::vector<check::Case> cases_of_microbench();

namespace {

constexpr int kNoDevice = 77, kHangs = 3;

std::vector<check::Case> all_cases() {
  const std::pair<const char*, std::vector<check::Case>> programs[] = {
      {"primitives", cases_of_primitives()}, {"execution", cases_of_execution()},
      {"product", cases_of_product()},       {"step", cases_of_step()},
      {"async", cases_of_async()},           {"exchange", cases_of_exchange()},
      {"memory", cases_of_memory()},         {"persistent", cases_of_persistent()},
      {"split", cases_of_split()},           {"microbench", cases_of_microbench()}};
  std::vector<check::Case> all;
  for (const auto& [program, cases] : programs)
    for (check::Case c : cases) {
      c.name = std::string(program) + "/" + c.name;
      all.push_back(std::move(c));
    }
  std::stable_partition(all.begin(), all.end(), [](const auto& c) { return c.kind != check::Kind::polls; });
  return all;
}

// Exit code 0 where kernels run on the device.
int require_device() {
  const std::string problem = rnnfast::gpu::device_problem();
  if (problem.empty()) return 0;
  std::fprintf(stderr, "card_tests: %s\n", problem.c_str());
  return problem.rfind("no CUDA device", 0) == 0 ? kNoDevice : 1;
}

// A kernel that hangs cannot be ended, only left.
class Watchdog {
 public:
  explicit Watchdog(int seconds) {
    std::thread([this, seconds] { watch(seconds); }).detach();
  }
  void begin(const check::Case& c) {
    running_ = &c;
    ++check::progress();
  }
  void end() { running_ = nullptr; }

 private:
  void watch(int seconds) {
    using Clock = std::chrono::steady_clock;
    unsigned long seen = 0;
    for (Clock::time_point since = Clock::now();; std::this_thread::sleep_for(std::chrono::milliseconds(100))) {
      const check::Case* running = running_;
      if (const unsigned long now = check::progress(); now != seen || !running) {
        seen = now;
        since = Clock::now();
      } else if (Clock::now() - since > std::chrono::seconds(seconds)) {
        std::printf("%s hangs: no progress in %d seconds\n", running->name.c_str(), seconds);
        std::fflush(stdout);
        _exit(kHangs);
      }
    }
  }

  std::atomic<const check::Case*> running_{nullptr};
};

// An error such as an illegal address stays: every later call of the process gives it.
std::string lasting_error() {
  const cudaError_t error = cudaDeviceSynchronize();
  return error == cudaSuccess ? "" : std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
}

}  // namespace

int main(int argc, char** argv) {
  int seconds = 30;
  if (argc > 2 && std::string(argv[1]) == "--seconds") {
    seconds = std::atoi(argv[2]);
    argv[2] = argv[0];
    argc -= 2;
    argv += 2;
  }
  if (seconds <= 0) {
    std::fprintf(stderr, "card_tests: --seconds: a number above 0\n");
    return 2;
  }
  check::state().again = [program = std::string(argv[0])](const check::Case& c, std::optional<uint64_t> seed) {
    return program + (seed ? " --seed " + std::to_string(*seed) : "") + " " + c.name;
  };
  const std::vector<check::Case> cases = all_cases();
  // Never destroyed: its thread runs until the process ends.
  auto* watchdog = new Watchdog(seconds);
  const int code = check::main(argc, argv, cases,
                               {require_device, [&](const check::Case& c) { watchdog->begin(c); }, lasting_error});
  watchdog->end();
  return code;
}

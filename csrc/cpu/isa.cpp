#include "isa.h"

#include <atomic>
#include <cstdlib>

namespace rnnfast::cpu {
namespace {

// The first that fits is the default.
const Kernels* find(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
  if (avx512 && (name.empty() || name == kKernelsAvx512.isa)) return &kKernelsAvx512;
  if (avx2 && (name.empty() || name == kKernelsAvx2.isa)) return &kKernelsAvx2;
#endif
  if (name.empty() || name == kKernelsPortable.isa) return &kKernelsPortable;
  return nullptr;
}

const Kernels* initial() {
  const char* wanted = std::getenv("RNNFAST_CPU_ISA");
  const Kernels* found = find(wanted ? wanted : "");
  // An ISA that is not there must not stop the import: the best one serves, and `python -m rnnfast info` tells which.
  return found ? found : find("");
}

std::atomic<const Kernels*>& current() {
  static std::atomic<const Kernels*> value{initial()};
  return value;
}

}  // namespace

const Kernels& kernels() { return *current().load(std::memory_order_acquire); }

std::string use_isa(const std::string& name) {
  if (!name.empty()) {
    const Kernels* found = find(name);
    if (!found) return "";
    current().store(found, std::memory_order_release);
  }
  return kernels().isa;
}

}  // namespace rnnfast::cpu

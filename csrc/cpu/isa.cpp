#include "isa.h"

#include <atomic>
#include <cstdlib>

namespace rnnfast::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*fits)();
  const Kernels* kernels[4];  // in the order of DType
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
#endif

// The first that fits is the default.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512", has_avx512, RNNFAST_KERNELS_OF(avx512)},
    {"avx2", has_avx2, RNNFAST_KERNELS_OF(avx2)},
#endif
    {"portable", [] { return true; }, RNNFAST_KERNELS_OF(portable)},
};

const Isa* find(const std::string& name) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  for (const Isa& isa : kIsas)
    if ((name.empty() || name == isa.name) && isa.fits()) return &isa;
  return nullptr;
}

const Isa* initial() {
  const char* wanted = std::getenv("RNNFAST_CPU_ISA");
  const Isa* found = find(wanted ? wanted : "");
  // An ISA that is not there must not stop the import: the best one serves, and `python -m rnnfast info` tells which.
  return found ? found : find("");
}

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> value{initial()};
  return value;
}

}  // namespace

const Kernels& kernels(DType dtype) {
  return *current().load(std::memory_order_acquire)->kernels[static_cast<int>(dtype)];
}

std::string use_isa(const std::string& name) {
  if (!name.empty()) {
    const Isa* found = find(name);
    if (!found) return "";
    current().store(found, std::memory_order_release);
  }
  return current().load(std::memory_order_acquire)->name;
}

}  // namespace rnnfast::cpu

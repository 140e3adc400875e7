#include "isa.h"

#include <atomic>
#include <cstdlib>

namespace rnnfast::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*fits)();
  const Kernels* kernels[4];             // in the order of DType
  const PanelForward* panel_forward[3];  // in the order of PanelType
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

// The first that fits is the default.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512_vnni",
     has_avx512_vnni,
     RNNFAST_KERNELS_OF(avx512),
     {&panel_forward_avx512_float32, &panel_forward_avx512_bfloat16, &panel_forward_avx512_vnni_int8}},
    {"avx512", has_avx512, RNNFAST_KERNELS_OF(avx512), RNNFAST_PANELS_OF(avx512)},
    {"avx2", has_avx2, RNNFAST_KERNELS_OF(avx2), RNNFAST_PANELS_OF(avx2)},
#endif
    {"portable", [] { return true; }, RNNFAST_KERNELS_OF(portable), RNNFAST_PANELS_OF(portable)},
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

PanelForward panel_forward(PanelType type) {
  return *current().load(std::memory_order_acquire)->panel_forward[static_cast<int>(type)];
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

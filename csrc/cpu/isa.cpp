#include "isa.h"

#include <atomic>
#include <cstdlib>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace rnnfast::cpu {
namespace {

struct Isa {
  const char* name;
  bool (*fits)();
  const Kernels* kernels[4];             // in the order of DType
  const PanelForward* panel_forward[3];  // in the order of PanelType
  const VariantKernels* variants[4];     // in the order of DType
  const Kernels* float32_in_bf16;        // float32 with products in bfloat16, or null
  // Asks the system, the first time, for what the kernels of bfloat16 and of float32_in_bf16 need; null: nothing.
  bool (*granted)();
};

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
bool has_avx512_bf16() { return has_avx512_vnni() && __builtin_cpu_supports("avx512bf16"); }

[[maybe_unused]] constexpr long kTileData = 18;  // XFEATURE_XTILEDATA

bool has_amx_bf16() {
  constexpr unsigned kTiles = 1u << 24, kBFloat16 = 1u << 22;  // of edx, CPUID leaf 7
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!has_avx512_bf16() || !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  if ((edx & (kTiles | kBFloat16)) != (kTiles | kBFloat16)) return false;
#if defined(__linux__)
  constexpr long kSupported = 0x1021;  // ARCH_GET_XCOMP_SUPP
  uint64_t features = 0;
  return syscall(SYS_arch_prctl, kSupported, &features) == 0 && (features >> kTileData & 1);
#else
  return false;
#endif
}

// Linux hands the tile registers to a process that asks for them. Not before they are used: from then on the process's
// stacks for signals have to be larger.
bool tiles_granted() {
#if defined(__linux__)
  constexpr long kRequest = 0x1023;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}

#define RNNFAST_KERNELS_WITH(isa) \
  {&kernels_avx512_float32, &kernels_avx512_float64, &kernels_##isa##_bfloat16, &kernels_avx512_float16}
#define RNNFAST_PANELS_WITH_VNNI \
  {&panel_forward_avx512_float32, &panel_forward_avx512_bfloat16, &panel_forward_avx512_vnni_int8}
#endif

// The first that fits is the default.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"amx_bf16", has_amx_bf16, RNNFAST_KERNELS_WITH(amx_bf16), RNNFAST_PANELS_WITH_VNNI, RNNFAST_VARIANTS_OF(avx512),
     &kernels_amx_bf16_float32, tiles_granted},
    {"avx512_bf16", has_avx512_bf16, RNNFAST_KERNELS_WITH(avx512_bf16), RNNFAST_PANELS_WITH_VNNI,
     RNNFAST_VARIANTS_OF(avx512), &kernels_avx512_bf16_float32, nullptr},
    {"avx512_vnni", has_avx512_vnni, RNNFAST_KERNELS_OF(avx512), RNNFAST_PANELS_WITH_VNNI, RNNFAST_VARIANTS_OF(avx512),
     nullptr, nullptr},
    {"avx512", has_avx512, RNNFAST_KERNELS_OF(avx512), RNNFAST_PANELS_OF(avx512), RNNFAST_VARIANTS_OF(avx512), nullptr,
     nullptr},
    {"avx2", has_avx2, RNNFAST_KERNELS_OF(avx2), RNNFAST_PANELS_OF(avx2), RNNFAST_VARIANTS_OF(avx2), nullptr, nullptr},
#endif
    {"portable", [] { return true; }, RNNFAST_KERNELS_OF(portable), RNNFAST_PANELS_OF(portable),
     RNNFAST_VARIANTS_OF(portable), nullptr, nullptr},
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

std::atomic<bool> bf16_allowed{false};

std::atomic<const Isa*>& current() {
  static std::atomic<const Isa*> value{initial()};
  return value;
}

}  // namespace

const Kernels& kernels(DType dtype) {
  const Isa* isa = current().load(std::memory_order_acquire);
  const bool rounded = dtype == DType::float32 && isa->float32_in_bf16 && bf16_allowed.load(std::memory_order_relaxed);
  // What the system refuses the next ISA does without.
  if ((rounded || dtype == DType::bfloat16) && isa->granted && !isa->granted()) ++isa;
  return rounded ? *isa->float32_in_bf16 : *isa->kernels[static_cast<int>(dtype)];
}

void allow_bf16(bool allowed) { bf16_allowed.store(allowed, std::memory_order_relaxed); }

PanelForward panel_forward(PanelType type) {
  return *current().load(std::memory_order_acquire)->panel_forward[static_cast<int>(type)];
}

const VariantKernels& variant_kernels(DType dtype) {
  return *current().load(std::memory_order_acquire)->variants[static_cast<int>(dtype)];
}

std::string use_isa(const std::string& name) {
  if (!name.empty()) {
    const Isa* found = find(name);
    if (!found) return "";
    current().store(found, std::memory_order_release);
  }
  return current().load(std::memory_order_acquire)->name;
}

std::string processor_vendor() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_is("intel")) return "intel";
  if (__builtin_cpu_is("amd")) return "amd";
#endif
  return "";
}

}  // namespace rnnfast::cpu

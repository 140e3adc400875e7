// How the kernels are launched, and how much of an SM they take: what benchmarks/launches.py asks. Host code, for the
// host compiler with -DRNNFAST_EMULATED: threads and shared memory come from the very headers that launch the kernels,
// and the rules of allocation from NVIDIA's own calculator, cuda_occupancy.h of the CUDA toolkit.
//
//   occupancy launches      a line for each kernel: kind, family, arithmetic (numbers), the kernel's type, its exchange
//                           ("": none), tiles of batch indices (of a row kernel units an access, 0: one, and the kernel
//                           is not named for it), threads a block,
//                           bytes of dynamic shared memory a block, passes and chunks whose weights are in registers
//                           (persistent.h); between tabs. Threads and shared memory of the persistent kernels are
//                           chosen when they are launched: of threads the most stands here, of shared memory -1
//   occupancy most          for each architecture the most shared memory that plan.h asks for
//   occupancy occupancy     for each line of stdin, "major minor threads registers static dynamic": the blocks that an
//                           SM holds, their warps, the warps that it could hold, and what limits the blocks
#include <cuda_occupancy.h>
#include <cxxabi.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <typeinfo>

#include "cuda/persistent/launch.cuh"
#include "cuda/plan.h"
#include "cuda/split/launch.cuh"
#include "cuda/step/launch.cuh"
#include "cuda/variants/launch.cuh"

namespace {

using rnnfast::Family;

// ---- launches -------------------------------------------------------------------------------------------------------

std::string type_name(const std::type_info& type) {
  char* name = abi::__cxa_demangle(type.name(), nullptr, nullptr, nullptr);
  const std::string copy = name;
  std::free(name);
  return copy;
}

struct Launched {
  const char* exchange;
  int tiles, threads, shared;
  rnnfast::gpu::InRegisters held;
};
template <class Kernel> std::string line_of(const Launched& launched) {
  const std::string type = type_name(typeid(Kernel));
  std::string line = std::string(Kernel::kName) + type.substr(type.find('<')) + "\t" + launched.exchange;
  for (const int number :
       {launched.tiles, launched.threads, launched.shared, launched.held.passes, launched.held.chunks})
    line += "\t" + std::to_string(number);
  return line + "\n";
}

// An InstanceTable of these has what every unit has.
template <Family kFamily, class Type> struct StepLaunches {
  static std::string kernels() {
    std::string lines;
    rnnfast::gpu::for_each_kernel<kFamily, Type>(
        [&]<class Kernel, int kTiles>(Kernel, std::integral_constant<int, kTiles>) {
          using Product = typename Kernel::template Product<kTiles>;
          lines += line_of<Kernel>({"", kTiles, Product::kThreads, Product::kSharedBytes, {0, 0}});
        });
    return lines;
  }
};
template <Family kFamily, class Type> struct PersistentLaunches {
  static std::string kernels() {
    using namespace rnnfast::gpu;
    std::string lines;
    for_each_persistent_kernel<kFamily, Type>(
        [&]<class Kernel, Exchange kExchange, int kTiles>(Kernel, std::integral_constant<Exchange, kExchange>,
                                                          std::integral_constant<int, kTiles>) {
          lines += line_of<Kernel>({name_of(kExchange), kTiles, kMostWarps * static_cast<int>(kWarpSize), -1,
                                    in_registers(kExchange, Type::kArithmetic, kTiles, Kernel::kBackward)});
        });
    return lines;
  }
};
template <Family kFamily> struct PersistentLaunches<kFamily, rnnfast::gpu::Float64> {
  static std::string kernels() { return ""; }
};

template <Family kFamily, class Type> struct SplitLaunches {
  static std::string kernels() {
    std::string lines;
    rnnfast::gpu::for_each_split_kernel<kFamily, Type>(
        [&]<class Kernel, int kWidth>(Kernel, std::integral_constant<int, kWidth>) {
          lines += line_of<Kernel>({"", kWidth, rnnfast::gpu::kRowThreads, 0, {0, 0}});
        });
    return lines;
  }
};
// Those of float32.
template <Family kFamily> struct SplitLaunches<kFamily, rnnfast::gpu::Tf32> {
  static std::string kernels() { return ""; }
};

template <Family kFamily, class Type> struct VariantLaunches {
  static std::string kernels() {
    std::string lines;
    if constexpr (rnnfast::gpu::has_options(kFamily))
      rnnfast::gpu::for_each_variant_kernel<kFamily, Type>([&]<class Kernel>(Kernel) {
        constexpr int kShared = static_cast<int>(rnnfast::gpu::block_sums_bytes(sizeof(typename Type::Compute)));
        lines += line_of<Kernel>({"", 0, rnnfast::gpu::kRowThreads, kShared, {0, 0}});
      });
    return lines;
  }
};
// Those of float32.
template <Family kFamily> struct VariantLaunches<kFamily, rnnfast::gpu::Tf32> {
  static std::string kernels() { return ""; }
};

template <template <Family, class> class Launches> void print_launches(const char* kind) {
  for (int family = 0; family < rnnfast::gpu::kFamilies; ++family) {
    for (int arithmetic = 0; arithmetic <= static_cast<int>(rnnfast::gpu::Arithmetic::float16); ++arithmetic) {
      const std::string& lines = rnnfast::gpu::InstanceTable<Launches>::of(
          static_cast<Family>(family), static_cast<rnnfast::gpu::Arithmetic>(arithmetic));
      for (size_t begin = 0; begin < lines.size();) {
        const size_t end = lines.find('\n', begin);
        std::printf("%s\t%d\t%d\t%s\n", kind, family, arithmetic, lines.substr(begin, end - begin).c_str());
        begin = end + 1;
      }
    }
  }
}

// ---- occupancy ------------------------------------------------------------------------------------------------------

// Of an SM, as the table "Technical Specifications per Compute Capability" of NVIDIA's CUDA C++ Programming Guide has
// them (libcudacxx has the same numbers in cuda/__device/arch_traits.h). cuda_occupancy.h knows the rest: blocks an SM,
// and in what pieces registers and shared memory are given out.
struct Limits {
  int major, minor, threads, shared_kb;
};
constexpr Limits kLimits[] = {{8, 0, 2048, 164}, {8, 6, 1536, 100},  {8, 9, 1536, 100},
                              {9, 0, 2048, 228}, {10, 0, 2048, 228}, {12, 0, 1536, 100}};
// The same on all of them. CUDA itself takes 1 KB of shared memory for each block, so the most that a block may ask for
// is that much less than what an SM has.
constexpr int kRegisters = 64 << 10, kThreadsOfBlock = 1024, kWarp = 32;
constexpr size_t kReserved = 1 << 10, kDefaultShared = 48 << 10;

const Limits* limits_of(int major, int minor) {
  for (const Limits& limits : kLimits)
    if (limits.major == major && limits.minor == minor) return &limits;
  return nullptr;
}

std::string limited_by(unsigned factors) {
  constexpr struct {
    unsigned factor;
    const char* name;
  } kNames[] = {{OCC_LIMIT_REGISTERS, "registers"},
                {OCC_LIMIT_SHARED_MEMORY, "shared memory"},
                {OCC_LIMIT_WARPS, "threads"},
                {OCC_LIMIT_BLOCKS, "blocks"}};
  std::string text;
  for (const auto& name : kNames)
    if (factors & name.factor) text += (text.empty() ? "" : " and ") + std::string(name.name);
  return text;
}

// False where the calculator does not know the architecture.
bool print_occupancy(int major, int minor, int threads, int registers, size_t fixed, size_t dynamic) {
  const Limits* limits = limits_of(major, minor);
  if (!limits) return false;
  cudaOccDeviceProp device;
  device.computeMajor = major;
  device.computeMinor = minor;
  device.maxThreadsPerBlock = kThreadsOfBlock;
  device.maxThreadsPerMultiprocessor = limits->threads;
  device.regsPerBlock = device.regsPerMultiprocessor = kRegisters;
  device.warpSize = kWarp;
  device.sharedMemPerBlock = kDefaultShared;
  device.sharedMemPerMultiprocessor = static_cast<size_t>(limits->shared_kb) << 10;
  device.sharedMemPerBlockOptin = device.sharedMemPerMultiprocessor - kReserved;
  device.reservedSharedMemPerBlock = kReserved;
  device.numSms = 1;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = threads;
  kernel.numRegs = registers;
  kernel.sharedSizeBytes = fixed;
  // As primitives/launch.h asks for it.
  kernel.maxDynamicSharedSizeBytes = dynamic;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  const cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, dynamic) != CUDA_OCC_SUCCESS)
    return false;
  const int blocks = result.activeBlocksPerMultiprocessor;
  std::printf("%d\t%d\t%d\t%s\n", blocks, blocks * ((threads + kWarp - 1) / kWarp), limits->threads / kWarp,
              limited_by(result.limitingFactors).c_str());
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string task = count == 2 ? arguments[1] : "";
  if (task == "launches") {
    print_launches<StepLaunches>("step");
    print_launches<PersistentLaunches>("persistent");
    print_launches<SplitLaunches>("split");
    print_launches<VariantLaunches>("variant");
    return 0;
  }
  if (task == "most") {
    for (const rnnfast::gpu::DeviceProperties& card : rnnfast::gpu::cards())
      std::printf("%d\t%d\n", card.sm, card.shared_per_block);
    return 0;
  }
  if (task != "occupancy") {
    std::fprintf(stderr, "usage: occupancy launches | most | occupancy\n");
    return 2;
  }
  int major, minor, threads, registers;
  size_t fixed, dynamic;
  while (std::scanf("%d %d %d %d %zu %zu", &major, &minor, &threads, &registers, &fixed, &dynamic) == 6) {
    if (!print_occupancy(major, minor, threads, registers, fixed, dynamic)) std::printf("unknown\n");
  }
  return 0;
}

// Host side: launches a kernel and waits for a stream. Both give the empty string, or what went wrong in words a user
// can act upon.
#pragma once

#include <map>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <utility>

#include "platform.h"

namespace rnnfast::gpu {

struct LaunchConfig {
  Dim3 grid;
  unsigned threads = 1;
  size_t shared_bytes = 0;
  unsigned cluster = 1;      // blocks a cluster, along x; more than 1 needs sm_90
  bool cooperative = false;  // every block resident at once: grid_sync is allowed
  bool dependent = false;    // may start before the launch before it has ended (sm_90; else no difference)
  bool most_shared = false;  // an SM's shared memory is as large as can be, at the cost of its L1 cache
  void* stream = nullptr;
  const char* name = "kernel";
};

#if defined(RNNFAST_EMULATED)

template <class... P, class... Args>
std::string launch(const LaunchConfig& config, void (*kernel)(P...), Args... args) {
  emulator::Launch request;
  request.name = config.name;
  request.entry = reinterpret_cast<const void*>(kernel);
  request.grid = config.grid;
  request.threads = config.threads;
  request.shared_bytes = config.shared_bytes;
  request.cluster = config.cluster;
  request.cooperative = config.cooperative;
  request.dependent = config.dependent;
  try {
    // Each thread gets its own copies, as kernel parameters are.
    emulator::launch(request,
                     [kernel, values = std::tuple<std::remove_cv_t<P>...>(args...)] { std::apply(kernel, values); });
  } catch (const std::exception& error) { return error.what(); }
  return {};
}

inline std::string synchronize(void* /*stream*/) {
  try {
    emulator::synchronize();
  } catch (const std::exception& error) { return error.what(); }
  return {};
}

#else

namespace detail {

// The error with the advice that its kind calls for.
inline std::string error_text(cudaError_t error, const char* name) {
  std::string text =
      std::string("CUDA kernel ") + name + ": " + cudaGetErrorName(error) + ": " + cudaGetErrorString(error);
  // Questions about a kernel that has no code for the card are answered with the second.
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) == cudaSuccess &&
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess)
      text += ". The card has compute capability " + std::to_string(major) + "." + std::to_string(minor);
    text += ". RNNFAST_CUDA_ARCHS chooses what rnnfast is built for.";
  }
  if (error == cudaErrorInsufficientDriver || error == cudaErrorUnsupportedPtxVersion) {
    int driver = 0, runtime = 0;
    if (cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&runtime) == cudaSuccess) {
      const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
      text += driver == 0 ? ". No NVIDIA driver is loaded." : ". The driver is for CUDA " + version(driver) + ".";
      text += " rnnfast was built with CUDA " + version(runtime) + ".";
    }
  }
  return text;
}

// More than 48 KB of shared memory, most of an SM as shared memory, and clusters of more than 8 blocks must be asked
// for, once a kernel and device. The limits are the process's, and so is what is known of them: a thread that knew only
// what it had raised by itself would lower what another has raised.
inline cudaError_t raise_limits(const void* kernel, const LaunchConfig& config) {
  constexpr size_t kDefaultShared = 48 << 10;
  constexpr unsigned kPortableCluster = 8;
  const bool large = config.cluster > kPortableCluster;
  if (config.shared_bytes <= kDefaultShared && !large && !config.most_shared) return cudaSuccess;
  struct Raised {
    size_t bytes = kDefaultShared;
    bool large_clusters = false, most_shared = false;
  };
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Raised> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard lock(mutex);
  Raised& raised = known[{kernel, device}];
  if (raised.bytes < config.shared_bytes) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                   static_cast<int>(config.shared_bytes));
    if (error != cudaSuccess) return error;
    raised.bytes = config.shared_bytes;
  }
  if (large && !raised.large_clusters) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
    if (error != cudaSuccess) return error;
    raised.large_clusters = true;
  }
  if (config.most_shared && !raised.most_shared) {
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                                   static_cast<int>(cudaSharedmemCarveoutMaxShared));
    if (error != cudaSuccess) return error;
    raised.most_shared = true;
  }
  return cudaSuccess;
}

}  // namespace detail

template <class... P, class... Args>
std::string launch(const LaunchConfig& config, void (*kernel)(P...), Args... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  cudaLaunchAttribute attributes[3];
  cudaLaunchConfig_t request{};
  request.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
  request.blockDim = dim3(config.threads);
  request.dynamicSmemBytes = config.shared_bytes;
  request.stream = static_cast<cudaStream_t>(config.stream);
  request.attrs = attributes;
  if (config.cluster > 1) {
    cudaLaunchAttribute& attribute = attributes[request.numAttrs++];
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  }
  if (config.cooperative) {
    cudaLaunchAttribute& attribute = attributes[request.numAttrs++];
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  if (config.dependent) {
    cudaLaunchAttribute& attribute = attributes[request.numAttrs++];
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
  }
  cudaError_t error = detail::raise_limits(function, config);
  if (error == cudaSuccess) {
    std::tuple<std::remove_cv_t<P>...> values(args...);
    error = std::apply(
        [&](auto&... value) {
          void* addresses[sizeof...(value) + 1] = {static_cast<void*>(&value)..., nullptr};
          return cudaLaunchKernelExC(&request, function, addresses);
        },
        values);
  }
  if (error == cudaSuccess) return {};
  // Clears the sticky copy of it, which a later check would take for its own.
  static_cast<void>(cudaGetLastError());
  return detail::error_text(error, config.name);
}

inline std::string synchronize(void* stream) {
  const cudaError_t error = cudaStreamSynchronize(static_cast<cudaStream_t>(stream));
  return error == cudaSuccess ? std::string() : detail::error_text(error, "(synchronize)");
}

#endif

}  // namespace rnnfast::gpu

#include "device.h"

#include <atomic>
#include <cstring>

#include "primitives/launch.h"

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)

int device_count() { return 1; }
std::string device_problem() { return ""; }
bool has_dependent_launch() { return true; }
std::string device_memory(int, int64_t&, int64_t&) { return ""; }

namespace {
void copy_bytes(void* to, const void* from, int64_t bytes) { std::memcpy(to, from, static_cast<size_t>(bytes)); }
void zero_bytes(void* to, int64_t bytes) { std::memset(to, 0, static_cast<size_t>(bytes)); }
}  // namespace
// As all that is on the stream: behind the launches before it.
std::string copy_on_device(void* to, const void* from, int64_t bytes, void* /*stream*/) {
  LaunchConfig config;
  config.name = "copy_on_device";
  return launch(config, copy_bytes, to, from, bytes);
}
std::string zero_on_device(void* to, int64_t bytes, void* /*stream*/) {
  LaunchConfig config;
  config.name = "zero_on_device";
  return launch(config, zero_bytes, to, bytes);
}

#else

namespace {
// Stands for all kernels: each is built for the same architectures.
RNNFAST_KERNEL void probe() {}
}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  static_cast<void>(cudaGetLastError());
  return 0;
}

std::string device_problem() {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  cudaFuncAttributes attributes;
  if (error == cudaSuccess && count > 0)
    error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe));
  if (error == cudaSuccess && count > 0) return "";
  static_cast<void>(cudaGetLastError());
  // Without a driver the runtime calls it too old.
  int driver = 0;
  if (count == 0 && (cudaDriverGetVersion(&driver) != cudaSuccess || driver == 0))
    return "no CUDA device: there is no NVIDIA driver";
  if (error == cudaSuccess || error == cudaErrorNoDevice) return "no CUDA device";
  return detail::error_text(error, "probe");
}

namespace {
std::string told(cudaError_t error, const char* name) {
  if (error == cudaSuccess) return "";
  static_cast<void>(cudaGetLastError());
  return detail::error_text(error, name);
}
}  // namespace

std::string copy_on_device(void* to, const void* from, int64_t bytes, void* stream) {
  return told(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                              static_cast<cudaStream_t>(stream)),
              "copy_on_device");
}
std::string zero_on_device(void* to, int64_t bytes, void* stream) {
  return told(cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)), "zero_on_device");
}

// Not the card alone decides: of a build for 8.0 a later card runs kernels in which the wait is left out, and a launch
// that may overlap with the one before it would be wrong.
bool has_dependent_launch() {
  constexpr int kMostDevices = 64, kHopper = 90;
  enum Known : int8_t { unknown, no, yes };
  static std::atomic<int8_t> known[kMostDevices];
  int device = 0;
  if (cudaGetDevice(&device) != cudaSuccess) static_cast<void>(cudaGetLastError()), device = -1;
  if (device < 0 || device >= kMostDevices) return false;
  int8_t answer = known[device].load(std::memory_order_relaxed);
  if (answer == unknown) {
    int major = 0;
    cudaFuncAttributes attributes;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(probe)) != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return false;
    }
    answer = 10 * major >= kHopper && attributes.ptxVersion >= kHopper ? yes : no;
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer == yes;
}

std::string device_memory(int device, int64_t& free, int64_t& total) {
  int before = 0;
  size_t free_bytes = 0, total_bytes = 0;
  cudaError_t error = cudaGetDevice(&before);
  const bool known = error == cudaSuccess;
  if (known) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaMemGetInfo(&free_bytes, &total_bytes);
  if (error == cudaSuccess) {
    free = static_cast<int64_t>(free_bytes);
    total = static_cast<int64_t>(total_bytes);
  }
  // Whatever came of it: who called goes on with its own device.
  if (known) static_cast<void>(cudaSetDevice(before));
  static_cast<void>(cudaGetLastError());
  if (error == cudaSuccess || error == cudaErrorMemoryAllocation) return "";
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

#endif

}  // namespace rnnfast::gpu

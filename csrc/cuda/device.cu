#include "device.h"

#include "primitives/launch.h"

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)

int device_count() { return 1; }
std::string device_problem() { return ""; }
bool has_dependent_launch(int) { return true; }

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

bool has_dependent_launch(int device) {
  int major = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess) return major >= 9;
  static_cast<void>(cudaGetLastError());
  return false;
}

#endif

}  // namespace rnnfast::gpu

// Host side: how many blocks of a launch the current device can hold at the same time.
#pragma once

#include "launch.h"

namespace rnnfast::gpu {

// Blocks, of clusters whole ones; 0 where the device cannot run the kernel at all. `error`: what the device said, or
// "".
template <class... P> int64_t blocks_at_once(const LaunchConfig& config, void (*kernel)(P...), std::string& error) {
  error.clear();
#if defined(RNNFAST_EMULATED)
  static_cast<void>(kernel);
  return emulator::options().device_blocks / config.cluster * config.cluster;
#else
  const void* function = reinterpret_cast<const void*>(kernel);
  int count = 0, device = 0, sms = 0;
  cudaError_t code = detail::raise_limits(function, config);
  if (code == cudaSuccess && config.cluster > 1) {
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = config.cluster;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t request{};
    request.gridDim = dim3(config.grid.x, config.grid.y, config.grid.z);
    request.blockDim = dim3(config.threads);
    request.dynamicSmemBytes = config.shared_bytes;
    request.attrs = &attribute;
    request.numAttrs = 1;
    code = cudaOccupancyMaxActiveClusters(&count, function, &request);
    if (code == cudaSuccess) return int64_t{count} * config.cluster;
  } else if (code == cudaSuccess) {
    code = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&count, function, static_cast<int>(config.threads),
                                                         config.shared_bytes);
    if (code == cudaSuccess) code = cudaGetDevice(&device);
    if (code == cudaSuccess) code = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device);
    if (code == cudaSuccess) return int64_t{count} * sms;
  }
  static_cast<void>(cudaGetLastError());
  error = detail::error_text(code, config.name);
  return 0;
#endif
}

}  // namespace rnnfast::gpu

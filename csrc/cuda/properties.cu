#include "properties.h"

#include <map>
#include <mutex>

#include "device.h"
#include "primitives/launch.h"

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)

std::string current_properties(DeviceProperties& properties) {
  // A small one: every thread is a fiber, and blocks of a cluster or a cooperative launch all exist at once.
  properties = device_properties(90);
  properties.name = "emulator";
  properties.sms = 6;
  properties.largest_cluster = 4;
  return "";
}

#else

namespace {

// As a persistent kernel, of which an SM holds one: how many clusters of it run at the same time is a matter of where
// the card's SMs are.
RNNFAST_KERNEL void cluster_probe() {}

int clusters_at_once(int size, int sms, int shared_bytes) {
  const void* const function = reinterpret_cast<const void*>(cluster_probe);
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = static_cast<unsigned>(size);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(size * sms));
  config.blockDim = dim3(kMostWarps * 32);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.attrs = &attribute;
  config.numAttrs = 1;
  int count = 0;
  if (cudaOccupancyMaxActiveClusters(&count, function, &config) == cudaSuccess) return count;
  // A size that this card does not have.
  static_cast<void>(cudaGetLastError());
  return 0;
}

void ask_for_clusters(DeviceProperties& found) {
  const void* const function = reinterpret_cast<const void*>(cluster_probe);
  if (cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, found.shared_per_block) !=
          cudaSuccess ||
      cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return;
  }
  for (int size = 2; size <= kMostCluster; ++size) {
    const int count = clusters_at_once(size, found.sms, found.shared_per_block);
    found.known_clusters[static_cast<size_t>(size)] = count;
    if (count > 0) found.largest_cluster = size;
  }
}

std::string ask(int device, DeviceProperties& found) {
  int major = 0, minor = 0, khz = 0, cooperative = 0, clusters = 0, l2 = 0;
  const std::pair<int*, cudaDeviceAttr> attributes[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&found.sms, cudaDevAttrMultiProcessorCount},
      {&found.shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&khz, cudaDevAttrClockRate},
      {&cooperative, cudaDevAttrCooperativeLaunch},
      {&clusters, cudaDevAttrClusterLaunch},
      {&l2, cudaDevAttrL2CacheSize},
  };
  for (const auto& [value, attribute] : attributes) {
    if (const cudaError_t error = cudaDeviceGetAttribute(value, attribute, device); error != cudaSuccess) {
      static_cast<void>(cudaGetLastError());
      return std::string("the device does not say what it is: ") + cudaGetErrorString(error);
    }
  }
  found.name = "current device";
  found.index = device;
  found.sm = 10 * major + minor;
  found.cooperative = cooperative != 0;
  found.clock_ghz = khz > 0 ? 1e-6 * khz : cards()[column_of(found.sm)].clock_ghz;
  found.l2_bytes = l2;
  found.largest_cluster = 0;
  // Not the card alone decides: of a build for 8.0 a later card runs kernels without what clusters need.
  if (clusters && has_dependent_launch()) ask_for_clusters(found);
  return "";
}

}  // namespace

std::string current_properties(DeviceProperties& properties) {
  static std::mutex mutex;
  static std::map<int, DeviceProperties> known;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) {
    static_cast<void>(cudaGetLastError());
    return std::string("no current device: ") + cudaGetErrorString(error);
  }
  const std::lock_guard lock(mutex);
  if (const auto found = known.find(device); found != known.end()) {
    properties = found->second;
    return "";
  }
  DeviceProperties asked;
  std::string error = ask(device, asked);
  if (error.empty()) properties = known[device] = asked;
  return error;
}

#endif

}  // namespace rnnfast::gpu

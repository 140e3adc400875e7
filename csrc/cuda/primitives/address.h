// Shared memory addresses: as the instructions want them on the device, and the checks of the emulated bodies, which
// are of what the hardware would fault on or silently get wrong (state space, alignment, bounds).
#pragma once

#include <cstddef>
#include <cstdint>

#include "platform.h"

#if defined(RNNFAST_EMULATED)

#include <string>

namespace rnnfast::gpu::emulated {

inline void require_aligned(const void* address, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    emulator::fail(std::string(what) + ": an address that is not a multiple of " + std::to_string(alignment) +
                   " bytes");
  }
}

// The address lies in shared memory of a block; which block's is returned as whether it is the caller's own.
inline bool in_own_shared(const void* address, size_t bytes) {
  const auto* begin = reinterpret_cast<const std::byte*>(emulator::shared_memory());
  const auto* first = static_cast<const std::byte*>(address);
  return first >= begin && first + bytes <= begin + emulator::shared_bytes();
}

inline void require_own_shared(const void* address, size_t bytes, size_t alignment, const char* what) {
  require_aligned(address, alignment, what);
  if (!in_own_shared(address, bytes)) {
    emulator::fail(std::string(what) + ": " + std::to_string(bytes) +
                   " bytes that are not all in the block's shared memory");
  }
}

// The block of the cluster, the caller's own included, in whose shared memory the bytes lie: its rank.
inline unsigned require_cluster_shared(const void* address, size_t bytes, size_t alignment, const char* what) {
  require_aligned(address, alignment, what);
  const auto* first = static_cast<const std::byte*>(address);
  for (unsigned rank = 0; rank < emulator::self().cluster_size; ++rank) {
    const auto* begin = static_cast<const std::byte*>(emulator::in_peer(emulator::shared_memory(), rank));
    if (first >= begin && first + bytes <= begin + emulator::shared_bytes()) return rank;
  }
  emulator::fail(std::string(what) + ": " + std::to_string(bytes) +
                 " bytes that are not all in shared memory of the cluster");
}

}  // namespace rnnfast::gpu::emulated

#else

namespace rnnfast::gpu {

// An address in the shared window, for instructions with a .shared operand.
RNNFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace rnnfast::gpu

#endif

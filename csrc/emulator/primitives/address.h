// The checks of shared memory addresses that the emulated bodies make: of what the hardware would fault on or silently
// get wrong (state space, alignment, bounds).
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../emulator.h"

namespace rnnfast::emulator {

inline void require_aligned(const void* address, size_t alignment, const char* what) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) {
    fail(std::string(what) + ": an address that is not a multiple of " + std::to_string(alignment) + " bytes");
  }
}

// The address lies in shared memory of a block; which block's is returned as whether it is the caller's own.
inline bool in_own_shared(const void* address, size_t bytes) {
  const auto* begin = reinterpret_cast<const std::byte*>(shared_memory());
  const auto* first = static_cast<const std::byte*>(address);
  return first >= begin && first + bytes <= begin + shared_bytes();
}

inline void require_own_shared(const void* address, size_t bytes, size_t alignment, const char* what) {
  require_aligned(address, alignment, what);
  if (!in_own_shared(address, bytes)) {
    fail(std::string(what) + ": " + std::to_string(bytes) + " bytes that are not all in the block's shared memory");
  }
}

// The block of the cluster, the caller's own included, in whose shared memory the bytes lie: its rank.
inline unsigned require_cluster_shared(const void* address, size_t bytes, size_t alignment, const char* what) {
  require_aligned(address, alignment, what);
  const auto* first = static_cast<const std::byte*>(address);
  for (unsigned rank = 0; rank < self().cluster_size; ++rank) {
    const auto* begin = static_cast<const std::byte*>(in_peer(shared_memory(), rank));
    if (first >= begin && first + bytes <= begin + shared_bytes()) return rank;
  }
  fail(std::string(what) + ": " + std::to_string(bytes) + " bytes that are not all in shared memory of the cluster");
}

}  // namespace rnnfast::emulator

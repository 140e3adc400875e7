// Shared memory addresses as the instructions want them.
#pragma once

#include <cstdint>

#include "platform.h"

#if !defined(RNNFAST_EMULATED)

namespace rnnfast::gpu {

// An address in the shared window, for instructions with a .shared operand.
RNNFAST_DEVICE uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

}  // namespace rnnfast::gpu

#endif

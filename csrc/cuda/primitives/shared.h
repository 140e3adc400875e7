// Dynamic shared memory of the block, the one accessor. 128-byte aligned; holds NaN bytes at first in the emulator,
// which gives each block exactly as many bytes as the launch asked for (ASan sees an overrun).
#pragma once

#include "platform.h"

namespace rnnfast::gpu {

RNNFAST_DEVICE std::byte* shared_memory() {
#if defined(RNNFAST_EMULATED)
  return emulator::shared_memory();
#else
  extern __shared__ __align__(128) unsigned char rnnfast_shared_memory[];
  return reinterpret_cast<std::byte*>(rnnfast_shared_memory);
#endif
}

}  // namespace rnnfast::gpu

// Copies that run beside the threads. cp_async and bulk stores are waited for by whoever issued them, in groups;
// bulk_copy and st_async report their bytes to an mbarrier. Their data is visible to the waiting thread then, and to
// others after a barrier. bulk_* need sm_90 and read and write through the asynchronous proxy: what threads have
// written to the source, or to the destination, needs fence_async_proxy before.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "address.h"
#include "mbarrier.h"
#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include "../../emulator/primitives/async_copy.h"
#else
#include <cuda/ptx>
#endif

namespace rnnfast::gpu {

// Copies 4, 8 or 16 bytes, which both addresses are multiples of, from global to shared memory; writes zeros and does
// not read if not `valid`.
template <int bytes> RNNFAST_DEVICE void cp_async(void* shared, const void* global, bool valid = true RNNFAST_SITE) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if defined(RNNFAST_EMULATED)
  emulator::cp_async<bytes>(shared, global, valid, site);
#else
  const uint32_t destination = shared_address(shared);
  const uint64_t source = __cvta_generic_to_global(global);
  // What is written beyond source_bytes are zeros.
  const uint32_t source_bytes = valid ? bytes : 0;
  // Only 16 bytes may go past the L1 cache, where no second reader would profit from them.
  if constexpr (bytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(destination), "l"(source), "r"(source_bytes)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(destination), "l"(source), "n"(bytes),
                 "r"(source_bytes)
                 : "memory");
  }
#endif
}

// Ends the group of the copies issued since the last commit.
RNNFAST_DEVICE void cp_async_commit(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::cp_async_commit(site);
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Returns when at most the newest N groups of this thread are under way.
template <int N> RNNFAST_DEVICE void cp_async_wait(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::cp_async_wait<N>(site);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
#endif
}

// Copies a multiple of 16 bytes from global to shared memory; the barrier of the own block counts them.
RNNFAST_DEVICE void bulk_copy(void* shared, const void* global, uint32_t bytes, mbarrier* bar RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::bulk_copy(shared, global, bytes, bar, site);
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk(cuda::ptx::space_cluster, cuda::ptx::space_global, shared, global, bytes, bar);
#else
  __trap();
#endif
}

// Copies a multiple of 16 bytes from shared to global memory.
RNNFAST_DEVICE void bulk_store(void* global, const void* shared, uint32_t bytes RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::bulk_store(global, shared, bytes, site);
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk(cuda::ptx::space_global, cuda::ptx::space_shared, global, shared, bytes);
#else
  __trap();
#endif
}

RNNFAST_DEVICE void bulk_commit(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::bulk_commit(site);
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk_commit_group();
#else
  __trap();
#endif
}

// Returns when at most the newest N groups of this thread's bulk stores are not yet in global memory.
template <int N> RNNFAST_DEVICE void bulk_wait(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::bulk_wait<N>(site);
#elif RNNFAST_SM90
  cuda::ptx::cp_async_bulk_wait_group(cuda::ptx::n32_t<N>{});
#else
  __trap();
#endif
}

// Stores a value of 4, 8 or 16 bytes in the shared memory of a block of the cluster; a barrier there counts the bytes.
// Both addresses are from map_to_rank, of the same rank.
template <class T>
RNNFAST_DEVICE void st_async(std::type_identity_t<T> value, T* peer_shared, mbarrier* peer_bar RNNFAST_SITE) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);
  static_assert(std::is_trivially_copyable_v<T>);
#if defined(RNNFAST_EMULATED)
  emulator::st_async(value, peer_shared, peer_bar, site);
#elif RNNFAST_SM90
  if constexpr (sizeof(T) == 4) {
    uint32_t word;
    memcpy(&word, &value, sizeof(T));
    cuda::ptx::st_async(reinterpret_cast<uint32_t*>(peer_shared), word, peer_bar);
  } else if constexpr (sizeof(T) == 8) {
    uint64_t word;
    memcpy(&word, &value, sizeof(T));
    cuda::ptx::st_async(reinterpret_cast<uint64_t*>(peer_shared), word, peer_bar);
  } else {
    uint32_t words[4];
    memcpy(words, &value, sizeof(T));
    cuda::ptx::st_async(reinterpret_cast<uint32_t*>(peer_shared), words, peer_bar);
  }
#else
  __trap();
#endif
}

// Makes what this thread has written, and seen written, visible to bulk copies; a barrier comes between this and
// another thread's copy.
RNNFAST_DEVICE void fence_async_proxy(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::fence_async_proxy(site);
#elif RNNFAST_SM90
  cuda::ptx::fence_proxy_async();
#endif
}

}  // namespace rnnfast::gpu

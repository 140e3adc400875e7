// Global memory: strong accesses at gpu scope of 4, 8 and 16 bytes (each indivisible), polling, the fence, and plain
// 16-byte words. Relaxed accesses order nothing, not even each other: what one thread stored first another may see
// last.
#pragma once

#include <cstring>
#include <type_traits>

#include "platform.h"

#if defined(RNNFAST_EMULATED)
#include "../../emulator/primitives/memory.h"
#endif

namespace rnnfast::gpu {

struct alignas(16) Word16 {
  uint32_t x[4];
};

template <class T>
inline constexpr bool kStrongType =
    std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16);

#if defined(__CUDACC__)
namespace detail {

// The register that carries a value of so many bytes.
template <size_t bytes> struct Register;
template <> struct Register<4> {
  using type = uint32_t;
};
template <> struct Register<8> {
  using type = uint64_t;
};
template <> struct Register<16> {
  using type = unsigned __int128;
};

}  // namespace detail

// One function for each instruction: the constraint letter depends on the size.
#define RNNFAST_STRONG_LOAD(order)                        \
  typename detail::Register<sizeof(T)>::type bits;        \
  if constexpr (sizeof(T) == 4)                           \
    asm volatile("ld." order ".gpu.global.b32 %0, [%1];"  \
                 : "=r"(bits)                             \
                 : "l"(__cvta_generic_to_global(address)) \
                 : "memory");                             \
  else if constexpr (sizeof(T) == 8)                      \
    asm volatile("ld." order ".gpu.global.b64 %0, [%1];"  \
                 : "=l"(bits)                             \
                 : "l"(__cvta_generic_to_global(address)) \
                 : "memory");                             \
  else                                                    \
    asm volatile("ld." order ".gpu.global.b128 %0, [%1];" \
                 : "=q"(bits)                             \
                 : "l"(__cvta_generic_to_global(address)) \
                 : "memory");                             \
  T value;                                                \
  memcpy(&value, &bits, sizeof(T));                       \
  return value
#define RNNFAST_STRONG_STORE(order)                                                                           \
  typename detail::Register<sizeof(T)>::type bits;                                                            \
  memcpy(&bits, &value, sizeof(T));                                                                           \
  if constexpr (sizeof(T) == 4)                                                                               \
    asm volatile("st." order ".gpu.global.b32 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "r"(bits)  \
                 : "memory");                                                                                 \
  else if constexpr (sizeof(T) == 8)                                                                          \
    asm volatile("st." order ".gpu.global.b64 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "l"(bits)  \
                 : "memory");                                                                                 \
  else                                                                                                        \
    asm volatile("st." order ".gpu.global.b128 [%0], %1;" ::"l"(__cvta_generic_to_global(address)), "q"(bits) \
                 : "memory")
#endif

template <class T> RNNFAST_DEVICE T load_relaxed(const T* address RNNFAST_SITE) {
  static_assert(kStrongType<T>);
#if defined(RNNFAST_EMULATED)
  return emulator::load_relaxed(address, site);
#else
  RNNFAST_STRONG_LOAD("relaxed");
#endif
}

template <class T> RNNFAST_DEVICE void store_relaxed(T* address, std::type_identity_t<T> value) {
  static_assert(kStrongType<T>);
#if defined(RNNFAST_EMULATED)
  emulator::store_relaxed(address, value);
#else
  RNNFAST_STRONG_STORE("relaxed");
#endif
}

// Sees what the thread whose store_release it reads wrote before that. Left out, it is a relaxed load.
template <class T> RNNFAST_DEVICE T load_acquire(const T* address RNNFAST_SITE) {
  static_assert(kStrongType<T>);
#if defined(RNNFAST_EMULATED)
  return emulator::load_acquire(address, site);
#else
  RNNFAST_STRONG_LOAD("acquire");
#endif
}

template <class T> RNNFAST_DEVICE void store_release(T* address, std::type_identity_t<T> value RNNFAST_SITE) {
  static_assert(kStrongType<T>);
#if defined(RNNFAST_EMULATED)
  emulator::store_release(address, value, site);
#else
  RNNFAST_STRONG_STORE("release");
#endif
}

#if defined(__CUDACC__) && !defined(RNNFAST_EMULATED)
#undef RNNFAST_STRONG_LOAD
#undef RNNFAST_STRONG_STORE
#endif

// Orders the thread's accesses before it and after it, for whoever has fences or acquires of its own.
RNNFAST_DEVICE void fence_gpu(RNNFAST_SITE_ALONE) {
#if defined(RNNFAST_EMULATED)
  emulator::fence_gpu(site);
#else
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
#endif
}

#if defined(__CUDACC__) && !defined(RNNFAST_EMULATED)
// As <cassert> has it, which a build with NDEBUG would leave out.
extern "C" __device__ void __assertfail(const char* message, const char* file, unsigned line, const char* function,
                                        size_t char_bytes) __attribute__((noreturn));
#endif

// How often a poll looks before it gives up: several seconds of a way to L2 and back. Only looks count, so that neither
// another program's share of the card nor a debugger's break ends a kernel.
constexpr unsigned kMostPolls = 1u << 24;

// Ends the launch with an error; what it was, and in which kernel, is printed.
RNNFAST_DEVICE void lose_block([[maybe_unused]] const char* kernel) {
#if defined(__CUDACC__) && !defined(RNNFAST_EMULATED)
  __assertfail("a block waited for seconds for what another has not sent: it is not running", "rnnfast", 0, kernel, 1);
#endif
}

// Loads, relaxed, until predicate(value) holds; returns that value. kernel: its name, for the error where nothing
// comes.
template <class T, class Predicate>
RNNFAST_DEVICE T poll(const T* address, Predicate predicate,
                      [[maybe_unused]] const char* kernel = "a kernel" RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  return emulator::poll(address, predicate, site);
#else
  for (unsigned polls = 0;; ++polls) {
    const T value = load_relaxed(address);
    if (predicate(value)) return value;
    if (polls == kMostPolls) lose_block(kernel);
  }
#endif
}

// As poll, of several addresses, each time all at once: they share the way to L2 and back.
template <class T, int kCount, class Predicate>
RNNFAST_DEVICE void poll_all(const T* const (&addresses)[kCount], Predicate predicate, T (&values)[kCount],
                             [[maybe_unused]] const char* kernel = "a kernel" RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  for (int i = 0; i < kCount; ++i) values[i] = emulator::poll(addresses[i], predicate, site);
#else
  for (unsigned polls = 0;; ++polls) {
    RNNFAST_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = load_relaxed(addresses[i]);
    bool all = true;
    RNNFAST_UNROLL
    for (int i = 0; i < kCount; ++i) all = predicate(values[i]) && all;
    if (all) return;
    if (polls == kMostPolls) lose_block(kernel);
  }
#endif
}

// As poll, and acquires.
template <class T, class Predicate>
RNNFAST_DEVICE T poll_acquire(const T* address, Predicate predicate,
                              [[maybe_unused]] const char* kernel = "a kernel" RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  return emulator::poll_acquire(address, predicate, site);
#else
  for (unsigned polls = 0;; ++polls) {
    const T value = load_acquire(address);
    if (predicate(value)) return value;
    if (polls == kMostPolls) lose_block(kernel);
  }
#endif
}

// Plain words: addresses are multiples of 16. load_read_only: of what nothing writes while the kernel runs.
RNNFAST_DEVICE Word16 load_global(const void* address) {
#if defined(RNNFAST_EMULATED)
  emulator::check_aligned(address, sizeof(Word16));
#endif
  return *static_cast<const Word16*>(address);
}

RNNFAST_DEVICE void store_global(void* address, const Word16& value) {
#if defined(RNNFAST_EMULATED)
  emulator::check_aligned(address, sizeof(Word16));
#endif
  *static_cast<Word16*>(address) = value;
}

RNNFAST_DEVICE Word16 load_read_only(const void* address) {
#if defined(RNNFAST_EMULATED)
  return load_global(address);
#else
  const uint4 value = __ldg(static_cast<const uint4*>(address));
  return {{value.x, value.y, value.z, value.w}};
#endif
}

RNNFAST_DEVICE void prefetch_l2([[maybe_unused]] const void* address) {
#if !defined(RNNFAST_EMULATED)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(address)));
#endif
}

}  // namespace rnnfast::gpu

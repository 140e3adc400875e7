// How a thread's arithmetic rounds, and whether it takes denormals for zeros (torch.set_flush_denormal).
#pragma once

#include <cstdint>

namespace rnnfast::cpu {

// MXCSR has, beside the mode, which exceptions there were.
[[maybe_unused]] constexpr uint32_t kExceptionsSeen = 0x3f;

inline uint64_t float_control() {
#if defined(__x86_64__)
  return __builtin_ia32_stmxcsr() & ~kExceptionsSeen;
#elif defined(__aarch64__)
  uint64_t control;
  asm volatile("mrs %0, fpcr" : "=r"(control));
  return control;
#else
  return 0;
#endif
}

inline void set_float_control([[maybe_unused]] uint64_t control) {
#if defined(__x86_64__)
  __builtin_ia32_ldmxcsr(static_cast<uint32_t>(control) | (__builtin_ia32_stmxcsr() & kExceptionsSeen));
#elif defined(__aarch64__)
  asm volatile("msr fpcr, %0" : : "r"(control));
#endif
}

// While it lives the thread computes under `control`. Threads of a pool have a mode of their own: without this, results
// would depend on which of them takes which part.
class FloatControlOf {
 public:
  explicit FloatControlOf(uint64_t control) : own_(float_control()), differs_(own_ != control) {
    if (differs_) set_float_control(control);
  }
  ~FloatControlOf() {
    if (differs_) set_float_control(own_);
  }
  FloatControlOf(const FloatControlOf&) = delete;
  FloatControlOf& operator=(const FloatControlOf&) = delete;

 private:
  const uint64_t own_;
  const bool differs_;
};

}  // namespace rnnfast::cpu

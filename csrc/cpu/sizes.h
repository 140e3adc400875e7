// Sizes as they are rounded, multiplied and added up. One that 64 bits do not count becomes kUncountable and stays it,
// so that it is found where memory is asked for, instead of wrapping round to a small one.
#pragma once

#include "kernels.h"

namespace rnnfast::cpu {
namespace {

constexpr int64_t product(int64_t size) { return size; }
template <class... Sizes> constexpr int64_t product(int64_t first, int64_t second, Sizes... others) {
  int64_t both = 0;
  return product(__builtin_mul_overflow(first, second, &both) ? kUncountable : both, others...);
}

constexpr int64_t sum(int64_t a, int64_t b) {
  int64_t both = 0;
  return __builtin_add_overflow(a, b, &both) ? kUncountable : both;
}

constexpr int64_t divide_up(int64_t size, int64_t divisor) { return size / divisor + (size % divisor != 0); }
constexpr int64_t round_up(int64_t size, int64_t multiple) { return product(divide_up(size, multiple), multiple); }

// No row, or no unit: nothing to compute, whatever the number of steps, which may be one that nobody counts through.
inline bool has_empty_results(const Recurrence& r) {
  return r.rows.batch == 0 || (r.hidden_size == 0 && r.state_size == 0);
}

}  // namespace
}  // namespace rnnfast::cpu

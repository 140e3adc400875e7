// The emulated bodies of csrc/cuda/primitives/mma.h. They follow the fragment layouts of the PTX ISA; products and
// their sums are formed in float64 and rounded to float32 once, after the last addition (the hardware rounds more
// often, in an order that it does not tell).
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "address.h"
#include "types.h"

namespace rnnfast::emulator {

inline unsigned own_lane() { return self().linear_thread % kWarpSize; }

struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
};

inline std::array<MmaOperands, kWarpSize> exchange_operands(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                            const char* what, const Site& site) {
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  return exchange(kAllLanes, mine, false, what, site);
}

// The accumulators of the calling lane: the first two in row lane / 4, the others eight rows below, in columns
// 2 (lane % 4) and the next. a(row, k) and b(k, column) give the factors.
template <unsigned K, class A, class B> void accumulate(float (&d)[4], const A& a, const B& b) {
  const unsigned lane = own_lane();
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + 8 * (i / 2);
    const unsigned column = 2 * (lane % 4) + i % 2;
    double sum = d[i];
    for (unsigned k = 0; k < K; ++k) sum += double(a(row, k)) * double(b(k, column));
    d[i] = static_cast<float>(sum);
  }
}

template <class T> float value_in(uint32_t word, unsigned upper) { return to_float(T{uint16_t(word >> (16 * upper))}); }

// The multiplier ignores the low 13 bits of a TF32 operand.
inline float tf32_value(uint32_t word) { return std::bit_cast<float>(word & 0xffffe000); }

// Lane 8 m + r names row r of matrix m, 16 bytes. Each lane reads the elements that it receives itself, so that the
// race detector asks for an order between whoever wrote them and this lane.
template <unsigned Matrices, bool Transposed>
void load_matrices(uint32_t (&r)[Matrices], const void* row, const char* what, const Site& site) {
  const unsigned lane = own_lane();
  if (lane < 8 * Matrices) require_own_shared(row, 16, 16, what);
  const auto rows = exchange(kAllLanes, row, false, what, site);
  for (unsigned m = 0; m < Matrices; ++m) {
    uint16_t pair[2];
    for (unsigned i = 0; i < 2; ++i) {
      const unsigned major = lane / 4, minor = 2 * (lane % 4) + i;
      const unsigned from_row = Transposed ? minor : major, from_column = Transposed ? major : minor;
      pair[i] = static_cast<const uint16_t*>(rows[8 * m + from_row])[from_column];
    }
    r[m] = uint32_t(pair[0]) | uint32_t(pair[1]) << 16;
  }
}

template <class T> void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
  const auto all = exchange_operands(a, b, "mma_m16n8k16", site);
  // A register of A: the next one is eight rows below, the one after that eight columns to the right. Each holds two
  // neighbouring columns of A or rows of B.
  const auto a_at = [&](unsigned row, unsigned k) {
    return value_in<T>(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2);
  };
  const auto b_at = [&](unsigned k, unsigned column) {
    return value_in<T>(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
  };
  accumulate<16>(d, a_at, b_at);
}

inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& site) {
  const auto all = exchange_operands(a, b, "mma_m16n8k8_tf32", site);
  // As above, with one element a register, four columns of A apart.
  const auto a_at = [&](unsigned row, unsigned k) {
    return tf32_value(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]);
  };
  const auto b_at = [&](unsigned k, unsigned column) { return tf32_value(all[column * 4 + k % 4].b[k / 4]); };
  accumulate<8>(d, a_at, b_at);
}

inline uint32_t to_tf32(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return 0x7fffffff;
  return (bits + 0x1000) & 0xffffe000;
}

}  // namespace rnnfast::emulator

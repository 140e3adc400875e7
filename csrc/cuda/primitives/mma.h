// Matrix products of a warp (mma.sync) and the loads that feed them (ldmatrix). All 32 lanes take part. The emulated
// bodies follow the fragment layouts of the PTX ISA; products and their sums are formed in float64 and rounded to
// float32 once, after the last addition (the hardware rounds more often, in an order that it does not tell). None of
// these orders memory: rows that other lanes wrote need sync_warp or sync_threads first.
#pragma once

#include <bit>
#include <cstdint>
#include <type_traits>

#include "address.h"
#include "platform.h"
#include "types.h"

#if defined(RNNFAST_EMULATED)
#include <array>
#endif

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)

namespace emulated {

inline unsigned own_lane() { return emulator::self().linear_thread % kWarpSize; }

struct MmaOperands {
  uint32_t a[4];
  uint32_t b[2];
};

inline std::array<MmaOperands, kWarpSize> exchange_operands(const uint32_t (&a)[4], const uint32_t (&b)[2],
                                                            const char* what, const emulator::Site& site) {
  const MmaOperands mine{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  return emulator::exchange(kAllLanes, mine, false, what, site);
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
void load_matrices(uint32_t (&r)[Matrices], const void* row, const char* what, const emulator::Site& site) {
  const unsigned lane = own_lane();
  if (lane < 8 * Matrices) require_own_shared(row, 16, 16, what);
  const auto rows = emulator::exchange(kAllLanes, row, false, what, site);
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

}  // namespace emulated

#endif

// d (16x8, float32) += a (16x16) b (16x8), a and b in T.
template <class T>
RNNFAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RNNFAST_SITE) {
  static_assert(is_16bit<T>);
#if defined(RNNFAST_EMULATED)
  const auto all = emulated::exchange_operands(a, b, "mma_m16n8k16", site);
  // A register of A: the next one is eight rows below, the one after that eight columns to the right. Each holds two
  // neighbouring columns of A or rows of B.
  const auto a_at = [&](unsigned row, unsigned k) {
    return emulated::value_in<T>(all[row % 8 * 4 + k % 8 / 2].a[row / 8 + 2 * (k / 8)], k % 2);
  };
  const auto b_at = [&](unsigned k, unsigned column) {
    return emulated::value_in<T>(all[column * 4 + k % 8 / 2].b[k / 8], k % 2);
  };
  emulated::accumulate<16>(d, a_at, b_at);
#else
  if constexpr (std::is_same_v<T, bfloat16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#endif
}

// d (16x8, float32) += a (16x8) b (8x8), a and b in TF32 (see to_tf32).
RNNFAST_DEVICE void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  const auto all = emulated::exchange_operands(a, b, "mma_m16n8k8_tf32", site);
  // As above, with one element a register, four columns of A apart.
  const auto a_at = [&](unsigned row, unsigned k) {
    return emulated::tf32_value(all[row % 8 * 4 + k % 4].a[row / 8 + 2 * (k / 4)]);
  };
  const auto b_at = [&](unsigned k, unsigned column) { return emulated::tf32_value(all[column * 4 + k % 4].b[k / 4]); };
  emulated::accumulate<8>(d, a_at, b_at);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Nearest TF32 number (10 bits of fraction), ties away from zero, in the upper 19 bits of a float32; a NaN stays one.
RNNFAST_DEVICE uint32_t to_tf32(float value) {
#if defined(RNNFAST_EMULATED)
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return 0x7fffffff;
  return (bits + 0x1000) & 0xffffe000;
#else
  uint32_t result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#endif
}

// One, two or four 8x8 matrices of 16-bit elements from shared memory, a register of each lane for each matrix: lane
// 4 i + j gets columns 2 j and 2 j + 1 of row i (transposed: rows 2 j and 2 j + 1 of column i). Lanes 8 m to 8 m + 7
// give the addresses of the rows of matrix m, multiples of 16; what the lanes beyond the last matrix give is ignored.
// "memory": the compiler must not move stores to these rows past the load.
RNNFAST_DEVICE void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulated::load_matrices<1, false>(r, shared_row, "ldmatrix_x1", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulated::load_matrices<2, false>(r, shared_row, "ldmatrix_x2", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulated::load_matrices<4, false>(r, shared_row, "ldmatrix_x4", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulated::load_matrices<1, true>(r, shared_row, "ldmatrix_x1_trans", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulated::load_matrices<2, true>(r, shared_row, "ldmatrix_x2_trans", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulated::load_matrices<4, true>(r, shared_row, "ldmatrix_x4_trans", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

}  // namespace rnnfast::gpu

// Matrix products of a warp (mma.sync) and the loads that feed them (ldmatrix). All 32 lanes take part. None of these
// orders memory: rows that other lanes wrote need sync_warp or sync_threads first.
#pragma once

#include <cstdint>
#include <type_traits>

#include "address.h"
#include "platform.h"
#include "types.h"

#if defined(RNNFAST_EMULATED)
#include "../../emulator/primitives/mma.h"
#endif

namespace rnnfast::gpu {

// d (16x8, float32) += a (16x16) b (16x8), a and b in T.
template <class T>
RNNFAST_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2] RNNFAST_SITE) {
  static_assert(is_16bit<T>);
#if defined(RNNFAST_EMULATED)
  emulator::mma_m16n8k16<T>(d, a, b, site);
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
  emulator::mma_m16n8k8_tf32(d, a, b, site);
#else
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#endif
}

// Nearest TF32 number (10 bits of fraction), ties away from zero, in the upper 19 bits of a float32; a NaN stays one.
// volatile: where a loop does not change the value, the compiler would keep both in registers.
RNNFAST_DEVICE uint32_t to_tf32(float value) {
#if defined(RNNFAST_EMULATED)
  return emulator::to_tf32(value);
#else
  uint32_t result;
  asm volatile("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(value));
  return result;
#endif
}

// One, two or four 8x8 matrices of 16-bit elements from shared memory, a register of each lane for each matrix: lane
// 4 i + j gets columns 2 j and 2 j + 1 of row i (transposed: rows 2 j and 2 j + 1 of column i). Lanes 8 m to 8 m + 7
// give the addresses of the rows of matrix m, multiples of 16; what the lanes beyond the last matrix give is ignored.
// "memory": the compiler must not move stores to these rows past the load.
RNNFAST_DEVICE void ldmatrix_x1(uint32_t (&r)[1], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::load_matrices<1, false>(r, shared_row, "ldmatrix_x1", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::load_matrices<2, false>(r, shared_row, "ldmatrix_x2", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::load_matrices<4, false>(r, shared_row, "ldmatrix_x4", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x1_trans(uint32_t (&r)[1], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::load_matrices<1, true>(r, shared_row, "ldmatrix_x1_trans", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x2_trans(uint32_t (&r)[2], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::load_matrices<2, true>(r, shared_row, "ldmatrix_x2_trans", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

RNNFAST_DEVICE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* shared_row RNNFAST_SITE) {
#if defined(RNNFAST_EMULATED)
  emulator::load_matrices<4, true>(r, shared_row, "ldmatrix_x4_trans", site);
#else
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(shared_row))
               : "memory");
#endif
}

}  // namespace rnnfast::gpu

// The primitives against their definitions in the PTX ISA, written down here a second time: number types and
// conversions, mma and ldmatrix fragment layouts element by element, shuffles and votes.
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "check.h"
#include "cuda/primitives/execution.h"
#include "cuda/primitives/mma.h"
#include "cuda/primitives/shared.h"
#include "cuda/primitives/types.h"
#include "host_numbers.h"
#include "run_kernel.h"

namespace {

using namespace rnnfast::gpu;
using namespace rnnfast::test;

// ---- conversions ----

// The value of a binary floating point number by its definition.
double value_of(uint32_t bits, int exponent_bits, int fraction_bits) {
  const uint32_t fraction = bits & ((1u << fraction_bits) - 1);
  const int exponent = int(bits >> fraction_bits & ((1u << exponent_bits) - 1));
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> (exponent_bits + fraction_bits) & 1 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) {
    return fraction ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  }
  if (exponent == 0) return sign * std::ldexp(double(fraction), 1 - bias - fraction_bits);
  return sign * std::ldexp(double(fraction + (1u << fraction_bits)), exponent - bias - fraction_bits);
}

// What the device makes of each value; and of each number in 16 bits, there and back.
template <class T> RNNFAST_KERNEL void narrow_kernel(uint16_t* bits, const float* values, size_t count) {
  for (size_t i = thread_index(); i < count; i += block_threads()) bits[i] = bits_of(from_float<T>(values[i]));
}
struct Widened {
  float wide;
  double wider;
  uint16_t again, same;
  uint32_t packed;
};
template <class T> RNNFAST_KERNEL void widen_kernel(Widened* results, const uint16_t* bits, size_t count) {
  for (size_t i = thread_index(); i < count; i += block_threads()) {
    T value, other;
    memcpy(&value, bits + i, sizeof(T));
    memcpy(&other, bits + (count - 1 - i), sizeof(T));
    const float wide = to_float(value);
    results[i] = {wide, convert<double>(value), bits_of(from_float<T>(wide)), bits_of(convert<T>(value)),
                  pack(value, other)};
  }
}

template <class T> void check_widening(int exponent_bits, int fraction_bits) {
  Array<uint16_t> all(65536);
  std::iota(all.begin(), all.end(), uint16_t(0));
  Array<Widened> results(all.size());
  CHECK(runs(blocks(1, 64), widen_kernel<T>, results.device(), all.device(), all.size()));
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    const double expected = value_of(bits, exponent_bits, fraction_bits);
    const Widened& r = results[bits];
    CHECK(r.packed == (bits | (65535 - bits) << 16));
    if (std::isnan(expected)) {
      CHECK(std::isnan(r.wide) && r.again == 0x7fff);
      continue;
    }
    CHECK(double(r.wide) == expected && std::signbit(r.wide) == std::signbit(expected));
    CHECK(r.wider == expected && r.again == bits && r.same == bits);
  }
}

template <class T> void check_16bit(int exponent_bits, int fraction_bits) {
  check_widening<T>(exponent_bits, fraction_bits);
  const uint32_t infinity = ((1u << exponent_bits) - 1) << fraction_bits;
  Array<float> values;
  std::vector<uint32_t> expected;
  const auto expect = [&](float value, uint32_t bits) {
    values.push_back(value);
    expected.push_back(bits);
  };
  // Between each number and the next one up (infinity stands for the power of two after the largest): halfway goes to
  // the even one, all else to the nearer one.
  for (uint32_t sign : {0u, 0x8000u}) {
    for (uint32_t low = 0; low < infinity; ++low) {
      const uint32_t high = low + 1;
      const double low_value = value_of(low, exponent_bits, fraction_bits);
      const double step = low_value - value_of(low > 0 ? low - 1 : 1, exponent_bits, fraction_bits);
      const double high_value =
          high < infinity ? value_of(high, exponent_bits, fraction_bits) : low_value + std::abs(step);
      const double middle = (low_value + high_value) / 2;
      const float tie = float(sign ? -middle : middle);
      CHECK(std::abs(double(tie)) == middle);
      expect(tie, sign | (low % 2 == 0 ? low : high));
      expect(std::nextafter(tie, 0.0f), sign | low);
      expect(std::nextafter(tie, sign ? -INFINITY : INFINITY), sign | high);
    }
    expect(sign ? -INFINITY : INFINITY, sign | infinity);
    expect((sign ? -1 : 1) * std::numeric_limits<float>::denorm_min(), sign);
    expect(sign ? -std::nanf("") : std::nanf(""), 0x7fff);
  }
  Array<uint16_t> results(values.size());
  CHECK(runs(blocks(1, 64), narrow_kernel<T>, results.device(), values.device(), values.size()));
  for (size_t i = 0; i < values.size(); ++i) CHECK(results[i] == expected[i]);
}

void test_bfloat16_conversions() { check_16bit<bfloat16>(8, 7); }
void test_float16_conversions() { check_16bit<float16>(5, 10); }

RNNFAST_KERNEL void tf32_kernel(uint32_t* results, const float* values, size_t count) {
  for (size_t i = thread_index(); i < count; i += block_threads()) results[i] = to_tf32(values[i]);
}

void test_tf32_conversion() {
  constexpr uint32_t kInfinity = 255u << 10;
  Array<float> values;
  std::vector<uint32_t> expected;
  const auto expect = [&](uint32_t value, uint32_t bits) {
    values.push_back(std::bit_cast<float>(value));
    expected.push_back(bits);
  };
  for (uint32_t low = 0; low < kInfinity; ++low) {
    // A float32 with 10 bits of fraction; the next one is 2^13 units further.
    const uint32_t bits = low << 13;
    for (uint32_t sign : {0u, 0x80000000u}) {
      expect(sign | bits, sign | bits);
      expect(sign | bits | 0x0fff, sign | bits);
      // Halfway: away from zero.
      expect(sign | bits | 0x1000, sign | (bits + 0x2000));
      expect(sign | bits | 0x1fff, sign | (bits + 0x2000));
    }
  }
  expect(0x7f800000u, 0x7f800000u);
  expect(0xff800000u, 0xff800000u);
  const size_t numbers = values.size();
  // A NaN whose upper fraction bits are zero must not become infinity.
  for (uint32_t nan : {0x7fc00000u, 0x7f800001u}) values.push_back(std::bit_cast<float>(nan));
  Array<uint32_t> results(values.size());
  CHECK(runs(blocks(1, 64), tf32_kernel, results.device(), values.device(), values.size()));
  // Below these bits a TF32 number has none: what stands there is not defined.
  for (uint32_t& bits : results) bits &= 0xffffe000u;
  for (size_t i = 0; i < numbers; ++i) CHECK(results[i] == expected[i]);
  for (size_t i = numbers; i < results.size(); ++i) CHECK(std::isnan(std::bit_cast<float>(results[i])));
}

RNNFAST_KERNEL void convert_kernel(double* results, double wide, float narrow) {
  results[0] = convert<float>(wide);
  results[1] = convert<double>(narrow);
  results[2] = convert<double>(wide);
  results[3] = bits_of(convert<bfloat16>(convert<float16>(narrow)));
}

void test_conversions_between_wide_types() {
  Array<double> results(4);
  CHECK(runs(blocks(1, 1), convert_kernel, results.device(), 1.0 + 0x1p-40, 1.25f));
  CHECK(results[0] == 1 && results[1] == 1.25 && results[2] == 1.0 + 0x1p-40 && results[3] == 0x3fa0);
  static_assert(std::is_same_v<Compute<double>, double> && std::is_same_v<Compute<float>, float>);
  static_assert(std::is_same_v<Compute<bfloat16>, float> && std::is_same_v<Compute<tf32>, float>);
}

// ---- mma ----

// Where element i of a lane's fragment lies in its matrix (PTX ISA, "Matrix Fragments for mma.m16n8k16", ".m16n8k8").
struct Place {
  unsigned row, column;
};
struct Layout16 {
  static constexpr unsigned kDepth = 16, kPerRegister = 2;
  RNNFAST_DEVICE static Place a(unsigned lane, unsigned i) {
    const unsigned group = lane >> 2, in_group = lane % 4;
    return {i < 2 || (4 <= i && i < 6) ? group : group + 8, in_group * 2 + (i & 1) + (i >= 4 ? 8 : 0)};
  }
  RNNFAST_DEVICE static Place b(unsigned lane, unsigned i) {
    return {(lane % 4) * 2 + (i & 1) + (i >= 2 ? 8 : 0), lane >> 2};
  }
};
struct LayoutTf32 {
  static constexpr unsigned kDepth = 8, kPerRegister = 1;
  RNNFAST_DEVICE static Place a(unsigned lane, unsigned i) {
    const unsigned group = lane >> 2, in_group = lane % 4;
    return {i == 0 || i == 2 ? group : group + 8, i == 0 || i == 1 ? in_group : in_group + 4};
  }
  RNNFAST_DEVICE static Place b(unsigned lane, unsigned i) { return {i == 0 ? lane % 4 : lane % 4 + 4, lane >> 2}; }
};
RNNFAST_DEVICE Place c_place(unsigned lane, unsigned i) {
  return {i < 2 ? lane >> 2 : (lane >> 2) + 8, (lane % 4) * 2 + (i & 1)};
}

template <class T> using LayoutOf = std::conditional_t<std::is_same_v<T, tf32>, LayoutTf32, Layout16>;

// d += a b for `count` triples of matrices, one after the other: element bits in a (16 x depth) and b (depth x 8).
template <class T> RNNFAST_KERNEL void mma_kernel(float* d, const uint32_t* a, const uint32_t* b, unsigned count) {
  using Layout = LayoutOf<T>;
  constexpr unsigned kDepth = Layout::kDepth, kPer = Layout::kPerRegister;
  for (unsigned n = warp(); n < count; n += block_threads() / 32) {
    uint32_t a_words[4] = {}, b_words[2] = {};
    for (unsigned i = 0; i < 4 * kPer; ++i) {
      const Place p = Layout::a(lane(), i);
      a_words[i / kPer] |= a[(n * 16 + p.row) * kDepth + p.column] << (i % kPer * 16);
    }
    for (unsigned i = 0; i < 2 * kPer; ++i) {
      const Place p = Layout::b(lane(), i);
      b_words[i / kPer] |= b[(n * kDepth + p.row) * 8 + p.column] << (i % kPer * 16);
    }
    const auto d_at = [&](unsigned i) -> float& {
      return d[(n * 16 + c_place(lane(), i).row) * 8 + c_place(lane(), i).column];
    };
    float sums[4] = {d_at(0), d_at(1), d_at(2), d_at(3)};
    if constexpr (std::is_same_v<T, tf32>)
      mma_m16n8k8_tf32(sums, a_words, b_words);
    else
      mma_m16n8k16<T>(sums, a_words, b_words);
    for (unsigned i = 0; i < 4; ++i) d_at(i) = sums[i];
  }
}

// The bits of a number that T has, and back.
template <class T> uint32_t bits_from(float value) {
  if constexpr (std::is_same_v<T, tf32>)
    return std::bit_cast<uint32_t>(value) & 0xffffe000u;
  else
    return std::bit_cast<uint16_t>(from_double<T>(value));
}

template <class T> double value_from(uint32_t bits) {
  if constexpr (std::is_same_v<T, tf32>)
    return value_of(bits, 8, 23);
  else
    return std::is_same_v<T, bfloat16> ? value_of(bits, 8, 7) : value_of(bits, 5, 10);
}

// Operands of a number of products, and their results by float64 on the host.
template <class T> struct Products {
  static constexpr unsigned kDepth = LayoutOf<T>::kDepth;
  // The hardware may cut each summand off where the largest of them ends; the emulator rounds the sum once.
#if defined(RNNFAST_EMULATED)
  static constexpr double kRoundings = 1;
#else
  static constexpr double kRoundings = kDepth;
#endif
  unsigned count;
  Array<uint32_t> a = Array<uint32_t>(count * 16 * kDepth), b = Array<uint32_t>(count * kDepth * 8);
  Array<float> d = Array<float>(count * 16 * 8);

  void check() const {
    Array<float> result = d;
    CHECK(runs(blocks(1, 64), mma_kernel<T>, result.device(), a.device(), b.device(), count));
    for (unsigned n = 0; n < count; ++n) {
      for (unsigned i = 0; i < 16 * 8; ++i) {
        double sum = d[n * 128 + i];
        double largest = std::abs(sum);
        for (unsigned k = 0; k < kDepth; ++k) {
          const double product =
              value_from<T>(a[(n * 16 + i / 8) * kDepth + k]) * value_from<T>(b[(n * kDepth + k) * 8 + i % 8]);
          sum += product;
          largest = std::max(largest, std::abs(product));
        }
        CHECK(std::abs(result[n * 128 + i] - sum) <= 0x1p-23 * (std::abs(sum) + kRoundings * largest));
      }
    }
  }
};

template <class T> void check_mma() {
  constexpr unsigned kDepth = LayoutOf<T>::kDepth;
  // A single one in A picks a row of B, whose elements all differ; then the same of B and A. Exact.
  Products<T> one_in_a{16 * kDepth}, one_in_b{kDepth * 8};
  for (unsigned n = 0; n < one_in_a.count; ++n) {
    one_in_a.a[n * 16 * kDepth + n] = bits_from<T>(1);
    for (unsigned i = 0; i < kDepth * 8; ++i) one_in_a.b[n * kDepth * 8 + i] = bits_from<T>(float(i + 1));
  }
  for (unsigned n = 0; n < one_in_b.count; ++n) {
    one_in_b.b[n * kDepth * 8 + n] = bits_from<T>(1);
    for (unsigned i = 0; i < 16 * kDepth; ++i) one_in_b.a[n * 16 * kDepth + i] = bits_from<T>(float(i + 1));
  }
  one_in_a.check();
  one_in_b.check();
  for_each_seed(6, [] {
    std::mt19937 random(static_cast<unsigned>(seed()));
    std::normal_distribution<float> normal;
    Products<T> products{8};
    for (uint32_t& x : products.a) x = bits_from<T>(normal(random));
    for (uint32_t& x : products.b) x = bits_from<T>(normal(random));
    for (float& x : products.d) x = normal(random);
    products.check();
  });
}

void test_mma_bfloat16() { check_mma<bfloat16>(); }
void test_mma_float16() { check_mma<float16>(); }
void test_mma_tf32() { check_mma<tf32>(); }

void test_mma_tf32_ignores_low_bits() {
  Array<uint32_t> a(16 * 8, 0x3f801fff), b(8 * 8, 0x40001fff);
  Array<float> d(16 * 8, 1.0f);
  CHECK(runs(blocks(1, 32), mma_kernel<tf32>, d.device(), a.device(), b.device(), 1u));
  for (float x : d) CHECK(x == 17.0f);
}

void test_mma_not_finite() {
  // inf * 1 in row 3; inf * 0 in column 5 of it.
  Array<uint32_t> a(16 * 16), b(16 * 8, 0x3f80);
  Array<float> d(16 * 8);
  a[3 * 16 + 7] = 0x7f80;
  b[7 * 8 + 5] = 0;
  CHECK(runs(blocks(1, 32), mma_kernel<bfloat16>, d.device(), a.device(), b.device(), 1u));
  for (unsigned i = 0; i < 128; ++i) {
    if (i / 8 != 3)
      CHECK(d[i] == 0);
    else if (i % 8 == 5)
      CHECK(std::isnan(d[i]));
    else
      CHECK(d[i] == INFINITY);
  }
}

// ---- ldmatrix ----

// Rows of 8 elements lie 48 bytes apart, last row first; element c of row r of matrix m is 64 m + 8 r + c.
constexpr unsigned kRowStride = 48;

template <unsigned Matrices, bool Transposed> RNNFAST_KERNEL void ldmatrix_kernel(uint32_t* result) {
  std::byte* shared = shared_memory();
  constexpr unsigned kRows = 8 * Matrices;
  const auto row_at = [&](unsigned row) { return shared + (kRows - 1 - row) * kRowStride; };
  for (unsigned i = lane(); i < kRows * 8; i += 32) reinterpret_cast<uint16_t*>(row_at(i / 8))[i % 8] = uint16_t(i);
  sync_warp();
  // Beyond the last row: an address that must not be used.
  const void* row = lane() < kRows ? row_at(lane()) : nullptr;
  uint32_t r[Matrices];
  if constexpr (Matrices == 1 && !Transposed) ldmatrix_x1(r, row);
  if constexpr (Matrices == 2 && !Transposed) ldmatrix_x2(r, row);
  if constexpr (Matrices == 4 && !Transposed) ldmatrix_x4(r, row);
  if constexpr (Matrices == 1 && Transposed) ldmatrix_x1_trans(r, row);
  if constexpr (Matrices == 2 && Transposed) ldmatrix_x2_trans(r, row);
  if constexpr (Matrices == 4 && Transposed) ldmatrix_x4_trans(r, row);
  for (unsigned m = 0; m < Matrices; ++m) result[lane() * Matrices + m] = r[m];
}

template <unsigned Matrices, bool Transposed> void check_ldmatrix() {
  for_each_seed(6, [] {
    Array<uint32_t> result(32 * Matrices);
    CHECK(runs(blocks(1, 32, 8 * Matrices * kRowStride), ldmatrix_kernel<Matrices, Transposed>, result.device()));
    for (unsigned thread = 0; thread < 32; ++thread) {
      for (unsigned m = 0; m < Matrices; ++m) {
        const unsigned i = thread / 4, j = thread % 4 * 2;
        const uint32_t low = 64 * m + (Transposed ? 8 * j + i : 8 * i + j);
        const uint32_t high = 64 * m + (Transposed ? 8 * (j + 1) + i : 8 * i + j + 1);
        CHECK(result[thread * Matrices + m] == (low | high << 16));
      }
    }
  });
}

void test_ldmatrix() {
  check_ldmatrix<1, false>();
  check_ldmatrix<2, false>();
  check_ldmatrix<4, false>();
}
void test_ldmatrix_trans() {
  check_ldmatrix<1, true>();
  check_ldmatrix<2, true>();
  check_ldmatrix<4, true>();
}

// ---- shuffles and votes ----

struct LaneResults {
  uint32_t indexed, rotated, crossed, ballot;
  uint64_t down;
  bool any, all, any_of_none, all_of_all;
};

RNNFAST_KERNEL void lanes_kernel(LaneResults* results) {
  const uint32_t mine = 1000 * warp() + lane();
  LaneResults r;
  r.indexed = shuffle(mine, 7);
  r.rotated = shuffle(mine, (lane() + 5) % 32);
  r.crossed = shuffle_xor(mine, 12);
  r.down = shuffle_down(uint64_t(mine) << 32, 3);
  r.ballot = rnnfast::gpu::ballot(lane() % 3 == warp());
  r.any = rnnfast::gpu::any(warp() == 1 && lane() == 31);
  r.all = rnnfast::gpu::all(warp() == 1 || lane() != 4);
  r.any_of_none = rnnfast::gpu::any(false);
  r.all_of_all = rnnfast::gpu::all(true);
  results[thread_index()] = r;
}

void test_shuffles_and_votes() {
  for_each_seed(6, [] {
    Array<LaneResults> results(64);
    CHECK(runs(blocks(1, 64), lanes_kernel, results.device()));
    for (unsigned thread = 0; thread < 64; ++thread) {
      const LaneResults& r = results[thread];
      const unsigned w = thread / 32, l = thread % 32;
      CHECK(r.indexed == 1000 * w + 7 && r.rotated == 1000 * w + (l + 5) % 32 && r.crossed == 1000 * w + (l ^ 12));
      CHECK(r.down == uint64_t(1000 * w + (l + 3 < 32 ? l + 3 : l)) << 32);
      uint32_t votes = 0;
      for (unsigned i = 0; i < 32; ++i) votes |= uint32_t(i % 3 == w) << i;
      CHECK(r.ballot == votes && r.any == (w == 1) && r.all == (w == 1) && !r.any_of_none && r.all_of_all);
    }
  });
}

}  // namespace

CHECK_CASES(primitives) {
  return {
      {"bfloat16_conversions", test_bfloat16_conversions},
      {"float16_conversions", test_float16_conversions},
      {"tf32_conversion", test_tf32_conversion},
      {"conversions_between_wide_types", test_conversions_between_wide_types},
      {"mma_bfloat16", test_mma_bfloat16},
      {"mma_float16", test_mma_float16},
      {"mma_tf32", test_mma_tf32},
      {"mma_tf32_ignores_low_bits", test_mma_tf32_ignores_low_bits},
      {"mma_not_finite", test_mma_not_finite},
      {"ldmatrix", test_ldmatrix},
      {"ldmatrix_trans", test_ldmatrix_trans},
      {"shuffles_and_votes", test_shuffles_and_votes},
  };
}

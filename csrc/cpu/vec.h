// Vectors of one ISA: the widest that the compiler's target has, in GCC and clang vector extensions, so that one source
// serves AVX-512, AVX2, NEON and the baseline. Included only from kernels.cpp, which is compiled for each ISA;
// everything is in an unnamed namespace, so that no function compiled for one ISA can be linked into another.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../recurrence.h"
#include "sanitized.h"

namespace rnnfast::cpu {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kVectorRegisters = 32;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kVectorRegisters = 16;
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorBytes = 16;
constexpr int kVectorRegisters = 16;
#endif

#define RNNFAST_INLINE [[gnu::always_inline]] inline

// Storage types of 16 bits: bits only, computed in float32.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <DType kDType> struct StorageOf;
template <> struct StorageOf<DType::float32> {
  using type = float;
};
template <> struct StorageOf<DType::float64> {
  using type = double;
};
template <> struct StorageOf<DType::bfloat16> {
  using type = BFloat16;
};
template <> struct StorageOf<DType::float16> {
  using type = Float16;
};

template <class Storage> struct ComputeOf {
  using type = float;
};
template <> struct ComputeOf<double> {
  using type = double;
};

template <class Compute> struct VectorTraits;
template <> struct VectorTraits<float> {
  using Bits = int32_t;
  typedef float Vector __attribute__((vector_size(kVectorBytes)));
  typedef int32_t BitsVector __attribute__((vector_size(kVectorBytes)));
};
template <> struct VectorTraits<double> {
  using Bits = int64_t;
  typedef double Vector __attribute__((vector_size(kVectorBytes)));
  typedef int64_t BitsVector __attribute__((vector_size(kVectorBytes)));
};

template <class Compute> using Vector = typename VectorTraits<Compute>::Vector;
template <class Compute> using BitsVector = typename VectorTraits<Compute>::BitsVector;
template <class Compute> constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(Compute));

typedef uint16_t HalfBits __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t WideBits __attribute__((vector_size(kVectorBytes)));

RNNFAST_INLINE Vector<float> widen(HalfBits half, BFloat16) {
  return (Vector<float>)(__builtin_convertvector(half, WideBits) << 16);
}

#if defined(__AVX512BF16__)
// Takes subnormal numbers for zeros, as the products of these instructions do.
RNNFAST_INLINE HalfBits narrow(Vector<float> value, BFloat16) { return (HalfBits)_mm512_cvtneps_pbh(value); }
#else
RNNFAST_INLINE HalfBits narrow(Vector<float> value, BFloat16) {
  const WideBits bits = (WideBits)value;
  // To nearest, ties to even; a NaN keeps its sign and becomes quiet.
  const WideBits rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const WideBits quiet = (bits >> 16) | 0x40u;
  return __builtin_convertvector((WideBits)(value != value ? quiet : rounded), HalfBits);
}
#endif

#if defined(__AVX512F__)
// These instructions heed subnormal float16 in every mode of the processor. Masked: GCC 12 warns of its own unmasked
// ones.
RNNFAST_INLINE Vector<float> widen(HalfBits half, Float16) { return _mm512_maskz_cvtph_ps(-1, (__m256i)half); }
RNNFAST_INLINE HalfBits narrow(Vector<float> value, Float16) {
  return (HalfBits)_mm512_maskz_cvtps_ph(-1, value, _MM_FROUND_TO_NEAREST_INT);
}
#else
RNNFAST_INLINE Vector<float> widen(HalfBits half, Float16) {
  const WideBits bits = __builtin_convertvector(half, WideBits);
  const WideBits sign = (bits & 0x8000u) << 16;
  const WideBits shifted = (bits & 0x7fffu) << 13;
  // float16's exponent bias is 15, float32's 127.
  const WideBits normal = shifted + 0x38000000u;
  // A subnormal is read as what stands behind the 1 of 2^-14, which is then taken off: no float32 here is subnormal, as
  // a thread that takes those for zeros would have it.
  const WideBits subnormal = (WideBits)((Vector<float>)(shifted + 0x38800000u) - 0x1p-14f);
  const WideBits special = shifted | 0x7f800000u;  // infinity or NaN
  const WideBits exponent = bits & 0x7c00u;
  WideBits magnitude = exponent == 0u ? subnormal : normal;
  magnitude = exponent == 0x7c00u ? special : magnitude;
  return (Vector<float>)(sign | magnitude);
}

RNNFAST_INLINE HalfBits narrow(Vector<float> value, Float16) {
  const WideBits bits = (WideBits)value;
  const WideBits sign = (bits >> 16) & 0x8000u;
  const WideBits magnitude = bits & 0x7fffffffu;
  // Normal results: re-bias and round to nearest even in the integer domain. Subnormal: adding 0.5 lets the FPU round
  // at float16's last subnormal bit, 2^-24; whether it takes subnormal float32 for zeros makes no difference.
  const WideBits normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const WideBits subnormal = (WideBits)((Vector<float>)magnitude + 0.5f) - 0x3f000000u;
  const WideBits infinite = magnitude - magnitude + 0x7c00u;
  WideBits result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477ff000u ? infinite : result;            // 65520 and up round to infinity
  result = magnitude > 0x7f800000u ? (infinite | 0x200u) : result;  // NaN
  return __builtin_convertvector((WideBits)(result | sign), HalfBits);
}
#endif

// Part of a vector: the first `count` values at `from`, zeros behind them, and the first `count` to `to`; `count` is
// less than its lanes. Sanitizers do not see what masked instructions touch: for them value by value.
#if defined(__AVX512BW__) && defined(__AVX512VL__) && !defined(RNNFAST_SANITIZED)
RNNFAST_INLINE uint16_t first_lanes(int64_t count) { return static_cast<uint16_t>(count > 0 ? (1u << count) - 1 : 0); }
template <class V> RNNFAST_INLINE V load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(first_lanes(count), from);
}
template <class V> RNNFAST_INLINE V load_some(const double* from, int64_t count) {
  return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(count)), from);
}
template <class V> RNNFAST_INLINE V load_some(const uint16_t* from, int64_t count) {
  return (V)_mm256_maskz_loadu_epi16(first_lanes(count), from);
}
RNNFAST_INLINE void store_some(float* to, Vector<float> value, int64_t count) {
  _mm512_mask_storeu_ps(to, first_lanes(count), value);
}
RNNFAST_INLINE void store_some(double* to, Vector<double> value, int64_t count) {
  _mm512_mask_storeu_pd(to, static_cast<__mmask8>(first_lanes(count)), value);
}
RNNFAST_INLINE void store_some(uint16_t* to, HalfBits value, int64_t count) {
  _mm256_mask_storeu_epi16(to, first_lanes(count), (__m256i)value);
}
#else
template <class V, class Value> RNNFAST_INLINE V load_some(const Value* from, int64_t count) {
  V value{};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
}
template <class V, class Value> RNNFAST_INLINE void store_some(Value* to, V value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}
#endif

// The first `count` values at `from` as a vector, zeros behind them. A whole vector where count is not less than its
// lanes.
RNNFAST_INLINE HalfBits load_bits(const uint16_t* from, int64_t count) {
  if (count < kLanes<float>) return load_some<HalfBits>(from, count);
  HalfBits bits;
  std::memcpy(&bits, from, sizeof bits);
  return bits;
}
template <class Compute, class Storage>
RNNFAST_INLINE Vector<Compute> load(const Storage* from, int64_t count = kLanes<Compute>) {
  if constexpr (sizeof(Storage) == sizeof(Compute)) {
    if (count < kLanes<Compute>) return load_some<Vector<Compute>>(from, count);
    Vector<Compute> value;
    std::memcpy(&value, from, sizeof value);
    return value;
  } else {
    return widen(load_bits(&from->bits, count), Storage{});
  }
}

template <class Compute, class Storage>
RNNFAST_INLINE void store(Storage* to, Vector<Compute> value, int64_t count = kLanes<Compute>) {
  if constexpr (sizeof(Storage) == sizeof(Compute)) {
    if (count < kLanes<Compute>) return store_some(to, value, count);
    std::memcpy(to, &value, sizeof value);
  } else {
    const HalfBits half = narrow(value, Storage{});
    if (count >= kLanes<Compute>)
      std::memcpy(to, &half, sizeof half);
    else
      store_some(&to->bits, half, count);
  }
}

// Pointer arithmetic on tensors of any storage type.
template <class Storage> RNNFAST_INLINE const Storage* at(const void* base, int64_t offset) {
  return static_cast<const Storage*>(base) + offset;
}
template <class Storage> RNNFAST_INLINE Storage* at(void* base, int64_t offset) {
  return static_cast<Storage*>(base) + offset;
}

// What the next step reads: the value, or zero where a segment ends. A select, not a product: a NaN must not cross.
template <class Compute> RNNFAST_INLINE Vector<Compute> unless(bool cut, Vector<Compute> value) {
  return cut ? Vector<Compute>{} : value;
}

// What a value becomes when it is stored and loaded again.
template <class Compute, class Storage> RNNFAST_INLINE Vector<Compute> rounded_to(Vector<Compute> value) {
  if constexpr (sizeof(Storage) == sizeof(Compute))
    return value;
  else
    return widen(narrow(value, Storage{}), Storage{});
}

template <class Compute> RNNFAST_INLINE Vector<Compute> broadcast(Compute value) {
  return value - Vector<Compute>{};  // x - 0 is x, and compiles to one broadcast
}

// The value, at most or at least `limit`; a NaN stays one, as the instructions give their second operand where one is.
// The compiler would make two of a comparison and a choice.
#if defined(__AVX512F__)
#define RNNFAST_VECTOR(name, ...) _mm512_maskz_##name(-1, __VA_ARGS__)
#elif defined(__AVX__)
#define RNNFAST_VECTOR(name, ...) _mm256_##name(__VA_ARGS__)
#elif defined(__x86_64__)
#define RNNFAST_VECTOR(name, ...) _mm_##name(__VA_ARGS__)
#endif
#if defined(RNNFAST_VECTOR)
RNNFAST_INLINE Vector<float> at_most(Vector<float> value, float limit) {
  return RNNFAST_VECTOR(min_ps, broadcast(limit), value);
}
RNNFAST_INLINE Vector<double> at_most(Vector<double> value, double limit) {
  return RNNFAST_VECTOR(min_pd, broadcast(limit), value);
}
RNNFAST_INLINE Vector<float> at_least(Vector<float> value, float limit) {
  return RNNFAST_VECTOR(max_ps, broadcast(limit), value);
}
RNNFAST_INLINE Vector<double> at_least(Vector<double> value, double limit) {
  return RNNFAST_VECTOR(max_pd, broadcast(limit), value);
}
#else
template <class Compute> RNNFAST_INLINE Vector<Compute> at_most(Vector<Compute> value, Compute limit) {
  return value > limit ? broadcast(limit) : value;
}
template <class Compute> RNNFAST_INLINE Vector<Compute> at_least(Vector<Compute> value, Compute limit) {
  return value < limit ? broadcast(limit) : value;
}
#endif

// Constants of the exponential: exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln 2 / 2.
template <class Compute> struct ExpConstants;
template <> struct ExpConstants<float> {
  static constexpr float kLog2e = 1.44269504088896341f;
  static constexpr float kLn2High = 0.693359375f;  // 9 significant bits: n * high is exact
  static constexpr float kLn2Low = -2.12194440054690583e-4f;
  static constexpr float kRoundMagic = 0x1.8p23f;
  static constexpr int kMantissaBits = 23;
  static constexpr int32_t kExponentBias = 127;
  static constexpr float kExpMin = -87.0f;                           // sigmoid(-x) is 1 from there on
  static constexpr float kExpMax = 88.72283f, kExpInfinite = 89.5f;  // the last finite exp; where 2^(n - 1) overflows
  static constexpr float kTanhOne = 10.0f;                           // tanh(x) rounds to 1 beyond it
  // Chebyshev fit of (exp(r) - 1 - r) / r^2 on |r| <= 0.35, highest power first; exp to 8.4e-9.
  static constexpr int kTerms = 5;
  static constexpr float kCoefficients[kTerms] = {0.001392692661402190648f, 0.0083637738744055734983f,
                                                  0.041666550110305124444f, 0.16666573381900846023f, 0.5f};
};
template <> struct ExpConstants<double> {
  static constexpr double kLog2e = 1.44269504088896340736;
  static constexpr double kLn2High = 6.93145751953125e-1;
  static constexpr double kLn2Low = 1.42860682030941723212e-6;
  static constexpr double kRoundMagic = 0x1.8p52;
  static constexpr int kMantissaBits = 52;
  static constexpr int64_t kExponentBias = 1023;
  static constexpr double kExpMin = -708.0;
  static constexpr double kExpMax = 709.782712893384, kExpInfinite = 710.5;
  static constexpr double kTanhOne = 20.0;
  // As above; exp to 1.9e-19.
  static constexpr int kTerms = 11;
  static constexpr double kCoefficients[kTerms] = {2.0915442297780115216e-9,
                                                   2.5106274733573294687e-8,
                                                   2.7557271810219799569e-7,
                                                   2.7557252833516909748e-6,
                                                   0.000024801587327007186731,
                                                   0.00019841269876864354929,
                                                   0.0013888888888883326674,
                                                   0.0083333333333255446996,
                                                   0.041666666666666670074,
                                                   0.16666666666666671438,
                                                   0.5};
};

template <class Compute> struct VectorMath {
  using Value = Vector<Compute>;
  using Bits = BitsVector<Compute>;
  using Constants = ExpConstants<Compute>;

  // scale = 2^(n - kHalvings) and minus_one = exp(r) - 1 with x = n ln 2 + r. A NaN ends up in minus_one.
  struct Split {
    Value scale, minus_one;
  };
  template <int kHalvings> RNNFAST_INLINE static Split split_exp(Value x) {
    // Rounds to an integer, which then stands in the low mantissa bits, as the exponent of 2^(n - kHalvings) has it.
    constexpr Compute kMagic = Constants::kRoundMagic + (Constants::kExponentBias - kHalvings);
    const Value shifted = x * Constants::kLog2e + kMagic;
    const Value n = shifted - kMagic;
    const Value r = (x - n * Constants::kLn2High) - n * Constants::kLn2Low;
    Value q = broadcast<Compute>(Constants::kCoefficients[0]);
#pragma GCC unroll 16
    for (int i = 1; i < Constants::kTerms; ++i) q = q * r + Constants::kCoefficients[i];
    return {(Value)((Bits)shifted << Constants::kMantissaBits), r + r * r * q};
  }

  RNNFAST_INLINE static Value sigmoid(Value x) {
    Value y = at_least(-x, Constants::kExpMin);
    y = y > Constants::kExpMax ? broadcast<Compute>(Constants::kExpInfinite) : y;
    // Half of 1 / (1 + exp(y)) above and below: the largest exp have n = 128 (1024), and 2^n is infinite there.
    const Split e = split_exp<1>(y);
    return Compute(0.5) / (Compute(0.5) + e.scale * (1 + e.minus_one));
  }

  // tanh |x| = -m / (m + 2) with m = exp(-2 |x|) - 1, which keeps its relative precision near 0. From ln 2 on it is
  // 1 - 2 exp(-2 |x|) / (m + 2), as exact as 1 - tanh^2, the derivative, can be had from it.
  RNNFAST_INLINE static Value tanh(Value x) {
    const Bits sign_bit = (Bits)broadcast<Compute>(Compute(-0.0));
    const Bits sign = (Bits)x & sign_bit;
    const Value magnitude = at_most((Value)((Bits)x & ~sign_bit), Constants::kTanhOne);
    const Split e = split_exp<0>(magnitude * -2);
    const Value m = e.scale * e.minus_one + (e.scale - 1);
    const Value exp = e.scale * e.minus_one + e.scale;
    const Bits far = m < Compute(-0.75);
    const Value limit = far ? broadcast<Compute>(1) : Value{};
    return (Value)((Bits)(limit - (far ? exp + exp : m) / (m + 2)) ^ sign);
  }

  // NaN stays NaN and lets the gradient through, as in torch.
  RNNFAST_INLINE static Value relu(Value x) { return x < 0 ? Value{} : x; }
  RNNFAST_INLINE static Value where_positive(Value condition, Value value) { return condition <= 0 ? Value{} : value; }
};

}  // namespace
}  // namespace rnnfast::cpu

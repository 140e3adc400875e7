// How each type is stored, computed with and multiplied, and the scalar functions that the cells use.
#pragma once

#include <cmath>

#include "instances.h"
#include "primitives/math.h"
#include "primitives/platform.h"
#include "primitives/types.h"

#if defined(RNNFAST_EMULATED)
#include <bit>
#endif

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)
inline uint32_t bits_of(float value) { return std::bit_cast<uint32_t>(value); }
inline uint64_t bits_of(double value) { return std::bit_cast<uint64_t>(value); }
inline float float_of(uint32_t bits) { return std::bit_cast<float>(bits); }
inline double double_of(uint64_t bits) { return std::bit_cast<double>(bits); }
#else
RNNFAST_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
RNNFAST_DEVICE uint64_t bits_of(double value) { return static_cast<uint64_t>(__double_as_longlong(value)); }
RNNFAST_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
RNNFAST_DEVICE double double_of(uint64_t bits) { return __longlong_as_double(static_cast<long long>(bits)); }
#endif

// kTensorCores: for float32 a choice, which Float32 and Tf32 are; else legal is true for 16-bit types and false for
// float64 (product.cuh). kLargeBatchTiles: tiles of 8 batch indices a block takes where the batch is large. Legal: from
// 1 on, as many as registers allow without spills (tests/test_cuda_build.py).
struct Float64 {
  static constexpr Arithmetic kArithmetic = Arithmetic::float64;
  using Storage = double;
  using Compute = double;
  static constexpr bool kTensorCores = false;
  static constexpr int kLargeBatchTiles = 2;
  static constexpr const char* kName = "float64";
};
struct Float32 {
  static constexpr Arithmetic kArithmetic = Arithmetic::float32;
  using Storage = float;
  using Compute = float;
  static constexpr bool kTensorCores = false;
  static constexpr int kLargeBatchTiles = 2;
  static constexpr const char* kName = "float32";
};
struct Tf32 {
  static constexpr Arithmetic kArithmetic = Arithmetic::tf32;
  using Storage = float;
  using Compute = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kLargeBatchTiles = 4;
  static constexpr const char* kName = "tf32";
};
struct BFloat16 {
  static constexpr Arithmetic kArithmetic = Arithmetic::bfloat16;
  using Storage = bfloat16;
  using Compute = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kLargeBatchTiles = 4;
  static constexpr const char* kName = "bfloat16";
};
struct Float16 {
  static constexpr Arithmetic kArithmetic = Arithmetic::float16;
  using Storage = float16;
  using Compute = float;
  static constexpr bool kTensorCores = true;
  static constexpr int kLargeBatchTiles = 4;
  static constexpr const char* kName = "float16";
};

static_assert(
    !Float32::kTensorCores && Tf32::kTensorCores,
    "kTensorCores must be false for Float32 and true for Tf32: nothing else tells them apart, and tensor cores "
    "round float32 to TF32");

// What cells.h calls, for scalars.
template <class Compute> struct ScalarMath {
  using Value = Compute;
  RNNFAST_DEVICE static Value sigmoid(Value x) { return 1 / (1 + std::exp(-x)); }
  RNNFAST_DEVICE static Value tanh(Value x) { return std::tanh(x); }
  // Written so that a NaN stays one, and lets the gradient through: what torch.relu does.
  RNNFAST_DEVICE static Value relu(Value x) { return x <= 0 ? Value(0) : x; }
  RNNFAST_DEVICE static Value where_positive(Value h, Value value) { return h <= 0 ? Value(0) : value; }
};

// The same in a quarter of the instructions, with an absolute error of some 1e-7: where a step is short and results are
// rounded to 16 bits, or products to TF32. (tanh.approx would be one instruction, but its 2^-11 is too much for a gate
// that is to remember a thousand steps: there 1 - f is 2^-10.)
struct FastMath : ScalarMath<float> {
  RNNFAST_DEVICE static float sigmoid(float x) {
    constexpr float kLog2E = 1.4426950408889634f;
    return approximate_reciprocal(1 + approximate_exp2(x * -kLog2E));
  }
  RNNFAST_DEVICE static float tanh(float x) { return 2 * sigmoid(2 * x) - 1; }
};
template <class Type>
using PersistentMath = std::conditional_t<std::is_same_v<Type, Float32>, ScalarMath<float>, FastMath>;

}  // namespace rnnfast::gpu

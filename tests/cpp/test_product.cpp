// A block's product against float64: vectors of every length around a chunk's, that start at multiples of 16 bytes or
// anywhere, with something behind their end that must not be read.
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "compare.h"
#include "cuda/product.cuh"
#include "layer_call.h"
#include "run_kernel.h"

namespace rnnfast::test {
namespace {

// result[n][i]: weight i times state n. `strides` apart, of weights and states.
template <class Type, class Product>
RNNFAST_KERNEL void product_kernel(typename Type::Compute* result, const typename Type::Storage* weights,
                                   const typename Type::Storage* states, int64_t stride, int64_t length, bool aligned) {
  Product product(
      length, aligned, [&](int i) { return weights + i * stride; }, [&](int n) { return states + n * stride; });
  product.fetch_first_states();
  product.run();
  gpu::sync_threads();
  for (int e = static_cast<int>(gpu::thread_index()); e < Product::kWeights * Product::kBatch; e += Product::kThreads)
    result[e] = Product::at(e % Product::kWeights, e / Product::kWeights);
}

// Vectors, `stride` apart after `shift` elements; NaN where there is no element of any.
struct Vectors {
  Values values;
  Buffer buffer;
  Vectors(DType dtype, int64_t count, int64_t stride, int64_t length, int64_t shift, std::mt19937_64& random)
      : values(static_cast<size_t>(shift + count * stride), std::numeric_limits<double>::quiet_NaN()) {
    std::uniform_real_distribution<double> uniform(-1, 1);
    for (int64_t v = 0; v < count; ++v)
      for (int64_t k = 0; k < length; ++k) values[static_cast<size_t>(shift + v * stride + k)] = uniform(random);
    round_to(dtype, values);
    buffer = Buffer(dtype, values);
  }
};

template <class Type, int kWeightTiles, int kBatchTiles, int kWarps>
void check_product(int64_t length, int64_t stride, int64_t shift, double tolerance) {
  using Product = gpu::BlockProduct<Type, kWeightTiles, kBatchTiles, kWarps>;
  using Storage = typename Type::Storage;
  const check::Note note(std::to_string(length) + " elements, " + std::to_string(stride) + " apart, " +
                         std::to_string(shift) + " after a multiple of 16 bytes");
  const DType dtype = dtype_of(Type::kArithmetic);
  std::mt19937_64 random(seed());
  Vectors weights(dtype, Product::kWeights, stride, length, shift, random);
  Vectors states(dtype, Product::kBatch, stride, length, shift, random);
  std::vector<double> expected;
  for (int64_t n = 0; n < Product::kBatch; ++n)
    for (int64_t i = 0; i < Product::kWeights; ++i) {
      double sum = 0;
      for (int64_t k = 0; k < length; ++k)
        sum += weights.values[static_cast<size_t>(shift + i * stride + k)] *
               states.values[static_cast<size_t>(shift + n * stride + k)];
      expected.push_back(sum);
    }
  Array<typename Type::Compute> result(expected.size());
  gpu::LaunchConfig config = blocks(1, Product::kThreads, Product::kSharedBytes);
  config.name = "product_kernel";
  const bool aligned = shift == 0 && stride * gpu::size_of(dtype) % 16 == 0;
  const std::string error = run(config, product_kernel<Type, Product>, result.device(),
                                static_cast<const Storage*>(weights.buffer.device()) + shift,
                                static_cast<const Storage*>(states.buffer.device()) + shift, stride, length, aligned);
  if (!CHECK_NO_ERROR(error)) return;
  expect_close("product", [&](size_t i) { return static_cast<double>(result[i]); }, expected.size(), expected,
               tolerance, {{"state", Product::kBatch}, {"weight", Product::kWeights}});
}

template <class Type, int kWeightTiles, int kBatchTiles, int kWarps> void check_lengths(double tolerance) {
  constexpr int64_t kVector = 16 / static_cast<int64_t>(sizeof(typename Type::Storage)), kChunk = 4 * kVector;
  const auto check = [&](int64_t length) {
    const int64_t whole = (length + kVector - 1) / kVector * kVector;
    for (const int64_t stride : {length, whole, whole + kVector})
      check_product<Type, kWeightTiles, kBatchTiles, kWarps>(length, stride, 0, tolerance);
    check_product<Type, kWeightTiles, kBatchTiles, kWarps>(length, whole, 1, tolerance);
  };
  // The race detector takes seconds a launch, and to it any whole word and any other length are alike.
  if (kSmallOnly)
    return for_each_seed(1, [&] {
      check_product<Type, kWeightTiles, kBatchTiles, kWarps>(kChunk + 1, kChunk + kVector, 0, tolerance);
      check_product<Type, kWeightTiles, kBatchTiles, kWarps>(kVector, kVector, 1, tolerance);
    });
  for_each_seed(2, [&] {
    // A chunk of one warp, and into that of the next.
    for (int64_t length = 1; length <= kChunk + kVector + 1; ++length) check(length);
    // Rings that are filled more than once; a last chunk that is full, and one of a single word.
    check(9 * kWarps * kChunk);
    check(9 * kWarps * kChunk + kVector);
  });
}

template <class Type> check::Case case_of(const char* name, double tolerance) {
  return {name, [tolerance] {
            check_lengths<Type, 2, 1, 2>(tolerance);
            check_lengths<Type, 1, 2, 3>(tolerance);
          }};
}

}  // namespace
}  // namespace rnnfast::test

CHECK_CASES(product) {
  using namespace rnnfast::test;
  using namespace rnnfast::gpu;
  // Operands are rounded to their types before; what is left is the sum's error, and the rounding to TF32.
  return {
      case_of<Float64>("float64", 1e-13),  case_of<Float32>("float32", 1e-5), case_of<Tf32>("tf32", 1e-2),
      case_of<BFloat16>("bfloat16", 2e-5), case_of<Float16>("float16", 2e-5),
  };
}

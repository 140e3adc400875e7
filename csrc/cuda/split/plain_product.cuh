// The products of the split kernels where no library is at hand: in the emulator, and in programs without torch. Right
// for every size, and slow.
#pragma once

#include "../elements.cuh"
#include "../primitives/execution.h"
#include "../primitives/launch.h"

namespace rnnfast::gpu {

// sums (D, rows, columns) = from (D, rows, length) times the weights, of which `column_stride` and `length_stride` are
// the elements from one column to the next, and from one element of the sum.
struct PlainProduct {
  const void* from{};
  const void* weight[kMaxDirections]{};
  int64_t column_stride[kMaxDirections]{}, length_stride[kMaxDirections]{};
  void* sums{};
  int64_t directions = 1, rows = 0, columns = 0, length = 0;
};

template <class Type> RNNFAST_KERNEL void plain_product(RNNFAST_GRID_CONSTANT const PlainProduct p) {
  using Storage = typename Type::Storage;
  using Compute = typename Type::Compute;
  const int64_t threads = int64_t{grid_size().x} * block_threads();
  const int64_t of_direction = p.rows * p.columns;
  for (int64_t i = int64_t{block_index().x} * block_threads() + thread_index(); i < p.directions * of_direction;
       i += threads) {
    const int64_t d = i / of_direction, row = i % of_direction / p.columns, column = i % p.columns;
    const Storage* from = at<Storage>(p.from, (d * p.rows + row) * p.length);
    const Storage* weight = at<Storage>(p.weight[d], column * p.column_stride[d]);
    Compute sum = 0;
    for (int64_t k = 0; k < p.length; ++k)
      sum = std::fma(convert<Compute>(from[k]), convert<Compute>(weight[k * p.length_stride[d]]), sum);
    *at<Compute>(p.sums, i) = sum;
  }
}

inline std::string run_plain_product(const PlainProduct& p, DType dtype, void* stream) {
  LaunchConfig config;
  // Few threads with much to do each: in the emulator a thread costs more than a sum.
  config.threads = kWarpSize;
  config.grid.x = 4;
  config.stream = stream;
  config.name = "plain_product";
  switch (dtype) {
    case DType::float64: return launch(config, plain_product<Float64>, p);
    case DType::bfloat16: return launch(config, plain_product<BFloat16>, p);
    case DType::float16: return launch(config, plain_product<Float16>, p);
    default: return launch(config, plain_product<Float32>, p);
  }
}

// By the matrices of a call: W^T where `by_rows`, as forward multiplies, else W.
inline PlainProduct plain_product_of(const Recurrence& r, Kind kind, bool by_rows, const void* from, void* sums) {
  PlainProduct p;
  const KindTraits& matrix = traits(kind);
  p.from = from;
  p.sums = sums;
  p.directions = r.directions;
  p.rows = r.rows.batch;
  p.columns = elements_of(by_rows ? matrix.rows : matrix.columns, r);
  p.length = elements_of(by_rows ? matrix.columns : matrix.rows, r);
  for (int64_t d = 0; d < r.directions; ++d) {
    const int64_t stride = r.parameters[kind].stride[d];
    p.weight[d] = r.parameters[kind].data[d];
    p.column_stride[d] = by_rows ? stride : 1;
    p.length_stride[d] = by_rows ? 1 : stride;
  }
  return p;
}

// "" or what went wrong.
inline std::string run_plain_product(const Recurrence& r, Kind kind, bool by_rows, const void* from, void* sums,
                                     void* stream) {
  return run_plain_product(plain_product_of(r, kind, by_rows, from, sums), r.dtype, stream);
}

}  // namespace rnnfast::gpu

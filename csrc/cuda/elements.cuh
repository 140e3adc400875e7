// How kernels name the elements of the tensors: at 64-bit offsets, read and written as the storage type and computed
// with as the compute type. A tensor that is not there reads as zeros, and what is written to it is dropped.
#pragma once

#include "arithmetic.cuh"

namespace rnnfast::gpu {

template <class T> RNNFAST_DEVICE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <class T> RNNFAST_DEVICE T* at(void* base, int64_t offset) { return static_cast<T*>(base) + offset; }

// Of direction d. Params: what the kernel is given, with `directions` and `rows`.
template <class Type, class Params> struct Elements {
  using Storage = typename Type::Storage;
  using Compute = typename Type::Compute;
  const Params& p;
  const unsigned d;

  // Index of unit u of this direction in a tensor of rows with `width` units a direction.
  RNNFAST_DEVICE int64_t in_rows(int64_t row, int64_t width, int64_t u) const {
    return (row * p.directions + d) * width + u;
  }
  // The same in (D, B, width).
  RNNFAST_DEVICE int64_t in_state(int64_t b, int64_t width, int64_t u) const {
    return (d * p.rows.layout.batch + b) * width + u;
  }
  RNNFAST_DEVICE static Compute read(const void* base, int64_t index) {
    return base ? convert<Compute>(*at<Storage>(base, index)) : Compute(0);
  }
  RNNFAST_DEVICE static void write(void* base, int64_t index, Compute value) {
    if (base) *at<Storage>(base, index) = convert<Storage>(value);
  }
};

}  // namespace rnnfast::gpu

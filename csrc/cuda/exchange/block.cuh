// A group of one block: shared memory and a barrier.
#pragma once

#include "exchange.cuh"

namespace rnnfast::gpu {

template <class Type, int kBatch> class Gather<Exchange::block, Type, kBatch> {
 public:
  RNNFAST_DEVICE Gather(const PersistentShared& p, const char* /*kernel*/) : place_{p} {}
  RNNFAST_DEVICE void begin() { sync_threads(); }  // after clear_operands()
  RNNFAST_DEVICE void end() {}

  RNNFAST_DEVICE void put(int /*turn*/, int n, int u, typename Type::Storage value) {
    *reinterpret_cast<typename Type::Storage*>(place_.operand(0, n, u)) = value;
  }
  RNNFAST_DEVICE void send(int /*turn*/) {}
  RNNFAST_DEVICE void receive(int /*turn*/) { sync_threads(); }  // all threads have written
  RNNFAST_DEVICE const std::byte* operands(int /*turn*/) const { return place_.operands(0); }

 private:
  const Place<Type> place_;
};

template <class Type, int kBatch> class Scatter<Exchange::block, Type, kBatch> {
 public:
  RNNFAST_DEVICE Scatter(const PersistentShared& p, const char* /*kernel*/) : place_{p} {}
  RNNFAST_DEVICE void begin() { sync_threads(); }  // after clear_operands()
  RNNFAST_DEVICE void end() {}

  RNNFAST_DEVICE void send(int /*turn*/, int tile, const float (&sums)[kBatch / kBatchTile][4]) {
    RNNFAST_UNROLL
    for (int j = 0; j < kBatch / kBatchTile; ++j) {
      const UnitSums part = unit_sums(tile, j, sums[j]);
      const int u = part.octet * kOctet + part.u;
      if (u < place_.units()) *reinterpret_cast<Word16*>(place_.sums() + u * sum_row(kBatch) + part.n) = part.sums;
    }
  }
  RNNFAST_DEVICE void sent(int /*turn*/) {}
  RNNFAST_DEVICE void receive(int /*turn*/) { sync_threads(); }  // all threads have written
  RNNFAST_DEVICE float sum(int /*turn*/, int u, int n) const { return place_.sums()[u * sum_row(kBatch) + n]; }

 private:
  const Place<Type> place_;
};

}  // namespace rnnfast::gpu

// What the row kernels share. A block takes a whole row: one batch index of one direction with all its units, kWidth of
// which a thread reads and writes at once.
#pragma once

#include "../cell.cuh"
#include "../elements.cuh"
#include "../primitives/dependent_launch.h"
#include "../primitives/execution.h"
#include "../rows.cuh"
#include "split.h"

namespace rnnfast::gpu {

// Legal: whole warps, up to 1024. With four units a thread a row of 1024 units in one go, and several rows an SM.
constexpr int kRowThreads = 256;

// The cell's functions: with 16-bit results an error of 1e-7 does not show.
template <class Type>
using SplitMath = std::conditional_t<sizeof(typename Type::Storage) == 2, FastMath, ScalarMath<typename Type::Compute>>;

template <class Type, class Params, int kWidth_> struct Row : Elements<Type, Params> {
  using typename Elements<Type, Params>::Storage;
  using typename Elements<Type, Params>::Compute;
  using Elements<Type, Params>::read;
  using Elements<Type, Params>::write;
  static constexpr int kWidth = kWidth_;
  using Values = Compute[kWidth];

  const int64_t b = block_index().x;
  const RowTurn turn = row_turn(this->p.rows, this->d, b);

  RNNFAST_DEVICE explicit Row(const Params& p) : Elements<Type, Params>{p, block_index().y} {}

  // The thread's first unit, and how far behind it is the next.
  RNNFAST_DEVICE static int64_t first_unit() { return int64_t{thread_index()} * kWidth; }
  RNNFAST_DEVICE static int64_t unit_stride() { return int64_t{block_threads()} * kWidth; }
  // Runs body(unit) for each unit of the thread, one by one: where rows are no steps.
  template <class Body> RNNFAST_DEVICE static void for_units(int64_t count, const Body& body) {
    for (int64_t unit = thread_index(); unit < count; unit += block_threads()) body(unit);
  }

  // kWidth elements of a tensor in the storage type, from `index` on; zeros of none.
  RNNFAST_DEVICE static void read(const void* base, int64_t index, Values& values) {
    read_as<Storage>(base, index, values);
  }
  RNNFAST_DEVICE static void write(void* base, int64_t index, const Values& values) {
    if (base) write_as<Storage>(base, index, values);
  }
  // The same of a workspace in the compute type.
  RNNFAST_DEVICE static void read_compute(const void* base, int64_t index, Values& values) {
    read_as<Compute>(base, index, values);
  }
  RNNFAST_DEVICE static void write_compute(void* base, int64_t index, const Values& values) {
    write_as<Compute>(base, index, values);
  }

 private:
  // 16-bit types have sums of twice their size, so that four of them are 16 bytes.
  template <class T> struct alignas(sizeof(T) * kWidth) Wide {
    T x[kWidth];
  };

  template <class T> RNNFAST_DEVICE static void read_as(const void* base, int64_t index, Values& values) {
    Wide<T> found{};
    if (base) found = *reinterpret_cast<const Wide<T>*>(at<T>(base, index));
    RNNFAST_UNROLL
    for (int v = 0; v < kWidth; ++v) values[v] = base ? convert<Compute>(found.x[v]) : Compute(0);
  }
  template <class T> RNNFAST_DEVICE static void write_as(void* base, int64_t index, const Values& values) {
    Wide<T> stored;
    RNNFAST_UNROLL
    for (int v = 0; v < kWidth; ++v) stored.x[v] = convert<T>(values[v]);
    *reinterpret_cast<Wide<T>*>(at<T>(base, index)) = stored;
  }
};

// The sums of a row as the product left them.
template <class Row> class PlainSums {
 public:
  // `first`: of the row's sums.
  RNNFAST_DEVICE PlainSums(const void* sums, int64_t first) : sums_(sums), first_(first) {}
  RNNFAST_DEVICE void read(int64_t i, typename Row::Values& values) const {
    Row::read_compute(sums_, first_ + i, values);
  }

 private:
  const void* const sums_;
  const int64_t first_;
};

}  // namespace rnnfast::gpu

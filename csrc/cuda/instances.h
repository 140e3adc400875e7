// What kernels are compiled for: each family of cells with each arithmetic. setup.py lists both, and writes a compile
// unit for each pair; a pair that it lacks does not link. Plain host code, no torch, no CUDA.
#pragma once

#include <array>
#include <utility>

#include "../recurrence.h"

namespace rnnfast::gpu {

// ---- families -------------------------------------------------------------------------------------------------------

// The first index in kCells, from `from` on, of a cell of this family; kModes where there is none.
constexpr int next_of_family(Family family, int from = 0) {
  while (from < kModes && kCells[from].family != family) ++from;
  return from;
}

constexpr int count_families() {
  int count = 0;
  while (next_of_family(static_cast<Family>(count)) < kModes) ++count;
  return count;
}
constexpr int kFamilies = count_families();

// Kernels take these from a family's first cell.
constexpr bool families_agree() {
  for (const CellTraits& cell : kCells) {
    const CellTraits& first = kCells[next_of_family(cell.family)];
    if (static_cast<int>(cell.family) >= kFamilies || cell.gates != first.gates || cell.reserve != first.reserve ||
        cell.has_cell_state != first.has_cell_state || cell.reads_previous_h != first.reads_previous_h ||
        cell.split_gate != first.split_gate || cell.may_project != first.may_project)
      return false;
  }
  return true;
}
static_assert(families_agree(), "cells of one family differ in more than a function, or a family has no cell");

// ---- arithmetic -----------------------------------------------------------------------------------------------------

// How a type is multiplied: float32 has two ways.
enum class Arithmetic { float64, float32, tf32, bfloat16, float16 };

// Their types (arithmetic.cuh).
struct Float64;
struct Float32;
struct Tf32;
struct BFloat16;
struct Float16;

inline Arithmetic arithmetic_of(DType dtype, bool allow_tf32) {
  switch (dtype) {
    case DType::float64: return Arithmetic::float64;
    case DType::bfloat16: return Arithmetic::bfloat16;
    case DType::float16: return Arithmetic::float16;
    default: return allow_tf32 ? Arithmetic::tf32 : Arithmetic::float32;
  }
}

constexpr int element_bytes(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::float64                                         ? 8
         : arithmetic == Arithmetic::bfloat16 || arithmetic == Arithmetic::float16 ? 2
                                                                                   : 4;
}
inline int64_t size_of(DType dtype) { return dtype == DType::float64 ? 8 : dtype == DType::float32 ? 4 : 2; }

// ---- the table ------------------------------------------------------------------------------------------------------

// Instance<family, type>::kernels() of every pair, to be looked up by both.
template <template <Family, class> class Instance> class InstanceTable {
  using Kernels = decltype(Instance<Family{}, Float32>::kernels());
  template <class... Types> struct Row {
    template <Family kFamily> static std::array<Kernels, sizeof...(Types)> of() {
      return {Instance<kFamily, Types>::kernels()...};
    }
  };
  // In the order of Arithmetic.
  using AllTypes = Row<Float64, Float32, Tf32, BFloat16, Float16>;
  using AllRows = std::array<decltype(AllTypes::template of<Family{}>()), kFamilies>;

  template <int... kIndex> static AllRows all(std::integer_sequence<int, kIndex...>) {
    return {AllTypes::template of<static_cast<Family>(kIndex)>()...};
  }

 public:
  static const Kernels& of(Family family, Arithmetic arithmetic) {
    static const AllRows table = all(std::make_integer_sequence<int, kFamilies>());
    return table[static_cast<size_t>(family)][static_cast<size_t>(arithmetic)];
  }
};

}  // namespace rnnfast::gpu

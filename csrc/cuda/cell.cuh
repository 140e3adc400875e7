// The cells of csrc/cells.h for kernels: a kernel is compiled for a family, and told the mode when it runs.
#pragma once

#include "arithmetic.cuh"
#include "instances.h"

namespace rnnfast::gpu {

// Beginning with the family's cell at kIndex of kCells.
template <Family kFamily, int kIndex = next_of_family(kFamily)> struct FamilyCell {
  static constexpr Mode kMode = kCells[kIndex].mode;
  static constexpr int kNext = next_of_family(kFamily, kIndex + 1);
  // What all cells of the family agree in.
  using Constants = CellConstants<kMode>;

  // Math: what cells.h calls (arithmetic.cuh).
  template <class Math, class... Args>
  RNNFAST_DEVICE static UnitState<typename Math::Value> forward(Mode mode, Args&&... args) {
    if constexpr (kNext < kModes) {
      if (mode != kMode) return FamilyCell<kFamily, kNext>::template forward<Math>(mode, args...);
    }
    return Cell<Math, kMode>::forward(args...);
  }
  template <class Math, class... Args> RNNFAST_DEVICE static void backward(Mode mode, Args&&... args) {
    if constexpr (kNext < kModes) {
      if (mode != kMode) return FamilyCell<kFamily, kNext>::template backward<Math>(mode, args...);
    }
    Cell<Math, kMode>::backward(args...);
  }
};

}  // namespace rnnfast::gpu

// What messages call a kernel. Plain host code.
#pragma once

#include <array>
#include <string>

#include "../instances.h"

namespace rnnfast::gpu {

// "step_forward<LSTM, float32>".
template <class Kernel, class Type> const char* name_of(Mode mode) {
  static const std::array<std::string, kModes> names = [] {
    std::array<std::string, kModes> all;
    for (int i = 0; i < kModes; ++i)
      all[static_cast<size_t>(i)] = std::string(Kernel::kName) + "<" + kCells[i].name + ", " + Type::kName + ">";
    return all;
  }();
  return names[static_cast<size_t>(mode)].c_str();
}

}  // namespace rnnfast::gpu

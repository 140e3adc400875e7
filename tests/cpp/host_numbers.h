// The number types of the kernels on the host: with nvcc the conversions of primitives/types.h are the device's alone.
#pragma once

#include <type_traits>

#include "cuda/primitives/types.h"

namespace rnnfast::test {

template <class T> T from_double(double value) {
  if constexpr (std::is_floating_point_v<T>)
    return static_cast<T>(value);
  else
#if defined(RNNFAST_EMULATED)
    return gpu::from_float<T>(static_cast<float>(value));
#else
    return T(static_cast<float>(value));
#endif
}

template <class T> double to_double(T value) {
  if constexpr (std::is_floating_point_v<T>)
    return value;
  else
#if defined(RNNFAST_EMULATED)
    return gpu::to_float(value);
#else
    return static_cast<float>(value);
#endif
}

}  // namespace rnnfast::test

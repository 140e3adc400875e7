// Where a layer's parameters stand among an op's arguments: each in a place of its own, the first direction's of a kind
// and then the reversed one's. Lists of tensors would not do: the stable interface empties a list that its caller still
// owns, and what packages compiled programs hands an empty list over as none.
#pragma once

#include <array>

#include "checks.h"

namespace rnnfast {

// A place's name among the arguments.
inline std::string place_name(const KindTraits& kind, int64_t direction) {
  return std::string(kind.name) + (direction ? "_reverse" : "");
}

// All are optional arguments: an op says itself which it needs.
struct Places : PerKind<std::array<OptionalTensor, kMaxDirections>> {
  static constexpr const char* kDefault = "=None";

  // In the order of the ops' arguments.
  template <class Use> void each(const Use& use) {
    for (const KindTraits& kind : kKinds)
      for (int64_t d = 0; d < kMaxDirections; ++d) use([&] { return place_name(kind, d); }, (*this)[kind.kind][d]);
  }

  int64_t directions() const {
    for (const auto& parameters : of)
      if (parameters[1]) return 2;
    return 1;
  }
};

inline const Tensor& required(const char* op, const KindTraits& kind, int64_t direction, const Places& places) {
  const OptionalTensor& tensor = places[kind.kind][direction];
  RNNFAST_CHECK(tensor, op, ": ", place_name(kind, direction), ": expected a tensor, got None");
  return *tensor;
}

// Whether a kind that a layer may lack is there: in each direction, or in none.
inline bool present(const char* op, const KindTraits& kind, int64_t directions, const Places& places) {
  const auto& parameters = places[kind.kind];
  RNNFAST_CHECK(directions == 1 || parameters[0].has_value() == parameters[1].has_value(), op, ": ", kind.name,
                ": expected it in both directions or in none, got it in one");
  return parameters[0].has_value();
}

}  // namespace rnnfast

// Where a layer's parameters stand among an op's arguments: each in a place of its own, the first direction's of a kind
// and then the reversed one's. Lists of tensors would not do: the stable interface empties a list that its caller still
// owns, and what packages compiled programs hands an empty list over as none.
#pragma once

#include "checks.h"

namespace rnnfast {

// A new kind of parameter is a line here, at the end: saved programs count places. rnnfast/signatures.py says what
// else.
#define RNNFAST_PLACES(PLACE) \
  PLACE(weight_ih)            \
  PLACE(weight_hh)            \
  PLACE(bias_ih)              \
  PLACE(bias_hh)              \
  PLACE(weight_hr)

#define RNNFAST_ONE(name) +1
constexpr size_t kPlaces = 0 RNNFAST_PLACES(RNNFAST_ONE);
#undef RNNFAST_ONE

// One direction's parameters.
struct Parameters {
#define RNNFAST_MEMBER(name) OptionalTensor name;
  RNNFAST_PLACES(RNNFAST_MEMBER)
#undef RNNFAST_MEMBER
};

struct Places {
  Parameters of[kMaxDirections];

  const Parameters& operator[](int64_t direction) const { return of[direction]; }
  int64_t directions() const {
#define RNNFAST_GIVEN(name) || of[1].name
    return (false RNNFAST_PLACES(RNNFAST_GIVEN)) ? 2 : 1;
#undef RNNFAST_GIVEN
  }
};

// A place's name among the arguments.
inline std::string place_name(const char* kind, int64_t direction) {
  return std::string(kind) + (direction ? "_reverse" : "");
}

inline const Tensor& required(const char* op, const char* kind, int64_t direction, const OptionalTensor& tensor) {
  RNNFAST_CHECK(tensor, op, ": ", place_name(kind, direction), ": expected a tensor, got None");
  return *tensor;
}

// Whether a kind that a layer may lack is there: in each direction, or in none.
inline bool present(const char* op, const char* kind, const Places& places, OptionalTensor Parameters::* member) {
  const bool first = (places[0].*member).has_value();
  if (places.directions() == 2)
    RNNFAST_CHECK((places[1].*member).has_value() == first, op, ": ", kind, ": expected it in both directions or in ",
                  "none, got it in one");
  return first;
}

}  // namespace rnnfast

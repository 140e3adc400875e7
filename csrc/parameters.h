// The kinds of parameters that a layer has, and what the kernels are given of them. No torch header here.
// rnnfast/signatures.py has the same table for Python.
#pragma once

#include <cstdint>
#include <iterator>

namespace rnnfast {

constexpr int kMaxDirections = 2;

// A new kind goes to the end (saved programs count places), here and in the table; beside it the kernels that use it.
enum class Kind { weight_ih, weight_hh, bias_ih, bias_hh, weight_hr };

// Of a dimension: G*H, I, P with projection and else H, H.
enum class Size { none, gates, input, state, hidden };
// What a layer has a kind with.
enum class Option { always, bias, projection };

struct KindTraits {
  Kind kind;
  const char* name;
  Option option;
  Size rows, columns = Size::none;

  constexpr bool is_matrix() const { return columns != Size::none; }
  // A matrix of the recurrence, which backward multiplies with as well; all else makes the input projection.
  constexpr bool multiplies_steps() const { return is_matrix() && columns != Size::input; }
};

// In the order of Kind.
constexpr KindTraits kKinds[] = {
    {Kind::weight_ih, "weight_ih", Option::always, Size::gates, Size::input},
    {Kind::weight_hh, "weight_hh", Option::always, Size::gates, Size::state},
    {Kind::bias_ih, "bias_ih", Option::bias, Size::gates},
    {Kind::bias_hh, "bias_hh", Option::bias, Size::gates},
    {Kind::weight_hr, "weight_hr", Option::projection, Size::state, Size::hidden},
};
constexpr int kKindCount = static_cast<int>(std::size(kKinds));

constexpr bool kinds_fit() {
  for (int i = 0; i < kKindCount; ++i)
    if (static_cast<int>(kKinds[i].kind) != i) return false;
  return true;
}
static_assert(kinds_fit());

constexpr const KindTraits& traits(Kind kind) { return kKinds[static_cast<int>(kind)]; }

// Which matrix of the recurrence multiplies vectors of this size: the state, or what is projected.
constexpr Kind multiplier_of(Size columns) {
  int found = 0;
  while (!(kKinds[found].multiplies_steps() && kKinds[found].columns == columns)) ++found;
  return kKinds[found].kind;
}

// Something of every kind: parameters[Kind::weight_hh].
template <class T> struct PerKind {
  T of[kKindCount]{};

  constexpr T& operator[](Kind kind) { return of[static_cast<int>(kind)]; }
  constexpr const T& operator[](Kind kind) const { return of[static_cast<int>(kind)]; }
};

// The parameters of a kind, one a direction.
struct Operand {
  const void* data[kMaxDirections]{};  // null: the layer has none
  int64_t stride[kMaxDirections]{};    // of a matrix: elements from one row to the next
};
using Operands = PerKind<Operand>;

}  // namespace rnnfast

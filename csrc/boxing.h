// From a function to what the dispatcher calls: as torch's TORCH_BOX, but for one parameter, Places, that takes several
// of the op's arguments.
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "places.h"

namespace rnnfast {

template <class T> struct Unboxed {
  static constexpr size_t kArguments = 1;
  static T take(StableIValue*& next) { return torch::stable::detail::to<T>(*next++); }
};

template <> struct Unboxed<Places> {
  static constexpr size_t kArguments = kPlaces * kMaxDirections;
  static Places take(StableIValue*& next) {
    Places places;
#define RNNFAST_TAKE(name) \
  for (Parameters& direction : places.of) direction.name = Unboxed<OptionalTensor>::take(next);
    RNNFAST_PLACES(RNNFAST_TAKE)
#undef RNNFAST_TAKE
    return places;
  }
};

template <class... T> void put_results(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... each) { ((*stack++ = torch::stable::detail::from(each)), ...); }, results);
}
inline void put_results(StableIValue* stack, const Tensor& result) { *stack = torch::stable::detail::from(result); }

template <auto function> struct Boxed;
template <class Result, class... Arguments, Result (*function)(Arguments...)> struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    constexpr size_t kExpected = (Unboxed<Arguments>::kArguments + ...);
    RNNFAST_CHECK(arguments == kExpected, "rnnfast: an op's schema has ", arguments, " arguments, its kernel ",
                  kExpected);
    StableIValue* next = stack;
    // Braces, because they keep to the order.
    std::tuple<Arguments...> taken{Unboxed<Arguments>::take(next)...};
    put_results(stack, std::apply(function, std::move(taken)));
  }
};

}  // namespace rnnfast

// From a function to what the dispatcher calls: as torch's TORCH_BOX, but a parameter may be a record that takes
// several of the op's arguments (Sequences, Places).
#pragma once

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "checks.h"

namespace rnnfast {

// A record calls use(name, member) for each of its arguments, in their order; name() makes the name, which a call of
// the op does without.
template <class T>
concept Record = requires(T record) { record.each([](const auto&, auto&) {}); };

inline const char* schema_type(const OptionalTensor&) { return "Tensor?"; }
inline const char* schema_type(bool) { return "bool"; }
inline const char* schema_type(double) { return "float"; }
inline const char* schema_type(int64_t) { return "int"; }
inline const char* schema_type(const std::string&) { return "str"; }

// The record's arguments as a schema has them, after others.
template <Record T> std::string schema_of() {
  std::string text;
  T().each([&](const auto& name, const auto& argument) {
    text += std::string(", ") + schema_type(argument) + " " + name();
    if constexpr (requires { T::kDefault; }) text += T::kDefault;
  });
  return text;
}

template <class T> struct Unboxed {
  static uint64_t arguments() { return 1; }
  static T take(StableIValue*& next) { return torch::stable::detail::to<T>(*next++); }
};

template <Record T> struct Unboxed<T> {
  static uint64_t arguments() {
    uint64_t count = 0;
    T().each([&](const auto&, const auto&) { ++count; });
    return count;
  }
  static T take(StableIValue*& next) {
    T record;
    record.each([&]<class Member>(const auto&, Member& member) { member = Unboxed<Member>::take(next); });
    return record;
  }
};

template <class T> void put_result(StableIValue*& next, T result) {
  if constexpr (Record<T>)
    result.each([&](const auto&, const auto& member) { put_result(next, member); });
  else
    *next++ = torch::stable::detail::from(result);
}
template <class... T> void put_results(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const T&... each) { (put_result(stack, each), ...); }, results);
}
inline void put_results(StableIValue* stack, const Tensor& result) { put_result(stack, result); }

template <auto function> struct Boxed;
template <class Result, class... Arguments, Result (*function)(Arguments...)> struct Boxed<function> {
  static void call(StableIValue* stack, uint64_t arguments, uint64_t) {
    static const uint64_t expected = (Unboxed<Arguments>::arguments() + ...);
    RNNFAST_CHECK(arguments == expected, "rnnfast: an op's schema has ", arguments, " arguments, its kernel ",
                  expected);
    StableIValue* next = stack;
    // Braces, because they keep to the order.
    std::tuple<Arguments...> taken{Unboxed<Arguments>::take(next)...};
    put_results(stack, std::apply(function, std::move(taken)));
  }
};

}  // namespace rnnfast

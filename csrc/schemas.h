// The schemas of the ops that every backend has. Shapes: docs/design.md. rnnfast/signatures.py has the same for Python.
#pragma once

#include <torch/csrc/stable/library.h>

#include "places.h"

namespace rnnfast {

// Every op ends with a layer's parameters. All are optional: an op says itself which it needs.
inline std::string with_places(const std::string& name_and_arguments, const char* results) {
  std::string schema = name_and_arguments;
#define RNNFAST_ARGUMENTS(name) \
  for (int64_t d = 0; d < kMaxDirections; ++d) schema += ", Tensor? " + place_name(#name, d) + "=None";
  RNNFAST_PLACES(RNNFAST_ARGUMENTS)
#undef RNNFAST_ARGUMENTS
  return schema + ") -> " + results;
}

template <class Library> void define_layer_ops(Library& library) {
  const std::string shared = "Tensor? hx, Tensor? cx, Tensor? batch_sizes, Tensor? lengths, Tensor? resets";
  const char* const five = "(Tensor, Tensor, Tensor, Tensor, Tensor)";
  const auto define = [&](const std::string& arguments, const char* results) {
    library.def(with_places(arguments, results).c_str());
  };
  define("input_projection(str mode, Tensor input", "Tensor");
  define("recurrence_forward(str mode, bool batch_first, bool save_reserve, Tensor gates, " + shared, five);
  define(
      "recurrence_backward(str mode, bool batch_first, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cell_states, Tensor? output, Tensor cell_states, Tensor reserve, " +
          shared,
      five);
  define("layer_forward(str mode, bool batch_first, Tensor input, " + shared, five);
  define("layer(str mode, bool batch_first, Tensor input, " + shared, "(Tensor, Tensor, Tensor)");
  library.def("matmul(Tensor a, Tensor b) -> Tensor");
}

}  // namespace rnnfast

// The schemas of the ops that every backend has. Shapes: docs/design.md. rnnfast/signatures.py has the same for Python.
#pragma once

#include "boxing.h"
#include "places.h"
#include "sequences.h"

namespace rnnfast {

template <class Library> void define_layer_ops(Library& library) {
  // Every op ends with the initial states, how the rows lie, and a layer's parameters.
  const auto define = [&](const std::string& name_and_arguments, const char* results) {
    const std::string shared = ", Tensor? hx, Tensor? cx" + schema_of<Sequences>() + schema_of<Places>();
    library.def((name_and_arguments + shared + ") -> " + results).c_str());
  };
  const char* const five = "(Tensor, Tensor, Tensor, Tensor, Tensor)";
  define("layer_forward(str mode, Tensor input", five);
  define("layer(str mode, Tensor input", "(Tensor, Tensor, Tensor)");
  define(
      "recurrence_backward(str mode, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor? grad_cell_states, Tensor? output, Tensor cell_states, Tensor reserve",
      five);
}

// The op of a layer whose weights were packed once, on the CPU alone: panels (csrc/cpu/panels.h) in the weights'
// places.
template <class Library> void define_quantized_op(Library& library) {
  const std::string schema =
      "quantized_layer(str weights, int hidden_size, int proj_size, str mode, Tensor input, Tensor? hx, Tensor? cx" +
      schema_of<Sequences>() + schema_of<Places>() + ") -> (Tensor, Tensor, Tensor)";
  library.def(schema.c_str());
}

}  // namespace rnnfast

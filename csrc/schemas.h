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

// One step of a layer with one direction and no projection, on the CPU alone, where passing arguments and results takes
// as long as the step: few of them, and None where there is nothing.
//   step: output, h_n (None where rows are (B, I)), c_n, and with `saves` cell_states and reserve, as layer_forward.
//   step_backward: all that goes to what came before the step: grad_gates, grad_gates_hh, grad_hx and grad_cx as of
//   recurrence_backward, and grad_input, as the input.
template <class Library> void define_step_ops(Library& library) {
  library.def(
      "step(str mode, bool saves, Tensor input, Tensor? hx, Tensor? cx, bool batch_first, Tensor weight_ih, "
      "Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?)");
  library.def(
      "step_backward(str mode, bool wants_input, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, "
      "Tensor input, Tensor? output, Tensor? cell_states, Tensor? reserve, Tensor? hx, Tensor? cx, bool batch_first, "
      "Tensor weight_ih, Tensor weight_hh) -> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?)");
}

}  // namespace rnnfast

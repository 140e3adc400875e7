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

// The whole backward pass of a layer, on the CPU alone: the gradients of layer_forward's tensors, in their order, None
// for those whose bit is not set in `wanted` (bit 0: of the input) and for what the layer does not have.
//   by_aten: products of matrices in float32 and float64 are ATen's, which is for the caller to know.
template <class Library> void define_layer_backward(Library& library) {
  std::string schema =
      "layer_backward(str mode, bool by_aten, int wanted, Tensor input, Tensor? grad_output, Tensor? grad_h_n, "
      "Tensor? grad_c_n, Tensor? grad_cell_states, Tensor? output, Tensor? cell_states, Tensor? reserve, Tensor? hx, "
      "Tensor? cx" +
      schema_of<Sequences>() + schema_of<Places>() + ") -> (Tensor?, Tensor?, Tensor?";
  for (int place = 0; place < kKindCount * kMaxDirections; ++place) schema += ", Tensor?";
  library.def((schema + ")").c_str());
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

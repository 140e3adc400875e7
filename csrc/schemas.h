// The schemas of the ops that every backend has. Shapes: docs/design.md.
#pragma once

#include <torch/csrc/stable/library.h>

namespace rnnfast {

template <class Library> void define_layer_ops(Library& library) {
  library.def("input_gates(str mode, Tensor input, Tensor[] weight_ih, Tensor[] bias_ih, Tensor[] bias_hh) -> Tensor");
  library.def(
      "recurrence_forward(str mode, Tensor gates, Tensor[] weight_hh, Tensor[] bias_hh, Tensor[] weight_hr, Tensor? "
      "hx, "
      "Tensor? cx, Tensor? batch_sizes, Tensor? lengths, Tensor? resets, bool batch_first, bool save_reserve) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "recurrence_backward(str mode, Tensor? grad_output, Tensor? grad_h_n, Tensor? grad_c_n, Tensor? grad_cells, "
      "Tensor output, Tensor cells, Tensor reserve, Tensor[] weight_hh, Tensor[] weight_hr, Tensor? hx, Tensor? cx, "
      "Tensor? batch_sizes, Tensor? lengths, Tensor? resets, bool batch_first) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def(
      "layer_inference(str mode, Tensor input, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, "
      "Tensor[] bias_hh, Tensor[] weight_hr, Tensor? hx, Tensor? cx, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, bool batch_first) -> (Tensor, Tensor, Tensor)");
  library.def(
      "layer_forward(str mode, Tensor input, Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, "
      "Tensor[] bias_hh, Tensor[] weight_hr, Tensor? hx, Tensor? cx, Tensor? batch_sizes, Tensor? lengths, "
      "Tensor? resets, bool batch_first) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  library.def("matmul(Tensor a, Tensor b) -> Tensor");
}

}  // namespace rnnfast

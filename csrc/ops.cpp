// Defines rnnfast's ops, nothing else.
#include "schemas.h"
#include "variants/arguments.h"

STABLE_TORCH_LIBRARY(rnnfast, library) {
  rnnfast::define_layer_ops(library);
  rnnfast::define_quantized_op(library);
  rnnfast::define_step_ops(library);
  rnnfast::define_layer_backward(library);
  rnnfast::define_variant_ops(library);
  library.def("matmul(Tensor a, Tensor b) -> Tensor");  // on the CPU alone
  library.def("use_cpu_isa(str name) -> str");
  library.def("cpu_vendor() -> str");
  library.def("use_cpu_team(str name) -> str");
  library.def("cpu_allow_bf16(bool allowed) -> ()");
  library.def("core_latency(int rounds) -> float");
}

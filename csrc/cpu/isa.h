// Which of the compiled instruction sets this processor has, and which one is in use.
#pragma once

#include <string>

#include "kernels.h"

namespace rnnfast::cpu {

// The kernels in use: of the widest ISA that the processor has, or of the one that RNNFAST_CPU_ISA or use_isa() asked
// for.
const Kernels& kernels(DType dtype);
PanelForward panel_forward(PanelType type);

// Switches to avx512_vnni, avx512, avx2 or portable ("" keeps the current one). Returns the name in use; an empty
// string if the processor lacks what was asked for or the name is unknown. Meant for tests and measurements.
std::string use_isa(const std::string& name);

}  // namespace rnnfast::cpu

// Which of the compiled instruction sets this processor has, and which one is in use.
#pragma once

#include <string>

#include "kernels.h"
#include "variants/kernels.h"

namespace rnnfast::cpu {

// The kernels in use: of the widest ISA that the processor has, or of the one that RNNFAST_CPU_ISA or use_isa() asked
// for. In float32 those that multiply in bfloat16 where that is allowed and the ISA has them.
const Kernels& kernels(DType dtype);
void allow_bf16(bool allowed);
PanelForward panel_forward(PanelType type);
const VariantKernels& variant_kernels(DType dtype);

// Switches to amx_bf16, avx512_bf16, avx512_vnni, avx512, avx2 or portable ("" keeps the current one). Returns the name
// in use; an empty string if the processor lacks what was asked for or the name is unknown. Meant for tests and
// measurements.
std::string use_isa(const std::string& name);

// Who made the processor: "intel", "amd", or "" for any other. Libraries of the makers are made for their own.
std::string processor_vendor();

}  // namespace rnnfast::cpu

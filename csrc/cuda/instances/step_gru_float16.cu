#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepGruFloat16 = StepInstance<GruStep, Float16>::kernels();
}

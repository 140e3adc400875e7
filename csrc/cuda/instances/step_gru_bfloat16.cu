#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepGruBfloat16 = StepInstance<GruStep, BFloat16>::kernels();
}

#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepGruFloat64 = StepInstance<GruStep, Float64>::kernels();
}

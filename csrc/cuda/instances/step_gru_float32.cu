#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepGruFloat32 = StepInstance<GruStep, Float32>::kernels();
}

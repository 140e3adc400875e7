#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepGruTf32 = StepInstance<GruStep, Tf32>::kernels();
}

#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepRnnTf32 = StepInstance<RnnStep, Tf32>::kernels();
}

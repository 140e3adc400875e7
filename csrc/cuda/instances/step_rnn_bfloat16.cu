#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepRnnBfloat16 = StepInstance<RnnStep, BFloat16>::kernels();
}

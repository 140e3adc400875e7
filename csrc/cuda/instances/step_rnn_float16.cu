#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepRnnFloat16 = StepInstance<RnnStep, Float16>::kernels();
}

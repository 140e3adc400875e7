#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepRnnFloat64 = StepInstance<RnnStep, Float64>::kernels();
}

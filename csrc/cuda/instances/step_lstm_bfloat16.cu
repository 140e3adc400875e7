#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepLstmBfloat16 = StepInstance<LstmStep, BFloat16>::kernels_with_projection();
}

#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepLstmTf32 = StepInstance<LstmStep, Tf32>::kernels_with_projection();
}

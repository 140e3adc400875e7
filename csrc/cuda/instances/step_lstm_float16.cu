#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepLstmFloat16 = StepInstance<LstmStep, Float16>::kernels_with_projection();
}

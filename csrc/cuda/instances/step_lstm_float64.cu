#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepLstmFloat64 = StepInstance<LstmStep, Float64>::kernels_with_projection();
}

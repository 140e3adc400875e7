#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepLstmFloat32 = StepInstance<LstmStep, Float32>::kernels_with_projection();
}

#include "../step.cuh"

namespace rnnfast::gpu {
const StepKernels kStepRnnFloat32 = StepInstance<RnnStep, Float32>::kernels();
}

// What the plan is told of the current device. No CUDA header here, so that it can stand beside torch's.
#pragma once

#include <string>

#include "plan/costs.h"

namespace rnnfast::gpu {

// Asked once for each device; "", or what went wrong. In the emulator a small Hopper card's.
std::string current_properties(DeviceProperties& properties);

}  // namespace rnnfast::gpu

// What the host code asks of the CUDA devices. No CUDA header here, so that it can stand beside torch's.
#pragma once

#include <cstdint>
#include <string>

namespace rnnfast::gpu {

int device_count();  // 0 where there is no card or no usable driver
// "" where kernels can run on the current device, else why not, in words a user can act upon.
std::string device_problem();
// Whether launches on the current device may overlap with their predecessor's end: whether it is a Hopper card or a
// later one, and the kernels are built for such a one.
bool has_dependent_launch();

// On the stream, within the device's memory; "" or what went wrong.
std::string copy_on_device(void* to, const void* from, int64_t bytes, void* stream);
std::string zero_on_device(void* to, int64_t bytes, void* stream);

// The bytes of a device's memory; "", or the error of a kernel or copy that no call on this device gets past any more.
std::string device_memory(int device, int64_t& free, int64_t& total);

}  // namespace rnnfast::gpu

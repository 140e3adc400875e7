// What has been launched in the emulator: tests ask whether the kernels that they mean to test have run.
#pragma once

#include <string>

namespace rnnfast::emulator {

// A line "COUNT NAME" for each kernel launched since the last call.
std::string launched();

}  // namespace rnnfast::emulator

// A call of the persistent kernels: what they are given, filled in from the op's arguments. Plain host code.
#pragma once

#include <string>

#include "persistent.h"

namespace rnnfast::gpu {

// Scratch in device memory.
struct PersistentWorkspace {
  void* words{};       // exchange_bytes() zeros
  int64_t* offsets{};  // packed rows: (T + 1), filled in on the stream
};

// Packed rows: the first row of each step, into device memory. Launched, not copied: a graph can capture it.
std::string write_offsets(const RowLayout& rows, int64_t* offsets, void* stream);

// Of a launch.
inline int64_t groups_of(const PersistentLayout& layout, const Recurrence& r) {
  return groups_a_launch(layout, r.rows.batch) * r.directions;
}
inline int64_t exchange_bytes(const PersistentLayout& layout, const Recurrence& r, bool backward) {
  return exchange_bytes(layout, groups_of(layout, r), static_cast<int>(size_of(r.dtype)), backward);
}

// Both: "" or what went wrong. p.gates is given. layout: from plan.h.
std::string run_persistent_forward(const ForwardParams& p, const PersistentLayout& layout,
                                   const PersistentWorkspace& workspace, bool allow_tf32, void* stream);
std::string run_persistent_backward(const BackwardParams& p, const PersistentLayout& layout,
                                    const PersistentWorkspace& workspace, bool allow_tf32, void* stream);

// Why the current device cannot run the layout, "" where it can: asked before anything is launched.
std::string why_not_resident(Mode mode, Arithmetic arithmetic, const PersistentLayout& layout, int64_t batch,
                             int64_t directions, bool backward);

}  // namespace rnnfast::gpu

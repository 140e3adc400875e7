// What the forward and the backward time loop share: the workspace of a call, packed weights, and the walk over a
// group's steps.
#pragma once

#include "../cells.h"
#include "schedule.h"
#include "tile.h"

namespace rnnfast::cpu {
namespace {

// A state buffer of the group's rows: (rows, row stride), whole vectors wide, so that vectors may be read past the last
// unit.
template <class Compute> struct StateBuffer {
  Compute* data = nullptr;
  int64_t stride = 0;

  void place(Workspace& workspace, int64_t rows, int64_t width) {
    // One more vector keeps rows of a power-of-two width out of the same cache sets.
    stride = sum(round_up(width, kLanes<Compute>), kLanes<Compute>);
    data = workspace.take<Compute>(rows, stride);
  }
  Compute* row(int64_t r) const { return data + r * stride; }
};

// What the next step reads: the value, or zero where a segment ends. A select, not a product: a NaN must not cross.
template <class Compute> RNNFAST_INLINE Vector<Compute> unless(bool cut, Vector<Compute> value) {
  return cut ? Vector<Compute>{} : value;
}

// Pointer arithmetic on tensors of any storage type.
template <class Storage> RNNFAST_INLINE const Storage* at(const void* base, int64_t offset) {
  return static_cast<const Storage*>(base) + offset;
}
template <class Storage> RNNFAST_INLINE Storage* at(void* base, int64_t offset) {
  return static_cast<Storage*>(base) + offset;
}

// Zeroes the rows beyond each row's length in a (rows, width) tensor of the group's direction.
template <class Storage>
inline void zero_beyond_lengths(const GroupRows& rows, Storage* tensor, int64_t row_stride, int64_t offset,
                                int64_t width, int rank, int members) {
  if (!rows.schedule.has_lengths() || !tensor) return;
  const Share share = share_of(rows.count(), rank, members);
  for (int64_t r = share.first; r < share.last; ++r) {
    const int64_t b = rows.batch_index(r);
    for (int64_t t = rows.schedule.length(b); t < rows.schedule.steps(); ++t)
      std::memset(static_cast<void*>(tensor + rows.schedule.row(t, b) * row_stride + offset), 0,
                  static_cast<size_t>(width) * sizeof(Storage));
  }
}

}  // namespace
}  // namespace rnnfast::cpu

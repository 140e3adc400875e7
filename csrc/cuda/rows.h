// Which rows of the tensors a launch works on, as the host tells it to the kernels (rows.cuh). A row is what it is in
// RowLayout: one step t of one batch index b. Plain host code, no torch, no CUDA.
#pragma once

#include <vector>

#include "../recurrence.h"

namespace rnnfast::gpu {

// What one direction does in one launch. `before` and `after` are its neighbours in the order in which the direction
// takes its steps: for the reversed one, before is time + 1.
struct Turn {
  int64_t time = 0;  // in backward's last turn outside [0, T): there only gradients are handed on to hx and cx
  int64_t row = 0, before_row = 0, after_row = 0;  // of batch index 0 at each of the three steps
  // How many batch indices have a row there; where lengths are given, not all of these rows are steps of a sequence.
  int64_t active = 0, before_active = 0, after_active = 0;
};

struct TurnRows {
  RowLayout layout;  // lengths and resets in device memory
  Turn turn[kMaxDirections];
};

// Where a direction's steps lie. offsets: of packed rows (T + 1), the first row of each step and their number; else
// null. For kernels too, which go through the steps by themselves.
struct Steps {
  RowLayout layout;
  const int64_t* offsets = nullptr;

  RNNFAST_HOST_DEVICE int64_t row(int64_t t) const {
    if (!exists(t)) return 0;
    return offsets ? offsets[t] : t * layout.step_stride;
  }
  RNNFAST_HOST_DEVICE int64_t active(int64_t t) const {
    if (!exists(t)) return 0;
    return offsets ? offsets[t + 1] - offsets[t] : layout.batch;
  }
  RNNFAST_HOST_DEVICE Turn turn(int64_t time, bool reversed) const {
    const int64_t before = reversed ? time + 1 : time - 1, after = reversed ? time - 1 : time + 1;
    return {time, row(time), row(before), row(after), active(time), active(before), active(after)};
  }

 private:
  RNNFAST_HOST_DEVICE bool exists(int64_t t) const { return t >= 0 && t < layout.steps; }
};

// The turns of a call.
class Turns {
 public:
  explicit Turns(const RowLayout& layout) : layout_(layout) {
    if (!layout.batch_sizes) return;
    layout_.batch_stride = 1;
    offsets_.reserve(static_cast<size_t>(layout.steps) + 1);
    offsets_.push_back(0);
    for (int64_t t = 0; t < layout.steps; ++t) offsets_.push_back(offsets_.back() + layout.batch_sizes[t]);
  }
  const RowLayout& layout() const { return layout_; }
  Turn turn(int64_t time, bool reversed) const {
    return Steps{layout_, offsets_.empty() ? nullptr : offsets_.data()}.turn(time, reversed);
  }

 private:
  RowLayout layout_;
  std::vector<int64_t> offsets_;
};

}  // namespace rnnfast::gpu

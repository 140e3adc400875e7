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

// The turns of a call.
class Turns {
 public:
  explicit Turns(const RowLayout& layout) : layout_(layout) {
    if (!layout.batch_sizes) return;
    layout_.batch_stride = 1;
    offsets_.reserve(static_cast<size_t>(layout.steps));
    int64_t sum = 0;
    for (int64_t t = 0; t < layout.steps; ++t) {
      offsets_.push_back(sum);
      sum += layout.batch_sizes[t];
    }
  }

  const RowLayout& layout() const { return layout_; }
  Turn turn(int64_t time, bool reversed) const {
    const int64_t before = reversed ? time + 1 : time - 1, after = reversed ? time - 1 : time + 1;
    return {time, row(time), row(before), row(after), active(time), active(before), active(after)};
  }

 private:
  bool exists(int64_t t) const { return t >= 0 && t < layout_.steps; }
  int64_t row(int64_t t) const {
    if (!exists(t)) return 0;
    return layout_.batch_sizes ? offsets_[static_cast<size_t>(t)] : t * layout_.step_stride;
  }
  int64_t active(int64_t t) const {
    if (!exists(t)) return 0;
    return layout_.batch_sizes ? layout_.batch_sizes[t] : layout_.batch;
  }

  RowLayout layout_;
  std::vector<int64_t> offsets_;
};

}  // namespace rnnfast::gpu

// What a row is at a turn: the one place where kernels look at lengths, packing and resets. What else of a step's
// inputs says which state a row starts from belongs here too.
#pragma once

#include "primitives/platform.h"
#include "rows.h"

namespace rnnfast::gpu {

// The row of one batch index at one turn. "cut": a segment boundary lies between the two steps, and no state crosses
// it. All that is true of it is one word, so that kernels can keep it: to find it takes loads.
struct RowTurn {
  enum Fact : uint32_t {
    kInBatch = 1,   // there is such a batch index
    kInMemory = 2,  // there is such a row
    kActive = 4,    // it is a step of its sequence; so the rows before and after
    kBefore = 8,
    kAfter = 16,
    kCutBefore = 32,
    kCutAfter = 64,
    kEmpty = 128  // its sequence has no step at all
  };
  uint32_t facts = 0;
  int64_t row = 0, before_row = 0, after_row = 0;

  RNNFAST_DEVICE bool in_batch() const { return facts & kInBatch; }
  RNNFAST_DEVICE bool in_memory() const { return facts & kInMemory; }
  RNNFAST_DEVICE bool active() const { return facts & kActive; }
  RNNFAST_DEVICE bool before() const { return facts & kBefore; }
  RNNFAST_DEVICE bool after() const { return facts & kAfter; }
  RNNFAST_DEVICE bool cut_before() const { return facts & kCutBefore; }
  RNNFAST_DEVICE bool cut_after() const { return facts & kCutAfter; }
  RNNFAST_DEVICE bool empty() const { return facts & kEmpty; }

  // The sequence's first step in this order was the turn before's: here its gradients reach hx and cx. A forward
  // direction meets the boundary before that step here.
  RNNFAST_DEVICE bool has_left() const { return (facts & (kInBatch | kActive | kAfter)) == (kInBatch | kAfter); }
  // State comes from the row before, gradients from the row after.
  RNNFAST_DEVICE bool follows() const { return (facts & (kBefore | kCutBefore)) == kBefore; }
  RNNFAST_DEVICE bool is_followed() const { return (facts & (kAfter | kCutAfter)) == kAfter; }
};

RNNFAST_DEVICE RowTurn row_turn(const TurnRows& rows, unsigned d, int64_t b) {
  RowTurn r;
  const RowLayout& layout = rows.layout;
  if (b >= layout.batch) return r;
  const auto note = [&](RowTurn::Fact fact, bool holds) { r.facts |= holds ? fact : 0u; };
  const Turn& turn = rows.turn[d];
  int64_t length = layout.lengths ? layout.lengths[b] : layout.steps;
  if (length > layout.steps) length = layout.steps;
  const bool reversed = d == 1;
  const int64_t before = reversed ? turn.time + 1 : turn.time - 1, after = reversed ? turn.time - 1 : turn.time + 1;
  const bool in_memory = b < turn.active, active = turn.time >= 0 && turn.time < length && in_memory;
  const bool has_before = before >= 0 && before < length && b < turn.before_active;
  const bool has_after = after >= 0 && after < length && b < turn.after_active;
  note(RowTurn::kInBatch, true);
  note(RowTurn::kInMemory, in_memory);
  note(RowTurn::kActive, active);
  note(RowTurn::kBefore, has_before);
  note(RowTurn::kAfter, has_after);
  note(RowTurn::kEmpty, length <= 0);
  r.row = turn.row + b * layout.batch_stride;
  r.before_row = turn.before_row + b * layout.batch_stride;
  r.after_row = turn.after_row + b * layout.batch_stride;
  if (layout.has_segments()) {
    // The boundary of step t stands before it in time, so a reversed direction meets it on leaving t.
    const bool here = active && layout.starts_segment(r.row);
    note(RowTurn::kCutBefore, reversed ? has_before && layout.starts_segment(r.before_row) : here);
    note(RowTurn::kCutAfter, reversed ? here : has_after && layout.starts_segment(r.after_row));
  }
  return r;
}

// Whether this turn is the direction's first: there a sequence without any step hands hx and cx through.
RNNFAST_DEVICE bool is_first_turn(const TurnRows& rows, unsigned d) {
  return rows.turn[d].time == (d == 1 ? rows.layout.steps - 1 : 0);
}

// Whether this turn is the direction's last of backward: there such a sequence hands the final gradients through.
RNNFAST_DEVICE bool is_last_turn(const TurnRows& rows, unsigned d) {
  return rows.turn[d].time == (d == 1 ? rows.layout.steps : -1);
}

// ---- the same for kernels that take all turns themselves ------------------------------------------------------------
// There a row is its length and its distance from batch index 0, and what all rows of a turn share is found once a
// turn. Numbers of rows and steps are below 2^31 there.

// What a direction's turn is for every row.
struct TurnStep {
  int time;         // of the step; of backward's last turn outside [0, T)
  bool reversed;    // of the direction
  uint32_t row;     // of batch index 0 at the step, where there is one
  uint32_t before;  // and at the steps before and after it, in the direction's order
  uint32_t after;
};

struct RowSteps {
  int length;    // steps; -1: no such row
  uint32_t row;  // behind that of batch index 0

  RNNFAST_DEVICE bool active(const TurnStep& at) const { return at.time >= 0 && at.time < length; }
  RNNFAST_DEVICE bool before(const TurnStep& at) const {
    return at.reversed ? at.time + 1 < length : at.time > 0 && at.time - 1 < length;
  }
  RNNFAST_DEVICE bool after(const TurnStep& at) const {
    return at.reversed ? at.time > 0 && at.time - 1 < length : at.time + 1 < length;
  }
  RNNFAST_DEVICE bool cut_before(const RowLayout& layout, const TurnStep& at) const {
    if (!layout.has_segments()) return false;
    return at.reversed ? before(at) && layout.starts_segment(at.before + row)
                       : active(at) && layout.starts_segment(at.row + row);
  }
  RNNFAST_DEVICE bool cut_after(const RowLayout& layout, const TurnStep& at) const {
    if (!layout.has_segments()) return false;
    return at.reversed ? active(at) && layout.starts_segment(at.row + row)
                       : after(at) && layout.starts_segment(at.after + row);
  }
};

RNNFAST_DEVICE TurnStep turn_step(const Steps& rows, int time, bool reversed) {
  const int before = reversed ? time + 1 : time - 1, after = reversed ? time - 1 : time + 1;
  return {time, reversed, static_cast<uint32_t>(rows.row(time)), static_cast<uint32_t>(rows.row(before)),
          static_cast<uint32_t>(rows.row(after))};
}

RNNFAST_DEVICE RowSteps row_steps(const Steps& rows, int64_t b) {
  const RowLayout& layout = rows.layout;
  if (b >= layout.batch) return {-1, 0};
  int64_t length = layout.steps;
  if (layout.lengths) {
    length = layout.lengths[b] < length ? layout.lengths[b] : length;
    if (length < 0) length = 0;
  } else if (rows.offsets) {
    // Packed rows get fewer from step to step: the first step that has none for b.
    int64_t has = 0;
    while (has < length) {
      const int64_t middle = (has + length) / 2;
      if (rows.active(middle) > b)
        has = middle + 1;
      else
        length = middle;
    }
  }
  return {static_cast<int>(length), static_cast<uint32_t>(b * layout.batch_stride)};
}

}  // namespace rnnfast::gpu

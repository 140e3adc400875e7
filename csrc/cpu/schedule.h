// Which rows have a step, where their data lie, and where a row's state is cut between its steps.
#pragma once

#include <cstring>

#include "split.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

// The rows active at each step. With rows sorted by length, longest first, those are always the first so many: ragged
// batches cost no more than their tokens. Packed rows come sorted; `lengths` are sorted here.
class Schedule {
 public:
  // Call twice: to size the workspace, and to fill it in.
  void place(const RowLayout& rows, Workspace& workspace) {
    rows_ = rows;
    const bool ragged = rows.lengths != nullptr;
    if (ragged) order_ = workspace.take<int64_t>(rows.batch);
    if (ragged) active_ = workspace.take<int64_t>(rows.steps + 1);
    if (ragged || rows.batch_sizes) rows_before_ = workspace.take<int64_t>(rows.steps);
    if (ragged && order_) sort_by_length();
    if (rows_before_) {
      int64_t sum = 0;
      for (int64_t t = 0; t < rows.steps; ++t) {
        rows_before_[t] = sum;
        sum += active(t);
      }
    }
  }

  int64_t steps() const { return rows_.steps; }
  int64_t batch() const { return rows_.batch; }
  // Rows with a step t; none outside [0, T).
  int64_t active(int64_t t) const {
    if (t < 0 || t >= rows_.steps) return 0;
    if (rows_.batch_sizes) return rows_.batch_sizes[t];
    return active_ ? active_[t] : rows_.batch;
  }
  // The batch index of what is `sorted`th by length.
  int64_t batch_index(int64_t sorted) const { return order_ ? order_[sorted] : sorted; }
  // Where step t of batch index b stands among the rows of the data.
  int64_t data_row(int64_t t, int64_t b) const {
    return rows_.batch_sizes ? rows_before_[t] + b : t * rows_.step_stride + b * rows_.batch_stride;
  }
  // How many rows have the steps before t: where those of t begin if none but rows with a step count.
  int64_t rows_before(int64_t t) const {
    if (!rows_before_) return t * rows_.batch;
    return t < rows_.steps ? rows_before_[t] : t > 0 ? rows_before_[t - 1] + active(t - 1) : 0;
  }
  // The steps that a backward pass does in some turns, from `first` to the one before `last`: of direction 0 from the
  // end, of direction 1 from the beginning. A turn behind the last step has none.
  Range times_of_turns(int64_t d, int64_t first, int64_t last) const {
    if (last > steps()) last = steps();
    return d == 0 ? Range{steps() - last, steps() - first} : Range{first, last};
  }
  // Whether such rows stand in the data in that order, with nothing between them.
  bool is_compact() const {
    if (rows_.batch_sizes) return true;
    const bool in_order = rows_.batch_stride == 1 || rows_.batch == 1;
    return !rows_.lengths && in_order && (rows_.step_stride == rows_.batch || rows_.steps == 1);
  }
  bool has_cuts() const { return rows_.has_segments(); }
  bool starts_segment(int64_t t, int64_t b) const { return has_cuts() && rows_.starts_segment(data_row(t, b)); }
  int64_t length(int64_t b) const { return rows_.lengths ? rows_.lengths[b] : rows_.steps; }
  bool has_lengths() const { return rows_.lengths != nullptr; }

 private:
  // Counting sort, stable. active_[t] is first the number of rows longer than t.
  void sort_by_length() {
    for (int64_t t = 0; t <= rows_.steps; ++t) active_[t] = 0;
    for (int64_t b = 0; b < rows_.batch; ++b) ++active_[rows_.lengths[b]];  // rows of just this length
    int64_t longer = 0;
    for (int64_t t = rows_.steps; t >= 0; --t) {
      const int64_t here = active_[t];
      active_[t] = longer;
      longer += here;
    }
    // Rows of length t start in the order behind the longer ones; while placing, active_[t] counts up to the rows of
    // length >= t.
    for (int64_t b = 0; b < rows_.batch; ++b) order_[active_[rows_.lengths[b]]++] = b;
    // Now active_[t] = rows of length >= t, so the rows active at step t are active_[t + 1].
    for (int64_t t = 0; t < rows_.steps; ++t) active_[t] = active_[t + 1];
  }

  RowLayout rows_;
  int64_t* order_ = nullptr;
  int64_t* active_ = nullptr;
  int64_t* rows_before_ = nullptr;  // where rows are packed or have lengths
};

// The rows of one group, which are carried through time together: every `stride`th of the sorted rows, so that all
// groups shrink alike. The group's row r is sorted row first + r * stride. One direction of the recurrence.
struct GroupRows {
  const Schedule& schedule;
  int64_t first, stride;
  bool reversed;

  int64_t local(int64_t sorted_count) const {
    return sorted_count <= first ? 0 : (sorted_count - first + stride - 1) / stride;
  }
  int64_t count() const { return local(schedule.batch()); }
  int64_t active(int64_t t) const { return local(schedule.active(t)); }
  int64_t sorted(int64_t r) const { return first + r * stride; }
  int64_t batch_index(int64_t r) const { return schedule.batch_index(sorted(r)); }
  int64_t time(int64_t step) const { return reversed ? schedule.steps() - 1 - step : step; }
  int64_t before(int64_t t) const { return reversed ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reversed ? t - 1 : t + 1; }

  // Whether a segment boundary between step t and the one before it in this direction cuts the state.
  bool cut_before(int64_t t, int64_t r) const {
    if (!schedule.has_cuts()) return false;
    const int64_t boundary = reversed ? t + 1 : t;
    if (reversed && r >= active(boundary)) return false;  // no step before this one: hx comes in
    return schedule.starts_segment(boundary, batch_index(r));
  }
  bool cut_after(int64_t t, int64_t r) const {
    if (!schedule.has_cuts()) return false;
    const int64_t next = after(t);
    return r < active(next) && cut_before(next, r);
  }
  // The same between the initial state and what is the first step of a row, forwards in time.
  bool initial_cut(int64_t r) const { return !reversed && r < active(0) && cut_before(0, r); }
};

// Zeroes what is beyond the lengths of some of the group's rows in a (rows, width) tensor of its direction.
template <class Storage>
inline void zero_beyond_lengths(const GroupRows& rows, Storage* tensor, int64_t row_stride, int64_t offset,
                                int64_t width, Range range) {
  if (!rows.schedule.has_lengths() || !tensor) return;
  for (int64_t r = range.first; r < range.last; ++r) {
    const int64_t b = rows.batch_index(r);
    for (int64_t t = rows.schedule.length(b); t < rows.schedule.steps(); ++t)
      std::memset(static_cast<void*>(tensor + rows.schedule.data_row(t, b) * row_stride + offset), 0,
                  static_cast<size_t>(width) * sizeof(Storage));
  }
}

}  // namespace
}  // namespace rnnfast::cpu

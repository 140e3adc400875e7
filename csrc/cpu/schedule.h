// Which rows a thread group works on at each step, and what happens to a row's state between its steps.
#pragma once

#include <cstdlib>

#include "../recurrence.h"
#include "memory.h"
#include "sizes.h"
#include "team.h"

namespace rnnfast::cpu {
namespace {

// Memory of one call, taken at once before the threads start, so that running out of it is found before anything is
// written.
class Workspace {
 public:
  Workspace() = default;
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { std::free(memory_); }

  // First pass: sizes are added up. Second pass, after allocate(): pointers are handed out in the same order.
  template <class T, class... Sizes> T* take(Sizes... sizes) {
    const int64_t at = used_;
    used_ = sum(used_, round_up(product(sizes..., sizeof(T)), kAlignment));
    return memory_ ? reinterpret_cast<T*>(static_cast<char*>(memory_) + at) : nullptr;
  }
  // 0, or how many bytes could not be had.
  int64_t allocate() {
    const int64_t bytes = used_ ? used_ : kAlignment;
    used_ = 0;
    if (bytes == kUncountable) return bytes;
    memory_ = std::aligned_alloc(kAlignment, static_cast<size_t>(bytes));
    if (!memory_) return bytes;
    prefer_huge_pages(memory_, bytes);
    return 0;
  }

 private:
  static constexpr int64_t kAlignment = 128;
  void* memory_ = nullptr;
  int64_t used_ = 0;
};

// The rows alive at each step. With rows sorted by length, longest first, those alive are always the first so many:
// ragged batches cost no more than their tokens. Packed rows come sorted; `lengths` are sorted here.
class Schedule {
 public:
  // Call twice: to size the workspace, and to fill it in.
  void place(const RowLayout& rows, Workspace& workspace) {
    rows_ = rows;
    const bool ragged = rows.lengths != nullptr;
    if (ragged) order_ = workspace.take<int64_t>(rows.batch);
    if (ragged) alive_ = workspace.take<int64_t>(rows.steps + 1);
    if (rows.batch_sizes) offsets_ = workspace.take<int64_t>(rows.steps);
    if (ragged && order_) sort_by_length();
    if (offsets_) {
      int64_t sum = 0;
      for (int64_t t = 0; t < rows.steps; ++t) {
        offsets_[t] = sum;
        sum += rows.batch_sizes[t];
      }
    }
  }

  int64_t steps() const { return rows_.steps; }
  int64_t batch() const { return rows_.batch; }
  // Rows with a step t; none outside [0, T).
  int64_t alive(int64_t t) const {
    if (t < 0 || t >= rows_.steps) return 0;
    if (rows_.batch_sizes) return rows_.batch_sizes[t];
    return alive_ ? alive_[t] : rows_.batch;
  }
  // The batch index of the row that is `sorted`th by length.
  int64_t batch_index(int64_t sorted) const { return order_ ? order_[sorted] : sorted; }
  int64_t row(int64_t t, int64_t b) const {
    return offsets_ ? offsets_[t] + b : t * rows_.step_stride + b * rows_.batch_stride;
  }
  bool reset(int64_t t, int64_t b) const { return rows_.resets && rows_.resets[row(t, b)]; }
  int64_t length(int64_t b) const { return rows_.lengths ? rows_.lengths[b] : rows_.steps; }
  bool has_lengths() const { return rows_.lengths != nullptr; }

 private:
  // Counting sort, stable. alive_[t] is first the number of rows longer than t.
  void sort_by_length() {
    for (int64_t t = 0; t <= rows_.steps; ++t) alive_[t] = 0;
    for (int64_t b = 0; b < rows_.batch; ++b) ++alive_[rows_.lengths[b]];  // rows of just this length
    int64_t longer = 0;
    for (int64_t t = rows_.steps; t >= 0; --t) {
      const int64_t here = alive_[t];
      alive_[t] = longer;
      longer += here;
    }
    // Rows of length t start in the order behind the longer ones; while placing, alive_[t] counts up to the rows of
    // length >= t.
    for (int64_t b = 0; b < rows_.batch; ++b) order_[alive_[rows_.lengths[b]]++] = b;
    // Now alive_[t] = rows of length >= t, so the rows alive at step t are alive_[t + 1].
    for (int64_t t = 0; t < rows_.steps; ++t) alive_[t] = alive_[t + 1];
  }

  RowLayout rows_;
  int64_t* order_ = nullptr;
  int64_t* alive_ = nullptr;
  int64_t* offsets_ = nullptr;
};

// The rows that one group of threads carries through time: every `stride`th of the sorted rows, so that all groups
// shrink alike. Local row r is sorted row first + r * stride. One direction of the recurrence.
struct GroupRows {
  const Schedule& schedule;
  int64_t first, stride;
  bool reversed;

  int64_t local(int64_t sorted_count) const {
    return sorted_count <= first ? 0 : (sorted_count - first + stride - 1) / stride;
  }
  int64_t count() const { return local(schedule.batch()); }
  int64_t alive(int64_t t) const { return local(schedule.alive(t)); }
  int64_t batch_index(int64_t r) const { return schedule.batch_index(first + r * stride); }
  int64_t time(int64_t step) const { return reversed ? schedule.steps() - 1 - step : step; }
  int64_t before(int64_t t) const { return reversed ? t + 1 : t - 1; }
  int64_t after(int64_t t) const { return reversed ? t - 1 : t + 1; }

  // A segment boundary between step t and the one before it in this direction cuts the state.
  bool cut_before(int64_t t, int64_t r) const {
    const int64_t boundary = reversed ? t + 1 : t;
    if (reversed && r >= alive(boundary)) return false;  // no step before this one: hx comes in
    return schedule.reset(boundary, batch_index(r));
  }
  bool cut_after(int64_t t, int64_t r) const {
    const int64_t next = after(t);
    return r < alive(next) && cut_before(next, r);
  }
};

// How the threads are shared out: `row_groups` groups of rows for each direction, and in each group the hidden units
// are split over `members` threads, which meet at a barrier each step (none where there is one member).
struct Split {
  int64_t row_groups;
};

// Seconds are estimated from measured constants of current cores; only their ratios matter.
inline Split choose_split(const Recurrence& p, int threads, int64_t element_size, int64_t unit_tiles) {
  constexpr double kFlops = 180e9;    // one core, register-tiled product
  constexpr double kBytesL2 = 150e9;  // one core's L2
  constexpr double kBytesL3 = 35e9;   // one core's share beyond it
  constexpr double kL2 = 900e3;       // bytes of weights that stay there
  constexpr double kBarrier = 0.5e-6;
  const int64_t per_direction = threads / p.directions;
  if (per_direction <= 1 || p.rows.batch < 2) return {1};
  const double weights = static_cast<double>(product(traits(p.mode).gates, p.hidden_size, p.state_size, element_size));
  const double flops = 2.0 * weights / element_size * p.rows.batch;
  const auto seconds = [&](double share_of_flops, double bytes) {
    const double compute = flops * share_of_flops / kFlops, memory = bytes / (bytes > kL2 ? kBytesL3 : kBytesL2);
    return compute > memory ? compute : memory;
  };
  const int64_t groups = per_direction < p.rows.batch ? per_direction : p.rows.batch;
  const double rows_share = static_cast<double>((p.rows.batch + groups - 1) / groups) / p.rows.batch;
  const double units_share = static_cast<double>((unit_tiles + per_direction - 1) / per_direction) / unit_tiles;
  const double by_rows = seconds(rows_share, weights);
  const double by_units = seconds(units_share, weights * units_share) + kBarrier * (p.projected ? 2 : 1);
  return {by_rows < by_units ? groups : 1};
}

// The groups of a call and the threads of a team among them.
struct Assignment {
  int64_t groups;
  int members_per_group;
  int64_t first_group, group_stride;
  int rank;
  bool idle;

  Assignment(int64_t groups_, int member, int members)
      : groups(groups_), members_per_group(members > groups_ ? static_cast<int>(members / groups_) : 1) {
    first_group = member / members_per_group;
    rank = member % members_per_group;
    group_stride = members > groups ? groups : members;
    idle = first_group >= groups;
  }
};

}  // namespace
}  // namespace rnnfast::cpu

// How the rows, units and directions of a call are shared out among its threads.
#pragma once

#include "../recurrence.h"
#include "sizes.h"

namespace rnnfast::cpu {
namespace {

// The part [first, last) of `count` items that falls to `member` of `members`.
struct Share {
  int64_t first, last;
};
inline Share share_of(int64_t count, int member, int members) {
  return {count * member / members, count * (member + 1) / members};
}

// How many groups the rows of each direction are split into. In each group the hidden units are split over some
// threads, which meet at a barrier each step (none where there is one thread).
//
// Seconds are estimated from measured constants of current cores; only their ratios matter.
inline int64_t choose_row_groups(const Recurrence& p, int threads, int64_t element_size, int64_t unit_tiles) {
  constexpr double kFlops = 180e9;    // one core, register-tiled product
  constexpr double kBytesL2 = 150e9;  // one core's L2
  constexpr double kBytesL3 = 35e9;   // one core's share beyond it
  constexpr double kL2 = 900e3;       // bytes of weights that stay there
  constexpr double kBarrier = 0.5e-6;
  const int64_t per_direction = threads / p.directions;
  if (per_direction <= 1 || p.rows.batch < 2) return 1;
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
  return by_rows < by_units ? groups : 1;
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

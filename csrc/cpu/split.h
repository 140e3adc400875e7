// How the rows, units and directions of a call are shared out among its threads.
#pragma once

#include "../recurrence.h"
#include "sizes.h"

namespace rnnfast::cpu {
namespace {

struct Range {
  int64_t first, last;
};
// The part [first, last) of `count` items that is share number `share` of `shares`.
inline Range share_of(int64_t count, int64_t share, int64_t shares) {
  if (shares == 1) return {0, count};  // in time loops: two divisions take as long as a gate of a small layer
  return {count * share / shares, count * (share + 1) / shares};
}

// The tiles of a share, forth at even `turn`s and back at odd ones (a step's number, or that of its state buffer).
// Where their weights do not fit the cache, those that were read last are the first to be read again, and are still
// there.
template <class Use> inline void for_tiles(Range tiles, int64_t turn, const Use& use) {
  if (turn % 2 == 0)
    for (int64_t tile = tiles.first; tile < tiles.last; ++tile) use(tile);
  else
    for (int64_t tile = tiles.last - 1; tile >= tiles.first; --tile) use(tile);
}

// Rates of current cores, measured: bytes and operations a second; seconds.
constexpr double kFlops = 180e9;    // one core, register-tiled product
constexpr double kBytesL2 = 150e9;  // one core's L2
constexpr double kBytesL3 = 35e9;   // one core's share beyond it
constexpr double kL2 = 900e3;       // bytes of weights that stay there
constexpr double kHandOver = 0.5e-6;
constexpr double kBytesHandedOver = 6e9;  // of what another core has just written
constexpr double kBytesMoved = 8e9;       // of rows copied by one core, roughly

// A product whose weights were read before.
inline double product_seconds(double flops, double weight_bytes) {
  const double compute = flops / kFlops, memory = weight_bytes / (weight_bytes > kL2 ? kBytesL3 : kBytesL2);
  return compute > memory ? compute : memory;
}

// How many directions are carried through time side by side, each by threads of its own; else by all threads, one
// direction after the other. Where a thread's share of the weights does not fit its cache, more of half that share
// does, and what a step reads again from beyond the cache is less. Whether the products or that takes longer does not
// matter (measured: docs/performance.md). Only where there are units for all of them.
inline int64_t choose_directions_at_once(const Recurrence& p, int threads, int64_t element_size, int64_t unit_tiles) {
  const int64_t members = threads / p.directions;
  if (p.directions == 1 || members < 1 || unit_tiles < threads) return p.directions;
  const int64_t share = product(traits(p.mode).gates, p.hidden_size, p.state_size, element_size) / members;
  return static_cast<double>(share) > 2 * kL2 ? 1 : p.directions;
}

// How many groups the rows of each direction are split into. In each group the hidden units are split over some
// threads, which hand h over at each step (not where there is one thread). `packed_bytes`: of a direction's weights
// that are packed before the first step. All threads do that together, and each then reads the whole of it, if it has
// rows of its own, or the part that it has packed itself. `speed`: of products, those in float32 are 1, which
// take `rows_at_once` rows, or fewer in the same time.
inline int64_t choose_row_groups(const Recurrence& p, int threads, int64_t directions_at_once, int64_t element_size,
                                 int64_t unit_tiles, int64_t packed_bytes, double speed, int64_t rows_at_once) {
  const int64_t per_direction = threads / directions_at_once;
  // A direction that all threads carry is to have its weights shared out.
  if (per_direction <= 1 || p.rows.batch < 2 || directions_at_once < p.directions) return 1;
  const double weights = static_cast<double>(product(traits(p.mode).gates, p.hidden_size, p.state_size, element_size));
  const double flops = 2.0 * weights / element_size * p.rows.batch / speed;
  const int64_t groups = per_direction < p.rows.batch ? per_direction : p.rows.batch;
  const double rows_share = static_cast<double>(round_up(divide_up(p.rows.batch, groups), rows_at_once)) /
                            round_up(p.rows.batch, rows_at_once);
  const double units_share = static_cast<double>((unit_tiles + per_direction - 1) / per_direction) / unit_tiles;
  const double handed_over = packed_bytes * (1.0 - 1.0 / per_direction) / kBytesHandedOver;
  const double by_rows =
      product_seconds(flops * rows_share, weights) + handed_over / (p.rows.steps > 0 ? p.rows.steps : 1);
  const double by_units =
      product_seconds(flops * units_share, weights * units_share) + kHandOver * (p.projected ? 2 : 1);
  return by_rows < by_units ? groups : 1;
}

// Into how many shares a round of each of `groups` groups is cut, which has `tiles` at most.
inline int64_t shares_of_group(int threads, int64_t groups, int64_t tiles) {
  const int64_t members = threads / groups;
  return members < 1 ? 1 : members < tiles ? members : tiles < 1 ? 1 : tiles;
}

}  // namespace
}  // namespace rnnfast::cpu

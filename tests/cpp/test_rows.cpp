// The two ways in which kernels look at lengths, packing and resets (rows.cuh) agree: row by row and turn by turn, as
// the step kernels do, and by a row's length alone, as those do that take all turns. Needs no kernel.
#include <random>
#include <vector>

#include "check.h"
#include "cuda/rows.cuh"
#include "run_kernel.h"

namespace rnnfast::test {
namespace {

using namespace gpu;

struct Rows {
  RowLayout layout;
  std::vector<int64_t> batch_sizes, lengths;
  std::vector<uint8_t> resets;
};

enum class Kind { dense, lengths, packed };

void fill(Rows& rows, Kind kind, bool resets, bool batch_first, std::mt19937_64& random) {
  const auto whole = [&](int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random);
  };
  RowLayout& layout = rows.layout;
  layout.steps = whole(0, 6);
  layout.batch = whole(1, 4);
  layout.step_stride = batch_first ? 1 : layout.batch;
  layout.batch_stride = batch_first ? layout.steps : 1;
  int64_t count = layout.steps * layout.batch;
  if (kind == Kind::packed) {
    count = 0;
    int64_t active = layout.batch;
    for (int64_t t = 0; t < layout.steps; ++t) {
      if (t) active = whole(1, active);
      rows.batch_sizes.push_back(active);
      count += active;
    }
    layout.batch_sizes = rows.batch_sizes.data();
  } else if (kind == Kind::lengths) {
    // Beyond the last step, and none at all, too.
    for (int64_t b = 0; b < layout.batch; ++b) rows.lengths.push_back(whole(-1, layout.steps + 1));
    layout.lengths = rows.lengths.data();
  }
  for (int64_t i = 0; i < count; ++i) rows.resets.push_back(whole(0, 2) == 0);
  if (resets) layout.resets = rows.resets.data();
}

void compare(const Rows& rows) {
  const Turns turns(rows.layout);
  std::vector<int64_t> offsets{0};
  for (const int64_t size : rows.batch_sizes) offsets.push_back(offsets.back() + size);
  const Steps steps{turns.layout(), rows.layout.batch_sizes ? offsets.data() : nullptr};
  for (const bool reversed : {false, true}) {
    // Backward has a turn outside.
    for (int64_t time = -1; time <= rows.layout.steps; ++time) {
      TurnRows all;
      all.layout = turns.layout();
      all.turn[reversed] = turns.turn(time, reversed);
      const TurnStep at = turn_step(steps, static_cast<int>(time), reversed);
      for (int64_t b = 0; b < rows.layout.batch + 1; ++b) {
        const RowTurn turn = row_turn(all, reversed, b);
        const RowSteps row = row_steps(steps, b);
        CHECK_EQUAL(row.active(at), turn.active());
        CHECK_EQUAL(row.length >= 0, turn.in_batch());
        if (!turn.in_batch()) continue;
        CHECK_EQUAL(row.before(at), turn.before());
        CHECK_EQUAL(row.after(at), turn.after());
        CHECK_EQUAL(row.cut_before(steps.layout, at), turn.cut_before());
        CHECK_EQUAL(row.cut_after(steps.layout, at), turn.cut_after());
        CHECK_EQUAL(row.length == 0, turn.empty());
        if (turn.active()) CHECK_EQUAL(int64_t{at.row + row.row}, turn.row);
        if (turn.before()) CHECK_EQUAL(int64_t{at.before + row.row}, turn.before_row);
        if (turn.after()) CHECK_EQUAL(int64_t{at.after + row.row}, turn.after_row);
      }
    }
  }
}

void agree(Kind kind) {
  std::mt19937_64 random(3);
  for (int i = 0; i < 300; ++i) {
    Rows rows;
    fill(rows, kind, i % 2, i % 4 < 2, random);
    compare(rows);
  }
}

}  // namespace
}  // namespace rnnfast::test

CHECK_CASES(rows) {
  using namespace rnnfast::test;
  return {{"dense", [] { agree(Kind::dense); }}, {"lengths", [] { agree(Kind::lengths); }}, {"packed", [] {
                                                                                               agree(Kind::packed);
                                                                                             }}};
}

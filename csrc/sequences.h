// The arguments that say how the rows of a layer's data belong to sequences and steps, and what each step is told
// beside them. A new one is a line or two here, a member of RowLayout (recurrence.h), and what kernels make of it;
// rnnfast/sequences.py has the same for Python.
#pragma once

#include "context.h"

namespace rnnfast {

struct Sequences {
  OptionalTensor batch_sizes;  // packed rows: (T,) int64 on the CPU
  OptionalTensor lengths;      // dense rows: (B,) int64
  OptionalTensor resets;       // dense rows: (T, B) bool in their layout: a segment starts at that step
  bool batch_first = false;    // dense rows: (B, T, ...)

  // In the order of the ops' arguments.
  template <class Use> void each(const Use& use) {
    use([] { return "batch_sizes"; }, batch_sizes);
    use([] { return "lengths"; }, lengths);
    use([] { return "resets"; }, resets);
    use([] { return "batch_first"; }, batch_first);
  }

  void fill(RowLayout& rows, Context& context) const {
    check_sizes(context.op, context.like_name, context.like);
    if (batch_sizes)
      fill_packed(rows, context);
    else if (context.like.dim() == 2)
      fill_one_step(rows, context);
    else
      fill_dense(rows, context);
  }

 private:
  bool dense_alone() const { return lengths || resets; }

  void fill_packed(RowLayout& rows, Context& context) const {
    const char* const op = context.op;
    RNNFAST_CHECK(context.like.dim() == 2, op, ": ", context.like_name,
                  ": expected packed rows, of 2 dimensions, with batch_sizes, got ", context.like.dim());
    RNNFAST_CHECK(batch_sizes->is_cpu() && batch_sizes->scalar_type() == ScalarType::Long && batch_sizes->dim() == 1,
                  op, ": batch_sizes: expected a 1-D int64 tensor on the CPU");
    RNNFAST_CHECK(!dense_alone(), op, ": lengths and resets go with dense rows, not with batch_sizes");
    rows.batch_sizes = context.copied("batch_sizes", *batch_sizes);
    rows.steps = batch_sizes->size(0);
    rows.batch = rows.steps ? rows.batch_sizes[0] : 0;
    context.row_count = context.like.size(0);
    // Counted down, so that no sum of them overflows.
    int64_t left = context.row_count;
    for (int64_t t = 0; t < rows.steps; ++t) {
      RNNFAST_CHECK(rows.batch_sizes[t] > 0 && (t == 0 || rows.batch_sizes[t] <= rows.batch_sizes[t - 1]), op,
                    ": batch_sizes: expected positive sizes that do not increase, got ", rows.batch_sizes[t],
                    " at step ", t);
      RNNFAST_CHECK(rows.batch_sizes[t] <= left, op, ": batch_sizes: expected a sum of ", context.row_count,
                    ", got more at step ", t);
      left -= rows.batch_sizes[t];
    }
    RNNFAST_CHECK(left == 0, op, ": batch_sizes: expected a sum of ", context.row_count, ", got ",
                  context.row_count - left);
  }

  void fill_one_step(RowLayout& rows, Context& context) const {
    RNNFAST_CHECK(!dense_alone(), context.op, ": ", context.like_name,
                  ": expected 3 dimensions, got 2: one step, which has one direction and neither lengths nor resets");
    context.one_step = true;
    rows.steps = 1;
    rows.batch = rows.step_stride = context.row_count = context.like.size(0);
    rows.batch_stride = 1;
  }

  void fill_dense(RowLayout& rows, Context& context) const {
    const char* const op = context.op;
    const Tensor& like = context.like;
    RNNFAST_CHECK(like.dim() == 3, op, ": ", context.like_name, ": expected 2 or 3 dimensions, got ", like.dim());
    rows.steps = like.size(batch_first ? 1 : 0);
    rows.batch = like.size(batch_first ? 0 : 1);
    rows.step_stride = batch_first ? 1 : rows.batch;
    rows.batch_stride = batch_first ? rows.steps : 1;
    RNNFAST_CHECK(!__builtin_mul_overflow(rows.steps, rows.batch, &context.row_count), op, ": ", context.like_name,
                  ": so many rows that 64 bits do not count them: ", rows.steps, " * ", rows.batch);
    if (lengths) {
      RNNFAST_CHECK(lengths->device() == like.device() && lengths->scalar_type() == ScalarType::Long, op,
                    ": lengths: expected an int64 tensor on the device of the data");
      check_shape(op, "lengths", *lengths, {rows.batch});
      // On another device the values cannot be read without waiting for it: there the kernels clamp them.
      rows.lengths = like.is_cpu() ? context.copied("lengths", *lengths)
                                   : static_cast<const int64_t*>(context.hold("lengths", lengths));
      for (int64_t b = 0; b < rows.batch && like.is_cpu(); ++b)
        RNNFAST_CHECK(rows.lengths[b] >= 0 && rows.lengths[b] <= rows.steps, op,
                      ": lengths: expected values from 0 to ", rows.steps, ", got ", rows.lengths[b], " for row ", b);
    }
    if (resets) {
      RNNFAST_CHECK(resets->device() == like.device() && resets->scalar_type() == ScalarType::Bool, op,
                    ": resets: expected a bool tensor on the device of the data");
      check_shape(op, "resets", *resets, {like.size(0), like.size(1)});
      rows.resets = static_cast<const uint8_t*>(context.hold("resets", resets));
    }
  }
};

}  // namespace rnnfast

// What the row kernels of layers with options share. A block takes a whole row: one batch index with all its units. A
// thread has the same units in every loop over them, so that what it leaves in a workspace it may read again without
// waiting; the block meets in the sums of norms alone.
#pragma once

#include "../../variants/cells.h"
#include "../primitives/shared.h"
#include "../split/row.cuh"
#include "variant.h"

namespace rnnfast::gpu {

// What variants/cells.h calls.
template <class Type> struct VariantMath : SplitMath<Type> {
  using Scalar = typename Type::Compute;
  RNNFAST_DEVICE static Scalar log_sigmoid(Scalar x) {
    return (x > 0 ? Scalar(0) : x) - std::log1p(std::exp(-std::abs(x)));
  }
};

// Each over all threads of the block, whole warps, in an order that does not change; every thread gets them. Shared
// memory: block_sums_bytes.
constexpr int kMostSums = 2;
constexpr size_t block_sums_bytes(int compute_bytes) {
  return static_cast<size_t>(kMostSums * compute_bytes) * kRowThreads / kWarpSize;
}
template <class T, int kCount> RNNFAST_DEVICE void block_sums(T (&values)[kCount]) {
  static_assert(kCount <= kMostSums);
  auto* const shared = reinterpret_cast<T*>(shared_memory());
  RNNFAST_UNROLL
  for (unsigned distance = kWarpSize / 2; distance > 0; distance /= 2) {
    RNNFAST_UNROLL
    for (T& value : values) value += shuffle_xor(value, distance);
  }
  // Those of the time before have been read.
  sync_threads();
  if (lane() == 0) {
    RNNFAST_UNROLL
    for (int i = 0; i < kCount; ++i) shared[warp() * kCount + i] = values[i];
  }
  // Those of every warp are there.
  sync_threads();
  RNNFAST_UNROLL
  for (int i = 0; i < kCount; ++i) {
    values[i] = 0;
    for (unsigned w = 0; w < block_threads() / kWarpSize; ++w) values[i] += shared[w * kCount + i];
  }
}

template <class Type, class Params> class VariantRow {
  using Access = Elements<Type, Params>;

 protected:
  using Compute = typename Type::Compute;
  using Storage = typename Type::Storage;

  RNNFAST_DEVICE explicit VariantRow(const Params& params) : p(params) {}

  const Params& p;
  const VariantParams& call = p.call;
  const unsigned d = call.reverse ? 1u : 0u;
  const int64_t b = block_index().x;
  const RowTurn turn = row_turn(p.rows, d, b);
  const int64_t H = call.hidden_size, N = call.width();

  RNNFAST_DEVICE static Compute read(const void* base, int64_t index) { return Access::read(base, index); }
  RNNFAST_DEVICE static void write(void* base, int64_t index, Compute value) { Access::write(base, index, value); }
  RNNFAST_DEVICE static Compute read_compute(const void* base, int64_t index) { return *at<Compute>(base, index); }
  RNNFAST_DEVICE static void write_compute(void* base, int64_t index, Compute value) {
    *at<Compute>(base, index) = value;
  }

  // Runs body(unit) for each unit of the thread.
  template <class Body> RNNFAST_DEVICE static void for_units(int64_t count, const Body& body) {
    for (int64_t unit = thread_index(); unit < count; unit += block_threads()) body(unit);
  }
  // The same with each of so many gates: body(u, gate).
  template <class Body> RNNFAST_DEVICE void for_row(int64_t gates, const Body& body) const {
    for_units(H, [&](int64_t u) {
      for (int64_t gate = 0; gate < gates; ++gate) body(u, gate);
    });
  }

  RNNFAST_DEVICE int64_t in_state(int64_t u) const { return b * H + u; }
  RNNFAST_DEVICE int64_t in_row(int64_t width, int64_t i) const { return turn.row * width + i; }
  // Of a gate's unit where products take and leave them, (heads, B, gates * H / heads).
  RNNFAST_DEVICE int64_t in_product(int64_t u, int64_t gates, int64_t gate) const {
    if (call.heads == 1) return (b * gates + gate) * H + u;
    // In 32 bits, a fraction of the instructions: with the most heads W_hh has H^2 / 2^14 weights, so H is below 2^31.
    const auto size = static_cast<uint32_t>(call.head_size()), head = static_cast<uint32_t>(u) / size;
    return ((head * call.rows.batch + b) * gates + gate) * size + (static_cast<uint32_t>(u) - head * size);
  }
  RNNFAST_DEVICE Compute vector(VariantVector which, int64_t i) const { return read(call.vectors[which], i); }

  // A state as it entered the step: where the row before left it, or as the call gave it.
  RNNFAST_DEVICE Compute entering(const void* trajectory, const void* initial, int64_t u) const {
    if (turn.cut_before()) return 0;
    return turn.before() ? read(trajectory, turn.before_row * H + u) : read(initial, in_state(u));
  }
  // What the row is multiplied by, 1 without a mask.
  RNNFAST_DEVICE Compute mask(const void* of_rows, int64_t u) const { return of_rows ? read(of_rows, in_state(u)) : 1; }

  // Zoneout: which part of the old value a step keeps. Where there is a mask it is a choice, so that what is not chosen
  // may be infinite.
  struct Zoneout {
    const uint8_t* kept;
    Compute share;

    RNNFAST_DEVICE bool is_on() const { return kept || share != 0; }
    RNNFAST_DEVICE Compute mix(Compute old, Compute fresh, int64_t at) const {
      if (kept) return kept[at] ? old : fresh;
      return old * share + fresh * (1 - share);
    }
    // Its derivative: the old value's share of a gradient.
    RNNFAST_DEVICE Compute of_old(Compute grad, int64_t at) const { return mix(grad, 0, at); }
    RNNFAST_DEVICE Compute of_fresh(Compute grad, int64_t at) const { return mix(0, grad, at); }
  };
  RNNFAST_DEVICE Zoneout zoneout_h() const { return {call.kept_h, static_cast<Compute>(call.zoneout_h)}; }
  RNNFAST_DEVICE Zoneout zoneout_c() const { return {call.kept_c, static_cast<Compute>(call.zoneout_c)}; }

  // Of a row of so many gates, in two passes, so that a mean far from 0 costs no digits. value(u, gate) is one of the
  // thread's.
  template <class Value> RNNFAST_DEVICE NormOf<Compute> norm_of(int64_t gates, const Value& value) const {
    const Compute count = static_cast<Compute>(gates * H);
    Compute mean = 0;
    if (!call.rms) {
      Compute sum[1] = {};
      for_row(gates, [&](int64_t u, int64_t gate) { sum[0] += value(u, gate); });
      block_sums(sum);
      mean = sum[0] / count;
    }
    Compute squares[1] = {};
    for_row(gates, [&](int64_t u, int64_t gate) {
      const Compute off = value(u, gate) - mean;
      squares[0] += off * off;
    });
    block_sums(squares);
    return {mean, NormOf<Compute>::scale_of(squares[0] / count, call.eps)};
  }
};

}  // namespace rnnfast::gpu

// What the ops on CPU tensors share: how many threads a call is worth, the kernels behind LayerOps, and products.
#pragma once

#include "../layer_ops.h"
#include "isa.h"
#include "memory.h"
#include "split.h"

namespace rnnfast::cpu {
namespace {

// Calling others costs some microseconds, and handing over to them each round less than one: small work stays on the
// calling thread, and no more threads take part than have something to do in a round.
inline int useful_threads(double flops, double flops_a_round) {
  constexpr double kWorthCalling = 4e5, kWorthHandingOver = 6e4;
  if (flops < kWorthCalling || flops_a_round < kWorthHandingOver) return 1;
  const int available = static_cast<int>(torch::stable::get_num_threads());
  const double useful = 1 + flops_a_round / kWorthHandingOver;
  return useful < available ? static_cast<int>(useful) : available;
}

// `missing` is what a kernel returned: the bytes of a workspace that it could not have.
inline void check_memory(const char* op, const Tensor& like, int64_t missing) {
  if (missing == kUncountable) fail_uncountable(op, "the workspace");
  if (missing) fail_for_memory(op, "the workspace", missing, like, "", false);
}

// For one pass through time.
struct Need {
  int threads;
  double alone_seconds;

  // input_size: of an input that is multiplied too. speed: how many times as fast as in float32 products are.
  Need(const Recurrence& r, int64_t row_count, int64_t input_size, double speed = 1) {
    const double units = 1.0 * r.directions * traits(r.mode).gates * r.hidden_size, weights = units * r.state_size;
    const int64_t steps = r.rows.steps ? r.rows.steps : 1;
    const double flops = 2 * weights * row_count / speed, of_input = 2 * units * input_size * row_count / speed;
    // One step's products are made in the same round. Two directions hand nothing over, or little for what they
    // multiply (choose_directions_at_once).
    const double shared = steps == 1 ? flops + of_input : flops;
    threads = useful_threads(shared, r.directions > 1 ? 1e9 : shared / steps);
    alone_seconds = steps * product_seconds(flops / steps, weights * kTypicalBytes / speed) + of_input / kFlops;
  }

 private:
  // Of a weight as it is computed with.
  static constexpr double kTypicalBytes = 4;
};

struct CpuBackend {
  static Tensor empty(const Wanted& wanted) {
    const Tensor tensor = rnnfast::empty(wanted);
    prefer_huge_pages(tensor.mutable_data_ptr(), bytes_of(wanted));
    return tensor;
  }

  // The kernels make the input projection themselves.
  static void forward(ForwardParams& p, Context& context, const Places& places) {
    p.input_size = context.like.size(context.like.dim() - 1);
    p.input = context.hold("input", context.like);
    for (const KindTraits& kind : kKinds)
      if (!kind.multiplies_steps()) hold_parameters(kind, context, p, places);
    const Need need(p, context.row_count, p.input_size);
    Team team(need.threads, need.alone_seconds);
    check_memory(context.op, context.like, kernels(p.dtype).forward(p, team));
  }
  static void backward(const BackwardParams& p, const Context& context, const Places&) {
    const Need need(p, context.row_count, 0);
    Team team(need.threads, need.alone_seconds);
    check_memory(context.op, context.like, kernels(p.dtype).backward(p, team, nullptr));
  }
};

// c = a b, of whatever size.
inline void multiply(const Context& context, const MatmulParams& m) {
  if (!m.m || !m.n) return;
  // Sums that are only rounded take as long as so many products.
  constexpr int64_t kRounding = 8;
  const double flops = 2.0 * m.m * m.n * (m.sums && m.k < kRounding ? kRounding : m.k);
  Team team(useful_threads(flops, flops), flops / kFlops);
  check_memory(context.op, context.like, kernels(m.dtype).matmul(m, team));
}

}  // namespace
}  // namespace rnnfast::cpu

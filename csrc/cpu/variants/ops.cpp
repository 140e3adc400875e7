// The ops of layers with options on CPU tensors (csrc/variants/ops.h).
#include "../../variants/ops.h"

#include "../backend.h"

namespace rnnfast::cpu {
namespace {

struct VariantBackend {
  static Tensor empty(const Wanted& wanted) { return CpuBackend::empty(wanted); }

  static void variant_forward(VariantForward& p, Context& context, const Tensor& weight_hh) {
    hold(p, context, weight_hh);
    Team team = team_for(p, context.row_count);
    check_memory(context.op, context.like, variant_kernels(p.dtype).forward(p, team));
  }
  static void variant_backward(VariantBackward& p, Context& context, const Tensor& weight_hh) {
    hold(p, context, weight_hh);
    Team team = team_for(p, context.row_count);
    check_memory(context.op, context.like, variant_kernels(p.dtype).backward(p, team));
  }

 private:
  static void hold(VariantParams& p, Context& context, const Tensor& weight_hh) {
    const Matrix held = context.hold_rows("weight_hh", weight_hh);
    p.weight_hh.data[0] = held.data;
    p.weight_hh.stride[0] = held.stride;
  }
  // For one pass through time: products alone are counted, as for other layers.
  static Team team_for(const VariantParams& p, int64_t row_count) {
    const int64_t steps = p.rows.steps ? p.rows.steps : 1;
    const double weights = 1.0 * p.width() * p.head_size(), flops = 2 * weights * row_count;
    return Team(useful_threads(flops, flops / steps), steps * product_seconds(flops / steps, weights * 4));
  }
};

}  // namespace
}  // namespace rnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, library) {
  rnnfast::register_variant_ops<rnnfast::cpu::VariantBackend>(library);
}

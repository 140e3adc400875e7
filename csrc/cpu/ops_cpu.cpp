// The ops on CPU tensors: checks, allocates, fills the params structs, calls the kernels.
#include "../layer_ops.h"
#include "core_latency.h"
#include "isa.h"
#include "memory.h"
#include "pool.h"
#include "split.h"

// What the system still has is not what one allocation can get: not reported.
rnnfast::DeviceMemory rnnfast::device_memory(const Tensor&) { return {}; }

namespace rnnfast::cpu {

void parallel_region(int64_t slots, void (*body)(int64_t, int64_t, void*), void* context) {
  if (slots == 1) return body(0, 1, context);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

namespace {

[[maybe_unused]] const bool allocator_taught = teach_allocator();

// Calling others costs some microseconds, and handing over to them each round less than one: small work stays on the
// calling thread, and no more threads take part than have something to do in a round.
int useful_threads(double flops, double flops_a_round) {
  constexpr double kWorthCalling = 4e5, kWorthHandingOver = 6e4;
  if (flops < kWorthCalling || flops_a_round < kWorthHandingOver) return 1;
  const int available = static_cast<int>(torch::stable::get_num_threads());
  const double useful = 1 + flops_a_round / kWorthHandingOver;
  return useful < available ? static_cast<int>(useful) : available;
}

// `missing` is what a kernel returned: the bytes of a workspace that it could not have.
void check_memory(const char* op, const Tensor& like, int64_t missing) {
  if (missing == kUncountable) fail_uncountable(op, "the workspace");
  if (missing) fail_for_memory(op, "the workspace", missing, like, "", false);
}

// For one pass through time.
struct Need {
  int threads;
  double alone_seconds;

  // input_size: of an input that is multiplied too.
  Need(const Recurrence& r, int64_t row_count, int64_t input_size) {
    const double weights = 1.0 * r.directions * traits(r.mode).gates * r.hidden_size * r.state_size;
    const int64_t steps = r.rows.steps ? r.rows.steps : 1;
    const double flops = 2 * weights * row_count;
    // Two directions hand nothing over.
    threads = useful_threads(flops, r.directions > 1 ? 1e9 : flops / steps);
    alone_seconds = steps * product_seconds(flops / steps, weights * kTypicalBytes) +
                    2.0 * r.directions * traits(r.mode).gates * r.hidden_size * input_size * row_count / kFlops;
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
    check_memory(context.op, context.like, kernels(p.dtype).backward(p, team));
  }
};

Tensor matmul(Tensor a, Tensor b) {
  const Context context("rnnfast::matmul", "a", a);
  const char* const op = context.op;
  RNNFAST_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": expected (M, K) and (K, N), got ",
                shape_text(a.sizes().data(), a.dim()), " and ", shape_text(b.sizes().data(), b.dim()));
  check_like(op, "b", b, a);
  MatmulParams m;
  m.dtype = dtype_of(op, a);
  m.m = a.size(0);
  m.k = a.size(1);
  m.n = b.size(1);
  if (b.stride(0) != 1 && b.stride(1) != 1) b = contiguous_copy(op, "b", b);
  m.a = data_of(a);
  m.a_row = a.stride(0);
  m.a_col = m.k == 1 ? 1 : a.stride(1);
  m.b = data_of(b);
  m.b_row = b.stride(0);
  m.b_col = b.stride(1);
  Tensor c = LayerOps<CpuBackend>::empty(context, "the product", {m.m, m.n});
  m.c = mutable_data_of(c);
  m.c_row = m.n;
  if (!m.m || !m.n) return c;
  const double flops = 2.0 * m.m * m.n * m.k;
  Team team(useful_threads(flops, flops), flops / kFlops);
  check_memory(op, a, kernels(m.dtype).matmul(m, team));
  return c;
}

std::string use_cpu_isa(std::string name) {
  const std::string used = use_isa(name);
  RNNFAST_CHECK(!used.empty(), "rnnfast::use_cpu_isa: name: expected an instruction set that this processor has, got ",
                name);
  return used;
}

std::string use_cpu_team(std::string name) {
  const std::string used(use_team(name));
  RNNFAST_CHECK(!used.empty(), "rnnfast::use_cpu_team: name: expected auto, alone, pool or helpers, got ", name);
  return used;
}

double core_latency(int64_t rounds) {
  RNNFAST_CHECK(rounds > 0, "rnnfast::core_latency: rounds: expected at least 1, got ", rounds);
  RNNFAST_CHECK(rounds <= kMostRounds, "rnnfast::core_latency: rounds: expected at most ", kMostRounds, ", got ",
                rounds);
  if (is_forked()) return 0;
  return core_to_core_seconds(static_cast<int>(torch::stable::get_num_threads()), rounds);
}

}  // namespace
}  // namespace rnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, library) {
  rnnfast::register_layer_ops<rnnfast::cpu::CpuBackend>(library);
  library.impl("matmul", TORCH_BOX(&rnnfast::cpu::matmul));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, library) {
  library.impl("use_cpu_isa", TORCH_BOX(&rnnfast::cpu::use_cpu_isa));
  library.impl("use_cpu_team", TORCH_BOX(&rnnfast::cpu::use_cpu_team));
  library.impl("core_latency", TORCH_BOX(&rnnfast::cpu::core_latency));
}

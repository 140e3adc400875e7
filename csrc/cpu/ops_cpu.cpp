// The ops on CPU tensors: checks, allocates, fills the params structs, calls the kernels.
#include "backend.h"
#include "core_latency.h"
#include "layer_backward.h"
#include "pool.h"

// What the system still has is not what one allocation can get: not reported.
rnnfast::DeviceMemory rnnfast::device_memory(const Tensor&) { return {}; }

namespace rnnfast::cpu {

void parallel_region(int64_t slots, void (*body)(int64_t, int64_t, void*), void* context) {
  if (slots == 1) return body(0, 1, context);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

namespace {

[[maybe_unused]] const bool allocator_taught = teach_allocator();

struct PanelTraits {
  const char* name;
  PanelType type;
  double speed;  // of products, those in float32 are 1
};
constexpr PanelTraits kPanelTypes[] = {
    {"float32", PanelType::float32, 1}, {"bf16", PanelType::bfloat16, 1.2}, {"int8", PanelType::int8, 2}};

const PanelTraits& panel_traits(const char* op, const std::string& name) {
  for (const PanelTraits& panel : kPanelTypes)
    if (name == panel.name) return panel;
  RNNFAST_CHECK(false, op, ": weights: expected float32, bf16 or int8, got ", name);
  __builtin_unreachable();
}

// A matrix in panels, in each direction.
void hold_panels(const KindTraits& kind, PanelType type, Context& context, ForwardParams& p, const Places& places) {
  const int64_t gates = kind.rows == Size::gates ? traits(p.mode).gates : 1;
  const int64_t units = (kind.rows == Size::gates ? p.hidden_size : p.state_size) + kPanelRows - 1;
  const int64_t columns = kind.columns == Size::input ? p.input_size : elements_of(kind.columns, p);
  RNNFAST_CHECK(type != PanelType::int8 || columns <= kMostInt8Columns, context.op, ": ", kind.name,
                ": expected at most ", kMostInt8Columns, " columns of int8, got ", columns);
  for (int64_t d = 0; d < p.directions; ++d) {
    const std::string name = place_name(kind, d);
    const Tensor& tensor = required(context.op, kind, d, places);
    check_shape(context.op, name.c_str(), tensor, {units / kPanelRows * gates, panel_lines(type, columns), kLineBytes});
    RNNFAST_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Byte && tensor.is_cpu(), context.op, ": ",
                  name, ": expected panels of weights, uint8 on the CPU");
    p.parameters[kind.kind].data[d] = context.hold(kind.name, tensor);
  }
}

Three quantized_layer(std::string weights, int64_t hidden_size, int64_t proj_size, std::string mode, Tensor input,
                      OptionalTensor hx, OptionalTensor cx, Sequences sequences, Places places) {
  Context context("rnnfast::quantized_layer", "input", input);
  const char* const op = context.op;
  const PanelTraits& panel = panel_traits(op, weights);
  constexpr int64_t kMostUnits = int64_t{1} << 32;
  RNNFAST_CHECK(hidden_size > 0 && hidden_size < kMostUnits, op, ": hidden_size: expected 1 to ", kMostUnits - 1,
                ", got ", hidden_size);
  RNNFAST_CHECK(proj_size >= 0 && proj_size < kMostUnits, op, ": proj_size: expected 0 to ", kMostUnits - 1, ", got ",
                proj_size);
  ForwardParams p;
  fill_options(mode, places, context, p);
  RNNFAST_CHECK(p.dtype == DType::float32, op, ": input: expected float32");
  RNNFAST_CHECK(p.projected == (proj_size > 0), op, ": ", traits(multiplier_of(Size::hidden)).name, ": expected ",
                proj_size > 0 ? "a tensor, got None" : "None, got a tensor", " with proj_size ", proj_size);
  p.hidden_size = hidden_size;
  p.state_size = p.projected ? proj_size : hidden_size;
  fill_rows(hx, cx, sequences, context, p);
  p.input_size = input.size(input.dim() - 1);
  check_sizes(op, "input", input);
  p.input = context.hold("input", input);
  for (const KindTraits& kind : kKinds) {
    if (kind.option == Option::projection && !p.projected) continue;
    if (kind.is_matrix()) {
      hold_panels(kind, panel.type, context, p, places);
    } else {
      check_parameters(kind, context, p, places);
      hold_parameters(kind, context, p, places);
    }
  }
  const auto results = LayerOps<CpuBackend>::make_results(false, context, p);
  const Need need(p, context.row_count, p.input_size, panel.speed);
  Team team(need.threads, need.alone_seconds);
  check_memory(op, input, panel_forward(panel.type)(p, team));
  return {results.output, LayerOps<CpuBackend>::or_none(context, results.h_n),
          LayerOps<CpuBackend>::or_none(context, results.c_n)};
}

using Stepped = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor, OptionalTensor>;

// How the rows of one step lie, (B, width), (1, B, width) or with batch_first (B, 1, width).
Sequences one_step(const Context& context, bool batch_first) {
  const Tensor& rows = context.like;
  RNNFAST_CHECK(rows.dim() == 2 || (rows.dim() == 3 && rows.size(batch_first ? 1 : 0) == 1), context.op, ": ",
                context.like_name, ": expected rows of one step, got shape ",
                shape_text(rows.sizes().data(), rows.dim()));
  Sequences sequences;
  sequences.batch_first = batch_first;
  return sequences;
}

Stepped step(std::string mode, bool saves, Tensor input, OptionalTensor hx, OptionalTensor cx, bool batch_first,
             Tensor weight_ih, Tensor weight_hh, OptionalTensor bias_ih, OptionalTensor bias_hh) {
  Context context("rnnfast::step", "input", input);
  Places places;
  places[Kind::weight_ih][0] = weight_ih;
  places[Kind::weight_hh][0] = weight_hh;
  places[Kind::bias_ih][0] = bias_ih;
  places[Kind::bias_hh][0] = bias_hh;
  const auto f = LayerOps<CpuBackend>::forwards(context, saves, mode, hx, cx, one_step(context, batch_first), places);
  return {f.output, f.h_n, f.c_n, f.cell_states, f.reserve};
}

Stepped step_backward(std::string mode, bool wants_input, OptionalTensor grad_output, OptionalTensor grad_h_n,
                      OptionalTensor grad_c_n, Tensor input, OptionalTensor output, OptionalTensor cell_states,
                      OptionalTensor reserve, OptionalTensor hx, OptionalTensor cx, bool batch_first, Tensor weight_ih,
                      Tensor weight_hh) {
  // The input has the rows of all.
  Context context("rnnfast::step_backward", "input", input);
  Places places;
  places[Kind::weight_hh][0] = weight_hh;
  const auto b = LayerOps<CpuBackend>::backwards(context, mode, grad_output, grad_h_n, grad_c_n, std::nullopt, output,
                                                 cell_states, reserve, hx, cx, one_step(context, batch_first), places);
  const int64_t width = b.grad_gates.size(input.dim() - 1), input_size = input.size(input.dim() - 1);
  context.check("weight_ih", weight_ih, {width, input_size});
  MatmulParams m;
  const OptionalTensor grad_input = LayerOps<CpuBackend>::rows(context, "grad_input", wants_input, m.c, input_size);
  if (wants_input) {
    m.dtype = dtype_of(context.op, input);
    m.m = context.row_count;
    m.k = m.a_row = width;
    m.n = m.c_row = input_size;
    m.a = data_of(b.grad_gates);
    m.a_col = m.b_col = 1;
    const Matrix weights = context.hold_rows("weight_ih", weight_ih);
    m.b = weights.data;
    m.b_row = weights.stride;
    multiply(context, m);
  }
  return {b.grad_gates, b.grad_gates_hh, grad_input, b.grad_hx, b.grad_cx};
}

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
  multiply(context, m);
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

void cpu_allow_bf16(bool allowed) { allow_bf16(allowed); }

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
  library.impl("quantized_layer", &rnnfast::Boxed<&rnnfast::cpu::quantized_layer>::call);
  library.impl("layer_backward", &rnnfast::Boxed<&rnnfast::cpu::layer_backward>::call);
  library.impl("step", TORCH_BOX(&rnnfast::cpu::step));
  library.impl("step_backward", TORCH_BOX(&rnnfast::cpu::step_backward));
  library.impl("matmul", TORCH_BOX(&rnnfast::cpu::matmul));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, library) {
  library.impl("use_cpu_isa", TORCH_BOX(&rnnfast::cpu::use_cpu_isa));
  library.impl("cpu_vendor", TORCH_BOX(&rnnfast::cpu::processor_vendor));
  library.impl("use_cpu_team", TORCH_BOX(&rnnfast::cpu::use_cpu_team));
  library.impl("cpu_allow_bf16", TORCH_BOX(&rnnfast::cpu::cpu_allow_bf16));
  library.impl("core_latency", TORCH_BOX(&rnnfast::cpu::core_latency));
}

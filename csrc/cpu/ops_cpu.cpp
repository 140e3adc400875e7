// The ops on CPU tensors: checks, allocates, fills the params structs, calls the kernels.
#include <pthread.h>
#include <torch/csrc/stable/library.h>

#include <atomic>

#include "../checks.h"
#include "isa.h"
#include "memory.h"

namespace rnnfast::cpu {

void parallel_region(int64_t slots, void (*body)(int64_t, int64_t, void*), void* context) {
  if (slots == 1) return body(0, 1, context);
  torch::stable::parallel_for(0, slots, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

namespace {

using Tensors = std::vector<Tensor>;

[[maybe_unused]] const bool allocator_taught = teach_allocator();

// The thread pool of libgomp does not survive a fork: its threads are not there in the child, and a parallel region
// would wait for them for ever. A forked process works on one thread.
std::atomic<bool> forked{false};
[[maybe_unused]] const int at_fork_installed = pthread_atfork(nullptr, nullptr, [] { forked.store(true); });

// Starting a region costs some microseconds, and so does a barrier each step: small work stays on the calling thread,
// and no more threads take part than have something to do between two barriers.
int threads_for(double flops, double flops_between_barriers) {
  constexpr double kWorthRegion = 4e5, kWorthBarrier = 6e4;
  if (flops < kWorthRegion || flops_between_barriers < kWorthBarrier || forked.load(std::memory_order_relaxed))
    return 1;
  const int available = static_cast<int>(torch::stable::get_num_threads());
  const double useful = 1 + flops_between_barriers / kWorthBarrier;
  return useful < available ? static_cast<int>(useful) : available;
}

void check_memory(const char* op, bool enough) { STD_TORCH_CHECK(enough, op, ": not enough memory for the workspace"); }

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor tensor =
      torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), like.scalar_type());
  int64_t bytes = static_cast<int64_t>(tensor.element_size());
  for (const int64_t size : sizes) bytes *= size;
  prefer_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}
Tensor none(const Tensor& like) { return empty(like, {0}); }

Tensor as_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}
const void* data_of(const Tensor& tensor) { return tensor.const_data_ptr(); }
void* mutable_data_of(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Row-major with any row stride; other layouts are copied. `keep` owns the copy.
struct Matrix {
  const void* data;
  int64_t stride;
};
Matrix row_major(const Tensor& tensor, Tensors& keep) {
  const bool usable = tensor.stride(1) == 1 || tensor.size(1) <= 1;
  if (usable) return {data_of(tensor), tensor.stride(0)};
  keep.push_back(torch::stable::contiguous(tensor));
  return {data_of(keep.back()), tensor.size(1)};
}

// The arguments that forward, backward and inference share.
struct Context {
  Recurrence r;
  Tensors keep;  // contiguous copies must live as long as the pointers to them
  int64_t row_count = 0;

  const void* hold(const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    keep.push_back(as_contiguous(*tensor));
    return data_of(keep.back());
  }
};

struct Arguments {
  const char* op;
  const std::string& mode;
  const Tensor& model;  // dtype, device and leading sizes; its last dimension is D * width
  const Tensors& weight_hh;
  const Tensors& weight_hr;
  const OptionalTensor& hx;
  const OptionalTensor& cx;
  const OptionalTensor& batch_sizes;
  const OptionalTensor& lengths;
  const OptionalTensor& resets;
  bool batch_first;
};

void fill_rows(const Arguments& a, Context& context) {
  RowLayout& rows = context.r.rows;
  const Tensor& model = a.model;
  if (a.batch_sizes) {
    STD_TORCH_CHECK(model.dim() == 2, a.op, ": with batch_sizes rows are packed: expected 2 dimensions, got ",
                    model.dim());
    STD_TORCH_CHECK(
        a.batch_sizes->is_cpu() && a.batch_sizes->scalar_type() == ScalarType::Long && a.batch_sizes->dim() == 1, a.op,
        ": batch_sizes: expected a 1-D int64 tensor on the CPU");
    STD_TORCH_CHECK(!a.lengths && !a.resets, a.op, ": lengths and resets go with dense rows, not with batch_sizes");
    rows.batch_sizes = static_cast<const int64_t*>(context.hold(a.batch_sizes));
    rows.steps = a.batch_sizes->size(0);
    rows.batch = rows.steps ? rows.batch_sizes[0] : 0;
    context.row_count = model.size(0);
    int64_t sum = 0;
    for (int64_t t = 0; t < rows.steps; ++t) {
      STD_TORCH_CHECK(rows.batch_sizes[t] > 0 && (t == 0 || rows.batch_sizes[t] <= rows.batch_sizes[t - 1]), a.op,
                      ": batch_sizes: expected positive sizes that do not increase");
      sum += rows.batch_sizes[t];
    }
    STD_TORCH_CHECK(sum == context.row_count, a.op, ": batch_sizes: expected a sum of ", context.row_count, ", got ",
                    sum);
    return;
  }
  STD_TORCH_CHECK(model.dim() == 3, a.op, ": expected 3 dimensions, got ", model.dim());
  rows.steps = model.size(a.batch_first ? 1 : 0);
  rows.batch = model.size(a.batch_first ? 0 : 1);
  rows.step_stride = a.batch_first ? 1 : rows.batch;
  rows.batch_stride = a.batch_first ? rows.steps : 1;
  context.row_count = rows.steps * rows.batch;
  if (a.lengths) {
    STD_TORCH_CHECK(a.lengths->is_cpu() && a.lengths->scalar_type() == ScalarType::Long, a.op,
                    ": lengths: expected an int64 tensor on the CPU");
    check_shape(a.op, "lengths", *a.lengths, {rows.batch});
    rows.lengths = static_cast<const int64_t*>(context.hold(a.lengths));
    for (int64_t b = 0; b < rows.batch; ++b)
      STD_TORCH_CHECK(rows.lengths[b] >= 0 && rows.lengths[b] <= rows.steps, a.op,
                      ": lengths: expected values from 0 to ", rows.steps, ", got ", rows.lengths[b], " for row ", b);
  }
  if (a.resets) {
    STD_TORCH_CHECK(a.resets->is_cpu() && a.resets->scalar_type() == ScalarType::Bool, a.op,
                    ": resets: expected a bool tensor on the CPU");
    check_shape(a.op, "resets", *a.resets, {model.size(0), model.size(1)});
    rows.resets = static_cast<const bool*>(context.hold(a.resets));
  }
}

// Everything but the layer's own input. Leaves contiguous copies in context.keep.
void fill(const Arguments& a, Context& context) {
  Recurrence& r = context.r;
  r.mode = mode_of(a.op, a.mode);
  r.dtype = dtype_of(a.op, a.model);
  r.directions = static_cast<int64_t>(a.weight_hh.size());
  STD_TORCH_CHECK(r.directions == 1 || r.directions == 2, a.op, ": weight_hh: expected 1 or 2 tensors, got ",
                  r.directions);
  r.projected = !a.weight_hr.empty();
  STD_TORCH_CHECK(!r.projected || (r.mode == Mode::lstm && a.weight_hr.size() == a.weight_hh.size()), a.op,
                  ": weight_hr: expected none, or for an LSTM one for each direction");
  STD_TORCH_CHECK(a.weight_hh[0].dim() == 2, a.op, ": weight_hh: expected 2 dimensions");
  const int64_t gates = gates_of(r.mode);
  r.hidden_size = a.weight_hh[0].size(0) / gates;
  r.state_size = a.weight_hh[0].size(1);
  context.keep.reserve(16);
  for (int64_t d = 0; d < r.directions; ++d) {
    check_shape(a.op, "weight_hh", a.weight_hh[d], {gates * r.hidden_size, r.projected ? r.state_size : r.hidden_size});
    check_like(a.op, "weight_hh", a.weight_hh[d], a.model);
    const Matrix hh = row_major(a.weight_hh[d], context.keep);
    r.weight_hh[d] = hh.data;
    r.weight_hh_stride[d] = hh.stride;
    if (!r.projected) continue;
    check_shape(a.op, "weight_hr", a.weight_hr[d], {r.state_size, r.hidden_size});
    check_like(a.op, "weight_hr", a.weight_hr[d], a.model);
    const Matrix hr = row_major(a.weight_hr[d], context.keep);
    r.weight_hr[d] = hr.data;
    r.weight_hr_stride[d] = hr.stride;
  }
  fill_rows(a, context);
  if (a.hx) {
    check_shape(a.op, "hx", *a.hx, {r.directions, r.rows.batch, r.state_size});
    check_like(a.op, "hx", *a.hx, a.model);
    r.hx = context.hold(a.hx);
  }
  if (a.cx && r.mode == Mode::lstm) {
    check_shape(a.op, "cx", *a.cx, {r.directions, r.rows.batch, r.hidden_size});
    check_like(a.op, "cx", *a.cx, a.model);
    r.cx = context.hold(a.cx);
  }
}

int threads_for(const Recurrence& r, int64_t row_count) {
  const double per_row = 2.0 * r.directions * gates_of(r.mode) * r.hidden_size * r.state_size;
  // Two directions need no barrier.
  const double between = r.directions > 1 ? 1e9 : per_row * row_count / (r.rows.steps ? r.rows.steps : 1);
  return threads_for(per_row * row_count, between);
}

// Last dimension of a (rows..., width) result.
Tensor empty_rows(const Tensor& like, int64_t width) {
  return like.dim() == 2 ? empty(like, {like.size(0), width}) : empty(like, {like.size(0), like.size(1), width});
}

Tensor input_gates(std::string mode_name, Tensor input, Tensors weight_ih, Tensors bias_ih, Tensors bias_hh) {
  const char* op = "rnnfast::input_gates";
  const Mode mode = mode_of(op, mode_name);
  STD_TORCH_CHECK(!weight_ih.empty() && weight_ih[0].dim() == 2, op,
                  ": weight_ih: expected 1 or 2 tensors of 2 dimensions");
  STD_TORCH_CHECK((bias_ih.empty() || bias_ih.size() == weight_ih.size()) &&
                      (bias_hh.empty() || bias_hh.size() == weight_ih.size()),
                  op, ": bias_ih, bias_hh: expected none, or one for each direction");
  STD_TORCH_CHECK(input.dim() == 2 || input.dim() == 3, op, ": input: expected 2 or 3 dimensions, got ", input.dim());
  const Tensor x = as_contiguous(input);
  const int64_t directions = static_cast<int64_t>(weight_ih.size());
  MatmulParams m;
  m.dtype = dtype_of(op, input);
  m.m = x.dim() == 2 ? x.size(0) : x.size(0) * x.size(1);
  m.n = weight_ih[0].size(0);
  m.k = x.size(x.dim() - 1);
  m.a = data_of(x);
  m.a_row = m.k;
  m.a_col = 1;
  m.b_row = 1;
  m.c_row = directions * m.n;
  Tensor gates = empty_rows(input, directions * m.n);
  for (int64_t d = 0; d < directions; ++d) {
    check_shape(op, "weight_ih", weight_ih[d], {m.n, m.k});
    check_like(op, "weight_ih", weight_ih[d], input);
    Tensors keep;
    const Matrix weight = row_major(weight_ih[d], keep);
    m.b = weight.data;
    m.b_col = weight.stride;
    m.c = static_cast<char*>(mutable_data_of(gates)) + d * m.n * static_cast<int64_t>(gates.element_size());
    const Tensors* biases[2] = {&bias_ih, &bias_hh};
    for (int i = 0; i < 2; ++i) {
      m.bias[i] = nullptr;
      if (biases[i]->empty()) continue;
      const Tensor& bias = (*biases[i])[d];
      check_shape(op, i ? "bias_hh" : "bias_ih", bias, {m.n});
      check_like(op, i ? "bias_hh" : "bias_ih", bias, input);
      keep.push_back(as_contiguous(bias));
      m.bias[i] = data_of(keep.back());
      // b_hn stands inside r * (W_hn h + b_hn): the recurrence adds it.
      m.bias_count[i] = i == 1 && mode == Mode::gru ? m.n / 3 * 2 : m.n;
    }
    if (m.m && m.n) check_memory(op, kernels().matmul(m, threads_for(2.0 * m.m * m.n * m.k, 1e9)));
  }
  return gates;
}

void fill_biases(const char* op, const char* argument, const Tensors& biases, const Tensor& model, Context& context,
                 const void** to) {
  if (biases.empty()) return;
  const Recurrence& r = context.r;
  STD_TORCH_CHECK(static_cast<int64_t>(biases.size()) == r.directions, op, ": ", argument,
                  ": expected none, or one for each direction");
  for (int64_t d = 0; d < r.directions; ++d) {
    check_shape(op, argument, biases[d], {gates_of(r.mode) * r.hidden_size});
    check_like(op, argument, biases[d], model);
    to[d] = context.hold(biases[d]);
  }
}

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// What forward returns, allocated and put into the params.
Five forward(const char* op, ForwardParams& p, const Context& context, const Tensor& like, bool save_reserve) {
  const int64_t D = p.directions, H = p.hidden_size;
  const bool lstm = p.mode == Mode::lstm;
  Tensor output = empty_rows(like, D * p.state_size), h_n = empty(like, {D, p.rows.batch, p.state_size});
  Tensor c_n = lstm ? empty(like, {D, p.rows.batch, H}) : none(like);
  Tensor cells = lstm && save_reserve ? empty_rows(like, D * H) : none(like);
  Tensor reserve = save_reserve && reserve_of(p.mode) ? empty_rows(like, D * reserve_of(p.mode) * H) : none(like);
  p.output = mutable_data_of(output);
  p.h_n = mutable_data_of(h_n);
  p.c_n = mutable_data_of(c_n);
  p.cells = lstm && save_reserve ? mutable_data_of(cells) : nullptr;
  p.reserve = save_reserve && reserve_of(p.mode) ? mutable_data_of(reserve) : nullptr;
  check_memory(op, kernels().forward(p, threads_for(p, context.row_count)));
  return {output, h_n, c_n, cells, reserve};
}

Five recurrence_forward(std::string mode, Tensor gates, Tensors weight_hh, Tensors bias_hh, Tensors weight_hr,
                        OptionalTensor hx, OptionalTensor cx, OptionalTensor batch_sizes, OptionalTensor lengths,
                        OptionalTensor resets, bool batch_first, bool save_reserve) {
  const char* op = "rnnfast::recurrence_forward";
  Context context;
  fill({op, mode, gates, weight_hh, weight_hr, hx, cx, batch_sizes, lengths, resets, batch_first}, context);
  ForwardParams p;
  static_cast<Recurrence&>(p) = context.r;
  const int64_t width = p.directions * gates_of(p.mode) * p.hidden_size;
  STD_TORCH_CHECK(gates.size(gates.dim() - 1) == width, op, ": gates: expected a last dimension of ", width, ", got ",
                  gates.size(gates.dim() - 1));
  p.gates = context.hold(gates);
  if (p.mode == Mode::gru) fill_biases(op, "bias_hh", bias_hh, gates, context, p.bias_hh);
  return forward(op, p, context, gates, save_reserve);
}

Five layer(const char* op, const std::string& mode, const Tensor& input, const Tensors& weight_ih,
           const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh, const Tensors& weight_hr,
           const OptionalTensor& hx, const OptionalTensor& cx, const OptionalTensor& batch_sizes,
           const OptionalTensor& lengths, const OptionalTensor& resets, bool batch_first, bool save_reserve) {
  Context context;
  fill({op, mode, input, weight_hh, weight_hr, hx, cx, batch_sizes, lengths, resets, batch_first}, context);
  ForwardParams p;
  static_cast<Recurrence&>(p) = context.r;
  STD_TORCH_CHECK(static_cast<int64_t>(weight_ih.size()) == p.directions, op, ": weight_ih: expected ", p.directions,
                  " tensors, got ", weight_ih.size());
  p.input_size = input.size(input.dim() - 1);
  p.from_input = true;
  p.input = context.hold(input);
  for (int64_t d = 0; d < p.directions; ++d) {
    check_shape(op, "weight_ih", weight_ih[d], {gates_of(p.mode) * p.hidden_size, p.input_size});
    check_like(op, "weight_ih", weight_ih[d], input);
    const Matrix ih = row_major(weight_ih[d], context.keep);
    p.weight_ih[d] = ih.data;
    p.weight_ih_stride[d] = ih.stride;
  }
  fill_biases(op, "bias_ih", bias_ih, input, context, p.bias_ih);
  fill_biases(op, "bias_hh", bias_hh, input, context, p.bias_hh);
  return forward(op, p, context, input, save_reserve);
}

Five layer_forward(std::string mode, Tensor input, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
                   Tensors bias_hh, Tensors weight_hr, OptionalTensor hx, OptionalTensor cx, OptionalTensor batch_sizes,
                   OptionalTensor lengths, OptionalTensor resets, bool batch_first) {
  return layer("rnnfast::layer_forward", mode, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, hx, cx,
               batch_sizes, lengths, resets, batch_first, true);
}

Three layer_inference(std::string mode, Tensor input, Tensors weight_ih, Tensors weight_hh, Tensors bias_ih,
                      Tensors bias_hh, Tensors weight_hr, OptionalTensor hx, OptionalTensor cx,
                      OptionalTensor batch_sizes, OptionalTensor lengths, OptionalTensor resets, bool batch_first) {
  auto [output, h_n, c_n, cells, reserve] =
      layer("rnnfast::layer_inference", mode, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, hx, cx,
            batch_sizes, lengths, resets, batch_first, false);
  return {output, h_n, c_n};
}

Five recurrence_backward(std::string mode, OptionalTensor grad_output, OptionalTensor grad_h_n, OptionalTensor grad_c_n,
                         OptionalTensor grad_cells, Tensor output, Tensor cells, Tensor reserve, Tensors weight_hh,
                         Tensors weight_hr, OptionalTensor hx, OptionalTensor cx, OptionalTensor batch_sizes,
                         OptionalTensor lengths, OptionalTensor resets, bool batch_first) {
  const char* op = "rnnfast::recurrence_backward";
  Context context;
  fill({op, mode, output, weight_hh, weight_hr, hx, cx, batch_sizes, lengths, resets, batch_first}, context);
  const Recurrence& r = context.r;
  const int64_t D = r.directions, H = r.hidden_size, G = gates_of(r.mode);
  const bool lstm = r.mode == Mode::lstm;
  const auto check_rows = [&](const char* argument, const Tensor& tensor, int64_t width) {
    check_like(op, argument, tensor, output);
    if (output.dim() == 2)
      check_shape(op, argument, tensor, {output.size(0), width});
    else
      check_shape(op, argument, tensor, {output.size(0), output.size(1), width});
  };
  BackwardParams p;
  static_cast<Recurrence&>(p) = r;
  const auto rows_of = [&](const char* argument, const OptionalTensor& tensor, int64_t width) -> const void* {
    if (!tensor) return nullptr;
    check_rows(argument, *tensor, width);
    return context.hold(tensor);
  };
  const auto state_of = [&](const char* argument, const OptionalTensor& tensor, int64_t width) -> const void* {
    if (!tensor) return nullptr;
    check_like(op, argument, *tensor, output);
    check_shape(op, argument, *tensor, {D, r.rows.batch, width});
    return context.hold(tensor);
  };
  p.output = rows_of("output", output, D * r.state_size);
  p.grad_output = rows_of("grad_output", grad_output, D * r.state_size);
  p.grad_h_n = state_of("grad_h_n", grad_h_n, r.state_size);
  if (lstm) {
    p.cells = rows_of("cells", cells, D * H);
    p.grad_c_n = state_of("grad_c_n", grad_c_n, H);
    p.grad_cells = rows_of("grad_cells", grad_cells, D * H);
  }
  if (reserve_of(r.mode)) p.reserve = rows_of("reserve", reserve, D * reserve_of(r.mode) * H);
  Tensor grad_gates = empty_rows(output, D * G * H);
  Tensor grad_gates_hh = r.mode == Mode::gru ? empty_rows(output, D * G * H) : none(output);
  Tensor grad_hx = hx ? empty(output, {D, r.rows.batch, r.state_size}) : none(output);
  Tensor grad_cx = lstm && cx ? empty(output, {D, r.rows.batch, H}) : none(output);
  Tensor grad_projected = r.projected ? empty_rows(output, D * r.state_size) : none(output);
  p.grad_gates = mutable_data_of(grad_gates);
  p.grad_gates_hh = r.mode == Mode::gru ? mutable_data_of(grad_gates_hh) : nullptr;
  p.grad_hx = hx ? mutable_data_of(grad_hx) : nullptr;
  p.grad_cx = lstm && cx ? mutable_data_of(grad_cx) : nullptr;
  p.grad_projected = r.projected ? mutable_data_of(grad_projected) : nullptr;
  check_memory(op, kernels().backward(p, threads_for(r, context.row_count)));
  return {grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected};
}

Tensor matmul(Tensor a, Tensor b) {
  const char* op = "rnnfast::matmul";
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && a.size(1) == b.size(0), op, ": expected (M, K) and (K, N), got ",
                  shape_text(a.sizes().data(), a.dim()), " and ", shape_text(b.sizes().data(), b.dim()));
  check_like(op, "b", b, a);
  MatmulParams m;
  m.dtype = dtype_of(op, a);
  m.m = a.size(0);
  m.k = a.size(1);
  m.n = b.size(1);
  if (b.stride(0) != 1 && b.stride(1) != 1) b = torch::stable::contiguous(b);
  m.a = data_of(a);
  m.a_row = a.stride(0);
  m.a_col = m.k == 1 ? 1 : a.stride(1);
  m.b = data_of(b);
  m.b_row = b.stride(0);
  m.b_col = b.stride(1);
  Tensor c = empty(a, {m.m, m.n});
  m.c = mutable_data_of(c);
  m.c_row = m.n;
  if (m.m && m.n) check_memory(op, kernels().matmul(m, threads_for(2.0 * m.m * m.n * m.k, 1e9)));
  return c;
}

std::string use_cpu_isa(std::string name) {
  const std::string used = use_isa(name);
  STD_TORCH_CHECK(!used.empty(),
                  "rnnfast::use_cpu_isa: name: expected an instruction set that this processor has, got ", name);
  return used;
}

}  // namespace
}  // namespace rnnfast::cpu

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CPU, library) {
  library.impl("input_gates", TORCH_BOX(&rnnfast::cpu::input_gates));
  library.impl("recurrence_forward", TORCH_BOX(&rnnfast::cpu::recurrence_forward));
  library.impl("recurrence_backward", TORCH_BOX(&rnnfast::cpu::recurrence_backward));
  library.impl("layer_forward", TORCH_BOX(&rnnfast::cpu::layer_forward));
  library.impl("layer_inference", TORCH_BOX(&rnnfast::cpu::layer_inference));
  library.impl("matmul", TORCH_BOX(&rnnfast::cpu::matmul));
}

STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, library) {
  library.impl("use_cpu_isa", TORCH_BOX(&rnnfast::cpu::use_cpu_isa));
}

// The step kernels against the float64 definition: every cell, type, layout and option, forward and every gradient; in
// the emulator under shuffled schedules, on a card with larger shapes.
#include <algorithm>
#include <cctype>
#include <cstdio>
#include <deque>
#include <string>

#include "cell_truth.h"
#include "check.h"
#include "compare.h"
#include "cuda/device.h"
#include "cuda/step/step_loop.h"
#include "device_array.h"
#include "host_numbers.h"
#include "run_kernel.h"
#include "step_reference.h"

namespace rnnfast::test {
namespace {

using gpu::Arithmetic;

struct TypeCase {
  const char* name;
  Arithmetic arithmetic;
  double tolerance;  // two to four times the largest error of all cases here
};
constexpr TypeCase kTypes[] = {{"float64", Arithmetic::float64, 2e-14},
                               {"float32", Arithmetic::float32, 4e-6},
                               {"tf32", Arithmetic::tf32, 3e-3},
                               {"bfloat16", Arithmetic::bfloat16, 2e-2},
                               {"float16", Arithmetic::float16, 2.5e-3}};

DType dtype_of(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::float64: return DType::float64;
    case Arithmetic::bfloat16: return DType::bfloat16;
    case Arithmetic::float16: return DType::float16;
    default: return DType::float32;
  }
}

// A tensor in a storage type. Memory that nothing has written yet is NaN.
class Buffer {
 public:
  Buffer() = default;
  Buffer(DType dtype, size_t count) : dtype_(dtype), count_(count) {
    bytes_.assign(count * static_cast<size_t>(gpu::size_of(dtype)), static_cast<char>(0xff));
  }
  Buffer(DType dtype, const Values& values) : Buffer(dtype, values.size()) {
    for (size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  // For the next launches only (device_array.h); null where there is no element.
  void* device() { return count_ ? bytes_.device() : nullptr; }
  size_t count() const { return count_; }
  double get(size_t i) const {
    switch (dtype_) {
      case DType::float64: return to_double(typed<double>()[i]);
      case DType::float32: return to_double(typed<float>()[i]);
      case DType::bfloat16: return to_double(typed<gpu::bfloat16>()[i]);
      default: return to_double(typed<gpu::float16>()[i]);
    }
  }

 private:
  template <class T> const T* typed() const { return reinterpret_cast<const T*>(bytes_.data()); }
  template <class T> T* typed() { return reinterpret_cast<T*>(bytes_.data()); }
  void set(size_t i, double value) {
    switch (dtype_) {
      case DType::float64: typed<double>()[i] = value; break;
      case DType::float32: typed<float>()[i] = from_double<float>(value); break;
      case DType::bfloat16: typed<gpu::bfloat16>()[i] = from_double<gpu::bfloat16>(value); break;
      default: typed<gpu::float16>()[i] = from_double<gpu::float16>(value);
    }
  }
  DType dtype_ = DType::float64;
  size_t count_ = 0;
  Array<char> bytes_;
};

// The values as the storage type holds them: what the reference computes from too.
void round_to(DType dtype, Values& values) {
  const Buffer buffer(dtype, values);
  for (size_t i = 0; i < values.size(); ++i) values[i] = buffer.get(i);
}

// (count, rows, columns) to (count, columns, rows).
Values transposed(const Values& matrices, int64_t count, int64_t rows, int64_t columns) {
  Values result(matrices.size());
  for (int64_t m = 0; m < count; ++m)
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j)
        result[static_cast<size_t>((m * columns + j) * rows + i)] =
            matrices[static_cast<size_t>((m * rows + i) * columns + j)];
  return result;
}

// What an index of a result stands for.
struct Elements {
  const Call& call;

  // (rows, D, width), and (D, B, width).
  std::vector<Dimension> rows(const char* unit, int64_t width, int64_t parts = 1, const char* part = "gate") const {
    std::vector<Dimension> dimensions = {{"row", call.row_count, [this](int64_t row) { return call.name_of_row(row); }},
                                         {"direction", call.shape.D}};
    if (parts != 1) dimensions.push_back({part, parts});
    dimensions.push_back({unit, width});
    return dimensions;
  }
  std::vector<Dimension> state(int64_t width) const {
    return {{"direction", call.shape.D}, {"batch", call.shape.B}, {"unit", width}};
  }
};

bool expect_close(const char* name, const Buffer& actual, const Values& expected, const TypeCase& type,
                  const std::vector<Dimension>& dimensions,
                  const std::source_location& place = std::source_location::current()) {
  const auto get = [&](size_t i) { return actual.get(i); };
  return expect_close(name, get, actual.count(), expected, type.tolerance, dimensions, place);
}

void fill_shared(const Call& call, DType dtype, std::deque<Buffer>& keep, Recurrence& r) {
  const Shape& s = call.shape;
  const auto hold = [&](const Values& values) {
    keep.emplace_back(dtype, values);
    return static_cast<const char*>(keep.back().device());
  };
  r.mode = s.mode;
  r.dtype = dtype;
  r.rows.steps = s.T;
  r.rows.batch = s.B;
  r.rows.step_stride = s.batch_first ? 1 : s.B;
  r.rows.batch_stride = s.batch_first ? s.T : 1;
  r.rows.batch_sizes = s.packed ? call.batch_sizes.data() : nullptr;
  r.rows.lengths = s.lengths ? call.lengths.device() : nullptr;
  r.rows.resets = s.resets ? reinterpret_cast<const uint8_t*>(call.resets.device()) : nullptr;
  r.hidden_size = s.H;
  r.state_size = s.state();
  r.directions = s.D;
  r.projected = s.P != 0;
  const char *hh = hold(call.weight_hh), *hr = hold(call.weight_hr);
  for (int64_t d = 0; d < s.D; ++d) {
    r.parameters[Kind::weight_hh].data[d] = hh + d * s.gates() * s.H * s.state() * gpu::size_of(dtype);
    r.parameters[Kind::weight_hh].stride[d] = s.state();
    r.parameters[Kind::weight_hr].data[d] = s.P ? hr + d * s.P * s.H * gpu::size_of(dtype) : nullptr;
    r.parameters[Kind::weight_hr].stride[d] = s.H;
  }
  r.hx = hold(call.hx);
  r.cx = hold(call.cx);
}

// On the null stream, as torch's is by default.
gpu::StepDevice stream_of(bool dependent) { return {nullptr, dependent && gpu::has_dependent_launch()}; }

void run_forward(Call& call, const TypeCase& type, bool dependent) {
  const DType dtype = dtype_of(type.arithmetic);
  const Shape& s = call.shape;
  std::deque<Buffer> keep;
  ForwardParams p;
  fill_shared(call, dtype, keep, p);
  Buffer gates(dtype, call.gates), bias(dtype, call.bias_hh);
  p.gates = gates.device();
  const char* bias_hh = static_cast<const char*>(bias.device());
  for (int64_t d = 0; d < s.D && bias_hh; ++d)
    p.parameters[Kind::bias_hh].data[d] = bias_hh + d * s.gates() * s.H * gpu::size_of(dtype);
  Buffer output(dtype, call.output.size()), h_n(dtype, call.h_n.size()), c_n(dtype, call.c_n.size()),
      cell_states(dtype, call.cell_states.size()), reserve(dtype, call.reserve.size());
  p.output = output.device();
  p.h_n = h_n.device();
  p.c_n = c_n.device();
  p.cell_states = cell_states.device();
  p.reserve = reserve.device();
  const auto states = static_cast<size_t>(s.D * s.B * s.H);
  Buffer carry(dtype == DType::float64 ? dtype : DType::float32, states), hidden(dtype, states);
  gpu::StepWorkspace workspace;
  workspace.carry = carry.device();
  workspace.hidden = hidden.device();
  const bool tf32 = type.arithmetic == Arithmetic::tf32;
  if (!CHECK_NO_ERROR(finish(gpu::run_steps_forward(p, workspace, tf32, stream_of(dependent))))) return;
  const Elements at{call};
  expect_close("output", output, call.output, type, at.rows("unit", s.state()));
  expect_close("h_n", h_n, call.h_n, type, at.state(s.state()));
  expect_close("c_n", c_n, call.c_n, type, at.state(s.H));
  expect_close("cell_states", cell_states, call.cell_states, type, at.rows("unit", s.H));
  expect_close("reserve", reserve, call.reserve, type, at.rows("unit", s.H, s.cell().reserve, "value"));
}

void run_backward(Call& call, const TypeCase& type, bool dependent) {
  const DType dtype = dtype_of(type.arithmetic);
  const Shape& s = call.shape;
  std::deque<Buffer> keep;
  BackwardParams p;
  fill_shared(call, dtype, keep, p);
  const auto hold = [&](const Values& values) {
    keep.emplace_back(dtype, values);
    return keep.back().device();
  };
  p.grad_output = hold(call.grad_output);
  p.grad_h_n = hold(call.grad_h_n);
  p.grad_c_n = hold(call.grad_c_n);
  p.grad_cell_states = hold(call.grad_cell_states);
  p.output = hold(call.output);
  p.cell_states = hold(call.cell_states);
  p.reserve = hold(call.reserve);
  Buffer grad_gates(dtype, call.grad_gates.size()), grad_gates_hh(dtype, call.grad_gates_hh.size()),
      grad_hx(dtype, call.grad_hx.size()), grad_cx(dtype, call.grad_cx.size()),
      grad_projected(dtype, call.grad_projected.size());
  p.grad_gates = grad_gates.device();
  p.grad_gates_hh = grad_gates_hh.device();
  p.grad_hx = grad_hx.device();
  p.grad_cx = grad_cx.device();
  p.grad_projected = grad_projected.device();
  Buffer carry(dtype == DType::float64 ? dtype : DType::float32, static_cast<size_t>(s.D * s.B * s.H));
  const int64_t width = s.gates() * s.H;
  const char* hh_t = static_cast<const char*>(hold(transposed(call.weight_hh, s.D, width, s.state())));
  const char* hr_t = static_cast<const char*>(hold(transposed(call.weight_hr, s.D, s.P, s.H)));
  gpu::StepWorkspace workspace;
  workspace.carry = carry.device();
  for (int64_t d = 0; d < s.D; ++d) {
    Operand &of_hh = workspace.transposed[Kind::weight_hh], &of_hr = workspace.transposed[Kind::weight_hr];
    of_hh.data[d] = hh_t + d * width * s.state() * gpu::size_of(dtype);
    of_hh.stride[d] = width;
    of_hr.data[d] = s.P ? hr_t + d * s.P * s.H * gpu::size_of(dtype) : nullptr;
    of_hr.stride[d] = s.P;
  }
  const bool tf32 = type.arithmetic == Arithmetic::tf32;
  if (!CHECK_NO_ERROR(finish(gpu::run_steps_backward(p, workspace, tf32, stream_of(dependent))))) return;
  const Elements at{call};
  expect_close("grad_gates", grad_gates, call.grad_gates, type, at.rows("unit", s.H, s.gates()));
  expect_close("grad_gates_hh", grad_gates_hh, call.grad_gates_hh, type, at.rows("unit", s.H, s.gates()));
  expect_close("grad_hx", grad_hx, call.grad_hx, type, at.state(s.state()));
  expect_close("grad_cx", grad_cx, call.grad_cx, type, at.state(s.H));
  expect_close("grad_projected", grad_projected, call.grad_projected, type, at.rows("unit", s.state()));
}

Call random_call_with_results(const Shape& shape, const TypeCase& type, uint64_t number) {
  Call call = random_call(shape, 17 + number);
  for (Values* values : {&call.gates, &call.weight_hh, &call.weight_hr, &call.bias_hh, &call.hx, &call.cx,
                         &call.grad_output, &call.grad_h_n, &call.grad_c_n, &call.grad_cell_states})
    round_to(dtype_of(type.arithmetic), *values);
  run_reference(call);
  return call;
}

void run_both(const Shape& shape, const TypeCase& type) {
  const check::Note note(text_of(shape));
  Call call = random_call_with_results(shape, type, seed());
  // What fails only in the second pass on a card fails for the overlap of launches.
#if defined(RNNFAST_EMULATED)
  for (const bool dependent : {true}) {
#else
  for (const bool dependent : {false, true}) {
#endif
    const check::Note launches(dependent ? "overlapping launches" : "launches one after the other");
    run_forward(call, type, dependent);
    run_backward(call, type, dependent);
  }
}

// Shapes of one or two blocks a launch come first. The race detector takes only those: it pays half a millisecond for
// every thread, and needs no luck with the schedule. Address errors do not hang on the schedule either, and a card
// knows no seeds.
#if defined(__SANITIZE_THREAD__)
constexpr unsigned kSeeds = 3;
constexpr bool kSmallOnly = true;
#elif defined(__SANITIZE_ADDRESS__) || !defined(RNNFAST_EMULATED)
constexpr unsigned kSeeds = 1;
constexpr bool kSmallOnly = false;
#else
constexpr unsigned kSeeds = 21;
constexpr bool kSmallOnly = false;
#endif
constexpr size_t kSmall = 2;
const std::vector<Shape> kShapes = {
    {.T = 3, .B = 3, .H = 5, .D = 2, .lengths = true, .resets = true},
    {.T = 3, .B = 4, .H = 9, .packed = true},
    {.T = 3, .B = 9, .H = 17, .resets = true},
    {.T = 4, .B = 5, .H = 9, .D = 2, .packed = true},
    {.T = 3, .B = 2, .H = 32, .batch_first = true, .lengths = true, .initial = false},
    {.T = 2, .B = 3, .H = 64, .D = 2},
};
const std::vector<Shape> kProjected = {
    {.T = 2, .B = 3, .H = 16, .P = 5, .D = 2, .lengths = true, .resets = true},
    {.T = 3, .B = 4, .H = 16, .P = 8, .packed = true},
    {.T = 3, .B = 4, .H = 34, .P = 16, .packed = true},
    // A sum so long that every kernel's ring of chunks is filled more than once, in few blocks.
    {.T = 2, .B = 1, .H = 20, .P = 1600},
};
// For a card: many steps; rows of many lengths in blocks that share them unevenly; more blocks than run at once.
const std::vector<Shape> kLarge = {
    {.T = 40, .B = 5, .H = 64, .D = 2, .lengths = true, .resets = true},
    {.T = 6, .B = 33, .H = 130, .D = 2, .lengths = true, .resets = true},
    {.T = 5, .B = 40, .H = 256, .packed = true},
    {.T = 2, .B = 72, .H = 520, .D = 2},
};
const std::vector<Shape> kLargeProjected = {
    {.T = 12, .B = 33, .H = 130, .P = 70, .D = 2, .lengths = true, .resets = true},
    {.T = 4, .B = 40, .H = 256, .P = 128},
};

// The plain schedule runs every shape, the shuffled ones take them in turn.
void run_shapes(const std::vector<Shape>& shapes, Mode mode, const TypeCase& type) {
  const size_t count = kSmallOnly ? kSmall : shapes.size();
  for_each_seed(kSeeds, [&] {
    for (size_t i = 0; i < count; ++i) {
      if (seed() && i != seed() % count) continue;
      Shape shape = shapes[i];
      shape.mode = mode;
      run_both(shape, type);
    }
  });
}

void run_cell(Mode mode, const TypeCase& type) {
  // Reference and kernels share these: what is wrong there is wrong in both.
  check_cell_equations(mode);
  run_shapes(kShapes, mode, type);
  if (traits(mode).may_project) run_shapes(kProjected, mode, type);
}

[[maybe_unused]] void run_cell_large(Mode mode, const TypeCase& type) {
  run_shapes(kLarge, mode, type);
  if (traits(mode).may_project) run_shapes(kLargeProjected, mode, type);
}

// "rnn-tanh-float32" of RNN_TANH.
std::string case_name(const CellTraits& cell, const TypeCase& type) {
  std::string name = cell.name;
  for (char& c : name) c = c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name + "-" + type.name;
}

}  // namespace
}  // namespace rnnfast::test

CHECK_CASES(step) {
  using namespace rnnfast;
  using namespace rnnfast::test;
  std::vector<check::Case> cases;
  for (const CellTraits& cell : kCells)
    for (const TypeCase& type : kTypes)
      cases.push_back({case_name(cell, type), [mode = cell.mode, &type] { run_cell(mode, type); }});
#if !defined(RNNFAST_EMULATED)
  for (const CellTraits& cell : kCells)
    for (const TypeCase& type : kTypes)
      cases.push_back({"large/" + case_name(cell, type), [mode = cell.mode, &type] { run_cell_large(mode, type); }});
#endif
  return cases;
}

// A call of a layer's time loop, as test_step and test_persistent make it: its tensors in a type's storage, given to
// what is tested, and every result against the float64 definition.
#pragma once

#include <cctype>
#include <deque>
#include <string>
#include <vector>

#include "compare.h"
#include "cuda/instances.h"
#include "device_array.h"
#include "host_numbers.h"
#include "run_kernel.h"
#include "step_reference.h"

namespace rnnfast::test {

using gpu::Arithmetic;

// ---- types ----------------------------------------------------------------------------------------------------------

struct TypeCase {
  const char* name;
  Arithmetic arithmetic;
  double tolerance;  // two to four times the largest error of all cases
};
constexpr TypeCase kTypes[] = {{"float64", Arithmetic::float64, 2e-14},
                               {"float32", Arithmetic::float32, 4e-6},
                               {"tf32", Arithmetic::tf32, 3e-3},
                               {"bfloat16", Arithmetic::bfloat16, 2e-2},
                               {"float16", Arithmetic::float16, 2.5e-3}};

inline DType dtype_of(Arithmetic arithmetic) {
  switch (arithmetic) {
    case Arithmetic::float64: return DType::float64;
    case Arithmetic::bfloat16: return DType::bfloat16;
    case Arithmetic::float16: return DType::float16;
    default: return DType::float32;
  }
}

// What a type is computed with.
inline DType compute_type(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

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
inline void round_to(DType dtype, Values& values) {
  const Buffer buffer(dtype, values);
  for (size_t i = 0; i < values.size(); ++i) values[i] = buffer.get(i);
}

// ---- the call -------------------------------------------------------------------------------------------------------

inline Call random_call_with_results(const Shape& shape, const TypeCase& type, uint64_t number) {
  Call call = random_call(shape, 17 + number);
  for (Values* values : {&call.gates, &call.weight_hh, &call.weight_hr, &call.bias_hh, &call.hx, &call.cx,
                         &call.grad_output, &call.grad_h_n, &call.grad_c_n, &call.grad_cell_states})
    round_to(dtype_of(type.arithmetic), *values);
  run_reference(call);
  return call;
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

inline bool expect_close(const char* name, const Buffer& actual, const Values& expected, const TypeCase& type,
                         const std::vector<Dimension>& dimensions,
                         const std::source_location& place = std::source_location::current()) {
  const auto get = [&](size_t i) { return actual.get(i); };
  return expect_close(name, get, actual.count(), expected, type.tolerance, dimensions, place);
}

inline void fill_shared(const Call& call, DType dtype, std::deque<Buffer>& keep, Recurrence& r) {
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

// run(p) launches, waits and says what went wrong, or "". Unless it `saves`, forward leaves nothing for a backward.
template <class Run> void check_forward(Call& call, const TypeCase& type, const Run& run, bool saves = true) {
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
  const Values none, &saved_states = saves ? call.cell_states : none, &saved = saves ? call.reserve : none;
  Buffer output(dtype, call.output.size()), h_n(dtype, call.h_n.size()), c_n(dtype, call.c_n.size()),
      cell_states(dtype, saved_states.size()), reserve(dtype, saved.size());
  p.output = output.device();
  p.h_n = h_n.device();
  p.c_n = c_n.device();
  p.cell_states = cell_states.device();
  p.reserve = reserve.device();
  if (!CHECK_NO_ERROR(run(p))) return;
  const Elements at{call};
  expect_close("output", output, call.output, type, at.rows("unit", s.state()));
  expect_close("h_n", h_n, call.h_n, type, at.state(s.state()));
  expect_close("c_n", c_n, call.c_n, type, at.state(s.H));
  expect_close("cell_states", cell_states, saved_states, type, at.rows("unit", s.H));
  expect_close("reserve", reserve, saved, type, at.rows("unit", s.H, s.cell().reserve, "value"));
}

template <class Run> void check_backward(Call& call, const TypeCase& type, const Run& run) {
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
  if (!CHECK_NO_ERROR(run(p))) return;
  const Elements at{call};
  expect_close("grad_gates", grad_gates, call.grad_gates, type, at.rows("unit", s.H, s.gates()));
  expect_close("grad_gates_hh", grad_gates_hh, call.grad_gates_hh, type, at.rows("unit", s.H, s.gates()));
  expect_close("grad_hx", grad_hx, call.grad_hx, type, at.state(s.state()));
  expect_close("grad_cx", grad_cx, call.grad_cx, type, at.state(s.H));
  expect_close("grad_projected", grad_projected, call.grad_projected, type, at.rows("unit", s.state()));
}

// ---- cases ----------------------------------------------------------------------------------------------------------

// "rnn-tanh" of RNN_TANH.
inline std::string case_name(const CellTraits& cell) {
  std::string name = cell.name;
  for (char& c : name) c = c == '_' ? '-' : static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

// Calls of one or two blocks a launch come first. The race detector takes only those: it pays half a millisecond for
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

// run(call) of a list whose first kSmall are small: the plain schedule runs every one, the shuffled ones take them in
// turn.
template <class Calls, class Run> void run_in_turn(const Calls& calls, const Run& run) {
  const size_t count = kSmallOnly ? kSmall : calls.size();
  for_each_seed(kSeeds, [&] {
    for (size_t i = 0; i < count; ++i)
      if (!seed() || i == seed() % count) run(calls[i]);
  });
}

// run(shape) of each, as shapes of a cell.
template <class Run> void run_shapes(const std::vector<Shape>& shapes, Mode mode, const Run& run) {
  run_in_turn(shapes, [&](Shape shape) {
    shape.mode = mode;
    run(shape);
  });
}

}  // namespace rnnfast::test

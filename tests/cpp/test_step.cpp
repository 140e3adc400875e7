// The step kernels against the float64 definition: every cell, type, layout and option, forward and every gradient; in
// the emulator under shuffled schedules, on a card with larger shapes.
#include <string>
#include <vector>

#include "cell_truth.h"
#include "check.h"
#include "cuda/device.h"
#include "cuda/step/step_loop.h"
#include "layer_call.h"

namespace rnnfast::test {
namespace {

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

DType carry_type(DType dtype) { return dtype == DType::float64 ? dtype : DType::float32; }

// On the null stream, as torch's is by default. Tiles are chosen for the device under some seeds and for a single SM
// under others: there blocks of many batch indices are taken as soon as one has some.
gpu::StepDevice stream_of(bool dependent) {
  return {nullptr, dependent && gpu::has_dependent_launch(), seed() % 5 % 2 ? 1 : 0};
}

std::string run_forward(const Call& call, const ForwardParams& p, bool dependent, bool tf32) {
  const Shape& s = call.shape;
  const auto states = static_cast<size_t>(s.D * s.B * s.H);
  Buffer carry(carry_type(p.dtype), states), hidden(p.dtype, states);
  gpu::StepWorkspace workspace;
  workspace.carry = carry.device();
  workspace.hidden = hidden.device();
  return finish(gpu::run_steps_forward(p, workspace, tf32, stream_of(dependent)));
}

std::string run_backward(const Call& call, const BackwardParams& p, bool dependent, bool tf32) {
  const Shape& s = call.shape;
  const int64_t width = s.gates() * s.H;
  Buffer carry(carry_type(p.dtype), static_cast<size_t>(s.D * s.B * s.H));
  Buffer hh(p.dtype, transposed(call.weight_hh, s.D, width, s.state()));
  Buffer hr(p.dtype, transposed(call.weight_hr, s.D, s.P, s.H));
  const char *hh_t = static_cast<const char*>(hh.device()), *hr_t = static_cast<const char*>(hr.device());
  gpu::StepWorkspace workspace;
  workspace.carry = carry.device();
  for (int64_t d = 0; d < s.D; ++d) {
    Operand &of_hh = workspace.transposed[Kind::weight_hh], &of_hr = workspace.transposed[Kind::weight_hr];
    of_hh.data[d] = hh_t + d * width * s.state() * gpu::size_of(p.dtype);
    of_hh.stride[d] = width;
    of_hr.data[d] = s.P ? hr_t + d * s.P * s.H * gpu::size_of(p.dtype) : nullptr;
    of_hr.stride[d] = s.P;
  }
  return finish(gpu::run_steps_backward(p, workspace, tf32, stream_of(dependent)));
}

void run_both(const Shape& shape, const TypeCase& type) {
  const check::Note note(text_of(shape));
  Call call = random_call_with_results(shape, type, seed());
  const bool tf32 = type.arithmetic == Arithmetic::tf32;
  // What fails only in the second pass on a card fails for the overlap of launches.
#if defined(RNNFAST_EMULATED)
  for (const bool dependent : {true}) {
#else
  for (const bool dependent : {false, true}) {
#endif
    const check::Note launches(dependent ? "overlapping launches" : "launches one after the other");
    check_forward(call, type, [&](const ForwardParams& p) { return run_forward(call, p, dependent, tf32); });
    check_backward(call, type, [&](const BackwardParams& p) { return run_backward(call, p, dependent, tf32); });
  }
}

// Shapes of one or two blocks a launch come first (layer_call.h).
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

void run_cell(Mode mode, const TypeCase& type) {
  // Reference and kernels share these: what is wrong there is wrong in both.
  check_cell_equations(mode);
  run_shapes(kShapes, mode, [&](const Shape& shape) { run_both(shape, type); });
  if (traits(mode).may_project) run_shapes(kProjected, mode, [&](const Shape& shape) { run_both(shape, type); });
}

[[maybe_unused]] void run_cell_large(Mode mode, const TypeCase& type) {
  run_shapes(kLarge, mode, [&](const Shape& shape) { run_both(shape, type); });
  if (traits(mode).may_project) run_shapes(kLargeProjected, mode, [&](const Shape& shape) { run_both(shape, type); });
}

}  // namespace
}  // namespace rnnfast::test

CHECK_CASES(step) {
  using namespace rnnfast;
  using namespace rnnfast::test;
  std::vector<check::Case> cases;
  for (const CellTraits& cell : kCells)
    for (const TypeCase& type : kTypes)
      cases.push_back({case_name(cell) + "-" + type.name, [mode = cell.mode, &type] { run_cell(mode, type); }});
#if !defined(RNNFAST_EMULATED)
  for (const CellTraits& cell : kCells)
    for (const TypeCase& type : kTypes)
      cases.push_back(
          {"large/" + case_name(cell) + "-" + type.name, [mode = cell.mode, &type] { run_cell_large(mode, type); }});
#endif
  return cases;
}

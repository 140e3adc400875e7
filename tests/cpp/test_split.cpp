// The split kernels against the float64 definition: every cell and type, forward and every gradient, with a plain
// product in place of a library's; in the emulator under shuffled schedules, on a card with larger shapes.
#include <string>
#include <vector>

#include "cell_truth.h"
#include "check.h"
#include "cuda/device.h"
#include "cuda/split/plain_product.cuh"
#include "cuda/split/split_loop.h"
#include "layer_call.h"

namespace rnnfast::test {
namespace {

// A product begins when ours have ended, and ours may begin before it has.
gpu::StepDevice stream_of(bool dependent) { return {nullptr, dependent && gpu::has_dependent_launch()}; }

// The workspaces of a call: what nobody has written is NaN.
class Workspaces {
 public:
  Workspaces(const Recurrence& r, bool forward) : carry_(make(r, compute_type(r.dtype), Size::hidden)) {
    given.carry = carry_.device();
    for (const KindTraits& matrix : kKinds) {
      const Kind kind = matrix.kind;
      if (!matrix.multiplies_steps() || !r.parameters[kind].data[0]) continue;
      from_[kind] = make(r, r.dtype, forward ? matrix.columns : matrix.rows);
      sums_[kind] = make(r, compute_type(r.dtype), forward ? matrix.rows : matrix.columns);
      void *from = from_[kind].device(), *sums = sums_[kind].device();
      given.products[kind] = {from, sums,
                              [=, &r] { return gpu::run_plain_product(r, kind, forward, from, sums, nullptr); }};
    }
  }
  gpu::SplitWorkspace given;

 private:
  static Buffer make(const Recurrence& r, DType type, Size size) {
    return Buffer(type, static_cast<size_t>(r.directions * r.rows.batch * elements_of(size, r)));
  }
  Buffer carry_;
  PerKind<Buffer> from_, sums_;
};

void run_both(const Shape& shape, const TypeCase& type) {
  const check::Note note(text_of(shape));
  Call call = random_call_with_results(shape, type, seed());
  const bool tf32 = type.arithmetic == Arithmetic::tf32;
#if defined(RNNFAST_EMULATED)
  for (const bool dependent : {true}) {
#else
  for (const bool dependent : {false, true}) {
#endif
    const check::Note launches(dependent ? "overlapping launches" : "launches one after the other");
    for (const bool saves : {true, false}) {
      check_forward(
          call, type,
          [&](const ForwardParams& p) {
            Workspaces workspaces(p, true);
            return finish(gpu::run_split_forward(p, workspaces.given, tf32, stream_of(dependent)));
          },
          saves);
      if (seed()) break;
    }
    check_backward(call, type, [&](const BackwardParams& p) {
      Workspaces workspaces(p, false);
      return finish(gpu::run_split_backward(p, workspaces.given, tf32, stream_of(dependent)));
    });
  }
}

// Small ones first (layer_call.h). Units that four divides, and that it does not; more than the threads of a block take
// in one go.
const std::vector<Shape> kShapes = {
    {.T = 3, .B = 3, .H = 5, .D = 2, .lengths = true, .resets = true},
    {.T = 3, .B = 4, .H = 8, .packed = true},
    {.T = 3, .B = 9, .H = 17, .resets = true},
    {.T = 4, .B = 5, .H = 12, .D = 2, .packed = true},
    {.T = 3, .B = 2, .H = 32, .batch_first = true, .lengths = true, .initial = false},
    {.T = 2, .B = 1, .H = 300},
    {.T = 2, .B = 1, .H = 1028},
    {.T = 3, .B = 3, .H = 12, .D = 2, .lengths = true, .resets = true, .initial = false, .state_gradients = false},
};
const std::vector<Shape> kProjected = {
    {.T = 2, .B = 3, .H = 16, .P = 5, .D = 2, .lengths = true, .resets = true},
    {.T = 3, .B = 4, .H = 16, .P = 8, .packed = true},
    {.T = 3, .B = 4, .H = 34, .P = 16, .D = 2, .packed = true},
    {.T = 3, .B = 3, .H = 20, .P = 12, .lengths = true, .initial = false},
};
// For a card: many steps; rows of many lengths; more rows than run at once.
const std::vector<Shape> kLarge = {
    {.T = 40, .B = 5, .H = 64, .D = 2, .lengths = true, .resets = true},
    {.T = 6, .B = 33, .H = 130, .D = 2, .lengths = true, .resets = true},
    {.T = 5, .B = 40, .H = 256, .packed = true},
    {.T = 2, .B = 700, .H = 520},
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

CHECK_CASES(split) {
  using namespace rnnfast;
  using namespace rnnfast::test;
  std::vector<check::Case> cases;
  // To these kernels TF32 is float32.
  const auto each = [&](const char* prefix, void (*run)(Mode, const TypeCase&)) {
    for (const CellTraits& cell : kCells)
      for (const TypeCase& type : kTypes)
        if (type.arithmetic != Arithmetic::tf32)
          cases.push_back(
              {prefix + case_name(cell) + "-" + type.name, [run, mode = cell.mode, &type] { run(mode, type); }});
  };
  each("", run_cell);
#if !defined(RNNFAST_EMULATED)
  each("large/", run_cell_large);
#endif
  return cases;
}

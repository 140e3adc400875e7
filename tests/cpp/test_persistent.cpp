// The persistent kernels against the float64 definition: every cell, type and exchange, forward and every gradient, in
// layouts with weights in registers and in shared memory; in the emulator under shuffled schedules, on a card with
// larger shapes.
#include <cstdio>
#include <string>
#include <vector>

#include "cell_truth.h"
#include "check.h"
#include "cuda/device.h"
#include "cuda/persistent/persistent_call.h"
#include "layer_call.h"

namespace rnnfast::test {
namespace {

using gpu::Exchange;
using gpu::PersistentLayout;

struct ExchangeCase {
  const char* name;
  Exchange exchange;
  bool barrier = false;
};
constexpr ExchangeCase kExchangeCases[] = {{"block", Exchange::block},
                                           {"cluster", Exchange::cluster},
                                           {"grid", Exchange::grid},
                                           {"grid-barrier", Exchange::grid, true}};

// A call, and how it is laid out.
struct Plan {
  Shape shape;
  int units, batch_tiles, warps;
  bool inference = false;  // forward alone, which saves nothing
  int launch_tiles = 0;    // the batch in several launches
};

PersistentLayout layout_of(const Plan& plan, const ExchangeCase& exchange) {
  const int group = gpu::divide_up(static_cast<int>(plan.shape.H), plan.units);
  return {exchange.exchange, group, plan.units, plan.batch_tiles, plan.warps, exchange.barrier, plan.launch_tiles};
}

// "groups of 3 blocks, 16 units, 2 tiles, 4 warps".
std::string text_of(const PersistentLayout& layout) {
  return "groups of " + std::to_string(layout.group) + " blocks, " + std::to_string(layout.units) + " units, " +
         std::to_string(layout.batch_tiles) + " tiles, " + std::to_string(layout.warps) + " warps" +
         (layout.launch_tiles ? ", launches of " + std::to_string(layout.launch_tiles) : "");
}

// What a block may ask for: on sm_90; or on the card at hand.
int most_shared_bytes() {
#if defined(RNNFAST_EMULATED)
  return 227 << 10;
#else
  int device = 0, bytes = 0;
  require(cudaGetDevice(&device), "cudaGetDevice");
  require(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return bytes;
#endif
}

bool threads_hold_cells(const PersistentLayout& layout) {
  return layout.units * layout.batch_tiles * gpu::kBatchTile <= gpu::kMostCells * 32 * layout.warps;
}

bool fits(const PersistentLayout& layout, const Shape& shape, Arithmetic arithmetic) {
  for (const bool backward : {false, true})
    if (gpu::persistent_shape(layout, static_cast<int>(shape.gates()), arithmetic, backward).map.bytes >
        most_shared_bytes())
      return false;
  return true;
}

// Scratch as the op allocates it.
struct Workspace {
  Array<char> words;
  Array<int64_t> offsets;

  Workspace(const PersistentLayout& layout, const Recurrence& r, bool backward)
      : words(static_cast<size_t>(gpu::exchange_bytes(layout, r, backward))),
        offsets(r.rows.batch_sizes ? static_cast<size_t>(r.rows.steps) + 1 : 0, int64_t{-1}) {}
  gpu::PersistentWorkspace device() { return {words.device(), offsets.device()}; }
};

void run_plan(const Plan& plan, const ExchangeCase& exchange, Mode mode, const TypeCase& type) {
  Shape shape = plan.shape;
  shape.mode = mode;
  const PersistentLayout layout = layout_of(plan, exchange);
  const check::Note of_shape(text_of(shape)), of_layout(text_of(layout));
  if (!CHECK(threads_hold_cells(layout))) return;
  const bool fit = fits(layout, shape, type.arithmetic);
#if defined(RNNFAST_EMULATED)
  if (!CHECK(fit)) return;
#else
  // What no plan would choose for this cell and type, or for a card with less shared memory.
  if (!fit) return;
#endif
  Call call = random_call_with_results(shape, type, seed());
  const bool tf32 = type.arithmetic == Arithmetic::tf32;
  check_forward(
      call, type,
      [&](const ForwardParams& p) {
        Workspace workspace(layout, p, false);
        return finish(gpu::run_persistent_forward(p, layout, workspace.device(), tf32, nullptr));
      },
      !plan.inference);
  if (plan.inference) return;
  check_backward(call, type, [&](const BackwardParams& p) {
    Workspace workspace(layout, p, true);
    return finish(gpu::run_persistent_backward(p, layout, workspace.device(), tf32, nullptr));
  });
}

// ---- calls (of few threads first: layer_call.h) ---------------------------------------------------------------------

// Comments say which cells and types have weights in shared memory too; the others have them in registers alone.
const std::vector<Plan> kAlone = {
    {{.T = 3, .B = 3, .H = 5, .D = 2, .lengths = true, .resets = true}, 8, 1, 1},
    {{.T = 3, .B = 4, .H = 9, .packed = true}, 16, 1, 2},
    {{.T = 4, .B = 9, .H = 17, .D = 2, .packed = true}, 24, 2, 3},
    {{.T = 5, .B = 17, .H = 8, .batch_first = true, .lengths = true, .initial = false}, 8, 2, 1},
    {{.T = 1, .B = 1, .H = 1, .D = 2}, 8, 1, 1},
    // Backward of LSTM in 4 bytes.
    {{.T = 3, .B = 9, .H = 33, .resets = true, .state_gradients = false}, 40, 1, 4},
    // Warps that share a sum, where the cell has few gates.
    {{.T = 3, .B = 2, .H = 40, .D = 2, .batch_first = true, .lengths = true, .resets = true}, 40, 1, 8, true},
    // In 4 bytes; backward of LSTM in 2 bytes.
    {{.T = 2, .B = 3, .H = 72}, 72, 1, 5},
    {{.T = 0, .B = 2, .H = 5, .D = 2}, 8, 1, 1},
};
const std::vector<Plan> kGroups = {
    {{.T = 3, .B = 3, .H = 9, .D = 2, .lengths = true, .resets = true}, 8, 1, 1},
    {{.T = 3, .B = 4, .H = 17, .packed = true}, 8, 1, 1},
    {{.T = 4, .B = 9, .H = 33, .D = 2, .packed = true}, 16, 2, 2},
    // LSTM and GRU; backward through the cluster all.
    {{.T = 5, .B = 17, .H = 40, .batch_first = true, .lengths = true, .initial = false}, 16, 1, 1},
    {{.T = 1, .B = 1, .H = 25, .D = 2}, 8, 1, 1},
    // The batch in launches of two groups and one, and of one each.
    {{.T = 3, .B = 19, .H = 16, .D = 2, .lengths = true, .resets = true}, 8, 1, 1, false, 2},
    {{.T = 3, .B = 10, .H = 12, .packed = true}, 8, 1, 1, false, 1},
    // Warps that share a sum.
    {{.T = 3, .B = 3, .H = 33, .resets = true, .state_gradients = false}, 8, 1, 2},
    {{.T = 3, .B = 2, .H = 33, .lengths = true, .resets = true}, 24, 1, 8, true},
    // More chunks (in 4 bytes), and backward through the grid more passes, than are in registers.
    {{.T = 2, .B = 3, .H = 250}, 16, 1, 1},
    // More chunks in 2 bytes.
    {{.T = 2, .B = 1, .H = 260}, 32, 1, 2},
    {{.T = 0, .B = 2, .H = 9, .D = 2}, 8, 1, 1},
};
// For a card: many steps; many groups; groups as large as clusters can be, and larger. Never more blocks than a card
// has multiprocessors.
[[maybe_unused]] const std::vector<Plan> kLargeAlone = {
    {{.T = 40, .B = 5, .H = 64, .D = 2, .lengths = true, .resets = true}, 64, 1, 8},
    {{.T = 12, .B = 130, .H = 70, .D = 2, .packed = true}, 72, 1, 6},
    {{.T = 50, .B = 33, .H = 96}, 96, 1, 6},
    {{.T = 30, .B = 20, .H = 128, .lengths = true}, 128, 1, 8},
};
[[maybe_unused]] const std::vector<Plan> kLargeClusters = {
    {{.T = 60, .B = 5, .H = 64, .D = 2, .lengths = true, .resets = true}, 16, 1, 4},
    {{.T = 30, .B = 20, .H = 250, .D = 2, .lengths = true, .resets = true}, 32, 2, 4},
    {{.T = 10, .B = 40, .H = 256, .packed = true}, 32, 2, 8},
    {{.T = 20, .B = 9, .H = 500}, 32, 1, 4},
};
[[maybe_unused]] const std::vector<Plan> kLargeGrids = {
    {{.T = 60, .B = 5, .H = 64, .D = 2, .lengths = true, .resets = true}, 16, 1, 4},
    {{.T = 30, .B = 9, .H = 520, .D = 2, .lengths = true, .resets = true}, 16, 2, 4},
    {{.T = 10, .B = 40, .H = 256, .packed = true}, 32, 2, 8},
    {{.T = 20, .B = 8, .H = 1024}, 16, 1, 4},
};

void run_plans(const std::vector<Plan>& plans, const ExchangeCase& exchange, Mode mode, const TypeCase& type) {
  // Kernels that may overlap on this card are kernels that know clusters: both need sm_90, in the card and the build.
  if (exchange.exchange == Exchange::cluster && !gpu::has_dependent_launch()) {
    std::printf("not run: clusters need compute capability 9.0, of the card and of the build\n");
    return;
  }
  run_in_turn(plans, [&](const Plan& plan) { run_plan(plan, exchange, mode, type); });
}

void run_cell(const ExchangeCase& exchange, Mode mode, const TypeCase& type) {
  // Reference and kernels share these: what is wrong there is wrong in both.
  check_cell_equations(mode);
  run_plans(exchange.exchange == Exchange::block ? kAlone : kGroups, exchange, mode, type);
}

[[maybe_unused]] void run_cell_large(const ExchangeCase& exchange, Mode mode, const TypeCase& type) {
  run_plans(exchange.exchange == Exchange::block     ? kLargeAlone
            : exchange.exchange == Exchange::cluster ? kLargeClusters
                                                     : kLargeGrids,
            exchange, mode, type);
}

// Calls use(exchange, cell, type, name of the case, its kind) for each.
template <class Use> void for_each_case(const Use& use) {
  for (const ExchangeCase& exchange : kExchangeCases)
    for (const CellTraits& cell : kCells)
      for (const TypeCase& type : kTypes) {
        if (type.arithmetic == Arithmetic::float64) continue;
        use(exchange, cell.mode, type, case_name(cell) + "-" + exchange.name + "-" + type.name,
            exchange.exchange == Exchange::grid ? check::Kind::polls : check::Kind::usual);
      }
}

}  // namespace
}  // namespace rnnfast::test

CHECK_CASES(persistent) {
  using namespace rnnfast;
  using namespace rnnfast::test;
  std::vector<check::Case> cases;
  for_each_case(
      [&](const ExchangeCase& exchange, Mode mode, const TypeCase& type, const std::string& name, check::Kind kind) {
        cases.push_back({name, [&exchange, mode, &type] { run_cell(exchange, mode, type); }, kind});
      });
#if !defined(RNNFAST_EMULATED)
  for_each_case(
      [&](const ExchangeCase& exchange, Mode mode, const TypeCase& type, const std::string& name, check::Kind kind) {
        cases.push_back({"large/" + name, [&exchange, mode, &type] { run_cell_large(exchange, mode, type); }, kind});
      });
#endif
  return cases;
}

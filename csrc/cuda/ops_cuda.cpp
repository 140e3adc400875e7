// The ops on CUDA tensors: the input projection through ATen, then the kernels that plan.h chooses. The same file makes
// the emulated library, whose ops of the same schemas take CPU tensors and run the kernels in csrc/emulator.
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <limits>

#include "../layer_ops.h"
#include "aten.h"
#include "device.h"
#include "persistent/persistent_call.h"
#include "plan/plan_json.h"
#include "planned.h"
#include "split/split_tensors.h"
#include "step/step_loop.h"
#include "variants/variant_tensors.h"

#if defined(RNNFAST_EMULATED)
#include "../emulator/emulator.h"
#include "../emulator/launched.h"
#include "../schemas.h"
#include "primitives/launch.h"
#endif

rnnfast::DeviceMemory rnnfast::device_memory(const Tensor& on) {
  DeviceMemory memory;
  memory.error = gpu::device_memory(on.get_device_index(), memory.free, memory.total);
  return memory;
}

namespace rnnfast::gpu {
namespace {

// How products may be rounded. Python passes torch's flags on when they change.
std::atomic<bool> tf32_allowed{false}, library_takes_tf32{false}, library_takes_half_sums{false};
Precision precision() {
  constexpr auto kRelaxed = std::memory_order_relaxed;
  return {tf32_allowed.load(kRelaxed), library_takes_tf32.load(kRelaxed), library_takes_half_sums.load(kRelaxed)};
}

// ---- devices and streams --------------------------------------------------------------------------------------------

#if defined(RNNFAST_EMULATED)
struct CurrentDevice {
  explicit CurrentDevice(const Tensor&) {}
  StepDevice device{nullptr, true};
};
void finish(const char* op, std::string error) {
  if (error.empty()) error = synchronize(nullptr);
  RNNFAST_CHECK(error.empty(), op, ": ", error);
}
#else
// torch's current stream. Looked up when first needed: a CPU-only torch does not have the function.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = reinterpret_cast<Function>(torch_function("aoti_torch_get_current_cuda_stream"));
  RNNFAST_CHECK(function, "rnnfast: this torch has no CUDA support (aoti_torch_get_current_cuda_stream is missing)");
  void* stream = nullptr;
  RNNFAST_CHECK(function(device, &stream) == TORCH_SUCCESS,
                "rnnfast: torch does not say what the current CUDA stream is: ", said_or_logged(torch_error()));
  return stream;
}

struct CurrentDevice {
  explicit CurrentDevice(const Tensor& tensor)
      : guard(tensor.get_device_index()), device{current_stream(tensor.get_device_index()), has_dependent_launch()} {}
  torch::stable::accelerator::DeviceGuard guard;
  StepDevice device;
};
void finish(const char* op, const std::string& error) { RNNFAST_CHECK(error.empty(), op, ": ", error); }
#endif

// ---- the backend ----------------------------------------------------------------------------------------------------

struct CudaBackend {
  using Ops = LayerOps<CudaBackend>;

  static Tensor empty(const Wanted& wanted) {
    const Tensor tensor = rnnfast::empty(wanted);
#if defined(RNNFAST_EMULATED)
    // Whatever a kernel reads before it is written shows.
    torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
#endif
    return tensor;
  }

  static void forward(ForwardParams& p, Context& context, const Places& places) {
    const CurrentDevice current(context.like);
    const Tensor gates = input_projection(p, context, places);
    p.gates = data_of(gates);
    hold_parameters(traits(Kind::bias_hh), context, p, places);
    const bool allow_tf32 = precision().allow_tf32;
    const bool training = p.reserve || p.cell_states;
    const Planned planned = planned_kernels(p, {precision(), training, false});
    if (planned.kernels == Kernels::persistent) {
      const Scratch scratch(context, planned.layout, p, false);
      return finish(context.op,
                    run_persistent_forward(p, planned.layout, scratch.workspace, allow_tf32, current.device.stream));
    }
    if (planned.kernels == Kernels::split) {
      const SplitTensors split(context, p, places, true, current.device.stream);
      return finish(context.op, run_split_forward(p, split.workspace, allow_tf32, current.device));
    }
    StepWorkspace workspace;
    const Tensor carry = carried(traits(p.mode).has_cell_state, p, context, workspace);
    const Tensor hidden = p.projected ? Ops::empty(context, "workspace", {p.directions, p.rows.batch, p.hidden_size})
                                      : Ops::none(context);
    workspace.hidden = mutable_data_of(hidden);
    finish(context.op, run_steps_forward(p, workspace, allow_tf32, current.device));
  }

  static void backward(const BackwardParams& p, const Context& context, const Places& places) {
    const char* const op = context.op;
    const CurrentDevice current(context.like);
    const bool allow_tf32 = precision().allow_tf32;
    const Planned planned = planned_kernels(p, {precision(), true, true});
    if (planned.kernels == Kernels::persistent) {
      const Scratch scratch(context, planned.layout, p, true);
      return finish(op,
                    run_persistent_backward(p, planned.layout, scratch.workspace, allow_tf32, current.device.stream));
    }
    if (planned.kernels == Kernels::split) {
      const SplitTensors split(context, p, places, false, current.device.stream);
      return finish(op, run_split_backward(p, split.workspace, allow_tf32, current.device));
    }
    StepWorkspace workspace;
    const Tensor carry = carried(carries(traits(p.mode)), p, context, workspace);
    Tensors keep;
    for (const KindTraits& kind : kKinds) {
      const std::string name = std::string(kind.name) + " transposed";
      Operand& transposed = workspace.transposed[kind.kind];
      for (int64_t d = 0; d < p.directions; ++d) {
        const OptionalTensor& weight = places[kind.kind][d];
        if (!kind.multiplies_steps() || !weight) continue;
        keep.push_back(contiguous_copy(op, name.c_str(), torch::stable::transpose(detached(*weight), 0, 1)));
        transposed.data[d] = data_of(keep.back());
        transposed.stride[d] = weight->size(0);
      }
    }
    finish(op, run_steps_backward(p, workspace, allow_tf32, current.device));
  }

  static void variant_forward(const VariantForward& p, Context& context, const Tensor& weight_hh) {
    const CurrentDevice current(context.like);
    VariantTensors tensors(context, p, weight_hh, current.device.stream);
    const VariantStepForward step = tensors.forward(p);
    finish(context.op, run_variant_forward(step, tensors.products, current.device));
  }
  static void variant_backward(const VariantBackward& p, Context& context, const Tensor& weight_hh) {
    const CurrentDevice current(context.like);
    VariantTensors tensors(context, p, weight_hh, current.device.stream);
    const VariantStepBackward step = tensors.backward(p);
    finish(context.op, run_variant_backward(step, tensors.products, current.device));
  }

 private:
  // What a persistent kernel wants of memory.
  struct Scratch {
    Scratch(const Context& context, const PersistentLayout& layout, const Recurrence& r, bool backward)
        : words(zeros(context, exchange_bytes(layout, r, backward))), offsets(row_offsets(context, r)) {
      workspace = {mutable_data_of(words), static_cast<int64_t*>(mutable_data_of(offsets))};
    }
    Tensor words, offsets;
    PersistentWorkspace workspace;
  };
  static Tensor zeros(const Context& context, int64_t bytes) {
    const int64_t sizes[1] = {bytes};
    Tensor words = rnnfast::empty({context.op, "workspace", Sizes(sizes, 1), ScalarType::Byte, context.like});
    // By a memset on the current stream.
    if (bytes) torch::stable::zero_(words);
    return words;
  }
  static Tensor row_offsets(const Context& context, const Recurrence& r) {
    const int64_t sizes[1] = {r.rows.batch_sizes ? r.rows.steps + 1 : 0};
    return rnnfast::empty({context.op, "workspace", Sizes(sizes, 1), ScalarType::Long, context.like});
  }

  // W_ih x + b, (rows, D*G*H): one product for all steps and directions.
  static Tensor input_projection(const Recurrence& r, const Context& context, const Places& places) {
    const char* const op = context.op;
    const Tensor& input = context.like;
    Tensors weights, biases;
    for (int64_t d = 0; d < r.directions; ++d) {
      const OptionalTensor &bias_ih = places[Kind::bias_ih][d], &bias_hh = places[Kind::bias_hh][d];
      weights.push_back(detached(*places[Kind::weight_ih][d]));
      Tensors parts;
      if (bias_ih) parts.push_back(detached(*bias_ih));
      if (bias_hh) parts.push_back(without_split_gate(detached(*bias_hh), r, op));
      if (!parts.empty()) biases.push_back(parts.size() == 2 ? sum_of(op, "biases", parts[0], parts[1]) : parts[0]);
    }
    void* data = nullptr;
    Tensor gates = *Ops::rows(context, "gates", true, data, r.directions * traits(r.mode).gates * r.hidden_size);
    const Tensor x =
        torch::stable::reshape(as_contiguous(op, "input", detached(input)), {-1, input.size(input.dim() - 1)});
    const Tensor flat = torch::stable::view(gates, {x.size(0), gates.size(gates.dim() - 1)});
    const OptionalTensor bias = biases.empty() ? OptionalTensor() : concatenated(op, "biases", biases);
    // The out variant: autocast leaves it alone.
    product_into(flat, op, "aten::linear", "out", x, concatenated(op, "weight_ih", weights), bias);
    return gates;
  }

  // b_hh with zeros for the split gate, whose part the recurrence adds (cells.h).
  static Tensor without_split_gate(Tensor bias, const Recurrence& r, const char* op) {
    const CellTraits& cell = traits(r.mode);
    if (cell.split_gate == kNoGate) return bias;
    const int64_t sizes[1] = {r.hidden_size}, first = cell.split_gate * r.hidden_size, behind = first + r.hidden_size;
    const Tensor zeros = allocate({op, "bias_hh", Sizes(sizes, 1), bias.scalar_type(), bias, "", true},
                                  [&] { return torch::stable::new_zeros(bias, {r.hidden_size}); });
    return concatenated(op, "bias_hh",
                        {torch::stable::narrow(bias, 0, 0, first), zeros,
                         torch::stable::narrow(bias, 0, behind, bias.size(0) - behind)});
  }

  // The workspace for what goes from step to step in the compute type.
  static Tensor carried(bool wanted, const Recurrence& r, const Context& context, StepWorkspace& workspace) {
    if (!wanted) return Ops::none(context);
    const int64_t sizes[3] = {r.directions, r.rows.batch, r.hidden_size};
    const Tensor carry = empty({context.op, "workspace", Sizes(sizes, 3), compute_type(r.dtype), context.like});
    workspace.carry = mutable_data_of(carry);
    return carry;
  }
};

// TF32 in recurrences, and what torch's own products take: TF32, and sums of float16 in float16. The first as it was.
bool allow_tf32(bool recurrences, bool products, bool half_sums) {
  library_takes_tf32 = products;
  library_takes_half_sums = half_sums;
  return tf32_allowed.exchange(recurrences);
}
// Of every call from now on, where it is legal; the one before.
std::string prefer_plan(std::string name) {
  std::string known;
  for (const char* each : kPlanNames) known += (known.empty() ? "" : ", ") + std::string(each);
  RNNFAST_CHECK(PreferredPlan::is_known(name), "rnnfast: prefer_plan: expected one of ", known, ", got ", name);
  return PreferredPlan::set(name);
}
DType dtype_of_name(const char* op, const std::string& name) {
  constexpr std::array<std::pair<const char*, DType>, 4> kNames = {{{"float64", DType::float64},
                                                                    {"float32", DType::float32},
                                                                    {"bfloat16", DType::bfloat16},
                                                                    {"float16", DType::float16}}};
  for (const auto& [known, dtype] : kNames)
    if (name == known) return dtype;
  fail(op, ": dtype: expected one of float64, float32, bfloat16, float16, got ", name);
}
// What a call would run on here and now: on the current device, with the plan that is preferred and TF32 as it is
// allowed. JSON, as that of rnnfast::cuda_plan.
std::string plan_here(std::string mode, std::string dtype, int64_t hidden, int64_t batch, int64_t steps,
                      int64_t directions, int64_t projection, bool training, bool backward) {
  const char* const op = "rnnfast::cuda_plan_here";
  Request request = checked_request(op, mode, hidden, batch, steps, directions, projection, training, backward);
  request.arithmetic = arithmetic_of(dtype_of_name(op, dtype), precision().allow_tf32);
  request.library_tf32 = precision().library_tf32;
  request.library_half_sums = precision().library_half_sums;
  // Of a cell without them, training writes no more than inference.
  const CellTraits& cell = traits(request.mode);
  request.training = backward || (training && (cell.reserve || cell.has_cell_state));
  DeviceProperties device;
  if (const std::string error = current_properties(device); !error.empty()) return Json().add("error", error).str();
  return json_of(plan_for(request, device, PreferredPlan::get()), request, device);
}
#if defined(RNNFAST_EMULATED)
std::string launched() { return emulator::launched(); }
bool by_torch(bool wanted) { return products_by_torch().exchange(wanted); }
void set_seed(int64_t seed) { emulator::options().seed = static_cast<uint64_t>(seed); }
#else
int64_t count_devices() { return device_count(); }
std::string problem() { return device_problem(); }
std::string archs() { return RNNFAST_CUDA_ARCH_LIST; }
#endif

constexpr const char* kPlanHere =
    "(str mode, str dtype, int hidden, int batch, int steps, int directions, int projection, bool training, "
    "bool backward) -> str";

}  // namespace
}  // namespace rnnfast::gpu

#if defined(RNNFAST_EMULATED)
STABLE_TORCH_LIBRARY(rnnfast_emulated, library) {
  rnnfast::define_layer_ops(library);
  rnnfast::define_variant_ops(library);
  library.def("allow_tf32(bool recurrences, bool products=False, bool half_sums=False) -> bool");
  library.def("products_by_torch(bool by_torch) -> bool");
  library.def("set_seed(int seed) -> ()");
  library.def("prefer_plan(str name) -> str");
  library.def(std::string("plan_here").append(rnnfast::gpu::kPlanHere).c_str());
  library.def("launched() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast_emulated, CPU, library) {
  rnnfast::register_layer_ops<rnnfast::gpu::CudaBackend>(library);
  rnnfast::register_variant_ops<rnnfast::gpu::CudaBackend>(library);
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast_emulated, CompositeExplicitAutograd, library) {
  library.impl("allow_tf32", TORCH_BOX(&rnnfast::gpu::allow_tf32));
  library.impl("products_by_torch", TORCH_BOX(&rnnfast::gpu::by_torch));
  library.impl("set_seed", TORCH_BOX(&rnnfast::gpu::set_seed));
  library.impl("prefer_plan", TORCH_BOX(&rnnfast::gpu::prefer_plan));
  library.impl("plan_here", TORCH_BOX(&rnnfast::gpu::plan_here));
  library.impl("launched", TORCH_BOX(&rnnfast::gpu::launched));
}
#else
STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, library) {
  library.def("cuda_allow_tf32(bool recurrences, bool products=False, bool half_sums=False) -> bool");
  library.def("cuda_prefer_plan(str name) -> str");
  library.def(std::string("cuda_plan_here").append(rnnfast::gpu::kPlanHere).c_str());
  library.def("cuda_device_count() -> int");
  library.def("cuda_problem() -> str");
  library.def("cuda_archs() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast, CUDA, library) {
  rnnfast::register_layer_ops<rnnfast::gpu::CudaBackend>(library);
  rnnfast::register_variant_ops<rnnfast::gpu::CudaBackend>(library);
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, library) {
  library.impl("cuda_allow_tf32", TORCH_BOX(&rnnfast::gpu::allow_tf32));
  library.impl("cuda_prefer_plan", TORCH_BOX(&rnnfast::gpu::prefer_plan));
  library.impl("cuda_plan_here", TORCH_BOX(&rnnfast::gpu::plan_here));
  library.impl("cuda_device_count", TORCH_BOX(&rnnfast::gpu::count_devices));
  library.impl("cuda_problem", TORCH_BOX(&rnnfast::gpu::problem));
  library.impl("cuda_archs", TORCH_BOX(&rnnfast::gpu::archs));
}
#endif

// The ops on CUDA tensors: one product for the input gates through ATen, then the step kernels. The same file makes the
// emulated library, whose ops of the same schemas take CPU tensors and run the kernels in csrc/emulator.
#include <torch/csrc/stable/accelerator.h>

#include <array>
#include <atomic>
#include <limits>

#include "../layer_ops.h"
#include "device.h"
#include "step_loop.h"

#if defined(RNNFAST_EMULATED)
#include "../emulator/emulator.h"
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

// Whether float32 recurrences may multiply in TF32. Python passes torch's flag on when it changes.
std::atomic<bool> tf32_allowed{false};

// ---- ATen, below autograd and autocast ------------------------------------------------------------------------------

template <class... Args> Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  const auto status = torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION);
  RNNFAST_CHECK(status == TORCH_SUCCESS, "rnnfast: ", name, ": ", said_or_logged(torch_error()));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
// A product into a tensor that is there; it may still want memory to work in.
template <class... Args>
Tensor product_into(const Tensor& result, const char* op, const char* name, const Args&... args) {
  try {
    return call_aten(name, "out", args..., result);
  } catch (const std::exception&) { fail_for_memory(op, name, -1, result, torch_error(), true); }
}
Tensor detached(const Tensor& tensor) { return call_aten("aten::detach", "", tensor); }

// Along the first dimension.
Tensor concatenated(const char* op, const char* name, const Tensors& tensors) {
  if (tensors.size() == 1) return tensors[0];
  const Tensor& first = tensors[0];
  int64_t sizes[2] = {0, first.dim() == 2 ? first.size(1) : 1};
  for (const Tensor& tensor : tensors) sizes[0] += tensor.size(0);
  const Sizes shape(sizes, static_cast<size_t>(first.dim()));
  return allocate({op, name, shape, first.scalar_type(), first, "", true},
                  [&] { return call_aten("aten::cat", "", tensors, int64_t{0}); });
}
// The stable interface passes no Scalar, which add has; its subtract takes a factor.
Tensor sum_of(const char* op, const char* name, const Tensor& a, const Tensor& b) {
  return allocate({op, name, a.sizes(), a.scalar_type(), a, "", true},
                  [&] { return torch::stable::subtract(a, b, -1.0); });
}

Tensor zeros_of(const char* op, const char* name, const Tensor& like, int64_t size) {
  return allocate({op, name, Sizes(&size, 1), like.scalar_type(), like, "", true},
                  [&] { return torch::stable::new_zeros(like, {size}); });
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
  static constexpr bool kMakesGates = false;

  static Tensor empty(const Wanted& wanted) {
    const Tensor tensor =
        allocate(wanted, [&] { return torch::stable::new_empty(wanted.like, wanted.sizes, wanted.type); });
#if defined(RNNFAST_EMULATED)
    // Whatever a kernel reads before it is written shows.
    torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
#endif
    return tensor;
  }

  static void forward(const char* op, const ForwardParams& p, const Context&, const Tensor& like) {
    const CurrentDevice current(like);
    const Tensor carry = p.mode == Mode::lstm ? compute_state(op, p, like) : Ops::none(op, like);
    const Tensor hidden = p.projected ? Ops::empty(op, "workspace", like, {p.directions, p.rows.batch, p.hidden_size})
                                      : Ops::none(op, like);
    StepWorkspace workspace;
    workspace.carry = mutable_data_of(carry);
    workspace.hidden = mutable_data_of(hidden);
    finish(op, run_steps_forward(p, workspace, tf32_allowed.load(std::memory_order_relaxed), current.device));
  }

  static void backward(const char* op, const BackwardParams& p, const Context&, const Tensor& like,
                       const Places& places) {
    const CurrentDevice current(like);
    const Tensor carry = p.mode == Mode::lstm || p.mode == Mode::gru ? compute_state(op, p, like) : Ops::none(op, like);
    StepWorkspace workspace;
    workspace.carry = mutable_data_of(carry);
    Tensors keep;
    const auto transposed = [&](const char* name, const Tensor& weight) {
      keep.push_back(contiguous_copy(op, name, torch::stable::transpose(detached(weight), 0, 1)));
      return data_of(keep.back());
    };
    for (int64_t d = 0; d < p.directions; ++d) {
      workspace.weight_hh_t[d] = transposed("weight_hh transposed", *places[d].weight_hh);
      if (p.projected) workspace.weight_hr_t[d] = transposed("weight_hr transposed", *places[d].weight_hr);
    }
    finish(op, run_steps_backward(p, workspace, tf32_allowed.load(std::memory_order_relaxed), current.device));
  }

  // One product for all steps and directions.
  static Tensor input_projection(std::string mode_name, Tensor input, Places places) {
    const char* op = "rnnfast::input_projection";
    const Mode mode = mode_of(op, mode_name);
    const int64_t width = check_gate_arguments(op, mode, input, places), hidden = width / traits(mode).gates;
    dtype_of(op, input);
    Tensors weights, biases;
    for (int64_t d = 0; d < places.directions(); ++d) {
      weights.push_back(detached(*places[d].weight_ih));
      Tensors parts;
      if (places[d].bias_ih) parts.push_back(detached(*places[d].bias_ih));
      if (places[d].bias_hh) {
        // b_hn stands inside r * (W_hn h + b_hn): the recurrence adds it.
        Tensor bias = detached(*places[d].bias_hh);
        if (mode == Mode::gru) {
          const Tensor zeros = zeros_of(op, "bias_hh", bias, hidden);
          bias = concatenated(op, "bias_hh", {torch::stable::narrow(bias, 0, 0, 2 * hidden), zeros});
        }
        parts.push_back(bias);
      }
      if (!parts.empty()) biases.push_back(parts.size() == 2 ? sum_of(op, "biases", parts[0], parts[1]) : parts[0]);
    }
    const int64_t input_size = input.size(input.dim() - 1);
    Tensor gates = Ops::empty_rows(op, "gates", input, static_cast<int64_t>(weights.size()) * width);
    const Tensor x = torch::stable::reshape(as_contiguous(op, "input", detached(input)), {-1, input_size});
    const Tensor flat = torch::stable::view(gates, {x.size(0), gates.size(gates.dim() - 1)});
    const OptionalTensor bias = biases.empty() ? OptionalTensor() : concatenated(op, "biases", biases);
    // The out variant: autocast leaves it alone.
    product_into(flat, op, "aten::linear", x, concatenated(op, "weight_ih", weights), bias);
    return gates;
  }

  static Tensor matmul(Tensor a, Tensor b) {
    const char* op = "rnnfast::matmul";
    check_matmul_arguments(op, a, b);
    const Tensor result = Ops::empty(op, "the product", a, {a.size(0), b.size(1)});
    return product_into(result, op, "aten::mm", detached(a), detached(b));
  }

 private:
  static Tensor compute_state(const char* op, const Recurrence& r, const Tensor& like) {
    const ScalarType type = r.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
    const int64_t sizes[3] = {r.directions, r.rows.batch, r.hidden_size};
    return empty({op, "workspace", Sizes(sizes, 3), type, like});
  }
};

bool allow_tf32(bool allowed) { return tf32_allowed.exchange(allowed); }
#if defined(RNNFAST_EMULATED)
void set_seed(int64_t seed) { emulator::options().seed = static_cast<uint64_t>(seed); }
#else
int64_t count_devices() { return device_count(); }
std::string problem() { return device_problem(); }
std::string archs() { return RNNFAST_CUDA_ARCH_LIST; }
#endif

}  // namespace
}  // namespace rnnfast::gpu

#if defined(RNNFAST_EMULATED)
STABLE_TORCH_LIBRARY(rnnfast_emulated, library) {
  rnnfast::define_layer_ops(library);
  library.def("allow_tf32(bool allowed) -> bool");
  library.def("set_seed(int seed) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast_emulated, CPU, library) {
  rnnfast::register_layer_ops<rnnfast::gpu::CudaBackend>(library);
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast_emulated, CompositeExplicitAutograd, library) {
  library.impl("allow_tf32", TORCH_BOX(&rnnfast::gpu::allow_tf32));
  library.impl("set_seed", TORCH_BOX(&rnnfast::gpu::set_seed));
}
#else
STABLE_TORCH_LIBRARY_FRAGMENT(rnnfast, library) {
  library.def("cuda_allow_tf32(bool allowed) -> bool");
  library.def("cuda_device_count() -> int");
  library.def("cuda_problem() -> str");
  library.def("cuda_archs() -> str");
}
STABLE_TORCH_LIBRARY_IMPL(rnnfast, CUDA, library) { rnnfast::register_layer_ops<rnnfast::gpu::CudaBackend>(library); }
STABLE_TORCH_LIBRARY_IMPL(rnnfast, CompositeExplicitAutograd, library) {
  library.impl("cuda_allow_tf32", TORCH_BOX(&rnnfast::gpu::allow_tf32));
  library.impl("cuda_device_count", TORCH_BOX(&rnnfast::gpu::count_devices));
  library.impl("cuda_problem", TORCH_BOX(&rnnfast::gpu::problem));
  library.impl("cuda_archs", TORCH_BOX(&rnnfast::gpu::archs));
}
#endif

// The ops on CUDA tensors: one product for the input gates through ATen, then the step kernels. The same file makes the
// emulated library, whose ops of the same schemas take CPU tensors and run the kernels in csrc/emulator.
#include <dlfcn.h>
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

namespace rnnfast::gpu {
namespace {

// Whether float32 recurrences may multiply in TF32. Python passes torch's flag on when it changes.
std::atomic<bool> tf32_allowed{false};

// ---- ATen, below autograd and autocast ------------------------------------------------------------------------------

// What torch said of its last error, where it keeps that for us (2.13 and later).
std::string last_error() {
  using Function = const char* (*)();
  static const auto function =
      reinterpret_cast<Function>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return function ? function() : "the error is in the log above";
}

template <class... Args> Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  const auto status = torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION);
  STD_TORCH_CHECK(status == TORCH_SUCCESS, "rnnfast: ", name, ": ", last_error());
  return torch::stable::detail::to<Tensor>(stack[0]);
}
Tensor detached(const Tensor& tensor) { return call_aten("aten::detach", "", tensor); }
Tensor concatenated(const Tensors& tensors) {
  return tensors.size() == 1 ? tensors[0] : call_aten("aten::cat", "", tensors, int64_t{0});
}
// The stable interface passes no Scalar, which add has; its subtract takes a factor.
Tensor sum_of(const Tensor& a, const Tensor& b) { return torch::stable::subtract(a, b, -1.0); }

Tensor empty_on(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
  Tensor tensor =
      torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes.begin(), sizes.size()), type);
#if defined(RNNFAST_EMULATED)
  // Whatever a kernel reads before it is written shows.
  torch::stable::fill_(tensor, std::numeric_limits<double>::quiet_NaN());
#endif
  return tensor;
}

// ---- devices and streams --------------------------------------------------------------------------------------------

#if defined(RNNFAST_EMULATED)
struct CurrentDevice {
  explicit CurrentDevice(const Tensor&) {}
  StepDevice device{nullptr, true};
};
void finish(const char* op, std::string error) {
  if (error.empty()) error = synchronize(nullptr);
  STD_TORCH_CHECK(error.empty(), op, ": ", error);
}
#else
// torch's current stream. Looked up when first needed: a CPU-only torch does not have the function.
void* current_stream(int32_t device) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* found = dlsym(RTLD_DEFAULT, name);
    if (!found)
      if (void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD)) found = dlsym(library, name);
    return reinterpret_cast<Function>(found);
  }();
  STD_TORCH_CHECK(function, "rnnfast: this torch has no CUDA support (aoti_torch_get_current_cuda_stream is missing)");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

struct CurrentDevice {
  explicit CurrentDevice(const Tensor& tensor)
      : guard(tensor.get_device_index()),
        device{current_stream(tensor.get_device_index()), has_dependent_launch(tensor.get_device_index())} {}
  torch::stable::accelerator::DeviceGuard guard;
  StepDevice device;
};
void finish(const char* op, const std::string& error) { STD_TORCH_CHECK(error.empty(), op, ": ", error); }
#endif

// ---- the backend ----------------------------------------------------------------------------------------------------

struct CudaBackend {
  static constexpr bool kMakesGates = false;

  static Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
    return empty_on(like, sizes, like.scalar_type());
  }

  static void forward(const char* op, const ForwardParams& p, const Context&, const Tensor& like) {
    const CurrentDevice current(like);
    const Tensor carry = p.mode == Mode::lstm ? compute_state(p, like) : empty(like, {0});
    const Tensor hidden = p.projected ? empty(like, {p.directions, p.rows.batch, p.hidden_size}) : empty(like, {0});
    StepWorkspace workspace;
    workspace.carry = mutable_data_of(carry);
    workspace.hidden = mutable_data_of(hidden);
    finish(op, run_steps_forward(p, workspace, tf32_allowed.load(std::memory_order_relaxed), current.device));
  }

  static void backward(const char* op, const BackwardParams& p, const Context&, const Tensor& like,
                       const Tensors& weight_hh, const Tensors& weight_hr) {
    const CurrentDevice current(like);
    const Tensor carry = p.mode == Mode::lstm || p.mode == Mode::gru ? compute_state(p, like) : empty(like, {0});
    StepWorkspace workspace;
    workspace.carry = mutable_data_of(carry);
    Tensors keep;
    const auto transposed = [&](const Tensor& weight) {
      keep.push_back(torch::stable::contiguous(torch::stable::transpose(detached(weight), 0, 1)));
      return data_of(keep.back());
    };
    for (size_t d = 0; d < weight_hh.size(); ++d) {
      workspace.weight_hh_t[d] = transposed(weight_hh[d]);
      if (p.projected) workspace.weight_hr_t[d] = transposed(weight_hr[d]);
    }
    finish(op, run_steps_backward(p, workspace, tf32_allowed.load(std::memory_order_relaxed), current.device));
  }

  // One product for all steps and directions.
  static Tensor input_gates(std::string mode_name, Tensor input, Tensors weight_ih, Tensors bias_ih, Tensors bias_hh) {
    const char* op = "rnnfast::input_gates";
    const Mode mode = mode_of(op, mode_name);
    check_gate_arguments(op, input, weight_ih, bias_ih, bias_hh);
    dtype_of(op, input);
    const int64_t width = weight_ih[0].size(0), hidden = width / gates_of(mode);
    Tensors weights, biases;
    for (size_t d = 0; d < weight_ih.size(); ++d) {
      weights.push_back(detached(weight_ih[d]));
      Tensors parts;
      if (!bias_ih.empty()) parts.push_back(detached(bias_ih[d]));
      if (!bias_hh.empty()) {
        // b_hn stands inside r * (W_hn h + b_hn): the recurrence adds it.
        Tensor bias = detached(bias_hh[d]);
        if (mode == Mode::gru) {
          const Tensor zeros = torch::stable::new_zeros(bias, {hidden});
          bias = concatenated({torch::stable::narrow(bias, 0, 0, 2 * hidden), zeros});
        }
        parts.push_back(bias);
      }
      if (!parts.empty()) biases.push_back(parts.size() == 2 ? sum_of(parts[0], parts[1]) : parts[0]);
    }
    const int64_t input_size = input.size(input.dim() - 1);
    Tensor gates = LayerOps<CudaBackend>::empty_rows(input, static_cast<int64_t>(weights.size()) * width);
    const Tensor x = torch::stable::reshape(as_contiguous(detached(input)), {-1, input_size});
    const Tensor flat = torch::stable::view(gates, {x.size(0), gates.size(gates.dim() - 1)});
    const OptionalTensor bias = biases.empty() ? OptionalTensor() : concatenated(biases);
    // The out variant: autocast leaves it alone.
    call_aten("aten::linear", "out", x, concatenated(weights), bias, flat);
    return gates;
  }

  static Tensor matmul(Tensor a, Tensor b) {
    check_matmul_arguments("rnnfast::matmul", a, b);
    const Tensor result = empty(a, {a.size(0), b.size(1)});
    return call_aten("aten::mm", "out", detached(a), detached(b), result);
  }

 private:
  static Tensor compute_state(const Recurrence& r, const Tensor& like) {
    const ScalarType type = r.dtype == DType::float64 ? ScalarType::Double : ScalarType::Float;
    return empty_on(like, {r.directions, r.rows.batch, r.hidden_size}, type);
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

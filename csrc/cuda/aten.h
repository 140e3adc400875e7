// ATen's ops as the CUDA backend calls them: below autograd and autocast.
#pragma once

#include <array>
#include <limits>

#include "../context.h"

namespace rnnfast::gpu {

template <class... Args> Tensor call_aten(const char* name, const char* overload, const Args&... args) {
  std::array<StableIValue, sizeof...(Args)> stack{torch::stable::detail::from(args)...};
  const auto status = torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION);
  RNNFAST_CHECK(status == TORCH_SUCCESS, "rnnfast: ", name, ": ", said_or_logged(torch_error()));
  return torch::stable::detail::to<Tensor>(stack[0]);
}
// A product into a tensor that is there; it may still want memory to work in.
template <class... Args>
Tensor product_into(const Tensor& result, const char* op, const char* name, const char* overload, const Args&... args) {
  try {
    return call_aten(name, overload, args..., result);
  } catch (const std::exception&) { fail_for_memory(op, name, -1, result, torch_error(), true); }
}
inline Tensor detached(const Tensor& tensor) { return call_aten("aten::detach", "", tensor); }

// The product of a step: sums, of 16-bit types in 32 bits, for which the host has no product. The out variants:
// autocast leaves them alone.
inline void step_product_into(const Tensor& sums, const char* op, const char* name, const Tensor& from,
                              const Tensor& weights) {
  if (from.scalar_type() == sums.scalar_type())
    product_into(sums, op, name, "out", from, weights);
  else if (from.is_cpu())
    product_into(sums, op, name, "out", torch::stable::to(from, sums.scalar_type()),
                 torch::stable::to(weights, sums.scalar_type()));
  else
    product_into(sums, op, name, "dtype_out", from, weights, sums.scalar_type());
}

// Scratch of a call.
inline Tensor workspace_of(const char* op, Sizes sizes, ScalarType type, const Tensor& like) {
  Tensor workspace = rnnfast::empty({op, "workspace", sizes, type, like});
#if defined(RNNFAST_EMULATED)
  // Whatever a kernel reads before it is written shows.
  torch::stable::fill_(workspace, std::numeric_limits<double>::quiet_NaN());
#endif
  return workspace;
}

// Along the first dimension.
inline Tensor concatenated(const char* op, const char* name, const Tensors& tensors) {
  if (tensors.size() == 1) return tensors[0];
  const Tensor& first = tensors[0];
  int64_t sizes[2] = {0, first.dim() == 2 ? first.size(1) : 1};
  for (const Tensor& tensor : tensors) sizes[0] += tensor.size(0);
  const Sizes shape(sizes, static_cast<size_t>(first.dim()));
  return allocate({op, name, shape, first.scalar_type(), first, "", true},
                  [&] { return call_aten("aten::cat", "", tensors, int64_t{0}); });
}
// The stable interface passes no Scalar, which add has; its subtract takes a factor.
inline Tensor sum_of(const char* op, const char* name, const Tensor& a, const Tensor& b) {
  return allocate({op, name, a.sizes(), a.scalar_type(), a, "", true},
                  [&] { return torch::stable::subtract(a, b, -1.0); });
}

}  // namespace rnnfast::gpu

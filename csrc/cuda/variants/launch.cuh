// How the row kernels of layers with options are launched. setup.py writes the units that include this, each with one
// VariantInstance.
#pragma once

#include "../primitives/launch.h"
#include "../step/kernel_name.h"
#include "backward.cuh"
#include "forward.cuh"

namespace rnnfast::gpu {

template <Family kFamily, class Type> struct VariantBeginKernel {
  static constexpr const char* kName = "variant_begin";
  static auto function() { return variant_begin<kFamily, Type>; }
};
template <Family kFamily, class Type> struct VariantResetKernel {
  static constexpr const char* kName = "variant_reset";
  static auto function() { return variant_reset<kFamily, Type>; }
};
template <Family kFamily, class Type> struct VariantForwardKernel {
  static constexpr const char* kName = "variant_forward";
  static auto function() { return variant_forward<kFamily, Type>; }
};
template <Family kFamily, class Type> struct VariantBackwardKernel {
  static constexpr const char* kName = "variant_backward";
  static auto function() { return variant_backward<kFamily, Type>; }
};
template <Family kFamily, class Type> struct VariantResetBackwardKernel {
  static constexpr const char* kName = "variant_reset_backward";
  static auto function() { return variant_reset_backward<kFamily, Type>; }
};
template <Family kFamily, class Type> struct VariantSumVectorsKernel {
  static constexpr const char* kName = "variant_sum_vectors";
  static auto function() { return variant_sum_vectors<kFamily, Type>; }
};

// Calls visit(kernel) for every kernel of a unit. What goes over all kernels does so here (benchmarks/occupancy/).
template <Family kFamily, class Type, class Visit> void for_each_variant_kernel(const Visit& visit) {
  visit(VariantBeginKernel<kFamily, Type>());
  visit(VariantForwardKernel<kFamily, Type>());
  visit(VariantBackwardKernel<kFamily, Type>());
  visit(VariantSumVectorsKernel<kFamily, Type>());
  if constexpr (kFamily == Family::gru) {
    visit(VariantResetKernel<kFamily, Type>());
    visit(VariantResetBackwardKernel<kFamily, Type>());
  }
}

// So many blocks, of as many threads as there are of `each`, by whole warps and up to kRowThreads.
template <class Kernel, class Type, class Params>
std::string launch_variant(const Params& p, const StepLaunch& how, int64_t blocks, int64_t each) {
  if (blocks == 0 || each == 0) return "";
  const char* const name = name_of<Kernel, Type>(p.call.mode);
  constexpr int64_t kWarp = kWarpSize, kMostBlocks = (int64_t{1} << 31) - 1;
  if (blocks > kMostBlocks)
    return std::string(name) + ": a launch has at most " + std::to_string(kMostBlocks) + " rows, got " +
           std::to_string(blocks);
  const int64_t wanted = (each + kWarp - 1) / kWarp * kWarp;
  LaunchConfig config;
  config.grid.x = static_cast<unsigned>(blocks);
  config.threads = static_cast<unsigned>(wanted < kRowThreads ? wanted : kRowThreads);
  config.shared_bytes = block_sums_bytes(sizeof(typename Type::Compute));
  config.dependent = how.dependent;
  config.stream = how.stream;
  config.name = name;
  return launch(config, Kernel::function(), p);
}

// Of one block for each row.
template <class Kernel, class Type, class Params>
std::string launch_variant_rows(const Params& p, const StepLaunch& how) {
  return launch_variant<Kernel, Type>(p, how, p.call.rows.batch, p.call.hidden_size);
}

template <Family kFamily, class Type>
  requires(has_options(kFamily))
VariantKernels VariantInstance<kFamily, Type>::kernels() {
  VariantKernels kernels{};
  kernels.begin = launch_variant_rows<VariantBeginKernel<kFamily, Type>, Type, VariantStepForward>;
  kernels.forward = launch_variant_rows<VariantForwardKernel<kFamily, Type>, Type, VariantStepForward>;
  kernels.backward = launch_variant_rows<VariantBackwardKernel<kFamily, Type>, Type, VariantStepBackward>;
  if constexpr (kFamily == Family::gru) {
    kernels.reset = launch_variant_rows<VariantResetKernel<kFamily, Type>, Type, VariantStepForward>;
    kernels.reset_backward = launch_variant_rows<VariantResetBackwardKernel<kFamily, Type>, Type, VariantStepBackward>;
  }
  kernels.sum_vectors = [](const VariantStepBackward& p, const StepLaunch& how) {
    const int64_t blocks = (p.vectors + kRowThreads - 1) / kRowThreads;
    return launch_variant<VariantSumVectorsKernel<kFamily, Type>, Type>(p, how, blocks, kRowThreads);
  };
  return kernels;
}

}  // namespace rnnfast::gpu

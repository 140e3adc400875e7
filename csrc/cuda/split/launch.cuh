// How the row kernels are launched. setup.py writes the units that include this, each with one SplitInstance.
#pragma once

#include "../primitives/launch.h"
#include "../step/kernel_name.h"
#include "backward.cuh"
#include "forward.cuh"

namespace rnnfast::gpu {

template <Family kFamily, class Type> struct SplitForwardKernel {
  static constexpr const char* kName = "split_forward";
  template <int kWidth> static auto function() { return split_forward<kFamily, Type, kWidth>; }
};
template <Family kFamily, class Type> struct SplitBackwardKernel {
  static constexpr const char* kName = "split_backward";
  template <int kWidth> static auto function() { return split_backward<kFamily, Type, kWidth>; }
};
template <class Type> struct SplitProjectForwardKernel {
  static constexpr const char* kName = "split_project_forward";
  template <int kWidth> static auto function() { return split_project_forward<Type, kWidth>; }
};
template <class Type> struct SplitProjectBackwardKernel {
  static constexpr const char* kName = "split_project_backward";
  template <int kWidth> static auto function() { return split_project_backward<Type, kWidth>; }
};

// Calls visit(kernel, integral_constant<int, units an access>) for every kernel of a unit. What goes over all kernels
// does so here (benchmarks/occupancy/).
template <Family kFamily, class Type, class Visit> void for_each_split_kernel(const Visit& visit) {
  const auto with_widths = [&](auto kernel) {
    visit(kernel, std::integral_constant<int, 1>());
    visit(kernel, std::integral_constant<int, widest(sizeof(typename Type::Storage))>());
  };
  with_widths(SplitForwardKernel<kFamily, Type>());
  with_widths(SplitBackwardKernel<kFamily, Type>());
  if constexpr (FamilyCell<kFamily>::Constants::kMayProject) {
    with_widths(SplitProjectForwardKernel<Type>());
    with_widths(SplitProjectBackwardKernel<Type>());
  }
}

// A block for each row of `units` units.
template <class Kernel, class Type, class Params>
std::string launch_rows(const Params& p, const StepLaunch& how, int64_t units) {
  const int64_t batch = p.rows.layout.batch;
  if (batch == 0 || units == 0) return "";
  constexpr int kWidest = widest(sizeof(typename Type::Storage));
  const auto launch_with = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    constexpr int64_t kWarp = kWarpSize;
    const int64_t wanted = (units + kWidth * kWarp - 1) / (kWidth * kWarp) * kWarp;
    LaunchConfig config;
    config.grid = {static_cast<unsigned>(batch), static_cast<unsigned>(p.directions), 1};
    config.threads = static_cast<unsigned>(wanted < kRowThreads ? wanted : kRowThreads);
    config.dependent = how.dependent;
    config.stream = how.stream;
    config.name = name_of<Kernel, Type>(p.mode);
    return launch(config, Kernel::template function<kWidth>(), p);
  };
  if (p.wide && units % kWidest == 0) return launch_with(std::integral_constant<int, kWidest>());
  return launch_with(std::integral_constant<int, 1>());
}

template <Family kFamily, class Type> SplitKernels SplitInstance<kFamily, Type>::kernels() {
  SplitKernels kernels{};
  kernels.forward = [](const SplitForward& p, const StepLaunch& how) {
    return launch_rows<SplitForwardKernel<kFamily, Type>, Type>(p, how, p.hidden_size);
  };
  kernels.backward = [](const SplitBackward& p, const StepLaunch& how) {
    return launch_rows<SplitBackwardKernel<kFamily, Type>, Type>(p, how, p.hidden_size);
  };
  if constexpr (FamilyCell<kFamily>::Constants::kMayProject) {
    kernels.project_forward = [](const SplitForward& p, const StepLaunch& how) {
      return launch_rows<SplitProjectForwardKernel<Type>, Type>(p, how, p.state_size);
    };
    kernels.project_backward = [](const SplitBackward& p, const StepLaunch& how) {
      return launch_rows<SplitProjectBackwardKernel<Type>, Type>(p, how, p.state_size);
    };
  }
  return kernels;
}

}  // namespace rnnfast::gpu

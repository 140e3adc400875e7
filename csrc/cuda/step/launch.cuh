// How the step kernels are launched. setup.py writes the units that include this, each with one StepInstance.
#pragma once

#include "../primitives/launch.h"
#include "backward.cuh"
#include "forward.cuh"
#include "kernel_name.h"
#include "project.cuh"

namespace rnnfast::gpu {

// A kernel as a type, by how many tiles of batch indices its blocks take.
template <Family kFamily, class Type> struct ForwardKernel {
  static constexpr const char* kName = "step_forward";
  template <int kBatchTiles> using Product = ForwardProduct<kFamily, Type, kBatchTiles>;
  template <int kBatchTiles> static auto function() { return step_forward<kFamily, Type, kBatchTiles>; }
};
template <Family kFamily, class Type> struct BackwardKernel {
  static constexpr const char* kName = "step_backward";
  template <int kBatchTiles> using Product = UnitProduct<Type, kBatchTiles>;
  template <int kBatchTiles> static auto function() { return step_backward<kFamily, Type, kBatchTiles>; }
};
template <class Type> struct ProjectForwardKernel {
  static constexpr const char* kName = "step_project_forward";
  template <int kBatchTiles> using Product = UnitProduct<Type, kBatchTiles>;
  template <int kBatchTiles> static auto function() { return step_project_forward<Type, kBatchTiles>; }
};
template <Family kFamily, class Type> struct ProjectBackwardKernel {
  static constexpr const char* kName = "step_project_backward";
  template <int kBatchTiles> using Product = UnitProduct<Type, kBatchTiles>;
  template <int kBatchTiles> static auto function() { return step_project_backward<kFamily, Type, kBatchTiles>; }
};

// Calls visit(kernel, tiles) for every kernel of a unit, with each number of tiles that launch_step chooses from. What
// goes over all kernels does so here (benchmarks/occupancy/).
template <Family kFamily, class Type, class Visit> void for_each_kernel(const Visit& visit) {
  const auto with_tiles = [&](auto kernel) {
    visit(kernel, std::integral_constant<int, 1>());
    visit(kernel, std::integral_constant<int, Type::kLargeBatchTiles>());
  };
  with_tiles(ForwardKernel<kFamily, Type>());
  with_tiles(BackwardKernel<kFamily, Type>());
  if constexpr (FamilyCell<kFamily>::Constants::kMayProject) {
    with_tiles(ProjectForwardKernel<Type>());
    with_tiles(ProjectBackwardKernel<kFamily, Type>());
  }
}

template <class Type, class Product> constexpr StepTile tile_of() {
  return {Product::kWeights, Product::kBatch, Product::kThreads, static_cast<int>(sizeof(typename Type::Storage)),
          Type::kTensorCores};
}

// `results`: units of the kernel's result; `length`: of the sum for each.
template <class Kernel, class Type, class Params>
std::string launch_step(const Params& p, const StepLaunch& how, int64_t results, int64_t length) {
  int64_t batch = 0;
  for (int64_t d = 0; d < p.directions; ++d) {
    const Turn& turn = p.rows.turn[d];
    for (const int64_t active : {turn.active, turn.after_active}) batch = active > batch ? active : batch;
  }
  // Sequences that have ended, or never began, have something to hand on too.
  if (p.rows.layout.lengths || p.rows.layout.steps == 0) batch = p.rows.layout.batch;
  if (batch == 0 || results == 0) return "";
  const auto launch_with = [&](auto tiles) {
    constexpr int kBatchTiles = decltype(tiles)::value;
    using Product = typename Kernel::template Product<kBatchTiles>;
    LaunchConfig config;
    config.grid = {static_cast<unsigned>((batch + Product::kBatch - 1) / Product::kBatch),
                   static_cast<unsigned>((results + kUnits - 1) / kUnits), static_cast<unsigned>(p.directions)};
    config.threads = Product::kThreads;
    config.shared_bytes = Product::kSharedBytes;
    config.dependent = how.dependent;
    // So that a block of the next launch fits beside each of this one, and so that an SM need not change how it is
    // divided between two launches, for which it would have to be empty.
    config.most_shared = true;
    config.stream = how.stream;
    config.name = name_of<Kernel, Type>(p.mode);
    return launch(config, Kernel::template function<kBatchTiles>(), p);
  };
  constexpr int kLarge = Type::kLargeBatchTiles;
  constexpr StepTile small = tile_of<Type, typename Kernel::template Product<1>>();
  constexpr StepTile large = tile_of<Type, typename Kernel::template Product<kLarge>>();
  if (takes_large(small, large, {results, length, batch, p.directions}, how.sms))
    return launch_with(std::integral_constant<int, kLarge>());
  return launch_with(std::integral_constant<int, 1>());
}

template <Family kFamily, class Type> StepKernels StepInstance<kFamily, Type>::kernels() {
  constexpr int kGates = FamilyCell<kFamily>::Constants::kGates;
  StepKernels kernels{};
  kernels.forward = [](const StepForward& p, const StepLaunch& how) {
    return launch_step<ForwardKernel<kFamily, Type>, Type>(p, how, p.hidden_size, p.state_size);
  };
  kernels.backward = [](const StepBackward& p, const StepLaunch& how) {
    return launch_step<BackwardKernel<kFamily, Type>, Type>(p, how, p.hidden_size,
                                                            p.projected ? p.state_size : kGates * p.hidden_size);
  };
  if constexpr (FamilyCell<kFamily>::Constants::kMayProject) {
    kernels.project_forward = [](const StepForward& p, const StepLaunch& how) {
      return launch_step<ProjectForwardKernel<Type>, Type>(p, how, p.state_size, p.hidden_size);
    };
    kernels.project_backward = [](const StepBackward& p, const StepLaunch& how) {
      return launch_step<ProjectBackwardKernel<kFamily, Type>, Type>(p, how, p.state_size, kGates * p.hidden_size);
    };
  }
  return kernels;
}

}  // namespace rnnfast::gpu

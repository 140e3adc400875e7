// A program that is built for one kind of kernel, family and arithmetic (tests/build_emulated.py) has these in place of
// all others: launches that say so.
#pragma once

#include <string>

#include "cuda/persistent/persistent.h"
#include "cuda/split/split.h"
#include "cuda/step/step.h"
#include "cuda/variants/variant.h"

namespace rnnfast::gpu {

inline std::string other_instance() {
  return "this program has the kernels of one family and arithmetic, and not these: build it without a case";
}

inline StepKernels other_step_kernels() {
  StepKernels kernels{};
  kernels.forward = kernels.project_forward = [](const StepForward&, const StepLaunch&) { return other_instance(); };
  kernels.backward = kernels.project_backward = [](const StepBackward&, const StepLaunch&) { return other_instance(); };
  return kernels;
}

inline SplitKernels other_split_kernels() {
  SplitKernels kernels{};
  kernels.forward = kernels.project_forward = [](const SplitForward&, const StepLaunch&) { return other_instance(); };
  kernels.backward =
      kernels.project_backward = [](const SplitBackward&, const StepLaunch&) { return other_instance(); };
  return kernels;
}

inline VariantKernels other_variant_kernels() {
  VariantKernels kernels{};
  kernels.begin = kernels.reset =
      kernels.forward = [](const VariantStepForward&, const StepLaunch&) { return other_instance(); };
  kernels.backward = kernels.reset_backward =
      kernels.sum_vectors = [](const VariantStepBackward&, const StepLaunch&) { return other_instance(); };
  return kernels;
}

inline PersistentKernels other_persistent_kernels() {
  PersistentKernels kernels{};
  kernels.forward = [](const PersistentForward&, void*) { return other_instance(); };
  kernels.backward = [](const PersistentBackward&, void*) { return other_instance(); };
  return kernels;
}

}  // namespace rnnfast::gpu

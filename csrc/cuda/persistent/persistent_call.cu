#include "persistent_call.h"

#include "../primitives/execution.h"
#include "../primitives/launch.h"

namespace rnnfast::gpu {
namespace {

// Kernel arguments are 4 KB at most.
constexpr int kSizesALaunch = 448;
struct BatchSizes {
  int64_t first_row;  // of the first of these steps
  int64_t count;
  int64_t* offsets;  // (count + 1)
  int64_t sizes[kSizesALaunch];
};

RNNFAST_KERNEL void persistent_offsets(RNNFAST_GRID_CONSTANT const BatchSizes p) {
  if (thread_index() != 0) return;
  int64_t row = p.first_row;
  for (int64_t t = 0; t < p.count; ++t) {
    p.offsets[t] = row;
    row += p.sizes[t];
  }
  p.offsets[p.count] = row;
}

const PersistentKernels& persistent_kernels(Mode mode, Arithmetic arithmetic) {
  return InstanceTable<PersistentInstance>::of(traits(mode).family, arithmetic);
}

template <class Params>
std::string fill_shared(const Recurrence& r, const PersistentLayout& layout, const PersistentWorkspace& workspace,
                        void* stream, Params& p) {
  p.mode = r.mode;
  p.rows.layout = r.rows;
  p.hidden_size = r.hidden_size;
  p.directions = r.directions;
  for (int64_t d = 0; d < r.directions; ++d) {
    p.weight[d] = r.parameters[Kind::weight_hh].data[d];
    p.weight_stride[d] = r.parameters[Kind::weight_hh].stride[d];
  }
  p.hx = r.hx;
  p.cx = r.cx;
  p.layout = layout;
  p.words = workspace.words;
  if (!r.rows.batch_sizes) return "";
  p.rows.offsets = workspace.offsets;
  p.rows.layout.batch_stride = 1;
  return write_offsets(r.rows, workspace.offsets, stream);
}

}  // namespace

std::string write_offsets(const RowLayout& rows, int64_t* offsets, void* stream) {
  LaunchConfig config;
  config.threads = kWarpSize;
  config.stream = stream;
  config.name = "persistent_offsets";
  BatchSizes p{};
  // Without any step too, there is a first row.
  for (int64_t t = 0; t < rows.steps || t == 0; t += kSizesALaunch) {
    p.count = rows.steps - t < kSizesALaunch ? rows.steps - t : kSizesALaunch;
    p.offsets = offsets + t;
    for (int64_t i = 0; i < p.count; ++i) p.sizes[i] = rows.batch_sizes[t + i];
    std::string error = launch(config, persistent_offsets, p);
    if (!error.empty()) return error;
    for (int64_t i = 0; i < p.count; ++i) p.first_row += p.sizes[i];
  }
  return "";
}

std::string run_persistent_forward(const ForwardParams& from, const PersistentLayout& layout,
                                   const PersistentWorkspace& workspace, bool allow_tf32, void* stream) {
  PersistentForward p;
  std::string error = fill_shared(from, layout, workspace, stream, p);
  if (!error.empty()) return error;
  fill_tensors(from, p);
  return persistent_kernels(from.mode, arithmetic_of(from.dtype, allow_tf32)).forward(p, stream);
}

std::string run_persistent_backward(const BackwardParams& from, const PersistentLayout& layout,
                                    const PersistentWorkspace& workspace, bool allow_tf32, void* stream) {
  PersistentBackward p;
  std::string error = fill_shared(from, layout, workspace, stream, p);
  if (!error.empty()) return error;
  fill_tensors(from, p);
  return persistent_kernels(from.mode, arithmetic_of(from.dtype, allow_tf32)).backward(p, stream);
}

std::string why_not_resident(Mode mode, Arithmetic arithmetic, const PersistentLayout& layout, int64_t batch,
                             int64_t directions, bool backward) {
  const PersistentKernels& kernels = persistent_kernels(mode, arithmetic);
  return (backward ? kernels.backward_resident : kernels.forward_resident)(layout, batch, directions);
}

}  // namespace rnnfast::gpu

// A split call's workspaces as tensors, and its products: through ATen by cuBLAS, in the emulator by a plain kernel.
#pragma once

#include <array>

#include "../../allocation.h"
#include "../../places.h"
#include "../aten.h"
#include "split_loop.h"

#if defined(RNNFAST_EMULATED)
#include <atomic>

#include "plain_product.cuh"
#endif

namespace rnnfast::gpu {

#if defined(RNNFAST_EMULATED)
// Whether the products go through ATen all the same, on the host: what a card does, for a test.
inline std::atomic<bool>& products_by_torch() {
  static std::atomic<bool> by_torch{false};
  return by_torch;
}
#endif

class SplitTensors {
 public:
  SplitTensors(const Context& context, const Recurrence& r, const Places& places, bool forward, void* stream)
      : op_(context.op), like_(context.like), r_(r), forward_(forward), stream_(stream) {
    const CellTraits& cell = traits(r.mode);
    if (forward ? cell.has_cell_state : carries(cell)) workspace.carry = mutable_data_of(make(compute(), Size::hidden));
    for (const KindTraits& matrix : kKinds) {
      if (!matrix.multiplies_steps() || !places[matrix.kind][0]) continue;
      const Tensor from = make(storage(), forward ? matrix.columns : matrix.rows);
      const Tensor sums = make(compute(), forward ? matrix.rows : matrix.columns);
      workspace.products[matrix.kind] = {mutable_data_of(from), mutable_data_of(sums),
                                         product(matrix.kind, places, from, sums)};
    }
  }
  // The products refer to it.
  SplitTensors(const SplitTensors&) = delete;
  SplitTensors& operator=(const SplitTensors&) = delete;

  SplitWorkspace workspace;

 private:
  ScalarType storage() const { return like_.scalar_type(); }
  ScalarType compute() const { return compute_type(r_.dtype); }

  // (D, B, size).
  Tensor make(ScalarType type, Size size) {
    const int64_t sizes[3] = {r_.directions, r_.rows.batch, elements_of(size, r_)};
    keep_.push_back(workspace_of(op_, Sizes(sizes, 3), type, like_));
    return keep_.back();
  }

  std::function<std::string()> product(Kind kind, const Places& places, const Tensor& from, const Tensor& sums) {
#if defined(RNNFAST_EMULATED)
    if (!products_by_torch())
      return [this, kind, from, sums] {
        return run_plain_product(r_, kind, forward_, data_of(from), mutable_data_of(sums), stream_);
      };
#endif
    const Tensor weights = matrices(kind, places);
    // Of one direction the tensors without that dimension: a batch of one takes another way in some versions.
    const bool batched = r_.directions > 1;
    const auto of_directions = [&](const Tensor& tensor) {
      return batched ? tensor : torch::stable::select(tensor, 0, 0);
    };
    return [this, weights, batched, from = of_directions(from), sums = of_directions(sums)] {
#if defined(RNNFAST_EMULATED)
      // The host is to read what kernels have written.
      if (std::string error = synchronize(stream_); !error.empty()) return error;
#endif
      step_product_into(sums, op_, batched ? "aten::bmm" : "aten::mm", from, weights);
      return std::string();
    };
  }

  // Of each direction W, forward W^T: (D, length, columns), of one direction without D.
  Tensor matrices(Kind kind, const Places& places) {
    const char* const name = traits(kind).name;
    std::array<Tensor, kMaxDirections> all;
    for (int64_t d = 0; d < r_.directions; ++d) {
      const Tensor matrix = detached(*places[kind][d]);
      const bool usable = matrix.stride(1) == 1 || matrix.size(1) <= 1;
      all[static_cast<size_t>(d)] = usable ? matrix : contiguous_copy(op_, name, matrix);
    }
    Tensor matrices = all[0];
    if (r_.directions > 1) {
      const Tensors both(all.begin(), all.end());
      const int64_t sizes[3] = {kMaxDirections, all[0].size(0), all[0].size(1)};
      matrices = torch::stable::view(concatenated(op_, name, both), Sizes(sizes, 3));
    }
    return forward_ ? torch::stable::transpose(matrices, -2, -1) : matrices;
  }

  const char* const op_;
  const Tensor& like_;
  const Recurrence& r_;
  const bool forward_;
  void* const stream_;
  Tensors keep_;
};

}  // namespace rnnfast::gpu

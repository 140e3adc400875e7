// What a matrix product has summed before all of its k are in: in c, or in float32 where c is narrower and is to be
// rounded once.
#pragma once

#include "kernels.h"
#include "vec.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <class Storage> class ProductSums {
  using Compute = typename ComputeOf<Storage>::type;
  static constexpr bool kRounds = sizeof(Storage) < sizeof(Compute);

 public:
  // blocks: of k, one after the other.
  ProductSums(const MatmulParams& params, int64_t blocks)
      : p_(params), blocks_(blocks), stride_(params.sums ? params.n : round_up(params.n, kLanes<Compute>)) {}

  void place(Workspace& workspace) {
    if constexpr (kRounds)
      kept_ = p_.sums ? p_.sums : blocks_ > 1 ? workspace.template take<float>(p_.m, stride_) : nullptr;
  }

  // A vector of what a block gives to a row, beginning with this column.
  RNNFAST_INLINE void write(int64_t block, int64_t row, int64_t column, Vector<Compute> sum) const {
    const int64_t left = p_.n - column;
    bool adds = p_.accumulates;
    if constexpr (kRounds) {
      if (kept_) {
        float* const kept = kept_ + row * stride_ + column;
        if (block > 0 || (p_.accumulates && p_.sums)) sum += load<float>(kept, left);
        if (block < blocks_ - 1 || !p_.c) return store<float>(kept, sum, left);
        adds = p_.accumulates && !p_.sums;
      }
    } else {
      adds = adds || block > 0;
    }
    Storage* const to = at<Storage>(p_.c, row * p_.c_row + column);
    store<Compute>(to, adds ? sum + load<Compute>(to, left) : sum, left);
  }

 private:
  const MatmulParams& p_;
  const int64_t blocks_, stride_;
  float* kept_ = nullptr;  // (M, stride)
};

}  // namespace
}  // namespace rnnfast::cpu

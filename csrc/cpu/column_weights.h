// The weights of a backward call: W_hh and W_hr transposed, packed by columns. The counterpart of CallWeights.
#pragma once

#include "split.h"
#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <class Products, class Storage, int kBlocks> class ColumnWeights {
  using Compute = typename ComputeOf<Storage>::type;
  using Packed = typename Products::Packed;
  static constexpr int kTileUnits = kLanes<Compute> * kBlocks;

 public:
  using RowValue = typename Products::RowValue;
  using Scope = typename Products::Scope;
  static constexpr int64_t kWeightBytes = Products::kWeightBytes;
  static constexpr int kRowGroup = Products::kRowGroup;
  static constexpr double kSpeed = Products::kSpeed;

  ColumnWeights(const BackwardParams& params)
      : hh_{params.parameters[Kind::weight_hh], traits(params.mode).gates * params.hidden_size, params.state_size},
        hr_{params.parameters[Kind::weight_hr], params.state_size, params.projected ? params.hidden_size : 0},
        directions_(params.directions) {}

  RNNFAST_INLINE static void keep_awake() { Products::keep_awake(); }

  // Of a direction's weights.
  int64_t packed_bytes() const {
    return sum(product(hh_.rows, hh_.columns, kWeightBytes), product(hr_.rows, hr_.columns, kWeightBytes));
  }

  void place(Workspace& workspace) {
    for (Matrix* matrix : {&hh_, &hr_})
      for (int64_t d = 0; d < directions_ && matrix->columns; ++d)
        matrix->packed[d] = workspace.template take<Packed>(matrix->tiles(), matrix->tile_size());
  }

  // One share of the packing.
  void prepare(int64_t share, int64_t shares) const {
    for (const Matrix* matrix : {&hh_, &hr_}) {
      const Range range = share_of(directions_ * matrix->tiles(), share, shares);
      for (int64_t i = range.first; i < range.last; ++i) {
        const int64_t d = i / matrix->tiles(), tile = i % matrix->tiles(), column = tile * kTileUnits;
        Products::template pack_columns<kBlocks>(at<Storage>(matrix->weights.data[d], column),
                                                 matrix->weights.stride[d], matrix->columns - column, matrix->rows,
                                                 matrix->tile(d, tile));
      }
    }
  }

  // use(first row, height, sums), some rows at once: the product with a tile of W_hh^T, (height, kBlocks); before it
  // prefetch(first row, height).
  template <class Use, class Prefetch>
  void multiply_hh(int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use,
                   const Prefetch& prefetch) const {
    Products::template for_rows<kBlocks>(rows, hh_.tile(d, tile), hh_.rows, use, prefetch);
  }
  // The same of W_hr^T.
  template <class Use> void multiply_hr(int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use) const {
    Products::template for_rows<kBlocks>(rows, hr_.tile(d, tile), hr_.rows, use, no_prefetch);
  }

 private:
  struct Matrix {
    const Operand& weights;
    int64_t rows, columns;
    Packed* packed[kMaxDirections] = {};

    int64_t tiles() const { return divide_up(columns, kTileUnits); }
    int64_t tile_size() const { return Products::packed_size(kBlocks, rows); }
    Packed* tile(int64_t d, int64_t number) const { return packed[d] + number * tile_size(); }
  };
  Matrix hh_, hr_;
  const int64_t directions_;
};

}  // namespace
}  // namespace rnnfast::cpu

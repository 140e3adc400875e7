// The weights of a backward call: W_hh and W_hr transposed, packed by columns, or read as they lie (packing.h). The
// counterpart of CallWeights.
#pragma once

#include "packing.h"
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
        directions_(params.directions) {
    const int64_t passes = product(params.rows.steps, divide_up(params.rows.batch, kMaxRows<kBlocks>));
    for (Matrix* matrix : {&hh_, &hr_})
      if (kMayLie && reads_columns_as_they_lie(passes, product(matrix->rows, matrix->columns, kWeightBytes)))
        matrix->first_packed = matrix->columns / kTileUnits;
  }

  RNNFAST_INLINE static void keep_awake() { Products::keep_awake(); }

  // Of a direction's weights.
  int64_t packed_bytes() const { return sum(hh_.packed_bytes(), hr_.packed_bytes()); }

  void place(Workspace& workspace) {
    for (Matrix* matrix : {&hh_, &hr_})
      for (int64_t d = 0; d < directions_ && matrix->columns; ++d)
        matrix->packed[d] = workspace.template take<Packed>(matrix->packed_tiles(), matrix->tile_size());
  }

  // One share of the packing.
  void prepare(int64_t share, int64_t shares) const {
    for (const Matrix* matrix : {&hh_, &hr_}) {
      const int64_t tiles = matrix->packed_tiles();
      const Range range = share_of(directions_ * tiles, share, shares);
      for (int64_t i = range.first; i < range.last; ++i) {
        const int64_t d = i / tiles, tile = matrix->first_packed + i % tiles, column = tile * kTileUnits;
        Products::template pack_columns<kBlocks>(matrix->at_column(d, column), matrix->weights.stride[d],
                                                 matrix->columns - column, matrix->rows, matrix->tile(d, tile));
      }
    }
  }

  // use(first row, height, sums), some rows at once: the product with a tile of W_hh^T, (height, kBlocks); before it
  // prefetch(first row, height).
  template <class Use, class Prefetch>
  void multiply_hh(int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use,
                   const Prefetch& prefetch) const {
    multiply(hh_, d, tile, rows, use, prefetch);
  }
  // The same of W_hr^T.
  template <class Use> void multiply_hr(int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use) const {
    multiply(hr_, d, tile, rows, use, no_prefetch);
  }

 private:
  static constexpr bool kMayLie = Products::kReadsAsItLies && sizeof(Storage) == sizeof(Compute);

  struct Matrix {
    const Operand& weights;
    int64_t rows, columns;
    int64_t first_packed = 0;  // tiles before it are read as they lie; what the last one lacks is packed as zeros
    Packed* packed[kMaxDirections] = {};

    int64_t packed_tiles() const { return divide_up(columns, kTileUnits) - first_packed; }
    int64_t packed_bytes() const { return product(rows, columns - first_packed * kTileUnits, kWeightBytes); }
    int64_t tile_size() const { return Products::packed_size(kBlocks, rows); }
    Packed* tile(int64_t d, int64_t number) const { return packed[d] + (number - first_packed) * tile_size(); }
    const Storage* at_column(int64_t d, int64_t column) const { return at<Storage>(weights.data[d], column); }
  };

  template <class Use, class Prefetch>
  static void multiply(const Matrix& matrix, int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use,
                       const Prefetch& prefetch) {
    if constexpr (kMayLie)
      if (tile < matrix.first_packed)
        return for_row_tiles<kBlocks>(rows.data, rows.stride, 1, rows.count,
                                      TileAt<Compute>{matrix.at_column(d, tile * kTileUnits), matrix.weights.stride[d]},
                                      matrix.rows, use, prefetch);
    Products::template for_rows<kBlocks>(rows, matrix.tile(d, tile), matrix.rows, use, prefetch);
  }

  Matrix hh_, hr_;
  const int64_t directions_;
};

}  // namespace
}  // namespace rnnfast::cpu

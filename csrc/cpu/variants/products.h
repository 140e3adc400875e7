// The products with W_hh of one direction of a layer with options: of all its rows, or where a step has two of some.
// With several heads W_hh is a matrix of blocks, of which those beside the diagonal are not there: (G*H, H / heads).
#pragma once

#include "../../variants/params.h"
#include "../call_weights.h"
#include "../column_weights.h"

namespace rnnfast::cpu {
namespace {

// What a product with some rows of W_hh sees: a layer of one gate and so many units.
template <class Params> inline Params product_params(const VariantParams& p, int64_t first_row, int64_t rows) {
  Params r;
  r.mode = Mode::rnn_identity;
  r.dtype = p.dtype;
  r.rows = p.rows;
  r.hidden_size = rows;
  r.state_size = p.head_size();
  r.parameters[Kind::weight_hh] = p.weight_hh;
  const int64_t element = p.dtype == DType::float64 ? 8 : p.dtype == DType::float32 ? 4 : 2;
  // Of no rows there is nothing to point at, and a matrix of one row may have any stride.
  if (rows)
    r.parameters[Kind::weight_hh].data[0] = at<char>(p.weight_hh.data[0], first_row * p.weight_hh.stride[0] * element);
  return r;
}

constexpr int kProductBlocks = 2;  // vectors of a tile

// Tiles of blocks of `block` units, `blocks` of them: none crosses from one block to the next.
template <class Compute> struct BlockTiles {
  static constexpr int kTileUnits = kLanes<Compute> * kProductBlocks;
  int64_t block, blocks;

  int64_t each() const { return divide_up(block, kTileUnits); }
  int64_t count() const { return blocks * each(); }
  int64_t block_of(int64_t tile) const { return tile / each(); }
  int64_t unit_in_block(int64_t tile) const { return tile % each() * kTileUnits; }
};

// W h: sums over the columns of some rows of W_hh.
template <class Storage> class SumsProduct {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Products = PlainProducts<Compute>;
  using Weights = CallWeights<Products, Storage, 1, kProductBlocks>;
  static constexpr int kL = kLanes<Compute>;

 public:
  SumsProduct(const VariantParams& p, int64_t first_row, int64_t rows, int threads)
      : first_row(first_row),
        rows(rows),
        params(product_params<ForwardParams>(p, first_row, rows)),
        heads_(p.heads),
        size_(p.head_size()),
        // Without heads one block, of all rows.
        tiles_{heads_ > 1 ? size_ : rows, heads_ > 1 && size_ ? rows / size_ : rows > 0},
        weights_(params, threads, shares_of_group(threads, 1, tiles_.count())) {}

  const int64_t first_row, rows;
  const ForwardParams params;

  int64_t tiles() const { return tiles_.count(); }
  int64_t packed_bytes() const { return heads_ > 1 ? product(rows, size_, sizeof(Compute)) : weights_.packed_bytes(); }

  void place(Workspace& workspace) {
    if (!rows) return;
    if (heads_ > 1)
      packed_ = workspace.template take<Compute>(tiles(), tile_size());
    else
      weights_.place(workspace, 0, 0, true);
  }
  void prepare_tile(int64_t tile) const {
    if (heads_ == 1) return weights_.prepare_tile(0, tile);
    const Operand& weight = params.parameters[Kind::weight_hh];
    for (int v = 0; v < kProductBlocks; ++v) {
      const int64_t unit = tiles_.unit_in_block(tile) + v * kL, left = size_ - unit;
      const int64_t row = tiles_.block_of(tile) * size_ + (left > 0 ? unit : 0);
      Products::template pack_rows<kProductBlocks>(at<Storage>(weight.data[0], row * weight.stride[0]),
                                                   weight.stride[0], left, size_, packed_ + tile * tile_size(), v);
    }
  }

  // use(row, column, sums, left): the sums of some rows of the states with one of this product's tiles.
  template <class Use> void multiply(int64_t tile, const Rows<Compute>& states, int member, const Use& use) const {
    const int64_t block = tiles_.block_of(tile), unit = tiles_.unit_in_block(tile);
    const auto of_rows = [&](int64_t first, int height, const Value* sums) {
      for (int i = 0; i < height; ++i)
        for (int v = 0; v < kProductBlocks && unit + v * kL < tiles_.block; ++v)
          use(first + i, block * tiles_.block + unit + v * kL, sums[i * kProductBlocks + v],
              tiles_.block - unit - v * kL);
    };
    if (heads_ == 1) return weights_.multiply_hh(0, tile, weights_.rows_of(states, size_, member), of_rows);
    const Rows<Compute> of_head{states.data + block % heads_ * size_, states.stride, states.count};
    Products::template for_rows<kProductBlocks>(of_head, packed_ + tile * tile_size(), size_, of_rows, no_prefetch);
  }

 private:
  int64_t tile_size() const { return Products::packed_size(kProductBlocks, size_); }

  const int64_t heads_, size_;
  const BlockTiles<Compute> tiles_;
  Weights weights_;
  Compute* packed_ = nullptr;
};

// d W: what reaches the states by some rows of W_hh.
template <class Storage> class StatesProduct {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Products = PlainProducts<Compute>;
  using Weights = ColumnWeights<Products, Storage, kProductBlocks>;
  static constexpr int kL = kLanes<Compute>;

 public:
  StatesProduct(const VariantParams& p, int64_t first_row, int64_t rows)
      : first_row(first_row),
        rows(rows),
        params(product_params<BackwardParams>(p, first_row, rows)),
        heads_(p.heads),
        size_(p.head_size()),
        gates_(p.hidden_size ? rows / p.hidden_size : 0),
        tiles_{size_, heads_},
        weights_(params) {}

  const int64_t first_row, rows;
  const BackwardParams params;

  int64_t tiles() const { return tiles_.count(); }
  int64_t packed_bytes() const { return heads_ > 1 ? product(rows, size_, sizeof(Compute)) : weights_.packed_bytes(); }

  void place(Workspace& workspace) {
    if (!rows) return;
    if (heads_ > 1)
      packed_ = workspace.template take<Compute>(gates_, tiles(), tile_size());
    else
      weights_.place(workspace);
  }
  void prepare(int64_t share, int64_t shares) const {
    if (!rows) return;
    if (heads_ == 1) return weights_.prepare(share, shares);
    const Operand& weight = params.parameters[Kind::weight_hh];
    const Range range = share_of(gates_ * tiles(), share, shares);
    for (int64_t i = range.first; i < range.last; ++i) {
      const int64_t tile = i % tiles(), unit = tiles_.unit_in_block(tile);
      const int64_t row = (i / tiles() * heads_ + tiles_.block_of(tile)) * size_;
      Products::template pack_columns<kProductBlocks>(at<Storage>(weight.data[0], row * weight.stride[0] + unit),
                                                      weight.stride[0], size_ - unit, size_, packed_ + i * tile_size());
    }
  }

  // As SumsProduct's, with one argument more: whether the sums are to be added to those before.
  template <class Use> void multiply(int64_t tile, const Rows<Compute>& gradients, const Use& use) const {
    const int64_t head = tiles_.block_of(tile), unit = tiles_.unit_in_block(tile);
    const auto of_rows = [&](bool adds) {
      return [&, adds](int64_t first, int height, const Value* sums) {
        for (int i = 0; i < height; ++i)
          for (int v = 0; v < kProductBlocks && unit + v * kL < size_; ++v)
            use(first + i, head * size_ + unit + v * kL, sums[i * kProductBlocks + v], size_ - unit - v * kL, adds);
      };
    };
    if (heads_ == 1) return weights_.multiply_hh(0, tile, gradients, of_rows(false), no_prefetch);
    for (int64_t gate = 0; gate < gates_; ++gate) {
      const Rows<Compute> of_gate{gradients.data + (gate * heads_ + head) * size_, gradients.stride, gradients.count};
      Products::template for_rows<kProductBlocks>(of_gate, packed_ + (gate * tiles() + tile) * tile_size(), size_,
                                                  of_rows(gate > 0), no_prefetch);
    }
  }

 private:
  int64_t tile_size() const { return Products::packed_size(kProductBlocks, size_); }

  const int64_t heads_, size_, gates_;
  const BlockTiles<Compute> tiles_;
  Weights weights_;
  Compute* packed_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::cpu

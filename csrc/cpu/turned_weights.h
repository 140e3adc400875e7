// The weights of a forward call of one step with some rows: read once, as they lie, with nothing packed but the rows. A
// product is turned around: the units are its rows, whose weights are broadcast, and the rows its lanes, so that no
// lanes have to be added up. What comes out is transposed in registers. The counterpart of CallWeights, for layers
// without projection.
#pragma once

#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

// Whether the pass is better served so than with the weights packed, which pays with more rows, or multiplied row by
// row, which few rows are that would leave lanes unused. Measured.
template <class Compute> inline bool is_worth_turning(const ForwardParams& p) {
  constexpr int64_t kMost = 64;
  const int64_t rows = p.rows.batch, lanes = round_up(rows, kLanes<Compute>);
  return p.rows.steps == 1 && !p.projected && rows <= kMost && 8 * rows >= 5 * lanes;
}

template <class Storage, int kG> class TurnedWeights {
  using Compute = Storage;
  using Value = Vector<Compute>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kMostVectors = 4;  // of rows at once

  // Rows as lanes: element (k, row) at [k][row], in blocks of so many vectors of rows.
  struct Turned {
    const Compute* data;
    int64_t count, k_count;
  };

 public:
  using RowValue = Compute;
  using Scope = NoScope;
  static constexpr int kRowGroup = kL;
  static constexpr double kSpeed = 1;
  static constexpr int kStateVectors = 1;
  static constexpr int64_t kWeightBytes = sizeof(Compute);

  TurnedWeights(const ForwardParams& params, int threads, int64_t) : p_(params), threads_(threads) {}

  int64_t packed_bytes() const { return 0; }
  bool share_outgrows_cache(int64_t) const { return false; }

  void place(Workspace& workspace, int64_t step_rows, int64_t, bool) {
    const int64_t columns = p_.input_size > p_.state_size ? p_.input_size : p_.state_size;
    member_size_ = product(round_up(step_rows, kL), columns);
    turned_ = workspace.template take<Compute>(threads_, member_size_);
  }

  static void keep_awake() {}
  static bool takes_in_place(int64_t) { return true; }
  void prepare_tile(int64_t, int64_t) const {}
  void prepare_state_tile(int64_t, int64_t) const {}

  // A member turns the rows for itself: the input's first, and the states' over them when it is done with those.
  Turned rows_of(const Rows<Compute>& rows, int64_t columns, int member) const {
    Compute* const to = turned_ + member * member_size_;
    for_blocks(rows.count, [&](int64_t first, int vectors) {
      for (int j = 0; j < vectors; ++j)
        pack_rows(rows.at(first + j * kL), rows.stride, rows.count - first - j * kL, columns,
                  to + first * columns + j * kL, vectors * kL);
    });
    return {to, rows.count, columns};
  }
  Turned input_of(const Rows<Compute>& rows, int member, bool) const { return rows_of(rows, p_.input_size, member); }

  template <class Use> void multiply_hh(int64_t d, int64_t tile, const Turned& rows, const Use& use) const {
    Value sums[kMostVectors * kL * kG];
    for_blocks(rows.count, [&](int64_t first, int vectors) {
      multiply(Kind::weight_hh, d, tile, rows, first, vectors, sums);
      const int64_t left = rows.count - first, height = left < vectors * kL ? left : vectors * kL;
      use(first, static_cast<int>(height), sums);
    });
  }
  // There is no projection.
  template <class Use> void multiply_hr(int64_t, int64_t, const Turned&, const Use&) const {}
  void multiply_ih(int64_t d, int64_t tile, const Turned& rows, int, Value* to) const {
    for_blocks(rows.count, [&](int64_t first, int vectors) {
      multiply(Kind::weight_ih, d, tile, rows, first, vectors, to + first * kG);
    });
  }

 private:
  // use(first row, vectors) for all rows, kMostVectors vectors at once.
  template <class Use> static void for_blocks(int64_t count, const Use& use) {
    for (int64_t first = 0; first < count; first += kMostVectors * kL) {
      const int64_t vectors = divide_up(count - first, kL);
      use(first, static_cast<int>(vectors < kMostVectors ? vectors : kMostVectors));
    }
  }

  // A block of rows times a tile: (rows of the block, kG) vectors.
  void multiply(Kind kind, int64_t d, int64_t tile, const Turned& rows, int64_t first, int vectors, Value* to) const {
    switch (vectors) {
      case 1: return multiply<1>(kind, d, tile, rows, first, to);
      case 2: return multiply<2>(kind, d, tile, rows, first, to);
      case 3: return multiply<3>(kind, d, tile, rows, first, to);
      default: return multiply<kMostVectors>(kind, d, tile, rows, first, to);
    }
  }
  template <int kVectors>
  void multiply(Kind kind, int64_t d, int64_t tile, const Turned& rows, int64_t first, Value* to) const {
    const int64_t stride = p_.parameters[kind].stride[d], height = rows.count - first;
    for (int v = 0; v < kG; ++v) {
      const TileSource source = source_of_tile<kG, kL, kL>(p_.hidden_size, tile, v);
      const int64_t units = source.units < kL ? source.units : kL;
      // Of each unit the sums of all rows.
      Value of_units[kL * kVectors];
      product_into<kVectors>(at<Storage>(p_.parameters[kind].data[d], source.weight_row * stride), stride, units,
                             rows.data + first * rows.k_count, rows.k_count, of_units);
      for (int j = 0; j < kVectors; ++j) {
        Value block[kL];
#pragma GCC unroll 16
        for (int i = 0; i < kL; ++i) block[i] = i < units ? of_units[i * kVectors + j] : Value{};
        transpose_level<1, Compute>(block);
        const int64_t left = height - j * kL;
        for (int i = 0; i < kL && i < left; ++i) to[(j * kL + i) * kG + v] = block[i];
      }
    }
  }

  const ForwardParams& p_;
  const int threads_;
  int64_t member_size_ = 0;
  Compute* turned_ = nullptr;  // of each member
};

}  // namespace
}  // namespace rnnfast::cpu

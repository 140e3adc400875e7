// The weights of a forward call that were packed before it, in panels. The counterpart of CallWeights.
#pragma once

#include "panel_products.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

// kWide: panels of a gate that a tile has; two let each value of a cell with one gate meet two vectors of weights.
template <PanelType kType, int kG, int kWide = 1> class PanelWeights {
  static_assert(kG == 1 || kWide == 1);
  using Product = PanelProduct<kType>;
  using Operands = typename Product::Operands;

 public:
  using RowValue = float;
  using Scope = NoScope;
  static constexpr int kRowGroup = 1;
  static constexpr double kSpeed = 1;
  // Of the tiles that the loop is to have.
  static constexpr int kBlocks = kWide * kLineVectors;
  static constexpr int kStateVectors = kLineVectors;
  static constexpr int64_t kWeightBytes = static_cast<int64_t>(sizeof(float)) / weights_in_word(kType);

  PanelWeights(const ForwardParams& params, int threads, int64_t) : p_(params), threads_(threads) {}

  int64_t packed_bytes() const { return 0; }
  bool share_outgrows_cache(int64_t) const { return false; }

  void place(Workspace& workspace, int64_t step_rows, int64_t chunk_rows, bool) {
    if constexpr (kType == PanelType::int8) {
      const int64_t ih = Product::operand_bytes(chunk_rows, p_.input_size),
                    hh = Product::operand_bytes(step_rows, p_.state_size),
                    hr = p_.projected ? Product::operand_bytes(step_rows, p_.hidden_size) : 0;
      member_bytes_ = ih > hh ? ih : hh;
      if (hr > member_bytes_) member_bytes_ = hr;
      operands_ = workspace.take<char>(threads_, member_bytes_);
    }
  }

  static void keep_awake() {}
  static bool takes_in_place(int64_t) { return true; }
  void prepare_tile(int64_t, int64_t) const {}
  void prepare_state_tile(int64_t, int64_t) const {}

  Operands rows_of(const Rows<float>& rows, int64_t columns, int member) const {
    return Product::operands(rows, columns, operands_ + member * member_bytes_);
  }

  Operands input_of(const Rows<float>& rows, int member, bool) const { return rows_of(rows, p_.input_size, member); }

  template <class Use> void multiply_hh(int64_t d, int64_t tile, const Operands& rows, const Use& use) const {
    const Panels panels = panels_of(Kind::weight_hh, d, tile * kPanels, p_.state_size);
    for_some_rows<Float, kG * kBlocks>(
        rows.count,
        [&](int64_t first, int height, Float* sums) {
          multiply_tile(Product::some(rows, first, height), panels, tile, p_.state_size, sums);
        },
        use);
  }
  template <class Use> void multiply_hr(int64_t d, int64_t tile, const Operands& rows, const Use& use) const {
    const Panels panels = panels_of(kProjection, d, tile, p_.hidden_size);
    for_some_rows<Float, kStateVectors>(
        rows.count,
        [&](int64_t first, int height, Float* sums) {
          multiply<1>(Product::some(rows, first, height), panels, p_.hidden_size, Sums{sums, kStateVectors, 0, 1});
        },
        use);
  }
  void multiply_ih(int64_t d, int64_t tile, const Operands& rows, int, Float* to) const {
    multiply_tile(rows, panels_of(Kind::weight_ih, d, tile * kPanels, p_.input_size), tile, p_.input_size, to);
  }

 private:
  static constexpr int kPanels = kG * kWide;  // of a tile
  static constexpr Kind kProjection = multiplier_of(Size::hidden);

  // From panel `first` of a matrix on.
  Panels panels_of(Kind kind, int64_t d, int64_t first, int64_t columns) const {
    const Panels all{static_cast<const char*>(p_.parameters[kind].data[d]), panel_lines(kType, columns) * kLineBytes};
    return all.behind(first);
  }

  // Rows times one tile: (rows, kBlocks, kG) vectors.
  void multiply_tile(const Operands& rows, const Panels& panels, int64_t tile, int64_t columns, Float* to) const {
    const Sums sums = kWide == 1 ? Sums{to, kG * kBlocks, 1, kG} : Sums{to, kBlocks, kLineVectors, 1};
    // The last tile may have one panel alone; what is behind it belongs to no unit.
    if (kWide > 1 && (tile * kWide + 1) * kPanelRows >= p_.hidden_size) return multiply<1>(rows, panels, columns, sums);
    multiply<kPanels>(rows, panels, columns, sums);
  }

  // Rows times kCount panels, as many at once as the registers hold.
  template <int kCount>
  static void multiply(const Operands& rows, const Panels& panels, int64_t columns, const Sums& sums) {
    constexpr int kAtOnce = kCount < Product::kMostPanels ? kCount : Product::kMostPanels;
    Product::template multiply<kAtOnce>(rows, panels, columns, sums);
    if constexpr (kAtOnce < kCount)
      multiply<kCount - kAtOnce>(rows, panels.behind(kAtOnce), columns, sums.behind(0, kAtOnce));
  }

  const ForwardParams& p_;
  const int threads_;
  int64_t member_bytes_ = 0;
  char* operands_ = nullptr;  // of each member
};

}  // namespace
}  // namespace rnnfast::cpu

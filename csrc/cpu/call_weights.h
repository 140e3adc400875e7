// The weights of a forward call as a layer keeps them: packed in the call into the order in which the products read
// them, or "direct", read as they lie. packing.h says which.
#pragma once

#include "packing.h"
#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <class Storage, int kG, int kBlocks> class CallWeights {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kVectors = kG * kBlocks;

 public:
  static constexpr int64_t kWeightBytes = sizeof(Compute);
  static constexpr int kStateVectors = 1;  // of a tile of W_hr

  // `shares`: among which a round's tiles are shared out, if there are no groups of rows.
  CallWeights(const ForwardParams& params, int threads, int64_t shares)
      : p_(params),
        threads_(threads),
        tiles_(divide_up(params.hidden_size, kL * kBlocks)),
        direct_hh_(reads_as_it_lies(use_of(params.hidden_size * kG, params.state_size, params.rows.batch, shares))),
        direct_hr_(params.projected &&
                   reads_as_it_lies(use_of(params.state_size, params.hidden_size, params.rows.batch, shares))),
        direct_ih_(reads_as_it_lies(use_of(params.hidden_size * kG, params.input_size, row_count(), shares))) {}

  // Of a direction's weights, before the first step at most.
  int64_t packed_bytes() const {
    const int64_t hh = direct_hh_ ? 0 : product(p_.hidden_size, kG, p_.state_size, sizeof(Compute)),
                  ih = direct_ih_ ? 0 : product(p_.hidden_size, kG, p_.input_size, sizeof(Compute)),
                  hr = packs_hr() ? product(p_.state_size, p_.hidden_size, sizeof(Compute)) : 0;
    return sum(sum(hh, ih), hr);
  }

  // Memory for products of at most `step_rows` rows with W_hh and W_hr, and `chunk_rows` with W_ih. `one_chunk`: each
  // tile of W_ih is used once.
  void place(Workspace& workspace, int64_t, int64_t, bool one_chunk) {
    packs_ih_early_ = !direct_ih_ && !one_chunk;
    for (int64_t d = 0; d < p_.directions; ++d) {
      if (!direct_hh_) packed_hh_[d] = workspace.template take<Compute>(tiles_, kVectors, kL, p_.state_size);
      if (packs_hr())
        packed_hr_[d] = workspace.template take<Compute>(divide_up(p_.state_size, kL), kL, p_.hidden_size);
      if (packs_ih_early_) packed_ih_[d] = workspace.template take<Compute>(tiles_, kVectors, kL, p_.input_size);
    }
    if (!direct_ih_ && !packs_ih_early_)
      packed_tiles_ = workspace.template take<Compute>(threads_, kVectors, kL, p_.input_size);
  }

  // Before the first step: a tile of W_hh and W_ih, and one of W_hr.
  void prepare_tile(int64_t d, int64_t tile) const {
    if (!direct_hh_)
      pack_tile(Kind::weight_hh, d, tile, p_.state_size, packed_tile(packed_hh_[d], tile, p_.state_size));
    if (packs_ih_early_)
      pack_tile(Kind::weight_ih, d, tile, p_.input_size, packed_tile(packed_ih_[d], tile, p_.input_size));
  }
  void prepare_state_tile(int64_t d, int64_t tile) const {
    if (direct_hr_) return;
    const int64_t stride = stride_of(Kind::weight_hr, d), unit = tile * kL;
    pack_rows(at<Storage>(data_of(Kind::weight_hr, d), unit * stride), stride, p_.state_size - unit, p_.hidden_size,
              packed_hr_[d] + unit * p_.hidden_size, kL);
  }

  // Rows as the products take them, for the thread that is number `member`.
  Rows<Compute> rows_of(Rows<Compute> rows, int64_t, int) const { return rows; }

  // use(first row, height, sums), some rows at once: the product with a tile of W_hh, (height, kVectors).
  template <class Use> void multiply_hh(int64_t d, int64_t tile, const Rows<Compute>& rows, const Use& use) const {
    const int64_t k = p_.state_size;
    if (direct_hh_)
      for_some_rows<Value, kVectors>(
          rows.count,
          [&](int64_t first, int height, Value* sums) {
            direct_product(rows.some(first, height), Kind::weight_hh, d, k, tile, sums);
          },
          use);
    else
      for_row_tiles<kVectors>(rows.data, rows.stride, 1, rows.count, packed_tile(packed_hh_[d], tile, k), k, use);
  }

  // The same of W_hr: (height, kStateVectors).
  template <class Use> void multiply_hr(int64_t d, int64_t tile, const Rows<Compute>& rows, const Use& use) const {
    const int64_t k = p_.hidden_size, unit = tile * kL;
    if (direct_hr_)
      for_some_rows<Value, 1>(
          rows.count,
          [&](int64_t first, int height, Value* sums) {
            direct_sums(rows.some(first, height), Kind::weight_hr, d, k, unit, p_.state_size - unit, sums, 1);
          },
          use);
    else
      for_row_tiles<1>(rows.data, rows.stride, 1, rows.count, packed_hr_[d] + unit * k, k, use);
  }

  // The product with a tile of W_ih, (rows, kVectors).
  void multiply_ih(int64_t d, int64_t tile, const Rows<Compute>& rows, int member, Value* to) const {
    const int64_t k = p_.input_size;
    if (direct_ih_) return direct_product(rows, Kind::weight_ih, d, k, tile, to);
    Compute* const packed =
        packs_ih_early_ ? packed_tile(packed_ih_[d], tile, k) : packed_tile(packed_tiles_, member, k);
    // In the only chunk: what is packed is read again from the nearest cache.
    if (!packs_ih_early_) pack_tile(Kind::weight_ih, d, tile, k, packed);
    product_into<kVectors>(rows.data, rows.stride, rows.count, packed, k, to);
  }

 private:
  // At most, if sequences have several lengths.
  int64_t row_count() const { return product(p_.rows.steps, p_.rows.batch); }
  WeightUse use_of(int64_t rows, int64_t k, int64_t rows_a_step, int64_t shares) const {
    // Where the share's size matters, with one row a step, there are no groups of rows.
    return {
        row_count(), rows_a_step, k, kL, sizeof(Storage) < sizeof(Compute), product(rows, k, sizeof(Compute)) / shares};
  }
  bool packs_hr() const { return p_.projected && !direct_hr_; }

  const void* data_of(Kind kind, int64_t d) const { return p_.parameters[kind].data[d]; }
  int64_t stride_of(Kind kind, int64_t d) const { return p_.parameters[kind].stride[d]; }

  TileSource source_of(int64_t tile, int v) const {
    return source_of_tile<kG, kL * kBlocks, kL>(p_.hidden_size, tile, v);
  }
  static Compute* packed_tile(Compute* packed, int64_t tile, int64_t k_count) {
    return packed + tile * kVectors * kL * k_count;
  }
  void pack_tile(Kind kind, int64_t d, int64_t tile, int64_t k_count, Compute* packed) const {
    const int64_t stride = stride_of(kind, d);
    for (int v = 0; v < kVectors; ++v) {
      const TileSource source = source_of(tile, v);
      pack_rows(at<Storage>(data_of(kind, d), source.weight_row * stride), stride, source.units, k_count,
                packed + v * kL, kVectors * kL);
    }
  }

  // Rows times one tile of weights as they lie: (rows, kVectors) sums.
  void direct_product(const Rows<Compute>& rows, Kind kind, int64_t d, int64_t k_count, int64_t tile,
                      Value* sums) const {
    for (int v = 0; v < kVectors; ++v) {
      const TileSource source = source_of(tile, v);
      if (source.units > 0)
        direct_sums(rows, kind, d, k_count, source.weight_row, source.units, sums + v, kVectors);
      else
        for (int64_t r = 0; r < rows.count; ++r) sums[r * kVectors + v] = Value{};
    }
  }
  void direct_sums(const Rows<Compute>& rows, Kind kind, int64_t d, int64_t k_count, int64_t weight_row, int64_t units,
                   Value* sums, int64_t sums_step) const {
    const int64_t stride = stride_of(kind, d);
    dot_all_rows(rows.data, rows.stride, rows.count, at<Storage>(data_of(kind, d), weight_row * stride), stride, units,
                 k_count, sums, sums_step);
  }

  const ForwardParams& p_;
  const int threads_;
  const int64_t tiles_;
  const bool direct_hh_, direct_hr_, direct_ih_;
  bool packs_ih_early_ = false;  // before the first step; else tile by tile, or not at all
  Compute* packed_hh_[kMaxDirections]{};
  Compute* packed_hr_[kMaxDirections]{};
  Compute* packed_ih_[kMaxDirections]{};
  Compute* packed_tiles_ = nullptr;  // a tile of each member
};

}  // namespace
}  // namespace rnnfast::cpu

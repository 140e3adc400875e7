// The weights of a forward call as a layer keeps them: packed in the call into the order in which the products read
// them, or "direct", read as they lie. packing.h says which. What that order is, Products knows: PlainProducts (tile.h)
// or PairProducts (pairs.h).
#pragma once

#include "packing.h"
#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <class Products, class Storage, int kG, int kBlocks> class CallWeights {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kVectors = kG * kBlocks;
  using Packed = typename Products::Packed;

 public:
  using RowValue = typename Products::RowValue;
  using Scope = typename Products::Scope;
  static constexpr int64_t kWeightBytes = Products::kWeightBytes;
  static constexpr int kRowGroup = Products::kRowGroup;
  static constexpr double kSpeed = Products::kSpeed;
  static constexpr int kStateVectors = 1;  // of a tile of W_hr

  // `shares`: among which a round's tiles are shared out, if there are no groups of rows.
  CallWeights(const ForwardParams& params, int threads, int64_t shares)
      : p_(params),
        threads_(threads),
        tiles_(divide_up(params.hidden_size, kL * kBlocks)),
        direct_hh_(is_direct(use_of(params.hidden_size * kG, params.state_size, params.rows.batch, shares))),
        direct_hr_(params.projected &&
                   is_direct(use_of(params.state_size, params.hidden_size, params.rows.batch, shares))),
        direct_ih_(is_direct(use_of(params.hidden_size * kG, params.input_size, row_count(), shares))) {}

  // Of a direction's weights, before the first step at most.
  int64_t packed_bytes() const {
    const int64_t hh = direct_hh_ ? 0 : product(p_.hidden_size, kG, p_.state_size, kWeightBytes),
                  ih = direct_ih_ ? 0 : product(p_.hidden_size, kG, p_.input_size, kWeightBytes),
                  hr = packs_hr() ? product(p_.state_size, p_.hidden_size, kWeightBytes) : 0;
    return sum(sum(hh, ih), hr);
  }

  // Whether one of `shares` of the packed weights is read again from beyond the cache, and that takes longer than the
  // products do. Where it is so is measured.
  bool share_outgrows_cache(int64_t shares) const {
    return kSpeed > 1 && static_cast<double>(packed_bytes() / shares) > 2 * kL2;
  }

  // Memory for products of at most `step_rows` rows with W_hh and W_hr, and `chunk_rows` with W_ih. `one_chunk`: each
  // tile of W_ih is used once.
  void place(Workspace& workspace, int64_t, int64_t, bool one_chunk) {
    packs_ih_early_ = !direct_ih_ && !one_chunk;
    for (int64_t d = 0; d < p_.directions; ++d) {
      if (!direct_hh_)
        packed_hh_[d] = workspace.template take<Packed>(tiles_, Products::packed_size(kVectors, p_.state_size));
      if (packs_hr())
        packed_hr_[d] =
            workspace.template take<Packed>(divide_up(p_.state_size, kL), Products::packed_size(1, p_.hidden_size));
      if (packs_ih_early_)
        packed_ih_[d] = workspace.template take<Packed>(tiles_, Products::packed_size(kVectors, p_.input_size));
    }
    if (!direct_ih_ && !packs_ih_early_)
      packed_tiles_ = workspace.template take<Packed>(threads_, Products::packed_size(kVectors, p_.input_size));
    input_memory_ = workspace.template take<RowValue>(threads_, Products::input_memory(p_.input_size));
  }

  RNNFAST_INLINE static void keep_awake() { Products::keep_awake(); }
  // Whether rows of an input of so many columns may be multiplied where they lie.
  static bool takes_in_place(int64_t columns) { return Products::takes_in_place(columns); }

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
    Products::template pack_rows<1>(at<Storage>(data_of(Kind::weight_hr, d), unit * stride), stride,
                                    p_.state_size - unit, p_.hidden_size, state_tile(d, tile), 0);
  }

  // Rows of states, and of an input, as the products take them, for the thread that is number `member`. `followed`:
  // by memory to the end of a group of rows.
  Rows<RowValue> rows_of(const Rows<RowValue>& rows, int64_t, int) const { return rows; }
  typename Products::Input input_of(const Rows<RowValue>& rows, int member, bool followed) const {
    return Products::input_of(rows, p_.input_size, followed,
                              input_memory_ + member * Products::input_memory(p_.input_size));
  }

  // use(first row, height, sums), some rows at once: the product with a tile of W_hh, (height, kVectors).
  template <class Use> void multiply_hh(int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use) const {
    const int64_t k = p_.state_size;
    if constexpr (Products::kReadsAsItLies)
      if (direct_hh_)
        return for_some_rows<Value, kVectors>(
            rows.count,
            [&](int64_t first, int height, Value* sums) {
              direct_product(rows.some(first, height), Kind::weight_hh, d, k, tile, sums);
            },
            use);
    Products::template for_rows<kVectors>(rows, packed_tile(packed_hh_[d], tile, k), k, use, no_prefetch);
  }

  // The same of W_hr: (height, kStateVectors).
  template <class Use> void multiply_hr(int64_t d, int64_t tile, const Rows<RowValue>& rows, const Use& use) const {
    const int64_t k = p_.hidden_size, unit = tile * kL;
    if constexpr (Products::kReadsAsItLies)
      if (direct_hr_)
        return for_some_rows<Value, 1>(
            rows.count,
            [&](int64_t first, int height, Value* sums) {
              direct_sums(rows.some(first, height), Kind::weight_hr, d, k, unit, p_.state_size - unit, sums, 1);
            },
            use);
    Products::template for_rows<1>(rows, state_tile(d, tile), k, use, no_prefetch);
  }

  // The product with a tile of W_ih, (rows, kVectors).
  void multiply_ih(int64_t d, int64_t tile, const typename Products::Input& rows, int member, Value* to) const {
    const int64_t k = p_.input_size;
    if constexpr (Products::kReadsAsItLies)
      if (direct_ih_) return direct_product(rows, Kind::weight_ih, d, k, tile, to);
    Packed* const packed =
        packs_ih_early_ ? packed_tile(packed_ih_[d], tile, k) : packed_tile(packed_tiles_, member, k);
    // In the only chunk: what is packed is read again from the nearest cache.
    if (!packs_ih_early_) pack_tile(Kind::weight_ih, d, tile, k, packed);
    Products::template into<kVectors>(rows, packed, k, to);
  }

 private:
  // At most, if sequences have several lengths.
  int64_t row_count() const { return product(p_.rows.steps, p_.rows.batch); }
  WeightUse use_of(int64_t rows, int64_t k, int64_t rows_a_step, int64_t shares) const {
    // Where the share's size matters, with one row a step, there are no groups of rows.
    return {
        row_count(), rows_a_step, k, kL, sizeof(Storage) < sizeof(Compute), product(rows, k, sizeof(Compute)) / shares};
  }
  static bool is_direct(const WeightUse& use) { return Products::kReadsAsItLies && reads_as_it_lies(use); }
  bool packs_hr() const { return p_.projected && !direct_hr_; }

  const void* data_of(Kind kind, int64_t d) const { return p_.parameters[kind].data[d]; }
  int64_t stride_of(Kind kind, int64_t d) const { return p_.parameters[kind].stride[d]; }

  TileSource source_of(int64_t tile, int v) const {
    return source_of_tile<kG, kL * kBlocks, kL>(p_.hidden_size, tile, v);
  }
  static Packed* packed_tile(Packed* packed, int64_t tile, int64_t k_count) {
    return packed + tile * Products::packed_size(kVectors, k_count);
  }
  Packed* state_tile(int64_t d, int64_t tile) const {
    return packed_hr_[d] + tile * Products::packed_size(1, p_.hidden_size);
  }
  void pack_tile(Kind kind, int64_t d, int64_t tile, int64_t k_count, Packed* packed) const {
    const int64_t stride = stride_of(kind, d);
    for (int v = 0; v < kVectors; ++v) {
      const TileSource source = source_of(tile, v);
      Products::template pack_rows<kVectors>(at<Storage>(data_of(kind, d), source.weight_row * stride), stride,
                                             source.units, k_count, packed, v);
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
  Packed* packed_hh_[kMaxDirections]{};
  Packed* packed_hr_[kMaxDirections]{};
  Packed* packed_ih_[kMaxDirections]{};
  Packed* packed_tiles_ = nullptr;    // a tile of each member
  RowValue* input_memory_ = nullptr;  // of each member
};

}  // namespace
}  // namespace rnnfast::cpu

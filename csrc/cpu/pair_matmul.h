// Matrix product of pairs of bfloat16 (pairs.h), for the weight and input gradients; the counterpart of MatmulLoop.
// Operands are packed, a few hundred k at a time, but for rows that are pairs as they lie, and sums of several such
// blocks are kept (product_sums.h).
#pragma once

#include "pairs.h"
#include "product_sums.h"
#include "split.h"
#include "team.h"
#include "workspace.h"

#if defined(__AVX512BF16__)

namespace rnnfast::cpu {
namespace {

template <class Storage> class PairMatmul {
  static constexpr int kL = kLanes<float>;
  static constexpr int kVectors = 4;
  static constexpr int kWidth = kVectors * kL;
  static constexpr int kRows = kPairRows<kVectors>;
  static_assert(kRows % kRowGroup == 0);
  // A tile of rows stays in L1, one of columns in L2. No block of what one can hold: its sums are written once.
  static constexpr int64_t kStepK = 512, kMostInOneBlock = 1024;
  static constexpr int64_t kLongStride = 1024;  // bytes

 public:
  PairMatmul(const MatmulParams& params)
      : p_(params),
        n_tiles_(divide_up(params.n, kWidth)),
        m_tiles_(divide_up(params.m, kRows)),
        step_k_(params.k <= kMostInOneBlock ? params.k : kStepK),
        blocks_(params.k > step_k_ ? divide_up(params.k, step_k_) : 1),
        // One line more keeps rows out of the same cache sets.
        row_stride_(round_up(step_k_, kBlockK) + kBlockK),
        // Rows of bfloat16 in whole blocks are pairs already; if a long power of two does not put them into the same
        // cache sets.
        lying_rows_(std::is_same_v<Storage, BFloat16> && params.a_col == 1 && params.k % kBlockK == 0 &&
                            params.a_row * static_cast<int64_t>(sizeof(BFloat16)) % kLongStride != 0
                        ? params.m / kRows * kRows
                        : 0),
        sums_(params, blocks_) {}

  int64_t run(Team& team) {
    shares_ = shares_for(team.planned());
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    // The packed operands of a block of k are written over those of the last.
    const Stage stage{1, shares_, 2 * blocks_};
    team.run(&stage, 1, [&](const Piece& piece) {
      const int64_t block = piece.round / 2, k = block * step_k_, left = p_.k - k;
      const int64_t k_count = left < step_k_ ? left : step_k_;
      if (piece.round % 2 == 0)
        pack(k, k_count, piece.share);
      else
        multiply(block, k_count, piece.share);
    });
    return 0;
  }

 private:
  void place() {
    packed_b_ = workspace_.template take<char>(n_tiles_, PairProducts::packed_size(kVectors, step_k_));
    packed_a_ = workspace_.template take<BFloat16>(m_tiles_ - lying_rows_ / kRows, kRows, row_stride_);
    sums_.place(workspace_);
  }
  char* tile_of_b(int64_t tile) const { return packed_b_ + tile * PairProducts::packed_size(kVectors, step_k_); }
  BFloat16* packed_row(int64_t row) const { return packed_a_ + (row - lying_rows_) * row_stride_; }

  void pack(int64_t k, int64_t k_count, int64_t share) const {
    const Range columns = share_of(n_tiles_, share, shares_), rows = share_of(m_tiles_, share, shares_);
    for (int64_t tile = columns.first; tile < columns.last; ++tile) {
      const int64_t column = tile * kWidth;
      if (p_.b_col == 1) {
        PairProducts::pack_columns<kVectors>(at<Storage>(p_.b, k * p_.b_row + column), p_.b_row, p_.n - column, k_count,
                                             tile_of_b(tile));
      } else {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t first = column + v * kL, left = p_.n - first;
          PairProducts::pack_rows<kVectors>(at<Storage>(p_.b, k + (left > 0 ? first : 0) * p_.b_col), p_.b_col, left,
                                            k_count, tile_of_b(tile), v);
        }
      }
    }
    if (p_.a_col == 1) {
      for (int64_t row = rows.first * kRows > lying_rows_ ? rows.first * kRows : lying_rows_;
           row < rows.last * kRows && row < p_.m; ++row) {
        const Storage* from = at<Storage>(p_.a, row * p_.a_row + k);
        BFloat16* to = packed_row(row);
        for (int64_t kk = 0; kk < k_count; kk += kBlockK) write_pairs(to + kk, load_pairs(from + kk, k_count - kk));
      }
      return;
    }
    const Range groups = share_of(divide_up(p_.m, kL), share, shares_);
    if (p_.a_row != 1) {
      // Neither rows nor columns are together: seldom, and slow.
      for (int64_t row = groups.first * kL; row < groups.last * kL && row < p_.m; ++row)
        for (int64_t kk = 0; kk < round_up(k_count, kBlockK); ++kk)
          packed_row(row)[kk] = one_value(row, k + kk, kk < k_count);
      return;
    }
    // A few k at a time: one line of memory serves several tiles, and must still be in L1 when the next one wants it.
    for (int64_t kk = 0; kk < k_count; kk += kBlockK)
      for (int64_t row = groups.first * kL; row < groups.last * kL && row < p_.m; row += kL)
        pack_transposed(at<Storage>(p_.a, row + k * p_.a_col), p_.m - row, kk, k_count, packed_row(row) + kk);
  }
  BFloat16 one_value(int64_t row, int64_t k, bool there) const {
    return {there ? bits_of(at<Storage>(p_.a, row * p_.a_row + k * p_.a_col), 1)[0] : uint16_t{0}};
  }
  static void write_pairs(BFloat16* to, Vector<float> pairs) {
    std::memcpy(static_cast<void*>(to), &pairs, sizeof pairs);
  }

  // A block of k, of as many rows as a vector has lanes, or the `rows` that there are: of columns, one after the other.
  void pack_transposed(const Storage* from, int64_t rows, int64_t k, int64_t k_count, BFloat16* to) const {
    Vector<float> block[kPairLines];
#pragma GCC unroll 16
    for (int line = 0; line < kPairLines; ++line)
      block[line] = (Vector<float>)column_pairs(from, p_.a_col, rows, k + 2 * line, k_count);
    transpose_level<1, float>(block);
    for (int64_t r = 0; r < kL && r < rows; ++r) write_pairs(to + r * row_stride_, block[r]);
  }

  void multiply(int64_t block, int64_t k_count, int64_t share) const {
    const typename PairProducts::Scope scope;
    // Some tiles of columns, which L2 holds, for one tile of rows after the other.
    const int64_t fewest = n_tiles_ * m_tiles_ / (4 * shares_), at_once = fewest < 1 ? 1 : fewest < 8 ? fewest : 8;
    const int64_t groups = divide_up(n_tiles_, at_once);
    const Range range = share_of(groups * m_tiles_, share, shares_);
    for (int64_t i = range.first; i < range.last; ++i) {
      const int64_t first = i / m_tiles_ * at_once;
      for (int64_t n_tile = first; n_tile < first + at_once && n_tile < n_tiles_; ++n_tile)
        multiply_tile(block, k_count, n_tile, i % m_tiles_);
    }
  }

  void multiply_tile(int64_t block, int64_t k_count, int64_t n_tile, int64_t m_tile) const {
    const int64_t row = m_tile * kRows, left = p_.m - row;
    const int height = static_cast<int>(left < kRows ? left : kRows);
    alignas(64) Vector<float> sums[kRows * kVectors];
    const bool lies = row < lying_rows_;
    const BFloat16* const rows = lies ? at<BFloat16>(p_.a, row * p_.a_row + block * step_k_) : packed_row(row);
    multiply_pairs<kVectors>(rows, lies ? p_.a_row : row_stride_, height, tile_of_b(n_tile), k_count, sums);
    for (int r = 0; r < height; ++r)
      for (int v = 0; v < kVectors && n_tile * kWidth + v * kL < p_.n; ++v)
        sums_.write(block, row + r, n_tile * kWidth + v * kL, sums[r * kVectors + v]);
  }

  const MatmulParams& p_;
  const int64_t n_tiles_, m_tiles_, step_k_, blocks_, row_stride_;
  const int64_t lying_rows_;  // of a, multiplied where they are
  ProductSums<Storage> sums_;
  int64_t shares_ = 1;
  Workspace workspace_;
  BFloat16* packed_a_ = nullptr;
  char* packed_b_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::cpu

#endif

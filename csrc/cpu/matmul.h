// Matrix product for the weight and input gradients: packed tiles of b (or tiles as they lie, packing.h), rows of a as
// they lie (packed where the packing turns or widens them), k in blocks that keep a tile of b in L2. A round for each
// block's packing and one for its output tiles.
#pragma once

#include "packing.h"
#include "product_sums.h"
#include "team.h"
#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <class Storage> class MatmulLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kVectors = kVectorRegisters == 32 ? 4 : 2;
  static constexpr int kWidth = kVectors * kL;
  static constexpr int kRows = kMaxRows<kVectors>;
  // What is narrower than its sums is always packed, as wide as they are.
  static constexpr bool kWidens = sizeof(Storage) < sizeof(Compute);
  // A block of a (kRows, k) stays in L1, one of b (k, kWidth) in L2. Sums of narrow results take memory of their own
  // between blocks: fewer of these.
  static constexpr int64_t kMostInBlock = (kWidens ? 4096 : 2048) / static_cast<int64_t>(sizeof(Compute));
  static constexpr int64_t kDirectRows = 3, kTilesWorthPacking = 2;

 public:
  MatmulLoop(const MatmulParams& params)
      : p_(params),
        n_tiles_(divide_up(params.n, kWidth)),
        m_tiles_(divide_up(params.m, kRows)),
        blocks_(params.k > kMostInBlock ? divide_up(params.k, kMostInBlock) : 1),
        block_k_(params.k < 1 ? 1 : divide_up(params.k, blocks_)),
        // Few rows and row-major weights: each weight is used a few times, so packing would cost more than the
        // product.
        direct_(params.m <= kDirectRows && params.b_row == 1 && params.a_col == 1 && !kWidens),
        // A transposed operand that few tiles of b use is read across its rows; packing it would take longer.
        first_packed_(params.b_col == 1 && !kWidens &&
                              reads_columns_as_they_lie(m_tiles_, product(block_k_, kWidth, sizeof(Compute)))
                          ? params.n / kWidth
                          : 0),
        pack_a_(kWidens || (params.a_col != 1 && n_tiles_ > kTilesWorthPacking)),
        // Rows stay rows. Others become columns of (k_count, kRows): then the product reads both operands in order.
        packed_a_row_(params.a_col == 1 ? sum(round_up(block_k_, kL), kL) : 1),
        packed_a_k_(params.a_col == 1 ? 1 : kRows),
        sums_(params, blocks_) {}

  int64_t run(Team& team) {
    shares_ = shares_for(team.planned());
    if (direct_) {
      run_direct(team);
      return 0;
    }
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    // The packed operands of a block of k are written over those of the last.
    const Stage stage{1, shares_, 2 * blocks_};
    team.run(&stage, 1, [&](const Piece& piece) {
      const int64_t block = piece.round / 2, k = block * block_k_, k_count = p_.k - k < block_k_ ? p_.k - k : block_k_;
      if (piece.round % 2 == 0)
        pack(k, k_count, piece.share);
      else
        multiply(block, k_count, piece.share);
    });
    return 0;
  }

 private:
  void place() {
    packed_b_ = workspace_.template take<Compute>(n_tiles_ - first_packed_, kWidth, block_k_);
    if (pack_a_) packed_a_ = workspace_.template take<Compute>(m_tiles_, packed_a_size());
    sums_.place(workspace_);
  }

  void pack(int64_t k, int64_t k_count, int64_t share) {
    const Range tiles = share_of(n_tiles_ - first_packed_, share, shares_);
    for (int64_t tile = first_packed_ + tiles.first; tile < first_packed_ + tiles.last; ++tile) {
      Compute* to = packed_tile(tile);
      const int64_t column = tile * kWidth, left = p_.n - column;
      if (p_.b_col == 1) {
        pack_columns(at<Storage>(p_.b, k * p_.b_row + column), p_.b_row, left, k_count, to, kWidth);
      } else {
        for (int v = 0; v < kVectors; ++v) {
          const int64_t rows = left - v * kL;
          pack_rows(at<Storage>(p_.b, k + (rows > 0 ? column + v * kL : 0) * p_.b_col), p_.b_col, rows > 0 ? rows : 0,
                    k_count, to + v * kL, kWidth);
        }
      }
    }
    if (!pack_a_) return;
    const Range rows = share_of(m_tiles_, share, shares_);
    if (p_.a_col == 1) {
      for (int64_t row = rows.first * kRows; row < rows.last * kRows && row < p_.m; ++row) {
        const Storage* from = at<Storage>(p_.a, row * p_.a_row + k);
        Compute* to = packed_rows(row / kRows) + row % kRows * packed_a_row_;
        for (int64_t i = 0; i < k_count; i += kL) store<Compute>(to + i, load<Compute>(from + i, k_count - i));
      }
      return;
    }
    // A few k at a time: one line of memory serves several tiles, and must still be in L1 when the next one wants it.
    constexpr int64_t kTurn = 16;
    for (int64_t kk = 0; kk < k_count; kk += kTurn) {
      const int64_t kk_last = kk + kTurn < k_count ? kk + kTurn : k_count;
      for (int64_t tile = rows.first; tile < rows.last; ++tile) {
        const int64_t height = p_.m - tile * kRows < kRows ? p_.m - tile * kRows : kRows;
        const Storage* from = at<Storage>(p_.a, tile * kRows * p_.a_row + k * p_.a_col);
        Compute* to = packed_rows(tile);
        if (p_.a_row != 1) {
          // Neither rows nor columns are together: seldom, and slow.
          for (int64_t i = kk; i < kk_last; ++i)
            for (int64_t r = 0; r < height; ++r)
              to[i * kRows + r] = load<Compute>(from + r * p_.a_row + i * p_.a_col, 1)[0];
        } else if (!kWidens && height == kRows) {
          for (int64_t i = kk; i < kk_last; ++i)
            std::memcpy(static_cast<void*>(to + i * kRows), from + i * p_.a_col, kRows * sizeof(Compute));
        } else {
          for (int64_t i = kk; i < kk_last; ++i)
            for (int64_t r = 0; r < height; r += kL)
              store<Compute>(to + i * kRows + r, load<Compute>(from + i * p_.a_col + r, height - r), kRows - r);
        }
      }
    }
  }

  Compute* packed_tile(int64_t tile) const { return packed_b_ + (tile - first_packed_) * kWidth * block_k_; }
  int64_t packed_a_size() const { return kRows * (p_.a_col == 1 ? packed_a_row_ : block_k_); }
  Compute* packed_rows(int64_t tile) const { return packed_a_ + tile * packed_a_size(); }
  TileAt<Compute> tile_at(int64_t tile, int64_t k) const {
    if constexpr (!kWidens)
      if (tile < first_packed_) return {at<Storage>(p_.b, k * p_.b_row + tile * kWidth), p_.b_row};
    return packed_at<kVectors>(static_cast<const Compute*>(packed_tile(tile)));
  }

  // One row of accumulators.
  void write(int64_t block, int64_t row, int64_t column, const Value* acc, int vectors) const {
    for (int v = 0; v < vectors && column + v * kL < p_.n; ++v) sums_.write(block, row, column + v * kL, acc[v]);
  }

  void multiply(int64_t block, int64_t k_count, int64_t share) const {
    const int64_t k = block * block_k_;
    const Range range = share_of(n_tiles_ * m_tiles_, share, shares_);
    for (int64_t i = range.first; i < range.last;) {
      const int64_t n_tile = i / m_tiles_, m_first = i % m_tiles_;
      const int64_t m_last = range.last - n_tile * m_tiles_ < m_tiles_ ? range.last - n_tile * m_tiles_ : m_tiles_;
      const TileAt<Compute> b = tile_at(n_tile, k);
      for (int64_t m = m_first; m < m_last; ++m) {
        const int64_t row = m * kRows, height = p_.m - row < kRows ? p_.m - row : kRows;
        const Compute* a = pack_a_ ? packed_rows(m) : static_cast<const Compute*>(p_.a) + row * p_.a_row + k * p_.a_col;
        for_row_tiles<kVectors>(a, pack_a_ ? packed_a_row_ : p_.a_row, pack_a_ ? packed_a_k_ : p_.a_col, height, b,
                                k_count, [&](int64_t first, int rows, const Value* acc) {
                                  for (int r = 0; r < rows; ++r)
                                    write(block, row + first + r, n_tile * kWidth, acc + r * kVectors, kVectors);
                                });
      }
      i = n_tile * m_tiles_ + m_last;
    }
  }

  void run_direct(Team& team) {
    const int64_t blocks = divide_up(p_.n, kL);
    const Stage stage{1, shares_, 1};
    team.run(&stage, 1, [&](const Piece& piece) {
      const Range range = share_of(blocks, piece.share, shares_);
      for (int64_t block = range.first; block < range.last; ++block) {
        if constexpr (!kWidens) {
          Value acc[kDirectRows];
          dot_all_rows(static_cast<const Compute*>(p_.a), p_.a_row, p_.m, at<Storage>(p_.b, block * kL * p_.b_col),
                       p_.b_col, p_.n - block * kL, p_.k, acc, 1);
          for (int64_t m = 0; m < p_.m; ++m) write(0, m, block * kL, acc + m, 1);
        }
      }
    });
  }

  const MatmulParams& p_;
  const int64_t n_tiles_, m_tiles_, blocks_, block_k_;
  const bool direct_;
  const int64_t first_packed_;  // tiles of b before it are read as they lie
  const bool pack_a_;
  const int64_t packed_a_row_, packed_a_k_;
  ProductSums<Storage> sums_;
  int64_t shares_ = 1;
  Workspace workspace_;
  Compute* packed_a_ = nullptr;
  Compute* packed_b_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::cpu

// The products inside the kernels: a few rows times a tile of packed weights, in registers; and the packing.
//
// A tile is `vectors` vectors wide. Packed, its element (k, v, lane) stands at [k][v][lane], so that the loop over k
// reads memory in order.
#pragma once

#include <utility>

#include "vec.h"

namespace rnnfast::cpu {
namespace {

// Where vector `v` of a tile of units comes from: the first of its rows of the weights, and how many of these there
// are. A tile has every gate of a block of units, then every gate of the next block.
struct TileSource {
  int64_t weight_row, units;
};
template <int kGates, int kTileUnits, int kLaneCount>
inline TileSource source_of_tile(int64_t hidden_size, int64_t tile, int v) {
  const int64_t unit = tile * kTileUnits + v / kGates * kLaneCount, left = hidden_size - unit;
  return left > 0 ? TileSource{v % kGates * hidden_size + unit, left} : TileSource{0, 0};
}

// Rows of one register tile: accumulators, one vector of weights for each column and one broadcast must fit the
// registers.
template <int kVectors>
constexpr int kMaxRows = kVectorRegisters == 32 ? (kVectors == 4   ? 6
                                                   : kVectors == 3 ? 8
                                                   : kVectors == 2 ? 12
                                                                   : 12)
                                                : (kVectors == 4   ? 3
                                                   : kVectors == 3 ? 4
                                                   : kVectors == 2 ? 5
                                                                   : 8);
constexpr int kMostRows = 12;

// How many sums along k each result is made of. One product is ready after 4 cycles and two start each cycle: fewer
// than 8 results at once need a split.
template <int kResults> constexpr int kSplitOf = kResults >= 8 ? 1 : kResults >= 4 ? 2 : kResults >= 2 ? 4 : 8;

// Where a product finds a tile: packed, or whole vectors of a row-major matrix as they lie.
template <class Compute> struct TileAt {
  const Compute* data;
  int64_t k_step;  // elements from one k to the next
};
template <int kVectors, class Compute> inline TileAt<Compute> packed_at(const Compute* packed) {
  return {packed, kVectors * kLanes<Compute>};
}

// acc[r][v] = sum over k of a[r * a_row + k * a_k] * tile[k][v]. acc is written, whole, at the end.
template <class Compute, int kRows, int kVectors>
[[gnu::noinline]] void tile_product(const Compute* __restrict a, int64_t a_row, int64_t a_k,
                                    const Compute* __restrict tile, int64_t k_step, int64_t k_count,
                                    Vector<Compute>* __restrict acc) {
  constexpr int kSplit = kSplitOf<kRows * kVectors>;
  Vector<Compute> sum[kSplit][kRows][kVectors] = {};
  int64_t k = 0;
  for (; k + kSplit <= k_count; k += kSplit) {
#pragma GCC unroll 8
    for (int s = 0; s < kSplit; ++s) {
      Vector<Compute> weight[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) weight[v] = load<Compute>(tile + (k + s) * k_step + v * kLanes<Compute>);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Vector<Compute> x = broadcast(a[r * a_row + (k + s) * a_k]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[s][r][v] += x * weight[v];
      }
    }
  }
  for (; k < k_count; ++k) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const Vector<Compute> x = broadcast(a[r * a_row + k * a_k]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[0][r][v] += x * load<Compute>(tile + k * k_step + v * kLanes<Compute>);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector<Compute> total = sum[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < kSplit; ++s) total += sum[s][r][v];
      acc[r * kVectors + v] = total;
    }
}

template <class Compute>
using TileProduct = void (*)(const Compute*, int64_t, int64_t, const Compute*, int64_t, int64_t, Vector<Compute>*);

template <class Compute, int kVectors, int... kRowsMinusOne>
inline TileProduct<Compute> tile_product_for(int rows, std::integer_sequence<int, kRowsMinusOne...>) {
  static constexpr TileProduct<Compute> table[] = {&tile_product<Compute, kRowsMinusOne + 1, kVectors>...};
  return table[rows - 1];
}

// Rows that a product multiplies, `stride` apart.
template <class Compute> struct Rows {
  const Compute* data;
  int64_t stride, count;

  const Compute* at(int64_t row) const { return data + row * stride; }
  Rows some(int64_t first, int64_t number) const { return {at(first), stride, number}; }
};

// Covers `rows` rows with register tiles of at most kMost, as equal in height as they can be: tile(first_row, height).
template <int kMost, class Tile> inline void split_rows(int64_t rows, const Tile& tile) {
  const int64_t tiles = (rows + kMost - 1) / kMost;
  for (int64_t i = 0, first = 0; i < tiles; ++i) {
    const int64_t last = rows * (i + 1) / tiles;
    tile(first, static_cast<int>(last - first));
    first = last;
  }
}

// Some rows at once: product(first_row, height, sums), kVectors vectors a row, then use(first_row, height, sums).
template <class Value, int kVectors, class Product, class Use>
inline void for_some_rows(int64_t rows, const Product& product, const Use& use) {
  Value sums[kMostRows * kVectors];
  split_rows<kMostRows>(rows, [&](int64_t first, int height) {
    product(first, height, sums);
    use(first, height, sums);
  });
}

template <int kVectors, class Compute>
inline void multiply_rows(const Compute* a, int64_t a_row, int64_t a_k, int height, TileAt<Compute> tile,
                          int64_t k_count, Vector<Compute>* acc) {
  tile_product_for<Compute, kVectors>(height, std::make_integer_sequence<int, kMaxRows<kVectors>>{})(
      a, a_row, a_k, tile.data, tile.k_step, k_count, acc);
}

// The product of `rows` rows of a with a tile, register tile by register tile: use(first_row, height, acc).
// Before each product prefetch(first_row, height) may ask for what `use` will read: the product hides the wait.
template <int kVectors, class Compute, class Use, class Prefetch>
inline void for_row_tiles(const Compute* a, int64_t a_row, int64_t a_k, int64_t rows, TileAt<Compute> tile,
                          int64_t k_count, const Use& use, const Prefetch& prefetch) {
  alignas(64) Vector<Compute> acc[kMaxRows<kVectors> * kVectors];
  split_rows<kMaxRows<kVectors>>(rows, [&](int64_t first, int height) {
    prefetch(first, height);
    multiply_rows<kVectors>(a + first * a_row, a_row, a_k, height, tile, k_count, acc);
    use(first, height, acc);
  });
}
inline void no_prefetch(int64_t, int) {}
template <int kVectors, class Compute, class Use>
inline void for_row_tiles(const Compute* a, int64_t a_row, int64_t a_k, int64_t rows, TileAt<Compute> tile,
                          int64_t k_count, const Use& use) {
  for_row_tiles<kVectors>(a, a_row, a_k, rows, tile, k_count, use, no_prefetch);
}

// The same with a packed tile, written to `to`: (rows, kVectors) vectors.
template <int kVectors, class Compute>
inline void product_into(const Compute* a, int64_t a_row, int64_t rows, const Compute* packed, int64_t k_count,
                         Vector<Compute>* to) {
  split_rows<kMaxRows<kVectors>>(rows, [&](int64_t first, int height) {
    multiply_rows<kVectors>(a + first * a_row, a_row, 1, height, packed_at<kVectors>(packed), k_count,
                            to + first * kVectors);
  });
}

// One level of a butterfly between lanes `step` apart, of vectors a and b that are `step` apart: `low` gathers the
// lanes whose number has the step's bit clear.
template <int kStep, bool kLow, class V, int... kLane>
RNNFAST_INLINE V exchange_lanes(V a, V b, std::integer_sequence<int, kLane...>) {
  constexpr int kCount = sizeof...(kLane);
  return __builtin_shufflevector(a, b,
                                 (kLow ? ((kLane & kStep) ? kCount + kLane - kStep : kLane)
                                       : ((kLane & kStep) ? kCount + kLane : kLane + kStep))...);
}

template <int kStep, class Compute> RNNFAST_INLINE void transpose_level(Vector<Compute>* x) {
  constexpr int kCount = kLanes<Compute>;
  using Lanes = std::make_integer_sequence<int, kCount>;
  if constexpr (kStep < kCount) {
#pragma GCC unroll 16
    for (int i = 0; i < kCount; ++i) {
      if (i & kStep) continue;
      const Vector<Compute> a = x[i], b = x[i + kStep];
      x[i] = exchange_lanes<kStep, true>(a, b, Lanes{});
      x[i + kStep] = exchange_lanes<kStep, false>(a, b, Lanes{});
    }
    transpose_level<kStep * 2, Compute>(x);
  }
}

// Lane j of the result is the sum over the lanes of x[j], of as many vectors as a vector has lanes. Of the first half
// of them, level by level: what the last level has still to add, lane j and lane j + kCount / 2.
template <int kStep, int kVectorCount, class Compute> RNNFAST_INLINE Vector<Compute> sum_lanes(Vector<Compute>* x) {
  using Lanes = std::make_integer_sequence<int, kLanes<Compute>>;
#pragma GCC unroll 16
  for (int i = 0; i < kVectorCount; i += 2 * kStep)
    x[i] = exchange_lanes<kStep, true>(x[i], x[i + kStep], Lanes{}) +
           exchange_lanes<kStep, false>(x[i], x[i + kStep], Lanes{});
  if constexpr (kStep * 2 < kVectorCount)
    return sum_lanes<kStep * 2, kVectorCount, Compute>(x);
  else
    return x[0];
}

// Dot products of kRows vectors with as many rows of a row-major matrix as a vector has lanes: lane j of sums[i *
// sums_step] gets the product of x[i * x_stride] and the matrix's row j; rows from `rows` on repeat the last one. No
// packing: for weights that are read as they lie. Each sum is made in the same order for every kRows.
template <int kRows, class Compute, class Storage>
[[gnu::noinline]] void dot_rows(const Compute* x, int64_t x_stride, const Storage* matrix, int64_t stride, int64_t rows,
                                int64_t k_count, Vector<Compute>* sums, int64_t sums_step) {
  constexpr int kCount = kLanes<Compute>;
  // All rows of the matrix at once, or half of them, so that the registers hold the sums.
  constexpr int kParts = kRows == 1 || kRows * kCount <= kVectorRegisters - 4 ? 1 : 2, kPart = kCount / kParts;
  Vector<Compute> part[kParts][kRows];
  for (int p = 0; p < kParts; ++p) {
    const Storage* row[kPart];
#pragma GCC unroll 16
    for (int j = 0; j < kPart; ++j) row[j] = matrix + (p * kPart + j < rows ? p * kPart + j : rows - 1) * stride;
    Vector<Compute> sum[kRows][kPart] = {};
    const auto add = [&](int64_t k, auto... count) {
      Vector<Compute> value[kRows];
#pragma GCC unroll 3
      for (int i = 0; i < kRows; ++i) value[i] = load<Compute>(x + i * x_stride + k, count...);
#pragma GCC unroll 16
      for (int j = 0; j < kPart; ++j) {
        const Vector<Compute> weight = load<Compute>(row[j] + k, count...);
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) sum[i][j] += value[i] * weight;
      }
    };
    int64_t k = 0;
    for (; k + kCount <= k_count; k += kCount) add(k);
    if (k < k_count) add(k, k_count - k);
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) part[p][i] = sum_lanes<1, kPart, Compute>(sum[i]);
  }
#pragma GCC unroll 3
  for (int i = 0; i < kRows; ++i) {
    if constexpr (kParts == 2) {
      using Lanes = std::make_integer_sequence<int, kCount>;
      sums[i * sums_step] = exchange_lanes<kPart, true>(part[0][i], part[1][i], Lanes{}) +
                            exchange_lanes<kPart, false>(part[0][i], part[1][i], Lanes{});
    } else {
      sums[i * sums_step] = part[0][i];
    }
  }
}

// The same for more vectors, so that each weight is read once: kRows with some rows of the matrix at a time, as many as
// give the sums that must be under way at once.
template <int kRows, class Compute, class Storage>
[[gnu::noinline]] void dot_more_rows(const Compute* x, int64_t x_stride, const Storage* matrix, int64_t stride,
                                     int64_t rows, int64_t k_count, Vector<Compute>* sums, int64_t sums_step) {
  constexpr int kCount = kLanes<Compute>, kPart = kVectorRegisters == 32 && kRows <= 5 && kCount >= 4 ? 4 : 2;
  Vector<Compute> part[kRows][kCount];
  for (int j = 0; j < kCount; j += kPart) {
    const Storage* row[kPart];
#pragma GCC unroll 4
    for (int i = 0; i < kPart; ++i) row[i] = matrix + (j + i < rows ? j + i : rows - 1) * stride;
    Vector<Compute> sum[kRows][kPart] = {};
    const auto add = [&](int64_t k, auto... count) {
      Vector<Compute> weight[kPart];
#pragma GCC unroll 4
      for (int i = 0; i < kPart; ++i) weight[i] = load<Compute>(row[i] + k, count...);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector<Compute> value = load<Compute>(x + r * x_stride + k, count...);
#pragma GCC unroll 4
        for (int i = 0; i < kPart; ++i) sum[r][i] += value * weight[i];
      }
    };
    int64_t k = 0;
    for (; k + kCount <= k_count; k += kCount) add(k);
    if (k < k_count) add(k, k_count - k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < kPart; ++i) part[r][j + i] = sum[r][i];
  }
  for (int r = 0; r < kRows; ++r) sums[r * sums_step] = sum_lanes<1, kCount, Compute>(part[r]);
}

// As many as leave registers for the sums.
constexpr int kMostDotRows = kVectorRegisters == 32 ? 8 : 4;

template <class Compute, class Storage, int... kRowsLessFour>
inline void dot_some_rows(int x_rows, const Compute* x, int64_t x_stride, const Storage* matrix, int64_t stride,
                          int64_t rows, int64_t k_count, Vector<Compute>* sums, int64_t sums_step,
                          std::integer_sequence<int, kRowsLessFour...>) {
  static constexpr auto table = {&dot_more_rows<kRowsLessFour + 4, Compute, Storage>...};
  table.begin()[x_rows - 4](x, x_stride, matrix, stride, rows, k_count, sums, sums_step);
}

// Dot products of `x_rows` vectors.
template <class Compute, class Storage>
inline void dot_all_rows(const Compute* x, int64_t x_stride, int64_t x_rows, const Storage* matrix, int64_t stride,
                         int64_t rows, int64_t k_count, Vector<Compute>* sums, int64_t sums_step) {
  if (x_rows >= 4 && (kMostDotRows > 4 || x_rows % 4 == 0))
    return split_rows<kMostDotRows>(x_rows, [&](int64_t first, int height) {
      dot_some_rows(height, x + first * x_stride, x_stride, matrix, stride, rows, k_count, sums + first * sums_step,
                    sums_step, std::make_integer_sequence<int, kMostDotRows - 3>{});
    });
  int64_t i = 0;
  for (; i + 3 <= x_rows; i += 3)
    dot_rows<3>(x + i * x_stride, x_stride, matrix, stride, rows, k_count, sums + i * sums_step, sums_step);
  if (x_rows - i == 2)
    dot_rows<2>(x + i * x_stride, x_stride, matrix, stride, rows, k_count, sums + i * sums_step, sums_step);
  else if (x_rows - i == 1)
    dot_rows<1>(x + i * x_stride, x_stride, matrix, stride, rows, k_count, sums + i * sums_step, sums_step);
}

// Packs `kLanes` rows of a row-major matrix (from `rows` on: zeros) as one vector column of a tile, for k in [0,
// k_count): to[k * width + lane] = matrix[lane * stride + k].
template <class Compute, class Storage>
inline void pack_rows(const Storage* matrix, int64_t stride, int64_t rows, int64_t k_count, Compute* to,
                      int64_t width) {
  constexpr int kCount = kLanes<Compute>;
  for (int64_t k = 0; k < k_count; k += kCount) {
    const int64_t columns = k_count - k < kCount ? k_count - k : kCount;
    Vector<Compute> block[kCount];
#pragma GCC unroll 16
    for (int j = 0; j < kCount; ++j)
      block[j] = j < rows ? load<Compute>(matrix + j * stride + k, columns) : Vector<Compute>{};
    transpose_level<1, Compute>(block);
    for (int64_t i = 0; i < columns; ++i) store<Compute>(to + (k + i) * width, block[i]);
  }
}

// Packs `columns` columns of a row-major matrix (the rest of the tile: zeros): to[k * width + j] = matrix[k * stride +
// j].
template <class Compute, class Storage>
inline void pack_columns(const Storage* matrix, int64_t stride, int64_t columns, int64_t k_count, Compute* to,
                         int64_t width) {
  for (int64_t k = 0; k < k_count; ++k)
    for (int64_t j = 0; j < width; j += kLanes<Compute>) {
      const int64_t left = columns - j;
      store<Compute>(to + k * width + j, left > 0 ? load<Compute>(matrix + k * stride + j, left) : Vector<Compute>{});
    }
}

// Nothing to prepare on a thread. (With a constructor of its own: then no variable of it is unused.)
struct NoScope {
  NoScope() {}
};

// How the loops multiply rows by packed weights; the counterpart of PairProducts (pairs.h), which says more.
template <class Compute> struct PlainProducts {
  using RowValue = Compute;
  using Packed = Compute;
  using Input = Rows<Compute>;
  using Scope = NoScope;
  static constexpr bool kReadsAsItLies = true;
  static constexpr int64_t kWeightBytes = sizeof(Compute);
  static constexpr int kRowGroup = 1;
  static constexpr double kSpeed = 1;  // of the products, those in float32 are 1

  static int64_t packed_size(int vectors, int64_t k_count) { return product(vectors, kLanes<Compute>, k_count); }
  template <int kVectors, class Storage>
  static void pack_rows(const Storage* matrix, int64_t stride, int64_t rows, int64_t k_count, Packed* tile, int v) {
    cpu::pack_rows(matrix, stride, rows, k_count, tile + v * kLanes<Compute>, kVectors * kLanes<Compute>);
  }
  template <int kVectors, class Storage>
  static void pack_columns(const Storage* matrix, int64_t stride, int64_t columns, int64_t k_count, Packed* tile) {
    cpu::pack_columns(matrix, stride, columns, k_count, tile, kVectors * kLanes<Compute>);
  }

  RNNFAST_INLINE static void keep_awake() {}
  static bool takes_in_place(int64_t) { return true; }
  static int64_t input_memory(int64_t) { return 0; }
  static Input input_of(const Rows<RowValue>& rows, int64_t, bool, RowValue*) { return rows; }

  template <int kVectors, class Use, class Prefetch>
  static void for_rows(const Rows<RowValue>& rows, const Packed* tile, int64_t k_count, const Use& use,
                       const Prefetch& prefetch) {
    for_row_tiles<kVectors>(rows.data, rows.stride, 1, rows.count, packed_at<kVectors>(tile), k_count, use, prefetch);
  }
  template <int kVectors>
  static void into(const Input& rows, const Packed* tile, int64_t k_count, Vector<Compute>* to) {
    product_into<kVectors>(rows.data, rows.stride, rows.count, tile, k_count, to);
  }
};

}  // namespace
}  // namespace rnnfast::cpu

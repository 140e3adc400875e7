// Products of bfloat16 with bfloat16, summed in float32, by the instructions that take them in pairs: AMX-BF16 where
// the compiler's target has it, else AVX512-BF16's dot products.
//
// Packed weights are in blocks of 32 k and 16 columns, the same for both: 16 lines of 64 bytes, in each a pair of
// consecutive k of every column; zeros fill the last block up. The blocks of a tile stand at [k / 32][v]: its vectors
// side by side, as the loop over k reads them. Rows are whole blocks wide as well, with zeros at the end.
#pragma once

#include "tile.h"

#if defined(__AVX512BF16__)

namespace rnnfast::cpu {
namespace {

constexpr int kBlockColumns = 16;
constexpr int kPairLines = 16;
constexpr int kBlockK = 2 * kPairLines;
constexpr int kBlockBytes = kPairLines * kVectorBytes;
static_assert(kLanes<float> == kBlockColumns && kLanes<BFloat16> == kBlockK);

// 32 values of a row in bfloat16, zeros from `count` on, as pairs.
template <int... kNumber>
RNNFAST_INLINE Vector<float> joined(HalfBits low, HalfBits high, std::integer_sequence<int, kNumber...>) {
  return (Vector<float>)__builtin_shufflevector(low, high, kNumber...);
}
RNNFAST_INLINE HalfBits bits_of(const float* from, int64_t count) {
  return narrow(load<float>(from, count), BFloat16{});
}
RNNFAST_INLINE HalfBits bits_of(const BFloat16* from, int64_t count) { return load_bits(&from->bits, count); }
template <class Storage> RNNFAST_INLINE Vector<float> load_pairs(const Storage* from, int64_t count) {
  return joined(bits_of(from, count), bits_of(from + kBlockColumns, count - kBlockColumns),
                std::make_integer_sequence<int, kBlockK>{});
}

// Packs `rows` rows of a row-major matrix (the rest of a block: zeros) as the columns of one vector of a tile: its
// blocks are `step` bytes apart.
template <class Storage>
inline void pack_row_pairs(const Storage* matrix, int64_t stride, int64_t rows, int64_t k_count, char* to,
                           int64_t step) {
  for (int64_t k = 0; k < k_count; k += kBlockK, to += step) {
    // Of 32 bits, which stay together: the same turn as of as many float32.
    Vector<float> block[kBlockColumns];
#pragma GCC unroll 16
    for (int j = 0; j < kBlockColumns; ++j)
      block[j] = j < rows ? load_pairs(matrix + j * stride + k, k_count - k) : Vector<float>{};
    transpose_level<1, float>(block);
    std::memcpy(to, block, sizeof block);
  }
}

// The pairs of rows k and k + 1 of a row-major matrix; rows from k_count on and columns from `columns` on are zeros.
template <class Storage>
RNNFAST_INLINE WideBits column_pairs(const Storage* matrix, int64_t stride, int64_t columns, int64_t k,
                                     int64_t k_count) {
  const auto row = [&](int64_t number) __attribute__((always_inline)) {
    return number < k_count ? __builtin_convertvector(bits_of(matrix + number * stride, columns), WideBits)
                            : WideBits{};
  };
  return row(k) | row(k + 1) << 16;
}

// The same of `columns` columns.
template <class Storage>
inline void pack_column_pairs(const Storage* matrix, int64_t stride, int64_t columns, int64_t k_count, char* to,
                              int64_t step) {
  for (int64_t k = 0; k < k_count; k += kBlockK, to += step)
    for (int line = 0; line < kPairLines; ++line) {
      const WideBits pairs = column_pairs(matrix, stride, columns, k + 2 * line, k_count);
      std::memcpy(to + line * kVectorBytes, &pairs, sizeof pairs);
    }
}

inline int64_t blocks_of(int64_t k_count) { return divide_up(k_count, kBlockK); }

#if defined(__AMX_BF16__)

// Rows that a tile register takes: so many must be there to be read, whatever stands in those that do not count.
constexpr int kRowGroup = 16;
constexpr double kPairSpeed = 8;  // PairProducts::kSpeed
// How many at a time: two registers of rows meet each one of weights.
constexpr int kRowsAtOnce = 2 * kRowGroup;

// While there is one this thread's tile registers are 16 lines of 64 bytes, each. It takes some 50 ns.
class PairRegisters {
 public:
  PairRegisters() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t line_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t lines[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~PairRegisters() { asm volatile("tilerelease"); }
  PairRegisters(const PairRegisters&) = delete;
  PairRegisters& operator=(const PairRegisters&) = delete;
};

// The instructions, by number of register: GCC's own take numbers as text only.
template <int kTile> RNNFAST_INLINE void clear_tile() { asm volatile("tilezero %%tmm%c0" : : "i"(kTile)); }
template <int kTile> RNNFAST_INLINE void load_tile(const void* from, int64_t line_bytes) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(line_bytes), "i"(kTile) : "memory");
}
template <int kTile> RNNFAST_INLINE void store_tile(void* to, int64_t line_bytes) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(line_bytes), "i"(kTile) : "memory");
}
template <int kSum, int kRows, int kWeights> RNNFAST_INLINE void add_products() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kRows), "i"(kWeights));
}

// The unit that multiplies tiles goes to sleep after half a microsecond without work, and takes a third of one to wake,
// the longer it slept the more. A product which nobody reads, one a row of other work, keeps it awake.
RNNFAST_INLINE void keep_pairs_awake() { add_products<0, 4, 6>(); }

template <class Use, int... kNumber> RNNFAST_INLINE void each(std::integer_sequence<int, kNumber...>, const Use& use) {
  (use(std::integral_constant<int, kNumber>{}), ...);
}

// kGroups groups of rows times kCount vectors of a tile: sums as lines, `sums_stride` bytes from row to row.
template <int kGroups, int kCount>
[[gnu::noinline]] void multiply_group(const BFloat16* rows, int64_t stride, const char* packed, int64_t step,
                                      int64_t blocks, char* sums, int64_t sums_stride) {
  // Registers 0 to 3 sum, 4 and 5 are rows, 6 and 7 weights.
  static_assert(kGroups * kCount <= 4);
  constexpr auto groups = std::make_integer_sequence<int, kGroups>{};
  constexpr auto vectors = std::make_integer_sequence<int, kCount>{};
  each(std::make_integer_sequence<int, kGroups * kCount>{}, [](auto i) { clear_tile<i>(); });
  for (int64_t block = 0; block < blocks; ++block, rows += kBlockK, packed += step) {
    each(groups, [&](auto group) {
      load_tile<4 + group>(rows + group * kRowGroup * stride, stride * static_cast<int64_t>(sizeof(BFloat16)));
    });
    each(vectors, [&](auto v) {
      load_tile<6 + v % 2>(packed + v * kBlockBytes, kVectorBytes);
      each(groups, [&](auto group) { add_products<group * kCount + v, 4 + group, 6 + v % 2>(); });
    });
  }
  each(groups, [&](auto group) {
    each(vectors, [&](auto v) {
      store_tile<group * kCount + v>(sums + group * kRowGroup * sums_stride + v * kVectorBytes, sums_stride);
    });
  });
}

// At most kRowsAtOnce rows times a whole tile, (height, kVectors) sums. Those of the whole last group are written.
template <int kVectors>
inline void multiply_pairs(const BFloat16* rows, int64_t stride, int height, const char* packed, int64_t k_count,
                           Vector<float>* sums) {
  constexpr int64_t kStep = kVectors * kBlockBytes, kSums = kVectors * kVectorBytes;
  char* const to = reinterpret_cast<char*>(sums);
  const int64_t blocks = blocks_of(k_count);
  if (height <= kRowGroup) return multiply_group<1, kVectors>(rows, stride, packed, kStep, blocks, to, kSums);
  constexpr int kFirst = kVectors < 2 ? kVectors : 2;
  multiply_group<2, kFirst>(rows, stride, packed, kStep, blocks, to, kSums);
  if constexpr (kVectors > kFirst)
    multiply_group<2, kVectors - kFirst>(rows, stride, packed + kFirst * kBlockBytes, kStep, blocks,
                                         to + kFirst * kVectorBytes, kSums);
}

// Covers rows with what a product takes at once: tile(first_row, height). All but the last are whole groups.
template <int, class Tile> inline void split_pair_rows(int64_t rows, const Tile& tile) {
  for (int64_t first = 0; first < rows; first += kRowsAtOnce)
    tile(first, static_cast<int>(rows - first < kRowsAtOnce ? rows - first : kRowsAtOnce));
}
template <int> constexpr int kPairRows = kRowsAtOnce;

#else

constexpr int kRowGroup = 1;
constexpr double kPairSpeed = 1;  // 0.5 where it was measured, on a core that has AMX as well

using PairRegisters = NoScope;
RNNFAST_INLINE void keep_pairs_awake() {}

template <int kRows, int kVectors>
[[gnu::noinline]] void pair_product(const BFloat16* rows, int64_t stride, const char* packed, int64_t blocks,
                                    Vector<float>* sums) {
  constexpr int kSplit = kSplitOf<kRows * kVectors>;
  Vector<float> sum[kSplit][kRows][kVectors] = {};
  for (int64_t block = 0; block < blocks; ++block, rows += kBlockK, packed += kVectors * kBlockBytes)
    for (int first = 0; first < kPairLines; first += kSplit)
#pragma GCC unroll 8
      for (int s = 0; s < kSplit; ++s) {
        const int line = first + s;
        __m512bh weight[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v)
          weight[v] = (__m512bh)_mm512_load_si512(packed + v * kBlockBytes + line * kVectorBytes);
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          int32_t pair;
          std::memcpy(&pair, rows + r * stride + 2 * line, sizeof pair);
          const __m512bh x = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) sum[s][r][v] = _mm512_dpbf16_ps(sum[s][r][v], x, weight[v]);
        }
      }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Vector<float> total = sum[0][r][v];
#pragma GCC unroll 8
      for (int s = 1; s < kSplit; ++s) total += sum[s][r][v];
      sums[r * kVectors + v] = total;
    }
}

template <int kVectors, int... kRowsMinusOne>
inline void pair_product_of(int height, std::integer_sequence<int, kRowsMinusOne...>, const BFloat16* rows,
                            int64_t stride, const char* packed, int64_t blocks, Vector<float>* sums) {
  using Product = void (*)(const BFloat16*, int64_t, const char*, int64_t, Vector<float>*);
  static constexpr Product table[] = {&pair_product<kRowsMinusOne + 1, kVectors>...};
  table[height - 1](rows, stride, packed, blocks, sums);
}

template <int kVectors> constexpr int kPairRows = kMaxRows<kVectors>;

template <int kVectors>
inline void multiply_pairs(const BFloat16* rows, int64_t stride, int height, const char* packed, int64_t k_count,
                           Vector<float>* sums) {
  pair_product_of<kVectors>(height, std::make_integer_sequence<int, kPairRows<kVectors>>{}, rows, stride, packed,
                            blocks_of(k_count), sums);
}

template <int kVectors, class Tile> inline void split_pair_rows(int64_t rows, const Tile& tile) {
  split_rows<kPairRows<kVectors>>(rows, tile);
}

#endif

// How the loops multiply rows in bfloat16 by packed weights: the counterpart of PlainProducts (tile.h).
struct PairProducts {
  using RowValue = BFloat16;  // of rows
  using Packed = char;        // of weights: a tile of them is what pack_rows or pack_columns make
  using Scope = PairRegisters;
  static constexpr bool kReadsAsItLies = false;
  static constexpr int64_t kWeightBytes = sizeof(BFloat16);
  static constexpr int kRowGroup = cpu::kRowGroup;
  static constexpr double kSpeed = kPairSpeed;

  static int64_t packed_size(int vectors, int64_t k_count) { return product(vectors, blocks_of(k_count), kBlockBytes); }
  // One vector of a tile, from rows of a matrix.
  template <int kVectors, class Storage>
  static void pack_rows(const Storage* matrix, int64_t stride, int64_t rows, int64_t k_count, Packed* tile, int v) {
    pack_row_pairs(matrix, stride, rows, k_count, tile + v * kBlockBytes, kVectors * kBlockBytes);
  }
  // A tile, from columns of a matrix.
  template <int kVectors, class Storage>
  static void pack_columns(const Storage* matrix, int64_t stride, int64_t columns, int64_t k_count, Packed* tile) {
    for (int v = 0; v < kVectors; ++v)
      pack_column_pairs(matrix + v * kBlockColumns, stride, columns - v * kBlockColumns, k_count,
                        tile + v * kBlockBytes, kVectors * kBlockBytes);
  }

  // To be called after each row of other work, while there is a Scope.
  RNNFAST_INLINE static void keep_awake() { keep_pairs_awake(); }

  // Rows of an input. Where they are not followed by memory up to the end of a group, the last group is a copy.
  struct Input {
    Rows<RowValue> whole, last;
  };
  // Whether rows of so many columns may be taken as they lie.
  static bool takes_in_place(int64_t columns) { return columns > 0 && columns % kBlockK == 0; }
  // Operands that `input_of` may want of a thread's memory.
  static int64_t input_memory(int64_t columns) { return product(kRowGroup, columns); }
  static Input input_of(const Rows<RowValue>& rows, int64_t columns, bool followed, RowValue* memory) {
    const int64_t left = rows.count % kRowGroup, whole = rows.count - left;
    if (followed || left == 0) return {rows, {rows.data, rows.stride, 0}};
    for (int64_t r = 0; r < left; ++r)
      std::memcpy(memory + r * columns, rows.at(whole + r), columns * sizeof(RowValue));
    return {rows.some(0, whole), {memory, columns, left}};
  }

  // The product of rows with a packed tile, some rows at a time: use(first_row, height, sums), kVectors sums a row.
  // Before each product prefetch(first_row, height), as in for_row_tiles. Rows are followed by memory.
  template <int kVectors, class Use, class Prefetch>
  static void for_rows(const Rows<RowValue>& rows, const Packed* tile, int64_t k_count, const Use& use,
                       const Prefetch& prefetch) {
    alignas(64) Vector<float> sums[kPairRows<kVectors> * kVectors];
    split_pair_rows<kVectors>(rows.count, [&](int64_t first, int height) {
      prefetch(first, height);
      multiply_pairs<kVectors>(rows.at(first), rows.stride, height, tile, k_count, sums);
      use(first, height, sums);
    });
  }
  // The same, written to `to`: (rows, kVectors) vectors.
  template <int kVectors> static void into(const Input& rows, const Packed* tile, int64_t k_count, Vector<float>* to) {
    const auto copy = [&](const Rows<RowValue>& some, Vector<float>* there) {
      const auto use = [&](int64_t first, int height, const Vector<float>* sums) {
        std::memcpy(static_cast<void*>(there + first * kVectors), sums, height * kVectors * sizeof *sums);
      };
      for_rows<kVectors>(some, tile, k_count, use, no_prefetch);
    };
    copy(rows.whole, to);
    copy(rows.last, to + rows.whole.count * kVectors);
  }
};

}  // namespace
}  // namespace rnnfast::cpu

#endif

// The products of rows with panels (panels.h) of weights, in registers.
//
// PanelProduct<type> has
//   Operands                                rows as the product takes them;
//   operands(rows, columns, memory)         makes them; int8: in operand_bytes(rows, columns) of memory;
//   some(operands, first, count)            a part of them;
//   multiply<kPanels>(operands, panels...)  them times some panels, at most kMostPanels.
// float32 and bfloat16 are multiplied in float32. int8 weights meet rows that are rounded to 16 bits, with a scale for
// each row, and their products are summed in 32-bit integers: exact, and many at once. A row with a NaN or an infinity
// in it has a NaN for its scale.
#pragma once

#include "panels.h"
#include "sizes.h"
#include "tile.h"

namespace rnnfast::cpu {
namespace {

using Float = Vector<float>;
using Int = BitsVector<float>;

constexpr int kLineVectors = kLineBytes / kVectorBytes;

// Where the sums of a row and a panel go: vector `v` of the panel's to at(row, panel)[v * vector].
struct Sums {
  Float* data;
  int64_t row, panel, vector;  // from one to the next

  Float* at(int64_t r, int p) const { return data + r * row + p * panel; }
  Sums behind(int64_t rows, int panels) const { return {at(rows, panels), row, panel, vector}; }
};

// Some panels that follow each other.
struct Panels {
  const char* data;
  int64_t bytes;  // of each

  const char* line(int panel, int64_t number) const { return data + panel * bytes + number * kLineBytes; }
  Panels behind(int64_t panels) const { return {data + panels * bytes, bytes}; }
};

template <class V> RNNFAST_INLINE V load_vector(const void* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// Calls function(std::integral_constant of the height), of 1 to kMost.
template <int kMost, class Function> RNNFAST_INLINE void with_height(int height, const Function& function) {
  if constexpr (kMost > 1)
    if (height < kMost) return with_height<kMost - 1>(height, function);
  function(std::integral_constant<int, kMost>{});
}

// As split_rows, of heights that are known: tile(first_row, std::integral_constant).
template <int kMost, class Tile> inline void split_rows_by_known(int64_t rows, const Tile& tile) {
  split_rows<kMost>(
      rows, [&](int64_t first, int height) { with_height<kMost>(height, [&](auto known) { tile(first, known); }); });
}

template <PanelType kType> struct PanelProduct {
  using Operands = Rows<float>;
  static constexpr int kWords = weights_in_word(kType);
  static constexpr int kMostPanels = kLineVectors >= 4 ? 1 : 4 / kLineVectors;

  static Operands operands(const Rows<float>& rows, int64_t, void*) { return rows; }
  static Operands some(const Operands& rows, int64_t first, int64_t count) { return rows.some(first, count); }

  template <int kPanels> static void multiply(const Operands& x, const Panels& panels, int64_t columns, Sums sums) {
    split_rows_by_known<kMaxRows<kPanels * kLineVectors>>(x.count, [&](int64_t first, auto height) {
      tile<decltype(height)::value, kPanels>(x.at(first), x.stride, panels, columns, sums.behind(first, 0));
    });
  }

 private:
  // The weight `j` of every word.
  RNNFAST_INLINE static Float weight(Int words, int j) {
    if constexpr (kWords == 1) return (Float)words;
    return (Float)(j == 0 ? words << 16 : words & static_cast<int32_t>(0xffff0000));
  }

  template <int kRows, int kPanels>
  [[gnu::noinline]] static void tile(const float* x, int64_t x_stride, Panels panels, int64_t columns, Sums sums) {
    constexpr int kSplit = kSplitOf<kRows * kPanels * kLineVectors>, kLines = kSplit > kWords ? kSplit / kWords : 1;
    Float sum[kSplit][kRows][kPanels][kLineVectors] = {};
    // Weight j of the words of a line, in the sums that are number s.
    const auto add = [&](int64_t line, int j, int s) __attribute__((always_inline)) {
      Float w[kPanels][kLineVectors];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < kLineVectors; ++v)
          w[p][v] = weight(load_vector<Int>(panels.line(p, line) + v * kVectorBytes), j);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Float value = broadcast(x[r * x_stride + line * kWords + j]);
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
          for (int v = 0; v < kLineVectors; ++v) sum[s][r][p][v] += value * w[p][v];
      }
    };
    const int64_t whole = columns / kWords;
    int64_t line = 0;
    for (; line + kLines <= whole; line += kLines)
#pragma GCC unroll 8
      for (int i = 0; i < kLines; ++i)
#pragma GCC unroll 2
        for (int j = 0; j < kWords; ++j) add(line + i, j, (i * kWords + j) % kSplit);
    for (; line < whole; ++line)
#pragma GCC unroll 2
      for (int j = 0; j < kWords; ++j) add(line, j, j % kSplit);
    if (whole * kWords < columns) add(line, 0, 0);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < kLineVectors; ++v) {
          Float total = sum[0][r][p][v];
#pragma GCC unroll 8
          for (int s = 1; s < kSplit; ++s) total += sum[s][r][p][v];
          sums.at(r, p)[v * sums.vector] = total;
        }
  }
};

// Rows in 16 bits. With AVX512-VNNI, which multiplies unsigned bytes by signed ones: 32768 more than the value, as its
// high bytes and then its low ones; else the signed values.
struct ShortRows {
  const char* data;
  int64_t stride;  // in bytes
  const float* scales;
  int64_t count;
};

constexpr float kMostShort = 32767;

#if defined(__AVX512VNNI__)
constexpr bool kByBytes = true;
#else
constexpr bool kByBytes = false;
#endif

template <int kStep = 1> RNNFAST_INLINE Float most_of_lanes(Float value) {
  if constexpr (kStep < kLanes<float>) {
    using Lanes = std::make_integer_sequence<int, kLanes<float>>;
    const Float a = exchange_lanes<kStep, true>(value, value, Lanes{}),
                b = exchange_lanes<kStep, false>(value, value, Lanes{});
    return most_of_lanes<kStep * 2>(a < b ? b : a);
  } else {
    return value;
  }
}

// A row in 16 bits, `padded` values wide; its scale.
inline float shorten(const float* x, int64_t columns, int64_t padded, char* to) {
  constexpr int kL = kLanes<float>;
  const Int sign_bit = (Int)broadcast(-0.0f);
  Float most{}, unusable{};  // a NaN where one of the values, or an infinity, stands
  for (int64_t k = 0; k < columns; k += kL) {
    const Float value = load<float>(x + k, columns - k), magnitude = (Float)((Int)value & ~sign_bit);
    most = most < magnitude ? magnitude : most;
    unusable += value * 0.0f;
  }
  const float largest = most_of_lanes(most)[0];
  float scale = largest / kMostShort;
  for (int i = 0; i < kL; ++i) scale += unusable[i];
  // Of zero and of subnormal numbers there is no reciprocal: such rows count as zeros.
  const float inverse = scale >= 0x1p-126f ? 1 / scale : 0.0f;
  constexpr float kMagic = 0x1.8p23f;  // rounds to an integer, which then stands in the low mantissa bits
  for (int64_t k = 0; k < padded; k += kL) {
    const Float value = load<float>(x + k, columns - k);
    const Int rounded = (Int)(value * inverse + kMagic) - (Int)broadcast(kMagic);
    if constexpr (kByBytes) {
      typedef uint8_t Bytes __attribute__((vector_size(kL)));
      const Int digits = rounded + 32768;
      const Bytes high = __builtin_convertvector(digits >> 8, Bytes), low = __builtin_convertvector(digits, Bytes);
      std::memcpy(to + k, &high, sizeof high);
      std::memcpy(to + padded + k, &low, sizeof low);
    } else {
      typedef int16_t Shorts __attribute__((vector_size(2 * kL)));
      const Shorts shorts = __builtin_convertvector(rounded, Shorts);
      std::memcpy(to + 2 * k, &shorts, sizeof shorts);
    }
  }
  return scale;
}

// The lanes' sums of the products of two pairs of 16 bits: lane i is a[2i] b[2i] + a[2i + 1] b[2i + 1].
typedef int16_t Shorts __attribute__((vector_size(kVectorBytes)));
RNNFAST_INLINE Int multiply_pairs(Shorts a, Shorts b) {
#if defined(__AVX512F__)
  return (Int)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (Int)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  // Also where the baseline of x86-64 has an instruction, so that what other processors run is tested.
  const Int a_low = (Int)a << 16 >> 16, b_low = (Int)b << 16 >> 16;
  return a_low * b_low + ((Int)a >> 16) * ((Int)b >> 16);
#endif
}

template <> struct PanelProduct<PanelType::int8> {
  using Operands = ShortRows;
  static constexpr int kMostPanels = kLineVectors == 1 ? 4 : 1;
  static constexpr int kL = kLanes<float>;

  static int64_t padded(int64_t columns) { return round_up(columns, kLineBytes); }
  // Of memory for `rows` operands.
  static int64_t operand_bytes(int64_t rows, int64_t columns) {
    return sum(product(rows, padded(columns), 2), round_up(product(rows, sizeof(float)), kLineBytes));
  }
  static Operands operands(const Rows<float>& rows, int64_t columns, void* memory) {
    const int64_t stride = padded(columns) * 2;
    char* const data = static_cast<char*>(memory);
    float* const scales = reinterpret_cast<float*>(data + rows.count * stride);
    for (int64_t r = 0; r < rows.count; ++r)
      scales[r] = shorten(rows.at(r), columns, padded(columns), data + r * stride);
    return {data, stride, scales, rows.count};
  }
  static Operands some(const Operands& rows, int64_t first, int64_t count) {
    return {rows.data + first * rows.stride, rows.stride, rows.scales + first, count};
  }

  template <int kPanels> static void multiply(const Operands& x, const Panels& panels, int64_t columns, Sums sums) {
    split_rows_by_known<kMost<kPanels>>(x.count, [&](int64_t first, auto height) {
      constexpr int kRows = decltype(height)::value;
      tile<kRows, kPanels>(some(x, first, kRows), panels, columns, sums.behind(first, 0));
    });
  }

 private:
  static int64_t lines_of(int64_t columns) { return word_lines(PanelType::int8, columns); }

#if defined(__AVX512VNNI__)
  // Two sums for each row and panel.
  template <int kPanels> static constexpr int kMost = 12 / kPanels;

  template <int kRows, int kPanels>
  [[gnu::noinline]] static void tile(ShortRows x, Panels panels, int64_t columns, Sums sums) {
    constexpr int kSplit = kSplitOf<kRows * kPanels * 2>;
    const int64_t lines = lines_of(columns), low_bytes = padded(columns);
    __m512i high[kSplit][kRows][kPanels] = {}, low[kSplit][kRows][kPanels] = {};
    const auto add = [&](int64_t line, int s) __attribute__((always_inline)) {
      __m512i w[kPanels];
#pragma GCC unroll 4
      for (int p = 0; p < kPanels; ++p) w[p] = load_vector<__m512i>(panels.line(p, line));
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const char* const word = x.data + r * x.stride + line * 4;
        const __m512i x_high = _mm512_set1_epi32(load_vector<int32_t>(word)),
                      x_low = _mm512_set1_epi32(load_vector<int32_t>(word + low_bytes));
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p) {
          high[s][r][p] = _mm512_dpbusd_epi32(high[s][r][p], x_high, w[p]);
          low[s][r][p] = _mm512_dpbusd_epi32(low[s][r][p], x_low, w[p]);
        }
      }
    };
    int64_t line = 0;
    for (; line + kSplit <= lines; line += kSplit)
#pragma GCC unroll 8
      for (int s = 0; s < kSplit; ++s) add(line + s, s);
    for (; line < lines; ++line) add(line, 0);
#pragma GCC unroll 4
    for (int p = 0; p < kPanels; ++p) {
      const Float scale = load_vector<Float>(panels.line(p, lines));
      // The high bytes are 128 too much.
      const Int beyond = load_vector<Int>(panels.line(p, lines + 1)) << 7;
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        Int h = (Int)high[0][r][p], l = (Int)low[0][r][p];
#pragma GCC unroll 8
        for (int s = 1; s < kSplit; ++s) {
          h += (Int)high[s][r][p];
          l += (Int)low[s][r][p];
        }
        const Float total = __builtin_convertvector(h - beyond, Float) * 256.0f + __builtin_convertvector(l, Float);
        // One scale after the other: their product may be infinite where the sum is not.
        *sums.at(r, p) = total * scale * x.scales[r];
      }
    }
  }
#else
  // A line is widened to vectors of 16 bits, twice as many; each has its own sum.
  static constexpr int kPieces = 2 * kLineVectors;
  template <int kPanels> static constexpr int kFit = (kVectorRegisters - 4) / (kPieces * kPanels);
  template <int kPanels>
  static constexpr int kMost = kFit<kPanels> < 1           ? 1
                               : kFit<kPanels> > kMostRows ? kMostRows
                                                           : kFit<kPanels>;

  template <int kRows, int kPanels>
  [[gnu::noinline]] static void tile(ShortRows x, Panels panels, int64_t columns, Sums sums) {
    typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 2)));
    constexpr int64_t kBlockLines = 128;  // 512 * 32767 * 127 < 2^31
    const int64_t lines = lines_of(columns);
    Float total[kRows][kPanels][kLineVectors] = {};
    for (int64_t first = 0; first < lines; first += kBlockLines) {
      const int64_t last = first + kBlockLines < lines ? first + kBlockLines : lines;
      Int sum[kRows][kPanels][kPieces] = {};
      for (int64_t line = first; line < last; ++line) {
        Shorts word[kRows];
#pragma GCC unroll 12
        for (int r = 0; r < kRows; ++r) {
          typedef int64_t Words __attribute__((vector_size(kVectorBytes)));
          word[r] = (Shorts)(load_vector<int64_t>(x.data + r * x.stride + line * 8) - Words{});
        }
#pragma GCC unroll 4
        for (int p = 0; p < kPanels; ++p)
#pragma GCC unroll 8
          for (int i = 0; i < kPieces; ++i) {
            const Shorts w = __builtin_convertvector(
                load_vector<Bytes>(panels.line(p, line) + i * static_cast<int>(sizeof(Bytes))), Shorts);
#pragma GCC unroll 12
            for (int r = 0; r < kRows; ++r) sum[r][p][i] += multiply_pairs(word[r], w);
          }
      }
      for (int r = 0; r < kRows; ++r)
        for (int p = 0; p < kPanels; ++p)
          for (int v = 0; v < kLineVectors; ++v)
            total[r][p][v] += __builtin_convertvector(
                sums_of_pairs(sum[r][p][2 * v], sum[r][p][2 * v + 1], std::make_integer_sequence<int, kL>{}), Float);
    }
    for (int p = 0; p < kPanels; ++p)
      for (int v = 0; v < kLineVectors; ++v) {
        const Float scale = load_vector<Float>(panels.line(p, lines) + v * kVectorBytes);
        for (int r = 0; r < kRows; ++r) sums.at(r, p)[v * sums.vector] = total[r][p][v] * scale * x.scales[r];
      }
  }
  // Of two vectors, each pair of neighbours.
  template <int... kLane> RNNFAST_INLINE static Int sums_of_pairs(Int a, Int b, std::integer_sequence<int, kLane...>) {
    return __builtin_shufflevector(a, b, (2 * kLane)...) + __builtin_shufflevector(a, b, (2 * kLane + 1)...);
  }
#endif
};

}  // namespace
}  // namespace rnnfast::cpu

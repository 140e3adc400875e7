// Weights packed once, before any call, in "panels": the format, which is the same for every instruction set.
// rnnfast/quantization.py makes them.
//
// A panel has 16 rows of a matrix: those of one gate and 16 units. They stand in lines of 64 bytes, in each a word of
// four bytes of every row: one float32, two bfloat16 or four int8, the lowest k first; zeros fill the last one up.
// Behind the words of int8 follow a line of float32, the value of a weight of 1 in each row, and a line of int32, the
// sum of each row's weights. W_ih and W_hh: the panels of the first 16 units, gate by gate, then those of the next;
// rows beyond H are zeros. W_hr: 16 units of P after the other.
#pragma once

#include <cstdint>

namespace rnnfast::cpu {

enum class PanelType { float32, bfloat16, int8 };

constexpr int kPanelRows = 16;
constexpr int kLineBytes = 64;

// Sums of products with int8 fit 32 bits up to here: 255 * 127 * 65536 < 2^31.
constexpr int64_t kMostInt8Columns = 65536;

namespace {

constexpr int weights_in_word(PanelType type) {
  return type == PanelType::float32 ? 1 : type == PanelType::bfloat16 ? 2 : 4;
}
// Of words.
constexpr int64_t word_lines(PanelType type, int64_t columns) {
  const int words = weights_in_word(type);
  return columns / words + (columns % words != 0);
}
constexpr int64_t panel_lines(PanelType type, int64_t columns) {
  return word_lines(type, columns) + (type == PanelType::int8 ? 2 : 0);
}

}  // namespace
}  // namespace rnnfast::cpu

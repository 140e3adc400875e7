// Which weights of a call are packed into the order in which the products read them, and which are read as they lie: in
// a forward call row by row, each a dot product (`dot_rows`), whose lanes are summed at the end.
//
// Packing takes about as long as it saves in K / 8 rows of input, for rows of K weights, where each such product has to
// sum its lanes; and memory to write to and to read again. So few rows of input are multiplied by the weights as they
// lie. With one row a step long rows of weights are read as they lie by any number of steps: to read them takes longer
// than to sum the lanes. Not so from the cache where each vector of a ragged row crosses two of its lines, or where
// 16-bit weights have to be widened. The bounds are measured (docs/performance.md).
#pragma once

#include "split.h"

namespace rnnfast::cpu {
namespace {

// One matrix of weights as its product sees it.
struct WeightUse {
  int64_t rows;         // by which it is multiplied, in the whole call
  int64_t rows_a_step;  // of these, at once
  int64_t k;            // weights in a row of the matrix
  int64_t lanes;        // of a vector
  bool narrow;          // 16-bit weights: each use widens them once more
  int64_t share_bytes;  // of what one thread would have packed of it
};

inline bool reads_as_it_lies(const WeightUse& use) {
  constexpr int64_t kLongRow = 192, kMostAtOnce = 24, kMostInSteps = 40;
  const bool ragged = use.k % use.lanes != 0;  // its rows do not begin where cache lines do
  const bool beyond_cache = static_cast<double>(use.share_bytes) > kL2 * (use.narrow ? 3 : 2);
  if (use.rows_a_step == 1 && (beyond_cache || (!use.narrow && !ragged)) && use.k >= kLongRow) return true;
  const int64_t least = use.narrow ? 4 : 8, rows = use.k / (use.narrow ? 32 : 8),
                most = ragged || use.rows_a_step == use.rows ? kMostAtOnce : kMostInSteps;
  return use.rows < (rows < least ? least : rows > most ? most : rows);
}

// Columns of a matrix are multiplied as they lie without sums over lanes: only their order in memory is worse. That is
// worth packing where they are read often, or soon from beyond the cache. The bounds are measured.
//   passes: how often each weight is read, some rows at once; bytes: of what is read again and again.
inline bool reads_columns_as_they_lie(int64_t passes, int64_t bytes) {
  constexpr int64_t kMost = 11, kMostBeyondCache = 2;
  return passes <= (static_cast<double>(bytes) > 2 * kL2 ? kMostBeyondCache : kMost);
}

}  // namespace
}  // namespace rnnfast::cpu

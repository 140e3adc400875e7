// The product of a block: kWeightTiles * 16 weights with kBatchTiles * 8 states. A weight is a row of a weight matrix,
// a state that of one batch index; both are vectors, contiguous along the sum. The warps share out the sum, so that no
// two need the same bytes and none waits for another: each has a ring of chunks in shared memory, filled kDepth chunks
// ahead with cp.async. Weights do not depend on the step before: the first chunks of them travel while that step still
// runs. Partial sums meet in shared memory at the end.
//
// What a copy takes decides how fast a warp can ask for data: vectors of whole words of 16 bytes have a loop of their
// own, in which a copy is an instruction and the step of its pointer.
#pragma once

#include "arithmetic.cuh"
#include "primitives/async_copy.h"
#include "primitives/execution.h"
#include "primitives/memory.h"
#include "primitives/mma.h"
#include "primitives/shared.h"

namespace rnnfast::gpu {

// Legal: 16 and 8 alone, what one mma.sync m16n8 multiplies. Lanes find their rows as lane / 4 + 8 i: two groups of
// eight for the weights, one for the states.
constexpr int kTileWeights = 16, kTileBatch = 8;
static_assert(kTileWeights == 16 && kTileBatch == 8, "kTileWeights must be 16 and kTileBatch 8: mma.sync is m16n8");

// Legal: kWeightTiles and kBatchTiles from 1 on, of the latter as many as registers allow (arithmetic.cuh); kWarps 1
// to 32.
template <class Type, int kWeightTiles_, int kBatchTiles_, int kWarps_> class BlockProduct {
  using Storage = typename Type::Storage;
  using Compute = typename Type::Compute;
  static_assert(kWeightTiles_ >= 1 && kBatchTiles_ >= 1, "kWeightTiles and kBatchTiles must be at least 1");
  static_assert(kWarps_ >= 1 && kWarps_ * kWarpSize <= 1024,
                "kWarps must be 1 to 32: a block has at most 1024 threads");
  static_assert(Type::kTensorCores ? std::is_same_v<Compute, float> : sizeof(Storage) >= 4,
                "kTensorCores must be true for 16-bit types, which multiply_scalars() cannot unpack, and false for "
                "float64, for which mma.h has no product");
  static constexpr int kVector = 16 / static_cast<int>(sizeof(Storage));  // elements in 16 bytes
  // Along the sum. Legal: 4 * kVector alone. Four lanes load 16 bytes each of a vector, side by side; eight vectors a
  // warp at once.
  static constexpr int kChunk = 4 * kVector;
  static_assert(kChunk == static_cast<int>(kWarpSize) / 8 * kVector,
                "kChunk must be 4 * kVector: of the 32 lanes, four load 16 bytes each of one of eight vectors");
  static constexpr int kLaneWeights = 2 * kWeightTiles_, kLaneStates = kBatchTiles_;  // 16-byte words a lane loads
  static constexpr int kChunkWords = (kLaneWeights + kLaneStates) * 32;
  static_assert(8 * kLaneWeights == kWeightTiles_ * kTileWeights && 8 * kLaneStates == kBatchTiles_ * kTileBatch,
                "kLaneWeights and kLaneStates must be 2 and 1 a tile: each covers eight of its vectors");
  static_assert(kChunkWords == (kLaneWeights + kLaneStates) * static_cast<int>(kWarpSize) && sizeof(Word16) == 16,
                "kChunkWords must be a word of 16 bytes for each lane and vector it loads");

 public:
  static constexpr int kWeightTiles = kWeightTiles_, kBatchTiles = kBatchTiles_, kWarps = kWarps_;
  static constexpr int kWeights = kWeightTiles * kTileWeights, kBatch = kBatchTiles * kTileBatch;
  static constexpr int kThreads = kWarps * static_cast<int>(kWarpSize);

 private:
  // In shared memory a column of kWeights results, plus 4 so that a warp's stores fall into different banks. Legal:
  // from kWeights on; another remainder of 32 costs bank conflicts.
  static constexpr int kColumn = kWeights + 4;
  static_assert(kColumn >= kWeights, "kColumn must be at least kWeights: a column holds that many results");
  static constexpr int kPartialBytes = static_cast<int>(sizeof(Compute)) * kWarps * kBatch * kColumn;
  // Every card since sm_80 grants a block 99 KB; two such blocks fit on a Hopper SM, one of them of the next step.
  // Legal: up to that; the less, the fewer chunks are under way.
  static constexpr int kBudget = 96 << 10, kRingBytes = kWarps * kChunkWords * 16;
  static_assert(kBudget <= 99 << 10, "kBudget must be at most 99 KB: no more is granted on 8.6, 8.9 and 12.0");
  // Chunks of the ring. Legal: from 2 on, one to multiply while another travels.
  static constexpr int kMostDepth = 6;
  static constexpr int kAffordable = (kBudget - kPartialBytes) / kRingBytes;
  static constexpr int kDepth = kAffordable < kMostDepth ? kAffordable : kMostDepth;
  static_assert(kMostDepth >= 2, "kMostDepth must be at least 2: one chunk is multiplied while another travels");
  static_assert(kAffordable >= 2, "too large a tile for shared memory: fewer kWarps, kBatchTiles or kWeightTiles");

 public:
  static constexpr size_t kSharedBytes = kPartialBytes + kDepth * kRingBytes;

  // weight(i): of i < kWeights; state(n): of n < kBatch. All must be readable for `length` elements; those that do not
  // count may point anywhere, since no result depends on another's vector. aligned: all start at multiples of 16 bytes.
  template <class Weight, class State>
  RNNFAST_DEVICE BlockProduct(int64_t length, bool aligned, const Weight& weight, const State& state)
      : whole_words_(aligned && length % kVector == 0),
        ring_(reinterpret_cast<Word16*>(shared_memory()) + warp() * (kDepth * kChunkWords) + lane()) {
    const int64_t all_chunks = (length + kChunk - 1) / kChunk, share = (all_chunks + kWarps - 1) / kWarps;
    const int64_t begin = warp() * share, end = begin + share < all_chunks ? begin + share : all_chunks;
    const int64_t first = begin * kChunk + (lane() % 4) * kVector;
    chunks_ = end > begin ? static_cast<int>(end - begin) : 0;
    left_ = static_cast<int>(length - first);
    RNNFAST_UNROLL
    for (int i = 0; i < kLaneWeights; ++i) weights_[i] = weight(static_cast<int>(lane() / 4) + 8 * i) + first;
    RNNFAST_UNROLL
    for (int j = 0; j < kLaneStates; ++j) states_[j] = state(static_cast<int>(lane() / 4) + 8 * j) + first;
    if (whole_words_)
      fetch_first_weights<true>();
    else
      fetch_first_weights<false>();
  }

  // Once the states can be read: the first chunks of them.
  RNNFAST_DEVICE void fetch_first_states() {
    if (whole_words_)
      fetch_first_states<true>();
    else
      fetch_first_states<false>();
  }

  // After fetch_first_states(). Ends with every warp's partial sums in shared memory, and needs a block barrier.
  RNNFAST_DEVICE void run() {
    if (whole_words_)
      multiply_chunks<true>();
    else
      multiply_chunks<false>();
    Compute* partial = partials() + warp() * (kBatch * kColumn);
    RNNFAST_UNROLL
    for (int i = 0; i < kLaneWeights; ++i) {
      RNNFAST_UNROLL
      for (int j = 0; j < kBatchTiles * 2; ++j) partial[result_batch(j) * kColumn + lane() / 4 + 8 * i] = result(i, j);
    }
  }

  // Where run() is left out: what was fetched must not arrive when the block, and with it its shared memory, is gone.
  RNNFAST_DEVICE void abandon(RNNFAST_SITE_ALONE) {
    cp_async_commit();
    cp_async_wait<0>(RNNFAST_PASS_SITE_ALONE);
  }

  // After a block barrier: the product of weight i and state n, the warps' sums added in a fixed order.
  RNNFAST_DEVICE static Compute at(int i, int n) {
    const Compute* partial = partials() + n * kColumn + i;
    Compute sum = partial[0];
    RNNFAST_UNROLL
    for (int w = 1; w < kWarps; ++w) sum += partial[w * (kBatch * kColumn)];
    return sum;
  }

 private:
  RNNFAST_DEVICE static Compute* partials() {
    return reinterpret_cast<Compute*>(reinterpret_cast<char*>(shared_memory()) + kDepth * kRingBytes);
  }

  // A slot holds words [group of 8 vectors][lane]: lane l fetches words of vector l / 4 of each group, its quarter l %
  // 4 of the chunk. On tensor cores it is also the one to use them: the instruction's fragments want other elements of
  // the sum in each lane, but the order along the sum is free as long as both operands keep to it.
  template <bool kWholeWords> RNNFAST_DEVICE void fetch_weights(int c, Word16* slot) {
    fetch<kWholeWords>(c, slot, weights_);
  }
  template <bool kWholeWords> RNNFAST_DEVICE void fetch_states(int c, Word16* slot) {
    fetch<kWholeWords>(c, slot + kLaneWeights * 32, states_);
  }
  template <bool kWholeWords> RNNFAST_DEVICE void fetch_first_weights() {
    for (int c = 0; c < kDepth && c < chunks_; ++c) fetch_weights<kWholeWords>(c, ring_ + c * kChunkWords);
  }
  template <bool kWholeWords> RNNFAST_DEVICE void fetch_first_states() {
    for (int c = 0; c < kDepth; ++c) {
      if (c < chunks_) fetch_states<kWholeWords>(c, ring_ + c * kChunkWords);
      cp_async_commit();
    }
  }
  template <bool kWholeWords> RNNFAST_DEVICE void multiply_chunks() {
    Word16 *slot = ring_, *const end = ring_ + kDepth * kChunkWords;
    for (int c = 0; c < chunks_; ++c) {
      cp_async_wait<kDepth - 1>();                     // chunk c is there, as far as this lane fetched it
      if constexpr (!Type::kTensorCores) sync_warp();  // and as far as the others did
      multiply(slot);
      if constexpr (!Type::kTensorCores) sync_warp();  // nobody reads this slot any more
      if (c + kDepth < chunks_) {
        fetch_weights<kWholeWords>(c + kDepth, slot);
        fetch_states<kWholeWords>(c + kDepth, slot);
      }
      cp_async_commit();
      slot += kChunkWords;
      if (slot == end) slot = ring_;
    }
  }
  // The lane's words of chunk c, to which `vectors` point; then to those of the next.
  template <bool kWholeWords, int kCount>
  RNNFAST_DEVICE void fetch(int c, Word16* to, const Storage* (&vectors)[kCount]) const {
    const int left = left_ - c * kChunk;
    RNNFAST_UNROLL
    for (int i = 0; i < kCount; ++i) {
      if constexpr (kWholeWords)
        cp_async<16>(to + i * 32, vectors[i], left > 0);
      else
        fetch_elements(to + i * 32, vectors[i], left);
      vectors[i] += kChunk;
    }
  }
  // Of a vector that starts anywhere: element by element, zeros behind the end. Two bytes are less than cp.async takes.
  RNNFAST_DEVICE static void fetch_elements(Word16* to, const Storage* vector, int left) {
    if constexpr (sizeof(Storage) == 2) {
      Storage values[kVector];
      RNNFAST_UNROLL
      for (int v = 0; v < kVector; ++v) values[v] = v < left ? vector[v] : convert<Storage>(0.0f);
      Word16 word;
      RNNFAST_UNROLL
      for (int i = 0; i < 4; ++i) word.x[i] = pack(values[2 * i], values[2 * i + 1]);
      *to = word;
    } else {
      RNNFAST_UNROLL
      for (int v = 0; v < kVector; ++v)
        cp_async<sizeof(Storage)>(reinterpret_cast<Storage*>(to) + v, vector + v, v < left);
    }
  }

  RNNFAST_DEVICE void multiply(const Word16* slot) {
    if constexpr (Type::kTensorCores)
      multiply_tiles(slot, slot + kLaneWeights * 32);
    else
      multiply_scalars(slot - lane(), slot - lane() + kLaneWeights * 32);
  }

  // Each half of a lane's 16 bytes feeds one instruction.
  RNNFAST_DEVICE void multiply_tiles(const Word16* weights, const Word16* states) {
    Word16 b[kBatchTiles];
    RNNFAST_UNROLL
    for (int j = 0; j < kBatchTiles; ++j) b[j] = as_operand(states[j * 32]);
    RNNFAST_UNROLL
    for (int i = 0; i < kWeightTiles; ++i) {
      const Word16 upper = as_operand(weights[2 * i * 32]), lower = as_operand(weights[(2 * i + 1) * 32]);
      RNNFAST_UNROLL
      for (int half = 0; half < 4; half += 2) {
        const uint32_t a[4] = {upper.x[half], lower.x[half], upper.x[half + 1], lower.x[half + 1]};
        RNNFAST_UNROLL
        for (int j = 0; j < kBatchTiles; ++j) {
          const uint32_t b_half[2] = {b[j].x[half], b[j].x[half + 1]};
          if constexpr (sizeof(Storage) == 2)
            mma_m16n8k16<Storage>(sums_[i][j], a, b_half);
          else
            mma_m16n8k8_tf32(sums_[i][j], a, b_half);
        }
      }
    }
  }
  RNNFAST_DEVICE static Word16 as_operand(Word16 word) {
    if constexpr (sizeof(Storage) == 4) {
      RNNFAST_UNROLL
      for (int i = 0; i < 4; ++i) word.x[i] = to_tf32(float_of(word.x[i]));
    }
    return word;
  }

  // A lane takes weights lane / 4 + 8 i and states lane % 4 + 4 j, a quarter of the chunk at a time.
  RNNFAST_DEVICE void multiply_scalars(const Word16* weights, const Word16* states) {
    for (int quarter = 0; quarter < 4; ++quarter) {
      Word16 b[2 * kBatchTiles];
      RNNFAST_UNROLL
      for (int j = 0; j < 2 * kBatchTiles; ++j) {
        const int n = scalar_state(j);
        b[j] = states[n / 8 * 32 + n % 8 * 4 + quarter];
      }
      RNNFAST_UNROLL
      for (int i = 0; i < kLaneWeights; ++i) {
        const Word16 a = weights[i * 32 + lane() / 4 * 4 + quarter];
        RNNFAST_UNROLL
        for (int j = 0; j < 2 * kBatchTiles; ++j) {
          RNNFAST_UNROLL
          for (int v = 0; v < kVector; ++v) sums_[i][j] = std::fma(element(a, v), element(b[j], v), sums_[i][j]);
        }
      }
    }
  }
  RNNFAST_DEVICE static int scalar_state(int j) { return static_cast<int>(lane() % 4) + 4 * j; }
  RNNFAST_DEVICE static Compute element(const Word16& word, int v) {
    if constexpr (sizeof(Storage) == 4)
      return float_of(word.x[v]);
    else
      return double_of(static_cast<uint64_t>(word.x[2 * v]) | static_cast<uint64_t>(word.x[2 * v + 1]) << 32);
  }

  // This lane's result j of its weight lane / 4 + 8 i, and which state that belongs to.
  RNNFAST_DEVICE Compute result(int i, int j) const {
    if constexpr (Type::kTensorCores)
      return sums_[i / 2][j / 2][i % 2 * 2 + j % 2];
    else
      return sums_[i][j];
  }
  RNNFAST_DEVICE static int result_batch(int j) {
    return Type::kTensorCores ? static_cast<int>(lane() % 4) * 2 + j % 2 + j / 2 * 8 : scalar_state(j);
  }

  // mma accumulators of each tile, or one sum for each of the lane's weights and states.
  using TileSums = Compute[kWeightTiles][kBatchTiles][4];
  using ScalarSums = Compute[kLaneWeights][2 * kBatchTiles];

  const bool whole_words_;  // every vector is a number of words of 16 bytes
  Word16* const ring_;
  const Storage* weights_[kLaneWeights];
  const Storage* states_[kLaneStates];
  int chunks_;  // of this warp
  int left_;    // elements from this lane's first one to the vectors' end
  std::conditional_t<Type::kTensorCores, TileSums, ScalarSums> sums_ = {};
};

}  // namespace rnnfast::gpu

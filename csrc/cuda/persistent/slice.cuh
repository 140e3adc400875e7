// A block's slice of W_hh on chip, and the product with it: ProductShape says which warp has which rows and which part
// of the sum. The weights that do not fit registers lie in shared memory, as the lanes will read them: 16 bytes each.
#pragma once

#include "../arithmetic.cuh"
#include "../primitives/execution.h"
#include "../primitives/memory.h"
#include "../primitives/mma.h"
#include "persistent.h"

namespace rnnfast::gpu {

// How a value lies among the operands of a product: as stored, or rounded to TF32 where that is what is multiplied.
template <class Type> RNNFAST_DEVICE typename Type::Storage operand_of(typename Type::Storage value) {
  if constexpr (std::is_same_v<Type, Tf32>)
    return float_of(to_tf32(value));
  else
    return value;
}

// sums (16x8) += a (16 weights) b (8 states), a step of the sum. Float32: each factor as two TF32 numbers, whose three
// larger products are summed: as precise as float32, but infinities become NaN.
template <class Type>
RNNFAST_DEVICE void multiply_step(float (&sums)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (sizeof(typename Type::Storage) == 2) {
    mma_m16n8k16<typename Type::Storage>(sums, a, b);
  } else if constexpr (std::is_same_v<Type, Tf32>) {
    mma_m16n8k8_tf32(sums, a, b);
  } else {
    uint32_t a_high[4], a_low[4], b_high[2], b_low[2];
    const auto split = [](uint32_t bits, uint32_t& high, uint32_t& low) {
      high = to_tf32(float_of(bits));
      low = to_tf32(float_of(bits) - float_of(high));
    };
    RNNFAST_UNROLL
    for (int i = 0; i < 4; ++i) split(a[i], a_high[i], a_low[i]);
    RNNFAST_UNROLL
    for (int i = 0; i < 2; ++i) split(b[i], b_high[i], b_low[i]);
    mma_m16n8k8_tf32(sums, a_low, b_high);
    mma_m16n8k8_tf32(sums, a_high, b_low);
    mma_m16n8k8_tf32(sums, a_high, b_high);
  }
}

template <class Type, Exchange kExchange, int kBatchTiles, bool kBackward> class Slice {
  using Storage = typename Type::Storage;
  static constexpr int kBytes = static_cast<int>(sizeof(Storage));
  static constexpr int kStep = kChunkBytes / 2 / kBytes;  // elements of the sum that one instruction takes
  static constexpr InRegisters kHeld = in_registers(kExchange, Type::kArithmetic, kBatchTiles, kBackward);

 public:
  // Each product waits for the one before it that adds to the same sums: with few tiles, two sets of sums in turn.
  struct Sums {
    static constexpr int kSets = kBatchTiles == 1 ? 2 : 1;
    float at[kSets][kRowTiles][kBatchTiles][4] = {};
  };

  // Ends with a block barrier; until then shared memory behind the barriers of the exchange belongs to it.
  // weights.word<kBackward>(row, k): the lane's part of the fragment that begins there.
  template <class Weights>
  RNNFAST_DEVICE Slice(const PersistentShape& shape, std::byte* shared, const Weights& weights)
      : product_(shape.product) {
    const ProductShape& p = product_;
    const int warp_index = uniform(static_cast<int>(warp()));
    row_warp_ = warp_index % p.row_warps;
    sum_warp_ = warp_index / p.row_warps;
    works_ = sum_warp_ < p.sum_warps;
    first_chunk_ = sum_warp_ * p.warp_chunks;
    own_chunks_ = smaller(p.warp_chunks, p.chunks - first_chunk_);

    const int staged = p.registers.passes * p.registers.chunks * kChunkFragments;
    auto* stage = reinterpret_cast<Word16*>(shared + shape.map.operands) + (warp_index * staged * 32 + lane());
    if (works_) fill(stage, 0, p.registers.passes, 0, p.registers.chunks, weights);
    RNNFAST_UNROLL
    for (int pass = 0; pass < kHeld.passes; ++pass) {
      RNNFAST_UNROLL
      for (int chunk = 0; chunk < kHeld.chunks; ++chunk) {
        const bool used = works_ && pass < p.registers.passes && chunk < p.registers.chunks;
        const Word16* from = stage + (pass * p.registers.chunks + chunk) * (kChunkFragments * 32);
        RNNFAST_UNROLL
        for (int f = 0; f < kChunkFragments; ++f) {
          const Word16 word = used ? from[f * 32] : Word16{};
          RNNFAST_UNROLL
          for (int i = 0; i < 4; ++i) held_[pass][chunk][f][i] = word.x[i];
        }
      }
    }
    sync_threads();  // every warp has its registers before what comes next overwrites the stage
    auto* kept = reinterpret_cast<Word16*>(shared + shape.map.weights) + (warp_index * p.kept * 32 + lane());
    kept_ = kept;
    if (!works_) return;
    kept = fill(kept, 0, p.registers.passes, p.registers.chunks, p.warp_chunks, weights);
    fill(kept, p.registers.passes, p.passes, 0, p.warp_chunks, weights);
  }

  RNNFAST_DEVICE int sum_warp() const { return sum_warp_; }

  // operands: row n at n * stride. emit(tile, sums of its rows [batch tile][4]) for each tile of the warp, as mma lays
  // them out.
  template <class Emit> RNNFAST_DEVICE void multiply(const std::byte* operands, int stride, const Emit& emit) const {
    if (!works_) return;
    // Of a chunk: lanes 8 m to 8 m + 7 name the rows of its words m.
    operands += (lane() % 8) * stride + first_chunk_ * kChunkBytes + lane() / 8 * 16;
    const Word16* kept = kept_;
    RNNFAST_UNROLL
    for (int pass = 0; pass < kHeld.passes; ++pass) {
      if (pass >= product_.passes) break;
      const bool full = is_full(pass);
      Sums sums;
      RNNFAST_UNROLL
      for (int chunk = 0; chunk < kHeld.chunks; ++chunk)
        if (chunk < own_chunks_) add_chunk(sums, held_[pass][chunk], operands, stride, chunk, full);
      add_kept(sums, kept, kHeld.chunks, operands, stride, full);
      kept += (product_.warp_chunks - product_.registers.chunks) * (kChunkFragments * 32);
      hand_out(pass, sums, emit);
    }
    for (int pass = kHeld.passes; pass < product_.passes; ++pass) {
      Sums sums;
      add_kept(sums, kept, 0, operands, stride, is_full(pass));
      kept += product_.warp_chunks * (kChunkFragments * 32);
      hand_out(pass, sums, emit);
    }
  }

 private:
  RNNFAST_DEVICE int tile_of(int pass, int i) const { return (pass * kRowTiles + i) * product_.row_warps + row_warp_; }

  // Whether a pass of this warp has all its tiles; else it has the first one or none.
  RNNFAST_DEVICE bool is_full(int pass) const { return tile_of(pass, kRowTiles - 1) < product_.tiles; }

  // This lane's words of the fragments of some passes and chunks, in the order in which they are used.
  template <class Weights>
  RNNFAST_DEVICE Word16* fill(Word16* to, int pass, int end_pass, int first_chunk, int end_chunk,
                              const Weights& weights) const {
    for (; pass < end_pass; ++pass) {
      for (int i = 0; i < kRowTiles; ++i) {
        const int tile = tile_of(pass, i);
        const int end = tile < product_.tiles ? smaller(end_chunk, own_chunks_) : 0;
        // Loads of a few steps are under way at once.
        RNNFAST_UNROLL_BY(4)
        for (int step = 2 * first_chunk; step < 2 * end_chunk; ++step) {
          Word16 word{};
          if (step < 2 * end) {
            word = weights.template word<kBackward>(tile * 16, (2 * first_chunk_ + step) * kStep);
            if constexpr (kBytes == 4) {
              RNNFAST_UNROLL
              for (uint32_t& bits : word.x) bits = bits_of(operand_of<Type>(float_of(bits)));
            }
          }
          to[((step - 2 * first_chunk) * kRowTiles + i) * 32] = word;
        }
      }
      to += (end_chunk - first_chunk) * (kChunkFragments * 32);
    }
    return to;
  }

  RNNFAST_DEVICE void add_kept(Sums& sums, const Word16* kept, int first, const std::byte* operands, int stride,
                               bool full) const {
    for (int chunk = first; chunk < own_chunks_; ++chunk, kept += kChunkFragments * 32) {
      uint32_t weights[kChunkFragments][4];
      RNNFAST_UNROLL
      for (int f = 0; f < kChunkFragments; ++f) {
        const Word16 word = kept[f * 32];
        RNNFAST_UNROLL
        for (int i = 0; i < 4; ++i) weights[f][i] = word.x[i];
      }
      add_chunk(sums, weights, operands, stride, chunk, full);
    }
  }

  RNNFAST_DEVICE static void add_chunk(Sums& sums, const uint32_t (&weights)[kChunkFragments][4],
                                       const std::byte* operands, int stride, int chunk, bool full) {
    RNNFAST_UNROLL
    for (int j = 0; j < kBatchTiles; ++j) {
      uint32_t b[4];
      ldmatrix_x4(b, operands + j * kBatchTile * stride + chunk * kChunkBytes);
      RNNFAST_UNROLL
      for (int step = 0; step < 2; ++step) {
        const uint32_t b_step[2] = {b[2 * step], b[2 * step + 1]};
        RNNFAST_UNROLL
        for (int i = 0; i < kRowTiles; ++i)
          if (i == 0 || full)
            multiply_step<Type>(sums.at[step % Sums::kSets][i][j], weights[step * kRowTiles + i], b_step);
      }
    }
  }

  template <class Emit> RNNFAST_DEVICE void hand_out(int pass, Sums& sums, const Emit& emit) const {
    if constexpr (Sums::kSets == 2) {
      RNNFAST_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        RNNFAST_UNROLL
        for (int k = 0; k < 4; ++k) sums.at[0][i][0][k] += sums.at[1][i][0][k];
      }
    }
    RNNFAST_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      const int tile = tile_of(pass, i);
      if (tile < product_.tiles) emit(tile, sums.at[0][i]);
    }
  }

  const ProductShape& product_;  // the kernel's argument: constant memory
  int row_warp_, sum_warp_, first_chunk_, own_chunks_;
  bool works_;
  const Word16* kept_;
  uint32_t held_[kHeld.passes][kHeld.chunks][kChunkFragments][4];
};

}  // namespace rnnfast::gpu

// One launch for all steps: what these kernels are given, how a launch is laid out, and the table of instances. Plain
// host code, no torch, no CUDA.
//
// A group of blocks owns some batch indices of one direction for the whole sequence. Each block owns some hidden units,
// with all their gates, and keeps its slice of W_hh on chip: in registers first, then in shared memory. Every step it
// multiplies and applies the cell; what differs is how the blocks of a group hand on what the next step multiplies
// (exchange/).
#pragma once

#include <string>

#include "../instances.h"
#include "../rows.h"
#include "../tensors.h"

namespace rnnfast::gpu {

// block: a group is one block, any architecture. cluster: a group is a cluster, sm_90 and later. grid: all blocks of
// a launch run at the same time, and what they hand on goes through L2.
enum class Exchange { block, cluster, grid };
constexpr const char* name_of(Exchange exchange) {
  return exchange == Exchange::block ? "block" : exchange == Exchange::cluster ? "cluster" : "grid";
}

// ---- how a launch is laid out ---------------------------------------------------------------------------------------

// Units come in octets: the 16 rows of a tensor-core tile are two octets of weight rows, each eight units of one gate.
constexpr int kOctet = 8;
// Batch indices of a tile.
constexpr int kBatchTile = 8;
// Tiles of 16 rows that a warp multiplies with at once: an operand read from shared memory serves that many.
constexpr int kRowTiles = 2;
// The sum is cut in chunks of 64 bytes: two tensor-core steps, one ldmatrix a batch tile.
constexpr int kChunkBytes = 64;
// Tensor-core operands (512 bytes of weights) of a chunk.
constexpr int kChunkFragments = 2 * kRowTiles, kFragmentBytes = 512;
constexpr int kMostWarps = 8;
// Cells, a unit of a batch index each, that a thread may own: their state is in its registers.
constexpr int kMostCells = 4;
// Tiles that a group may have: 1, 2 or 4. Of a single block 4 would leave too few units to a thread's cells.
constexpr int most_batch_tiles(Exchange exchange) { return exchange == Exchange::block ? 2 : 4; }
constexpr int kMostCluster = 16;

// What other values would do, and nothing else notices.
static_assert(kOctet == 8 && kBatchTile == 8, "kOctet and kBatchTile must be 8: mma multiplies 16 rows by 8 columns");
static_assert(kRowTiles == 2, "kRowTiles must be 2: a warp has both tiles of a pass, or the first one alone");
static_assert(kChunkBytes == 64, "kChunkBytes must be 64: two steps of mma, whose states one ldmatrix reads");
static_assert(kChunkFragments == 2 * kRowTiles && kFragmentBytes == 32 * 16,
              "kChunkFragments must be two a row tile, kFragmentBytes a word of 16 bytes for each lane");
static_assert(kMostWarps >= 6 && kMostWarps <= 8,
              "kMostWarps must be 6 to 8: plan.h tries 6 beside it, and a thread of more has no 255 registers");
static_assert(kMostCells >= 1 && kOctet * kBatchTile * most_batch_tiles(Exchange::grid) <= kMostCells * kMostWarps * 32,
              "kMostCells must be at least 1, and enough for the cells of an octet");
constexpr bool is_batch_tiles(int tiles) { return tiles == 1 || tiles == 2 || tiles == 4; }
static_assert(is_batch_tiles(most_batch_tiles(Exchange::block)) &&
                  is_batch_tiles(most_batch_tiles(Exchange::cluster)) &&
                  is_batch_tiles(most_batch_tiles(Exchange::grid)),
              "most_batch_tiles must be 1, 2 or 4: there are no other instances");
static_assert(kMostCluster >= 2 && kMostCluster <= 16, "kMostCluster must be 2 to 16: no card has larger ones");

// What a plan chooses (plan.h).
struct PersistentLayout {
  Exchange exchange{};
  int group = 1;        // blocks
  int units = kOctet;   // a block's, a multiple of 8; group * units >= H
  int batch_tiles = 1;  // of 8 batch indices, a group's: 1, 2 or 4
  int warps = kMostWarps;
  bool barrier = false;  // grid: flags and a second trip for the data, in place of data that carries its own tag
  int launch_tiles = 0;  // groups of a direction in one launch, the others follow in launches of their own; 0: all
};
constexpr const char* name_of(const PersistentLayout& layout) {
  return layout.exchange == Exchange::grid && layout.barrier ? "grid-barrier" : name_of(layout.exchange);
}

// Passes and chunks whose weights are in registers, of each warp: as many as fit beside the rest without spills
// (tests/test_cuda_build.py). A fragment of a lane takes 4 registers.
struct InRegisters {
  int passes, chunks;
};
constexpr InRegisters in_registers(Exchange exchange, Arithmetic arithmetic, int batch_tiles, bool backward) {
  // Strict float32 splits each operand in two as it comes; of many tiles there are many sums.
  const bool strict = arithmetic == Arithmetic::float32, many = batch_tiles > 2;
  // A single block has many rows and a short sum.
  if (!backward && exchange == Exchange::block) return {2, strict ? 3 : 4};
  if (!backward) return {1, strict ? 6 : many ? 7 : 8};
  // Of a grid each block has few gates, and rows of all units; of the others the gates make a long sum.
  const int most = 7 - strict - many;
  return exchange == Exchange::grid ? InRegisters{most, 1} : InRegisters{1, most};
}

// Registers that a thread's held weights take, and the sums that it adds to.
constexpr int held_registers(InRegisters held) { return held.passes * held.chunks * kChunkFragments * 4; }
constexpr int sum_registers(int batch_tiles) { return (batch_tiles == 1 ? 2 : 1) * kRowTiles * batch_tiles * 4; }

constexpr bool registers_suffice() {
  for (const Exchange exchange : {Exchange::block, Exchange::cluster, Exchange::grid}) {
    for (int tiles = 1; tiles <= most_batch_tiles(exchange); tiles *= 2) {
      for (const Arithmetic arithmetic : {Arithmetic::float32, Arithmetic::tf32, Arithmetic::bfloat16}) {
        for (const bool backward : {false, true}) {
          const InRegisters held = in_registers(exchange, arithmetic, tiles, backward);
          if (held.passes < 1 || held.chunks < 1 || held_registers(held) + sum_registers(tiles) > 255) return false;
        }
      }
    }
  }
  return true;
}
static_assert(registers_suffice(), "in_registers must be 1 or more, and with the sums at most 255 registers");

// How the warps of a block share its product: rows in tiles of 16, the sum in chunks. Forward, rows are the block's
// gates and the sum goes over all units; backward, rows are all units and the sum goes over the block's gates.
struct ProductShape {
  int tiles = 0, chunks = 0;
  int row_warps = 1, sum_warps = 1;  // warp w: rows w % row_warps, part w / row_warps of the sum; others have none
  int passes = 1;                    // of kRowTiles tiles, until all rows are done
  int warp_chunks = 0;               // of each part of the sum, the last may have fewer
  InRegisters registers{};           // those of the instance that are used
  int kept = 0;                      // fragments a warp keeps in shared memory
};

RNNFAST_HOST_DEVICE constexpr int divide_up(int a, int b) { return (a + b - 1) / b; }
RNNFAST_HOST_DEVICE constexpr int smaller(int a, int b) { return a < b ? a : b; }

constexpr ProductShape product_shape(int octets, int sum_bytes, int warps, bool splits_sum, InRegisters registers) {
  ProductShape shape;
  shape.tiles = divide_up(octets, 2);
  shape.chunks = divide_up(sum_bytes, kChunkBytes);
  // Rows alone, and every warp reads all states; the sum alone, and there are as many partial sums as warps.
  shape.row_warps = smaller(warps, splits_sum ? divide_up(shape.tiles, kRowTiles) : shape.tiles);
  shape.sum_warps = splits_sum ? smaller(warps / shape.row_warps, shape.chunks) : 1;
  shape.passes = divide_up(shape.tiles, shape.row_warps * kRowTiles);
  shape.warp_chunks = divide_up(shape.chunks, shape.sum_warps);
  shape.registers = {smaller(registers.passes, shape.passes), smaller(registers.chunks, shape.warp_chunks)};
  const int all = shape.passes * shape.warp_chunks;
  shape.kept = (all - shape.registers.passes * shape.registers.chunks) * kChunkFragments;
  return shape;
}

// Bytes of a block's shared memory, and where its parts begin; before them lie the exchange's mbarriers.
struct SharedMap {
  int operands = 0;  // what the product multiplies: [buffer][batch index][chunks * 64 + 16]
  int operand_stride = 0, operand_bytes = 0;
  int sums = 0;  // forward: partial sums [part of the sum][batch index][rows + 4]; backward: what was received
  int sum_column = 0;
  int weights = 0;  // fragments [warp][fragment][lane]
  int bytes = 0;
};

// Backward, a unit's sums of all batch indices: 4 more, for aligned words and other banks.
RNNFAST_HOST_DEVICE constexpr int sum_row(int batch) { return batch + 4; }
static_assert(sum_row(kBatchTile) >= kBatchTile && sum_row(kBatchTile) % 4 == 0,
              "sum_row must be at least the batch, and whole words of 16 bytes");
// Backward through the grid, parts of the sources that threads add up apart.
constexpr int kSourceParts = 8;
static_assert(kSourceParts >= 1, "kSourceParts must be at least 1");
RNNFAST_HOST_DEVICE constexpr int source_parts(int group) { return smaller(kSourceParts, group); }

struct PersistentShape {
  ProductShape product;
  SharedMap map;
};

constexpr PersistentShape persistent_shape(const PersistentLayout& layout, int gates, Arithmetic arithmetic,
                                           bool backward) {
  PersistentShape shape;
  const int octets = layout.units / kOctet, batch = layout.batch_tiles * kBatchTile;
  const InRegisters registers = in_registers(layout.exchange, arithmetic, layout.batch_tiles, backward);
  const int bytes = element_bytes(arithmetic);
  if (backward)
    shape.product =
        product_shape(layout.group * octets, octets * kOctet * gates * bytes, layout.warps, false, registers);
  else
    shape.product = product_shape(octets * gates, layout.group * layout.units * bytes, layout.warps, true, registers);
  const ProductShape& product = shape.product;
  SharedMap& map = shape.map;
  constexpr int kBarrierBytes = 128;
  map.operands = kBarrierBytes;
  // An odd number of 16-byte words: eight batch indices fall into different banks.
  map.operand_stride = product.chunks * kChunkBytes + 16;
  map.operand_bytes = batch * map.operand_stride;
  // Backward writes the gradients of a step while the slowest warp still multiplies those of the step before.
  const int buffers = backward || layout.exchange == Exchange::cluster ? 2 : 1;
  map.sums = map.operands + buffers * map.operand_bytes;
  int sum_bytes = 0;
  if (backward) {
    const int slot = layout.units * sum_row(batch) * 4;
    sum_bytes = layout.exchange == Exchange::block     ? slot
                : layout.exchange == Exchange::cluster ? 2 * layout.group * slot
                                                       : source_parts(layout.group) * slot;
  } else {
    // The lanes of a warp write eight rows of four pairs of batch indices: no two into the same bank.
    map.sum_column = product.tiles * 16 + 4;
    sum_bytes = product.sum_warps * batch * map.sum_column * 4;
  }
  map.weights = map.sums + sum_bytes;
  const int staged = product.registers.passes * product.registers.chunks * kChunkFragments;
  // Weights on their way into registers pass through shared memory before anything else is there.
  const int at_start = kBarrierBytes + layout.warps * staged * kFragmentBytes;
  const int later = map.weights + layout.warps * product.kept * kFragmentBytes;
  map.bytes = at_start > later ? at_start : later;
  return shape;
}

// ---- what kernels are given -----------------------------------------------------------------------------------------

struct PersistentShared {
  Mode mode{};
  Steps rows;  // lengths, resets and offsets in device memory
  int64_t hidden_size = 0, directions = 1;
  const void* weight[kMaxDirections]{};  // W_hh (G*H, H)
  int64_t weight_stride[kMaxDirections]{};
  const void* hx{};
  const void* cx{};
  PersistentLayout layout;
  PersistentShape shape;
  void* words{};           // grid: zeros, as many bytes as exchange_bytes() says
  int64_t first_tile = 0;  // of the launch: its groups of a direction follow those of earlier launches
};

struct PersistentForward : PersistentShared, ForwardTensors {};
struct PersistentBackward : PersistentShared, BackwardTensors {};

// ---- the grid's memory ----------------------------------------------------------------------------------------------

// Forward an item of 4 bytes is a float, or two units' values of 16 bits, of one batch index. A word of 16 bytes has
// those of the same units for three batch indices, and the number of the turn.
constexpr int kWordItems = 3;
static_assert(kWordItems == 3, "kWordItems must be 3: a word of 16 bytes has a number beside them");
RNNFAST_HOST_DEVICE constexpr int unit_words(int batch) { return divide_up(batch, kWordItems); }
// Of a block.
RNNFAST_HOST_DEVICE constexpr int slice_words(int units, int batch, int element_bytes) {
  return units * element_bytes / 4 * unit_words(batch);
}

// Groups of a direction.
constexpr int64_t batch_groups(const PersistentLayout& layout, int64_t batch) {
  const int64_t of_group = int64_t{layout.batch_tiles} * kBatchTile;
  return (batch + of_group - 1) / of_group;
}

// Of these, those of a launch.
constexpr int64_t groups_a_launch(const PersistentLayout& layout, int64_t batch) {
  const int64_t all = batch_groups(layout, batch);
  return layout.launch_tiles > 0 && layout.launch_tiles < all ? layout.launch_tiles : all;
}

// Bytes that the groups of a launch need, zeros at first: two buffers for each group, then a flag for each block.
inline int64_t exchange_bytes(const PersistentLayout& layout, int64_t groups, int element_bytes, bool backward) {
  if (layout.exchange != Exchange::grid) return 0;
  const int64_t batch = int64_t{layout.batch_tiles} * kBatchTile, blocks = layout.group;
  const int64_t words = backward ? blocks * blocks * layout.units * batch / 4
                                 : blocks * slice_words(layout.units, static_cast<int>(batch), element_bytes);
  return groups * (2 * words * 16 + blocks * 16);
}

// ---- the table ------------------------------------------------------------------------------------------------------

template <class Params> using PersistentKernel = std::string (*)(const Params&, void* stream);

// Why the current device cannot hold the blocks that wait for each other, "" where it can.
using PersistentQuery = std::string (*)(const PersistentLayout&, int64_t batch, int64_t directions);

struct PersistentKernels {
  PersistentKernel<PersistentForward> forward;
  PersistentKernel<PersistentBackward> backward;
  PersistentQuery forward_resident, backward_resident;
};

// launch.cuh has the body; setup.py writes the units that instantiate it.
template <Family kFamily, class Type> struct PersistentInstance {
  static PersistentKernels kernels();
};
// float64 stays with the step kernels.
template <Family kFamily> struct PersistentInstance<kFamily, Float64> {
  static PersistentKernels kernels() { return {}; }
};

}  // namespace rnnfast::gpu

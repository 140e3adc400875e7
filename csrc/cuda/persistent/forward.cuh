// Forward: all steps of a group of rows in one launch.
#pragma once

#include "../exchange/block.cuh"
#include "../exchange/cluster.cuh"
#include "../exchange/grid.cuh"
#include "cells.cuh"
#include "slice.cuh"

namespace rnnfast::gpu {

// Grid: x the blocks of a group, y tiles of the batch, z directions.
template <Family kFamily, class Type, Exchange kExchange, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kMostWarps* static_cast<int>(kWarpSize),
                                     1) void persistent_forward(RNNFAST_GRID_CONSTANT const PersistentForward p) {
  using Storage = typename Type::Storage;
  using Tensors = Elements<Type, PersistentForward>;
  using Constants = typename FamilyCell<kFamily>::Constants;
  constexpr int kGates = Constants::kGates, kReserve = Constants::kReserve, kBatch = kBatchTiles * kBatchTile;
  if (kExchange == Exchange::cluster && !require_clusters()) return;
  const int64_t H = p.hidden_size;

  Gather<kExchange, Type, kBatch> gather(p, __PRETTY_FUNCTION__);
  const SliceWeights<Type, kGates> weights(p);
  const Slice<Type, kExchange, kBatchTiles, false> slice(p.shape, shared_memory(), weights);
  clear_operands(p);

  // ---- where the thread's cells begin ----
  const OwnCells<Type, PersistentForward, kBatch> cells(p);
  const Prefetch<Type, kBatch> prefetch(p, kGates);
  UnitState<float> state[kMostCells] = {};
  float bias_split[kMostCells] = {};
  bool cut[kMostCells] = {};  // no state goes into the next step
  cells.for_each([&](int i, const OwnCell& cell) {
    if (!cell.exists()) return;
    state[i].h = Tensors::read(p.hx, cells.in_state(cell));
    if constexpr (Constants::kHasCell) state[i].c = Tensors::read(p.cx, cells.in_state(cell));
    if constexpr (Constants::kSplitGradient) bias_split[i] = Tensors::read(p.bias_split[cells.d], cells.unit(cell));
  });
  const auto look_ahead = [&](const TurnStep& at) {
    cells.for_each([&](int i, const OwnCell& cell) { cut[i] = cell.steps.cut_before(p.rows.layout, at); });
  };
  // What the next step multiplies.
  const auto hand_on = [&](int turn, int i, const OwnCell& cell) {
    if (cut[i]) state[i] = {};
    gather.put(turn, cell.n, cell.u, operand_of<Type>(convert<Storage>(state[i].h)));
  };

  gather.begin();
  const int steps = cells.steps();
  TurnStep next = cells.turn(0, false);
  if (steps > 0) {
    look_ahead(next);
    cells.for_each([&](int i, const OwnCell& cell) { hand_on(0, i, cell); });
    gather.send(0);
  }
  float* const sums = reinterpret_cast<float*>(shared_memory() + p.shape.map.sums);
  const int column = p.shape.map.sum_column;
  for (int turn = 0; turn < steps; ++turn) {
    // ---- while the others' values travel: what this step is given ----
    const TurnStep now = next;
    Storage x[kMostCells][kGates];
    cells.for_each([&](int i, const OwnCell& cell) {
      if (!cell.steps.active(now)) return;
      const Storage* from = static_cast<const Storage*>(p.gates) + cells.in_rows(cell, now.row, kGates);
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g) x[i][g] = from[g * H];
    });
    const bool last = turn + 1 == steps;
    next = cells.turn(turn + 1, false);
    if (!last) look_ahead(next);
    prefetch.ask(p, p.gates, kGates, cells.turn(turn + kPrefetchTurns, false));

    // ---- product ----
    gather.receive(turn);
    float* const part = sums + slice.sum_warp() * kBatch * column;
    slice.multiply(
        gather.operands(turn), p.shape.map.operand_stride, [&](int tile, const float (&tile_sums)[kBatchTiles][4]) {
          float* const to = part + static_cast<int>(lane() % 4) * 2 * column + tile * 16 + static_cast<int>(lane() / 4);
          RNNFAST_UNROLL
          for (int j = 0; j < kBatchTiles; ++j) {
            RNNFAST_UNROLL
            for (int k = 0; k < 4; ++k) to[(j * kBatchTile + k % 2) * column + k / 2 * 8] = tile_sums[j][k];
          }
        });
    sync_threads();  // all partial sums before the cells; and every warp has read the operands that put() overwrites

    // ---- cell ----
    cells.for_each([&](int i, const OwnCell& cell) {
      const bool active = cell.steps.active(now);
      float reserve[kReserve ? kReserve : 1] = {};
      UnitState<float> result = {};
      if (active) {
        float rec[kGates] = {}, x_now[kGates];
        const float* from = sums + cell.n * column + slice_row<kGates>(cell.u, 0);
        RNNFAST_UNROLL_BY(4)
        for (int w = 0; w < p.shape.product.sum_warps; ++w, from += kBatch * column) {
          RNNFAST_UNROLL
          for (int g = 0; g < kGates; ++g) rec[g] += from[g * kOctet];
        }
        RNNFAST_UNROLL
        for (int g = 0; g < kGates; ++g) x_now[g] = convert<float>(x[i][g]);
        if constexpr (Constants::kSplitGradient) rec[Constants::kSplitGate] += bias_split[i];
        state[i] = FamilyCell<kFamily>::template forward<PersistentMath<Type>>(p.mode, UnitInputs<float>{x_now, rec},
                                                                               state[i], reserve);
        // As the tensors have it, from which backward computes.
        state[i].h = convert<float>(convert<Storage>(state[i].h));
        result = state[i];
      }
      if (!last) hand_on(turn + 1, i, cell);
      if (!cells.in_memory(cell, now)) return;
      const uint64_t at = cells.in_rows(cell, now.row, 1);
      Tensors::write(p.output, static_cast<int64_t>(at), result.h);
      if constexpr (Constants::kHasCell) Tensors::write(p.cell_states, static_cast<int64_t>(at), result.c);
      if constexpr (kReserve != 0) {
        if (!p.reserve) return;
        Storage* to = static_cast<Storage*>(p.reserve) + cells.in_rows(cell, now.row, kReserve);
        RNNFAST_UNROLL
        for (int k = 0; k < kReserve; ++k) to[k * H] = convert<Storage>(reserve[k]);
      }
    });
    if (!last) gather.send(turn + 1);
  }

  cells.for_each([&](int i, const OwnCell& cell) {
    if (!cell.exists()) return;
    Tensors::write(p.h_n, cells.in_state(cell), state[i].h);
    if constexpr (Constants::kHasCell) Tensors::write(p.c_n, cells.in_state(cell), state[i].c);
  });
  gather.end();
}

}  // namespace rnnfast::gpu

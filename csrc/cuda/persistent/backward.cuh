// Backward: all steps of a group of rows in one launch.
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
                                     1) void persistent_backward(RNNFAST_GRID_CONSTANT const PersistentBackward p) {
  using Storage = typename Type::Storage;
  using Tensors = Elements<Type, PersistentBackward>;
  using Constants = typename FamilyCell<kFamily>::Constants;
  constexpr int kGates = Constants::kGates, kReserve = Constants::kReserve, kBatch = kBatchTiles * kBatchTile;
  if (kExchange == Exchange::cluster && !require_clusters()) return;
  const int64_t H = p.hidden_size;

  Scatter<kExchange, Type, kBatch> scatter(p, __PRETTY_FUNCTION__);
  const SliceWeights<Type, kGates> weights(p);
  // Transposed: a row for each unit of h_{t-1}, the sum goes over the block's gates.
  const Slice<Type, kExchange, kBatchTiles, true> slice(p.shape, shared_memory(), weights);
  clear_operands(p);
  scatter.begin();

  const OwnCells<Type, PersistentBackward, kBatch> cells(p);
  const Prefetch<Type, kBatch> prefetch(p, kReserve ? kReserve : 1);
  float carry[kMostCells] = {};
  const int steps = cells.steps();
  // One turn more than there are steps: rows whose first step is done hand their gradients on to hx and cx.
  const int turns = steps + (p.grad_hx || p.grad_cx ? 1 : 0);
  for (int turn = 0; turn < turns; ++turn) {
    // ---- while the others' sums travel: what forward saved and the gradients from outside ----
    struct Given {
      bool followed, ends;  // ends: its gradients reach hx and cx here
      Storage reserve[kReserve ? kReserve : 1];
      UnitState<float> previous, now;
      float dh, dc;
    };
    Given given[kMostCells];
    const TurnStep now = cells.turn(turn, true);
    cells.for_each([&](int i, const OwnCell& cell) {
      Given& own = given[i];
      own = Given{};
      const bool after = cell.steps.after(now), active = cell.steps.active(now);
      own.followed = after && !cell.steps.cut_after(p.rows.layout, now);
      own.ends = after && !active;
      // What a sequence ends with; of one without any step that is where it begins.
      const bool hands_through = turn == steps && cell.steps.length == 0;
      if ((active && !after) || hands_through) {
        own.dh = Tensors::read(p.grad_h_n, cells.in_state(cell));
        if constexpr (Constants::kHasCell) own.dc = Tensors::read(p.grad_c_n, cells.in_state(cell));
        own.ends = hands_through;
      }
      if (!active) return;
      const auto at = static_cast<int64_t>(cells.in_rows(cell, now.row, 1));
      const auto before = [&](const void* rows, const void* initial) {
        if (cell.steps.cut_before(p.rows.layout, now)) return 0.0f;
        return cell.steps.before(now) ? Tensors::read(rows, static_cast<int64_t>(cells.in_rows(cell, now.before, 1)))
                                      : Tensors::read(initial, cells.in_state(cell));
      };
      if constexpr (kReserve != 0) {
        const Storage* from = static_cast<const Storage*>(p.reserve) + cells.in_rows(cell, now.row, kReserve);
        RNNFAST_UNROLL
        for (int k = 0; k < kReserve; ++k) own.reserve[k] = from[k * H];
      } else {
        own.now.h = Tensors::read(p.output, at);
      }
      if constexpr (Constants::kHasCell) {
        own.now.c = Tensors::read(p.cell_states, at);
        own.previous.c = before(p.cell_states, p.cx);
        own.dc += Tensors::read(p.grad_cell_states, at);
      }
      if constexpr (Constants::kNeedsPreviousH) own.previous.h = before(p.output, p.hx);
      own.dh += Tensors::read(p.grad_output, at);
    });
    if constexpr (kReserve != 0) prefetch.ask(p, p.reserve, kReserve, cells.turn(turn + kPrefetchTurns, true));

    // ---- cell ----
    if (turn > 0) scatter.receive(turn - 1);
    std::byte* const gradients = shared_memory() + p.shape.map.operands + (turn & 1) * p.shape.map.operand_bytes;
    cells.for_each([&](int i, const OwnCell& cell) {
      const Given& own = given[i];
      float dh = own.dh;
      if (own.followed)
        dh += turn > 0 ? scatter.sum(turn - 1, cell.u, cell.n) : 0;
      else
        carry[i] = 0;
      if constexpr (Constants::kHasCell)
        carry[i] += own.dc;
      else
        dh += carry[i];
      float dgates[kGates] = {}, d_rec_split = 0;
      if (cell.steps.active(now)) {
        float reserve[kReserve ? kReserve : 1];
        RNNFAST_UNROLL
        for (int k = 0; k < kReserve; ++k) reserve[k] = convert<float>(own.reserve[k]);
        const UnitGradients<float> at_step{reserve, own.previous, own.now, dh};
        FamilyCell<kFamily>::template backward<PersistentMath<Type>>(p.mode, at_step, carry[i], dgates, d_rec_split);
      } else if (own.ends) {
        Tensors::write(p.grad_hx, cells.in_state(cell), dh);
        if constexpr (Constants::kHasCell) Tensors::write(p.grad_cx, cells.in_state(cell), carry[i]);
      }
      const auto through_hh = [&](int g) {
        return convert<Storage>(Constants::kSplitGradient && g == Constants::kSplitGate ? d_rec_split : dgates[g]);
      };
      auto* const operand =
          reinterpret_cast<Storage*>(gradients + cell.n * p.shape.map.operand_stride) + slice_row<kGates>(cell.u, 0);
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g) operand[g * kOctet] = operand_of<Type>(through_hh(g));
      if (!cells.in_memory(cell, now)) return;
      const uint64_t at = cells.in_rows(cell, now.row, kGates);
      Storage* to = static_cast<Storage*>(p.grad_gates) + at;
      RNNFAST_UNROLL
      for (int g = 0; g < kGates; ++g) to[g * H] = convert<Storage>(dgates[g]);
      if constexpr (Constants::kSplitGradient) {
        to = static_cast<Storage*>(p.grad_gates_hh) + at;
        RNNFAST_UNROLL
        for (int g = 0; g < kGates; ++g) to[g * H] = through_hh(g);
      }
    });

    // ---- product ----
    if (turn + 1 == turns) break;
    sync_threads();  // all gradients before the product; and the sums received are read before others overwrite them
    slice.multiply(gradients, p.shape.map.operand_stride,
                   [&](int tile, const float (&sums)[kBatchTiles][4]) { scatter.send(turn, tile, sums); });
    scatter.sent(turn);
  }
  scatter.end();
}

}  // namespace rnnfast::gpu

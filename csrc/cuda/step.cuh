// One launch a step: the fallback that is never wrong. A block takes 16 hidden units (all their gates) of some batch
// rows of one direction: the product of its weights with the states of the step before, the warps sharing out the sum;
// then each thread applies the cell to units of its own. State passes from launch to launch in global memory: h_t in
// `output`, c_t in a workspace. What does not depend on the step before is loaded before the kernel waits for it.
#pragma once

#include "../cells.h"
#include "primitives/dependent_launch.h"
#include "primitives/launch.h"
#include "product.cuh"
#include "step.h"

namespace rnnfast::gpu {

constexpr int kUnits = 16;  // hidden units a block
// Forward with a large batch has many partial sums a warp; else the more warps, the more loads are under way.
template <class Type, int kBatchTiles>
constexpr int kForwardWarps = kBatchTiles == 1 && sizeof(typename Type::Compute) == 4 ? 8 : 4;
constexpr int kBackwardWarps = 8;

// ---- cells: cells.h, with what a family's modes differ in chosen at run time ----------------------------------------

template <Mode kFirst, Mode... kOthers> struct StepCell {
  template <class Compute> using Cell = rnnfast::Cell<ScalarMath<Compute>, kFirst>;
  template <class Compute, class... Args> RNNFAST_DEVICE static UnitState<Compute> forward(Mode mode, Args&&... args) {
    if constexpr (sizeof...(kOthers) > 0) {
      if (mode != kFirst) return StepCell<kOthers...>::template forward<Compute>(mode, args...);
    }
    return Cell<Compute>::forward(args...);
  }
  template <class Compute, class... Args> RNNFAST_DEVICE static void backward(Mode mode, Args&&... args) {
    if constexpr (sizeof...(kOthers) > 0) {
      if (mode != kFirst) return StepCell<kOthers...>::template backward<Compute>(mode, args...);
    }
    Cell<Compute>::backward(args...);
  }
};

struct LstmStep : StepCell<Mode::lstm> {
  static constexpr const char* kName = "lstm";
};
struct GruStep : StepCell<Mode::gru> {
  static constexpr const char* kName = "gru";
};
struct RnnStep : StepCell<Mode::rnn_tanh, Mode::rnn_relu, Mode::rnn_identity> {
  static constexpr const char* kName = "rnn";
};

// ---- rows -----------------------------------------------------------------------------------------------------------

// One batch row at one turn. "cut": a segment boundary lies between the two steps, and no state crosses it.
struct RowTurn {
  bool in_batch = false;
  bool alive = false;  // it has this step; so the step before and the one after
  bool before = false, after = false;
  bool cut_before = false, cut_after = false;
  bool empty = false;  // it has no step at all
  int64_t row = 0, before_row = 0, after_row = 0;
};

RNNFAST_DEVICE RowTurn row_turn(const StepRows& rows, unsigned d, int64_t b) {
  RowTurn r;
  r.in_batch = b < rows.batch;
  if (!r.in_batch) return r;
  const Turn& turn = rows.turn[d];
  int64_t length = rows.lengths ? rows.lengths[b] : rows.steps;
  if (length > rows.steps) length = rows.steps;
  const bool reversed = d == 1;
  const int64_t before = reversed ? turn.time + 1 : turn.time - 1, after = reversed ? turn.time - 1 : turn.time + 1;
  r.alive = turn.time >= 0 && turn.time < length && b < turn.alive;
  r.before = before >= 0 && before < length && b < turn.before_alive;
  r.after = after >= 0 && after < length && b < turn.after_alive;
  r.empty = length <= 0;
  r.row = turn.row + b * rows.batch_stride;
  r.before_row = turn.before_row + b * rows.batch_stride;
  r.after_row = turn.after_row + b * rows.batch_stride;
  if (rows.resets) {
    // The boundary of step t stands before it in time, so a reversed direction meets it on leaving t.
    const bool here = r.alive && rows.resets[r.row];
    r.cut_before = reversed ? r.before && rows.resets[r.before_row] : here;
    r.cut_after = reversed ? here : r.after && rows.resets[r.after_row];
  }
  return r;
}

// Element access at 64-bit offsets.
template <class T> RNNFAST_DEVICE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}
template <class T> RNNFAST_DEVICE T* at(void* base, int64_t offset) { return static_cast<T*>(base) + offset; }

// What a kernel knows of its block, and how it names elements of the tensors.
template <class Type, int kBatch> struct Block {
  using Storage = typename Type::Storage;
  using Compute = typename Type::Compute;
  const StepShared& p;
  const unsigned d = block_index().z;
  const int64_t first_row = static_cast<int64_t>(block_index().x) * kBatch;
  const int64_t first_unit = static_cast<int64_t>(block_index().y) * kUnits;

  // Index of unit u of this direction in a tensor of rows with `width` units a direction.
  RNNFAST_DEVICE int64_t in_rows(int64_t row, int64_t width, int64_t u) const {
    return (row * p.directions + d) * width + u;
  }
  // The same in (D, B, width).
  RNNFAST_DEVICE int64_t in_state(int64_t b, int64_t width, int64_t u) const {
    return (d * p.rows.batch + b) * width + u;
  }
  RNNFAST_DEVICE static Compute read(const void* base, int64_t index) {
    return base ? convert<Compute>(*at<Storage>(base, index)) : Compute(0);
  }
  RNNFAST_DEVICE static void write(void* base, int64_t index, Compute value) {
    if (base) *at<Storage>(base, index) = convert<Storage>(value);
  }
  // Row `i` of the weights, a readable one where there is none; results of such rows are not used.
  RNNFAST_DEVICE const Storage* weight_row(int64_t i, int64_t count) const {
    return at<Storage>(p.weight[d], (i < count ? i : 0) * p.weight_stride[d]);
  }
};

// Whether any batch row of the block has something to multiply: the same answer in every thread. `has(n)` for row n.
template <int kBatch, class Has> RNNFAST_DEVICE bool any_row(const Has& has) {
  static_assert(kBatch <= 32);
  return any(lane() < kBatch && has(static_cast<int>(lane())));
}

// Runs body(slot, n, unit) for this thread's elements of a (kBatch, kUnits) tile; slot counts them.
template <int kBatch, int kThreads, class Body> RNNFAST_DEVICE void for_elements(const Body& body) {
  constexpr int kSlots = (kBatch * kUnits + kThreads - 1) / kThreads;
  RNNFAST_UNROLL
  for (int slot = 0; slot < kSlots; ++slot) {
    const int element = slot * kThreads + static_cast<int>(thread_index());
    if (element < kBatch * kUnits) body(slot, element / kUnits, element % kUnits);
  }
}
template <int kBatch, int kThreads> constexpr int kSlots = (kBatch * kUnits + kThreads - 1) / kThreads;

// ---- forward --------------------------------------------------------------------------------------------------------

// h_{t-1} of a row, as it lies in memory; null where it is zero.
template <class Block>
RNNFAST_DEVICE const void* previous_h(const Block& block, const StepForward& p, const RowTurn& r, int64_t b) {
  using Storage = typename Block::Storage;
  if (!r.alive || r.cut_before) return nullptr;
  if (r.before) return at<Storage>(p.output, block.in_rows(r.before_row, p.state_size, 0));
  return p.hx ? at<Storage>(p.hx, block.in_state(b, p.state_size, 0)) : nullptr;
}

// Whether this turn is the direction's first: there rows without any step hand hx and cx through.
RNNFAST_DEVICE bool is_first_turn(const StepRows& rows, unsigned d) {
  return rows.turn[d].time == (d == 1 ? rows.steps - 1 : 0);
}

template <class Step, class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS((kForwardWarps<Type, kBatchTiles> * 32),
                                     1) void step_forward(RNNFAST_GRID_CONSTANT const StepForward p) {
  using Compute = typename Type::Compute;
  using Storage = typename Type::Storage;
  using Cell = typename Step::template Cell<Compute>;
  constexpr int kG = Cell::kGates, kWarps = kForwardWarps<Type, kBatchTiles>, kThreads = kWarps * 32;
  using Product = BlockProduct<Type, kG, kBatchTiles, kWarps>;
  constexpr int kBatch = Product::kBatch;
  allow_next_grid();
  const Block<Type, kBatch> block{p};
  const int64_t H = p.hidden_size;

  Compute x[kSlots<kBatch, kThreads>][kG];
  for_elements<kBatch, kThreads>([&](int slot, int n, int u) {
    const int64_t b = block.first_row + n, unit = block.first_unit + u;
    const RowTurn r = row_turn(p.rows, block.d, b);
    RNNFAST_UNROLL
    for (int g = 0; g < kG; ++g)
      x[slot][g] = r.alive && unit < H ? block.read(p.gates, block.in_rows(r.row, kG * H, g * H + unit)) : Compute(0);
  });
  const auto source = [&](int n) {
    const int64_t b = block.first_row + n;
    return previous_h(block, p, row_turn(p.rows, block.d, b), b);
  };
  const auto weight_row = [&](int i) {
    const int64_t unit = block.first_unit + i % kUnits;
    return block.weight_row(unit < H ? i / kUnits * H + unit : 0, kG * H);
  };
  Product product(p.state_size, p.aligned, weight_row, [&](int n) {
    const void* h = source(n);
    return h ? static_cast<const Storage*>(h) : block.weight_row(0, 1);
  });
  // Everything the earlier launches wrote is there from here on.
  wait_for_previous_grid();
  const bool multiplied = any_row<kBatch>([&](int n) { return source(n) != nullptr; });
  if (multiplied) {
    product.run();
    sync_threads();  // every warp's partial sums are in shared memory
  } else {
    product.abandon();
  }

  for_elements<kBatch, kThreads>([&](int slot, int n, int u) {
    const int64_t b = block.first_row + n, unit = block.first_unit + u;
    const RowTurn r = row_turn(p.rows, block.d, b);
    if (!r.in_batch || unit >= H) return;
    const int64_t state_at = block.in_state(b, H, unit), row_at = block.in_rows(r.row, H, unit);
    const bool in_time = p.rows.turn[block.d].time >= 0 && b < p.rows.turn[block.d].alive;
    if (!r.alive) {
      if (r.empty && is_first_turn(p.rows, block.d)) {
        if (!p.projected) block.write(p.h_n, state_at, block.read(p.hx, state_at));
        block.write(p.c_n, state_at, block.read(p.cx, state_at));
      }
      if (!in_time) return;
      if (!p.projected) block.write(p.output, row_at, 0);
      block.write(p.cell_states, row_at, 0);
      for (int i = 0; i < Cell::kReserve; ++i)
        block.write(p.reserve, block.in_rows(r.row, Cell::kReserve * H, i * H + unit), 0);
      return;
    }
    const void* h_row = previous_h(block, p, r, b);
    Compute rec[kG];
    RNNFAST_UNROLL
    for (int g = 0; g < kG; ++g) rec[g] = multiplied && h_row ? Product::at(g * kUnits + u, n) : Compute(0);
    if constexpr (Cell::kSplitGradient) rec[Cell::kSplitGate] += block.read(p.bias_n[block.d], unit);
    UnitState<Compute> previous{0, 0};
    if constexpr (Cell::kNeedsPreviousH) previous.h = block.read(h_row, unit);
    if constexpr (Cell::kHasCell) {
      if (!r.cut_before) previous.c = r.before ? *at<Compute>(p.carry, state_at) : block.read(p.cx, state_at);
    }
    Compute reserve[Cell::kReserve ? Cell::kReserve : 1];
    const UnitState<Compute> now =
        Step::template forward<Compute>(p.mode, UnitInputs<Compute>{x[slot], rec}, previous, reserve);
    if (p.projected) {
      block.write(p.hidden, state_at, now.h);
    } else {
      block.write(p.output, row_at, now.h);
      if (!r.after) block.write(p.h_n, state_at, now.h);
    }
    if constexpr (Cell::kHasCell) {
      *at<Compute>(p.carry, state_at) = now.c;
      block.write(p.cell_states, row_at, now.c);
      if (!r.after) block.write(p.c_n, state_at, now.c);
    }
    if (p.reserve) {
      RNNFAST_UNROLL
      for (int i = 0; i < Cell::kReserve; ++i)
        block.write(p.reserve, block.in_rows(r.row, Cell::kReserve * H, i * H + unit), reserve[i]);
    }
  });
}

// h_t = W_hr (o tanh(c)), after step_forward of the same step. weight: (P, H).
template <class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kBackwardWarps * 32,
                                     1) void step_project_forward(RNNFAST_GRID_CONSTANT const StepForward p) {
  using Storage = typename Type::Storage;
  constexpr int kThreads = kBackwardWarps * 32;
  using Product = BlockProduct<Type, 1, kBatchTiles, kBackwardWarps>;
  constexpr int kBatch = Product::kBatch;
  allow_next_grid();
  const Block<Type, kBatch> block{p};
  const int64_t P = p.state_size;
  const auto has_step = [&](int n) { return row_turn(p.rows, block.d, block.first_row + n).alive; };
  Product product(
      p.hidden_size, p.aligned, [&](int i) { return block.weight_row(block.first_unit + i, P); },
      [&](int n) {
        const int64_t b = block.first_row + n;
        return has_step(n) ? at<Storage>(static_cast<const void*>(p.hidden), block.in_state(b, p.hidden_size, 0))
                           : block.weight_row(0, 1);
      });
  // o tanh(c) of this step is there from here on.
  wait_for_previous_grid();
  const bool multiplied = any_row<kBatch>(has_step);
  if (multiplied) {
    product.run();
    sync_threads();  // every warp's partial sums are in shared memory
  } else {
    product.abandon();
  }
  for_elements<kBatch, kThreads>([&](int, int n, int u) {
    const int64_t b = block.first_row + n, unit = block.first_unit + u;
    const RowTurn r = row_turn(p.rows, block.d, b);
    if (!r.in_batch || unit >= P) return;
    const int64_t state_at = block.in_state(b, P, unit), row_at = block.in_rows(r.row, P, unit);
    if (r.alive) {
      const auto h = Product::at(u, n);
      block.write(p.output, row_at, h);
      if (!r.after) block.write(p.h_n, state_at, h);
      return;
    }
    if (r.empty && is_first_turn(p.rows, block.d)) block.write(p.h_n, state_at, block.read(p.hx, state_at));
    if (b < p.rows.turn[block.d].alive) block.write(p.output, row_at, 0);
  });
}

// ---- backward -------------------------------------------------------------------------------------------------------

// The gates' gradients of the step after, that of W_hh h; null where nothing comes back from there.
template <int kGates, class Block>
RNNFAST_DEVICE const void* later_gradient(const Block& block, const StepBackward& p, const RowTurn& r) {
  using Storage = typename Block::Storage;
  if (!r.after || r.cut_after) return nullptr;
  const void* gradients = p.grad_gates_hh ? p.grad_gates_hh : p.grad_gates;
  return at<Storage>(gradients, block.in_rows(r.after_row, kGates * p.hidden_size, 0));
}

// A forward direction's boundary before its first step is met when the row hands its gradients on to hx and cx.
RNNFAST_DEVICE bool ends_here(const RowTurn& r) { return r.in_batch && !r.alive && r.after; }

// Whether this turn is the direction's last: there rows without any step hand the final gradients through.
RNNFAST_DEVICE bool is_last_turn(const StepRows& rows, unsigned d) {
  return rows.turn[d].time == (d == 1 ? rows.steps : -1);
}

// What reaches h_t beside the product: from the output and, in a row's last step, from h_n.
template <class Block>
RNNFAST_DEVICE typename Block::Compute outer_gradient(const Block& block, const StepBackward& p, const RowTurn& r,
                                                      int64_t b, int64_t unit) {
  typename Block::Compute dh = block.read(p.grad_output, block.in_rows(r.row, p.state_size, unit));
  if (!r.after) dh += block.read(p.grad_h_n, block.in_state(b, p.state_size, unit));
  return dh;
}

// weight: W_hh^T (H, G*H), or with projection W_hr^T (H, P) and the gradient of h_t comes from step_project_backward.
template <class Step, class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kBackwardWarps * 32,
                                     1) void step_backward(RNNFAST_GRID_CONSTANT const StepBackward p) {
  using Compute = typename Type::Compute;
  using Storage = typename Type::Storage;
  using Cell = typename Step::template Cell<Compute>;
  constexpr int kG = Cell::kGates, kThreads = kBackwardWarps * 32;
  constexpr bool kCarries = Cell::kHasCell || Cell::kSplitGradient;
  using Product = BlockProduct<Type, 1, kBatchTiles, kBackwardWarps>;
  constexpr int kBatch = Product::kBatch;
  allow_next_grid();
  const Block<Type, kBatch> block{p};
  const int64_t H = p.hidden_size;

  // All that forward saved and the gradients from outside.
  struct Given {
    Compute reserve[Cell::kReserve ? Cell::kReserve : 1];
    UnitState<Compute> previous, now;
    Compute dh, dc;
  };
  Given given[kSlots<kBatch, kThreads>];
  for_elements<kBatch, kThreads>([&](int slot, int n, int u) {
    const int64_t b = block.first_row + n, unit = block.first_unit + u;
    const RowTurn r = row_turn(p.rows, block.d, b);
    Given& own = given[slot];
    own = Given{};
    if (!r.alive || unit >= H) return;
    const int64_t state_at = block.in_state(b, H, unit);
    RNNFAST_UNROLL
    for (int i = 0; i < Cell::kReserve; ++i)
      own.reserve[i] = block.read(p.reserve, block.in_rows(r.row, Cell::kReserve * H, i * H + unit));
    const auto before = [&](const void* rows, const void* initial) {
      if (r.cut_before) return Compute(0);
      return r.before ? block.read(rows, block.in_rows(r.before_row, H, unit)) : block.read(initial, state_at);
    };
    if constexpr (Cell::kHasCell) {
      own.now.c = block.read(p.cell_states, block.in_rows(r.row, H, unit));
      own.previous.c = before(p.cell_states, p.cx);
      own.dc = block.read(p.grad_cell_states, block.in_rows(r.row, H, unit));
      if (!r.after) own.dc += block.read(p.grad_c_n, state_at);
    }
    if constexpr (Cell::kNeedsPreviousH) own.previous.h = before(p.output, p.hx);
    if constexpr (Cell::kReserve == 0) own.now.h = block.read(p.output, block.in_rows(r.row, H, unit));
    if (!p.projected) own.dh = outer_gradient(block, p, r, b, unit);
  });

  const auto source = [&](int n) -> const void* {
    const RowTurn r = row_turn(p.rows, block.d, block.first_row + n);
    if (!p.projected) return later_gradient<kG>(block, p, r);
    return r.alive ? at<Storage>(static_cast<const void*>(p.grad_projected), block.in_rows(r.row, p.state_size, 0))
                   : nullptr;
  };
  Product product(
      p.projected ? p.state_size : kG * H, p.aligned, [&](int i) { return block.weight_row(block.first_unit + i, H); },
      [&](int n) {
        const void* row = source(n);
        return row ? static_cast<const Storage*>(row) : block.weight_row(0, 1);
      });
  // Everything the earlier launches wrote is there from here on.
  wait_for_previous_grid();
  const bool multiplied = any_row<kBatch>([&](int n) { return source(n) != nullptr; });
  if (multiplied) {
    product.run();
    sync_threads();  // every warp's partial sums are in shared memory
  } else {
    product.abandon();
  }

  for_elements<kBatch, kThreads>([&](int slot, int n, int u) {
    const int64_t b = block.first_row + n, unit = block.first_unit + u;
    const RowTurn r = row_turn(p.rows, block.d, b);
    if (!r.in_batch || unit >= H) return;
    const int64_t state_at = block.in_state(b, H, unit);
    const bool comes_back = r.after && !r.cut_after;
    Compute carry = 0;
    if constexpr (kCarries) {
      if (comes_back) carry = *at<Compute>(p.carry, state_at);
    }
    Compute dh = given[slot].dh;
    if (multiplied && source(n)) dh += Product::at(u, n);
    if constexpr (!Cell::kHasCell) dh += carry;
    const auto write_gates = [&](void* gradients, int g, Compute value) {
      block.write(gradients, block.in_rows(r.row, kG * H, g * H + unit), value);
    };
    if (r.alive) {
      Compute dgates[kG], d_rec_split = 0;
      if constexpr (Cell::kHasCell) carry += given[slot].dc;
      const UnitGradients<Compute> gradients{given[slot].reserve, given[slot].previous, given[slot].now, dh};
      Step::template backward<Compute>(p.mode, gradients, carry, dgates, d_rec_split);
      RNNFAST_UNROLL
      for (int g = 0; g < kG; ++g) {
        write_gates(p.grad_gates, g, dgates[g]);
        if constexpr (Cell::kSplitGradient)
          write_gates(p.grad_gates_hh, g, g == Cell::kSplitGate ? d_rec_split : dgates[g]);
      }
      if constexpr (kCarries) *at<Compute>(p.carry, state_at) = carry;
      return;
    }
    if (ends_here(r)) {
      if (!p.projected) block.write(p.grad_hx, state_at, comes_back ? dh : Compute(0));
      if constexpr (Cell::kHasCell) block.write(p.grad_cx, state_at, carry);
    } else if (r.empty && is_last_turn(p.rows, block.d)) {
      if (!p.projected) block.write(p.grad_hx, state_at, block.read(p.grad_h_n, state_at));
      if constexpr (Cell::kHasCell) block.write(p.grad_cx, state_at, block.read(p.grad_c_n, state_at));
    }
    const int64_t time = p.rows.turn[block.d].time;
    if (time < 0 || time >= p.rows.steps || b >= p.rows.turn[block.d].alive) return;
    RNNFAST_UNROLL
    for (int g = 0; g < kG; ++g) {
      write_gates(p.grad_gates, g, 0);
      if constexpr (Cell::kSplitGradient) write_gates(p.grad_gates_hh, g, 0);
    }
  });
}

// The gradient of h_t (and of hx), before step_backward of the same step. weight: W_hh^T (P, 4*H).
template <class Type, int kBatchTiles>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kBackwardWarps * 32,
                                     1) void step_project_backward(RNNFAST_GRID_CONSTANT const StepBackward p) {
  using Compute = typename Type::Compute;
  using Storage = typename Type::Storage;
  constexpr int kG = 4, kThreads = kBackwardWarps * 32;
  using Product = BlockProduct<Type, 1, kBatchTiles, kBackwardWarps>;
  constexpr int kBatch = Product::kBatch;
  allow_next_grid();
  const Block<Type, kBatch> block{p};
  const int64_t P = p.state_size;
  const auto source = [&](int n) {
    return later_gradient<kG>(block, p, row_turn(p.rows, block.d, block.first_row + n));
  };
  Product product(
      kG * p.hidden_size, p.aligned, [&](int i) { return block.weight_row(block.first_unit + i, P); },
      [&](int n) {
        const void* row = source(n);
        return row ? static_cast<const Storage*>(row) : block.weight_row(0, 1);
      });
  // The gates' gradients of the step after are there from here on.
  wait_for_previous_grid();
  const bool multiplied = any_row<kBatch>([&](int n) { return source(n) != nullptr; });
  if (multiplied) {
    product.run();
    sync_threads();  // every warp's partial sums are in shared memory
  } else {
    product.abandon();
  }
  for_elements<kBatch, kThreads>([&](int, int n, int u) {
    const int64_t b = block.first_row + n, unit = block.first_unit + u;
    const RowTurn r = row_turn(p.rows, block.d, b);
    if (!r.in_batch || unit >= P) return;
    const int64_t state_at = block.in_state(b, P, unit);
    const Compute back = multiplied && source(n) ? Product::at(u, n) : Compute(0);
    if (r.alive) {
      block.write(p.grad_projected, block.in_rows(r.row, P, unit), back + outer_gradient(block, p, r, b, unit));
      return;
    }
    if (ends_here(r))
      block.write(p.grad_hx, state_at, back);
    else if (r.empty && is_last_turn(p.rows, block.d))
      block.write(p.grad_hx, state_at, block.read(p.grad_h_n, state_at));
    const int64_t time = p.rows.turn[block.d].time;
    if (time >= 0 && time < p.rows.steps && b < p.rows.turn[block.d].alive)
      block.write(p.grad_projected, block.in_rows(r.row, P, unit), 0);
  });
}

// ---- launches -------------------------------------------------------------------------------------------------------

// kMakeKernel<kBatchTiles>() names the kernel. Small batches take one tile of 8 rows, large ones as many as fit.
template <class Type, template <int> class Kernel, class Params>
std::string launch_step(const Params& p, const StepLaunch& how, int64_t results) {
  int64_t rows = 0;
  for (int64_t d = 0; d < p.directions; ++d) {
    const Turn& turn = p.rows.turn[d];
    for (const int64_t alive : {turn.alive, turn.after_alive}) rows = alive > rows ? alive : rows;
  }
  // Rows that have ended, or never began, have something to hand on too.
  if (p.rows.lengths || p.rows.steps == 0) rows = p.rows.batch;
  if (rows == 0 || results == 0) return "";
  const auto launch_with = [&](auto kernel) {
    using K = decltype(kernel);
    LaunchConfig config;
    config.grid = {static_cast<unsigned>((rows + K::Product::kBatch - 1) / K::Product::kBatch),
                   static_cast<unsigned>((results + kUnits - 1) / kUnits), static_cast<unsigned>(p.directions)};
    config.threads = K::Product::kWarps * 32;
    config.shared_bytes = K::Product::kSharedBytes;
    config.dependent = how.dependent;
    config.stream = how.stream;
    config.name = K::name();
    return launch(config, K::function(), p);
  };
  if (rows <= 8) return launch_with(Kernel<1>());
  return launch_with(Kernel<Type::kLargeBatchTiles>());
}

template <class Step, class Type> struct StepInstance {
  template <int kBatchTiles> struct Forward {
    using Product = BlockProduct<Type, Step::template Cell<typename Type::Compute>::kGates, kBatchTiles,
                                 kForwardWarps<Type, kBatchTiles>>;
    static auto function() { return step_forward<Step, Type, kBatchTiles>; }
    static const char* name() {
      static const std::string text = std::string("step_forward<") + Step::kName + ", " + Type::kName + ">";
      return text.c_str();
    }
  };
  template <int kBatchTiles> struct Backward {
    using Product = BlockProduct<Type, 1, kBatchTiles, kBackwardWarps>;
    static auto function() { return step_backward<Step, Type, kBatchTiles>; }
    static const char* name() {
      static const std::string text = std::string("step_backward<") + Step::kName + ", " + Type::kName + ">";
      return text.c_str();
    }
  };
  template <int kBatchTiles> struct ProjectForward {
    using Product = BlockProduct<Type, 1, kBatchTiles, kBackwardWarps>;
    static auto function() { return step_project_forward<Type, kBatchTiles>; }
    static const char* name() {
      static const std::string text = std::string("step_project_forward<") + Type::kName + ">";
      return text.c_str();
    }
  };
  template <int kBatchTiles> struct ProjectBackward {
    using Product = BlockProduct<Type, 1, kBatchTiles, kBackwardWarps>;
    static auto function() { return step_project_backward<Type, kBatchTiles>; }
    static const char* name() {
      static const std::string text = std::string("step_project_backward<") + Type::kName + ">";
      return text.c_str();
    }
  };

  static std::string forward(const StepForward& p, const StepLaunch& how) {
    return launch_step<Type, Forward>(p, how, p.hidden_size);
  }
  static std::string backward(const StepBackward& p, const StepLaunch& how) {
    return launch_step<Type, Backward>(p, how, p.hidden_size);
  }
  static std::string project_forward(const StepForward& p, const StepLaunch& how) {
    return launch_step<Type, ProjectForward>(p, how, p.state_size);
  }
  static std::string project_backward(const StepBackward& p, const StepLaunch& how) {
    return launch_step<Type, ProjectBackward>(p, how, p.state_size);
  }
  static constexpr StepKernels kernels() { return {forward, backward, nullptr, nullptr}; }
  static constexpr StepKernels kernels_with_projection() {
    return {forward, backward, project_forward, project_backward};
  }
};

}  // namespace rnnfast::gpu

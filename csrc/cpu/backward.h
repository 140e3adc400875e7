// Backward time loop, the mirror of forward.h: groups and thread shares are the same. Each step: dgates of the later
// step times a tile of packed W_hh^T gives dh, the cell's derivative on the tile gives this step's dgates, one barrier.
// A row whose first step is done gets one more product, for grad_hx. With a projection: the first product gives the
// gradient of the projected h_t, a second one with W_hr that of o tanh(c).
#pragma once

#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

template <Mode kMode, class Storage, int kBlocks> class BackwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Cell = rnnfast::Cell<VectorMath<Compute>, kMode>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kG = Cell::kGates;
  static constexpr int kTileUnits = kL * kBlocks;

 public:
  BackwardLoop(const BackwardParams& params, int threads)
      : p_(params),
        tiles_(divide_up(params.state_size, kTileUnits)),
        inner_tiles_(params.projected ? divide_up(params.hidden_size, kTileUnits) : 0),
        gates_width_(kG * params.hidden_size),
        groups_each_(choose_split(params, threads, sizeof(Compute), tiles_).row_groups) {}

  int64_t run(int threads) {
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    run_team(threads, [&](Team& team, int member) {
      const int members = team.members();
      pack(member, members);
      const Assignment mine(p_.directions * groups_each_, member, members);
      team.wait();  // packed weights are there
      if (mine.idle) return;
      for (int64_t g = mine.first_group; g < mine.groups; g += mine.group_stride) {
        initialize(g, mine.rank, mine.members_per_group);
        steps(g, mine.rank, mine.members_per_group);
      }
    });
    return 0;
  }

 private:
  struct Group {
    StateBuffer<Compute> dgates[2];  // of the later step and of this one: (rows, G*H), of W_hh h for the GRU
    StateBuffer<Compute> carry;      // what reaches the earlier step beside the product (cells.h): (rows, H)
    StateBuffer<Compute> dh;         // with projection: gradient of h_t (rows, P)
  };
  static constexpr bool kCarries = Cell::kHasCell || Cell::kSplitGradient;

  GroupRows rows_of(int64_t g) const { return {schedule_, g % groups_each_, groups_each_, g / groups_each_ == 1}; }

  void place() {
    schedule_.place(p_.rows, workspace_);
    barriers_ = workspace_.template take<Barrier>(p_.directions, groups_each_);
    groups_ = workspace_.template take<Group>(p_.directions, groups_each_);
    const int64_t rows = divide_up(p_.rows.batch, groups_each_);
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) {
      Group group;
      group.dgates[0].place(workspace_, rows, gates_width_);
      group.dgates[1].place(workspace_, rows, gates_width_);
      if (kCarries) group.carry.place(workspace_, rows, round_up(p_.hidden_size, kTileUnits));
      if (p_.projected) group.dh.place(workspace_, rows, product(tiles_, kTileUnits));
      if (groups_) {
        groups_[g] = group;
        barriers_[g] = Barrier();
      }
    }
    for (int64_t d = 0; d < p_.directions; ++d) {
      packed_hh_[d] = workspace_.template take<Compute>(tiles_, kTileUnits, gates_width_);
      if (p_.projected) packed_hr_[d] = workspace_.template take<Compute>(inner_tiles_, kTileUnits, p_.state_size);
    }
  }

  void pack(int member, int members) {
    const auto pack_all = [&](int64_t tiles, const void* const* weight, const int64_t* weight_stride,
                              Compute* const* to, int64_t columns, int64_t k_count) {
      const Share share = share_of(p_.directions * tiles, member, members);
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t d = i / tiles, column = i % tiles * kTileUnits;
        pack_columns(at<Storage>(weight[d], column), weight_stride[d], columns - column, k_count,
                     to[d] + column * k_count, kTileUnits);
      }
    };
    pack_all(tiles_, p_.weight_hh, p_.weight_hh_stride, packed_hh_, p_.state_size, gates_width_);
    if (p_.projected)
      pack_all(inner_tiles_, p_.weight_hr, p_.weight_hr_stride, packed_hr_, p_.hidden_size, p_.state_size);
  }

  // Rows without a step hand their final gradients straight on. Gradients beyond a row's length are zero.
  void initialize(int64_t g, int rank, int members) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    const Share share = share_of(rows.count(), rank, members);
    for (int64_t r = share.first; r < share.last; ++r) {
      if (r < rows.alive(0)) continue;
      const auto copy = [&](const void* from, void* to, int64_t width) {
        const int64_t offset = (d * p_.rows.batch + rows.batch_index(r)) * width;
        for (int64_t u = 0; u < width; u += kL)
          store<Compute>(at<Storage>(to, offset + u),
                         from ? load<Compute>(at<Storage>(from, offset + u), width - u) : Value{}, width - u);
      };
      if (p_.grad_hx) copy(p_.grad_h_n, p_.grad_hx, p_.state_size);
      if (p_.grad_cx) copy(p_.grad_c_n, p_.grad_cx, p_.hidden_size);
    }
    const auto zero = [&](void* tensor, int64_t width) {
      zero_beyond_lengths(rows, static_cast<Storage*>(tensor), p_.directions * width, d * width, width, rank, members);
    };
    zero(p_.grad_gates, gates_width_);
    zero(p_.grad_gates_hh, gates_width_);
    zero(p_.grad_projected, p_.state_size);
  }

  // One row of one step.
  struct Row {
    int64_t r, b, row;
    bool started;          // a later step has left its dgates: the product counts
    bool cut;              // a segment ends behind this step: nothing comes from the later one
    int64_t previous_row;  // of the step before; -1: hx, cx; -2: zeros
  };
  static constexpr int64_t kInitial = -1, kZeros = -2;

  Row row_at(const GroupRows& rows, int64_t t, int64_t r, int64_t started, int64_t alive_before) const {
    const int64_t b = rows.batch_index(r), before = rows.before(t);
    Row row{r, b, schedule_.row(t, b), r < started, false, kInitial};
    if (r < alive_before) row.previous_row = schedule_.row(before, b);
    if (p_.rows.resets) {
      row.cut = row.started && rows.cut_after(t, r);
      if (rows.cut_before(t, r)) row.previous_row = kZeros;
    }
    return row;
  }

  // A value that entered the step: from `trajectory` (rows, D*width), from `initial` (D, B, width), or zero.
  Value entering(const void* trajectory, const void* initial, int64_t d, const Row& row, int64_t unit,
                 int64_t width) const {
    if (row.previous_row >= 0)
      return load<Compute>(at<Storage>(trajectory, (row.previous_row * p_.directions + d) * width + unit),
                           width - unit);
    if (row.previous_row == kInitial && initial)
      return load<Compute>(at<Storage>(initial, (d * p_.rows.batch + row.b) * width + unit), width - unit);
    return Value{};
  }

  // Gradient of h_t on one block of units: from the later step, from the output, from h_n.
  Value total_dh(int64_t d, const Row& row, int64_t unit, Value from_later) const {
    const int64_t width = p_.state_size, left = width - unit;
    Value dh = unless<Compute>(!row.started || row.cut, from_later);
    if (p_.grad_output)
      dh += load<Compute>(at<Storage>(p_.grad_output, (row.row * p_.directions + d) * width + unit), left);
    if (!row.started && p_.grad_h_n)
      dh += load<Compute>(at<Storage>(p_.grad_h_n, (d * p_.rows.batch + row.b) * width + unit), left);
    return dh;
  }

  // What step_cell will read for one row of a tile, and the lines that it will write.
  void prefetch(int64_t d, int64_t row, int64_t tile) const {
    const int64_t H = p_.hidden_size, unit_row = row * p_.directions + d;
    for (int64_t unit = tile * kTileUnits; unit < (tile + 1) * kTileUnits && unit < H; unit += kL) {
#pragma GCC unroll 4
      for (int q = 0; q < Cell::kReserve; ++q)
        __builtin_prefetch(at<Storage>(p_.reserve, (unit_row * Cell::kReserve + q) * H + unit), 0);
#pragma GCC unroll 4
      for (int g = 0; g < kG; ++g) __builtin_prefetch(at<Storage>(p_.grad_gates, (unit_row * kG + g) * H + unit), 1);
      if (p_.grad_output && !p_.projected) __builtin_prefetch(at<Storage>(p_.grad_output, unit_row * H + unit), 0);
    }
  }

  // The cell's derivative on one block of units of one row; dh is the gradient of the cell's own output.
  void step_cell(const Group& group, int current, int64_t d, const Row& row, int64_t unit, Value dh) const {
    const int64_t H = p_.hidden_size, left = H - unit, unit_row = row.row * p_.directions + d;
    Value reserve[Cell::kReserve + 1], dgates[kG], carry{}, d_rec_split{};
    UnitState<Value> previous{}, now{};
#pragma GCC unroll 4
    for (int q = 0; q < Cell::kReserve; ++q)
      reserve[q] = load<Compute>(at<Storage>(p_.reserve, (unit_row * Cell::kReserve + q) * H + unit), left);
    if (Cell::kHasCell) {
      now.c = load<Compute>(at<Storage>(p_.cell_states, unit_row * H + unit), left);
      previous.c = entering(p_.cell_states, p_.cx, d, row, unit, H);
      if (row.started)
        carry = unless<Compute>(row.cut, load<Compute>(group.carry.row(row.r) + unit));
      else if (p_.grad_c_n)
        carry = load<Compute>(at<Storage>(p_.grad_c_n, (d * p_.rows.batch + row.b) * H + unit), left);
      if (p_.grad_cell_states) carry += load<Compute>(at<Storage>(p_.grad_cell_states, unit_row * H + unit), left);
    }
    if (Cell::kNeedsPreviousH) previous.h = entering(p_.output, p_.hx, d, row, unit, H);
    if (!Cell::kReserve) now.h = load<Compute>(at<Storage>(p_.output, unit_row * H + unit), left);
    Cell::backward({reserve, previous, now, dh}, carry, dgates, d_rec_split);
    if (kCarries) store<Compute>(group.carry.row(row.r) + unit, carry);
    Compute* to_earlier = group.dgates[current].row(row.r) + unit;
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      const Value recurrent = g == Cell::kSplitGate ? d_rec_split : dgates[g];
      store<Compute>(at<Storage>(p_.grad_gates, (unit_row * kG + g) * H + unit), dgates[g], left);
      if (Cell::kSplitGradient)
        store<Compute>(at<Storage>(p_.grad_gates_hh, (unit_row * kG + g) * H + unit), recurrent, left);
      store<Compute>(to_earlier + g * H, recurrent, left);
    }
  }

  // The gradients of the initial states, for a row whose first step was the one before.
  bool initial_cut(const GroupRows& rows, int64_t r) const { return !rows.reversed && rows.cut_before(0, r); }
  void write_grad_hx(const GroupRows& rows, int64_t d, int64_t r, int64_t unit, Value dh) const {
    store<Compute>(at<Storage>(p_.grad_hx, (d * p_.rows.batch + rows.batch_index(r)) * p_.state_size + unit),
                   unless<Compute>(initial_cut(rows, r), dh), p_.state_size - unit);
  }
  void write_grad_cx(const GroupRows& rows, const Group& group, int64_t d, int64_t r, int64_t unit) const {
    store<Compute>(at<Storage>(p_.grad_cx, (d * p_.rows.batch + rows.batch_index(r)) * p_.hidden_size + unit),
                   unless<Compute>(initial_cut(rows, r), load<Compute>(group.carry.row(r) + unit)),
                   p_.hidden_size - unit);
  }

  void steps(int64_t g, int rank, int members) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    const Group group = groups_[g];
    const Share my_tiles = share_of(tiles_, rank, members);
    const Share my_inner_tiles = share_of(inner_tiles_, rank, members);
    int64_t started = 0;  // rows whose later step has been done
    int current = 0;
    // One turn more than steps: the last only finishes the rows that are left, where anyone wants their initial
    // gradients.
    const int64_t last_turn = p_.grad_hx || p_.grad_cx ? 0 : 1;
    for (int64_t s = schedule_.steps(); s >= last_turn; --s, current = 1 - current) {
      const int64_t t = rows.time(s - 1), alive = s > 0 ? rows.alive(t) : 0;
      const int64_t alive_before = s > 0 ? rows.alive(rows.before(t)) : 0;
      const StateBuffer<Compute>& later = group.dgates[1 - current];
      for (int64_t tile = my_tiles.first; tile < my_tiles.last; ++tile) {
        const auto on_row = [&](int64_t r, const Value* products) {
          const Row row = r < alive ? row_at(rows, t, r, started, alive_before) : Row{};
          for (int block = 0; block < kBlocks; ++block) {
            const int64_t unit = tile * kTileUnits + block * kL;
            if (unit >= p_.state_size) break;
            Value product = products[block];
            if (!p_.projected && Cell::kSplitGradient && r < started)
              product += load<Compute>(group.carry.row(r) + unit);
            if (r >= alive) {
              if (p_.grad_hx) write_grad_hx(rows, d, r, unit, product);
              if (p_.grad_cx && !p_.projected) write_grad_cx(rows, group, d, r, unit);
              continue;
            }
            const Value dh = total_dh(d, row, unit, product);
            if (!p_.projected) {
              step_cell(group, current, d, row, unit, dh);
              continue;
            }
            store<Compute>(group.dh.row(r) + unit, dh);
            store<Compute>(at<Storage>(p_.grad_projected, (row.row * p_.directions + d) * p_.state_size + unit), dh,
                           p_.state_size - unit);
          }
        };
        const auto on_rows = [&](int64_t first, int height, const Value* acc) {
          for (int i = 0; i < height; ++i) on_row(first + i, acc + i * kBlocks);
        };
        const auto fetch = [&](int64_t first, int height) {
          for (int i = 0; i < height && first + i < alive && !p_.projected; ++i)
            prefetch(d, schedule_.row(t, rows.batch_index(first + i)), tile);
        };
        for_row_tiles<kBlocks>(later.data, later.stride, 1, started, packed_hh_[d] + tile * kTileUnits * gates_width_,
                               gates_width_, on_rows, fetch);
        const Value zeros[kBlocks] = {};
        for (int64_t r = started; r < alive; ++r) on_row(r, zeros);
      }
      if (p_.projected) {
        barriers_[g].wait(members);  // the gradient of every projected unit is there
        for (int64_t tile = my_inner_tiles.first; tile < my_inner_tiles.last; ++tile) {
          for_row_tiles<kBlocks>(group.dh.data, group.dh.stride, 1, alive,
                                 packed_hr_[d] + tile * kTileUnits * p_.state_size, p_.state_size,
                                 [&](int64_t first, int height, const Value* acc) {
                                   for (int i = 0; i < height; ++i)
                                     for (int block = 0; block < kBlocks; ++block) {
                                       const int64_t unit = tile * kTileUnits + block * kL;
                                       if (unit < p_.hidden_size)
                                         step_cell(group, current, d, row_at(rows, t, first + i, started, alive_before),
                                                   unit, acc[i * kBlocks + block]);
                                     }
                                 });
          for (int64_t r = alive; p_.grad_cx && r < started; ++r)
            for (int64_t unit = tile * kTileUnits; unit < p_.hidden_size && unit < (tile + 1) * kTileUnits; unit += kL)
              write_grad_cx(rows, group, d, r, unit);
        }
      }
      started = alive;
      if (s == last_turn) break;
      // dgates of this step are there for all, and nobody reads the later step's any more.
      barriers_[g].wait(members);
    }
  }

  const BackwardParams& p_;
  const int64_t tiles_, inner_tiles_, gates_width_, groups_each_;
  Workspace workspace_;
  Schedule schedule_;
  Barrier* barriers_ = nullptr;
  Group* groups_ = nullptr;
  Compute* packed_hh_[kMaxDirections]{};
  Compute* packed_hr_[kMaxDirections]{};
};

}  // namespace
}  // namespace rnnfast::cpu

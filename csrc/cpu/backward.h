// Backward time loop, the mirror of forward.h: groups and shares are the same. The phases of a step:
//   product  the later step's dgates times a tile of packed W_hh^T, for the gradient of h_t;
//   project  with a projection, in a round of its own: that gradient times W_hr, for the one of `hidden`, o tanh(c);
//   cell     its derivative on the tile gives this step's dgates.
// A row whose first step is done gets one more product, for grad_hx. What the weights are `Weights` knows: a
// ColumnWeights (column_weights.h). With `Chunks` (kernels.h) what the steps leave is used up every few turns.
#pragma once

#include "../cells.h"
#include "schedule.h"
#include "team.h"
#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <Mode kMode, class Storage, int kBlocks, class Weights> class BackwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using RowValue = typename Weights::RowValue;
  using Cell = rnnfast::Cell<VectorMath<Compute>, kMode>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kG = Cell::kGates;
  static constexpr int kTileUnits = kL * kBlocks;
  static constexpr int64_t kInCache = 2 << 20;  // bytes that a core's own caches hold

 public:
  BackwardLoop(const BackwardParams& params, int threads, const Chunks* chunks)
      : p_(params),
        chunks_(chunks),
        tiles_(divide_up(params.state_size, kTileUnits)),
        hidden_tiles_(params.projected ? divide_up(params.hidden_size, kTileUnits) : 0),
        gates_width_(kG * params.hidden_size),
        weights_(params),
        directions_at_once_(choose_directions_at_once(params, threads, Weights::kWeightBytes, tiles_)),
        groups_each_(choose_row_groups(params, threads, directions_at_once_, Weights::kWeightBytes, tiles_,
                                       weights_.packed_bytes(), Weights::kSpeed, Weights::kRowGroup)),
        shares_(shares_of_group(threads, directions_at_once_ * groups_each_, tiles_)),
        preparing_shares_(shares_for(threads)),
        gates_(left_by_steps(params.grad_gates, gates_width_)),
        gates_hh_(left_by_steps(params.grad_gates_hh, chunks ? params.hidden_size : gates_width_)),
        projected_(left_by_steps(params.grad_projected, params.state_size)),
        hidden_(left_by_steps(chunks ? chunks->hidden : nullptr, params.hidden_size)),
        leaves_beyond_cache_(!chunks || gates_.direction_stride * params.directions * sizeof(Storage) > kInCache) {}

  int64_t run(Team& team) {
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    const int64_t turns_at_once = chunks_ ? chunks_->turns : turns();
    run_turns(team, turns_at_once);
    while (chunks_ && chunks_->use(chunks_->context, first_turn_, last_turn_) && last_turn_ < turns()) {
      Team next(team.planned(), chunks_->alone_seconds);
      run_turns(next, turns_at_once);
    }
    return 0;
  }

 private:
  // The next turns, at most so many.
  void run_turns(Team& team, int64_t most) {
    first_turn_ = last_turn_;
    last_turn_ = turns() - first_turn_ < most ? turns() : first_turn_ + most;
    bool sums = false;
    for (int64_t d = 0; d < p_.directions && chunks_; ++d)
      sums = sums || chunks_->grad_bias_ih[d].result || chunks_->grad_bias_hh[d].result;
    const int64_t groups = directions_at_once_ * groups_each_, rounds = (last_turn_ - first_turn_) * rounds_a_turn();
    // The second sweep is of the second direction, if it has one to itself.
    const Stage stages[] = {{1, preparing_shares_, first_turn_ == 0},
                            {groups, shares_, rounds},
                            {directions_at_once_ < p_.directions ? groups : 0, shares_, rounds},
                            {1, preparing_shares_, sums}};
    team.run(stages, 4, [&](const Piece& piece) {
      if (piece.stage == 0)
        prepare(piece.share);
      else if (piece.stage == 3)
        sum_share(piece.share);
      else
        step_share((piece.stage - 1) * groups + piece.group, first_turn_ * rounds_a_turn() + piece.round, piece.share);
    });
  }

  // Where the steps leave their gradients: rows of data, or of a chunk.
  struct LeftBySteps {
    void* data;
    int64_t row_stride, direction_stride;

    Storage* row(int64_t d, int64_t r) const { return at<Storage>(data, d * direction_stride + r * row_stride); }
  };
  LeftBySteps left_by_steps(void* data, int64_t width) const {
    if (!chunks_) return {data, p_.directions * width, width};
    const int64_t stride = chunk_row_stride(width, sizeof(Storage));
    return {data, stride, chunks_->rows * stride};
  }
  // The steps of the turns under way.
  Range times_of(int64_t d) const { return schedule_.times_of_turns(d, first_turn_, last_turn_); }

  struct Group {
    StateBuffer<RowValue> dgates[2];  // of the later step and of this one: (rows, G*H), of W_hh h
    StateBuffer<Compute> carry;       // what reaches the earlier step beside the product (cells.h): (rows, H)
    StateBuffer<RowValue> dh;         // with projection: gradient of h_t (rows, P)
  };

  bool projected() const { return Cell::kMayProject && p_.projected; }
  GroupRows rows_of(int64_t g) const { return {schedule_, g % groups_each_, groups_each_, g / groups_each_ == 1}; }

  void place() {
    schedule_.place(p_.rows, workspace_);
    groups_ = workspace_.template take<Group>(p_.directions, groups_each_);
    const int64_t rows = round_up(divide_up(p_.rows.batch, groups_each_), Weights::kRowGroup);
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) {
      Group group;
      group.dgates[0].place(workspace_, rows, gates_width_);
      group.dgates[1].place(workspace_, rows, gates_width_);
      if (Cell::kCarries) group.carry.place(workspace_, rows, round_up(p_.hidden_size, kTileUnits));
      if (projected()) group.dh.place(workspace_, rows, product(tiles_, kTileUnits));
      if (groups_) groups_[g] = group;
    }
    weights_.place(workspace_);
  }

  // One share of what must be there before the first turn: packed weights, and what rows without a step give.
  void prepare(int64_t share) {
    weights_.prepare(share, preparing_shares_);
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) initialize(g, share);
  }

  // Rows without a step hand their final gradients straight on. Gradients beyond a row's length are zero.
  void initialize(int64_t g, int64_t share) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    const Range range = share_of(rows.count(), share, preparing_shares_);
    for (int64_t r = range.first; r < range.last; ++r) {
      for (const StateBuffer<RowValue>& dgates : groups_[g].dgates) dgates.clear_last(r, gates_width_);
      if (projected()) groups_[g].dh.clear_last(r, p_.state_size);
      if (r < rows.active(0)) continue;
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
      zero_beyond_lengths(rows, static_cast<Storage*>(tensor), p_.directions * width, d * width, width, range);
    };
    if (chunks_) return;
    zero(p_.grad_gates, gates_width_);
    zero(p_.grad_gates_hh, gates_width_);
    zero(p_.grad_projected, p_.state_size);
  }

  // One share of the sums over a chunk's rows, which those of the chunks before are added to.
  void sum_share(int64_t share) const {
    const int64_t H = p_.hidden_size, before = (Cell::kSplitGradient ? Cell::kSplitGate : kG) * H;
    for (int64_t d = 0; d < p_.directions; ++d) {
      const BiasGradient &ih = chunks_->grad_bias_ih[d], &hh = chunks_->grad_bias_hh[d];
      sum_rows(gates_, d, {0, before}, 0, share, ih, hh);
      if (!Cell::kSplitGradient) continue;
      sum_rows(gates_, d, {before, before + H}, before, share, ih);
      sum_rows(gates_hh_, d, {0, H}, before, share, hh);
      sum_rows(gates_, d, {before + H, gates_width_}, before + H, share, ih, hh);
    }
  }
  // Some columns of a matrix, to as many sums from `first_sum` on, here and there.
  void sum_rows(const LeftBySteps& matrix, int64_t d, Range columns, int64_t first_sum, int64_t share,
                const BiasGradient& here, const BiasGradient& there = {}) const {
    constexpr int kVectors = 4;
    // So many are summed by themselves: not all one after the other, which would lose digits.
    constexpr int64_t kBlock = 64;
    if (!here.result && !there.result) return;
    const Range times = times_of(d);
    const int64_t rows = schedule_.rows_before(times.last) - schedule_.rows_before(times.first);
    const int64_t width = columns.last - columns.first;
    const Range blocks = share_of(divide_up(width, kVectors * kL), share, preparing_shares_);
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
      const int64_t column = block * kVectors * kL, left = width - column;
      Value total[kVectors] = {};
      for (int64_t first = 0; first < rows; first += kBlock) {
        Value sum[kVectors] = {};
        for (int64_t r = first; r < rows && r < first + kBlock; ++r) {
          const Storage* const from = matrix.row(d, r) + columns.first + column;
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v)
            if (v * kL < left) sum[v] += load<Compute>(from + v * kL, left - v * kL);
        }
        for (int v = 0; v < kVectors; ++v) total[v] += sum[v];
      }
      for (int v = 0; v < kVectors && v * kL < left; ++v)
        for (const BiasGradient* const bias : {&here, &there})
          add_to_bias(*bias, first_sum + column + v * kL, total[v], left - v * kL);
    }
  }
  void add_to_bias(const BiasGradient& bias, int64_t column, Value sum, int64_t left) const {
    if (!bias.result) return;
    Storage* const result = at<Storage>(bias.result, column);
    Compute* const kept = bias.sum ? at<Compute>(bias.sum, column) : nullptr;
    if (first_turn_ > 0) sum += kept ? load<Compute>(kept, left) : load<Compute>(result, left);
    if (kept && last_turn_ < turns())
      store<Compute>(kept, sum, left);
    else
      store<Compute>(result, sum, left);
  }

  // One step of a group.
  struct Step {
    const GroupRows& rows;
    const Group& group;
    int64_t d, t;
    int64_t active, active_before;  // the group's rows that have it, and that have the step before
    int64_t started;                // rows whose later step has been done
    int from, to;                   // the buffers of the later step's dgates and of this one's
    int64_t rows_before;            // of a chunk, of steps before this one
  };

  // One row of the group in it.
  struct StepRow {
    int64_t r, b, data_row, left_row;  // left_row: of what the step leaves
    bool started;                      // a later step has left its dgates: the product counts
    bool cut;                          // a segment ends behind this step: nothing comes from the later one
    int64_t previous_row;              // data row of the step before; -1: hx, cx; -2: zeros
  };
  static constexpr int64_t kInitial = -1, kZeros = -2;

  StepRow row_at(const Step& step, int64_t r) const {
    const GroupRows& rows = step.rows;
    const int64_t b = rows.batch_index(r), before = rows.before(step.t);
    const bool started = r < step.started;
    const int64_t data_row = schedule_.data_row(step.t, b);
    StepRow row{r,        b,
                data_row, chunks_ ? step.rows_before + rows.sorted(r) : data_row,
                started,  started && rows.cut_after(step.t, r),
                kInitial};
    if (r < step.active_before) row.previous_row = schedule_.data_row(before, b);
    if (rows.cut_before(step.t, r)) row.previous_row = kZeros;
    return row;
  }

  // A value that entered the step: from `trajectory` (rows, D*width), from `initial` (D, B, width), or zero.
  Value entering(const void* trajectory, const void* initial, int64_t d, const StepRow& row, int64_t unit,
                 int64_t width) const {
    if (row.previous_row >= 0)
      return load<Compute>(at<Storage>(trajectory, (row.previous_row * p_.directions + d) * width + unit),
                           width - unit);
    if (row.previous_row == kInitial && initial)
      return load<Compute>(at<Storage>(initial, (d * p_.rows.batch + row.b) * width + unit), width - unit);
    return Value{};
  }

  // Gradient of h_t on one block of units: from the later step, from the output, from h_n.
  Value total_dh(int64_t d, const StepRow& row, int64_t unit, Value from_later) const {
    const int64_t width = p_.state_size, left = width - unit;
    Value dh = unless<Compute>(!row.started || row.cut, from_later);
    if (p_.grad_output)
      dh += load<Compute>(at<Storage>(p_.grad_output, (row.data_row * p_.directions + d) * width + unit), left);
    if (!row.started && p_.grad_h_n)
      dh += load<Compute>(at<Storage>(p_.grad_h_n, (d * p_.rows.batch + row.b) * width + unit), left);
    return dh;
  }

  // What step_cell will read for one row of a tile, and the lines that it will write.
  void prefetch(const Step& step, int64_t r, int64_t tile) const {
    const int64_t data_row = schedule_.data_row(step.t, step.rows.batch_index(r));
    const int64_t d = step.d, H = p_.hidden_size, unit_row = data_row * p_.directions + d;
    const int64_t left_row = chunks_ ? step.rows_before + step.rows.sorted(r) : data_row;
    for (int64_t unit = tile * kTileUnits; unit < (tile + 1) * kTileUnits && unit < H; unit += kL) {
#pragma GCC unroll 4
      for (int q = 0; q < Cell::kReserve; ++q)
        __builtin_prefetch(at<Storage>(p_.reserve, (unit_row * Cell::kReserve + q) * H + unit), 0);
#pragma GCC unroll 4
      for (int g = 0; g < kG; ++g)
        if (leaves_beyond_cache_) __builtin_prefetch(gates_.row(d, left_row) + g * H + unit, 1);
      if (p_.grad_output && !p_.projected) __builtin_prefetch(at<Storage>(p_.grad_output, unit_row * H + unit), 0);
    }
  }

  // The cell's derivative on one block of units of one row; dh is the gradient of the cell's own output.
  void step_cell(const Step& step, const StepRow& row, int64_t unit, Value dh) const {
    const int64_t d = step.d, H = p_.hidden_size, left = H - unit, unit_row = row.data_row * p_.directions + d;
    const Group& group = step.group;
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
    if constexpr (Cell::kMayProject)
      if (hidden_.data)
        store<Compute>(hidden_.row(d, row.left_row) + unit, Cell::hidden({reserve, previous, now, dh}), left);
    Cell::backward({reserve, previous, now, dh}, carry, dgates, d_rec_split);
    if (Cell::kCarries) store<Compute>(group.carry.row(row.r) + unit, carry);
    RowValue* to_earlier = group.dgates[step.to].row(row.r) + unit;
    Storage* const gates = gates_.row(d, row.left_row) + unit;
    Storage* const gates_hh = Cell::kSplitGradient ? gates_hh_.row(d, row.left_row) + unit : nullptr;
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      const Value recurrent = g == Cell::kSplitGate ? d_rec_split : dgates[g];
      store<Compute>(gates + g * H, dgates[g], left);
      if (Cell::kSplitGradient && !chunks_) store<Compute>(gates_hh + g * H, recurrent, left);
      store<Compute>(to_earlier + g * H, recurrent, left);
    }
    if (Cell::kSplitGradient && chunks_) store<Compute>(gates_hh, d_rec_split, left);
  }

  // The gradients of the initial states, for a row whose first step was the one before.
  void write_grad_hx(const Step& step, int64_t r, int64_t unit, Value dh) const {
    const int64_t b = step.rows.batch_index(r);
    store<Compute>(at<Storage>(p_.grad_hx, (step.d * p_.rows.batch + b) * p_.state_size + unit),
                   unless<Compute>(step.rows.initial_cut(r), dh), p_.state_size - unit);
  }
  void write_grad_cx(const Step& step, int64_t r, int64_t unit) const {
    const int64_t b = step.rows.batch_index(r);
    store<Compute>(at<Storage>(p_.grad_cx, (step.d * p_.rows.batch + b) * p_.hidden_size + unit),
                   unless<Compute>(step.rows.initial_cut(r), load<Compute>(step.group.carry.row(r) + unit)),
                   p_.hidden_size - unit);
  }

  // use(tile, r, sums): the products of a tile's units for one row, kBlocks sums.
  template <class Use> void product_phase(const Step& step, Range my_tiles, const Use& use) const {
    const StateBuffer<RowValue>& later = step.group.dgates[step.from];
    for_tiles(my_tiles, step.from, [&](int64_t tile) {
      const auto on_rows = [&](int64_t first, int height, const Value* sums) {
        for (int i = 0; i < height; ++i) use(tile, first + i, sums + i * kBlocks);
      };
      const auto fetch = [&](int64_t first, int height) {
        for (int i = 0; i < height && first + i < step.active && !projected(); ++i) prefetch(step, first + i, tile);
      };
      weights_.multiply_hh(step.d, tile, {later.data, later.stride, step.started}, on_rows, fetch);
      const Value zeros[kBlocks] = {};
      for (int64_t r = step.started; r < step.active; ++r) use(tile, r, zeros);
    });
  }

  // What becomes of a row's products: the gradient of h_t, for the cell phase or the project phase; of a row whose
  // first step is done, the gradients of its initial states.
  void use_product(const Step& step, int64_t tile, int64_t r, const Value* sums) const {
    const StepRow row = r < step.active ? row_at(step, r) : StepRow{};
    Weights::keep_awake();
    for (int block = 0; block < kBlocks; ++block) {
      const int64_t unit = tile * kTileUnits + block * kL;
      if (unit >= p_.state_size) break;
      Value from_later = sums[block];
      if (Cell::kNeedsPreviousH && r < step.started) from_later += load<Compute>(step.group.carry.row(r) + unit);
      if (r >= step.active) {
        if (p_.grad_hx) write_grad_hx(step, r, unit, from_later);
        if (p_.grad_cx && !projected()) write_grad_cx(step, r, unit);
        continue;
      }
      const Value dh = total_dh(step.d, row, unit, from_later);
      if (!projected()) {
        step_cell(step, row, unit, dh);
        continue;
      }
      step.group.dh.put(r, unit, dh, p_.state_size - unit);
      store<Compute>(projected_.row(step.d, row.left_row) + unit, dh, p_.state_size - unit);
    }
  }

  // The gradient of `hidden`, which the cell takes at once.
  void project_phase(const Step& step, Range my_hidden_tiles) const {
    const StateBuffer<RowValue>& dh = step.group.dh;
    for_tiles(my_hidden_tiles, step.from, [&](int64_t tile) {
      const auto on_rows = [&](int64_t first, int height, const Value* sums) {
        for (int i = 0; i < height; ++i) {
          Weights::keep_awake();
          for (int block = 0; block < kBlocks; ++block) {
            const int64_t unit = tile * kTileUnits + block * kL;
            if (unit < p_.hidden_size) step_cell(step, row_at(step, first + i), unit, sums[i * kBlocks + block]);
          }
        }
      };
      weights_.multiply_hr(step.d, tile, {dh.data, dh.stride, step.active}, on_rows);
      for (int64_t r = step.active; p_.grad_cx && r < step.started; ++r)
        for (int64_t unit = tile * kTileUnits; unit < p_.hidden_size && unit < (tile + 1) * kTileUnits; unit += kL)
          write_grad_cx(step, r, unit);
    });
  }

  // One turn more than steps: the last only finishes the rows that are left, where anyone wants their initial
  // gradients.
  int64_t turns() const { return schedule_.steps() + (p_.grad_hx || p_.grad_cx ? 1 : 0); }
  int64_t rounds_a_turn() const { return projected() ? 2 : 1; }

  // One share of a group's round. Between two rounds all is there that the one gives to the other, and nobody reads any
  // more what the other writes over: the later step's dgates.
  void step_share(int64_t g, int64_t round, int64_t share) const {
    const typename Weights::Scope scope;
    const GroupRows rows = rows_of(g);
    const Group& group = groups_[g];
    const int64_t turn = projected() ? round / 2 : round;
    const int64_t s = schedule_.steps() - turn, t = rows.time(s - 1);
    const int current = static_cast<int>(turn & 1);
    const int64_t d = g / groups_each_;
    const Step step{rows,
                    group,
                    d,
                    t,
                    s > 0 ? rows.active(t) : 0,
                    s > 0 ? rows.active(rows.before(t)) : 0,
                    turn > 0 ? rows.active(rows.time(s)) : 0,
                    1 - current,
                    current,
                    chunks_ && s > 0 ? schedule_.rows_before(t) - schedule_.rows_before(times_of(d).first) : 0};
    if (projected() && round % 2 == 1) return project_phase(step, share_of(hidden_tiles_, share, shares_));
    // The derivative of a phase that needs all units of a row before the cell (see forward.h) goes into a round of its
    // own behind this one: from the gradients that the cell left in `dgates` to those of the products.
    product_phase(step, share_of(tiles_, share, shares_),
                  [&](int64_t tile, int64_t r, const Value* sums) { use_product(step, tile, r, sums); });
  }

  const BackwardParams& p_;
  const Chunks* const chunks_;
  const int64_t tiles_, hidden_tiles_, gates_width_;
  Weights weights_;
  const int64_t directions_at_once_, groups_each_, shares_, preparing_shares_;
  const LeftBySteps gates_, gates_hh_, projected_, hidden_;
  const bool leaves_beyond_cache_;          // what steps leave is not in cache any more when others write there
  int64_t first_turn_ = 0, last_turn_ = 0;  // of those under way
  Workspace workspace_;
  Schedule schedule_;
  Group* groups_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::cpu

// Forward time loop. Groups of rows and directions run independently; inside a group each share of a round (team.h) is
// some hidden units. The phases of a step:
//   product  h_{t-1} times a tile of packed W_hh, in registers;
//   cell     on that tile while it is in L1: h_t into the other of two state buffers, or `hidden`, o tanh(c);
//   project  with a projection, in a round of its own: h_t = W_hr hidden.
// The input projection is made a few steps at a time by the thread that does the share, so that it stays in its cache
// instead of going to memory and back. What the weights are, and how rows are multiplied by them, `Weights` knows:
// those that a layer keeps are CallWeights (call_weights.h), or in calls of one step TurnedWeights (turned_weights.h);
// those that were packed before the call are PanelWeights (panel_weights.h).
#pragma once

#include "../cells.h"
#include "schedule.h"
#include "team.h"
#include "tile.h"
#include "workspace.h"

namespace rnnfast::cpu {
namespace {

template <Mode kMode, class Storage, int kBlocks, class Weights> class ForwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using RowValue = typename Weights::RowValue;
  using Cell = rnnfast::Cell<VectorMath<Compute>, kMode>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kG = Cell::kGates;
  static constexpr int kVectors = kG * kBlocks;
  static constexpr int kTileUnits = kL * kBlocks;
  static constexpr int kStateUnits = kL * Weights::kStateVectors;
  static constexpr bool kKeepsExact = Cell::kNeedsPreviousH && sizeof(RowValue) < sizeof(Storage);

 public:
  ForwardLoop(const ForwardParams& params, int threads)
      : p_(params),
        threads_(threads),
        tiles_(divide_up(params.hidden_size, kTileUnits)),
        state_tiles_(params.projected ? divide_up(params.state_size, kStateUnits) : 0),
        directions_at_once_(choose_directions_at_once(params, threads, Weights::kWeightBytes, tiles_)),
        weights_(params, threads, shares_of_group(threads, directions_at_once_, tiles_)),
        groups_each_(choose_row_groups(params, threads, directions_at_once_, Weights::kWeightBytes, tiles_,
                                       weights_.packed_bytes(), Weights::kSpeed, Weights::kRowGroup)),
        shares_(shares_of_group(threads, directions_at_once_ * groups_each_, tiles_)),
        preparing_shares_(shares_for(threads)),
        group_rows_(divide_up(params.rows.batch, groups_each_)),
        chunk_steps_(chunk_steps()) {}

  int64_t run(Team& team) {
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    const int64_t groups = directions_at_once_ * groups_each_, rounds = schedule_.steps() * rounds_a_step();
    // The second sweep is of the second direction, if it has one to itself.
    const Stage stages[] = {{1, preparing_shares_, 1},
                            {groups, shares_, rounds},
                            {directions_at_once_ < p_.directions ? groups : 0, shares_, rounds}};
    team.run(stages, 3, [&](const Piece& piece) {
      if (piece.stage == 0)
        prepare(piece.share);
      else
        step_share((piece.stage - 1) * groups + piece.group, piece.round, piece.share, piece.member);
    });
    return 0;
  }

 private:
  static constexpr int64_t kMostChunkSteps = 256;

  // Steps whose input projection fits a part of the L2 cache, of one share; more where the input's weights do not stay
  // there from one chunk to the next, and reading them takes longer than to write and read the results.
  int64_t chunk_steps() const {
    const int64_t chunk_bytes = weights_.share_outgrows_cache(shares_) ? 2 << 20 : 448 << 10;
    const int64_t step_bytes = product(group_rows_, tiles_, kVectors, kVectorBytes) / shares_;
    int64_t steps = chunk_bytes / (step_bytes > 0 ? step_bytes : 1);
    if (steps > kMostChunkSteps) steps = kMostChunkSteps;
    if (steps > p_.rows.steps) steps = p_.rows.steps;
    return steps > 1 ? steps : 1;
  }

  struct Group {
    StateBuffer<RowValue> h[2];    // h_{t-1} and h_t: (rows, P or H)
    StateBuffer<Compute> exact;    // of a cell that reads h_{t-1} itself, if products round it: that (rows, H)
    StateBuffer<Compute> c;        // with a cell state: (rows, H)
    StateBuffer<RowValue> hidden;  // with projection: o tanh(c) (rows, H)
    Value* gates = nullptr;        // a chunk's input projection without bias: (tiles, rows of the chunk, kVectors)
  };

  // The steps of a chunk, as one member sees them: where the rows of each begin among the chunk's, and the input of
  // all.
  struct Chunk {
    int64_t group = -1, first_step = 0;
    int64_t first_row[kMostChunkSteps];
    int64_t rows = 0;
    const RowValue* input = nullptr;  // null until this member needs it
    int64_t input_stride = 0;
  };

  const void* data_of(Kind kind, int64_t d) const { return p_.parameters[kind].data[d]; }
  int64_t stride_of(Kind kind, int64_t d) const { return p_.parameters[kind].stride[d]; }
  bool projected() const { return Cell::kMayProject && p_.projected; }
  GroupRows rows_of(int64_t g) const { return {schedule_, g % groups_each_, groups_each_, g / groups_each_ == 1}; }

  void place() {
    schedule_.place(p_.rows, workspace_);
    // The rows of consecutive steps follow each other in memory and in the group: no copy of the input is needed.
    input_in_place_ = sizeof(Storage) == sizeof(RowValue) && groups_each_ == 1 && !p_.rows.lengths &&
                      (p_.rows.batch_sizes || p_.rows.batch_stride == 1) && Weights::takes_in_place(p_.input_size);
    chunks_ = workspace_.template take<Chunk>(threads_);
    for (int member = 0; chunks_ && member < threads_; ++member) chunks_[member] = Chunk();
    groups_ = workspace_.template take<Group>(p_.directions, groups_each_);
    const int64_t rows = round_up(group_rows_, Weights::kRowGroup), chunk_rows = product(chunk_steps_, group_rows_);
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) {
      Group group;
      group.h[0].place(workspace_, rows, p_.state_size);
      group.h[1].place(workspace_, rows, p_.state_size);
      if (kKeepsExact) group.exact.place(workspace_, rows, product(tiles_, kTileUnits));
      if (Cell::kHasCell) group.c.place(workspace_, rows, product(tiles_, kTileUnits));
      if (projected()) group.hidden.place(workspace_, rows, product(tiles_, kTileUnits));
      group.gates = workspace_.template take<Value>(tiles_, chunk_rows, kVectors);
      if (groups_) groups_[g] = group;
    }
    weights_.place(workspace_, rows, chunk_rows, groups_each_ == 1 && chunk_steps_ == p_.rows.steps);
    for (int64_t d = 0; d < p_.directions; ++d) bias_[d] = workspace_.template take<Value>(tiles_, kVectors);
    input_stride_ = round_up(p_.input_size, kLanes<RowValue>);
    copied_rows_ = round_up(chunk_rows, Weights::kRowGroup);
    if (!input_in_place_) input_copies_ = workspace_.template take<RowValue>(threads_, copied_rows_, input_stride_);
  }

  // b_ih + b_hh in the order of a tile; b_hh of a split gate is added to its recurrent part.
  void pack_bias(int64_t d, int64_t tile) {
    for (int v = 0; v < kVectors; ++v) {
      const TileSource source = source_of_tile<kG, kTileUnits, kL>(p_.hidden_size, tile, v);
      Value bias{};
      const void *ih = data_of(Kind::bias_ih, d), *hh = data_of(Kind::bias_hh, d);
      if (ih) bias += load<Compute>(at<Storage>(ih, source.weight_row), source.units);
      if (hh && v % kG != Cell::kSplitGate) bias += load<Compute>(at<Storage>(hh, source.weight_row), source.units);
      bias_[d][tile * kVectors + v] = bias;
    }
  }

  // One share of what must be there before the first step: packed weights and initial states.
  void prepare(int64_t share) {
    const Range tiles = share_of(p_.directions * tiles_, share, preparing_shares_);
    for (int64_t i = tiles.first; i < tiles.last; ++i) {
      const int64_t d = i / tiles_, tile = i % tiles_;
      weights_.prepare_tile(d, tile);
      pack_bias(d, tile);
    }
    if (projected()) {
      const Range state_tiles = share_of(p_.directions * state_tiles_, share, preparing_shares_);
      for (int64_t i = state_tiles.first; i < state_tiles.last; ++i)
        weights_.prepare_state_tile(i / state_tiles_, i % state_tiles_);
    }
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) initialize(g, share);
  }

  // hx and cx into the state buffers (both of h: a row that starts late finds it in either); the states of rows without
  // a step.
  void initialize(int64_t g, int64_t share) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    Group& group = groups_[g];
    const Range range = share_of(rows.count(), share, preparing_shares_);
    for (int64_t r = range.first; r < range.last; ++r) {
      const int64_t b = rows.batch_index(r);
      const bool cut = rows.initial_cut(r), empty = r >= rows.active(0);
      const auto copy = [&](const void* from, void* final_state, auto* to, auto* to_too, int64_t width) {
        for (int64_t u = 0; u < width; u += kL) {
          const int64_t offset = (d * p_.rows.batch + b) * width + u;
          const Value value = from ? load<Compute>(at<Storage>(from, offset), width - u) : Value{};
          store<Compute>(to + u, unless<Compute>(cut, value));
          if (to_too) store<Compute>(to_too + u, unless<Compute>(cut, value));
          if (empty) store<Compute>(at<Storage>(final_state, offset), value, width - u);
        }
      };
      for (StateBuffer<RowValue>* states : {&group.h[0], &group.h[1]}) states->clear_last(r, p_.state_size);
      if (projected()) group.hidden.clear_last(r, p_.hidden_size);
      copy(p_.hx, p_.h_n, group.h[0].row(r), group.h[1].row(r), p_.state_size);
      if (kKeepsExact) copy(p_.hx, p_.h_n, group.exact.row(r), static_cast<Compute*>(nullptr), p_.state_size);
      if (Cell::kHasCell) copy(p_.cx, p_.c_n, group.c.row(r), static_cast<Compute*>(nullptr), p_.hidden_size);
    }
    zero_beyond_lengths(rows, static_cast<Storage*>(p_.output), p_.directions * p_.state_size, d * p_.state_size,
                        p_.state_size, range);
    if (Cell::kHasCell)
      zero_beyond_lengths(rows, static_cast<Storage*>(p_.cell_states), p_.directions * p_.hidden_size,
                          d * p_.hidden_size, p_.hidden_size, range);
  }

  // One step of a group.
  struct Step {
    const GroupRows& rows;
    const Group& group;
    int64_t d, t;
    int64_t active, active_after;  // the group's rows that have it, and that have the next one
    int from, to;                  // the state buffers of h_{t-1} and of h_t
    int64_t chunk_row;             // its first row among the chunk's
  };

  // One row of the group in it.
  struct StepRow {
    int64_t r, b, data_row;
    bool last;  // the row's last step: its state is h_n, c_n
    bool cut;   // a segment ends behind it
  };
  StepRow row_at(const Step& step, int64_t r) const {
    const int64_t b = step.rows.batch_index(r);
    return {r, b, schedule_.data_row(step.t, b), r >= step.active_after, step.rows.cut_after(step.t, r)};
  }

  void write_h(const Step& step, const StepRow& row, int64_t unit, Value h) const {
    const int64_t left = p_.state_size - unit;
    store<Compute>(at<Storage>(p_.output, (row.data_row * p_.directions + step.d) * p_.state_size + unit), h, left);
    if (row.last) store<Compute>(at<Storage>(p_.h_n, (step.d * p_.rows.batch + row.b) * p_.state_size + unit), h, left);
    // What is stored in the type of the output is rounded by that.
    if constexpr (sizeof(RowValue) == sizeof(Compute)) h = rounded_to<Compute, Storage>(h);
    h = unless<Compute>(row.cut, h);
    step.group.h[step.to].put(row.r, unit, h, left);
    if constexpr (kKeepsExact) store<Compute>(step.group.exact.row(row.r) + unit, h);
  }

  // use(tile, first row, height, sums): the sums W_hh h of a tile's units for some rows, (height, kVectors).
  template <class Use> void product_phase(const Step& step, Range my_tiles, int member, const Use& use) const {
    const StateBuffer<RowValue>& h = step.group.h[step.from];
    const auto rows = weights_.rows_of({h.data, h.stride, step.active}, p_.state_size, member);
    for_tiles(my_tiles, step.from, [&](int64_t tile) {
      weights_.multiply_hh(step.d, tile, rows,
                           [&](int64_t first, int height, const Value* sums) { use(tile, first, height, sums); });
    });
  }

  // The cell on what the product phase made.
  void cell_phase(const Step& step, int64_t tile, int64_t first, int height, const Value* sums) const {
    const Value* gates = gates_of_tile(step.group, tile) + (step.chunk_row + first) * kVectors;
    for (int i = 0; i < height; ++i) {
      const StepRow row = row_at(step, first + i);
      Weights::keep_awake();
      for (int block = 0; block < kBlocks; ++block) {
        const int64_t unit = tile * kTileUnits + block * kL;
        if (unit >= p_.hidden_size) break;
        step_cell(step, row, unit, sums + i * kVectors + block * kG, gates + i * kVectors + block * kG,
                  bias_[step.d] + tile * kVectors + block * kG);
      }
    }
  }

  // The cell on one block of units of one row: its kG recurrent sums, its input projection, and the bias of that.
  void step_cell(const Step& step, const StepRow& row, int64_t unit, const Value* sums, const Value* gates,
                 const Value* bias) const {
    const int64_t d = step.d, H = p_.hidden_size, left = H - unit, unit_row = row.data_row * p_.directions + d;
    const Group& group = step.group;
    Value x[kG], rec[kG], reserve[Cell::kReserve + 1];
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      x[g] = gates[g] + bias[g];
      rec[g] = sums[g];
    }
    if constexpr (Cell::kSplitGradient) {
      constexpr int kGate = Cell::kSplitGate;
      if (const void* bias_hh = data_of(Kind::bias_hh, d))
        rec[kGate] += load<Compute>(at<Storage>(bias_hh, kGate * H + unit), left);
    }
    UnitState<Value> state{};
    if constexpr (kKeepsExact)
      state.h = load<Compute>(group.exact.row(row.r) + unit);
    else if (Cell::kNeedsPreviousH)
      state.h = load<Compute>(group.h[step.from].row(row.r) + unit);
    if (Cell::kHasCell) state.c = load<Compute>(group.c.row(row.r) + unit);
    state = Cell::forward({x, rec}, state, reserve);
    if (Cell::kReserve && p_.reserve)
#pragma GCC unroll 4
      for (int q = 0; q < Cell::kReserve; ++q)
        store<Compute>(at<Storage>(p_.reserve, (unit_row * Cell::kReserve + q) * H + unit), reserve[q], left);
    if (Cell::kHasCell) {
      if (p_.cell_states) store<Compute>(at<Storage>(p_.cell_states, unit_row * H + unit), state.c, left);
      if (row.last) store<Compute>(at<Storage>(p_.c_n, (d * p_.rows.batch + row.b) * H + unit), state.c, left);
      store<Compute>(group.c.row(row.r) + unit, unless<Compute>(row.cut, state.c));
    }
    if (projected())
      group.hidden.put(row.r, unit, state.h, left);
    else
      write_h(step, row, unit, state.h);
  }

  // h_t = W_hr hidden.
  void project_phase(const Step& step, Range my_state_tiles, int member) const {
    const StateBuffer<RowValue>& hidden = step.group.hidden;
    const auto rows = weights_.rows_of({hidden.data, hidden.stride, step.active}, p_.hidden_size, member);
    for_tiles(my_state_tiles, step.from, [&](int64_t tile) {
      weights_.multiply_hr(step.d, tile, rows, [&](int64_t first, int height, const Value* sums) {
        for (int i = 0; i < height; ++i)
          for (int v = 0; v < Weights::kStateVectors; ++v) {
            const int64_t unit = tile * kStateUnits + v * kL;
            if (unit >= p_.state_size) break;
            write_h(step, row_at(step, first + i), unit, sums[i * Weights::kStateVectors + v]);
          }
      });
    });
  }

  int64_t chunk_end(const Chunk& chunk) const {
    return chunk.first_step + chunk_steps_ < schedule_.steps() ? chunk.first_step + chunk_steps_ : schedule_.steps();
  }

  // Where the rows of the chunk that begins at step `first` stand.
  void locate(const GroupRows& rows, int64_t group, int64_t first, Chunk& chunk) const {
    chunk.group = group;
    chunk.first_step = first;
    chunk.input = nullptr;
    chunk.rows = 0;
    const int64_t last = chunk_end(chunk);
    if (input_in_place_) {
      const int64_t earliest = rows.time(rows.reversed ? last - 1 : first),
                    latest = rows.time(rows.reversed ? first : last - 1);
      const int64_t origin = schedule_.data_row(earliest, 0);
      for (int64_t s = first; s < last; ++s) chunk.first_row[s - first] = schedule_.data_row(rows.time(s), 0) - origin;
      chunk.rows = schedule_.data_row(latest, 0) - origin + rows.active(latest);
      chunk.input = static_cast<const RowValue*>(p_.input) + origin * p_.input_size;
      chunk.input_stride = p_.input_size;
      return;
    }
    for (int64_t s = first; s < last; ++s) {
      chunk.first_row[s - first] = chunk.rows;
      chunk.rows += rows.active(rows.time(s));
    }
  }

  // The chunk's input for this member, where it does not lie row by row already.
  void gather(const GroupRows& rows, int member, Chunk& chunk) const {
    if (chunk.input) return;
    RowValue* copy = input_copies_ + member * copied_rows_ * input_stride_;
    chunk.input = copy;
    chunk.input_stride = input_stride_;
    for (int64_t s = chunk.first_step; s < chunk_end(chunk); ++s) {
      const int64_t t = rows.time(s), active = rows.active(t);
      for (int64_t r = 0; r < active; ++r, copy += input_stride_) {
        const Storage* from = at<Storage>(p_.input, schedule_.data_row(t, rows.batch_index(r)) * p_.input_size);
        // Up to the end of the row, which is whole vectors of operands.
        for (int64_t k = 0; k < input_stride_; k += kL)
          store<Compute>(copy + k, load<Compute>(from + k, p_.input_size - k));
      }
    }
  }

  // The input projection of a chunk, for a share's tiles.
  void input_projection(const Group& group, int64_t d, const Chunk& chunk, Range my_tiles, int member) const {
    const auto rows = weights_.input_of({chunk.input, chunk.input_stride, chunk.rows}, member, !input_in_place_);
    for (int64_t tile = my_tiles.first; tile < my_tiles.last; ++tile)
      weights_.multiply_ih(d, tile, rows, member, gates_of_tile(group, tile));
  }
  Value* gates_of_tile(const Group& group, int64_t tile) const {
    return group.gates + tile * chunk_steps_ * group_rows_ * kVectors;
  }

  int64_t rounds_a_step() const { return projected() ? 2 : 1; }

  // One share of a group's round. Between two rounds all is there that the one gives to the other, and nobody reads any
  // more what the other writes over: h_{t-1}, whose buffer takes h_{t+1}.
  void step_share(int64_t g, int64_t round, int64_t share, int member) const {
    const typename Weights::Scope scope;
    const GroupRows rows = rows_of(g);
    const Group& group = groups_[g];
    const int64_t s = projected() ? round / 2 : round, d = g / groups_each_;
    const Range my_tiles = share_of(tiles_, share, shares_);
    Chunk& chunk = chunks_[member];
    if (chunk.group != g || s < chunk.first_step || s >= chunk.first_step + chunk_steps_)
      locate(rows, g, s / chunk_steps_ * chunk_steps_, chunk);
    const int64_t t = rows.time(s);
    const int current = static_cast<int>(s & 1);
    const Step step{rows,    group,          d,
                    t,       rows.active(t), rows.active(rows.after(t)),
                    current, 1 - current,    chunk.first_row[s - chunk.first_step]};
    if (projected() && round % 2 == 1) return project_phase(step, share_of(state_tiles_, share, shares_), member);
    if (s == chunk.first_step) {
      gather(rows, member, chunk);
      input_projection(group, d, chunk, my_tiles, member);
    }
    // A phase that needs all units of a row before the cell, such as a normalisation, goes between these two: the
    // product phase's sums into a buffer of the group; then, in a round of its own, the new phase and the cell phase on
    // the buffer's rows.
    product_phase(step, my_tiles, member, [&](int64_t tile, int64_t first, int height, const Value* sums) {
      cell_phase(step, tile, first, height, sums);
    });
  }

  const ForwardParams& p_;
  const int threads_;
  const int64_t tiles_, state_tiles_, directions_at_once_;
  Weights weights_;
  const int64_t groups_each_, shares_, preparing_shares_, group_rows_, chunk_steps_;
  bool input_in_place_ = false;
  int64_t input_stride_ = 0, copied_rows_ = 0;
  Workspace workspace_;
  Schedule schedule_;
  Chunk* chunks_ = nullptr;  // of each member
  Group* groups_ = nullptr;
  Value* bias_[kMaxDirections]{};
  RowValue* input_copies_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::cpu

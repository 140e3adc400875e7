// Forward time loop. Groups of rows and directions run independently; inside a group each thread owns some hidden
// units. Each step: h_{t-1} times a tile of packed W_hh in registers, the cell on the tile while it is in L1, h_t into
// the other of two state buffers, one barrier. With a projection: the cell writes o tanh(c), a second product with W_hr
// makes h_t. The input gates are made a few steps at a time by the thread that uses them, so that they stay in its
// cache instead of going to memory and back.
#pragma once

#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

template <Mode kMode, class Storage, int kBlocks> class ForwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Cell = rnnfast::Cell<VectorMath<Compute>, kMode>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kG = Cell::kGates;
  static constexpr int kVectors = kG * kBlocks;
  static constexpr int kTileUnits = kL * kBlocks;

 public:
  ForwardLoop(const ForwardParams& params, int threads)
      : p_(params),
        threads_(threads),
        tiles_(divide_up(params.hidden_size, kTileUnits)),
        state_tiles_(params.projected ? divide_up(params.state_size, kL) : 0),
        groups_each_(choose_split(params, threads, sizeof(Compute), tiles_).row_groups),
        members_planned_(threads > params.directions * groups_each_ ? threads / (params.directions * groups_each_) : 1),
        // With one row a step each weight is used once: reading it as it lies beats packing it, unless there are many
        // steps.
        direct_(params.rows.batch == 1 ? params.rows.steps < kDirectSteps
                                       : product(params.rows.steps, params.rows.batch) < kDirectRows),
        group_rows_(divide_up(params.rows.batch, groups_each_)),
        chunk_steps_(params.from_input ? chunk_steps() : params.rows.steps) {}

  int64_t run(int threads) {
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    run_team(threads, [&](Team& team, int member) {
      const int members = team.members();
      pack(member, members);
      const Assignment mine(p_.directions * groups_each_, member, members);
      if (!mine.idle)
        for (int64_t g = mine.first_group; g < mine.groups; g += mine.group_stride)
          initialize(g, mine.rank, mine.members_per_group);
      team.wait();  // packed weights and initial states are there
      if (mine.idle) return;
      for (int64_t g = mine.first_group; g < mine.groups; g += mine.group_stride)
        steps(g, member, mine.rank, mine.members_per_group);
    });
    return 0;
  }

 private:
  static constexpr int64_t kDirectSteps = 8, kDirectRows = 24;
  static constexpr int64_t kMostChunkSteps = 256;

  // Steps whose input gates fit a part of the L2 cache, one thread's share.
  int64_t chunk_steps() const {
    constexpr int64_t kChunkBytes = 448 << 10;
    const int64_t step_bytes = product(group_rows_, tiles_, kVectors, kVectorBytes) / members_planned_;
    int64_t steps = kChunkBytes / (step_bytes > 0 ? step_bytes : 1);
    if (steps > kMostChunkSteps) steps = kMostChunkSteps;
    if (steps > p_.rows.steps) steps = p_.rows.steps;
    return steps > 1 ? steps : 1;
  }

  struct Group {
    StateBuffer<Compute> h[2];   // h_{t-1} and h_t: (rows, P or H)
    StateBuffer<Compute> c;      // LSTM: (rows, H)
    StateBuffer<Compute> inner;  // with projection: o tanh(c) (rows, H)
    Value* gates = nullptr;      // a chunk's input gates without bias: (tiles, rows of the chunk, kVectors)
  };

  // The steps of a chunk: where the rows of each begin among the chunk's, and the input of all.
  struct Chunk {
    int64_t first_step = 0;
    int64_t first_row[kMostChunkSteps];
    int64_t rows = 0;
    const Compute* input = nullptr;
    int64_t input_stride = 0;
  };

  GroupRows rows_of(int64_t g) const { return {schedule_, g % groups_each_, groups_each_, g / groups_each_ == 1}; }

  void place() {
    schedule_.place(p_.rows, workspace_);
    // The rows of consecutive steps follow each other in memory and in the group: no copy of the input is needed.
    input_in_place_ = sizeof(Storage) == sizeof(Compute) && groups_each_ == 1 && !p_.rows.lengths &&
                      (p_.rows.batch_sizes || p_.rows.batch_stride == 1);
    barriers_ = workspace_.template take<Barrier>(p_.directions, groups_each_);
    groups_ = workspace_.template take<Group>(p_.directions, groups_each_);
    const int64_t rows = group_rows_, chunk_rows = product(chunk_steps_, rows);
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) {
      Group group;
      group.h[0].place(workspace_, rows, p_.state_size);
      group.h[1].place(workspace_, rows, p_.state_size);
      if (Cell::kHasCell) group.c.place(workspace_, rows, product(tiles_, kTileUnits));
      if (p_.projected) group.inner.place(workspace_, rows, product(tiles_, kTileUnits));
      if (p_.from_input) group.gates = workspace_.template take<Value>(tiles_, chunk_rows, kVectors);
      if (groups_) {
        groups_[g] = group;
        barriers_[g] = Barrier();
      }
    }
    for (int64_t d = 0; d < p_.directions; ++d) {
      if (!direct_) packed_hh_[d] = workspace_.template take<Compute>(tiles_, kVectors, kL, p_.state_size);
      if (p_.projected) packed_hr_[d] = workspace_.template take<Compute>(state_tiles_, kL, p_.hidden_size);
      if (!p_.from_input) continue;
      if (!direct_) packed_ih_[d] = workspace_.template take<Compute>(tiles_, kVectors, kL, p_.input_size);
      bias_[d] = workspace_.template take<Value>(tiles_, kVectors);
    }
    input_stride_ = round_up(p_.input_size, kL);
    if (p_.from_input && !input_in_place_)
      input_copies_ = workspace_.template take<Compute>(threads_, chunk_rows, input_stride_);
  }

  // Where a tile's vector v comes from: its gate, its first unit, and how many of its units there are.
  struct Source {
    int64_t row, units;
  };
  Source source_of(int64_t tile, int v) const {
    const int64_t unit = tile * kTileUnits + v / kG * kL, left = p_.hidden_size - unit;
    return left > 0 ? Source{v % kG * p_.hidden_size + unit, left} : Source{0, 0};
  }

  void pack_tile(const void* weight, int64_t stride, int64_t tile, int64_t k_count, Compute* packed) const {
    for (int v = 0; v < kVectors; ++v) {
      const Source source = source_of(tile, v);
      pack_rows(at<Storage>(weight, source.row * stride), stride, source.units, k_count,
                packed + tile * kVectors * kL * k_count + v * kL, kVectors * kL);
    }
  }

  // b_ih + b_hh in the order of a tile; b_hn stands inside r * (W_hn h + b_hn) and is added there.
  void pack_bias(int64_t d, int64_t tile) {
    for (int v = 0; v < kVectors; ++v) {
      const Source source = source_of(tile, v);
      Value bias{};
      if (p_.bias_ih[d]) bias += load<Compute>(at<Storage>(p_.bias_ih[d], source.row), source.units);
      if (p_.bias_hh[d] && !(v % kG == Cell::kSplitGate))
        bias += load<Compute>(at<Storage>(p_.bias_hh[d], source.row), source.units);
      bias_[d][tile * kVectors + v] = bias;
    }
  }

  void pack(int member, int members) {
    const Share tiles = share_of(p_.directions * tiles_, member, members);
    for (int64_t i = tiles.first; i < tiles.last; ++i) {
      const int64_t d = i / tiles_, tile = i % tiles_;
      if (!direct_) pack_tile(p_.weight_hh[d], p_.weight_hh_stride[d], tile, p_.state_size, packed_hh_[d]);
      if (!p_.from_input) continue;
      if (!direct_) pack_tile(p_.weight_ih[d], p_.weight_ih_stride[d], tile, p_.input_size, packed_ih_[d]);
      pack_bias(d, tile);
    }
    if (p_.projected) {
      const Share share = share_of(p_.directions * state_tiles_, member, members);
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t d = i / state_tiles_, unit = i % state_tiles_ * kL;
        pack_rows(at<Storage>(p_.weight_hr[d], unit * p_.weight_hr_stride[d]), p_.weight_hr_stride[d],
                  p_.state_size - unit, p_.hidden_size, packed_hr_[d] + unit * p_.hidden_size, kL);
      }
    }
  }

  // hx and cx into the state buffers (both of h: a row that starts late finds it in either); the states of rows without
  // a step.
  void initialize(int64_t g, int rank, int members) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    Group& group = groups_[g];
    const Share share = share_of(rows.count(), rank, members);
    for (int64_t r = share.first; r < share.last; ++r) {
      const int64_t b = rows.batch_index(r);
      const bool cut = !rows.reversed && r < rows.alive(0) && rows.cut_before(0, r);
      const bool empty = r >= rows.alive(0);
      const auto copy = [&](const void* from, void* final_state, Compute* to, Compute* to_too, int64_t width) {
        for (int64_t u = 0; u < width; u += kL) {
          const int64_t offset = (d * p_.rows.batch + b) * width + u;
          const Value value = from ? load<Compute>(at<Storage>(from, offset), width - u) : Value{};
          store<Compute>(to + u, unless<Compute>(cut, value));
          if (to_too) store<Compute>(to_too + u, unless<Compute>(cut, value));
          if (empty) store<Compute>(at<Storage>(final_state, offset), value, width - u);
        }
      };
      copy(p_.hx, p_.h_n, group.h[0].row(r), group.h[1].row(r), p_.state_size);
      if (Cell::kHasCell) copy(p_.cx, p_.c_n, group.c.row(r), nullptr, p_.hidden_size);
    }
    zero_beyond_lengths(rows, static_cast<Storage*>(p_.output), p_.directions * p_.state_size, d * p_.state_size,
                        p_.state_size, rank, members);
    if (Cell::kHasCell)
      zero_beyond_lengths(rows, static_cast<Storage*>(p_.cell_states), p_.directions * p_.hidden_size,
                          d * p_.hidden_size, p_.hidden_size, rank, members);
  }

  // One row of one step, as the cell's epilogue sees it.
  struct Row {
    int64_t r, b, row;
    bool last;  // the row's last step: its state is h_n, c_n
    bool cut;   // a segment ends behind it
  };
  Row row_at(const GroupRows& rows, int64_t t, int64_t r, int64_t alive_after) const {
    const int64_t b = rows.batch_index(r);
    return {r, b, schedule_.row(t, b), r >= alive_after, p_.rows.resets && rows.cut_after(t, r)};
  }

  void write_h(const Group& group, int next, int64_t d, const Row& row, int64_t unit, Value h) const {
    const int64_t left = p_.state_size - unit;
    store<Compute>(at<Storage>(p_.output, (row.row * p_.directions + d) * p_.state_size + unit), h, left);
    if (row.last) store<Compute>(at<Storage>(p_.h_n, (d * p_.rows.batch + row.b) * p_.state_size + unit), h, left);
    store<Compute>(group.h[next].row(row.r) + unit, unless<Compute>(row.cut, rounded_to<Compute, Storage>(h)));
  }

  // The cell on one block of units of one row; `product` are its kG recurrent sums, `made` its input gates and `bias`
  // theirs, unless they come as a tensor.
  void step_cell(const Group& group, int next, int64_t d, const Row& row, int64_t unit, const Value* product,
                 const Value* made, const Value* bias) const {
    const int64_t H = p_.hidden_size, left = H - unit, unit_row = row.row * p_.directions + d;
    Value x[kG], rec[kG], reserve[Cell::kReserve + 1];
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      x[g] = made ? made[g] + bias[g] : load<Compute>(at<Storage>(p_.gates, (unit_row * kG + g) * H + unit), left);
      rec[g] = product[g];
    }
    if constexpr (Cell::kSplitGradient) {
      constexpr int kGate = Cell::kSplitGate;
      if (p_.bias_hh[d]) rec[kGate] += load<Compute>(at<Storage>(p_.bias_hh[d], kGate * H + unit), left);
    }
    UnitState<Value> state{};
    if (Cell::kNeedsPreviousH) state.h = load<Compute>(group.h[1 - next].row(row.r) + unit);
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
    if (p_.projected)
      store<Compute>(group.inner.row(row.r) + unit, state.h);
    else
      write_h(group, next, d, row, unit, state.h);
  }

  // The rows of the chunk that begins at step `first`, and where their input lies.
  void gather(const GroupRows& rows, int64_t first, int member, Chunk& chunk) const {
    const int64_t last = first + chunk_steps_ < schedule_.steps() ? first + chunk_steps_ : schedule_.steps();
    chunk.first_step = first;
    chunk.rows = 0;
    if (input_in_place_) {
      const int64_t earliest = rows.time(rows.reversed ? last - 1 : first),
                    latest = rows.time(rows.reversed ? first : last - 1);
      const int64_t origin = schedule_.row(earliest, 0);
      for (int64_t s = first; s < last; ++s) chunk.first_row[s - first] = schedule_.row(rows.time(s), 0) - origin;
      chunk.rows = schedule_.row(latest, 0) - origin + rows.alive(latest);
      chunk.input = static_cast<const Compute*>(p_.input) + origin * p_.input_size;
      chunk.input_stride = p_.input_size;
      return;
    }
    Compute* copy = input_copies_ + member * chunk_steps_ * group_rows_ * input_stride_;
    chunk.input = copy;
    chunk.input_stride = input_stride_;
    for (int64_t s = first; s < last; ++s) {
      const int64_t t = rows.time(s), alive = rows.alive(t);
      chunk.first_row[s - first] = chunk.rows;
      chunk.rows += alive;
      for (int64_t r = 0; r < alive; ++r, copy += input_stride_) {
        const Storage* from = at<Storage>(p_.input, schedule_.row(t, rows.batch_index(r)) * p_.input_size);
        for (int64_t k = 0; k < p_.input_size; k += kL)
          store<Compute>(copy + k, load<Compute>(from + k, p_.input_size - k));
      }
    }
  }

  // The input gates of a chunk, for this thread's tiles.
  void make_gates(const Group& group, int64_t d, const Chunk& chunk, Share my_tiles) const {
    for (int64_t tile = my_tiles.first; tile < my_tiles.last; ++tile) {
      Value* to = gates_of_tile(group, tile);
      if (direct_)
        for (int64_t row = 0; row < chunk.rows; ++row)
          direct_product(chunk.input + row * chunk.input_stride, p_.weight_ih[d], p_.weight_ih_stride[d], p_.input_size,
                         tile, to + row * kVectors);
      else
        product_into<kVectors>(chunk.input, chunk.input_stride, chunk.rows,
                               packed_ih_[d] + tile * kVectors * kL * p_.input_size, p_.input_size, to);
    }
  }
  Value* gates_of_tile(const Group& group, int64_t tile) const {
    return group.gates + tile * chunk_steps_ * group_rows_ * kVectors;
  }

  void steps(int64_t g, int member, int rank, int members) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    const Group group = groups_[g];
    const Share my_tiles = share_of(tiles_, rank, members);
    const Share my_state_tiles = share_of(state_tiles_, rank, members);
    Chunk chunk;
    int current = 0;
    for (int64_t s = 0; s < schedule_.steps(); ++s, current = 1 - current) {
      if (p_.from_input && s % chunk_steps_ == 0) {
        gather(rows, s, member, chunk);
        make_gates(group, d, chunk, my_tiles);
      }
      const int64_t t = rows.time(s), alive = rows.alive(t), alive_after = rows.alive(rows.after(t));
      const StateBuffer<Compute>& h = group.h[current];
      for (int64_t tile = my_tiles.first; tile < my_tiles.last; ++tile) {
        const Value* made =
            p_.from_input ? gates_of_tile(group, tile) + chunk.first_row[s - chunk.first_step] * kVectors : nullptr;
        const auto use = [&](int64_t first, int height, const Value* acc) {
          for (int i = 0; i < height; ++i) {
            const Row row = row_at(rows, t, first + i, alive_after);
            for (int block = 0; block < kBlocks; ++block) {
              const int64_t unit = tile * kTileUnits + block * kL;
              if (unit >= p_.hidden_size) break;
              step_cell(group, 1 - current, d, row, unit, acc + i * kVectors + block * kG,
                        made ? made + (first + i) * kVectors + block * kG : nullptr,
                        made ? bias_[d] + tile * kVectors + block * kG : nullptr);
            }
          }
        };
        if (direct_) {
          for (int64_t r = 0; r < alive; ++r) {
            Value acc[kVectors] = {};
            direct_product(h.row(r), p_.weight_hh[d], p_.weight_hh_stride[d], p_.state_size, tile, acc);
            use(r, 1, acc);
          }
        } else {
          for_row_tiles<kVectors>(h.data, h.stride, 1, alive, packed_hh_[d] + tile * kVectors * kL * p_.state_size,
                                  p_.state_size, use);
        }
      }
      if (p_.projected) {
        barriers_[g].wait(members);  // every unit's o tanh(c) is there
        for (int64_t tile = my_state_tiles.first; tile < my_state_tiles.last; ++tile)
          for_row_tiles<1>(group.inner.data, group.inner.stride, 1, alive, packed_hr_[d] + tile * kL * p_.hidden_size,
                           p_.hidden_size, [&](int64_t first, int height, const Value* acc) {
                             for (int i = 0; i < height; ++i)
                               write_h(group, 1 - current, d, row_at(rows, t, first + i, alive_after), tile * kL,
                                       acc[i]);
                           });
      }
      // h_t is there for all, and nobody reads h_{t-1} any more: its buffer may take h_{t+1}.
      if (s + 1 < schedule_.steps()) barriers_[g].wait(members);
    }
  }

  // One row times one tile of weights as they lie.
  void direct_product(const Compute* x, const void* weight, int64_t stride, int64_t k_count, int64_t tile,
                      Value* acc) const {
    for (int v = 0; v < kVectors; ++v) {
      const Source source = source_of(tile, v);
      if (source.units > 0)
        acc[v] = dot_rows(x, at<Storage>(weight, source.row * stride), stride, source.units, k_count);
    }
  }

  const ForwardParams& p_;
  const int threads_;
  const int64_t tiles_, state_tiles_, groups_each_, members_planned_;
  const bool direct_;
  const int64_t group_rows_, chunk_steps_;
  bool input_in_place_ = false;
  int64_t input_stride_ = 0;
  Workspace workspace_;
  Schedule schedule_;
  Barrier* barriers_ = nullptr;
  Group* groups_ = nullptr;
  Compute* packed_hh_[kMaxDirections]{};
  Compute* packed_hr_[kMaxDirections]{};
  Compute* packed_ih_[kMaxDirections]{};
  Value* bias_[kMaxDirections]{};
  Compute* input_copies_ = nullptr;
};

}  // namespace
}  // namespace rnnfast::cpu

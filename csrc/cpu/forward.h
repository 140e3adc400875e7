// Forward time loop. Groups of rows and directions run independently; inside a group each thread owns some hidden
// units. Each step: h_{t-1} times a tile of packed W_hh in registers, the cell on the tile while it is in L1, h_t into
// the other of two state buffers, one barrier. With a projection: the cell writes o tanh(c), a second product with W_hr
// makes h_t.
#pragma once

#include "time_loop.h"

namespace rnnfast::cpu {
namespace {

template <template <class> class CellOf, class Storage, int kBlocks> class ForwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Cell = CellOf<VectorMath<Compute>>;
  static constexpr int kL = kLanes<Compute>;
  static constexpr int kG = Cell::kGates;
  static constexpr int kVectors = kG * kBlocks;
  static constexpr int kTileUnits = kL * kBlocks;

 public:
  ForwardLoop(const ForwardParams& params, int threads)
      : p_(params),
        tiles_(divide_up(params.hidden_size, kTileUnits)),
        state_tiles_(params.projected ? divide_up(params.state_size, kL) : 0),
        groups_each_(choose_split(params, threads, sizeof(Compute), tiles_).row_groups),
        // With one row a step each weight is used once: reading it as it lies beats packing it, unless there are many
        // steps.
        direct_(params.rows.batch == 1 ? params.rows.steps < kDirectSteps
                                       : params.rows.steps * params.rows.batch < kDirectRows) {}

  bool run(int threads) {
    place();
    if (!workspace_.allocate()) return false;
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
        steps(g, mine.rank, mine.members_per_group);
    });
    return true;
  }

 private:
  static constexpr int64_t kDirectSteps = 8, kDirectRows = 8;

  struct Group {
    StateBuffer<Compute> h[2];   // h_{t-1} and h_t: (rows, P or H)
    StateBuffer<Compute> c;      // LSTM: (rows, H)
    StateBuffer<Compute> inner;  // with projection: o tanh(c) (rows, H)
  };

  GroupRows rows_of(int64_t g) const { return {schedule_, g % groups_each_, groups_each_, g / groups_each_ == 1}; }

  void place() {
    schedule_.place(p_.rows, workspace_);
    barriers_ = workspace_.template take<Barrier>(p_.directions * groups_each_);
    groups_ = workspace_.template take<Group>(p_.directions * groups_each_);
    const int64_t rows = divide_up(p_.rows.batch, groups_each_);
    for (int64_t g = 0; g < p_.directions * groups_each_; ++g) {
      Group group;
      group.h[0].place(workspace_, rows, p_.state_size);
      group.h[1].place(workspace_, rows, p_.state_size);
      if (Cell::kHasCell) group.c.place(workspace_, rows, tiles_ * kTileUnits);
      if (p_.projected) group.inner.place(workspace_, rows, tiles_ * kTileUnits);
      if (groups_) {
        groups_[g] = group;
        barriers_[g] = Barrier();
      }
    }
    for (int64_t d = 0; d < p_.directions; ++d) {
      if (!direct_) packed_hh_[d] = workspace_.template take<Compute>(tiles_ * kVectors * kL * p_.state_size);
      if (p_.projected) packed_hr_[d] = workspace_.template take<Compute>(state_tiles_ * kL * p_.hidden_size);
    }
  }

  void pack(int member, int members) {
    if (!direct_) {
      const Share share = share_of(p_.directions * tiles_, member, members);
      for (int64_t i = share.first; i < share.last; ++i) {
        const int64_t d = i / tiles_, tile = i % tiles_;
        Compute* to = packed_hh_[d] + tile * kVectors * kL * p_.state_size;
        for (int v = 0; v < kVectors; ++v) {
          const int64_t unit = tile * kTileUnits + v / kG * kL, gate = v % kG;
          const int64_t left = p_.hidden_size - unit;
          pack_rows(
              at<Storage>(p_.weight_hh[d], (gate * p_.hidden_size + (left > 0 ? unit : 0)) * p_.weight_hh_stride[d]),
              p_.weight_hh_stride[d], left > 0 ? left : 0, p_.state_size, to + v * kL, kVectors * kL);
        }
      }
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
      zero_beyond_lengths(rows, static_cast<Storage*>(p_.cells), p_.directions * p_.hidden_size, d * p_.hidden_size,
                          p_.hidden_size, rank, members);
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

  // The cell on one block of units of one row; `product` are its kG recurrent sums.
  void step_cell(const Group& group, int next, int64_t d, const Row& row, int64_t unit, const Value* product) const {
    const int64_t H = p_.hidden_size, left = H - unit, unit_row = row.row * p_.directions + d;
    Value x[kG], rec[kG], reserve[Cell::kReserve + 1];
#pragma GCC unroll 4
    for (int g = 0; g < kG; ++g) {
      x[g] = load<Compute>(at<Storage>(p_.gates, (unit_row * kG + g) * H + unit), left);
      rec[g] = product[g];
    }
    if (Cell::kNeedsPreviousH && p_.bias_hn[d]) rec[kG - 1] += load<Compute>(at<Storage>(p_.bias_hn[d], unit), left);
    UnitState<Value> state{};
    if (Cell::kNeedsPreviousH) state.h = load<Compute>(group.h[1 - next].row(row.r) + unit);
    if (Cell::kHasCell) state.c = load<Compute>(group.c.row(row.r) + unit);
    state = Cell::forward(x, rec, state, reserve);
    if (Cell::kReserve && p_.reserve)
#pragma GCC unroll 4
      for (int q = 0; q < Cell::kReserve; ++q)
        store<Compute>(at<Storage>(p_.reserve, (unit_row * Cell::kReserve + q) * H + unit), reserve[q], left);
    if (Cell::kHasCell) {
      if (p_.cells) store<Compute>(at<Storage>(p_.cells, unit_row * H + unit), state.c, left);
      if (row.last) store<Compute>(at<Storage>(p_.c_n, (d * p_.rows.batch + row.b) * H + unit), state.c, left);
      store<Compute>(group.c.row(row.r) + unit, unless<Compute>(row.cut, state.c));
    }
    if (p_.projected)
      store<Compute>(group.inner.row(row.r) + unit, state.h);
    else
      write_h(group, next, d, row, unit, state.h);
  }

  void steps(int64_t g, int rank, int members) {
    const GroupRows rows = rows_of(g);
    const int64_t d = g / groups_each_;
    const Group group = groups_[g];
    const Share my_tiles = share_of(tiles_, rank, members);
    const Share my_state_tiles = share_of(state_tiles_, rank, members);
    int current = 0;
    for (int64_t s = 0; s < schedule_.steps(); ++s, current = 1 - current) {
      const int64_t t = rows.time(s), alive = rows.alive(t), alive_after = rows.alive(rows.after(t));
      const StateBuffer<Compute>& h = group.h[current];
      for (int64_t tile = my_tiles.first; tile < my_tiles.last; ++tile) {
        const auto use = [&](int64_t first, int height, const Value* acc) {
          for (int i = 0; i < height; ++i) {
            const Row row = row_at(rows, t, first + i, alive_after);
            for (int block = 0; block < kBlocks; ++block) {
              const int64_t unit = tile * kTileUnits + block * kL;
              if (unit < p_.hidden_size) step_cell(group, 1 - current, d, row, unit, acc + i * kVectors + block * kG);
            }
          }
        };
        if (direct_)
          direct_product(h, d, tile, alive, use);
        else
          for_row_tiles<kVectors>(h.data, h.stride, 1, alive, packed_hh_[d] + tile * kVectors * kL * p_.state_size,
                                  p_.state_size, use);
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

  template <class Use>
  void direct_product(const StateBuffer<Compute>& h, int64_t d, int64_t tile, int64_t alive, const Use& use) const {
    Value acc[kVectors] = {};
    for (int64_t r = 0; r < alive; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t unit = tile * kTileUnits + v / kG * kL, gate = v % kG, left = p_.hidden_size - unit;
        if (left > 0)
          acc[v] =
              dot_rows(h.row(r), at<Storage>(p_.weight_hh[d], (gate * p_.hidden_size + unit) * p_.weight_hh_stride[d]),
                       p_.weight_hh_stride[d], left, p_.state_size);
      }
      use(r, 1, acc);
    }
  }

  const ForwardParams& p_;
  const int64_t tiles_, state_tiles_, groups_each_;
  const bool direct_;
  Workspace workspace_;
  Schedule schedule_;
  Barrier* barriers_ = nullptr;
  Group* groups_ = nullptr;
  Compute* packed_hh_[kMaxDirections]{};
  Compute* packed_hr_[kMaxDirections]{};
};

}  // namespace
}  // namespace rnnfast::cpu

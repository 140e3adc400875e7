// Forward time loop of one direction of a layer with options: forward.h's, but a step has two rounds, so that the
// second sees whole rows:
//   product  h_{t-1} times a tile of packed W_hh, into a buffer;
//   rows     norms, cell, zoneout, row by row;
// and where r multiplies h itself (GRU) two more, the same of what W_hn multiplies.
// All options are looked at while it runs: one compilation serves every combination.
#pragma once

#include "../schedule.h"
#include "products.h"
#include "row_math.h"

namespace rnnfast::cpu {
namespace {

template <class Storage> class VariantForwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Math = VariantMath<Compute>;
  static constexpr int kL = kLanes<Compute>;
  using Product = SumsProduct<Storage>;

 public:
  VariantForwardLoop(const VariantForward& params, int threads)
      : p_(params),
        H_(params.hidden_size),
        N_(params.width()),
        first_(params, 0, params.first_width(), threads),
        second_(params, params.first_width(), params.second_width(), threads),
        threads_(threads),
        groups_count_(
            choose_row_groups(first_.params, threads, 1, sizeof(Compute), first_.tiles(), first_.packed_bytes(), 1, 1)),
        shares_(shares_of_group(threads, groups_count_, first_.tiles())),
        preparing_shares_(shares_for(threads)),
        gate_{params.hard_sigmoid},
        lstm_{params.coupled(), gate_},
        gru_{params.relu, gate_} {}

  int64_t run(Team& team) {
    place();
    if (const int64_t missing = workspace_.allocate()) return missing;
    place();
    const Stage stages[] = {{1, preparing_shares_, 1}, {groups_count_, shares_, rounds_a_step() * schedule_.steps()}};
    team.run(stages, 2, [&](const Piece& piece) {
      if (piece.stage == 0)
        prepare(piece.share);
      else
        step_share(piece.group, piece.round, piece.share, piece.member);
    });
    return 0;
  }

 private:
  int64_t rounds_a_step() const { return p_.reset_first ? 4 : 2; }

  struct Group {
    StateBuffer<Compute> h;       // h_{t-1}, and behind the second round h_t: (rows, H)
    StateBuffer<Compute> masked;  // with a mask: what W_hh multiplies of it
    StateBuffer<Compute> c;       // with a cell state: (rows, H)
    StateBuffer<Compute> l;       // of the sLSTM: log of what c was divided by (rows, H)
    StateBuffer<Compute> sums;    // W_hh h: (rows, G*H)
    StateBuffer<Compute> reset;   // where r multiplies h itself: r h (rows, H)
  };

  GroupRows rows_of(int64_t g) const { return {schedule_, g, groups_count_, p_.reverse}; }

  void place() {
    schedule_.place(p_.rows, workspace_);
    groups_ = workspace_.template take<Group>(groups_count_);
    const int64_t rows = divide_up(p_.rows.batch, groups_count_);
    for (int64_t g = 0; g < groups_count_; ++g) {
      Group group;
      group.h.place(workspace_, rows, H_);
      if (p_.recurrent_mask) group.masked.place(workspace_, rows, H_);
      if (p_.has_cell()) group.c.place(workspace_, rows, H_);
      if (p_.exponential) group.l.place(workspace_, rows, H_);
      group.sums.place(workspace_, rows, N_);
      if (p_.reset_first) group.reset.place(workspace_, rows, H_);
      if (groups_) groups_[g] = group;
    }
    scratch_.place(workspace_, threads_, H_);
    for (Product* product : {&first_, &second_}) product->place(workspace_);
  }

  void prepare(int64_t share) {
    for (const Product* product : {&first_, &second_}) {
      const Range tiles = share_of(product->tiles(), share, preparing_shares_);
      for (int64_t tile = tiles.first; tile < tiles.last; ++tile) product->prepare_tile(tile);
    }
    for (int64_t g = 0; g < groups_count_; ++g) initialize(g, share);
  }

  // hx and cx into the state buffers; the states of rows without a step.
  void initialize(int64_t g, int64_t share) {
    const GroupRows rows = rows_of(g);
    const Group& group = groups_[g];
    const Range range = share_of(rows.count(), share, preparing_shares_);
    for (int64_t r = range.first; r < range.last; ++r) {
      const int64_t b = rows.batch_index(r);
      const bool cut = rows.initial_cut(r), empty = r >= rows.active(0);
      for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
        const Value h = p_.hx ? load<Compute>(at<Storage>(p_.hx, b * H_ + u), left) : Value{};
        put_h(group, r, b, u, left, unless<Compute>(cut, h));
        if (empty) store<Compute>(at<Storage>(p_.h_n, b * H_ + u), h, left);
        if (!p_.has_cell()) return;
        const Value c = p_.cx ? load<Compute>(at<Storage>(p_.cx, b * H_ + u), left) : Value{};
        store<Compute>(group.c.row(r) + u, unless<Compute>(cut, c));
        if (empty) store<Compute>(at<Storage>(p_.c_n, b * H_ + u), c, left);
        if (!p_.exponential) return;
        const Value l = p_.lx ? load<Compute>(at<Storage>(p_.lx, b * H_ + u), left) : nothing();
        store<Compute>(group.l.row(r) + u, cut ? nothing() : l);
        if (empty) store<Compute>(at<Storage>(p_.l_n, b * H_ + u), l, left);
      });
    }
    zero_beyond_lengths(rows, static_cast<Storage*>(p_.output), H_, 0, H_, range);
    if (p_.has_cell()) zero_beyond_lengths(rows, static_cast<Storage*>(p_.cell_states), H_, 0, H_, range);
  }

  // The sLSTM's l where nothing was taken in yet.
  static Value nothing() { return broadcast<Compute>(-__builtin_inff()); }

  void put_h(const Group& group, int64_t r, int64_t b, int64_t u, int64_t left, Value h) const {
    store<Compute>(group.h.row(r) + u, h);
    if (p_.recurrent_mask)
      store<Compute>(group.masked.row(r) + u, h * load<Compute>(at<Storage>(p_.recurrent_mask, b * H_ + u), left));
  }

  // One row of a group in a step.
  struct Row {
    const Group& group;
    int64_t r, b, data_row;
    bool last;  // the row's last step: its state is h_n, c_n
    bool cut;   // a segment ends behind it
    Compute* sums;
    Compute* scratch;
  };

  // One share of a group's round: of the tiles in a product's, of the rows in the others. Between a product and the
  // rows all sums of a row are there, whoever made them; between the rows and the next product all of h_t is, and
  // nobody reads h_{t-1} any more: so one buffer does for both.
  void step_share(int64_t g, int64_t round, int64_t share, int member) const {
    const GroupRows rows = rows_of(g);
    const Group& group = groups_[g];
    const int64_t s = round / rounds_a_step(), t = rows.time(s), active = rows.active(t);
    const int64_t phase = round % rounds_a_step();
    if (phase == 0)
      return multiply(first_, p_.recurrent_mask ? group.masked : group.h, group, s, active, share, member);
    if (phase == 2) return multiply(second_, group.reset, group, s, active, share, member);
    const Range mine = share_of(active, share, shares_);
    const int64_t active_after = rows.active(rows.after(t));
    for (int64_t r = mine.first; r < mine.last; ++r) {
      const int64_t b = rows.batch_index(r);
      const Row row{group,
                    r,
                    b,
                    schedule_.data_row(t, b),
                    r >= active_after,
                    rows.cut_after(t, r),
                    group.sums.row(r),
                    scratch_.row(member)};
      if (p_.reset_first && phase == 1) {
        reset_state(row);
        continue;
      }
      normalise_gates(row);
      if (p_.exponential)
        slstm(row);
      else if (p_.has_cell())
        lstm(row);
      else
        other_cell(row);
    }
  }

  // A share of the tiles of a product, for a step's rows, into their sums.
  void multiply(const Product& product, const StateBuffer<Compute>& h, const Group& group, int64_t s, int64_t active,
                int64_t share, int member) const {
    for_tiles(share_of(product.tiles(), share, shares_), s, [&](int64_t tile) {
      product.multiply(tile, {h.data, h.stride, active}, member,
                       [&](int64_t row, int64_t column, Value sums, int64_t left) {
                         store<Compute>(group.sums.row(row) + product.first_row + column, sums, left);
                       });
    });
  }

  // The sums of a row become what the norm makes of them, before its weight and bias.
  void normalise_gates(const Row& row) const {
    if (p_.gate_norm == GateNorm::none) return;
    Compute* const sums = row.sums;
    if (p_.gate_norm == GateNorm::joint)
      for_vectors<Compute>(N_, [&](int64_t i, int64_t left) {
        const Value x = load<Compute>(at<Storage>(p_.gates_in, row.data_row * N_ + i), left);
        store<Compute>(sums + i, load<Compute>(sums + i) + x);
      });
    const NormOf<Compute> norm = norm_of(sums, N_, p_.rms, p_.eps);
    for_vectors<Compute>(N_, [&](int64_t i, int64_t left) {
      const Value normed = norm(load<Compute>(sums + i));
      store<Compute>(sums + i, normed);
      if (p_.normed) store<Compute>(at<Storage>(p_.normed, row.data_row * N_ + i), normed, left);
    });
    if (p_.scale) static_cast<Compute*>(p_.scale)[row.data_row] = norm.scale;
  }

  // What the input and what W_hh h give gate `g`, of which a joint norm made one.
  struct GateParts {
    Value x, recurrent;
  };
  GateParts gate_parts(const Row& row, int64_t g, int64_t u, int64_t left) const {
    const int64_t i = g * H_ + u;
    Value recurrent = load<Compute>(row.sums + i, left);
    if (p_.vectors[kNorm]) recurrent *= load<Compute>(at<Storage>(p_.vectors[kNorm], i), left);
    if (p_.gate_norm == GateNorm::joint) {
      if (p_.vectors[kNormBias]) recurrent += load<Compute>(at<Storage>(p_.vectors[kNormBias], i), left);
      return {Value{}, recurrent};
    }
    return {load<Compute>(at<Storage>(p_.gates_in, row.data_row * N_ + i), left), recurrent};
  }
  Value gate(const Row& row, int64_t g, int64_t u, int64_t left) const {
    const GateParts parts = gate_parts(row, g, u, left);
    return parts.x + parts.recurrent;
  }
  // Peephole `number`'s part of a gate.
  Value peep(int number, Value c, int64_t u, int64_t left) const {
    if (!p_.vectors[kPeephole]) return Value{};
    return load<Compute>(at<Storage>(p_.vectors[kPeephole], number * H_ + u), left) * c;
  }
  Value mask_of_candidate(const Row& row, int64_t u, int64_t left) const {
    if (!p_.candidate_mask) return broadcast<Compute>(1);
    return load<Compute>(at<Storage>(p_.candidate_mask, row.b * H_ + u), left);
  }
  void reserve(const Row& row, int q, int64_t u, Value value, int64_t left) const {
    if (p_.reserve_out)
      store<Compute>(at<Storage>(p_.reserve_out, (row.data_row * p_.reserve() + q) * H_ + u), value, left);
  }

  void lstm(const Row& row) const {
    const bool coupled = p_.coupled();
    const int of_g = coupled ? 1 : 2, of_o = of_g + 1;
    Compute* const fresh_c = row.scratch;
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      const Value c = load<Compute>(row.group.c.row(row.r) + u, left);
      const Value sum_i = gate(row, 0, u, left) + peep(0, c, u, left);
      const Value sum_f = coupled ? Value{} : gate(row, 1, u, left) + peep(1, c, u, left);
      const auto gates = lstm_.gates(sum_i, sum_f, gate(row, of_g, u, left));
      reserve(row, 0, u, gates.i, left);
      if (!coupled) reserve(row, 1, u, gates.f, left);
      reserve(row, of_g, u, gates.g, left);
      store<Compute>(fresh_c + u, lstm_.cell_state(gates, mask_of_candidate(row, u, left), c), left);
    });
    NormOf<Compute> norm{0, 1};
    if (p_.cell_norm != CellNorm::none) norm = norm_of(fresh_c, H_, p_.rms, p_.eps);
    const Zoneout<Compute> zoneout_c(p_.kept_c, row.data_row, H_, p_.zoneout_c);
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      Value fresh = load<Compute>(fresh_c + u, left), seen = fresh;
      if (p_.cell_norm != CellNorm::none) {
        seen = norm(fresh) * load<Compute>(at<Storage>(p_.vectors[kNormC], u), left);
        if (p_.vectors[kNormCBias]) seen += load<Compute>(at<Storage>(p_.vectors[kNormCBias], u), left);
      }
      if (p_.cell_norm == CellNorm::carried) fresh = seen;
      const Value o = gate_(gate(row, of_o, u, left) + peep(of_o - 1, fresh, u, left));
      reserve(row, of_o, u, o, left);
      Value c = fresh;
      if (zoneout_c.is_on())
        c = zoneout_c.mix(load<Compute>(row.group.c.row(row.r) + u, left), fresh, zoneout_c.part(u, left));
      store<Compute>(at<Storage>(p_.cell_states, row.data_row * H_ + u), c, left);
      if (row.last) store<Compute>(at<Storage>(p_.c_n, row.b * H_ + u), c, left);
      store<Compute>(row.group.c.row(row.r) + u, unless<Compute>(row.cut, c));
      write_h(row, u, left, o * Math::tanh(seen));
    });
  }

  void slstm(const Row& row) const {
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      Compute *const l_at = row.group.l.row(row.r) + u, *const c_at = row.group.c.row(row.r) + u;
      Value sums[4], saved[4];
      for (int g = 0; g < 4; ++g) sums[g] = gate(row, g, u, left);
      const auto now =
          ExponentialLstm<Math>::forward(sums, load<Compute>(c_at, left), load<Compute>(l_at, left), saved);
      for (int g = 0; g < 4; ++g) reserve(row, g, u, saved[g], left);
      store<Compute>(at<Storage>(p_.cell_states, row.data_row * H_ + u), now.c, left);
      if (row.last) {
        store<Compute>(at<Storage>(p_.c_n, row.b * H_ + u), now.c, left);
        store<Compute>(at<Storage>(p_.l_n, row.b * H_ + u), now.l, left);
      }
      store<Compute>(c_at, unless<Compute>(row.cut, now.c));
      store<Compute>(l_at, row.cut ? nothing() : now.l);
      write_h(row, u, left, now.h);
    });
  }

  // r h, which W_hn multiplies.
  void reset_state(const Row& row) const {
    const StateBuffer<Compute>& h = p_.recurrent_mask ? row.group.masked : row.group.h;
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      const Value r = gate_(gate(row, 0, u, left));
      reserve(row, 0, u, r, left);
      store<Compute>(row.group.reset.row(row.r) + u, r * load<Compute>(h.row(row.r) + u, left));
    });
  }

  void other_cell(const Row& row) const {
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      if (p_.mode != Mode::gru) {
        const Value h = VariantRnn<Math>::forward(p_.mode, gate(row, 0, u, left));
        reserve(row, 0, u, h, left);
        return write_h(row, u, left, h);
      }
      const int of_z = p_.has_reset() ? 1 : 0, of_n = of_z + 1;
      const Value z = gate_(gate(row, of_z, u, left));
      Value r = broadcast<Compute>(1);  // where there is none, or where it was in the product
      if (p_.has_reset() && !p_.reset_first) {
        r = gate_(gate(row, 0, u, left));
        reserve(row, 0, u, r, left);
      }
      GateParts parts = gate_parts(row, of_n, u, left);
      if (p_.vectors[kBiasHn]) parts.recurrent += load<Compute>(at<Storage>(p_.vectors[kBiasHn], u), left);
      const Value n = gru_.candidate(parts.x, r, parts.recurrent);
      reserve(row, of_z, u, z, left);
      reserve(row, of_n, u, n, left);
      if (p_.has_reset()) reserve(row, 3, u, parts.recurrent, left);
      const Value h = load<Compute>(row.group.h.row(row.r) + u, left);
      write_h(row, u, left, gru_.state(z, n, mask_of_candidate(row, u, left), h));
    });
  }

  void write_h(const Row& row, int64_t u, int64_t left, Value h) const {
    const Zoneout<Compute> zoneout(p_.kept_h, row.data_row, H_, p_.zoneout_h);
    if (zoneout.is_on()) h = zoneout.mix(load<Compute>(row.group.h.row(row.r) + u, left), h, zoneout.part(u, left));
    store<Compute>(at<Storage>(p_.output, row.data_row * H_ + u), h, left);
    if (row.last) store<Compute>(at<Storage>(p_.h_n, row.b * H_ + u), h, left);
    put_h(row.group, row.r, row.b, u, left, unless<Compute>(row.cut, rounded_to<Compute, Storage>(h)));
  }

  const VariantForward& p_;
  const int64_t H_, N_;
  Product first_, second_;
  const int threads_;
  const int64_t groups_count_, shares_, preparing_shares_;
  const GateActivation<Math> gate_;
  const VariantLstm<Math> lstm_;
  const VariantGru<Math> gru_;
  Workspace workspace_;
  Schedule schedule_;
  Group* groups_ = nullptr;
  StateBuffer<Compute> scratch_;  // of each member: (H)
};

}  // namespace
}  // namespace rnnfast::cpu

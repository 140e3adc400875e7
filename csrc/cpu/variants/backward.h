// Backward time loop of one direction of a layer with options, the mirror of forward.h. A turn has two rounds:
//   product  the later step's gradients of W_hh h times a tile of packed W_hh^T, into a buffer;
//   rows     the derivatives of zoneout, cell and norms, row by row;
// and where r multiplies h itself (GRU) two more, the same of what W_hn multiplied.
// What vectors of the layer get is summed by each share for itself, and in the end over the shares, in their order: the
// result does not depend on who did which.
#pragma once

#include "../schedule.h"
#include "products.h"
#include "row_math.h"

namespace rnnfast::cpu {
namespace {

template <class Storage> class VariantBackwardLoop {
  using Compute = typename ComputeOf<Storage>::type;
  using Value = Vector<Compute>;
  using Math = VariantMath<Compute>;
  static constexpr int kL = kLanes<Compute>;
  using Product = StatesProduct<Storage>;

 public:
  VariantBackwardLoop(const VariantBackward& params, int threads)
      : p_(params),
        H_(params.hidden_size),
        N_(params.width()),
        first_(params, 0, params.first_width()),
        second_(params, params.first_width(), params.second_width()),
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
    const Stage stages[] = {{1, preparing_shares_, 1},
                            {groups_count_, shares_, rounds_a_turn() * turns()},
                            {1, preparing_shares_, any_vectors()}};
    team.run(stages, 3, [&](const Piece& piece) {
      if (piece.stage == 0)
        prepare(piece.share);
      else if (piece.stage == 1)
        step_share(piece.group, piece.round, piece.share, piece.member);
      else
        sum_share(piece.share);
    });
    return 0;
  }

 private:
  int64_t rounds_a_turn() const { return p_.reset_first ? 4 : 2; }

  struct Group {
    StateBuffer<Compute> dsums;    // gradient of W_hh h of the later step, and then of this one: (rows, G*H)
    StateBuffer<Compute> dh;       // its product with W_hh: (rows, H)
    StateBuffer<Compute> carry_h;  // what reaches the earlier h beside that product: (rows, H)
    StateBuffer<Compute> carry_c;  // gradient of c_{t-1}: (rows, H)
    StateBuffer<Compute> carry_l;  // of the sLSTM: gradient of l_{t-1}: (rows, H)
  };
  // What one share sums: of the turns under way, and of those before.
  struct Sums {
    Compute *now[kVariantVectors]{}, *before[kVariantVectors]{};
  };

  GroupRows rows_of(int64_t g) const { return {schedule_, g, groups_count_, p_.reverse}; }
  int64_t turns() const { return schedule_.steps() + (p_.grad_hx || p_.grad_cx || p_.grad_lx ? 1 : 0); }
  int64_t any_vectors() const {
    for (int i = 0; i < kVariantVectors; ++i)
      if (vector_size(p_, i)) return 1;
    return 0;
  }

  void place() {
    schedule_.place(p_.rows, workspace_);
    groups_ = workspace_.template take<Group>(groups_count_);
    sums_ = workspace_.template take<Sums>(groups_count_, shares_);
    const int64_t rows = divide_up(p_.rows.batch, groups_count_);
    for (int64_t g = 0; g < groups_count_; ++g) {
      Group group;
      group.dsums.place(workspace_, rows, N_);
      group.dh.place(workspace_, rows, H_);
      group.carry_h.place(workspace_, rows, H_);
      if (p_.has_cell()) group.carry_c.place(workspace_, rows, H_);
      if (p_.exponential) group.carry_l.place(workspace_, rows, H_);
      if (groups_) groups_[g] = group;
      for (int64_t share = 0; share < shares_; ++share) {
        Sums sums;
        for (int i = 0; i < kVariantVectors; ++i) {
          const int64_t size = round_up(vector_size(p_, i), kL);
          if (!size) continue;
          sums.now[i] = workspace_.template take<Compute>(sum(size, kL));
          sums.before[i] = workspace_.template take<Compute>(sum(size, kL));
        }
        if (sums_) sums_[g * shares_ + share] = sums;
      }
    }
    scratch_.place(workspace_, product(threads_, kScratches), H_);
    for (Product* product : {&first_, &second_}) product->place(workspace_);
  }

  void prepare(int64_t share) {
    for (const Product* product : {&first_, &second_}) product->prepare(share, preparing_shares_);
    const Range mine = share_of(groups_count_ * shares_, share, preparing_shares_);
    for (int64_t j = mine.first; j < mine.last; ++j)
      for (int i = 0; i < kVariantVectors; ++i)
        for_vectors<Compute>(vector_size(p_, i), [&](int64_t u, int64_t) {
          store<Compute>(sums_[j].now[i] + u, Value{});
          store<Compute>(sums_[j].before[i] + u, Value{});
        });
    for (int64_t g = 0; g < groups_count_; ++g) initialize(g, share);
  }

  // Rows without a step hand their final gradients straight on. Gradients beyond a row's length are zero.
  void initialize(int64_t g, int64_t share) {
    const GroupRows rows = rows_of(g);
    const Range range = share_of(rows.count(), share, preparing_shares_);
    for (int64_t r = range.first; r < range.last; ++r) {
      if (r < rows.active(0)) continue;
      const int64_t b = rows.batch_index(r);
      const auto copy = [&](const void* from, void* to) {
        if (!to) return;
        for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
          store<Compute>(at<Storage>(to, b * H_ + u),
                         from ? load<Compute>(at<Storage>(from, b * H_ + u), left) : Value{}, left);
        });
      };
      copy(p_.grad_h_n, p_.grad_hx);
      copy(p_.grad_c_n, p_.grad_cx);
      copy(p_.grad_l_n, p_.grad_lx);
    }
    for (void* rows_left : {p_.grad_gates, p_.grad_sums})
      zero_beyond_lengths(rows, static_cast<Storage*>(rows_left), N_, 0, N_, range);
  }

  static constexpr int64_t kInitial = -1, kZeros = -2;

  // One row of a group in a step.
  struct Row {
    const Group& group;
    const Sums& sums;
    int64_t r, b, data_row;
    bool started;          // a later step has left its gradients
    bool cut;              // a segment ends behind this step: nothing comes from the later one
    int64_t previous_row;  // data row of the step before; kInitial: hx, cx; kZeros
    Compute* dsums;
    Compute* scratch;  // kScratches rows of it
  };
  // Of which the rows are: c_t as the tanh and the step after see it before a norm; the gradient of what the norm of c
  // gave; that of c_t beside it.
  static constexpr int kScratches = 3;
  Compute* scratch(const Row& row, int number) const { return row.scratch + number * scratch_.stride; }

  // One share of a group's round, as in forward.h. Between a product and the rows all of dh is there; between the rows
  // and the next product all of a row's dsums are, and nobody reads the later step's any more.
  void step_share(int64_t g, int64_t round, int64_t share, int member) const {
    const GroupRows rows = rows_of(g);
    const Group& group = groups_[g];
    const int64_t turn = round / rounds_a_turn(), s = schedule_.steps() - turn, t = rows.time(s - 1);
    const int64_t phase = round % rounds_a_turn();
    const int64_t started = turn > 0 ? rows.active(rows.time(s)) : 0, active = s > 0 ? rows.active(t) : 0;
    if (phase == 0) return multiply(first_, group, turn, started, share);
    if (phase == 2) return multiply(second_, group, turn, active, share);
    const Sums& sums = sums_[g * shares_ + share];
    const int64_t active_before = s > 0 ? rows.active(rows.before(t)) : 0;
    const Range mine = share_of(active > started ? active : started, share, shares_);
    for (int64_t r = mine.first; r < mine.last; ++r) {
      const int64_t b = rows.batch_index(r);
      if (r >= active) {
        if (phase == 1) write_initial(rows, group, r, b);
        continue;
      }
      Row row{group,
              sums,
              r,
              b,
              schedule_.data_row(t, b),
              r < started,
              r < started && rows.cut_after(t, r),
              kInitial,
              group.dsums.row(r),
              scratch_.row(member * kScratches)};
      if (r < active_before) row.previous_row = schedule_.data_row(rows.before(t), b);
      if (rows.cut_before(t, r)) row.previous_row = kZeros;
      if (phase == 3) {
        through_reset(row);
        continue;
      }
      if (p_.exponential)
        slstm(row);
      else if (p_.has_cell())
        lstm(row);
      else
        other_cell(row);
      through_gate_norm(row);
    }
    if (turn % kTurnsSummed == kTurnsSummed - 1 && mine.first < mine.last) settle(sums);
  }

  // A share of the tiles of a product, into dh.
  void multiply(const Product& product, const Group& group, int64_t turn, int64_t count, int64_t share) const {
    for_tiles(share_of(product.tiles(), share, shares_), turn, [&](int64_t tile) {
      product.multiply(tile, {group.dsums.data + product.first_row, group.dsums.stride, count},
                       [&](int64_t row, int64_t column, Value sums, int64_t left, bool adds) {
                         Compute* const to = group.dh.row(row) + column;
                         store<Compute>(to, adds ? load<Compute>(to, left) + sums : sums, left);
                       });
    });
  }

  // The gradients of the initial states, of a row whose first step was the one before.
  void write_initial(const GroupRows& rows, const Group& group, int64_t r, int64_t b) const {
    const bool cut = rows.initial_cut(r);
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      if (p_.grad_hx)
        store<Compute>(at<Storage>(p_.grad_hx, b * H_ + u), unless<Compute>(cut, from_later(group, r, b, u, left)),
                       left);
      if (p_.grad_cx)
        store<Compute>(at<Storage>(p_.grad_cx, b * H_ + u),
                       unless<Compute>(cut, load<Compute>(group.carry_c.row(r) + u, left)), left);
      if (p_.grad_lx)
        store<Compute>(at<Storage>(p_.grad_lx, b * H_ + u),
                       unless<Compute>(cut, load<Compute>(group.carry_l.row(r) + u, left)), left);
    });
  }
  Value from_later(const Group& group, int64_t r, int64_t b, int64_t u, int64_t left) const {
    Value product = load<Compute>(group.dh.row(r) + u, left);
    if (p_.recurrent_mask) product *= load<Compute>(at<Storage>(p_.recurrent_mask, b * H_ + u), left);
    return product + load<Compute>(group.carry_h.row(r) + u, left);
  }

  // A state that entered the step.
  Value entering(const void* trajectory, const void* initial, const Row& row, int64_t u, int64_t left) const {
    if (row.previous_row >= 0) return load<Compute>(at<Storage>(trajectory, row.previous_row * H_ + u), left);
    if (row.previous_row == kInitial && initial) return load<Compute>(at<Storage>(initial, row.b * H_ + u), left);
    return Value{};
  }
  // Gradients of h_t and c_t: from the later step, from the results of this one, from the final states.
  Value total(const Row& row, Value later, const void* of_rows, const void* of_final, int64_t u, int64_t left) const {
    Value grad = unless<Compute>(!row.started || row.cut, later);
    if (of_rows) grad += load<Compute>(at<Storage>(of_rows, row.data_row * H_ + u), left);
    if (!row.started && of_final) grad += load<Compute>(at<Storage>(of_final, row.b * H_ + u), left);
    return grad;
  }
  // The gradient of the step's own h; what zoneout lets past goes into carry_h.
  Value grad_of_fresh_h(const Row& row, int64_t u, int64_t left) const {
    const Value later = row.started ? from_later(row.group, row.r, row.b, u, left) : Value{};
    const Value dh = total(row, later, p_.grad_output, p_.grad_h_n, u, left);
    const Zoneout<Compute> zoneout(p_.kept_h, row.data_row, H_, p_.zoneout_h);
    Value kept{}, fresh = dh;
    if (zoneout.is_on()) {
      const auto shares = zoneout.shares(dh, zoneout.part(u, left));
      kept = shares.old;
      fresh = shares.fresh;
    }
    store<Compute>(row.group.carry_h.row(row.r) + u, kept);
    return fresh;
  }

  Value reserve(const Row& row, int q, int64_t u, int64_t left) const {
    return load<Compute>(at<Storage>(p_.reserve_in, (row.data_row * p_.reserve() + q) * H_ + u), left);
  }
  Value vector_at(const void* vector, int64_t i, int64_t left) const {
    return load<Compute>(at<Storage>(vector, i), left);
  }
  Value mask_of_candidate(const Row& row, int64_t u, int64_t left) const {
    return p_.candidate_mask ? load<Compute>(at<Storage>(p_.candidate_mask, row.b * H_ + u), left)
                             : broadcast<Compute>(1);
  }
  // Adds to what one of the layer's vectors gets.
  void add(const Row& row, VariantVector which, int64_t i, Value value, int64_t left) const {
    Compute* const sums = row.sums.now[which];
    if (!sums) return;
    store<Compute>(sums + i, load<Compute>(sums + i, left) + value, left);
  }

  // What a gate's gradient is: of what the input gave it, and in dsums of what W_hh h gave it.
  void put_gate(const Row& row, int g, int64_t u, Value grad, Value of_sums, int64_t left) const {
    store<Compute>(at<Storage>(p_.grad_gates, row.data_row * N_ + g * H_ + u), grad, left);
    store<Compute>(row.dsums + g * H_ + u, of_sums, left);
  }

  void lstm(const Row& row) const {
    const bool coupled = p_.coupled(), normalises = p_.cell_norm != CellNorm::none;
    const int of_g = coupled ? 1 : 2, of_o = of_g + 1;
    Compute *const raw_c = scratch(row, 0), *const of_normed = scratch(row, 1), *const beside = scratch(row, 2);
    const auto gates_before_o = [&](int64_t u, int64_t left) {
      const Value i = reserve(row, 0, u, left);
      using Gates = typename VariantLstm<Math>::Gates;
      return Gates{i, coupled ? 1 - i : reserve(row, 1, u, left), reserve(row, of_g, u, left)};
    };
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      const auto gates = gates_before_o(u, left);
      const Value c = entering(p_.cell_states, p_.cx, row, u, left);
      store<Compute>(raw_c + u, lstm_.cell_state(gates, mask_of_candidate(row, u, left), c));
    });
    NormOf<Compute> norm{0, 1};
    if (normalises) norm = norm_of(raw_c, H_, p_.rms, p_.eps);
    const Zoneout<Compute> zoneout_c(p_.kept_c, row.data_row, H_, p_.zoneout_c);
    Value sum_g{}, sum_g_normed{};
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      const Value raw = load<Compute>(raw_c + u, left);
      Value seen = raw, normed{}, weight{};
      if (normalises) {
        normed = first_of<Compute>(norm(raw), left);
        weight = vector_at(p_.vectors[kNormC], u, left);
        seen = normed * weight;
        if (p_.vectors[kNormCBias]) seen += vector_at(p_.vectors[kNormCBias], u, left);
      }
      const auto grads = lstm_.output_backward(reserve(row, of_o, u, left), seen, grad_of_fresh_h(row, u, left));
      const Value later = row.started ? load<Compute>(row.group.carry_c.row(row.r) + u, left) : Value{};
      Value dc = total(row, later, p_.grad_cell_states, p_.grad_c_n, u, left), kept{};
      if (zoneout_c.is_on()) {
        const auto shares = zoneout_c.shares(dc, zoneout_c.part(u, left));
        kept = shares.old;
        dc = shares.fresh;
      }
      store<Compute>(row.group.carry_c.row(row.r) + u, kept);
      put_gate(row, of_o, u, grads.o, grads.o, left);
      if (p_.vectors[kPeephole]) {
        const Value fresh = p_.cell_norm == CellNorm::carried ? seen : raw;
        const int64_t i = (of_o - 1) * H_ + u;
        add(row, kPeephole, i, grads.o * fresh, left);
        dc += grads.o * vector_at(p_.vectors[kPeephole], i, left);
      }
      Value d_seen = grads.seen;
      if (p_.cell_norm != CellNorm::output) {
        // c_t itself is what the tanh sees.
        d_seen += dc;
        dc = Value{};
      }
      if (!normalises) {
        store<Compute>(beside + u, d_seen);
        return;
      }
      add(row, kNormC, u, d_seen * normed, left);
      add(row, kNormCBias, u, d_seen, left);
      const Value g = d_seen * weight;
      sum_g += g;
      sum_g_normed += g * normed;
      store<Compute>(of_normed + u, g);
      store<Compute>(beside + u, dc);
    });
    const NormGradient<Compute> through_norm = norm_gradient<Compute>(sum_g, sum_g_normed, norm.scale, H_, p_.rms);
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      Value dc = load<Compute>(beside + u, left);
      if (normalises) dc += through_norm(load<Compute>(of_normed + u, left), norm(load<Compute>(raw_c + u, left)));
      const auto gates = gates_before_o(u, left);
      const Value c = entering(p_.cell_states, p_.cx, row, u, left);
      const auto grads = lstm_.gates_backward(gates, mask_of_candidate(row, u, left), c, dc);
      Value to_earlier = load<Compute>(row.group.carry_c.row(row.r) + u, left) + grads.c;
      put_gate(row, 0, u, grads.i, grads.i, left);
      put_gate(row, of_g, u, grads.g, grads.g, left);
      const auto through_peephole = [&](int number, Value grad) {
        if (!p_.vectors[kPeephole]) return;
        add(row, kPeephole, number * H_ + u, grad * c, left);
        to_earlier += grad * vector_at(p_.vectors[kPeephole], number * H_ + u, left);
      };
      through_peephole(0, grads.i);
      if (!coupled) {
        put_gate(row, 1, u, grads.f, grads.f, left);
        through_peephole(1, grads.f);
      }
      store<Compute>(row.group.carry_c.row(row.r) + u, to_earlier);
    });
  }

  void slstm(const Row& row) const {
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      Value saved[4], dgates[4];
      for (int g = 0; g < 4; ++g) saved[g] = reserve(row, g, u, left);
      const Value earlier = entering(p_.cell_states, p_.cx, row, u, left), dh = grad_of_fresh_h(row, u, left);
      Compute *const carry_c = row.group.carry_c.row(row.r) + u, *const carry_l = row.group.carry_l.row(row.r) + u;
      const Value none{}, later_c = row.started ? load<Compute>(carry_c, left) : none,
                          later_l = row.started ? load<Compute>(carry_l, left) : none;
      Value dc = total(row, later_c, p_.grad_cell_states, p_.grad_c_n, u, left);
      Value dl = total(row, later_l, nullptr, p_.grad_l_n, u, left);
      ExponentialLstm<Math>::backward(saved, earlier, dh, dc, dl, dgates);
      for (int g = 0; g < 4; ++g) put_gate(row, g, u, dgates[g], dgates[g], left);
      store<Compute>(carry_c, dc);
      store<Compute>(carry_l, dl);
    });
  }

  void other_cell(const Row& row) const {
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      const Value dh = grad_of_fresh_h(row, u, left);
      if (p_.mode != Mode::gru) {
        const Value da = VariantRnn<Math>::backward(p_.mode, reserve(row, 0, u, left), dh);
        return put_gate(row, 0, u, da, da, left);
      }
      const bool has_reset = p_.has_reset();
      const int of_z = has_reset ? 1 : 0, of_n = of_z + 1;
      const Value z = reserve(row, of_z, u, left), n = reserve(row, of_n, u, left);
      const Value h = entering(p_.output, p_.hx, row, u, left);
      const auto grads = gru_.backward(z, n, mask_of_candidate(row, u, left), h, dh);
      put_gate(row, of_z, u, grads.z, grads.z, left);
      Value by_r = grads.n;  // of what r multiplies, where there is such a thing
      if (has_reset && !p_.reset_first) {
        const Value r = reserve(row, 0, u, left), d_r = grads.n * reserve(row, 3, u, left) * gate_.slope(r);
        put_gate(row, 0, u, d_r, d_r, left);
        by_r = grads.n * r;
      }
      // A joint norm made the input's part one with the other: all of n's is multiplied by r.
      put_gate(row, of_n, u, p_.gate_norm == GateNorm::joint ? by_r : grads.n, by_r, left);
      add(row, kBiasHn, u, by_r, left);
      Compute* const carry = row.group.carry_h.row(row.r) + u;
      store<Compute>(carry, load<Compute>(carry, left) + grads.h);
    });
  }

  // Of n = tanh(x_n + W_hn (r h)): to r, and past it to h. The product with W_hn is in dh.
  void through_reset(const Row& row) const {
    for_vectors<Compute>(H_, [&](int64_t u, int64_t left) {
      const Value r = reserve(row, 0, u, left), h = entering(p_.output, p_.hx, row, u, left);
      Value grad = load<Compute>(row.group.dh.row(row.r) + u, left);
      if (p_.recurrent_mask) grad *= load<Compute>(at<Storage>(p_.recurrent_mask, row.b * H_ + u), left);
      const Value d_r = grad * h * gate_.slope(r);
      put_gate(row, 0, u, d_r, d_r, left);
      Compute* const carry = row.group.carry_h.row(row.r) + u;
      store<Compute>(carry, load<Compute>(carry, left) + grad * r);
    });
  }

  // From the gradient of the gates that the norm gave, in dsums, to that of what it was given.
  void through_gate_norm(const Row& row) const {
    if (p_.gate_norm != GateNorm::none) {
      const auto normed_at = [&](int64_t i, int64_t left) {
        return load<Compute>(at<Storage>(p_.normed, row.data_row * N_ + i), left);
      };
      Value sum_g{}, sum_g_normed{};
      for_vectors<Compute>(N_, [&](int64_t i, int64_t left) {
        const Value dy = load<Compute>(row.dsums + i, left), normed = normed_at(i, left);
        add(row, kNorm, i, dy * normed, left);
        add(row, kNormBias, i, dy, left);
        const Value g = dy * vector_at(p_.vectors[kNorm], i, left);
        sum_g += g;
        sum_g_normed += g * normed;
      });
      const Compute scale = static_cast<const Compute*>(p_.scale)[row.data_row];
      const NormGradient<Compute> through = norm_gradient<Compute>(sum_g, sum_g_normed, scale, N_, p_.rms);
      for_vectors<Compute>(N_, [&](int64_t i, int64_t left) {
        const Value g = load<Compute>(row.dsums + i, left) * vector_at(p_.vectors[kNorm], i, left);
        const Value grad = through(g, normed_at(i, left));
        store<Compute>(row.dsums + i, grad, left);
        if (p_.gate_norm == GateNorm::joint)
          store<Compute>(at<Storage>(p_.grad_gates, row.data_row * N_ + i), grad, left);
      });
    }
    if (p_.grad_sums)
      for_vectors<Compute>(N_, [&](int64_t i, int64_t left) {
        store<Compute>(at<Storage>(p_.grad_sums, row.data_row * N_ + i), load<Compute>(row.dsums + i, left), left);
      });
  }

  void settle(const Sums& sums) const {
    for (int i = 0; i < kVariantVectors; ++i)
      for_vectors<Compute>(vector_size(p_, i), [&](int64_t u, int64_t) {
        store<Compute>(sums.before[i] + u, load<Compute>(sums.before[i] + u) + load<Compute>(sums.now[i] + u));
        store<Compute>(sums.now[i] + u, Value{});
      });
  }
  // A part of the sums over the shares.
  void sum_share(int64_t share) const {
    for (int i = 0; i < kVariantVectors; ++i) {
      const int64_t size = vector_size(p_, i);
      const Range vectors = share_of(divide_up(size, kL), share, preparing_shares_);
      for (int64_t v = vectors.first; v < vectors.last; ++v) {
        Value total{};
        for (int64_t j = 0; j < groups_count_ * shares_; ++j)
          total += load<Compute>(sums_[j].before[i] + v * kL) + load<Compute>(sums_[j].now[i] + v * kL);
        store<Compute>(at<Storage>(p_.grad_vectors[i], v * kL), total, size - v * kL);
      }
    }
  }

  const VariantBackward& p_;
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
  Sums* sums_ = nullptr;
  StateBuffer<Compute> scratch_;  // of each member: kScratches rows (H)
};

}  // namespace
}  // namespace rnnfast::cpu

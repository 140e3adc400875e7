// Forward: a row's norms, cell and zoneout, after the product of all rows. csrc/cpu/variants/forward.h has the same
// order.
#pragma once

#include "row.cuh"

namespace rnnfast::gpu {

template <Family kFamily, class Type> class VariantForwardRow : VariantRow<Type, VariantStepForward> {
  using Base = VariantRow<Type, VariantStepForward>;
  using Math = VariantMath<Type>;
  using Base::b, Base::d, Base::turn, Base::call, Base::H, Base::N, Base::p;
  using Base::entering, Base::for_row, Base::for_units, Base::in_product, Base::in_row, Base::in_state, Base::mask;
  using Base::read, Base::read_compute, Base::vector, Base::write, Base::write_compute;
  using typename Base::Compute;
  using typename Base::Storage;

 public:
  RNNFAST_DEVICE explicit VariantForwardRow(const VariantStepForward& params) : Base(params) {}

  RNNFAST_DEVICE bool is_step() const { return turn.active(); }

  // What the first product multiplies at a row's first step.
  RNNFAST_DEVICE void begin() const {
    for_units(H, [&](int64_t u) { write(p.entering, in_state(u), read(call.hx, in_state(u)) * masked(u)); });
  }

  // Where the row is no step: what a sequence without any hands through, and zeros.
  RNNFAST_DEVICE void no_step() const {
    const VariantForward& f = p.call;
    if (turn.empty() && is_first_turn(p.rows, d))
      for_units(H, [&](int64_t u) {
        write(f.h_n, in_state(u), read(call.hx, in_state(u)));
        write(f.c_n, in_state(u), read(call.cx, in_state(u)));
        write(f.l_n, in_state(u), initial_l(u));
      });
    if (!turn.in_memory()) return;
    const auto zero = [&](void* rows, int64_t width) {
      for_units(width, [&](int64_t i) { write(rows, in_row(width, i), 0); });
    };
    zero(f.output, H);
    zero(f.cell_states, H);
    zero(f.reserve_out, call.reserve() * H);
    zero(f.normed, N);
    if (f.scale && thread_index() == 0) write_compute(f.scale, turn.row, 0);
  }

  // r h, which W_hn multiplies.
  RNNFAST_DEVICE void reset() const {
    for_units(H, [&](int64_t u) {
      const Compute r = gate_(sum(0, u));
      reserve(0, u, r);
      write(p.reset_state, in_state(u), has_state_ ? r * read(p.entering, in_state(u)) : 0);
    });
  }

  RNNFAST_DEVICE void step() const {
    normalise_gates();
    if constexpr (kFamily == Family::lstm) {
      if (call.exponential)
        slstm();
      else
        lstm();
    } else {
      for_units(H, [&](int64_t u) {
        if constexpr (kFamily == Family::gru)
          gru(u);
        else
          rnn(u);
      });
    }
  }

 private:
  RNNFAST_DEVICE Compute masked(int64_t u) const { return mask(call.recurrent_mask, u); }
  // The sLSTM's l, where nothing was taken in yet minus infinity.
  static constexpr Compute kNoL = -std::numeric_limits<Compute>::infinity();
  RNNFAST_DEVICE Compute initial_l(int64_t u) const { return call.lx ? read(call.lx, in_state(u)) : kNoL; }

  // What the product left of a gate; a row that begins with zeros was not multiplied.
  RNNFAST_DEVICE Compute product(int64_t gate, int64_t u) const {
    if (call.reset_first && gate == 2) return read_compute(p.reset_sums, in_product(u, 1, 0));
    return has_state_ ? read_compute(p.sums, in_product(u, call.reset_first ? 2 : call.gates, gate)) : 0;
  }

  // The sums of a row become what the norm makes of them, before its weight and bias.
  RNNFAST_DEVICE void normalise_gates() const {
    if (call.gate_norm == GateNorm::none) return;
    const auto sum_at = [&](int64_t u, int64_t gate) -> Compute& {
      return *at<Compute>(p.sums, in_product(u, call.gates, gate));
    };
    const bool joint = call.gate_norm == GateNorm::joint;
    for_row(call.gates, [&](int64_t u, int64_t gate) {
      const Compute own = has_state_ ? sum_at(u, gate) : 0;
      sum_at(u, gate) = joint ? own + read(call.gates_in, in_row(N, gate * H + u)) : own;
    });
    const NormOf<Compute> norm = this->norm_of(call.gates, sum_at);
    for_row(call.gates, [&](int64_t u, int64_t gate) {
      const Compute normed = norm(sum_at(u, gate));
      sum_at(u, gate) = normed;
      write(p.call.normed, in_row(N, gate * H + u), normed);
    });
    if (p.call.scale && thread_index() == 0) write_compute(p.call.scale, turn.row, norm.scale);
  }

  // What the input and what W_hh h give a gate, of which a joint norm made one.
  struct Parts {
    Compute x, rec;
  };
  RNNFAST_DEVICE Parts parts(int64_t gate, int64_t u) const {
    const int64_t i = gate * H + u;
    if (call.gate_norm == GateNorm::none) return {read(call.gates_in, in_row(N, i)), product(gate, u)};
    const Compute normed = read_compute(p.sums, in_product(u, call.gates, gate)) * vector(kNorm, i);
    if (call.gate_norm == GateNorm::joint) return {0, normed + vector(kNormBias, i)};
    return {read(call.gates_in, in_row(N, i)), normed};
  }
  RNNFAST_DEVICE Compute sum(int64_t gate, int64_t u) const {
    const Parts of_gate = parts(gate, u);
    return of_gate.x + of_gate.rec;
  }
  // The part that a peephole gives a gate.
  RNNFAST_DEVICE Compute peep(int64_t number, Compute c, int64_t u) const {
    return call.vectors[kPeephole] ? vector(kPeephole, number * H + u) * c : 0;
  }
  RNNFAST_DEVICE void reserve(int64_t q, int64_t u, Compute value) const {
    write(p.call.reserve_out, (turn.row * call.reserve() + q) * H + u, value);
  }
  RNNFAST_DEVICE Compute previous_h(int64_t u) const { return entering(p.call.output, call.hx, u); }
  RNNFAST_DEVICE Compute previous_c(int64_t u) const {
    return turn.follows() ? read_compute(p.carry_c, in_state(u)) : entering(nullptr, call.cx, u);
  }
  RNNFAST_DEVICE Compute previous_l(int64_t u) const {
    if (turn.follows()) return read_compute(p.carry_l, in_state(u));
    return turn.cut_before() ? kNoL : initial_l(u);
  }

  RNNFAST_DEVICE void lstm() const {
    const VariantLstm<Math> cell{call.coupled(), gate_};
    const int64_t of_g = call.coupled() ? 1 : 2;
    const bool normalises = call.cell_norm != CellNorm::none;
    for_units(H, [&](int64_t u) {
      const Compute c = previous_c(u);
      const Compute sum_f = call.coupled() ? 0 : sum(1, u) + peep(1, c, u);
      const auto gates = cell.gates(sum(0, u) + peep(0, c, u), sum_f, sum(of_g, u));
      reserve(0, u, gates.i);
      if (!call.coupled()) reserve(1, u, gates.f);
      reserve(of_g, u, gates.g);
      const Compute fresh = cell.cell_state(gates, mask(call.candidate_mask, u), c);
      if (normalises)
        write_compute(p.fresh_c, in_state(u), fresh);
      else
        lstm_output(u, fresh, fresh);
    });
    if (!normalises) return;
    const NormOf<Compute> norm =
        this->norm_of(1, [&](int64_t u, int64_t) { return read_compute(p.fresh_c, in_state(u)); });
    for_units(H, [&](int64_t u) {
      const Compute fresh = read_compute(p.fresh_c, in_state(u));
      const Compute seen = norm(fresh) * vector(kNormC, u) + vector(kNormCBias, u);
      lstm_output(u, call.cell_norm == CellNorm::carried ? seen : fresh, seen);
    });
  }
  // fresh: c_t before zoneout; seen: what of it the tanh sees.
  RNNFAST_DEVICE void lstm_output(int64_t u, Compute fresh, Compute seen) const {
    const int64_t of_o = call.coupled() ? 2 : 3;
    const Compute o = gate_(sum(of_o, u) + peep(of_o - 1, fresh, u));
    reserve(of_o, u, o);
    const auto zoneout = this->zoneout_c();
    put_c(u, zoneout.is_on() ? zoneout.mix(previous_c(u), fresh, in_row(H, u)) : fresh);
    put_h(u, o * Math::tanh(seen));
  }

  RNNFAST_DEVICE void slstm() const {
    for_units(H, [&](int64_t u) {
      Compute sums[4], saved[4];
      RNNFAST_UNROLL
      for (int g = 0; g < 4; ++g) sums[g] = sum(g, u);
      const auto now = ExponentialLstm<Math>::forward(sums, previous_c(u), previous_l(u), saved);
      RNNFAST_UNROLL
      for (int g = 0; g < 4; ++g) reserve(g, u, saved[g]);
      put_c(u, now.c);
      write_compute(p.carry_l, in_state(u), now.l);
      if (!turn.after()) write(p.call.l_n, in_state(u), now.l);
      put_h(u, now.h);
    });
  }

  RNNFAST_DEVICE void gru(int64_t u) const {
    const VariantGru<Math> cell{call.relu, gate_};
    const int64_t of_z = call.has_reset() ? 1 : 0, of_n = of_z + 1;
    const Compute z = gate_(sum(of_z, u));
    Compute r = 1;
    if (call.has_reset() && !call.reset_first) {
      r = gate_(sum(0, u));
      reserve(0, u, r);
    }
    Parts of_candidate = parts(of_n, u);
    of_candidate.rec += vector(kBiasHn, u);
    const Compute n = cell.candidate(of_candidate.x, r, of_candidate.rec);
    reserve(of_z, u, z);
    reserve(of_n, u, n);
    if (call.has_reset()) reserve(3, u, of_candidate.rec);
    put_h(u, cell.state(z, n, mask(call.candidate_mask, u), previous_h(u)));
  }

  RNNFAST_DEVICE void rnn(int64_t u) const {
    const Compute h = VariantRnn<Math>::forward(call.mode, sum(0, u));
    reserve(0, u, h);
    put_h(u, h);
  }

  RNNFAST_DEVICE void put_c(int64_t u, Compute c) const {
    write(p.call.cell_states, in_row(H, u), c);
    write_compute(p.carry_c, in_state(u), c);
    if (!turn.after()) write(p.call.c_n, in_state(u), c);
  }
  RNNFAST_DEVICE void put_h(int64_t u, Compute h) const {
    const auto zoneout = this->zoneout_h();
    if (zoneout.is_on()) h = zoneout.mix(previous_h(u), h, in_row(H, u));
    write(p.call.output, in_row(H, u), h);
    if (!turn.after()) write(p.call.h_n, in_state(u), h);
    // As whoever reads the output will find it.
    const Compute rounded = convert<Compute>(convert<Storage>(h));
    write(p.entering, in_state(u), call.recurrent_mask ? rounded * masked(u) : rounded);
  }

  const GateActivation<Math> gate_{this->call.hard_sigmoid};
  // Whether `entering` has what the step begins with; else that is zeros.
  const bool has_state_ = !turn.cut_before() && (turn.before() || call.hx);
};

template <Family kFamily, class Type>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void variant_begin(RNNFAST_GRID_CONSTANT const VariantStepForward p) {
  const VariantForwardRow<kFamily, Type> row(p);
  row.begin();
}

template <Family kFamily, class Type>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void variant_reset(RNNFAST_GRID_CONSTANT const VariantStepForward p) {
  const VariantForwardRow<kFamily, Type> row(p);
  wait_for_previous_grid();
  if (row.is_step()) row.reset();
}

template <Family kFamily, class Type>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void variant_forward(RNNFAST_GRID_CONSTANT const VariantStepForward p) {
  const VariantForwardRow<kFamily, Type> row(p);
  wait_for_previous_grid();
  if (row.is_step())
    row.step();
  else
    row.no_step();
}

}  // namespace rnnfast::gpu

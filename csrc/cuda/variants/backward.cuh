// Backward: the derivatives of a row's zoneout, cell and norms, after the product that brings the later step's
// gradients back. csrc/cpu/variants/backward.h has the same order.
#pragma once

#include "row.cuh"

namespace rnnfast::gpu {

template <Family kFamily, class Type> class VariantBackwardRow : VariantRow<Type, VariantStepBackward> {
  using Base = VariantRow<Type, VariantStepBackward>;
  using Math = VariantMath<Type>;
  using Base::b, Base::d, Base::turn, Base::call, Base::H, Base::N, Base::p;
  using Base::entering, Base::for_row, Base::for_units, Base::in_product, Base::in_row, Base::in_state, Base::mask;
  using Base::read, Base::read_compute, Base::vector, Base::write, Base::write_compute;
  using typename Base::Compute;

 public:
  RNNFAST_DEVICE explicit VariantBackwardRow(const VariantStepBackward& params) : Base(params) {}

  RNNFAST_DEVICE bool is_step() const { return turn.active(); }

  // Where the row is no step: its gradients, if its first step was the one before, for the initial states; what a
  // sequence without any step hands through; zeros.
  RNNFAST_DEVICE void no_step() const {
    const VariantBackward& g = p.call;
    if (turn.has_left())
      for_units(H, [&](int64_t u) {
        write(g.grad_hx, in_state(u), from_later(u));
        write(g.grad_cx, in_state(u), carried(p.carry_c, u));
        write(g.grad_lx, in_state(u), carried(p.carry_l, u));
      });
    else if (turn.empty() && is_last_turn(p.rows, d))
      for_units(H, [&](int64_t u) {
        write(g.grad_hx, in_state(u), read(g.grad_h_n, in_state(u)));
        write(g.grad_cx, in_state(u), read(g.grad_c_n, in_state(u)));
        write(g.grad_lx, in_state(u), read(g.grad_l_n, in_state(u)));
      });
    if (!turn.in_memory()) return;
    for_units(N, [&](int64_t i) {
      write(g.grad_gates, in_row(N, i), 0);
      write(g.grad_sums, in_row(N, i), 0);
    });
  }

  RNNFAST_DEVICE void step() const {
    if constexpr (kFamily == Family::lstm) {
      if (call.exponential)
        for_units(H, [&](int64_t u) { slstm(u); });
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
    through_gate_norm();
    settle();
  }

  // Of n = tanh(x_n + W_hn (r h)): to r, and past it to h. The product with W_hn is in `back`.
  RNNFAST_DEVICE void reset() const {
    for_units(H, [&](int64_t u) {
      const Compute r = reserve(0, u), h = entering(p.call.output, call.hx, u);
      const Compute grad = read_compute(p.back, in_product(u, 1, 0)) * mask(call.recurrent_mask, u);
      const Compute d_r = grad * h * gate_.slope(r);
      put_gate(0, u, d_r, d_r);
      add_to_carry(p.carry_h, u, grad * r);
    });
  }

 private:
  // What the later step left in a workspace, where it is of this row's segment.
  RNNFAST_DEVICE Compute carried(const void* workspace, int64_t u) const {
    return workspace && turn.is_followed() ? read_compute(workspace, in_state(u)) : 0;
  }
  RNNFAST_DEVICE Compute from_later(int64_t u) const {
    if (!turn.is_followed()) return 0;
    return read_compute(p.back, in_product(u, 1, 0)) * mask(call.recurrent_mask, u) + carried(p.carry_h, u);
  }
  // With what comes from outside, of this step's results and of the final states.
  RNNFAST_DEVICE Compute total(Compute later, const void* of_rows, const void* of_final, int64_t u) const {
    later += read(of_rows, in_row(H, u));
    return turn.after() ? later : later + read(of_final, in_state(u));
  }
  // Of a state, the gradient of the step's own; what zoneout lets past stays in the workspace.
  RNNFAST_DEVICE Compute of_fresh(Compute grad, const typename Base::Zoneout& zoneout, void* carry, int64_t u) const {
    const int64_t at = in_row(H, u);
    write_compute(carry, in_state(u), zoneout.is_on() ? zoneout.of_old(grad, at) : 0);
    return zoneout.is_on() ? zoneout.of_fresh(grad, at) : grad;
  }
  RNNFAST_DEVICE Compute grad_of_fresh_h(int64_t u) const {
    const Compute dh = total(from_later(u), p.call.grad_output, p.call.grad_h_n, u);
    return of_fresh(dh, this->zoneout_h(), p.carry_h, u);
  }
  RNNFAST_DEVICE void add_to_carry(void* carry, int64_t u, Compute value) const {
    *at<Compute>(carry, in_state(u)) += value;
  }

  RNNFAST_DEVICE Compute reserve(int64_t q, int64_t u) const {
    return read(p.call.reserve_in, (turn.row * call.reserve() + q) * H + u);
  }
  // Adds to what one of the layer's vectors gets.
  RNNFAST_DEVICE void add(VariantVector which, int64_t i, Compute value) const {
    if (call.vectors[which]) *at<Compute>(p.vectors_now, b * p.vectors + p.vector_begin[which] + i) += value;
  }

  // What a gate's gradient is: of what the input gave it, and of what W_hh h gave it.
  RNNFAST_DEVICE void put_gate(int64_t gate, int64_t u, Compute grad, Compute of_sum) const {
    write(p.call.grad_gates, in_row(N, gate * H + u), grad);
    if (call.gate_norm == GateNorm::none)
      put_sum(gate, u, of_sum);
    else
      write_compute(p.of_gates, b * N + gate * H + u, of_sum);
  }
  RNNFAST_DEVICE void put_sum(int64_t gate, int64_t u, Compute grad) const {
    if (call.reset_first && gate == 2)
      write(p.reset_gradients, in_product(u, 1, 0), grad);
    else
      write(p.sum_gradients, in_product(u, call.reset_first ? 2 : call.gates, gate), grad);
    write(p.call.grad_sums, in_row(N, gate * H + u), grad);
  }

  // ---- LSTM ----
  RNNFAST_DEVICE VariantLstm<Math> lstm_cell() const { return {call.coupled(), gate_}; }
  RNNFAST_DEVICE int64_t of_g() const { return call.coupled() ? 1 : 2; }
  RNNFAST_DEVICE typename VariantLstm<Math>::Gates gates(int64_t u) const {
    const Compute i = reserve(0, u);
    return {i, call.coupled() ? 1 - i : reserve(1, u), reserve(of_g(), u)};
  }
  RNNFAST_DEVICE Compute previous_c(int64_t u) const { return entering(p.call.cell_states, call.cx, u); }
  // c_t before the norm.
  RNNFAST_DEVICE Compute raw_c(int64_t u) const {
    return lstm_cell().cell_state(gates(u), mask(call.candidate_mask, u), previous_c(u));
  }

  RNNFAST_DEVICE void lstm() const {
    if (call.cell_norm == CellNorm::none)
      for_units(H, [&](int64_t u) {
        const Compute c = raw_c(u);
        const CellGradients grads = through_output(u, c, c);
        through_gates(u, grads.seen + grads.beside);
      });
    else
      lstm_with_norm();
  }
  RNNFAST_DEVICE void lstm_with_norm() const {
    for_units(H, [&](int64_t u) { write_compute(p.raw_c, in_state(u), raw_c(u)); });
    const NormOf<Compute> norm =
        this->norm_of(1, [&](int64_t u, int64_t) { return read_compute(p.raw_c, in_state(u)); });
    Compute sums[2] = {};  // of g, and of g times what the norm gave
    for_units(H, [&](int64_t u) {
      const Compute raw = read_compute(p.raw_c, in_state(u)), normed = norm(raw), weight = vector(kNormC, u);
      const Compute seen = normed * weight + vector(kNormCBias, u);
      const bool carried_on = call.cell_norm == CellNorm::carried;
      CellGradients grads = through_output(u, carried_on ? seen : raw, seen);
      if (carried_on) {
        // c_t itself is what the tanh sees.
        grads.seen += grads.beside;
        grads.beside = 0;
      }
      add(kNormC, u, grads.seen * normed);
      add(kNormCBias, u, grads.seen);
      const Compute g = grads.seen * weight;
      sums[0] += g;
      sums[1] += g * normed;
      write_compute(p.of_normed, in_state(u), g);
      write_compute(p.beside, in_state(u), grads.beside);
    });
    const NormGradient<Compute> through = through_norm(sums, norm.scale, H);
    for_units(H, [&](int64_t u) {
      const Compute of_raw = through(read_compute(p.of_normed, in_state(u)), norm(read_compute(p.raw_c, in_state(u))));
      through_gates(u, read_compute(p.beside, in_state(u)) + of_raw);
    });
  }
  RNNFAST_DEVICE NormGradient<Compute> through_norm(Compute (&sums)[2], Compute scale, int64_t count) const {
    block_sums(sums);
    const Compute each = static_cast<Compute>(count);
    return {call.rms ? Compute(0) : sums[0] / each, sums[1] / each, scale};
  }

  struct CellGradients {
    Compute seen, beside;  // of what the tanh sees of c_t, and of c_t past that
  };
  // fresh: c_t before zoneout.
  RNNFAST_DEVICE CellGradients through_output(int64_t u, Compute fresh, Compute seen) const {
    const int64_t of_o = of_g() + 1, peephole = (of_o - 1) * H + u;
    const auto grads = lstm_cell().output_backward(reserve(of_o, u), seen, grad_of_fresh_h(u));
    Compute dc = total(carried(p.carry_c, u), p.call.grad_cell_states, p.call.grad_c_n, u);
    dc = of_fresh(dc, this->zoneout_c(), p.carry_c, u);
    put_gate(of_o, u, grads.o, grads.o);
    if (call.vectors[kPeephole]) {
      add(kPeephole, peephole, grads.o * fresh);
      dc += grads.o * vector(kPeephole, peephole);
    }
    return {grads.seen, dc};
  }
  // dc: of c_t before the norm.
  RNNFAST_DEVICE void through_gates(int64_t u, Compute dc) const {
    const Compute c = previous_c(u);
    const auto grads = lstm_cell().gates_backward(gates(u), mask(call.candidate_mask, u), c, dc);
    Compute earlier = grads.c;
    const auto put = [&](int64_t gate, Compute grad, bool has_peephole) {
      put_gate(gate, u, grad, grad);
      if (!has_peephole || !call.vectors[kPeephole]) return;
      add(kPeephole, gate * H + u, grad * c);
      earlier += grad * vector(kPeephole, gate * H + u);
    };
    put(0, grads.i, true);
    if (!call.coupled()) put(1, grads.f, true);
    put(of_g(), grads.g, false);
    add_to_carry(p.carry_c, u, earlier);
  }

  RNNFAST_DEVICE void slstm(int64_t u) const {
    Compute saved[4], dgates[4];
    RNNFAST_UNROLL
    for (int g = 0; g < 4; ++g) saved[g] = reserve(g, u);
    const Compute dh = grad_of_fresh_h(u);
    Compute dc = total(carried(p.carry_c, u), p.call.grad_cell_states, p.call.grad_c_n, u);
    Compute dl = total(carried(p.carry_l, u), nullptr, p.call.grad_l_n, u);
    ExponentialLstm<Math>::backward(saved, previous_c(u), dh, dc, dl, dgates);
    RNNFAST_UNROLL
    for (int g = 0; g < 4; ++g) put_gate(g, u, dgates[g], dgates[g]);
    write_compute(p.carry_c, in_state(u), dc);
    write_compute(p.carry_l, in_state(u), dl);
  }

  // ---- GRU and RNNs ----
  RNNFAST_DEVICE void gru(int64_t u) const {
    const VariantGru<Math> cell{call.relu, gate_};
    const int64_t of_z = call.has_reset() ? 1 : 0, of_n = of_z + 1;
    const Compute dh = grad_of_fresh_h(u);
    const auto grads = cell.backward(reserve(of_z, u), reserve(of_n, u), mask(call.candidate_mask, u),
                                     entering(p.call.output, call.hx, u), dh);
    put_gate(of_z, u, grads.z, grads.z);
    Compute by_r = grads.n;  // of what r multiplies, where there is such a thing
    if (call.has_reset() && !call.reset_first) {
      const Compute r = reserve(0, u), d_r = grads.n * reserve(3, u) * gate_.slope(r);
      put_gate(0, u, d_r, d_r);
      by_r = grads.n * r;
    }
    put_gate(of_n, u, grads.n, by_r);
    add(kBiasHn, u, by_r);
    add_to_carry(p.carry_h, u, grads.h);
  }

  RNNFAST_DEVICE void rnn(int64_t u) const {
    const Compute da = VariantRnn<Math>::backward(call.mode, reserve(0, u), grad_of_fresh_h(u));
    put_gate(0, u, da, da);
  }

  // From the gradient of the gates that the norm gave to that of what it was given. A joint norm made the input's part
  // one with the other.
  RNNFAST_DEVICE void through_gate_norm() const {
    if (call.gate_norm == GateNorm::none) return;
    Compute sums[2] = {};  // of g, and of g times what the norm gave
    for_row(call.gates, [&](int64_t u, int64_t gate) {
      const int64_t i = gate * H + u;
      const Compute dy = read_compute(p.of_gates, b * N + i), normed = read(p.call.normed, in_row(N, i));
      add(kNorm, i, dy * normed);
      add(kNormBias, i, dy);
      const Compute g = dy * vector(kNorm, i);
      sums[0] += g;
      sums[1] += g * normed;
    });
    const NormGradient<Compute> through = through_norm(sums, read_compute(p.call.scale, turn.row), N);
    for_row(call.gates, [&](int64_t u, int64_t gate) {
      const int64_t i = gate * H + u;
      const Compute g = read_compute(p.of_gates, b * N + i) * vector(kNorm, i);
      const Compute grad = through(g, read(p.call.normed, in_row(N, i)));
      put_sum(gate, u, grad);
      if (call.gate_norm == GateNorm::joint) write(p.call.grad_gates, in_row(N, i), grad);
    });
  }

  RNNFAST_DEVICE void settle() const {
    const int64_t time = p.rows.turn[d].time, done = call.reverse ? time + 1 : call.rows.steps - time;
    if (!p.vectors || done % p.turns_summed != 0) return;
    // What the other threads have added is there.
    sync_threads();
    for_units(p.vectors, [&](int64_t i) {
      Compute& now = *at<Compute>(p.vectors_now, b * p.vectors + i);
      *at<Compute>(p.vectors_before, b * p.vectors + i) += now;
      now = 0;
    });
  }

  const GateActivation<Math> gate_{this->call.hard_sigmoid};
};

template <Family kFamily, class Type>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void variant_backward(RNNFAST_GRID_CONSTANT const VariantStepBackward p) {
  const VariantBackwardRow<kFamily, Type> row(p);
  wait_for_previous_grid();
  if (row.is_step())
    row.step();
  else
    row.no_step();
}

template <Family kFamily, class Type>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void variant_reset_backward(RNNFAST_GRID_CONSTANT const VariantStepBackward p) {
  const VariantBackwardRow<kFamily, Type> row(p);
  wait_for_previous_grid();
  if (row.is_step()) row.reset();
}

// What the rows added to the vectors' gradients, a thread for each number. Launched behind all others.
template <Family kFamily, class Type>
RNNFAST_KERNEL RNNFAST_LAUNCH_BOUNDS(kRowThreads,
                                     2) void variant_sum_vectors(RNNFAST_GRID_CONSTANT const VariantStepBackward p) {
  using Compute = typename Type::Compute;
  using Storage = typename Type::Storage;
  const int64_t i = int64_t{block_index().x} * block_threads() + thread_index(), rows = p.call.rows.batch;
  if (i >= p.vectors) return;
  // In pieces, as the turns are, and so that loads need not wait for sums.
  constexpr int kRows = 16;
  Compute total = 0;
  for (int64_t first = 0; first < rows; first += kRows) {
    Compute piece = 0;
    RNNFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      const int64_t at_row = (first + r) * p.vectors + i;
      if (first + r < rows) piece += *at<Compute>(p.vectors_before, at_row) + *at<Compute>(p.vectors_now, at_row);
    }
    total += piece;
  }
  for (int which = 0; which < kVariantVectors; ++which) {
    const int64_t in_vector = i - p.vector_begin[which];
    if (in_vector >= 0 && in_vector < vector_size(p.call, which))
      *at<Storage>(p.call.grad_vectors[which], in_vector) = convert<Storage>(total);
  }
}

}  // namespace rnnfast::gpu

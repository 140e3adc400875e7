// What the kernels of layers with options are given: one direction of one layer. No torch header here.
// rnnfast/variants/reference.py has the equations, rnnfast/variants/options.py says what the options are.
#pragma once

#include "../recurrence.h"

namespace rnnfast {

enum class GateNorm { none, separate, joint };
enum class CellNorm { none, output, carried };

// What one direction's loop reads besides W_hh, each a vector of the type of the op's tensors, or null:
//   of the GRU where r multiplies it, b_hn (H); peepholes of i, f, o (3H), coupled of i and o (2H); weight and bias of
//   the norm of the gates (G*H), and of the cell state (H).
enum VariantVector { kBiasHn, kPeephole, kNorm, kNormBias, kNormC, kNormCBias, kVariantVectors };

struct VariantParams {
  Mode mode{};
  DType dtype{};
  RowLayout rows;
  int64_t hidden_size = 0;  // H
  int64_t gates = 0;        // G: of a coupled LSTM 3, of a GRU without r 2
  int64_t heads = 1;        // blocks of W_hh
  bool reverse = false;
  GateNorm gate_norm{};
  CellNorm cell_norm{};
  bool rms = false, hard_sigmoid = false;
  bool exponential = false;  // of the LSTM: the sLSTM's gates
  bool relu = false;         // in place of the tanh of the GRU's n
  bool reset_first = false;  // of the GRU: W_hn (r h) in place of r (W_hn h + b_hn), so a step has two products
  double eps = 0;
  double zoneout_h = 0, zoneout_c = 0;  // the part of the old state that is kept where there is no mask
  const void* gates_in{};               // (rows, G*H): what the input gives the gates
  const void* hx{};                     // (B, H) or null: zeros
  const void* cx{};
  const void* lx{};   // of the sLSTM: (B, H) or null: minus infinity
  Operand weight_hh;  // on the CPU: (G*H, H / heads)
  const void* vectors[kVariantVectors]{};
  const void* recurrent_mask{};  // (B, H) or null: what h is multiplied by before W_hh
  const void* candidate_mask{};  // (B, H) or null: what g, or n, is multiplied by
  const uint8_t* kept_h{};       // (rows, H) or null: where the old h is kept
  const uint8_t* kept_c{};

  RNNFAST_HOST_DEVICE bool has_cell() const { return mode == Mode::lstm; }
  RNNFAST_HOST_DEVICE bool coupled() const { return has_cell() && gates == 3; }
  RNNFAST_HOST_DEVICE int64_t width() const { return gates * hidden_size; }      // G*H
  RNNFAST_HOST_DEVICE int64_t head_size() const { return hidden_size / heads; }  // H / heads
  RNNFAST_HOST_DEVICE bool has_reset() const { return mode == Mode::gru && gates == 3; }
  // What a step saves: every gate, where there is r the recurrent part of n too, of the RNNs their new h.
  RNNFAST_HOST_DEVICE int64_t reserve() const { return has_reset() ? 4 : gates; }
  // Whether the gradient of W_hh h is another than that of gates_in.
  RNNFAST_HOST_DEVICE bool splits_gradient() const {
    return gate_norm == GateNorm::separate || (has_reset() && gate_norm == GateNorm::none && !reset_first);
  }
  // The rows of W_hh that a step's first product has, and the second.
  RNNFAST_HOST_DEVICE int64_t first_width() const { return reset_first ? 2 * hidden_size : width(); }
  RNNFAST_HOST_DEVICE int64_t second_width() const { return width() - first_width(); }
};

struct VariantForward : VariantParams {
  void* output{};       // (rows, H)
  void* h_n{};          // (B, H)
  void* c_n{};          // with a cell state: (B, H)
  void* l_n{};          // of the sLSTM: (B, H)
  void* cell_states{};  // with a cell state: (rows, H)
  void* reserve_out{};  // (rows, R*H) or null: not saved; so the next two
  void* normed{};       // with a norm of the gates: (rows, G*H), before weight and bias
  void* scale{};        // (rows): 1 / deviation
};

struct VariantBackward : VariantParams {
  const void* grad_output{};       // (rows, H) or null: zeros; so the next four
  const void* grad_h_n{};          // (B, H)
  const void* grad_c_n{};          // (B, H)
  const void* grad_l_n{};          // (B, H)
  const void* grad_cell_states{};  // (rows, H)
  const void* output{};            // as forward left them; so the next four
  const void* cell_states{};
  const void* reserve_in{};
  const void* normed{};
  const void* scale{};
  void* grad_gates{};  // (rows, G*H)
  void* grad_sums{};   // where it is another: (rows, G*H), of W_hh h
  void* grad_hx{};     // (B, H) or null: nobody asks
  void* grad_cx{};
  void* grad_lx{};
  void* grad_vectors[kVariantVectors]{};  // of the vectors that are there, of their shapes
};

// What vectors of the layer get is summed over so many turns by itself: not over all one after the other, which would
// lose digits. Legal: from 1 on. rnnfast/triton/variant_step.py has the same for Triton.
constexpr int64_t kTurnsSummed = 64;

// How many values a vector has, 0 where there is none.
RNNFAST_HOST_DEVICE inline int64_t vector_size(const VariantParams& p, int vector) {
  const int64_t H = p.hidden_size, sizes[kVariantVectors] = {H, (p.gates - 1) * H, p.width(), p.width(), H, H};
  return p.vectors[vector] ? sizes[vector] : 0;
}

}  // namespace rnnfast

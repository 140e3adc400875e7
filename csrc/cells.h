// The step equations of every cell and their derivatives: written once, for scalars on the GPU and vectors on the CPU.
//
// `Math` names the value type and its sigmoid and tanh. `x` are the input gates (W_ih x + b_ih, and b_hh where it may
// be folded in), `rec` the recurrent products (W_hh h, for the GRU's n gate with b_hn). Source: torch.nn.LSTM, GRU, RNN
// documentation.
#pragma once

#include "recurrence.h"

// Inlined always: otherwise a vector goes through memory at each call.
#if defined(__CUDACC__)
#define RNNFAST_CELL __host__ __device__ __attribute__((always_inline))
#else
#define RNNFAST_CELL [[gnu::always_inline]]
#endif

namespace rnnfast {

// State of one hidden unit: h_t, or o * tanh(c_t) before a projection; c_t for the LSTM only.
template <class Value> struct UnitState {
  Value h;
  Value c;
};

template <class Math> struct LstmCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 4;
  static constexpr int kReserve = 4;
  static constexpr bool kHasCell = true;          // carries c_t
  static constexpr bool kNeedsPreviousH = false;  // in the step itself, beside W_hh h
  static constexpr bool kSplitGradient = false;   // the gradient of W_hh h differs from that of W_ih x

  // i, f, o = sigmoid; g = tanh; c_t = f c_{t-1} + i g; h_t = o tanh(c_t). reserve: i f g o.
  RNNFAST_CELL static inline UnitState<Value> forward(const Value* x, const Value* rec, UnitState<Value> previous,
                                                      Value* reserve) {
    const Value i = Math::sigmoid(x[0] + rec[0]);
    const Value f = Math::sigmoid(x[1] + rec[1]);
    const Value g = Math::tanh(x[2] + rec[2]);
    const Value o = Math::sigmoid(x[3] + rec[3]);
    const Value c = f * previous.c + i * g;
    reserve[0] = i;
    reserve[1] = f;
    reserve[2] = g;
    reserve[3] = o;
    return {o * Math::tanh(c), c};
  }

  // carry: gradient of c_t on entry, of c_{t-1} on return.
  RNNFAST_CELL static inline void backward(const Value* reserve, UnitState<Value> previous, UnitState<Value> now,
                                           Value dh, Value& carry, Value* dgates, Value& /*d_rec_n*/) {
    const Value i = reserve[0], f = reserve[1], g = reserve[2], o = reserve[3];
    const Value tanh_c = Math::tanh(now.c);
    const Value dc = carry + dh * o * (1 - tanh_c * tanh_c);
    dgates[0] = dc * g * i * (1 - i);
    dgates[1] = dc * previous.c * f * (1 - f);
    dgates[2] = dc * i * (1 - g * g);
    dgates[3] = dh * tanh_c * o * (1 - o);
    carry = dc * f;
  }
};

template <class Math> struct GruCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 3;
  static constexpr int kReserve = 4;
  static constexpr bool kHasCell = false;
  static constexpr bool kNeedsPreviousH = true;
  static constexpr bool kSplitGradient = true;

  // r, z = sigmoid; n = tanh(x_n + r (W_hn h + b_hn)); h_t = (1 - z) n + z h_{t-1}. reserve: r z n and (W_hn h + b_hn).
  RNNFAST_CELL static inline UnitState<Value> forward(const Value* x, const Value* rec, UnitState<Value> previous,
                                                      Value* reserve) {
    const Value r = Math::sigmoid(x[0] + rec[0]);
    const Value z = Math::sigmoid(x[1] + rec[1]);
    const Value n = Math::tanh(x[2] + r * rec[2]);
    reserve[0] = r;
    reserve[1] = z;
    reserve[2] = n;
    reserve[3] = rec[2];
    return {n + z * (previous.h - n), previous.c};
  }

  // carry: on return what reaches h_{t-1} past the gates. d_rec_n: gradient of W_hn h + b_hn.
  RNNFAST_CELL static inline void backward(const Value* reserve, UnitState<Value> previous, UnitState<Value> /*now*/,
                                           Value dh, Value& carry, Value* dgates, Value& d_rec_n) {
    const Value r = reserve[0], z = reserve[1], n = reserve[2], rec_n = reserve[3];
    dgates[2] = dh * (1 - z) * (1 - n * n);
    dgates[1] = dh * (previous.h - n) * z * (1 - z);
    dgates[0] = dgates[2] * rec_n * r * (1 - r);
    d_rec_n = dgates[2] * r;
    carry = dh * z;
  }
};

template <class Math, Mode kMode> struct RnnCell {
  using Value = typename Math::Value;
  static constexpr int kGates = 1;
  static constexpr int kReserve = 0;
  static constexpr bool kHasCell = false;
  static constexpr bool kNeedsPreviousH = false;
  static constexpr bool kSplitGradient = false;

  // h_t = tanh, relu or identity of the sum. Backward needs h_t alone.
  RNNFAST_CELL static inline UnitState<Value> forward(const Value* x, const Value* rec, UnitState<Value> previous,
                                                      Value* /*reserve*/) {
    const Value a = x[0] + rec[0];
    if constexpr (kMode == Mode::rnn_tanh) return {Math::tanh(a), previous.c};
    if constexpr (kMode == Mode::rnn_relu) return {Math::relu(a), previous.c};
    return {a, previous.c};
  }

  RNNFAST_CELL static inline void backward(const Value* /*reserve*/, UnitState<Value> /*previous*/,
                                           UnitState<Value> now, Value dh, Value& /*carry*/, Value* dgates,
                                           Value& /*d_rec_n*/) {
    if constexpr (kMode == Mode::rnn_tanh)
      dgates[0] = dh * (1 - now.h * now.h);
    else if constexpr (kMode == Mode::rnn_relu)
      dgates[0] = Math::where_positive(now.h, dh);
    else
      dgates[0] = dh;
  }
};

}  // namespace rnnfast

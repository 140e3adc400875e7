// What a cell is: the table of all cells, and their step equations with derivatives, written once, for scalars on the
// GPU and vectors on the CPU. No torch header here. rnnfast/cell_types.py has the same table for Python.
//
// `Math` names the value type and its sigmoid and tanh. Source of the equations: torch.nn.LSTM, GRU, RNN documentation;
// MGU: Zhou et al. 2016, https://arxiv.org/abs/1603.09420.
#pragma once

#include <cstdint>
#include <iterator>
#include <type_traits>

#if defined(__CUDACC__)
#define RNNFAST_HOST_DEVICE __host__ __device__
// Inlined always: otherwise a vector goes through memory at each call.
#define RNNFAST_CELL __host__ __device__ __attribute__((always_inline))
#else
#define RNNFAST_HOST_DEVICE
#define RNNFAST_CELL [[gnu::always_inline]]
#endif

namespace rnnfast {

// ---- the table ------------------------------------------------------------------------------------------------------

enum class Mode { lstm, gru, rnn_tanh, rnn_relu, rnn_identity, rnn_sigmoid, mgu };
// Cells of one family differ in a function of one value only, which GPU kernels choose at run time.
enum class Family { lstm, gru, rnn, mgu };

constexpr int kNoGate = -1;

struct CellTraits {
  Mode mode;
  const char* name;  // the ops' argument `mode`
  Family family;
  int gates;              // G: the rows that weights have for each hidden unit
  int reserve;            // values that forward saves for each hidden unit; 0: backward reads h_t
  bool has_cell_state;    // carries c_t
  bool reads_previous_h;  // in the step itself, beside W_hh h
  // The gate whose recurrent part, W_hh h + b_hh, is multiplied by another gate, or kNoGate. Its b_hh is no part of the
  // input projection, and the gradient of its recurrent part differs from that of its input part.
  int split_gate;
  bool may_project;  // the layer may have weight_hr: h_t = W_hr hidden. Not for a cell that reads_previous_h
};

// In the order of Mode. Not inline, which would be a symbol that the kernels of several ISAs share.
constexpr CellTraits kCells[] = {
    {Mode::lstm, "LSTM", Family::lstm, 4, 4, true, false, kNoGate, true},
    {Mode::gru, "GRU", Family::gru, 3, 4, false, true, 2, false},
    {Mode::rnn_tanh, "RNN_TANH", Family::rnn, 1, 0, false, false, kNoGate, false},
    {Mode::rnn_relu, "RNN_RELU", Family::rnn, 1, 0, false, false, kNoGate, false},
    {Mode::rnn_identity, "RNN_IDENTITY", Family::rnn, 1, 0, false, false, kNoGate, false},
    {Mode::rnn_sigmoid, "RNN_SIGMOID", Family::rnn, 1, 0, false, false, kNoGate, false},
    {Mode::mgu, "MGU", Family::mgu, 2, 3, false, true, 1, false},
};
constexpr int kModes = static_cast<int>(std::size(kCells));

constexpr const CellTraits& traits(Mode mode) { return kCells[static_cast<int>(mode)]; }

// Whether backward hands an earlier step something beside the product: gradients of c, or of h past the gates.
constexpr bool carries(const CellTraits& cell) { return cell.has_cell_state || cell.reads_previous_h; }

constexpr bool cells_fit() {
  for (int i = 0; i < kModes; ++i) {
    const CellTraits& cell = kCells[i];
    if (static_cast<int>(cell.mode) != i) return false;
    // One value a unit is carried, and with a projection h has other units than the cell.
    if (cell.reads_previous_h && (cell.has_cell_state || cell.may_project)) return false;
  }
  return true;
}
static_assert(cells_fit());

// Calls use(std::integral_constant<Mode, mode>) and returns what it returns.
template <int kFirst = 0, class Use> auto with_mode(Mode mode, const Use& use) {
  if constexpr (kFirst + 1 < kModes) {
    if (static_cast<int>(mode) != kFirst) return with_mode<kFirst + 1>(mode, use);
  }
  return use(std::integral_constant<Mode, static_cast<Mode>(kFirst)>{});
}

// ---- the equations --------------------------------------------------------------------------------------------------

// State of one hidden unit: h_t, or `hidden` = o * tanh(c_t) before a projection; c_t where the cell has one.
template <class Value> struct UnitState {
  Value h;
  Value c;
};

// What a step is given of one hidden unit beside its state.
template <class Value> struct UnitInputs {
  const Value* x;    // (G): the input projection
  const Value* rec;  // (G): W_hh h; of the split gate with b_hh
};

// What the derivative of a step is given.
template <class Value> struct UnitGradients {
  const Value* reserve;            // as forward left it
  UnitState<Value> previous, now;  // before and after the step, as far as the cell looks at them
  Value dh;                        // gradient of h_t, or of `hidden` before a projection
};

template <class Math, Mode kMode> struct Cell;

// The row of the table as constants.
template <Mode kMode> struct CellConstants {
  static constexpr int kGates = traits(kMode).gates;
  static constexpr int kReserve = traits(kMode).reserve;
  static constexpr bool kHasCell = traits(kMode).has_cell_state;
  static constexpr bool kNeedsPreviousH = traits(kMode).reads_previous_h;
  static constexpr int kSplitGate = traits(kMode).split_gate;
  static constexpr bool kSplitGradient = kSplitGate != kNoGate;
  static constexpr bool kMayProject = traits(kMode).may_project;
  static constexpr bool kCarries = carries(traits(kMode));
};

template <class Math> struct Cell<Math, Mode::lstm> : CellConstants<Mode::lstm> {
  using Value = typename Math::Value;

  // i, f, o = sigmoid; g = tanh; c_t = f c_{t-1} + i g; h_t = o tanh(c_t). reserve: i f g o.
  RNNFAST_CELL static inline UnitState<Value> forward(const UnitInputs<Value>& in, UnitState<Value> previous,
                                                      Value* reserve) {
    const Value i = Math::sigmoid(in.x[0] + in.rec[0]);
    const Value f = Math::sigmoid(in.x[1] + in.rec[1]);
    const Value g = Math::tanh(in.x[2] + in.rec[2]);
    const Value o = Math::sigmoid(in.x[3] + in.rec[3]);
    const Value c = f * previous.c + i * g;
    reserve[0] = i;
    reserve[1] = f;
    reserve[2] = g;
    reserve[3] = o;
    return {o * Math::tanh(c), c};
  }

  // carry: gradient of c_t on entry, of c_{t-1} on return.
  RNNFAST_CELL static inline void backward(const UnitGradients<Value>& at, Value& carry, Value* dgates,
                                           Value& /*d_rec_split*/) {
    const Value i = at.reserve[0], f = at.reserve[1], g = at.reserve[2], o = at.reserve[3];
    const Value tanh_c = Math::tanh(at.now.c);
    const Value dc = carry + at.dh * o * (1 - tanh_c * tanh_c);
    dgates[0] = dc * g * i * (1 - i);
    dgates[1] = dc * at.previous.c * f * (1 - f);
    dgates[2] = dc * i * (1 - g * g);
    dgates[3] = at.dh * tanh_c * o * (1 - o);
    carry = dc * f;
  }

  // What a projection multiplies, from what backward is given.
  RNNFAST_CELL static inline Value hidden(const UnitGradients<Value>& at) {
    return at.reserve[3] * Math::tanh(at.now.c);
  }
};

template <class Math> struct Cell<Math, Mode::gru> : CellConstants<Mode::gru> {
  using Value = typename Math::Value;

  // r, z = sigmoid; n = tanh(x_n + r (W_hn h + b_hn)); h_t = (1 - z) n + z h_{t-1}. reserve: r z n and (W_hn h + b_hn).
  RNNFAST_CELL static inline UnitState<Value> forward(const UnitInputs<Value>& in, UnitState<Value> previous,
                                                      Value* reserve) {
    const Value r = Math::sigmoid(in.x[0] + in.rec[0]);
    const Value z = Math::sigmoid(in.x[1] + in.rec[1]);
    const Value n = Math::tanh(in.x[2] + r * in.rec[2]);
    reserve[0] = r;
    reserve[1] = z;
    reserve[2] = n;
    reserve[3] = in.rec[2];
    return {n + z * (previous.h - n), previous.c};
  }

  // carry: on return what reaches h_{t-1} past the gates. d_rec_split: gradient of W_hn h + b_hn.
  RNNFAST_CELL static inline void backward(const UnitGradients<Value>& at, Value& carry, Value* dgates,
                                           Value& d_rec_split) {
    const Value r = at.reserve[0], z = at.reserve[1], n = at.reserve[2], rec_n = at.reserve[3];
    dgates[2] = at.dh * (1 - z) * (1 - n * n);
    dgates[1] = at.dh * (at.previous.h - n) * z * (1 - z);
    dgates[0] = dgates[2] * rec_n * r * (1 - r);
    d_rec_split = dgates[2] * r;
    carry = at.dh * z;
  }
};

template <class Math> struct Cell<Math, Mode::mgu> : CellConstants<Mode::mgu> {
  using Value = typename Math::Value;

  // f = sigmoid; n = tanh(x_n + f (W_hn h + b_hn)); h_t = (1 - f) h_{t-1} + f n. reserve: f n and (W_hn h + b_hn).
  RNNFAST_CELL static inline UnitState<Value> forward(const UnitInputs<Value>& in, UnitState<Value> previous,
                                                      Value* reserve) {
    const Value f = Math::sigmoid(in.x[0] + in.rec[0]);
    const Value n = Math::tanh(in.x[1] + f * in.rec[1]);
    reserve[0] = f;
    reserve[1] = n;
    reserve[2] = in.rec[1];
    return {previous.h + f * (n - previous.h), previous.c};
  }

  // carry: on return what reaches h_{t-1} past the gates. d_rec_split: gradient of W_hn h + b_hn.
  RNNFAST_CELL static inline void backward(const UnitGradients<Value>& at, Value& carry, Value* dgates,
                                           Value& d_rec_split) {
    const Value f = at.reserve[0], n = at.reserve[1], rec_n = at.reserve[2];
    dgates[1] = at.dh * f * (1 - n * n);
    dgates[0] = (at.dh * (n - at.previous.h) + dgates[1] * rec_n) * f * (1 - f);
    d_rec_split = dgates[1] * f;
    carry = at.dh * (1 - f);
  }
};

// The RNNs: h_t = f(x + rec). Backward needs h_t alone.
template <class Math, Mode kMode> struct Cell : CellConstants<kMode> {
  using Value = typename Math::Value;

  RNNFAST_CELL static inline UnitState<Value> forward(const UnitInputs<Value>& in, UnitState<Value> previous,
                                                      Value* /*reserve*/) {
    const Value a = in.x[0] + in.rec[0];
    if constexpr (kMode == Mode::rnn_tanh) return {Math::tanh(a), previous.c};
    if constexpr (kMode == Mode::rnn_relu) return {Math::relu(a), previous.c};
    if constexpr (kMode == Mode::rnn_sigmoid) return {Math::sigmoid(a), previous.c};
    return {a, previous.c};
  }

  RNNFAST_CELL static inline void backward(const UnitGradients<Value>& at, Value& /*carry*/, Value* dgates,
                                           Value& /*d_rec_split*/) {
    const Value h = at.now.h;
    if constexpr (kMode == Mode::rnn_tanh)
      dgates[0] = at.dh * (1 - h * h);
    else if constexpr (kMode == Mode::rnn_relu)
      dgates[0] = Math::where_positive(h, at.dh);
    else if constexpr (kMode == Mode::rnn_sigmoid)
      dgates[0] = at.dh * h * (1 - h);
    else
      dgates[0] = at.dh;
  }
};

}  // namespace rnnfast

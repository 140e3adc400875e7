// The ops of layers with options, one direction of one layer, for every backend that has kernels for them: what differs
// between devices stands in `Backend`:
//   static Tensor empty(const Wanted&);
//   static void variant_forward(VariantForward&, Context&, const Tensor& weight_hh);
//   static void variant_backward(VariantBackward&, Context&, const Tensor& weight_hh);
// They fill in W_hh, which each multiplies in its own way.
// rnnfast/variants/reference.py says what they compute, rnnfast/variants/ops.py has their arguments for Python.
#pragma once

#include <sstream>
#include <tuple>

#include "../arguments.h"
#include "arguments.h"
#include "params.h"

namespace rnnfast {

// What both passes take.
struct VariantCall {
  const VariantSettings& settings;
  const OptionalTensor &hx, &cx, &lx;
  const Sequences& sequences;
  const VariantWeights& weights;
  const VariantMasks& masks;
};

// Raises where a word is none of those.
inline void check_variant_words(const char* op, const std::string& words) {
  std::istringstream stream(words);
  for (std::string word; stream >> word;)
    RNNFAST_CHECK(word == "hard_sigmoid" || word == "exponential" || word == "rms" || word == "carried" ||
                      word == "reset_first" || word == "relu",
                  op, ": words: expected hard_sigmoid, exponential, rms, carried, reset_first or relu, got ", word);
}

inline bool has_word(const std::string& words, const std::string& word) {
  return (" " + words + " ").find(" " + word + " ") != std::string::npos;
}

class VariantFiller {
 public:
  VariantFiller(Context& context, const VariantCall& call, VariantParams& p) : context_(context), call_(call), p_(p) {}

  void fill() {
    const char* const op = context_.op;
    const VariantWeights& weights = call_.weights;
    p_.mode = mode_of(op, call_.settings.mode);
    const Family family = traits(p_.mode).family;
    RNNFAST_CHECK(family == Family::lstm || family == Family::gru || family == Family::rnn, op,
                  ": mode: expected LSTM, GRU or an RNN, got ", call_.settings.mode);
    p_.dtype = dtype_of(op, context_.like);
    RNNFAST_CHECK(context_.like.dim() >= 2, op, ": ", context_.like_name, ": expected 2 or 3 dimensions, got ",
                  context_.like.dim());
    check_variant_words(op, call_.settings.words);
    p_.reverse = call_.settings.reverse;
    p_.eps = call_.settings.eps;
    RNNFAST_CHECK(p_.eps >= 0, op, ": eps: expected a number of at least 0, got ", p_.eps);
    p_.hard_sigmoid = has_word(call_.settings.words, "hard_sigmoid");
    p_.rms = has_word(call_.settings.words, "rms");
    p_.exponential = has_word(call_.settings.words, "exponential");
    p_.relu = has_word(call_.settings.words, "relu");
    p_.reset_first = has_word(call_.settings.words, "reset_first");
    fill_weights();
    RNNFAST_CHECK(!p_.relu || p_.mode == Mode::gru, op, ": words: expected no relu but for a GRU");
    RNNFAST_CHECK(!p_.reset_first || (p_.has_reset() && !weights.weight_norm_hh && !weights.weight_norm), op,
                  ": words: expected no reset_first but for a GRU without a norm of the gates");
    RNNFAST_CHECK(!(weights.weight_norm_hh && weights.weight_norm), op,
                  ": weight_norm: expected None beside weight_norm_hh");
    p_.gate_norm = weights.weight_norm_hh ? GateNorm::separate : weights.weight_norm ? GateNorm::joint : GateNorm::none;
    if (weights.weight_norm_c)
      p_.cell_norm = has_word(call_.settings.words, "carried") ? CellNorm::carried : CellNorm::output;
    RNNFAST_CHECK(!weights.bias_hn || (p_.has_reset() && p_.gate_norm != GateNorm::joint && !p_.reset_first), op,
                  ": bias_hn: expected None but for a GRU whose r multiplies it");
    RNNFAST_CHECK(p_.has_cell() || (!weights.weight_peephole && !weights.weight_norm_c), op,
                  ": weight_peephole, weight_norm_c: expected None: the LSTM alone has them");
    RNNFAST_CHECK(!p_.exponential || (p_.has_cell() && p_.gates == 4 && !p_.hard_sigmoid && !weights.weight_peephole &&
                                      !weights.weight_norm_c && !call_.masks.candidate && !call_.masks.kept_c &&
                                      call_.settings.zoneout_c == 0),
                  op, ": words: expected no exponential but for an LSTM without another option of its cell");
    call_.sequences.fill(p_.rows, context_);
    if (context_.one_step) p_.rows.steps = 1;
    p_.gates_in = rows("gates", context_.like, p_.width());
    state("hx", call_.hx, p_.hx);
    if (p_.has_cell()) state("cx", call_.cx, p_.cx);
    if (p_.exponential) state("lx", call_.lx, p_.lx);
    fill_masks();
  }

  // (B, width).
  void state(const char* name, const OptionalTensor& tensor, const void*& pointer) {
    if (!tensor) return;
    context_.check(name, *tensor, {p_.rows.batch, p_.hidden_size});
    pointer = context_.hold(name, tensor);
  }
  const void* rows(const char* name, const OptionalTensor& tensor, int64_t width) {
    if (!tensor) return nullptr;
    context_.check_rows(name, *tensor, width);
    return context_.hold(name, tensor);
  }

 private:
  void fill_weights() {
    const char* const op = context_.op;
    const VariantWeights& weights = call_.weights;
    RNNFAST_CHECK(weights.weight_hh, op, ": weight_hh: expected a tensor, got None");
    const Tensor& hh = *weights.weight_hh;
    RNNFAST_CHECK(hh.dim() == 2, op, ": weight_hh: expected 2 dimensions, got ", hh.dim());
    check_sizes(op, "weight_hh", hh);
    p_.heads = call_.settings.num_heads;
    constexpr int64_t kMostHeads = int64_t{1} << 14;
    RNNFAST_CHECK(p_.heads > 0 && p_.heads <= kMostHeads, op, ": num_heads: expected 1 to ", kMostHeads, ", got ",
                  p_.heads);
    p_.hidden_size = hh.size(1) * p_.heads;
    const int64_t of_cell = traits(p_.mode).gates;
    p_.gates = p_.hidden_size ? hh.size(0) / p_.hidden_size : of_cell;
    RNNFAST_CHECK(p_.gates == of_cell || p_.coupled() || (p_.mode == Mode::gru && p_.gates == 2), op,
                  ": weight_hh: expected (G*H, H / num_heads), got shape ", shape_text(hh.sizes().data(), hh.dim()));
    context_.check("weight_hh", hh, {p_.width(), p_.head_size()});
    vector("bias_hn", weights.bias_hn, p_.hidden_size, p_.vectors[kBiasHn]);
    vector("weight_peephole", weights.weight_peephole, (p_.gates - 1) * p_.hidden_size, p_.vectors[kPeephole]);
    vector("weight_norm_hh", weights.weight_norm_hh, p_.width(), p_.vectors[kNorm]);
    vector("weight_norm", weights.weight_norm, p_.width(), p_.vectors[kNorm]);
    vector("bias_norm", weights.bias_norm, p_.width(), p_.vectors[kNormBias]);
    vector("weight_norm_c", weights.weight_norm_c, p_.hidden_size, p_.vectors[kNormC]);
    vector("bias_norm_c", weights.bias_norm_c, p_.hidden_size, p_.vectors[kNormCBias]);
    RNNFAST_CHECK(!weights.bias_norm || weights.weight_norm, op, ": bias_norm: expected None without weight_norm");
    RNNFAST_CHECK(!weights.bias_norm_c || weights.weight_norm_c, op,
                  ": bias_norm_c: expected None without weight_norm_c");
  }
  void vector(const char* name, const OptionalTensor& tensor, int64_t size, const void*& pointer) {
    if (!tensor) return;
    context_.check(name, *tensor, {size});
    pointer = context_.hold(name, tensor);
  }

  void fill_masks() {
    const VariantMasks& masks = call_.masks;
    state("recurrent_mask", masks.recurrent, p_.recurrent_mask);
    state("candidate_mask", masks.candidate, p_.candidate_mask);
    RNNFAST_CHECK(!masks.candidate || traits(p_.mode).gates > 1, context_.op,
                  ": candidate_mask: expected None: the RNN has no gates");
    p_.kept_h = kept("zoneout_h_mask", masks.kept_h);
    p_.zoneout_h = share("zoneout_h", call_.settings.zoneout_h);
    if (!p_.has_cell()) return;
    p_.kept_c = kept("zoneout_c_mask", masks.kept_c);
    p_.zoneout_c = share("zoneout_c", call_.settings.zoneout_c);
  }
  double share(const char* name, double value) const {
    RNNFAST_CHECK(value >= 0 && value <= 1, context_.op, ": ", name, ": expected a number from 0 to 1, got ", value);
    return value;
  }
  const uint8_t* kept(const char* name, const OptionalTensor& tensor) {
    if (!tensor) return nullptr;
    const Tensor& like = context_.like;
    RNNFAST_CHECK(tensor->device() == like.device() && tensor->scalar_type() == ScalarType::Bool, context_.op, ": ",
                  name, ": expected a bool tensor on the device of the data");
    if (like.dim() == 2)
      check_shape(context_.op, name, *tensor, {like.size(0), p_.hidden_size});
    else
      check_shape(context_.op, name, *tensor, {like.size(0), like.size(1), p_.hidden_size});
    return static_cast<const uint8_t*>(context_.hold(name, tensor));
  }

  Context& context_;
  const VariantCall call_;
  VariantParams& p_;
};

// Results, and pointers to them.
template <class Backend> struct VariantResults {
  const Context& context;

  Tensor make(const char* name, std::initializer_list<int64_t> sizes, ScalarType type, void*& pointer) const {
    const Tensor made = Backend::empty({context.op, name, Sizes(sizes.begin(), sizes.size()), type, context.like});
    pointer = made.mutable_data_ptr();
    return made;
  }
  Tensor none() const {
    void* nowhere = nullptr;
    return make("nothing", {0}, context.like.scalar_type(), nowhere);
  }
  Tensor rows(const char* name, int64_t width, void*& pointer) const {
    return rows(name, width, context.like.scalar_type(), pointer);
  }
  Tensor rows(const char* name, int64_t width, ScalarType type, void*& pointer) const {
    const Tensor& like = context.like;
    if (like.dim() == 2) return make(name, {like.size(0), width}, type, pointer);
    return make(name, {like.size(0), like.size(1), width}, type, pointer);
  }
  Tensor vector(const char* name, std::initializer_list<int64_t> sizes, void*& pointer) const {
    return make(name, sizes, context.like.scalar_type(), pointer);
  }
};

template <class Backend> struct VariantOps {
  using Forwards = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Forwards forward(bool saves, VariantSettings settings, Tensor gates, OptionalTensor hx, OptionalTensor cx,
                          OptionalTensor lx, Sequences sequences, VariantWeights weights, VariantMasks masks) {
    Context context("rnnfast::variant_forward", "gates", gates);
    VariantForward p;
    VariantFiller(context, {settings, hx, cx, lx, sequences, weights, masks}, p).fill();
    const int64_t H = p.hidden_size, B = p.rows.batch;
    const bool saves_norm = saves && p.gate_norm != GateNorm::none;
    const VariantResults<Backend> results{context};
    Forwards made{
        results.rows("output", H, p.output),
        results.vector("h_n", {B, H}, p.h_n),
        p.has_cell() ? results.vector("c_n", {B, H}, p.c_n) : results.none(),
        p.has_cell() ? results.rows("cell_states", H, p.cell_states) : results.none(),
        p.exponential ? results.vector("l_n", {B, H}, p.l_n) : results.none(),
        saves ? results.rows("reserve", p.reserve() * H, p.reserve_out) : results.none(),
        saves_norm ? results.rows("normed", p.width(), p.normed) : results.none(),
        saves_norm ? results.rows("scale", 1, compute_type(p.dtype), p.scale) : results.none(),
    };
    Backend::variant_forward(p, context, *weights.weight_hh);
    return made;
  }

  using Backwards =
      std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

  static Backwards backward(VariantGradients grads, VariantSaved saved, VariantSettings settings, Tensor gates,
                            OptionalTensor hx, OptionalTensor cx, OptionalTensor lx, Sequences sequences,
                            VariantWeights weights, VariantMasks masks) {
    Context context("rnnfast::variant_backward", "gates", gates);
    const char* const op = context.op;
    VariantBackward p;
    VariantFiller filler(context, {settings, hx, cx, lx, sequences, weights, masks}, p);
    filler.fill();
    const int64_t H = p.hidden_size, B = p.rows.batch;
    RNNFAST_CHECK(saved.output && saved.cell_states && saved.reserve && saved.normed && saved.scale, op,
                  ": output, cell_states, reserve, normed, scale: expected what forward returned, got None");
    p.grad_output = filler.rows("grad_output", grads.output, H);
    filler.state("grad_h_n", grads.h_n, p.grad_h_n);
    p.output = filler.rows("output", saved.output, H);
    p.reserve_in = filler.rows("reserve", saved.reserve, p.reserve() * H);
    if (p.has_cell()) {
      filler.state("grad_c_n", grads.c_n, p.grad_c_n);
      if (p.exponential) filler.state("grad_l_n", grads.l_n, p.grad_l_n);
      p.grad_cell_states = filler.rows("grad_cell_states", grads.cell_states, H);
      p.cell_states = filler.rows("cell_states", saved.cell_states, H);
    }
    if (p.gate_norm != GateNorm::none) {
      p.normed = filler.rows("normed", saved.normed, p.width());
      RNNFAST_CHECK(saved.scale->scalar_type() == compute_type(p.dtype) &&
                        saved.scale->device() == context.like.device() && saved.scale->numel() == context.row_count,
                    op, ": scale: expected what forward returned");
      p.scale = context.hold("scale", saved.scale);
    }
    const VariantResults<Backend> results{context};
    const auto gradient = [&](const char* name, const OptionalTensor& of, std::initializer_list<int64_t> sizes,
                              void*& pointer) { return of ? results.vector(name, sizes, pointer) : results.none(); };
    const VariantWeights& w = weights;
    void** const to = p.grad_vectors;
    Backwards made{
        results.rows("grad_gates", p.width(), p.grad_gates),
        p.splits_gradient() ? results.rows("grad_sums", p.width(), p.grad_sums) : results.none(),
        gradient("grad_hx", hx, {B, H}, p.grad_hx),
        p.has_cell() ? gradient("grad_cx", cx, {B, H}, p.grad_cx) : results.none(),
        p.exponential ? gradient("grad_lx", lx, {B, H}, p.grad_lx) : results.none(),
        gradient("grad_bias_hn", w.bias_hn, {H}, to[kBiasHn]),
        gradient("grad_weight_peephole", w.weight_peephole, {(p.gates - 1) * H}, to[kPeephole]),
        gradient("grad_weight_norm_hh", w.weight_norm_hh, {p.width()}, to[kNorm]),
        gradient("grad_weight_norm", w.weight_norm, {p.width()}, to[kNorm]),
        gradient("grad_bias_norm", w.bias_norm, {p.width()}, to[kNormBias]),
        gradient("grad_weight_norm_c", w.weight_norm_c, {H}, to[kNormC]),
        gradient("grad_bias_norm_c", w.bias_norm_c, {H}, to[kNormCBias]),
    };
    Backend::variant_backward(p, context, *weights.weight_hh);
    return made;
  }
};

template <class Backend, class Library> void register_variant_ops(Library& library) {
  library.impl("variant_forward", &Boxed<&VariantOps<Backend>::forward>::call);
  library.impl("variant_backward", &Boxed<&VariantOps<Backend>::backward>::call);
}

}  // namespace rnnfast

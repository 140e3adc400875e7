// The arguments of the ops of layers with options, as records, each in the order in which the ops have them, and the
// ops' schemas. rnnfast/variants/reference.py has those of forward for Python.
#pragma once

#include "../boxing.h"
#include "../sequences.h"

namespace rnnfast {

struct VariantSettings {
  std::string mode, words;
  double eps = 0, zoneout_h = 0, zoneout_c = 0;
  bool reverse = false;
  int64_t num_heads = 1;

  template <class Use> void each(const Use& use) {
    use([] { return "mode"; }, mode);
    use([] { return "words"; }, words);
    use([] { return "eps"; }, eps);
    use([] { return "zoneout_h"; }, zoneout_h);
    use([] { return "zoneout_c"; }, zoneout_c);
    use([] { return "reverse"; }, reverse);
    use([] { return "num_heads"; }, num_heads);
  }
};

struct VariantWeights {
  OptionalTensor weight_hh, bias_hn, weight_peephole, weight_norm_hh, weight_norm, bias_norm, weight_norm_c,
      bias_norm_c;

  template <class Use> void each(const Use& use) {
    use([] { return "weight_hh"; }, weight_hh);
    use([] { return "bias_hn"; }, bias_hn);
    use([] { return "weight_peephole"; }, weight_peephole);
    use([] { return "weight_norm_hh"; }, weight_norm_hh);
    use([] { return "weight_norm"; }, weight_norm);
    use([] { return "bias_norm"; }, bias_norm);
    use([] { return "weight_norm_c"; }, weight_norm_c);
    use([] { return "bias_norm_c"; }, bias_norm_c);
  }
};

struct VariantMasks {
  OptionalTensor recurrent, candidate, kept_h, kept_c;

  template <class Use> void each(const Use& use) {
    use([] { return "recurrent_mask"; }, recurrent);
    use([] { return "candidate_mask"; }, candidate);
    use([] { return "zoneout_h_mask"; }, kept_h);
    use([] { return "zoneout_c_mask"; }, kept_c);
  }
};

struct VariantGradients {
  OptionalTensor output, h_n, c_n, cell_states, l_n;

  template <class Use> void each(const Use& use) {
    use([] { return "grad_output"; }, output);
    use([] { return "grad_h_n"; }, h_n);
    use([] { return "grad_c_n"; }, c_n);
    use([] { return "grad_cell_states"; }, cell_states);
    use([] { return "grad_l_n"; }, l_n);
  }
};

struct VariantSaved {
  OptionalTensor output, cell_states, reserve, normed, scale;

  template <class Use> void each(const Use& use) {
    use([] { return "output"; }, output);
    use([] { return "cell_states"; }, cell_states);
    use([] { return "reserve"; }, reserve);
    use([] { return "normed"; }, normed);
    use([] { return "scale"; }, scale);
  }
};

// variant_forward: output, h_n, c_n, cell_states, of the sLSTM l_n; with `saves` what variant_backward needs: reserve,
// normed, scale. variant_backward: the gradients of gates, of W_hh h where it is another, of hx, cx, lx, and of the
// weights but weight_hh. (0,) stands for what does not apply.
template <class Library> void define_variant_ops(Library& library) {
  const std::string call = schema_of<VariantSettings>() + ", Tensor gates, Tensor? hx, Tensor? cx, Tensor? lx" +
                           schema_of<Sequences>() + schema_of<VariantWeights>() + schema_of<VariantMasks>();
  const auto results = [](int count) {
    std::string text = ") -> (Tensor";
    for (int i = 1; i < count; ++i) text += ", Tensor";
    return text + ")";
  };
  library.def(("variant_forward(bool saves" + call + results(8)).c_str());
  const std::string given = schema_of<VariantGradients>() + schema_of<VariantSaved>() + call;
  library.def(("variant_backward(" + given.substr(2) + results(12)).c_str());
}

}  // namespace rnnfast

// The ops of a layer, for every backend: what differs between devices stands in `Backend`:
//   static Tensor empty(const Wanted&);
//   static constexpr bool kMakesGates;  // forward takes the layer's input; else gates come from input_projection first
//   input_projection and matmul, as the ops
//   static void forward(const char* op, const ForwardParams&, const Context&, const Tensor& like);
//   static void backward(const char* op, const BackwardParams&, const Context&, const Tensor& like,
//                        const Places&);
#pragma once

#include <tuple>

#include "arguments.h"
#include "boxing.h"

namespace rnnfast {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend> struct LayerOps {
  static Tensor empty(const char* op, const char* name, const Tensor& like, std::initializer_list<int64_t> sizes) {
    return Backend::empty({op, name, Sizes(sizes.begin(), sizes.size()), like.scalar_type(), like});
  }
  // Of shape (0,): what does not apply.
  static Tensor none(const char* op, const Tensor& like) { return empty(op, "nothing", like, {0}); }

  // (rows..., width), where `like` has the rows.
  static Tensor empty_rows(const char* op, const char* name, const Tensor& like, int64_t width) {
    if (like.dim() == 2) return empty(op, name, like, {like.size(0), width});
    return empty(op, name, like, {like.size(0), like.size(1), width});
  }

  // (D, B, width), of one step (B, width).
  static Tensor empty_state(const char* op, const char* name, const Tensor& like, const Context& context,
                            int64_t width) {
    const Recurrence& r = context.r;
    if (context.one_step) return empty(op, name, like, {r.rows.batch, width});
    return empty(op, name, like, {r.directions, r.rows.batch, width});
  }

  // What forward returns, allocated and put into the params.
  static Five forward(const char* op, ForwardParams& p, const Context& context, const Tensor& like, bool save_reserve) {
    const int64_t D = p.directions, H = p.hidden_size;
    const bool lstm = p.mode == Mode::lstm;
    Tensor output = empty_rows(op, "output", like, D * p.state_size);
    // After one step h_n would be the output once more.
    Tensor h_n = context.one_step ? none(op, like) : empty(op, "h_n", like, {D, p.rows.batch, p.state_size});
    Tensor c_n = lstm ? empty_state(op, "c_n", like, context, H) : none(op, like);
    Tensor cell_states = lstm && save_reserve ? empty_rows(op, "cell_states", like, D * H) : none(op, like);
    Tensor reserve = save_reserve && traits(p.mode).reserve
                         ? empty_rows(op, "reserve", like, D * traits(p.mode).reserve * H)
                         : none(op, like);
    p.output = mutable_data_of(output);
    p.h_n = mutable_data_of(context.one_step ? output : h_n);
    p.c_n = mutable_data_of(c_n);
    p.cell_states = lstm && save_reserve ? mutable_data_of(cell_states) : nullptr;
    p.reserve = save_reserve && traits(p.mode).reserve ? mutable_data_of(reserve) : nullptr;
    Backend::forward(op, p, context, like);
    return {output, h_n, c_n, cell_states, reserve};
  }

  static Five recurrence_forward(std::string mode, bool batch_first, bool save_reserve, Tensor gates, OptionalTensor hx,
                                 OptionalTensor cx, OptionalTensor batch_sizes, OptionalTensor lengths,
                                 OptionalTensor resets, Places places) {
    const char* op = "rnnfast::recurrence_forward";
    Context context(op);
    fill({op, mode, "gates", gates, places, hx, cx, batch_sizes, lengths, resets, batch_first}, context);
    ForwardParams p;
    static_cast<Recurrence&>(p) = context.r;
    const int64_t width = p.directions * traits(p.mode).gates * p.hidden_size;
    RNNFAST_CHECK(gates.size(gates.dim() - 1) == width, op, ": gates: expected a last dimension of ", width, ", got ",
                  gates.size(gates.dim() - 1));
    p.gates = context.hold("gates", gates);
    if (p.mode == Mode::gru) fill_biases(op, "bias_hh", places, &Parameters::bias_hh, gates, context, p.bias_hh);
    return forward(op, p, context, gates, save_reserve);
  }

  static Five whole_layer(const char* op, const std::string& mode, bool batch_first, const Tensor& input,
                          const OptionalTensor& hx, const OptionalTensor& cx, const OptionalTensor& batch_sizes,
                          const OptionalTensor& lengths, const OptionalTensor& resets, const Places& places,
                          bool save_reserve) {
    Context context(op);
    fill({op, mode, "input", input, places, hx, cx, batch_sizes, lengths, resets, batch_first}, context);
    ForwardParams p;
    static_cast<Recurrence&>(p) = context.r;
    p.input_size = input.size(input.dim() - 1);
    for (int64_t d = 0; d < p.directions; ++d) {
      const std::string name = place_name("weight_ih", d);
      const Tensor& weight_ih = required(op, "weight_ih", d, places[d].weight_ih);
      check_shape(op, name.c_str(), weight_ih, {traits(p.mode).gates * p.hidden_size, p.input_size});
      check_like(op, name.c_str(), weight_ih, input);
    }
    if constexpr (Backend::kMakesGates) {
      p.from_input = true;
      p.input = context.hold("input", input);
      for (int64_t d = 0; d < p.directions; ++d) {
        const Matrix ih = row_major(op, "weight_ih", *places[d].weight_ih, context.keep);
        p.weight_ih[d] = ih.data;
        p.weight_ih_stride[d] = ih.stride;
      }
      fill_biases(op, "bias_ih", places, &Parameters::bias_ih, input, context, p.bias_ih);
      fill_biases(op, "bias_hh", places, &Parameters::bias_hh, input, context, p.bias_hh);
    } else {
      p.gates = context.hold("gates", Backend::input_projection(mode, input, places));
      if (p.mode == Mode::gru) fill_biases(op, "bias_hh", places, &Parameters::bias_hh, input, context, p.bias_hh);
    }
    return forward(op, p, context, input, save_reserve);
  }

  static Five layer_forward(std::string mode, bool batch_first, Tensor input, OptionalTensor hx, OptionalTensor cx,
                            OptionalTensor batch_sizes, OptionalTensor lengths, OptionalTensor resets, Places places) {
    return whole_layer("rnnfast::layer_forward", mode, batch_first, input, hx, cx, batch_sizes, lengths, resets, places,
                       true);
  }

  static Three layer(std::string mode, bool batch_first, Tensor input, OptionalTensor hx, OptionalTensor cx,
                     OptionalTensor batch_sizes, OptionalTensor lengths, OptionalTensor resets, Places places) {
    auto [output, h_n, c_n, cell_states, reserve] =
        whole_layer("rnnfast::layer", mode, batch_first, input, hx, cx, batch_sizes, lengths, resets, places, false);
    return {output, h_n, c_n};
  }

  static Five recurrence_backward(std::string mode, bool batch_first, OptionalTensor grad_output,
                                  OptionalTensor grad_h_n, OptionalTensor grad_c_n, OptionalTensor grad_cell_states,
                                  OptionalTensor output, Tensor cell_states, Tensor reserve, OptionalTensor hx,
                                  OptionalTensor cx, OptionalTensor batch_sizes, OptionalTensor lengths,
                                  OptionalTensor resets, Places places) {
    const char* op = "rnnfast::recurrence_backward";
    Context context(op);
    // Of one step of an LSTM or GRU the reserve says all: nobody need keep the output.
    const Tensor& model = output ? *output : reserve;
    fill({op, mode, output ? "output" : "reserve", model, places, hx, cx, batch_sizes, lengths, resets, batch_first},
         context);
    const Recurrence& r = context.r;
    const int64_t D = r.directions, H = r.hidden_size, G = traits(r.mode).gates;
    const bool lstm = r.mode == Mode::lstm;
    RNNFAST_CHECK(output || (context.one_step && traits(r.mode).reserve), op,
                  ": output: expected a tensor, got None (which one step of an LSTM or GRU allows)");
    const auto check_rows = [&](const char* argument, const Tensor& tensor, int64_t width) {
      check_like(op, argument, tensor, model);
      if (model.dim() == 2)
        check_shape(op, argument, tensor, {model.size(0), width});
      else
        check_shape(op, argument, tensor, {model.size(0), model.size(1), width});
    };
    BackwardParams p;
    static_cast<Recurrence&>(p) = r;
    const auto rows_of = [&](const char* argument, const OptionalTensor& tensor, int64_t width) -> const void* {
      if (!tensor) return nullptr;
      check_rows(argument, *tensor, width);
      return context.hold(argument, tensor);
    };
    const auto state_of = [&](const char* argument, const OptionalTensor& tensor, int64_t width) -> const void* {
      if (!tensor) return nullptr;
      context.check_state(argument, *tensor, model, width);
      return context.hold(argument, tensor);
    };
    p.output = rows_of("output", output, D * r.state_size);
    p.grad_output = rows_of("grad_output", grad_output, D * r.state_size);
    // After one step h_n is the output.
    RNNFAST_CHECK(!grad_h_n || !context.one_step, op,
                  ": grad_h_n: expected None for one step, whose h_n is the output");
    p.grad_h_n = state_of("grad_h_n", grad_h_n, r.state_size);
    if (lstm) {
      p.cell_states = rows_of("cell_states", cell_states, D * H);
      p.grad_c_n = state_of("grad_c_n", grad_c_n, H);
      p.grad_cell_states = rows_of("grad_cell_states", grad_cell_states, D * H);
    }
    if (traits(r.mode).reserve) p.reserve = rows_of("reserve", reserve, D * traits(r.mode).reserve * H);
    Tensor grad_gates = empty_rows(op, "grad_gates", model, D * G * H);
    Tensor grad_gates_hh = r.mode == Mode::gru ? empty_rows(op, "grad_gates_hh", model, D * G * H) : none(op, model);
    Tensor grad_hx = hx ? empty_state(op, "grad_hx", model, context, r.state_size) : none(op, model);
    Tensor grad_cx = lstm && cx ? empty_state(op, "grad_cx", model, context, H) : none(op, model);
    Tensor grad_projected = r.projected ? empty_rows(op, "grad_projected", model, D * r.state_size) : none(op, model);
    p.grad_gates = mutable_data_of(grad_gates);
    p.grad_gates_hh = r.mode == Mode::gru ? mutable_data_of(grad_gates_hh) : nullptr;
    p.grad_hx = hx ? mutable_data_of(grad_hx) : nullptr;
    p.grad_cx = lstm && cx ? mutable_data_of(grad_cx) : nullptr;
    p.grad_projected = r.projected ? mutable_data_of(grad_projected) : nullptr;
    Backend::backward(op, p, context, model, places);
    return {grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected};
  }
};

template <class Backend, class Library> void register_layer_ops(Library& library) {
  library.impl("input_projection", &Boxed<&Backend::input_projection>::call);
  library.impl("recurrence_forward", &Boxed<&LayerOps<Backend>::recurrence_forward>::call);
  library.impl("recurrence_backward", &Boxed<&LayerOps<Backend>::recurrence_backward>::call);
  library.impl("layer_forward", &Boxed<&LayerOps<Backend>::layer_forward>::call);
  library.impl("layer", &Boxed<&LayerOps<Backend>::layer>::call);
  library.impl("matmul", &Boxed<&Backend::matmul>::call);
}

}  // namespace rnnfast

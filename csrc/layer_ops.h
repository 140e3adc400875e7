// The ops of a layer, for every backend: what differs between devices stands in `Backend`:
//   static Tensor empty(const Wanted&);
//   static void forward(ForwardParams&, Context&, const Places&);  // fills in what it makes of the input, context.like
//   static void backward(const BackwardParams&, Context&, const Places&);
#pragma once

#include <tuple>

#include "arguments.h"
#include "boxing.h"

namespace rnnfast {

using Three = std::tuple<Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Backend> struct LayerOps {
  static Tensor empty(const Context& context, const char* name, std::initializer_list<int64_t> sizes) {
    const Tensor& like = context.like;
    return Backend::empty({context.op, name, Sizes(sizes.begin(), sizes.size()), like.scalar_type(), like});
  }
  // Of shape (0,): what does not apply, where it is a tensor all the same.
  static Tensor none(const Context& context) { return empty(context, "nothing", {0}); }
  static Tensor or_none(const Context& context, const OptionalTensor& tensor) {
    return tensor ? *tensor : none(context);
  }

  // Results, of which the params struct gets a pointer: null where one is not wanted. (rows..., width).
  static OptionalTensor rows(const Context& context, const char* name, bool wanted, void*& pointer, int64_t width) {
    const Tensor& like = context.like;
    if (!wanted) return std::nullopt;
    if (like.dim() == 2) return pointed_at(empty(context, name, {like.size(0), width}), pointer);
    return pointed_at(empty(context, name, {like.size(0), like.size(1), width}), pointer);
  }
  // (D, B, width), of one step (B, width).
  static OptionalTensor state(const Context& context, const char* name, bool wanted, void*& pointer,
                              const Recurrence& r, int64_t width) {
    if (!wanted) return std::nullopt;
    if (context.one_step) return pointed_at(empty(context, name, {r.rows.batch, width}), pointer);
    return pointed_at(empty(context, name, {r.directions, r.rows.batch, width}), pointer);
  }

  // What a forward pass gives, and what it saves for a backward pass, if there will be one.
  struct Forwards {
    Tensor output;
    OptionalTensor h_n, c_n, cell_states, reserve;
  };

  static Forwards forwards(Context& context, bool saves, const std::string& mode, const OptionalTensor& hx,
                           const OptionalTensor& cx, const Sequences& sequences, const Places& places) {
    ForwardParams p;
    fill(mode, hx, cx, sequences, places, context, p);
    // What makes the input projection: a backend takes it in its own way.
    for (const KindTraits& kind : kKinds)
      if (!kind.multiplies_steps()) check_parameters(kind, context, p, places);
    const Forwards results = make_results(saves, context, p);
    Backend::forward(p, context, places);
    return results;
  }

  // Of a forward pass whose sizes are known.
  static Forwards make_results(bool saves, const Context& context, ForwardParams& p) {
    const CellTraits& cell = traits(p.mode);
    const int64_t D = p.directions, H = p.hidden_size;
    Forwards results{*rows(context, "output", true, p.output, D * p.state_size), {}, {}, {}, {}};
    // After one step h_n would be the output once more.
    results.h_n = state(context, "h_n", !context.one_step, p.h_n, p, p.state_size);
    if (context.one_step) p.h_n = p.output;
    results.c_n = state(context, "c_n", cell.has_cell_state, p.c_n, p, H);
    results.cell_states = rows(context, "cell_states", saves && cell.has_cell_state, p.cell_states, D * H);
    results.reserve = rows(context, "reserve", saves && cell.reserve, p.reserve, D * cell.reserve * H);
    return results;
  }

  static Five layer_forward(std::string mode, Tensor input, OptionalTensor hx, OptionalTensor cx, Sequences sequences,
                            Places places) {
    Context context("rnnfast::layer_forward", "input", input);
    const Forwards f = forwards(context, true, mode, hx, cx, sequences, places);
    return {f.output, or_none(context, f.h_n), or_none(context, f.c_n), or_none(context, f.cell_states),
            or_none(context, f.reserve)};
  }

  static Three layer(std::string mode, Tensor input, OptionalTensor hx, OptionalTensor cx, Sequences sequences,
                     Places places) {
    Context context("rnnfast::layer", "input", input);
    const Forwards f = forwards(context, false, mode, hx, cx, sequences, places);
    return {f.output, or_none(context, f.h_n), or_none(context, f.c_n)};
  }

  static Five recurrence_backward(std::string mode, OptionalTensor grad_output, OptionalTensor grad_h_n,
                                  OptionalTensor grad_c_n, OptionalTensor grad_cell_states, OptionalTensor output,
                                  Tensor cell_states, Tensor reserve, OptionalTensor hx, OptionalTensor cx,
                                  Sequences sequences, Places places) {
    // Of one step a reserve says all: nobody need keep the output.
    Context context("rnnfast::recurrence_backward", output ? "output" : "reserve", output ? *output : reserve);
    const Backwards b = backwards(context, mode, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states,
                                  reserve, hx, cx, sequences, places);
    return {b.grad_gates, or_none(context, b.grad_gates_hh), or_none(context, b.grad_hx), or_none(context, b.grad_cx),
            or_none(context, b.grad_projected)};
  }

  struct Backwards {
    Tensor grad_gates;
    OptionalTensor grad_gates_hh, grad_hx, grad_cx, grad_projected;
  };

  // What a backward pass reads.
  static void fill_backward(Context& context, const std::string& mode, const OptionalTensor& grad_output,
                            const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                            const OptionalTensor& grad_cell_states, const OptionalTensor& output,
                            const OptionalTensor& cell_states, const OptionalTensor& reserve, const OptionalTensor& hx,
                            const OptionalTensor& cx, const Sequences& sequences, const Places& places,
                            BackwardParams& p) {
    fill(mode, hx, cx, sequences, places, context, p);
    const CellTraits& cell = traits(p.mode);
    const int64_t D = p.directions, H = p.hidden_size;
    RNNFAST_CHECK(output || (context.one_step && cell.reserve), context.op,
                  ": output: expected a tensor, got None (which one step of a cell with a reserve allows)");
    const auto rows_of = [&](const char* argument, const OptionalTensor& tensor, int64_t width) -> const void* {
      if (!tensor) return nullptr;
      context.check_rows(argument, *tensor, width);
      return context.hold(argument, tensor);
    };
    const auto state_of = [&](const char* argument, const OptionalTensor& tensor, int64_t width) -> const void* {
      if (!tensor) return nullptr;
      context.check_state(argument, *tensor, p, width);
      return context.hold(argument, tensor);
    };
    p.output = rows_of("output", output, D * p.state_size);
    p.grad_output = rows_of("grad_output", grad_output, D * p.state_size);
    // After one step h_n is the output.
    RNNFAST_CHECK(!grad_h_n || !context.one_step, context.op,
                  ": grad_h_n: expected None for one step, whose h_n is the output");
    p.grad_h_n = state_of("grad_h_n", grad_h_n, p.state_size);
    if (cell.has_cell_state) {
      RNNFAST_CHECK(cell_states, context.op, ": cell_states: expected a tensor, got None");
      p.cell_states = rows_of("cell_states", cell_states, D * H);
      p.grad_c_n = state_of("grad_c_n", grad_c_n, H);
      p.grad_cell_states = rows_of("grad_cell_states", grad_cell_states, D * H);
    }
    if (cell.reserve) {
      RNNFAST_CHECK(reserve, context.op, ": reserve: expected a tensor, got None");
      p.reserve = rows_of("reserve", reserve, D * cell.reserve * H);
    }
  }

  static Backwards backwards(Context& context, const std::string& mode, const OptionalTensor& grad_output,
                             const OptionalTensor& grad_h_n, const OptionalTensor& grad_c_n,
                             const OptionalTensor& grad_cell_states, const OptionalTensor& output,
                             const OptionalTensor& cell_states, const OptionalTensor& reserve, const OptionalTensor& hx,
                             const OptionalTensor& cx, const Sequences& sequences, const Places& places) {
    BackwardParams p;
    fill_backward(context, mode, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states, reserve, hx,
                  cx, sequences, places, p);
    const CellTraits& cell = traits(p.mode);
    const int64_t D = p.directions, H = p.hidden_size, gates_width = D * cell.gates * H;
    Backwards results{*rows(context, "grad_gates", true, p.grad_gates, gates_width), {}, {}, {}, {}};
    results.grad_gates_hh = rows(context, "grad_gates_hh", cell.split_gate != kNoGate, p.grad_gates_hh, gates_width);
    results.grad_hx = state(context, "grad_hx", hx.has_value(), p.grad_hx, p, p.state_size);
    results.grad_cx = state(context, "grad_cx", cell.has_cell_state && cx, p.grad_cx, p, H);
    results.grad_projected = rows(context, "grad_projected", p.projected, p.grad_projected, D * p.state_size);
    Backend::backward(p, context, places);
    return results;
  }

 private:
  static OptionalTensor pointed_at(const Tensor& tensor, void*& pointer) {
    pointer = mutable_data_of(tensor);
    return tensor;
  }
};

template <class Backend, class Library> void register_layer_ops(Library& library) {
  library.impl("layer_forward", &Boxed<&LayerOps<Backend>::layer_forward>::call);
  library.impl("layer", &Boxed<&LayerOps<Backend>::layer>::call);
  library.impl("recurrence_backward", &Boxed<&LayerOps<Backend>::recurrence_backward>::call);
}

}  // namespace rnnfast

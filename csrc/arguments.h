// From the ops' arguments to the params structs, for every backend: checks, contiguous copies, pointers.
#pragma once

#include "places.h"
#include "sequences.h"

namespace rnnfast {

// The parameters of a kind where the layer has them: of the kind's shape, the op's dtype and device.
inline void check_parameters(const KindTraits& kind, const Context& context, const Recurrence& r,
                             const Places& places) {
  const bool expected = kind.option == Option::bias ? present(context.op, kind, r.directions, places)
                                                    : kind.option == Option::always || r.projected;
  if (!expected) return;
  const auto count = [&](Size size) {
    switch (size) {
      case Size::gates: return traits(r.mode).gates * r.hidden_size;
      case Size::input: return context.like.size(context.like.dim() - 1);
      case Size::state: return r.state_size;
      default: return r.hidden_size;
    }
  };
  for (int64_t d = 0; d < r.directions; ++d) {
    const Tensor& tensor = required(context.op, kind, d, places);
    const std::string reversed = d ? place_name(kind, d) : "";
    const char* const name = d ? reversed.c_str() : kind.name;
    if (kind.is_matrix())
      context.check(name, tensor, {count(kind.rows), count(kind.columns)});
    else
      context.check(name, tensor, {count(kind.rows)});
  }
}

// Their pointers, of those that are there.
inline void hold_parameters(const KindTraits& kind, Context& context, Recurrence& r, const Places& places) {
  Operand& operand = r.parameters[kind.kind];
  for (int64_t d = 0; d < r.directions; ++d) {
    const OptionalTensor& tensor = places[kind.kind][d];
    if (!tensor) continue;
    const Matrix held =
        kind.is_matrix() ? context.hold_rows(kind.name, *tensor) : Matrix{context.hold(kind.name, tensor), 1};
    operand.data[d] = held.data;
    operand.stride[d] = held.stride;
  }
}

// The cell, and whether there are two directions and a projection.
inline void fill_options(const std::string& mode, const Places& places, const Context& context, Recurrence& r) {
  const char* const op = context.op;
  r.mode = mode_of(op, mode);
  r.dtype = dtype_of(op, context.like);
  r.directions = places.directions();
  for (const KindTraits& kind : kKinds) {
    if (kind.option != Option::projection || !present(op, kind, r.directions, places)) continue;
    RNNFAST_CHECK(traits(r.mode).may_project, op, ": ", kind.name, ": expected None: ", mode, " has no projection");
    r.projected = true;
  }
}

// Of a layer whose sizes are known: how its rows lie, and its states.
inline void fill_rows(const OptionalTensor& hx, const OptionalTensor& cx, const Sequences& sequences, Context& context,
                      Recurrence& r) {
  sequences.fill(r.rows, context);
  RNNFAST_CHECK(!context.one_step || r.directions == 1, context.op, ": ", context.like_name,
                ": expected 3 dimensions, got 2: one step, which has one direction");
  if (hx) {
    context.check_state("hx", *hx, r, r.state_size);
    r.hx = context.hold("hx", hx);
  }
  if (cx && traits(r.mode).has_cell_state) {
    context.check_state("cx", *cx, r, r.hidden_size);
    r.cx = context.hold("cx", cx);
  }
}

// All that forward and backward share.
inline void fill(const std::string& mode, const OptionalTensor& hx, const OptionalTensor& cx,
                 const Sequences& sequences, const Places& places, Context& context, Recurrence& r) {
  const char* const op = context.op;
  fill_options(mode, places, context, r);
  const Tensor& weight_hh = required(op, traits(Kind::weight_hh), 0, places);
  RNNFAST_CHECK(weight_hh.dim() == 2, op, ": weight_hh: expected 2 dimensions, got ", weight_hh.dim());
  check_sizes(op, "weight_hh", weight_hh);
  r.hidden_size = weight_hh.size(0) / traits(r.mode).gates;
  r.state_size = r.projected ? weight_hh.size(1) : r.hidden_size;
  for (const KindTraits& kind : kKinds) {
    if (!kind.multiplies_steps()) continue;
    check_parameters(kind, context, r, places);
    hold_parameters(kind, context, r, places);
  }
  fill_rows(hx, cx, sequences, context, r);
}

}  // namespace rnnfast

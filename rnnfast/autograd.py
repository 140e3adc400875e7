"""The derivative of a layer: what is saved, which products give which gradient, and how vmap folds it.

`Layer` is one layer (all its directions, all its steps). Its backward asks `RecurrenceBackward` for the gradients of
the gates and of the states, and turns them into the gradients of the weights and of the input with matrix products.
`RecurrenceBackward` is differentiable through `reference.py`, so a backward pass with create_graph=True can itself be
differentiated, any number of times. There is no `jvp` rule (Dynamo refuses a Function that has one): forward-mode
differentiation runs `reference_layer`, ordinary differentiable PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference

Tensors = Sequence[Tensor]


def split_weights(weights: Tensors, directions: int, bias: bool) -> tuple[list[Tensor], ...]:
    """Sorts one layer's parameters, in torch.nn's order, into lists of one tensor a direction.

    Returns:
        (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr); a list is empty where the layer has no such parameter.
    """
    each = len(weights) // directions
    bias_ih: list[Tensor] = []
    bias_hh: list[Tensor] = []
    if bias:
        bias_ih, bias_hh = list(weights[2::each]), list(weights[3::each])
    # weight_hr comes last, so an odd count says that it is there.
    weight_hr = list(weights[each - 1 :: each]) if each % 2 else []
    return list(weights[0::each]), list(weights[1::each]), bias_ih, bias_hh, weight_hr


def reference_layer(
    mode: str,
    directions: int,
    bias: bool,
    batch_first: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer in plain PyTorch, every result differentiable: (output, h_n, c_n, cells, reserve)."""
    weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = split_weights(weights, directions, bias)
    gates = reference.input_gates(mode, input, weight_ih, bias_ih, bias_hh)
    return reference.recurrence_forward(
        mode, gates, weight_hh, bias_hh if mode == "GRU" else [], weight_hr, hx, cx, batch_sizes, lengths, resets,
        batch_first, True,
    )  # fmt: skip


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The types were chosen in forward: an autocast region around backward() must not change them."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# Roles of the tensors for vmap (ops.batched_call), in the order of the Functions' arguments.
_LAYER_ROLES = (ops.ROWS, ops.STATE, ops.STATE, ops.SIZES, ops.BATCH, ops.ROWS)
_LAYER_RESULTS = (ops.ROWS, ops.STATE, ops.STATE, ops.ROWS, ops.ROWS)
_BACKWARD_ROLES = (ops.ROWS, ops.STATE, ops.STATE, *[ops.ROWS] * 4, *_LAYER_ROLES)
_BACKWARD_RESULTS = (ops.ROWS, ops.ROWS, ops.STATE, ops.STATE, ops.ROWS, ops.ROWS)


class Layer(torch.autograd.Function):
    """One layer: (output, h_n, c_n, cells, reserve); reserve has no gradient."""

    @staticmethod
    def forward(
        backend: str,
        mode: str,
        directions: int,
        bias: bool,
        batch_first: bool,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        weight_ih, weight_hh, bias_ih, bias_hh, weight_hr = split_weights(weights, directions, bias)
        gates = ops.input_gates(mode, input, weight_ih, bias_ih, bias_hh, backend=backend)
        return ops.recurrence_forward(
            mode, gates, weight_hh, bias_hh if mode == "GRU" else [], weight_hr, hx, cx, batch_sizes, lengths, resets,
            batch_first, True, backend=backend,
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.mode, ctx.directions, ctx.bias, ctx.batch_first = inputs[:5]
        out, _, _, cells, reserve = output
        ctx.save_for_backward(*inputs[5:11], out, cells, reserve, *inputs[11:])
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_cells: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Any, ...]:
        input, hx, cx, batch_sizes, lengths, resets, output, cells, reserve, *weights = ctx.saved_tensors
        if grad_output is None and grad_h_n is None and grad_c_n is None and grad_cells is None:
            return (None,) * len(ctx.needs_input_grad)
        with _without_autocast(output.device.type):
            grad_input, grad_hx, grad_cx, grad_weights = _layer_backward(
                ctx, grad_output, grad_h_n, grad_c_n, grad_cells, input, hx, cx, batch_sizes, lengths, resets, output,
                cells, reserve, weights,
            )  # fmt: skip
        return (None, None, None, None, None, grad_input, grad_hx, grad_cx, None, None, None, *grad_weights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        flags, tensors = args[:5], args[5:]
        return ops.batched_call(
            lambda *folded: Layer.apply(*flags, *folded),
            info.batch_size, in_dims[5:], tensors, _LAYER_ROLES + (ops.WEIGHT,) * (len(tensors) - 6), _LAYER_RESULTS,
            tensors[3] is not None, flags[4],
        )  # fmt: skip


def _layer_backward(
    ctx: Any,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    output: Tensor,
    cells: Tensor,
    reserve: Tensor,
    weights: Tensors,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    needs = ctx.needs_input_grad
    directions, bias, batch_first = ctx.directions, ctx.bias, ctx.batch_first
    arguments = (
        ctx.backend, ctx.mode, directions, bias, batch_first, grad_output, grad_h_n, grad_c_n, grad_cells, output,
        cells, reserve, input, hx, cx, batch_sizes, lengths, resets, *weights,
    )  # fmt: skip
    # The Function is only worth its overhead where somebody may differentiate this backward pass.
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        results = RecurrenceBackward.apply(*arguments)
    else:
        results = RecurrenceBackward.forward(*arguments)
    grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected, hidden = results

    each = len(weights) // directions
    weight_needs = needs[11:]
    # (rows, D*G*H) as a matrix, whatever the leading dimensions; a view, because results are contiguous.
    flat = grad_gates.flatten(0, -2)
    grad_weights: list[Tensor | None] = [None] * len(weights)
    grad_input = None
    if needs[5]:
        weight_ih = weights[0] if directions == 1 else torch.cat((weights[0], weights[each]))
        grad_input = ops.matmul(flat, weight_ih).view(input.shape)
    if any(weight_needs[0::each]):
        product = ops.matmul(flat.t(), input.contiguous().flatten(0, -2))
        grad_weights[0::each] = product.chunk(directions)
    if any(weight_needs[1::each]):
        grad_hh = grad_gates_hh if ctx.mode == "GRU" else grad_gates
        for d in range(directions):
            if weight_needs[d * each + 1]:
                grad_weights[d * each + 1] = _grad_weight_hh(
                    grad_hh, output, hx, d, directions, batch_sizes, lengths, resets, batch_first
                )
    if bias and any(weight_needs):
        sums = flat.sum(0).chunk(directions)
        grad_weights[2::each] = sums
        grad_weights[3::each] = sums if ctx.mode != "GRU" else grad_gates_hh.flatten(0, -2).sum(0).chunk(directions)
    if each % 2:
        for d in range(directions):
            if weight_needs[d * each + each - 1]:
                grad_weights[d * each + each - 1] = ops.matmul(
                    _columns(grad_projected, d, directions).flatten(0, -2).t(),
                    _columns(hidden, d, directions).flatten(0, -2),
                )
    return (
        grad_input,
        grad_hx if needs[6] else None,
        grad_cx if needs[7] else None,
        [g if need else None for g, need in zip(grad_weights, weight_needs, strict=True)],
    )


def _columns(rows: Tensor, direction: int, directions: int) -> Tensor:
    """A direction's part of (..., D*K): (..., K), a view."""
    return rows if directions == 1 else rows.chunk(directions, -1)[direction]


def _grad_weight_hh(
    grad: Tensor,
    output: Tensor,
    hx: Tensor | None,
    direction: int,
    directions: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
) -> Tensor:
    """Gradient of one direction's weight_hh (G*H, P or H): over all rows, grad times the state that entered the step.

    Args:
        grad: (rows, D*G*H), the gradient of `W_hh h`.
        output: (rows, D*P or D*H).
    """
    grad, output = _columns(grad, direction, directions), _columns(output, direction, directions)
    state = None if hx is None else hx[direction]
    if batch_sizes is not None:
        previous = _previous_packed(output, state, batch_sizes, direction == 1)
        return ops.matmul(grad.t(), previous)
    if lengths is None and resets is None and not batch_first:
        # Time-major: the state that entered is the output, shifted by one step. Two views and two products, no copy.
        inner, entry = (grad[1:], grad[0]) if direction == 0 else (grad[:-1], grad[-1])
        shifted = output[:-1] if direction == 0 else output[1:]
        if state is not None and output.size(0) == 1:
            return ops.matmul(entry.t(), state)
        product = ops.matmul(inner.flatten(0, 1).t(), shifted.flatten(0, 1))
        return product if state is None else product + ops.matmul(entry.t(), state)
    previous = _previous_dense(output, state, lengths, resets, direction == 1, 1 if batch_first else 0)
    return ops.matmul(grad.flatten(0, 1).t(), previous.flatten(0, 1))


def _previous_dense(
    output: Tensor, state: Tensor | None, lengths: Tensor | None, resets: Tensor | None, reverse: bool, time: int
) -> Tensor:
    """The state that entered each step of one direction, in the shape of `output`, (T, B, P) or (B, T, P)."""
    steps = output.size(time)
    at_edge = (torch.zeros_like(output.select(time, 0)) if state is None else state).unsqueeze(time)
    if not reverse:
        previous = torch.cat((at_edge, output.narrow(time, 0, steps - 1)), time)
        return previous if resets is None else previous.masked_fill(resets.unsqueeze(-1), 0)
    previous = torch.cat((output.narrow(time, 1, steps - 1), at_edge), time)
    if resets is not None:
        # The reversed direction zeroes the state after step t, that is before step t - 1.
        after = torch.cat((resets.narrow(time, 1, steps - 1), torch.zeros_like(resets.narrow(time, 0, 1))), time)
        previous = previous.masked_fill(after.unsqueeze(-1), 0)
    if lengths is not None and state is not None:
        # hx enters at each row's own last step; a reset just behind it (beyond the row) does nothing.
        t = torch.arange(steps, device=output.device).unsqueeze(1 - time)
        previous = torch.where((t == (lengths - 1).unsqueeze(time)).unsqueeze(-1), at_edge, previous)
    return previous


def _previous_packed(output: Tensor, state: Tensor | None, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """The state that entered each packed row of one direction: (rows, P)."""
    rows, batch = output.size(0), None if state is None else state.size(0)
    steps = torch.arange(batch_sizes.size(0))
    starts = batch_sizes.cumsum(0) - batch_sizes
    step = torch.repeat_interleave(steps, batch_sizes, output_size=rows)
    column = torch.arange(rows) - starts[step]
    # Where each row's predecessor stands in `output`; -1 for the rows that hx enters.
    if not reverse:
        before = (step - 1).clamp_min(0)
        source = torch.where(step > 0, starts[before] + column, -1)
    else:
        after = (step + 1).clamp_max(batch_sizes.size(0) - 1)
        alive = (step + 1 < batch_sizes.size(0)) & (column < batch_sizes[after])
        source = torch.where(alive, starts[after] + column, -1)
    source, column = source.to(output.device), column.to(output.device)
    inside = (source >= 0).unsqueeze(-1)
    previous = output.index_select(0, source.clamp_min(0))
    if state is None or batch is None:
        return previous.masked_fill(~inside, 0)
    return torch.where(inside, previous, state.index_select(0, column))


def _hidden(cells: Tensor, reserve: Tensor, directions: int, lengths: Tensor | None, batch_first: bool) -> Tensor:
    """What a projection multiplies, `o * tanh(c)`: (rows, D*H) in the type of the cells."""
    # 16-bit types: round once, as forward does.
    kind = torch.float32 if cells.dtype in (torch.float16, torch.bfloat16) else cells.dtype
    out_gate = reserve.unflatten(-1, (directions, 4, -1)).select(-2, 3).flatten(-2)
    hidden = (out_gate.to(kind) * cells.to(kind).tanh()).to(cells.dtype)
    if lengths is None:
        return hidden
    # reserve holds anything beyond a row's length.
    t = torch.arange(cells.size(1 if batch_first else 0), device=cells.device)
    beyond = t >= lengths.unsqueeze(1) if batch_first else t.unsqueeze(1) >= lengths
    return hidden.masked_fill(beyond.unsqueeze(-1), 0)


class RecurrenceBackward(torch.autograd.Function):
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected, hidden).

    Takes everything that determines these, so that its own backward can recompute them differentiably: the gradients of
    the results, the layer's input and parameters. output, cells and reserve are shortcuts to what these determine, and
    get no gradient here.
    """

    @staticmethod
    def forward(
        backend: str,
        mode: str,
        directions: int,
        bias: bool,
        batch_first: bool,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_cells: Tensor | None,
        output: Tensor,
        cells: Tensor,
        reserve: Tensor,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        _, weight_hh, _, _, weight_hr = split_weights(weights, directions, bias)
        results = ops.recurrence_backward(
            mode, grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, reserve, weight_hh, weight_hr, hx, cx,
            batch_sizes, lengths, resets, batch_first, backend=backend,
        )  # fmt: skip
        hidden = _hidden(cells, reserve, directions, lengths, batch_first) if weight_hr else output.new_empty(0)
        return (*results, hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.flags = inputs[1:5]
        # output, cells and reserve (9, 10, 11) are recomputed.
        ctx.save_for_backward(*inputs[5:9], *inputs[12:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        mode, directions, bias, batch_first = ctx.flags
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[5:9] + ctx.needs_input_grad[12:]
        wanted = [i for i, need in enumerate(needs) if need and saved[i] is not None]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        grads: list[Tensor | None] = [None] * len(saved)
        if wanted and given:

            def recompute(*variables: Tensor) -> tuple[Tensor, ...]:
                values = list(saved)
                for i, variable in zip(wanted, variables, strict=True):
                    values[i] = variable
                grad_output, grad_h_n, grad_c_n, grad_cells, *layer = values
                _, hx, cx, batch_sizes, lengths, resets, *weights = layer
                _, weight_hh, _, _, weight_hr = split_weights(weights, directions, bias)
                output, _, _, cells, reserve = reference_layer(mode, directions, bias, batch_first, *layer)
                results = reference.recurrence_backward(
                    mode, grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, reserve, weight_hh, weight_hr,
                    hx, cx, batch_sizes, lengths, resets, batch_first,
                )  # fmt: skip
                hidden = _hidden(cells, reserve, directions, lengths, batch_first) if weight_hr else output.new_empty(0)
                every = (*results, hidden)
                return tuple(every[i] for i in given)

            with _without_autocast(saved[4].device.type):
                pull_back = torch.func.vjp(recompute, *[saved[i] for i in wanted])[1]
                for i, grad in zip(wanted, pull_back(tuple(cotangents[i] for i in given)), strict=True):
                    grads[i] = grad
        return (None,) * 5 + (*grads[:4], None, None, None, *grads[4:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        flags, tensors = args[:5], args[5:]
        return ops.batched_call(
            lambda *folded: RecurrenceBackward.apply(*flags, *folded),
            info.batch_size, in_dims[5:], tensors, _BACKWARD_ROLES + (ops.WEIGHT,) * (len(tensors) - 13),
            _BACKWARD_RESULTS, tensors[10] is not None, flags[4],
        )  # fmt: skip

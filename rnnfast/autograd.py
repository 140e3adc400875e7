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


# A layer's parameters have a fixed number of places, None where there is none: five a direction. (Dynamo does not
# understand a Function with setup_context that takes *arguments.)
Places = tuple[Tensor | None, ...]
IH, HH, BIAS_IH, BIAS_HH, HR = range(5)


def place_weights(weights: Tensors, directions: int, bias: bool) -> Places:
    """One layer's parameters, in torch.nn's order, in their ten places."""
    each = len(weights) // directions
    places: list[Tensor | None] = [None] * 10
    for d in range(directions):
        own = weights[d * each : (d + 1) * each]
        places[5 * d + IH], places[5 * d + HH] = own[0], own[1]
        if bias:
            places[5 * d + BIAS_IH], places[5 * d + BIAS_HH] = own[2], own[3]
        if each % 2:
            places[5 * d + HR] = own[-1]
    return tuple(places)


def lists_of(
    places: Sequence[Tensor | None],
) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """The lists that the ops take: (weight_ih, weight_hh, bias_ih, bias_hh, weight_hr), one tensor a direction."""

    def kind(place: int) -> list[Tensor]:
        return [weight for weight in (places[place], places[5 + place]) if weight is not None]

    return kind(IH), kind(HH), kind(BIAS_IH), kind(BIAS_HH), kind(HR)


def reference_layer(
    mode: str,
    batch_first: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer in plain PyTorch, every result differentiable: (output, h_n, c_n, cells, reserve)."""
    return reference.layer_forward(mode, input, *lists_of(places), hx, cx, batch_sizes, lengths, resets, batch_first)


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The types were chosen in forward: an autocast region around backward() must not change them."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# Roles of the tensors for vmap (ops.batched_call), in the order of the Functions' arguments.
_LAYER_ROLES = (ops.ROWS, ops.STATE, ops.STATE, ops.SIZES, ops.BATCH, ops.ROWS, *[ops.WEIGHT] * 10)
_LAYER_RESULTS = (ops.ROWS, ops.STATE, ops.STATE, ops.ROWS, ops.ROWS)
_BACKWARD_ROLES = (ops.ROWS, ops.STATE, ops.STATE, *[ops.ROWS] * 4, *_LAYER_ROLES)
_BACKWARD_RESULTS = (ops.ROWS, ops.ROWS, ops.STATE, ops.STATE, ops.ROWS, ops.ROWS)


class Layer(torch.autograd.Function):
    """One layer: (output, h_n, c_n, cells, reserve); reserve has no gradient."""

    @staticmethod
    def forward(
        backend: str,
        mode: str,
        batch_first: bool,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        weight_ih_reverse: Tensor | None,
        weight_hh_reverse: Tensor | None,
        bias_ih_reverse: Tensor | None,
        bias_hh_reverse: Tensor | None,
        weight_hr_reverse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        places = (
            weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ih_reverse, weight_hh_reverse, bias_ih_reverse,
            bias_hh_reverse, weight_hr_reverse,
        )  # fmt: skip
        return ops.layer_forward(
            mode, input, *lists_of(places), hx, cx, batch_sizes, lengths, resets, batch_first, backend=backend
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.mode, ctx.batch_first = inputs[:3]
        out, _, _, cells, reserve = output
        ctx.save_for_backward(*inputs[3:9], out, cells, reserve, *inputs[9:])
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
        input, hx, cx, batch_sizes, lengths, resets, output, cells, reserve, *places = ctx.saved_tensors
        if grad_output is None and grad_h_n is None and grad_c_n is None and grad_cells is None:
            return (None,) * len(ctx.needs_input_grad)
        with _without_autocast(output.device.type):
            grad_input, grad_hx, grad_cx, grad_weights = _layer_backward(
                ctx, grad_output, grad_h_n, grad_c_n, grad_cells, input, hx, cx, batch_sizes, lengths, resets, output,
                cells, reserve, places,
            )  # fmt: skip
        return (None, None, None, grad_input, grad_hx, grad_cx, None, None, None, *grad_weights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        flags, tensors = args[:3], args[3:]
        return ops.batched_call(
            lambda *folded: Layer.apply(*flags, *folded),
            info.batch_size, in_dims[3:], tensors, _LAYER_ROLES, _LAYER_RESULTS, tensors[3] is not None, flags[2],
        )  # fmt: skip


def layer_in_graph(*arguments: Any) -> Any:
    """`Layer.apply`, put into Dynamo's graph as it is: see `mark_layer_in_graph`."""
    return Layer.apply(*arguments)


def mark_layer_in_graph() -> bool:
    """Tells Dynamo not to look into `layer_in_graph`.

    Inside torch.func's transforms Dynamo takes a Function's forward for the whole of it and drops the backward, which
    gives wrong gradients without a word. What it does not look into runs as without Dynamo, transforms and all.
    """
    torch.compiler.allow_in_graph(layer_in_graph)
    return True


# The effect of torch.compiler.assume_constant_result: Dynamo calls this while it traces. That decorator, like
# allow_in_graph itself, imports Dynamo, which takes seconds, so neither can run when this module is imported.
mark_layer_in_graph._dynamo_marked_constant = True  # type: ignore[attr-defined]


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
    places: Sequence[Tensor | None],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    needs_input, needs_hx, needs_cx, *_ = ctx.needs_input_grad[3:]
    needs = ctx.needs_input_grad[9:]
    arguments = (
        ctx.backend, ctx.mode, ctx.batch_first, grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, reserve,
        input, hx, cx, batch_sizes, lengths, resets, *places,
    )  # fmt: skip
    # The Function is only worth its overhead where somebody may differentiate this backward pass.
    if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
        results = RecurrenceBackward.apply(*arguments)
    else:
        results = RecurrenceBackward.forward(*arguments)
    grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected, hidden = results

    weight_ih, weight_hh, _, _, _ = lists_of(places)
    directions = len(weight_hh)
    # (rows, D*G*H) as a matrix, whatever the leading dimensions; a view, because results are contiguous.
    flat = grad_gates.flatten(0, -2)
    flat_hh = grad_gates_hh.flatten(0, -2) if ctx.mode == "GRU" else flat
    grads: list[Tensor | None] = [None] * 10
    grad_input = None
    if needs_input:
        grad_input = ops.matmul(flat, weight_ih[0] if directions == 1 else torch.cat(weight_ih)).view(input.shape)

    if any(needs[IH::5]):
        grads[IH::5] = _split(ops.matmul(flat.t(), input.contiguous().flatten(0, -2)), directions)
    if any(needs[BIAS_IH::5]) or any(needs[BIAS_HH::5]):
        grads[BIAS_IH::5] = _split(flat.sum(0), directions)
        grads[BIAS_HH::5] = grads[BIAS_IH::5] if ctx.mode != "GRU" else _split(flat_hh.sum(0), directions)
    for d in range(directions):
        if needs[5 * d + HH]:
            grads[5 * d + HH] = _grad_weight_hh(
                _columns(flat_hh, d, directions), _columns(output, d, directions), hx, d, batch_sizes, lengths, resets,
                ctx.batch_first,
            )  # fmt: skip
        if needs[5 * d + HR]:
            projected, unprojected = _columns(grad_projected, d, directions), _columns(hidden, d, directions)
            grads[5 * d + HR] = ops.matmul(projected.flatten(0, -2).t(), unprojected.flatten(0, -2))
    return (
        grad_input,
        grad_hx if needs_hx else None,
        grad_cx if needs_cx else None,
        [g if need else None for g, need in zip(grads, needs, strict=True)],
    )


def _split(value: Tensor, directions: int) -> tuple[Tensor | None, ...]:
    """(D*K, ...) into one part for each of two directions, None for the one that is not there."""
    return (value, None) if directions == 1 else value.chunk(2)


def _columns(rows: Tensor, direction: int, directions: int) -> Tensor:
    """A direction's part of (..., D*K): (..., K), a view."""
    return rows if directions == 1 else rows.chunk(directions, -1)[direction]


def _grad_weight_hh(
    grad: Tensor,
    output: Tensor,
    hx: Tensor | None,
    direction: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
) -> Tensor:
    """Gradient of one direction's weight_hh (G*H, P or H): over all rows, grad times the state that entered the step.

    Args:
        grad: (T*B, G*H), or packed (rows, G*H): the gradient of `W_hh h`, as a matrix.
        output: (rows, P or H), this direction's.
        hx: (D, B, P or H), all directions', or None.
    """
    state = None if hx is None else hx[direction]
    reverse = direction == 1
    if batch_sizes is not None:
        entered = _previous_packed_views if _on_device(output, batch_sizes) else _previous_packed
        return ops.matmul(grad.t(), entered(output, state, batch_sizes, reverse))
    if lengths is None and resets is None and not batch_first:
        # Time-major: the state that entered is the output, shifted by one step. Two views and two products, no copy.
        batch, rows = output.size(1), grad.size(0)
        output = output.flatten(0, 1)
        if reverse:
            inner, entry, shifted = grad[: rows - batch], grad[rows - batch :], output[batch:]
        else:
            inner, entry, shifted = grad[batch:], grad[:batch], output[: rows - batch]
        product = ops.matmul(inner.t(), shifted)
        return product if state is None else product + ops.matmul(entry.t(), state)
    previous = _previous_dense(output, state, lengths, resets, reverse, 1 if batch_first else 0)
    return ops.matmul(grad.t(), previous.flatten(0, 1))


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


def _on_device(output: Tensor, batch_sizes: Tensor) -> bool:
    """Whether `_previous_packed_views` serves better: on CUDA, unless a graph is traced, where sizes are symbols.

    Index lists made on the host would have to be copied, which halts the host and cannot be captured in a CUDA graph.
    """
    return (
        output.is_cuda
        and not torch.compiler.is_compiling()
        and type(batch_sizes) is Tensor  # not a FakeTensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(batch_sizes)
    )


def _previous_packed_views(output: Tensor, state: Tensor | None, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """What `_previous_packed` returns, put together from views: nothing goes from the host to the device."""
    sizes = batch_sizes.tolist()
    if state is None:
        state = output.new_zeros(sizes[0] if sizes else 0, output.size(1))
    parts = []
    # Of the rows of one step, those that a neighbouring step precedes, and behind them those that the state enters.
    # A run of steps of equal size is one view: there the neighbours' rows lie one behind the other.
    start = 0
    for first, last in _runs(sizes):
        size, steps = sizes[first], last - first
        end = start + steps * size
        if not reverse:
            before = sizes[first - 1] if first > 0 else 0
            parts.append(state[:size] if first == 0 else output[start - before : start - before + size])
            parts.append(output[start : end - size])
        else:
            after = sizes[last] if last < len(sizes) else 0
            parts.append(output[start + size : end])
            parts.append(output[end : end + after])
            parts.append(state[after:size])
        start = end
    return torch.cat(parts) if parts else output


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The stretches [first, last) of equal numbers."""
    starts = [t for t in range(len(sizes)) if t == 0 or sizes[t] != sizes[t - 1]]
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))


def _hidden(cells: Tensor, reserve: Tensor, directions: int) -> Tensor:
    """What a projection multiplies, `o * tanh(c)`: (rows, D*H) in the type of the cells, zero beyond a row's length."""
    # 16-bit types: round once, as forward does.
    kind = torch.float32 if cells.dtype in (torch.float16, torch.bfloat16) else cells.dtype
    out_gate = reserve.unflatten(-1, (directions, 4, -1)).select(-2, 3).flatten(-2)
    return (out_gate.to(kind) * cells.to(kind).tanh()).to(cells.dtype)


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
        weight_ih: Tensor,
        weight_hh: Tensor,
        bias_ih: Tensor | None,
        bias_hh: Tensor | None,
        weight_hr: Tensor | None,
        weight_ih_reverse: Tensor | None,
        weight_hh_reverse: Tensor | None,
        bias_ih_reverse: Tensor | None,
        bias_hh_reverse: Tensor | None,
        weight_hr_reverse: Tensor | None,
    ) -> tuple[Tensor, ...]:
        places = (
            weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, weight_ih_reverse, weight_hh_reverse, bias_ih_reverse,
            bias_hh_reverse, weight_hr_reverse,
        )  # fmt: skip
        _, every_hh, _, _, every_hr = lists_of(places)
        results = ops.recurrence_backward(
            mode, grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, reserve, every_hh, every_hr, hx, cx,
            batch_sizes, lengths, resets, batch_first, backend=backend,
        )  # fmt: skip
        hidden = _hidden(cells, reserve, len(every_hh)) if every_hr else output.new_empty(0)
        return (*results, hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mode, ctx.batch_first = inputs[1:3]
        # output, cells and reserve (7, 8, 9) are recomputed.
        ctx.save_for_backward(*inputs[3:7], *inputs[10:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        mode, batch_first = ctx.mode, ctx.batch_first
        saved = ctx.saved_tensors
        needs = ctx.needs_input_grad[3:7] + ctx.needs_input_grad[10:]
        wanted = [i for i, need in enumerate(needs) if need and saved[i] is not None]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        grads: list[Tensor | None] = [None] * len(saved)
        if wanted and given:

            def recompute(*variables: Tensor) -> tuple[Tensor, ...]:
                values = list(saved)
                for i, variable in zip(wanted, variables, strict=True):
                    values[i] = variable
                grad_output, grad_h_n, grad_c_n, grad_cells, *layer = values
                _, hx, cx, batch_sizes, lengths, resets, *places = layer
                _, weight_hh, _, _, weight_hr = lists_of(places)
                output, _, _, cells, reserve = reference_layer(mode, batch_first, *layer)
                nothing = output.new_empty(0)
                results = reference.recurrence_backward(
                    mode, grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, reserve, weight_hh, weight_hr,
                    hx, cx, batch_sizes, lengths, resets, batch_first,
                )  # fmt: skip
                hidden = _hidden(cells, reserve, len(weight_hh)) if weight_hr else nothing
                every = (*results, hidden)
                return tuple(every[i] for i in given)

            with _without_autocast(saved[4].device.type):
                pull_back = torch.func.vjp(recompute, *[saved[i] for i in wanted])[1]
                for i, grad in zip(wanted, pull_back(tuple(cotangents[i] for i in given)), strict=True):
                    grads[i] = grad
        return (None,) * 3 + (*grads[:4], None, None, None, *grads[4:])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        flags, tensors = args[:3], args[3:]
        return ops.batched_call(
            lambda *folded: RecurrenceBackward.apply(*flags, *folded),
            info.batch_size, in_dims[3:], tensors, _BACKWARD_ROLES, _BACKWARD_RESULTS, tensors[10] is not None,
            flags[2],
        )  # fmt: skip

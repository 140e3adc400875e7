"""The derivative of a layer: what is saved, which products give which gradient, and how vmap folds it.

`Layer` is one layer (all its directions, all its steps). Its backward asks `RecurrenceBackward` for the gradients of
the gates and of the states, and turns them into the gradients of the weights and of the input with matrix products.
`RecurrenceBackward` is differentiable through `reference.py`, so a backward pass with create_graph=True can itself be
differentiated, any number of times. There is no `jvp` rule (Dynamo refuses a Function that has one): forward-mode
differentiation runs `reference.layer_forward`, ordinary differentiable PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .signatures import BIAS_HH, BIAS_IH, HH, HR, IH, OPS, PLACES, of_kind, rows_of_one_step
from .vmap import batched_call

# Bound once: on the path of every call.
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The types were chosen in forward: an autocast region around backward() must not change them."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


# What the Functions' arguments are for vmap: those of the ops. (RecurrenceBackward has the layer's input besides.)
_LAYER, _BACKWARD = OPS["layer_forward"], OPS["recurrence_backward"]
_BACKWARD_ROLES = (*_BACKWARD.roles[2:9], *_LAYER.roles[2:])
_BACKWARD_RESULTS = (*_BACKWARD.results, _BACKWARD.results[-1])

# The places that a first derivative leaves alone, where the input wants a gradient and where it does not.
_NOT_NEEDED = [i for i, place in enumerate(PLACES) if place.startswith("bias")]
_NOT_NEEDED_OF_DATA = [i for i, place in enumerate(PLACES) if place.startswith(("bias", "weight_ih"))]

# The Functions name every place: Dynamo does not understand a Function with setup_context that takes *arguments.


def _keep(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """Saves those tensors that there are: a None among saved tensors breaks tools that look at them."""
    ctx.kept = kept = [i for i, tensor in enumerate(tensors) if tensor is not None]
    ctx.save_for_backward(*[tensors[i] for i in kept])


def _kept(ctx: Any, count: int) -> list[Any]:
    """What `_keep` was given, so many tensors."""
    tensors: list[Any] = [None] * count
    for i, tensor in zip(ctx.kept, ctx.saved_tensors, strict=True):
        tensors[i] = tensor
    return tensors


class Layer(torch.autograd.Function):
    """One layer: (output, h_n, c_n, cell_states, reserve); reserve has no gradient."""

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
        weight_ih_reverse: Tensor | None,
        weight_hh: Tensor,
        weight_hh_reverse: Tensor | None,
        bias_ih: Tensor | None,
        bias_ih_reverse: Tensor | None,
        bias_hh: Tensor | None,
        bias_hh_reverse: Tensor | None,
        weight_hr: Tensor | None,
        weight_hr_reverse: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = ops.kernels[backend].layer_forward(
            mode, batch_first, input, hx, cx, batch_sizes, lengths, resets, weight_ih, weight_ih_reverse,
            weight_hh, weight_hh_reverse, bias_ih, bias_ih_reverse, bias_hh, bias_hh_reverse, weight_hr,
            weight_hr_reverse,
        )  # fmt: skip
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.backend, ctx.mode, ctx.batch_first = inputs[:3]
        out: Tensor | None
        out, _, _, cell_states, reserve = output
        input, hx, cx, batch_sizes, lengths, resets, *places = inputs[3:]
        if ctx.mode in ("LSTM", "GRU") and rows_of_one_step(input, batch_sizes):
            # Backward needs the state that entered alone, so whoever called may write into the new one.
            out = None
        ctx.unsaved = None
        if not _is_compiling() and not _functorch_active():
            # What the first derivative does not need may change in the meantime; the second looks whether it did.
            unsaved = ctx.unsaved = []
            for place in _NOT_NEEDED if input.requires_grad else _NOT_NEEDED_OF_DATA:
                tensor = places[place]
                if tensor is not None:
                    unsaved.append((place, tensor, tensor._version))
                    places[place] = None
        _keep(ctx, [input, hx, cx, batch_sizes, lengths, resets, out, cell_states, reserve, *places])
        ctx.mark_non_differentiable(reserve)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(
        ctx: Any,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_cell_states: Tensor | None,
        _: Tensor | None,
    ) -> tuple[Any, ...]:
        kept = _kept(ctx, 9 + len(PLACES))
        if grad_output is None and grad_h_n is None and grad_c_n is None and grad_cell_states is None:
            return (None,) * len(ctx.needs_input_grad)
        for place, tensor, version in ctx.unsaved or ():
            if torch.is_grad_enabled() and tensor._version != version:
                name = PLACES[place]
                raise RuntimeError(
                    f"rnnfast: {name} has been modified by an inplace operation since the forward pass, and the second "
                    f"derivative needs it as it was: expected version {version}, got {tensor._version}"
                )
            kept[9 + place] = tensor
        if rows_of_one_step(kept[0], kept[3]):
            # The h_n of one step is empty: the output stands for it.
            grad_h_n = None
        with _without_autocast(kept[0].device.type):
            grad_input, grad_hx, grad_cx, grad_weights = _layer_backward(
                ctx, (grad_output, grad_h_n, grad_c_n, grad_cell_states), kept[:9], kept[9:]
            )
        return (None, None, None, grad_input, grad_hx, grad_cx, None, None, None, *grad_weights)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        flags, tensors = args[:3], args[3:]
        return batched_call(
            lambda *folded: Layer.apply(*flags, *folded),
            info.batch_size, in_dims[3:], tensors, _LAYER.roles[2:], _LAYER.results, flags[2],
        )  # fmt: skip


# What Layer.apply comes to where neither Dynamo nor torch.func looks on. On the way there it binds the arguments to
# forward's signature, for defaults that we do not have, which takes as long as the rest of a small layer.
apply_layer: Any = super(torch.autograd.Function, Layer).apply  # type: ignore[misc]


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
    cotangents: tuple[Tensor | None, ...],
    saved: Sequence[Any],
    places: Sequence[Any],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, list[Tensor | None]]:
    """What `Layer.backward` returns: gradients of input, hx and cx, and of the places.

    Args:
        ctx: of Layer.
        cotangents: the gradients of output, h_n, c_n and cell_states, None for zero.
        saved: input, hx, cx, batch_sizes, lengths, resets, output, cell_states, reserve.
        places: the parameters.
    """
    input, hx, cx, batch_sizes, lengths, resets, output, cell_states, reserve = saved
    needs_input, needs_hx, needs_cx, *_ = ctx.needs_input_grad[3:]
    needs = ctx.needs_input_grad[9:]
    arguments = (
        ctx.backend, ctx.mode, ctx.batch_first, *cotangents, output, cell_states, reserve, input, hx, cx, batch_sizes,
        lengths, resets, *places,
    )  # fmt: skip
    # The Function is only worth its overhead where somebody may differentiate this backward pass.
    if torch.is_grad_enabled() or _functorch_active():
        results = RecurrenceBackward.apply(*arguments)
    else:
        results = RecurrenceBackward.forward(*arguments)
    grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected, hidden = results

    weight_ih = of_kind(places, IH)
    directions = len(weight_ih)
    # (rows, D*G*H) as a matrix, whatever the leading dimensions; a view, because results are contiguous.
    flat = _matrix(grad_gates)
    flat_hh = _matrix(grad_gates_hh) if ctx.mode == "GRU" else flat
    # Nothing that is handed out shares memory: callers write into gradients.
    grads: list[Tensor | None] = [None] * len(needs)
    grad_input = None
    if needs_input:
        grad_input = ops.matmul(flat, weight_ih[0] if directions == 1 else torch.cat(weight_ih)).view(input.shape)
    rows = None
    if any(needs[IH : IH + 2]):
        rows = input if lengths is None else reference.zero_beyond(input, lengths, ctx.batch_first)
        rows = rows.contiguous().flatten(0, -2)
    sums = None
    if any(needs[BIAS_IH : BIAS_IH + 2]) or any(needs[BIAS_HH : BIAS_HH + 2]):
        sums = flat.sum(0)
    for d in range(directions):
        if needs[IH + d]:
            assert rows is not None
            grads[IH + d] = ops.matmul(_columns(flat, d, directions).t(), rows)
        if sums is not None:
            own = _columns(sums, d, directions)
            if needs[BIAS_IH + d]:
                grads[BIAS_IH + d] = own if directions == 1 else own.clone()
            if needs[BIAS_HH + d]:
                grads[BIAS_HH + d] = own.clone() if ctx.mode != "GRU" else _columns(flat_hh, d, directions).sum(0)
        if needs[HH + d]:
            grads[HH + d] = _grad_weight_hh(
                _columns(flat_hh, d, directions), None if output is None else _columns(output, d, directions), hx, d,
                batch_sizes, lengths, resets, ctx.batch_first, places[HH + d],
            )  # fmt: skip
        if needs[HR + d]:
            projected, unprojected = _columns(grad_projected, d, directions), _columns(hidden, d, directions)
            grads[HR + d] = ops.matmul(_matrix(projected).t(), _matrix(unprojected))
    return grad_input, grad_hx if needs_hx else None, grad_cx if needs_cx else None, grads


def _matrix(rows: Tensor) -> Tensor:
    """(rows, K) whatever the leading dimensions. (Not by flatten: autograd's own batched gradients do not know it.)"""
    return rows.reshape(-1, rows.size(-1))


def _columns(rows: Tensor, direction: int, directions: int) -> Tensor:
    """A direction's part of (..., D*K): (..., K), a view."""
    return rows if directions == 1 else rows.chunk(directions, -1)[direction]


def _grad_weight_hh(
    grad: Tensor,
    output: Tensor | None,
    hx: Tensor | None,
    direction: int,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    weight: Tensor,
) -> Tensor:
    """Gradient of one direction's weight_hh (G*H, P or H): over all rows, grad times the state that entered the step.

    Args:
        grad: (T*B, G*H), or packed (rows, G*H): the gradient of `W_hh h`, as a matrix.
        output: (rows, P or H), this direction's; None for one step that did not keep it.
        hx: (D, B, P or H), all directions', of one step (B, P or H), or None.
        weight: the parameter itself, for its shape.
    """
    if output is None or rows_of_one_step(output, batch_sizes):
        return torch.zeros_like(weight) if hx is None else ops.matmul(grad.t(), hx)
    state = None if hx is None else hx[direction]
    reverse = direction == 1
    if batch_sizes is not None:
        entered = _previous_packed_views if _on_device(output, batch_sizes) else _previous_packed
        return ops.matmul(grad.t(), entered(output, state, batch_sizes, reverse))
    if lengths is None and resets is None and (not batch_first or output.size(1) == 1):
        # Time-major: the state that entered is the output, shifted by one step. Two views and two products, no copy.
        batch, rows = output.size(0 if batch_first else 1), grad.size(0)
        if output.size(1 if batch_first else 0) == 1:
            # One step: the state alone. (Empty products would be made, and added, for nothing.)
            return torch.zeros_like(weight) if state is None else ops.matmul(grad.t(), state)
        output = output.flatten(0, 1)
        if reverse:
            inner, entry, shifted = grad[: rows - batch], grad[rows - batch :], output[batch:]
        else:
            inner, entry, shifted = grad[batch:], grad[:batch], output[: rows - batch]
        product = ops.matmul(inner.t(), shifted)
        return product if state is None else product + ops.matmul(entry.t(), state)
    previous = _previous_dense(output, state, lengths, resets, reverse, 1 if batch_first else 0)
    if lengths is not None:
        # A row without a step has a state all the same, which may hold anything.
        previous = reference.zero_beyond(previous, lengths, batch_first)
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


def _hidden(cell_states: Tensor, reserve: Tensor, directions: int, lengths: Tensor | None, batch_first: bool) -> Tensor:
    """What a projection multiplies, `o * tanh(c)`: (rows, D*H) in the type of cell_states, zero beyond a row's length."""
    # 16-bit types: round once, as forward does.
    kind = torch.float32 if cell_states.dtype in (torch.float16, torch.bfloat16) else cell_states.dtype
    out_gate = reserve.unflatten(-1, (directions, 4, -1)).select(-2, 3).flatten(-2)
    hidden = (out_gate.to(kind) * cell_states.to(kind).tanh()).to(cell_states.dtype)
    return hidden if lengths is None else reference.zero_beyond(hidden, lengths, batch_first)


class RecurrenceBackward(torch.autograd.Function):
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected, hidden).

    Takes everything that determines these, so that its own backward can recompute them differentiably: the gradients of
    the results, the layer's input and parameters. output, cell_states and reserve are shortcuts to what these determine, and
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
        grad_cell_states: Tensor | None,
        output: Tensor | None,
        cell_states: Tensor,
        reserve: Tensor,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        weight_ih: Tensor,
        weight_ih_reverse: Tensor | None,
        weight_hh: Tensor,
        weight_hh_reverse: Tensor | None,
        bias_ih: Tensor | None,
        bias_ih_reverse: Tensor | None,
        bias_hh: Tensor | None,
        bias_hh_reverse: Tensor | None,
        weight_hr: Tensor | None,
        weight_hr_reverse: Tensor | None,
    ) -> tuple[Tensor, ...]:
        places = (
            weight_ih, weight_ih_reverse, weight_hh, weight_hh_reverse, bias_ih, bias_ih_reverse, bias_hh,
            bias_hh_reverse, weight_hr, weight_hr_reverse,
        )  # fmt: skip
        results = ops.kernels[backend].recurrence_backward(
            mode, batch_first, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states, reserve, hx, cx, batch_sizes,
            lengths, resets, *places,
        )  # fmt: skip
        if weight_hr is None:
            return (*results, weight_hh.new_empty(0))
        return (*results, _hidden(cell_states, reserve, len(of_kind(places, HH)), lengths, batch_first))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.mode, ctx.batch_first = inputs[1:3]
        # output, cell_states and reserve (7, 8, 9) are recomputed.
        _keep(ctx, [*inputs[3:7], *inputs[10:]])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        mode, batch_first = ctx.mode, ctx.batch_first
        saved = _kept(ctx, 10 + len(PLACES))
        needs = ctx.needs_input_grad[3:7] + ctx.needs_input_grad[10:]
        wanted = [i for i, need in enumerate(needs) if need and saved[i] is not None]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        grads: list[Tensor | None] = [None] * len(saved)
        if wanted and given:

            def recompute(*variables: Tensor) -> tuple[Tensor, ...]:
                values = list(saved)
                for i, variable in zip(wanted, variables, strict=True):
                    values[i] = variable
                grad_output, grad_h_n, grad_c_n, grad_cell_states, *layer = values
                _, hx, cx, batch_sizes, lengths, resets, *places = layer
                output, _, _, cell_states, reserve = reference.layer_forward(mode, batch_first, *layer)
                results = reference.recurrence_backward(
                    mode, batch_first, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states, reserve, hx, cx,
                    batch_sizes, lengths, resets, *places,
                )  # fmt: skip
                hidden = output.new_empty(0)
                if places[HR] is not None:
                    hidden = _hidden(cell_states, reserve, len(of_kind(places, HH)), lengths, batch_first)
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
        return batched_call(
            lambda *folded: RecurrenceBackward.apply(*flags, *folded),
            info.batch_size, in_dims[3:], tensors, _BACKWARD_ROLES, _BACKWARD_RESULTS, flags[2],
        )  # fmt: skip

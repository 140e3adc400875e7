"""The derivative of a layer: what is saved, which products give which gradient, and how vmap folds it.

`Layer` is one layer (all its directions, all its steps). Its backward is one op on the CPU; elsewhere, and where it is
to be differentiated in turn, it asks `RecurrenceBackward` for the gradients of the gates and of the states, and turns
them into the gradients of the weights and of the input with matrix products.
`RecurrenceBackward` is differentiable through `reference.py`, so a backward pass with create_graph=True can itself be
differentiated, any number of times. There is no `jvp` rule (Dynamo refuses a Function that has one): forward-mode
differentiation runs `reference.layer_forward`, ordinary differentiable PyTorch.

The Functions take the ops' arguments flat, in the order of the schema, and name every one: Dynamo does not understand a
Function with setup_context that takes *arguments. Everything else goes by name, or by the records of signatures.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops, reference
from .backends import BACKENDS
from .cell_types import CELLS
from .sequences import Role, are_one_step, entered, zero_beyond
from .signatures import (
    OPS,
    PLACES,
    BackwardArguments,
    LayerArguments,
    compute_dtype,
    is_one_step,
    nested,
    role_of,
)
from .vmap import batched_call, is_any_batched

# Bound once: on the path of every call.
_is_compiling = torch.compiler.is_compiling
_functorch_active = torch._C._are_functorch_transforms_active

# The arguments of the Functions, by name, and where each stands: looked up once, because all of this is on the path of
# every training call.
LAYER = ("backend", *OPS["layer_forward"].names)
_BACKWARD = ("backend", "input", *OPS["recurrence_backward"].names)
_INPUT, _HX, _CX, _BATCH_SIZES = (LAYER.index(name) for name in ("input", "hx", "cx", "batch_sizes"))
_WEIGHT_IH, _WEIGHT_HH, _BIAS_IH, _BIAS_HH, _WEIGHT_HR = (
    LAYER.index(kind) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
)
# Of these the op `layer_backward` returns the gradients.
DIFFERENTIABLE = [LAYER.index(name) for name in ("input", "hx", "cx", *PLACES)]
# What forward returned and backward looks at stands behind Layer's arguments where they are kept.
_SAVED = ("output", "cell_states", "reserve")


def _tensors_of(names: Sequence[str]) -> tuple[int, ...]:
    return tuple(i for i, name in enumerate(names) if role_of(name) is not Role.OTHER)


_LAYER_TENSORS, _BACKWARD_TENSORS = _tensors_of((*LAYER, *_SAVED)), _tensors_of(_BACKWARD)

# The places that a first derivative leaves alone, where the input wants a gradient and where it does not.
_NOT_NEEDED = [i for i, name in enumerate(LAYER) if name.startswith("bias")]
_NOT_NEEDED_OF_DATA = [i for i, name in enumerate(LAYER) if name.startswith(("bias", "weight_ih"))]


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The types were chosen in forward: an autocast region around backward() must not change them."""
    if torch._C._is_any_autocast_enabled() and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _keep(ctx: Any, values: list[Any], tensors: Sequence[int]) -> None:
    """Keeps the values, of which the numbered ones are tensors or None. (A None among saved tensors breaks tools that
    look at them.)"""
    ctx.kept = kept = [i for i in tensors if values[i] is not None]
    ctx.save_for_backward(*[values[i] for i in kept])
    for i in kept:
        values[i] = None
    ctx.others = values


def _kept(ctx: Any) -> list[Any]:
    """What `_keep` was given."""
    values = list(ctx.others)
    for i, tensor in zip(ctx.kept, ctx.saved_tensors, strict=True):
        values[i] = tensor
    return values


class Layer(torch.autograd.Function):
    """One layer: (output, h_n, c_n, cell_states, reserve); reserve has no gradient."""

    @staticmethod
    def forward(
        backend: str,
        mode: str,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        batch_first: bool,
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
        results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = BACKENDS[backend].kernels.layer_forward(
            mode, input, hx, cx, batch_sizes, lengths, resets, batch_first, weight_ih, weight_ih_reverse, weight_hh,
            weight_hh_reverse, bias_ih, bias_ih_reverse, bias_hh, bias_hh_reverse, weight_hr, weight_hr_reverse,
        )  # fmt: skip
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        out: Tensor | None
        out, _, _, cell_states, reserve = output
        mode, input = inputs[1:3]
        if are_one_step(input, inputs[_BATCH_SIZES]) and CELLS[mode].reserve:
            # Of one step backward needs the state that entered, unless the cell saves nothing else: so whoever called
            # may write into the new one.
            out = None
        values = [*inputs, out, cell_states, reserve]
        ctx.unsaved = None
        if not _is_compiling() and not _functorch_active():
            # What the first derivative does not need may change in the meantime; the second looks whether it did.
            unsaved = ctx.unsaved = []
            for i in _NOT_NEEDED if input.requires_grad else _NOT_NEEDED_OF_DATA:
                tensor = values[i]
                if tensor is not None:
                    unsaved.append((i, tensor, tensor._version))
                    values[i] = None
        _keep(ctx, values, _LAYER_TENSORS)
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
        if grad_output is None and grad_h_n is None and grad_c_n is None and grad_cell_states is None:
            return (None,) * len(LAYER)
        values = _kept(ctx)
        for i, tensor, version in ctx.unsaved or ():
            if torch.is_grad_enabled() and tensor._version != version:
                raise RuntimeError(
                    f"rnnfast: {LAYER[i]} has been modified by an inplace operation since the forward pass, and the "
                    f"second derivative needs it as it was: expected version {version}, got {tensor._version}"
                )
            values[i] = tensor
        if are_one_step(values[_INPUT], values[_BATCH_SIZES]):
            # h_n is empty: the output stands for it.
            grad_h_n = None
        # The two ops' arguments are the same from hx on.
        backend, mode, input, *others = values[: len(LAYER)]
        saved = values[len(LAYER) :]
        arguments = (backend, input, mode, grad_output, grad_h_n, grad_c_n, grad_cell_states, *saved, *others)
        with without_autocast(input.device.type):
            return tuple(layer_backward(arguments, ctx.needs_input_grad))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return batched_call(Layer.apply, info.batch_size, in_dims, args, LAYER, OPS["layer_forward"].results)


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


def layer_backward(arguments: tuple[Any, ...], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients of `Layer`'s arguments.

    Args:
        arguments: `RecurrenceBackward`'s.
        needs: of which of `Layer`'s arguments anybody wants the gradient.
    """
    backend, input, _, *grads = arguments[:7]
    if (
        backend == "cpu"
        and type(input) in _PLAIN
        and not (torch.is_grad_enabled() or _functorch_active() or _is_compiling() or is_any_batched(*grads))
    ):
        return _at_once(arguments, needs, ops.whole_backward_by_aten(input.dtype))
    return layer_backward_in_parts(arguments, needs)


# Not what tracers have in place of tensors.
_PLAIN = (Tensor, torch.nn.Parameter)


def _at_once(arguments: tuple[Any, ...], needs: Sequence[bool], by_aten: bool) -> list[Tensor | None]:
    """`layer_backward` by the op of that name, which never has the gradients of gates of all steps."""
    _, input, mode, *others = arguments
    wanted = sum(1 << i for i, place in enumerate(DIFFERENTIABLE) if needs[place])
    results = ops.layer_backward(mode, by_aten, wanted, input, *others)
    grads: list[Tensor | None] = [None] * len(LAYER)
    for place, result in zip(DIFFERENTIABLE, results, strict=True):
        grads[place] = result
    return grads


def layer_backward_in_parts(arguments: tuple[Any, ...], needs: Sequence[bool]) -> list[Tensor | None]:
    """`layer_backward` by the backend's `recurrence_backward` and products; differentiable where anybody asks."""
    backend, input, *others = arguments
    step = nested(BackwardArguments, others)
    # The Function is only worth its overhead where somebody may differentiate this backward pass.
    if torch.is_grad_enabled() or _functorch_active():
        *results, hidden = RecurrenceBackward.apply(*arguments)
    else:
        results = BACKENDS[backend].kernels.recurrence_backward(*others)
        hidden = _hidden(step) if step.parameters.is_projected else None
    grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected = results

    parameters, sequences = step.parameters, step.sequences
    split = CELLS[step.mode].split_gate is not None
    weight_ih = parameters.each("weight_ih")
    directions = len(weight_ih)
    # (rows, D*G*H) as a matrix, whatever the leading dimensions; a view, because results are contiguous.
    of_gates = as_matrix(grad_gates)
    of_recurrent = as_matrix(grad_gates_hh) if split else of_gates
    # Nothing that is handed out shares memory: callers write into gradients.
    grads: list[Tensor | None] = [None] * len(LAYER)
    if needs[_INPUT]:
        weight = weight_ih[0] if directions == 1 else torch.cat(weight_ih)
        grads[_INPUT] = ops.matmul(of_gates, weight).view(input.shape)
    if needs[_HX]:
        grads[_HX] = grad_hx
    if needs[_CX]:
        grads[_CX] = grad_cx
    rows = None
    sums = None
    for d in range(directions):
        if needs[_WEIGHT_IH + d]:
            if rows is None:
                rows = zero_beyond(input, sequences).contiguous().flatten(0, -2)
            grads[_WEIGHT_IH + d] = ops.matmul(_columns(of_gates, d, directions).t(), rows)
        if needs[_BIAS_IH + d] or needs[_BIAS_HH + d]:
            if sums is None:
                sums = of_gates.sum(0)
            own = _columns(sums, d, directions)
            if needs[_BIAS_IH + d]:
                grads[_BIAS_IH + d] = own if directions == 1 else own.clone()
            if needs[_BIAS_HH + d]:
                grads[_BIAS_HH + d] = _columns(of_recurrent, d, directions).sum(0) if split else own.clone()
        if needs[_WEIGHT_HH + d]:
            grads[_WEIGHT_HH + d] = _grad_weight_hh(_columns(of_recurrent, d, directions), d, directions, step)
        if needs[_WEIGHT_HR + d]:
            projected, unprojected = _columns(grad_projected, d, directions), _columns(hidden, d, directions)
            grads[_WEIGHT_HR + d] = ops.matmul(as_matrix(projected).t(), as_matrix(unprojected))
    return grads


def as_matrix(rows: Tensor) -> Tensor:
    """(rows, K) whatever the leading dimensions. (Not by flatten: autograd's own batched gradients do not know it.)"""
    return rows.reshape(-1, rows.size(-1))


def _columns(rows: Tensor, direction: int, directions: int) -> Tensor:
    """A direction's part of (..., D*K): (..., K), a view."""
    return rows if directions == 1 else rows.chunk(directions, -1)[direction]


def _grad_weight_hh(grad: Tensor, direction: int, directions: int, step: BackwardArguments) -> Tensor:
    """Gradient of one direction's weight_hh (G*H, P or H): over all rows, grad times the state that entered the step.

    Args:
        grad: (T*B, G*H), or packed (rows, G*H): the gradient of `W_hh h`, as a matrix.
        direction: which.
        directions: D.
        step: its output is None for one step that did not keep it.
    """
    hx, sequences, weight = step.hx, step.sequences, step.parameters.each("weight_hh")[direction]
    if is_one_step(step):
        return torch.zeros_like(weight) if hx is None else ops.matmul(grad.t(), hx)
    assert step.output is not None
    output = _columns(step.output, direction, directions)
    state = None if hx is None else hx[direction]
    reverse, batch_first = direction == 1, sequences.batch_first
    if sequences.every_row_counts and (not batch_first or output.size(1) == 1):
        # Time-major: the state that entered is the output, shifted by one step. Two views and two products, no copy.
        batch, rows = output.size(0 if batch_first else 1), grad.size(0)
        if output.size(1 if batch_first else 0) == 1:
            # One step: the state alone. (Empty products would be made, and added, for nothing.)
            return torch.zeros_like(weight) if state is None else ops.matmul(grad.t(), state)
        output = output.flatten(0, 1)
        if reverse:
            later, first, shifted = grad[: rows - batch], grad[rows - batch :], output[batch:]
        else:
            later, first, shifted = grad[batch:], grad[:batch], output[: rows - batch]
        product = ops.matmul(later.t(), shifted)
        return product if state is None else product + ops.matmul(first.t(), state)
    return ops.matmul(grad.t(), as_matrix(entered(output, state, reverse, sequences)))


def _hidden(step: BackwardArguments) -> Tensor:
    """What a projection multiplies, `o * tanh(c)`: (rows, D*H) as cell_states, zero beyond a row's length."""
    cell_states, parameters = step.cell_states, step.parameters
    # 16-bit types: round once, as forward does.
    kind = compute_dtype(cell_states.dtype)
    cell, directions = CELLS[step.mode], parameters.directions
    assert cell.hidden is not None
    saved = step.reserve.unflatten(-1, (directions, cell.reserve, -1)).unbind(-2)
    hidden = cell.hidden(saved, cell_states.to(kind).unflatten(-1, (directions, -1)))
    return zero_beyond(hidden.flatten(-2).to(cell_states.dtype), step.sequences)


class RecurrenceBackward(torch.autograd.Function):
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected, hidden).

    Takes everything that determines these, so that its own backward can recompute them differentiably: the gradients of
    the results, the layer's input and parameters. output, cell_states and reserve are shortcuts to what these
    determine, and get no gradient here.
    """

    @staticmethod
    def forward(
        backend: str,
        input: Tensor,
        mode: str,
        grad_output: Tensor | None,
        grad_h_n: Tensor | None,
        grad_c_n: Tensor | None,
        grad_cell_states: Tensor | None,
        output: Tensor | None,
        cell_states: Tensor,
        reserve: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        batch_sizes: Tensor | None,
        lengths: Tensor | None,
        resets: Tensor | None,
        batch_first: bool,
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
        arguments = (
            mode, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states, reserve, hx, cx, batch_sizes,
            lengths, resets, batch_first, weight_ih, weight_ih_reverse, weight_hh, weight_hh_reverse, bias_ih,
            bias_ih_reverse, bias_hh, bias_hh_reverse, weight_hr, weight_hr_reverse,
        )  # fmt: skip
        results = BACKENDS[backend].kernels.recurrence_backward(*arguments)
        hidden = weight_hh.new_empty(0) if weight_hr is None else _hidden(nested(BackwardArguments, arguments))
        return (*results, hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        # The results of forward are recomputed.
        values = [None if name in _SAVED else value for name, value in zip(_BACKWARD, inputs, strict=True)]
        _keep(ctx, values, _BACKWARD_TENSORS)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        values = dict(zip(_BACKWARD, _kept(ctx), strict=True))
        needs = dict(zip(_BACKWARD, ctx.needs_input_grad, strict=True))
        wanted = [name for name in values if needs[name] and values[name] is not None]
        given = [i for i, cotangent in enumerate(cotangents) if cotangent is not None]
        grads: dict[str, Tensor | None] = {}
        if wanted and given:

            def recompute(*variables: Tensor) -> tuple[Tensor, ...]:
                now = values | dict(zip(wanted, variables, strict=True))
                layer = nested(LayerArguments, [now[name] for name in LAYER[1:]])
                now["output"], _, _, now["cell_states"], now["reserve"] = reference.layer_forward(layer)
                step = nested(BackwardArguments, [now[name] for name in _BACKWARD[2:]])
                hidden = _hidden(step) if step.parameters.is_projected else step.cell_states.new_empty(0)
                every = (*reference.recurrence_backward(step), hidden)
                return tuple(every[i] for i in given)

            with without_autocast(values["input"].device.type):
                pull_back = torch.func.vjp(recompute, *[values[name] for name in wanted])[1]
                pulled = pull_back(tuple(cotangents[i] for i in given))
                grads.update(zip(wanted, pulled, strict=True))
        return tuple([grads.get(name) for name in _BACKWARD])

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        results = OPS["recurrence_backward"].results
        return batched_call(
            RecurrenceBackward.apply, info.batch_size, in_dims, args, _BACKWARD, (*results, results[-1])
        )

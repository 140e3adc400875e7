"""One direction of one layer with options, by a backend's kernels, and what torch is told of their ops.

The backward pass is an op too. Where it is to be differentiated in turn, and where torch.func's transforms or
forward-mode derivatives look on, everything goes through reference.py.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import libraries, ops
from ..autograd import as_matrix, without_autocast
from ..backends import asked_for, kernels_for_options, select, select_with_options
from ..sequences import Sequences, entered, zero_beyond
from ..signatures import compute_dtype
from . import reference
from .reference import Arguments, Masks, Weights

# How many arguments each group has.
_WEIGHTS, _MASKS, _SEQUENCES = len(Weights._fields), len(Masks._fields), len(Sequences._fields)
_OWN = len(Arguments._fields) - 3
# Where each group of arguments begins in the op, and which of them have gradients.
_AT_WEIGHTS = _OWN + _SEQUENCES
_AT_MASKS = _AT_WEIGHTS + _WEIGHTS
_GATES, _HX, _CX, _LX = (Arguments._fields.index(name) for name in ("gates", "hx", "cx", "lx"))
DIFFERENTIABLE = (_GATES, _HX, _CX, _LX, *range(_AT_WEIGHTS, _AT_MASKS))


# Of forward's results the first are those that a gradient may come to.
_DIFFERENTIABLE_RESULTS = 5
# What backward is given of them.
_SAVED = ("output", "cell_states", "reserve", "normed", "scale")


def flat(arguments: Arguments) -> tuple[Any, ...]:
    return (*arguments[:-3], *arguments.sequences, *arguments.weights, *arguments.masks)


def nested(values: Sequence[Any]) -> Arguments:
    """Of flat ones. The dispatcher leaves out those at the end that are None."""
    values = [*values, *[None] * (_AT_MASKS + _MASKS - len(values))]
    arguments: Any = Arguments
    made: Arguments = arguments(
        *values[:_OWN],
        Sequences(*values[_OWN:_AT_WEIGHTS]),
        Weights(*values[_AT_WEIGHTS:_AT_MASKS]),
        Masks(*values[_AT_MASKS : _AT_MASKS + _MASKS]),
    )
    return made


def warn_of_reference(tensor: Tensor, why: str | None) -> None:
    """Says once that the reference runs, and why, unless it was asked for."""
    if why is not None and asked_for() != "reference" and not torch.compiler.is_compiling():
        _warn_once(select(tensor), why)


@functools.cache
def _warn_once(backend: str, why: str) -> None:
    warnings.warn(
        f"rnnfast: layers with options beyond torch.nn's run through the slow reference implementation: {why}",
        UserWarning,
        stacklevel=6,
    )


def recurrence(arguments: Arguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer: what `reference.forward` returns, by the fastest that there is."""
    gates = arguments.gates
    if forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active() or gates.dtype.is_complex:
        return reference.forward(arguments)
    backend, why_not = select_with_options(gates)
    if why_not is not None:
        warn_of_reference(gates, why_not)
        return reference.forward(arguments)
    # A trace is the same with and without gradients.
    saves = torch._C._get_tracing_state() is not None or (
        torch.is_grad_enabled()
        and any(
            tensor is not None and tensor.requires_grad
            for tensor in (gates, arguments.hx, arguments.cx, arguments.lx, *arguments.weights)
        )
    )
    results: tuple[Tensor, ...] = kernels_for_options(backend).forward(saves, *flat(arguments))
    output, h_n, c_n, cell_states, l_n = results[:_DIFFERENTIABLE_RESULTS]
    return output, h_n, c_n, cell_states, l_n


# --- the derivative -----------------------------------------------------------------------------------------------


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values = list(inputs[1:])
    saved, places = [], []
    for i, value in enumerate(values):
        if isinstance(value, Tensor):
            saved.append(value)
            values[i] = None
            places.append(i)
    ctx.places, ctx.others = places, values
    out, _, _, cell_states, _, reserve, normed, scale = output
    ctx.save_for_backward(*saved, out, cell_states, reserve, normed, scale)
    ctx.mark_non_differentiable(reserve, normed, scale)
    ctx.set_materialize_grads(False)


def _backward(op: Callable[..., Any], ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    """op: `variant_backward` of the namespace whose forward it was."""
    of_results = grads[:_DIFFERENTIABLE_RESULTS]
    values = list(ctx.others)
    every = ctx.saved_tensors
    for i, tensor in zip(ctx.places, every, strict=False):
        values[i] = tensor
    results = every[len(ctx.places) :]
    wanted = [i for i in DIFFERENTIABLE if ctx.needs_input_grad[i + 1]]
    found: list[Tensor | None] = [None] * (1 + len(values))
    if all(grad is None for grad in of_results):
        return tuple(found)
    with without_autocast(values[_GATES].device.type):
        if torch.is_grad_enabled():
            found_now = _differentiable_gradients(values, wanted, of_results)
        else:
            found_now = gradients(op, nested(values), wanted, of_results, results)
    for i, grad in zip(wanted, found_now, strict=True):
        found[i + 1] = grad
    return tuple(found)


def _differentiable_gradients(
    values: list[Any], wanted: Sequence[int], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients of the wanted arguments through the reference, with a graph of their own."""
    # Tensors of their own, through which no path leads from one argument to another.
    inner = list(values)
    for i in wanted:
        inner[i] = values[i].view_as(values[i])
    results = reference.forward(nested(inner))
    pairs = [(result, grad) for result, grad in zip(results, grads, strict=True) if grad is not None]
    return list(
        torch.autograd.grad(
            [result for result, _ in pairs],
            [inner[i] for i in wanted],
            [grad for _, grad in pairs],
            create_graph=True,
            allow_unused=True,
        )
    )


def gradients(
    op: Callable[..., Any],
    arguments: Arguments,
    wanted: Sequence[int],
    grads: Sequence[Tensor | None],
    results: Sequence[Tensor],
) -> list[Tensor | None]:
    """The gradients of the wanted arguments by the kernels.

    Args:
        op: `variant_backward` of a namespace.
        arguments: what forward was given.
        wanted: the places among `DIFFERENTIABLE`.
        grads: of forward's results, those that a gradient may come to.
        results: what forward saved: output, cell_states, reserve, normed, scale.
    """
    output, cell_states, reserve, normed, scale = results
    if arguments.gates.is_cuda:
        op = ops.with_torchs_memory_error(op)
    grad_gates, grad_sums, grad_hx, grad_cx, grad_lx, *of_vectors = op(
        *grads, output, cell_states, reserve, normed, scale, *flat(arguments)
    )
    by_place: dict[int, Tensor | None] = {_GATES: grad_gates, _HX: grad_hx, _CX: grad_cx, _LX: grad_lx}
    if _AT_WEIGHTS in wanted:
        of_sums = grad_sums if grad_sums.numel() else grad_gates
        by_place[_AT_WEIGHTS] = _grad_weight_hh(arguments, output, reserve, of_sums)
    by_place |= dict(enumerate(of_vectors, _AT_WEIGHTS + 1))
    return [by_place[i] for i in wanted]


def _grad_weight_hh(arguments: Arguments, output: Tensor, reserve: Tensor, grad_sums: Tensor) -> Tensor:
    """Of W_hh (G*H, H): over all rows, the gradient of W_hh h times the h that entered the step."""
    sequences, mask = arguments.sequences, arguments.masks.recurrent
    if not output.numel():
        assert arguments.weights.weight_hh is not None
        return torch.zeros_like(arguments.weights.weight_hh)
    state = entered(output, arguments.hx, arguments.reverse, sequences)
    if mask is not None:
        state = state * of_rows(mask, sequences, state)
    # Reshaped, because autograd's own batched gradients do not know flatten and unflatten.
    grad, state = as_matrix(grad_sums), as_matrix(state)
    if "reset_first" not in arguments.words.split():
        return _outer(grad, state, arguments.num_heads)
    # Of n it met r h. What stands beyond a row's length in the reserve nobody wrote.
    hidden_size = state.size(-1)
    reset = as_matrix(zero_beyond(reserve[..., :hidden_size], sequences)) * state
    of_gates, of_n = grad.split([2 * hidden_size, hidden_size], dim=-1)
    return torch.cat([_outer(of_gates, state, arguments.num_heads), _outer(of_n, reset, arguments.num_heads)])


def _outer(grad: Tensor, state: Tensor, num_heads: int) -> Tensor:
    """The gradient (N, H / num_heads) of what multiplied state (rows, H) and gave what has the gradient (rows, N)."""
    if num_heads == 1:
        return ops.matmul(grad.t(), state)
    rows, size = state.size(0), state.size(-1) // num_heads
    of_heads = grad.reshape(rows, -1, num_heads, size).permute(2, 1, 3, 0).reshape(num_heads, -1, rows)
    product = of_heads @ state.reshape(rows, num_heads, size).transpose(0, 1)
    return product.reshape(num_heads, -1, size, size).transpose(0, 1).reshape(-1, size)


def of_rows(values: Tensor, sequences: Sequences, rows: Tensor) -> Tensor:
    """(B, F), one for each sequence, to what can be multiplied with (rows, F)."""
    if sequences.batch_sizes is None:
        return values.unsqueeze(1 if sequences.batch_first else 0)
    sizes = sequences.batch_sizes
    starts = torch.repeat_interleave(sizes.cumsum(0) - sizes, sizes, output_size=rows.size(0))
    return values.index_select(0, (torch.arange(rows.size(0), device=sizes.device) - starts).to(values.device))


# --- shapes, for tracing ------------------------------------------------------------------------------------------


def reserve_width(mode: str, width: Any, hidden_size: Any) -> Any:
    """How many values a step saves: every gate, where there is r also the recurrent part of n, of the RNN its h."""
    return width + hidden_size if mode == "GRU" and width == 3 * hidden_size else width


def _check_devices(op: str, gates: Tensor, values: Sequence[Any]) -> None:
    """Raises RuntimeError where a tensor is elsewhere.

    torch takes what stands here for real tensors too, if a single one is on the meta device, and what is made of those
    would pass for results.
    """
    for value in (*values[:_OWN], *values[_OWN + 1 :]):
        if isinstance(value, Tensor) and value.device != gates.device:
            raise RuntimeError(f"rnnfast::{op}: expected all tensors on {gates.device}, got one on {value.device}")
    batch_sizes = values[_OWN] if len(values) > _OWN else None
    if batch_sizes is not None and batch_sizes.device.type != "cpu":
        raise RuntimeError(f"rnnfast::{op}: batch_sizes: expected a tensor on the CPU, got one on {batch_sizes.device}")


def _fake_forward(saves: bool, *values: Any) -> tuple[Tensor, ...]:
    arguments = nested(values)
    gates, weights = arguments.gates, arguments.weights
    _check_devices("variant_forward", gates, values)
    rows, width = gates.shape[:-1], weights.weight_hh.size(0)
    hidden_size = weights.weight_hh.size(1) * arguments.num_heads
    sequences, has_cell = arguments.sequences, arguments.mode == "LSTM"
    batch: Any
    if arguments.hx is not None:
        batch = arguments.hx.size(0)
    elif arguments.cx is not None:
        batch = arguments.cx.size(0)
    elif sequences.batch_sizes is not None:
        # The first batch size is a number in a tensor: a size that only the run knows.
        batch = torch.library.get_ctx().new_dynamic_size()
    else:
        batch = gates.size(0 if sequences.batch_first else 1)
    normalises = weights.weight_norm_hh is not None or weights.weight_norm is not None
    nothing = gates.new_empty
    return (
        nothing(*rows, hidden_size),
        nothing(batch, hidden_size),
        nothing(batch, hidden_size) if has_cell else nothing(0),
        nothing(*rows, hidden_size) if has_cell else nothing(0),
        nothing(batch, hidden_size) if "exponential" in arguments.words.split() else nothing(0),
        nothing(*rows, reserve_width(arguments.mode, width, hidden_size)) if saves else nothing(0),
        nothing(*rows, width) if saves and normalises else nothing(0),
        nothing(*rows, 1, dtype=compute_dtype(gates.dtype)) if saves and normalises else nothing(0),
    )


def _fake_backward(*values: Any) -> tuple[Tensor, ...]:
    _, _, arguments = of_backward(values)
    _check_devices("variant_backward", arguments.gates, flat(arguments))
    gates, hx, cx, weights = arguments.gates, arguments.hx, arguments.cx, arguments.weights
    width, head_size = weights.weight_hh.shape
    has_reset = arguments.mode == "GRU" and width == 3 * head_size * arguments.num_heads
    after = has_reset and "reset_first" not in arguments.words.split()
    differs = weights.weight_norm_hh is not None or (after and weights.weight_norm is None)
    vectors = [None if vector is None else torch.empty_like(vector) for vector in weights[1:]]
    return (
        torch.empty_like(gates, memory_format=torch.contiguous_format),
        torch.empty_like(gates, memory_format=torch.contiguous_format) if differs else gates.new_empty(0),
        gates.new_empty(0 if hx is None else hx.shape),
        gates.new_empty(0 if cx is None else cx.shape),
        gates.new_empty(0 if arguments.lx is None else arguments.lx.shape),
        *[gates.new_empty(0) if vector is None else vector for vector in vectors],
    )


# --- numbers of operations, for torch.utils.flop_counter, as registration.py counts them --------------------------


def _count(arguments: Arguments) -> int:
    """Of W_hh with every row. Shapes come in the tensors' stead."""
    gates: Any = arguments.gates
    weight_hh: Any = arguments.weights.weight_hh
    return 2 * math.prod(gates[:-1]) * math.prod(weight_hh)


def count_forward(saves: bool, *values: Any, **_: Any) -> int:
    return _count(nested(values))


def count_backward(*values: Any, **_: Any) -> int:
    return _count(of_backward(values)[2])


# --- telling torch ------------------------------------------------------------------------------------------------


def schemas() -> dict[str, str]:
    """By op: its schema, as csrc/variants/arguments.h has it, for namespaces without C++."""
    named_types = {str: "str", float: "float", bool: "bool", int: "int", Tensor: "Tensor"}
    types = {name: named_types.get(hint, "Tensor?") for name, hint in get_type_hints(Arguments).items()}
    named = [(types[name], name) for name in Arguments._fields[:_OWN]]
    named += [("bool" if name == "batch_first" else "Tensor?", name) for name in Sequences._fields]
    named += [("Tensor?", name) for name in (*Weights._fields, *(f"{name}_mask" for name in Masks._fields))]
    call = ", ".join(f"{kind} {name}" for kind, name in named)
    grads = ", ".join(f"Tensor? grad_{name}" for name in ("output", "h_n", "c_n", "cell_states", "l_n"))
    saved = ", ".join(f"Tensor? {name}" for name in _SAVED)

    def results(count: int) -> str:
        return f"({', '.join(['Tensor'] * count)})"

    return {
        "variant_forward": f"variant_forward(bool saves, {call}) -> {results(_DIFFERENTIABLE_RESULTS + 3)}",
        # Of gates, of W_hh h, of hx, cx, lx, of the weights but W_hh.
        "variant_backward": f"variant_backward({grads}, {saved}, {call}) -> {results(5 + _WEIGHTS - 1)}",
    }


def of_backward(values: Sequence[Any]) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None], Arguments]:
    """The arguments of `variant_backward`: the gradients of the results, what forward saved, what it was given."""
    begin = _DIFFERENTIABLE_RESULTS + len(_SAVED)
    return values[:_DIFFERENTIABLE_RESULTS], values[_DIFFERENTIABLE_RESULTS:begin], nested(values[begin:])


def register(namespace: str) -> None:
    """Tells torch of the shapes and the derivative of a namespace's ops, the first time that a process asks."""
    ops_of = getattr(torch.ops, namespace)

    def registered() -> torch.library.Library:
        library = torch.library.Library(namespace, "FRAGMENT")
        torch.library.register_fake(f"{namespace}::variant_forward", _fake_forward, lib=library)
        torch.library.register_fake(f"{namespace}::variant_backward", _fake_backward, lib=library)
        backward = functools.partial(_backward, ops_of.variant_backward)
        torch.library.register_autograd(f"{namespace}::variant_forward", backward, setup_context=_setup, lib=library)
        return library

    libraries.registered_once(f"{namespace}: what torch is told of variants", registered)

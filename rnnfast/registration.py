"""What torch is told about the ops besides their kernels: derivatives, shapes, numbers of operations.

An op's derivative is part of the op, so it is still there in a program that was exported, traced, saved and loaded:
where a derivative may be asked for, the dispatcher's Autograd key runs the op as a composition of differentiable parts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import libraries, ops, reference
from ._after_import import after_import
from .autograd import Layer
from .reference import GATES
from .signatures import HH, HR, IH, OPS, filled, of_kind, rows_of_one_step

# --- derivatives --------------------------------------------------------------------------------------------------


def _differentiable(backend_of: Callable[[Tensor], str]) -> dict[str, Callable[..., Any]]:
    """By op: what it comes to where a derivative may be asked for.

    The layer as a whole has the kernels' backward pass. Its parts are differentiated through the reference: nothing
    but a direct call has them apart.
    """

    def layer_forward(mode: str, batch_first: bool, input: Tensor, *others: Tensor | None) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = Layer.apply(backend_of(input), mode, batch_first, input, *others)
        return results

    return {
        "input_projection": reference.input_projection,
        "recurrence_forward": reference.recurrence_forward,
        "recurrence_backward": reference.recurrence_backward,
        "layer_forward": layer_forward,
        "layer": lambda *arguments: layer_forward(*arguments)[:3],
        "matmul": ops.Matmul.apply,
    }


def _all_arguments(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, given the arguments too that the dispatcher leaves out."""
    if name not in OPS:
        return function
    return lambda *arguments: function(*filled(name, arguments))


def _autograd_kernel(op: Any, differentiable: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """For the dispatcher's Autograd key."""

    def kernel(keyset: Any, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            return reference(*arguments)
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return differentiable(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return op.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    return kernel


def _functorch_kernel(differentiable: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """For the key by which torch.func's transforms take a call first.

    They know the rules of autograd Functions, vmap's too, any number of transforms deep. At the Autograd key it would
    be too late: there each transform has unpacked its own tensors, and what the outer ones want is lost.
    """

    def kernel(*arguments: Any) -> Any:
        return (reference if forward_ad._current_level >= 0 else differentiable)(*arguments)

    return kernel


# --- shapes, for tracing ------------------------------------------------------------------------------------------
# Sizes are only ever passed on, never compared: T and B stay symbols.


def _states_fake(
    mode: str, batch_first: bool, rows: Tensor, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None,
    places: Sequence[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    weight_hh = of_kind(places, HH)
    directions, (width, features) = len(weight_hh), weight_hh[0].shape
    output = rows.new_empty(*rows.shape[:-1], directions * features)
    if rows_of_one_step(rows, batch_sizes):
        leading: tuple[Any, ...] = (rows.size(0),)
        h_n = rows.new_empty(0)
    else:
        leading = (directions, _batch(batch_first, rows, hx, cx, batch_sizes))
        h_n = rows.new_empty(*leading, features)
    c_n = rows.new_empty(*leading, width // GATES[mode]) if mode == "LSTM" else rows.new_empty(0)
    return output, h_n, c_n


def _batch(batch_first: bool, rows: Tensor, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None) -> Any:
    if hx is not None:
        return hx.size(1)
    if cx is not None:
        return cx.size(1)
    if batch_sizes is not None:
        # The first batch size is a number in a tensor: a size that only the run knows.
        return torch.library.get_ctx().new_dynamic_size()
    return rows.size(0 if batch_first else 1)


def _saved_fake(mode: str, save_reserve: bool, rows: Tensor, places: Sequence[Tensor | None]) -> tuple[Tensor, Tensor]:
    weight_hh = of_kind(places, HH)
    width = len(weight_hh) * (weight_hh[0].size(0) // GATES[mode])
    cell_states = rows.new_empty(*rows.shape[:-1], width) if save_reserve and mode == "LSTM" else rows.new_empty(0)
    keeps = save_reserve and mode in ("LSTM", "GRU")
    return cell_states, rows.new_empty(*rows.shape[:-1], 4 * width) if keeps else rows.new_empty(0)


def _input_projection_fake(mode: str, input: Tensor, *places: Tensor | None) -> Tensor:
    weight_ih = of_kind(places, IH)
    return input.new_empty(*input.shape[:-1], len(weight_ih) * weight_ih[0].size(0))


def _recurrence_forward_fake(
    mode: str, batch_first: bool, save_reserve: bool, gates: Tensor, hx: Tensor | None, cx: Tensor | None,
    batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, *places: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    states = _states_fake(mode, batch_first, gates, hx, cx, batch_sizes, places)
    return (*states, *_saved_fake(mode, save_reserve, gates, places))


def _recurrence_backward_fake(
    mode: str, batch_first: bool, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None,
    grad_cell_states: Tensor | None, output: Tensor | None, cell_states: Tensor, reserve: Tensor, hx: Tensor | None,
    cx: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None,
    *places: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    model = reserve if output is None else output
    rows = model.shape[:-1]
    weight_hh, weight_hr = of_kind(places, HH), of_kind(places, HR)
    directions, (width, features) = len(weight_hh), weight_hh[0].shape
    grad_gates = model.new_empty(*rows, directions * width)
    grad_gates_hh = model.new_empty(*rows, directions * width) if mode == "GRU" else model.new_empty(0)
    grad_hx = model.new_empty(0 if hx is None else hx.shape)
    grad_cx = model.new_empty(0 if cx is None or mode != "LSTM" else cx.shape)
    grad_projected = model.new_empty(*rows, directions * features) if weight_hr else model.new_empty(0)
    return grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected


def _layer_forward_fake(
    mode: str, batch_first: bool, input: Tensor, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None,
    lengths: Tensor | None, resets: Tensor | None, *places: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    states = _states_fake(mode, batch_first, input, hx, cx, batch_sizes, places)
    return (*states, *_saved_fake(mode, True, input, places))


def _layer_fake(
    mode: str, batch_first: bool, input: Tensor, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None,
    lengths: Tensor | None, resets: Tensor | None, *places: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    return _states_fake(mode, batch_first, input, hx, cx, batch_sizes, places)


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))


_FAKES: dict[str, Callable[..., Any]] = {
    "input_projection": _input_projection_fake,
    "recurrence_forward": _recurrence_forward_fake,
    "recurrence_backward": _recurrence_backward_fake,
    "layer_forward": _layer_forward_fake,
    "layer": _layer_fake,
    "matmul": _matmul_fake,
}


# --- numbers of operations, for torch.utils.flop_counter ------------------------------------------------------------
# Two for each multiplication with a weight, as torch counts its own products. Shapes come in the tensors' stead.


def _products(shapes: Sequence[Any], rows: Any, kinds: Sequence[int]) -> int:
    """What multiplying every one of the rows with the weights of these kinds takes."""
    total = 0
    for kind in kinds:
        for height, width in of_kind(shapes, kind):
            total += 2 * height * width
    for size in rows[:-1]:
        total *= size
    return total


def _count_layer(mode: str, batch_first: bool, input: Any, *others: Any, **_: Any) -> int:
    return _products(others[5:], input, (IH, HH, HR))


_COUNTS: dict[str, Callable[..., int]] = {
    "input_projection": lambda mode, input, *places, **_: _products(places, input, (IH,)),
    "recurrence_forward": lambda *arguments, **_: _products(arguments[9:], arguments[3], (HH, HR)),
    "recurrence_backward": lambda *arguments, **_: _products(
        arguments[14:], arguments[8] if arguments[6] is None else arguments[6], (HH, HR)
    ),
    "layer_forward": _count_layer,
    "layer": _count_layer,
    "matmul": lambda a, b, **_: 2 * a[0] * a[1] * b[1],
}


def _count_operations(flop_counter: Any) -> None:
    """Has torch.utils.flop_counter count the ops. (Importing it takes longer than importing all of this package.)"""
    for namespace in ("rnnfast", "rnnfast_triton", "rnnfast_emulated"):
        for name, count in _COUNTS.items():
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is not None and packet not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(packet)(count)


# --- telling torch ------------------------------------------------------------------------------------------------


def register(namespace: str, backend_of: Callable[[Tensor], str]) -> None:
    """Tells torch all of it for the ops of one namespace, the first time that a process asks.

    Args:
        namespace: of ops that are defined.
        backend_of: the name of the backend that runs an op of the namespace on a tensor.
    """

    def registered() -> torch.library.Library:
        library = torch.library.Library(namespace, "FRAGMENT")
        differentiable = _differentiable(backend_of)
        for name, fake in _FAKES.items():
            if not hasattr(getattr(torch.ops, namespace), name):
                continue
            op = getattr(getattr(torch.ops, namespace), name).default
            qualified = f"{namespace}::{name}"
            torch.library.register_fake(qualified, fake, lib=library)
            own, plain = _all_arguments(name, differentiable[name]), _all_arguments(name, getattr(reference, name))
            library.impl(name, _autograd_kernel(op, own, plain), "Autograd", with_keyset=True)
            library.impl(name, _functorch_kernel(own, plain), "FuncTorchDynamicLayerFrontMode")
        return library

    libraries.registered_once(f"{namespace}: what torch is told", registered)


def _define_triton() -> torch.library.Library:
    """The ops of rnnfast/triton as torch sees them: opaque."""

    def late(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            from .triton import layers  # imports Triton, which takes a second

            return getattr(layers, name)(*arguments)

        return call

    library = torch.library.Library("rnnfast_triton", "DEF")
    for name, signature in OPS.items():
        library.define(signature.schema(name))
        # On the CPU they run in Triton's interpreter.
        for key in ("CUDA", "CPU"):
            library.impl(name, late(name), key)
    return library


def register_all() -> None:
    """What the import of the package registers."""
    after_import("torch.utils.flop_counter", _count_operations)
    if ops.library_error is None:
        register("rnnfast", lambda tensor: "cuda" if tensor.is_cuda else "cpu")
    if libraries.triton_error is None:
        libraries.registered_once("rnnfast_triton: ops", _define_triton)
        register("rnnfast_triton", lambda _: "triton")
        ops.add_kernels("triton", "rnnfast_triton")

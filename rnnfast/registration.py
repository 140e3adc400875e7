"""What torch is told about the ops besides their kernels: derivatives, shapes, numbers of operations.

An op's derivative is part of the op, so it is still there in a program that was exported, traced, saved and loaded:
where a derivative may be asked for, the dispatcher's Autograd key runs the op as a composition of differentiable parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import backward_op, libraries, ops, reference, step_ops
from ._after_import import after_import
from .autograd import Layer
from .backends import BACKENDS, KernelsWithOptions
from .cell_types import CELLS
from .quantized_op import NAMESPACE as REFERENCE_NAMESPACE
from .quantized_op import QuantizedLayer, by_reference, no_derivative, without_tangents
from .recompute import op as recompute_op
from .sequences import Role, Sequences
from .signatures import (
    KINDS,
    OF_RECURRENCE,
    OPS,
    QUANTIZED_LAYER,
    BackwardArguments,
    LayerArguments,
    Parameters,
    QuantizedArguments,
    flat,
    nested,
    role_of,
)
from .triton import availability
from .variants import ops as variant_ops

# The namespaces with rnnfast's ops, and the name of the backend that runs an op of it on a tensor.
_NAMESPACES: dict[str, Callable[[Tensor], str]] = {
    "rnnfast": lambda tensor: "cuda" if tensor.is_cuda else "cpu",
    "rnnfast_triton": lambda _: "triton",
    "rnnfast_emulated": lambda _: "emulated",
    REFERENCE_NAMESPACE: lambda _: "reference",
}

# --- derivatives --------------------------------------------------------------------------------------------------


def _differentiable(backend_of: Callable[[Tensor], str]) -> dict[str, Callable[..., Any]]:
    """By op: what it comes to where a derivative may be asked for.

    The layer as a whole has the kernels' backward pass. That pass is differentiated through the reference. With
    quantized weights there is none.
    """

    def layer_forward(*arguments: Any) -> tuple[Tensor, ...]:
        call = nested(LayerArguments, arguments)
        # All of them: the dispatcher leaves out those at the end that are None.
        results: tuple[Tensor, ...] = Layer.apply(backend_of(call.input), *flat(call))
        return results

    def quantized_layer(*arguments: Any) -> tuple[Tensor, ...]:
        call = nested(QuantizedArguments, arguments)
        results: tuple[Tensor, ...] = QuantizedLayer.apply(backend_of(call.input), *flat(call))
        return results

    return {
        "recurrence_backward": _references["recurrence_backward"],
        "layer_forward": layer_forward,
        "layer": lambda *arguments: layer_forward(*arguments)[:3],
        "quantized_layer": quantized_layer,
        "matmul": ops.Matmul.apply,
        "step": step_ops.differentiable_step(backend_of),
        "step_backward": step_ops.step_backward_by_reference,
        "layer_backward": backward_op.in_parts(backend_of),
    }


# By op: the differentiable reference.
_references: dict[str, Callable[..., Any]] = {
    **BACKENDS["reference"].kernels._asdict(),
    "quantized_layer": without_tangents,
    "matmul": reference.matmul,
    "step": step_ops.step_by_reference,
    "step_backward": step_ops.step_backward_by_reference,
    "layer_backward": backward_op.by_reference,
}


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
    call: LayerArguments | QuantizedArguments, hidden_size: Any, state_size: Any
) -> tuple[Tensor, Tensor, Tensor]:
    input, hx, cx, sequences, parameters = call[-5:]
    directions, cell = len(parameters.each("weight_hh")), CELLS[call.mode]
    output = input.new_empty(*input.shape[:-1], directions * state_size)
    if sequences.is_one_step(input):
        leading: tuple[Any, ...] = (input.size(0),)
        h_n = input.new_empty(0)
    else:
        leading = (directions, _batch(input, hx, cx, sequences))
        h_n = input.new_empty(*leading, state_size)
    c_n = input.new_empty(*leading, hidden_size) if cell.has_cell_state else input.new_empty(0)
    return output, h_n, c_n


def _batch(input: Tensor, hx: Tensor | None, cx: Tensor | None, sequences: Sequences) -> Any:
    if hx is not None:
        return hx.size(1)
    if cx is not None:
        return cx.size(1)
    if sequences.batch_sizes is not None:
        # The first batch size is a number in a tensor: a size that only the run knows.
        return torch.library.get_ctx().new_dynamic_size()
    return input.size(0 if sequences.batch_first else 1)


def _sizes(call: LayerArguments) -> tuple[Any, Any]:
    """H, and P or H."""
    width, state_size = call.parameters.each("weight_hh")[0].shape
    return width // CELLS[call.mode].gates, state_size


def _layer_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = nested(LayerArguments, arguments)
    return _states_fake(call, *_sizes(call))


def _quantized_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = nested(QuantizedArguments, arguments)
    return _states_fake(call, call.hidden_size, call.state_size)


def _layer_forward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = nested(LayerArguments, arguments)
    cell, input, (hidden_size, state_size) = CELLS[call.mode], call.input, _sizes(call)
    rows, width = input.shape[:-1], len(call.parameters.each("weight_hh")) * hidden_size
    cell_states = input.new_empty(*rows, width) if cell.has_cell_state else input.new_empty(0)
    reserve = input.new_empty(*rows, cell.reserve * width) if cell.reserve else input.new_empty(0)
    return (*_states_fake(call, hidden_size, state_size), cell_states, reserve)


def _recurrence_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    call = nested(BackwardArguments, arguments)
    like, hx, cx, cell = call.like, call.hx, call.cx, CELLS[call.mode]
    rows = like.shape[:-1]
    weight_hh = call.parameters.each("weight_hh")
    directions, (width, state_size) = len(weight_hh), weight_hh[0].shape
    projected = call.parameters.is_projected
    nothing = like.new_empty
    return (
        like.new_empty(*rows, directions * width),
        like.new_empty(*rows, directions * width) if cell.split_gate is not None else nothing(0),
        like.new_empty(0 if hx is None else hx.shape),
        like.new_empty(0 if cx is None or not cell.has_cell_state else cx.shape),
        like.new_empty(*rows, directions * state_size) if projected else nothing(0),
    )


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))


def _on_one_device(op: Any, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The fake with a check of the devices.

    The dispatcher takes it for real tensors too, where a single one is on the meta device: what it makes of those would
    pass for results.
    """
    names = [argument.name for argument in op._schema.arguments]
    of_data = [(i, name) for i, name in enumerate(names) if role_of(name) is not Role.SIZES]
    sizes = [(i, name) for i, name in enumerate(names) if role_of(name) is Role.SIZES]

    def checked(*arguments: Any) -> Any:
        # At the end those are missing that are None.
        given = [(name, arguments[i]) for i, name in of_data if i < len(arguments)]
        (first, like), *others = [(name, value) for name, value in given if isinstance(value, Tensor)]
        for name, tensor in others:
            if tensor.device != like.device:
                raise RuntimeError(
                    f"rnnfast::{op._opname}: {name}: expected the device of {first}, {like.device}, got {tensor.device}"
                )
        for i, name in sizes:
            if i < len(arguments) and arguments[i] is not None and arguments[i].device.type != "cpu":
                raise RuntimeError(
                    f"rnnfast::{op._opname}: {name}: expected a tensor on the CPU, got one on {arguments[i].device}"
                )
        return fake(*arguments)

    return checked


_FAKES: dict[str, Callable[..., Any]] = {
    "recurrence_backward": _recurrence_backward_fake,
    "layer_forward": _layer_forward_fake,
    "layer": _layer_fake,
    "quantized_layer": _quantized_fake,
    "matmul": _matmul_fake,
    "step": step_ops.step_fake,
    "step_backward": step_ops.step_backward_fake,
    "layer_backward": backward_op.layer_backward_fake,
}


# --- numbers of operations, for torch.utils.flop_counter ------------------------------------------------------------
# Two for each multiplication with a weight, as torch counts its own products. Shapes come in the tensors' stead.


def _products(parameters: Parameters, rows: Any, of_recurrence: bool) -> int:
    """What multiplying every one of the rows with the weights, or with those of the recurrence alone, takes."""
    total = 0
    for kind in OF_RECURRENCE if of_recurrence else [name for name, kind in KINDS.items() if len(kind.shape) == 2]:
        for height, width in parameters.each(kind):
            total += 2 * height * width
    for size in rows[:-1]:
        total *= size
    return total


def _count_layer(*arguments: Any, **_: Any) -> int:
    call = nested(LayerArguments, arguments)
    return _products(call.parameters, call.input, False)


def _count_quantized(*arguments: Any, **_: Any) -> int:
    call = nested(QuantizedArguments, arguments)
    input: Any = call.input
    return _products(call.unpacked(input[-1], lambda _, packed, shape: shape), input, False)


def _count_backward(*arguments: Any, **_: Any) -> int:
    call = nested(BackwardArguments, arguments)
    return _products(call.parameters, call.like, True)


_COUNTS: dict[str, Callable[..., int]] = {
    "recurrence_backward": _count_backward,
    "layer_forward": _count_layer,
    "layer": _count_layer,
    "quantized_layer": _count_quantized,
    "matmul": lambda a, b, **_: 2 * a[0] * a[1] * b[1],
    "step": step_ops.count_step,
    "step_backward": step_ops.count_step_backward,
    "layer_backward": backward_op.count,
    "variant_forward": variant_ops.count_forward,
    "variant_backward": variant_ops.count_backward,
}


def _count_operations(flop_counter: Any) -> None:
    """Has torch.utils.flop_counter count the ops. (Importing it takes longer than importing all of this package.)"""
    for namespace in _NAMESPACES:
        for name, count in _COUNTS.items():
            packet = getattr(getattr(torch.ops, namespace), name, None)
            if packet is not None and packet not in flop_counter.flop_registry:
                flop_counter.register_flop_formula(packet)(count)


# --- telling torch ------------------------------------------------------------------------------------------------


def _register(namespace: str) -> None:
    """Tells torch all of it for the ops of one namespace, which are defined, the first time that a process asks."""

    def registered() -> torch.library.Library:
        library = torch.library.Library(namespace, "FRAGMENT")
        differentiable = _differentiable(_NAMESPACES[namespace])
        for name, fake in _FAKES.items():
            if not hasattr(getattr(torch.ops, namespace), name):
                continue
            op = getattr(getattr(torch.ops, namespace), name).default
            torch.library.register_fake(f"{namespace}::{name}", _on_one_device(op, fake), lib=library)
            own, plain = differentiable[name], _references[name]
            library.impl(name, _autograd_kernel(op, own, plain), "Autograd", with_keyset=True)
            library.impl(name, _functorch_kernel(own, plain), "FuncTorchDynamicLayerFrontMode")
        return library

    libraries.registered_once(f"{namespace}: what torch is told", registered)


def _define_reference() -> torch.library.Library:
    """What is plain PyTorch, as ops: programs keep them whole, and derivatives are what is said of ops."""
    library = torch.library.Library(REFERENCE_NAMESPACE, "DEF")
    library.define(QUANTIZED_LAYER.schema("quantized_layer"))
    library.impl("quantized_layer", by_reference, "CPU")
    library.define("no_derivative(Tensor grad, SymInt[] size) -> Tensor")
    library.impl("no_derivative", no_derivative, "CPU")
    fake = f"{REFERENCE_NAMESPACE}::no_derivative"
    torch.library.register_fake(fake, lambda grad, size: grad.new_empty(size), lib=library)
    return library


def _define_triton() -> torch.library.Library:
    """The ops of rnnfast/triton as torch sees them: opaque."""

    def late(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            from .triton import layers, variant_layers  # import Triton, which takes a second

            return getattr(layers if name in OPS else variant_layers, name)(*arguments)

        return call

    library = torch.library.Library("rnnfast_triton", "DEF")
    schemas = {name: signature.schema(name) for name, signature in OPS.items()} | variant_ops.schemas()
    for name, schema in schemas.items():
        library.define(schema)
        # On the CPU they run in Triton's interpreter.
        for key in ("CUDA", "CPU"):
            library.impl(name, late(name), key)
    return library


def load_emulated(path: str | None = None) -> None:
    """Makes the backend `emulated` available: the CUDA kernels, compiled for the processor. A developer's tool, slow.

    Args:
        path: of the library; None takes the environment variable RNNFAST_EMULATED_LIBRARY.

    Raises:
        RuntimeError: there is no such library, or it does not load; the message says how to build it.
    """
    libraries.load_emulated_library(path)
    if not hasattr(torch.ops.rnnfast_emulated, "variant_forward"):
        raise RuntimeError("rnnfast.load_emulated: the emulated library is older than this rnnfast: make emulated")
    BACKENDS["emulated"].use("rnnfast_emulated")
    _register("rnnfast_emulated")
    variant_ops.register("rnnfast_emulated")
    BACKENDS["emulated"].with_options = KernelsWithOptions.of("emulated", "rnnfast_emulated")


def register_all() -> None:
    """What the import of the package registers."""
    after_import("torch.utils.flop_counter", _count_operations)
    libraries.registered_once(f"{REFERENCE_NAMESPACE}: ops", _define_reference)
    _register(REFERENCE_NAMESPACE)
    BACKENDS["reference"].quantized = ops.quantized_layer(REFERENCE_NAMESPACE)
    if ops.library_error is None:
        _register("rnnfast")
        variant_ops.register("rnnfast")
    if availability.error is None:
        libraries.registered_once("rnnfast_triton: ops", _define_triton)
        _register("rnnfast_triton")
        BACKENDS["triton"].use("rnnfast_triton")
        variant_ops.register("rnnfast_triton")
        BACKENDS["triton"].with_options = KernelsWithOptions.of("triton", "rnnfast_triton")
    recompute_op.register()
    BACKENDS["emulated"].load = load_emulated

"""The op `quantized_layer` in plain PyTorch, and what stands for its derivative: an error, never a silent detach."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backends import BACKENDS
from .quantization import gates_of, unpack
from .reference import check_mode, layer
from .signatures import QUANTIZED_LAYER, QuantizedArguments, nested
from .vmap import batched_call

# The namespace of the ops that are plain PyTorch.
NAMESPACE = "rnnfast_reference"


def by_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op: `reference.layer` on the unpacked weights.

    Args:
        arguments: `QuantizedArguments`, flat.
    Returns:
        output, h_n, c_n, as `reference.layer` does.
    Raises:
        ValueError: weights are not packed as the arguments say.
    """
    call = nested(QuantizedArguments, arguments)
    gates = check_mode("quantized_layer", call.mode).gates

    def matrix(place: str, packed: Tensor, shape: tuple[int, int]) -> Tensor:
        try:
            return unpack(packed, gates_of(place, gates), *shape, call.weights)
        except ValueError as error:
            raise ValueError(f"quantized_layer: {place}: {error}") from None

    return layer(call.layer._replace(parameters=call.unpacked(call.input.shape[-1], matrix)))


def no_derivative(*_: Any) -> NoReturn:
    """Raises RuntimeError."""
    raise RuntimeError(
        "rnnfast: quantized weights have no derivative, nor have results computed with them: call such layers inside "
        "torch.no_grad(), or detach what they are given or what they return"
    )


def refuse_tangents(*arguments: Any) -> None:
    """Raises RuntimeError if one of an op's arguments takes part in forward-mode differentiation."""
    for argument in arguments:
        if isinstance(argument, Tensor) and (
            torch._C._functorch.is_functorch_wrapped_tensor(argument)
            or forward_ad.unpack_dual(argument).tangent is not None
        ):
            no_derivative()


def without_tangents(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op inside forward-mode differentiation. Raises RuntimeError if an argument takes part in that."""
    refuse_tangents(*arguments)
    return by_reference(*arguments)


class QuantizedLayer(torch.autograd.Function):
    """The op, whose results want gradients where an argument does, and raise when they get one."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> tuple[Tensor, ...]:
        run: Any = BACKENDS[backend].quantized
        results: tuple[Tensor, ...] = run(*arguments)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.shapes = [value.shape if isinstance(value, Tensor) else None for value in inputs]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        grad = next((grad for grad in grads if grad is not None), None)
        if grad is None:
            return (None,) * len(ctx.shapes)
        # An op, so that a compiled program raises when it runs backward, and not when it is made.
        refuse = getattr(torch.ops, NAMESPACE).no_derivative
        return tuple(
            refuse(grad, shape) if needed else None
            for shape, needed in zip(ctx.shapes, ctx.needs_input_grad, strict=True)
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
        names = ("backend", *QUANTIZED_LAYER.names)
        return batched_call(QuantizedLayer.apply, info.batch_size, in_dims, arguments, names, QUANTIZED_LAYER.results)

"""What torch is told about the op `layer_backward` (csrc/schemas.h): shapes, derivatives, numbers of operations. Plain
calls go past all of this (`autograd.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .autograd import DIFFERENTIABLE, LAYER, layer_backward_in_parts
from .signatures import KINDS, OF_RECURRENCE, PLACES, LayerBackwardArguments, nested

Gradients = tuple[Tensor | None, ...]


def layer_backward_fake(*arguments: Any) -> Gradients:
    wanted = nested(LayerBackwardArguments, arguments).differentiated
    return tuple([None if value is None else value.new_empty(value.shape) for value in wanted])


def in_parts(backend_of: Callable[[Tensor], str]) -> Callable[..., Gradients]:
    """The op as what it is made of, which is differentiable."""

    def layer_backward(*arguments: Any) -> Gradients:
        call = nested(LayerBackwardArguments, arguments)
        nothing = call.input.new_empty(0)
        kept = (nothing if value is None else value for value in (call.cell_states, call.reserve))
        needs = [False] * len(LAYER)
        for place, value in zip(DIFFERENTIABLE, call.differentiated, strict=True):
            needs[place] = value is not None
        parts = (
            backend_of(call.input), call.input, call.mode, call.grad_output, call.grad_h_n, call.grad_c_n,
            call.grad_cell_states, call.output, *kept, call.hx, call.cx, *call.sequences, *call.parameters,
        )  # fmt: skip
        grads = layer_backward_in_parts(parts, needs)
        return tuple([grads[place] for place in DIFFERENTIABLE])

    return layer_backward


by_reference = in_parts(lambda _: "reference")


def count(*arguments: Any, **_: Any) -> int:
    """Shapes come in the tensors' stead."""
    call = nested(LayerBackwardArguments, arguments)
    input: Any = call.input
    shapes: Any = call.parameters
    rows = 1
    for size in input[:-1]:
        rows *= size
    # Where the states that entered are the output as it lies, the first step without one has no product.
    batch = input[0] if len(input) == 2 or call.sequences.batch_first else input[1]
    lies_so = len(input) == 2 or not call.sequences.batch_first or batch == 1
    plain = all(given is None for given in (call.hx, *call.sequences[:3]))
    entering = rows - batch if lies_so and plain else rows
    of_input, _, _, *wanted = call.differentiated
    total = 0
    for name, shape, gradient in zip(PLACES, shapes, wanted, strict=True):
        kind = name.removesuffix("_reverse")
        if shape is None or len(KINDS[kind].shape) < 2:
            continue
        times = rows if kind in OF_RECURRENCE or of_input is not None else 0
        if gradient is not None:
            times += entering if kind == "weight_hh" else rows
        total += 2 * times * shape[0] * shape[1]
    return total

"""What torch is told about the op `layer_backward` (csrc/schemas.h): shapes, derivatives, numbers of operations. Plain
calls go past all of this (`autograd.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from .autograd import DIFFERENTIABLE, LAYER, layer_backward_in_parts
from .cell_types import CELLS
from .sequences import Sequences
from .signatures import KINDS, OF_RECURRENCE, PLACES, Parameters

Optional = Tensor | None


class LayerBackwardArguments(NamedTuple):
    """What `layer_backward` takes, up to what belongs to the rows and the parameters."""

    mode: str
    by_aten: bool
    wanted: int
    input: Tensor
    grad_output: Optional
    grad_h_n: Optional
    grad_c_n: Optional
    grad_cell_states: Optional
    output: Optional
    cell_states: Optional
    reserve: Optional
    hx: Optional
    cx: Optional


_OWN, _ROWS = len(LayerBackwardArguments._fields), len(Sequences._fields)


def _record(arguments: tuple[Any, ...]) -> tuple[LayerBackwardArguments, Sequences, Parameters]:
    """The dispatcher leaves out those at the end that are None."""
    rest = _OWN + _ROWS
    return (
        LayerBackwardArguments(*arguments[:_OWN]),
        Sequences(*arguments[_OWN:rest]),
        Parameters(*arguments[rest:]),
    )


def _wanted(call: LayerBackwardArguments, parameters: Parameters) -> list[Any]:
    """What a gradient is wanted of, in the order of the results; None elsewhere."""
    each = (call.input, call.hx, call.cx if CELLS[call.mode].has_cell_state else None, *parameters)
    return [value if call.wanted >> i & 1 else None for i, value in enumerate(each)]


def layer_backward_fake(*arguments: Any) -> tuple[Optional, ...]:
    call, _, parameters = _record(arguments)
    return tuple([None if value is None else value.new_empty(value.shape) for value in _wanted(call, parameters)])


def in_parts(backend_of: Callable[[Tensor], str]) -> Callable[..., tuple[Optional, ...]]:
    """The op as what it is made of, which is differentiable."""

    def layer_backward(*arguments: Any) -> tuple[Optional, ...]:
        call, sequences, parameters = _record(arguments)
        nothing = call.input.new_empty(0)
        kept = (nothing if value is None else value for value in (call.cell_states, call.reserve))
        needs = [False] * len(LAYER)
        for place, value in zip(DIFFERENTIABLE, _wanted(call, parameters), strict=True):
            needs[place] = value is not None
        grads = layer_backward_in_parts(
            (
                backend_of(call.input), call.input, call.mode, call.grad_output, call.grad_h_n, call.grad_c_n,
                call.grad_cell_states, call.output, *kept, call.hx, call.cx, *sequences, *parameters,
            ),
            needs,
        )  # fmt: skip
        return tuple([grads[place] for place in DIFFERENTIABLE])

    return layer_backward


by_reference = in_parts(lambda _: "reference")


def count(*arguments: Any, **_: Any) -> int:
    """Shapes come in the tensors' stead."""
    call, sequences, parameters = _record(arguments)
    input: Any = call.input
    rows = 1
    for size in input[:-1]:
        rows *= size
    # Where the states that entered are the output as it lies, the first step without one has no product.
    shifted = len(input) == 2 or not sequences.batch_first or input[0] == 1
    entering = rows
    if call.hx is None and shifted and all(given is None for given in sequences[:3]):
        entering -= input[0] if len(input) == 2 else input[0 if sequences.batch_first else 1]
    of_input, _, _, *wanted = _wanted(call, parameters)
    total = 0
    shapes: Any = parameters
    for name, shape, gradient in zip(PLACES, shapes, wanted, strict=True):
        kind = name.removesuffix("_reverse")
        if shape is not None and len(KINDS[kind].shape) == 2:
            total += 2 * rows * shape[0] * shape[1] * (kind in OF_RECURRENCE or of_input is not None)
            if gradient is not None:
                total += 2 * (entering if kind == "weight_hh" else rows) * shape[0] * shape[1]
    return total

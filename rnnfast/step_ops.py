"""What torch is told about the ops of one step, `step` and `step_backward` (csrc/schemas.h): shapes, derivatives,
numbers of operations. Plain calls go past all of this (`steps.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference
from .autograd import Layer, as_matrix
from .cell_types import CELLS
from .sequences import Sequences
from .signatures import BackwardArguments, LayerArguments, Parameters, flat

Optional = Tensor | None
Five = tuple[Tensor, Optional, Optional, Optional, Optional]


def _parameters(weight_ih: Tensor, weight_hh: Tensor, bias_ih: Optional = None, bias_hh: Optional = None) -> Parameters:
    return Parameters(weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh)


def _or_none(tensor: Tensor) -> Optional:
    """What an op of layers returns, as one of steps: None where there is nothing."""
    return None if tensor.dim() == 1 else tensor


def step_fake(
    mode: str,
    saves: bool,
    input: Tensor,
    hx: Optional,
    cx: Optional,
    batch_first: bool,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias_ih: Optional,
    bias_hh: Optional,
) -> Five:
    cell, rows, size = CELLS[mode], input.shape[:-1], weight_hh.size(1)
    batch = (input.size(0),) if input.dim() == 2 else (1, input.size(0 if batch_first else 1))
    state = input.new_empty
    return (
        state(*rows, size),
        None if input.dim() == 2 else state(*batch, size),
        state(*batch, size) if cell.has_cell_state else None,
        state(*rows, size) if saves and cell.has_cell_state else None,
        state(*rows, cell.reserve * size) if saves and cell.reserve else None,
    )


class StepBackwardArguments(NamedTuple):
    """What `step_backward` takes."""

    mode: str
    wants_input: bool
    grad_output: Optional
    grad_h_n: Optional
    grad_c_n: Optional
    input: Tensor
    output: Optional
    cell_states: Optional
    reserve: Optional
    hx: Optional
    cx: Optional
    batch_first: bool
    weight_ih: Tensor
    weight_hh: Tensor


def step_backward_fake(*arguments: Any) -> Five:
    call = StepBackwardArguments(*arguments)
    cell, input, width = CELLS[call.mode], call.input, call.weight_hh.size(0)
    return (
        input.new_empty(*input.shape[:-1], width),
        input.new_empty(*input.shape[:-1], width) if cell.split_gate is not None else None,
        input.new_empty(input.shape) if call.wants_input else None,
        None if call.hx is None else call.hx.new_empty(call.hx.shape),
        call.cx.new_empty(call.cx.shape) if call.cx is not None and cell.has_cell_state else None,
    )


def step_through(layer_forward: Callable[[LayerArguments], tuple[Tensor, ...]]) -> Callable[..., Five]:
    """`step` as a layer: with the derivative that this has."""

    def step(
        mode: str, saves: bool, input: Tensor, hx: Optional, cx: Optional, batch_first: bool, *weights: Any
    ) -> Five:
        call = LayerArguments(mode, input, hx, cx, Sequences(batch_first=batch_first), _parameters(*weights))
        output, *others = layer_forward(call)
        h_n, c_n, cell_states, reserve = map(_or_none, others)
        return output, h_n, c_n, cell_states if saves else None, reserve if saves else None

    return step


def differentiable_step(backend_of: Callable[[Tensor], str]) -> Callable[..., Five]:
    """`step` with the derivative that layers have."""
    return step_through(lambda call: Layer.apply(backend_of(call.input), *flat(call)))


step_by_reference = step_through(reference.layer_forward)


def step_backward_by_reference(*arguments: Any) -> Five:
    call = StepBackwardArguments(*arguments)
    nothing = call.input.new_empty(0)
    gates, recurrent, grad_hx, grad_cx, _ = reference.recurrence_backward(
        BackwardArguments(
            call.mode,
            call.grad_output,
            call.grad_h_n,
            call.grad_c_n,
            None,
            call.output,
            nothing if call.cell_states is None else call.cell_states,
            nothing if call.reserve is None else call.reserve,
            call.hx,
            call.cx,
            Sequences(batch_first=call.batch_first),
            _parameters(call.weight_ih, call.weight_hh),
        )
    )
    grad_input = torch.mm(as_matrix(gates), call.weight_ih).view(call.input.shape) if call.wants_input else None
    return (
        gates,
        _or_none(recurrent),
        grad_input,
        None if call.hx is None else grad_hx,
        grad_cx if call.cx is not None and CELLS[call.mode].has_cell_state else None,
    )


# Shapes come in the tensors' stead.


def count_step(mode: str, saves: bool, input: Any, hx: Any, cx: Any, batch_first: bool, *weights: Any, **_: Any) -> int:
    return _products(input, weights[:2])


def _products(rows: Any, weights: Any) -> int:
    number = rows[0] if len(rows) == 2 else rows[0] * rows[1]
    return sum(2 * number * height * width for height, width in weights)


def count_step_backward(mode: str, wants_input: bool, *others: Any, **_: Any) -> int:
    weight_ih, weight_hh = others[-2:]
    return _products(others[3], (weight_ih, weight_hh) if wants_input else (weight_hh,))

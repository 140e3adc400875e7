"""What torch is told about the ops of one step, `step` and `step_backward` (csrc/schemas.h): shapes, derivatives,
numbers of operations. Plain calls go past all of this (`steps.py`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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


def step_backward_fake(
    mode: str,
    wants_input: bool,
    grad_output: Optional,
    grad_h_n: Optional,
    grad_c_n: Optional,
    input: Tensor,
    output: Optional,
    cell_states: Optional,
    reserve: Optional,
    hx: Optional,
    cx: Optional,
    batch_first: bool,
    weight_ih: Tensor,
    weight_hh: Tensor,
) -> Five:
    cell, width = CELLS[mode], weight_hh.size(0)
    return (
        input.new_empty(*input.shape[:-1], width),
        input.new_empty(*input.shape[:-1], width) if cell.split_gate is not None else None,
        input.new_empty(input.shape) if wants_input else None,
        None if hx is None else hx.new_empty(hx.shape),
        cx.new_empty(cx.shape) if cx is not None and cell.has_cell_state else None,
    )


def differentiable_step(backend_of: Callable[[Tensor], str]) -> Callable[..., Any]:
    """`step` with the derivative that layers have."""

    def step(
        mode: str, saves: bool, input: Tensor, hx: Optional, cx: Optional, batch_first: bool, *weights: Optional
    ) -> Five:
        sequences, parameters = Sequences(batch_first=batch_first), _parameters(*weights)  # type: ignore[arg-type]
        call = LayerArguments(mode, input, hx, cx, sequences, parameters)
        output, *others = Layer.apply(backend_of(input), *flat(call))
        h_n, c_n, cell_states, reserve = map(_or_none, others)
        return output, h_n, c_n, cell_states if saves else None, reserve if saves else None

    return step


def step_by_reference(
    mode: str, saves: bool, input: Tensor, hx: Optional, cx: Optional, batch_first: bool, *weights: Optional
) -> Five:
    sequences, parameters = Sequences(batch_first=batch_first), _parameters(*weights)  # type: ignore[arg-type]
    output, *others = reference.layer_forward(LayerArguments(mode, input, hx, cx, sequences, parameters))
    h_n, c_n, cell_states, reserve = map(_or_none, others)
    return output, h_n, c_n, cell_states if saves else None, reserve if saves else None


def step_backward_by_reference(
    mode: str,
    wants_input: bool,
    grad_output: Optional,
    grad_h_n: Optional,
    grad_c_n: Optional,
    input: Tensor,
    output: Optional,
    cell_states: Optional,
    reserve: Optional,
    hx: Optional,
    cx: Optional,
    batch_first: bool,
    weight_ih: Tensor,
    weight_hh: Tensor,
) -> Five:
    nothing = input.new_empty(0)
    call = BackwardArguments(
        mode, grad_output, grad_h_n, grad_c_n, None, output, nothing if cell_states is None else cell_states,
        nothing if reserve is None else reserve, hx, cx, Sequences(batch_first=batch_first),
        _parameters(weight_ih, weight_hh),
    )  # fmt: skip
    gates, recurrent, grad_hx, grad_cx, _ = reference.recurrence_backward(call)
    grad_input = torch.mm(as_matrix(gates), weight_ih).view(input.shape) if wants_input else None
    return (
        gates,
        _or_none(recurrent),
        grad_input,
        None if hx is None else grad_hx,
        grad_cx if cx is not None and CELLS[mode].has_cell_state else None,
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

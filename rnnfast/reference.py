"""The recurrence in plain PyTorch: the truth that every kernel is tested against.

The functions compute what the ops in docs/design.md compute, for any floating dtype on any device, and take the same
arguments as records (:mod:`rnnfast.signatures`):

* the forward pass is composed of differentiable operations, so it can be differentiated any number of times, in reverse
  and forward mode, and be mapped with ``torch.vmap`` over inputs, weights or both;
* the backward pass beside it is written by hand, uses no autograd, and is itself composed of differentiable operations.

The step equations and their derivatives stand in :mod:`rnnfast.cell_types`, how rows lie in :mod:`rnnfast.sequences`.
For the projection: https://arxiv.org/abs/1402.1128.

Shapes: T steps, B batch, I input size, H hidden size, P projection size, D directions, G gates, R values of a cell's
reserve. "rows" stands for the leading dimensions: (T, B), with batch_first (B, T), packed (sum of batch_sizes,). One
step without any has rows (B,): there states are (B, .), and h_n, which would be the output again, is (0,).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .cell_types import CELLS, CellType, StepGradients
from .sequences import DenseRows, masked, select, zero_beyond
from .signatures import (
    BackwardArguments,
    LayerArguments,
    Parameters,
    as_sequence,
    check_output,
    compute_dtype,
    is_one_step,
)

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _op(has_h_n: bool) -> Callable[[_Function], _Function]:
    """What the functions of ops have round them.

    Autocast would round the products inside a step; what is asked for is decided by the dtypes that come in.
    """

    def decorate(function: _Function) -> _Function:
        @functools.wraps(function)
        def wrapper(arguments: LayerArguments | BackwardArguments) -> Any:
            check_mode(function.__name__, arguments.mode)
            check_output(function.__name__, arguments)
            with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
                if is_one_step(arguments):
                    return as_sequence(function, arguments, has_h_n)
                return function(arguments)

        return wrapper  # type: ignore[return-value]

    return decorate


def check_mode(op: str, mode: str) -> CellType:
    """The cell of that mode; ValueError where there is none."""
    cell = CELLS.get(mode)
    if cell is None:
        raise ValueError(f"{op}: mode must be one of {', '.join(CELLS)}, got {mode!r}")
    return cell


def _of_direction(value: Tensor, d: int, directions: int) -> Tensor:
    """(..., D*F) to direction d's (..., F)."""
    size = value.shape[-1] // directions
    return value.narrow(-1, d * size, size)


def _initial(state: Tensor | None, d: int, like: Tensor, batch: int, features: int) -> Tensor:
    """Direction d's initial state (B, F), in the dtype that steps compute in; None means zeros."""
    dtype = compute_dtype(like.dtype)
    return like.new_zeros((batch, features), dtype=dtype) if state is None else state[d].to(dtype)


def _stack(values: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Per step (B, F) to (T, B, F); without steps, no rows of the shape of ``empty`` (B, F)."""
    return torch.stack(list(values)) if values else empty.new_zeros((0, *empty.shape))


# ---- forward --------------------------------------------------------------------------------------------------------


def input_projection(mode: str, input: Tensor, parameters: Parameters) -> Tensor:
    """The pre-activations' part that does not depend on the state, for all steps and directions.

    Args:
        mode: a key of ``CELLS``.
        input: (rows, I).
        parameters: weight_ih (G*H, I) and, with bias, bias_ih, bias_hh (G*H,) are read, of each direction.

    Returns:
        gates (rows, D*G*H), ``W_ih x + b_ih + b_hh``; for the split gate (the GRU's n) without b_hh, which stands
        inside ``r * (W_hn h + b_hn)``.
    """
    dtype, cell = compute_dtype(input.dtype), CELLS[mode]
    bias_ih, bias_hh = parameters.each("bias_ih"), parameters.each("bias_hh")
    parts = []
    for d, weight in enumerate(parameters.each("weight_ih")):
        bias = bias_ih[d].to(dtype) if bias_ih else None
        if bias_hh:
            folded = _by_gate(bias_hh[d].to(dtype), cell, of_split_gate=False)
            bias = folded if bias is None else bias + folded
        parts.append(F.linear(input.to(dtype), weight.to(dtype), bias))
    return torch.cat(parts, dim=-1).to(input.dtype)


def _by_gate(bias: Tensor, cell: CellType, of_split_gate: bool) -> Tensor:
    """bias_hh (G*H,), with zeros for all gates but the split one, or for the split one."""
    parts = bias.chunk(cell.gates)
    return torch.cat(
        [
            part if (gate == cell.split_gate) == of_split_gate else torch.zeros_like(part)
            for gate, part in enumerate(parts)
        ]
    )


def recurrence_forward(gates: Tensor, arguments: LayerArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of one layer, in all its directions: :func:`layer_forward` after its input projection.

    gates: (rows, D*G*H), what :func:`input_projection` returned.

    16-bit types compute in float32: h_t is rounded to its storage type before step t+1 uses it, c_t stays in float32.
    """
    mode, _, hx, cx, sequences, parameters = arguments
    cell = CELLS[mode]
    weight_hh, weight_hr, bias_hh = (parameters.each(kind) for kind in ("weight_hh", "weight_hr", "bias_hh"))
    directions = len(weight_hh)
    storage, compute = gates.dtype, compute_dtype(gates.dtype)
    rows = DenseRows.of(gates, sequences)
    gates_in = rows.read(gates).to(compute)
    hidden_size = gates.shape[-1] // (directions * cell.gates)
    outputs, cell_states, reserves, h_n, c_n = [], [], [], [], []
    for d in range(directions):
        reverse = d == 1
        weight = weight_hh[d].to(compute)
        projection = weight_hr[d].to(compute) if weight_hr else None
        bias = None
        if cell.split_gate is not None and bias_hh:
            bias = _by_gate(bias_hh[d].to(compute), cell, of_split_gate=True)
        h = _initial(hx, d, gates, rows.batch, weight.shape[1])
        c = _initial(cx, d, gates, rows.batch, hidden_size) if cell.has_cell_state else None
        active, keep = rows.masks(reverse)
        gates_of = _of_direction(gates_in, d, directions).unbind()
        every_h, every_c, every_saved = [h] * rows.steps, [c] * rows.steps, [h] * rows.steps
        for t in rows.order(reverse):
            h_before = masked(keep[t], h)
            c_before = None if c is None else masked(keep[t], c)
            recurrent = F.linear(h_before, weight, bias)
            h_new, c_new, saved = cell.step(gates_of[t], recurrent, h_before, c_before)
            if projection is not None:
                h_new = F.linear(h_new, projection)
            h = every_h[t] = select(active[t], h_new.to(storage).to(compute), h)
            if c is not None and c_new is not None:
                c = every_c[t] = select(active[t], c_new, c)
            if saved:
                every_saved[t] = torch.cat(saved, dim=-1)
        outputs.append(_stack(every_h, h))
        h_n.append(h)
        if c is not None:
            c_n.append(c)
            cell_states.append(_stack([c_t for c_t in every_c if c_t is not None], c))
        reserves.append(_stack(every_saved, h.new_zeros((rows.batch, cell.reserve * hidden_size))))

    def of_rows(parts: list[Tensor]) -> Tensor:
        return rows.write(torch.cat(parts, dim=-1).to(storage))

    nothing = gates.new_empty(0)
    return (
        of_rows(outputs),
        torch.stack(h_n).to(storage),
        torch.stack(c_n).to(storage) if cell.has_cell_state else nothing,
        of_rows(cell_states) if cell.has_cell_state else nothing.clone(),
        of_rows(reserves) if cell.reserve else nothing.clone(),
    )


@_op(has_h_n=True)
def layer_forward(arguments: LayerArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A whole layer, in all its directions.

    Args:
        arguments: mode, a key of ``CELLS``; input (rows, I); hx and cx, (D, B, P or H) and (D, B, H), None for zeros
            (cx is read by cells that have a cell state); the sequences; of each direction weight_ih (G*H, I),
            weight_hh (G*H, P or H), with bias bias_ih and bias_hh (G*H,), with projection weight_hr (P, H). The second
            direction runs reversed in time.

    Returns:
        output (rows, D*P or D*H), zero beyond a row's length; h_n (D, B, P or H) and c_n (D, B, H), the state after a
        row's last step; cell_states (rows, D*H), every c_t; reserve (rows, D*R*H), what the backward pass needs, see
        ``CellType``. What does not apply has shape (0,): c_n and cell_states without a cell state, reserve where R = 0.

    Raises:
        ValueError: mode is unknown.
    """
    input = zero_beyond(arguments.input, arguments.sequences)
    return recurrence_forward(input_projection(arguments.mode, input, arguments.parameters), arguments)


def layer(arguments: LayerArguments) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_forward` without what only a backward pass needs: (output, h_n, c_n)."""
    output, h_n, c_n, _, _ = layer_forward(arguments)
    return output, h_n, c_n


# ---- backward -------------------------------------------------------------------------------------------------------


@_op(has_h_n=False)
def recurrence_backward(arguments: BackwardArguments) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`recurrence_forward`, written out: no autograd in here.

    The gradients of the weights are products over all rows of what this returns with h_t, c_t and the input.

    Args:
        arguments: grad_output, grad_h_n, grad_c_n, grad_cell_states, the gradients of the results of those names, of
            their shapes, None for zero; output, cell_states, reserve, as returned by the forward pass (what lies beyond
            a row's length does not matter; the output of one step may be None where R > 0); the others as given to it.

    Returns:
        grad_gates (rows, D*G*H), zero beyond a row's length; grad_gates_hh (rows, D*G*H), with a split gate the
        gradient of ``W_hh h + b_hh``; grad_hx (D, B, P or H); grad_cx (D, B, H); grad_projected (rows, D*P), with
        projection the whole gradient of h_t. What does not apply has shape (0,): grad_gates_hh without a split gate
        (where it would be grad_gates), grad_hx where hx is None, grad_cx where cx is None, grad_projected without
        projection.

    Raises:
        ValueError: mode is unknown.
    """
    mode, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states, reserve, hx, cx, *_ = arguments
    cell, sequences, parameters = CELLS[mode], arguments.sequences, arguments.parameters
    weight_hh, weight_hr = parameters.each("weight_hh"), parameters.each("weight_hr")
    directions = len(weight_hh)
    if output is None:
        # One step: the state that entered it is hx, and no cell with a reserve looks at the one that came of it.
        output = reserve.new_zeros((*reserve.shape[:-1], weight_hh[0].shape[1]))
    storage, compute = output.dtype, compute_dtype(output.dtype)
    rows = DenseRows.of(output, sequences)
    hidden_size = weight_hh[0].shape[0] // cell.gates

    def rows_of(value: Tensor, d: int) -> Tensor:
        return rows.read(_of_direction(value, d, directions)).to(compute)

    dgates, dgates_hh, dprojected, dhx, dcx = [], [], [], [], []
    for d in range(directions):
        reverse = d == 1
        weight = weight_hh[d].to(compute)
        projection = weight_hr[d].to(compute) if weight_hr else None
        active, keep = rows.masks(reverse)
        h_all = rows_of(output, d)
        h_after = h_all.unbind()
        h_before = rows.states_before(_initial(hx, d, output, rows.batch, weight.shape[1]), h_all, reverse)
        c_after: Sequence[Tensor | None] = [None] * rows.steps
        c_before = c_after
        saved: list[tuple[Tensor, ...]] = [()] * rows.steps
        if cell.has_cell_state:
            c_all = rows_of(cell_states, d)
            c_after = c_all.unbind()
            c_before = rows.states_before(_initial(cx, d, output, rows.batch, hidden_size), c_all, reverse)
        if cell.reserve:
            saved = [part.chunk(cell.reserve, dim=-1) for part in rows_of(reserve, d).unbind()]
        dh = _initial(grad_h_n, d, output, rows.batch, weight.shape[1])
        dc = _initial(grad_c_n, d, output, rows.batch, hidden_size) if cell.has_cell_state else None
        dh_outer = None if grad_output is None else rows_of(grad_output, d).unbind()
        dc_outer = (
            None if grad_cell_states is None or not cell.has_cell_state else rows_of(grad_cell_states, d).unbind()
        )
        every_dgates, every_dgates_hh, every_dh = [dh] * rows.steps, [dh] * rows.steps, [dh] * rows.steps
        for t in rows.order(not reverse):
            # the gradients of h_t and c_t: from the step after t (or h_n, c_n) and from the results of this step.
            # Where a row has ended, step t did nothing: they are zero, and dh and dc go on to its last step
            dh_t = masked(active[t], dh if dh_outer is None else dh + dh_outer[t])
            dc_t = None
            if dc is not None:
                dc_t = masked(active[t], dc if dc_outer is None else dc + dc_outer[t])
            dhidden = dh_t if projection is None else dh_t @ projection
            dgates_t, dgates_hh_t, dh_direct, dc_before = cell.step_backward(
                StepGradients(saved[t], h_before[t], h_after[t], c_before[t], c_after[t], dhidden, dc_t)
            )
            dh_before = dgates_hh_t @ weight
            if dh_direct is not None:
                dh_before = dh_before + dh_direct
            dh = select(active[t], masked(keep[t], dh_before), dh)
            if dc is not None and dc_before is not None:
                dc = select(active[t], masked(keep[t], dc_before), dc)
            every_dgates[t], every_dgates_hh[t], every_dh[t] = dgates_t, dgates_hh_t, dh_t
        empty = dh.new_zeros((rows.batch, weight.shape[0]))
        dgates.append(_stack(every_dgates, empty))
        dgates_hh.append(_stack(every_dgates_hh, empty))
        dprojected.append(_stack(every_dh, dh))
        dhx.append(dh)
        if dc is not None:
            dcx.append(dc)

    def of_rows(parts: list[Tensor]) -> Tensor:
        return rows.write(torch.cat(parts, dim=-1).to(storage))

    nothing = output.new_empty(0)
    return (
        of_rows(dgates),
        of_rows(dgates_hh) if cell.split_gate is not None else nothing,
        torch.stack(dhx).to(storage) if hx is not None else nothing.clone(),
        torch.stack(dcx).to(storage) if cell.has_cell_state and cx is not None else nothing.clone(),
        of_rows(dprojected) if weight_hr else nothing.clone(),
    )


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices.

    Args:
        a: (M, K), any strides.
        b: (K, N), any strides.

    Returns:
        (M, N), in the dtype of a; 16-bit types are summed in float32.
    """
    dtype = compute_dtype(a.dtype)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)

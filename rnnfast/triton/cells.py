"""The cells' equations and their derivatives, for both families of kernels. Those of cell_types.py, where sources are.

Gates and what forward saves are tuples, built by `+=` in tl.static_range where a value depends on the number of its
gate: Triton's comprehensions go over tuples only. Results that a cell does not have repeat another one: what is not
used costs nothing.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import triton
import triton.language as tl

from ..cell_types import CELLS

# Cells by number, as constants of kernels compare them.
_NUMBERS = {mode: number for number, mode in enumerate(CELLS)}
LSTM = tl.constexpr(_NUMBERS["LSTM"])
GRU = tl.constexpr(_NUMBERS["GRU"])
RNN_TANH = tl.constexpr(_NUMBERS["RNN_TANH"])
RNN_RELU = tl.constexpr(_NUMBERS["RNN_RELU"])
RNN_IDENTITY = tl.constexpr(_NUMBERS["RNN_IDENTITY"])
RNN_SIGMOID = tl.constexpr(_NUMBERS["RNN_SIGMOID"])
MGU = tl.constexpr(_NUMBERS["MGU"])


class Cell(NamedTuple):
    """What kernels are told of a cell, their constant CELL: its row of CELLS, in numbers.

    Kernels read it by `NAME: tl.constexpr = CELL.name`: without the annotation Triton 3.6 takes a constant's attribute
    for a value of Python's, which `tl.static_range` refuses. Numbers only: in strings inside of constants Triton 3.6
    looks for properties of arguments, each a letter.
    """

    mode: int
    gates: int
    reserve: int
    has_cell_state: bool
    reads_previous_h: bool
    split_gate: int  # -1: none


def cell(mode: str) -> Cell:
    found = CELLS[mode]
    # One value a unit is carried past the gates, and with a projection h has other units than the cell.
    assert not (found.reads_previous_h and (found.has_cell_state or found.may_project)), f"{mode} does not fit"
    split_gate = -1 if found.split_gate is None else found.split_gate
    return Cell(_NUMBERS[mode], found.gates, found.reserve, found.has_cell_state, found.reads_previous_h, split_gate)


@triton.jit
def sigmoid(x):
    """No overflow in exp, and no loss of small values."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """From exp, and near zero, where that cancels, the series."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    # Where the first term left out is below the type's precision.
    limit: tl.constexpr = 0.01 if x.dtype == tl.float64 else 0.25
    return tl.where(magnitude < limit, near, tl.where(x < 0, -far, far))


@triton.jit
def forward(CELL: tl.constexpr, x, rec, h, c):
    """One step of a cell, before the projection.

    Args: x, the gates from the input; rec, those of `W_hh h`, of the split gate with b_hh; h and c, the state.
    Returns: h_t or before a projection `o tanh(c)`; c_t; and the values of the reserve.
    """
    MODE: tl.constexpr = CELL.mode
    if MODE == LSTM:
        i, f, g, o = sigmoid(x[0] + rec[0]), sigmoid(x[1] + rec[1]), tanh(x[2] + rec[2]), sigmoid(x[3] + rec[3])
        c_new = f * c + i * g
        return o * tanh(c_new), c_new, (i, f, g, o)
    elif MODE == GRU:
        r, z = sigmoid(x[0] + rec[0]), sigmoid(x[1] + rec[1])
        n = tanh(x[2] + r * rec[2])
        return n + z * (h - n), c, (r, z, n, rec[2])
    elif MODE == MGU:
        f = sigmoid(x[0] + rec[0])
        n = tanh(x[1] + f * rec[1])
        return h + f * (n - h), c, (f, n, rec[1])
    elif MODE == RNN_TANH:
        return tanh(x[0] + rec[0]), c, ()
    elif MODE == RNN_RELU:
        a = x[0] + rec[0]
        # Not maximum(a, 0): a NaN stays one.
        return tl.where(a < 0, 0.0, a), c, ()
    elif MODE == RNN_SIGMOID:
        return sigmoid(x[0] + rec[0]), c, ()
    else:
        tl.static_assert(MODE == RNN_IDENTITY, "a cell without equations")
        return x[0] + rec[0], c, ()


@triton.jit
def backward(CELL: tl.constexpr, saved, h, c, h_new, c_new, dh, dc):
    """The derivative of `forward`.

    Args: saved, the reserve; h and c before the step, h_new and c_new after it; dh and dc, their gradients.
    Returns: the gradients of x; those of rec; what reaches the earlier state past the gates: the gradient of c where
        there is one, else a part of that of h.
    """
    MODE: tl.constexpr = CELL.mode
    if MODE == LSTM:
        i, f, g, o = saved
        tanh_c = tanh(c_new)
        d = dc + dh * o * (1 - tanh_c * tanh_c)
        dgates = (d * g * i * (1 - i), d * c * f * (1 - f), d * i * (1 - g * g), dh * tanh_c * o * (1 - o))
        return dgates, dgates, d * f
    elif MODE == GRU:
        r, z, n, rec_n = saved
        dn = dh * (1 - z) * (1 - n * n)
        dz = dh * (h - n) * z * (1 - z)
        dr = dn * rec_n * r * (1 - r)
        return (dr, dz, dn), (dr, dz, dn * r), dh * z
    elif MODE == MGU:
        f, n, rec_n = saved
        dn = dh * f * (1 - n * n)
        df = (dh * (n - h) + dn * rec_n) * f * (1 - f)
        return (df, dn), (df, dn * f), dh * (1 - f)
    elif MODE == RNN_TANH:
        d = dh * (1 - h_new * h_new)
        return (d,), (d,), dh
    elif MODE == RNN_RELU:
        d = tl.where(h_new <= 0, 0.0, dh)
        return (d,), (d,), dh
    elif MODE == RNN_SIGMOID:
        d = dh * h_new * (1 - h_new)
        return (d,), (d,), dh
    else:
        tl.static_assert(MODE == RNN_IDENTITY, "a cell without a derivative")
        return (dh,), (dh,), dh

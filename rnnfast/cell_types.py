"""What a cell is: the table of all cells, with their step equations and derivatives in plain PyTorch.

csrc/cells.h has the same table and equations for the compiled kernels, triton/cells.py the equations for Triton. Their
source: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html, .../torch.nn.GRU.html and
.../torch.nn.RNN.html; for the MGU https://arxiv.org/abs/1603.09420.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# hidden (B, H), the new cell state (B, H) or None, and what backward needs, each (B, H).
Stepped = tuple[Tensor, Tensor | None, tuple[Tensor, ...]]
# The gradients of gates (B, G*H), of recurrent (B, G*H), of h where it enters other than by recurrent, and of c: (B, H)
# each, or None.
SteppedBack = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


@dataclasses.dataclass(frozen=True)
class StepGradients:
    """What the derivative of a step is given, each (B, H)."""

    saved: tuple[Tensor, ...]  # as the step returned it
    h: Tensor  # before the step
    h_new: Tensor  # after it; only cells that save nothing look at it
    c: Tensor | None
    c_new: Tensor | None
    dh: Tensor  # gradient of `hidden`
    dc: Tensor | None  # gradient of the new cell state


@dataclasses.dataclass(frozen=True)
class CellType:
    """One cell.

    Attributes:
        mode: its name, as the ops and modules have it.
        gates: G, how many rows the weights have for each hidden unit.
        reserve: R, how many values forward saves for each hidden unit; 0: backward looks at h_t instead.
        step: (gates (B, G*H), recurrent (B, G*H), h (B, P or H), c (B, H) or None): one step, before a projection.
            gates is the input projection, recurrent `W_hh h`, with b_hh for the split gate.
        step_backward: its derivative.
        hidden: (the values that `step` saved, the new cell state): what a projection multiplies; None: there is no
            projection (`proj_size`) for this cell.
        has_cell_state: whether c_t is carried beside h_t.
        reads_previous_h: whether the step itself reads h, beside `W_hh h`.
        split_gate: the gate whose recurrent part `W_hh h + b_hh` is multiplied by another gate. Its b_hh is no part of
            the input projection, and the gradient of its recurrent part differs from that of its input part.
        memory_gates: which gates decide how long the state lasts, each with 1 where it keeps what was, with -1 where it
            takes in what is new.
        torch_cell: torch's own op for one step: (input, h, weight_ih, weight_hh, bias_ih, bias_hh); None: there is
            none, nor a module in torch.nn.
        torch_layers: torch's own op for layers whose state is one tensor.
    """

    mode: str
    gates: int
    reserve: int
    step: Callable[[Tensor, Tensor, Tensor, Tensor | None], Stepped]
    step_backward: Callable[[StepGradients], SteppedBack]
    hidden: Callable[[Sequence[Tensor], Tensor], Tensor] | None = None
    has_cell_state: bool = False
    reads_previous_h: bool = False
    split_gate: int | None = None
    memory_gates: tuple[tuple[int, int], ...] = ()
    torch_cell: Callable[..., Any] | None = None
    torch_layers: Callable[..., Any] | None = None

    @property
    def may_project(self) -> bool:
        return self.hidden is not None


def _lstm(gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor | None) -> Stepped:
    """Saves i, f, g, o."""
    assert c is not None
    i, f, g, o = (gates + recurrent).chunk(4, dim=-1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c = f * c + i * g
    return o * c.tanh(), c, (i, f, g, o)


def _lstm_backward(at: StepGradients) -> SteppedBack:
    assert at.c is not None
    assert at.c_new is not None
    assert at.dc is not None
    i, f, g, o = at.saved
    tanh_c = at.c_new.tanh()
    dc = at.dc + at.dh * o * (1 - tanh_c * tanh_c)
    di = dc * g * i * (1 - i)
    df = dc * at.c * f * (1 - f)
    dg = dc * i * (1 - g * g)
    do = at.dh * tanh_c * o * (1 - o)
    dgates = torch.cat([di, df, dg, do], dim=-1)
    return dgates, dgates, None, dc * f


def _gru(gates: Tensor, recurrent: Tensor, h: Tensor, _: Tensor | None) -> Stepped:
    """Saves r, z, n and `W_hn h + b_hn`."""
    gates_r, gates_z, gates_n = gates.chunk(3, dim=-1)
    recurrent_r, recurrent_z, recurrent_n = recurrent.chunk(3, dim=-1)
    r, z = (gates_r + recurrent_r).sigmoid(), (gates_z + recurrent_z).sigmoid()
    n = (gates_n + r * recurrent_n).tanh()
    return (1 - z) * n + z * h, None, (r, z, n, recurrent_n)


def _gru_backward(at: StepGradients) -> SteppedBack:
    r, z, n, recurrent_n = at.saved
    dz = at.dh * (at.h - n) * z * (1 - z)
    dn = at.dh * (1 - z) * (1 - n * n)
    dr = dn * recurrent_n * r * (1 - r)
    return torch.cat([dr, dz, dn], dim=-1), torch.cat([dr, dz, dn * r], dim=-1), at.dh * z, None


def _mgu(gates: Tensor, recurrent: Tensor, h: Tensor, _: Tensor | None) -> Stepped:
    """Saves f, n and `W_hn h + b_hn`."""
    gates_f, gates_n = gates.chunk(2, dim=-1)
    recurrent_f, recurrent_n = recurrent.chunk(2, dim=-1)
    f = (gates_f + recurrent_f).sigmoid()
    n = (gates_n + f * recurrent_n).tanh()
    return (1 - f) * h + f * n, None, (f, n, recurrent_n)


def _mgu_backward(at: StepGradients) -> SteppedBack:
    f, n, recurrent_n = at.saved
    dn = at.dh * f * (1 - n * n)
    df = (at.dh * (n - at.h) + dn * recurrent_n) * f * (1 - f)
    return torch.cat([df, dn], dim=-1), torch.cat([df, dn * f], dim=-1), at.dh * (1 - f), None


def _rnn(
    nonlinearity: str,
    function: Callable[[Tensor], Tensor],
    gradient: Callable[[Tensor, Tensor], Tensor],
    torch_cell: Callable[..., Any] | None = None,
    torch_layers: Callable[..., Any] | None = None,
) -> CellType:
    """The Elman RNN `h_t = function(gates + recurrent)`; gradient: (h_t, dh) to that of the argument."""

    def backward(at: StepGradients) -> SteppedBack:
        dgates = gradient(at.h_new, at.dh)
        return dgates, dgates, None, None

    return CellType(
        mode=f"RNN_{nonlinearity.upper()}",
        gates=1,
        reserve=0,
        step=lambda gates, recurrent, h, c: (function(gates + recurrent), None, ()),
        step_backward=backward,
        torch_cell=torch_cell,
        torch_layers=torch_layers,
    )


_RNNS = {
    "tanh": _rnn("tanh", torch.tanh, lambda h, dh: dh * (1 - h * h), torch.rnn_tanh_cell, torch.rnn_tanh),
    # relu'(0) = 0, and a NaN lets the gradient through: what torch.relu does.
    "relu": _rnn("relu", torch.relu, lambda h, dh: torch.where(h <= 0, 0, dh), torch.rnn_relu_cell, torch.rnn_relu),
    "identity": _rnn("identity", lambda gates: gates, lambda _, dh: dh),
    "sigmoid": _rnn("sigmoid", torch.sigmoid, lambda h, dh: dh * h * (1 - h)),
}

# By mode, in the order of csrc/cells.h.
CELLS: dict[str, CellType] = {
    cell.mode: cell
    for cell in (
        CellType(
            "LSTM", 4, 4, _lstm, _lstm_backward, hidden=lambda saved, c: saved[3] * c.tanh(), has_cell_state=True,
            memory_gates=((0, -1), (1, 1)), torch_cell=torch.lstm_cell,
        ),
        CellType(
            "GRU", 3, 4, _gru, _gru_backward, reads_previous_h=True, split_gate=2, memory_gates=((1, 1),),
            torch_cell=torch.gru_cell, torch_layers=torch.gru,
        ),
        *_RNNS.values(),
        CellType("MGU", 2, 3, _mgu, _mgu_backward, reads_previous_h=True, split_gate=1, memory_gates=((0, -1),)),
    )
}  # fmt: skip

# The modes of the RNN, by its nonlinearity.
NONLINEARITIES: dict[str, str] = {name: cell.mode for name, cell in _RNNS.items()}

"""The recurrence in plain PyTorch: the truth that every kernel is tested against.

The functions have the names, arguments and results of the ops in docs/design.md, for any floating dtype on any device:

* the forward pass is composed of differentiable operations, so it can be differentiated any number of times, in reverse
  and forward mode, and be mapped with ``torch.vmap`` over inputs, weights or both;
* the backward pass beside it is written by hand, uses no autograd, and is itself composed of differentiable operations.

The step equations and their derivatives stand once, in :func:`cell_step` and :func:`cell_step_backward`. Their source:
https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html, .../torch.nn.GRU.html and .../torch.nn.RNN.html; for
the projection https://arxiv.org/abs/1402.1128.

Parameters come as the ops take them, in the places of :mod:`rnnfast.signatures`.

Shapes: T steps, B batch, I input size, H hidden size, P projection size, D directions, G gates (LSTM 4: i f g o, GRU 3:
r z n, RNN 1). "rows" stands for the leading dimensions: (T, B), with batch_first (B, T), packed (sum of batch_sizes,).
One step without any has rows (B,): there states are (B, .), and h_n, which would be the output again, is (0,).
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from .signatures import BIAS_HH, BIAS_IH, HH, HR, IH, as_sequence, is_one_step, of_kind

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1, "RNN_IDENTITY": 1}
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "RNN_TANH": torch.tanh,
    "RNN_RELU": torch.relu,
    "RNN_IDENTITY": lambda gates: gates,
}

_Function = TypeVar("_Function", bound=Callable[..., Any])


# ---- the cells ------------------------------------------------------------------------------------------------------


def cell_step(
    mode: str, gates: Tensor, recurrent: Tensor, h: Tensor, c: Tensor | None
) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
    """One step of a cell, before the projection.

    Args:
        mode: a key of ``GATES``.
        gates: (B, G*H), the part of the pre-activations that comes from the input, see :func:`input_projection`.
        recurrent: (B, G*H), ``W_hh h``; for the GRU's n gate ``W_hn h + b_hn``.
        h: (B, P or H), the state before the step.
        c: (B, H), the LSTM's cell state before the step, otherwise None.

    Returns:
        hidden (B, H), the LSTM's new cell state (B, H) or None, and what the backward pass needs, each (B, H):
        LSTM i, f, g, o; GRU r, z, n and ``W_hn h + b_hn``; RNN nothing.
    """
    if mode == "LSTM":
        assert c is not None
        i, f, g, o = (gates + recurrent).chunk(4, dim=-1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * c + i * g
        return o * c.tanh(), c, (i, f, g, o)
    if mode == "GRU":
        gates_r, gates_z, gates_n = gates.chunk(3, dim=-1)
        recurrent_r, recurrent_z, recurrent_n = recurrent.chunk(3, dim=-1)
        r, z = (gates_r + recurrent_r).sigmoid(), (gates_z + recurrent_z).sigmoid()
        n = (gates_n + r * recurrent_n).tanh()
        return (1 - z) * n + z * h, None, (r, z, n, recurrent_n)
    return _ACTIVATIONS[mode](gates + recurrent), None, ()


def cell_step_backward(
    mode: str,
    saved: tuple[Tensor, ...],
    hidden: Tensor,
    h: Tensor,
    c: Tensor | None,
    c_new: Tensor | None,
    grad_hidden: Tensor,
    grad_c_new: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The derivative of :func:`cell_step`.

    Args:
        mode, h, c: as there.
        saved, hidden, c_new: what that step returned (hidden is read by the RNN only).
        grad_hidden, grad_c_new: (B, H), the gradients of hidden and c_new.

    Returns:
        The gradients of gates (B, G*H), of recurrent (B, G*H), of h where it enters other than by recurrent (GRU:
        (B, H), otherwise None), and of c (LSTM: (B, H), otherwise None).
    """
    if mode == "LSTM":
        assert c is not None
        assert c_new is not None
        assert grad_c_new is not None
        i, f, g, o = saved
        tanh_c = c_new.tanh()
        dc = grad_c_new + grad_hidden * o * (1 - tanh_c * tanh_c)
        di = dc * g * i * (1 - i)
        df = dc * c * f * (1 - f)
        dg = dc * i * (1 - g * g)
        do = grad_hidden * tanh_c * o * (1 - o)
        dgates = torch.cat([di, df, dg, do], dim=-1)
        return dgates, dgates, None, dc * f
    if mode == "GRU":
        r, z, n, recurrent_n = saved
        dz = grad_hidden * (h - n) * z * (1 - z)
        dn = grad_hidden * (1 - z) * (1 - n * n)
        dr = dn * recurrent_n * r * (1 - r)
        return torch.cat([dr, dz, dn], dim=-1), torch.cat([dr, dz, dn * r], dim=-1), grad_hidden * z, None
    if mode == "RNN_TANH":
        dgates = grad_hidden * (1 - hidden * hidden)
    elif mode == "RNN_RELU":
        # relu'(0) = 0, and a NaN lets the gradient through: what torch.relu does
        dgates = torch.where(hidden <= 0, 0, grad_hidden)
    else:
        dgates = grad_hidden
    return dgates, dgates, None, None


# ---- rows: one layout inside, three outside -------------------------------------------------------------------------


def _masked(mask: Tensor | None, value: Tensor) -> Tensor:
    """value where mask holds, else zero: not a product, so that NaN and its gradient stop here."""
    return value if mask is None else torch.where(mask, value, 0)


def _select(mask: Tensor | None, value: Tensor, other: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, other)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """How the rows of a call lie, and which of them count.

    Inside, everything is dense and time-major; :meth:`read` and :meth:`write` translate. ``alive`` (T, B, 1) is False
    where a row has ended, ``boundary`` (T, B, 1) is True where a segment begins; None where that holds nowhere.
    """

    steps: int
    batch: int
    batch_first: bool
    alive: Tensor | None
    boundary: Tensor | None
    # packed only: the row that (t, b) is read from, (T*B,), and the position t*B + b where each row is found, (rows,)
    sources: Tensor | None = None
    positions: Tensor | None = None

    @staticmethod
    def of(
        like: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, batch_first: bool
    ) -> "_Rows":
        """The layout of a call whose tensors of rows are shaped like ``like``, (rows, features)."""
        if batch_sizes is not None:
            sizes = batch_sizes.tolist()
            steps, batch = len(sizes), max(sizes, default=0)
            taken = torch.arange(batch) < batch_sizes.unsqueeze(1)
            row = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1) + torch.arange(batch)
            # a place without a row reads row 0, and read() masks it
            sources = torch.where(taken, row, 0).flatten().to(like.device)
            positions = taken.flatten().nonzero().squeeze(1).to(like.device)
            return _Rows(steps, batch, False, taken.unsqueeze(2).to(like.device), None, sources, positions)
        batch, steps = like.shape[:2] if batch_first else (like.shape[1], like.shape[0])
        alive: Tensor | None = None
        boundary: Tensor | None = None
        if lengths is not None:
            alive = (torch.arange(steps, device=like.device).unsqueeze(1) < lengths).unsqueeze(2)
        if resets is not None:
            boundary = (resets.transpose(0, 1) if batch_first else resets).unsqueeze(2)
            boundary = boundary if alive is None else boundary & alive
        return _Rows(steps, batch, batch_first, alive, boundary)

    def read(self, value: Tensor) -> Tensor:
        """(rows, F) to (T, B, F), zero where there is no row or where it has ended."""
        if self.sources is not None:
            value = value.index_select(0, self.sources).reshape(self.steps, self.batch, value.shape[-1])
        elif self.batch_first:
            value = value.transpose(0, 1)
        return _masked(self.alive, value)

    def write(self, value: Tensor) -> Tensor:
        """(T, B, F) to (rows, F), contiguous, zero where a row has ended."""
        if self.positions is not None:
            return value.reshape(self.steps * self.batch, value.shape[-1]).index_select(0, self.positions)
        value = _masked(self.alive, value)
        return (value.transpose(0, 1) if self.batch_first else value).contiguous()

    def order(self, reverse: bool) -> Iterable[int]:
        """The steps in the order in which a direction takes them."""
        return reversed(range(self.steps)) if reverse else range(self.steps)

    def masks(self, reverse: bool) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Per step (B, 1): whether the row is alive, and whether its step takes over the state (no boundary before it).

        The reversed direction crosses the boundary of t on its way from t to t-1; one beyond a row's end is none.
        """
        keep = self.alive
        if self.boundary is not None:
            boundary = self.boundary
            if reverse:
                boundary = torch.cat([boundary[1:], torch.zeros_like(boundary[:1])])
            keep = ~boundary if self.alive is None else self.alive & ~boundary
        nowhere: Sequence[Tensor | None] = [None] * self.steps
        return nowhere if self.alive is None else self.alive.unbind(), nowhere if keep is None else keep.unbind()

    def states_before(self, initial: Tensor, states: Tensor, reverse: bool) -> list[Tensor]:
        """The state that each step started from, in order of t, each (B, F).

        Args:
            initial: (B, F), the state before the first step.
            states: (T, B, F), the state after each step.
            reverse: whether the direction is the reversed one.
        """
        alive, keep = self.masks(reverse)
        after = states.unbind()
        before = [initial] * self.steps
        state = initial
        for t in self.order(reverse):
            before[t] = _masked(keep[t], state)
            state = _select(alive[t], after[t], state)
        return before


def zero_beyond(rows: Tensor, lengths: Tensor, batch_first: bool) -> Tensor:
    """`rows` (T, B, ...), or (B, T, ...), with zeros beyond each row's length.

    The time loop never reads what stands there, but a weight's gradient is one product over all steps, in which even a
    NaN times a gradient of zero would spread.
    """
    step = torch.arange(rows.shape[1 if batch_first else 0], device=rows.device)
    beyond = step >= lengths.unsqueeze(1) if batch_first else step.unsqueeze(1) >= lengths
    return rows.masked_fill(beyond.unsqueeze(-1), 0)


# ---- helpers --------------------------------------------------------------------------------------------------------


def _compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _op(function: _Function) -> _Function:
    """What every op's function here has round it.

    Autocast would round the products inside a step; what is asked for is decided by the dtypes that come in.
    """
    name = function.__name__

    @functools.wraps(function)
    def wrapper(mode: str, *given: Any) -> Any:
        if mode not in GATES:
            raise ValueError(f"{name}: mode must be one of {', '.join(GATES)}, got {mode!r}")
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            if is_one_step(name, (mode, *given)):
                return as_sequence(name, function, (mode, *given))
            return function(mode, *given)

    return wrapper  # type: ignore[return-value]


def _of_direction(value: Tensor, d: int, directions: int) -> Tensor:
    """(..., D*F) to direction d's (..., F)."""
    size = value.shape[-1] // directions
    return value.narrow(-1, d * size, size)


def _initial(state: Tensor | None, d: int, like: Tensor, batch: int, features: int) -> Tensor:
    """Direction d's initial state (B, F), in the dtype that steps compute in; None means zeros."""
    dtype = _compute_dtype(like.dtype)
    return like.new_zeros((batch, features), dtype=dtype) if state is None else state[d].to(dtype)


def _stack(values: Sequence[Tensor], empty: Tensor) -> Tensor:
    """Per step (B, F) to (T, B, F); without steps, no rows of the shape of ``empty`` (B, F)."""
    return torch.stack(list(values)) if values else empty.new_zeros((0, *empty.shape))


# ---- the ops --------------------------------------------------------------------------------------------------------


@_op
def input_projection(mode: str, input: Tensor, *places: Tensor | None) -> Tensor:
    """The pre-activations' part that does not depend on the state, for all steps and directions.

    Args:
        mode: LSTM, GRU, RNN_TANH, RNN_RELU or RNN_IDENTITY.
        input: (rows, I).
        places: weight_ih (G*H, I) and, with bias, bias_ih, bias_hh (G*H,) are read, of each direction.

    Returns:
        gates (rows, D*G*H), ``W_ih x + b_ih + b_hh``. For the GRU's n gate ``W_in x + b_in``: b_hn stands inside
        ``r * (W_hn h + b_hn)``.

    Raises:
        ValueError: mode is unknown.
    """
    dtype = _compute_dtype(input.dtype)
    parts = []
    bias_ih, bias_hh = of_kind(places, BIAS_IH), of_kind(places, BIAS_HH)
    for d, weight in enumerate(of_kind(places, IH)):
        bias = bias_ih[d].to(dtype) if bias_ih else None
        if bias_hh:
            # all gates but the GRU's n
            size = weight.shape[0] // 3 * 2 if mode == "GRU" else weight.shape[0]
            inner = F.pad(bias_hh[d][:size].to(dtype), (0, weight.shape[0] - size))
            bias = inner if bias is None else bias + inner
        parts.append(F.linear(input.to(dtype), weight.to(dtype), bias))
    return torch.cat(parts, dim=-1).to(input.dtype)


@_op
def recurrence_forward(
    mode: str,
    batch_first: bool,
    save_reserve: bool,
    gates: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All steps of one layer, in all its directions.

    16-bit types compute in float32: h_t is rounded to its storage type before step t+1 uses it, c_t stays in float32.

    Args:
        mode: LSTM, GRU, RNN_TANH, RNN_RELU or RNN_IDENTITY.
        batch_first: whether dense rows are (B, T).
        save_reserve: whether cell_states and reserve are wanted.
        gates: (rows, D*G*H), from :func:`input_projection`.
        hx, cx: (D, B, P or H), (D, B, H), None for zeros. cx is read by the LSTM only.
        batch_sizes: (T,) int64 on the CPU, for packed rows: row (t, b) stands at ``batch_sizes[:t].sum() + b``.
        lengths: (B,) int64, dense only: row b ends after lengths[b] steps, which may be 0.
        resets: bool (T, B), with batch_first (B, T), dense only: True at t starts a new segment at t. The state is
            zeroed before step t; in the reversed direction between step t and step t-1.
        places: of each direction weight_hh (G*H, P or H), with projection weight_hr (P, H), and for the GRU with bias
            bias_hh (3*H,), of which the n gate's part is read. The second direction runs reversed in time.

    Returns:
        output (rows, D*P or D*H), zero beyond a row's length; h_n (D, B, P or H) and c_n (D, B, H), the state after a
        row's last step; cell_states (rows, D*H), every c_t; reserve (rows, D*4*H), what the backward pass needs, see
        :func:`cell_step`. What does not apply has shape (0,): c_n and cell_states but for the LSTM, reserve for the RNN,
        cell_states and reserve without save_reserve.

    Raises:
        ValueError: mode is unknown.
    """
    weight_hh, weight_hr, bias_hh = of_kind(places, HH), of_kind(places, HR), of_kind(places, BIAS_HH)
    directions, is_lstm = len(weight_hh), mode == "LSTM"
    storage, compute = gates.dtype, _compute_dtype(gates.dtype)
    rows = _Rows.of(gates, batch_sizes, lengths, resets, batch_first)
    gates_in = rows.read(gates).to(compute)
    hidden_size = gates.shape[-1] // (directions * GATES[mode])
    outputs, cell_states, reserves, h_n, c_n = [], [], [], [], []
    for d in range(directions):
        reverse = d == 1
        weight = weight_hh[d].to(compute)
        projection = weight_hr[d].to(compute) if weight_hr else None
        bias = None
        if mode == "GRU" and bias_hh:
            # zero but for the n gate, whose bias is not part of gates
            bias = F.pad(bias_hh[d][2 * hidden_size :].to(compute), (2 * hidden_size, 0))
        h = _initial(hx, d, gates, rows.batch, weight.shape[1])
        c = _initial(cx, d, gates, rows.batch, hidden_size) if is_lstm else None
        alive, keep = rows.masks(reverse)
        gates_of = _of_direction(gates_in, d, directions).unbind()
        every_h, every_c, every_saved = [h] * rows.steps, [c] * rows.steps, [h] * rows.steps
        for t in rows.order(reverse):
            h_before = _masked(keep[t], h)
            c_before = None if c is None else _masked(keep[t], c)
            recurrent = F.linear(h_before, weight, bias)
            h_new, c_new, saved = cell_step(mode, gates_of[t], recurrent, h_before, c_before)
            if projection is not None:
                h_new = F.linear(h_new, projection)
            h = every_h[t] = _select(alive[t], h_new.to(storage).to(compute), h)
            if c is not None and c_new is not None:
                c = every_c[t] = _select(alive[t], c_new, c)
            if saved and save_reserve:
                every_saved[t] = torch.cat(saved, dim=-1)
        outputs.append(_stack(every_h, h))
        h_n.append(h)
        if c is not None:
            c_n.append(c)
            cell_states.append(_stack([c_t for c_t in every_c if c_t is not None], c))
        reserves.append(_stack(every_saved, h.new_zeros((rows.batch, 4 * hidden_size))))

    def of_rows(parts: list[Tensor]) -> Tensor:
        return rows.write(torch.cat(parts, dim=-1).to(storage))

    nothing = gates.new_empty(0)
    return (
        of_rows(outputs),
        torch.stack(h_n).to(storage),
        torch.stack(c_n).to(storage) if is_lstm else nothing,
        of_rows(cell_states) if is_lstm and save_reserve else nothing.clone(),
        of_rows(reserves) if mode in ("LSTM", "GRU") and save_reserve else nothing.clone(),
    )


@_op
def recurrence_backward(
    mode: str,
    batch_first: bool,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cell_states: Tensor | None,
    output: Tensor | None,
    cell_states: Tensor,
    reserve: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of :func:`recurrence_forward`, written out: no autograd in here.

    The gradients of the weights are products over all rows of what this returns with h_t, c_t and the input.

    Args:
        grad_output, grad_h_n, grad_c_n, grad_cell_states: the gradients of the results of those names, of their shapes; None
            for zero.
        output, cell_states, reserve: as returned by the forward pass with save_reserve. What lies beyond a row's length does
            not matter. The output of one step of an LSTM or GRU may be None.
        others: as given to the forward pass.

    Returns:
        grad_gates (rows, D*G*H), zero beyond a row's length; grad_gates_hh (rows, D*3*H), the GRU's gradient of
        ``W_hh h + b_hh``; grad_hx (D, B, P or H); grad_cx (D, B, H); grad_projected (rows, D*P), with projection the
        whole gradient of h_t. What does not apply has shape (0,): grad_gates_hh but for the GRU (elsewhere it would be
        grad_gates), grad_hx where hx is None, grad_cx where cx is None, grad_projected without projection.

    Raises:
        ValueError: mode is unknown.
    """
    weight_hh, weight_hr = of_kind(places, HH), of_kind(places, HR)
    directions, is_lstm = len(weight_hh), mode == "LSTM"
    if output is None:
        # One step: the state that entered it is hx, and no cell but the RNN looks at the one that came of it.
        output = reserve.new_zeros((*reserve.shape[:-1], weight_hh[0].shape[1]))
    storage, compute = output.dtype, _compute_dtype(output.dtype)
    rows = _Rows.of(output, batch_sizes, lengths, resets, batch_first)
    hidden_size = weight_hh[0].shape[0] // GATES[mode]

    def rows_of(value: Tensor, d: int) -> Tensor:
        return rows.read(_of_direction(value, d, directions)).to(compute)

    dgates, dgates_hh, dprojected, dhx, dcx = [], [], [], [], []
    for d in range(directions):
        reverse = d == 1
        weight = weight_hh[d].to(compute)
        projection = weight_hr[d].to(compute) if weight_hr else None
        alive, keep = rows.masks(reverse)
        h_all = rows_of(output, d)
        h_after = h_all.unbind()
        h_before = rows.states_before(_initial(hx, d, output, rows.batch, weight.shape[1]), h_all, reverse)
        c_after: Sequence[Tensor | None] = [None] * rows.steps
        c_before = c_after
        saved: list[tuple[Tensor, ...]] = [()] * rows.steps
        if is_lstm:
            c_all = rows_of(cell_states, d)
            c_after = c_all.unbind()
            c_before = rows.states_before(_initial(cx, d, output, rows.batch, hidden_size), c_all, reverse)
        if mode in ("LSTM", "GRU"):
            saved = [part.chunk(4, dim=-1) for part in rows_of(reserve, d).unbind()]
        dh = _initial(grad_h_n, d, output, rows.batch, weight.shape[1])
        dc = _initial(grad_c_n, d, output, rows.batch, hidden_size) if is_lstm else None
        dh_outer = None if grad_output is None else rows_of(grad_output, d).unbind()
        dc_outer = None if grad_cell_states is None or not is_lstm else rows_of(grad_cell_states, d).unbind()
        every_dgates, every_dgates_hh, every_dh = [dh] * rows.steps, [dh] * rows.steps, [dh] * rows.steps
        for t in rows.order(not reverse):
            # the gradients of h_t and c_t: from the step after t (or h_n, c_n) and from the results of this step.
            # Where a row has ended, step t did nothing: they are zero, and dh and dc go on to its last step
            dh_t = _masked(alive[t], dh if dh_outer is None else dh + dh_outer[t])
            dc_t = None
            if dc is not None:
                dc_t = _masked(alive[t], dc if dc_outer is None else dc + dc_outer[t])
            dhidden = dh_t if projection is None else dh_t @ projection
            dgates_t, dgates_hh_t, dh_direct, dc_before = cell_step_backward(
                mode, saved[t], h_after[t], h_before[t], c_before[t], c_after[t], dhidden, dc_t
            )
            dh_before = dgates_hh_t @ weight
            if dh_direct is not None:
                dh_before = dh_before + dh_direct
            dh = _select(alive[t], _masked(keep[t], dh_before), dh)
            if dc is not None and dc_before is not None:
                dc = _select(alive[t], _masked(keep[t], dc_before), dc)
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
        of_rows(dgates_hh) if mode == "GRU" else nothing,
        torch.stack(dhx).to(storage) if hx is not None else nothing.clone(),
        torch.stack(dcx).to(storage) if is_lstm and cx is not None else nothing.clone(),
        of_rows(dprojected) if weight_hr else nothing.clone(),
    )


@_op
def layer_forward(
    mode: str,
    batch_first: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *places: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`input_projection` and :func:`recurrence_forward` in one call: a whole layer.

    Args:
        input: (rows, I).
        others: as there.

    Returns:
        output, h_n, c_n, cell_states, reserve, as of :func:`recurrence_forward`.

    Raises:
        ValueError: mode is unknown.
    """
    if lengths is not None:
        input = zero_beyond(input, lengths, batch_first)
    gates = input_projection(mode, input, *places)
    return recurrence_forward(mode, batch_first, True, gates, hx, cx, batch_sizes, lengths, resets, *places)


def layer(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`layer_forward` without what only a backward pass needs: (output, h_n, c_n)."""
    output, h_n, c_n, _, _ = layer_forward(*arguments)
    return output, h_n, c_n


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """The product of two matrices.

    Args:
        a: (M, K), any strides.
        b: (K, N), any strides.

    Returns:
        (M, N), in the dtype of a; 16-bit types are summed in float32.
    """
    dtype = _compute_dtype(a.dtype)
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        return (a.to(dtype) @ b.to(dtype)).to(a.dtype)

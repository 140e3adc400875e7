"""The recurrences with options, in plain PyTorch: what all kernels for them are tested against.

One direction of one layer, composed of differentiable operations, so that it can be differentiated any number of times,
in reverse and forward mode, and be mapped. The sources of the equations stand in options.py and more_layers.py.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sequences import DenseRows, Sequences, masked, select
from ..signatures import compute_dtype
from .batch_norm import BatchNorm
from .options import Options


class Weights(NamedTuple):
    """The parameters of one direction that the time loop reads, in the order in which the ops have them.

    weight_hh (G*H, H / num_heads); bias_hn (H,): b_hh of the GRU's n where r multiplies it; the others as in `Options`.
    """

    weight_hh: Tensor
    bias_hn: Tensor | None = None
    weight_peephole: Tensor | None = None
    weight_norm_hh: Tensor | None = None
    weight_norm: Tensor | None = None
    bias_norm: Tensor | None = None
    weight_norm_c: Tensor | None = None
    bias_norm_c: Tensor | None = None


class Masks(NamedTuple):
    """What was drawn for one direction, None where nothing was.

    Attributes:
        recurrent: (B, H), what h is multiplied by in W_hh h.
        candidate: (B, H), what g or n is multiplied by.
        zoneout_h, zoneout_c: bool (rows, H), where the state is kept.
    """

    recurrent: Tensor | None = None
    candidate: Tensor | None = None
    zoneout_h: Tensor | None = None
    zoneout_c: Tensor | None = None


# Of these each step has its own, the others are one for each sequence.
MASKS_OF_STEPS = ("zoneout_h", "zoneout_c")


class Arguments(NamedTuple):
    """What one direction of one layer takes, in the order in which the op `variant_forward` has it.

    Attributes:
        mode: a key of `CELLS`.
        words: `Options.words`.
        eps: `Options.norm_eps`.
        zoneout_h, zoneout_c: where there is no mask: the part of the old state that is kept, its expectation.
        reverse: whether time runs backwards.
        num_heads: `Options.num_heads`.
        gates: (rows, G*H): what the input gives the gates, with every bias but bias_hn; with ``"separate"`` normalised,
            with ``"joint"`` not.
        hx, cx: (B, H), None for zeros.
        lx: (B, H), of the sLSTM: log n_0 + m_0, None for minus infinity, as with n_0 = 0.
    """

    mode: str
    words: str
    eps: float
    zoneout_h: float
    zoneout_c: float
    reverse: bool
    num_heads: int
    gates: Tensor
    hx: Tensor | None
    cx: Tensor | None
    lx: Tensor | None
    sequences: Sequences
    weights: Weights
    masks: Masks


# By mode of an RNN.
_NONLINEARITIES: dict[str, Callable[[Tensor], Tensor]] = {
    "RNN_TANH": torch.tanh,
    "RNN_RELU": torch.relu,
    "RNN_SIGMOID": torch.sigmoid,
    "RNN_IDENTITY": lambda value: value,
}


def recurrent_product(h: Tensor, weight: Tensor, num_heads: int) -> Tensor:
    """W_hh h (B, N) for h (B, H): with several heads W_hh has blocks on its diagonal alone, weight (N, H / num_heads)
    where N is a multiple of H, and row i of it meets the part of h that belongs to the head of unit i % H."""
    if num_heads == 1:
        return F.linear(h, weight)
    size = weight.shape[1]
    blocks = weight.unflatten(0, (-1, num_heads, size))
    return torch.einsum("bhk,ghjk->bghj", h.unflatten(-1, (num_heads, size)), blocks).flatten(1)


def hard_sigmoid(value: Tensor) -> Tensor:
    """clip(0.2 x + 0.5, 0, 1): as ONNX's HardSigmoid has it without attributes, and Keras 2."""
    # With no gradient at its corners, as the kernels have it.
    return F.hardtanh(0.2 * value + 0.5, 0, 1)


def normalised(value: Tensor, weight: Tensor, bias: Tensor | None, words: str, eps: float) -> Tensor:
    """N of (..., F): torch.nn.LayerNorm's, or with the word ``"rms"`` torch.nn.RMSNorm's, whose layers have no bias."""
    if "rms" in words.split():
        normed = F.rms_norm(value, weight.shape, weight, eps)
        return normed if bias is None else normed + bias
    return F.layer_norm(value, weight.shape, weight, bias, eps)


def input_gates(
    options: Options,
    mode: str,
    input: Tensor,
    weight_ih: Tensor,
    bias_ih: Tensor | None,
    bias_hh: Tensor | None,
    weight_norm_ih: Tensor | None,
    sequences: Sequences,
    batch_norm: BatchNorm | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What the input gives the gates of one direction, for all steps, in the input's type.

    Args:
        input: (rows, I).
        weight_ih: (G*H, I).
        bias_ih, bias_hh: (G*H,), or None.
        weight_norm_ih: (G*H,), with ``layer_norm="separate"``.
        sequences: which rows count.
        batch_norm: of this direction.

    Returns:
        gates (rows, G*H); bias_hn (H,): b_hh of the GRU's n where it stands inside ``r * (W_hn h + b_hn)``; and with a
        batch norm of each step the other biases (G*H,), which the gates then lack.
    """
    bias, bias_hn = bias_ih, None
    if bias_hh is not None:
        folded = bias_hh
        if mode == "GRU" and options.layer_norm != "joint" and options.reset_after and options.reset_gate:
            # Chunks that are views of a parameter are not to be handed out.
            reset, update, bias_hn = bias_hh.chunk(3)
            bias_hn = bias_hn.clone()
            folded = torch.cat([reset, update, torch.zeros_like(bias_hn)])
        bias = folded if bias is None else bias + folded
    if batch_norm is not None:
        gates = F.linear(input, weight_ih)
        if batch_norm.of_each_step:
            return gates, bias_hn, bias
        gates = batch_norm.of_input(gates, sequences)
        return gates if bias is None else gates + bias, bias_hn, None
    if options.layer_norm != "separate":
        return F.linear(input, weight_ih, bias), bias_hn, None
    assert weight_norm_ih is not None
    gates = normalised(F.linear(input, weight_ih), weight_norm_ih, None, options.words, options.norm_eps)
    return gates if bias is None else gates + bias, bias_hn, None


def _slstm(gates: Tensor, c: Tensor, log_n: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One step of the sLSTM: (gates (B, 4H), c / n, log n + m) to h and the new two.

    c / n is the mean of what it was and of z, weighted as exp(log f + m + log n) and exp(i): m itself drops out.
    """
    i, f, z, o = gates.chunk(4, dim=-1)
    a = F.logsigmoid(f) + log_n - i
    alpha, z = a.sigmoid(), z.tanh()
    c = z + alpha * (c - z)
    return o.sigmoid() * c, c, i - F.logsigmoid(-a)


def _as_it_is(value: Tensor) -> Tensor:
    return value


def _keep_old(mask: Tensor | None, share: float, old: Tensor, new: Tensor) -> Tensor:
    """Zoneout: the old value where the mask says so; without a mask that share of it."""
    if mask is not None:
        return torch.where(mask, old, new)
    return new if share == 0 else share * old + (1 - share) * new


def _step(arguments: Arguments, compute: torch.dtype) -> Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]:
    """One step: (gates (B, G*H), W_hh h (B, G*H), h, c, of the sLSTM log n + m, two masks of zoneout, each (B, H), what
    the tanh sees of c) to the new h, c and log n + m."""
    mode, words, eps, weights, masks = (
        arguments.mode, arguments.words, arguments.eps, arguments.weights, arguments.masks,
    )  # fmt: skip
    cast = [None if weight is None else weight.to(compute) for weight in weights]
    _, bias_hn, peephole, norm_hh, norm, norm_bias, norm_c, norm_c_bias = cast
    gate = hard_sigmoid if "hard_sigmoid" in words.split() else torch.sigmoid
    candidate = None if masks.candidate is None else masks.candidate.to(compute)
    joint, carried, reset_first = norm is not None, "carried" in words.split(), "reset_first" in words.split()
    activation = torch.relu if "relu" in words.split() else torch.tanh
    recurrent_mask = None if masks.recurrent is None else masks.recurrent.to(compute)

    def drop(value: Tensor) -> Tensor:
        return value if candidate is None else value * candidate

    def normalised_cell(c: Tensor) -> Tensor:
        return c if norm_c is None else normalised(c, norm_c, norm_c_bias, words, eps)

    def lstm(x: Tensor, recurrent: Tensor, c: Tensor, seen: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        parts = (x + recurrent).chunk(x.shape[-1] // c.shape[-1], dim=-1)
        peep = [] if peephole is None else list(peephole.chunk(len(parts) - 1))
        before_i = parts[0] + peep[0] * c if peep else parts[0]
        i = gate(before_i)
        if len(parts) == 3:
            f = 1 - i
        else:
            f = gate(parts[1] + peep[1] * c if peep else parts[1])
        new = f * c + i * drop(parts[-2].tanh())
        if carried:
            new = normalised_cell(new)
        o = gate(parts[-1] + peep[-1] * new if peep else parts[-1])
        return o * seen(new if carried else normalised_cell(new)).tanh(), new

    def gru(x: Tensor, recurrent: Tensor, h: Tensor) -> Tensor:
        if x.shape[-1] == 2 * h.shape[-1]:
            z, n = (x + recurrent).chunk(2, dim=-1)
            z = gate(z)
            return (1 - z) * drop(activation(n)) + z * h
        x_r, x_z, x_n = x.chunk(3, dim=-1)
        if joint:
            r, z = gate(x_r), gate(x_z)
            n = r * x_n
        elif reset_first:
            weight = cast[0]
            assert weight is not None
            r, z, _ = gate(x + recurrent).chunk(3, dim=-1)
            reset = r * (h if recurrent_mask is None else h * recurrent_mask)
            n = x_n + recurrent_product(reset, weight[2 * h.shape[-1] :], arguments.num_heads)
        else:
            recurrent_r, recurrent_z, recurrent_n = recurrent.chunk(3, dim=-1)
            r, z = gate(x_r + recurrent_r), gate(x_z + recurrent_z)
            n = x_n + r * (recurrent_n if bias_hn is None else recurrent_n + bias_hn)
        return (1 - z) * drop(activation(n)) + z * h

    def step(
        x: Tensor,
        recurrent: Tensor,
        h: Tensor,
        c: Tensor | None,
        log_n: Tensor | None,
        old_h: Tensor | None,
        old_c: Tensor | None,
        seen: Callable[[Tensor], Tensor],
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        if norm_hh is not None:
            recurrent = normalised(recurrent, norm_hh, None, words, eps)
        if norm is not None:
            x, recurrent = normalised(x + recurrent, norm, norm_bias, words, eps), torch.zeros_like(recurrent)
        new_c, new_log_n = None, None
        if log_n is not None:
            assert c is not None
            new_h, new_c, new_log_n = _slstm(x + recurrent, c, log_n)
        elif mode == "LSTM":
            assert c is not None
            new_h, new_c = lstm(x, recurrent, c, seen)
            new_c = _keep_old(old_c, arguments.zoneout_c, c, new_c)
        else:
            new_h = gru(x, recurrent, h) if mode == "GRU" else _NONLINEARITIES[mode](x + recurrent)
        return _keep_old(old_h, arguments.zoneout_h, h, new_h), new_c, new_log_n

    return step


def _numbers_of_steps(rows: DenseRows, sequences: Sequences, reverse: bool) -> dict[int, int]:
    """By time: the steps of a direction from 0 on, beginning with the first that any row has: what is padded beyond the
    longest row must not count."""
    order = list(rows.order(reverse))
    beyond = 0
    if reverse and sequences.lengths is not None and sequences.lengths.numel():
        beyond = rows.steps - int(sequences.lengths.max())
    return {t: max(number - beyond, 0) for number, t in enumerate(order)}


def forward(
    arguments: Arguments, batch_norm: BatchNorm | None = None, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer, all its steps.

    Args:
        arguments: as the ops take them.
        batch_norm: of each step, where there is one: then gates are W_ih x alone.
        bias: what is added to them behind it, (G*H,) or None.

    Returns:
        output (rows, H), zero beyond a row's length; h_n, c_n (B, H), the state after a row's last step; cell_states
        (rows, H), every c_t; l_n (B, H), of the sLSTM. What does not apply is (0,).
    """
    gates, sequences, masks = arguments.gates, arguments.sequences, arguments.masks
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        storage, compute = gates.dtype, compute_dtype(gates.dtype)
        rows = DenseRows.of(gates, sequences)
        x: Any = rows.read(gates).to(compute)
        if batch_norm is None:
            x = x.unbind()
        else:
            numbers = _numbers_of_steps(rows, sequences, arguments.reverse)
            x = batch_norm.steps_of_input(x, rows, numbers)
            x = [step if bias is None else step + bias.to(compute) for step in x]
        weight = arguments.weights.weight_hh.to(compute)
        hidden_size, has_cell = weight.shape[1] * arguments.num_heads, arguments.mode == "LSTM"

        def initial(state: Tensor | None) -> Tensor:
            zeros = gates.new_zeros((rows.batch, hidden_size), dtype=compute)
            return zeros if state is None else state.to(compute)

        def by_step(mask: Tensor | None) -> Any:
            return [None] * rows.steps if mask is None else (rows.read(mask.to(compute)) != 0).unbind()

        h = initial(arguments.hx)
        c = initial(arguments.cx) if has_cell else None
        log_n = None
        if "exponential" in arguments.words.split():
            nothing_yet = torch.full_like(h, -math.inf)
            log_n = nothing_yet if arguments.lx is None else arguments.lx.to(compute)
        recurrent_mask = None if masks.recurrent is None else masks.recurrent.to(compute)
        old_h, old_c = by_step(masks.zoneout_h), by_step(masks.zoneout_c)
        step = _step(arguments, compute)
        active, keep = rows.masks(arguments.reverse)
        every_h, every_c = [h] * rows.steps, [h] * rows.steps
        for t in rows.order(arguments.reverse):
            h_before = masked(keep[t], h)
            c_before = None if c is None else masked(keep[t], c)
            multiplied = h_before if recurrent_mask is None else h_before * recurrent_mask
            recurrent = recurrent_product(multiplied, weight, arguments.num_heads)
            seen: Callable[[Tensor], Tensor] = _as_it_is
            if batch_norm is not None:
                recurrent = batch_norm.of_recurrent(recurrent, numbers[t], active[t])
                seen = functools.partial(batch_norm.of_cell, step=numbers[t], counts=active[t])
            log_n_before = None if log_n is None else select(keep[t], log_n, nothing_yet)
            new_h, new_c, new_log_n = step(x[t], recurrent, h_before, c_before, log_n_before, old_h[t], old_c[t], seen)
            if log_n is not None and new_log_n is not None:
                log_n = select(active[t], new_log_n, log_n)
            h = every_h[t] = select(active[t], new_h.to(storage).to(compute), h)
            if c is not None and new_c is not None:
                c = every_c[t] = select(active[t], new_c, c)

        def of_rows(values: list[Tensor]) -> Tensor:
            stacked = torch.stack(values) if values else h.new_zeros((0, *h.shape))
            return rows.write(stacked.to(storage))

        nothing = gates.new_empty(0)
        return (
            of_rows(every_h),
            h.to(storage),
            nothing if c is None else c.to(storage),
            nothing.clone() if c is None else of_rows(every_c),
            nothing.clone() if log_n is None else log_n.to(storage),
        )

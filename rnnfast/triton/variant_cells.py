"""The equations of layers with options and their derivatives, for whole rows: those of variants/reference.py, where
sources are. csrc/variants/cells.h has the same for the kernels in C++.

Values are tiles of BLOCK_B rows and, where a norm looks on, all units of them; gates are tuples, as in cells.py. What
is not used, because the options do not have it, may be anything.
"""

# A kernel is not quite Python: its tuples grow, for one.
# mypy: disable-error-code="no-untyped-def, assignment"

from typing import NamedTuple

import triton
import triton.language as tl

from . import cells

# Of `Variant`, as constants of kernels compare them.
SEPARATE, JOINT = tl.constexpr(1), tl.constexpr(2)
OUTPUT, CARRIED = tl.constexpr(1), tl.constexpr(2)
BY_MASK, BY_SHARE = tl.constexpr(1), tl.constexpr(2)


class Variant(NamedTuple):
    """What kernels are told of a layer with options, their constant VARIANT; read as `cells.Cell` is, and of numbers
    for the same reason.

    Attributes:
        mode: number of the cell, as in cells.py.
        gates: G.
        reserve: how many values of (H,) a row saves for backward.
        gate_norm: 0, SEPARATE or JOINT.
        cell_norm: 0, OUTPUT or CARRIED.
        zoneout_h, zoneout_c: 0, BY_MASK or BY_SHARE.
        reset: whether there is r; reset_first: whether it multiplies h itself.
        bias_hn, peephole, norm, norm_bias, norm_c, norm_c_bias: where the gradient of that vector begins among all,
            in units of H; -1: there is no such vector.
        vectors: how many there are in all, in units of H.
    """

    mode: int
    gates: int
    reserve: int
    has_cell_state: bool
    exponential: bool
    coupled: bool
    reset: bool
    reset_first: bool
    relu: bool
    hard_sigmoid: bool
    rms: bool
    gate_norm: int
    cell_norm: int
    zoneout_h: int
    zoneout_c: int
    recurrent_mask: bool
    candidate_mask: bool
    splits_gradient: bool
    bias_hn: int
    peephole: int
    norm: int
    norm_bias: int
    norm_c: int
    norm_c_bias: int
    vectors: int


@triton.jit
def gate_activation(VARIANT: tl.constexpr, x):
    HARD: tl.constexpr = VARIANT.hard_sigmoid
    if HARD:
        y = 0.2 * x + 0.5
        # Not minimum and maximum: a NaN stays one.
        y = tl.where(y < 0, 0.0, y)
        return tl.where(y > 1, 1.0, y)
    else:
        return cells.sigmoid(x)


@triton.jit
def gate_slope(VARIANT: tl.constexpr, value):
    """The derivative, from the value."""
    HARD: tl.constexpr = VARIANT.hard_sigmoid
    if HARD:
        return tl.where((value > 0) & (value < 1), tl.full(value.shape, 0.2, value.dtype), 0.0)
    else:
        return value * (1 - value)


@triton.jit
def log_sigmoid(x):
    """min(x, 0) - log(1 + e) with e = exp(-|x|), whose digits are kept where 1 + e loses them."""
    e = tl.exp(-tl.abs(x))
    u = 1.0 + e
    lost = u == 1.0
    return tl.where(x > 0, 0.0, x) - tl.where(lost, e, tl.log(u) * (e / tl.where(lost, 1.0, u - 1.0)))


@triton.jit
def normalise(values, unit, count, eps, RMS: tl.constexpr):
    """Of rows that are tuples of tiles: (x - mean) / deviation, with the word "rms" x / root of the mean square; and 1
    / deviation (BLOCK_B, 1). Twice over the row: a large mean takes no digits from the deviation."""
    mean = tl.zeros((values[0].shape[0], 1), values[0].dtype)
    if not RMS:
        for i in tl.static_range(len(values)):
            mean += tl.sum(tl.where(unit, values[i], 0.0), 1)[:, None] / count
    squares = tl.zeros((values[0].shape[0], 1), values[0].dtype)
    for i in tl.static_range(len(values)):
        off = tl.where(unit, values[i] - mean, 0.0)
        squares += tl.sum(off * off, 1)[:, None]
    mean_square = squares / count
    # 1 / infinity would make zeros of what was too large, and hide it. A NaN is not below infinity either.
    scale = tl.where(mean_square < float("inf"), 1.0 / tl.sqrt(mean_square + eps), float("nan"))
    normed = ()
    for i in tl.static_range(len(values)):
        normed += ((values[i] - mean) * scale,)
    return normed, scale


@triton.jit
def normalise_backward(grads, normed, scale, unit, count, RMS: tl.constexpr):
    """From the gradients of what `normalise` gave, before weight and bias, to those of what it was given."""
    of_mean = tl.zeros((grads[0].shape[0], 1), grads[0].dtype)
    along = tl.zeros((grads[0].shape[0], 1), grads[0].dtype)
    for i in tl.static_range(len(grads)):
        if not RMS:
            of_mean += tl.sum(tl.where(unit, grads[i], 0.0), 1)[:, None] / count
        along += tl.sum(tl.where(unit, grads[i] * normed[i], 0.0), 1)[:, None] / count
    found = ()
    for i in tl.static_range(len(grads)):
        found += ((grads[i] - of_mean - normed[i] * along) * scale,)
    return found


@triton.jit
def _cell_seen(VARIANT: tl.constexpr, raw, norm_c, norm_c_bias, unit, H, eps):
    """What the tanh sees of f c + i g; that before weight and bias of the norm, and the norm's scale."""
    CELL_NORM: tl.constexpr = VARIANT.cell_norm
    RMS: tl.constexpr = VARIANT.rms
    if CELL_NORM:
        normed, scale = normalise((raw,), unit, H, eps, RMS)
        return normed[0] * norm_c + norm_c_bias, normed[0], scale
    else:
        return raw, raw, raw


@triton.jit
def lstm(VARIANT: tl.constexpr, gates, c, peepholes, candidate, norm_c, norm_c_bias, unit, H, eps):
    """One step: h, c before zoneout; and the values of the reserve.

    Args: gates, of input and h together; c, as it was; peepholes (1, N) of each; candidate, the mask of g; the norm of
        c's weight and bias (1, N).
    """
    COUPLED: tl.constexpr = VARIANT.coupled
    PEEPHOLE: tl.constexpr = VARIANT.peephole >= 0
    CELL_NORM: tl.constexpr = VARIANT.cell_norm
    OF_O: tl.constexpr = VARIANT.gates - 1
    i, g = gates[0], cells.tanh(gates[OF_O - 1])
    if PEEPHOLE:
        i += peepholes[0] * c
    i = gate_activation(VARIANT, i)
    if COUPLED:
        f = 1 - i
    else:
        f = gates[1]
        if PEEPHOLE:
            f += peepholes[1] * c
        f = gate_activation(VARIANT, f)
    raw = f * c + i * (g * candidate)
    seen, _, _ = _cell_seen(VARIANT, raw, norm_c, norm_c_bias, unit, H, eps)
    fresh = raw
    if CELL_NORM == CARRIED:
        fresh = seen
    o = gates[OF_O]
    if PEEPHOLE:
        o += peepholes[OF_O - 1] * fresh
    o = gate_activation(VARIANT, o)
    saved = (i, f, g, o)
    if COUPLED:
        saved = (i, g, o)
    return o * cells.tanh(seen), fresh, saved


@triton.jit
def lstm_backward(VARIANT: tl.constexpr, saved, c, dh, dc, peepholes, candidate, norm_c, norm_c_bias, unit, H, eps):
    """The derivative of `lstm`: of each gate, of the earlier c; of each peephole, and of weight and bias of the norm of
    c, what every row adds to their gradients."""
    COUPLED: tl.constexpr = VARIANT.coupled
    PEEPHOLE: tl.constexpr = VARIANT.peephole >= 0
    CELL_NORM: tl.constexpr = VARIANT.cell_norm
    RMS: tl.constexpr = VARIANT.rms
    OF_O: tl.constexpr = VARIANT.gates - 1
    i, g, o = saved[0], saved[OF_O - 1], saved[OF_O]
    f = saved[1]
    if COUPLED:
        f = 1 - i
    dropped = g * candidate
    raw = f * c + i * dropped
    seen, normed, scale = _cell_seen(VARIANT, raw, norm_c, norm_c_bias, unit, H, eps)
    tanh_c = cells.tanh(seen)
    d_o = dh * tanh_c * gate_slope(VARIANT, o)
    of_peephole_o = d_o
    if PEEPHOLE:
        fresh = raw
        if CELL_NORM == CARRIED:
            fresh = seen
        of_peephole_o = d_o * fresh
        dc += d_o * peepholes[OF_O - 1]
    d_seen = dh * o * (1 - tanh_c * tanh_c)
    beside = dc
    if CELL_NORM != OUTPUT:
        # c_t itself is what the tanh sees.
        d_seen += dc
        beside = tl.zeros(dc.shape, dc.dtype)
    if CELL_NORM:
        through = normalise_backward((d_seen * norm_c,), (normed,), scale, unit, H, RMS)
        dc = beside + through[0]
    else:
        dc = d_seen
    d_g = dc * i * candidate * (1 - g * g)
    if COUPLED:
        d_i = dc * (dropped - c) * gate_slope(VARIANT, i)
    else:
        d_i = dc * dropped * gate_slope(VARIANT, i)
    d_f = dc * c * gate_slope(VARIANT, f)
    earlier = dc * f
    if PEEPHOLE:
        earlier += d_i * peepholes[0]
        if not COUPLED:
            earlier += d_f * peepholes[1]
    dgates = (d_i, d_f, d_g, d_o)
    of_peepholes = (d_i * c, d_f * c, of_peephole_o)
    if COUPLED:
        dgates = (d_i, d_g, d_o)
        of_peepholes = (d_i * c, of_peephole_o)
    return dgates, earlier, of_peepholes, d_seen * normed, d_seen


@triton.jit
def slstm(gates, c, log_n):
    """One step of the sLSTM: h; c / n; log n + m; and the values of the reserve."""
    a = log_sigmoid(gates[1]) + log_n - gates[0]
    alpha, z, o = cells.sigmoid(a), cells.tanh(gates[2]), cells.sigmoid(gates[3])
    c = z + alpha * (c - z)
    return o * c, c, gates[0] - log_sigmoid(-a), (alpha, cells.sigmoid(gates[1]), z, o)


@triton.jit
def slstm_backward(saved, c, dh, dc, dl):
    """Its derivative: of each gate, of the earlier c / n, of the earlier log n + m."""
    alpha, f, z, o = saved
    new_c = z + alpha * (c - z)
    dc += dh * o
    of_mean = dc * (c - z) * alpha * (1 - alpha)
    d_a = of_mean + dl * alpha
    dgates = (dl * (1 - alpha) - of_mean, d_a * (1 - f), dc * (1 - alpha) * (1 - z * z), dh * new_c * o * (1 - o))
    return dgates, dc * alpha, d_a


@triton.jit
def gru(VARIANT: tl.constexpr, x, rec, h, candidate):
    """One step: h before zoneout, and the values of the reserve. rec: of n with b_hn."""
    RESET: tl.constexpr = VARIANT.reset
    RESET_FIRST: tl.constexpr = VARIANT.reset_first
    RELU: tl.constexpr = VARIANT.relu
    OF_N: tl.constexpr = VARIANT.gates - 1
    z = gate_activation(VARIANT, x[OF_N - 1] + rec[OF_N - 1])
    r = z
    if RESET:
        r = gate_activation(VARIANT, x[0] + rec[0])
    n = x[OF_N] + rec[OF_N]
    if RESET and not RESET_FIRST:
        n = x[OF_N] + r * rec[OF_N]
    if RELU:
        n = tl.where(n < 0, 0.0, n)
    else:
        n = cells.tanh(n)
    kept = n * candidate
    saved = (z, n)
    if RESET:
        saved = (r, z, n, rec[OF_N])
    return kept + z * (h - kept), saved


@triton.jit
def gru_backward(VARIANT: tl.constexpr, saved, h, dh, candidate):
    """Its derivative: of x; of rec; of h past the gates. It says nothing of r where that multiplies h itself, nor of x
    behind a joint norm, which makes one of x and rec."""
    RESET: tl.constexpr = VARIANT.reset
    RESET_FIRST: tl.constexpr = VARIANT.reset_first
    RELU: tl.constexpr = VARIANT.relu
    OF_Z: tl.constexpr = VARIANT.gates - 2
    z, n = saved[OF_Z], saved[OF_Z + 1]
    d = dh * (1 - z) * candidate
    if RELU:
        d_n = tl.where(n <= 0, 0.0, d)
    else:
        d_n = d * (1 - n * n)
    d_z = dh * (h - n * candidate) * gate_slope(VARIANT, z)
    if not RESET:
        return (d_z, d_n), (d_z, d_n), dh * z
    elif RESET_FIRST:
        return (d_z, d_z, d_n), (d_z, d_z, d_n), dh * z
    else:
        r = saved[0]
        d_r = d_n * saved[3] * gate_slope(VARIANT, r)
        return (d_r, d_z, d_n), (d_r, d_z, d_n * r), dh * z

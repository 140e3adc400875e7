"""The kernels of layers with options, one direction of one layer: two launches a step, so that the second sees whole
rows, as the kernels in C++ have it.

    multiply     W_hh h of a step, or backward W_hh^T times the later step's gradients, into a workspace
    forward      norms, cell, zoneout of a step, or `backward` their derivatives

Where r multiplies h itself (GRU) two more: `reset`, and `multiply` by W_hn alone. What of step.py's first paragraphs is
not about tiles and directions holds here too.
"""

# A kernel is not quite Python: its tuples grow, for one.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

import triton
import triton.language as tl

from . import cells, step
from . import table as tb
from . import variant_cells as vc

# So many turns of the backward pass are summed by themselves: not all one after the other, which would lose digits.
TURNS_SUMMED = tl.constexpr(64)


@triton.jit
def _tile(BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's batch rows and units."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    return b, tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)


@triton.jit
def _around(table, turn, b, BACKWARD: tl.constexpr):
    """Of batch rows b at this turn: the turn's number; whether each has a place, whether it is active, its row; whether
    it was active in the step before, and that row; the same of the step after; whether the state is cut in between."""
    d = tl.load(table + tb.REVERSE)
    turn, time, before_time, after_time = step._neighbours(table, d, turn, BACKWARD)
    has_place, active, row = tb.rows_at(table, time, b)
    _, before, before_row = tb.rows_at(table, before_time, b)
    _, after, after_row = tb.rows_at(table, after_time, b)
    cut = tb.cut_between(table, d, before_row, before & active, row, active)
    cut_after = tb.cut_between(table, d, row, active, after_row, after)
    return turn, has_place, active, row, before, before_row, after, after_row, cut, cut_after


@triton.jit
def _has_state(table, active, before, cut):
    """Whether ENTERING has what a row's step begins with; else that is zero."""
    return active & (cut == 0) & (before | tb.if_there(table, tb.HX, active))


@triton.jit(do_not_specialize=["turn"])
def multiply(
    table,
    turn,
    H,
    size,
    SLOT: tl.constexpr,
    FIRST: tl.constexpr,
    GATES: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W_hh times what a place of the table has of (B, H), into SUMS. A program takes BLOCK_N units of a head and gate.

    size: H / heads. FIRST: the first gate. GATES: of all there are.
    """
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    tiles = tl.cdiv(size, BLOCK_N)
    gate = FIRST + tl.program_id(1) // tiles
    n = (tl.program_id(1) % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, _, active, _, before, _, _, _, cut, _ = _around(table, turn, b, False)
    has_a = _has_state(table, active, before, cut)
    first = tl.program_id(2) * size
    a_row = tb.pointer(table, SLOT, DTYPE) + b * H + first
    # cast, because Triton makes constants of sizes of 1
    w = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + tl.cast(gate * H + first, tl.int64) * size
    sums = step._product(
        a_row, has_a, size, w, size, n, size, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K, True
    )
    at = ((b * GATES + gate) * H + first)[:, None] + n[None, :]
    # Rows without a state before: not even 0 * inf of the weights.
    tb.write(table, tb.SUMS, at, tl.where(has_a[:, None], sums, 0.0), active[:, None] & (n < size)[None, :], COMPUTE)


@triton.jit(do_not_specialize=["turn"])
def multiply_backward(
    table,
    turn,
    H,
    size,
    SLOT: tl.constexpr,
    FIRST: tl.constexpr,
    COUNT: tl.constexpr,
    GATES: tl.constexpr,
    OF_LATER: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """W_hh^T times the gradients (rows, G*H) in a place of the table, into GRAD_ENTERING: those of the later step, or
    of this one. Of COUNT gates from FIRST on."""
    b, n = _tile(BLOCK_B, BLOCK_N)
    _, _, active, row, _, _, after, after_row, _, cut_after = _around(table, turn, b, True)
    has_a = active
    if OF_LATER:
        has_a = after & (cut_after == 0)
        row = after_row
    first = tl.program_id(2) * size
    sums = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)
    for gate in tl.static_range(FIRST, FIRST + COUNT):
        a_row = tb.pointer(table, SLOT, DTYPE) + row * GATES * H + (gate * H + first)
        w = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + tl.cast(gate * H + first, tl.int64) * size
        sums += step._product(
            a_row, has_a, size, w, size, n, size, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K, False
        )
    mask = has_a[:, None] & (n < size)[None, :]
    tb.write(table, tb.GRAD_ENTERING, (b * H + first)[:, None] + n[None, :], sums, mask, COMPUTE)


@triton.jit
def _of_units(table, SLOT: tl.constexpr, n, H, COUNT: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """COUNT parts (1, BLOCK_N) of a vector of the layer, zeros where there is none."""
    parts = ()
    for i in tl.static_range(COUNT):
        parts += (tb.read(table, SLOT, i * H + n, n < H, DTYPE, COMPUTE)[None, :],)
    return parts


@triton.jit
def _of_lstm(table, GATES: tl.constexpr, n, H, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """The peepholes; weight and bias of the norm of c; what is added to its variance."""
    peepholes = _of_units(table, tb.PEEPHOLE, n, H, GATES - 1, DTYPE, COMPUTE)
    (norm_c,) = _of_units(table, tb.NORM_C, n, H, 1, DTYPE, COMPUTE)
    (norm_c_bias,) = _of_units(table, tb.NORM_C_BIAS, n, H, 1, DTYPE, COMPUTE)
    return peepholes, norm_c, norm_c_bias, tb.number(table, tb.EPS, COMPUTE)


@triton.jit
def _found(
    table,
    OF_ROWS: tl.constexpr,
    INITIAL: tl.constexpr,
    before_at,
    at,
    from_step,
    from_initial,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """A state as a step found it: of the step before, or the initial one."""
    state = tb.read(table, OF_ROWS, before_at, from_step, DTYPE, COMPUTE)
    return state + tb.read(table, INITIAL, at, from_initial, DTYPE, COMPUTE)


@triton.jit
def _candidate_mask(table, VARIANT: tl.constexpr, at, mask, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    IS_THERE: tl.constexpr = VARIANT.candidate_mask
    if IS_THERE:
        return tb.read(table, tb.CANDIDATE_MASK, at, mask, DTYPE, COMPUTE)
    else:
        return tl.full(at.shape, 1.0, COMPUTE)


@triton.jit
def _kept(table, HOW: tl.constexpr, MASK: tl.constexpr, SHARE: tl.constexpr, at, mask, COMPUTE: tl.constexpr):
    """The part of the old state that zoneout keeps."""
    if HOW == vc.BY_MASK:
        return tl.where(tb.read(table, MASK, at, mask, tl.int8, tl.int32) != 0, 1.0, 0.0).to(COMPUTE)
    else:
        return tl.zeros(at.shape, COMPUTE) + tb.number(table, SHARE, COMPUTE)


@triton.jit
def _mixed(HOW: tl.constexpr, old, new, kept):
    """Zoneout. A choice where there is a mask, so that what is not chosen may be infinite."""
    if HOW == vc.BY_MASK:
        return tl.where(kept > 0, old, new)
    else:
        return kept * old + (1 - kept) * new


@triton.jit
def _shares(HOW: tl.constexpr, grad, kept):
    """Its derivative: the old value's share of a gradient, and the new one's."""
    if HOW == vc.BY_MASK:
        return tl.where(kept > 0, grad, 0.0), tl.where(kept > 0, 0.0, grad)
    else:
        return kept * grad, (1 - kept) * grad


@triton.jit
def _gate_parts(
    table, VARIANT: tl.constexpr, sums, active, row, n, H, unit, DTYPE: tl.constexpr, COMPUTE: tl.constexpr
):
    """What the input and what W_hh h give each gate, of which a joint norm makes one, and a norm's results before
    weight and bias, which it saves."""
    GATES: tl.constexpr = VARIANT.gates
    NORM: tl.constexpr = VARIANT.gate_norm
    RMS: tl.constexpr = VARIANT.rms
    runs = active[:, None] & unit
    at = (row * GATES * H)[:, None] + n[None, :]
    x = tb.read_each(table, tb.INPUT_PROJECTION, at, H, GATES, runs, DTYPE, COMPUTE)
    if NORM:
        values = sums
        if NORM == vc.JOINT:
            values = ()
            for gate in tl.static_range(GATES):
                values += (x[gate] + sums[gate],)
        eps = tb.number(table, tb.EPS, COMPUTE)
        normed, scale = vc.normalise(values, unit, GATES * H, eps, RMS)
        tb.write_each(table, tb.NORMED, at, H, normed, runs, DTYPE)
        tb.write(table, tb.SCALE, row[:, None], scale, active[:, None], COMPUTE)
        weight = _of_units(table, tb.NORM, n, H, GATES, DTYPE, COMPUTE)
        bias = _of_units(table, tb.NORM_BIAS, n, H, GATES, DTYPE, COMPUTE)
        rec = ()
        of_input = ()
        for gate in tl.static_range(GATES):
            rec += (normed[gate] * weight[gate] + bias[gate],)
            if NORM == vc.JOINT:
                of_input += (tl.zeros(sums[gate].shape, COMPUTE),)
            else:
                of_input += (x[gate],)
        return of_input, rec
    else:
        return x, sums


@triton.jit(do_not_specialize=["turn"])
def forward(
    table,
    turn,
    H,
    VARIANT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """All of a step but its product."""
    GATES: tl.constexpr = VARIANT.gates
    RESERVE: tl.constexpr = VARIANT.reserve
    MODE: tl.constexpr = VARIANT.mode
    HAS_CELL_STATE: tl.constexpr = VARIANT.has_cell_state
    EXPONENTIAL: tl.constexpr = VARIANT.exponential
    RESET: tl.constexpr = VARIANT.reset
    ZONEOUT_H: tl.constexpr = VARIANT.zoneout_h
    ZONEOUT_C: tl.constexpr = VARIANT.zoneout_c
    HAS_MASK: tl.constexpr = VARIANT.recurrent_mask
    b, n = _tile(BLOCK_B, BLOCK_N)
    turn, has_place, active, row, before, before_row, after, _, cut, _ = _around(table, turn, b, False)
    unit = (n < H)[None, :]
    runs = active[:, None] & unit
    from_output = runs & (before & (cut == 0))[:, None]
    from_initial = runs & ((before == 0) & (cut == 0))[:, None]
    at = (b * H)[:, None] + n[None, :]
    row_at = (row * H)[:, None] + n[None, :]
    sums = tb.read_each(table, tb.SUMS, (b * GATES * H)[:, None] + n[None, :], H, GATES, runs, COMPUTE, COMPUTE)
    x, rec = _gate_parts(table, VARIANT, sums, active, row, n, H, unit, DTYPE, COMPUTE)
    before_at = (before_row * H)[:, None] + n[None, :]
    h = _found(table, tb.OUTPUT, tb.HX, before_at, at, from_output, from_initial, DTYPE, COMPUTE)
    candidate = _candidate_mask(table, VARIANT, at, runs, DTYPE, COMPUTE)
    new_h, new_c, log_n = h, h, h
    if HAS_CELL_STATE:
        c = tb.read(table, tb.CARRY, at, from_output, COMPUTE, COMPUTE)
        c += tb.read(table, tb.CX, at, from_initial, DTYPE, COMPUTE)
        gates = ()
        for gate in tl.static_range(GATES):
            gates += (x[gate] + rec[gate],)
        if EXPONENTIAL:
            # Minus infinity where nothing was taken in yet.
            given = tb.if_there(table, tb.LX, from_initial)
            before_n = tb.read(table, tb.CARRY_L, at, from_output, COMPUTE, COMPUTE)
            before_n += tb.read(table, tb.LX, at, from_initial, DTYPE, COMPUTE)
            before_n = tl.where(from_output | given, before_n, float("-inf"))
            new_h, new_c, log_n, saved = vc.slstm(gates, c, before_n)
        else:
            peepholes, norm_c, norm_c_bias, eps = _of_lstm(table, GATES, n, H, DTYPE, COMPUTE)
            new_h, new_c, saved = vc.lstm(VARIANT, gates, c, peepholes, candidate, norm_c, norm_c_bias, unit, H, eps)
            if ZONEOUT_C:
                kept = _kept(table, ZONEOUT_C, tb.KEPT_C, tb.ZONEOUT_C, row_at, runs, COMPUTE)
                new_c = _mixed(ZONEOUT_C, c, new_c, kept)
    elif MODE == cells.GRU:
        (bias_hn,) = _of_units(table, tb.BIAS_HN, n, H, 1, DTYPE, COMPUTE)
        if RESET:
            rec = (rec[0], rec[1], rec[2] + bias_hn)
        new_h, saved = vc.gru(VARIANT, x, rec, h, candidate)
    else:
        new_h, _, _ = cells.forward(VARIANT, x, rec, h, h)
        saved = (new_h,)
    if ZONEOUT_H:
        new_h = _mixed(ZONEOUT_H, h, new_h, _kept(table, ZONEOUT_H, tb.KEPT_H, tb.ZONEOUT_H, row_at, runs, COMPUTE))

    placed = has_place[:, None] & unit
    # A row without any step hands its initial state through.
    handed = tb.never_begins(table, b, turn == 0)[:, None] & unit
    final = (runs & (after == 0)[:, None]) | handed
    tb.write(table, tb.OUTPUT, row_at, tl.where(runs, new_h, 0.0), placed, DTYPE)
    tb.write(
        table, tb.H_N, at, tl.where(handed, tb.read(table, tb.HX, at, handed, DTYPE, COMPUTE), new_h), final, DTYPE
    )
    # What the next step multiplies: h as it was stored.
    entering = new_h.to(DTYPE).to(COMPUTE)
    if HAS_MASK:
        entering *= tb.read(table, tb.RECURRENT_MASK, at, runs, DTYPE, COMPUTE)
    tb.write(table, tb.ENTERING, at, entering, runs, DTYPE)
    if HAS_CELL_STATE:
        tb.write(table, tb.CARRY, at, new_c, runs, COMPUTE)
        tb.write(table, tb.CELL_STATES, row_at, tl.where(runs, new_c, 0.0), placed, DTYPE)
        cx = tb.read(table, tb.CX, at, handed, DTYPE, COMPUTE)
        tb.write(table, tb.C_N, at, tl.where(handed, cx, new_c), final, DTYPE)
    if EXPONENTIAL:
        tb.write(table, tb.CARRY_L, at, log_n, runs, COMPUTE)
        lx = tl.where(
            tb.if_there(table, tb.LX, handed), tb.read(table, tb.LX, at, handed, DTYPE, COMPUTE), float("-inf")
        )
        tb.write(table, tb.L_N, at, tl.where(handed, lx, log_n), final, DTYPE)
    saved = [tl.where(runs, value, 0.0) for value in saved]
    tb.write_each(table, tb.RESERVE, (row * RESERVE * H)[:, None] + n[None, :], H, saved, placed, DTYPE)


@triton.jit(do_not_specialize=["turn"])
def reset(
    table,
    turn,
    H,
    VARIANT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """r h, which W_hn multiplies, after the product of r and z."""
    GATES: tl.constexpr = VARIANT.gates
    b, n = _tile(BLOCK_B, BLOCK_N)
    _, _, active, row, before, _, _, _, cut, _ = _around(table, turn, b, False)
    unit = (n < H)[None, :]
    runs = active[:, None] & unit
    has_h = _has_state(table, active, before, cut)[:, None] & unit
    at = (b * H)[:, None] + n[None, :]
    x = tb.read(table, tb.INPUT_PROJECTION, (row * GATES * H)[:, None] + n[None, :], runs, DTYPE, COMPUTE)
    rec = tb.read(table, tb.SUMS, (b * GATES * H)[:, None] + n[None, :], runs, COMPUTE, COMPUTE)
    h = tb.read(table, tb.ENTERING, at, has_h, DTYPE, COMPUTE)
    tb.write(table, tb.RESET_STATE, at, vc.gate_activation(VARIANT, x + rec) * h, runs, DTYPE)


@triton.jit
def _add_up(
    table,
    VARIANT: tl.constexpr,
    FIRST: tl.constexpr,
    PART: tl.constexpr,
    turn,
    n,
    H,
    value,
    runs,
    COMPUTE: tl.constexpr,
):
    """Adds what the rows of this program give part PART of the gradient of a vector, which begins at FIRST among all of
    them; nothing where FIRST is -1."""
    VECTORS: tl.constexpr = VARIANT.vectors
    if FIRST >= 0:
        sums = tl.sum(tl.where(runs, value, 0.0), 0)
        piece = (turn // TURNS_SUMMED) * tl.num_programs(0) + tl.program_id(0)
        at = (tl.cast(piece, tl.int64) * VECTORS + FIRST + PART) * H + n
        # Turns past the last step, which a captured graph may have, have no place of their own.
        mask = (n < H) & (turn < tl.load(table + tb.STEPS))
        before = tb.read(table, tb.GRAD_VECTORS, at, mask, COMPUTE, COMPUTE)
        tb.write(table, tb.GRAD_VECTORS, at, before + sums, mask, COMPUTE)


@triton.jit(do_not_specialize=["turn"])
def backward(
    table,
    turn,
    H,
    VARIANT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The derivative of `forward`, after the product of the later step's gradients; one turn after the last, the
    gradients of the initial states."""
    GATES: tl.constexpr = VARIANT.gates
    RESERVE: tl.constexpr = VARIANT.reserve
    MODE: tl.constexpr = VARIANT.mode
    HAS_CELL_STATE: tl.constexpr = VARIANT.has_cell_state
    EXPONENTIAL: tl.constexpr = VARIANT.exponential
    RESET_FIRST: tl.constexpr = VARIANT.reset_first
    ZONEOUT_H: tl.constexpr = VARIANT.zoneout_h
    ZONEOUT_C: tl.constexpr = VARIANT.zoneout_c
    HAS_MASK: tl.constexpr = VARIANT.recurrent_mask
    NORM: tl.constexpr = VARIANT.gate_norm
    RMS: tl.constexpr = VARIANT.rms
    SPLITS: tl.constexpr = VARIANT.splits_gradient
    PEEPHOLE: tl.constexpr = VARIANT.peephole
    OF_BIAS_HN: tl.constexpr = VARIANT.bias_hn
    OF_NORM: tl.constexpr = VARIANT.norm
    OF_NORM_BIAS: tl.constexpr = VARIANT.norm_bias
    OF_NORM_C: tl.constexpr = VARIANT.norm_c
    OF_NORM_C_BIAS: tl.constexpr = VARIANT.norm_c_bias
    b, n = _tile(BLOCK_B, BLOCK_N)
    turn, has_place, active, row, before, before_row, after, _, cut, cut_after = _around(table, turn, b, True)
    unit = (n < H)[None, :]
    runs = active[:, None] & unit
    first = runs & (after == 0)[:, None]  # the first step of the backward pass
    comes_back = (after & (cut_after == 0))[:, None] & unit
    from_step = runs & (before & (cut == 0))[:, None]
    from_initial = runs & ((before == 0) & (cut == 0))[:, None]
    at = (b * H)[:, None] + n[None, :]
    row_at = (row * H)[:, None] + n[None, :]
    before_at = (before_row * H)[:, None] + n[None, :]

    later_h = tb.read(table, tb.GRAD_ENTERING, at, comes_back, COMPUTE, COMPUTE)
    if HAS_MASK:
        later_h *= tb.read(table, tb.RECURRENT_MASK, at, comes_back, DTYPE, COMPUTE)
    later_h += tb.read(table, tb.CARRY_H, at, comes_back, COMPUTE, COMPUTE)
    dh = later_h + tb.read(table, tb.GRAD_OUTPUT, row_at, runs, DTYPE, COMPUTE)
    dh += tb.read(table, tb.GRAD_H_N, at, first, DTYPE, COMPUTE)
    carry_h = tl.zeros(dh.shape, COMPUTE)
    if ZONEOUT_H:
        kept = _kept(table, ZONEOUT_H, tb.KEPT_H, tb.ZONEOUT_H, row_at, runs, COMPUTE)
        carry_h, dh = _shares(ZONEOUT_H, dh, kept)
    reserve_at = (row * RESERVE * H)[:, None] + n[None, :]
    saved = tb.read_each(table, tb.RESERVE, reserve_at, H, RESERVE, runs, DTYPE, COMPUTE)
    candidate = _candidate_mask(table, VARIANT, at, runs, DTYPE, COMPUTE)
    later_c, later_l, carry_c, carry_l = later_h, later_h, later_h, later_h
    if HAS_CELL_STATE:
        c = _found(table, tb.CELL_STATES, tb.CX, before_at, at, from_step, from_initial, DTYPE, COMPUTE)
        later_c = tb.read(table, tb.CARRY, at, comes_back, COMPUTE, COMPUTE)
        dc = later_c + tb.read(table, tb.GRAD_CELL_STATES, row_at, runs, DTYPE, COMPUTE)
        dc += tb.read(table, tb.GRAD_C_N, at, first, DTYPE, COMPUTE)
        if EXPONENTIAL:
            later_l = tb.read(table, tb.CARRY_L, at, comes_back, COMPUTE, COMPUTE)
            dl = later_l + tb.read(table, tb.GRAD_L_N, at, first, DTYPE, COMPUTE)
            dgates, carry_c, carry_l = vc.slstm_backward(saved, c, dh, dc, dl)
        else:
            kept_c = tl.zeros(dc.shape, COMPUTE)
            if ZONEOUT_C:
                kept = _kept(table, ZONEOUT_C, tb.KEPT_C, tb.ZONEOUT_C, row_at, runs, COMPUTE)
                kept_c, dc = _shares(ZONEOUT_C, dc, kept)
            peepholes, norm_c, norm_c_bias, eps = _of_lstm(table, GATES, n, H, DTYPE, COMPUTE)
            dgates, carry_c, of_peepholes, of_norm_c, of_norm_c_bias = vc.lstm_backward(
                VARIANT, saved, c, dh, dc, peepholes, candidate, norm_c, norm_c_bias, unit, H, eps
            )
            carry_c += kept_c
            for i in tl.static_range(GATES - 1):
                _add_up(table, VARIANT, PEEPHOLE, i, turn, n, H, of_peepholes[i], runs, COMPUTE)
            _add_up(table, VARIANT, OF_NORM_C, 0, turn, n, H, of_norm_c, runs, COMPUTE)
            _add_up(table, VARIANT, OF_NORM_C_BIAS, 0, turn, n, H, of_norm_c_bias, runs, COMPUTE)
        drec = dgates
    elif MODE == cells.GRU:
        h = _found(table, tb.OUTPUT, tb.HX, before_at, at, from_step, from_initial, DTYPE, COMPUTE)
        dgates, drec, past_gates = vc.gru_backward(VARIANT, saved, h, dh, candidate)
        carry_h += past_gates
        _add_up(table, VARIANT, OF_BIAS_HN, 0, turn, n, H, drec[GATES - 1], runs, COMPUTE)
    else:
        dgates, drec, _ = cells.backward(VARIANT, (), dh, dh, saved[0], dh, dh, dh)

    gates_at = (row * GATES * H)[:, None] + n[None, :]
    if NORM:
        normed = tb.read_each(table, tb.NORMED, gates_at, H, GATES, runs, DTYPE, COMPUTE)
        weight = _of_units(table, tb.NORM, n, H, GATES, DTYPE, COMPUTE)
        weighted = ()
        for gate in tl.static_range(GATES):
            _add_up(table, VARIANT, OF_NORM, gate, turn, n, H, drec[gate] * normed[gate], runs, COMPUTE)
            _add_up(table, VARIANT, OF_NORM_BIAS, gate, turn, n, H, drec[gate], runs, COMPUTE)
            weighted += (drec[gate] * weight[gate],)
        scale = tb.read(table, tb.SCALE, row[:, None], active[:, None], COMPUTE, COMPUTE)
        drec = vc.normalise_backward(weighted, normed, scale, unit, GATES * H, RMS)
        if NORM == vc.JOINT:
            dgates = drec
    placed = has_place[:, None] & unit
    # Of r where it multiplies h itself `reset_backward` has it.
    FIRST: tl.constexpr = 1 if RESET_FIRST else 0
    for gate in tl.static_range(FIRST, GATES):
        tb.write(table, tb.GRAD_GATES, gates_at + gate * H, tl.where(runs, dgates[gate], 0.0), placed, DTYPE)
        if SPLITS:
            tb.write(table, tb.GRAD_GATES_HH, gates_at + gate * H, tl.where(runs, drec[gate], 0.0), placed, DTYPE)
    tb.write(table, tb.CARRY_H, at, carry_h, runs, COMPUTE)
    # Rows whose last step is done hand on what came back; those without any step, what they were given.
    ends = ((active == 0) & after)[:, None] & unit
    handed = tb.never_begins(table, b, turn == tl.load(table + tb.STEPS))[:, None] & unit
    given = tb.read(table, tb.GRAD_H_N, at, handed, DTYPE, COMPUTE)
    tb.write(table, tb.GRAD_HX, at, tl.where(handed, given, later_h), ends | handed, DTYPE)
    if HAS_CELL_STATE:
        tb.write(table, tb.CARRY, at, carry_c, runs, COMPUTE)
        given = tb.read(table, tb.GRAD_C_N, at, handed, DTYPE, COMPUTE)
        tb.write(table, tb.GRAD_CX, at, tl.where(handed, given, later_c), ends | handed, DTYPE)
    if EXPONENTIAL:
        tb.write(table, tb.CARRY_L, at, carry_l, runs, COMPUTE)
        given = tb.read(table, tb.GRAD_L_N, at, handed, DTYPE, COMPUTE)
        tb.write(table, tb.GRAD_LX, at, tl.where(handed, given, later_l), ends | handed, DTYPE)


@triton.jit(do_not_specialize=["turn"])
def reset_backward(
    table,
    turn,
    H,
    VARIANT: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Of n = tanh(x_n + W_hn (r h)), after its product: to r, and past it to h."""
    GATES: tl.constexpr = VARIANT.gates
    RESERVE: tl.constexpr = VARIANT.reserve
    HAS_MASK: tl.constexpr = VARIANT.recurrent_mask
    b, n = _tile(BLOCK_B, BLOCK_N)
    _, has_place, active, row, before, before_row, _, _, cut, _ = _around(table, turn, b, True)
    unit = (n < H)[None, :]
    runs = active[:, None] & unit
    at = (b * H)[:, None] + n[None, :]
    grad = tb.read(table, tb.GRAD_ENTERING, at, runs, COMPUTE, COMPUTE)
    if HAS_MASK:
        grad *= tb.read(table, tb.RECURRENT_MASK, at, runs, DTYPE, COMPUTE)
    r = tb.read(table, tb.RESERVE, (row * RESERVE * H)[:, None] + n[None, :], runs, DTYPE, COMPUTE)
    from_step = runs & (before & (cut == 0))[:, None]
    from_initial = runs & ((before == 0) & (cut == 0))[:, None]
    before_at = (before_row * H)[:, None] + n[None, :]
    h = _found(table, tb.OUTPUT, tb.HX, before_at, at, from_step, from_initial, DTYPE, COMPUTE)
    d_r = tl.where(runs, grad * h * vc.gate_slope(VARIANT, r), 0.0)
    tb.write(table, tb.GRAD_GATES, (row * GATES * H)[:, None] + n[None, :], d_r, has_place[:, None] & unit, DTYPE)
    carry = tb.read(table, tb.CARRY_H, at, runs, COMPUTE, COMPUTE)
    tb.write(table, tb.CARRY_H, at, carry + grad * r, runs, COMPUTE)

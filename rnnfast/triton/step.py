"""One launch a step, any H: the kernels of a step's product and cell, forward and backward, all directions in one.

A program takes BLOCK_N hidden units (all their gates) of BLOCK_B batch rows of one direction. State needs no buffers of
its own: h_{t-1} is read from `output` (or hx), the later step's gradients from `grad_gates`; only c_t and what reaches
the earlier step past the gates are carried, in the compute type, in a workspace. A row that has ended, is cut by a
reset or has not begun is a matter of where it reads from. `turn` counts launches: a reversed direction starts at T - 1.
Turns past the last one do nothing.
"""

# A kernel is not quite Python: its tuples grow, for one.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

import triton
import triton.language as tl

from . import cells
from . import table as tb


@triton.jit
def _tile(BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's direction, batch rows and units."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    return tl.program_id(2).to(tl.int64), b, n


@triton.jit
def _neighbours(table, d, turn, BACKWARD: tl.constexpr):
    """The number of this turn, its step, and the steps before and after it in the order in which its direction goes."""
    last = tl.load(table + tb.STEPS) - 1
    turn += tl.load(table + tb.TURN)
    forward_in_time = (d == 0) != BACKWARD
    time = tl.where(forward_in_time, turn, last - turn)
    towards_later = tl.where(d == 0, 1, -1)
    return turn, time, time - towards_later, time + towards_later


@triton.jit
def _multiply_add(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b. float64 without tl.dot: where a load's mask comes from memory Triton 3.6 ends with an assertion,
    "Currently fp64 don't support largeK MMA"."""
    if acc.dtype == tl.float64:
        acc += tl.sum(a[:, :, None] * b[None, :, :], 1)
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def _product(
    a_row,
    has_a,
    size,
    w,
    w_row,
    n,
    width,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ALONG_SUM: tl.constexpr,
):
    """a w: (BLOCK_B, BLOCK_N). a_row: pointers to rows of `size` elements, read where has_a.

    w: with ALONG_SUM its rows belong to the results, n < width, and are w_row apart; else to the terms of the sum.
    """
    acc = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)
    # Without any row, no turn at all.
    end = tl.where(tl.max(has_a.to(tl.int32), 0) > 0, size, 0)
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_row[:, None] + k[None, :], mask=has_a[:, None] & (k < size)[None, :], other=0.0)
        mask = (k < size)[:, None] & (n < width)[None, :]
        if ALONG_SUM:
            b = tl.load(w + n[None, :] * w_row + k[:, None], mask=mask, other=0.0)
        else:
            b = tl.load(w + tl.arange(0, BLOCK_K)[:, None] * w_row + n[None, :], mask=mask, other=0.0)
            # The matrix may have more elements than 32 bits can count: a pointer that moves.
            w += BLOCK_K * w_row
        acc = _multiply_add(a.to(PRODUCT), b.to(PRODUCT), acc, PRECISION)
    return acc


@triton.jit
def _gate_products(
    h_row,
    has_h,
    size,
    w,
    H,
    n,
    GATES: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """`W_hh h` of every gate, a tuple of (BLOCK_B, BLOCK_N), in one loop: h is read once. w: (GATES*H, size)."""
    sums = ()
    for _ in tl.static_range(GATES):
        sums += (tl.zeros((BLOCK_B, BLOCK_N), COMPUTE),)
    end = tl.where(tl.max(has_h.to(tl.int32), 0) > 0, size, 0)
    # cast, because Triton makes a constant of an H of 1
    gate_size = tl.cast(H, tl.int64) * size
    for start in range(0, end, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        h = tl.load(h_row[:, None] + k[None, :], mask=has_h[:, None] & (k < size)[None, :], other=0.0)
        h = h.to(PRODUCT)
        # Within one gate 32 bits do; layers.py sees to it.
        at = n[None, :] * size + k[:, None]
        mask = (k < size)[:, None] & (n < H)[None, :]
        added = ()
        for gate in tl.static_range(GATES):
            b = tl.load(w + gate * gate_size + at, mask=mask, other=0.0).to(PRODUCT)
            added += (_multiply_add(h, b, sums[gate], PRECISION),)
        sums = added
    return sums


@triton.jit(do_not_specialize=["turn"])
def forward(
    table,
    turn,
    H,
    state_size,
    CELL: tl.constexpr,
    PROJECTED: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Gates and cell of one step. H hidden units, state_size elements of h."""
    GATES: tl.constexpr = CELL.gates
    RESERVE: tl.constexpr = CELL.reserve
    HAS_CELL_STATE: tl.constexpr = CELL.has_cell_state
    READS_PREVIOUS_H: tl.constexpr = CELL.reads_previous_h
    SPLIT_GATE: tl.constexpr = CELL.split_gate
    d, b, n = _tile(BLOCK_B, BLOCK_N)
    D = tl.num_programs(2)
    batch = tl.load(table + tb.BATCH)
    turn, time, before_time, after_time = _neighbours(table, d, turn, False)
    has_place, active, row = tb.rows_at(table, time, b)
    _, before, before_row = tb.rows_at(table, before_time, b)
    _, after, _ = tb.rows_at(table, after_time, b)
    cut = tb.cut_between(table, d, before_row, before, row, active)
    from_output = active & before & (cut == 0)
    from_initial = active & (before == 0) & (cut == 0)

    h_row = tl.where(
        from_output,
        tb.pointer(table, tb.OUTPUT, DTYPE) + (before_row * D + d) * state_size,
        tb.pointer(table, tb.HX, DTYPE) + (d * batch + b) * state_size,
    )
    has_h = from_output | tb.if_there(table, tb.HX, from_initial)
    w = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + d * GATES * H * state_size
    products = _gate_products(
        h_row, has_h, state_size, w, H, n, GATES, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K
    )

    unit = (n < H)[None, :]
    runs = active[:, None] & unit
    rec = ()
    for gate in tl.static_range(GATES):
        # Rows without a state before: not even 0 * inf of the weights.
        product = tl.where(has_h[:, None], products[gate], 0.0)
        if gate == SPLIT_GATE:
            product += tb.read(table, tb.BIAS_SPLIT, d * H + n, n < H, DTYPE, COMPUTE)[None, :]
        rec += (product,)
    gates_at = ((row * D + d) * GATES * H)[:, None] + n[None, :]
    x = tb.read_each(table, tb.INPUT_PROJECTION, gates_at, H, GATES, runs, DTYPE, COMPUTE)
    state_at = ((d * batch + b) * H)[:, None] + n[None, :]
    h, c = rec[0], rec[0]
    if READS_PREVIOUS_H:
        h = tl.load(h_row[:, None] + n[None, :], mask=has_h[:, None] & unit, other=0.0).to(COMPUTE)
    if HAS_CELL_STATE:
        c = tb.read(table, tb.CARRY, state_at, from_output[:, None] & unit, COMPUTE, COMPUTE)
        c += tb.read(table, tb.CX, state_at, from_initial[:, None] & unit, DTYPE, COMPUTE)
    h, c, saved = cells.forward(CELL, x, rec, h, c)

    # Where a row has ended, zero is written.
    placed = has_place[:, None] & unit
    row_at = ((row * D + d) * H)[:, None] + n[None, :]
    # A row without any step hands its initial state through.
    handed = tb.never_begins(table, b, turn == 0)[:, None] & unit
    final = (runs & (after == 0)[:, None]) | handed
    if PROJECTED:
        tb.write(table, tb.HIDDEN, state_at, h, runs, DTYPE)
    else:
        tb.write(table, tb.OUTPUT, row_at, tl.where(runs, h, 0.0), placed, DTYPE)
        hx = tb.read(table, tb.HX, state_at, handed, DTYPE, COMPUTE)
        tb.write(table, tb.H_N, state_at, tl.where(handed, hx, h), final, DTYPE)
    if HAS_CELL_STATE:
        tb.write(table, tb.CARRY, state_at, c, runs, COMPUTE)
        tb.write(table, tb.CELL_STATES, row_at, tl.where(runs, c, 0.0), placed, DTYPE)
        cx = tb.read(table, tb.CX, state_at, handed, DTYPE, COMPUTE)
        tb.write(table, tb.C_N, state_at, tl.where(handed, cx, c), final, DTYPE)
    reserve_at = ((row * D + d) * RESERVE * H)[:, None] + n[None, :]
    saved = [tl.where(runs, value, 0.0) for value in saved]
    tb.write_each(table, tb.RESERVE, reserve_at, H, saved, placed, DTYPE)


@triton.jit(do_not_specialize=["turn"])
def project_forward(
    table,
    turn,
    H,
    state_size,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h_t = W_hr (o tanh(c)), after `forward` of the same turn. A program's units are those of h."""
    d, b, n = _tile(BLOCK_B, BLOCK_N)
    D = tl.num_programs(2)
    batch = tl.load(table + tb.BATCH)
    turn, time, _, after_time = _neighbours(table, d, turn, False)
    has_place, active, row = tb.rows_at(table, time, b)
    _, after, _ = tb.rows_at(table, after_time, b)
    a_row = tb.pointer(table, tb.HIDDEN, DTYPE) + (d * batch + b) * H
    w = tb.pointer(table, tb.WEIGHT_HR, DTYPE) + d * state_size * H
    h = _product(a_row, active, H, w, H, n, state_size, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K, True)
    unit = (n < state_size)[None, :]
    runs = active[:, None] & unit
    state_at = ((d * batch + b) * state_size)[:, None] + n[None, :]
    row_at = ((row * D + d) * state_size)[:, None] + n[None, :]
    handed = tb.never_begins(table, b, turn == 0)[:, None] & unit
    hx = tb.read(table, tb.HX, state_at, handed, DTYPE, COMPUTE)
    tb.write(table, tb.OUTPUT, row_at, tl.where(runs, h, 0.0), has_place[:, None] & unit, DTYPE)
    tb.write(table, tb.H_N, state_at, tl.where(handed, hx, h), (runs & (after == 0)[:, None]) | handed, DTYPE)


@triton.jit(do_not_specialize=["turn"])
def backward(
    table,
    turn,
    H,
    state_size,
    CELL: tl.constexpr,
    PROJECTED: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gates' gradients of one step; one turn after the last, those of hx and cx."""
    GATES: tl.constexpr = CELL.gates
    RESERVE: tl.constexpr = CELL.reserve
    HAS_CELL_STATE: tl.constexpr = CELL.has_cell_state
    READS_PREVIOUS_H: tl.constexpr = CELL.reads_previous_h
    SPLIT_GATE: tl.constexpr = CELL.split_gate
    d, b, n = _tile(BLOCK_B, BLOCK_N)
    D = tl.num_programs(2)
    batch = tl.load(table + tb.BATCH)
    steps = tl.load(table + tb.STEPS)
    turn, time, before_time, after_time = _neighbours(table, d, turn, True)
    has_place, active, row = tb.rows_at(table, time, b)
    _, before, before_row = tb.rows_at(table, before_time, b)
    _, after, after_row = tb.rows_at(table, after_time, b)
    cut = tb.cut_between(table, d, before_row, before & active, row, active)
    cut_after = tb.cut_between(table, d, row, active, after_row, after)
    comes_back = after & (cut_after == 0)

    if PROJECTED:
        has_a = active
        a_row = tb.pointer(table, tb.GRAD_PROJECTED, DTYPE) + (row * D + d) * state_size
        w = tb.pointer(table, tb.WEIGHT_HR, DTYPE) + d * state_size * H
        dh = _product(
            a_row, has_a, state_size, w, H, n, H, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K, False
        )
    else:
        has_a = comes_back
        a_row = _later_gradients(table, (after_row * D + d) * GATES * H, SPLIT_GATE, DTYPE)
        w = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + d * GATES * H * state_size
        dh = _product(
            a_row, has_a, GATES * H, w, state_size, n, H, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N, BLOCK_K, False
        )
    dh = tl.where(has_a[:, None], dh, 0.0)

    unit = (n < H)[None, :]
    runs = active[:, None] & unit
    first = runs & (after == 0)[:, None]  # the first step of the backward pass
    state_at = ((d * batch + b) * H)[:, None] + n[None, :]
    row_at = ((row * D + d) * H)[:, None] + n[None, :]
    before_at = ((before_row * D + d) * H)[:, None] + n[None, :]
    from_step = runs & (before & (cut == 0))[:, None]
    from_initial = runs & ((before == 0) & (cut == 0))[:, None]
    if PROJECTED == 0:
        dh += tb.read(table, tb.GRAD_OUTPUT, row_at, runs, DTYPE, COMPUTE)
        dh += tb.read(table, tb.GRAD_H_N, state_at, first, DTYPE, COMPUTE)
    carry, dc, h, c, h_new, c_new = dh, dh, dh, dh, dh, dh
    if HAS_CELL_STATE or READS_PREVIOUS_H:
        carry = tb.read(table, tb.CARRY, state_at, comes_back[:, None] & unit, COMPUTE, COMPUTE)
    reserve_at = ((row * D + d) * RESERVE * H)[:, None] + n[None, :]
    saved = tb.read_each(table, tb.RESERVE, reserve_at, H, RESERVE, runs, DTYPE, COMPUTE)
    if HAS_CELL_STATE:
        c_new = tb.read(table, tb.CELL_STATES, row_at, runs, DTYPE, COMPUTE)
        c = tb.read(table, tb.CELL_STATES, before_at, from_step, DTYPE, COMPUTE)
        c += tb.read(table, tb.CX, state_at, from_initial, DTYPE, COMPUTE)
        dc = carry + tb.read(table, tb.GRAD_CELL_STATES, row_at, runs, DTYPE, COMPUTE)
        dc += tb.read(table, tb.GRAD_C_N, state_at, first, DTYPE, COMPUTE)
    if READS_PREVIOUS_H:
        dh += carry
        h = tb.read(table, tb.OUTPUT, before_at, from_step, DTYPE, COMPUTE)
        h += tb.read(table, tb.HX, state_at, from_initial, DTYPE, COMPUTE)
    if RESERVE == 0:
        h_new = tb.read(table, tb.OUTPUT, row_at, runs, DTYPE, COMPUTE)
    dgates, drec, carried = cells.backward(CELL, saved, h, c, h_new, c_new, dh, dc)

    placed = has_place[:, None] & unit
    gates_at = ((row * D + d) * GATES * H)[:, None] + n[None, :]
    # Both gradients of a gate before the next one's: fewer registers.
    for gate in tl.static_range(GATES):
        at = gates_at + gate * H
        tb.write(table, tb.GRAD_GATES, at, tl.where(runs, dgates[gate], 0.0), placed, DTYPE)
        if SPLIT_GATE >= 0:
            tb.write(table, tb.GRAD_GATES_HH, at, tl.where(runs, drec[gate], 0.0), placed, DTYPE)
    if HAS_CELL_STATE or READS_PREVIOUS_H:
        tb.write(table, tb.CARRY, state_at, carried, runs, COMPUTE)
    # Rows whose last step is done hand on what came back; those without any step, what they were given.
    ends = ((active == 0) & after)[:, None] & unit
    handed = tb.never_begins(table, b, turn == steps)[:, None] & unit
    if PROJECTED == 0:
        given = tb.read(table, tb.GRAD_H_N, state_at, handed, DTYPE, COMPUTE)
        back = tl.where(comes_back[:, None], dh, 0.0)
        tb.write(table, tb.GRAD_HX, state_at, tl.where(handed, given, back), ends | handed, DTYPE)
    if HAS_CELL_STATE:
        given = tb.read(table, tb.GRAD_C_N, state_at, handed, DTYPE, COMPUTE)
        tb.write(table, tb.GRAD_CX, state_at, tl.where(handed, given, carry), ends | handed, DTYPE)


@triton.jit
def _later_gradients(table, index, SPLIT_GATE: tl.constexpr, DTYPE: tl.constexpr):
    """Pointers to the gradients of `W_hh h`."""
    if SPLIT_GATE >= 0:
        return tb.pointer(table, tb.GRAD_GATES_HH, DTYPE) + index
    else:
        return tb.pointer(table, tb.GRAD_GATES, DTYPE) + index


@triton.jit(do_not_specialize=["turn"])
def project_backward(
    table,
    turn,
    H,
    state_size,
    CELL: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The gradient of h_t, and of hx, before `backward` of the same turn. A program's units are those of h."""
    GATES: tl.constexpr = CELL.gates
    SPLIT_GATE: tl.constexpr = CELL.split_gate
    d, b, n = _tile(BLOCK_B, BLOCK_N)
    D = tl.num_programs(2)
    batch = tl.load(table + tb.BATCH)
    turn, time, _, after_time = _neighbours(table, d, turn, True)
    has_place, active, row = tb.rows_at(table, time, b)
    _, after, after_row = tb.rows_at(table, after_time, b)
    cut_after = tb.cut_between(table, d, row, active, after_row, after)
    comes_back = after & (cut_after == 0)
    a_row = _later_gradients(table, (after_row * D + d) * GATES * H, SPLIT_GATE, DTYPE)
    w = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + d * GATES * H * state_size
    dh = _product(
        a_row, comes_back, GATES * H, w, state_size, n, state_size, COMPUTE, PRODUCT, PRECISION, BLOCK_B, BLOCK_N,
        BLOCK_K, False,
    )  # fmt: skip
    dh = tl.where(comes_back[:, None], dh, 0.0)
    unit = (n < state_size)[None, :]
    runs = active[:, None] & unit
    state_at = ((d * batch + b) * state_size)[:, None] + n[None, :]
    row_at = ((row * D + d) * state_size)[:, None] + n[None, :]
    ends = ((active == 0) & after)[:, None] & unit
    handed = tb.never_begins(table, b, turn == tl.load(table + tb.STEPS))[:, None] & unit
    given = tb.read(table, tb.GRAD_H_N, state_at, (runs & (after == 0)[:, None]) | handed, DTYPE, COMPUTE)
    tb.write(table, tb.GRAD_HX, state_at, tl.where(handed, given, dh), ends | handed, DTYPE)
    dh += tb.read(table, tb.GRAD_OUTPUT, row_at, runs, DTYPE, COMPUTE) + given
    tb.write(table, tb.GRAD_PROJECTED, row_at, tl.where(runs, dh, 0.0), has_place[:, None] & unit, DTYPE)

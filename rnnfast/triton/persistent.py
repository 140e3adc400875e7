"""One launch for the whole sequence, small H: a program owns BLOCK_B batch rows of one direction and its time loop.

All of W_hh stays on chip (in registers, as operands of the products), and so does the state: h in the storage type,
since that is what every step multiplies, c and the gradients in the compute type. Programs exchange nothing. What a
turn reads from memory does not depend on the turn before: it is loaded one turn ahead.
"""

# A kernel is not quite Python: its tuples grow, for one.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

import triton
import triton.language as tl

from . import cells
from . import table as tb


@triton.jit
def _weights(table, d, H, row, column, GATES: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr):
    """Every gate's square matrix. row, column: where its rows' and its columns' numbers lie in the tile."""
    first = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + d * GATES * H * H
    found = ()
    for gate in tl.static_range(GATES):
        at = first + gate * tl.cast(H, tl.int64) * H
        found += (tl.load(at + row * H + column, mask=(row < H) & (column < H), other=0.0).to(PRODUCT),)
    return found


@triton.jit
def _forward_inputs(table, time, d, b, n, H, GATES: tl.constexpr, DTYPE: tl.constexpr):
    """What a turn reads: its rows, whether a boundary stands before them, the gates."""
    has_place, active, row = tb.rows_at(table, time, b)
    boundary = tb.boundary_at(table, row, active)
    gates = tb.pointer(table, tb.INPUT_PROJECTION, DTYPE)
    at = ((row * tl.num_programs(1) + d) * GATES * H)[:, None] + n[None, :]
    mask = active[:, None] & (n < H)[None, :]
    x = ()
    for gate in tl.static_range(GATES):
        x += (tl.load(gates + at + gate * H, mask=mask, other=0.0),)
    return has_place, active, row, boundary, x


@triton.jit
def forward(
    table,
    H,
    CELL: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every step. H hidden units, at most BLOCK_N."""
    GATES: tl.constexpr = CELL.gates
    RESERVE: tl.constexpr = CELL.reserve
    HAS_CELL_STATE: tl.constexpr = CELL.has_cell_state
    SPLIT_GATE: tl.constexpr = CELL.split_gate
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    k = n
    D = tl.num_programs(1)
    steps = tl.load(table + tb.STEPS)
    batch = tl.load(table + tb.BATCH)
    w = _weights(table, d, H, n[None, :], k[:, None], GATES, DTYPE, PRODUCT)
    unit = (n < H)[None, :]
    in_batch = (b < batch)[:, None] & unit
    state_at = ((d * batch + b) * H)[:, None] + n[None, :]
    h = tb.read(table, tb.HX, state_at, in_batch, DTYPE, DTYPE)
    c = tb.read(table, tb.CX, state_at, in_batch, DTYPE, COMPUTE)
    bias = tb.read(table, tb.BIAS_SPLIT, d * H + n, n < H, DTYPE, COMPUTE)[None, :]
    zero = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)

    first = tl.where(d == 0, 0, steps - 1)
    onward = tl.where(d == 0, 1, -1)
    has_place, active, row, boundary, x = _forward_inputs(table, first, d, b, n, H, GATES, DTYPE)
    last_boundary = b < 0  # of the step before
    for turn in range(steps):
        following = first + (turn + 1) * onward
        next_place, next_active, next_row, next_boundary, next_x = _forward_inputs(
            table, following, d, b, n, H, GATES, DTYPE
        )
        cut = tb.between(d, last_boundary, boundary)[:, None]
        h_before = tl.where(cut, 0.0, h).to(DTYPE)
        c_before = tl.where(cut, 0.0, c)
        rec = ()
        for gate in tl.static_range(GATES):
            product = tl.dot(h_before.to(PRODUCT), w[gate], zero, input_precision=PRECISION)
            if gate == SPLIT_GATE:
                product += bias
            rec += (product,)
        h_new, c_new, saved = cells.forward(
            CELL, [value.to(COMPUTE) for value in x], rec, h_before.to(COMPUTE), c_before
        )
        runs = active[:, None] & unit
        placed = has_place[:, None] & unit
        row_at = ((row * D + d) * H)[:, None] + n[None, :]
        tb.write(table, tb.OUTPUT, row_at, tl.where(runs, h_new, 0.0), placed, DTYPE)
        if HAS_CELL_STATE:
            tb.write(table, tb.CELL_STATES, row_at, tl.where(runs, c_new, 0.0), placed, DTYPE)
        reserve_at = ((row * D + d) * RESERVE * H)[:, None] + n[None, :]
        saved = [tl.where(runs, value, 0.0) for value in saved]
        tb.write_each(table, tb.RESERVE, reserve_at, H, saved, placed, DTYPE)
        h = tl.where(active[:, None], h_new.to(DTYPE), h)
        c = tl.where(active[:, None], c_new, c)
        last_boundary = boundary
        has_place, active, row, boundary, x = next_place, next_active, next_row, next_boundary, next_x
    tb.write(table, tb.H_N, state_at, h, in_batch, DTYPE)
    if HAS_CELL_STATE:
        tb.write(table, tb.C_N, state_at, c, in_batch, DTYPE)


@triton.jit
def _backward_inputs(table, time, d, b, n, H, CELL: tl.constexpr, DTYPE: tl.constexpr):
    """What a turn reads: its rows, boundaries, the state after its step (c_t or h_t), the reserve, gradients."""
    RESERVE: tl.constexpr = CELL.reserve
    HAS_CELL_STATE: tl.constexpr = CELL.has_cell_state
    has_place, active, row = tb.rows_at(table, time, b)
    boundary = tb.boundary_at(table, row, active)
    D = tl.num_programs(1)
    mask = active[:, None] & (n < H)[None, :]
    at = ((row * D + d) * H)[:, None] + n[None, :]
    grad = tb.read(table, tb.GRAD_OUTPUT, at, mask, DTYPE, DTYPE)
    grad_c = grad
    if HAS_CELL_STATE:
        state = tb.read(table, tb.CELL_STATES, at, mask, DTYPE, DTYPE)
        grad_c = tb.read(table, tb.GRAD_CELL_STATES, at, mask, DTYPE, DTYPE)
    else:
        state = tb.read(table, tb.OUTPUT, at, mask, DTYPE, DTYPE)
    reserve_at = ((row * D + d) * RESERVE * H)[:, None] + n[None, :]
    saved = tb.read_each(table, tb.RESERVE, reserve_at, H, RESERVE, mask, DTYPE, DTYPE)
    return has_place, active, row, boundary, grad, grad_c, state, saved


@triton.jit
def backward(
    table,
    H,
    CELL: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every step backwards: dh and dc are what has come back to the state after the step at hand."""
    GATES: tl.constexpr = CELL.gates
    HAS_CELL_STATE: tl.constexpr = CELL.has_cell_state
    READS_PREVIOUS_H: tl.constexpr = CELL.reads_previous_h
    SPLIT_GATE: tl.constexpr = CELL.split_gate
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    k = n
    D = tl.num_programs(1)
    steps = tl.load(table + tb.STEPS)
    batch = tl.load(table + tb.BATCH)
    # The sum runs over the units of the gates: down the rows of W_hh.
    w = _weights(table, d, H, k[:, None], n[None, :], GATES, DTYPE, PRODUCT)
    unit = (n < H)[None, :]
    in_batch = (b < batch)[:, None] & unit
    state_at = ((d * batch + b) * H)[:, None] + n[None, :]
    dh = tb.read(table, tb.GRAD_H_N, state_at, in_batch, DTYPE, COMPUTE)
    dc, initial = dh, dh
    if HAS_CELL_STATE:
        dc = tb.read(table, tb.GRAD_C_N, state_at, in_batch, DTYPE, COMPUTE)
        initial = tb.read(table, tb.CX, state_at, in_batch, DTYPE, COMPUTE)
    else:
        initial = tb.read(table, tb.HX, state_at, in_batch, DTYPE, COMPUTE)
    zero = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)

    first = tl.where(d == 0, steps - 1, 0)
    onward = tl.where(d == 0, -1, 1)
    has_place, active, row, boundary, grad, grad_c, state, saved = _backward_inputs(
        table, first, d, b, n, H, CELL, DTYPE
    )
    for turn in range(steps):
        # The step that the direction takes before this one comes next here.
        next_place, next_active, next_row, next_boundary, next_grad, next_grad_c, next_state, next_saved = (
            _backward_inputs(table, first + (turn + 1) * onward, d, b, n, H, CELL, DTYPE)
        )
        cut = tb.between(d, next_boundary, boundary)[:, None]
        before = tl.where(cut, 0.0, tl.where(next_active[:, None], next_state.to(COMPUTE), initial))
        now = state.to(COMPUTE)
        dgates, drec, carried = cells.backward(
            CELL, [value.to(COMPUTE) for value in saved], before, before, now, now,
            dh + grad.to(COMPUTE), dc + grad_c.to(COMPUTE),
        )  # fmt: skip
        runs = active[:, None] & unit
        placed = has_place[:, None] & unit
        # Rows beyond their length have nothing to multiply either.
        dgates = [tl.where(runs, value, 0.0).to(DTYPE) for value in dgates]
        drec = [tl.where(runs, value, 0.0).to(DTYPE) for value in drec]
        gates_at = ((row * D + d) * GATES * H)[:, None] + n[None, :]
        tb.write_each(table, tb.GRAD_GATES, gates_at, H, dgates, placed, DTYPE)
        if SPLIT_GATE >= 0:
            tb.write_each(table, tb.GRAD_GATES_HH, gates_at, H, drec, placed, DTYPE)
        # Products after everything is written: up to a fifth of the registers less than gate by gate.
        back = zero
        for gate in tl.static_range(GATES):
            back = tl.dot(drec[gate].to(PRODUCT), w[gate], back, input_precision=PRECISION)
        if READS_PREVIOUS_H:
            back += carried
        dh = tl.where(active[:, None], tl.where(cut, 0.0, back), dh)
        if HAS_CELL_STATE:
            dc = tl.where(active[:, None], tl.where(cut, 0.0, carried), dc)
        has_place, active, row, boundary = next_place, next_active, next_row, next_boundary
        grad, grad_c, state, saved = next_grad, next_grad_c, next_state, next_saved
    tb.write(table, tb.GRAD_HX, state_at, dh, in_batch, DTYPE)
    if HAS_CELL_STATE:
        tb.write(table, tb.GRAD_CX, state_at, dc, in_batch, DTYPE)

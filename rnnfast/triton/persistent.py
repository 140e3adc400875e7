"""One launch for the whole sequence, small H: a program owns BLOCK_B batch rows of one direction and its time loop.

All of W_hh stays on chip (in registers, as operands of the products), and so does the state: h in the storage type,
since that is what every step multiplies, c and the gradients in the compute type. Programs exchange nothing. What a
turn reads from memory does not depend on the turn before: it is loaded one turn ahead.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from . import cells
from . import table as tb


@triton.jit
def _weight(table, d, gate: tl.constexpr, H, row, column, G: tl.constexpr, DTYPE: tl.constexpr, PRODUCT: tl.constexpr):
    """One gate's square matrix. row, column: where its rows' and its columns' numbers lie in the tile."""
    at = tb.pointer(table, tb.WEIGHT_HH, DTYPE) + d * G * H * H + gate * tl.cast(H, tl.int64) * H
    return tl.load(at + row * H + column, mask=(row < H) & (column < H), other=0.0).to(PRODUCT)


@triton.jit
def _forward_inputs(table, time, d, b, n, H, G: tl.constexpr, DTYPE: tl.constexpr):
    """What a turn reads: its rows, whether a segment begins there, the gates."""
    has_place, alive, row = tb.rows_at(table, time, b)
    reset = tb.resets_at(table, row, alive)
    gates = tb.pointer(table, tb.GATES, DTYPE)
    at = ((row * tl.num_programs(1) + d) * G * H)[:, None] + n[None, :]
    mask = alive[:, None] & (n < H)[None, :]
    x0 = tl.load(gates + at, mask=mask, other=0.0)
    x1, x2, x3 = x0, x0, x0
    if G > 1:
        x1 = tl.load(gates + at + H, mask=mask, other=0.0)
        x2 = tl.load(gates + at + 2 * H, mask=mask, other=0.0)
    if G > 3:
        x3 = tl.load(gates + at + 3 * H, mask=mask, other=0.0)
    return has_place, alive, row, reset, x0, x1, x2, x3


@triton.jit
def forward(
    table,
    H,
    MODE: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every step. H hidden units, at most BLOCK_N."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    k = n
    D = tl.num_programs(1)
    steps = tl.load(table + tb.STEPS)
    batch = tl.load(table + tb.BATCH)
    w0 = _weight(table, d, 0, H, n[None, :], k[:, None], G, DTYPE, PRODUCT)
    w1, w2, w3 = w0, w0, w0
    if G > 1:
        w1 = _weight(table, d, 1, H, n[None, :], k[:, None], G, DTYPE, PRODUCT)
        w2 = _weight(table, d, 2, H, n[None, :], k[:, None], G, DTYPE, PRODUCT)
    if G > 3:
        w3 = _weight(table, d, 3, H, n[None, :], k[:, None], G, DTYPE, PRODUCT)
    unit = (n < H)[None, :]
    in_batch = (b < batch)[:, None] & unit
    state_at = ((d * batch + b) * H)[:, None] + n[None, :]
    h = tb.read(table, tb.HX, state_at, in_batch, DTYPE, DTYPE)
    c = tb.read(table, tb.CX, state_at, in_batch, DTYPE, COMPUTE)
    bias_n = tb.read(table, tb.BIAS_N, d * H + n, n < H, DTYPE, COMPUTE)[None, :]
    zero = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)

    first = tl.where(d == 0, 0, steps - 1)
    onward = tl.where(d == 0, 1, -1)
    has_place, alive, row, reset, x0, x1, x2, x3 = _forward_inputs(table, first, d, b, n, H, G, DTYPE)
    met = b < 0  # whether a reversed direction met a boundary on leaving the step before
    for turn in range(steps):
        following = first + (turn + 1) * onward
        next_place, next_alive, next_row, next_reset, y0, y1, y2, y3 = _forward_inputs(
            table, following, d, b, n, H, G, DTYPE
        )
        cut = tl.where(d == 0, reset, met)[:, None]
        h_before = tl.where(cut, 0.0, h).to(DTYPE)
        c_before = tl.where(cut, 0.0, c)
        r0 = tl.dot(h_before.to(PRODUCT), w0, zero, input_precision=PRECISION)
        r1, r2, r3 = r0, r0, r0
        if G > 1:
            r1 = tl.dot(h_before.to(PRODUCT), w1, zero, input_precision=PRECISION)
            r2 = tl.dot(h_before.to(PRODUCT), w2, zero, input_precision=PRECISION)
        if G > 3:
            r3 = tl.dot(h_before.to(PRODUCT), w3, zero, input_precision=PRECISION)
        if MODE == cells.GRU:
            r2 += bias_n
        h_new, c_new, s0, s1, s2, s3 = cells.forward(
            MODE, x0.to(COMPUTE), x1.to(COMPUTE), x2.to(COMPUTE), x3.to(COMPUTE), r0, r1, r2, r3,
            h_before.to(COMPUTE), c_before,
        )  # fmt: skip
        runs = alive[:, None] & unit
        placed = has_place[:, None] & unit
        row_at = ((row * D + d) * H)[:, None] + n[None, :]
        tb.write(table, tb.OUTPUT, row_at, tl.where(runs, h_new, 0.0), placed, DTYPE)
        if MODE == cells.LSTM:
            tb.write(table, tb.CELL_STATES, row_at, tl.where(runs, c_new, 0.0), placed, DTYPE)
        if G > 1:
            reserve_at = ((row * D + d) * 4 * H)[:, None] + n[None, :]
            tb.write(table, tb.RESERVE, reserve_at, tl.where(runs, s0, 0.0), placed, DTYPE)
            tb.write(table, tb.RESERVE, reserve_at + H, tl.where(runs, s1, 0.0), placed, DTYPE)
            tb.write(table, tb.RESERVE, reserve_at + 2 * H, tl.where(runs, s2, 0.0), placed, DTYPE)
            tb.write(table, tb.RESERVE, reserve_at + 3 * H, tl.where(runs, s3, 0.0), placed, DTYPE)
        h = tl.where(alive[:, None], h_new.to(DTYPE), h)
        c = tl.where(alive[:, None], c_new, c)
        met = reset
        has_place, alive, row, reset = next_place, next_alive, next_row, next_reset
        x0, x1, x2, x3 = y0, y1, y2, y3
    tb.write(table, tb.H_N, state_at, h, in_batch, DTYPE)
    if MODE == cells.LSTM:
        tb.write(table, tb.C_N, state_at, c, in_batch, DTYPE)


@triton.jit
def _backward_inputs(
    table, time, d, b, n, H, MODE: tl.constexpr, G: tl.constexpr, DTYPE: tl.constexpr, COMPUTE: tl.constexpr
):
    """What a turn reads: its rows, resets, the state after its step (c_t or h_t), the reserve, gradients."""
    has_place, alive, row = tb.rows_at(table, time, b)
    reset = tb.resets_at(table, row, alive)
    D = tl.num_programs(1)
    mask = alive[:, None] & (n < H)[None, :]
    at = ((row * D + d) * H)[:, None] + n[None, :]
    grad = tb.read(table, tb.GRAD_OUTPUT, at, mask, DTYPE, DTYPE)
    grad_c = grad
    if MODE == cells.LSTM:
        state = tb.read(table, tb.CELL_STATES, at, mask, DTYPE, DTYPE)
        grad_c = tb.read(table, tb.GRAD_CELL_STATES, at, mask, DTYPE, DTYPE)
    else:
        state = tb.read(table, tb.OUTPUT, at, mask, DTYPE, DTYPE)
    s0 = state
    s1, s2, s3 = s0, s0, s0
    if G > 1:
        reserve_at = ((row * D + d) * 4 * H)[:, None] + n[None, :]
        s0 = tb.read(table, tb.RESERVE, reserve_at, mask, DTYPE, DTYPE)
        s1 = tb.read(table, tb.RESERVE, reserve_at + H, mask, DTYPE, DTYPE)
        s2 = tb.read(table, tb.RESERVE, reserve_at + 2 * H, mask, DTYPE, DTYPE)
        s3 = tb.read(table, tb.RESERVE, reserve_at + 3 * H, mask, DTYPE, DTYPE)
    return has_place, alive, row, reset, grad, grad_c, state, s0, s1, s2, s3


@triton.jit
def backward(
    table,
    H,
    MODE: tl.constexpr,
    G: tl.constexpr,
    DTYPE: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRODUCT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Every step backwards: dh and dc are what has come back to the state after the step at hand."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.program_id(1).to(tl.int64)
    n = tl.arange(0, BLOCK_N)
    k = n
    D = tl.num_programs(1)
    steps = tl.load(table + tb.STEPS)
    batch = tl.load(table + tb.BATCH)
    # The sum runs over the units of the gates: down the rows of W_hh.
    w0 = _weight(table, d, 0, H, k[:, None], n[None, :], G, DTYPE, PRODUCT)
    w1, w2, w3 = w0, w0, w0
    if G > 1:
        w1 = _weight(table, d, 1, H, k[:, None], n[None, :], G, DTYPE, PRODUCT)
        w2 = _weight(table, d, 2, H, k[:, None], n[None, :], G, DTYPE, PRODUCT)
    if G > 3:
        w3 = _weight(table, d, 3, H, k[:, None], n[None, :], G, DTYPE, PRODUCT)
    unit = (n < H)[None, :]
    in_batch = (b < batch)[:, None] & unit
    state_at = ((d * batch + b) * H)[:, None] + n[None, :]
    dh = tb.read(table, tb.GRAD_H_N, state_at, in_batch, DTYPE, COMPUTE)
    dc, initial = dh, dh
    if MODE == cells.LSTM:
        dc = tb.read(table, tb.GRAD_C_N, state_at, in_batch, DTYPE, COMPUTE)
        initial = tb.read(table, tb.CX, state_at, in_batch, DTYPE, COMPUTE)
    else:
        initial = tb.read(table, tb.HX, state_at, in_batch, DTYPE, COMPUTE)
    zero = tl.zeros((BLOCK_B, BLOCK_N), COMPUTE)

    first = tl.where(d == 0, steps - 1, 0)
    onward = tl.where(d == 0, -1, 1)
    has_place, alive, row, reset, grad, grad_c, state, s0, s1, s2, s3 = _backward_inputs(
        table, first, d, b, n, H, MODE, G, DTYPE, COMPUTE
    )
    for turn in range(steps):
        # The step that the direction takes before this one comes next here.
        (
            next_place, next_alive, next_row, next_reset, next_grad, next_grad_c, next_state, y0, y1, y2, y3,
        ) = _backward_inputs(table, first + (turn + 1) * onward, d, b, n, H, MODE, G, DTYPE, COMPUTE)  # fmt: skip
        cut = tl.where(d == 0, reset, next_reset)[:, None]
        before = tl.where(cut, 0.0, tl.where(next_alive[:, None], next_state.to(COMPUTE), initial))
        now = state.to(COMPUTE)
        d0, d1, d2, d3, d_rec_n, carried = cells.backward(
            MODE, s0.to(COMPUTE), s1.to(COMPUTE), s2.to(COMPUTE), s3.to(COMPUTE), before, before, now, now,
            dh + grad.to(COMPUTE), dc + grad_c.to(COMPUTE),
        )  # fmt: skip
        runs = alive[:, None] & unit
        placed = has_place[:, None] & unit
        # Rows beyond their length have nothing to multiply either.
        g0 = tl.where(runs, d0, 0.0).to(DTYPE)
        gates_at = ((row * D + d) * G * H)[:, None] + n[None, :]
        tb.write(table, tb.GRAD_GATES, gates_at, g0, placed, DTYPE)
        back = tl.dot(g0.to(PRODUCT), w0, zero, input_precision=PRECISION)
        if G > 1:
            g1 = tl.where(runs, d1, 0.0).to(DTYPE)
            g2 = tl.where(runs, d2, 0.0).to(DTYPE)
            tb.write(table, tb.GRAD_GATES, gates_at + H, g1, placed, DTYPE)
            tb.write(table, tb.GRAD_GATES, gates_at + 2 * H, g2, placed, DTYPE)
            if MODE == cells.GRU:
                g2 = tl.where(runs, d_rec_n, 0.0).to(DTYPE)
                tb.write(table, tb.GRAD_GATES_HH, gates_at, g0, placed, DTYPE)
                tb.write(table, tb.GRAD_GATES_HH, gates_at + H, g1, placed, DTYPE)
                tb.write(table, tb.GRAD_GATES_HH, gates_at + 2 * H, g2, placed, DTYPE)
            back = tl.dot(g1.to(PRODUCT), w1, back, input_precision=PRECISION)
            back = tl.dot(g2.to(PRODUCT), w2, back, input_precision=PRECISION)
        if G > 3:
            g3 = tl.where(runs, d3, 0.0).to(DTYPE)
            tb.write(table, tb.GRAD_GATES, gates_at + 3 * H, g3, placed, DTYPE)
            back = tl.dot(g3.to(PRODUCT), w3, back, input_precision=PRECISION)
        if MODE == cells.GRU:
            back += carried
        dh = tl.where(alive[:, None], tl.where(cut, 0.0, back), dh)
        if MODE == cells.LSTM:
            dc = tl.where(alive[:, None], tl.where(cut, 0.0, carried), dc)
        has_place, alive, row, reset = next_place, next_alive, next_row, next_reset
        grad, grad_c, state = next_grad, next_grad_c, next_state
        s0, s1, s2, s3 = y0, y1, y2, y3
    tb.write(table, tb.GRAD_HX, state_at, dh, in_batch, DTYPE)
    if MODE == cells.LSTM:
        tb.write(table, tb.GRAD_CX, state_at, dc, in_batch, DTYPE)

"""What a launch is given: a small table in device memory with every size and address of a call.

Kernels take the table, not pointers and sizes. So T and B are never part of what Triton specialises on, a tensor that
is absent is an address of zero behind a mask and not another compiled kernel, and a captured graph of launches serves
every later call of its shape: only the table is filled anew.
"""

# A kernel is not quite Python: its tuples grow, for one.
# mypy: disable-error-code="no-untyped-def, assignment, misc"

import triton
import triton.language as tl
from torch import Tensor

from ..sequences import Sequences

# The places in the table. Sizes and strides; strides count rows.
STEPS = tl.constexpr(0)
BATCH = tl.constexpr(1)
STEP_STRIDE = tl.constexpr(2)  # 0 for packed rows
BATCH_STRIDE = tl.constexpr(3)
TURN = tl.constexpr(4)  # the turns that earlier launches of a captured graph have done
# Addresses; 0 where there is no such tensor.
OFFSETS = tl.constexpr(5)  # (T + 1,) int64, packed rows: where each step's rows begin
LENGTHS = tl.constexpr(6)  # (B,) int64
RESETS = tl.constexpr(7)  # bool, one a row
HX = tl.constexpr(8)
CX = tl.constexpr(9)
WEIGHT_HH = tl.constexpr(10)  # (D, G*H, state_size)
WEIGHT_HR = tl.constexpr(11)  # (D, state_size, H)
BIAS_SPLIT = tl.constexpr(12)  # (D, H): b_hh of the split gate
CARRY = tl.constexpr(13)  # (D, B, H) in the compute type: c_t; backward: what reaches the earlier step past the gates
HIDDEN = tl.constexpr(14)  # (D, B, H), projected forward: o tanh(c)
OUTPUT = tl.constexpr(15)
CELL_STATES = tl.constexpr(16)
RESERVE = tl.constexpr(17)
INPUT_PROJECTION = tl.constexpr(18)
H_N = tl.constexpr(19)
C_N = tl.constexpr(20)
GRAD_OUTPUT = tl.constexpr(21)
GRAD_H_N = tl.constexpr(22)
GRAD_C_N = tl.constexpr(23)
GRAD_CELL_STATES = tl.constexpr(24)
GRAD_GATES = tl.constexpr(25)
GRAD_GATES_HH = tl.constexpr(26)
GRAD_HX = tl.constexpr(27)
GRAD_CX = tl.constexpr(28)
GRAD_PROJECTED = tl.constexpr(29)
# How many values one launch of `fill` writes, and the size of the table.
SIZE = 32

# Of layers with options, whose table is twice that size; those above serve them too, with one direction a call.
# CARRY is that of c, INPUT_PROJECTION what the input gives the gates, GRAD_GATES_HH the gradient of W_hh h.
REVERSE = tl.constexpr(32)  # 1 where time runs backwards
ENTERING = tl.constexpr(33)  # (B, H): what W_hh multiplies in the next step
RESET_STATE = tl.constexpr(34)  # (B, H): r h, where W_hn multiplies that
SUMS = tl.constexpr(35)  # (B, G*H) in the compute type: W_hh h
GRAD_ENTERING = tl.constexpr(36)  # (B, H) in the compute type: of what W_hh multiplied
CARRY_H = tl.constexpr(37)  # (B, H) in the compute type: what reaches the earlier h beside that
LX = tl.constexpr(38)  # (B, H): of the sLSTM; so the next four
L_N = tl.constexpr(39)
CARRY_L = tl.constexpr(40)  # in the compute type
GRAD_L_N = tl.constexpr(41)
GRAD_LX = tl.constexpr(42)
NORMED = tl.constexpr(43)  # (rows, G*H): of the norm of the gates, before weight and bias
SCALE = tl.constexpr(44)  # (rows,) in the compute type: 1 / deviation
BIAS_HN = tl.constexpr(45)  # vectors: `Weights` in variants/reference.py has their sizes
PEEPHOLE = tl.constexpr(46)
NORM = tl.constexpr(47)
NORM_BIAS = tl.constexpr(48)
NORM_C = tl.constexpr(49)
NORM_C_BIAS = tl.constexpr(50)
GRAD_VECTORS = tl.constexpr(51)  # (pieces of time, tiles of rows, all vectors) in the compute type
RECURRENT_MASK = tl.constexpr(52)  # (B, H)
CANDIDATE_MASK = tl.constexpr(53)  # (B, H)
KEPT_H = tl.constexpr(54)  # bool (rows, H)
KEPT_C = tl.constexpr(55)
EPS = tl.constexpr(56)  # the bits of a double; so the next two
ZONEOUT_H = tl.constexpr(57)
ZONEOUT_C = tl.constexpr(58)
SIZE_WITH_OPTIONS = 64


def of_sequences(sequences: Sequences, steps: int, batch: int) -> tuple[list[int], dict[str, Tensor | None]]:
    """What kernels are told of how rows lie: the sizes at the table's beginning, and tensors by their places' names."""
    if sequences.batch_sizes is not None:
        strides = [0, 1]
    else:
        strides = [1, steps] if sequences.batch_first else [batch, 1]
    return [steps, batch, *strides], {"lengths": sequences.lengths, "resets": sequences.resets}


@triton.jit
def advance(table, turns):
    """The last launch of a captured graph: its next replay goes on where this one ends."""
    tl.store(table + TURN, tl.load(table + TURN) + turns)


@triton.jit(do_not_specialize=[f"a{i}" for i in range(SIZE)])
def fill(
    table, a0: tl.int64, a1: tl.int64, a2: tl.int64, a3: tl.int64, a4: tl.int64, a5: tl.int64, a6: tl.int64,
    a7: tl.int64, a8: tl.int64, a9: tl.int64, a10: tl.int64, a11: tl.int64, a12: tl.int64, a13: tl.int64,
    a14: tl.int64, a15: tl.int64, a16: tl.int64, a17: tl.int64, a18: tl.int64, a19: tl.int64, a20: tl.int64,
    a21: tl.int64, a22: tl.int64, a23: tl.int64, a24: tl.int64, a25: tl.int64, a26: tl.int64, a27: tl.int64,
    a28: tl.int64, a29: tl.int64, a30: tl.int64, a31: tl.int64,
):  # fmt: skip
    """table[i] = a_i. A launch, because a copy from the host could not be captured in a graph.

    Not one argument that is a tuple: its elements could not be told to be 64-bit integers, and every pattern of small
    and large ones would be another compiled kernel.
    """
    values = (
        a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15, a16, a17, a18, a19, a20, a21, a22, a23,
        a24, a25, a26, a27, a28, a29, a30, a31,
    )  # fmt: skip
    for i in tl.static_range(len(values)):
        tl.store(table + i, values[i])


@triton.jit
def pointer(table, SLOT: tl.constexpr, DTYPE: tl.constexpr):
    """The address in a place of the table. Tensors begin at multiples of 16 bytes: that allows wide loads."""
    return tl.multiple_of(tl.load(table + SLOT).to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def if_there(table, SLOT: tl.constexpr, mask):
    """The mask where there is such a tensor. (Not `mask & ...`: the interpreter makes integers of a scalar's truth.)"""
    return tl.where(mask, tl.load(table + SLOT), 0) != 0


@triton.jit
def read(table, SLOT: tl.constexpr, index, mask, DTYPE: tl.constexpr, COMPUTE: tl.constexpr):
    """Elements at 64-bit indices, in the compute type; zero where the mask does not hold or there is no tensor."""
    value = tl.load(pointer(table, SLOT, DTYPE) + index, mask=if_there(table, SLOT, mask), other=0.0)
    return value.to(COMPUTE)


@triton.jit
def write(table, SLOT: tl.constexpr, index, value, mask, DTYPE: tl.constexpr):
    """Nothing where the mask does not hold or there is no tensor."""
    tl.store(pointer(table, SLOT, DTYPE) + index, value.to(DTYPE), mask=if_there(table, SLOT, mask))


@triton.jit
def read_each(table, SLOT: tl.constexpr, index, stride, COUNT: tl.constexpr, mask, DTYPE: tl.constexpr,
              COMPUTE: tl.constexpr):  # fmt: skip
    """`read` at COUNT indices that are `stride` apart: a tuple."""
    values = ()
    for i in tl.static_range(COUNT):
        values += (read(table, SLOT, index + i * stride, mask, DTYPE, COMPUTE),)
    return values


@triton.jit
def write_each(table, SLOT: tl.constexpr, index, stride, values, mask, DTYPE: tl.constexpr):
    """`write` of a tuple, to indices that are `stride` apart."""
    for i in tl.static_range(len(values)):
        write(table, SLOT, index + i * stride, values[i], mask, DTYPE)


@triton.jit
def number(table, SLOT: tl.constexpr, COMPUTE: tl.constexpr):
    """What is no whole number: the bits of a double."""
    return tl.load(table + SLOT).to(tl.float64, bitcast=True).to(COMPUTE)


@triton.jit
def rows_at(table, time, b):
    """The batch rows b, int64, at a step: whether each has a place there, whether it is active, its row.

    A dense row beyond its length has a place, to be written zero; a packed one has none.
    """
    steps = tl.load(table + STEPS)
    batch = tl.load(table + BATCH)
    inside = (time >= 0) & (time < steps)
    packed = tl.load(table + OFFSETS) != 0
    offsets = pointer(table, OFFSETS, tl.int64)
    first = tl.load(offsets + time, mask=inside & packed, other=0)
    end = tl.load(offsets + time + 1, mask=inside & packed, other=0)
    count = tl.where(packed, end - first, tl.where(inside, batch, 0))
    has_place = b < count
    active = has_place & (time < lengths_of(table, b))
    row = first + time * tl.load(table + STEP_STRIDE) + b * tl.load(table + BATCH_STRIDE)
    return has_place, active, row


@triton.jit
def lengths_of(table, b):
    """Rows' lengths. Values beyond T do no harm; T where there are none given, also for packed rows."""
    mask = if_there(table, LENGTHS, b < tl.load(table + BATCH))
    return tl.load(pointer(table, LENGTHS, tl.int64) + b, mask=mask, other=tl.load(table + STEPS))


@triton.jit
def boundary_at(table, row, mask):
    """Whether a boundary, which cuts the state, stands before the step of a row, in time."""
    return tl.load(pointer(table, RESETS, tl.int8) + row, mask=if_there(table, RESETS, mask), other=0) != 0


@triton.jit
def between(d, first, second):
    """Of two steps that direction d takes one after the other, what belongs to the later one in time: the boundary
    between them does.
    """
    return tl.where(d == 0, second, first)


@triton.jit
def cut_between(table, d, first_row, first, second_row, second):
    """Whether the state is cut on its way from one step to the next of direction d. first, second: whether there is
    such a step.
    """
    return boundary_at(table, between(d, first_row, second_row), between(d, first, second))


@triton.jit
def never_begins(table, b, now):
    """Whether a batch row has no step at all, so that its initial state is its final one; False but for `now`."""
    return (b < tl.where(now, tl.load(table + BATCH), 0)) & (
        tl.minimum(lengths_of(table, b), tl.load(table + STEPS)) <= 0
    )

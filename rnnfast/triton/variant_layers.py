"""The ops of layers with options, one direction of one layer each, on top of the kernels in variant_step.py: checks,
allocation, tables, launches.

rnnfast/variants/reference.py says what they compute, rnnfast/variants/ops.py has their arguments.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..cell_types import CELLS
from ..signatures import compute_dtype
from ..variants.ops import nested, of_backward
from ..variants.reference import Arguments
from . import cells, graphs, plan, variant_cells, variant_step
from . import table as tb
from .layers import (
    BACKEND,
    TYPES,
    check,
    check_tensor,
    on_device,
    precision_of,
    put,
    types,
    upload,
    without_autograd,
)
from .variant_cells import Variant

# As csrc/variants/ops.h has it, and a launch's grid takes.
_MOST_HEADS = 1 << 14
_WORDS = ("hard_sigmoid", "exponential", "rms", "carried", "reset_first", "relu")

# The vectors among `Weights`, in their order: the name of each in `Variant` and in the table, and its size for G gates,
# in units of H. A norm of the gates has one of two weights.
_VECTORS: dict[str, tuple[str, Callable[[int], int]]] = {
    "bias_hn": ("bias_hn", lambda gates: 1),
    "weight_peephole": ("peephole", lambda gates: gates - 1),
    "weight_norm_hh": ("norm", lambda gates: gates),
    "weight_norm": ("norm", lambda gates: gates),
    "bias_norm": ("norm_bias", lambda gates: gates),
    "weight_norm_c": ("norm_c", lambda gates: 1),
    "bias_norm_c": ("norm_c_bias", lambda gates: 1),
}


class _Call(NamedTuple):
    """What forward and backward share.

    Attributes:
        op: its name, for messages.
        variant: what kernels are told.
        heads: of W_hh.
        rows: the shape of the rows, without features.
        values, keep: the table's, and the tensors whose addresses are in it.
    """

    op: str
    variant: Variant
    steps: int
    batch: int
    hidden_size: int
    heads: int
    rows: torch.Size
    values: list[int]
    keep: list[Tensor]

    @property
    def width(self) -> int:
        return self.variant.gates * self.hidden_size

    @property
    def whole_rows(self) -> bool:
        """Whether a program must see all units of a row."""
        return bool(self.variant.gate_norm or self.variant.cell_norm)

    def row_tiles(self, dtype: torch.dtype) -> plan.Tiles:
        return plan.row_tiles(self.hidden_size, dtype, self.whole_rows)

    def check(self, condition: bool, message: str) -> None:
        check(condition, self.op, message)


def _number(value: float) -> int:
    """Its bits as a double's."""
    return int(struct.unpack("q", struct.pack("d", value))[0])


def _zoneout(mask: Tensor | None, share: float) -> int:
    if mask is not None:
        return variant_cells.BY_MASK.value
    return variant_cells.BY_SHARE.value if share else 0


def variant_of(op: str, arguments: Arguments) -> tuple[Variant, int]:
    """What kernels are told of a call, and H; RuntimeError where its arguments do not go together."""
    mode, weights, masks = arguments.mode, arguments.weights, arguments.masks
    known = mode == "LSTM" or mode == "GRU" or mode.startswith("RNN_")
    check(mode in CELLS and known, op, f"mode: expected LSTM, GRU or an RNN, got {mode!r}")
    words = set(arguments.words.split())
    wrong = words.difference(_WORDS)
    check(not wrong, op, f"words: expected {', '.join(_WORDS)}, got {', '.join(sorted(wrong))}")
    weight_hh: Tensor | None = weights.weight_hh
    if weight_hh is None:
        raise RuntimeError(f"rnnfast_triton::{op}: weight_hh: expected a tensor, got None")
    heads = arguments.num_heads
    check(weight_hh.dim() == 2, op, f"weight_hh: expected 2 dimensions, got {weight_hh.dim()}")
    check(0 < heads <= _MOST_HEADS, op, f"num_heads: expected 1 to {_MOST_HEADS}, got {heads}")
    hidden_size, cell = weight_hh.shape[1] * heads, CELLS[mode]
    gates = weight_hh.shape[0] // hidden_size if hidden_size else cell.gates
    is_lstm, is_gru = mode == "LSTM", mode == "GRU"
    fits = gates == cell.gates or (is_lstm and gates == 3) or (is_gru and gates == 2)
    shape = tuple(weight_hh.shape)
    check(fits and shape[0] == gates * hidden_size, op, f"weight_hh: expected (G*H, H / num_heads), got shape {shape}")
    check(hidden_size * weight_hh.shape[1] < 2**31, op, f"weight_hh: {hidden_size} hidden units: too large")
    has_reset, reset_first = is_gru and gates == 3, "reset_first" in words
    separate, joint = weights.weight_norm_hh is not None, weights.weight_norm is not None
    check(not (separate and joint), op, "weight_norm: expected None beside weight_norm_hh")
    check("relu" not in words or is_gru, op, "words: expected no relu but for a GRU")
    check(
        not reset_first or (has_reset and not separate and not joint), op,
        "words: expected no reset_first but for a GRU without a norm of the gates",
    )  # fmt: skip
    check(
        weights.bias_hn is None or (has_reset and not joint and not reset_first), op,
        "bias_hn: expected None but for a GRU whose r multiplies it",
    )  # fmt: skip
    check(
        is_lstm or (weights.weight_peephole is None and weights.weight_norm_c is None), op,
        "weight_peephole, weight_norm_c: expected None: the LSTM alone has them",
    )  # fmt: skip
    check(weights.bias_norm is None or joint, op, "bias_norm: expected None without weight_norm")
    has_norm_c = weights.weight_norm_c is not None
    check(weights.bias_norm_c is None or has_norm_c, op, "bias_norm_c: expected None without weight_norm_c")
    check(masks.candidate is None or cell.gates > 1, op, "candidate_mask: expected None: the RNN has no gates")
    exponential = "exponential" in words
    of_cell = (weights.weight_peephole, weights.weight_norm_c, masks.candidate, masks.zoneout_c)
    alone = all(each is None for each in of_cell) and arguments.zoneout_c == 0 and "hard_sigmoid" not in words
    check(
        not exponential or (is_lstm and gates == 4 and alone), op,
        "words: expected no exponential but for an LSTM without another option of its cell",
    )  # fmt: skip
    check(arguments.eps >= 0, op, f"eps: expected a number of at least 0, got {arguments.eps}")
    for name in ("zoneout_h", "zoneout_c")[: 1 + is_lstm]:
        share = getattr(arguments, name)
        check(0 <= share <= 1, op, f"{name}: expected a number from 0 to 1, got {share}")
    places, vectors = dict.fromkeys((place for place, _ in _VECTORS.values()), -1), 0
    for name, (place, size) in _VECTORS.items():
        if getattr(weights, name) is not None:
            places[place] = vectors
            vectors += size(gates)
    cell_norm = variant_cells.CARRIED if "carried" in words else variant_cells.OUTPUT
    variant = Variant(
        mode=cells.cell(mode).mode,
        gates=gates,
        reserve=4 if has_reset else gates,
        has_cell_state=is_lstm,
        exponential=exponential,
        coupled=is_lstm and gates == 3,
        reset=has_reset,
        reset_first=reset_first,
        relu="relu" in words,
        hard_sigmoid="hard_sigmoid" in words,
        rms="rms" in words,
        gate_norm=variant_cells.SEPARATE.value if separate else variant_cells.JOINT.value if joint else 0,
        cell_norm=cell_norm.value if has_norm_c else 0,
        zoneout_h=_zoneout(masks.zoneout_h, arguments.zoneout_h),
        zoneout_c=_zoneout(masks.zoneout_c, arguments.zoneout_c) if is_lstm else 0,
        recurrent_mask=masks.recurrent is not None,
        candidate_mask=masks.candidate is not None,
        splits_gradient=separate or (has_reset and not joint and not reset_first),
        vectors=vectors,
        **places,
    )
    return variant, hidden_size


def _call(op: str, arguments: Arguments) -> _Call:
    """Checks the arguments that forward and backward share. What a cell has nothing for is not looked at."""
    if arguments.mode != "LSTM":
        arguments = arguments._replace(cx=None, zoneout_c=0.0, masks=arguments.masks._replace(zoneout_c=None))
    if "exponential" not in arguments.words.split():
        arguments = arguments._replace(lx=None)
    gates, sequences, weights, masks = arguments.gates, arguments.sequences, arguments.weights, arguments.masks
    check(gates.dtype in TYPES, op, f"expected a floating type of 16, 32 or 64 bits, got {gates.dtype}")
    variant, hidden_size = variant_of(op, arguments)
    steps, batch = sequences.check(f"rnnfast_triton::{op}", gates)
    sizes, tensors = tb.of_sequences(sequences, steps, batch)
    values = sizes + [0] * (tb.SIZE_WITH_OPTIONS - len(sizes))
    values[tb.REVERSE.value] = int(arguments.reverse)
    for place, number in (
        (tb.EPS, arguments.eps), (tb.ZONEOUT_H, arguments.zoneout_h), (tb.ZONEOUT_C, arguments.zoneout_c),
    ):  # fmt: skip
        values[place.value] = _number(number)
    heads = arguments.num_heads
    call = _Call(op, variant, steps, batch, hidden_size, heads, gates.shape[:-1], values, [])
    if sequences.batch_sizes is not None:
        offsets = [0, *itertools.accumulate(sequences.batch_sizes.tolist())]
        tensors["offsets"] = upload(offsets, gates.device)
    check_tensor(op, "gates", gates, gates, (*call.rows, call.width))
    check_tensor(op, "weight_hh", weights.weight_hh, gates, (call.width, hidden_size // heads))
    of_batch = {
        "hx": arguments.hx, "cx": arguments.cx, "lx": arguments.lx, "recurrent_mask": masks.recurrent,
        "candidate_mask": masks.candidate,
    }  # fmt: skip
    for name, tensor in of_batch.items():
        if tensor is not None:
            check_tensor(op, name, tensor, gates, (batch, hidden_size))
    vectors = {}
    for name, (place, size) in _VECTORS.items():
        if (vector := getattr(weights, name)) is not None:
            check_tensor(op, name, vector, gates, (size(variant.gates) * hidden_size,))
            vectors[place] = vector
    for name, kept in (("zoneout_h_mask", masks.zoneout_h), ("zoneout_c_mask", masks.zoneout_c)):
        if kept is not None:
            right = kept.dtype == torch.bool and kept.device == gates.device
            call.check(right, f"{name}: expected a bool tensor on the device of the data")
            shape = (*call.rows, hidden_size)
            call.check(tuple(kept.shape) == shape, f"{name}: expected shape {shape}, got {tuple(kept.shape)}")
    put(
        call, **tensors, **of_batch, **vectors, weight_hh=weights.weight_hh, input_projection=gates,
        kept_h=masks.zoneout_h, kept_c=masks.zoneout_c,
    )  # fmt: skip
    return call


class _Launches:
    """The kernels of one turn, in their order, and what they are told beside the table."""

    def __init__(self, call: _Call, like: Tensor) -> None:
        self._call, self._like = call, like
        self._precision = precision_of(like.dtype)
        self._known = {"VARIANT": call.variant, "GATES": call.variant.gates, **types(like.dtype, self._precision)}
        self._starts: list[Callable[[Tensor, int], Any]] = []
        self._keys: list[Any] = []

    def _add(self, kernel: Any, grid: tuple[int, ...], tiles: plan.Tiles, sizes: Sequence[int], own: Any) -> None:
        every = {
            **self._known, **own, "BLOCK_B": tiles.batch, "BLOCK_N": tiles.units, "BLOCK_K": tiles.terms,
        }  # fmt: skip
        constants = {name: value for name, value in every.items() if name in kernel.arg_names}
        options = plan.options(tiles, BACKEND)
        self._starts.append(lambda table, turn: kernel[grid](table, turn, *sizes, **constants, **options))
        self._keys.append(
            (kernel.fn.__name__, grid, tiles, tuple(getattr(value, "value", value) for value in own.values()))
        )

    def product(self, kernel: Any, gates: int, **own: Any) -> None:
        """Of one head at a time, and of so many gates in programs of their own, each of which adds up COUNT of them."""
        call = self._call
        size = call.hidden_size // call.heads
        tiles = plan.product_tiles(own.get("COUNT", 1), self._like.dtype, self._precision, call.batch, size)
        grid = (triton.cdiv(call.batch, tiles.batch), gates * triton.cdiv(size, tiles.units), call.heads)
        self._add(kernel, grid, tiles, (call.hidden_size, size), own)

    def rows(self, kernel: Any) -> None:
        call = self._call
        tiles = call.row_tiles(self._like.dtype)
        grid = (triton.cdiv(call.batch, tiles.batch), triton.cdiv(call.hidden_size, tiles.units))
        self._add(kernel, grid, tiles, (call.hidden_size,), {})

    def run(self, turns: int) -> None:
        call, device = self._call, self._like.device
        if not call.batch:
            return
        key = (
            call.op, call.variant, self._like.dtype, self._precision, device, call.hidden_size, call.heads,
            *self._keys,
        )  # fmt: skip

        def one_turn(table: Tensor, turn: int) -> None:
            for start in self._starts:
                start(table, turn)

        with on_device(device):
            graphs.run(key, call.values, turns, device, one_turn)


@without_autograd()
def variant_forward(saves: bool, *values: Any) -> tuple[Tensor, ...]:
    """One direction of one layer: what `reference.forward` returns, and with `saves` what backward needs: reserve,
    normed, scale. values: `Arguments`, flat."""
    arguments = nested(values)
    call, gates = _call("variant_forward", arguments), arguments.gates
    variant, batch, hidden_size = call.variant, call.batch, call.hidden_size
    nothing, computed = gates.new_empty, compute_dtype(gates.dtype)
    saves_norm = saves and variant.gate_norm != 0
    has_cell_state, exponential = variant.has_cell_state, variant.exponential
    output, h_n = nothing(*call.rows, hidden_size), nothing(batch, hidden_size)
    c_n = nothing(batch, hidden_size) if has_cell_state else nothing(0)
    cell_states = nothing(*call.rows, hidden_size) if has_cell_state else nothing(0)
    l_n = nothing(batch, hidden_size) if exponential else nothing(0)
    reserve = nothing(*call.rows, variant.reserve * hidden_size) if saves else nothing(0)
    normed = nothing(*call.rows, call.width) if saves_norm else nothing(0)
    scale = nothing(*call.rows, 1, dtype=computed) if saves_norm else nothing(0)
    mask, hx = arguments.masks.recurrent, arguments.hx
    # A copy: each step writes into it what the next one multiplies. Without hx nothing is read before.
    entering = nothing(batch, hidden_size) if hx is None else hx.clone() if mask is None else hx * mask
    put(
        call, output=output, h_n=h_n, c_n=c_n, cell_states=cell_states, l_n=l_n, reserve=reserve, normed=normed,
        scale=scale, entering=entering.contiguous(), sums=nothing(batch, call.width, dtype=computed),
        carry=nothing(batch, hidden_size, dtype=computed) if has_cell_state else None,
        carry_l=nothing(batch, hidden_size, dtype=computed) if exponential else None,
        reset_state=nothing(batch, hidden_size) if variant.reset_first else None,
    )  # fmt: skip
    launches = _Launches(call, gates)
    if variant.reset_first:
        launches.product(variant_step.multiply, 2, SLOT=tb.ENTERING, FIRST=0)
        launches.rows(variant_step.reset)
        launches.product(variant_step.multiply, 1, SLOT=tb.RESET_STATE, FIRST=2)
    else:
        launches.product(variant_step.multiply, variant.gates, SLOT=tb.ENTERING, FIRST=0)
    launches.rows(variant_step.forward)
    # Without any step one turn all the same: initial states are handed through.
    launches.run(max(1, call.steps))
    return output, h_n, c_n, cell_states, l_n, reserve, normed, scale


@without_autograd()
def variant_backward(*values: Any) -> tuple[Tensor, ...]:
    """The gradients of gates, of W_hh h where it is another, of hx, cx, lx, and of the weights but weight_hh."""
    op = "variant_backward"
    grads, saved, arguments = of_backward(values)
    call, gates, weights = _call(op, arguments), arguments.gates, arguments.weights
    variant, batch, hidden_size = call.variant, call.batch, call.hidden_size
    nothing, computed = gates.new_empty, compute_dtype(gates.dtype)
    is_there = all(each is not None for each in saved)
    call.check(is_there, "output, cell_states, reserve, normed, scale: expected what forward returned, got None")
    output, cell_states, reserve, normed, scale = saved
    grad_output, grad_h_n, grad_c_n, grad_cell_states, grad_l_n = grads
    rows = {
        "output": (output, hidden_size), "grad_output": (grad_output, hidden_size),
        "reserve": (reserve, variant.reserve * hidden_size),
    }  # fmt: skip
    states = {"grad_h_n": grad_h_n}
    if variant.has_cell_state:
        rows |= {"cell_states": (cell_states, hidden_size), "grad_cell_states": (grad_cell_states, hidden_size)}
        states["grad_c_n"] = grad_c_n
    if variant.exponential:
        states["grad_l_n"] = grad_l_n
    given: dict[str, Tensor | None] = dict(states)
    if variant.gate_norm:
        rows["normed"] = (normed, call.width)
        right = scale is not None and scale.dtype == computed and scale.device == gates.device
        right = right and scale is not None and tuple(scale.shape) == (*call.rows, 1)
        call.check(right, "scale: expected what forward returned")
        given["scale"] = scale
    for name, (tensor, width) in rows.items():
        if tensor is not None:
            check_tensor(op, name, tensor, gates, (*call.rows, width))
            given[name] = tensor
    for name, state in states.items():
        if state is not None:
            check_tensor(op, name, state, gates, (batch, hidden_size))
    grad_gates = nothing(*call.rows, call.width)
    grad_sums = nothing(*call.rows, call.width) if variant.splits_gradient else nothing(0)

    def of_state(state: Tensor | None, applies: bool) -> Tensor:
        return nothing(batch, hidden_size) if applies and state is not None else nothing(0)

    grad_hx, grad_cx = of_state(arguments.hx, True), of_state(arguments.cx, variant.has_cell_state)
    grad_lx = of_state(arguments.lx, variant.exponential)
    tiles = triton.cdiv(batch, call.row_tiles(gates.dtype).batch)
    pieces = triton.cdiv(call.steps, variant_step.TURNS_SUMMED.value)
    sums = nothing((pieces, tiles, variant.vectors * hidden_size), dtype=computed).zero_()

    def workspace(needed: bool) -> Tensor | None:
        return nothing(batch, hidden_size, dtype=computed) if needed else None

    put(
        call, **given, grad_gates=grad_gates, grad_gates_hh=grad_sums, grad_hx=grad_hx, grad_cx=grad_cx,
        grad_lx=grad_lx, grad_vectors=sums, grad_entering=workspace(True), carry_h=workspace(True),
        carry=workspace(variant.has_cell_state), carry_l=workspace(variant.exponential),
    )  # fmt: skip
    launches = _Launches(call, gates)
    of_sums = tb.GRAD_GATES_HH if variant.splits_gradient else tb.GRAD_GATES
    first = 2 if variant.reset_first else variant.gates
    launches.product(variant_step.multiply_backward, 1, SLOT=of_sums, FIRST=0, COUNT=first, OF_LATER=True)
    launches.rows(variant_step.backward)
    if variant.reset_first:
        launches.product(variant_step.multiply_backward, 1, SLOT=of_sums, FIRST=2, COUNT=1, OF_LATER=False)
        launches.rows(variant_step.reset_backward)
    # One turn more than there are steps: rows whose first step is done hand their gradients on to the initial states.
    asked = any(grad.numel() for grad in (grad_hx, grad_cx, grad_lx))
    launches.run(call.steps + asked)
    vectors = sums.flatten(0, 1).sum(0).to(gates.dtype)
    found, begin = [], 0
    for name in _VECTORS:
        vector = getattr(weights, name)
        size = 0 if vector is None else vector.numel()
        # No views: each result of an op has memory of its own.
        found.append(vectors[begin : begin + size].clone())
        begin += size
    return grad_gates, grad_sums, grad_hx, grad_cx, grad_lx, *found

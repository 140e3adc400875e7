"""The ops of docs/design.md on top of the kernels: checks, allocation, tables, launches.

Functions have the names, arguments and results of the ops in `signatures.py`. The tensors of a call lie on one CUDA (or
HIP) device; in Triton's interpreter, on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import libraries
from ..cell_types import CELLS, CellType
from ..sequences import check_tensor as check_tensor_of_op
from ..signatures import (
    KINDS,
    OF_RECURRENCE,
    BackwardArguments,
    LayerArguments,
    Parameters,
    as_sequence,
    check_output,
    compute_dtype,
    is_one_step,
    nested,
)
from . import availability, cells, graphs, persistent, plan, step
from . import table as tb

Tensors = Sequence[Tensor]

TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Triton's name for the devices here.
BACKEND = "cuda" if torch.version.hip is None else "hip"


class _Call(NamedTuple):
    """What forward and backward share."""

    mode: str
    steps: int
    batch: int
    directions: int
    hidden_size: int
    state_size: int  # P with projection, else H
    projected: bool
    values: list[int]  # the table's, those of the arguments that forward and backward share
    keep: list[Tensor]  # whose addresses are in the table

    @property
    def cell(self) -> CellType:
        return CELLS[self.mode]


def check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"rnnfast_triton::{op}: {message}")


def check_tensor(op: str, name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    check_tensor_of_op(f"rnnfast_triton::{op}", name, tensor, like, shape)


def upload(offsets: list[int], device: torch.device) -> Tensor:
    """Numbers of the host, on the device, without waiting for it."""
    if device.type == "cpu":
        return torch.tensor(offsets, dtype=torch.int64, device="cpu")
    if not torch.cuda.is_current_stream_capturing():
        host = torch.tensor(offsets, dtype=torch.int64, device="cpu", pin_memory=True)
        return host.to(device, non_blocking=True)
    # A captured copy would read host memory that is somebody else's when the graph is replayed.
    table = graphs.new_table(device, len(offsets))
    graphs.fill(table, offsets)
    return table


def put(call: Any, **tensors: Tensor | None) -> None:
    """Notes the addresses of tensors, copied where they are not contiguous, under their names in table.py."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel():
            tensor = tensor.contiguous()
            if tensor.data_ptr() % 16:
                # The kernels count on it. Views into the middle of a tensor may begin anywhere.
                tensor = tensor.clone()
            call.keep.append(tensor)
            call.values[getattr(tb, name.upper()).value] = tensor.data_ptr()


def _stacked(tensors: Tensors) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))


def _call(op: str, arguments: LayerArguments | BackwardArguments, like: Tensor) -> _Call:
    """Checks the arguments that forward and backward share. like: has the rows, the dtype and the device."""
    mode, sequences, parameters = arguments.mode, arguments.sequences, arguments.parameters
    check(like.dtype in TYPES, op, f"expected a floating type of 16, 32 or 64 bits, got {like.dtype}")
    steps, batch = sequences.check(f"rnnfast_triton::{op}", like)
    first = parameters.weight_hh
    cell, directions = CELLS[mode], parameters.directions
    if first is None:
        raise RuntimeError(f"rnnfast_triton::{op}: weight_hh: expected a tensor, got None")
    hidden_size, state_size = first.size(0) // cell.gates, first.size(1)
    check(hidden_size * state_size < 2**31, op, f"hidden sizes {hidden_size}, {state_size}: too large")
    widths = {"gates": cell.gates * hidden_size, "state": state_size, "hidden": hidden_size}
    weights: dict[str, Tensor | None] = {}
    for kind in OF_RECURRENCE:
        (shape, option), given = KINDS[kind], parameters.each(kind)
        for weight in given:
            check_tensor(op, kind, weight, like, [widths[size] for size in shape])
        allowed = cell.may_project or option != "projection" or not given
        check(allowed, op, f"{kind}: expected None: {mode} has no projection")
        check(len(given) in (0, directions), op, f"{kind}: expected {directions}, got {len(given)}")
        weights[kind] = _stacked(given) if given else None
    projected = parameters.is_projected
    check(projected or hidden_size == state_size, op, f"weight_hh: expected {hidden_size} columns")
    for name, state, size in (("hx", arguments.hx, state_size), ("cx", arguments.cx, hidden_size)):
        if state is not None:
            check_tensor(op, name, state, like, (directions, batch, size))
    sizes, tensors = tb.of_sequences(sequences, steps, batch)
    values = sizes + [0] * (tb.SIZE - len(sizes))
    call = _Call(mode, steps, batch, directions, hidden_size, state_size, projected, values, [])
    if sequences.batch_sizes is not None:
        offsets = [0, *itertools.accumulate(sequences.batch_sizes.tolist())]
        tensors["offsets"] = upload(offsets, like.device)
    put(call, **tensors, **weights, hx=arguments.hx, cx=arguments.cx if cell.has_cell_state else None)
    return call


def precision_of(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: TF32 where torch's flag for recurrences says so."""
    # No meaning for other types. AMD has TF32 on some chips only: there float32 is float32.
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if libraries.tf32_allowed() else "ieee"


def family_of(mode: str, dtype: torch.dtype, hidden_size: int, projected: bool) -> str:
    """The family of kernels that runs a layer: `persistent` or `step`."""
    return plan.family(CELLS[mode].gates, dtype, precision_of(dtype), hidden_size, projected)


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def constants(mode: str, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """What kernels of a cell and type are compiled with, beside their tiles."""
    return {"CELL": cells.cell(mode), **types(dtype, precision)}


def types(dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """What kernels are told of types."""
    return {
        "DTYPE": TYPES[dtype],
        "COMPUTE": TYPES[compute_dtype(dtype)],
        # The type that operands have in products: the interpreter's know no bfloat16.
        "PRODUCT": tl.float32 if dtype == torch.bfloat16 and availability.interpreted() else TYPES[dtype],
        "PRECISION": precision,
    }


def launch(call: _Call, like: Tensor, kind: str, turns: int) -> None:
    """Runs every kernel of a call. kind: forward or backward."""
    if not call.batch:
        return
    dtype, precision = like.dtype, precision_of(like.dtype)
    known = constants(call.mode, dtype, precision)
    with on_device(like.device):
        if family_of(call.mode, dtype, call.hidden_size, call.projected) == "persistent":
            tiles = plan.persistent_tiles(call.cell.gates, dtype, precision, call.hidden_size)
            assert tiles is not None
            table = graphs.new_table(like.device)
            graphs.fill(table, call.values)
            getattr(persistent, kind)[(triton.cdiv(call.batch, tiles.batch), call.directions)](
                table, call.hidden_size, **known, BLOCK_B=tiles.batch, BLOCK_N=tiles.units,
                **plan.options(tiles, BACKEND),
            )  # fmt: skip
            return
        _run_steps(call, like, kind, turns, known, precision)


def _run_steps(call: _Call, like: Tensor, kind: str, turns: int, known: dict[str, Any], precision: str) -> None:
    backward = kind == "backward"
    known = {**known, "PROJECTED": call.projected}
    launches: list[Callable[..., Any]] = []
    keys: list[Any] = []

    def add(kernel: Any, products: int, units: int) -> None:
        tiles = plan.step_tiles(products, like.dtype, precision, call.batch, call.hidden_size, call.state_size)
        grid = (triton.cdiv(call.batch, tiles.batch), triton.cdiv(units, tiles.units), call.directions)
        constants = {name: value for name, value in known.items() if name in kernel.arg_names}
        launches.append(
            functools.partial(
                kernel[grid], **constants, BLOCK_B=tiles.batch, BLOCK_N=tiles.units, BLOCK_K=tiles.terms,
                **plan.options(tiles, BACKEND),
            )
        )  # fmt: skip
        keys.append((grid, tiles))

    if call.projected and backward:
        add(step.project_backward, 1, call.state_size)
    add(getattr(step, kind), 1 if backward else call.cell.gates, call.hidden_size)
    if call.projected and not backward:
        add(step.project_forward, 1, call.state_size)

    def one_turn(table: Tensor, turn: int) -> None:
        for start in launches:
            start(table, turn, call.hidden_size, call.state_size)

    key = (
        kind, call.mode, like.dtype, precision, like.device, call.hidden_size, call.state_size, call.projected,
        *keys,
    )  # fmt: skip
    graphs.run(key, call.values, turns, like.device, one_turn)


def input_projection(mode: str, input: Tensor, parameters: Parameters) -> Tensor:
    """`W_ih x + b` of all steps and directions in one product: (rows, D*G*H)."""
    weights, biases = parameters.each("weight_ih"), parameters.each("bias_ih")
    check(bool(weights), "input_projection", "weight_ih: expected a tensor, got None")
    bias = torch.cat(biases) if biases else None
    if biases_hh := parameters.each("bias_hh"):
        if CELLS[mode].split_gate is not None:
            # The recurrence adds it.
            biases_hh = [other.clone() for other in biases_hh]
            for other in biases_hh:
                _of_split_gate(mode, other).zero_()
        bias = torch.cat(biases_hh) if bias is None else bias + torch.cat(biases_hh)
    weight = weights[0] if len(weights) == 1 else torch.cat(weights)
    return torch.nn.functional.linear(input, weight, bias).contiguous()


def _of_split_gate(mode: str, bias: Tensor) -> Tensor:
    """The part of a bias (G*H,), or of biases (D, G*H), that belongs to the cell's split gate."""
    cell = CELLS[mode]
    assert cell.split_gate is not None
    return bias.chunk(cell.gates, dim=-1)[cell.split_gate]


def recurrence_forward(
    op: str, arguments: LayerArguments, projection: Tensor, save_reserve: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Every step of one layer, all its directions: (output, h_n, c_n, cell_states, reserve).

    Args:
        op: whose call it is.
        arguments: of the layer.
        projection: what `input_projection` returned.
        save_reserve: whether backward will come.
    """
    call = _call(op, arguments, projection)
    cell, D, B, H = call.cell, call.directions, call.batch, call.hidden_size
    rows, state_size = projection.shape[:-1], call.state_size
    check_tensor(op, "input projection", projection, projection, (*rows, D * cell.gates * H))
    output, h_n = projection.new_empty(*rows, D * state_size), projection.new_empty(D, B, state_size)
    c_n = projection.new_empty((D, B, H) if cell.has_cell_state else 0)
    cell_states = projection.new_empty((*rows, D * H) if cell.has_cell_state and save_reserve else 0)
    reserve = projection.new_empty((*rows, D * cell.reserve * H) if cell.reserve and save_reserve else 0)
    biases_hh = arguments.parameters.each("bias_hh")
    if cell.split_gate is not None and biases_hh:
        for bias in biases_hh:
            check_tensor(op, "bias_hh", bias, projection, (cell.gates * H,))
        put(call, bias_split=_of_split_gate(call.mode, _stacked(biases_hh)))
    carried = projection.new_empty((D, B, H), dtype=compute_dtype(projection.dtype)) if cell.has_cell_state else None
    put(
        call, input_projection=projection, output=output, h_n=h_n, c_n=c_n, cell_states=cell_states, reserve=reserve,
        carry=carried, hidden=projection.new_empty((D, B, H)) if call.projected else None,
    )  # fmt: skip
    # Without any step one turn all the same: hx and cx are handed through.
    launch(call, projection, "forward", max(1, call.steps))
    return output, h_n, c_n, cell_states, reserve


@contextlib.contextmanager
def without_autograd() -> Iterator[None]:
    """And without autocast: an op's types are what they should be, and gradients have ops of their own."""
    with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield


_Record = TypeVar("_Record", LayerArguments, BackwardArguments)


def _op(record: type[_Record]) -> Callable[[Callable[[_Record], tuple[Tensor, ...]]], Callable[..., Any]]:
    """Makes a function of a record an op's: given flat arguments, of one step or of sequences."""

    def decorate(function: Callable[[_Record], tuple[Tensor, ...]]) -> Callable[..., Any]:
        op = function.__name__

        @functools.wraps(function)
        def flat(*arguments: Any) -> tuple[Tensor, ...]:
            given = nested(record, arguments)
            check(given.mode in CELLS, op, f"mode must be one of {', '.join(CELLS)}, got {given.mode!r}")
            check_output(f"rnnfast_triton::{op}", given)
            with without_autograd():
                if is_one_step(given):
                    return as_sequence(function, given, record is LayerArguments)
                return function(given)

        return flat

    return decorate


@_op(LayerArguments)
def layer_forward(arguments: LayerArguments) -> tuple[Tensor, ...]:
    """A whole layer: (output, h_n, c_n, cell_states, reserve)."""
    projection = input_projection(arguments.mode, arguments.input, arguments.parameters)
    return recurrence_forward("layer_forward", arguments, projection, True)


@_op(LayerArguments)
def layer(arguments: LayerArguments) -> tuple[Tensor, ...]:
    """`layer_forward` with nothing kept for backward: (output, h_n, c_n)."""
    projection = input_projection(arguments.mode, arguments.input, arguments.parameters)
    return recurrence_forward("layer", arguments, projection, False)[:3]


@_op(BackwardArguments)
def recurrence_backward(arguments: BackwardArguments) -> tuple[Tensor, ...]:
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected)."""
    op, like = "recurrence_backward", arguments.like
    call = _call(op, arguments, like)
    cell, D, B, H = call.cell, call.directions, call.batch, call.hidden_size
    rows, state_size, gates = like.shape[:-1], call.state_size, call.cell.gates
    given = {
        "output": (arguments.output, (*rows, D * state_size)),
        "grad_output": (arguments.grad_output, (*rows, D * state_size)),
        "grad_h_n": (arguments.grad_h_n, (D, B, state_size)),
    }
    if cell.has_cell_state:
        given["cell_states"] = (arguments.cell_states, (*rows, D * H))
        given["grad_cell_states"] = (arguments.grad_cell_states, (*rows, D * H))
        given["grad_c_n"] = (arguments.grad_c_n, (D, B, H))
    if cell.reserve:
        given["reserve"] = (arguments.reserve, (*rows, D * cell.reserve * H))
    for name, (tensor, shape) in given.items():
        if tensor is not None:
            check_tensor(op, name, tensor, like, shape)
    grad_gates = like.new_empty(*rows, D * gates * H)
    grad_gates_hh = like.new_empty((*rows, D * gates * H) if cell.split_gate is not None else 0)
    grad_hx = like.new_empty((D, B, state_size) if arguments.hx is not None else 0)
    grad_cx = like.new_empty((D, B, H) if cell.has_cell_state and arguments.cx is not None else 0)
    grad_projected = like.new_empty((*rows, D * state_size) if call.projected else 0)
    carries = cell.has_cell_state or cell.reads_previous_h
    put(
        call, **{name: tensor for name, (tensor, _) in given.items()}, grad_gates=grad_gates,
        grad_gates_hh=grad_gates_hh, grad_hx=grad_hx, grad_cx=grad_cx, grad_projected=grad_projected,
        carry=like.new_empty((D, B, H), dtype=compute_dtype(like.dtype)) if carries else None,
    )  # fmt: skip
    # One turn more than there are steps: rows whose first step is done hand their gradients on to hx and cx.
    launch(call, like, "backward", call.steps + (1 if grad_hx.numel() or grad_cx.numel() else 0))
    return grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected

"""The ops of docs/design.md on top of the kernels: checks, allocation, tables, launches.

Functions have the names, arguments and results of those in `reference.py`. The tensors of a call lie on one CUDA (or
HIP) device; in Triton's interpreter, on the CPU.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import libraries
from ..reference import GATES
from ..signatures import BIAS_HH, BIAS_IH, HH, HR, IH, as_sequence, is_one_step, of_kind
from . import cells, graphs, persistent, plan, step
from . import table as tb

Tensors = Sequence[Tensor]

_TYPES = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
# Triton's name for the devices here.
_BACKEND = "cuda" if torch.version.hip is None else "hip"


class _Layout(NamedTuple):
    """Sizes of a call and where its rows lie."""

    steps: int
    batch: int
    step_stride: int
    batch_stride: int
    # packed: (T + 1) numbers, where each step's rows begin; else empty
    offsets: list[int]


class _Call(NamedTuple):
    """What forward and backward share."""

    mode: str
    layout: _Layout
    directions: int
    hidden_size: int
    state_size: int  # P with projection, else H
    projected: bool
    values: list[int]  # the table's, those of the arguments that forward and backward share
    keep: list[Tensor]  # whose addresses are in the table


def _check(condition: bool, op: str, message: str) -> None:
    if not condition:
        raise RuntimeError(f"rnnfast_triton::{op}: {message}")


def _check_tensor(op: str, name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    _check(tuple(tensor.shape) == tuple(shape), op, f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    same = tensor.dtype == like.dtype and tensor.device == like.device
    _check(
        same, op, f"{name}: expected {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}",
    )  # fmt: skip


def _layout(
    op: str, model: Tensor, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, batch_first: bool
) -> _Layout:
    if batch_sizes is not None:
        _check(model.dim() == 2, op, f"with batch_sizes rows are packed: expected 2 dimensions, got {model.dim()}")
        _check(
            batch_sizes.device.type == "cpu" and batch_sizes.dtype == torch.int64 and batch_sizes.dim() == 1,
            op, "batch_sizes: expected a 1-D int64 tensor on the CPU",
        )  # fmt: skip
        _check(lengths is None and resets is None, op, "lengths and resets go with dense rows, not with batch_sizes")
        sizes = batch_sizes.tolist()
        falling = all(size > 0 for size in sizes) and sizes == sorted(sizes, reverse=True)
        _check(falling, op, "batch_sizes: expected positive sizes that do not increase")
        offsets = [0]
        for size in sizes:
            offsets.append(offsets[-1] + size)
        _check(
            offsets[-1] == model.size(0), op,
            f"batch_sizes: expected a sum of {model.size(0)}, got {offsets[-1]}",
        )  # fmt: skip
        return _Layout(len(sizes), sizes[0] if sizes else 0, 0, 1, offsets)
    _check(model.dim() == 3, op, f"expected 3 dimensions, got {model.dim()}")
    steps, batch = model.size(1 if batch_first else 0), model.size(0 if batch_first else 1)
    if lengths is not None:
        right = lengths.device == model.device and lengths.dtype == torch.int64 and tuple(lengths.shape) == (batch,)
        _check(right, op, f"lengths: expected {batch} int64 on the device of the data")
        if model.device.type == "cpu" and batch:
            least, most = int(lengths.min()), int(lengths.max())
            _check(least >= 0 and most <= steps, op, f"lengths: expected values from 0 to {steps}")
    if resets is not None:
        right = resets.device == model.device and resets.dtype == torch.bool and resets.shape == model.shape[:2]
        _check(right, op, f"resets: expected bool of shape {tuple(model.shape[:2])} on the device of the data")
    return _Layout(steps, batch, 1 if batch_first else batch, steps if batch_first else 1, [])


def _upload(offsets: list[int], device: torch.device) -> Tensor:
    """Numbers of the host, on the device, without waiting for it."""
    if device.type == "cpu":
        return torch.tensor(offsets, dtype=torch.int64)
    if not torch.cuda.is_current_stream_capturing():
        return torch.tensor(offsets, dtype=torch.int64, pin_memory=True).to(device, non_blocking=True)
    # A captured copy would read host memory that is somebody else's when the graph is replayed.
    padded = torch.empty(-(-len(offsets) // tb.SIZE) * tb.SIZE, dtype=torch.int64, device=device)
    for start in range(0, len(offsets), tb.SIZE):
        graphs.fill(padded[start:], offsets[start : start + tb.SIZE])
    return padded


def _put(call: _Call, **tensors: Tensor | None) -> None:
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


def _call(
    op: str,
    mode: str,
    model: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    places: Sequence[Tensor | None],
) -> _Call:
    """Checks the arguments that forward and backward share. model: has the rows, the dtype and the device."""
    _check(mode in GATES, op, f"mode must be one of {', '.join(GATES)}, got {mode!r}")
    _check(model.dtype in _TYPES, op, f"expected a floating type of 16, 32 or 64 bits, got {model.dtype}")
    layout = _layout(op, model, batch_sizes, lengths, resets, batch_first)
    weight_hh, weight_hr = of_kind(places, HH), of_kind(places, HR)
    directions = len(weight_hh)
    _check(bool(places) and places[HH] is not None, op, "weight_hh: expected a tensor, got None")
    hidden_size, state_size = weight_hh[0].size(0) // GATES[mode], weight_hh[0].size(1)
    _check(hidden_size * state_size < 2**31, op, f"hidden sizes {hidden_size}, {state_size}: too large")
    for weight in weight_hh:
        _check_tensor(op, "weight_hh", weight, model, (GATES[mode] * hidden_size, state_size))
    for weight in weight_hr:
        _check_tensor(op, "weight_hr", weight, model, (state_size, hidden_size))
    _check(len(weight_hr) in ((0, directions) if mode == "LSTM" else (0,)), op, "weight_hr: LSTM only, one a direction")
    _check(bool(weight_hr) or hidden_size == state_size, op, f"weight_hh: expected {hidden_size} columns")
    for name, state, size in (("hx", hx, state_size), ("cx", cx, hidden_size)):
        if state is not None:
            _check_tensor(op, name, state, model, (directions, layout.batch, size))
    values = [0] * tb.SIZE
    values[:4] = layout[:4]
    call = _Call(mode, layout, directions, hidden_size, state_size, bool(weight_hr), values, [])
    _put(
        call, lengths=lengths, resets=resets, hx=hx, cx=cx if mode == "LSTM" else None, weight_hh=_stacked(weight_hh),
        weight_hr=_stacked(weight_hr) if weight_hr else None,
        offsets=_upload(layout.offsets, model.device) if layout.offsets else None,
    )  # fmt: skip
    return call


def _precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: TF32 where torch's flag for recurrences says so."""
    # No meaning for other types. AMD has TF32 on some chips only: there float32 is float32.
    if dtype != torch.float32 or torch.version.hip is not None:
        return "ieee"
    return "tf32" if libraries.tf32_allowed() else "ieee"


def family_of(mode: str, dtype: torch.dtype, hidden_size: int, projected: bool) -> str:
    """The family of kernels that runs a layer: `persistent` or `step`."""
    return plan.family(GATES[mode], dtype, _precision(dtype), hidden_size, projected)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def constants(mode: str, dtype: torch.dtype, precision: str) -> dict[str, Any]:
    """What every kernel of a cell and type is compiled with, beside its tiles."""
    return {
        "MODE": cells.MODES[mode],
        "G": GATES[mode],
        "DTYPE": _TYPES[dtype],
        "COMPUTE": tl.float64 if dtype == torch.float64 else tl.float32,
        # The type that operands have in products: the interpreter's know no bfloat16.
        "PRODUCT": tl.float32 if dtype == torch.bfloat16 and libraries.triton_interpreted() else _TYPES[dtype],
        "PRECISION": precision,
    }


def launch(call: _Call, model: Tensor, kind: str, turns: int) -> None:
    """Runs every kernel of a call. kind: forward or backward."""
    if not call.layout.batch:
        return
    dtype, gates, batch = model.dtype, GATES[call.mode], call.layout.batch
    precision = _precision(dtype)
    cell = constants(call.mode, dtype, precision)
    with _on(model.device):
        if family_of(call.mode, dtype, call.hidden_size, call.projected) == "persistent":
            tiles = plan.persistent_tiles(gates, dtype, precision, call.hidden_size)
            assert tiles is not None
            table = graphs.new_table(model.device)
            graphs.fill(table, call.values)
            getattr(persistent, kind)[(triton.cdiv(batch, tiles.batch), call.directions)](
                table, call.hidden_size, **cell, BLOCK_B=tiles.batch, BLOCK_N=tiles.units,
                **plan.options(tiles, True, _BACKEND),
            )  # fmt: skip
            return
        _run_steps(call, model, kind, turns, cell, precision)


def _run_steps(call: _Call, model: Tensor, kind: str, turns: int, cell: dict[str, Any], precision: str) -> None:
    backward = kind == "backward"
    # The kernels of a projection belong to one cell.
    shared = {name: value for name, value in cell.items() if name not in ("MODE", "G")}
    launches: list[Callable[..., Any]] = []
    keys: list[Any] = []

    def add(kernel: Any, gates: int, units: int, constants: dict[str, Any]) -> None:
        tiles = plan.step_tiles(gates, model.dtype, precision, call.layout.batch, backward or gates == 1)
        grid = (triton.cdiv(call.layout.batch, tiles.batch), triton.cdiv(units, tiles.units), call.directions)
        launches.append(
            functools.partial(
                kernel[grid], **constants, BLOCK_B=tiles.batch, BLOCK_N=tiles.units, BLOCK_K=tiles.terms,
                **plan.options(tiles, False, _BACKEND),
            )
        )  # fmt: skip
        keys.append((grid, tiles))

    if call.projected and backward:
        add(step.project_backward, 1, call.state_size, shared)
    cell = {**cell, "PROJECTED": call.projected}
    add(getattr(step, kind), cell["G"], call.hidden_size, cell)
    if call.projected and not backward:
        add(step.project_forward, 1, call.state_size, shared)

    def one_turn(table: Tensor, turn: int) -> None:
        for start in launches:
            start(table, turn, call.hidden_size, call.state_size)

    key = (
        kind, call.mode, model.dtype, precision, model.device, call.hidden_size, call.state_size, call.projected,
        *keys,
    )  # fmt: skip
    graphs.run(key, call.values, turns, model.device, one_turn)


def _plainly(function: Callable[..., Any]) -> Callable[..., Any]:
    """Without autograd and autocast: the types are what they should be, and gradients have ops of their own."""

    @functools.wraps(function)
    def wrapper(*arguments: Any) -> Any:
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            if is_one_step(function.__name__, arguments):
                return as_sequence(function.__name__, function, arguments)
            return function(*arguments)

    return wrapper


@_plainly
def input_projection(mode: str, input: Tensor, *places: Tensor | None) -> Tensor:
    """One product for all steps and directions: (rows, D*G*H)."""
    _check(mode in GATES, "input_projection", f"mode must be one of {', '.join(GATES)}, got {mode!r}")
    weight_ih = of_kind(places, IH)
    _check(bool(weight_ih), "input_projection", "weight_ih: expected a tensor, got None")
    outer = of_kind(places, BIAS_IH)
    bias = torch.cat(outer) if outer else None
    if inner := of_kind(places, BIAS_HH):
        if mode == "GRU":
            # b_hn stands inside r * (W_hn h + b_hn): the recurrence adds it.
            size = weight_ih[0].size(0) // 3 * 2
            inner = [torch.cat([part[:size], torch.zeros_like(part[size:])]) for part in inner]
        bias = torch.cat(inner) if bias is None else bias + torch.cat(inner)
    weight = weight_ih[0] if len(weight_ih) == 1 else torch.cat(weight_ih)
    return torch.nn.functional.linear(input, weight, bias).contiguous()


@_plainly
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
    """Every step of one layer, all its directions: (output, h_n, c_n, cell_states, reserve)."""
    op = "recurrence_forward"
    call = _call(op, mode, gates, hx, cx, batch_sizes, lengths, resets, batch_first, places)
    D, B, H, K = call.directions, call.layout.batch, call.hidden_size, call.state_size
    rows = gates.shape[:-1]
    _check_tensor(op, "gates", gates, gates, (*rows, D * GATES[mode] * H))
    is_lstm = mode == "LSTM"
    output, h_n = gates.new_empty(*rows, D * K), gates.new_empty(D, B, K)
    c_n = gates.new_empty((D, B, H) if is_lstm else 0)
    cell_states = gates.new_empty((*rows, D * H) if is_lstm and save_reserve else 0)
    reserve = gates.new_empty((*rows, D * 4 * H) if mode in ("LSTM", "GRU") and save_reserve else 0)
    compute = torch.float64 if gates.dtype == torch.float64 else torch.float32
    if mode == "GRU" and (bias_hh := of_kind(places, BIAS_HH)):
        for bias in bias_hh:
            _check_tensor(op, "bias_hh", bias, gates, (3 * H,))
        _put(call, bias_n=_stacked(bias_hh)[:, 2 * H :])
    _put(
        call, gates=gates, output=output, h_n=h_n, c_n=c_n, cell_states=cell_states, reserve=reserve,
        carry=gates.new_empty((D, B, H), dtype=compute) if is_lstm else None,
        hidden=gates.new_empty((D, B, H)) if call.projected else None,
    )  # fmt: skip
    # Without any step one turn all the same: hx and cx are handed through.
    launch(call, gates, "forward", max(1, call.layout.steps))
    return output, h_n, c_n, cell_states, reserve


@_plainly
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
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected)."""
    op = "recurrence_backward"
    model = reserve if output is None else output
    call = _call(op, mode, model, hx, cx, batch_sizes, lengths, resets, batch_first, places)
    D, B, H, K, G = call.directions, call.layout.batch, call.hidden_size, call.state_size, GATES[mode]
    rows = model.shape[:-1]
    is_lstm = mode == "LSTM"
    given = {
        "output": (output, (*rows, D * K)),
        "grad_output": (grad_output, (*rows, D * K)),
        "grad_h_n": (grad_h_n, (D, B, K)),
    }
    if is_lstm:
        given["cell_states"] = (cell_states, (*rows, D * H))
        given["grad_cell_states"] = (grad_cell_states, (*rows, D * H))
        given["grad_c_n"] = (grad_c_n, (D, B, H))
    if G > 1:
        given["reserve"] = (reserve, (*rows, D * 4 * H))
    for name, (tensor, shape) in given.items():
        if tensor is not None:
            _check_tensor(op, name, tensor, model, shape)
    grad_gates = model.new_empty(*rows, D * G * H)
    grad_gates_hh = model.new_empty((*rows, D * G * H) if mode == "GRU" else 0)
    grad_hx = model.new_empty((D, B, K) if hx is not None else 0)
    grad_cx = model.new_empty((D, B, H) if is_lstm and cx is not None else 0)
    grad_projected = model.new_empty((*rows, D * K) if call.projected else 0)
    compute = torch.float64 if model.dtype == torch.float64 else torch.float32
    _put(
        call, **{name: tensor for name, (tensor, _) in given.items()}, grad_gates=grad_gates,
        grad_gates_hh=grad_gates_hh, grad_hx=grad_hx, grad_cx=grad_cx, grad_projected=grad_projected,
        carry=model.new_empty((D, B, H), dtype=compute) if G > 1 else None,
    )  # fmt: skip
    # One turn more than there are steps: rows whose first step is done hand their gradients on to hx and cx.
    launch(call, model, "backward", call.layout.steps + (1 if grad_hx.numel() or grad_cx.numel() else 0))
    return grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected


def layer_forward(mode: str, batch_first: bool, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """A whole layer: (output, h_n, c_n, cell_states, reserve). rest: hx to resets, and the places."""
    return _layer(True, mode, batch_first, input, *rest)


def layer(mode: str, batch_first: bool, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """`layer_forward` with nothing kept for backward: (output, h_n, c_n)."""
    return _layer(False, mode, batch_first, input, *rest)[:3]


def _layer(save_reserve: bool, mode: str, batch_first: bool, input: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    gates = input_projection(mode, input, *rest[5:])
    results: tuple[Tensor, ...] = recurrence_forward(mode, batch_first, save_reserve, gates, *rest)
    return results

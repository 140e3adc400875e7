"""The ops of rnnfast: the compiled kernels where they are built, plain PyTorch (`reference.py`) otherwise.

Each function here has the signature of the op of the same name (docs/design.md lists shapes and meanings) and one more
argument, `backend`: the name of the backend that runs it, None for the one that `backends.select` chooses.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import libraries, reference
from .reference import GATES

Tensors = Sequence[Tensor]

# None where the C++ library is loaded, else why it is not.
library_error = libraries.cpu_error


class Kernels(NamedTuple):
    """One backend's functions, each with the signature of the op of its name."""

    input_gates: Callable[..., Any]
    recurrence_forward: Callable[..., Any]
    recurrence_backward: Callable[..., Any]
    layer_forward: Callable[..., Any]
    layer_inference: Callable[..., Any]


def _library_kernels(namespace: str) -> Kernels:
    """The ops of a loaded library. Bound once: looking one up through torch.ops costs as much as a small call."""
    return Kernels(*(getattr(getattr(torch.ops, namespace), name).default for name in Kernels._fields))


def _missing_kernels(backend: str, why: str | None) -> Kernels:
    def missing(*_: Any) -> Any:
        raise RuntimeError(f"rnnfast: backend {backend!r} is not available: {why}")

    return Kernels(*[missing] * len(Kernels._fields))


def _on_cuda(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, with torch's TF32 flag handed to the library first, and torch's own error where memory runs out."""

    def call(*arguments: Any) -> Any:
        libraries.follow_tf32()
        try:
            return op(*arguments)
        except RuntimeError as error:
            # The library cannot throw torch's classes: they are not part of the stable interface.
            if isinstance(error, torch.OutOfMemoryError) or ": out of memory: " not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from None

    return call


def _cuda_kernels() -> Kernels:
    """The same ops as the CPU's: the dispatcher goes by the tensors' device."""
    if libraries.cuda_error is not None:
        return _missing_kernels("cuda", libraries.cuda_error)
    return Kernels(*map(_on_cuda, _library_kernels("rnnfast")))


# Every backend's functions: the one place where a backend's name becomes code.
kernels: dict[str, Kernels] = {
    "reference": Kernels(*(getattr(reference, name) for name in Kernels._fields)),
    "cpu": _library_kernels("rnnfast") if library_error is None else _missing_kernels("cpu", library_error),
    "cuda": _cuda_kernels(),
    # Registered at the end of this file.
    "triton": _missing_kernels("triton", libraries.triton_error),
    "emulated": _missing_kernels("emulated", "call rnnfast.ops.load_emulated first"),
}
_matmul: Callable[..., Any] = torch.mm if library_error is not None else torch.ops.rnnfast.matmul.default

# Whether `kernels` has the emulated library's functions.
emulated_loaded = False


def load_emulated(path: str | None = None) -> None:
    """Makes the backend `emulated` available: the CUDA kernels, compiled for the processor. A developer's tool, slow.

    Args:
        path: of the library; None takes the environment variable RNNFAST_EMULATED_LIBRARY.

    Raises:
        RuntimeError: there is no such library, or it does not load; the message says how to build it.
    """
    global emulated_loaded
    if not emulated_loaded:
        libraries.load_emulated_library(path)
        kernels["emulated"] = _library_kernels("rnnfast_emulated")
        _register("rnnfast_emulated")
        emulated_loaded = True


def use_cpu_isa(name: str) -> str:
    """Switches the C++ kernels to another instruction set, for tests and measurements.

    Args:
        name: avx512, avx2 or portable; "" changes nothing.

    Returns:
        The one in use now.

    Raises:
        RuntimeError: this processor lacks it, or the name is unknown.
    """
    return str(torch.ops.rnnfast.use_cpu_isa(name))


def cpu_isa() -> str:
    """The instruction set that the C++ kernels use: avx512, avx2, portable ("" without the library)."""
    return "" if library_error is not None else use_cpu_isa("")


def _backend_for(tensor: Tensor) -> str:
    from .backends import select  # imported late: backends reports on this module

    return select(tensor)


def input_gates(
    mode: str, input: Tensor, weight_ih: Tensors, bias_ih: Tensors, bias_hh: Tensors, *, backend: str | None = None
) -> Tensor:
    """All gates' input part, (rows, D*G*H): `W_ih x + b_ih + b_hh` (without b_hn for the GRU's n gate)."""
    return kernels[backend or _backend_for(input)].input_gates(mode, input, weight_ih, bias_ih, bias_hh)


def recurrence_forward(
    mode: str,
    gates: Tensor,
    weight_hh: Tensors,
    bias_hh: Tensors,
    weight_hr: Tensors,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    save_reserve: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs every step of one layer, all its directions: (output, h_n, c_n, cells, reserve)."""
    return kernels[backend or _backend_for(gates)].recurrence_forward(
        mode, gates, weight_hh, bias_hh, weight_hr, hx, cx, batch_sizes, lengths, resets, batch_first, save_reserve
    )


def recurrence_backward(
    mode: str,
    grad_output: Tensor | None,
    grad_h_n: Tensor | None,
    grad_c_n: Tensor | None,
    grad_cells: Tensor | None,
    output: Tensor,
    cells: Tensor,
    reserve: Tensor,
    weight_hh: Tensors,
    weight_hr: Tensors,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected)."""
    return kernels[backend or _backend_for(output)].recurrence_backward(
        mode, grad_output, grad_h_n, grad_c_n, grad_cells, output, cells, reserve, weight_hh, weight_hr, hx, cx,
        batch_sizes, lengths, resets, batch_first,
    )  # fmt: skip


def layer_forward(
    mode: str,
    input: Tensor,
    weight_ih: Tensors,
    weight_hh: Tensors,
    bias_ih: Tensors,
    bias_hh: Tensors,
    weight_hr: Tensors,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, with what backward needs: (output, h_n, c_n, cells, reserve)."""
    return kernels[backend or _backend_for(input)].layer_forward(
        mode, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, hx, cx, batch_sizes, lengths, resets,
        batch_first,
    )  # fmt: skip


def layer_inference(
    mode: str,
    input: Tensor,
    weight_ih: Tensors,
    weight_hh: Tensors,
    bias_ih: Tensors,
    bias_hh: Tensors,
    weight_hr: Tensors,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    batch_first: bool,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer without anything kept for backward: (output, h_n, c_n)."""
    return kernels[backend or _backend_for(input)].layer_inference(
        mode, input, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, hx, cx, batch_sizes, lengths, resets,
        batch_first,
    )  # fmt: skip


class _Matmul(torch.autograd.Function):
    """The C++ product of two matrices, differentiable any number of times."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if grad is None:
            return None, None
        a, b = ctx.saved_tensors
        return (
            matmul(grad, b.t()) if ctx.needs_input_grad[0] else None,
            matmul(a.t(), grad) if ctx.needs_input_grad[1] else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        return _matmul_vmap(info, in_dims, a, b)


# The types whose products the C++ library does faster than ATen's BLAS; oneDNN does the 16-bit ones well.
_MATMUL_TYPES = (torch.float32, torch.float64)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for two matrices, each with any strides of which one is 1; differentiable any number of times."""
    if library_error is not None or not a.is_cpu or a.dtype not in _MATMUL_TYPES:
        return torch.mm(a, b)
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return _matmul(a, b)
    return _Matmul.apply(a, b)


# --- vmap ---------------------------------------------------------------------------------------------------------
# Batched data are folded into the batch: the vmapped dimension (V) goes right behind B, where it does no harm to packed
# rows either: row (t, b) becomes rows (t, b*V) .. (t, b*V + V-1), and every batch size V times itself. Batched weights
# leave nothing to share: one call a member.

# What an argument or a result is, for folding: ROWS (T, B, ...), (B, T, ...) or packed (rows, ...); STATE (D, B, ...);
# BATCH (B,); SIZES batch_sizes; WEIGHT a tensor or a list of them; OTHER anything that is not a tensor.
ROWS, STATE, BATCH, SIZES, WEIGHT, OTHER = range(6)


def is_batched(dims: Any) -> bool:
    """Whether any of `dims`, an in_dims entry (int, None or a list of them), names a vmapped dimension."""
    return any(d is not None for d in dims) if isinstance(dims, (list, tuple)) else dims is not None


def _member(arg: Any, dims: Any, index: int) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_member(a, d, index) for a, d in zip(arg, dims, strict=True)]
    return arg if dims is None else arg.select(dims, index)


def batched_call(
    call: Callable[..., tuple[Tensor, ...]],
    size: int,
    in_dims: Sequence[Any],
    args: Sequence[Any],
    roles: Sequence[int],
    out_roles: Sequence[int],
    packed: bool,
    batch_first: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Runs `call` on arguments with a vmapped dimension of `size`: the results and their out_dims."""
    for dims, role in zip(in_dims, roles, strict=True):
        if role == SIZES and is_batched(dims):
            raise RuntimeError("rnnfast: vmap over batch_sizes is not possible; map over the packed data")
    if any(is_batched(dims) for dims, role in zip(in_dims, roles, strict=True) if role == WEIGHT):
        members = [call(*[_member(a, d, i) for a, d in zip(args, in_dims, strict=True)]) for i in range(size)]
        # Results that do not apply, of shape (0,), stay as they are.
        stacked = [r[0] if _is_placeholder(r[0]) else torch.stack(r) for r in zip(*members, strict=True)]
        return tuple(stacked), tuple(None if _is_placeholder(r) else 0 for r in stacked)

    # Where V goes, before folding, by role.
    axes = {ROWS: 1 if packed or batch_first else 2, STATE: 2, BATCH: 1}
    folded = []
    for arg, dims, role in zip(args, in_dims, roles, strict=True):
        if arg is None or role in (WEIGHT, OTHER) or _is_placeholder(arg):
            folded.append(arg)
        elif role == SIZES:
            folded.append(arg * size)
        else:
            axis = axes[role]
            if dims is None:
                arg = arg.unsqueeze(axis).expand(*arg.shape[:axis], size, *arg.shape[axis:])
            else:
                arg = arg.movedim(dims, axis)
            folded.append(arg.flatten(axis - 1, axis))
    results: list[Tensor] = []
    out_dims: list[int | None] = []
    for result, role in zip(call(*folded), out_roles, strict=True):
        if _is_placeholder(result):
            results.append(result)
            out_dims.append(None)
        else:
            axis = axes[role]
            results.append(result.unflatten(axis - 1, (result.size(axis - 1) // size, size)))
            out_dims.append(axis)
    return tuple(results), tuple(out_dims)


def _is_placeholder(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.dim() == 1 and tensor.size(0) == 0


_FORWARD_ROLES = (OTHER, ROWS, WEIGHT, WEIGHT, WEIGHT, STATE, STATE, SIZES, BATCH, ROWS, OTHER, OTHER)
_BACKWARD_ROLES = (
    OTHER, ROWS, STATE, STATE, ROWS, ROWS, ROWS, ROWS, WEIGHT, WEIGHT, STATE, STATE, SIZES, BATCH, ROWS, OTHER,
)  # fmt: skip
_FORWARD_RESULTS = (ROWS, STATE, STATE, ROWS, ROWS)
_INFERENCE_ROLES = (OTHER, ROWS, WEIGHT, WEIGHT, WEIGHT, WEIGHT, WEIGHT, STATE, STATE, SIZES, BATCH, ROWS, OTHER)


def _vmap_rules(own: Kernels) -> dict[str, Callable[..., Any]]:
    """By op: how one library's ops run on arguments with a vmapped dimension."""

    def rule(
        op: Callable[..., Any], roles: Sequence[int], out_roles: Sequence[int], sizes: int, first: int
    ) -> Callable[..., Any]:
        # sizes, first: where batch_sizes and batch_first stand among the arguments
        def run(info: Any, in_dims: Any, *args: Any) -> Any:
            packed = args[sizes] is not None
            return batched_call(op, info.batch_size, in_dims, args, roles, out_roles, packed, args[first])

        return run

    def input_gates(info: Any, in_dims: Any, mode: Any, input: Any, *weights: Any) -> tuple[Tensor, int | None]:
        results, out_dims = batched_call(
            lambda x, *w: (own.input_gates(mode, x, *w),), info.batch_size, in_dims[1:], (input, *weights),
            (ROWS, WEIGHT, WEIGHT, WEIGHT), (ROWS,), True, False,
        )  # fmt: skip
        return results[0], out_dims[0]

    backward_results = (ROWS, ROWS, STATE, STATE, ROWS)
    return {
        "input_gates": input_gates,
        "recurrence_forward": rule(own.recurrence_forward, _FORWARD_ROLES, _FORWARD_RESULTS, 7, 10),
        "recurrence_backward": rule(own.recurrence_backward, _BACKWARD_ROLES, backward_results, 12, 15),
        "layer_forward": rule(own.layer_forward, _INFERENCE_ROLES, _FORWARD_RESULTS, 9, 12),
        "layer_inference": rule(own.layer_inference, _INFERENCE_ROLES, _FORWARD_RESULTS[:3], 9, 12),
        "matmul": _matmul_vmap,
    }


def _matmul_vmap(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    a = a if in_dims[0] is None else a.movedim(in_dims[0], 0)
    b = b if in_dims[1] is None else b.movedim(in_dims[1], 0)
    return torch.matmul(a, b), 0


# --- shapes, for tracing ------------------------------------------------------------------------------------------
# Sizes are only ever passed on, never compared: T and B stay symbols.


def _state_batch(
    rows: Tensor, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None, batch_first: bool
) -> Any:
    if hx is not None:
        return hx.size(1)
    if cx is not None:
        return cx.size(1)
    if batch_sizes is not None:
        # The first batch size is a number in a tensor: a size that only the run knows.
        return torch.library.get_ctx().new_dynamic_size()
    return rows.size(0 if batch_first else 1)


def _input_gates_fake(mode: str, input: Tensor, weight_ih: Tensors, bias_ih: Tensors, bias_hh: Tensors) -> Tensor:
    return input.new_empty(*input.shape[:-1], len(weight_ih) * weight_ih[0].size(0))


def _states_fake(
    mode: str, rows: Tensor, weight_hh: Tensors, weight_hr: Tensors, hx: Tensor | None, cx: Tensor | None,
    batch_sizes: Tensor | None, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    directions = len(weight_hh)
    batch = _state_batch(rows, hx, cx, batch_sizes, batch_first)
    output = rows.new_empty(*rows.shape[:-1], directions * weight_hh[0].size(1))
    h_n = rows.new_empty(directions, batch, weight_hh[0].size(1))
    c_n = rows.new_empty(directions, batch, weight_hh[0].size(0) // 4) if mode == "LSTM" else rows.new_empty(0)
    return output, h_n, c_n


def _saved_fake(mode: str, rows: Tensor, weight_hh: Tensors, save_reserve: bool) -> tuple[Tensor, Tensor]:
    width = len(weight_hh) * (weight_hh[0].size(0) // GATES[mode])
    cells = rows.new_empty(*rows.shape[:-1], width) if save_reserve and mode == "LSTM" else rows.new_empty(0)
    keeps = save_reserve and mode in ("LSTM", "GRU")
    return cells, rows.new_empty(*rows.shape[:-1], 4 * width) if keeps else rows.new_empty(0)


def _recurrence_forward_fake(
    mode: str, gates: Tensor, weight_hh: Tensors, bias_hh: Tensors, weight_hr: Tensors, hx: Tensor | None,
    cx: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, batch_first: bool,
    save_reserve: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    states = _states_fake(mode, gates, weight_hh, weight_hr, hx, cx, batch_sizes, batch_first)
    return (*states, *_saved_fake(mode, gates, weight_hh, save_reserve))


def _recurrence_backward_fake(
    mode: str, grad_output: Tensor | None, grad_h_n: Tensor | None, grad_c_n: Tensor | None, grad_cells: Tensor | None,
    output: Tensor, cells: Tensor, reserve: Tensor, weight_hh: Tensors, weight_hr: Tensors, hx: Tensor | None,
    cx: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None, resets: Tensor | None, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    rows = output.shape[:-1]
    width = len(weight_hh) * weight_hh[0].size(0)
    grad_gates = output.new_empty(*rows, width)
    grad_gates_hh = output.new_empty(*rows, width) if mode == "GRU" else output.new_empty(0)
    grad_hx = output.new_empty(0 if hx is None else hx.shape)
    grad_cx = output.new_empty(0 if cx is None or mode != "LSTM" else cx.shape)
    grad_projected = output.new_empty(output.shape if weight_hr else (0,))
    return grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected


def _layer_forward_fake(
    mode: str, input: Tensor, weight_ih: Tensors, weight_hh: Tensors, bias_ih: Tensors, bias_hh: Tensors,
    weight_hr: Tensors, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None,
    resets: Tensor | None, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    states = _states_fake(mode, input, weight_hh, weight_hr, hx, cx, batch_sizes, batch_first)
    return (*states, *_saved_fake(mode, input, weight_hh, True))


def _layer_inference_fake(
    mode: str, input: Tensor, weight_ih: Tensors, weight_hh: Tensors, bias_ih: Tensors, bias_hh: Tensors,
    weight_hr: Tensors, hx: Tensor | None, cx: Tensor | None, batch_sizes: Tensor | None, lengths: Tensor | None,
    resets: Tensor | None, batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _states_fake(mode, input, weight_hh, weight_hr, hx, cx, batch_sizes, batch_first)


def _matmul_fake(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(a.size(0), b.size(1))


_FAKES: dict[str, Callable[..., Any]] = {
    "input_gates": _input_gates_fake,
    "recurrence_forward": _recurrence_forward_fake,
    "recurrence_backward": _recurrence_backward_fake,
    "layer_forward": _layer_forward_fake,
    "layer_inference": _layer_inference_fake,
    "matmul": _matmul_fake,
}


def _register(namespace: str) -> None:
    """Tells torch the shapes of one library's results, for tracing, and its vmap rules."""
    rules = _vmap_rules(_library_kernels(namespace))
    for name, fake in _FAKES.items():
        if not hasattr(getattr(torch.ops, namespace), name):
            continue
        torch.library.register_fake(f"{namespace}::{name}", fake)
        torch.library.register_vmap(f"{namespace}::{name}", rules[name])


if library_error is None:
    _register("rnnfast")
    _wanted = os.environ.get("RNNFAST_CPU_ISA", "")
    if _wanted and _wanted != cpu_isa():
        warnings.warn(f"RNNFAST_CPU_ISA={_wanted}: this processor has none such, {cpu_isa()} is used", stacklevel=2)


def _define_triton() -> torch.library.Library:
    """The ops of rnnfast/triton as torch sees them: opaque, with the signatures of the shapes' functions above."""

    def late(name: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            from .triton import layers  # imports Triton, which takes a second

            return getattr(layers, name)(*arguments)

        return call

    library = torch.library.Library("rnnfast_triton", "DEF")
    for name in Kernels._fields:
        library.define(name + torch.library.infer_schema(_FAKES[name], mutates_args=()))
        # On the CPU they run in Triton's interpreter.
        for key in ("CUDA", "CPU"):
            library.impl(name, late(name), key)
    return library


if libraries.triton_error is None:
    # An op lives as long as its Library.
    _triton_library = _define_triton()
    kernels["triton"] = _library_kernels("rnnfast_triton")
    _register("rnnfast_triton")

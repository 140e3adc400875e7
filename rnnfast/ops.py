"""The ops of rnnfast: the compiled kernels where they are built, plain PyTorch (`reference.py`) otherwise.

Each function here has the signature of the op of the same name (`signatures.py`; docs/design.md lists shapes and
meanings) and one more argument, `backend`: the name of the backend that runs it, None for the one that
`backends.select` chooses. They are for direct calls: the layers go to `kernels` themselves.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import libraries, reference
from .reference import GATES as GATES

# None where the C++ library is loaded, else why it is not.
library_error = libraries.cpu_error

# Bound once: on the path of every call.
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_below_autograd: Any = torch._C._AutoDispatchBelowAutograd


class Kernels(NamedTuple):
    """One backend's functions, each with the signature of the op of its name."""

    input_projection: Callable[..., Any]
    recurrence_forward: Callable[..., Any]
    recurrence_backward: Callable[..., Any]
    layer_forward: Callable[..., Any]
    layer: Callable[..., Any]


def overloads(namespace: str) -> Kernels:
    """The ops of a loaded library as torch calls them: with their derivatives (`registration.py`)."""
    # Bound once: looking one up through torch.ops costs as much as a small call.
    return Kernels(*(getattr(getattr(torch.ops, namespace), name).default for name in Kernels._fields))


def _without_derivative(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op for callers that need no derivative or bring one: the dispatcher goes past Autograd's Python."""

    def call(*arguments: Any) -> Any:
        # Those who trace want to see the op itself.
        if _is_compiling() or _functorch_active() or _grad_enabled():
            return op(*arguments)
        with _below_autograd():
            return op(*arguments)

    return call


def _library_kernels(namespace: str) -> Kernels:
    return Kernels(*map(_without_derivative, overloads(namespace)))


def add_kernels(backend: str, namespace: str) -> None:
    """Makes the ops of a namespace those of a backend."""
    kernels[backend] = _library_kernels(namespace)
    _overloads[backend] = overloads(namespace)


def differentiable(backend: str) -> Kernels:
    """A backend's ops for programs that run without rnnfast's Python: with their derivatives."""
    return _overloads.get(backend) or kernels[backend]


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
    # Registered by registration.py.
    "triton": _missing_kernels("triton", libraries.triton_error),
    "emulated": _missing_kernels("emulated", "call rnnfast.ops.load_emulated first"),
}
_overloads: dict[str, Kernels] = {}
if library_error is None:
    _overloads["cpu"] = overloads("rnnfast")
if libraries.cuda_error is None:
    _overloads["cuda"] = overloads("rnnfast")

_matmul: Callable[..., Any] = (
    torch.mm if library_error is not None else _without_derivative(torch.ops.rnnfast.matmul.default)
)

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
        add_kernels("emulated", "rnnfast_emulated")
        from .registration import register

        register("rnnfast_emulated", lambda _: "emulated")
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


def _run(name: str, tensor: Tensor, backend: str | None, arguments: tuple[Any, ...]) -> Any:
    return getattr(kernels[backend or _backend_for(tensor)], name)(*arguments)


def input_projection(mode: str, input: Tensor, *places: Tensor | None, backend: str | None = None) -> Tensor:
    """All gates' input part, (rows, D*G*H): `W_ih x + b_ih + b_hh` (without b_hn for the GRU's n gate)."""
    result: Tensor = _run("input_projection", input, backend, (mode, input, *places))
    return result


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Runs every step of one layer, all its directions: (output, h_n, c_n, cell_states, reserve)."""
    arguments = (mode, batch_first, save_reserve, gates, hx, cx, batch_sizes, lengths, resets, *places)
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _run("recurrence_forward", gates, backend, arguments)
    return results


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
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The steps backwards: (grad_gates, grad_gates_hh, grad_hx, grad_cx, grad_projected)."""
    arguments = (
        mode, batch_first, grad_output, grad_h_n, grad_c_n, grad_cell_states, output, cell_states, reserve, hx, cx, batch_sizes,
        lengths, resets, *places,
    )  # fmt: skip
    model = reserve if output is None else output
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _run("recurrence_backward", model, backend, arguments)
    return results


def layer_forward(
    mode: str,
    batch_first: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *places: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One layer, with what backward needs: (output, h_n, c_n, cell_states, reserve)."""
    arguments = (mode, batch_first, input, hx, cx, batch_sizes, lengths, resets, *places)
    results: tuple[Tensor, Tensor, Tensor, Tensor, Tensor] = _run("layer_forward", input, backend, arguments)
    return results


def layer(
    mode: str,
    batch_first: bool,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
    *places: Tensor | None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, (output, h_n, c_n): keeps what backward needs only where somebody may differentiate it."""
    arguments = (mode, batch_first, input, hx, cx, batch_sizes, lengths, resets, *places)
    results: tuple[Tensor, Tensor, Tensor] = _run("layer", input, backend, arguments)
    return results


class Matmul(torch.autograd.Function):
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
        return batched_matmul(info, in_dims, a, b)


# The types whose products the C++ library does faster than ATen's BLAS; oneDNN does the 16-bit ones well.
_MATMUL_TYPES = (torch.float32, torch.float64)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for two matrices, each with any strides of which one is 1; differentiable any number of times."""
    if library_error is not None or not a.is_cpu or a.dtype not in _MATMUL_TYPES:
        return torch.mm(a, b)
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return _matmul(a, b)
    return Matmul.apply(a, b)


def batched_matmul(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """The rule of `torch.vmap` for the product."""
    a = a if in_dims[0] is None else a.movedim(in_dims[0], 0)
    b = b if in_dims[1] is None else b.movedim(in_dims[1], 0)
    return torch.matmul(a, b), 0


if library_error is None:
    _wanted = os.environ.get("RNNFAST_CPU_ISA", "")
    if _wanted and _wanted != cpu_isa():
        warnings.warn(f"RNNFAST_CPU_ISA={_wanted}: this processor has none such, {cpu_isa()} is used", stacklevel=2)

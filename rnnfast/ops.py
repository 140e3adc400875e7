"""The compiled ops as Python calls them, and the matrix product of the CPU library."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import libraries

# None where the C++ library is loaded, else why it is not.
library_error = libraries.cpu_error

# Bound once: on the path of every call.
_functorch_active = torch._C._are_functorch_transforms_active
_is_compiling = torch.compiler.is_compiling
_grad_enabled = torch.is_grad_enabled
_below_autograd: Any = torch._C._AutoDispatchBelowAutograd


class Kernels(NamedTuple):
    """One backend's functions. Each takes the arguments of the op of its name, flat (`signatures.OPS`)."""

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


def without_derivatives(namespace: str) -> Kernels:
    """The ops of a loaded library for callers that need no derivative or bring one."""
    return Kernels(*map(_without_derivative, overloads(namespace)))


def quantized_layer(namespace: str) -> Callable[..., Any]:
    """The op of that name, of a namespace that has it: of inference alone, so its derivative is an error."""
    return _without_derivative(getattr(torch.ops, namespace).quantized_layer.default)


def on_cuda(kernels: Kernels) -> Kernels:
    """The ops for CUDA tensors: torch's TF32 flag is handed to the library first."""
    return Kernels(*map(_on_cuda, kernels))


def on_cpu(kernels: Kernels) -> Kernels:
    """The ops for CPU tensors: torch's flag for float32 in bfloat16 is handed to the library first."""
    return Kernels(*map(_on_cpu, kernels))


def _on_cpu(op: Callable[..., Any]) -> Callable[..., Any]:
    follow = libraries.follow_bf16

    def call(*arguments: Any) -> Any:
        follow()
        return op(*arguments)

    return call


def _on_cuda(op: Callable[..., Any]) -> Callable[..., Any]:
    """The op, with torch's TF32 flag handed to the library first, and torch's own error where memory runs out."""
    with_error = with_torchs_memory_error(op)

    def call(*arguments: Any) -> Any:
        libraries.follow_tf32()
        return with_error(*arguments)

    return call


def with_torchs_memory_error(op: Callable[..., Any]) -> Callable[..., Any]:
    """An op for CUDA tensors, with torch's own error where memory runs out."""

    def call(*arguments: Any) -> Any:
        try:
            return op(*arguments)
        except RuntimeError as error:
            # The library cannot throw torch's classes: they are not part of the stable interface.
            if isinstance(error, torch.OutOfMemoryError) or ": out of memory: " not in str(error):
                raise
            raise torch.OutOfMemoryError(str(error)) from None

    return call


_matmul: Callable[..., Any] = (
    torch.mm if library_error is not None else _without_derivative(torch.ops.rnnfast.matmul.default)
)


# Instruction sets with kernels that multiply in bfloat16 (csrc/cpu/pairs.h).
ISAS_WITH_PAIRS = ("amx_bf16", "avx512_bf16")


def use_cpu_isa(name: str) -> str:
    """Switches the C++ kernels to another instruction set, for tests and measurements.

    Args:
        name: amx_bf16, avx512_bf16, avx512_vnni, avx512, avx2 or portable; "" changes nothing.

    Returns:
        The one in use now.

    Raises:
        RuntimeError: this processor lacks it, or the name is unknown.
    """
    used = str(torch.ops.rnnfast.use_cpu_isa(name))
    if name:
        _choose_products(used)
    return used


def use_cpu_team(name: str) -> str:
    """Says whose threads the C++ kernels use beside the caller's, for tests and measurements.

    Args:
        name: auto (chosen anew for each call), alone (none), pool (torch's pool, whatever its threads are doing) or
            helpers (rnnfast's own threads, wherever they sleep); "" changes nothing.

    Returns:
        The one in use now. Results do not depend on it.

    Raises:
        RuntimeError: the name is unknown.
    """
    return str(torch.ops.rnnfast.use_cpu_team(name))


def cpu_isa() -> str:
    """The instruction set that the C++ kernels use, as `use_cpu_isa` names it ("" without the library)."""
    return "" if library_error is not None else use_cpu_isa("")


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


class _Limit(NamedTuple):
    """Up to how many multiplications a product goes to the C++ library; larger ones to ATen."""

    plain: float
    transposed: float  # where the columns of `a` lie one after the other, as in the gradients of weights


_EVERY, _NONE = _Limit(math.inf, math.inf), _Limit(-1, -1)
# Of products up to here calling ATen's takes longer than they do.
_SMALL = 2e6
# Where a type is not here ATen's product runs.
_limits: dict[torch.dtype, _Limit] = {}
# Of the ISA in use.
_has_pairs = False
# Gradients of gates are multiplied at once by the step that made them up to here, where larger products are ATen's.
_SMALL_OF_STEP = 1e6


def _choose_products(isa: str) -> None:
    """Whose product is faster, by type; measured (docs/performance.md).

    In float32 and float64 ATen's is MKL's, which is the faster one on the processors of its maker. That ours is as
    right, where an ISA is asked for by name, is for tests to see.

    ATen's in 16 bits are oneDNN's, which are fast where the processor has instructions for the type, and slow where
    not (it says of bfloat16 that AVX-512 is enough). Those of transposed matrices it turns around first: AMX's own do
    that as they pack.
    """
    global _has_pairs
    _has_pairs = isa in ISAS_WITH_PAIRS
    vendors = isa == _best_isa and torch.backends.mkl.is_available() and torch.ops.rnnfast.cpu_vendor() == "intel"
    _limits.update(dict.fromkeys((torch.float32, torch.float64), _NONE if vendors else _EVERY))
    for dtype, question in (
        (torch.bfloat16, "_is_mkldnn_bf16_supported"),
        (torch.float16, "_is_mkldnn_fp16_supported"),
    ):
        # A torch without oneDNN has no such op.
        fast = torch.backends.mkldnn.is_available() and getattr(torch.ops.mkldnn, question)()
        if not fast or (isa == "avx512" and dtype == torch.bfloat16):
            _limits[dtype] = _EVERY
        else:
            turned = isa == "amx_bf16" and dtype == torch.bfloat16
            _limits[dtype] = _Limit(_SMALL, math.inf if turned else _SMALL)


def atens_products_are_the_makers() -> bool:
    """Whether ATen's product in float32 and float64 is one that was made for this processor by who made that."""
    return _limits.get(torch.float32) is _NONE


def _is_own(a: Tensor, b: Tensor) -> bool:
    """Whether the C++ library makes this product."""
    limit = _limits.get(a.dtype)
    if limit is None or not a.is_cpu:
        return False
    if limit is _NONE:
        # In bfloat16, where that is allowed, ours is the only one.
        return a.dtype == torch.float32 and _has_pairs and libraries.bf16_allowed()
    rows, columns = a.shape
    most = limit.transposed if rows > 1 and a.stride(0) == 1 else limit.plain
    # A program that is being traced must not be bound to sizes.
    return most == math.inf or (not _is_compiling() and rows * columns * b.shape[1] <= most)


def _direct(name: str) -> Callable[..., Any]:
    """An op of the CPU library for plain calls that need no derivative or bring one, with nothing before it."""
    if library_error is not None:

        def missing(*_: Any) -> Any:
            raise RuntimeError(f"rnnfast: backend 'cpu' is not available: {library_error}")

        return missing
    op: Any = getattr(torch.ops.rnnfast, name).default._op
    follow = libraries.follow_bf16

    def call(*arguments: Any) -> Any:
        follow()
        with _below_autograd():
            return op(*arguments)

    return call


# csrc/schemas.h says what they take and give. Of one step, and the whole backward pass of a layer.
step, step_backward, layer_backward = _direct("step"), _direct("step_backward"), _direct("layer_backward")


def whole_backward_by_aten(dtype: torch.dtype) -> bool:
    """Whether `layer_backward` is to take ATen's products. (In 16 bits they take more memory than its chunks spare.)"""
    return _limits.get(dtype) is _NONE and not (dtype == torch.float32 and _has_pairs and libraries.bf16_allowed())


def makes_product(rows: Tensor, weights: Tensor) -> bool:
    """Whether the C++ library is to multiply gradients of gates, as many as `rows` (..., I), by weights (G*H, I)."""
    limit = _limits.get(rows.dtype)
    if limit is None or not rows.is_cpu:
        return False
    most = _SMALL_OF_STEP if limit is _NONE else limit.plain
    return most == math.inf or rows.numel() * weights.shape[0] <= most


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` for two matrices, each with any strides of which one is 1; differentiable any number of times."""
    # The library's product has no derivative in forward mode.
    if forward_ad._current_level >= 0 or not _is_own(a, b):
        return torch.mm(a, b)
    if a.dtype == torch.float32:
        libraries.follow_bf16()
    if not torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
        return _matmul(a, b)
    return Matmul.apply(a, b)


def batched_matmul(info: Any, in_dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
    """The rule of `torch.vmap` for the product."""
    a = a if in_dims[0] is None else a.movedim(in_dims[0], 0)
    b = b if in_dims[1] is None else b.movedim(in_dims[1], 0)
    return torch.matmul(a, b), 0


_wanted = os.environ.get("RNNFAST_CPU_ISA", "")
# The processor's own, where nobody asked for one by name.
_best_isa = cpu_isa() if not _wanted else ""
if library_error is None:
    _choose_products(cpu_isa())
    if _wanted and _wanted != cpu_isa():
        warnings.warn(f"RNNFAST_CPU_ISA={_wanted}: this processor has none such, {cpu_isa()} is used", stacklevel=2)
    _wanted = os.environ.get("RNNFAST_CPU_TEAM", "")
    try:
        use_cpu_team(_wanted)
    except RuntimeError as _error:
        _why = str(_error).splitlines()[0]
        warnings.warn(f"RNNFAST_CPU_TEAM={_wanted}: {_why}; {use_cpu_team('')} is used", stacklevel=2)

"""The types that layers compute in where autocast is on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Tensors = Sequence[Tensor]

# Bound once: on the path of every call.
_is_any_enabled = torch._C._is_any_autocast_enabled


def _autocast_available(device: str) -> bool:
    """Whether autocast knows this type of device. About the others, meta among them, it must not be asked."""
    return torch.amp.is_autocast_available(device)


# The effect of torch.compiler.assume_constant_result, which would import Dynamo: 2.11's cannot trace the question.
_autocast_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def by_autocast(
    mode: str, device: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Tensors
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensors]:
    """Casts to the types that torch.nn's modules compute in under autocast; float64 is left alone, as autocast does.

    LSTM and RNN take the autocast type everywhere, the GRU on accelerators only: on the CPU the type of its results is
    promoted from autocast's and its state's, which has the input's type where none is given. (One thing is not copied:
    on CUDA PyTorch casts to float16 for cuDNN also where autocast says bfloat16.)
    """
    dtype = torch.get_autocast_dtype(device)
    # The MGU, which torch.nn lacks, does as the RNN.
    if mode == "GRU" and device == "cpu":
        dtype = torch.promote_types(dtype, (input if hx is None else hx).dtype)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return (
        cast(input),
        None if hx is None else cast(hx),
        None if cx is None else cast(cx),
        [cast(weight) for weight in weights],
    )


def autocasts(input: Tensor) -> bool:
    """Whether autocast, which is on for some device, is for this tensor's."""
    device = input.device.type
    return _autocast_available(device) and torch.is_autocast_enabled(device)


def with_autocast(
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Tensors,
    run: Callable[[Tensor, Tensor | None, Tensor | None, Tensors], Any],
    cast: Callable[..., tuple[Any, ...]] = by_autocast,
) -> Any:
    """`run` of these in the types that autocast, where it is on, wants."""
    if not _is_any_enabled() or not autocasts(input):
        return run(input, hx, cx, weights)
    device = input.device.type
    now = cast(mode, device, input, hx, cx, weights)
    # From here on the types are what they should be; autocast must not touch the products inside.
    with torch.autocast(device, enabled=False):
        return run(*now)


def to_float32(
    mode: str, device: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Tensors
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensors]:
    """`by_autocast` for a kernel that computes in float32 alone, whose weights are no matter of autocast."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    return cast(input), None if hx is None else cast(hx), None if cx is None else cast(cx), weights

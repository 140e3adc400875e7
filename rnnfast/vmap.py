"""How a layer runs on arguments with a vmapped dimension.

Batched data are folded into the batch: the vmapped dimension (V) goes right behind B, where it does no harm to packed
rows either: row (t, b) becomes rows (t, b*V) .. (t, b*V + V-1), and every batch size V times itself. Batched weights
leave nothing to share: one call a member.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .signatures import BATCH, OTHER, ROWS, SIZES, STATE, WEIGHT


def _member(arg: Any, dim: int | None, index: int) -> Any:
    return arg if dim is None else arg.select(dim, index)


def _axes(
    args: Sequence[Any], in_dims: Sequence[int | None], roles: Sequence[int], batch_first: bool
) -> dict[int, int]:
    """Where V goes, before folding, by role."""
    packed = any(role == SIZES and arg is not None for arg, role in zip(args, roles, strict=True))
    # The first argument of rows is never `resets`: input, gates or a gradient come before.
    rows = next(
        arg.dim() - (dim is not None)
        for arg, dim, role in zip(args, in_dims, roles, strict=True)
        if role == ROWS and arg is not None and not _is_placeholder(arg, dim)
    )
    one_step = rows == 2 and not packed
    return {ROWS: 1 if packed or one_step or batch_first else 2, STATE: 1 if one_step else 2, BATCH: 1}


def batched_call(
    call: Callable[..., tuple[Tensor, ...]],
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
    roles: Sequence[int],
    out_roles: Sequence[int],
    batch_first: bool,
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Runs `call` on arguments with a vmapped dimension of `size`: the results and their out_dims."""
    for dim, role in zip(in_dims, roles, strict=True):
        if role == SIZES and dim is not None:
            raise RuntimeError("rnnfast: vmap over batch_sizes is not possible; map over the packed data")
    if any(dim is not None for dim, role in zip(in_dims, roles, strict=True) if role == WEIGHT):
        members = [call(*[_member(a, d, i) for a, d in zip(args, in_dims, strict=True)]) for i in range(size)]
        # Results that do not apply, of shape (0,), stay as they are.
        stacked = [r[0] if _is_placeholder(r[0]) else torch.stack(r) for r in zip(*members, strict=True)]
        return tuple(stacked), tuple(None if _is_placeholder(r) else 0 for r in stacked)

    axes = _axes(args, in_dims, roles, batch_first)
    folded = []
    for arg, dim, role in zip(args, in_dims, roles, strict=True):
        if arg is None or role in (WEIGHT, OTHER) or _is_placeholder(arg, dim):
            folded.append(arg)
        elif role == SIZES:
            folded.append(arg * size)
        else:
            axis = axes[role]
            if dim is None:
                arg = arg.unsqueeze(axis).expand(*arg.shape[:axis], size, *arg.shape[axis:])
            else:
                arg = arg.movedim(dim, axis)
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


def _is_placeholder(tensor: Any, dim: int | None = None) -> bool:
    """Whether this is what stands for a tensor that does not apply."""
    return isinstance(tensor, Tensor) and dim is None and tensor.dim() == 1 and tensor.size(0) == 0

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

from .sequences import Role, Sequences
from .signatures import role_of

# Autograd's own batched gradients (is_grads_batched), which are no transform of torch.func.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def is_any_batched(*grads: Tensor | None) -> bool:
    """Whether any of these is several gradients in one, of which only ops that return tensors know."""
    for grad in grads:  # noqa: SIM110 (a generator would cost more than the loop)
        if grad is not None and _is_batched(grad):
            return True
    return False


def _member(arg: Any, dim: int | None, index: int) -> Any:
    return arg if dim is None else arg.select(dim, index)


def _axes(arguments: dict[str, Any], dims: dict[str, int | None]) -> dict[Role, int]:
    """Where V goes, before folding, by role."""
    packed = arguments["batch_sizes"] is not None
    rank = next(
        value.dim() - (dims[name] is not None)
        for name, value in arguments.items()
        # Those of the sequences have no features.
        if role_of(name) is Role.ROWS
        and name not in Sequences._fields
        and value is not None
        and not _is_placeholder(value, dims[name])
    )
    one_step = rank == 2 and not packed
    return {
        Role.ROWS: 1 if packed or one_step or arguments["batch_first"] else 2,
        Role.STATE: 1 if one_step else 2,
        Role.BATCH: 1,
    }


def batched_call(
    call: Callable[..., tuple[Tensor, ...]],
    size: int,
    in_dims: Sequence[int | None],
    args: Sequence[Any],
    names: Sequence[str],
    out_roles: Sequence[Role],
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Runs `call` on arguments with a vmapped dimension of `size`: the results and their out_dims.

    Args:
        names: of the arguments, which say what they are (`signatures.role_of`).
        out_roles: what the results are.
    """
    roles = [role_of(name) for name in names]
    for dim, role in zip(in_dims, roles, strict=True):
        if role is Role.SIZES and dim is not None:
            raise RuntimeError("rnnfast: vmap over batch_sizes is not possible; map over the packed data")
    if any(dim is not None for dim, role in zip(in_dims, roles, strict=True) if role is Role.WEIGHT):
        members = [call(*[_member(a, d, i) for a, d in zip(args, in_dims, strict=True)]) for i in range(size)]
        # Results that do not apply, of shape (0,), stay as they are.
        stacked = [r[0] if _is_placeholder(r[0]) else torch.stack(r) for r in zip(*members, strict=True)]
        return tuple(stacked), tuple(None if _is_placeholder(r) else 0 for r in stacked)

    axes = _axes(dict(zip(names, args, strict=True)), dict(zip(names, in_dims, strict=True)))
    folded = []
    for arg, dim, role in zip(args, in_dims, roles, strict=True):
        if arg is None or role in (Role.WEIGHT, Role.OTHER) or _is_placeholder(arg, dim):
            folded.append(arg)
        elif role is Role.SIZES:
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

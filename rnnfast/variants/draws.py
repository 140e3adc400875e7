"""What layers with options draw from torch's generator."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def dropped(size: tuple[Any, ...], p: float, like: Tensor) -> Tensor:
    """A mask of dropout: 0 with probability p, else 1 / (1 - p), of the type and device of `like`."""
    return torch.nn.functional.dropout(like.new_ones(size), p, True)


def chosen(size: tuple[Any, ...], p: float, like: Tensor) -> Tensor:
    """A bool mask: True with probability p, on the device of `like`.

    On the CPU four values come from a number of 64 bits, each from 16 of them: torch draws one number after the other,
    and a mask of each step has as many values as the states. p is rounded to a 65536th.
    """
    watched = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
    if like.device.type != "cpu" or watched or torch._C._are_functorch_transforms_active():
        # What compiles and is traced, and what vmap knows to draw anew for each.
        return torch.rand(size, device=like.device) < p
    count, share = math.prod(size), round(p * 65536)
    if share == 65536:
        return torch.ones(size, dtype=torch.bool, device=like.device)
    numbers = torch.empty((count + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    return (numbers.view(torch.int16)[:count] < share - 32768).view(size)


def dropped_weights(weight: Tensor, p: float) -> Tensor:
    """A weight with elements dropped: what F.dropout does, in less time."""
    # Of what `chosen` makes of p, so that the expectation is the weight.
    p = round(p * 65536) / 65536
    if p == 1:
        return weight * 0
    mask = chosen(tuple(weight.shape), p, weight).logical_not_().to(weight.dtype)
    return weight * mask.mul_(1 / (1 - p))

"""What the tests of layers with options share: comparison, draws, parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

SEED = 77
GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Of one float64 computation and another."""
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


def dropped(p: float, *size: int, like: Tensor) -> Tensor:
    """As F.dropout draws it: 0 or 1 / (1 - p)."""
    return F.dropout(like.new_ones(size), p, True)


def kept(p: float, *size: int) -> Tensor:
    """Where zoneout keeps the old state, and weight dropout drops: quarters of 64-bit numbers, the lowest first."""
    count = math.prod(size)
    numbers = torch.empty(-(-count // 4), dtype=torch.int64).random_(-(2**63), None)
    quarters = torch.stack([numbers << 48, numbers << 32, numbers << 16, numbers], 1) >> 48
    return (quarters.flatten()[:count] < round(p * 65536) - 32768).reshape(size)


def weight_mask(p: float, *size: int, like: Tensor) -> Tensor:
    """What weight dropout multiplies weights by."""
    return (~kept(p, *size)).to(like.dtype) / (1 - round(p * 65536) / 65536)


def randomise(module: nn.RNNBase) -> None:
    """No parameter is left at a value that would hide what it does. The bounds are torch.nn's."""
    bound = module.hidden_size**-0.5
    for name, parameter in module.named_parameters():
        nn.init.uniform_(parameter, -bound, bound)
        if name.startswith("weight_norm"):
            parameter.data += 1

"""Layers with options on the card, by the CUDA kernels and by Triton's, against the CPU's kernels in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast.variants import layers as variant_layers
from tolerances import error
from variant_layers import B, I, R, every_layer, made, run, same

# Beyond what is launched one by one: the turns of a captured graph, and some that are left.
STEPS = 21
BATCH = 40
LENGTHS = [STEPS, 3, 0, 9] * 10


@pytest.fixture(autouse=True)
def _draws_are_the_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device has a generator of its own, which draws other masks."""
    for name in ("dropped", "chosen"):
        original: Any = getattr(variant_layers, name)

        def moved(size: Any, p: float, like: Tensor, original: Any = original) -> Tensor:
            return original(size, p, like.cpu()).to(like.device)

        monkeypatch.setattr(variant_layers, name, moved)
    of_weights: Any = variant_layers.dropped_weights
    monkeypatch.setattr(
        variant_layers, "dropped_weights", lambda weight, p: of_weights(weight.cpu(), p).to(weight.device)
    )


def on_cpu(layer: Any, *given: Tensor, **options: Any) -> list[Tensor]:
    """What the CPU's kernels make of it, in float64."""
    with rnnfast.backend("cpu"):
        return run(copy.deepcopy(layer).cpu().double(), *(tensor.cpu().double() for tensor in given), **options)


@every_layer
def test_results_and_gradients(device: str, name: str) -> None:
    layer, x, lengths = made(name, bidirectional=True), R(STEPS, BATCH, I), torch.tensor(LENGTHS)
    resets = torch.rand(STEPS, BATCH) < 0.1
    expected = on_cpu(layer, x, lengths=lengths, resets=resets)
    found = run(layer.to(device), x.to(device), lengths=lengths.to(device), resets=resets.to(device))
    same([value.cpu() for value in found], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("hidden_size", [70, 1024])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_in_other_types(device: str, dtype: torch.dtype, hidden_size: int) -> None:
    """The yardstick is the reference in the same type, on the CPU."""
    options = {"layer_norm": "separate", "cell_norm": "output", "zoneout": 0.1, "peephole": True}
    layer = rnnfast.LSTM(I, hidden_size, dtype=dtype, **options).eval()
    # At 1 a step makes more of a rounding error, not less, and the types can no longer be compared.
    torch.nn.init.constant_(layer.weight_norm_ih_l0, 0.3)
    torch.nn.init.constant_(layer.weight_norm_hh_l0, 0.3)
    x = torch.randn(STEPS, B, I).to(dtype)
    expected = on_cpu(layer, x)
    with rnnfast.backend("reference"):
        yardstick = run(layer, x)
    for value, own, true in zip(run(layer.to(device), x.to(device)), yardstick, expected, strict=True):
        unit = torch.finfo(dtype).eps * max(1.0, true.abs().max().item())
        assert error(value.cpu(), true) <= 3 * error(own, true) + 4 * unit


def test_slstm(device: str) -> None:
    layer, x = rnnfast.SLSTM(I, 24, num_heads=3, dtype=torch.float64), R(STEPS, B, I)
    expected = on_cpu(layer, x)
    same([value.cpu() for value in run(layer.to(device), x.to(device))], expected, rtol=1e-9, atol=1e-9)

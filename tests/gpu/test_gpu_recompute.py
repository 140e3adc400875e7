"""Layers that recompute on the card, by both backends, against themselves without; and how much memory that takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import rnnfast
from rnnfast.recompute.memory import WAYS, Training, memory_of

T, B, I, H = 300, 40, 24, 64  # noqa: E741


@pytest.mark.parametrize("way", ["gates", "chunks", 7])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {"bidirectional": True, "num_layers": 2}),
        ("GRU", {"bidirectional": True}),
        ("RNN", {}),
        ("LSTM", {"layer_norm": "separate", "peephole": True}),
    ],
    ids=["LSTM", "GRU", "RNN", "options"],
)
def test_outputs_and_gradients_are_the_same(device: str, kind: str, options: dict[str, Any], way: Any) -> None:
    module = getattr(rnnfast, kind)(I, H, dtype=torch.float64, device=device, **options)
    lengths = torch.randint(0, T + 1, (B,), device=device)
    lengths[0] = T
    x = torch.randn(T, B, I, dtype=torch.float64, device=device)
    found = []
    for each in (None, way):
        module.recompute = each
        module.zero_grad()
        data = x.clone().requires_grad_()
        output = module(data, lengths=lengths)[0]
        output.square().sum().backward()
        found.append([output, data.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*found, strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("way", WAYS)
def test_the_peak_is_what_the_formula_says(device: str, way: str | None) -> None:
    steps = 20_000
    module = rnnfast.LSTM(16, 256, recompute=way, device=device)
    module(torch.randn(64, 8, 16, device=device))[1][0].sum().backward()
    x = torch.randn(steps, 8, 16, device=device)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    module(x)[1][0].sum().backward()
    taken = torch.cuda.max_memory_allocated() - before
    memory = memory_of(Training("LSTM", 16, 256, steps, 8 * steps, output_gradient=False), way)
    assert memory.kept <= taken < 1.15 * memory.peak + 32e6

"""Layers that recompute, and their calls: for the tests of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import rnnfast
from module_cases import leaves
from variant_cases import randomise

T, B, I, H = 13, 4, 3, 4  # noqa: E741
LENGTHS = [13, 5, 8, 0]
DOUBLE = {"dtype": torch.float64}
EVERY_WAY = ("gates", "chunks", 1, 3, T)
PLAIN: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"bidirectional": True, "num_layers": 2, "bias": False}),
    ("LSTM", {"proj_size": 2, "bidirectional": True}),
    ("GRU", {"bidirectional": True, "num_layers": 2, "dropout": 0.3}),
    ("MGU", {"bidirectional": True}),
    ("RNN", {"bidirectional": True, "nonlinearity": "relu"}),
]
WITH_OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"layer_norm": "separate", "cell_norm": "output", "bidirectional": True, "num_layers": 2}),
    ("LSTM", {"layer_norm": "joint", "cell_norm": "carried", "norm": "rms", "peephole": True}),
    ("LSTM", {"zoneout": 0.3, "recurrent_dropout": 0.3, "bidirectional": True}),
    ("LSTM", {"coupled": True, "recurrent_dropout": 0.3, "dropout_mode": "candidate", "input_dropout": 0.2}),
    ("LSTM", {"weight_dropout": 0.3, "bidirectional": True}),
    ("GRU", {"reset_after": False, "num_heads": 2, "bidirectional": True, "recurrent_dropout": 0.3}),
    ("GRU", {"layer_norm": "separate", "zoneout": 0.3, "bidirectional": True}),
    ("GRU", {"preset": "dreamer_v3", "bias": False}),
    ("GRU", {"reset_gate": False, "candidate_activation": "relu", "gate_activation": "hard_sigmoid"}),
    ("RNN", {"layer_norm": "joint", "num_heads": 2, "bidirectional": True}),
    ("SLSTM", {"num_heads": 2}),
]
# How rows lie, and which count.
ROWS = ("dense", "batch_first", "unbatched", "lengths", "resets", "both", "both, batch_first", "packed")


def name_of(case: Any) -> str:
    return str(case) if isinstance(case, (str, int)) else f"{case[0]} {' '.join(map(str, case[1].values()))}"


def made(kind: str, options: dict[str, Any], **more: Any) -> Any:
    module = getattr(rnnfast, kind)(I, H, **{**DOUBLE, **options, **more})
    randomise(module)
    return module


def input_of(rows: str, **kind: Any) -> tuple[Any, dict[str, Any]]:
    """x of a call, (T, B, I) or as `rows` has it, and what goes with it."""
    x = torch.randn(T, B, I, **{**DOUBLE, **kind})
    given: dict[str, Any] = {}
    if rows == "unbatched":
        return x[:, 0], given
    if "lengths" in rows or "both" in rows:
        given["lengths"] = torch.tensor(LENGTHS)
    if "resets" in rows or "both" in rows:
        given["resets"] = torch.rand(T, B) < 0.25
    if "batch_first" in rows:
        x = x.transpose(0, 1).contiguous()
        given = {name: value.t().contiguous() if name == "resets" else value for name, value in given.items()}
    return x, given


def run(module: Any, rows: str, x: Any, given: dict[str, Any], states: Any) -> list[Tensor]:
    """Every result and gradient of one call, from draws that are the same each time."""
    torch.manual_seed(5)
    module.zero_grad()
    x = x.clone().requires_grad_()
    entering = [state.clone().requires_grad_() for state in states]
    data = pack_padded_sequence(x, [7, 13, 9, 1], enforce_sorted=False) if rows == "packed" else x
    hx: Any = tuple(entering) if len(entering) == 2 else entering[0] if entering else None
    results = leaves(module(data, hx, **given))
    results = [result for result in results if result.requires_grad]
    grads = [torch.randn(result.shape, **DOUBLE).to(result.dtype) for result in results]
    torch.autograd.backward(results, grads)
    found = [x, *entering, *module.parameters()]
    assert all(tensor.grad is not None for tensor in found)
    return [*results, *(tensor.grad for tensor in found)]


def states_of(module: Any, rows: str) -> list[Tensor]:
    count = module.num_layers * (2 if module.bidirectional else 1)
    batch = () if rows == "unbatched" else (B,)
    lstm = isinstance(module, rnnfast.LSTM)
    h = torch.randn(count, *batch, module.proj_size or H, **DOUBLE)
    return [h, torch.randn(count, *batch, H, **DOUBLE)] if lstm else [h]


def held(module: Any, rows: str, ways: Any = EVERY_WAY, with_states: bool = True, steps: int = T) -> None:
    """Against the same module without recompute; steps: of rows that are (T, B, I)."""
    x, given = input_of(rows)
    if steps < T:
        x, given = x[:steps], {name: value.clamp(max=steps) for name, value in given.items()}
    states = states_of(module, rows) if with_states else []
    module.recompute = None
    expected = run(module, rows, x, given, states)
    for way in ways:
        module.recompute = way
        for one, other in zip(run(module, rows, x, given, states), expected, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text: f"{way}: {text}")  # noqa: B023

"""What lies beyond a row's length, or enters a row without steps, reaches no gradient: whatever it holds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import rnnfast
from emulated_library import emulated_problem
from rnnfast import functional

T, B, I, H = 6, 4, 3, 5  # noqa: E741
LENGTHS = torch.tensor([T, 0, 3, 1])
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"proj_size": 2, "bidirectional": True}),
    ("GRU", {"bidirectional": True, "num_layers": 2}),
    ("RNN", {"batch_first": True, "bidirectional": True}),
]


# Calls of the last two are slow: what differs between backends is enough there.
RUNS = [
    *(("cpu", form, value) for form in ("module", "functional") for value in (math.nan, math.inf, 3e38)),
    ("reference", "module", math.nan),
    ("reference", "functional", math.inf),
    ("emulated", "module", math.nan),
    ("triton", "module", math.nan),
]


def needs(backend: str) -> None:
    if backend == "emulated":
        if (why := emulated_problem()) is not None:
            pytest.skip(why)
    elif not rnnfast.backends()[backend].available:
        pytest.skip(f"backend {backend}: {rnnfast.backends()[backend].reason}")


def run(module: torch.nn.RNNBase, form: str, x: Tensor, states: tuple[Tensor, ...]) -> list[Tensor]:
    """Results, and the gradients of a loss in all of them, by the module or by the function."""
    hx: Any = states if len(states) > 1 else states[0]
    if form == "module":
        output, final = module(x, hx, lengths=LENGTHS)
    else:
        function = getattr(functional, type(module).__name__.lower())
        output, final = function(
            x, list(module.parameters()), hx, num_layers=module.num_layers, bidirectional=module.bidirectional,
            batch_first=module.batch_first, lengths=LENGTHS,
        )  # fmt: skip
    results = [output, *(final if isinstance(final, tuple) else (final,))]
    # The states of the row without a step are its initial ones: here only what is computed.
    states_of = [r[:, [0, 2, 3]] for r in results[1:]]
    loss = sum((r * r).sum() for r in [output, *states_of])
    grads = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    second = torch.autograd.grad(sum(g.sin().sum() for g in grads), list(module.parameters()))
    return [output, *states_of, *(g.detach() for g in grads), *second]


@pytest.mark.parametrize(("backend", "form", "value"), RUNS)
@pytest.mark.parametrize("where", ["padding", "state"])
@pytest.mark.parametrize(("kind", "options"), CASES)
def test_it_may_hold_anything(
    kind: str, options: dict[str, Any], where: str, backend: str, form: str, value: float
) -> None:
    needs(backend)
    module = getattr(rnnfast, kind)(I, H, dtype=torch.float32, **options)
    x = torch.randn(B, T, I) if module.batch_first else torch.randn(T, B, I)
    layers = module.num_layers * (2 if module.bidirectional else 1)
    states = [torch.randn(layers, B, size) for size in (module.proj_size or H, H)][: 2 if kind == "LSTM" else 1]
    with rnnfast.backend(backend):
        expected = run(module, form, x, tuple(states))
        x, states = x.clone(), [state.clone() for state in states]
        if where == "padding":
            beyond = torch.arange(T).unsqueeze(1) >= LENGTHS
            x[beyond.t() if module.batch_first else beyond] = value
        else:
            for state in states:
                state[:, 1] = value
        for actual, wanted in zip(run(module, form, x, tuple(states)), expected, strict=True):
            assert_close(actual, wanted)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_forward_left_undefined_reaches_no_gradient(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reserve beyond a row's length is not written: there may be anything."""
    from rnnfast.backends import BACKENDS

    module = rnnfast.LSTM(I, H, proj_size=2, bidirectional=True)
    x = torch.randn(T, B, I)

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(module(x, lengths=LENGTHS)[0].sin().sum(), list(module.parameters()))

    expected = gradients()
    name = "cpu" if rnnfast.backends()["cpu"].available else "reference"
    own = BACKENDS[name].kernels

    def poisoned(*arguments: Any) -> Any:
        results = own.layer_forward(*arguments)
        results[4][torch.arange(T).unsqueeze(1) >= LENGTHS] = value
        return results

    monkeypatch.setattr(BACKENDS[name], "kernels", own._replace(layer_forward=poisoned))
    assert_close(gradients(), expected)

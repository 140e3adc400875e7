"""Autograd's own batched gradients, which are older than torch.func's and know no rule of ours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import jacobian
from torch.testing import assert_close

import rnnfast

T, B, I, H = 4, 3, 2, 3  # noqa: E741
CASES: list[tuple[str, dict[str, Any], str]] = [
    ("LSTM", {"bidirectional": True, "proj_size": 2}, "dense"),
    ("LSTM", {"batch_first": True, "proj_size": 2}, "lengths"),
    ("GRU", {"num_layers": 2, "bias": False}, "dense"),
    ("GRU", {"bidirectional": True}, "lengths"),
    ("RNN", {"bidirectional": True}, "packed"),
    ("GRU", {}, "packed"),
    ("LSTM", {}, "resets"),
    ("LSTMCell", {}, "cell"),
    ("GRUCell", {}, "cell"),
    ("RNNCell", {}, "cell"),
]


def made(kind: str, options: dict[str, Any], form: str) -> tuple[Any, Tensor]:
    """A function of one input, and that input."""
    module = getattr(rnnfast, kind)(I, H, dtype=torch.float64, **options)
    x = (
        torch.randn(B, I)
        if form == "cell"
        else torch.randn(B, T, I)
        if options.get("batch_first")
        else torch.randn(T, B, I)
    )

    def run(x: Tensor) -> Tensor:
        if form == "lengths":
            return module(x, lengths=torch.tensor([T, 0, 2]))[0]
        if form == "resets":
            return module(x, resets=torch.arange(T * B).view(T, B) % 3 == 0)[0]
        if form == "packed":
            return module(torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([4, 3, 1])))[0].data
        result = module(x)
        return result if isinstance(result, Tensor) else result[0]

    return run, x.double().requires_grad_()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("kind", "options", "form"), CASES)
def test_batched_gradients(kind: str, options: dict[str, Any], form: str, backend: str) -> None:
    if not (found := rnnfast.backends()[backend]).available:
        pytest.skip(f"backend {backend}: {found.reason}")
    run, x = made(kind, options, form)
    with rnnfast.backend(backend):
        output = run(x)
        many = torch.randn(3, *output.shape, dtype=torch.float64)
        (together,) = torch.autograd.grad(output, x, many, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(output, x, one, retain_graph=True)[0] for one in many]
        assert_close(together, torch.stack(alone))
        assert_close(jacobian(run, x.detach(), vectorize=True), jacobian(run, x.detach()))


@pytest.mark.parametrize(("kind", "options", "form"), CASES)
def test_gradcheck_with_batched_gradients(kind: str, options: dict[str, Any], form: str) -> None:
    run, x = made(kind, options, form)
    assert torch.autograd.gradcheck(run, (x,), check_batched_grad=True)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_batched_gradients_of_the_parameters(kind: str) -> None:
    module = getattr(rnnfast, kind)(I, H, bidirectional=True, dtype=torch.float64)
    output, _ = module(torch.randn(T, B, I, dtype=torch.float64))
    parameters = list(module.parameters())
    many = torch.randn(2, *output.shape, dtype=torch.float64)
    together = torch.autograd.grad(output, parameters, many, is_grads_batched=True, retain_graph=True)
    for i, one in enumerate(many):
        alone = torch.autograd.grad(output, parameters, one, retain_graph=True)
        assert_close([each[i] for each in together], list(alone))

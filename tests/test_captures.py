"""Programs that are made of a layer and run without it: exported, traced, saved, loaded, frozen, packaged.

Each gives what the layer gives, and where a program trains, every gradient.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import rnnfast
from rnnfast import ops

pytestmark = [
    pytest.mark.skipif(ops.library_error is not None, reason=f"no C++ library: {ops.library_error}"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    # The checks of shapes are Python's: a trace does not have them.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

T, B, I, H = 6, 3, 4, 5  # noqa: E741


class Model(nn.Module):
    """A layer of ours between two of torch's, in the form that a configuration asks for."""

    def __init__(self, kind: str, form: str, **options: Any) -> None:
        super().__init__()
        self.form = form
        self.below = nn.Linear(I, I)
        self.rnn = getattr(rnnfast, kind)(I, H, **options)
        if form == "cell":
            return
        directions = 2 if self.rnn.bidirectional else 1
        self.above = nn.Linear(directions * (self.rnn.proj_size or H), 2)

    def forward(self, x: Tensor, extra: Tensor) -> tuple[Tensor, ...]:
        x = self.below(x)
        if self.form == "packed":
            packed = nn.utils.rnn.PackedSequence(x, extra)
            output, states = self.rnn(packed)
            output = output.data
        elif self.form == "lengths":
            output, states = self.rnn(x, lengths=extra)
        elif self.form == "resets":
            output, states = self.rnn(x, resets=extra)
        elif self.form == "cell":
            states = self.rnn(x[0])
            return states if isinstance(states, tuple) else (states,)
        else:
            output, states = self.rnn(x)
        return (self.above(output), *(states if isinstance(states, tuple) else (states,)))


CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "LSTM": ("LSTM", "dense", {}),
    "LSTM, projection": ("LSTM", "dense", {"proj_size": 2}),
    "GRU, no bias": ("GRU", "dense", {"bias": False}),
    "RNN, bidirectional": ("RNN", "dense", {"bidirectional": True}),
    "GRU, two layers, batch first": ("GRU", "dense", {"num_layers": 2, "batch_first": True}),
    "LSTM, packed": ("LSTM", "packed", {"bidirectional": True}),
    "GRU, lengths": ("GRU", "lengths", {}),
    "LSTM, lengths, projection": ("LSTM", "lengths", {"proj_size": 2, "bidirectional": True}),
    "RNN, resets": ("RNN", "resets", {}),
    "LSTM cell": ("LSTMCell", "cell", {}),
    "GRU cell": ("GRUCell", "cell", {}),
}
every_configuration = pytest.mark.parametrize("name", CONFIGURATIONS)


def made(name: str) -> tuple[Model, tuple[Tensor, Tensor]]:
    """A model, and arguments for it."""
    kind, form, options = CONFIGURATIONS[name]
    model = Model(kind, form, **options)
    extra = {
        "packed": torch.tensor([3, 3, 2, 1, 1, 1]),
        "lengths": torch.tensor([T, 0, 3]),
        "resets": torch.rand(T, B) < 0.3,
    }.get(form, torch.zeros(1))
    rows = (int(extra.sum()),) if form == "packed" else (T, B)
    return model, (torch.randn(*rows, I), extra)


def check(model: Model, program: Callable[..., Any], named: dict[str, Tensor], arguments: tuple[Tensor, ...]) -> None:
    """The program's results and gradients against the model's, on other data than those it was made with."""
    x = torch.randn_like(arguments[0])
    own, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, actual = model(own, *arguments[1:]), program(theirs, *arguments[1:])
    assert len(actual) == len(expected)
    directions = [torch.randn_like(value) for value in expected]
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
        assert a.requires_grad
    parameters = dict(model.named_parameters())
    assert named.keys() == parameters.keys()
    wanted = torch.autograd.grad(expected, [own, *parameters.values()], directions, allow_unused=True)
    got = torch.autograd.grad(actual, [theirs, *(named[name] for name in parameters)], directions, allow_unused=True)
    for name, a, e in zip(["input", *parameters], got, wanted, strict=True):
        assert (a is None) == (e is None), name
        if a is not None:
            assert_close(a, e, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("strict", [True, False])
@every_configuration
def test_an_exported_program_trains(name: str, strict: bool, gradients: bool) -> None:
    model, arguments = made(name)
    with torch.set_grad_enabled(gradients):
        program = torch.export.export(model, arguments, strict=strict).module()
    check(model, program, dict(program.named_parameters()), arguments)


@pytest.mark.parametrize("gradients", [True, False])
@every_configuration
def test_a_trace_is_one_graph_and_trains(name: str, gradients: bool) -> None:
    """torch.jit.trace traces again without gradients, and compares the graphs: a difference is an error here."""
    model, arguments = made(name)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model, arguments)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    loaded = torch.jit.load(buffer)
    check(model, loaded, dict(loaded.named_parameters()), arguments)


@every_configuration
def test_a_frozen_trace_runs_again_and_again(name: str) -> None:
    model, arguments = made(name)
    model.eval()
    with torch.no_grad():
        frozen = torch.jit.freeze(torch.jit.trace(model, arguments))
        for _ in range(10):
            x = torch.randn_like(arguments[0])
            assert_close(frozen(x, *arguments[1:]), model(x, *arguments[1:]))


@pytest.mark.exhaustive
@every_configuration
def test_a_package_of_machine_code(name: str, tmp_path: Path) -> None:
    """AOTInductor, which hands arguments over in forms of its own."""
    model, arguments = made(name)
    model.eval()
    with torch.no_grad():
        path = torch._inductor.aoti_compile_and_package(
            torch.export.export(model, arguments), package_path=str(tmp_path / "model.pt2")
        )
        program = torch._inductor.aoti_load_package(path)
        for _ in range(2):
            x = torch.randn_like(arguments[0])
            assert_close(tuple(program(x, *arguments[1:])), tuple(model(x, *arguments[1:])))

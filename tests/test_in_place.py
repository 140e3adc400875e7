"""What callers may do with results and gradients: no two share memory, and writing into them is as in torch.nn."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import rnnfast

LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"bidirectional": True, "proj_size": 2}),
    ("LSTM", {"num_layers": 2, "dropout": 0.3, "batch_first": True}),
    ("GRU", {"bidirectional": True}),
    ("GRU", {"bias": False, "num_layers": 2}),
    ("RNN", {"bidirectional": True}),
    ("RNN", {"nonlinearity": "identity"}),
]
CELLS: list[tuple[str, dict[str, Any]]] = [
    ("LSTMCell", {}),
    ("GRUCell", {}),
    ("RNNCell", {}),
    ("RNNCell", {"nonlinearity": "relu"}),
]
I, H = 4, 6  # noqa: E741


def module_and_inputs(kind: str, options: dict[str, Any], steps: int = 5) -> tuple[torch.nn.Module, list[Tensor]]:
    """A module, an input and the states, all of which want gradients."""
    module = getattr(rnnfast, kind)(I, H, **options)
    if kind.endswith("Cell"):
        shapes = [(3, I), (3, H), (3, H)]
    else:
        layers = module.num_layers * (2 if module.bidirectional else 1)
        shapes = [(3, steps, I) if module.batch_first else (steps, 3, I)]
        shapes += [(layers, 3, module.proj_size or H), (layers, 3, H)]
    count = 3 if kind.startswith("LSTM") else 2
    return module, [torch.randn(shape, requires_grad=True) for shape in shapes[:count]]


def results_of(module: torch.nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    states: Any = tuple(inputs[1:]) if len(inputs) > 2 else inputs[1]

    def flat(value: Any) -> Iterator[Tensor]:
        if isinstance(value, Tensor):
            yield value
        else:
            for part in value:
                yield from flat(part)

    return list(flat(module(inputs[0], states)))


def share_nothing(tensors: dict[str, Tensor]) -> None:
    for (a, one), (b, other) in itertools.combinations(tensors.items(), 2):
        assert one.untyped_storage().data_ptr() != other.untyped_storage().data_ptr(), (a, b)


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize(("kind", "options"), [*LAYERS, *CELLS])
@pytest.mark.parametrize("gradients", [True, False])
def test_no_two_tensors_share_memory(kind: str, options: dict[str, Any], steps: int, gradients: bool) -> None:
    module, inputs = module_and_inputs(kind, options, steps)
    with torch.set_grad_enabled(gradients):
        results = results_of(module, inputs)
    for result in results:
        assert result.is_contiguous()
        assert not result._is_view()
    named = {f"result {i}": result for i, result in enumerate(results)}
    share_nothing({**named, **{f"input {i}": value for i, value in enumerate(inputs)}})
    if not gradients:
        return
    wanted = {**{f"input {i}": value for i, value in enumerate(inputs)}, **dict(module.named_parameters())}
    cotangents = [torch.randn_like(result) for result in results]
    grads = torch.autograd.grad(results, list(wanted.values()), cotangents)
    share_nothing({**named, **dict(zip(wanted, grads, strict=True)), **{f"g{i}": g for i, g in enumerate(cotangents)}})


@pytest.mark.parametrize(("kind", "options"), [*LAYERS, *CELLS])
def test_results_can_be_detached_in_place(kind: str, options: dict[str, Any]) -> None:
    module, inputs = module_and_inputs(kind, options)
    for result in results_of(module, inputs):
        result.detach_()
        assert not result.requires_grad


@pytest.mark.parametrize(("kind", "options"), [*LAYERS, *CELLS])
def test_nothing_saved_is_missing(kind: str, options: dict[str, Any]) -> None:
    """Tools that draw graphs look at what every node saved: a None there breaks them."""
    module, inputs = module_and_inputs(kind, options)
    nodes, seen = [result.grad_fn for result in results_of(module, inputs)], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "saved_tensors"):
            assert all(isinstance(tensor, Tensor) for tensor in node.saved_tensors)
        nodes += [following for following, _ in node.next_functions]
    assert any(type(node).__name__.startswith("Layer") for node in seen) or kind.endswith("Cell")


@pytest.mark.parametrize(("kind", "options"), LAYERS)
@pytest.mark.parametrize("what", ["bias", "weight_ih"])
def test_what_the_gradient_does_not_need_may_change(kind: str, options: dict[str, Any], what: str) -> None:
    """As in torch.nn; the second derivative needs all of it, and says so."""
    module, inputs = module_and_inputs(kind, {**options, "num_layers": 1, "dropout": 0.0})
    changed = [parameter for name, parameter in module.named_parameters() if name.startswith(what)]
    if not changed:
        pytest.skip("no bias")
    parameters = list(module.parameters())
    x = inputs[0].detach().requires_grad_(what == "bias")

    def gradients(in_between: bool, create_graph: bool = False) -> tuple[Tensor, ...]:
        output = results_of(module, [x, *inputs[1:]])[0]
        if in_between:
            with torch.no_grad():
                for parameter in changed:
                    parameter.mul_(1.0)
        return torch.autograd.grad(output.sin().sum(), parameters, create_graph=create_graph)

    for before, after in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(before, after)
    with pytest.raises(RuntimeError, match=f"{what}.* modified by an inplace operation"):
        gradients(True, create_graph=True)


def test_an_output_changed_in_place_is_noticed() -> None:
    """A layer's output is saved: the guide says so."""
    for kind in ("LSTM", "GRU", "RNN"):
        output, _ = getattr(rnnfast, kind)(I, H)(torch.randn(5, 3, I))
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.mul_(2).sum().backward()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_the_layout_depends_on_no_option(kind: str, batch_first: bool, training: bool) -> None:
    module = getattr(rnnfast, kind)(I, H, 3, batch_first=batch_first, dropout=0.2).train(training)
    theirs = getattr(torch.nn, kind)(I, H, 3, batch_first=batch_first, dropout=0.2).train(training)
    theirs.load_state_dict(module.state_dict())
    x = torch.randn(3, 5, I)
    torch.manual_seed(5)
    output, _ = module(x)
    torch.manual_seed(5)
    assert_close(output, theirs(x)[0])
    assert output.is_contiguous()
    output.view(3, -1)

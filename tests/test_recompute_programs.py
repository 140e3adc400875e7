"""Layers that recompute in programs: of torch.compile, with and without `fullgraph`, and saved ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

from recompute_cases import DOUBLE, B, I, T, made, name_of

CASES: list[tuple[str, dict[str, Any]]] = [("LSTM", {}), ("GRU", {"zoneout": 0.2, "bidirectional": True})]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", [("LSTM", {"bidirectional": True}), ("GRU", {"zoneout": 0.2})], ids=name_of)
@pytest.mark.parametrize("way", ["gates", "chunks"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_one_node_in_a_compiled_program(case: tuple[str, dict[str, Any]], way: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    module = made(*case, recompute=way).eval()
    nodes: list[Any] = []
    compiled: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        op = torch.ops.rnnfast_recompute.forward
        nodes.append([node for node in graph.graph.nodes if node.target in (op, op.default)])
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    program = torch.compile(lambda x: module(x)[0], fullgraph=True, dynamic=dynamic, backend=backend)
    for steps in (T, 29):
        grads = []
        x = torch.randn(steps, B, I, **DOUBLE)
        for call in (program, lambda x: module(x)[0]):
            module.zero_grad()
            call(x).square().sum().backward()
            grads.append([parameter.grad for parameter in module.parameters()])
        for one, other in zip(*grads, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-10)
        compiled.append(len(nodes))
    assert {len(of_graph) for of_graph in nodes} == {1}
    assert (compiled[0] == compiled[1]) == dynamic


@pytest.mark.parametrize("strict", [False, True])
def test_saved_programs_recompute_nothing(strict: bool) -> None:
    module, x = made("LSTM", {}, recompute="gates"), torch.randn(T, B, I, **DOUBLE)
    program = torch.export.export(module, (x,), strict=strict)
    assert "recompute" not in str(program.graph)
    assert_close(program.module()(x), module(x))
    assert_close(torch.jit.trace(module, (x,))(x), module(x))


@pytest.mark.parametrize(
    ("case", "rows", "way", "dynamic", "most"),
    [
        # One more where Dynamo learns that T changes.
        *[(case, "dense", way, None, 2) for case in CASES for way in ("gates", "chunks", 3, "auto")],
        *[(case, "dense", "auto", True, 2) for case in CASES],
        # Every program breaks where B is a number in a tensor; the loops over pieces are not compiled.
        *[(CASES[0], "packed", way, None, 6) for way in (None, "gates", "chunks")],
    ],
    ids=lambda value: name_of(value) if isinstance(value, tuple) else None,
)
def test_with_default_arguments(case: Any, rows: str, way: Any, dynamic: bool | None, most: int) -> None:
    """No new program for every T, and no graph of the pieces."""
    torch._dynamo.reset()
    module = made(*case, recompute=way, **({"memory_budget": "2 kB"} if way == "auto" else {})).eval()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    def loss(x: Any) -> Any:
        return module(x)[0]

    program = torch.compile(loss, backend=backend, dynamic=dynamic)
    for steps in (T, 29, 50, 21):
        x = torch.randn(steps, B, I, **DOUBLE)
        data = pack_padded_sequence(x, [steps, steps - 2, 5, 1]) if rows == "packed" else x
        grads = []
        for call in (program, loss):
            module.zero_grad()
            output = call(data)
            (output.data if rows == "packed" else output).square().sum().backward()
            grads.append([parameter.grad for parameter in module.parameters()])
        for one, other in zip(*grads, strict=True):
            assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert len(graphs) <= most

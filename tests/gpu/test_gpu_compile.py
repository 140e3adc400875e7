"""torch.compile and torch.export on the card: one graph, and the same results."""

import importlib.util
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gpu_device import ON_CARD, only_on_card
from torch import Tensor, nn

import rnnfast
from tolerances import check_equal

CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 3, "batch_first": True}),
    ("GRU", {"bidirectional": True}),
    ("RNN", {"nonlinearity": "identity"}),
]
over_cases = pytest.mark.parametrize(("kind", "options"), CASES, ids=str)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Tagger(nn.Module):
    def __init__(self, kind: str, device: str, **options: Any) -> None:
        super().__init__()
        self.rnn = getattr(rnnfast, kind)(4, 9, device=device, **options)
        width = (self.rnn.proj_size or 9) * (2 if self.rnn.bidirectional else 1)
        self.head = nn.Linear(width, 3, device=device)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.rnn(input)[0]).relu()


def run(model: nn.Module, function: Any, input: Tensor) -> list[Tensor]:
    output = function(input)
    return [output.detach().clone(), *torch.autograd.grad(output.sin().sum(), list(model.parameters()))]


def same(model: nn.Module, function: Any, device: str, steps: int = 6) -> None:
    input = torch.randn(steps, 5, 4, device=device)
    for index, (value, other) in enumerate(zip(run(model, function, input), run(model, model, input), strict=True)):
        check_equal(f"result {index}", value, other, 1e-4)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
@over_cases
def test_one_graph_for_every_length(device: str, kind: str, options: dict[str, Any], compiler: str) -> None:
    if compiler == "inductor" and ON_CARD and importlib.util.find_spec("triton") is None:
        pytest.skip("inductor needs triton on CUDA")
    model = Tagger(kind, device, **options)
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend=compiler)
    for steps in (6, 11):
        same(model, fast, device, steps)


@only_on_card
@pytest.mark.parametrize("steps", [6, 70])
def test_reduce_overhead(device: str, steps: int) -> None:
    """The compiler's own CUDA graphs. At 70 steps the Triton kernels would capture one of their own outside of them."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("inductor needs triton on CUDA")
    model = Tagger("LSTM", device)
    fast = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        same(model, fast, device, steps)


def test_autocast_inside_a_graph(device: str) -> None:
    model = Tagger("GRU", device)
    fast = torch.compile(model, fullgraph=True, backend="aot_eager")
    input = torch.randn(6, 5, 4, device=device)
    with torch.autocast(device, torch.bfloat16):
        output, expected = fast(input), model(input)
    assert output.dtype == expected.dtype == torch.bfloat16
    check_equal("output", output, expected, 0.01)
    output.float().sum().backward()


def test_export(device: str) -> None:
    model = Tagger("LSTM", device, batch_first=True).eval()
    T, B = torch.export.Dim("T", min=2, max=1000), torch.export.Dim("B", min=2, max=1000)
    with torch.no_grad():
        input = torch.randn(3, 6, 4, device=device)
        program = torch.export.export(model, (input,), dynamic_shapes={"input": {0: B, 1: T}}, strict=False)
        for shape in ((3, 6), (7, 50)):
            input = torch.randn(*shape, 4, device=device)
            check_equal("output", program.module()(input), model(input), 1e-6)

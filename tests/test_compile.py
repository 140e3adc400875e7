"""torch.compile and torch.export: one graph, forward and backward, for every length.

The kernels are one op to the compiler; the reference is a Python loop over the steps, which nobody compiles.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from cases import make_call
from rnnfast import functional
from test_autograd import LAYOUTS, compare, exhaustive, layer, over_layouts, over_modes, scalar
from tolerances import check_equal


@pytest.fixture(autouse=True)
def _needs_library() -> Iterator[None]:
    available = rnnfast.backends()["cpu"]
    if not available.available:
        pytest.skip(f"backend cpu: {available.reason}")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(function: Callable[..., Any], backend: str = "aot_eager", **options: Any) -> Any:
    """fullgraph: a graph break is an error."""
    return torch.compile(function, fullgraph=True, backend=backend, **options)


def same_results_and_gradients(
    actual: tuple[Tensor, ...], expected: tuple[Tensor, ...], inputs: list[Tensor], tolerance: float = 1e-12
) -> None:
    compare(actual, expected, tolerance)
    ours, theirs = (
        torch.autograd.grad(sum(value.sin().sum() for value in results), inputs) for results in (actual, expected)
    )
    compare(ours, theirs, tolerance)


@over_layouts
@over_modes
@pytest.mark.parametrize("initial", [False, pytest.param(True, marks=exhaustive)], ids=["zeros", "hx"])
def test_forward_and_backward(mode: str, P: int, layout: str, initial: bool) -> None:
    call = make_call(mode, P=P, D=2, initial=initial, **LAYOUTS[layout]).leaves()
    inputs = list(call.tensors().values())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(values)).values())

    same_results_and_gradients(compiled(function)(*inputs), function(*inputs), inputs)


class Tagger(torch.nn.Module):
    """A user's model: our layers inside a larger module."""

    def __init__(self, kind: type[torch.nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, 4, dtype=torch.float64)
        self.rnn = kind(4, 5, dtype=torch.float64, **options)
        width = self.rnn.hidden_size * (2 if self.rnn.bidirectional else 1)
        self.head = torch.nn.Linear(width, 3, dtype=torch.float64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, 11, shape)


over_kinds = pytest.mark.parametrize("kind", [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN])


def run_lengths(model: Tagger, fast: Any, shapes: list[tuple[int, int]]) -> None:
    for T, B in shapes:
        batch = tokens(T, B)
        same_results_and_gradients((fast(batch),), (model(batch),), list(model.parameters()), 1e-11)


@over_kinds
@pytest.mark.parametrize("dynamic", [True, None], ids=["dynamic", "automatic"])
def test_model_in_one_graph_for_every_length(kind: type[torch.nn.RNNBase], dynamic: bool | None) -> None:
    model = Tagger(kind, bidirectional=True)
    counter = CompileCounterWithBackend("aot_eager")
    fast = compiled(model, counter, dynamic=dynamic)
    # Automatic: the first call has fixed sizes; when T, then B, are seen to vary, they become symbols.
    run_lengths(model, fast, [(6, 3)] if dynamic else [(6, 3), (7, 3), (9, 4)])
    count = counter.frame_count
    run_lengths(model, fast, [(12, 5), (31, 2), (50, 7), (8, 9)])
    assert counter.frame_count == count


def test_inductor() -> None:
    model = Tagger(rnnfast.GRU)
    run_lengths(model, compiled(model, "inductor", dynamic=True), [(6, 3), (9, 2)])


@over_kinds
def test_inference_in_one_graph(kind: type[torch.nn.RNNBase]) -> None:
    model = Tagger(kind, num_layers=2, batch_first=True).eval()
    fast = compiled(model, dynamic=True)
    with torch.no_grad():
        for T, B in ((6, 3), (7, 2)):
            batch = tokens(B, T)
            check_equal("output", fast(batch), model(batch), 1e-11)


def graph_size(T: int, num_layers: int = 1) -> int:
    """Nodes of the forward and backward graphs together."""
    sizes = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        sizes.append(len(graph.graph.nodes))
        return graph

    from torch._dynamo.backends.common import aot_autograd

    torch._dynamo.reset()
    model = Tagger(rnnfast.LSTM, num_layers=num_layers)
    compiled(model, aot_autograd(fw_compiler=count))(tokens(T, 3)).sum().backward()
    assert len(sizes) == 2
    return sum(sizes)


def test_graph_does_not_grow_with_the_steps() -> None:
    assert graph_size(4) == graph_size(200)
    # and grows with the layers by the same few nodes each
    assert graph_size(5, 3) - graph_size(5, 2) == graph_size(5, 4) - graph_size(5, 3) < 60


def test_lengths_resets_and_cells_of_a_module() -> None:
    module = rnnfast.LSTM(4, 5, bidirectional=True, dtype=torch.float64)
    call = make_call("LSTM", I=4, lengths=True, resets=True)

    def function(input: Tensor, lengths: Tensor, resets: Tensor) -> tuple[Tensor, ...]:
        output, (h_n, c_n), cells = module(input, lengths=lengths, resets=resets, return_cell_states=True)
        return output, h_n, c_n, cells

    arguments = (call.input, call.lengths, call.resets)
    parameters = list(module.parameters())
    same_results_and_gradients(compiled(function)(*arguments), function(*arguments), parameters)


@pytest.mark.parametrize("initial", [True, False], ids=["hx", "zeros"])
@pytest.mark.parametrize("sorted_rows", [True, False], ids=["sorted", "unsorted"])
def test_packed_sequence_through_a_module(initial: bool, sorted_rows: bool) -> None:
    module = rnnfast.GRU(3, 5, bidirectional=True, dtype=torch.float64)
    lengths = torch.tensor([5, 4, 2] if sorted_rows else [4, 2, 5])
    input = torch.randn(5, 3, 3, dtype=torch.float64)
    packed = pack_padded_sequence(input, lengths, enforce_sorted=sorted_rows)
    hx = torch.randn(2, 3, 5, dtype=torch.float64) if initial else None

    def function(data: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        output, h_n = module(PackedSequence(data, *rest), hx)
        return output.data, h_n

    arguments = tuple(value for value in packed if value is not None)
    same_results_and_gradients(compiled(function)(*arguments), function(*arguments), list(module.parameters()))


@pytest.mark.parametrize("batch_first", [True, False])
def test_dropout_between_layers(batch_first: bool) -> None:
    """The compiler draws its own random numbers, so: what is dropped, and that gradients follow."""
    module = rnnfast.LSTM(4, 5, num_layers=2, dropout=0.5, batch_first=batch_first)
    input = torch.randn(6, 3, 4)
    outputs = [compiled(module)(input)[0] for _ in range(2)]
    assert not torch.equal(*outputs)
    outputs[0].sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in module.parameters())
    module.eval()
    check_equal("eval", compiled(module)(input)[0], module(input)[0], 1e-6)


def test_autocast() -> None:
    module = rnnfast.LSTM(4, 5)
    input = torch.randn(6, 3, 4)
    fast = compiled(module)
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = fast(input)[0], module(input)[0]
    assert output.dtype == torch.bfloat16
    check_equal("output", output, expected, 0.01)
    output.float().sum().backward()
    assert module.weight_ih_l0.grad.dtype == torch.float32


def test_backend_by_name_inside_and_around() -> None:
    call = make_call("GRU", dtype=torch.float32)
    weights = [call.weight_ih[0], call.weight_hh[0], call.bias_ih[0], call.bias_hh[0]]

    def function(input: Tensor) -> Tensor:
        return functional.gru(input, weights)[0]

    def inside(input: Tensor) -> Tensor:
        with rnnfast.backend("reference"):
            return functional.gru(input, weights)[0]

    expected = function(call.input)
    check_equal("inside", compiled(inside)(call.input), expected, 1e-6)
    counter = CompileCounterWithBackend("eager")
    fast = compiled(function, counter)
    check_equal("auto", fast(call.input), expected, 1e-6)
    with rnnfast.backend("reference"):
        check_equal("around", fast(call.input), expected, 1e-6)
    assert counter.frame_count == 2
    fast(call.input)
    assert counter.frame_count == 2


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("eager", marks=exhaustive)])
@over_modes
def test_torch_func_inside_a_compiled_function(mode: str, P: int, backend: str) -> None:
    call = make_call(mode, P=P, D=2)
    values = tuple(call.tensors().values())
    inputs = torch.randn(3, *call.input.shape, dtype=torch.float64)

    def loss(*members: Tensor) -> Tensor:
        return scalar(layer(call, list(members)))

    def of_input(input: Tensor) -> Tensor:
        return loss(input, *values[1:])

    functions: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda *members: grad(loss, argnums=tuple(range(len(values))))(*members), values),
        (lambda many: (vmap(of_input)(many),), (inputs,)),
        (lambda many: (vmap(grad(of_input))(many),), (inputs,)),
        (lambda one: (jvp(of_input, (one,), (one.cos(),))[1],), (call.input,)),
    ]
    for function, arguments in functions:
        torch._dynamo.reset()
        compare(compiled(function, backend)(*arguments), function(*arguments))


# ---- export ---------------------------------------------------------------------------------------------------------


@over_kinds
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad", "no_grad"])
def test_export(kind: type[torch.nn.RNNBase], strict: bool, grad_mode: bool) -> None:
    model = Tagger(kind, num_layers=2, bidirectional=True, batch_first=True).eval()
    T, B = torch.export.Dim("T", min=2, max=1000), torch.export.Dim("B", min=2, max=1000)
    with torch.set_grad_enabled(grad_mode):
        program = torch.export.export(model, (tokens(3, 6),), dynamic_shapes={"tokens": {0: B, 1: T}}, strict=strict)
    for shape in ((3, 6), (2, 2), (7, 50)):
        batch = tokens(*shape)
        check_equal("output", program.module()(batch), model(batch), 1e-12)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_export_in_training_mode(strict: bool) -> None:
    model = Tagger(rnnfast.LSTM, num_layers=2, dropout=0.5, batch_first=True)
    T, B = torch.export.Dim("T", min=2, max=1000), torch.export.Dim("B", min=2, max=1000)
    program = torch.export.export(model, (tokens(3, 6),), dynamic_shapes={"tokens": {0: B, 1: T}}, strict=strict)
    assert program.module()(tokens(5, 9)).shape == (5, 9, 3)


@pytest.mark.parametrize("kind", [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN])
@pytest.mark.parametrize("initial", [True, False])
def test_packed_rows_in_one_graph(kind: type[torch.nn.RNNBase], initial: bool) -> None:
    """Of any order, with a state or without: the number of rows is a shape, and no number is read from a tensor."""
    module = kind(3, 4, 2, bidirectional=True, dtype=torch.float64)
    x = torch.randn(6, 3, 3, dtype=torch.float64)
    packed = pack_padded_sequence(x, torch.tensor([2, 6, 3]), enforce_sorted=False)
    packed.data.requires_grad_()
    h = torch.randn(4, 3, 4, dtype=torch.float64)
    hx: Any = None if not initial else (h, h) if kind is rnnfast.LSTM else h

    def function(packed: PackedSequence) -> tuple[Tensor, ...]:
        output, states = module(packed, hx)
        return (output.data, *(states if isinstance(states, tuple) else (states,)))

    same_results_and_gradients(compiled(function)(packed), function(packed), [packed.data, *module.parameters()])

"""rnnfast.functional: stacked layers, dropout, autocast and the argument checks of lstm, gru and rnn."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from module_cases import torch_autocasts
from rnnfast import functional
from tolerances import check_equal

KINDS = {
    "LSTM": (torch.nn.LSTM, functional.lstm, {}),
    "LSTM-projected": (torch.nn.LSTM, functional.lstm, {"proj_size": 2}),
    "GRU": (torch.nn.GRU, functional.gru, {}),
    "RNN": (torch.nn.RNN, functional.rnn, {}),
}


@pytest.fixture(params=["reference", "cpu"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    available = rnnfast.backends()[request.param]
    if not available.available:
        pytest.skip(f"backend {request.param}: {available.reason}")
    with rnnfast.backend(request.param):
        yield request.param


def flatten(results: Any) -> list[Tensor]:
    if isinstance(results, PackedSequence):
        return [results.data]
    return [results] if isinstance(results, Tensor) else [leaf for part in results for leaf in flatten(part)]


def gradients(results: list[Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(sum(value.sin().sum() for value in results), inputs, retain_graph=True)


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("layout", ["dense", "batch_first", "packed"])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_stack_with_dropout_is_torch_nns(kind: str, dropout: float, bidirectional: bool, layout: str) -> None:
    """The same generator, the same masks: results and gradients number by number."""
    build, function, options = KINDS[kind]
    options = {"num_layers": 3, "bidirectional": bidirectional, "batch_first": layout == "batch_first", **options}
    module = build(3, 5, dropout=dropout, dtype=torch.float64, **options)
    input = torch.randn(4, 6, 3, dtype=torch.float64, requires_grad=True)
    rows: Any = input
    extra: dict[str, Any] = {}
    if layout == "packed":
        rows = pack_padded_sequence(input, torch.tensor([4, 4, 3, 2, 1, 1]))
        extra["batch_sizes"] = rows.batch_sizes
    inputs = [input, *module.parameters()]
    call = {name: value for name, value in options.items() if name != "proj_size"}
    torch.manual_seed(7)
    expected = flatten(module(rows))
    torch.manual_seed(7)
    actual = flatten(function(flatten(rows)[0], module._flat_weights, dropout=dropout, training=True, **call, **extra))
    for a, e in zip([*actual, *gradients(actual, inputs)], [*expected, *gradients(expected, inputs)], strict=True):
        check_equal(kind, a, e, 1e-12)
    evaluated = flatten(function(flatten(rows)[0], module._flat_weights, dropout=dropout, **call, **extra))
    for a, e in zip(evaluated, flatten(module.eval()(rows)), strict=True):
        check_equal(kind + " eval", a, e, 1e-12)


def test_cells_are_those_of_the_last_layer() -> None:
    module = torch.nn.LSTM(3, 5, num_layers=2, dtype=torch.float64)
    input = torch.randn(6, 4, 3, dtype=torch.float64)
    for weights in (module._flat_weights, [weight.detach() for weight in module._flat_weights]):
        _, _, cells = functional.lstm(input, weights, num_layers=2, return_cell_states=True)
        expected = torch.stack([module(input[: t + 1])[1][1][-1] for t in range(6)])
        check_equal("cells", cells, expected)
        assert cells.requires_grad == weights[0].requires_grad


def test_identity_is_linear() -> None:
    weights = [torch.randn(2, 3), torch.randn(2, 2) / 4]
    input = torch.randn(5, 4, 3)
    output, h_n = functional.rnn(input, weights, nonlinearity="identity")
    h = torch.zeros(4, 2)
    for t in range(5):
        h = input[t] @ weights[0].T + h @ weights[1].T
        check_equal(str(t), output[t], h, 1e-5)
    check_equal("h_n", h_n[0], h, 1e-5)


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("own", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("inside", [True, False], ids=["backward inside", "backward outside"])
def test_autocast(kind: str, dtype: torch.dtype, own: torch.dtype, inside: bool) -> None:
    build, function, _ = KINDS[kind]
    module = build(3, 5, num_layers=2, dtype=own)
    input = torch.randn(6, 4, 3).to(own).requires_grad_()
    inputs = [input, *module.parameters()]
    with torch.autocast("cpu", dtype):
        results = flatten(function(input, module._flat_weights, num_layers=2))
        if inside:
            grads = gradients(results, inputs)
    if not inside:
        grads = gradients(results, inputs)
    # float64 stays. CPU autocast: LSTM and RNN take its type, GRU's results have the widest type around.
    wanted = dtype if kind != "GRU" else torch.promote_types(own, dtype)
    wanted = torch.float64 if own == torch.float64 else wanted
    assert {value.dtype for value in results} == {wanted}
    if torch_autocasts(kind, dtype) and not (own == torch.bfloat16 and dtype == torch.float16):
        with torch.autocast("cpu", dtype):
            theirs = flatten(module(input))
        assert {value.dtype for value in theirs} == {wanted}
    exact_module = build(3, 5, num_layers=2, dtype=torch.float64)
    exact_module.load_state_dict(module.state_dict())
    exact_input = input.detach().double().requires_grad_()
    exact = flatten(exact_module(exact_input))
    exact_grads = gradients(exact, [exact_input, *exact_module.parameters()])
    tolerance = 1e-6 if torch.float64 in (wanted, own) else 0.05
    for a, e in zip([*results, *grads], [*exact, *exact_grads], strict=True):
        scale = max(1.0, e.abs().max().item())
        assert (a.double() - e).abs().max() <= tolerance * scale
    assert [grad.dtype for grad in grads] == [value.dtype for value in inputs]


# ---- arguments ------------------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> dict[str, Any]:
    module = torch.nn.LSTM(3, 5, num_layers=2)
    return {"input": torch.randn(4, 2, 3), "weights": module._flat_weights, "num_layers": 2} | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input": torch.randn(4, 2)}, "input should be 3-D"),
        ({"input": torch.zeros(4, 2, 3, dtype=torch.int64)}, "input should be of a floating type"),
        ({"input": torch.randn(4, 2, 4)}, r"weights\[0\], weight_ih of layer 0, should be \[20, 4\], got \[20, 3\]"),
        ({"input": torch.randn(4, 2, 3).double()}, "input is torch.float64, the weights are torch.float32"),
        ({"num_layers": 3}, "weights should hold 2 or 3 or 4 or 5 tensors for each of 3"),
        ({"num_layers": 0}, "weights should hold"),
        ({"dropout": 1.5}, r"dropout should be in \[0, 1\]"),
        ({"hx": (torch.zeros(2, 3, 5), torch.zeros(2, 2, 5))}, r"hx\[0\] should be \[2, 2, 5\], got \[2, 3, 5\]"),
        ({"hx": (torch.zeros(2, 2, 5), torch.zeros(2, 2, 4))}, r"hx\[1\] should be \[2, 2, 5\], got \[2, 2, 4\]"),
        ({"hx": (torch.zeros(2, 2, 5).double(), torch.zeros(2, 2, 5))}, r"hx\[0\] is torch.float64"),
        ({"lengths": torch.tensor([4, 2, 1])}, r"Expected lengths of shape \(N,\) = \(2,\), got \(3,\)"),
        ({"lengths": torch.tensor([4.0, 2.0])}, "lengths should be integers, got a tensor of torch.float32"),
        (
            {"resets": torch.zeros(2, 4, dtype=torch.bool)},
            r"Expected resets of shape \(T, N\) = \(4, 2\), got \(2, 4\)",
        ),
        ({"resets": torch.zeros(4, 2)}, "resets should be a bool tensor, got torch.float32"),
        ({"batch_sizes": torch.tensor([2, 1])}, "input should be packed rows, 2-D"),
        (
            {"input": torch.randn(3, 3), "batch_sizes": torch.tensor([2, 1]), "lengths": torch.tensor([2, 1])},
            "lengths cannot be given with packed input",
        ),
        ({"input": torch.randn(3, 3), "batch_sizes": torch.tensor([2.0, 1.0])}, "batch_sizes should be 1-D int64"),
    ],
)
def test_wrong_arguments(changed: dict[str, Any], message: str) -> None:
    # The words for lengths and resets are those of the modules: a TypeError where the type is wrong.
    with pytest.raises((ValueError, TypeError), match=message):
        functional.lstm(**arguments(**changed))


def test_wrong_weights() -> None:
    weights = list(arguments()["weights"])
    with pytest.raises(ValueError, match=r"weights\[3\], bias_hh of layer 0, should be \[20\], got \[19\]"):
        functional.lstm(**arguments(weights=[*weights[:3], weights[3][1:], *weights[4:]]))
    with pytest.raises(ValueError, match=r"weights\[2\] should be torch.float32 as weights\[0\], got torch.float64"):
        functional.lstm(**arguments(weights=[*weights[:2], weights[2].double(), *weights[3:]]))
    with pytest.raises(ValueError, match="weight_hh should be"):
        functional.gru(torch.randn(4, 2, 3), [torch.randn(15, 3), torch.randn(14, 5)])
    with pytest.raises(ValueError, match=r"weight_hh should be \[15, 5\], got \[15, 4\]"):
        functional.gru(torch.randn(4, 2, 3), [torch.randn(15, 3), torch.randn(15, 4)])
    with pytest.raises(ValueError, match=r"nonlinearity should be one of tanh, relu, identity.*, got 'gelu'"):
        functional.rnn(torch.randn(4, 2, 3), [torch.randn(5, 3), torch.randn(5, 5)], nonlinearity="gelu")
    with pytest.raises(ValueError, match="weights should hold 2 or 4"):
        functional.rnn(torch.randn(4, 2, 3), [torch.randn(5, 3), torch.randn(5, 5), torch.randn(2, 5)])

"""One step, of cells and of layers with T = 1: results that may be written into, and the choice between our kernels and
torch's own op in training, which nobody must notice but by the clock.
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import rnnfast
from rnnfast import cells, ops

# The package's function of the same name hides it.
backends = sys.modules["rnnfast.backends"]
pytestmark = pytest.mark.skipif(ops.library_error is not None, reason="the C++ library is not built")

CELLS = [("LSTMCell", {}), ("GRUCell", {}), ("RNNCell", {}), ("RNNCell", {"nonlinearity": "relu"})]
over_cells = pytest.mark.parametrize(("kind", "options"), CELLS, ids=["LSTM", "GRU", "RNN", "RNN relu"])
GATED = pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])


@pytest.fixture(params=["kernels", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two runs one step in training, whatever its size."""
    reason = "for the test" if request.param == "torch" else None
    monkeypatch.setattr(backends, "torchs_step_is_faster", lambda *call: reason)
    return str(request.param)


@pytest.fixture
def torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own op for every size."""
    monkeypatch.setattr(backends, "torchs_step_is_faster", lambda *call: "for the test")


def pair(kind: str, *sizes: int, **options: Any) -> tuple[Any, Any]:
    """torch.nn's module and ours, with the same parameters."""
    theirs, ours = getattr(nn, kind)(*sizes, **options), getattr(rnnfast, kind)(*sizes, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def leaves(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in leaves(part)]


def ran_kernels(result: Any) -> bool:
    """Whether our Function made this, be it not the last to touch it."""
    pending, names = [leaves(result)[0].grad_fn], []
    while pending:
        node = pending.pop()
        names.append(node.name())
        pending += [before for before, _ in node.next_functions if before is not None]
    return not {"LayerBackward", "StepBackward"}.isdisjoint(names)


def derivatives(module: nn.Module, run: Callable[[Any, list[Tensor]], Any], inputs: list[Tensor]) -> list[Tensor]:
    """Results, first and second derivatives for the inputs and for all parameters."""
    inputs = [tensor.clone().requires_grad_() for tensor in inputs]
    wanted = [*inputs, *module.parameters()]
    results = leaves(run(module, inputs))
    loss = sum(((i + 1) * result.sin()).sum() for i, result in enumerate(results))
    first = torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first if g is not None), wanted, allow_unused=True)
    return [tensor for tensor in (*results, *first, *second) if tensor is not None]


def same(theirs: list[Tensor], ours: list[Tensor]) -> None:
    for expected, got in zip(theirs, ours, strict=True):
        assert_close(got, expected)


def states_of(kind: str, tensors: list[Tensor]) -> Any:
    return None if not tensors else tuple(tensors) if kind == "LSTMCell" else tensors[0]


# ---- the same results either way ------------------------------------------------------------------------------------


@over_cells
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("batch", [(3,), (1,), (), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_a_cell_is_torchs_either_way(
    kind: str, options: dict[str, Any], way: str, dtype: torch.dtype, batch: tuple[int, ...], bias: bool, given: bool
) -> None:
    theirs, ours = pair(kind, 4, 5, bias=bias, dtype=dtype, **options)
    count = 0 if not given else 2 if kind == "LSTMCell" else 1
    inputs = [torch.randn(*batch, 4, dtype=dtype), *(torch.randn(*batch, 5, dtype=dtype) for _ in range(count))]

    def run(cell: Any, tensors: list[Tensor]) -> Any:
        return cell(tensors[0], states_of(kind, tensors[1:]))

    same(derivatives(theirs, run, inputs), derivatives(ours, run, inputs))
    assert ran_kernels(run(ours, inputs)) == (way == "kernels")
    assert (rnnfast.explain(ours, inputs[0]).backend == "torch.nn") == (way == "torch")


LAYERS = [("GRU", {}), ("RNN", {}), ("RNN", {"nonlinearity": "relu"}), ("LSTM", {}), ("LSTM", {"proj_size": 2})]


@pytest.mark.parametrize(("kind", "options"), LAYERS, ids=["GRU", "RNN", "RNN relu", "LSTM", "projection"])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("num_layers", "dropout"), [(1, 0.0), (2, 0.0), (2, 0.5)])
@pytest.mark.parametrize("form", ["batch", "unbatched", "zeros"])
def test_layers_of_one_step_are_torchs_either_way(
    kind: str, options: dict[str, Any], way: str, directions: int, batch_first: bool, num_layers: int, dropout: float,
    form: str,
) -> None:  # fmt: skip
    theirs, ours = pair(
        kind, 4, 5, num_layers=num_layers, bidirectional=directions == 2, batch_first=batch_first, dropout=dropout,
        dtype=torch.float64, **options,
    )  # fmt: skip
    rows = () if form == "unbatched" else (3,)
    sizes = [] if form == "zeros" else [options.get("proj_size", 5), 5][: 2 if kind == "LSTM" else 1]
    inputs = [torch.randn(*((*rows, 1) if batch_first else (1, *rows)), 4, dtype=torch.float64)]
    inputs += [torch.randn(num_layers * directions, *rows, size, dtype=torch.float64) for size in sizes]

    def run(layers: Any, tensors: list[Tensor]) -> Any:
        torch.manual_seed(3)  # dropout
        return layers(tensors[0], None if not sizes else tuple(tensors[1:]) if kind == "LSTM" else tensors[1])

    same(derivatives(theirs, run, inputs), derivatives(ours, run, inputs))
    torchs = way == "torch" and kind != "LSTM"
    assert ran_kernels(run(ours, inputs)) != torchs
    assert (rnnfast.explain(ours, inputs[0]).backend == "torch.nn") == torchs


# ---- results are the caller's ---------------------------------------------------------------------------------------


@over_cells
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "unbatched"])
@pytest.mark.parametrize("grad", [True, False])
def test_results_are_no_views(kind: str, options: dict[str, Any], way: str, batch: tuple[int, ...], grad: bool) -> None:
    cell = getattr(rnnfast, kind)(4, 5, **options)
    with torch.set_grad_enabled(grad):
        results = leaves(cell(torch.randn(*batch, 4)))
    assert not any(result._is_view() for result in results)
    for result in results:
        result.detach_()


@over_cells
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "unbatched"])
def test_results_and_gradients_share_no_memory(
    kind: str, options: dict[str, Any], way: str, batch: tuple[int, ...]
) -> None:
    cell = getattr(rnnfast, kind)(4, 5, **options)
    tensors = [torch.randn(*batch, 4), torch.randn(*batch, 5), torch.randn(*batch, 5)]
    tensors = [tensor.requires_grad_() for tensor in tensors[: 3 if kind == "LSTMCell" else 2]]
    results = leaves(cell(tensors[0], states_of(kind, tensors[1:])))
    sum(result.sum() for result in results).backward()
    everything = [*tensors, *results, *cell.parameters()]
    everything += [tensor.grad for tensor in (*tensors, *cell.parameters())]
    owners = [tensor.untyped_storage().data_ptr() for tensor in everything]
    assert len(set(owners)) == len(owners)


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "masked": lambda state: state[..., :2].zero_(),
    "relu_": lambda state: state.relu_(),
    "+=": lambda state: state.add_(1),
    "nan": lambda state: state.masked_fill_(state > 0.1, 0.5),
}


@GATED
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("batch", [(3,), ()], ids=["batch", "unbatched"])
def test_states_of_gated_cells_may_be_written_into(kind: str, way: str, write: str, batch: tuple[int, ...]) -> None:
    """`h[done] = 0` at an episode's end, `gru_cell(x, h).relu_()`: gradients are right, the second ones too."""
    theirs, ours = pair(kind, 4, 5, dtype=torch.float64)
    inputs = [torch.randn(*batch, 4, dtype=torch.float64) for _ in range(3)]

    def run(cell: Any, tensors: list[Tensor]) -> Any:
        states = None
        for input in tensors:
            states = cell(input, states)
            for state in leaves(states):
                WRITES[write](state)
        return states

    same(derivatives(theirs, run, inputs), derivatives(ours, run, inputs))


@pytest.mark.parametrize("nonlinearity", ["tanh", "relu"])
def test_writing_to_the_state_of_an_rnn_cell_is_an_error_as_in_torch(nonlinearity: str, way: str) -> None:
    for cell in pair("RNNCell", 4, 5, nonlinearity=nonlinearity):
        state = cell(torch.randn(3, 4))
        state.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            state.sum().backward()


# ---- where torch's own op must not stand in -------------------------------------------------------------------------


@over_cells
@pytest.mark.usefixtures("torchs")
def test_a_backend_asked_for_by_name_runs(kind: str, options: dict[str, Any]) -> None:
    cell, input = getattr(rnnfast, kind)(4, 5, **options), torch.randn(3, 4)
    assert not ran_kernels(cell(input))
    for name in ("cpu", "reference"):
        with rnnfast.backend(name):
            assert ran_kernels(cell(input))
            assert rnnfast.explain(cell, input).backend == name
            with rnnfast.backend("auto"):
                assert not ran_kernels(cell(input))


@pytest.mark.usefixtures("torchs")
@pytest.mark.parametrize("kind", ["GRU", "RNN"])
def test_a_backend_asked_for_by_name_runs_layers(kind: str) -> None:
    layers, input = getattr(rnnfast, kind)(4, 5, num_layers=2), torch.randn(1, 3, 4)
    assert not ran_kernels(layers(input))
    with rnnfast.backend("cpu"):
        assert ran_kernels(layers(input))
    assert ran_kernels(layers(torch.randn(2, 3, 4)))
    assert ran_kernels(layers(input, lengths=[1, 0, 1]))
    assert ran_kernels(layers(input, resets=torch.ones(1, 3, dtype=torch.bool)))
    assert ran_kernels(layers(nn.utils.rnn.pack_padded_sequence(input, [1, 1, 1]))[0].data)


def of_samples(cell: Any, input: Tensor) -> None:
    weights = {name: parameter.detach() for name, parameter in cell.named_parameters()}

    def loss(weights: dict[str, Tensor], input: Tensor) -> Tensor:
        return sum(result.square().sum() for result in leaves(torch.func.functional_call(cell, weights, (input,))))

    torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, input)


def with_tangents(cell: Any, input: Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        cell(torch.autograd.forward_ad.make_dual(input, torch.ones_like(input)))


def compiled(cell: Any, input: Tensor) -> None:
    torch.compile(lambda input: cell(input), fullgraph=True, backend="aot_eager")(input)


def without_gradients(cell: Any, input: Tensor) -> None:
    with torch.no_grad():
        cell(input)


ELSEWHERE: dict[str, Callable[[Any, Tensor], Any]] = {
    "vmap(grad)": of_samples,
    "forward mode": with_tangents,
    "compile": compiled,
    "export": lambda cell, input: torch.export.export(cell, (input,), strict=False),
    "trace": lambda cell, input: torch.jit.trace(cell, (input,), check_trace=False),
    "no_grad": without_gradients,
    "frozen": lambda cell, input: cell.requires_grad_(False)(input),
    "bfloat16": lambda cell, input: cell.bfloat16()(input.bfloat16()),
    "meta": lambda cell, input: cell.to("meta")(input.to("meta")),
}


@over_cells
@pytest.mark.parametrize("use", ELSEWHERE)
@pytest.mark.usefixtures("torchs")
@pytest.mark.filterwarnings("ignore")  # torch deprecates its tracing
def test_our_step_runs_in_all_but_plain_training(
    kind: str, options: dict[str, Any], use: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> None:
        raise AssertionError("torch's own op ran")

    monkeypatch.setattr(cells, "_torchs_step", refuse)
    cell = getattr(rnnfast, kind)(4, 5, **options)
    with pytest.raises(AssertionError, match="torch's own op ran"):
        cell(torch.randn(3, 4))
    ELSEWHERE[use](cell, torch.randn(3, 4))


@over_cells
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_is_torchs_either_way(kind: str, options: dict[str, Any], way: str, lower: torch.dtype) -> None:
    theirs, ours = pair(kind, 4, 5, **options)
    input, results = torch.randn(3, 4), []
    for cell in (theirs, ours):
        with torch.autocast("cpu", dtype=lower):
            results.append(leaves(cell(input)))
        sum(result.float().sum() for result in results[-1]).backward()
    # LSTM and GRU cells compute in the wide type, without autocast; in the lower one our step is the finer.
    assert ran_kernels(results[1]) == (way == "kernels" or kind == "RNNCell")
    assert [result.dtype for result in results[0]] == [result.dtype for result in results[1]]
    near = {"rtol": 0.0, "atol": 4 * torch.finfo(torch.bfloat16).eps}
    for expected, got in zip(*results, strict=True):
        assert_close(got, expected, **near)
    for (name, expected), got in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        assert_close(got.grad, expected.grad, rtol=0.05, atol=0.05, msg=lambda text, name=name: f"{name}: {text}")


@over_cells
def test_errors_are_the_same_either_way(kind: str, options: dict[str, Any], way: str) -> None:
    theirs, ours = pair(kind, 4, 5, **options)
    for shape, size, batch in (((3, 7), 5, 3), ((3, 4), 6, 3), ((3, 4), 5, 2), ((7,), 5, None)):
        rows = () if batch is None else (batch,)
        hx = states_of(kind, [torch.randn(*rows, size), torch.randn(*rows, size)])
        texts = []
        for cell in (theirs, ours):
            with pytest.raises(RuntimeError) as caught:
                cell(torch.randn(*shape), hx)
            texts.append(str(caught.value))
        assert texts[0] == texts[1]
    with pytest.raises(RuntimeError, match="not the same dtype"):
        ours(torch.randn(3, 4).double())


@over_cells
def test_nan_stays_in_its_row_either_way(kind: str, options: dict[str, Any], way: str) -> None:
    theirs, ours = pair(kind, 4, 5, **options)
    input = torch.randn(3, 4)
    input[1, 2] = float("nan")
    for expected, got in zip(leaves(theirs(input)), leaves(ours(input)), strict=True):
        assert_close(got, expected, equal_nan=True)


# ---- the rule -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "batch", "size", "torchs", "torchs_beside_makers"),
    [
        ("LSTMCell", 1, 256, True, False),
        ("LSTMCell", 1, 32, False, False),
        ("LSTMCell", 4, 256, False, False),
        ("GRUCell", 1, 256, True, False),
        ("GRUCell", 8, 512, False, False),
        ("GRUCell", 64, 32, False, False),
        ("RNNCell", 4, 32, True, True),
        ("RNNCell", 512, 64, False, True),
        ("RNNCell", 0, 64, False, False),
        ("LSTM", 1, 256, False, False),
        ("GRU", 1, 256, True, False),
        ("GRU", 8, 64, False, False),
        ("RNN", 4, 32, True, True),
        ("RNN", 64, 64, False, True),
    ],
)
@pytest.mark.parametrize("makers", [False, True], ids=["any processor", "its maker's products"])
def test_the_rule_and_what_explain_says(
    kind: str, batch: int, size: int, torchs: bool, torchs_beside_makers: bool, makers: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(ops, "atens_products_are_the_makers", lambda: makers)
    torchs = torchs_beside_makers if makers else torchs
    module = getattr(rnnfast, kind)(size, size)
    input = torch.randn(*(() if kind.endswith("Cell") else (1,)), batch, size)
    assert ran_kernels(module(input)) != torchs
    found = rnnfast.explain(module, input)
    assert found.backend == ("torch.nn" if torchs else "cpu")
    if torchs:
        assert "torch's own op" in str(found)
    with torch.no_grad():
        assert rnnfast.explain(module, input).backend == "cpu"
    assert rnnfast.explain(module, input.bfloat16()).backend == "cpu"


@pytest.mark.parametrize("makers", [False, True], ids=["any processor", "its maker's products"])
@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell"])
def test_the_steps_that_follow_are_ours(kind: str, makers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a loop the gradients of the weights are put off, which torch's own op cannot do."""
    monkeypatch.setattr(ops, "atens_products_are_the_makers", lambda: makers)
    cell, input = getattr(rnnfast, kind)(256, 256), torch.randn(1, 256)
    first = cell(input)
    assert ran_kernels(first) == makers
    assert ran_kernels(cell(input, first))


def test_there_is_no_op_for_the_linear_cell() -> None:
    cell = rnnfast.RNNCell(256, 256, nonlinearity="identity")
    assert ran_kernels(cell(torch.randn(1, 256)))
    assert rnnfast.explain(cell, torch.randn(1, 256)).backend == "cpu"

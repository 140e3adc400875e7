"""rnnfast.tbptt: windows over a stream, in float64 against torch.nn called a step at a time."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import rnnfast
from module_cases import leaves

T, B, I, H = 23, 3, 4, 5  # noqa: E741
DOUBLE = {"dtype": torch.float64}
pytestmark = pytest.mark.usefixtures("one_thread")

x_ok = torch.zeros(6, B, I)
# k1, k2: one step, as long as a chunk, a few chunks or no number of them, all that there was.
HORIZONS = [(1, 1), (1, 4), (5, 5), (5, 10), (5, 12), (4, 100), (T, T), (40, 40)]


def data_of(steps: int = T) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(steps, B, I, **DOUBLE), torch.randn(steps, B, H, **DOUBLE)


def detached(state: Any) -> Any:
    return None if state is None else tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()


def trained_by_steps(module: nn.Module, x: Tensor, y: Tensor, k1: int, k2: int) -> None:
    """What `tbptt` is to come to, one call for each step."""
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    known = {0: None}
    for begin in range(0, len(x), k1):
        first, end = max(0, begin + k1 - k2), min(begin + k1, len(x))
        following = max(0, begin + 2 * k1 - k2)
        state, outputs = known[first], []
        for t in range(first, end):
            output, state = module(x[t : t + 1], state)
            if t + 1 == following:
                known[following] = detached(state)
            if t >= begin:
                outputs.append(output)
        optimizer.zero_grad()
        (torch.cat(outputs) - y[begin:end]).square().mean().backward()
        optimizer.step()


def trained(module: nn.Module, chunks: Iterator[Any]) -> None:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.2)
    for chunk in chunks:
        optimizer.zero_grad()
        (chunk.output - chunk.target).square().mean().backward()
        optimizer.step()


def blocks_of(sizes: list[int], *tensors: Tensor, axis: int = 0) -> list[Any]:
    """Blocks of so many steps each; the last has the rest."""
    sizes = [*sizes, tensors[0].shape[axis] - sum(sizes)]
    return [list(each) for each in zip(*(tensor.split(sizes, axis) for tensor in tensors), strict=True)]


@pytest.mark.parametrize(("k1", "k2"), HORIZONS)
@pytest.mark.parametrize("form", ["tensors", "blocks", "loader"])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_training_is_that_of_steps(kind: str, form: str, k1: int, k2: int) -> None:
    """Every weight after several updates: windows begin with the states of the weights of their time."""
    x, y = data_of()
    layer = getattr(nn, kind)(I, H, num_layers=2, **DOUBLE)
    ours = getattr(rnnfast, kind)(I, H, num_layers=2, **DOUBLE)
    ours.load_state_dict(layer.state_dict())
    trained_by_steps(layer, x, y, k1, k2)
    stream: Any = (x, y)
    if form == "blocks":
        stream = blocks_of([1, 7, 0, 3, 9], x, y)
    elif form == "loader":
        # Each item of the set is a step of all rows, and a batch six steps.
        stream = DataLoader(TensorDataset(x, y), batch_size=6)
    trained(ours, rnnfast.tbptt(ours, stream, k1, k2))
    for one, other in zip(ours.parameters(), layer.parameters(), strict=True):
        assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("k1", "k2"), HORIZONS)
def test_gradients_reach_as_far_as_said(k1: int, k2: int) -> None:
    module = rnnfast.LSTM(I, H, **DOUBLE)
    x = data_of()[0].requires_grad_()
    at = 0
    for chunk in rnnfast.tbptt(module, x, k1, k2):
        assert (chunk.begin, chunk.end) == (at, min(at + k1, T))
        assert torch.equal(chunk.input, x[chunk.begin : chunk.end])
        (grad,) = torch.autograd.grad(chunk.output[-1].sum(), x)
        reached = grad.abs().sum((1, 2)).nonzero().flatten().tolist()
        assert reached == list(range(max(0, at + k1 - k2), chunk.end))
        at = chunk.end
    assert at == T


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["whole", "blocks"])
@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (5, 12), (3, 4)])
@pytest.mark.parametrize("kind", ["LSTM", "MGU", "SLSTM"])
def test_resets_and_lengths(kind: str, k1: int, k2: int, form: str, batch_first: bool) -> None:
    """Outputs and the last state are those of one call, of rows that end early too."""
    axis = int(batch_first)
    module = getattr(rnnfast, kind)(I, H, batch_first=batch_first, **DOUBLE)
    x, resets, lengths = data_of()[0], torch.rand(T, B) < 0.2, torch.tensor([T, 9, 0])
    if batch_first:
        x, resets = x.transpose(0, 1).contiguous(), resets.t().contiguous()
    expected, last = module(x, resets=resets, lengths=lengths)
    stream: Any = {"lengths": lengths, "input": x, "resets": resets}
    if form == "blocks":
        cut = blocks_of([4, 2, 10], x, resets, axis=axis)
        begins = [0, 4, 6, 16]
        stream = [
            {"input": a, "resets": r, "lengths": (lengths - begin).clamp(0, a.shape[axis]).tolist()}
            for (a, r), begin in zip(cut, begins, strict=True)
        ]
    chunks = rnnfast.tbptt(module, stream, k1, k2)
    seen = list(chunks)
    assert_close(torch.cat([chunk.output for chunk in seen], axis), expected)
    for one, other in zip(leaves(chunks.state), leaves(last), strict=True):
        assert_close(one, other)
        assert not one.requires_grad
    step = torch.arange(T).unsqueeze(1)
    valid = (step < lengths).t() if batch_first else step < lengths
    assert torch.equal(torch.cat([chunk.valid for chunk in seen], axis), valid)
    assert torch.equal(torch.cat([chunk.options["resets"] for chunk in seen], axis), resets)
    assert all(chunk.target == {} for chunk in seen)
    # Where each window begins with the stream the chunks' gradients are those of the whole.
    weights = list(module.parameters())
    whole = torch.autograd.grad(expected.square().sum(), weights)
    losses = (chunk.output.square().sum() for chunk in rnnfast.tbptt(module, stream, k1, 2 * T))
    for one, other in zip(torch.autograd.grad(sum(losses), weights), whole, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.uint16, torch.int32, torch.uint64], ids=str)
def test_lengths_of_any_integers(dtype: torch.dtype) -> None:
    x, lengths = torch.randn(126, 3, I), torch.tensor([126, 3, 0])
    stream = {"input": x, "lengths": lengths.to(dtype)}
    valid = torch.cat([chunk.valid for chunk in rnnfast.tbptt(rnnfast.GRU(I, H), stream, 50)])
    assert valid.sum(0).tolist() == lengths.tolist()
    # Without a batch one number, in a tensor or not.
    for length in (stream["lengths"][0], 126):
        chunks = rnnfast.tbptt(rnnfast.GRU(I, H), {"input": x[:, 0], "lengths": length}, 50)
        assert sum(int(chunk.valid.sum()) for chunk in chunks) == 126


class _OwnLSTM(nn.LSTM):
    """Takes lengths, and does something with them."""

    def forward(self, x: Tensor, state: Any, lengths: Tensor) -> Any:
        output, state = super().forward(x, state)
        return output * (torch.arange(len(x)).unsqueeze(1) < lengths).unsqueeze(-1), state


def test_a_layer_of_the_users() -> None:
    chunks = rnnfast.tbptt(_OwnLSTM(I, H), {"input": torch.randn(6, 2, I), "lengths": [6, 1]}, 4)
    assert [int(chunk.output[:, 1].any(-1).sum()) for chunk in chunks] == [1, 0]


def test_rows_with_gaps_go_on_where_they_ended() -> None:
    """A block may hold fewer steps of a row than of another: the next block's follow on them."""
    module = rnnfast.GRU(I, H, **DOUBLE)
    rows = [torch.randn(steps, I, **DOUBLE) for steps in (8, 5)]
    padding = torch.full((3, I), torch.nan, **DOUBLE)
    first = torch.stack((rows[0][:4], torch.cat((rows[1][:1], padding))), 1)
    second = torch.stack((rows[0][4:], rows[1][1:]), 1)
    stream = [{"input": first, "lengths": torch.tensor([4, 1])}, {"input": second, "lengths": torch.tensor([4, 4])}]
    for k1, k2 in ((3, 3), (3, 8), (8, 8)):
        chunks = rnnfast.tbptt(module, stream, k1, k2)
        seen = list(chunks)
        output, valid = (torch.cat([getattr(chunk, name) for chunk in seen]) for name in ("output", "valid"))
        for b, row in enumerate(rows):
            expected, last = module(row)
            assert_close(output[valid[:, b], b], expected)
            assert_close(chunks.state[:, b], last)
    # A block without lengths among others: every step counts.
    *seen, last = rnnfast.tbptt(module, [stream[0], {"input": second}], 3)
    assert torch.equal(torch.cat([chunk.valid for chunk in seen]), torch.cat((valid[:4], torch.ones(2, 2) > 0)))
    assert last.valid is None


class _Model(nn.Module):
    """Of tokens, with a state that is a nest and outputs that are several."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, I, **DOUBLE)
        self.lower, self.upper = rnnfast.LSTM(I, H, **DOUBLE), rnnfast.GRU(H, H, **DOUBLE)

    def forward(self, tokens: Tensor, state: Any = None) -> Any:
        state = state or {"lower": None, "upper": [None], "calls": 0}
        output, lower = self.lower(self.embedding(tokens), state["lower"])
        other, upper = self.upper(output, state["upper"][0])
        return {"lower": output, "both": (output, other)}, OrderedDict(
            lower=lower, upper=[upper], calls=state["calls"] + 1
        )


@pytest.mark.parametrize(("k1", "k2"), [(5, 5), (5, 12)])
@pytest.mark.parametrize("shape", [(T, B), (T,)], ids=str)
def test_a_model_with_any_state(shape: tuple[int, ...], k1: int, k2: int) -> None:
    model, tokens = _Model(), torch.randint(7, shape)
    expected, last = model(tokens)
    chunks = rnnfast.tbptt(model, tokens, k1, k2)
    seen = list(chunks)
    assert all(chunk.target is None and chunk.valid is None for chunk in seen)
    assert_close(torch.cat([chunk.output["both"][1] for chunk in seen]), expected["both"][1])
    assert_close(torch.cat([chunk.output["lower"] for chunk in seen]), expected["lower"])
    assert_close(chunks.state["upper"][0], last["upper"][0])
    assert not any(state.requires_grad for state in leaves(list(chunks.state.values())[:2]))
    assert isinstance(chunks.state, OrderedDict)
    assert chunks.state["calls"] >= 5
    sum(chunk.output["both"][1].sum() for chunk in seen).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (rnnfast.LSTM(I, H, batch_first=True), (T, I)),
        (rnnfast.GRU(I, H), (T, I)),
        (nn.LSTM(I, H, num_layers=2), (T, B, I)),
        (torch.compile(rnnfast.GRU(I, H, batch_first=True), backend="eager"), (T, I)),
        (rnnfast.LSTM(I, H, proj_size=2, recompute="chunks"), (T, B, I)),
        (rnnfast.LSTM(I, H, layer_norm="separate", peephole=True, batch_first=True), (B, T, I)),
    ],
    ids=lambda value: "",
)
@torch.no_grad()
def test_other_layers_and_layouts(module: Any, shape: tuple[int, ...]) -> None:
    axis, x = int(shape[0] == B), torch.randn(shape)
    expected, last = module(x)
    chunks = rnnfast.tbptt(module, x, 5, 7)
    assert len(chunks) == 5
    assert_close(torch.cat([chunk.output for chunk in chunks], axis), expected)
    for one, other in zip(leaves(chunks.state), leaves(last), strict=True):
        assert_close(one, other)


def test_the_state_travels() -> None:
    module, (x, _) = rnnfast.GRU(I, H, **DOUBLE), data_of()
    expected = module(x)[0]
    first = rnnfast.tbptt(module, x[:10], 4)
    outputs = [chunk.output for chunk in first]
    second = rnnfast.tbptt(module, iter([x[10:]]), 4, state=first.state)
    assert second.state is first.state
    with pytest.raises(TypeError, match="no length before its end"):
        len(second)
    assert_close(torch.cat([*outputs, *(chunk.output for chunk in second)]), expected)
    # A state that is learned gets its gradient from each window that begins with it.
    learned = torch.zeros(1, 1, H, **DOUBLE, requires_grad=True)
    grads = []
    for chunk in rnnfast.tbptt(module, x, 4, 9, state=learned.expand(1, B, H)):
        learned.grad = None
        chunk.output.sum().backward()
        grads.append(learned.grad is not None)
    assert grads == [True, True, False, False, False, False]
    with pytest.raises(AttributeError):
        second.state = None
    # When the module fails nothing has changed.
    chunks = rnnfast.tbptt(module, x, 4)
    next(chunks)
    before, module.weight_hh_l0.data = module.weight_hh_l0.data, torch.zeros(3, H, **DOUBLE)
    with pytest.raises(RuntimeError):
        next(chunks)
    module.weight_hh_l0.data = before
    assert_close(next(chunks).output, expected[4:8])


def test_what_could_not_be_read_is_not_left_out() -> None:
    """A stream that goes on behind it would have a gap."""
    chunks = rnnfast.tbptt(rnnfast.GRU(I, H), [x_ok, 5, x_ok], 4)
    next(chunks)
    for _ in range(3):
        with pytest.raises(TypeError, match="block 1: input: expected a tensor, got int"):
            next(chunks)

    def broken() -> Iterator[Tensor]:
        yield x_ok
        raise OSError("the disk is full")

    chunks = rnnfast.tbptt(rnnfast.GRU(I, H), broken(), 4)
    next(chunks)
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is full"):
            next(chunks)


def test_blocks_are_tuples_or_mappings() -> None:
    module = rnnfast.GRU(I, H)
    x, y, z = torch.zeros(6, B, I), torch.ones(6, B), torch.arange(6)
    for stream, expected in (
        ((x, y), y[:4]),
        ((x, y, z), (y[:4], z[:4])),
        ([[x, y]], y[:4]),
        ({"input": x, "labels": y, 7: z, "lengths": None, "resets": None}, {"labels": y[:4], 7: z[:4]}),
    ):
        chunk = next(rnnfast.tbptt(module, stream, 4))
        assert_close(chunk.target, expected)
        assert chunk.options == {}
        assert chunk.valid is None
    # Names, in any order.
    blocks = [{"input": x, "a": y, "b": z}, {"b": z, "a": y, "input": x}]
    assert next(rnnfast.tbptt(module, blocks, 8)).target["b"].tolist() == [*range(6), 0, 1]


def test_an_endless_stream_is_read_as_far_as_needed() -> None:
    read = []

    def stream() -> Iterator[Tensor]:
        for number in itertools.count():
            read.append(number)
            yield torch.randn(3, B, I)

    chunks = rnnfast.tbptt(rnnfast.LSTM(I, H), stream(), k1=4, k2=6)
    assert read == []
    for chunk in itertools.islice(chunks, 20):
        assert len(chunk.output) == 4
        assert len(read) == -(-chunk.end // 3)
        # Nothing is held that no window will need.
        assert sum(part.end - part.begin for part in chunks._parts) <= 9
    assert list(rnnfast.tbptt(rnnfast.LSTM(I, H), [], 3)) == []
    assert list(rnnfast.tbptt(rnnfast.LSTM(I, H), torch.zeros(0, B, I), 3)) == []


def test_windows_share_no_graph() -> None:
    chunks = list(rnnfast.tbptt(rnnfast.LSTM(I, H), torch.randn(T, B, I), 5, 10))
    for chunk in reversed(chunks):
        chunk.output.sum().backward()


@dataclasses.dataclass
class _State:
    h: Tensor


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"k1": 0}, ValueError, "tbptt: k1: expected at least 1 step, got 0"),
        ({"k1": 2.0}, TypeError, "tbptt: k1: expected a number of steps, got 2.0"),
        ({"k2": True}, TypeError, "tbptt: k2: expected a number of steps, got True"),
        ({"k2": 1}, ValueError, "tbptt: k2: expected at least k1 = 2, so that each step has a gradient, got 1"),
        ({"batch_first": "no"}, TypeError, "tbptt: batch_first: expected True, False or None, got 'no'"),
        (
            {"module": nn.ModuleDict({"r": nn.GRU(I, H, batch_first=True)})},
            ValueError,
            "batch_first: expected True or False for a model around a layer with batch_first=True, here GRU 'r', got",
        ),
        (
            {"stream": torch.tensor(1.0)},
            ValueError,
            "block 0: input: expected at least 1 dimension, got a tensor of no",
        ),
        ({"stream": {"input": x_ok, "lengths": 4}}, TypeError, "block 0: lengths should be integers, got 4"),
        (
            {"stream": {"input": x_ok, "lengths": ["a"] * 3}},
            TypeError,
            "block 0: lengths should be integers, got \\['a",
        ),
        ({"module": lambda x, state: (x, _State(x))}, TypeError, "expected a state of tensors, in tuples.*got _State"),
        ({"module": lambda x, state: (x,)}, TypeError, r"return \(output, state\), got a tuple of 1"),
        ({"module": rnnfast.GRU(I, H, bidirectional=True)}, ValueError, "one direction.*got a bidirectional GRU$"),
        ({"module": nn.Sequential(nn.LSTM(I, H, bidirectional=True))}, ValueError, "got a bidirectional LSTM '0'"),
        ({"module": 5}, TypeError, r"tbptt: module: expected one called as module\(input, state\), got int"),
        ({"stream": 5}, TypeError, "tbptt: stream: expected tensors or an iterable of blocks, got int"),
        ({"stream": ()}, ValueError, "block 0: expected the input and perhaps targets, got nothing"),
        ({"stream": {"x": x_ok}}, ValueError, "block 0: expected an entry 'input', got 'x'"),
        ({"stream": (x_ok, [1])}, TypeError, "block 0: target 1: expected a tensor, got list"),
        ({"stream": (x_ok, x_ok[:5])}, ValueError, "block 0: target 1: expected 6 steps in dimension 0, as of the inp"),
        ({"stream": {"input": x_ok, "resets": x_ok[0, 0]}}, ValueError, "block 0: resets: expected 6 steps"),
        (
            {"stream": {"input": x_ok, "lengths": [7, 1, 1]}},
            ValueError,
            "block 0: lengths should be from 0 to T = 6, got 7",
        ),
        (
            {"stream": {"input": x_ok, "lengths": [1, 1]}},
            ValueError,
            r"block 0: Expected lengths of shape \(N,\) = \(3,\), got",
        ),
        ({"stream": {"input": x_ok, "lengths": [1.0, 1, 1]}}, TypeError, "block 0: lengths should be integers, got"),
        ({"stream": {"input": x_ok, "lengths": torch.tensor(4)}}, ValueError, r"lengths of shape \(N,\) = \(3,\), got"),
        ({"stream": pack_sequence([x_ok[:, 0]])}, TypeError, "block 0: expected padded rows.*got a PackedSequence"),
        (
            {"stream": [x_ok, x_ok[:, :2]]},
            ValueError,
            r"block 1: expected input float32 \(T, 3, 4\), as in block 0, got input float32 \(T, 2, 4\)",
        ),
        (
            {"stream": [x_ok, (x_ok, x_ok)]},
            ValueError,
            r"block 1: expected input .*, got input .*, target 1 float32 \(",
        ),
        ({"stream": [x_ok, {"input": x_ok}]}, ValueError, "block 1: expected input .*got a mapping of input"),
        ({"stream": [(x_ok, x_ok), (x_ok, x_ok.int())]}, ValueError, "target 1 float32.*got .*, target 1 int32"),
        ({"batch_first": True}, ValueError, "batch_first: expected False, as the module has it, got True"),
        ({"module": rnnfast.LSTMCell(I, H)}, TypeError, "expected a layer or a model, got a cell, LSTMCell"),
        ({"module": lambda x, state: ((x, 1.0), state)}, TypeError, "expected an output of tensors, in .*, got float"),
        ({"module": lambda x, state: x}, TypeError, r"return \(output, state\), got Tensor"),
        ({"module": lambda x, state: (x[-1:], state)}, ValueError, "expected an output of 2 steps in dimension 0, got"),
        (
            {"module": nn.GRU(I, H), "stream": {"input": x_ok, "resets": x_ok[..., 0] > 0}},
            TypeError,
            "block 0: resets: expected none with torch.nn.GRU, got some; rnnfast's layers take them",
        ),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], text: str) -> None:
    given: dict[str, Any] = {"module": rnnfast.LSTM(I, H), "stream": x_ok, "k1": 2, **arguments}
    with pytest.raises(error, match=text):
        list(rnnfast.tbptt(**copy.copy(given)))

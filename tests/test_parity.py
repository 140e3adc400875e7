"""rnnfast's modules against torch.nn's: outputs, states and every gradient, on random weights and data.

The whole grid is marked exhaustive. The default run takes a part of it in which every three settings still meet.
"""

import dataclasses
import itertools
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from tolerances import check

SETTINGS = {
    "cell": ["LSTM", "LSTM with projection", "GRU", "RNN tanh", "RNN relu"],
    # more than one layer, and dropout between them
    "layers": [(1, 0.0), (3, 0.0), (3, 0.4)],
    "bidirectional": [False, True],
    "bias": [True, False],
    "batch_first": [False, True],
    "input": ["unbatched", "batched", "packed, sorted", "packed, unsorted"],
    "initial": [True, False],
    "dtype": [torch.float32, torch.float64, torch.bfloat16, torch.float16],
}


@dataclasses.dataclass(frozen=True)
class Case:
    cell: str
    layers: tuple[int, float]
    bidirectional: bool
    bias: bool
    batch_first: bool
    input: str
    initial: bool
    dtype: torch.dtype
    hidden_size: int

    def __str__(self) -> str:
        words = [
            self.cell,
            f"{self.layers[0]} layers",
            f"dropout {self.layers[1]}" if self.layers[1] else "",
            "bidirectional" if self.bidirectional else "",
            "" if self.bias else "no bias",
            "batch_first" if self.batch_first else "",
            self.input,
            "" if self.initial else "no hx",
            str(self.dtype).removeprefix("torch."),
            f"H {self.hidden_size}",
        ]
        return " - ".join(word for word in words if word)

    def module(self, namespace: Any, dtype: torch.dtype) -> torch.nn.Module:
        """The layer, from torch.nn or rnnfast, in training mode."""
        name, *detail = self.cell.split()
        options: dict[str, Any] = {"nonlinearity": detail[0]} if name == "RNN" else {}
        if "projection" in detail:
            options["proj_size"] = self.hidden_size // 2
        layers, dropout = self.layers
        return getattr(namespace, name)(
            6,
            self.hidden_size,
            num_layers=layers,
            bias=self.bias,
            batch_first=self.batch_first,
            dropout=dropout,
            bidirectional=self.bidirectional,
            dtype=dtype,
            **options,
        )


def _grid() -> list[Case]:
    combinations = itertools.product(*SETTINGS.values())
    # small and odd, and large enough for blocks of every width and a rest, in turn
    return [Case(*values, hidden_size=(5, 43)[k % 2]) for k, values in enumerate(combinations)]


def _covering(grid: list[Case]) -> list[Case]:
    """A part of the grid in which every three settings that can meet do meet."""

    names = [field.name for field in dataclasses.fields(Case)]
    order = random.Random(0).sample(grid, len(grid))
    values = [[(name, str(getattr(case, name))) for name in names] for case in order]
    triples = [set(itertools.combinations(own, 3)) for own in values]
    met: set[Any] = set()
    chosen = []
    # those that bring many new meetings first
    for wanted in (60, 30, 10, 1):
        for case, own in zip(order, triples, strict=True):
            if len(own - met) >= wanted:
                chosen.append(case)
                met |= own
    return chosen


GRID = _grid()
COVERING = _covering(GRID)


def one_sided(case: Case) -> bool:
    """Whether every unit is to be on or off throughout.

    relu's derivative jumps at zero: a 16-bit rounding of an argument near zero changes the gradient by its whole size,
    in torch.nn as here, but not always in both. So there no argument is a difference that nearly vanishes: input and
    states are positive, and each unit's weights and biases have one sign.
    """
    return case.cell == "RNN relu" and case.dtype.itemsize == 2


def make_one_sided(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            # half the size, so that sums of one sign do not grow from step to step
            parameter.abs_().mul_(0.5)
            parameter[1::2] *= -1


def make_input(case: Case) -> tuple[Any, Tensor]:
    """The input as the module takes it, and the tensor inside it, in float64 with numbers of the case's dtype."""
    T, B = 6, 4
    shape = (B, T, 6) if case.batch_first and case.input != "unbatched" else (T, B, 6)
    if case.input == "unbatched":
        shape = (T, 6)
    data = torch.randn(shape, dtype=torch.float64).to(case.dtype).double()
    data = data.abs() if one_sided(case) else data
    if "packed" not in case.input:
        return data, data
    lengths = torch.tensor([6, 4, 4, 1] if case.input == "packed, sorted" else [4, 1, 6, 4])
    packed = pack_padded_sequence(data, lengths, case.batch_first, enforce_sorted=case.input == "packed, sorted")
    return packed, packed.data


def with_data(input: Any, data: Tensor) -> Any:
    return input._replace(data=data) if isinstance(input, PackedSequence) else data


def make_state(case: Case, module: torch.nn.Module) -> list[Tensor]:
    """h_0 and for the LSTM c_0, in float64 with numbers of the case's dtype."""
    layers = case.layers[0] * (2 if case.bidirectional else 1)
    sizes = [getattr(module, "proj_size", 0) or case.hidden_size]
    sizes += [case.hidden_size] if "LSTM" in case.cell else []
    batch = () if case.input == "unbatched" else (4,)
    states = [torch.randn(layers, *batch, size, dtype=torch.float64).to(case.dtype).double() for size in sizes]
    return [state.abs() for state in states] if one_sided(case) else states


def run(
    module: torch.nn.Module, input: Any, data: Tensor, state: list[Tensor], grads: list[Tensor]
) -> tuple[dict[str, Tensor], Any]:
    """Results and the gradients of input, state and parameters, on the CPU; the output as it came.

    Fills grads when empty.
    """
    like = next(module.parameters())
    input = input.to(like.device)
    data, *state = (value.detach().to(like).requires_grad_() for value in (data, *state))
    hx = None if not state else tuple(state) if len(state) == 2 else state[0]
    # the seed of the dropout masks
    torch.manual_seed(99)
    output, h_n = module(with_data(input, data), hx)
    results = {"output": output.data if isinstance(output, PackedSequence) else output}
    results |= {"h_n": h_n} if isinstance(h_n, Tensor) else {"h_n": h_n[0], "c_n": h_n[1]}
    if not grads:
        # of a size that leaves the gradients of the weights near 1
        grads += [
            torch.randn(value.shape, dtype=torch.float64).to(like.dtype).double() / 4 for value in results.values()
        ]
    inputs = {"input": data} | dict(zip(["hx", "cx"], state, strict=False)) | dict(module.named_parameters())
    gradients = torch.autograd.grad(list(results.values()), list(inputs.values()), [grad.to(like) for grad in grads])
    results |= {f"gradient of {name}": value for name, value in zip(inputs, gradients, strict=True)}
    return {name: value.cpu() for name, value in results.items()}, output


def compare(case: Case, device: str = "cpu") -> None:
    """Ours and torch.nn's, on the device, against torch.nn's in float64 on the CPU."""
    ours = case.module(rnnfast, case.dtype)
    if one_sided(case):
        make_one_sided(ours)
    theirs, exact = case.module(torch.nn, case.dtype), case.module(torch.nn, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    exact.load_state_dict(ours.state_dict())
    ours, theirs = ours.to(device), theirs.to(device)
    input, data = make_input(case)
    state = make_state(case, exact) if case.initial else []
    grads: list[Tensor] = []
    expected, _ = run(exact, input, data, state, grads)
    yardstick, their_output = run(theirs, input, data, state, grads)
    actual, output = run(ours, input, data, state, grads)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        check(name, value, expected[name], yardstick[name])
    assert type(output) is type(their_output)
    if isinstance(output, PackedSequence):
        for ours_, theirs_ in zip(output[1:], their_output[1:], strict=True):
            assert (ours_ is None) == (theirs_ is None)
            assert ours_ is None or torch.equal(ours_, theirs_)


@pytest.mark.parametrize("case", COVERING, ids=str)
def test_parity(case: Case) -> None:
    compare(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", [case for case in GRID if case not in set(COVERING)], ids=str)
def test_parity_whole_grid(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", COVERING[::4], ids=str)
def test_parity_on_every_backend(backend: str, device: str, case: Case) -> None:
    compare(case, device)


@pytest.mark.parametrize("padding", [0.0, float("nan")])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("cell", SETTINGS["cell"])
def test_lengths_are_packing_without_packing(
    backend: str, device: str, cell: str, batch_first: bool, padding: float
) -> None:
    """Stacked and bidirectional, against torch.nn on the packed rows; what the padding holds does not matter."""
    case = Case(cell, (3, 0.0), True, True, batch_first, "packed, unsorted", True, torch.float64, 13)
    ours, theirs = case.module(rnnfast, torch.float64), case.module(torch.nn, torch.float64)
    theirs.load_state_dict(ours.state_dict())
    state = [value.to(device) for value in make_state(case, theirs)]
    ours, theirs = ours.to(device), theirs.to(device)
    lengths = torch.tensor([4, 1, 6, 4])
    input = torch.randn(4, 6, 6, dtype=torch.float64).to(device)
    valid = (torch.arange(6) < lengths.unsqueeze(1)).to(device)
    input[~valid] = padding
    input = (input if batch_first else input.transpose(0, 1).contiguous()).requires_grad_()
    valid = valid if batch_first else valid.T
    hx = tuple(state) if len(state) == 2 else state[0]
    packed, packed_state = theirs(pack_padded_sequence(input, lengths, batch_first, enforce_sorted=False), hx)
    expected, _ = torch.nn.utils.rnn.pad_packed_sequence(packed, batch_first)
    output, h_n = ours(input, hx, lengths=lengths)
    pairs = [("output", output, expected)]
    pairs += [("h_n", h_n, packed_state)] if isinstance(h_n, Tensor) else zip("hc", h_n, packed_state, strict=True)
    for name, value, other in pairs:
        check(name, value, other, other)
    grad = torch.randn_like(output) / 4
    actual = torch.autograd.grad(output, [input, *ours.parameters()], grad)
    wanted = torch.autograd.grad(expected, [input, *theirs.parameters()], grad)
    for name, value, other in zip(["input", *dict(ours.named_parameters())], actual, wanted, strict=True):
        check(f"gradient of {name}", value, other, other)
    assert not actual[0][~valid].any()

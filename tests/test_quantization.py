"""rnnfast.quantize_weights: the format of packed weights, and what layers and cells compute with them."""

from __future__ import annotations

import copy
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from isas import ISAS
from module_cases import leaves, random_states
from rnnfast import ops
from rnnfast.quantization import TYPES, error, gates_of, pack, packed_shape, rounded, unpack
from tolerances import check
from tolerances import error as largest_error

each_type = pytest.mark.parametrize("weights", TYPES)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    isa = ops.cpu_isa()
    yield
    if isa:
        ops.use_cpu_isa(isa)


# ---- the format ------------------------------------------------------------------------------------------------------


@each_type
@pytest.mark.parametrize("gates", [1, 2, 4])
@pytest.mark.parametrize("H", [1, 16, 17, 33])
@pytest.mark.parametrize("K", [1, 3, 130])
def test_what_was_unpacked_packs_to_the_same(weights: str, gates: int, H: int, K: int) -> None:
    matrix = torch.randn(gates * H, K) * torch.rand(gates * H, 1)
    packed = pack(matrix, gates, weights)
    assert packed.dtype is torch.uint8
    assert packed.is_contiguous()
    assert tuple(packed.shape) == packed_shape(weights, gates, gates * H, K)
    found = unpack(packed, gates, gates * H, K, weights)
    assert torch.equal(found, rounded(matrix, weights))
    assert torch.equal(pack(found, gates, weights), packed)
    assert (
        largest_error(found, matrix) <= {"float32": 0, "bf16": 2**-8, "int8": 0.51 / 127}[weights] * matrix.abs().max()
    )
    if weights == "bf16":
        assert torch.equal(found, matrix.bfloat16().float())


def test_scales_of_int8_survive_unpacking() -> None:
    """127 * scale is exact: a scale of 24 bits would come back as another one in a row of 128."""
    matrix = torch.randn(20_000, 2)
    packed = pack(matrix, 1, "int8")
    assert torch.equal(pack(unpack(packed, 1, 20_000, 2, "int8"), 1, "int8"), packed)


@each_type
def test_the_format_word_by_word(weights: str) -> None:
    """Written with loops, from the description alone."""
    gates, H, K, each = 3, 18, 5, {"float32": 1, "bf16": 2, "int8": 4}[weights]
    matrix = torch.randn(gates * H, K)
    values, packed, expected = rounded(matrix, weights), pack(matrix, gates, weights), b""

    def word(row: int | None, start: int, scale: float) -> bytes:
        found = b""
        for k in range(start, start + each):
            value = 0.0 if row is None or k >= K else values[row, k].item()
            if weights == "int8":
                found += struct.pack("<b", round(value / scale) if scale else 0)
            else:
                found += struct.pack("<f", value)[2 if weights == "bf16" else 0 :]
        return found

    for panel in range(2 * gates):
        unit, gate = divmod(panel, gates)
        rows = [gate * H + r if r < H else None for r in range(16 * unit, 16 * unit + 16)]
        scales: tuple[float, ...] = (1.0,) * 16
        if weights == "int8":
            scales = struct.unpack("<16f", bytes(packed[panel, -2].tolist()))
            largest = [0.0 if row is None else matrix[row].abs().max().item() for row in rows]
            assert scales == pytest.approx([value / 127 for value in largest], rel=2**-17)
        lines = [b"".join(map(word, rows, [start] * 16, scales)) for start in range(0, K, each)]
        expected += b"".join(lines)
        if weights == "int8":
            bytes_of_row = [b"".join(line[4 * lane : 4 * lane + 4] for line in lines) for lane in range(16)]
            sums = [sum(struct.unpack(f"<{len(row)}b", row)) for row in bytes_of_row]
            expected += struct.pack("<16f", *scales) + struct.pack("<16i", *sums)
    assert bytes(packed.flatten().tolist()) == expected


def test_rows_of_zeros_and_errors() -> None:
    zeros = torch.zeros(3, 5)
    assert torch.equal(unpack(pack(zeros, 1, "int8"), 1, 3, 5, "int8"), zeros)
    assert error([zeros], [zeros]) == 0
    assert error([torch.tensor([3.0]), torch.tensor([4.0])], [torch.tensor([3.5]), torch.tensor([4.0])]) == 0.1
    packed = pack(torch.randn(6, 5), 2, "bf16")
    for shape in ((2, 6, 7, "bf16"), (1, 34, 5, "bf16"), (2, 6, 5, "int8")):
        with pytest.raises(ValueError, match=r"expected packed weights, uint8 \(.*got torch.uint8 \(2, 3, 64\)"):
            unpack(packed, *shape)
    assert [gates_of(name, 4) for name in ("weight_ih", "weight_hh_l0_reverse", "weight_hr_l2")] == [4, 4, 1]


# ---- results ---------------------------------------------------------------------------------------------------------

# A class, its sizes (T, B, I, H), its options, and what a call is given.
CASES: list[tuple[str, tuple[int, int, int, int], dict[str, Any], str]] = [
    ("LSTM", (5, 3, 7, 17), {}, "hx"),
    ("LSTM", (9, 1, 33, 40), {"batch_first": True}, ""),
    ("LSTM", (4, 6, 5, 33), {"num_layers": 2, "bidirectional": True}, "lengths resets hx"),
    ("LSTM", (6, 5, 3, 20), {"proj_size": 7, "num_layers": 2}, "hx"),
    ("LSTM", (6, 5, 130, 18), {"proj_size": 5, "bidirectional": True, "bias": False}, "packed"),
    ("GRU", (5, 3, 7, 17), {"bidirectional": True, "bias": False}, "hx packed"),
    ("GRU", (3, 1, 1, 1), {}, "resets"),
    ("GRU", (7, 4, 66, 48), {"num_layers": 2, "batch_first": True}, "lengths resets"),
    ("GRU", (8, 1, 5, 31), {"num_layers": 2}, "unbatched hx"),
    ("RNN", (5, 3, 7, 17), {}, "hx"),
    ("RNN", (5, 2, 16, 64), {"nonlinearity": "relu", "bidirectional": True}, "lengths"),
    ("RNN", (4, 2, 6, 10), {"nonlinearity": "sigmoid"}, "unbatched"),
    ("MGU", (5, 3, 7, 17), {"num_layers": 2, "bidirectional": True}, "packed"),
    ("MGU", (6, 20, 12, 33), {}, "hx resets"),
    ("LSTMCell", (1, 5, 7, 17), {}, "hx"),
    ("LSTMCell", (1, 1, 130, 40), {"bias": False}, "unbatched"),
    ("GRUCell", (1, 3, 5, 33), {}, "hx"),
    ("RNNCell", (1, 4, 7, 17), {"nonlinearity": "relu"}, "hx"),
    ("MGUCell", (1, 2, 9, 16), {}, "unbatched hx"),
]


def given(module: Any, kind: str, sizes: tuple[int, int, int, int], what: str) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a random call."""
    T, B, I, H = sizes  # noqa: E741
    batch_first, options, cell = getattr(module, "batch_first", False), {}, kind.endswith("Cell")
    count = 1 if cell else module.num_layers * (2 if module.bidirectional else 1)
    batch = () if "unbatched" in what else (B,)
    x: Any = torch.randn(*batch, I) if cell else torch.randn(*((B, T) if batch_first and batch else (T, *batch)), I)
    leading = batch if cell else (count, *batch)
    hx = None
    if "hx" in what:
        h = torch.randn(*leading, getattr(module, "proj_size", 0) or H)
        hx = (h, torch.randn(*leading, H)) if kind.startswith("LSTM") else h
    if "lengths" in what:
        options["lengths"] = torch.tensor([T, 0, *[1 + b % T for b in range(B - 2)]])
    if "resets" in what:
        options["resets"] = torch.rand(*((B, T) if batch_first else (T, B))) < 0.3
    if "packed" in what:
        lengths = torch.tensor([1 + (3 * b) % T for b in range(B)])
        x = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
    return [x, hx], options


def numbers(values: Any) -> list[Tensor]:
    """The tensors in a result or in arguments, without what is said of packed rows."""
    return [leaf for leaf in leaves(values) if leaf.is_floating_point()]


def to_double(value: Any) -> Any:
    if isinstance(value, PackedSequence):
        return value.double()
    if isinstance(value, tuple):
        return tuple(map(to_double, value))
    return value.double() if isinstance(value, Tensor) else value


def with_rounded_weights(module: nn.Module, weights: str) -> nn.Module:
    """A copy whose weights are what is left of them, as parameters."""
    twin = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.dim() == 2:
                parameter.copy_(rounded(parameter, weights))
    return twin


def allowed_by_int8(module: Any, arguments: list[Any], sizes: tuple[int, int, int, int]) -> float:
    """What rounding the inputs and states to 16 bits may come to, in any result of `module`, whose weights are rounded.

    A product is off by at most 2**-16 times the largest of what is multiplied times the sum of a row's weights; each
    step adds that to its state (where weights are as at initialisation, a step makes no error larger), each layer too.
    """
    off, T = 0.0, sizes[0]
    given = [argument for argument in arguments if argument is not None]
    largest = max(1.0, *(value.abs().max().item() for value in numbers(given)))
    for parameter in module.parameters():
        if parameter.dim() == 2:
            off += 2**-16 * largest * parameter.abs().sum(1).max().item()
    return T * off + 1e-6


@pytest.fixture(params=[*ISAS, "reference"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on each instruction set that there is, and on the reference."""
    if request.param == "reference":
        with rnnfast.backend("reference"):
            yield request.param
        return
    if ops.library_error is not None:
        pytest.skip(ops.library_error)
    try:
        ops.use_cpu_isa(request.param)
    except RuntimeError as unknown:
        pytest.skip(f"{request.param}: {str(unknown).splitlines()[0]}")
    yield request.param


@each_type
@pytest.mark.parametrize(("kind", "sizes", "options", "what"), CASES, ids=str)
def test_against_float64_with_the_weights_that_are_left(
    kernels: str, weights: str, kind: str, sizes: tuple[int, int, int, int], options: dict[str, Any], what: str
) -> None:
    """Float32's own rule; where activations are rounded too, a bound made of that rounding."""
    module = getattr(rnnfast, kind)(*sizes[2:], **options)
    left = with_rounded_weights(module, weights)
    arguments, row_options = given(module, kind, sizes, what)
    truth = copy.deepcopy(left).double()
    with torch.no_grad(), rnnfast.backend("reference"):
        expected = numbers(truth(*map(to_double, arguments), **row_options))
        yardstick = numbers(left(*arguments, **row_options))
    report = rnnfast.quantize_weights(module, weights)
    assert list(report.swapped) == [""]
    got = numbers(module(*arguments, **row_options))
    with torch.inference_mode():
        again = numbers(module(*arguments, **row_options))
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True))
    bound = allowed_by_int8(left, arguments, sizes)
    for ours, theirs, plain in zip(got, expected, yardstick, strict=True):
        if weights == "int8":
            assert ours.dtype is torch.float32
            assert largest_error(ours, theirs) <= bound
        else:
            check("result", ours, theirs, plain)


@each_type
def test_near_the_layer_that_it_was(weights: str) -> None:
    layer, x = rnnfast.LSTM(24, 48, 2), torch.randn(20, 3, 24)
    with torch.no_grad():
        before = layer(x)[0]
    report = rnnfast.quantize_weights(layer, weights)
    off = ((layer(x)[0] - before).norm() / before.norm()).item()
    assert off <= {"float32": 1e-6, "bf16": 0.004, "int8": 0.012}[weights]
    assert f"{weights} weights" in report.swapped[""]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_a_number_stays_in_its_row(value: float) -> None:
    layer, x = rnnfast.GRU(5, 17), torch.randn(4, 3, 5)
    rnnfast.quantize_weights(layer, "int8")
    x[1, 1, 2] = value
    output = layer(x)[0]
    assert output[:, [0, 2]].isfinite().all()
    assert output[0].isfinite().all()
    if ops.library_error is None:
        assert output[1:, 1].isnan().all()


def test_dropout_between_layers_in_training() -> None:
    layer, x = rnnfast.GRU(5, 8, 2, dropout=0.5), torch.randn(4, 3, 5)
    rnnfast.quantize_weights(layer, "bf16")
    assert not torch.equal(layer(x)[0], layer(x)[0])
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_computes_in_float32(kind: str, dtype: torch.dtype) -> None:
    module, cell = getattr(rnnfast, kind)(5, 8), kind.endswith("Cell")
    rnnfast.quantize_weights(module, "int8")
    x = torch.randn(*(() if cell else (4,)), 3, 5, dtype=dtype)
    hx = random_states(kind.removesuffix("Cell"), *(() if cell else (1,)), 3, 8)
    expected = leaves(module(x.float(), hx))
    with torch.autocast("cpu", torch.bfloat16):
        found = leaves(module(x, hx))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        with pytest.raises(RuntimeError, match=r"take torch.float32 alone, got torch.float64"):
            module(x.double())
        with pytest.raises(RuntimeError, match="of a floating type"):
            module(x.int())

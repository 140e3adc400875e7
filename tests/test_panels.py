"""Products with weights in panels: large sums, every number of rows and of panels, who computes, what is refused."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from isas import ISAS
from rnnfast import ops
from rnnfast.cell_types import CELLS
from rnnfast.quantization import TYPES, gates_of, pack, rounded
from tolerances import check

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=f"no C++ library: {ops.library_error}")

# By how much rows in 16 bits put the outputs here off, with normal inputs and weights as torch initialises them:
# 9e-5 at most in a thousand calls on four instruction sets.
OFF = 2e-4
each_type = pytest.mark.parametrize("weights", TYPES)


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.cpu_isa()
    try:
        ops.use_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(f"{request.param}: {str(error).splitlines()[0]}")
    yield request.param
    ops.use_cpu_isa(before)


def call(layer: Any, weights: str, x: Tensor, **changed: Any) -> Any:
    """The op on a layer's first direction, with some of its arguments changed."""
    gates = CELLS[layer._mode()].gates
    places = []
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"):
        value = getattr(layer, f"{name}_l0", None)
        matrix = value is not None and value.dim() == 2
        places.append(pack(value.detach(), gates_of(name, gates), weights) if matrix else value)
        places.append(None)
    given: dict[str, Any] = {
        "hidden_size": layer.hidden_size, "proj_size": layer.proj_size, "mode": layer._mode(),
        "input": x, "hx": None, "cx": None, "batch_sizes": None, "lengths": None, "resets": None, "batch_first": False,
    }  # fmt: skip
    given |= {"weight_ih": places[0], "weight_hh": places[2], "bias_ih": places[4], "bias_hh": places[6]}
    given |= {"weight_hr": places[8], **changed}
    given["weights"] = given.pop("packed", weights)
    with torch.no_grad():
        return torch.ops.rnnfast.quantized_layer(**given)


def expected(layer: Any, weights: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """torch.nn's output with the rounded weights, in float64 and in float32."""
    theirs = getattr(torch.nn, type(layer).__name__)(
        layer.input_size, layer.hidden_size, **({"proj_size": layer.proj_size} if layer.proj_size else {})
    )
    state = {name: rounded(value, weights) if value.dim() == 2 else value for name, value in layer.state_dict().items()}
    theirs.load_state_dict(state)
    with torch.no_grad():
        plain = theirs(x)[0]
        return theirs.double()(x.double())[0], plain


@each_type
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 12, 13, 29])
@pytest.mark.parametrize(
    ("cell", "H", "options"),
    [("LSTM", 40, {}), ("LSTM", 72, {"proj_size": 35}), ("GRU", 33, {}), ("RNN", 65, {}), ("RNN", 80, {})],
)
def test_every_number_of_rows(isa: str, weights: str, rows: int, cell: str, H: int, options: dict[str, Any]) -> None:
    """Register tiles of every height, an odd number of panels in tiles of two, odd numbers of columns."""
    layer = getattr(rnnfast, cell)(27, H, **options)
    x = torch.randn(3, rows, 27)
    truth, plain = expected(layer, weights, x)
    got = call(layer, weights, x)[0]
    if weights == "int8":
        assert (got - truth).abs().max() < OFF
    else:
        check("output", got, truth, plain)


@pytest.mark.parametrize("columns", [300, 1030, 65536])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_of_int8(isa: str, columns: int, sign: int) -> None:
    """Every weight 127 and every value the largest: sums that would leave 32 bits if they were not counted right."""
    layer = rnnfast.RNN(columns, 16, nonlinearity="identity", bias=False)
    torch.nn.init.constant_(layer.weight_ih_l0, sign * 1.0)
    torch.nn.init.zeros_(layer.weight_hh_l0)
    x = torch.full((1, 2, columns), 0.75)
    x[0, 1] = -0.75
    output = call(layer, "int8", x)[0]
    torch.testing.assert_close(output[0, 0], torch.full((16,), sign * 0.75 * columns), rtol=2e-5, atol=0)
    torch.testing.assert_close(output[0, 1], torch.full((16,), sign * -0.75 * columns), rtol=2e-5, atol=0)


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1.0, 1e4, 1e30])
def test_rows_are_rounded_to_16_bits(isa: str, scale: float) -> None:
    """To the nearest: by half of the last of 16 bits at most; the second term is float32's own."""
    layer = rnnfast.RNN(16, 16, nonlinearity="identity", bias=False)
    # Each weight is 127, with a scale of 1 / 127: nothing but the row is rounded.
    torch.nn.init.eye_(layer.weight_ih_l0)
    torch.nn.init.zeros_(layer.weight_hh_l0)
    x = torch.randn(1, 29, 16) * scale
    off = (call(layer, "int8", x)[0].double() - x).abs().amax(-1)
    largest = x.abs().amax(-1).double()
    assert (off <= largest * (0.5 / 32767 + 2**-17)).all()
    assert (off >= largest * 2**-20).any()


def test_scales_whose_product_is_infinite(isa: str) -> None:
    layer = rnnfast.RNN(2, 2, nonlinearity="identity", bias=False)
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.diag(torch.tensor([1e-3, 1e8])))
        layer.weight_hh_l0.zero_()
    output = call(layer, "int8", torch.tensor([[[3e38, 0.0]]]))[0]
    torch.testing.assert_close(output, torch.tensor([[[3e35, 0.0]]]), rtol=1e-4, atol=0)


def test_subnormal_rows_count_as_zeros(isa: str) -> None:
    layer = rnnfast.RNN(50, 16, nonlinearity="identity", bias=False)
    torch.nn.init.constant_(layer.weight_ih_l0, 1e30)
    assert (call(layer, "int8", torch.full((1, 2, 50), 1e-36))[0] == 0).all()
    # Not so the smallest of the others.
    assert (call(layer, "int8", torch.full((1, 2, 50), 1e-33))[0] > 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 17, 49])
def test_what_is_not_finite_makes_its_row_nan(isa: str, value: float, place: int) -> None:
    layer = rnnfast.RNN(50, 16, nonlinearity="identity")
    x = torch.randn(1, 3, 50)
    x[0, 1, place] = value
    output = call(layer, "int8", x)[0]
    assert output[0, 1].isnan().all()
    assert output[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"proj_size": 5}])
def test_few_inputs_beside_large_states(isa: str, options: dict[str, Any]) -> None:
    """The rounded rows of states need more memory than those of the input."""
    layer, x = rnnfast.LSTM(3, 200, **options), torch.randn(1, 5, 3)
    hx, cx = torch.randn(1, 5, options.get("proj_size", 200)), torch.randn(1, 5, 200)
    wide = torch.cat([x, torch.zeros(1, 5, 197)], 2)
    wider = rnnfast.LSTM(200, 200, **options)
    state = layer.state_dict()
    state["weight_ih_l0"] = torch.cat([state["weight_ih_l0"], torch.zeros(800, 197)], 1)
    wider.load_state_dict(state)
    small, large = (call(each, "int8", rows, hx=hx, cx=cx) for each, rows in ((layer, x), (wider, wide)))
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@each_type
@pytest.mark.parametrize(
    ("cell", "B", "H", "options"),
    [("LSTM", 1, 200, {}), ("LSTM", 6, 128, {"proj_size": 96}), ("GRU", 1, 260, {}), ("RNN", 9, 250, {})],
)
def test_the_same_whoever_computes(isa: str, weights: str, cell: str, B: int, H: int, options: dict[str, Any]) -> None:
    layer = getattr(rnnfast, cell)(H, H, **options)
    x = torch.randn(12, B, H)
    threads, results = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        for team in ("alone", "pool", "helpers"):
            ops.use_cpu_team(team)
            results.append(call(layer, weights, x))
    finally:
        torch.set_num_threads(threads)
        ops.use_cpu_team("auto")
    for others in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(others, results[0], strict=True))
    truth, plain = expected(layer, weights, x)
    if weights == "int8":
        assert (results[0][0] - truth).abs().max() < OFF
    else:
        check("output", results[0][0], truth, plain)


@each_type
def test_panels_that_lie_anywhere(isa: str, weights: str) -> None:
    """Off every alignment, as a file that is mapped into memory may have them; and not in one piece."""
    layer, x = rnnfast.GRU(20, 30), torch.randn(4, 2, 20)
    panels = pack(layer.weight_hh_l0.detach(), 3, weights)
    moved = torch.cat([panels.new_zeros(3), panels.flatten()])[3:].view(panels.shape)
    spread = torch.cat([panels, panels], 2)[:, :, :64]
    before = call(layer, weights, x)
    for other in (moved, spread):
        found = call(layer, weights, x, weight_hh=other)
        assert all(torch.equal(a, b) for a, b in zip(found, before, strict=True))


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"packed": "int4"}, "weights: expected float32, bf16 or int8, got int4"),
    ({"hidden_size": 0}, "hidden_size: expected 1 to 4294967295, got 0"),
    ({"hidden_size": 2**40}, "hidden_size: expected 1 to 4294967295, got 1099511627776"),
    ({"hidden_size": 12}, "weight_hh: expected shape"),
    ({"bias_hh": torch.zeros(48)}, "bias_hh: expected shape"),
    ({"hidden_size": 40}, "weight_ih: expected shape"),
    ({"proj_size": -1}, "proj_size: expected 0 to 4294967295, got -1"),
    ({"proj_size": 4}, "weight_hr: expected a tensor, got None with proj_size 4"),
    (
        {"weight_hr": torch.zeros(1, 6, 64, dtype=torch.uint8)},
        "weight_hr: expected None, got a tensor with proj_size 0",
    ),
    ({"mode": "GRU"}, "weight_ih: expected shape"),
    ({"input": torch.randn(3, 2, 9)}, "weight_ih: expected shape"),
    ({"input": torch.randn(3, 2, 8).double()}, "input: expected float32"),
    ({"weight_hh": torch.zeros(4, 6, 64)}, "weight_hh: expected panels of weights, uint8"),
    ({"weight_hh": None}, "weight_hh: expected a tensor, got None"),
    ({"weight_hh": torch.zeros(4, 5, 64, dtype=torch.uint8)}, "weight_hh: expected shape"),
    ({"hx": torch.zeros(1, 3, 16)}, "hx: expected shape"),
]


@pytest.mark.parametrize(
    ("changed", "message"), REFUSED, ids=[f"{next(iter(changed))}: {message}" for changed, message in REFUSED]
)
def test_what_the_op_refuses(changed: dict[str, Any], message: str) -> None:
    layer, x = rnnfast.LSTM(8, 16), torch.randn(3, 2, 8)
    with pytest.raises(RuntimeError, match=f"rnnfast::quantized_layer: {message}"):
        call(layer, "int8", x, **changed)


def test_too_many_columns_of_int8() -> None:
    with pytest.raises(RuntimeError, match="weight_ih: expected at most 65536 columns of int8, got 65537"):
        call(rnnfast.RNN(65537, 1), "int8", torch.zeros(1, 1, 65537))

"""Products of pairs of bfloat16 (csrc/cpu/pairs.h), by AMX-BF16 and by AVX512-BF16: calls that are large enough for
them, against float64, with gradients; and the matrix product in every layout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import MODES, RESULTS, Call, make_call, random_grads, reference, selected
from isas import WITH_PAIRS
from rnnfast import GRU, LSTM, backend, explain, libraries, ops
from rnnfast.cell_types import CELLS
from test_build import needs_library
from test_ops import check_results, double
from tolerances import check

BFLOAT16 = torch.bfloat16

# Sizes at which forward packs pairs (kernels.cpp: is_worth_pairs). Rows of a step: one, less than a group of 16, a
# group, some more, more than two groups. Units and inputs: whole blocks of 32, odd numbers, less than one vector.
FAMILIES: dict[str, dict[str, Any]] = {
    "one row": {"B": 1, "T": 40, "H": 160, "I": 96},
    "one row, odd": {"B": 1, "T": 70, "H": 131, "I": 77},
    "few rows": {"B": 3, "T": 17, "H": 150, "I": 64},
    "one step": {"B": 37, "T": 1, "H": 160, "I": 128},
    "16 rows": {"B": 16, "T": 7, "H": 128, "I": 128},
    "17 rows": {"B": 17, "T": 6, "H": 129, "I": 127},
    "50 rows": {"B": 50, "T": 4, "H": 96, "I": 160},
    "few units": {"B": 64, "T": 60, "H": 11, "I": 900},
    "few inputs": {"B": 20, "T": 20, "H": 110, "I": 1},
    "several chunks": {"B": 2, "T": 300, "H": 60, "I": 40},
    "both directions": {"B": 19, "T": 5, "H": 100, "I": 70, "D": 2},
    "batch first": {"B": 18, "T": 5, "H": 120, "I": 96, "layout": "batch_first"},
    "packed": {"B": 33, "T": 9, "H": 80, "I": 64, "layout": "packed"},
    "packed, odd": {"B": 9, "T": 13, "H": 90, "I": 95, "layout": "packed", "D": 2},
    "lengths, resets": {"B": 34, "T": 7, "H": 90, "I": 64, "lengths": True, "resets": True},
    "no initial states, no bias": {"B": 24, "T": 6, "H": 100, "I": 96, "initial": False, "bias": False},
    "projection": {"B": 21, "T": 9, "H": 110, "I": 64, "P": 45},
    "projection, lengths": {"B": 40, "T": 6, "H": 100, "I": 32, "P": 64, "lengths": True, "resets": True, "D": 2},
}
CASES = [
    pytest.param(mode, family, id=f"{mode} {family}")
    for i, (family, sizes) in enumerate(FAMILIES.items())
    for j, mode in enumerate(MODES)
    # Every family with an LSTM, which has projections, and with one of the others.
    if mode == "LSTM" or ("P" not in sizes and j == 1 + i % (len(MODES) - 1))
]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before, threads = ops.cpu_isa(), torch.get_num_threads()
    with backend("cpu"):
        yield
    if before:
        ops.use_cpu_isa(before)
    torch.set_num_threads(threads)


@pytest.fixture(params=WITH_PAIRS)
def isa(request: pytest.FixtureRequest) -> str:
    try:
        ops.use_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(f"{request.param}: {str(error).splitlines()[0]}")
    return str(request.param)


def each_isa(threads: Sequence[int]) -> Iterator[tuple[str, int]]:
    """Those that this processor has, each in use in its turn, with so many threads: what is true of all of them is
    computed once."""
    found = False
    for name in WITH_PAIRS:
        try:
            ops.use_cpu_isa(name)
        except RuntimeError:
            continue
        for number in threads:
            torch.set_num_threads(number)
            found = True
            yield name, number
    if not found:
        pytest.skip(f"this processor has none of {', '.join(WITH_PAIRS)}")


def leave_not_a_number_in_free_memory() -> None:
    """Where the next workspace is taken from: what is padding must be made zero, a NaN times zero is none."""
    kept = [torch.full((1 << size,), torch.nan) for size in range(8, 23) for _ in range(3)]
    del kept


def is_worth_pairs(mode: str, sizes: dict[str, Any]) -> bool:
    rows, H, D = sizes["B"] * sizes["T"], sizes["H"], sizes.get("D", 1)
    return rows >= 8 and 2 * D * CELLS[mode].gates * H * (sizes["I"] + sizes.get("P", H)) * rows >= 6e6


@needs_library
@pytest.mark.parametrize(("mode", "family"), CASES)
def test_layers_against_float64(mode: str, family: str) -> None:
    sizes = FAMILIES[family]
    if CELLS[mode].gates == 1:
        sizes = {**sizes, "T": 4 * sizes["T"]}
    assert is_worth_pairs(mode, sizes), "this case does not come to pairs"
    call = make_call(mode, dtype=BFLOAT16, **sizes)
    exact = call.to(torch.float64)
    saved = call.forward(reference)
    grads = random_grads(saved)
    expected_forward = exact.forward(reference)
    own_backward, expected_backward = (
        call.backward(reference, grads, saved),
        exact.backward(reference, double(grads), double(saved)),
    )
    for isa, threads in each_isa((1, 2, 3)):
        leave_not_a_number_in_free_memory()
        actual = call.forward(selected)
        check_results(call, actual, saved, expected_forward, f"layer_forward, {isa}, {threads} threads")
        assert torch.equal(call.inference(selected)["output"], actual["output"])
        leave_not_a_number_in_free_memory()
        actual = call.backward(selected, grads, saved)
        check_results(call, actual, own_backward, expected_backward, f"recurrence_backward, {isa}, {threads} threads")


@pytest.fixture
def bf16_allowed() -> Iterator[None]:
    flags = torch.backends.mkldnn.rnn
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    yield
    flags.fp32_precision = before
    libraries.follow_bf16()


@needs_library
@pytest.mark.usefixtures("bf16_allowed")
@pytest.mark.parametrize(("mode", "family"), [case for case in CASES if "LSTM" not in case.id or "projec" in case.id])
def test_float32_where_bfloat16_is_allowed(mode: str, family: str) -> None:
    """As exact as bfloat16 as a whole, or better; and rounded indeed: these sizes come to pairs."""
    sizes = FAMILIES[family]
    if CELLS[mode].gates == 1:
        sizes = {**sizes, "T": 4 * sizes["T"]}
    call = make_call(mode, dtype=torch.float32, **sizes)
    rounded, exact = call.to(BFLOAT16), call.to(torch.float64)
    saved, coarse = call.forward(reference), rounded.forward(reference)
    grads = random_grads(saved)
    forward = (in_float32(coarse), exact.forward(reference))
    backward = (
        in_float32(rounded.backward(reference, {name: grad.to(BFLOAT16) for name, grad in grads.items()}, coarse)),
        exact.backward(reference, double(grads), double(saved)),
    )
    libraries.follow_bf16()
    torch.ops.rnnfast.cpu_allow_bf16(False)
    plain = torch.ops.rnnfast.layer_forward(mode, call.input, *call.shared)[0]
    plain_gates = torch.ops.rnnfast.recurrence_backward(*backward_arguments(call, grads, saved))[0]
    torch.ops.rnnfast.cpu_allow_bf16(True)
    for isa, threads in each_isa((1, 3)):
        leave_not_a_number_in_free_memory()
        check_results(call, call.forward(selected), *forward, f"layer_forward, {isa}, {threads} threads")
        leave_not_a_number_in_free_memory()
        actual = call.backward(selected, grads, saved)
        check_results(call, actual, *backward, f"recurrence_backward, {isa}, {threads} threads")
        assert not torch.equal(call.forward(selected)["output"], plain)
        assert call.steps == 1 or not torch.equal(actual["grad_gates"], plain_gates)


def backward_arguments(call: Call, grads: dict[str, Tensor], saved: dict[str, Tensor]) -> list[Any]:
    given = [grads.get(name) for name in RESULTS[:4]]
    return [call.mode, *given, saved["output"], saved["cell_states"], saved["reserve"], *call.shared]


@needs_library
@pytest.mark.usefixtures("bf16_allowed", "isa")
def test_the_state_that_a_gru_carries_on_is_not_rounded() -> None:
    """With an update gate of 1 it stays what it was: n + (h - n)."""
    layer, h = GRU(160, 160), torch.randn(1, 20, 160)
    with torch.no_grad():
        layer.bias_ih_l0[160:320] = 1e4
        h_n = layer(torch.randn(20, 20, 160), h)[1]
    assert (h_n - h).abs().max() < 1e-5
    assert (h.bfloat16() - h).abs().max() > 1e-3


@needs_library
@pytest.mark.usefixtures("bf16_allowed", "isa")
def test_small_calls_are_exact_forward_and_backward() -> None:
    layer, input = LSTM(8, 8), torch.randn(3, 2, 8)
    results = []
    for precision in ("bf16", "ieee"):
        torch.backends.mkldnn.rnn.fp32_precision = precision
        output = layer(input)[0]
        results.append((output, *torch.autograd.grad(output.square().sum(), list(layer.parameters()))))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def in_float32(results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() for name, value in results.items()}


@needs_library
@pytest.mark.usefixtures("bf16_allowed", "isa")
def test_the_flag_is_followed_at_every_call() -> None:
    layer, input = LSTM(160, 160), torch.randn(20, 20, 160)
    flags, outputs = torch.backends.mkldnn.rnn, {}
    for precision in ("none", "bf16", "ieee", "bf16"):
        flags.fp32_precision = precision
        output = layer(input)[0]
        output.sum().backward()
        outputs.setdefault(precision, []).append((output, layer.weight_hh_l0.grad))
        layer.weight_hh_l0.grad = None
    (plain,), (ieee,), (first, second) = outputs["none"], outputs["ieee"], outputs["bf16"]
    for one, other, allowed in zip(plain, ieee, first, strict=True):
        assert torch.equal(one, other)
        assert 1e-4 < ((allowed - one).norm() / one.norm()).item() < 1e-2
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@needs_library
def test_explain_says_whose_products_are_rounded(isa: str, bf16_allowed: None) -> None:
    layer, input = LSTM(8, 8), torch.randn(3, 2, 8)
    assert f"C++ time loop ({isa}, larger products in bfloat16)" in explain(layer, input).kernel
    assert "in bfloat16" in explain(layer.bfloat16(), input.bfloat16()).kernel
    assert "in bfloat16" not in explain(layer.double(), input.double()).kernel
    torch.backends.mkldnn.rnn.fp32_precision = "ieee"
    assert "in bfloat16" not in explain(layer.float(), input).kernel


def matrix(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).to(BFLOAT16).t() if transposed else torch.randn(rows, columns).to(BFLOAT16)


@needs_library
@pytest.mark.parametrize("turned", [(False, False), (False, True), (True, False), (True, True)], ids=str)
@pytest.mark.parametrize(
    "sizes",
    # One block of k and several, whole and not, as they lie (k in whole 32) and packed; tiles of 32 rows and 64 columns
    # and what is left of them.
    [(1, 1, 1), (5, 7, 9), (32, 64, 64), (33, 65, 130), (100, 2000, 70), (64, 1537, 64), (3, 1024, 200), (257, 31, 5)]
    + [(67, 96, 70), (70, 1312, 66), (64, 1536, 64)],
    ids=str,
)
@pytest.mark.usefixtures("isa")
def test_matrix_product(sizes: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    m, k, n = sizes
    a, b = matrix(m, k, turned[0]), matrix(k, n, turned[1])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leave_not_a_number_in_free_memory()
        check("product", torch.ops.rnnfast.matmul(a, b), a.double() @ b.double(), a @ b)


@needs_library
@pytest.mark.usefixtures("isa")
def test_matrices_whose_rows_and_columns_lie_apart() -> None:
    a, b = matrix(64, 128, False)[::2, ::2], matrix(64, 80, False)[:, ::2]
    one = torch.ones((), dtype=BFLOAT16)
    for left in (a, one.expand(32, 64), a[:1].expand(32, 64), a[:, :1].expand(32, 64)):
        check("product", torch.ops.rnnfast.matmul(left, b), left.double() @ b.double(), left @ b)


@needs_library
@pytest.mark.usefixtures("isa")
def test_second_derivatives_with_gradients_that_are_expanded() -> None:
    """The gradient of a sum lies nowhere: its strides are zeros."""
    layer, input = LSTM(24, 40).bfloat16(), torch.randn(6, 5, 24).bfloat16().requires_grad_()

    def second(layer: LSTM, input: Tensor) -> list[Tensor]:
        wanted = [input, *layer.parameters()]
        first = torch.autograd.grad(layer(input)[0].square().sum(), wanted, create_graph=True)
        total = torch.stack([grad.sum() for grad in first]).sum()
        return list(torch.autograd.grad(total, wanted))

    own = second(layer, input)
    with backend("reference"):
        exact = LSTM(24, 40).double()
        exact.load_state_dict({name: value.double() for name, value in layer.state_dict().items()})
        truth = second(exact, input.detach().double().requires_grad_())
        yardstick = second(layer, input)
    for one, right, plain in zip(own, truth, yardstick, strict=True):
        check("second derivative", one, right, plain)


@needs_library
@pytest.mark.usefixtures("isa")
def test_a_part_of_a_matrix_is_not_read_beyond() -> None:
    """Rows and columns beside the matrix are NaN: one that is read shows."""
    part = torch.full((80, 130), torch.nan, dtype=BFLOAT16)[5:45, 7:70]
    part.copy_(torch.randn(40, 63))
    # ATen's own product does read beyond.
    copy = part.contiguous()
    check("a^T a", torch.ops.rnnfast.matmul(part.t(), part), copy.double().t() @ copy.double(), copy.t() @ copy)
    check("a a^T", torch.ops.rnnfast.matmul(part, part.t()), copy.double() @ copy.double().t(), copy @ copy.t())


@needs_library
@pytest.mark.usefixtures("isa")
def test_not_a_number_and_infinity_stay_in_their_rows() -> None:
    """A group of rows is multiplied as one; those that do not count may hold anything."""
    call = make_call("LSTM", B=18, T=5, H=120, I=96, dtype=BFLOAT16)
    clean = call.forward(selected)["output"]
    call.input[1, 3] = torch.nan
    call.input[2, 17, 5] = torch.inf
    output, exact = call.forward(selected)["output"], call.to(torch.float64).forward(reference)["output"]
    others = [b for b in range(18) if b not in (3, 17)]
    assert torch.equal(output[:, others], clean[:, others])
    assert output[1:, 3].isnan().all()
    # An infinity saturates gates; where it meets the zeros behind the last unit it must not stay. (The yardstick is
    # what rounding alone makes of it: oneDNN's product lets the other row's NaN in.)
    assert exact[2:, 17].isfinite().all()
    check("row", output[:, 17], exact[:, 17], exact[:, 17].to(BFLOAT16))


@needs_library
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("mode", ["LSTM", "RNN_RELU"])
def test_numbers_that_overflow_stay_infinite(mode: str) -> None:
    call = make_call(mode, B=18, T=12, H=120, I=96, P=50 if mode == "LSTM" else 0, dtype=BFLOAT16)
    for weight in (*call.weight_ih, *call.weight_hh):
        weight.abs_().mul_(50 if mode == "RNN_RELU" else 1)
    call.input.abs_().mul_(1e37)
    actual, own = call.forward(selected), call.forward(reference)
    assert torch.equal(actual["output"].isnan(), own["output"].isnan())
    assert torch.equal(actual["output"].isinf(), own["output"].isinf())


@needs_library
def test_bfloat16_products_without_instructions_for_them_are_own() -> None:
    """oneDNN says that it supports them on every AVX-512."""
    try:
        ops.use_cpu_isa("avx512")
    except RuntimeError as error:
        pytest.skip(str(error).splitlines()[0])
    assert ops._is_own(matrix(512, 128, False), matrix(128, 64, False))


@needs_library
def test_where_bfloat16_products_go(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large products of a transposed matrix are the kernels' own where they have tiles, others ATen's."""
    asked: list[str] = []
    own, torchs = ops._matmul, torch.mm
    monkeypatch.setattr(ops, "_matmul", lambda a, b: asked.append("own") or own(a, b))
    monkeypatch.setattr(torch, "mm", lambda a, b: asked.append("torch") or torchs(a, b))
    with torch.no_grad():
        ops.matmul(matrix(512, 128, True), matrix(128, 64, False))
        ops.matmul(matrix(512, 128, False), matrix(128, 64, False))
        ops.matmul(matrix(8, 8, False), matrix(8, 8, False))
    assert torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert asked == ["own" if isa == "amx_bf16" else "torch", "torch", "own"]
    # Without oneDNN ATen's are no choice.
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(ops, "_limits", {})
    ops._choose_products(isa)
    del asked[:]
    with torch.no_grad():
        for dtype in (BFLOAT16, torch.float16):
            ops.matmul(matrix(512, 128, False).to(dtype), matrix(128, 64, False).to(dtype))
    assert asked == ["own", "own"]

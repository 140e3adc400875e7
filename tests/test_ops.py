"""Every op on every backend against the reference in float64: results, states and every gradient."""

import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from cases import MODES, WITH_CELL_STATE, Call, make_call, random_grads, reference, selected, torch_layer
from rnnfast import ops
from rnnfast import reference as plain
from rnnfast.cell_types import CELLS
from tolerances import check, check_equal, error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# both directions unless a family says otherwise
FAMILIES = {
    "one step": {"T": 1, "H": 6},
    "one row": {"B": 1, "H": 10, "T": 6},
    "no rows": {"B": 0},
    "one hidden unit": {"H": 1, "I": 1},
    "H 17": {"H": 17, "D": 1},
    "H 33": {"H": 33, "B": 7},
    "H 64": {"H": 64, "B": 19, "I": 20, "D": 1},
    "H 65": {"H": 65, "B": 9, "I": 33},
    "projection": {"H": 9, "P": 4},
    "projection, large": {"H": 40, "P": 17, "B": 13, "lengths": True, "resets": True, "D": 1},
    "packed": {"layout": "packed", "H": 18, "B": 11, "T": 7},
    "packed, projection, one direction": {"layout": "packed", "H": 18, "P": 7, "B": 11, "D": 1},
    "packed, one row": {"layout": "packed", "B": 1, "T": 4},
    "packed, no initial states": {"layout": "packed", "B": 21, "H": 8, "initial": False},
    "lengths": {"lengths": True, "H": 12, "B": 10, "T": 6},
    "resets": {"resets": True, "H": 12, "B": 10, "T": 6},
    "lengths, resets": {"lengths": True, "resets": True, "H": 21, "B": 10, "T": 9},
    "batch first": {"layout": "batch_first", "H": 20, "B": 6, "D": 1},
    "batch first, lengths, resets": {"layout": "batch_first", "H": 20, "B": 6, "T": 8, "lengths": True, "resets": True},
    "no initial states, no bias": {"initial": False, "bias": False, "H": 14, "resets": True},
}
CASES = [
    (mode, family)
    for family, options in FAMILIES.items()
    for mode in MODES
    if CELLS[mode].may_project or "P" not in options
]


def valid(call: Call, name: str, value: Tensor) -> Tensor:
    """What is defined of a result: the reserve's rows within their length."""
    rows = call.alive_rows()
    return value[rows.to(value.device)] if name == "reserve" and rows is not None and value.numel() else value


def family_call(mode: str, family: str, dtype: torch.dtype) -> Call:
    return make_call(mode, dtype=dtype, **{"D": 2, **FAMILIES[family]})


def on(device: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to(device) for name, value in tensors.items()}


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.double() for name, value in tensors.items()}


@functools.cache
def truth(mode: str, family: str, dtype: torch.dtype) -> tuple[dict[str, dict[str, Tensor]], ...]:
    """By op, in this dtype: arguments, the reference's results on them, and its float64 results on the same numbers."""
    call = family_call(mode, family, dtype)
    exact = call.to(torch.float64)
    saved = call.forward(reference)
    grads = random_grads(saved)
    own = {
        "forward": saved,
        "backward": call.backward(reference, grads, saved),
        "inference": call.inference(reference),
    }
    expected = {
        "forward": exact.forward(reference),
        "backward": exact.backward(reference, double(grads), double(saved)),
        "inference": exact.inference(reference),
    }
    return {"grads": grads}, own, expected


def check_results(
    call: Call, actual: dict[str, Tensor], own: dict[str, Tensor], expected: dict[str, Tensor], what: str
) -> None:
    for name, value in actual.items():
        assert value.stride() == torch.empty(value.shape, device="meta").stride(), name
        assert value.shape == own[name].shape, f"{what}: {name}"
        check(f"{what}: {name}", *(valid(call, name, v).cpu() for v in (value, expected[name], own[name])))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "family"), CASES)
def test_against_float64(backend: str, device: str, mode: str, family: str, dtype: torch.dtype) -> None:
    # the seed is that of every test, so truth() sees the same call whoever computes it first
    arguments, own, expected = truth(mode, family, dtype)
    torch.manual_seed(1234)
    call = family_call(mode, family, dtype).on(device)
    actual = call.forward(selected)
    check_results(call, actual, own["forward"], expected["forward"], "layer_forward")
    beyond = call.alive_rows()
    if beyond is not None:
        assert not actual["output"][~beyond].any()
        assert mode not in WITH_CELL_STATE or not actual["cell_states"][~beyond].any()
    actual = call.backward(selected, on(device, arguments["grads"]), on(device, own["forward"]))
    check_results(call, actual, own["backward"], expected["backward"], "recurrence_backward")
    check_results(call, call.inference(selected), own["inference"], expected["inference"], "layer")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mode", "family"), [case for case in CASES if case[1] in ("lengths, resets", "packed")])
def test_forward_of_one_backend_and_backward_of_another(
    backend: str, device: str, mode: str, family: str, dtype: torch.dtype
) -> None:
    call = family_call(mode, family, dtype).on(device)
    saved = {"ours": call.forward(selected), "reference": call.forward(reference)}
    grads = random_grads(saved["reference"])
    exact = call.to(torch.float64)
    for forward, backward in (("ours", reference), ("ours", selected), ("reference", selected)):
        expected = exact.backward(reference, double(grads), double(saved[forward]))
        own = call.backward(reference, grads, saved[forward])
        check_results(call, call.backward(backward, grads, saved[forward]), own, expected, f"{forward} forward")


@pytest.mark.parametrize("given", [[], ["output"], ["h_n"], ["c_n"], ["cell_states"], ["h_n", "c_n"]])
@pytest.mark.parametrize("family", ["lengths, resets", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_that_are_none(backend: str, device: str, mode: str, family: str, given: list[str]) -> None:
    call = family_call(mode, family, torch.float64).on(device)
    saved = call.forward(reference)
    grads = random_grads(saved, given)
    expected = call.backward(reference, grads, saved)
    for name, value in call.backward(selected, grads, saved).items():
        check_equal(name, value, expected[name])


def strided(value: Tensor) -> Tensor:
    """The same numbers at other strides: every second element of each dimension's double, last dimension first."""
    if value.shape == (0,):
        return value
    spread = value.new_zeros([2 * size for size in reversed(value.shape)])
    view = spread[tuple(slice(None, None, 2) for _ in value.shape)].permute(*reversed(range(value.dim())))
    return view.copy_(value)


@pytest.mark.parametrize("family", ["lengths, resets", "batch first, lengths, resets", "packed", "projection"])
@pytest.mark.parametrize("mode", MODES)
def test_strides_do_not_matter(backend: str, device: str, mode: str, family: str) -> None:
    if not CELLS[mode].may_project and "P" in FAMILIES[family]:
        family = "no initial states, no bias"
    call = family_call(mode, family, torch.float32).on(device)
    other = call.map(strided)
    other.lengths, other.resets, other.batch_sizes = (
        None if v is None else strided(v) for v in (call.lengths, call.resets, call.batch_sizes)
    )
    saved = call.forward(reference)
    grads = random_grads(saved)
    spread = {name: strided(value) for name, value in saved.items()}
    for actual, expected in (
        (other.forward(selected), call.forward(selected)),
        (other.inference(selected), call.inference(selected)),
        (
            other.backward(selected, {name: strided(value) for name, value in grads.items()}, spread),
            call.backward(selected, grads, saved),
        ),
    ):
        for name, value in actual.items():
            check(name, *(valid(call, name, v) for v in (value, expected[name].double(), expected[name])))


@pytest.mark.parametrize("mode", MODES)
def test_expanded_inputs(backend: str, device: str, mode: str) -> None:
    call = make_call(mode, D=2, H=9).on(device)
    for name in ["hx", "cx"] if mode in WITH_CELL_STATE else ["hx"]:
        setattr(call, name, getattr(call, name)[:, :1].expand(-1, call.batch, -1))
    call.input = call.input[:1, :1].expand(5, 4, -1)
    saved = call.forward(reference)
    grads = {name: value.new_tensor(0.5).expand(value.shape) for name, value in saved.items()}
    for actual, expected in (
        (call.forward(selected), saved),
        (call.inference(selected), call.inference(reference)),
        (call.backward(selected, grads, saved), call.backward(reference, grads, saved)),
    ):
        for name, value in actual.items():
            check_equal(name, value, expected[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("family", ["lengths, resets", "packed", "H 33"])
@pytest.mark.parametrize("mode", MODES)
def test_nan_and_inf_stand_where_the_reference_has_them(
    backend: str, device: str, mode: str, family: str, value: float
) -> None:
    call = family_call(mode, family, torch.float64).on(device)
    call.input[(2, 3, 0) if call.batch_sizes is None else (12, 0)] = value
    call.hx[:, 1, 0] = value
    saved = call.forward(reference)
    for name, result in call.forward(selected).items():
        assert error(*(valid(call, name, v) for v in (result, saved[name]))) < 1e-12, name
    grads = random_grads(saved)
    grads["output"].view(-1)[5] = value
    expected = call.backward(reference, grads, saved)
    for name, result in call.backward(selected, grads, saved).items():
        assert error(result, expected[name]) < 1e-12, name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode not in ("RNN_RELU", "RNN_IDENTITY")])
def test_gates_of_any_size_saturate(backend: str, device: str, mode: str, dtype: torch.dtype) -> None:
    """One step from zero: what comes out is the activation functions alone, from subnormal to far beyond saturation."""
    sizes = [0.0, 1e-30, 1e-6, 1e-3, 0.1, 1.0, 5.0, 9.0, 11.0, 20.0, 45.0, 88.0, 89.0, 104.0, 800.0, 6e4]
    values = torch.tensor([*sizes, *(-size for size in sizes)], dtype=dtype, device=device)
    call = make_call(mode, T=1, B=1, H=len(values), initial=False, bias=False, dtype=dtype).on(device)
    # The input is the gates.
    call.input = values.repeat(call.weight_ih[0].shape[0] // len(values)).reshape(1, 1, -1)
    call.weight_ih = [torch.eye(call.input.shape[2], dtype=dtype, device=device)]
    own, expected = call.forward(reference), call.to(torch.float64).forward(reference)
    check_results(call, call.forward(selected), own, expected, "layer_forward")


@pytest.fixture
def rows_apart(backend: str) -> Iterator[None]:
    """Products of torch whose rows know nothing of each other.

    The emulated kernels leave products to torch, and on processors with AMX oneDNN's bfloat16 product lets a NaN of one
    row into others, as torch.mm alone shows. Without oneDNN it does not.
    """
    if backend != "emulated":
        yield
        return
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


@pytest.mark.usefixtures("rows_apart")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
def test_what_lies_beyond_a_row_is_never_read(backend: str, device: str, mode: str, dtype: torch.dtype) -> None:
    call = family_call(mode, "batch first, lengths, resets", dtype).on(device)
    saved = call.forward(selected)
    grads = random_grads(saved)
    expected = saved | call.backward(selected, grads, saved)
    beyond = ~call.alive_rows()
    poisoned = {name: value.clone() for name, value in saved.items()}
    poisoned_grads = {name: value.clone() for name, value in grads.items()}
    for tensor in [call.input, *poisoned.values(), *poisoned_grads.values()]:
        if tensor.shape[:2] == beyond.shape:
            tensor[beyond] = float("nan")
    actual = call.forward(selected) | call.backward(selected, poisoned_grads, poisoned)
    for name, value in expected.items():
        assert torch.equal(valid(call, name, actual[name]), valid(call, name, value)), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", ["lengths, resets", "H 65", "projection", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_runs_repeat_bit_for_bit_and_arguments_stay_as_they_are(
    backend: str, device: str, mode: str, family: str, dtype: torch.dtype
) -> None:
    if not CELLS[mode].may_project and "P" in FAMILIES[family]:
        family = "H 33"
    call = family_call(mode, family, dtype).on(device)
    before = {name: value.clone() for name, value in call.tensors().items()}
    saved = call.forward(selected)
    copies = {name: value.clone() for name, value in saved.items()}
    grads = random_grads(saved)
    grads_copy = {name: value.clone() for name, value in grads.items()}
    first, second = call.backward(selected, grads, saved), call.backward(selected, grads, saved)
    again = call.forward(selected)
    inferences = call.inference(selected), call.inference(selected)
    for name, value in saved.items():
        assert torch.equal(valid(call, name, value), valid(call, name, copies[name])), f"backward wrote to {name}"
        assert torch.equal(valid(call, name, value), valid(call, name, again[name])), name
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    for name, value in inferences[0].items():
        assert torch.equal(value, inferences[1][name]), name
        assert torch.equal(value, saved[name]), f"{name} in inference"
    for now, then in ((call.tensors(), before), (grads, grads_copy)):
        for name, value in now.items():
            assert torch.equal(value, then[name]), f"an op wrote to {name}"


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("B", [1, 3, 40])
@pytest.mark.parametrize("mode", MODES)
def test_any_number_of_threads(backend: str, mode: str, B: int, threads: int) -> None:
    call = make_call(mode, T=6, B=B, H=50, I=20, D=2, lengths=True, resets=True)
    saved = call.forward(reference)
    grads = random_grads(saved)
    expected = saved | call.backward(reference, grads, saved)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        actual = call.forward(selected) | call.backward(selected, grads, saved)
    finally:
        torch.set_num_threads(before)
    for name, value in actual.items():
        check_equal(name, *(valid(call, name, v) for v in (value, expected[name])))


@functools.cache
def long_truth(mode: str) -> tuple[dict[str, Tensor], ...]:
    """The reference takes many seconds for this: once for all backends."""
    torch.manual_seed(1234)
    call = make_call(mode, T=70_000, B=2, H=3, I=2)
    saved = call.forward(reference)
    grads = random_grads(saved)
    return saved, grads, call.backward(reference, grads, saved)


@pytest.mark.alone
@pytest.mark.parametrize("mode", ["LSTM", pytest.param("GRU", marks=pytest.mark.exhaustive)])
def test_seventy_thousand_steps(backend: str, device: str, mode: str) -> None:
    """The kernels against the reference, the reference against torch.nn."""
    saved, grads, expected = long_truth(mode)
    torch.manual_seed(1234)
    call = make_call(mode, T=70_000, B=2, H=3, I=2)
    if backend == "reference":
        with torch.no_grad():
            output, _ = torch_layer(call, [0])(call.input, (call.hx, call.cx) if mode in WITH_CELL_STATE else call.hx)
        check_equal("output", saved["output"], output)
        return
    call = call.on(device)
    for name, value in call.forward(selected).items():
        check_equal(name, value.cpu(), saved[name])
    for name, value in call.backward(selected, on(device, grads), on(device, saved)).items():
        check_equal(name, value.cpu(), expected[name])


def matmul_of(backend: str) -> Callable[[Tensor, Tensor], Tensor]:
    return plain.matmul if backend == "reference" else torch.ops.rnnfast.matmul


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("M", "K", "N"),
    [
        (1, 1, 1),
        (5, 7, 3),
        (1, 64, 33),
        (65, 1, 17),
        (130, 67, 50),
        (64, 256, 96),
        (20, 1300, 70),
        (0, 3, 4),
        (3, 0, 4),
    ],
)
def test_matmul(backend: str, device: str, M: int, K: int, N: int, dtype: torch.dtype) -> None:
    matmul = matmul_of(backend)
    # the rule's floor is meant for values near 1
    a = (torch.randn(M, K, dtype=torch.float64) / max(1, K) ** 0.5).to(device, dtype)
    b = torch.randn(K, N, dtype=torch.float64).to(device, dtype)
    # the leading dimension may be larger than a row
    layouts = {
        "row": lambda x: x,
        "column": lambda x: x.t().contiguous().t(),
        "row, wide": lambda x: torch.cat([x, x], dim=1)[:, : x.shape[1]],
        "column, wide": lambda x: torch.cat([x.t(), x.t()], dim=1)[:, : x.shape[0]].t(),
    }
    expected = a.double() @ b.double()
    for name_a, lay_a in layouts.items():
        for name_b, lay_b in layouts.items():
            result = matmul(lay_a(a), lay_b(b))
            assert result.is_contiguous()
            check(f"{name_a} @ {name_b}", result, expected, a @ b)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_matmul_keeps_nan_and_inf(backend: str, device: str, value: float) -> None:
    matmul = matmul_of(backend)
    a, b = torch.randn(20, 30).to(device), torch.randn(30, 40).to(device)
    a[3, 4] = b[7, 9] = value
    assert torch.equal(matmul(a, b).isfinite(), (a @ b).isfinite())


def test_matmul_is_differentiable() -> None:
    a, b = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda a, b: ops.matmul(a, b.t()), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: ops.matmul(a, b.t()), (a, b))

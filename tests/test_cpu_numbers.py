"""What the CPU kernels do with numbers at the edges: denormals under flush-to-zero, huge and special values, saturated
gates, sizes that nothing holds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import rnnfast
from rnnfast import ops

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=f"no C++ library: {ops.library_error}")

CELLS = ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "batch_first": {"batch_first": True, "bias": False},
}


@pytest.fixture(params=["avx512", "avx2", "portable"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = ops.use_cpu_isa("")
    try:
        ops.use_cpu_isa(request.param)
    except RuntimeError as error:
        pytest.skip(f"{request.param}: {str(error).splitlines()[0]}")
    try:
        with rnnfast.backend("cpu"):
            yield request.param
    finally:
        ops.use_cpu_isa(before)


def module_of(library: Any, cell: str, *sizes: int, **options: Any) -> nn.Module:
    kind, _, nonlinearity = cell.partition("_")
    if nonlinearity:
        options["nonlinearity"] = nonlinearity.lower()
    module: nn.Module = getattr(library, kind)(*sizes, **options)
    return module


def on_a_thread(run: Callable[[], Any]) -> Any:
    """What `run` returns on a thread of its own: with a float mode and a pool of threads of its own."""
    results: list[Any] = []

    def record() -> None:
        try:
            results.append(run())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=record)
    thread.start()
    thread.join()
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


# ---- flush-to-zero ---------------------------------------------------------------------------------------------------


# Made of bits: a thread that flushes makes no denormal of a number.
DENORMALS = torch.full((2, 1 << 19), 1 << 20, dtype=torch.int32).view(torch.float32)


def flushing_of_the_pool() -> list[bool]:
    """Whether torch's own arithmetic flushes, in the caller's half of a parallel loop and in that of the pool."""
    flushed = (DENORMALS * 1.5).view(torch.int32) == 0
    assert (flushed == flushed[:, :1]).all(), "expected two threads, and one mode in each"
    return [bool(half) for half in flushed[:, 0]]


def with_flushing(caller: bool, pool: bool, run: Callable[[], Any]) -> Any:
    """`run` on a thread whose own mode is `caller`, where the other thread of its pool has the mode `pool`."""

    def all_of_it() -> Any:
        torch.set_num_threads(2)
        # The pool's threads begin with the mode of the thread that makes them.
        torch.set_flush_denormal(pool)
        flushing_of_the_pool()
        torch.set_flush_denormal(caller)
        assert flushing_of_the_pool() == [caller, pool]
        result = run()
        assert flushing_of_the_pool() == [caller, pool]
        return result

    return on_a_thread(all_of_it)


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def results_and_gradients(module: nn.Module, input: Tensor, grad: Tensor, biases: bool = True) -> list[Tensor]:
    input = input.clone().requires_grad_()
    output = module(input)[0]
    parameters = [parameter for name, parameter in module.named_parameters() if biases or "bias" not in name]
    gradients = torch.autograd.grad(output, [input, *parameters], grad)
    return [output.detach(), *gradients]


def denormal_parts(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Half of the values are denormal in float16."""
    return (torch.randn(shape) * torch.where(torch.rand(shape) < 0.5, 3e-5, 1.0)).to(dtype)


def large_call(cell: str, dtype: torch.dtype, option: str) -> tuple[nn.Module, Tensor, Tensor]:
    """One that is worth two threads, with denormals among its inputs, weights, results and gradients."""
    module = module_of(rnnfast, cell, 24, 48, **OPTIONS[option]).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(denormal_parts(parameter.shape, dtype) * 0.3)
    input = denormal_parts((12, 32, 24), dtype)
    return module, input, denormal_parts(module(input)[0].shape, dtype) * 2.0**-8


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
def test_float16_denormals_are_numbers_in_every_mode(cell: str, option: str) -> None:
    call = large_call(cell, torch.float16, option)
    want = on_a_thread(lambda: results_and_gradients(*call))
    assert (want[1] != 0).any()
    assert any(((value != 0) & (value.abs() < 2.0**-14)).any() for value in want)
    for caller, pool in [(True, True), (True, False), (False, True)]:
        got = with_flushing(caller, pool, lambda: results_and_gradients(*call))
        for value, expected in zip(got, want, strict=True):
            # float32 in between may lose what is below 2^-126: nothing that float16 holds.
            assert_close(value, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_16_bit_value_is_read_and_written(dtype: torch.dtype) -> None:
    """Through a product with one, and through a layer that hands its input on."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = bits.view(dtype)
    every = every[every.isfinite()].view(-1, 8)
    if dtype is torch.bfloat16:
        # In that mode bfloat16's denormals, which are float32's, are zeros like those.
        every = torch.where(every.float().abs() < 2.0**-126, 0, every)
    one = torch.eye(8, dtype=dtype)
    for caller, pool in [(False, False), (True, True), (True, False)]:
        got = with_flushing(caller, pool, lambda: torch.ops.rnnfast.matmul(every, one))
        assert_close(got, every, rtol=0, atol=0)


def test_infinities_and_nan_of_16_bits() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        special = torch.tensor([[torch.inf], [-torch.inf], [torch.nan], [1.0]], dtype=dtype)
        got = torch.ops.rnnfast.matmul(special, torch.ones(1, 1, dtype=dtype))
        assert_close(got, special, equal_nan=True)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_team_works_in_the_callers_mode(cell: str, option: str, dtype: torch.dtype) -> None:
    """The same bits in every run, whatever the modes of the pool's threads; and much the same ones on one thread."""
    module, input, grad = large_call(cell, dtype, option)
    # Sums of which many terms are denormal.
    input, grad = input * 2.0**-120, grad * 2.0**-105
    # Without the gradients of biases: their sums are torch's, which works in the pool's own modes.
    calls = lambda: [results_and_gradients(module, input, grad, biases=False) for _ in range(5)]  # noqa: E731
    wanted = {}
    for caller in (True, False):
        want = wanted[caller] = with_flushing(caller, caller, calls)[0]
        for repetition in with_flushing(caller, not caller, calls):
            for value, expected in zip(repetition, want, strict=True):
                assert torch.equal(value, expected)

        def on_one_thread(mode: bool = caller) -> list[Tensor]:
            torch.set_flush_denormal(mode)
            torch.set_num_threads(1)
            return results_and_gradients(module, input, grad, biases=False)

        for value, expected in zip(on_a_thread(on_one_thread), want, strict=True):
            # Tiles of other heights add up in another order, and so flush other sums.
            rounding = torch.finfo(dtype).eps * expected.abs().max().item()
            assert_close(value, expected, rtol=0, atol=max(4 * rounding, 2.0**-123 if caller else 2.0**-140))
    assert not all(map(torch.equal, wanted[True], wanted[False]))


# ---- activations and their derivatives -------------------------------------------------------------------------------


def cell_state(x: Tensor, gate: int) -> tuple[Tensor, Tensor]:
    """The gate's activation, and the gradient of x through it: of an LSTM whose other gates let it through."""
    module = rnnfast.LSTM(4, 1, bias=False, dtype=x.dtype)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(4))
        module.weight_hh_l0.zero_()
    gates = torch.zeros(1, x.numel(), 4, dtype=x.dtype)
    gates[..., 0] = 50.0
    gates[..., gate] = x
    gates.requires_grad_()
    zero = torch.zeros(1, x.numel(), 1, dtype=x.dtype)
    c_n = module(gates, (zero, torch.ones_like(zero) * (gate == 1)))[1][1]
    (grad,) = torch.autograd.grad(c_n.sum(), gates)
    return c_n.detach().flatten(), grad[0, :, gate]


def in_ulps(actual: Tensor, expected: Tensor) -> Tensor:
    rounded = expected.to(actual.dtype).abs()
    ulp = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded
    return (actual.double() - expected).abs() / ulp.double()


# The last argument whose exp is finite.
LAST_EXP = {torch.float32: 88.722839, torch.float64: 709.782712}


def test_sigmoid_up_to_where_exp_overflows() -> None:
    """Below that, as torch has it, it is 0; and so is its derivative."""
    for dtype, last in LAST_EXP.items():
        wide = torch.linspace(-last, last, 20001, dtype=torch.float64) * (1 - 1e-7)
        near = -last + torch.rand(4000, dtype=torch.float64) + 1e-5
        x = torch.cat([wide, near]).to(dtype)
        value, grad = cell_state(x, 1)
        exact = 1 / (1 + (-x.double()).exp())
        if dtype is torch.float32:
            assert in_ulps(value, exact).max() <= 2.5
            # 1 - f is as exact as f is.
            assert_close(grad.double(), exact * (1 - exact), rtol=1e-6, atol=1.6e-7)
            small = x < -10
            assert_close(grad[small].double(), exact[small] * (1 - exact[small]), rtol=1e-6, atol=2.0**-148)
        else:
            assert_close(value, x.sigmoid(), rtol=1e-15, atol=0)
            assert_close(grad, x.sigmoid() * (1 - x.sigmoid()), rtol=1e-14, atol=4e-16)
        beyond = torch.tensor([-last - 1e-4, -last - 1, -2 * last, -1e30, -torch.inf, last + 1, 1e30, torch.inf])
        value, grad = cell_state(beyond.to(dtype)[[0, 1, 2, 3, 5, 6]], 1)
        assert value.tolist() == [0, 0, 0, 0, 1, 1]
        assert grad.tolist() == [0] * 6


def test_tanh_near_one_is_as_exact_as_torchs() -> None:
    """Its derivative is 1 - tanh^2: an error of tanh counts double there, and by 1 / (1 - tanh^2) as much."""
    x = torch.cat([torch.linspace(-12, 12, 60001), torch.randn(20000), 1e-3 * torch.randn(1000)])
    value, grad = cell_state(x, 2)
    exact = x.double().tanh()
    assert in_ulps(value, exact).max() <= 2.5
    far = x.abs() > 0.7
    assert in_ulps(value, exact)[far].max() <= 1.5
    worst = {
        name: (g.double() - (1 - exact * exact)).abs()[x.abs() > 2].max().item()
        for name, g in [("ours", grad), ("torch", 1 - x.tanh() * x.tanh())]
    }
    assert worst["ours"] <= 1.3 * worst["torch"], worst


# ---- huge, tiny and special values -----------------------------------------------------------------------------------

STATES = [0.0, -0.0, 1e-40, 1e-20, 0.5, 1.0, -1.0, 1e4, 1e19, -1e19, 3e38, -3e38, torch.inf, -torch.inf, torch.nan]
SMALL_GATES = [0.0, 1.0, -1.0, 3.0, -20.0, 87.0, -87.0, -88.2]
GATES = [*SMALL_GATES, 88.5, -88.4, -88.5, -88.7, -88.8, 95.0, -95.0, -110.0, 110.0, 1e19, -1e19, 3e38, -3e38]


def drawn(values: list[float], *shape: int) -> Tensor:
    return torch.tensor(values)[torch.randint(len(values), shape)]


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")
@pytest.mark.parametrize("weight_hh", [0.5, -1.0, 0.0])
@pytest.mark.parametrize("cell", CELLS)
def test_extreme_values_as_torch_has_them(cell: str, weight_hh: float) -> None:
    """Finite where torch.nn is, and near it; NaN only where torch.nn is NaN."""
    gates = {"LSTM": 4, "GRU": 3}.get(cell, 1)
    theirs, ours = (module_of(library, cell, gates, 1, bias=False) for library in (nn, rnnfast))
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(torch.eye(gates))
        theirs.weight_hh_l0.fill_(weight_hh)
    ours.load_state_dict(theirs.state_dict())
    count = 12000
    input = drawn(GATES, 1, count, gates)
    states = [drawn(STATES, 1, count, 1) for _ in range(2 if cell == "LSTM" else 1)]
    grads = [drawn(STATES, 1, count, 1) for _ in states]

    def run(module: nn.Module) -> dict[str, Tensor]:
        leaves = [value.clone().requires_grad_() for value in (input, *states)]
        output, last = module(leaves[0], tuple(leaves[1:]) if cell == "LSTM" else leaves[1])
        results = [output, last[1]] if cell == "LSTM" else [output]
        gradients = torch.autograd.grad(results, leaves, grads)
        named = zip(["output", "c_n"], results, strict=False), zip(["input", "h", "c"], gradients, strict=False)
        return {name: value.detach()[0] for pairs in named for name, value in pairs}

    # oneDNN's layer has activations of its own, which overflow elsewhere.
    with torch.backends.mkldnn.flags(enabled=False):
        wanted = run(theirs)
    for name, got in run(ours).items():
        want = wanted[name]
        assert not (got.isnan() & ~want.isnan()).any(), name
        finite = want.isfinite()
        assert got[finite].isfinite().all(), name
        # 1 - tanh^2 and 1 - sigmoid have lost half of their digits at the values above: where more is lost, nothing of
        # it is left to compare.
        near = torch.isclose(got, want, rtol=2e-4, atol=1e-37)
        # Sums of which all may cancel but the rounding: over the gates, and the GRU's n + z (h - n).
        if name == "h":
            near |= (got - want).abs() <= 1e-6 * wanted["input"].abs().sum(-1, keepdim=True)
        if name == "output" and cell == "GRU":
            near |= (got - want).abs() <= 1e-6 * states[0][0].abs().clamp(max=1)
        assert near[finite].all(), (name, got[finite][~near[finite]][:5], want[finite][~near[finite]][:5])


# ---- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
def test_an_empty_batch_takes_no_memory(cell: str) -> None:
    """Whatever its weights: these are expanded along their rows, one of which is there and is never touched."""
    gates = {"LSTM": 4, "GRU": 3}.get(cell, 1)
    H = 2**30 if gates > 1 else 2**31
    module = module_of(rnnfast, cell, 1, 1, bias=False).requires_grad_(False)
    module.hidden_size = H
    module.weight_ih_l0 = nn.Parameter(torch.zeros(1, 1).expand(gates * H, 1), requires_grad=False)
    module.weight_hh_l0 = nn.Parameter(torch.empty(1, H).expand(gates * H, H), requires_grad=False)
    input = torch.zeros(30, 0, 1, requires_grad=True)
    output = module(input)[0]
    assert output.shape == (30, 0, H)
    (grad,) = torch.autograd.grad(output.sum(), input)
    assert grad.shape == input.shape


def test_rounds_that_would_never_end() -> None:
    for rounds in (10_001, 2**62):
        with pytest.raises(RuntimeError, match=f"core_latency: rounds: expected at most 10000, got {rounds}"):
            torch.ops.rnnfast.core_latency(rounds)
    assert torch.ops.rnnfast.core_latency(1000) > 0

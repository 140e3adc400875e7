"""The CUDA kernels, run by the emulator: any schedule, TF32, and what forward keeps, shared with the CPU's kernels.

The parity suites run on the backend `emulated` too: test_ops.py, test_parity.py, test_autograd.py.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rnnfast
from cases import MODES, Call, make_call, random_grads, reference, selected
from emulated_library import emulated_problem
from rnnfast.cell_types import CELLS
from test_ops import check_results, double
from tolerances import error

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"lengths": True, "resets": True},
    "packed": {"layout": "packed"},
    "projection": {"P": 5},
}
CASES = [(mode, layout) for mode in MODES for layout in LAYOUTS if CELLS[mode].may_project or layout != "projection"]


@pytest.fixture(autouse=True)
def _emulated() -> Iterator[None]:
    if (why := emulated_problem()) is not None:
        pytest.skip(why)
    with rnnfast.backend("emulated"):
        yield
    torch.ops.rnnfast_emulated.allow_tf32(False)


def test_it_is_listed_once_loaded() -> None:
    assert rnnfast.backends()["emulated"].available
    found = rnnfast.explain(rnnfast.GRU(3, 5), torch.randn(4, 2, 3))
    assert found.backend == "emulated"
    assert "one launch a step (CUDA, emulated on the processor)" in found.kernel


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "layout"), CASES)
def test_forward_here_and_backward_by_the_cpu_kernels(mode: str, layout: str, dtype: torch.dtype) -> None:
    """And the reverse: there is one layout of what forward keeps."""
    available = rnnfast.backends()["cpu"]
    if not available.available:
        pytest.skip(available.reason)
    call = make_call(mode, D=2, T=5, B=7, H=21, dtype=dtype, **LAYOUTS[layout])
    saved = {"emulated": call.forward(selected)}
    with rnnfast.backend("cpu"):
        saved["cpu"] = call.forward(selected)
    grads = random_grads(saved["cpu"])
    exact = call.to(torch.float64)
    for forward, results in saved.items():
        expected = exact.backward(reference, double(grads), double(results))
        own = call.backward(reference, grads, results)
        check_results(call, call.backward(selected, grads, results), own, expected, f"{forward}, then emulated")
        with rnnfast.backend("cpu"):
            check_results(call, call.backward(selected, grads, results), own, expected, f"{forward}, then cpu")


def results_of(call: Call) -> dict[str, torch.Tensor]:
    saved = call.forward(selected)
    torch.manual_seed(7)
    return saved | call.backward(selected, random_grads(saved), saved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("mode", "layout"), CASES)
def test_twenty_schedules_agree_bit_for_bit(mode: str, layout: str, dtype: torch.dtype) -> None:
    call = make_call(mode, D=2, T=3, B=5, H=17, dtype=dtype, **LAYOUTS[layout])
    expected = results_of(call)
    try:
        for seed in range(1, 21):
            torch.ops.rnnfast_emulated.set_seed(seed)
            for name, value in results_of(call).items():
                # bit for bit, so NaN is no excuse
                assert error(value, expected[name]) == 0, f"{name} with seed {seed}"
    finally:
        torch.ops.rnnfast_emulated.set_seed(0)


@pytest.mark.parametrize(("mode", "layout"), CASES)
def test_tf32(mode: str, layout: str) -> None:
    """Off, the error is float32's; on, it is that of 10 bits of mantissa, and of no fewer."""
    call = make_call(mode, D=2, T=5, B=9, H=40, dtype=torch.float32, **LAYOUTS[layout])
    exact = call.to(torch.float64)
    expected = exact.forward(reference)
    grads = random_grads(expected)
    own_grads = {name: value.float() for name, value in grads.items()}
    wanted = exact.backward(reference, double(own_grads), expected)
    saved = {name: value.float() for name, value in expected.items()}

    def errors() -> list[float]:
        forward, backward = call.forward(selected), call.backward(selected, own_grads, saved)
        size = max(1.0, wanted["grad_gates"].abs().max().item())
        return [
            error(forward["output"], expected["output"]),
            error(backward["grad_gates"], wanted["grad_gates"]) / size,
        ]

    assert torch.ops.rnnfast_emulated.allow_tf32(True) is False
    coarse = errors()
    assert torch.ops.rnnfast_emulated.allow_tf32(False) is True
    fine = errors()
    assert max(fine) < 2e-6
    for value in coarse:
        assert 5e-6 < value < 2e-3


def test_vmap_and_tracing_know_the_ops() -> None:
    module = rnnfast.GRU(3, 5, bidirectional=True, dtype=torch.float64)
    inputs = torch.randn(3, 4, 2, 3, dtype=torch.float64)
    function: Callable[[torch.Tensor], torch.Tensor] = lambda input: module(input)[0]  # noqa: E731
    expected = torch.stack([function(input) for input in inputs])
    assert error(torch.func.vmap(function)(inputs), expected) < 1e-12
    torch._dynamo.reset()
    fast = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert error(fast(inputs[0]), expected[0]) < 1e-12
    fast(inputs[0]).sum().backward()
    torch._dynamo.reset()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_gates_of_another_width_are_refused() -> None:
    """The kernels would read beyond them."""
    call = make_call("GRU", H=9)
    call.weight_ih = [call.weight_ih[0][:-3]]
    call.bias_ih, call.bias_hh = [], []
    with pytest.raises(RuntimeError, match=r"weight_ih: expected shape \(27, 3\), got \(24, 3\)"):
        call.inference(selected)

"""The split CUDA kernels as the ops choose them, on the emulator, against float64. There a plain kernel stands for the
library's product; on a card that is tested by tests/gpu.

The kernels have tests of their own, of more shapes (tests/cpp/test_split.cpp).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from cases import MODES, make_call, random_grads, reference, selected
from emulated_library import emulated_problem
from rnnfast import cuda_plan
from rnnfast.cell_types import CELLS
from test_ops import check_results, double
from test_persistent_plans import LAYOUTS, launched, layout_of

TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PROJECTED: dict[str, dict[str, Any]] = {
    "projected": {"D": 2, "T": 3, "B": 4, "H": 12, "P": 8, "lengths": True, "resets": True},
    "projected, packed": {"D": 1, "T": 4, "B": 5, "H": 9, "P": 5, "layout": "packed"},
}
EVERYTHING = [
    *itertools.product(MODES, TYPES, LAYOUTS),
    *itertools.product([mode for mode in MODES if CELLS[mode].may_project], TYPES, PROJECTED),
]


@pytest.fixture(autouse=True)
def _emulated(one_thread: None) -> Iterator[None]:
    if (why := emulated_problem()) is not None:
        pytest.skip(why)
    with rnnfast.backend("emulated"), cuda_plan.prefer("split"):
        launched()
        yield
    torch.ops.rnnfast_emulated.allow_tf32(False)


def kernels_launched() -> dict[str, int]:
    """How often each kernel was launched since the last call, without the types that it was made for."""
    counts: dict[str, int] = {}
    for name, count in launched().items():
        name = re.sub("<.*", "", name)
        counts[name] = counts.get(name, 0) + count
    return counts


@pytest.mark.parametrize(("mode", "dtype", "layout"), EVERYTHING)
def test_against_float64(mode: str, dtype: torch.dtype, layout: str) -> None:
    """Results, states and every gradient; inference is training without what backward reads."""
    call = make_call(mode, dtype=dtype, **{**LAYOUTS, **PROJECTED}[layout])
    exact = call.to(torch.float64)
    saved = call.forward(reference)
    grads = random_grads(saved)
    assert layout_of(call)["name"] == layout_of(call, training=True, backward=True)["name"] == "split"
    forward = call.forward(selected)
    steps, projected, initial = call.steps, layout in PROJECTED, call.hx is not None
    counts = kernels_launched()
    assert counts.pop("split_forward") == steps
    assert counts.pop("split_project_forward", 0) == steps * projected
    # Without hx the first step multiplies nothing.
    assert counts.pop("plain_product") == steps - (not initial) + steps * projected
    assert counts.pop("copy_on_device", 0) == initial
    assert not counts
    backward = call.backward(selected, grads, saved)
    counts = kernels_launched()
    assert counts.pop("split_backward") == steps + initial
    assert counts.pop("split_project_backward", 0) == (steps + initial) * projected
    assert counts.pop("plain_product") == steps - 1 + initial + (steps + initial) * projected
    assert not counts
    inference = call.inference(selected)
    assert kernels_launched()["split_forward"] == steps
    expected = exact.forward(reference)
    wanted = exact.backward(reference, double(grads), double(saved))
    own = call.backward(reference, grads, saved)
    check_results(call, forward, saved, expected, "forward")
    check_results(call, backward, own, wanted, "backward")
    check_results(call, inference, saved, expected, "inference")
    for name, value in inference.items():
        assert torch.equal(value, forward[name]), name


def test_it_is_no_choice_where_products_are_less_exact_than_allowed() -> None:
    call = make_call("LSTM", T=2, B=3, H=8, dtype=torch.float32)
    for recurrences, products, name in ((False, True, "step"), (True, True, "split"), (True, False, "split")):
        torch.ops.rnnfast_emulated.allow_tf32(recurrences, products)
        found = cuda_plan.here(torch.device("cpu"), "LSTM", torch.float32, 8, 3, 2, emulated=True)
        assert found.name == name
        assert ("TF32" in found.why) == (name == "step")
        call.inference(selected)
        assert set(kernels_launched()) >= {f"{name}_forward"}


def test_it_is_no_choice_where_products_give_no_sums_in_float32() -> None:
    call = make_call("LSTM", T=2, B=3, H=8, dtype=torch.float16)
    for half_sums, name in ((True, "step"), (False, "split")):
        torch.ops.rnnfast_emulated.allow_tf32(False, False, half_sums)
        found = cuda_plan.here(torch.device("cpu"), "LSTM", torch.float16, 8, 3, 2, emulated=True)
        assert found.name == name
        call.inference(selected)
        assert set(kernels_launched()) >= {f"{name}_forward"}
        assert cuda_plan.here(torch.device("cpu"), "LSTM", torch.bfloat16, 8, 3, 2, emulated=True).name == "split"


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps(steps: int) -> None:
    """Of none the step kernels hand the states through."""
    call = make_call("LSTM", T=steps, B=3, H=8, D=2)
    saved = call.forward(reference)
    found = call.forward(selected)
    assert set(kernels_launched()) >= {"split_forward" if steps else "step_forward"}
    for name, value in saved.items():
        torch.testing.assert_close(found[name], value)


def test_a_module_trains_as_with_the_step_kernels() -> None:
    torch.manual_seed(3)
    model = rnnfast.GRU(7, 12, num_layers=2, bidirectional=True)
    x = torch.randn(6, 5, 7)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        output, h_n = model(x)
        (output.square().sum() + h_n.sum()).backward()
        return [p.grad.clone() for p in model.parameters()]  # type: ignore[union-attr]

    split = gradients()
    assert {"split_forward", "split_backward"} <= set(kernels_launched())
    with cuda_plan.prefer("step"):
        step = gradients()
    for ours, theirs in zip(split, step, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def _products_by_torch() -> Iterator[None]:
    """The products go through ATen, as on a card; what the CPU lacks of it is made up here."""
    library = torch.library.Library("aten", "IMPL", "CPU")

    def into(product: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made_up(a: Tensor, b: Tensor, out_dtype: torch.dtype, *, out: Tensor) -> Tensor:
            assert (a.dtype, b.dtype, out_dtype, out.dtype) == (a.dtype, a.dtype, torch.float32, torch.float32)
            return out.copy_(product(a.float(), b.float()))

        return made_up

    library.impl("mm.dtype_out", into(torch.mm))
    library.impl("bmm.dtype_out", into(torch.bmm))
    torch.ops.rnnfast_emulated.products_by_torch(True)
    yield
    torch.ops.rnnfast_emulated.products_by_torch(False)
    library._destroy()


@pytest.mark.usefixtures("_products_by_torch")
@pytest.mark.parametrize("strange_weights", [False, True])
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("layout", ["dense", "bidirectional", "projected", "projected, packed"])
def test_products_through_aten(layout: str, dtype: torch.dtype, strange_weights: bool) -> None:
    """What a card does: the right op, with matrices and workspaces of the right shapes."""
    call = make_call("LSTM", dtype=dtype, **{**LAYOUTS, **PROJECTED}[layout])
    exact = call.to(torch.float64)
    saved = call.forward(reference)
    grads = random_grads(saved)
    if strange_weights:
        # Columns that are not side by side.
        for weights in (call.weight_hh, call.weight_hr):
            weights[:] = [weight.t().contiguous().t() for weight in weights]
    forward, backward = call.forward(selected), call.backward(selected, grads, saved)
    assert "plain_product" not in kernels_launched()
    check_results(call, forward, saved, exact.forward(reference), "forward")
    wanted = exact.backward(reference, double(grads), double(saved))
    check_results(call, backward, call.backward(reference, grads, saved), wanted, "backward")

"""The ops of one step, `step` and `step_backward`: what they refuse, what is counted of them, any number of rows."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from rnnfast import ops
from test_steps import IN, KINDS, B, H, data, kernels, over_kinds, pair

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason="the C++ library is not built")
__all__ = ["kernels"]  # the fixture


@over_kinds
def test_operations_are_counted_as_torch_counts_its_own(kind: str) -> None:
    counts = []
    for loop in pair(kind):
        input = data(4).requires_grad_()
        state = torch.randn(B, H, dtype=torch.float64)
        with FlopCounterMode(display=False) as counter:
            loop(input, (state, state) if kind == "LSTM" else state).sum().backward()
        counts.append(counter.get_total_flops())
    # torch.nn multiplies for the gradient of the first state too, which nobody asked for, and so do we.
    assert abs(counts[1] - counts[0]) <= 2 * B * H * H * {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]


SEQUENCE = torch.zeros(2, B, IN)


@pytest.mark.parametrize(
    ("op", "change", "message"),
    [
        ("step", {"input": SEQUENCE}, "input: expected rows of one step, got shape"),
        ("step", {"weight_ih": torch.zeros(H, IN + 1)}, "weight_ih: expected shape"),
        ("step", {"hx": torch.zeros(B + 1, H)}, "hx: expected shape"),
        ("step", {"bias_hh": torch.zeros(H + 1)}, "bias_hh: expected shape"),
        ("step", {"mode": "ELMAN"}, "mode: expected one of"),
        ("step_backward", {"input": SEQUENCE}, "input: expected rows of one step, got shape"),
        ("step_backward", {"output": None}, "output: expected a tensor, got None"),
        ("step_backward", {"weight_ih": torch.zeros(H, IN + 1)}, "weight_ih: expected shape"),
        ("step_backward", {"grad_output": torch.zeros(B + 1, H)}, "grad_output: expected shape"),
        ("step_backward", {"mode": "LSTM", "weight_hh": torch.zeros(4 * H, H)}, "cell_states: expected a tensor, got"),
        ("step_backward", {"mode": "GRU", "weight_hh": torch.zeros(3 * H, H)}, "reserve: expected a tensor, got None"),
    ],
)
def test_the_ops_refuse_what_does_not_fit(op: str, change: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "mode": "RNN_TANH", "input": torch.zeros(B, IN), "hx": None, "cx": None, "batch_first": False,
        "weight_ih": torch.zeros(H, IN), "weight_hh": torch.zeros(H, H),
    }  # fmt: skip
    if op == "step":
        given |= {"saves": True, "bias_ih": torch.zeros(H), "bias_hh": torch.zeros(H)}
    else:
        given |= dict.fromkeys(("grad_h_n", "grad_c_n", "cell_states", "reserve"))
        given |= {"wants_input": True, "grad_output": torch.zeros(B, H), "output": torch.zeros(B, H)}
    getattr(torch.ops.rnnfast, op)(**given)
    with pytest.raises(RuntimeError, match=f"rnnfast::{op}: {message}"):
        getattr(torch.ops.rnnfast, op)(**given | change)


@pytest.mark.parametrize("kind", [*KINDS, "MGU"])
@pytest.mark.parametrize("rows", [1, 3, 4, 5, 8, 11, 12, 16, 17, 20, 33, 48, 64, 65])
@pytest.mark.parametrize("sizes", [(5, 7), (16, 32), (40, 50)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_number_of_rows(kind: str, rows: int, sizes: tuple[int, int], dtype: torch.dtype) -> None:
    """Few rows meet the weights row by row, more as lanes (csrc/cpu/turned_weights.h), many packed; forth and back."""
    cell = getattr(rnnfast, kind + "Cell")(*sizes, dtype=torch.float64)
    given = [torch.randn(rows, size, dtype=torch.float64) for size in (*sizes, sizes[1])][: 3 if kind == "LSTM" else 2]
    found = []
    for backend, kept in (("reference", torch.float64), ("cpu", dtype)):
        cell.to(kept)
        leaves = [tensor.to(kept).requires_grad_() for tensor in given]
        with rnnfast.backend(backend):
            results = cell(leaves[0], tuple(leaves[1:]) if kind == "LSTM" else leaves[1])
            results = results if kind == "LSTM" else (results,)
            loss = sum(result.sin().sum() for result in results)
            found.append([*results, *torch.autograd.grad(loss, [*leaves, *cell.parameters()])])
        with torch.no_grad(), rnnfast.backend(backend):
            again = cell(leaves[0], tuple(leaves[1:]) if kind == "LSTM" else leaves[1])
        assert all(torch.equal(a, b) for a, b in zip(again if kind == "LSTM" else (again,), results, strict=True))
    near = 2e-5 if dtype == torch.float32 else 1e-12
    for right, got in zip(*found, strict=True):
        assert_close(got.double(), right.detach(), rtol=near, atol=near * max(1.0, float(right.detach().abs().max())))


MODES = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN_TANH", "MGU": "MGU"}


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("form", ["cell", "sequence", "batch first"])
def test_shapes_and_derivatives_of_the_ops_by_themselves(kind: str, form: str) -> None:
    """What programs that call the ops get: as traced, and differentiated."""
    cell = getattr(rnnfast, kind + "Cell")(IN, H, dtype=torch.float64)
    weights = [weight.detach().requires_grad_() for weight in cell.parameters()]
    first, axis = form == "batch first", 1 if form == "batch first" else 0
    input, states = torch.randn(B, IN, dtype=torch.float64), [torch.randn(B, H, dtype=torch.float64) for _ in range(2)]
    if form != "cell":
        input, states = input.unsqueeze(axis), [state.unsqueeze(0) for state in states]
    input.requires_grad_()
    hx, cx = states[0].requires_grad_(), states[1].requires_grad_() if kind == "LSTM" else None

    def forward(*given: Any) -> Any:
        results = torch.ops.rnnfast.step(MODES[kind], True, given[0], given[1], cx, first, *given[2:])
        return tuple(result for result in results[:3] if result is not None)

    with torch.no_grad():
        saved = torch.ops.rnnfast.step(MODES[kind], True, input, hx, cx, first, *weights)
    grads = [None if tensor is None else torch.randn_like(tensor) for tensor in saved[:3]]
    rest = (input, saved[0], saved[3], saved[4], hx, cx, first, *weights[:2])
    for op, given in (
        ("step", (MODES[kind], True, input, hx, cx, first, *weights)),
        ("step_backward", (MODES[kind], True, *grads, *rest)),
    ):
        given = tuple(tensor.detach() if isinstance(tensor, torch.Tensor) else tensor for tensor in given)
        real = getattr(torch.ops.rnnfast, op)(*given)
        meta = [tensor.to("meta") if isinstance(tensor, torch.Tensor) else tensor for tensor in given]
        shapes = [
            [None if result is None else result.shape for result in each]
            for each in (real, getattr(torch.ops.rnnfast, op)(*meta))
        ]
        assert shapes[0] == shapes[1]
    assert torch.autograd.gradcheck(forward, (input, hx, *weights))
    given = [None if grad is None else grad.requires_grad_() for grad in grads]
    results = torch.ops.rnnfast.step_backward(MODES[kind], True, *given, *rest)
    with torch.no_grad():
        plain = torch.ops.rnnfast.step_backward(MODES[kind], True, *given, *rest)
    for differentiable, result in zip(results, plain, strict=True):
        assert_close(differentiable, result)
    assert torch.autograd.grad(results[0].sum(), given[0])[0].abs().sum() > 0


# ---- errors ----------------------------------------------------------------------------------------------------------


@over_kinds
@pytest.mark.parametrize("grad", [True, False])
def test_what_is_no_state_is_refused_as_by_torch(kind: str, grad: bool) -> None:
    cells, input, state = [loop.core for loop in pair(kind)], data(1)[0], torch.zeros(B, H, dtype=torch.float64)
    wrong: list[Any] = [[state], state.numpy(), 3]
    if kind == "LSTM":
        wrong = [(state, None), (state, [state]), (state.numpy(), state), (state,)]
    with torch.set_grad_enabled(grad):
        for hx in wrong:
            errors = []
            for cell in cells:
                with pytest.raises((AttributeError, RuntimeError, TypeError)) as caught:
                    cell(input, hx)
                errors.append((caught.type, str(caught.value)))
            assert errors[1] == errors[0]


def test_errors_that_are_not_about_the_call_are_raised_once() -> None:
    cell, input, calls = pair("GRU")[1].core, data(1)[0], []

    def fail(tensor: Tensor) -> Tensor:
        calls.append(tensor)
        raise RuntimeError("no room on the disk")

    with (
        torch.autograd.graph.saved_tensors_hooks(fail, lambda tensor: tensor),
        pytest.raises(RuntimeError, match="no room on the disk"),
    ):
        cell(input)
    assert len(calls) == 1

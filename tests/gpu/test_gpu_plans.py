"""Every plan of the CUDA kernels in turn, over several blocks, clusters and groups: right, and safe to capture.

The other tests of this folder run on the plan that is chosen, or under RNNFAST_CUDA_PLAN on another; their shapes are
small. These ask for each plan by themselves.
"""

import contextlib
import copy
from typing import Any

import pytest
import torch
from gpu_device import ON_CARD, captured, only_on_card, tf32
from torch import Tensor

import rnnfast
from rnnfast import cuda_plan
from tolerances import check, error

# And a hidden size that each can take, in every type, forward and backward.
PLANS = {"step": 200, "block": 40, "cluster": 200, "grid": 200, "grid-barrier": 200, "split": 200}
KINDS = ("LSTM", "GRU", "RNN", "MGU")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
T, B, I = 9, 20, 16  # noqa: E741


@pytest.fixture(autouse=True)
def _of_cuda_kernels(backend: str) -> None:
    if backend == "triton":
        pytest.skip("Triton's kernels have plans of their own")


def preferred(plan: str) -> contextlib.AbstractContextManager[None]:
    return cuda_plan.prefer(plan) if ON_CARD else contextlib.nullcontext()


def make(kind: str, plan: str, dtype: torch.dtype, device: str) -> tuple[Any, Tensor, Tensor]:
    """A module, its input, and the lengths of its rows."""
    module = getattr(rnnfast, kind)(I, PLANS[plan], bidirectional=True, dtype=dtype, device=device)
    lengths = torch.randint(0, T + 1, (B,))
    return module, torch.randn(T, B, I).to(device, dtype), lengths.to(device)


def step(module: Any, input: Tensor, lengths: Tensor) -> list[Tensor]:
    """Results, and every gradient."""
    output, state = module(input, lengths=lengths)
    results = [output, *(state if isinstance(state, tuple) else [state])]
    value = sum((result.double().sin() / result.numel() ** 0.5).sum() for result in results)
    return [result.detach() for result in results] + list(torch.autograd.grad(value, list(module.parameters())))


def check_plan(module: Any, input: Tensor, plan: str) -> None:
    """That it is the plan that a call takes."""
    if ON_CARD:
        found = rnnfast.explain(module, input)
        assert found.plan is not None
        assert found.backward_plan is not None
        assert (found.plan.partition(":")[0], found.backward_plan.partition(":")[0]) == (plan, plan), found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_against_float64(device: str, plan: str, kind: str, dtype: torch.dtype) -> None:
    module, input, lengths = make(kind, plan, dtype, device)
    with preferred(plan):
        check_plan(module, input, plan)
        found = step(module, input, lengths)
        again = step(module, input, lengths)
    on_host = copy.deepcopy(module).cpu()
    with rnnfast.backend("reference"):
        expected = step(copy.deepcopy(on_host).double(), input.cpu().double(), lengths.cpu())
        yardstick = step(on_host, input.cpu(), lengths.cpu())
    for number, value in enumerate(found):
        check(f"result {number}", value.cpu(), expected[number], yardstick[number])
        assert torch.equal(value, again[number]), number


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_in_tf32(device: str, plan: str, kind: str) -> None:
    module, input, lengths = make(kind, plan, torch.float32, device)
    with preferred(plan), tf32(True):
        check_plan(module, input, plan)
        found = step(module, input, lengths)
    with rnnfast.backend("reference"):
        expected = step(copy.deepcopy(module).cpu().double(), input.cpu().double(), lengths.cpu())
    for number, value in enumerate(found):
        size = max(1.0, expected[number].abs().max().item())
        assert error(value.cpu(), expected[number]) < 4e-3 * size, number


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_in_a_graph(device: str, plan: str, kind: str) -> None:
    """Replayed many times, with other input: a word of an earlier replay must not be taken for one of this."""
    module, input, lengths = make(kind, plan, torch.float32, device)
    with preferred(plan):
        replay, results = captured(lambda: step(module, input, lengths))
        for _ in range(10):
            input.copy_(torch.randn(T, B, I))
            replay()
            for value, other in zip(results, step(module, input, lengths), strict=True):
                assert torch.equal(value, other)


@only_on_card
@pytest.mark.parametrize("plan", PLANS)
def test_every_plan_on_two_streams_at_once(device: str, plan: str) -> None:
    """Each call has blocks that wait for each other, beside those of another."""
    calls = [make(kind, plan, torch.float32, device) for kind in ("LSTM", "GRU")]
    with preferred(plan):
        expected = [step(*call) for call in calls]
        streams = [torch.cuda.Stream() for _ in calls]
        torch.cuda.synchronize()
        found: list[list[list[Tensor]]] = [[] for _ in calls]
        for _ in range(20):
            for number, call in enumerate(calls):
                with torch.cuda.stream(streams[number]):
                    found[number].append(step(*call))
        torch.cuda.synchronize()
    for wanted, results in zip(expected, found, strict=True):
        for values in results:
            for value, other in zip(values, wanted, strict=True):
                assert torch.equal(value, other)

"""The persistent CUDA kernels as the ops choose them, on the emulator: every plan in turn against float64.

The kernels have tests of their own, of many more layouts (tests/cpp/test_persistent.cpp). Here it is the ops that are
tested, from Python: what a call is given, what it gives back, and that the plan that is preferred is what runs.
"""

from __future__ import annotations

import copy
import itertools
import math
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rnnfast
from cases import MODES, Call, make_call, random_grads, reference, selected
from emulated_library import emulated_problem
from rnnfast import cuda_plan, libraries
from rnnfast.cell_types import CELLS
from test_ops import check_results, double
from tolerances import check, error

PLANS = ("block", "cluster", "grid", "grid-barrier")
# How values are stored and multiplied.
TYPES = {
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# What does not fill a tile of anything; two groups at least.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"D": 1, "T": 4, "B": 9, "H": 21, "lengths": True, "resets": True},
    "packed": {"D": 1, "T": 5, "B": 7, "H": 40, "layout": "packed"},
    "bidirectional": {"D": 2, "T": 3, "B": 3, "H": 12, "layout": "batch_first"},
    "many rows": {"D": 1, "T": 3, "B": 19, "H": 33, "resets": True, "initial": False, "bias": False},
}
# An octet of units is one block's.
TINY: dict[str, dict[str, Any]] = {
    "tiny": {"D": 2, "T": 5, "B": 1, "H": 5, "lengths": True},
}
EVERYTHING = [
    *itertools.product(MODES, TYPES, LAYOUTS, PLANS),
    *itertools.product(MODES, TYPES, TINY, ["block"]),
]


@pytest.fixture(autouse=True)
def _emulated(one_thread: None) -> Iterator[None]:
    if (why := emulated_problem()) is not None:
        pytest.skip(why)
    with rnnfast.backend("emulated"):
        launched()
        yield
    torch.ops.rnnfast_emulated.allow_tf32(False)


def launched() -> dict[str, int]:
    """How often each kernel was launched since the last call."""
    lines = torch.ops.rnnfast_emulated.launched().splitlines()
    return {name: int(count) for count, _, name in (line.partition(" ") for line in lines)}


def expect(mode: str, arithmetic: str, plan: str, forward: int = 0, backward: int = 0) -> None:
    """That so many persistent kernels of the plan have run since the last look, and no step kernel."""
    counts = launched()
    counts.pop("persistent_offsets", None)
    for name, count in (("forward", forward), ("backward", backward)):
        assert counts.pop(f"persistent_{name}<{mode}, {arithmetic}, {plan}>", 0) == count, (name, counts)
    assert not counts


def layout_of(call: Call, **passes: bool) -> dict[str, int]:
    sizes = (call.hidden_size, call.batch, call.steps, call.directions)
    found = cuda_plan.here(torch.device("cpu"), call.mode, call.input.dtype, *sizes, **passes, emulated=True)
    return {"name": found.name, **found.layout}  # type: ignore[dict-item]


@pytest.mark.parametrize(("mode", "arithmetic", "layout", "plan"), EVERYTHING)
def test_against_float64(mode: str, arithmetic: str, layout: str, plan: str) -> None:
    """Results, states and every gradient; inference is training without what backward reads."""
    torch.ops.rnnfast_emulated.allow_tf32(arithmetic == "tf32")
    call = make_call(mode, dtype=TYPES[arithmetic], **{**LAYOUTS, **TINY}[layout])
    exact = call.to(torch.float64)
    saved = call.forward(reference)
    grads = random_grads(saved)
    with cuda_plan.prefer(plan):
        assert layout_of(call)["name"] == layout_of(call, training=True, backward=True)["name"] == plan
        same = layout_of(call) == layout_of(call, training=True)
        forward = call.forward(selected)
        expect(mode, arithmetic, plan, forward=1)
        backward = call.backward(selected, grads, saved)
        expect(mode, arithmetic, plan, backward=1)
        inference = call.inference(selected)
        expect(mode, arithmetic, plan, forward=1)
    expected = exact.forward(reference)
    wanted = exact.backward(reference, double(grads), double(saved))
    own = call.backward(reference, grads, saved)
    for what, found, yardstick, truth in (
        ("forward", forward, saved, expected),
        ("backward", backward, own, wanted),
        ("inference", inference, saved, expected),
    ):
        if arithmetic == "tf32":
            check_tf32(call, found, truth, what)
        else:
            check_results(call, found, yardstick, truth, what)
    if same:
        for name, value in inference.items():
            assert torch.equal(value, forward[name]), name


def check_tf32(call: Call, found: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    """10 bits of mantissa, and errors that add up over some steps."""
    rows = call.alive_rows()
    for name, value in found.items():
        truth = expected[name]
        if name == "reserve" and rows is not None and value.numel():
            value, truth = value[rows], truth[rows]
        size = max(1.0, truth.abs().max().item()) if truth.numel() else 1.0
        assert error(value, truth) < 2e-3 * size, f"{what}: {name}"


# Every cell with every plan; types and layouts in turn.
SCHEDULES = [
    (mode, list(TYPES)[(number + number // 4) % 4], list(LAYOUTS)[number % 3], plan)
    for number, (mode, plan) in enumerate(itertools.product(MODES, PLANS))
]


def results_of(call: Call) -> dict[str, Tensor]:
    saved = call.forward(selected)
    torch.manual_seed(7)
    results = saved | call.backward(selected, random_grads(saved), saved)
    # What of the reserve no row has is not defined.
    rows = call.alive_rows()
    if rows is not None and results["reserve"].numel():
        results["reserve"] = results["reserve"][rows]
    return results


@pytest.mark.parametrize(("mode", "arithmetic", "layout", "plan"), SCHEDULES)
def test_twenty_schedules_agree_bit_for_bit(mode: str, arithmetic: str, layout: str, plan: str) -> None:
    torch.ops.rnnfast_emulated.allow_tf32(arithmetic == "tf32")
    call = make_call(mode, dtype=TYPES[arithmetic], **{**LAYOUTS[layout], "T": 3})
    with cuda_plan.prefer(plan):
        expected = results_of(call)
        try:
            for seed in range(1, 21):
                torch.ops.rnnfast_emulated.set_seed(seed)
                for name, value in results_of(call).items():
                    assert error(value, expected[name]) == 0, f"{name} with seed {seed}"
        finally:
            torch.ops.rnnfast_emulated.set_seed(0)
    expect(mode, arithmetic, plan, forward=21, backward=21)


# ---- modules, end to end --------------------------------------------------------------------------------------------


def run(module: Any, input: Tensor, lengths: Tensor | None, packed: bool, states: Any) -> dict[str, Tensor]:
    """Results, and the gradients of the input and of every parameter."""
    leaf = input.clone().requires_grad_()
    if packed:
        assert lengths is not None
        given: Any = pack_padded_sequence(leaf, lengths, batch_first=module.batch_first, enforce_sorted=False)
        output, state = module(given, states)
        output = output.data
    else:
        output, state = module(leaf, states) if lengths is None else module(leaf, states, lengths=lengths)
    state = state if isinstance(state, tuple) else (state,)
    results = {"output": output, **{f"state {i}": each for i, each in enumerate(state)}}
    total = sum((value.double().sin() / math.sqrt(value.numel())).sum() for value in results.values())
    assert isinstance(total, Tensor)
    parameters = dict(module.named_parameters())
    grads = torch.autograd.grad(total, [leaf, *parameters.values()])
    return results | dict(zip(["input", *parameters], grads, strict=True))


MODULES = [
    (kind, *rest) for kind, rest in zip(
        ("LSTM", "GRU", "RNN", "MGU") * 4,
        itertools.product(PLANS, ("packed", "lengths", "batch_first", "dense")),
        strict=True,
    )
]  # fmt: skip


@pytest.mark.parametrize(("kind", "plan", "way"), MODULES)
def test_modules_end_to_end(kind: str, plan: str, way: str) -> None:
    """Two layers of two directions, with autograd."""
    dtype = torch.bfloat16 if way == "lengths" else torch.float32
    options = {"num_layers": 2, "bidirectional": True, "batch_first": way == "batch_first"}
    module = getattr(rnnfast, kind)(3, 20, dtype=dtype, **options)
    input = torch.randn(4, 5, 3).to(dtype)
    batch = 4 if way == "batch_first" else 5
    lengths = torch.tensor([4, 1, 3, 4, 2]) if way in ("packed", "lengths") else None
    # Not to be differentiated.
    hx = torch.randn(4, batch, 20).to(dtype)
    states: Any = (hx, hx.flip(0)) if kind == "LSTM" else hx
    exact = copy.deepcopy(module).double()
    with cuda_plan.prefer(plan):
        found = run(module, input, lengths, way == "packed", states)
        again = run(module, input, lengths, way == "packed", states)
        mode, arithmetic = module._mode(), str(dtype).removeprefix("torch.")
        expect(mode, arithmetic, plan, forward=4, backward=4)
        said = rnnfast.explain(module, pack(input, lengths) if way == "packed" else input)
        with torch.no_grad():
            inference = module(input, states)[0] if lengths is None else None
    assert f"exchange {plan}" in said.kernel or plan == "block"
    assert said.plan is not None
    assert said.backward_plan is not None
    assert said.plan.startswith(f"{plan}: ")
    assert said.backward_plan.startswith(f"{plan}: ")
    assert said.why == said.backward_why == "asked for by name"
    with rnnfast.backend("reference"):
        wide = tuple(each.double() for each in states) if isinstance(states, tuple) else states.double()
        expected = run(exact, input.double(), lengths, way == "packed", wide)
        yardstick = run(module, input, lengths, way == "packed", states)
    for name, value in found.items():
        check(name, value, expected[name], yardstick[name])
        assert torch.equal(value, again[name]), name
    if inference is not None:
        check("inference", inference, expected["output"], yardstick["output"])


def pack(input: Tensor, lengths: Tensor | None) -> PackedSequence:
    assert lengths is not None
    return pack_padded_sequence(input, lengths, enforce_sorted=False)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_few_steps_and_rows(mode: str, plan: str) -> None:
    """One step; no step and no batch index, where no kernel of these runs."""
    with cuda_plan.prefer(plan):
        for sizes in ({"T": 1, "B": 5}, {"T": 1, "B": 1, "initial": False}, {"T": 3, "B": 0}, {"T": 0, "B": 3}):
            call = make_call(mode, D=2, H=16, dtype=torch.float32, **sizes)  # type: ignore[arg-type]
            saved = call.forward(reference)
            grads = random_grads(saved)
            launched()
            results = {**call.forward(selected), **call.backward(selected, grads, saved)}
            if call.steps and call.batch:
                expect(mode, "float32", plan, forward=1, backward=1)
            else:
                assert not any(name.startswith("persistent") for name in launched())
            exact = call.to(torch.float64)
            expected = {
                **exact.forward(reference),
                **exact.backward(reference, double(grads), double(saved)),
            }
            own = {**saved, **call.backward(reference, grads, saved)}
            check_results(call, results, own, expected, str(sizes))


# ---- what is not legal, and what is said ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("plan", "options", "why"),
    [
        ("grid", {"dtype": torch.float64}, "grid: float64 runs step by step: there are no persistent kernels"),
        ("block", {"P": 4}, "block: a projection runs step by step: there are no persistent kernels"),
        ("cluster", {"H": 8}, "cluster: there are too few units for two blocks, or too many for 4"),
        ("block", {"H": 3000, "T": 1, "B": 1}, "block: "),
        ("grid-barrier", {"H": 3000, "T": 1, "B": 1}, "grid: "),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_is_not_legal_runs_step_by_step(plan: str, options: dict[str, Any], why: str) -> None:
    P = options.get("P", 0)
    module = rnnfast.LSTM(3, options.get("H", 16), proj_size=P, dtype=options.get("dtype", torch.float32))
    input = torch.randn(options.get("T", 3), options.get("B", 4), 3, dtype=options.get("dtype", torch.float32))
    with cuda_plan.prefer(plan), torch.no_grad():
        found = rnnfast.explain(module, input)
        launches = "two launches" if P else "one launch"
        assert found.kernel.startswith(f"{launches} a step (CUDA, emulated on the processor), inference")
        assert found.plan is not None
        assert found.plan.startswith("step: ")
        assert found.why is not None
        assert found.why.startswith(why)
        if module.hidden_size > 1000:
            return
        value = module(input)[0]
    counts = launched()
    assert counts
    assert not any(name.startswith("persistent") for name in counts)
    with rnnfast.backend("reference"):
        expected, yardstick = module.double()(input.double())[0], value.double()
    assert error(value, expected) < 1e-5
    assert yardstick.shape == expected.shape


def test_forward_and_backward_are_planned_apart() -> None:
    """And `auto` is what the model has cheapest on that device: it says why."""
    with cuda_plan.prefer("auto"):
        found = rnnfast.explain(rnnfast.GRU(3, 40), torch.randn(4, 2, 3))
        small = cuda_plan.here(torch.device("cpu"), "GRU", torch.float32, 40, 2, 4, training=True, emulated=True)
    assert found.why is not None
    assert found.why.startswith("the cheapest by the model: ")
    assert found.plan == str(small)
    assert small.device == {**small.device, "name": "emulator", "sm": 90, "sms": 6, "largest_cluster": 4}
    assert found.predicted_us == small.predicted_us
    assert "this plan: " in str(found)


def test_tf32_is_what_the_library_was_told() -> None:
    """torch's own flag is for CUDA tensors."""
    sizes = (torch.float32, 64, 8, 100)
    plans = []
    for allowed in (False, True):
        torch.ops.rnnfast_emulated.allow_tf32(allowed)
        with cuda_plan.prefer("cluster"):
            plans.append(cuda_plan.here(torch.device("cpu"), "LSTM", *sizes, emulated=True))
    assert plans[0].limits_us["mma"] > plans[1].limits_us["mma"]


def test_a_preference_ends_with_its_block() -> None:
    prefer = torch.ops.rnnfast_emulated.prefer_plan
    first = prefer("step")
    try:
        with cuda_plan.prefer("grid"):
            with cuda_plan.prefer("cluster"):
                assert rnnfast.explain(rnnfast.GRU(3, 16), torch.randn(4, 2, 3)).kernel.startswith(
                    "persistent, exchange cluster: one launch for all steps (CUDA, emulated on the processor), with"
                )
            with pytest.raises(ZeroDivisionError), cuda_plan.prefer("block"):
                raise ZeroDivisionError
            assert prefer("grid") == "grid"
        assert prefer("step") == "step"
    finally:
        prefer(first)


def test_what_cannot_be_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    names = "auto, step, split, block, cluster, grid, grid-barrier"
    with (
        pytest.raises(ValueError, match=f"^rnnfast.cuda_plan.prefer: unknown plan 'warp', expected one of {names}$"),
        cuda_plan.prefer("warp"),
    ):
        pass
    monkeypatch.setattr(libraries, "emulated_problem", lambda: "not loaded")
    monkeypatch.setattr(libraries, "cuda_error", "the CUDA library is not built")
    with (
        pytest.raises(RuntimeError, match="no library with CUDA kernels is loaded: the CUDA library is not built; "),
        cuda_plan.prefer("grid"),
    ):
        pass
    with pytest.raises(RuntimeError, match="backend 'emulated' is not available: not loaded"):
        cuda_plan.here(torch.device("cpu"), "GRU", torch.float32, 8, 1, 1, emulated=True)
    monkeypatch.setattr(libraries, "cuda_problem", lambda: "no card")
    with pytest.raises(RuntimeError, match="backend 'cuda' is not available: no card"):
        cuda_plan.here(torch.device("cuda"), "GRU", torch.float32, 8, 1, 1)


ASKED = """
import torch, rnnfast
with rnnfast.backend("emulated"):
    print(rnnfast.explain(rnnfast.GRU(3, 16), torch.randn(4, 2, 3)).kernel)
"""


def test_the_environment_names_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNFAST_CUDA_PLAN", "warp")
    with pytest.warns(UserWarning, match="^RNNFAST_CUDA_PLAN=warp: no such plan, it is ignored; there are auto, "):
        cuda_plan._check_variable()
    monkeypatch.setenv("RNNFAST_CUDA_PLAN", "grid-barrier")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cuda_plan._check_variable()
    import build_emulated

    library = os.environ.get(libraries.EMULATED_VARIABLE, str(build_emulated.LIBRARY))
    environment = {**os.environ, libraries.EMULATED_VARIABLE: library}
    root = Path(rnnfast.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", ASKED], env=environment, cwd=root, capture_output=True, text=True, check=False
    )
    assert done.stdout.startswith("persistent, exchange grid-barrier: one launch for all steps"), done.stderr


FEW = """
import os
import re
import torch
from rnnfast import GRU, backend, explain
from rnnfast.registration import load_emulated

load_emulated(os.environ["RNNFAST_EMULATED_LIBRARY"])
with backend("emulated"):
    module, input = GRU(3, 17), torch.randn(2, 3, 3)
    print(explain(module, input).why)
    module(input)[0].sum().backward()
print(torch.ops.rnnfast_emulated.launched())
"""


@pytest.mark.parametrize(("plan", "held"), [("block", 0), ("cluster", 1), ("grid", 2), ("grid-barrier", 2)])
def test_what_the_device_cannot_hold_is_never_launched(plan: str, held: int) -> None:
    """Three blocks of 8 units wait for each other in a grid, two or three in a cluster: fewer would for ever."""
    import build_emulated

    library = os.environ.get(libraries.EMULATED_VARIABLE, str(build_emulated.LIBRARY))
    environment = {**os.environ, libraries.EMULATED_VARIABLE: library, "RNNFAST_CUDA_PLAN": plan}
    root = Path(rnnfast.__file__).parent.parent

    def outcome(blocks: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", FEW], env={**environment, "RNNFAST_EMULATOR_DEVICE_BLOCKS": blocks}, cwd=root,
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip

    enough, few = outcome("6"), outcome(str(held))
    assert "persistent_forward" in enough
    assert "persistent_backward" in enough
    assert "step_forward" not in enough
    assert "persistent" not in few.partition("\n")[2]
    assert "step_forward" in few
    assert "step_backward" in few
    assert few.startswith(f"{plan}: needs "), few
    assert re.search(r"the device holds [0-2] of persistent_forward", few), few


def test_every_cell_has_persistent_kernels() -> None:
    """Whoever adds one finds it above."""
    assert {mode for mode, *_ in EVERYTHING} == set(CELLS)

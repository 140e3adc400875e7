"""The main shapes under pytest-benchmark, to compare one commit with another:

    pytest benchmarks --benchmark-only --benchmark-autosave
    pytest benchmarks --benchmark-only --benchmark-compare --benchmark-compare-fail=median:10%

Results are checked before anything is timed. `benchmarks/run.py` compares with torch.nn; here rnnfast stands alone, on
the CPU and, where there is one, on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from rnnfast import explain
from rnnfast.benchmark.case import Case, compare, exact, make_call, make_data, make_layers, timed_steps
from shapes import SUITES

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed: pip install rnnfast[dev]")

# The headline of the GPU suites, and layers that fit one SM, some, and no number of them.
CARD = [case for case in SUITES["flashrnn"] if (case.batch, case.steps) == (16, 1024)]
CARD += [
    case for case in SUITES["grid"] if case.cell != "RNN" and case.hidden_size in (128, 512, 2048) and case.batch == 16
]
CASES = [("cpu", case) for case in SUITES["sizes"] + SUITES["one-step"] + SUITES["packed"]]
CASES += [("cuda", replace(case, dtype="bfloat16")) for case in CARD]


def identify(value: object) -> str | None:
    return value.name.replace(" ", "-") if isinstance(value, Case) else None


@pytest.mark.parametrize("workload", ["inference", "training"])
@pytest.mark.parametrize(("device", "case"), CASES, ids=identify)
def test_layer(benchmark: Any, device: str, case: Case, workload: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    where = torch.device(device)
    torch.manual_seed(0)
    theirs, ours = make_layers(case, where)
    data = make_data(case, where, 0)
    call = make_call(ours, case, workload, data)
    wrong = compare(exact(theirs, case, workload, data), make_call(theirs, case, workload, data)(), call())
    assert wrong is None, wrong

    def synchronized() -> None:
        call()
        torch.cuda.synchronize(where)

    timed: Callable[[], object] = synchronized if device == "cuda" else call
    benchmark.group = f"{device}, {case.cell}, {workload}"
    with torch.set_grad_enabled(workload == "training"):
        benchmark.extra_info["plan"] = explain(ours, data.rows).kernel
    benchmark.extra_info["steps"] = timed_steps(case, workload)
    benchmark(timed)

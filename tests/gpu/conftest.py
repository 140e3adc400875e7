"""Every test of this folder needs a CUDA device: the marker `gpu`, and a skip with the reason where there is none.

Each runs on the CUDA kernels and on the Triton kernels. What wants the whole card is marked `alone`.

`make test-gpu` runs them. RNNFAST_GPU_TESTS_DEVICE=cpu runs their bodies with the CPU kernels, for who writes tests.
`--outcomes FILE` writes each test's outcome as it comes; `--except-passed FILE` leaves out what passed in such a file.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

import gpu_device
import pytest
import torch

from records import whole_lines
from rnnfast import backend as use_backend

HERE = Path(__file__).parent


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu")
    group.addoption("--outcomes", type=Path, help="append every test's outcome to this file, a JSON object a line")
    group.addoption(
        "--except-passed", type=Path, action="append", default=[], help="leave out the tests that passed in such a file"
    )


def passed_in(file: Path) -> set[str]:
    """The tests whose last outcome in the file is that they passed."""
    last = {outcome["test"]: outcome["outcome"] for outcome in whole_lines(file) if "test" in outcome}
    return {test for test, outcome in last.items() if outcome == "passed"}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.gpu)
    if files := config.getoption("--except-passed", []):
        passed = set().union(*map(passed_in, files))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in passed])
        items[:] = [item for item in items if item.nodeid not in passed]


def write_outcome(file: Path, **outcome: object) -> None:
    with file.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(outcome) + "\n")


class Outcomes:
    """Writes as things go, so that a run which is ended from outside has told what it knew."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # What fails before or behind a test's body is a failure of the test.
        if report.when != "call" and report.outcome == "passed":
            return
        text = {} if report.outcome == "passed" else {"text": report.longreprtext[-2000:]}
        seconds = round(report.duration, 3)
        write_outcome(self.file, test=report.nodeid, outcome=report.outcome, seconds=seconds, **text)


def pytest_configure(config: pytest.Config) -> None:
    # Of several processes the first is told what the others found.
    if (file := config.getoption("--outcomes", None)) is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(file))


@pytest.fixture(autouse=True, scope="session")
def _card() -> None:
    if gpu_device.MISSING is not None:
        pytest.skip(gpu_device.MISSING)


@pytest.fixture
def device() -> str:
    """Where the tensors of a test are."""
    return gpu_device.DEVICE


@pytest.fixture(autouse=True, params=[gpu_device.DEVICE, *(["triton"] if gpu_device.ON_CARD else [])])
def backend(_card: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """Asks for the kernels by name, so that nothing falls back; where they are missing every test fails."""
    with use_backend(request.param):
        yield request.param


def end_if_lost(request: pytest.FixtureRequest) -> None:
    """Waits for the device. A CUDA context does not survive some errors, an access out of bounds among them: everything
    after that would fail too, so one of several test processes ends, and pytest-xdist starts another in its place."""
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" not in os.environ:
            raise
        # What is printed now is lost with the process.
        if (file := request.config.getoption("--outcomes", None)) is not None:
            write_outcome(file, test=request.node.nodeid, outcome="failed", text=f"the CUDA context is lost: {error}")
        os._exit(1)


@pytest.fixture(autouse=True)
def _without_tf32(_card: None, request: pytest.FixtureRequest) -> Iterator[None]:
    """float32 is float32, in torch.nn too, unless a test asks for TF32."""
    with gpu_device.tf32(False):
        yield
    if gpu_device.ON_CARD:
        end_if_lost(request)

"""Seeds, and the backend fixture.

Tests marked `exhaustive` are deselected by default (pyproject.toml): `pytest -m exhaustive` runs them.
"""

from collections.abc import Iterator

import pytest
import torch

from rnnfast import backend as use_backend
from rnnfast import ops

# a backend, and for the C++ kernels the instruction set
BACKENDS = ["reference", "cpu-avx512", "cpu-avx2", "cpu-portable"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(1234)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that the machine has; its name."""
    name, _, isa = request.param.partition("-")
    if not isa:
        with use_backend(name):
            yield request.param
        return
    if ops.library_error is not None:
        pytest.skip(ops.library_error)
    before = torch.ops.rnnfast.use_cpu_isa("")
    try:
        torch.ops.rnnfast.use_cpu_isa(isa)
    except RuntimeError as error:
        pytest.skip(f"{isa}: {str(error).splitlines()[0]}")
    try:
        with use_backend(name):
            yield request.param
    finally:
        torch.ops.rnnfast.use_cpu_isa(before)

"""Every test of this folder needs a CUDA device: the marker `gpu`, and a skip with the reason where there is none.

Each runs on the CUDA kernels and on the Triton kernels.

`make test-gpu` runs them. RNNFAST_GPU_TESTS_DEVICE=cpu runs their bodies with the CPU kernels, for who writes tests.
"""

from collections.abc import Iterator
from pathlib import Path

import gpu_device
import pytest
import torch

from rnnfast import backend as use_backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            item.add_marker(pytest.mark.gpu)


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


@pytest.fixture(autouse=True)
def _without_tf32(_card: None) -> Iterator[None]:
    """float32 is float32, in torch.nn too, unless a test asks for TF32."""
    with gpu_device.tf32(False):
        yield
    if gpu_device.ON_CARD:
        torch.cuda.synchronize()

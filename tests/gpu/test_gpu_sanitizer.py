"""compute-sanitizer over small calls of every kernel, and a check that the calls themselves run."""

import os
import subprocess
import sys
from pathlib import Path

import gpu_device
import pytest
from gpu_device import only_on_card

from cuda_tools import cuda_tool

SCRIPT = Path(__file__).parent / "sanitized.py"


@pytest.fixture(autouse=True)
def backend(_card: None) -> str:
    """Once: the script has the CUDA kernels run, in a process of its own."""
    return gpu_device.DEVICE


def test_the_calls_run() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "120 calls" in done.stdout


@only_on_card
@pytest.mark.alone
# Not initcheck: told to look at our kernels only, it does not know what others wrote; and torch's take too long.
@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "synccheck"])
def test_compute_sanitizer(tool: str) -> None:
    program = cuda_tool("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer was not found; it comes with the CUDA toolkit")
    # Only our kernels (their names begin with step); without torch's cache every tensor is an allocation of its own,
    # so that an access beyond its end is seen.
    command = [program, "--tool", tool, "--error-exitcode", "99", "--kernel-regex", "kns=step"]
    # What torch asks the driver and is refused is no error of ours.
    command += ["--report-api-errors", "no"] if tool == "memcheck" else []
    command += [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=1800)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]

"""On a machine with a card the tests of tests/gpu are collected for the Triton kernels too: here a stand-in for it.

(tests/conftest.py takes most tests from backends that are slow without a card, and once took these as well.)
"""

import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A plugin of pytest: what tests and package ask of the machine before they run anything.
A_CARD = """
import torch
torch.cuda.device_count = lambda: 1
torch.cuda.is_available = lambda: True
"""


@pytest.mark.parametrize("card", [True, False], ids=["with a card", "without"])
def test_triton_has_every_test_that_cuda_has(tmp_path: Path, card: bool) -> None:
    (tmp_path / "card_in_words.py").write_text(A_CARD if card else "")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "card_in_words"]
    done = subprocess.run(
        [*command, "-m", "gpu", "tests/gpu"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    # By backend and file.
    found: dict[str, Counter[str]] = {"cuda": Counter(), "triton": Counter()}
    for file, backend in re.findall(r"^tests/gpu/(\w+)\.py::\w+\[(cuda|triton)\b", done.stdout, re.MULTILINE):
        found[backend][file] += 1
    assert found["triton"] == found["cuda"]
    assert {"test_gpu_ops", "test_gpu_parity", "test_gpu_execution", "test_gpu_compile"} <= set(found["triton"])
    assert min(found["triton"].values()) > 0
    assert found["triton"].total() > 1500

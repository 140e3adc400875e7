"""The programs for a machine with a card (build_card.py), as far as one without a card can tell: they compile without
spills, hold the library's kernels, say that there is no card, and lack none of the cases that make sense on one.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

import build_card
import build_emulated
import cuda_resources
from cuda_tools import cuda_tool

ARCH = "9.0a"
SHARED = sorted(set(build_emulated.programs()) - build_card.EMULATOR_ONLY)


def built(name: str) -> Path:
    """The program, up to date; after `make card` there is nothing to do."""
    try:
        good = build_card.build([ARCH], [name], quiet=True)
    except SystemExit as error:  # no nvcc, no host compiler, or no objects of the library
        pytest.skip(str(error))
    if not good:
        pytest.fail(f"{name} does not compile: see `python tests/build_card.py`")
    return build_card.program(name, ARCH)


@pytest.fixture(scope="module")
def card_tests() -> Path:
    return built("card_tests")


@pytest.fixture(scope="module")
def microbench() -> Path:
    return built("microbench")


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([str(program), *arguments], env=environment, capture_output=True, text=True, check=False)


def cases(program: Path) -> list[str]:
    done = run(program, "--list")
    assert done.returncode == 0, done.stderr
    return [name for name in done.stdout.splitlines() if not name.endswith("(by name only)")]


def spills(*sources: Path) -> list[int]:
    """Bytes that each kernel of these sources stores for want of registers."""
    folder = build_card.BUILD / ARCH.replace(".", "")
    logs = [(folder / f"{source.stem}.o.log").read_text() for source in sources]
    return [int(found) for log in logs for found in re.findall(r"(\d+) bytes spill stores", log)]


def test_without_a_card_they_say_so(card_tests: Path, microbench: Path) -> None:
    done = run(card_tests)
    assert done.returncode == 77
    assert done.stderr.startswith("card_tests: no CUDA device")
    assert not done.stdout
    done = run(microbench)
    assert done.returncode == 2
    assert '"error": ' in done.stdout


def test_wrong_arguments_are_errors(card_tests: Path) -> None:
    for wrong in ["step/lunch", "lstm-float32", "-lunch"]:
        done = run(card_tests, wrong)
        assert done.returncode == 2
        assert done.stdout == f"no case {wrong}; --list shows them\n"
    assert run(card_tests, "--seconds", "soon").returncode == 2


def test_no_case_is_left_out_on_a_card(card_tests: Path) -> None:
    try:
        assert build_emulated.build([f"plain/{program}" for program in SHARED], quiet=True)
    except SystemExit as error:  # no compiler, or no ninja
        pytest.skip(str(error))
    emulated = [
        f"{program.removeprefix('test_')}/{case}"
        for program in SHARED
        for case in cases(build_emulated.BUILD / "plain" / program)
    ]
    assert len(emulated) > 60
    on_card = cases(card_tests)
    assert len(set(on_card)) == len(on_card)
    assert {case for case in on_card if "/large/" not in case} == set(emulated)
    # What waits in loops for other blocks comes last: it may hang.
    assert on_card[-1].startswith("microbench/")
    assert on_card.index("exchange/grid") > on_card.index("step/large/lstm-float32")
    assert on_card.index("persistent/lstm-grid-float16") > on_card.index("persistent/large/lstm-cluster-float16")


def test_the_kernels_are_the_library_s(card_tests: Path) -> None:
    if cuda_tool("cuobjdump") is None:
        pytest.skip("no cuobjdump: pip install nvidia-cuda-cuobjdump")
    sm = f"sm_{ARCH.replace('.', '')}"
    sizes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        for arch, cubin in cuda_resources.cubins(card_tests, Path(folder)):
            if arch == sm:
                sizes |= cuda_resources.code_sizes(cubin.read_bytes())
    found = {name: sizes[symbol] for symbol, name in cuda_resources.readable(list(sizes)).items()}
    steps = {kernel.kernel: kernel.bytes for kernel in cuda_resources.resources() if kernel.arch == sm}
    assert len(steps) > 60
    assert {name: found.get(name) for name in steps} == steps
    assert any(name.startswith("exchange::grid_exchange") for name in found)


def test_no_kernel_spills(card_tests: Path, microbench: Path) -> None:
    for sources, least in [(build_card.test_sources(), 40), ([build_card.MICROBENCH], 15)]:
        stored = spills(*sources)
        assert len(stored) >= least
        assert set(stored) == {0}

"""What the built library promises: instruction sets chosen at run time and kept apart, a source that fits NEON."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast
import setup
from isas import ISAS
from rnnfast import ops

ROOT = Path(__file__).resolve().parent.parent

needs_library = pytest.mark.skipif(ops.library_error is not None, reason=f"no C++ library: {ops.library_error}")


def in_new_process(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@needs_library
@pytest.mark.parametrize("name", ISAS)
def test_the_environment_chooses_the_instruction_set(name: str) -> None:
    before = ops.cpu_isa()
    try:
        ops.use_cpu_isa(name)
    except RuntimeError:
        pytest.skip(f"this processor has no {name}")
    finally:
        ops.use_cpu_isa(before)
    printed = in_new_process("from rnnfast import ops; print(ops.cpu_isa())", RNNFAST_CPU_ISA=name)
    assert printed.split() == [name]


@needs_library
def test_an_unknown_instruction_set_is_an_error_and_in_the_environment_a_warning() -> None:
    with pytest.raises(RuntimeError, match="use_cpu_isa: name: expected an instruction set"):
        ops.use_cpu_isa("avx1024")
    printed = in_new_process("from rnnfast import ops; print(ops.cpu_isa())", RNNFAST_CPU_ISA="avx1024")
    assert "RNNFAST_CPU_ISA=avx1024" in printed
    assert ops.cpu_isa() in printed


def test_instruction_sets_are_kept_apart() -> None:
    """A function that two ISAs' objects share may be linked from either: on an older processor that is a crash."""
    objects = [path for kind in ("kernels", "panels") for path in sorted((ROOT / "build").glob(f"cpu-*/{kind}_*.o"))]
    if not objects or shutil.which("nm") is None:
        pytest.skip("no object files of a build in this tree, or no nm")
    for path in objects:
        listed = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        shared = [line for line in listed.splitlines() if line[17:18] in "WwVu"]
        assert not shared, f"{path.name}: {shared[:5]}"


@pytest.mark.parametrize(
    ("source", "name"),
    [("kernels.cpp", "DTYPE=float16"), *(("panel_kernels.cpp", f"PANEL={panel}") for panel in setup.PANELS)],
)
def test_kernels_compile_for_neon(source: str, name: str) -> None:
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no cross compiler: apt-get install g++-aarch64-linux-gnu")
    flags = "-std=c++20 -O0 -fno-exceptions -fno-rtti -Wall -Wextra -Werror -Wno-psabi -fsyntax-only".split()
    names = ["-DRNNFAST_ISA=portable", f"-DRNNFAST_{name}"]
    command = [compiler, *flags, *names, str(ROOT / "csrc" / "cpu" / source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_version_stands_once() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    assert f'version = "{rnnfast.__version__}"' in text

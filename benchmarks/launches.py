"""How each kernel of the CUDA library is launched, and how much of an SM that takes: asks occupancy/occupancy.cpp,
which is compiled for it (a second, once) against the headers that launch the kernels and NVIDIA's cuda_occupancy.h.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

from machine_code import short_name

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import CSRC, CUDA_ARITHMETICS, CUDA_FAMILIES, Ninja, cuda_unit, cxx_compiler  # noqa: E402

SOURCE = ROOT / "benchmarks/occupancy/occupancy.cpp"
BUILD = ROOT / "build" / "occupancy"
FLAGS = f"-std=c++20 -Wall -Wextra -Werror -DRNNFAST_EMULATED -I{CSRC}".split()


def arch_number(arch: str) -> int:
    """90 of "sm_90a"."""
    return int(arch.removeprefix("sm_").rstrip("af"))


class Launch(NamedTuple):
    """How a kernel is launched.

    Args:
        kernel: its name, as in "step_forward<lstm, BFloat16, 4>".
        unit: the compile unit that has it.
        family: as in "lstm". arithmetic: as in "BFloat16".
        threads: a block; where that is chosen when it is launched (by csrc/cuda/plan.h), the most.
        dynamic: bytes of dynamic shared memory a block; None where that is chosen when it is launched.
        exchange: of a persistent kernel, as in "grid", else "".
        tiles: of batch indices, a block's; of a row kernel units an access.
        held: passes and chunks of a persistent kernel's product whose weights stay in registers (in_registers() of
            csrc/cuda/persistent/persistent.h).
    """

    kernel: str
    unit: str
    family: str
    arithmetic: str
    threads: int
    dynamic: int | None
    exchange: str = ""
    tiles: int = 1
    held: tuple[int, int] = (0, 0)

    @property
    def is_persistent(self) -> bool:
        return self.exchange != ""

    def has_body(self, arch: str) -> bool:
        """Whether there is more than a trap for an architecture as in "sm_90a": clusters came with 9.0."""
        return self.exchange != "cluster" or arch_number(arch) >= 90


class Occupancy(NamedTuple):
    """What an SM holds of a kernel.

    Args:
        blocks: at once.
        percent: the warps of these blocks, of all that an SM can hold.
        limited_by: what keeps the blocks from being more: "registers", "shared memory", "threads" (a card's limit of
            resident threads), "blocks" (of resident blocks), or two of them.
    """

    blocks: int
    percent: int
    limited_by: str


def toolkit_include() -> Path:
    """The folder of cuda_occupancy.h: of the toolkit, of a package of NVIDIA's, or of triton."""
    packages = Path(sysconfig.get_paths()["platlib"])
    homes = [os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [Path(home) / "include" for home in homes if home]
    folders += [*sorted(packages.glob("nvidia/cu*/include")), packages / "triton/backends/nvidia/include"]
    for folder in folders:
        if (folder / "cuda_occupancy.h").exists():
            return folder
    raise SystemExit("cuda_occupancy.h was not found: install the CUDA toolkit, set CUDA_HOME, or pip install triton")


def _ask(task: str, text: str = "") -> list[list[str]]:
    """The fields of each line of the program's answer; brings the program up to date first."""
    ninja = Ninja(BUILD)
    ninja.rule("program", f"{cxx_compiler()} $flags -MMD -MF $out.d $in -o $out")
    # As a system directory: warnings in NVIDIA's header are not ours to mend.
    program = ninja.edge("program", "occupancy", [SOURCE], [*FLAGS, "-isystem", str(toolkit_include())])
    if not ninja.run(quiet=True):
        raise SystemExit(f"{SOURCE.relative_to(ROOT)} did not compile; the compiler's message is above")
    done = subprocess.run([program, task], input=text, capture_output=True, text=True, check=True)
    return [line.split("\t") for line in done.stdout.splitlines()]


@cache
def launches() -> dict[str, Launch]:
    """Every kernel of the units that setup.py writes, by name, in the order of the units."""
    found = {}
    for kind, family, arithmetic, kernel, exchange, *numbers in _ask("launches"):
        tiles, threads, dynamic, *held = map(int, numbers)
        of_exchange = f"{exchange}, " if exchange else ""
        of_tiles = f", {of_exchange}{tiles}" if tiles else ""
        name = f"{short_name(kernel).removesuffix('>')}{of_tiles}>"
        of_family, of_type = CUDA_FAMILIES[int(family)], CUDA_ARITHMETICS[int(arithmetic)]
        unit = cuda_unit(kind, of_family, of_type)
        shared = None if dynamic < 0 else dynamic
        found[name] = Launch(name, unit, of_family, of_type, threads, shared, exchange, tiles, held=(held[0], held[1]))
    return found


@cache
def _most_dynamic() -> dict[int, int]:
    return {int(sm): int(most) for sm, most in _ask("most")}


def most_dynamic(arch: str) -> int:
    """The most shared memory that a plan asks for a block, on an architecture as in "sm_90a".

    Raises:
        SystemExit: the architecture is not in the table of csrc/cuda/plan/costs.h.
    """
    if (most := _most_dynamic().get(arch_number(arch))) is None:
        raise SystemExit(f"{arch}: csrc/cuda/plan/costs.h has no card of this architecture: add one to cards()")
    return most


def occupancies(kernels: Iterable[tuple[str, int, int, int, int]]) -> list[Occupancy]:
    """Of each kernel in turn.

    Args:
        kernels: (architecture, as in "sm_90a", threads a block, registers a thread, bytes of static shared memory a
            block, of dynamic).

    Raises:
        SystemExit: an architecture is not in the table of occupancy.cpp.
    """
    asked = list(kernels)
    lines = []
    for arch, *numbers in asked:
        number = str(arch_number(arch))
        lines.append(" ".join(map(str, (number[:-1], number[-1], *numbers))))
    found = []
    for (arch, *_), fields in zip(asked, _ask("occupancy", "\n".join(lines)), strict=True):
        if fields == ["unknown"]:
            raise SystemExit(
                f"{arch}: {SOURCE.relative_to(ROOT)} has no limits of this architecture: add them to kLimits"
            )
        blocks, warps, most, limited_by = fields
        found.append(Occupancy(int(blocks), round(100 * int(warps) / int(most)), limited_by))
    return found

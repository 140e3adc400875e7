"""Builds what runs on a machine with a card and needs neither torch nor Python there, where nvcc is found; no GPU is
needed: `build/card/card_tests-90a`, the programs of tests/cpp that make sense on silicon, with the kernels of the CUDA
library (`make cuda` comes first), and `build/card/microbench-90a` (benchmarks/microbench).

    python tests/build_card.py [--archs 9.0a] [--quiet] [card_tests | microbench ...]
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from card_kit import FOLDER as BUILD  # noqa: E402
from card_kit import PROGRAMS  # noqa: E402
from setup import (  # noqa: E402
    CUDA_BUILD,
    NVCC_FLAGS,
    Ninja,
    built_archs,
    code_flags,
    compression_flags,
    cuda_sources,
    find_nvcc,
    host_compiler,
)

MICROBENCH = ROOT / "benchmarks/microbench/microbench.cu"
# Not for a card: the emulator itself, what it refuses, device functions called by the host, schedules, which nobody
# shuffles there, and what new tests begin from.
EMULATOR_ONLY = {"test_emulator", "test_misuse", "test_rows", "test_variant", "template"}


def test_sources() -> list[Path]:
    cpp = ROOT / "tests/cpp"
    tests = [source for source in sorted(cpp.glob("test_*.cpp")) if source.stem not in EMULATOR_ONLY]
    return [cpp / "card_tests.cpp", *tests]


def program(name: str, arch: str) -> Path:
    return BUILD / f"{name}-{arch.replace('.', '')}"


def kernels() -> list[Path]:
    """The CUDA library's own objects: what is tested is what it runs."""
    return [CUDA_BUILD / f"{source.stem}.o" for source in cuda_sources()]


def why_no_kernels(arch: str) -> str:
    """Why the CUDA library's objects cannot be taken, or ""."""
    if arch in built_archs():
        return ""
    return f"the CUDA library is not built for {arch}: make cuda RNNFAST_CUDA_ARCHS={arch}"


def ninja_file(nvcc: str, arch: str) -> Ninja:
    number = arch.replace(".", "")
    ninja = Ninja(BUILD / number)
    # What ptxas says of registers and spills stands beside the object.
    run = f"{shlex.quote(nvcc)} -x cu $flags -c $in -o $out"
    ninja.rule("nvcc", f"{run} -MD -MF $out.d -Xptxas -v > $out.log 2>&1 || {{ cat $out.log; exit 1; }}")
    ninja.rule("link", f"{shlex.quote(nvcc)} -cudart static -nodlink -o $out $in $flags", depfile=False)
    flags = NVCC_FLAGS + compression_flags(nvcc) + host_compiler() + code_flags([arch])

    def units(sources: list[Path]) -> list[Path]:
        return [ninja.edge("nvcc", f"{source.stem}.o", [source], flags) for source in sources]

    objects = {
        "card_tests": units(test_sources()) + kernels(),
        "microbench": units([MICROBENCH]),
    }
    for name in PROGRAMS:
        ninja.phony(name, [ninja.edge("link", program(name, arch), objects[name], host_compiler())])
    return ninja


def build(archs: list[str], programs: list[str], quiet: bool = False) -> bool:
    """Brings the programs up to date; False where something does not compile, SystemExit where nothing can."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise SystemExit("rnnfast: no nvcc, or RNNFAST_CUDA=0: put nvcc on PATH or set CUDA_HOME")
    for arch in archs:
        if "card_tests" in programs:
            if reason := why_no_kernels(arch):
                raise SystemExit(f"rnnfast: card_tests: {reason}")
            # As they were made the last time, after a change of a source.
            if not Ninja(CUDA_BUILD).run(kernels(), quiet):
                return False
        if not ninja_file(nvcc, arch).run(programs, quiet):
            return False
    return True


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", nargs="+", default=["9.0a"], metavar="ARCH")
    parser.add_argument("--quiet", action="store_true", help="print errors and what was built only")
    parser.add_argument("programs", nargs="*", metavar="program", help=f"all by default: {', '.join(PROGRAMS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.programs) - set(PROGRAMS):
        parser.error(f"no program is called {', '.join(sorted(unknown))}")
    wanted = arguments.programs or list(PROGRAMS)
    if not build(arguments.archs, wanted, arguments.quiet):
        sys.exit(1)
    for path in [program(name, arch) for arch in arguments.archs for name in wanted]:
        print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 2**20:.1f} MiB")

"""Builds what runs CUDA kernels without a card: `build/emulated/_C_emulated.so`, whose ops the parity tests call, and
the programs of tests/cpp in three variants: `build/emulated/plain` (most schedules), `asan` (ASan + UBSan) and
`tsan` (TSan).

    python tests/build_emulated.py [--quiet] [library | asan | tsan | asan/test_step | ...]
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import CSRC, STABLE_ABI, Ninja, cuda_sources, cxx_compiler, torch_includes, torch_root  # noqa: E402

BUILD = ROOT / "build" / "emulated"
LIBRARY = BUILD / "_C_emulated.so"

COMMON_FLAGS = f"-std=c++20 -g1 -fPIC -Wall -Wextra -Werror -DRNNFAST_EMULATED -I{CSRC}".split()
# Without two checks that ASan makes as well, or that need virtual functions: they take a third of the compile time.
UNDEFINED = "-fsanitize=undefined -fno-sanitize=vptr,object-size -fno-sanitize-recover=all".split()
# Per variant: flags of every file, of the kernels and the tests, of the emulator, of the link. The emulator tells TSan
# itself what orders what: its own accesses, from one host thread, are none of a kernel's.
VARIANTS: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    # The library is made of its objects.
    "plain": (["-O2", "-fvisibility=hidden"], [], [], []),
    "asan": (
        ["-O1", "-fno-omit-frame-pointer", "-D_GLIBCXX_ASSERTIONS", *UNDEFINED],
        ["-fsanitize=address"],
        ["-fsanitize=address"],
        ["-fsanitize=address,undefined"],
    ),
    "tsan": (
        ["-O1", "-fno-omit-frame-pointer", "-DRNNFAST_TSAN"],
        ["-fsanitize=thread"],
        [],
        ["-fsanitize=thread"],
    ),
}
# The programs that run the kernels of csrc/cuda; the others bring kernels of their own.
LINK_KERNELS = {"test_step"}


def programs() -> list[str]:
    """The names of the test programs."""
    return [source.stem for source in sorted((ROOT / "tests/cpp").glob("test_*.cpp"))]


def ninja_file() -> Ninja:
    cxx = cxx_compiler()
    ninja = Ninja(BUILD)
    ninja.rule("compile", f"{cxx} $flags -MMD -MF $out.d -c $in -o $out")
    ninja.rule("link", f"{cxx} -o $out $in $flags -pthread", depfile=False)
    emulator = sorted(CSRC.glob("emulator/*.cpp"))

    def units(folder: str, sources: list[Path], flags: list[str]) -> list[Path]:
        return [
            ninja.edge("compile", f"{folder}/{source.name}.o", [source], COMMON_FLAGS + flags + ["-x", "c++"])
            for source in sources
        ]

    for variant, (common, code, scheduler, link) in VARIANTS.items():
        shared = units(variant, emulator, common + scheduler)
        kernels = units(variant, cuda_sources(), common + code)
        built = []
        for name in programs():
            objects = units(variant, [ROOT / "tests/cpp" / f"{name}.cpp"], common + code) + shared
            objects += kernels if name in LINK_KERNELS else []
            built.append(ninja.edge("link", BUILD / variant / name, objects, link))
        ninja.phony(variant, built)
        if variant == "plain":
            ops = units(variant, [CSRC / "cuda/ops_cuda.cpp"], common + [STABLE_ABI] + torch_includes())
            libraries = [f"-L{torch_root() / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
            libraries += ["-shared", "-Wl,--no-undefined"]
            ninja.phony("library", [ninja.edge("link", LIBRARY, shared + kernels + ops, libraries)])
    return ninja


def build(targets: list[str], quiet: bool = False) -> bool:
    """Brings the targets (all by default) up to date; False where something does not compile."""
    phony = {"library", *VARIANTS}
    return ninja_file().run([target if target in phony else BUILD / target for target in targets], quiet)


@cache
def fixed_addresses() -> list[str]:
    """What stands before a program: gcc's sanitizers do not bear with every place where a newer kernel puts things."""
    prefix = ["setarch", "-R"]
    if (
        shutil.which("setarch") is None
        or subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode
    ):
        return []
    return prefix


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("targets", nargs="*")
    arguments = parser.parse_args()
    sys.exit(not build(arguments.targets, arguments.quiet))

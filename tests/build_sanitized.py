"""Builds what `tests/fuzz/run.py` runs: the C++ library under a sanitizer, in `build/sanitized/address` (ASan, UBSan)
and `build/sanitized/thread` (TSan), and beside it what its run needs from tests/fuzz.

    python tests/build_sanitized.py [--quiet] [address | thread]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from build_emulated import UNDEFINED  # noqa: E402
from setup import COMMON_FLAGS, Ninja, build_cpu, cxx_compiler, torch_includes, torch_root  # noqa: E402

BUILD = ROOT / "build" / "sanitized"
FLAGS = {
    "address": ["-fsanitize=address", *UNDEFINED, "-D_GLIBCXX_ASSERTIONS"],
    "thread": ["-fsanitize=thread"],
}
COMMON = "-O1 -g1 -fno-omit-frame-pointer".split()


def library(sanitizer: str) -> Path:
    return BUILD / sanitizer / "_C_cpu.so"


def companions(sanitizer: str) -> list[Path]:
    """Small libraries from tests/fuzz: ops with a fault each, and what tells TSan about the thread pool."""
    names = ["planted"] + ["pool_order"] * (sanitizer == "thread")
    return [BUILD / sanitizer / "fuzz" / f"{name}.so" for name in names]


def build(sanitizer: str, quiet: bool = False) -> bool:
    """Brings what one sanitizer's run needs up to date; False where something does not compile."""
    flags = FLAGS[sanitizer] + COMMON
    build_cpu(BUILD / sanitizer, flags, quiet)
    targets = companions(sanitizer)
    ninja = Ninja(targets[0].parent)
    ninja.rule("library", f"{cxx_compiler()} -shared -MMD -MF $out.d -o $out $in $flags")
    for target in targets:
        source = ROOT / "tests/fuzz" / f"{target.stem}.cpp"
        # What is preloaded must not bring torch along.
        libraries = ["-ldl"] if target.stem == "pool_order" else [f"-L{torch_root() / 'lib'}", "-ltorch_cpu", "-ltorch"]
        ninja.edge("library", target, [source], COMMON_FLAGS + flags + torch_includes() + libraries)
    return ninja.run(quiet=quiet)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("sanitizers", nargs="*", choices=[*FLAGS, []])
    arguments = parser.parse_args()
    sys.exit(not all(build(sanitizer, arguments.quiet) for sanitizer in arguments.sanitizers or FLAGS))

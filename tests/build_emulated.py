"""Builds what runs CUDA kernels without a card: `build/emulated/_C_emulated.so`, whose ops the parity tests call, and
the programs of tests/cpp in four variants: `build/emulated/plain` (most schedules), `asan` (ASan + UBSan), `tsan`
(TSan) and, where it is asked for, `debug` (for gdb).

    python tests/build_emulated.py [--quiet] [library | asan | tsan | asan/test_step | ...]

A program that runs the library's kernels can be built for one family and arithmetic alone, in a fraction of the
time: `plain/test_step.lstm-float32`. `make kernel-test` does where a case has such a name.
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

from setup import (  # noqa: E402
    CSRC,
    CUDA_KERNELS,
    CUDA_UNITS,
    STABLE_ABI,
    Ninja,
    cuda_instances,
    cuda_sources,
    cuda_unit,
    cxx_compiler,
    torch_includes,
    torch_root,
    write_changed,
)

BUILD = ROOT / "build" / "emulated"
LIBRARY = BUILD / "_C_emulated.so"

COMMON_FLAGS = f"-std=c++20 -g1 -fPIC -Wall -Wextra -Werror -DRNNFAST_EMULATED -I{CSRC} -I{ROOT / 'tests/cpp'}".split()
# Messages and the names of synchronisations begin in the repository.
COMMON_FLAGS += [f"-fmacro-prefix-map={ROOT}/="]
# Without two checks that ASan makes as well, or that need virtual functions: they take a third of the compile time.
UNDEFINED = "-fsanitize=undefined -fno-sanitize=vptr,object-size -fno-sanitize-recover=all".split()
# Per variant: flags of every file, of the kernels and the tests, of the emulator, of the link. The emulator tells TSan
# itself what orders what: its own accesses, from one host thread, are none of a kernel's.
VARIANTS: dict[str, tuple[list[str], list[str], list[str], list[str]]] = {
    # The library is made of its objects.
    "plain": (["-O1", "-fvisibility=hidden"], [], [], []),
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
    "debug": (["-O0", "-g"], [], [], []),
}
# What is built where nothing is named.
TESTED = ["plain", "asan", "tsan"]
# The programs that run the kernels of csrc/cuda, and of which kind; the others bring kernels of their own.
LINK_KERNELS = {"test_step": "step", "test_persistent": "persistent", "test_split": "split", "test_variant": "variant"}
# Of these the sanitized variants are built one family and arithmetic at a time, as tests ask for them: all at once
# would take longer than everything else together.
BY_INSTANCE = {"test_persistent", "test_split", "test_variant"}


def programs() -> list[str]:
    """The names of the test programs, and of the one to begin a new one from."""
    return [*(source.stem for source in sorted((ROOT / "tests/cpp").glob("test_*.cpp"))), "template"]


def instances(program: str) -> list[str]:
    """The families and arithmetics, as in "rnn-float32", of the kernels that a program runs."""
    kind = LINK_KERNELS.get(program)
    return [f"{family}-{arithmetic.lower()}" for of, family, arithmetic in cuda_instances() if of == kind]


def instance_of(program: str, case: str) -> str | None:
    """The family and arithmetic that a case's name begins and ends with, as in "rnn-float32" of "rnn-tanh-float32": all
    that it runs."""
    words = case.split("-")
    instance = f"{words[0]}-{words[-1]}"
    return instance if instance in instances(program) else None


def program_of(variant: str, program: str, case: str) -> str:
    """The build target of the program that runs a case of `program` in a variant: of one instance, where that is how
    it is built."""
    instance = instance_of(program, case) if variant != "plain" and program in BY_INSTANCE else None
    return f"{variant}/{program}.{instance}" if instance else f"{variant}/{program}"


def other_instances(kind: str, family: str, arithmetic: str) -> Path:
    """The source of what stands for the kernels of all other kinds, families and arithmetics."""
    lines = ['#include "other_instances.h"', "", "namespace rnnfast::gpu {"]
    for of, *other in cuda_instances():
        if (of, *other) == (kind, family, arithmetic):
            continue
        instance = CUDA_KERNELS[of][1]
        kernels = f"{instance.removesuffix('Instance')}Kernels"
        specialised = f"{instance}<Family::{', '.join(other)}>::kernels()"
        lines.append(f"template <> {kernels} {specialised} {{ return other_{of}_kernels(); }}")
    folder = BUILD / "others"
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / f"other_than_{cuda_unit(kind, family, arithmetic)}.cpp"
    write_changed(source, "\n".join([*lines, "}  // namespace rnnfast::gpu", ""]))
    return source


def ninja_file() -> Ninja:
    cxx = cxx_compiler()
    ninja = Ninja(BUILD)
    ninja.rule("compile", f"{cxx} $flags -MMD -MF $out.d -c $in -o $out")
    ninja.rule("link", f"{cxx} -o $out $in $flags -pthread", depfile=False)
    emulator = sorted(CSRC.glob("emulator/*.cpp"))
    sources = cuda_sources()

    def units(folder: str, sources: list[Path], flags: list[str]) -> list[Path]:
        return [
            ninja.edge("compile", f"{folder}/{source.name}.o", [source], COMMON_FLAGS + flags + ["-x", "c++"])
            for source in sources
        ]

    for variant, (common, code, scheduler, link) in VARIANTS.items():
        shared = units(variant, emulator, common + scheduler)
        kernels = units(variant, sources, common + code)
        of_all = [unit for source, unit in zip(sources, kernels, strict=True) if source.parent != CUDA_UNITS]
        alone: dict[str, dict[str, list[Path]]] = {kind: {} for kind in CUDA_KERNELS}
        for kind, family, arithmetic in cuda_instances():
            name = f"{cuda_unit(kind, family, arithmetic)}.cu.o"
            others = units(variant, [other_instances(kind, family, arithmetic)], common + code)
            of_one = [unit for unit in kernels if unit.name == name]
            alone[kind][f"{family}-{arithmetic.lower()}"] = of_all + of_one + others
        built = []
        for name in programs():
            objects = units(variant, [ROOT / "tests/cpp" / f"{name}.cpp"], common + code) + shared
            if name in LINK_KERNELS:
                for instance, needed in alone[LINK_KERNELS[name]].items():
                    ninja.edge("link", BUILD / variant / f"{name}.{instance}", objects + needed, link)
                # Of its own kind: the sanitized variants compile what a program links.
                of_others = tuple(f"{kind}_" for kind in CUDA_KERNELS if kind != LINK_KERNELS[name])
                objects += [unit for unit in kernels if not unit.name.startswith(of_others)]
            program = ninja.edge("link", BUILD / variant / name, objects, link)
            if variant == "plain" or name not in BY_INSTANCE:
                built.append(program)
        ninja.phony(variant, built)
        if variant == "plain":
            ops = units(variant, [CSRC / "cuda/ops_cuda.cpp"], common + [STABLE_ABI] + torch_includes())
            libraries = [f"-L{torch_root() / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
            libraries += ["-shared", "-Wl,--no-undefined"]
            ninja.phony("library", [ninja.edge("link", LIBRARY, shared + kernels + ops, libraries)])
    ninja.default(["library", *TESTED])
    return ninja


def build(targets: list[str], quiet: bool = False) -> bool:
    """Brings the targets (by default the library and `TESTED`) up to date; False where something does not compile."""
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

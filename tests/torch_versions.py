"""Holds the promise of one binary for every torch from 2.10 on, for versions other than the one that is installed.

    python tests/torch_versions.py 2.10.0 2.11.0

Each lies in build/torch-VERSION, installed there without what it depends on (`make torch-versions`); everything else is
this environment's. Checked are: that the sources compile with its headers; that it has every function of torch that the
built libraries name; that both libraries load there and tests/smoke.py passes; and what an op says of memory that it
cannot have, which is where a torch's age shows. A CUDA build of torch wants NVIDIA's libraries, gigabytes of which
nothing runs without a card: stand-ins take their place, of which every function fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import setup as build  # noqa: E402

LIBRARIES = [ROOT / "rnnfast" / name for name in ("_C_cpu.so", "_C_cuda.so")]
# Looked up at run time, with something to do where they are missing.
DISPENSABLE = {"torch_exception_get_what_without_backtrace"}
OUT_OF_MEMORY = """
import torch
from rnnfast import libraries
from rnnfast.backends import BACKENDS
assert libraries.cpu_error is None, libraries.cpu_error
assert libraries.cuda_error is None or {without_cuda}, libraries.cuda_error
weights = torch.zeros(4096, 0), None, torch.zeros(4096, 1024)
try:
    BACKENDS["cpu"].kernels.layer("LSTM", torch.zeros(2**36, 64, 0), *[None] * 5, False, *weights)
except RuntimeError as error:
    wanted = "rnnfast::layer: out of memory: output of shape (68719476736, 64, 1024), float32, needs "
    assert str(error).startswith(wanted), error
else:
    raise AssertionError("petabytes were there")
"""


class Failure(Exception):
    """What does not hold, in words."""


def output_of(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def symbols(library: Path, *flags: str) -> list[str]:
    """The names, with their versions, of a library's dynamic symbols."""
    return [line.split()[-1] for line in output_of("nm", "-D", *flags, library).splitlines() if line.strip()]


def bare(symbol: str) -> str:
    return symbol.split("@")[0]


def compiles(torch: Path) -> None:
    """Every file that includes torch's headers, as setup.py and tests/build_emulated.py compile it."""
    cxx = [*build.cxx_compiler().split(), *build.COMMON_FLAGS, "-fsyntax-only", *build.torch_includes(torch)]
    commands = [
        [*cxx, build.CSRC / "ops.cpp"],
        [*cxx, build.CSRC / "cpu/ops_cpu.cpp"],
        [*cxx, build.CSRC / "cpu/variants/ops.cpp"],
        [*cxx, f"-I{build.CSRC}", "-DRNNFAST_EMULATED", build.CSRC / "cuda/ops_cuda.cpp"],
    ]
    if nvcc := build.find_nvcc():
        flags = build.cuda_ops_flags(build.CUDA_ARCHS.split(";"), torch)
        commands.append([nvcc, *flags, "-Xcompiler", "-fsyntax-only", "-c", build.CSRC / "cuda/ops_cuda.cpp"])
    with ThreadPoolExecutor(2) as pool:
        done = pool.map(lambda command: subprocess.run(command, capture_output=True, text=True, check=False), commands)
        for command, result in zip(commands, done, strict=True):
            if result.returncode != 0:
                raise Failure(f"{command[-1]} does not compile with its headers:\n{result.stderr[:4000]}")


def has_every_function(torch: Path) -> None:
    defined = {
        bare(name)
        for lib in ("libtorch_cpu.so", "libc10.so")
        for name in symbols(torch / "lib" / lib, "--defined-only")
    }
    for library in LIBRARIES:
        if library.exists():
            imported = {bare(name) for name in symbols(library, "--undefined-only")}
            # torch's C interface, and whatever of its C++ got in.
            missing = {name for name in imported if re.match(r"aoti_|torch_|_ZN?K?(5torch|2at|3c10)", name)} - defined
            if missing:
                raise Failure(f"{library.name} needs functions that it lacks: {', '.join(sorted(missing))}")
    looked_up = {
        name
        for source in build.CSRC.rglob("*")
        if source.suffix in (".h", ".cpp")
        for name in re.findall(r'torch_function\("(\w+)"\)', source.read_text())
    }
    if not looked_up:
        raise Failure("no torch_function(...) is found in csrc: this check no longer sees what is looked up")
    # shim*.h, and the generated c_shim_*.h of single ops.
    declared = "".join(header.read_text() for header in (torch / "include/torch/csrc").rglob("*shim*.h"))
    needed = looked_up - DISPENSABLE
    undeclared = {name for name in needed if not re.search(rf"\b{name}\b", declared)}
    if undeclared:
        raise Failure(f"its headers do not declare what is looked up at run time: {', '.join(sorted(undeclared))}")
    # Those of CUDA are defined in libtorch_cuda.so, which a torch for the CPU has not.
    undefined = {name for name in needed - defined if "cuda" not in name}
    if undefined:
        raise Failure(f"it lacks what is looked up at run time: {', '.join(sorted(undefined))}")


def stand_ins(torch: Path) -> Path:
    """A folder with a library for each that torch's own need and this machine lacks."""
    folder = torch.parent / "stand-ins"
    folder.mkdir(exist_ok=True)
    own = sorted((torch / "lib").glob("*.so*"))
    needed = set(re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl).*)\]", output_of("readelf", "-d", *own)))
    missing = [name for name in needed if not (torch / "lib" / name).exists()]
    if not missing:
        return folder
    # By version, "" where there is none.
    wanted: dict[str, set[str]] = defaultdict(set)
    for library in own:
        for symbol in symbols(library, "--undefined-only"):
            name, _, version = symbol.partition("@")
            if re.match(r"_*(cu|nv|nccl)", name):
                wanted[version.lstrip("@")].add(name)
    names = set().union(*wanted.values())
    source, versions, built = folder / "all.c", folder / "versions", folder / "all.so"
    source.write_text("".join(f"long {name}(void) {{ return 100; }}\n" for name in sorted(names)))
    versions.write_text(
        "".join(f"{version} {{ {'; '.join(sorted(names))}; }};\n" for version, names in wanted.items() if version)
    )
    # -w: some are names of functions that the compiler knows otherwise.
    command = [*build.cxx_compiler().split(), "-x", "c", "-w", "-shared", "-fPIC", "-o", built, source]
    subprocess.run([*command, f"-Wl,--version-script={versions}"], check=True)
    for name in missing:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(built.name)
    return folder


def runs(torch: Path) -> str:
    """What tests/smoke.py says of itself there."""
    path = os.pathsep.join([str(torch.parent), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "LD_LIBRARY_PATH": str(stand_ins(torch))}
    without_cuda = str(build.find_nvcc() is None)
    for arguments in (["-c", OUT_OF_MEMORY.replace("{without_cuda}", without_cuda)], [str(ROOT / "tests/smoke.py")]):
        done = subprocess.run(
            [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise Failure(f"`python {arguments[0]}` fails there:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


def check(version: str) -> str:
    torch = ROOT / "build" / f"torch-{version}" / "torch"
    if not torch.exists():
        raise Failure(f"{torch.parent} has no torch: run `make torch-versions`")
    compiles(torch)
    has_every_function(torch)
    printed = runs(torch)
    found = re.search(r"torch (\S+)", printed)
    if found is None or found[1].split("+")[0] != version:
        raise Failure(f"another torch was imported: {printed}")
    return re.findall(r"largest difference.*", printed)[0]


def main(versions: list[str]) -> int:
    missing = [library.name for library in LIBRARIES[: 1 if build.find_nvcc() is None else 2] if not library.exists()]
    if missing:
        print(f"not built in this tree: {', '.join(missing)} (make cuda)", file=sys.stderr)
        return 1
    failed = False
    for version in versions:
        try:
            print(f"torch {version}: compiles, loads, runs; {check(version)}", flush=True)
        except Failure as failure:
            failed = True
            print(f"torch {version}: {failure}", file=sys.stderr, flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

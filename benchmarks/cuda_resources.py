"""Writes build/cuda_resources.csv: what each kernel of the CUDA library takes, as ptxas, the cubins and the launch code
say.

    python benchmarks/cuda_resources.py                        # of setup.py's build folder; `make cuda` builds first
    python benchmarks/cuda_resources.py --before old.csv       # and what differs from an earlier table
    python benchmarks/cuda_resources.py --unit step_gru_tf32   # compiles that unit alone, prints its kernels

Columns: kernel, arch, registers (a thread), spills (bytes stored and loaded), stack (bytes a thread), shared (static,
bytes a block), dynamic (shared memory, bytes a block), threads (a block), blocks (that an SM holds), occupancy (percent
of an SM's warps), limited_by (what keeps it from holding more), bytes (of machine code), seconds (to compile its unit,
all architectures, beside whatever else the build ran at that time). Threads and shared memory of the persistent kernels
are chosen when they are launched: the table has the most of both, for which the architecture has room.
Then the main loop, which is the time loop of a persistent kernel, and of others the innermost one with the most
products: instructions of its body, of one iteration (machine_code.Loop.iteration), and how many of each kind those are;
matrix (the opcodes of its products on tensor cores).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import machine_code
from cuda_tools import run_tool
from launches import launches, most_dynamic, occupancies
from machine_code import readable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import CUDA_BUILD as BUILD  # noqa: E402
from setup import built_archs, cuda_archs, cuda_ninja, cuda_sources, find_nvcc, write_changed  # noqa: E402

TABLE = ROOT / "build" / "cuda_resources.csv"
# Build folders of some units only, by the architectures that they are for.
PARTS = ROOT / "build" / "cuda-parts"


class Kernel(NamedTuple):
    kernel: str
    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    dynamic: int
    threads: int
    blocks: int
    occupancy: int
    limited_by: str
    bytes: int
    seconds: float
    # Of the main loop, 0 where there is none.
    loop: int = 0
    iteration: int = 0
    hmma: int = 0
    ffma: int = 0
    dfma: int = 0
    ldgsts: int = 0
    ldg: int = 0
    lds: int = 0
    sts: int = 0
    branches: int = 0
    ldsm: int = 0
    stg: int = 0
    stas: int = 0
    shfl: int = 0
    mufu: int = 0
    bar: int = 0
    matrix: str = ""


def code_sizes(cubin: bytes) -> dict[str, int]:
    """Bytes of machine code of each kernel: its section .text.<mangled name> in a 64-bit ELF file."""
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = []
    for index in range(count):
        name = struct.unpack_from("<I", cubin, table + index * entry)[0]
        offset, size = struct.unpack_from("<QQ", cubin, table + index * entry + 0x18)
        sections.append((name, offset, size))
    strings = sections[names][1]
    sizes = {}
    for name, _, size in sections:
        start = strings + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        if text.startswith(".text."):
            sizes[text.removeprefix(".text.")] = size
    return sizes


def cubins(binary: Path, folder: Path) -> list[tuple[str, Path]]:
    """(architecture, file) of each piece of machine code in an object or library, unpacked into `folder`."""
    run_tool("cuobjdump", "-xelf", "all", str(binary), cwd=folder)
    found = [(re.search(r"\.(sm_\w+)\.cubin$", path.name), path) for path in sorted(folder.glob("*.cubin"))]
    return [(match[1], path) for match, path in found if match]


ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def loop_counts(cubin: Path) -> dict[str, dict[str, int | str]]:
    """Of each kernel in a cubin that has a main loop, by mangled name: the columns of that loop."""
    found = {}
    for symbol, function in machine_code.functions(run_tool("nvdisasm", "-c", str(cubin))).items():
        if loop := function.main_loop():
            counts = machine_code.counts(loop.iteration)
            columns: dict[str, int | str] = {name: counts.get(name.upper(), counts.get(name, 0)) for name in KINDS}
            opcodes = sorted({one.opcode for one in loop.iteration if one.kind == "HMMA"})
            sizes = {"loop": len(loop.instructions), "iteration": len(loop.iteration)}
            found[symbol] = {**sizes, **columns, "matrix": " ".join(opcodes)}
    return found


LOOP_COLUMNS = Kernel._fields[Kernel._fields.index("loop") :]
# Those that count instructions of a kind.
KINDS = LOOP_COLUMNS[2:-1]


class UnitCode(NamedTuple):
    """What the cubins of an object say, by (architecture, mangled name)."""

    sizes: dict[tuple[str, str], int]
    loops: dict[tuple[str, str], dict[str, Any]]


def unit_code(binary: Path) -> UnitCode:
    """Reading the machine code of a unit takes a second: what was found stands beside the object until that changes."""
    said = [binary.read_bytes(), Path(machine_code.__file__).read_bytes(), " ".join(LOOP_COLUMNS).encode()]
    digest = hashlib.sha256(b"".join(said)).hexdigest()
    kept = Path(f"{binary}.loops.json")
    loops: dict[str, dict[str, dict[str, Any]]] = {}
    if kept.exists():
        known = json.loads(kept.read_text())
        loops = known["loops"] if known["digest"] == digest else {}
    with tempfile.TemporaryDirectory() as folder:
        found = cubins(binary, Path(folder))
        sizes = {(arch, name): size for arch, path in found for name, size in code_sizes(path.read_bytes()).items()}
        if not loops:
            loops = {arch: loop_counts(path) for arch, path in found}
            # Objects of another's build folder may be looked at too, where nothing can be written.
            if os.access(binary.parent, os.W_OK):
                write_changed(kept, json.dumps({"digest": digest, "loops": loops}))
    return UnitCode(sizes, {(arch, name): row for arch, rows in loops.items() for name, row in rows.items()})


def unit_resources(log: Path, seconds: float) -> list[Kernel]:
    """The kernels of one compile unit, from the log of ptxas -v and the object beside it; names still mangled, and
    nothing yet of how they are launched."""
    sizes, loops = unit_code(log.with_suffix(""))
    kernels = []
    for part in log.read_text().split("ptxas info    : Compiling ")[1:]:
        entry, stack, used = ENTRY.search("Compiling " + part), STACK.search(part), USED.search(part)
        if not (entry and stack and used):
            continue
        symbol, arch = entry.groups()
        kernels.append(
            Kernel(
                symbol,
                arch,
                registers=int(used[1]),
                spills=int(stack[2]) + int(stack[3]),
                stack=int(stack[1]),
                shared=int(used[2] or 0),
                dynamic=0,
                threads=0,
                blocks=0,
                occupancy=0,
                limited_by="never launched",
                bytes=sizes.get((arch, symbol), 0),
                seconds=seconds,
                **loops.get((arch, symbol), {}),
            )
        )
    if not kernels or any(kernel.bytes == 0 for kernel in kernels):
        raise SystemExit(f"{log} does not fit the object beside it: remove both and build again")
    return kernels


def launched(kernels: list[Kernel]) -> list[Kernel]:
    """With names and what the launch code says. Kernels of csrc/cuda/*.cu are told from those of the units by having no
    template arguments: nothing launches them."""
    names = readable(sorted({kernel.kernel for kernel in kernels}))
    named = [kernel._replace(kernel=names[kernel.kernel]) for kernel in kernels]
    known = launches()
    if unknown := sorted({kernel.kernel for kernel in named if "<" in kernel.kernel} - set(known)):
        raise SystemExit(
            f"{unknown[0]}: benchmarks/occupancy/occupancy.cpp does not print this kernel, so its shared memory is not "
            "known: add it to the for_each_kernel of its kind, which is called there, or build again if it was removed"
        )
    with_launch = []
    for kernel in named:
        if launch := known.get(kernel.kernel):
            dynamic = most_dynamic(kernel.arch) if launch.dynamic is None else launch.dynamic
            with_launch.append(kernel._replace(threads=launch.threads, dynamic=dynamic))
    asked = [(kernel.arch, kernel.threads, kernel.registers, kernel.shared, kernel.dynamic) for kernel in with_launch]
    done = [
        kernel._replace(
            blocks=occupancy.blocks,
            occupancy=occupancy.percent,
            limited_by=occupancy.limited_by,
        )
        for kernel, occupancy in zip(with_launch, occupancies(asked), strict=True)
    ]
    return sorted([kernel for kernel in named if kernel.kernel not in known] + done)


def resources(build: Path = BUILD, units: Iterable[str] = ()) -> list[Kernel]:
    """Every kernel of the CUDA library for every architecture; of some units only, where they are named.

    Raises:
        SystemExit: units are not built, or tools are missing; says which.
    """
    seconds = {}
    for line in (build / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        seconds[Path(output).name] = (int(end) - int(start)) / 1000
    # An object whose source is gone stays in the folder: only what the library is linked from counts.
    linked = re.findall(r"^build (\S+\.o): nvcc", (build / "build.ninja").read_text(), re.MULTILINE)
    wanted = set(units)
    objects = [path for path in map(Path, linked) if not wanted or path.stem in wanted]
    # `make cuda K=...` builds some of them.
    if missing := [path.stem for path in objects if not path.exists()]:
        raise SystemExit(
            f"cuda_resources: {len(missing)} of {len(objects)} units are not built, {missing[0]} first: make cuda"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        of_units = pool.map(lambda path: unit_resources(Path(f"{path}.log"), seconds[path.name]), objects)
        return launched([kernel for kernels in of_units for kernel in kernels])


# ---- tables of two builds --------------------------------------------------------------------------------------------

# Seconds differ from build to build.
COMPARED = [name for name in Kernel._fields if name not in ("kernel", "arch", "seconds")]


def read_table(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of an earlier table, by (architecture, kernel).

    Raises:
        ValueError: it is not there, cannot be read, or is no table of this script.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            columns = reader.fieldnames or []
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is no CSV file: {error}") from error
    for number, row in enumerate(rows):
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {number}: expected {len(columns)} columns, got more or fewer")
    if missing := {"kernel", "arch", "registers", "bytes"} - set(columns):
        raise ValueError(f"{path} is no table of cuda_resources.py: it has no column {', '.join(sorted(missing))}")
    return {(row["arch"], row["kernel"]): row for row in rows}


def changes(before: dict[tuple[str, str], dict[str, str]], kernels: Iterable[Kernel]) -> list[str]:
    """A line for each kernel that is new, gone, or differs in a column that both tables have."""
    now = {(kernel.arch, kernel.kernel): kernel._asdict() for kernel in kernels}
    # An earlier build may have been for other architectures: that is said once, not of every kernel.
    archs_before, archs_now = ({arch for arch, _ in table} for table in (before, now))
    lines = [f"{arch}: built for it now, not before" for arch in sorted(archs_now - archs_before)]
    lines += [f"{arch}: built for it before, not now" for arch in sorted(archs_before - archs_now)]
    for key in sorted(before.keys() | now.keys()):
        arch, name = key
        if arch not in archs_before & archs_now:
            continue
        if key not in now:
            lines.append(f"{arch} {name}: gone")
        elif key not in before:
            row = now[key]
            lines.append(f"{arch} {name}: new, {row['registers']} registers, {row['spills']} bytes of spills")
        else:
            pairs = [(column, before[key].get(column), str(now[key][column])) for column in COMPARED]
            different = [f"{column} {old} -> {new}" for column, old, new in pairs if old not in (None, new)]
            lines += [f"{arch} {name}: {', '.join(different)}"] * bool(different)
    return lines


# ---- the command -----------------------------------------------------------------------------------------------------


def print_kernels(kernels: list[Kernel]) -> None:
    columns: dict[str, Callable[[Kernel], Any]] = {
        "arch": lambda kernel: kernel.arch,
        "kernel": lambda kernel: kernel.kernel,
        "registers": lambda kernel: kernel.registers,
        "spills": lambda kernel: kernel.spills,
        "threads": lambda kernel: kernel.threads,
        "shared KB": lambda kernel: f"{(kernel.shared + kernel.dynamic) / 1024:.1f}",
        "blocks": lambda kernel: kernel.blocks,
        "occupancy": lambda kernel: f"{kernel.occupancy}%",
        "limited by": lambda kernel: kernel.limited_by,
        "iteration": lambda kernel: kernel.iteration,
        "code KB": lambda kernel: f"{kernel.bytes / 1024:.1f}",
    }
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(
            column, justify="left" if column in ("arch", "kernel", "limited by") else "right", no_wrap=True
        )
    for kernel in sorted(kernels, key=lambda kernel: (kernel.arch, kernel.kernel)):
        table.add_row(*(str(value(kernel)) for value in columns.values()))
    Console(width=160, highlight=False, markup=False).print(table)


def print_summary(kernels: list[Kernel]) -> None:
    for arch in sorted({kernel.arch for kernel in kernels}):
        of_arch = [kernel for kernel in kernels if kernel.arch == arch]
        running = [kernel for kernel in of_arch if kernel.threads]
        least, most = (choose(kernel.occupancy for kernel in running) for choose in (min, max))
        limits = sorted({kernel.limited_by for kernel in running})
        print(
            f"{arch}: {len(of_arch)} kernels, {sum(kernel.bytes for kernel in of_arch) >> 10} KiB of code, at most "
            f"{max(kernel.registers for kernel in of_arch)} registers, {sum(k.spills > 0 for k in of_arch)} with "
            f"spills, occupancy {least}% to {most}% (limited by {', '.join(limits)})"
        )


def compile_unit(parser: argparse.ArgumentParser, unit: str) -> Path:
    """Brings the object of one unit up to date; the build folder that has it. That is the folder of `make cuda`, unless
    the library there is for other architectures than are asked for: all its objects are for the same."""
    units = [source.stem for source in cuda_sources()]
    if unit not in units:
        parser.error(f"--unit: no compile unit is called {unit!r}; there are: {', '.join(units)}")
    nvcc = find_nvcc()
    if nvcc is None:
        parser.error("no nvcc, or RNNFAST_CUDA=0: put nvcc on PATH or set CUDA_HOME")
    archs, built = cuda_archs(nvcc), built_archs()
    folder = BUILD if set(built or archs) == set(archs) else PARTS / "-".join(archs)
    ninja, _ = cuda_ninja(nvcc, archs, folder)
    if not ninja.run([folder / f"{unit}.o"]):
        raise SystemExit(f"cuda_resources: {unit} did not compile; nvcc's message is above")
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help=f"where the table goes (build/{TABLE.name}; of one unit: nowhere)")
    parser.add_argument("--before", type=Path, metavar="CSV", help="an earlier table: print what changed since")
    parser.add_argument("--unit", help="compile this unit alone and print its kernels")
    options = parser.parse_args()
    # Read first: it may be the file that is written.
    try:
        before = read_table(options.before) if options.before else None
    except ValueError as error:
        parser.error(f"--before: {error}")
    build = BUILD
    if options.unit:
        build = compile_unit(parser, options.unit)
    elif not (BUILD / "build.ninja").exists():
        parser.error("the CUDA library is not built: `make cuda` builds it where nvcc is found")
    kernels = resources(build, [options.unit] if options.unit else [])
    if options.unit:
        print_kernels(kernels)
    else:
        print_summary(kernels)
    if out := options.out or (None if options.unit else TABLE):
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(Kernel._fields)
            writer.writerows(kernels)
        print(f"written: {os.path.relpath(out)}")
    if before is not None:
        names = {kernel.kernel for kernel in kernels}
        if options.unit:
            before = {key: row for key, row in before.items() if key[1] in names}
        print("\n".join(changes(before, kernels) or ["nothing changed"]))


if __name__ == "__main__":
    main()

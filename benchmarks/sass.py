"""Prints the machine code (SASS) of a kernel with its source lines and loops, and how often each kind of instruction
stands in it; no card is needed.

    python benchmarks/sass.py step_forward --arch 9.0a --cell lstm --type bfloat16           # `make sass` calls this
    python benchmarks/sass.py 'step_backward<gru, Tf32, 4>' --counts

Compiles the one unit that has the kernel, for the one architecture, where the build folder of `make cuda` is not for
it. The output is the same for the same code, so that two of them can be compared with diff. Of each loop the table has
the instructions of its body and, if no other loop lies in it, those of one iteration: the shortest way through with the
most products and asynchronous copies. The body also has the ways that are taken at an end or for what is unaligned.
Of a persistent kernel the table is of the time loop: the longest way through it of a thread that has all its cells,
each loop inside gone through once, by the sections that headings in the kernel's source make ("// ---- product ----"),
and an iteration of each loop inside.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.table import Table

from cuda_resources import PARTS, Kernel, cubins, launched, unit_resources
from cuda_tools import cuda_tool, missing, run_tool
from launches import Launch, launches
from machine_code import KINDS, OTHER, Function, Instruction, Loop, counts, functions, readable

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import (  # noqa: E402
    CSRC,
    CUDA_ARITHMETICS,
    CUDA_BUILD,
    CUDA_FAMILIES,
    Ninja,
    built_archs,
    cuda_archs,
    cuda_ninja,
    find_nvcc,
    known_archs,
)

# So many kernels of one unit are printed without --all, one kernel for small and for large batches; their tables alone
# of all kernels of a unit.
MOST = 2


def fail(message: str) -> NoReturn:
    """Ends the program as argparse does."""
    print(f"sass.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# ---- which kernels, and their objects --------------------------------------------------------------------------------


def matching(pattern: str, cell: str | None, type_name: str | None) -> list[Launch]:
    """The kernels whose names the regular expression is found in."""
    try:
        expression = re.compile(pattern)
    except re.error as error:
        fail(f"KERNEL: {pattern!r} is no regular expression: {error}")
    found = [
        launch
        for launch in launches().values()
        if expression.search(launch.kernel)
        and cell in (None, launch.family)
        and type_name in (None, launch.arithmetic.lower())
    ]
    if not found:
        names = ", ".join(sorted({name.partition("<")[0] for name in launches()}))
        chosen = "".join(f" of {what}" for what in (cell, type_name) if what)
        fail(
            f"KERNEL: no kernel{chosen} has {pattern!r} in its name; expected a regular expression for names like "
            f"{next(iter(launches()))!r}; there are {names}"
        )
    return found


class Objects:
    """The objects of compile units for one architecture; an error in words where there can be none."""

    def __init__(self, arch: str) -> None:
        self.arch = arch
        self.sm = f"sm_{arch.replace('.', '')}"
        nvcc = find_nvcc()
        # The library's own object has the code, and is what runs.
        if arch in (archs := built_archs()):
            self.ninja = cuda_ninja(nvcc, archs, CUDA_BUILD)[0] if nvcc else Ninja(CUDA_BUILD)
            return
        if nvcc is None:
            fail(f"no nvcc to compile for {arch}, or RNNFAST_CUDA=0: put nvcc on PATH or set CUDA_HOME")
        known = known_archs(nvcc)
        if arch.rstrip("af") not in known:
            fail(f"ARCH: expected a compute capability that {nvcc} compiles for ({', '.join(known)}), got {arch!r}")
        try:
            archs = cuda_archs(nvcc, arch, "ARCH")
        except SystemExit as error:
            fail(str(error))
        self.ninja, _ = cuda_ninja(nvcc, archs, PARTS / arch)

    def path(self, unit: str) -> Path:
        return self.ninja.folder / f"{unit}.o"

    def is_current(self, unit: str) -> bool:
        """Whether the object is there, of the sources as they are."""
        if not self.path(unit).exists():
            return False
        dry_run = [Ninja.program(), "-C", str(self.ninja.folder), "-n", str(self.path(unit))]
        return "no work to do" in subprocess.run(dry_run, capture_output=True, text=True, check=False).stdout

    def build(self, units: Iterable[str]) -> None:
        if missing := [unit for unit in units if not self.is_current(unit)]:
            print(f"compiling for {self.arch}: {', '.join(missing)}", file=sys.stderr)
            if not self.ninja.run([self.path(unit) for unit in missing], quiet=True):
                raise SystemExit("sass.py: nvcc's message is above")

    def resources(self, unit: str) -> dict[str, Kernel]:
        """By name, of this architecture."""
        kernels = launched(unit_resources(Path(f"{self.path(unit)}.log"), seconds=0))
        return {kernel.kernel: kernel for kernel in kernels if kernel.arch == self.sm}

    def code(self, unit: str) -> dict[str, Function]:
        """By name, with source lines."""
        with tempfile.TemporaryDirectory() as folder:
            for arch, cubin in cubins(self.path(unit), Path(folder)):
                if arch == self.sm:
                    found = functions(run_tool("nvdisasm", "-c", "-gi", str(cubin)))
                    names = readable(list(found))
                    return {names[symbol]: function for symbol, function in found.items()}
        raise SystemExit(f"sass.py: {self.path(unit)} has no code for {self.sm}: remove it, and it is compiled again")


# ---- what is printed -------------------------------------------------------------------------------------------------


def source_name(file: str) -> str:
    """As it stands in the tree."""
    path = Path(file).resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def source_lines(instructions: Iterable[Instruction]) -> str:
    """First and last line in each file of ours, as in "product.cuh 79-210"."""
    lines: dict[str, list[int]] = {}
    for instruction in instructions:
        if Path(instruction.file).resolve().is_relative_to(CSRC):
            lines.setdefault(Path(instruction.file).name, []).append(instruction.line)
    spans = ((name, min(found), max(found)) for name, found in sorted(lines.items()))
    return ", ".join(f"{name} {first}" + f"-{last}" * (last > first) for name, first, last in spans)


def listing(function: Function) -> Iterator[str]:
    """The code: a line above where the source line changes, the number of the innermost loop beside the address."""
    # nvdisasm numbers the labels of a unit's kernels in a row: here by kernel, so that one's change stays its own.
    labels = {
        label: f"L{number}" for number, label in enumerate(sorted(function.labels, key=function.labels.__getitem__))
    }
    by_address: dict[int, list[str]] = {}
    for label, address in function.labels.items():
        by_address.setdefault(address, []).append(labels[label])
    loop_of: dict[int, Loop] = {}
    for loop in sorted(function.loops, key=lambda loop: loop.depth):
        loop_of.update((instruction.address, loop) for instruction in loop.instructions)
    place = ("", 0)
    for instruction in function.instructions:
        yield from (f"{label}:" for label in by_address.get(instruction.address, []))
        if (instruction.file, instruction.line) != place:
            place = (instruction.file, instruction.line)
            yield f"    ; {source_name(place[0])}:{place[1]}" if place[0] else "    ; no line"
        inside = loop_of.get(instruction.address)
        text = re.sub(r"`\((\.L_\w+)\)", lambda found: labels.get(found[1], found[1]), instruction.text)
        yield f"{instruction.address:6x} {f'loop {inside.number}' if inside else '':7} {text}"


@cache
def headings(file: str) -> list[tuple[int, str]]:
    """Line and words of the headings in a source."""
    if not Path(file).is_file():
        return []
    lines = enumerate(Path(file).read_text(encoding="utf-8").splitlines(), start=1)
    found = ((number, re.match(r"\s*// ---- (.+?) -*$", line)) for number, line in lines)
    return [(number, heading[1]) for number, heading in found if heading]


def section(instruction: Instruction) -> str:
    """The heading that it stands under in the kernel's source."""
    file, line = instruction.place
    return next((words for number, words in reversed(headings(file)) if number <= line), "elsewhere")


def short(heading: str) -> str:
    return heading.partition(":")[0]


def time_table(function: Function, time_loop: Loop) -> Table:
    """Columns: the kinds that occur. Rows: the whole kernel, the time loop, an iteration of it in all and by section,
    and an iteration of each loop in it."""
    rows: list[tuple[str, Counter[str]]] = [("kernel", counts(function.instructions))]
    rows.append((f"loop {time_loop.number} body", counts(time_loop.instructions)))
    rows.append((f"iteration {time_loop.number}", counts(time_loop.iteration)))
    sections: dict[str, list[Instruction]] = {}
    for instruction in sorted(time_loop.iteration, key=lambda one: one.place):
        sections.setdefault(section(instruction), []).append(instruction)
    rows += [(f"  {short(words)}", counts(inside)) for words, inside in sections.items()]
    for loop in function.loops:
        if loop.innermost and time_loop.has(loop):
            rows.append((f"iteration {loop.number}, {short(section(loop.iteration[0]))}", counts(loop.iteration)))
    table = Table(box=None, pad_edge=False)
    kinds = [kind for kind in (*KINDS, OTHER) if rows[1][1][kind]]
    for title in ("", *kinds, "all"):
        table.add_column(title, justify="right" if title else "left", no_wrap=True)
    for name, of in rows:
        table.add_row(name, *(str(of[kind]) for kind in kinds), str(sum(of.values())))
    return table


def counts_table(function: Function) -> Table:
    """A row for each kind that occurs; columns: the whole kernel, and of each loop its body and iteration."""
    columns: list[tuple[str, Iterable[Instruction]]] = [("kernel", function.instructions)]
    for loop in function.loops:
        columns.append((f"loop {loop.number} body", loop.instructions))
        if loop.innermost:
            columns.append((f"iteration {loop.number}", loop.iteration))
    table = Table(box=None, pad_edge=False)
    table.add_column("instructions", no_wrap=True)
    found = []
    for title, instructions in columns:
        table.add_column(title, justify="right", no_wrap=True)
        found.append(counts(instructions))
    for kind in [kind for kind in (*KINDS, OTHER) if found[0][kind]]:
        table.add_row(kind, *(str(of[kind]) for of in found))
    table.add_row("all", *(str(sum(of.values())) for of in found))
    return table


def loop_text(loop: Loop) -> str:
    """A loop in a line."""
    name = f"loop {loop.number}" + ", the time loop" * loop.is_time
    where = f"{loop.first:#x} to {loop.last:#x}"
    inside = f", in {loop.depth - 1} other{'s' * (loop.depth > 2)}" if loop.depth > 1 else ""
    size = f"{len(loop.instructions)} instructions" + f", {len(loop.iteration)} an iteration" * bool(loop.iteration)
    return f"{name}{inside}: {where}, {size}; {source_lines(loop.instructions)}"


def print_kernel(console: Console, kernel: Kernel, function: Function, only_counts: bool) -> None:
    time_loop = function.time_loop()
    at_most = "at most " * (time_loop is not None)
    console.print(
        f"{kernel.kernel} for {kernel.arch}: {kernel.registers} registers, {kernel.spills} bytes of spills, "
        f"{at_most}{kernel.threads} threads and {kernel.shared + kernel.dynamic} bytes of shared memory a block, "
        f"{kernel.blocks} blocks an SM ({kernel.occupancy}% of its warps, limited by {kernel.limited_by})"
    )
    for loop in function.loops:
        # Those before a time loop fill registers and shared memory once.
        if not (only_counts and time_loop) or loop is time_loop or time_loop.has(loop):
            console.print(loop_text(loop))
    console.print()
    console.print(time_table(function, time_loop) if time_loop else counts_table(function))
    console.print()
    if not only_counts:
        for line in listing(function):
            console.print(line)
        console.print()


def print_list(console: Console, kernels: list[Launch], objects: Objects) -> None:
    """Name, unit, registers and loops of each; of objects that are there."""
    table = Table(box=None, pad_edge=False)
    for title in ("kernel", "unit", "registers", "loops: an iteration of each"):
        table.add_column(title, no_wrap=True, justify="right" if title == "registers" else "left")
    for unit in dict.fromkeys(launch.unit for launch in kernels):
        known, code = (objects.resources(unit), objects.code(unit)) if objects.is_current(unit) else ({}, {})
        for name in (launch.kernel for launch in kernels if launch.unit == unit):
            if not code:
                table.add_row(name, unit, "", "not built")
                continue
            found = [time_loop] if (time_loop := code[name].time_loop()) else code[name].loops
            loops = ", ".join(str(len(loop.iteration)) for loop in found if loop.iteration)
            table.add_row(name, unit, str(known[name].registers), loops or "none")
    with console.capture() as text:
        console.print(table)
    print("\n".join(line.rstrip() for line in text.get().splitlines()))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="sass.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kernel", metavar="KERNEL", help="a part of the name, or a regular expression for it")
    parser.add_argument("--arch", default="9.0a", help="compute capability (%(default)s)")
    parser.add_argument("--cell", choices=CUDA_FAMILIES, help="kernels of this family of cells only")
    parser.add_argument("--type", choices=[name.lower() for name in CUDA_ARITHMETICS], help="of this arithmetic only")
    parser.add_argument("--all", action="store_true", help="print every kernel that matches, and compile all they need")
    parser.add_argument("--counts", action="store_true", help="print the tables alone, not the code")
    options = parser.parse_args()
    found = matching(options.kernel, options.cell, options.type)
    for tool in ("cuobjdump", "nvdisasm"):
        if cuda_tool(tool) is None:
            fail(missing(tool))
    objects = Objects(options.arch)
    units = list(dict.fromkeys(launch.unit for launch in found))
    # Plain text of any width: it goes to less and diff.
    console = Console(width=1000, highlight=False, markup=False, emoji=False, soft_wrap=True, no_color=True)
    if not options.all and (len(units) > 1 or (len(found) > MOST and not options.counts)):
        if len(units) == 1:
            objects.build(units)
        print_list(console, found, objects)
        fail(
            f"KERNEL: {len(found)} kernels match {options.kernel!r}: name one, narrow with --cell and --type "
            "(make: CELL=, TYPE=), or take --all (ALL=1)"
        )
    objects.build(units)
    for unit in units:
        resources, code = objects.resources(unit), objects.code(unit)
        for name in (launch.kernel for launch in found if launch.unit == unit):
            print_kernel(console, resources[name], code[name], options.counts)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:  # `| head`
        sys.stderr.close()

"""SASS as nvdisasm prints it, taken apart: the kernels of a listing, their instructions with source lines, their loops,
and how often each kind of instruction stands in them.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import networkx as nx

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import CUDA_FAMILIES  # noqa: E402

# Those of csrc/cuda/persistent/persistent.h, in its order.
EXCHANGES = ["block", "cluster", "grid"]

# The kinds that tell most about a kernel, by mnemonic (what stands before the first dot), in the order of the tables.
KINDS: dict[str, str] = {
    "HMMA": "products on tensor cores",
    "FFMA": "float32 multiply-add",
    "DFMA": "float64 multiply-add",
    "MUFU": "exp, reciprocal and their like",
    "LDGSTS": "cp.async: global to shared memory",
    "LDG": "loads from global memory",
    "STG": "stores to it",
    "LDS": "loads from shared memory",
    "LDSM": "ldmatrix",
    "STS": "stores to shared memory",
    "STAS": "st.async: stores to another SM's shared memory",
    "SYNCS": "mbarriers",
    "LDL": "loads from local memory: spills",
    "STL": "stores to it",
    "BAR": "block barriers",
    "SHFL": "shuffles",
    "branches": "BRA, CALL, RET, EXIT and their like",
}
OTHER = "other"  # addresses, integers, predicates, conversions
# The kinds that a kernel's main loop is there for, and those that an iteration is told by: the way through the loop
# that has the most of them is the one that is taken while there is work.
PRODUCTS = ("HMMA", "FFMA", "DFMA")
WORK = (*PRODUCTS, "LDGSTS")
_BRANCHES = frozenset("BRA BRX JMP JMX CALL RET EXIT BREAK".split())
# What ends a basic block. A subroutine comes back, so CALL does not.
_JUMPS = frozenset("BRA BSYNC EXIT RET BRX JMP JMX BREAK".split())

_SECTION = re.compile(r"^\s*\.section\s+(?:\.text\.([^,\s]+))?")
_LABEL = re.compile(r"^(\.L_\w+):")
_LINE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)( inlined at)?')
_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+((?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*)\S*.*?)\s*;?\s*$")
_OPCODE = re.compile(r"(?:@!?U?P\w+\s+)?(\S+)")
_TARGET = re.compile(r"`\((\.L_\w+)\)")


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Args:
        address: in bytes, from the kernel's start.
        text: with predicate and operands; targets as nvdisasm names them.
        mnemonic: its name without modifiers, as in "HMMA".
        file: the source file as the compiler was given it, "" without line information; line: in that file.
        place: file and line in the kernel itself, of the call that was inlined there; with `nvdisasm -gi` alone.
    """

    address: int
    text: str
    mnemonic: str
    file: str = ""
    line: int = 0
    place: tuple[str, int] = ("", 0)

    @property
    def opcode(self) -> str:
        """With modifiers, as in "HMMA.16816.F32"."""
        found = _OPCODE.match(self.text)
        return found[1] if found else self.mnemonic

    @property
    def kind(self) -> str:
        # Never carried out: on some cards the assembler puts three such LDS before each LDGSTS.
        if self.text.startswith("@!PT "):
            return OTHER
        if self.mnemonic in _BRANCHES:
            return "branches"
        return self.mnemonic if self.mnemonic in KINDS else OTHER

    @property
    def conditional(self) -> bool:
        return self.text.startswith("@")


@dataclass(frozen=True)
class Loop:
    """A loop: what a backward branch leads back through.

    Args:
        number: in the order of addresses, from 1.
        depth: 1 for a loop that lies in no other.
        innermost: no other loop lies in it.
        instructions: of its body, all branches of it, in the order of addresses. They need not be contiguous.
        iteration: of an innermost loop, the shortest of the ways through it with the most of WORK. What an iteration
            takes in the usual case: the body also has the ways for what is unaligned or at an end. Of a time loop, each
            loop in it gone through once, of the ways with the most products and functions the longest: of a thread
            that has all its cells. Of other loops empty.
        is_time: a time loop, as persistent kernels have one: the outermost loop with products on tensor cores and a
            block barrier, in which other loops lie.
    """

    number: int
    depth: int
    innermost: bool
    instructions: tuple[Instruction, ...]
    iteration: tuple[Instruction, ...]
    is_time: bool = False

    @property
    def first(self) -> int:
        return self.instructions[0].address

    @property
    def last(self) -> int:
        return self.instructions[-1].address

    def has(self, other: Loop) -> bool:
        """Whether the other one lies in it."""
        return self is not other and set(other.instructions) <= set(self.instructions)

    def products(self) -> int:
        found = counts(self.instructions)
        return sum(found[kind] for kind in PRODUCTS)


@dataclass
class Function:
    """A kernel's code, as it stands in its section, subroutines of the compiler behind it.

    Args:
        symbol: the mangled name.
        labels: address of each label; one may stand behind the last instruction.
    """

    symbol: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @cached_property
    def loops(self) -> list[Loop]:
        return _loops(self)

    def time_loop(self) -> Loop | None:
        return next((loop for loop in self.loops if loop.is_time), None)

    def main_loop(self) -> Loop | None:
        """The time loop, else the innermost loop with the most products, None where none has any. Of loops with as many
        the shorter one that copies asynchronously: the other is for vectors that start anywhere."""
        if time_loop := self.time_loop():
            return time_loop

        def weight(loop: Loop) -> tuple[int, bool, int]:
            return loop.products(), counts(loop.instructions)["LDGSTS"] > 0, -len(loop.instructions)

        return max((loop for loop in self.loops if loop.innermost and loop.products()), key=weight, default=None)


def short_name(name: str) -> str:
    """A demangled name as name<arguments>, without return type, parameters and our namespaces; families and exchanges
    by name."""
    name = re.sub(r"\b(rnnfast|gpu)::|\(anonymous namespace\)::|^void ", "", name)
    name = re.sub(r"\(Family\)(\d+)", lambda found: CUDA_FAMILIES[int(found[1])], name)
    name = re.sub(r"\(Exchange\)(\d+)", lambda found: EXCHANGES[int(found[1])], name)
    depth = 0
    for end, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:end]
    return name


def readable(symbols: list[str]) -> dict[str, str]:
    """The short names of mangled kernel names."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return {symbol: short_name(name) for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True)}


def functions(listing: str) -> dict[str, Function]:
    """The kernels of what `nvdisasm -c` printed (with source lines: `-g`, with places too: `-gi`), by mangled name."""
    found: dict[str, Function] = {}
    current: Function | None = None
    waiting: list[str] = []  # labels that the next instruction bears
    file, line_number, place = "", 0, ("", 0)
    inlined = False  # the next line information is of where that before was inlined
    for line in listing.splitlines():
        if match := _INSTRUCTION.match(line):
            if current is None:
                continue
            address = int(match[1], 16)
            for label in waiting:
                current.labels[label] = address
            waiting = []
            current.instructions.append(Instruction(address, match[2], match[3], file, line_number, place))
            inlined = False
        elif match := _LINE.match(line):
            place = (match[1], int(match[2]))
            if not inlined:
                file, line_number = place
            inlined = match[3] is not None
        elif match := _LABEL.match(line):
            waiting.append(match[1])
        elif match := _SECTION.match(line):
            current = found.setdefault(match[1], Function(match[1])) if match[1] else None
            waiting, file, line_number, place, inlined = [], "", 0, ("", 0), False
    return found


def counts(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each of KINDS, and OTHER, stands among them."""
    return Counter(instruction.kind for instruction in instructions)


def _flow(function: Function) -> tuple[nx.DiGraph, dict[int, list[Instruction]]]:
    """Basic blocks by their first address, and where each leads."""
    code = function.instructions
    # Where threads that wait at a BSYNC go on: the label that the last BSSY with its register named.
    meeting: dict[str, int] = {}
    targets: dict[int, int] = {}
    for instruction in code:
        label = _TARGET.search(instruction.text)
        target = function.labels.get(label[1]) if label else None
        register = re.search(r"\b(B\d+)\b", instruction.text)
        if instruction.mnemonic == "BSSY" and register and target is not None:
            meeting[register[1]] = target
        elif instruction.mnemonic == "BSYNC" and register and register[1] in meeting:
            targets[instruction.address] = meeting[register[1]]
        # A CALL to a label inside of the kernel, not to a subroutine, does not come back: a way out of a loop on 8.0.
        elif instruction.mnemonic in ("BRA", "JMP", "CALL") and target is not None:
            targets[instruction.address] = target
    starts = {code[0].address, *targets.values()}
    ends = {instruction.address for instruction in code if instruction.mnemonic in _JUMPS} | set(targets)
    starts |= {after.address for before, after in pairwise(code) if before.address in ends}
    blocks: dict[int, list[Instruction]] = {}
    for instruction in code:
        if instruction.address in starts:
            blocks[instruction.address] = current = []
        current.append(instruction)
    graph = nx.DiGraph()
    graph.add_nodes_from(blocks)
    firsts = list(blocks)
    for first, following in zip(firsts, [*firsts[1:], None], strict=True):
        last = blocks[first][-1]
        target = targets.get(last.address)
        if target in blocks:
            graph.add_edge(first, target)
        goes_on = last.address not in ends or last.conditional or (last.mnemonic == "BSYNC" and target is None)
        if goes_on and following is not None:
            graph.add_edge(first, following)
    return graph, blocks


def _usual_way(body: nx.DiGraph, blocks: dict[int, list[Instruction]], header: int, latches: list[int]) -> list[int]:
    """The blocks of Loop.iteration."""
    acyclic = nx.DiGraph(edge for edge in body.edges if edge[1] != header)
    acyclic.add_node(header)

    def score(block: int) -> int:
        found = counts(blocks[block])
        # Work counts first; of equals the shorter way.
        return sum(found[kind] for kind in WORK) * 1_000_000 - len(blocks[block])

    best = {header: (score(header), [header])}
    for block in nx.topological_sort(acyclic):
        before = [best[other] for other in acyclic.predecessors(block) if other in best]
        if before:
            points, way = max(before, key=lambda one: one[0])
            best[block] = (points + score(block), [*way, block])
    return max((best[latch] for latch in latches), key=lambda one: one[0])[1]


def _longest_way(
    graph: nx.DiGraph, blocks: dict[int, list[Instruction]], header: int, bodies: dict[int, set[int]]
) -> list[int]:
    """The blocks of a time loop's iteration: of each loop inside, the branch back leads to where the loop is left."""

    def score(block: int) -> int:
        found = counts(blocks[block])
        return sum(found[kind] for kind in (*PRODUCTS, "MUFU")) * 1_000_000 + len(blocks[block])

    forward = nx.DiGraph(graph.subgraph(bodies[header]))
    inside = [other for other, body in bodies.items() if body < bodies[header]]
    for other in sorted(inside, key=lambda one: len(bodies[one])):
        body = bodies[other]
        left = {end for block in body for end in graph.successors(block) if end in bodies[header] - body}
        for latch in [block for block in forward.predecessors(other) if block in body]:
            forward.remove_edge(latch, other)
            forward.add_edges_from((latch, end) for end in left)
    latches = list(forward.predecessors(header))
    forward.remove_edges_from([(latch, header) for latch in latches])
    best = {header: (score(header), [header])}
    for block in nx.topological_sort(forward):
        before = [best[other] for other in forward.predecessors(block) if other in best]
        if before:
            # Of equals always the same one, whatever the order in which the graph has them.
            points, way = max(before)
            best[block] = (points + score(block), [*way, block])
    return max(best[latch] for latch in latches if latch in best)[1]


def _loops(function: Function) -> list[Loop]:
    """The natural loops. A branch back makes one where its target dominates it: code that the compiler has moved behind
    the kernel's end jumps backwards too, and is no loop."""
    if not function.instructions:
        return []
    graph, blocks = _flow(function)
    entry = function.instructions[0].address
    graph = nx.DiGraph(graph.subgraph(nx.descendants(graph, entry) | {entry}))
    above = nx.immediate_dominators(graph, entry)

    def dominated_by(node: int, other: int) -> bool:
        while node != other and above.get(node, node) not in (None, node):
            node = above[node]
        return node == other

    bodies: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    for source, header in graph.edges:
        if dominated_by(source, header):
            # Two branches back to one place are one loop.
            inside = bodies.setdefault(header, {header})
            waiting = [source]
            while waiting:
                if (block := waiting.pop()) not in inside:
                    inside.add(block)
                    waiting += graph.pred[block]
            latches.setdefault(header, []).append(source)
    code = {header: tuple(i for first in sorted(body) for i in blocks[first]) for header, body in bodies.items()}
    innermost = {header: not any(other < body for other in bodies.values()) for header, body in bodies.items()}
    depth = {header: sum(body <= other for other in bodies.values()) for header, body in bodies.items()}
    found = {header: counts(instructions) for header, instructions in code.items()}
    timed = [header for header in bodies if not innermost[header] and found[header]["HMMA"] and found[header]["BAR"]]
    time_loop = min(timed, key=lambda header: depth[header], default=None)

    def iteration(header: int) -> list[int]:
        if header == time_loop:
            return _longest_way(graph, blocks, header, bodies)
        body = graph.subgraph(bodies[header])
        return _usual_way(body, blocks, header, latches[header]) if innermost[header] else []

    return [
        Loop(
            number,
            depth=depth[header],
            innermost=innermost[header],
            instructions=code[header],
            iteration=tuple(i for first in iteration(header) for i in blocks[first]),
            is_time=header == time_loop,
        )
        for number, header in enumerate(sorted(bodies), start=1)
    ]

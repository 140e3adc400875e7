"""What an option costs: in how many files, and lines of code, the names of one that is there already stand.

    python tests/option_cost.py [FOLDER]     # of this checkout, or of another one

Counted are rnnfast/ and csrc/, setup.py too: code without comments and docstrings, lines that name the option. Tests
and pages are not, nor is rnnfast/convert/, where names are other libraries'. A folder of the option's own (a backend's)
counts as one file, without its lines.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Option(NamedTuple):
    """A kind of option, by one that is there.

    Attributes:
        what: the kind.
        names: by which the code knows the one that is there, as a regular expression.
        own: the folder that is all its own.
        most: how many files it may touch: tests/test_structure.py.
    """

    what: str
    names: str
    most: int
    own: str = ""


OPTIONS = {
    "nonlinearity": Option("a nonlinearity: identity", r"(?i)(rnn_?|['\"])identity", 5),
    "mask": Option("a per-step mask: resets", r"\bresets\b|\bRESETS\b", 9),
    "weight": Option("a weight: weight_hr", r"\bweight_hr|\bWEIGHT_HR\b", 9),
    "cell": Option("a cell of two gates: MGU", r"(?i)(?<![a-z])mgu", 9),
    "peephole": Option(
        "an option of the cell with a weight: peephole", r"(?i)peep(hole)?\b|weight_peephole|kPeephole", 14
    ),
    "zoneout": Option("an option with masks of each step: zoneout", r"(?i)zoneout|kept_[hc]\b", 17),
    "heads": Option("an option of W_hh: num_heads", r"\bnum_heads\b|\bheads_?\b", 13),
    "backend": Option("a backend: triton", r"(?i)triton", 3, "rnnfast/triton"),
}


def code_lines(path: Path) -> Iterator[str]:
    """The lines of a file that have code, without comments and docstrings."""
    text = path.read_text()
    if path.suffix != ".py":
        # A string with // in it would be cut: there are none with names of options behind it.
        text = re.sub(r"/\*.*?\*/", lambda match: "\n" * match[0].count("\n"), text, flags=re.DOTALL)
        yield from (line.split("//")[0] for line in text.splitlines())
        return
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            for number in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[number] = ""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1]:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    yield from lines


def cost(option: Option, tree: Path = ROOT) -> dict[str, int]:
    """By file: how many lines name the option. A folder of its own stands for its files, with 0 lines."""
    found: dict[str, int] = {}
    sources = [tree / "setup.py", *sorted((tree / "rnnfast").rglob("*.py")), *sorted((tree / "csrc").rglob("*.*"))]
    for path in sources:
        name = path.relative_to(tree).as_posix()
        if any(part in name for part in ("emulator/", "benchmark/", "convert/")) or path.suffix not in (
            ".py",
            ".h",
            ".cpp",
            ".cu",
            ".cuh",
        ):
            continue
        if option.own and name.startswith(option.own + "/"):
            found[option.own] = 0
            continue
        count = sum(1 for line in code_lines(path) if re.search(option.names, line))
        if count:
            found[name] = count
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT)
    for option in OPTIONS.values():
        found = cost(option, parser.parse_args().folder)
        print(f"{option.what}: {len(found)} files, {sum(found.values())} lines (at most {option.most} files)")
        for name, count in found.items():
            print(f"    {count:4} {name}")


if __name__ == "__main__":
    sys.exit(main())

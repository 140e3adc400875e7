"""The result files: where they are, what their rows have in common, and a short table of them.

    python benchmarks/records.py [FOLDER or FILE ...]     # for each suite, workload and backend: how many, mean, worst
    python benchmarks/records.py --worst 3 [...]          # the worst cases, as options of `python -m rnnfast bench`
    python benchmarks/records.py --before FOLDER [...]    # how the ratios have changed since the files in FOLDER

Needs nothing but Python: it also runs on machines that have a GPU and little else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
# Folder inside it with the files of an earlier run: how well the numbers repeat.
REPEAT = "repeat"
# Folder with the files of a run with --keep-memory.
KEPT = "keep-memory"

# The order in which tables and figures show things; what is not listed comes behind, by name.
SUITES = ("sizes", "grid", "flashrnn", "corners", "deepbench", "models", "lengths", "packed", "one-step")
CELLS = ("LSTM", "GRU", "RNN")
DTYPES = ("float32", "bfloat16", "float16", "float64")
WORKLOADS = ("inference", "training", "streaming")

# Options of `python -m rnnfast bench` that take a value, and the field of a row that has it.
BENCH_OPTIONS = {
    "--cell": "cell",
    "--hidden": "H",
    "--input": "I",
    "--proj": "P",
    "--batch": "B",
    "--steps": "T",
    "--layers": "layers",
    "--dtype": "dtype",
    "--resets": "resets",
    "--workload": "workload",
}

Row = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One result file.

    Args:
        path: where it lies.
        data: all of it.
        device: the device in the file's name: "cpu", "h200".
    """

    path: Path
    data: dict[str, Any]
    device: str

    @property
    def suite(self) -> str:
        return str(self.data["suite"])

    @property
    def rows(self) -> list[Row]:
        """The rows that were timed; those of wrong or failed calls are not."""
        return [row for row in self.data["rows"] if row["correct"] and row["ratio"] is not None]

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.data["rows"] if not row["correct"]]


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file with one a line. A program that was killed may have left half a line, which is passed
    over."""
    objects: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            objects.append(json.loads(line))
    return objects


def rank(order: Sequence[str], value: str) -> tuple[int, str]:
    """For sorting: the place in `order`, then the name."""
    return (order.index(value) if value in order else len(order), value)


def in_order(order: Sequence[str], values: Iterable[str]) -> list[str]:
    """The different values, those of `order` first."""
    return sorted(set(values), key=lambda value: rank(order, value))


def load(path: Path) -> Record | None:
    """The file's record; None where it is not a suite's (the demos write other files beside them)."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data, dict) or "suite" not in data or "rows" not in data:
        return None
    return Record(path, data, path.stem.removesuffix(f"-{data['suite']}"))


def load_all(folder: Path = RESULTS) -> list[Record]:
    """Every suite's record in the folder: the CPU's first, then by device; suites in their order."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    records = [record for record in found if record is not None]
    return sorted(records, key=lambda r: (r.device != "cpu", r.device, rank(SUITES, r.suite)))


def worst(rows: Sequence[Row]) -> Row:
    """The row with the lowest ratio."""
    return min(rows, key=lambda row: row["ratio"])


def mean_ratio(rows: Sequence[Row]) -> float:
    """Geometric mean: torch.nn's time over ours, above 1 where we are faster."""
    return statistics.geometric_mean(row["ratio"] for row in rows)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Fixed-width text: columns as wide as their widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def short_table(records: Sequence[Record]) -> str:
    """Fixed-width text: a line for each suite, workload and backend."""
    lines = [("device", "suite", "workload", "backend", "rows", "failed", "mean", "worst", "at")]
    for record in records:
        keys = {(row["workload"], row["backend"]) for row in record.data["rows"]}
        for workload, backend in sorted(keys, key=lambda key: (rank(WORKLOADS, key[0]), key[1])):

            def of_key(rows: Sequence[Row], key: tuple[str, str] = (workload, backend)) -> list[Row]:
                return [row for row in rows if (row["workload"], row["backend"]) == key]

            rows, failed = of_key(record.rows), of_key(record.failures)
            low = worst(rows) if rows else None
            lines.append(
                (
                    record.device,
                    record.suite,
                    workload,
                    backend,
                    str(len(rows)),
                    str(len(failed)),
                    f"{mean_ratio(rows):.2f}" if rows else "-",
                    f"{low['ratio']:.2f}" if low else "-",
                    low["case"] if low else "",
                )
            )
    return aligned(lines)


def bench_options(row: Row) -> str:
    """The row's case as options of `python -m rnnfast bench`."""
    options = [f"{option} {row[key]}" for option, key in BENCH_OPTIONS.items() if row[key]]
    options += ["--bidirectional"] * (row["directions"] == 2)
    options += [f"--{flag}" for flag in ("packed", "lengths") if row[flag]]
    return " ".join([*options, f"--backends {row['backend'].removesuffix('-graph')}"])


def worst_of(records: Sequence[Record], count: int) -> list[str]:
    """The options of so many different cases with the lowest ratios."""
    rows = sorted((row for record in records for row in record.rows), key=lambda row: row["ratio"])
    return list(dict.fromkeys(bench_options(row) for row in rows))[:count]


@dataclass(frozen=True)
class Change:
    """Two runs of the same cases of one suite, cell, workload and backend; of the whole suite where `cell` is "all".

    Args:
        device, suite, cell, workload, backend: of which.
        cases: how many both have.
        before, now: geometric means of the ratios.
        most: the case that changed most, with its workload.
        factor: its ratio now over that before.
    """

    device: str
    suite: str
    cell: str
    workload: str
    backend: str
    cases: int
    before: float
    now: float
    most: str
    factor: float


def changes(before: Sequence[Record], now: Sequence[Record]) -> list[Change]:
    """How the ratios changed: of each suite that both have its cells, workloads and backends, then the whole suite."""
    keys = ("case", "dtype", "workload", "backend")
    result = []
    for record in now:
        others = [other for other in before if (other.device, other.suite) == (record.device, record.suite)]
        then = {tuple(row[key] for key in keys): row for other in others for row in other.rows}
        groups: dict[tuple[str, str, str], list[tuple[Row, Row]]] = {}
        for row in record.rows:
            if (old := then.get(tuple(row[key] for key in keys))) is not None:
                for group in ((row["cell"], row["workload"], row["backend"]), ("all", "", "")):
                    groups.setdefault(group, []).append((old, row))
        for group in sorted(groups, key=lambda key: (rank(CELLS, key[0]), rank(WORKLOADS, key[1]), key[2])):
            pairs = groups[group]
            old, new = max(pairs, key=lambda pair: abs(math.log(pair[1]["ratio"] / pair[0]["ratio"])))
            means = [mean_ratio([pair[side] for pair in pairs]) for side in (0, 1)]
            most = f"{new['case']} {new['workload']}"
            factor = new["ratio"] / old["ratio"]
            result.append(Change(record.device, record.suite, *group, len(pairs), *means, most, factor))
    return result


def change_table(before: Sequence[Record], now: Sequence[Record]) -> str:
    """Fixed-width text: a line for each of the `changes`."""
    lines = [("device", "suite", "cell", "workload", "backend", "cases", "before", "now", "change", "most", "at")]
    for c in changes(before, now):
        means = (f"{c.before:.2f}", f"{c.now:.2f}", f"{c.now / c.before - 1:+.1%}")
        lines.append(
            (c.device, c.suite, c.cell, c.workload, c.backend, str(c.cases), *means, f"{c.factor - 1:+.1%}", c.most)
        )
    return aligned(lines)


def records_in(places: Iterable[Path]) -> list[Record]:
    """The records of folders and files."""
    records: list[Record] = []
    for place in places:
        if place.is_dir():
            records += load_all(place)
        elif (record := load(place)) is not None:
            records.append(record)
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, default=[RESULTS], help="folders and files")
    parser.add_argument("--worst", type=int, metavar="N", help="print the N worst cases, nothing else")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="compare with the result files there")
    options = parser.parse_args()
    records = records_in(options.places)
    if options.worst is not None:
        print("\n".join(worst_of(records, options.worst)))
    elif options.before is not None:
        print(
            "ratio = torch.nn's time / rnnfast's time; geometric means before and now, and the case that changed most"
        )
        print(change_table(records_in([options.before]), records))
    elif not records:
        print(f"no result files in {', '.join(map(str, options.places))}")
    else:
        print("ratio = torch.nn's time / rnnfast's time (above 1: rnnfast is faster), geometric mean and worst case")
        print(short_table(records))
    return 0


if __name__ == "__main__":
    sys.exit(main())

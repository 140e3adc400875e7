"""The result files: where they are, what their rows have in common, and a short table of them.

    python benchmarks/records.py [FOLDER or FILE ...]     # for each suite, workload and backend: how many, mean, worst
    python benchmarks/records.py --worst 3 [...]          # the worst cases, as options of `python -m rnnfast bench`
    python benchmarks/records.py --before FOLDER [...]    # how the ratios have changed since the files in FOLDER
    python benchmarks/records.py --html FILE [...]        # one page of all that, with figures (see report.py)

Needs nothing but Python, unless a page is asked for: it also runs on machines that have a GPU and little else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
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
# Folders inside the one of the results with files of a part of a suite, and of what Ctrl-C left.
PARTIAL = "partial"
INTERRUPTED = "interrupted"
# What is said of a row that was timed while others took cores from it.
BESIDE = "beside other load"
# By how much of itself a median may differ from another way to compute it before that is worth a word.
ROUNDING = 0.02
# So many rows are explained one by one.
MOST_EXPLAINED = 10

# rnnfast's own backends. Behind a name: the same inside a CUDA graph, or in a process with one thread. What is neither
# one of these nor torch.nn is a peer, another library or one's own, whose ratios say nothing of rnnfast.
OURS = ("cpu", "cuda", "triton", "reference", "emulated")
TORCH = "torch"
GRAPH = "-graph"
ONE_THREAD = "-one-thread"
# Behind a backend's name: the layer has quantized weights, of the type that the case says.
QUANTIZED = "-quantized"

# What is said where there are rows of layers with options (`is_variant`).
AGAINST_LOOPS = (
    "torch.nn has no layers with rnnfast's options: where a case names one, a loop of PyTorch's operations over the "
    "steps takes the place of torch.nn's layer."
)

# The order in which tables and figures show things; what is not listed comes behind, by name.
SUITES = (
    "sizes",
    "grid",
    "flashrnn",
    "corners",
    "deepbench",
    "models",
    "lengths",
    "packed",
    "one-step",
    "cells",
    "service",
    "quantized",
    "sixteen-bit",
    "variants",
)
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


# What every row has.
FIELDS = tuple("case cell dtype workload backend us_per_step torch_us_per_step ratio p20 p80 correct".split())
# What is divided, or of which logarithms are taken, where a row was timed.
POSITIVE = ("us_per_step", "torch_us_per_step", "ratio", "p20", "p80")


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
    """The file's record; None where it is not a suite's (the demos write other files beside them).

    Raises:
        OSError: it cannot be read.
        ValueError: it is no JSON, a row lacks what every row has, or a timed row has a time or ratio that none can be.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: expected a result file, got no JSON: {error}") from error
    if not isinstance(data, dict) or "suite" not in data or not isinstance(data.get("rows"), list):
        return None
    for number, row in enumerate(data["rows"]):
        if lacking := [field for field in FIELDS if not isinstance(row, dict) or field not in row]:
            raise ValueError(f"{path}: row {number}: expected {lacking[0]}, got none")
        if row["ratio"] is not None and (wrong := [field for field in POSITIVE if not is_positive(row[field])]):
            got = json.dumps(row[wrong[0]])
            raise ValueError(f"{path}: row {number}: {wrong[0]}: expected a finite number above 0, got {got}")
    return Record(path, data, path.stem.removesuffix(f"-{data['suite']}"))


def is_positive(value: object) -> bool:
    """Whether a value of a JSON file is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def load_all(folder: Path = RESULTS) -> list[Record]:
    """Every suite's record in the folder: the CPU's first, then by device; suites in their order."""
    found = [load(path) for path in sorted(folder.glob("*.json"))]
    records = [record for record in found if record is not None]
    return sorted(records, key=lambda r: (r.device != "cpu", r.device, rank(SUITES, r.suite)))


def base(backend: str) -> str:
    """The name without what says how it was run."""
    return backend.removesuffix(GRAPH).removesuffix(ONE_THREAD).removesuffix(QUANTIZED)


def is_ours(backend: str) -> bool:
    """Whether it is one of rnnfast's own backends."""
    return base(backend) in OURS


def is_peer(backend: str) -> bool:
    """Whether it is neither rnnfast's nor torch.nn's."""
    return base(backend) not in (*OURS, TORCH)


def is_served(row: Row) -> bool:
    """Whether it is of a case with a pause or neighbours; earlier files have neither."""
    return bool(row.get("pause_ms") or row.get("neighbours"))


def is_loop(row: Row) -> bool:
    """Whether it is of a loop of cells, not of a layer; earlier files have no such rows."""
    return bool(row.get("cells"))


def is_variant(row: Row) -> bool:
    """Whether it is of a layer with options, which is compared with a loop of PyTorch's operations; earlier files have
    no such rows."""
    return bool(row.get("variant"))


def quantizes(record: Record) -> bool:
    """Whether it has cases with quantized weights, whose ratios say nothing of other layers: they have a table of their
    own (quantization.py), and no figures."""
    return any(row.get("quantized") for row in record.data["rows"])


def condition(row: Row) -> str:
    """The pause and the neighbours of the row's case, in words; "" where it has neither."""
    pause, beside = row.get("pause_ms") or 0, row.get("neighbours") or 0
    words = [f"pause of {pause:g} ms"] * bool(pause) + [f"{beside} neighbour" + "s" * (beside > 1)] * bool(beside)
    return ", ".join(words)


def shape_of(row: Row) -> str:
    """The name of the row's case without its condition."""
    return re.sub(r"(-pause.+?ms)?(-neighbours\d+)?$", "", row["case"]) if is_served(row) else str(row["case"])


def in_conditions(rows: Iterable[Row]) -> list[str]:
    """The different conditions of the rows: the pauses by length, then neighbours by number."""
    keys = {(row.get("neighbours") or 0, row.get("pause_ms") or 0, condition(row)) for row in rows}
    return [words for *_, words in sorted(keys)]


def worst(rows: Sequence[Row]) -> Row:
    """The row with the lowest ratio."""
    return min(rows, key=lambda row: row["ratio"])


def mean_ratio(rows: Sequence[Row]) -> float:
    """Geometric mean: torch.nn's time over the rows', above 1 where these are faster."""
    return statistics.geometric_mean(row["ratio"] for row in rows)


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Fixed-width text: columns as wide as their widest cell."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def named(row: Row) -> str:
    """The row's case, marked where it was timed beside other load."""
    return f"{row['case']} ({BESIDE})" if row.get("contended") else str(row["case"])


def loaded(rows: Iterable[Row]) -> bool:
    """Whether one of the rows was timed beside other load."""
    return any(row.get("contended") for row in rows)


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
                    named(low) if low else "",
                )
            )
    return aligned(lines)


def bench_options(row: Row) -> str:
    """The row's case as options of `python -m rnnfast bench`."""
    options = [f"{option} {row[key]}" for option, key in BENCH_OPTIONS.items() if row[key]]
    options += ["--bidirectional"] * (row["directions"] == 2)
    # Earlier files have not all of these.
    options += [f"--{flag}" for flag in ("packed", "lengths", "cells") if row.get(flag)]
    options += [f"--quantized {kind}" for kind in [row.get("quantized")] if kind]
    return " ".join([*options, f"--backends {row['backend'].removesuffix(GRAPH).removesuffix(QUANTIZED)}"])


def worst_of(records: Sequence[Record], count: int) -> list[str]:
    """The options of so many different cases with the lowest ratios; `python -m rnnfast bench` has neither peers nor
    cases with pauses or neighbours, nor layers with options."""
    rows = (row for record in records for row in record.rows)
    own = (row for row in rows if not (is_peer(row["backend"]) or is_served(row) or is_variant(row)))
    rows = sorted(own, key=lambda row: row["ratio"])
    return list(dict.fromkeys(bench_options(row) for row in rows))[:count]


def contradictions(rows: Iterable[Row]) -> list[str]:
    """Explains the rows whose ratio is not that of their two times: which is beyond the 20th to 80th percentile of the
    ratios, or on the other side of 1."""
    found = []
    for row in rows:
        if not row["ratio"]:
            continue
        ratio, quotient = row["ratio"], row["torch_us_per_step"] / row["us_per_step"]
        outside = not row["p20"] * (1 - ROUNDING) <= quotient <= row["p80"] * (1 + ROUNDING)
        opposite = (quotient > 1) != (ratio > 1) and abs(math.log(quotient / ratio)) > ROUNDING
        if outside or opposite:
            found.append(
                f"{named(row)} {row['workload']} {row['backend']}: the ratio is {ratio:.2f} ({row['p20']:.2f} to "
                f"{row['p80']:.2f}), that of the two times is {quotient:.2f}"
            )
    if not found:
        return []
    more = [f"... and {len(found) - MOST_EXPLAINED} more"] * (len(found) > MOST_EXPLAINED)
    why = "Each time is the median of its own, the ratio that of pairs taken in turn: they differ where the machine "
    why += "changed while the case was timed. Trust neither; measure again."
    return [*found[:MOST_EXPLAINED], *more, why]


def beside_load(records: Sequence[Record]) -> list[str]:
    """How many rows of each record were timed beside other load, a line each; nothing where none was."""
    counts = [(record, sum(bool(row.get("contended")) for row in record.rows)) for record in records]
    return [
        f"{record.path}: {count} of {len(record.rows)} rows were timed {BESIDE}: do not trust their ratios"
        for record, count in counts
        if count
    ]


@dataclass(frozen=True)
class Change:
    """Two runs of the same cases of one suite, cell, workload and backend; where `cell` is "all", of the
    whole suite and all of rnnfast's own backends.

    What is noise: a case's ratio has changed where the intervals from the 20th to the 80th percentile of its rounds do
    not overlap, before and now. The interval of a group goes from the geometric mean of the lower ends to that of the
    upper ones. It is as wide as if all its cases had erred in the same direction, since what disturbs a machine lasts
    longer than a case.

    Args:
        device, suite, cell, workload, backend: of which.
        cases: how many both have.
        before, now: geometric means of the ratios.
        changed: whether that is more than noise.
        loaded: whether some of it was timed beside other load, then or now, so that neither verdict is sure.
        most: the case that changed most, with its workload.
        factor: its ratio now over that before.
        most_changed: whether that is more than noise.
        most_loaded: whether it was timed beside other load, then or now.
    """

    device: str
    suite: str
    cell: str
    workload: str
    backend: str
    cases: int
    before: float
    now: float
    changed: bool
    loaded: bool
    most: str
    factor: float
    most_changed: bool
    most_loaded: bool


def disjoint(before: Sequence[Row], now: Sequence[Row]) -> bool:
    """Whether the intervals of the geometric means of the ratios do not overlap; of one row each: of its ratio."""
    (low, high), (low_now, high_now) = (
        [statistics.geometric_mean(row[end] for row in rows) for end in ("p20", "p80")] for rows in (before, now)
    )
    return high < low_now or high_now < low


def changes(before: Sequence[Record], now: Sequence[Record]) -> list[Change]:
    """How the ratios changed: of each suite that both have its cells, workloads and backends, then all rows of
    rnnfast's own backends."""
    keys = ("case", "dtype", "workload", "backend")
    result = []
    for record in now:
        others = [other for other in before if (other.device, other.suite) == (record.device, record.suite)]
        then = {tuple(row[key] for key in keys): row for other in others for row in other.rows}
        groups: dict[tuple[str, str, str], list[tuple[Row, Row]]] = {}
        for row in record.rows:
            if (old := then.get(tuple(row[key] for key in keys))) is not None:
                groups.setdefault((row["cell"], row["workload"], row["backend"]), []).append((old, row))
                if is_ours(row["backend"]):
                    groups.setdefault(("all", "", ""), []).append((old, row))
        for group in sorted(groups, key=lambda key: (rank(CELLS, key[0]), rank(WORKLOADS, key[1]), key[2])):
            pairs = groups[group]
            sides = [[pair[side] for pair in pairs] for side in (0, 1)]
            old, new = max(pairs, key=lambda pair: abs(math.log(pair[1]["ratio"] / pair[0]["ratio"])))
            beside = loaded([old, new])
            most = f"{named({**new, 'contended': beside})} {new['workload']}"
            result.append(
                Change(
                    *(record.device, record.suite, *group, len(pairs)),
                    *map(mean_ratio, sides),
                    changed=disjoint(*sides),
                    loaded=any(map(loaded, sides)),
                    most=most,
                    factor=new["ratio"] / old["ratio"],
                    most_changed=disjoint([old], [new]),
                    most_loaded=beside,
                )
            )
    return result


def verdict(changed: bool, loaded: bool) -> str:
    return ("changed" if changed else "within noise") + "?" * loaded


def change_table(found: Sequence[Change]) -> str:
    """Fixed-width text: a line for each of the `changes`."""
    head = "device suite cell workload backend cases before now change verdict most verdict at"
    lines: list[Sequence[str]] = [head.split()]
    for c in found:
        means = (f"{c.before:.2f}", f"{c.now:.2f}", f"{c.now / c.before - 1:+.1%}", verdict(c.changed, c.loaded))
        most = (f"{c.factor - 1:+.1%}", verdict(c.most_changed, c.most_loaded), c.most)
        lines.append((c.device, c.suite, c.cell, c.workload, c.backend, str(c.cases), *means, *most))
    return aligned(lines)


def records_in(places: Iterable[Path]) -> list[Record]:
    """The records of folders and files.

    Raises:
        ValueError: a place that is not there, or has no result file.
    """
    records: list[Record] = []
    for place in places:
        if not place.exists():
            raise ValueError(f"{place}: expected a folder or a result file, got neither: it does not exist")
        found = load_all(place) if place.is_dir() else [record for record in [load(place)] if record is not None]
        if not found:
            raise ValueError(f"{place}: expected results of a suite, got no such file" + "s" * place.is_dir())
        records += found
    return records


def of_peers(records: Iterable[Record]) -> int:
    """How many rows were timed of peers."""
    return sum(is_peer(row["backend"]) for record in records for row in record.rows)


def page_path(text: str) -> Path:
    """For argparse: the file of a page. Another's name is more likely that of a result file, which it would replace."""
    if Path(text).suffix.lower() not in (".html", ".htm"):
        raise argparse.ArgumentTypeError(f"expected a file that ends in .html, got {text}")
    return Path(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", nargs="*", type=Path, default=[RESULTS], help="folders and files")
    parser.add_argument("--before", type=Path, metavar="FOLDER", help="compare with the result files there")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--worst", type=int, metavar="N", help="print the N worst cases, nothing else")
    instead.add_argument(
        "--html", type=page_path, metavar="FILE", help="write a page: machine, figures, rows, what changed"
    )
    options = parser.parse_args()
    if options.worst is not None and options.worst < 1:
        parser.error(f"argument --worst: expected an integer of at least 1, got {options.worst}")
    try:
        records = records_in(options.places)
        before = records_in([options.before]) if options.before is not None else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if options.html is not None:
        try:
            import report  # which needs jinja2, matplotlib and rnnfast

            report.publish(options.html, records, before if options.before is not None else None, parser.error)
        except ModuleNotFoundError as error:
            parser.error(f"argument --html: {error.name} is not installed: pip install rnnfast[bench]")
        return 0
    if options.worst is not None:
        print("\n".join(worst_of(records, options.worst)))
        return 0
    if options.before is None:
        print("ratio = torch.nn's time / the row's time (above 1: faster than torch.nn), geometric mean and worst case")
        print(short_table(records))
    else:
        found = changes(before, records)
        if not found:
            parser.error(f"argument --before: {options.before}: expected cases of the results now, got none of them")
        print("ratio = torch.nn's time / the row's time; geometric means, and the case that changed most")
        print("changed: from the 20th to the 80th percentile the two runs have nothing in common")
        print(change_table(found))
        if any(change.loaded for change in found):
            print(f"?: some of it was timed {BESIDE}")
        if count := of_peers(records):
            print(f"{count} rows of peers are not in all, which is rnnfast's own backends")
    shown = [*before, *records]
    if any(is_variant(row) for record in shown for row in record.rows):
        print(AGAINST_LOOPS)
    for line in [*beside_load(shown), *contradictions(row for record in shown for row in record.rows)]:
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())

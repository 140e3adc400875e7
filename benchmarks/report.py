"""A page about result files, in one HTML file that needs nothing else: `records.py --html FILE` calls this.

It shows the machines and versions, a summary, what changed since earlier files (`--before FOLDER`), the figures of
plot.py and every row. The page's looks are in report.html.j2; here is what stands in it.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import jinja2

from plot import PLAIN_IN_WORDS, described, drawn, figures_of, groups, lacking
from records import (
    AGAINST_LOOPS,
    BESIDE,
    CELLS,
    DTYPES,
    WORKLOADS,
    Change,
    Record,
    changes,
    contradictions,
    in_order,
    is_ours,
    is_variant,
    mean_ratio,
    of_peers,
    rank,
    verdict,
    worst,
)
from rnnfast.benchmark.cores import Nearness

TEMPLATE = "report.html.j2"
# Of the figures: sharp on screens with small pixels too. The page shows them as large as those of the docs.
DPI, SHOWN_DPI = 150, 100
# The order of a suite's figures.
KINDS = ("ratio", "latency", "bars", "time", "scaling")
# Columns that only cases of a service fill.
P90 = "torch.nn p90 µs/step, p90 µs/step"
# Columns that only layers with options fill.
OVER_PLAIN = "plain layer µs/step, over plain layer"
# Beyond that from the 20th to the 80th percentile, as a part of the ratio, a row is marked.
WIDE = 0.2

# What the page calls the fields of a result file; others that are there stand behind them under their own names.
FIELDS = {
    "device": "device",
    "processor": "processor",
    "cores": "logical processors",
    "system": "system",
    "rnnfast": "rnnfast",
    "commit": "commit of rnnfast",
    "torch": "PyTorch",
    "cuda": "CUDA",
    "cudnn": "cuDNN",
    "python": "Python",
}
# What differs from file to file of one run, and the rows.
NOT_OF_THE_MACHINE = ("suite", "rows", "date")


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Args:
        text: what it shows.
        value: what it is sorted by, where that is a number; None sorts last.
        kind: a class of the page's style: "number", "slower", "wrong", "noisy", "quiet", "strong"; "" for plain text.
        note: a line below the text.
    """

    text: str
    value: float | None = None
    kind: str = ""
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Heads, those of columns of numbers marked with True, and lines."""

    heads: list[tuple[str, bool]]
    lines: list[list[Cell]]

    def without(self, *heads: str) -> Table:
        """Leaves out columns."""
        kept = [place for place, (head, _) in enumerate(self.heads) if head not in heads]
        return Table([self.heads[place] for place in kept], [[line[place] for place in kept] for line in self.lines])


def number(value: float | None, form: str = ".2f", kind: str = "number") -> Cell:
    return Cell("-", None, "number") if value is None else Cell(format(value, form), value, kind)


def ratio(value: float | None) -> Cell:
    return number(value, kind="number" if value is None or value >= 1 else "number slower")


@dataclass(frozen=True)
class Machine:
    """Where result files come from.

    Args:
        fields: names and values.
        suites: those that were measured there.
        date: of the measurements, the first and the last.
        rows, noisy: how many there are, and how many are marked as noisy.
        warnings: sentences.
    """

    fields: dict[str, str]
    suites: list[str]
    date: str
    rows: int
    noisy: int
    warnings: list[str]


def by_machine(records: Sequence[Record]) -> dict[tuple[tuple[str, str], ...], list[Record]]:
    """The files of each machine, by its fields and versions."""
    found: dict[tuple[tuple[str, str], ...], list[Record]] = {}
    for record in records:
        data = record.data
        known = [(FIELDS[key], str(data[key])) for key in FIELDS if data.get(key) is not None]
        more = [(key, str(value)) for key, value in data.items() if key not in (*FIELDS, *NOT_OF_THE_MACHINE) and value]
        found.setdefault((*known, *more), []).append(record)
    return found


def dates(records: Sequence[Record]) -> str:
    """When they were measured: the first and the last date."""
    days = sorted({str(record.data.get("date", "unknown")) for record in records})
    return " to ".join(dict.fromkeys((days[0], days[-1]))).replace("T", " ").replace("Z", " UTC")


@dataclass(frozen=True)
class Origin:
    """Of the files that are compared: their folders, dates and commits."""

    folders: str
    date: str
    commits: str


def origin(records: Sequence[Record]) -> Origin:
    # As short as from here: the page may go to others.
    folders = dict.fromkeys(os.path.relpath(record.path.parent) for record in records)
    commits = dict.fromkeys(str(record.data.get("commit") or "unknown") for record in records)
    return Origin(", ".join(folders), dates(records), ", ".join(commits))


def machines(records: Sequence[Record], noise: dict[int, list[str]]) -> list[Machine]:
    """The files' machines and versions, each different one once."""
    result = []
    for fields, own in by_machine(records).items():
        rows = [row for record in own for row in record.data["rows"]]
        noisy = sum(bool(noise[id(row)]) for row in rows)
        warnings = []
        if any(str(record.data.get("commit", "")).endswith("-dirty") for record in own):
            warnings.append("The source had changes that are in no commit.")
        suites = [record.suite for record in own]
        result.append(Machine(dict(fields), suites, dates(own), len(rows), noisy, warnings))
    return result


def noise_of(records: Sequence[Record]) -> dict[int, list[str]]:
    """For each row, by its `id`, why its numbers are to be taken with care; empty where nothing speaks against them.
    Files of old versions have not all of the fields."""
    result: dict[int, list[str]] = {}
    for own in by_machine(records).values():
        rows = [row for record in own for row in record.data["rows"]]
        nearness = Nearness(patience=0.0)
        for row in rows:
            nearness.see(row.get("core_to_core_ns"))
        for row in rows:
            reasons = result[id(row)] = []
            if nearness.far(row.get("core_to_core_ns")):
                reasons.append(f"cores far apart ({row['core_to_core_ns']:.0f} ns)")
            if row.get("contended"):
                busy = row.get("others_busy")
                reasons.append(BESIDE if busy is None else f"{BESIDE} ({busy:.1f} cores)")
            if row["ratio"] is not None and row["p80"] - row["p20"] > WIDE * row["ratio"]:
                reasons.append(f"p20 to p80 is {(row['p80'] - row['p20']) / row['ratio']:.0%} of the ratio")
    return result


def heads(text: str, numbers: bool = False) -> list[tuple[str, bool]]:
    """Of a table's columns, from words with commas."""
    return [(name.strip(), numbers) for name in text.split(",")]


def summary(records: Sequence[Record]) -> Table:
    """A line for each suite, cell, type, workload and backend."""
    columns = heads("device, suite, cell, type, workload, backend") + heads(
        "rows, failed, mean ratio, worst ratio", True
    )
    columns += heads("worst case")
    lines = []
    for record in records:
        keys = groups(record.data["rows"], "cell", "dtype", "workload", "backend")
        order = (CELLS, DTYPES, WORKLOADS, ())
        for key in sorted(keys, key=lambda key: tuple(map(rank, order, key))):
            failed = [row for row in keys[key] if not row["correct"]]
            timed = [row for row in keys[key] if row["correct"] and row["ratio"] is not None]
            low = worst(timed) if timed else None
            lines.append(
                [
                    *map(Cell, (record.device, record.suite, *key)),
                    number(len(timed), "d"),
                    number(len(failed), "d", "number wrong" if failed else "number"),
                    ratio(mean_ratio(timed) if timed else None),
                    ratio(low["ratio"] if low else None),
                    Cell(low["case"] if low else "-"),
                ]
            )
    return Table(columns, lines)


def what_changed(before: Sequence[Record], now: Sequence[Record]) -> Table:
    """A line for each of `records.changes`: the page's only way to what is compared and how."""
    columns = heads("device, suite, cell, workload, backend") + heads("cases, before, now, change", True)
    columns += heads("verdict") + heads("largest change", True) + heads("its verdict, of the case")

    def said(changed: bool, loaded: bool) -> Cell:
        return Cell(verdict(changed, loaded), kind="strong" if changed else "quiet")

    def cells(change: Change) -> Iterator[Cell]:
        for text in (change.device, change.suite, change.cell, change.workload, change.backend):
            yield Cell(text or "all", kind="strong" if change.cell == "all" else "")
        yield number(change.cases, "d")
        yield ratio(change.before)
        yield ratio(change.now)
        yield number(change.now / change.before - 1, "+.1%")
        yield said(change.changed, change.loaded)
        yield number(change.factor - 1, "+.1%")
        yield said(change.most_changed, change.most_loaded)
        yield Cell(change.most)

    return Table(columns, [list(cells(change)) for change in changes(before, now)])


def all_rows(records: Sequence[Record], noise: dict[int, list[str]]) -> Table:
    """Every row of the files, also those that failed."""
    columns = heads("device, suite, case, workload, backend") + heads("ratio", True) + heads("noise, results")
    columns += heads("p20 to p80, torch.nn µs/step, µs/step", True) + heads(P90, True)
    columns += heads(OVER_PLAIN, True)
    columns += heads("limit µs/step, % of limit, peak MB, torch.nn peak MB", True)
    lines = []
    for record in records:
        for row in record.data["rows"]:
            peaks = [row.get(key) for key in ("peak_memory_bytes", "torch_peak_memory_bytes")]
            spread = Cell("-", None, "number")
            if row["ratio"] is not None:
                spread = Cell(f"{row['p20']:.2f} to {row['p80']:.2f}", row["p80"] / row["p20"], "number")
            why = row.get("failure") or "the file does not say why"
            results = Cell("agree") if row["correct"] else Cell("FAILED", None, "wrong", str(why))
            reasons = "; ".join(noise[id(row)])
            limit, time = row.get("limit_us_per_step"), row["us_per_step"]
            lines.append(
                [
                    *map(Cell, (record.device, record.suite, row["case"], row["workload"], row["backend"])),
                    ratio(row["ratio"]),
                    Cell("noisy", None, "noisy", reasons) if reasons else Cell(""),
                    results,
                    spread,
                    number(row["torch_us_per_step"]),
                    number(time),
                    *(number(row.get(key)) for key in ("torch_p90_us_per_step", "p90_us_per_step")),
                    *(number(row.get(key)) for key in ("plain_us_per_step", "over_plain")),
                    number(limit),
                    number(100 * limit / time if limit and time else None, ".0f"),
                    *(number(None if peak is None else peak / 1e6) for peak in peaks),
                ]
            )
    return Table(columns, lines)


@dataclass(frozen=True)
class Picture:
    """A figure inside the page: its PNG file as a data URI, what it shows, and its size in the page's pixels."""

    uri: str
    text: str
    width: int
    height: int


def picture(png: bytes, text: str) -> Picture:
    size = [int.from_bytes(png[at : at + 4], "big") * SHOWN_DPI // DPI for at in (16, 20)]
    return Picture("data:image/png;base64," + base64.b64encode(png).decode("ascii"), text, size[0], size[1])


@dataclass(frozen=True)
class Suite:
    """A suite's figures, and sentences about those that could not be made."""

    title: str
    pictures: list[Picture]
    lacking: list[str]


def page(records: Sequence[Record], before: Sequence[Record] | None) -> str:
    """The page.

    Args:
        records: what it is about; at least one.
        before: earlier records to compare with.
    """
    noise = noise_of(records)
    rows = [row for record in records for row in record.rows]
    own = [row for row in rows if is_ours(row["backend"]) and not is_variant(row)]
    several = len({record.device for record in records}) > 1
    needless = [] if several else ["device"]
    rows_needless = needless if any(noise.values()) else [*needless, "noise"]
    if not any(row.get("p90_us_per_step") for row in rows):
        rows_needless = [*rows_needless, *(head for head, _ in heads(P90))]
    varied = sum(map(is_variant, rows))
    if not varied:
        rows_needless = [*rows_needless, *(head for head, _ in heads(OVER_PLAIN))]
    suites = [
        Suite(
            record.suite + f" ({record.device})" * several,
            [
                picture(drawn(record, figure, DPI), described(record, figure))
                for figure in sorted(figures_of(record), key=lambda figure: KINDS.index(figure.kind))
            ],
            lacking(record),
        )
        for record in records
    ]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(TEMPLATE).render(
        devices=in_order((), [record.device for record in records]),
        machines=machines(records, noise),
        wide=WIDE,
        timed=len(rows),
        failed=sum(len(record.failures) for record in records),
        own=len(own),
        of_peers=of_peers(records),
        varied=varied,
        against_loops=AGAINST_LOOPS,
        noisy=sum(map(bool, noise.values())),
        rows_in_all=len(noise),
        faster=sum(row["ratio"] >= 1 for row in own),
        mean=mean_ratio(own) if own else None,
        worst=worst(own) if own else None,
        summary=summary(records).without(*needless),
        compared=None if before is None else (origin(before), origin(records)),
        changes=None if before is None else what_changed(before, records).without(*needless),
        suites=suites,
        plain=PLAIN_IN_WORDS,
        contradictions=contradictions(rows),
        beside=BESIDE,
        rows=all_rows(records, noise).without(*rows_needless),
    )


def publish(
    path: Path, records: Sequence[Record], before: Sequence[Record] | None, fail: Callable[[str], NoReturn]
) -> None:
    """Writes the page and says so.

    Args:
        path: of the file.
        records: of the result files that it is about.
        before: of earlier ones to compare with; None where none were asked for.
        fail: ends the program with a message that says what is wrong with its options.
    """
    if not path.parent.is_dir():
        fail(f"argument --html: expected a file in a folder that exists, got {path}: there is no {path.parent}")
    text = page(records, before)
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        fail(f"argument --html: cannot write {path}: {error.strerror}")
    print(f"written: {path} ({len(text.encode()) / 1024:.0f} KB)")

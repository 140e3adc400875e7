"""Figures from the result files, and from nothing else: `make readme-figures` calls this.

    python benchmarks/plot.py [--results FOLDER] [--out FOLDER]

For every suite that has the shapes for it:
  <device>-<suite>-ratio-<workload>-<backend>.png  heat map, H x B for each cell and type: torch.nn's time over ours
  <device>-<suite>-time-<workload>.png             microseconds a step against H, with the limit (plot_lines.py)
  <device>-<suite>-scaling.png                     microseconds a step against T and against B (plot_lines.py)
for the rows of cases with a pause or neighbours:
  <device>-<suite>-latency.png                     microseconds a step: 50th to 90th percentile (plot_service.py)
and for the others that are in no heat map:
  <device>-<suite>-bars.png                        a bar for each case and backend: torch.nn's time over ours
It says which it made of each file, and of those that it could not make which shapes they need. Each figure carries a
fingerprint of the result file that it shows (`fingerprint`), so that a test can tell a stale one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from records import (
    CELLS,
    DTYPES,
    GRAPH,
    ONE_THREAD,
    RESULTS,
    WORKLOADS,
    Record,
    Row,
    base,
    in_order,
    is_ours,
    is_served,
    is_variant,
    load_all,
    mean_ratio,
    quantizes,
)

FIGURES = RESULTS.parent.parent / "docs" / "figures"

# The key under which a figure says what it was made from.
SOURCE = "Source"

# Okabe and Ito's palette, which colour-blind readers can tell apart; and no two lines differ by colour alone.
COLOURS = {"torch.nn": "#555555", "cpu": "#d55e00", "cuda": "#d55e00", "triton": "#0072b2", "reference": "#cc79a7"}
COLOURS |= {"emulated": "#000000", "cpu-one-thread": "#0072b2"}
MARKERS = {"torch.nn": "s", "cpu": "o", "cpu-one-thread": "^", "cuda": "o", "triton": "^", "reference": "D"}
BACKENDS = ("cpu", "cpu-one-thread", "cuda", "cuda-graph", "triton", "triton-graph")
# The bars' colours of other libraries.
OTHER_COLOURS = ("#009e73", "#e69f00", "#56b4e9", "#999933")
# One layer, one direction, rows of full length; no loop of cells, no options of rnnfast's own.
PLAIN = {"layers": 1, "directions": 1, "P": 0, "packed": False, "lengths": False, "resets": 0, "cells": False}
PLAIN |= {"variant": ""}
PLAIN_IN_WORDS = "one layer, one direction, no projection, all rows of full length, no resets, no pause or neighbours, "
PLAIN_IN_WORDS += "no options beyond torch.nn's"
# So many different values make a heat map or a line.
LEAST_HIDDEN, LEAST_BATCHES, LEAST_SERIES = 3, 2, 3
# More panels side by side cannot be read in a README's width.
MOST_COLUMNS = 4
# More bars above each other are no picture. A case has one for each backend; so many cases have a place anyhow.
MOST_BARS, LEAST_CASES = 120, 10
# Cases of one backend that are read without effort.
MOST_CASES = 60


def fingerprint(record: Record) -> str:
    """What a figure of this record says that it was made from."""
    return hashlib.sha256(record.path.read_bytes()).hexdigest()[:16]


def source_of(figure: Path) -> str | None:
    """The fingerprint in a figure's file (a PNG text chunk)."""
    data, at = figure.read_bytes(), 8
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        if data[at + 4 : at + 8] == b"tEXt":
            key, _, value = data[at + 8 : at + 8 + length].partition(b"\0")
            if key == SOURCE.encode():
                return value.decode("latin-1")
        at += 12 + length
    return None


def is_plain(row: Row) -> bool:
    """Whether cell, H, B, T and type describe the row: everything else is as in `PLAIN`; earlier files lack some."""
    return all(row.get(key, value) == value for key, value in PLAIN.items()) and not is_served(row)


def plain(record: Record) -> list[Row]:
    return [row for row in record.rows if is_plain(row)]


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    result: dict[tuple[Any, ...], list[Row]] = defaultdict(list)
    for row in rows:
        result[tuple(row[key] for key in keys)].append(row)
    return result


def values(rows: Sequence[Row], key: str) -> list[int]:
    return sorted({row[key] for row in rows})


def is_grid(rows: Sequence[Row]) -> bool:
    """Whether H and B both vary, for the same cell: enough for a heat map and for lines over H."""
    return any(
        len(values(group, "H")) >= LEAST_HIDDEN and len(values(group, "B")) >= LEAST_BATCHES
        for group in groups(rows, "cell", "workload").values()
    )


def sweep(rows: Sequence[Row], over: str) -> list[Row]:
    """Of a workload's rows those of the longest series in which only `over` varies: at least three values of it. Of
    several the one with the largest layer."""
    fixed = [key for key in ("cell", "dtype", "H", "I", "T", "B") if key != over]
    candidates = groups(rows, *fixed)
    chosen = max(candidates.values(), key=lambda group: (len(values(group, over)), group[0]["H"]), default=[])
    return chosen if len(values(chosen, over)) >= LEAST_SERIES else []


def mapped_backends(rows: Sequence[Row]) -> list[str]:
    """The backends that get a heat map: each once, inside a CUDA graph where it was timed there."""
    backends = in_order(BACKENDS, [row["backend"] for row in rows])
    return [name for name in backends if name + GRAPH not in backends]


@dataclass(frozen=True)
class Figure:
    """A file that `draw` makes.

    Args:
        name: of the file.
        kind: "ratio", "time", "scaling", "latency" or "bars".
        workload: that is shown; "" for a scaling, latencies and bars, which show all.
        backend: that is shown; "" where all are.
    """

    name: str
    kind: str
    workload: str = ""
    backend: str = ""


def workloads_of(rows: Sequence[Row]) -> list[str]:
    return in_order(WORKLOADS, [row["workload"] for row in rows])


def of_workload(rows: Sequence[Row], workload: str) -> list[Row]:
    return [row for row in rows if row["workload"] == workload]


def has_series(rows: Sequence[Row]) -> bool:
    return any(sweep(rows, over) for over in "TB")


def unmapped(record: Record) -> list[Row]:
    """The rows that no heat map shows, nor a figure of latencies: those of the bars."""
    rows = plain(record)
    mapped = {workload for workload in workloads_of(rows) if is_grid(of_workload(rows, workload))}
    return [row for row in record.rows if not (is_served(row) or (is_plain(row) and row["workload"] in mapped))]


def has_curves(rows: Sequence[Row]) -> bool:
    """Whether most of the curves of time against H would have more than one point."""
    curves = groups(rows, "cell", "B", "dtype").values()
    return 2 * sum(len(values(curve, "H")) > 1 for curve in curves) >= len(curves)


def figures_of(record: Record) -> list[Figure]:
    """The figures that `draw` makes of this record."""
    rows, figures = plain(record), []
    if quantizes(record):
        return []
    stem = f"{record.device}-{record.suite}"
    for workload in workloads_of(rows):
        own = of_workload(rows, workload)
        if is_grid(own):
            names = mapped_backends(own)
            figures += [Figure(f"{stem}-ratio-{workload}-{name}.png", "ratio", workload, name) for name in names]
            if has_curves(own):
                figures.append(Figure(f"{stem}-time-{workload}.png", "time", workload))
    if any(has_series(of_workload(rows, workload)) for workload in workloads_of(rows)):
        figures.append(Figure(f"{stem}-scaling.png", "scaling"))
    if any(map(is_served, record.rows)):
        figures.append(Figure(f"{stem}-latency.png", "latency"))
    if unmapped(record):
        figures.append(Figure(f"{stem}-bars.png", "bars"))
    return figures


def lacking(record: Record) -> list[str]:
    """Sentences: which figures cannot be made of this record, and which shapes they would need."""
    if not record.rows:
        return ["no figure: none of its rows was timed"]
    rows, sentences = plain(record), []
    without = [workload for workload in workloads_of(record.rows) if not is_grid(of_workload(rows, workload))]
    if without:
        seen = [
            (len(values(group, "H")), len(values(group, "B")), cell)
            for (cell, workload), group in groups(rows, "cell", "workload").items()
            if workload in without
        ]
        here = "no plain layer"
        if seen:
            hidden, batches, cell = max(seen)
            here = f"at most {hidden} and {batches} ({cell})"
        sentences.append(
            f"no heat map and no time against H of {', '.join(without)}: they need at least {LEAST_HIDDEN} hidden "
            f"sizes and {LEAST_BATCHES} batch sizes of one cell among plain layers; here: {here}"
        )
    without = [workload for workload in workloads_of(record.rows) if not has_series(of_workload(rows, workload))]
    if without:
        sentences.append(
            f"no scaling of {', '.join(without)}: it needs at least {LEAST_SERIES} values of T or of B among plain "
            "layers that are alike in all else"
        )
    return sentences


def described(record: Record, figure: Figure) -> str:
    """What the figure shows, for who does not see it."""
    what = {
        "ratio": "heat map of the ratios over H and B",
        "time": "time of a step against H",
        "scaling": "time of a step against T or B",
        "latency": "times of single calls with pauses or beside neighbours",
        "bars": "bars of the ratio of each case",
    }
    words = [what[figure.kind], figure.workload, f"suite {record.suite}", record.device]
    if figure.backend != record.device:
        words.append(figure.backend)
    return ", ".join(filter(None, words))


def caption(record: Record) -> str:
    data = record.data
    return f"{data['device']}, torch {data['torch']}, {data['date'][:10]}, commit {data['commit']}"


# ---- drawing --------------------------------------------------------------------------------------------------------


def import_pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.titlesize": 9, "axes.grid": False, "savefig.facecolor": "white"})
    return plt


def rendered(figure: Any, record: Record, dpi: int = 100) -> bytes:
    """The figure as a PNG file with its caption and its `SOURCE`; closes it."""
    return encoded(figure, caption(record), fingerprint(record), dpi)


def encoded(figure: Any, caption: str, source: str, dpi: int = 100) -> bytes:
    """The same of what is no result file's."""
    from PIL import Image, PngImagePlugin  # a part of matplotlib's installation

    figure.supxlabel(caption, fontsize=7, color="#555555")
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=dpi)
    import_pyplot().close(figure)
    # A palette is enough, and a third of the size.
    note = PngImagePlugin.PngInfo()
    note.add_text(SOURCE, source)
    small = io.BytesIO()
    picture = Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE)
    picture.save(small, "PNG", optimize=True, pnginfo=note)
    return small.getvalue()


def panels(count: int) -> tuple[int, int]:
    columns = min(count, MOST_COLUMNS)
    return math.ceil(count / columns), columns


def ratio_map(record: Record, workload: str, backend: str) -> Any:
    """A line of panels for each type, the cells side by side; a square is the geometric mean over what else varies."""
    plt = import_pyplot()
    from matplotlib.colors import Normalize

    rows = [row for row in plain(record) if (row["workload"], row["backend"]) == (workload, backend)]
    by_panel = groups(rows, "dtype", "cell")
    dtypes = in_order(DTYPES, [row["dtype"] for row in rows])
    cells = in_order(CELLS, [row["cell"] for row in rows])
    lines, columns = len(dtypes), len(cells)
    heights, widths = values(rows, "H"), values(rows, "B")
    size = (max(1.2 + columns * (0.55 * len(widths) + 0.9), 5.5), 1.2 + lines * (0.3 * len(heights) + 0.75))
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    # Symmetric about 1 in the logarithm; beyond 8 times the colour says no more.
    norm = Normalize(-3, 3)
    colours = plt.get_cmap("PuOr", 25)
    for axis, key in zip(axes.flat, product(dtypes, cells), strict=True):
        squares = groups(by_panel[key], "H", "B")
        picture = [
            [math.log2(mean_ratio(squares[h, b])) if (h, b) in squares else math.nan for b in widths] for h in heights
        ]
        axis.imshow(picture, cmap=colours, norm=norm, aspect="auto", origin="lower")
        for y, line in enumerate(picture):
            for x, value in enumerate(line):
                if not math.isnan(value):
                    ratio = 2**value
                    text = f"{ratio:.2f}" if ratio < 9.95 else f"{ratio:.0f}"
                    axis.text(x, y, text, ha="center", va="center", color="white" if abs(value) > 1.9 else "black")
        axis.set_xticks(range(len(widths)), widths)
        axis.set_yticks(range(len(heights)), heights)
        axis.set_xlabel("batch size B")
        axis.set_ylabel("hidden size H")
        axis.set_title(f"{key[1]}, {key[0]}")
    picture = plt.cm.ScalarMappable(norm, colours)
    bar = figure.colorbar(picture, ax=axes, ticks=[-3, -2, -1, 0, 1, 2, 3], shrink=0.9)
    bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    where = f"backend {backend.removesuffix(GRAPH)}" + ", both in CUDA graphs" * backend.endswith(GRAPH)
    name = "rnnfast" if is_ours(backend) else backend
    title = f"torch.nn's time / {name}'s: {workload}, {where}, suite {record.suite}\nabove 1 {name} is faster"
    figure.suptitle(title, fontsize=11)
    return figure


def lines_of(rows: Sequence[Row], over: str) -> Iterator[tuple[str, list[int], list[float], dict[str, Any]]]:
    """(label, xs, ys, style) of torch.nn, of each backend and of the limit."""

    def series(rows: Sequence[Row], key: str) -> tuple[list[int], list[float]]:
        points = sorted((row[over], row[key]) for row in rows if row.get(key) is not None)
        return [x for x, _ in points], [y for _, y in points]

    backends = in_order(BACKENDS, [row["backend"] for row in rows])
    against: dict[str, list[Row]] = {}
    for backend in backends:
        own = [row for row in rows if row["backend"] == backend]
        against.setdefault("torch-graph" if "graph" in (own[0].get("against") or "") else "torch", own)
    for name, own in against.items():
        label = "torch.nn" + (" in a CUDA graph" if name.endswith(GRAPH) else "")
        style: dict[str, Any] = {"color": COLOURS["torch.nn"], "marker": MARKERS["torch.nn"], "linestyle": "--"}
        if name.endswith(GRAPH):
            style |= {"markerfacecolor": "white", "linestyle": (0, (4, 1, 1, 1))}
        yield label, *series(own, "torch_us_per_step"), style
    for backend, (label, colour, hollow) in looks(backends).items():
        style = {"color": colour, "marker": MARKERS.get(backend.removesuffix(GRAPH), "v"), "linestyle": "-"}
        if hollow:
            style |= {"markerfacecolor": "white", "linestyle": (0, (4, 1, 1, 1))}
        yield label, *series([row for row in rows if row["backend"] == backend], "us_per_step"), style
    xs, ys = series([row for row in rows if row["backend"] == backends[0]], "limit_us_per_step")
    if xs:
        yield "limit (see docs/performance.md)", xs, ys, {"color": "black", "linestyle": ":", "linewidth": 1}


def legend(figure: Any, axes: Sequence[Any], title: str) -> None:
    """One for all panels, under the figure's title."""
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    drawn = figure.legend(
        found.values(),
        found.keys(),
        title=title,
        title_fontsize=11,
        loc="outside upper center",
        ncols=min(3, len(found)),
        frameon=False,
    )
    drawn.get_title().set_multialignment("center")


def shown_cases(rows: Sequence[Row]) -> tuple[list[str], int]:
    """The cases that the bars show, in the suite's order, and how many they leave out: the highest ratios."""
    backends = {row["backend"] for row in rows}
    most = min(MOST_CASES, max(LEAST_CASES, MOST_BARS // len(backends)))
    lowest = {case: min(row["ratio"] for row in group) for (case,), group in groups(rows, "case").items()}
    kept = set(sorted(lowest, key=lambda case: lowest[case])[:most])
    return [case for case in lowest if case in kept], len(lowest) - len(kept)


def looks(backends: Sequence[str]) -> dict[str, tuple[str, str, bool]]:
    """Each backend's name in a legend, its colour, and whether it was timed in a CUDA graph: hollow then."""
    others = in_order((), [name for name in backends if not is_ours(name)])
    found = {}
    for name in backends:
        eager, graph, single = name.removesuffix(GRAPH), name.endswith(GRAPH), name.endswith(ONE_THREAD)
        if is_ours(name):
            colour = COLOURS.get(eager, COLOURS[base(name)])
        else:
            colour = OTHER_COLOURS[others.index(name) % len(OTHER_COLOURS)]
        how = " in a CUDA graph" * graph + ", one thread" * single
        found[name] = ("rnnfast, " * is_ours(name) + base(name) + how, colour, graph)
    return found


def bars_figure(record: Record) -> Any:
    """A panel for each workload, the cases one below the other; from p20 to p80 a whisker."""
    plt = import_pyplot()
    rows = unmapped(record)
    cases, omitted = shown_cases(rows)
    rows = [row for row in rows if row["case"] in cases]
    varied = sum(map(is_variant, rows))
    against = "torch.nn" if not varied else "a PyTorch loop" if varied == len(rows) else "torch.nn or a PyTorch loop"
    workloads = workloads_of(rows)
    backends = in_order(BACKENDS, [row["backend"] for row in rows])
    styles = {
        name: {"facecolor": "white" if hollow else colour, "edgecolor": colour, "label": label}
        for name, (label, colour, hollow) in looks(backends).items()
    }
    # Inches: a letter of a case's name, a bar, the gap between cases.
    letter, thick, gap = 0.066, 0.17, 0.08 if len(backends) == 1 else 0.16
    labels = letter * max(map(len, cases))
    size = (max(labels + 0.6 + 2.8 * len(workloads), 5.5), 1.7 + (thick * len(backends) + gap) * len(cases))
    figure, axes = plt.subplots(1, len(workloads), figsize=size, squeeze=False, layout="constrained", sharey=True)
    # Some room beside the bars for their numbers, and 1/2 and 2 always in sight.
    low = math.log2(min(0.5, *(row["p20"] for row in rows)))
    high = math.log2(max(2, *(row["p80"] for row in rows)))
    room = max(0.3, 0.15 * (high - low))
    powers = range(math.ceil(low - room), math.floor(high + room) + 1)
    ticks = [2.0**power for power in powers if power % (1 + len(powers) // 8) == 0]
    height = thick / (thick * len(backends) + gap)
    for axis, workload in zip(axes.flat, workloads, strict=True):
        for number, backend in enumerate(backends):
            own = [row for row in of_workload(rows, workload) if row["backend"] == backend]
            places = [cases.index(row["case"]) + height * (number - (len(backends) - 1) / 2) for row in own]
            widths = [row["ratio"] - 1 for row in own]
            axis.barh(places, widths, 0.9 * height, left=1, linewidth=0.8, **styles[backend])
            for place, row in zip(places, own, strict=True):
                axis.plot(
                    [row["p20"], row["p80"]], [place, place], color="black", linewidth=0.8, marker="|", markersize=4
                )
                ahead = row["ratio"] >= 1
                at = max(row["p80"], 1) * 1.06 if ahead else min(row["p20"], 1) / 1.06
                text = f"{row['ratio']:.2f}"
                axis.text(at, place, text, ha="left" if ahead else "right", va="center_baseline", fontsize=7)
        for place in range(1, len(cases), 2):
            axis.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
        axis.axvline(1, color="black", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_xlim(2 ** (low - room), 2 ** (high + room))
        axis.set_xticks(ticks, [f"{tick:g}" if tick >= 1 else f"1/{1 / tick:g}" for tick in ticks])
        axis.minorticks_off()
        axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        axis.set_title(workload)
        axis.set_xlabel(f"times as fast as {against}")
    # A name is no formula.
    axes[0][0].set_yticks(range(len(cases)), cases, fontsize=8, parse_math=False)
    axes[0][0].set_ylim(len(cases) - 0.5, -0.5)
    title = f"Ratio of each case, suite {record.suite}: above 1 faster than {against}\n"
    title += "whisker: 20th to 80th percentile"
    if omitted:
        title += f"\n{omitted} of {omitted + len(cases)} cases are left out, those with the highest ratios"
    legend(figure, list(axes.flat), title)
    return figure


def drawn(record: Record, figure: Figure, dpi: int = 100) -> bytes:
    """One of `figures_of` the record as a PNG file."""
    if figure.kind == "ratio":
        picture = ratio_map(record, figure.workload, figure.backend)
    elif figure.kind in ("time", "scaling"):
        import plot_lines  # which draws with what stands here

        time = figure.kind == "time"
        picture = plot_lines.time_figure(record, figure.workload) if time else plot_lines.scaling_figure(record)
    elif figure.kind == "latency":
        import plot_service  # as that does

        picture = plot_service.latency_figure(record)
    else:
        picture = bars_figure(record)
    return rendered(picture, record, dpi)


def draw(record: Record, out: Path) -> list[Path]:
    """Draws every figure of the record into the folder."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for figure in figures_of(record):
        paths.append(out / figure.name)
        paths[-1].write_bytes(drawn(record, figure))
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument(
        "--out", type=Path, help="folder of the figures (default docs/figures; of other results FOLDER/figures)"
    )
    options = parser.parse_args()
    if options.out is None:
        # The pages' figures are of the repository's own results.
        options.out = FIGURES if options.results.resolve() == RESULTS else options.results / "figures"
    if not options.results.is_dir():
        parser.error(f"argument --results: expected a folder of result files, got {options.results}, which is none")
    try:
        records = load_all(options.results)
    except (OSError, ValueError) as error:
        parser.error(f"argument --results: cannot read the result files in {options.results}: {error}")
    if not records:
        parser.error(f"argument --results: no result file of a suite (*.json from run.py) in {options.results}")
    made: list[Path] = []
    for record in records:
        print(f"{record.path.name}: suite {record.suite}, {len(record.rows)} rows timed")
        try:
            paths = draw(record, options.out)
        except OSError as error:
            parser.error(f"argument --out: cannot write into {options.out}: {error.strerror}")
        for path, figure in zip(paths, figures_of(record), strict=True):
            print(f"  written: {path} ({path.stat().st_size / 1024:.0f} KB): {described(record, figure)}")
        for sentence in lacking(record):
            print(f"  {sentence}")
        made += paths
    if any(map(lacking, records)):
        print(f"plain layers have {PLAIN_IN_WORDS}")
    # Other results have no say in which figures the pages show.
    if (options.out, options.results) == (FIGURES, RESULTS):
        for path in set(FIGURES.glob("*.png")) - set(made):
            path.unlink()
            print(f"removed: {path} (nothing in the results makes it any more)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

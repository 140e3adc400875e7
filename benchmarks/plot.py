"""Figures from the result files, and from nothing else: `make readme-figures` calls this.

    python benchmarks/plot.py [--results FOLDER] [--out FOLDER]

For every suite that has the shapes for it:
  <device>-<suite>-ratio-<workload>-<backend>.png  heat map, H x B for each cell and type: torch.nn's time over ours
  <device>-<suite>-time-<workload>.png             microseconds a step against H, with the limit
  <device>-<suite>-scaling.png                     microseconds a step against T and against B
Each file carries a fingerprint of the result file that it shows (`fingerprint`), so that a test can tell a stale one.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import struct
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from records import CELLS, DTYPES, RESULTS, WORKLOADS, Record, Row, in_order, load_all, mean_ratio

FIGURES = RESULTS.parent.parent / "docs" / "figures"

# The key under which a figure says what it was made from.
SOURCE = "Source"

# Okabe and Ito's palette, which colour-blind readers can tell apart; and no two lines differ by colour alone.
COLOURS = {"torch.nn": "#555555", "cpu": "#d55e00", "cuda": "#d55e00", "triton": "#0072b2", "reference": "#cc79a7"}
MARKERS = {"torch.nn": "s", "cpu": "o", "cuda": "o", "triton": "^", "reference": "D"}
BACKENDS = ("cpu", "cuda", "cuda-graph", "triton", "triton-graph")
GRAPH = "-graph"
# One layer, one direction, rows of full length.
PLAIN = {"layers": 1, "directions": 1, "P": 0, "packed": False, "lengths": False, "resets": 0}
# More panels side by side cannot be read in a README's width.
MOST_COLUMNS = 4


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


def plain(record: Record) -> list[Row]:
    """The rows that their cell, H, B, T and type describe: everything else is as in `PLAIN`."""
    return [row for row in record.rows if all(row[key] == value for key, value in PLAIN.items())]


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
        len(values(group, "H")) >= 3 and len(values(group, "B")) >= 2
        for group in groups(rows, "cell", "workload").values()
    )


def sweep(rows: Sequence[Row], over: str) -> list[Row]:
    """Of a workload's rows those of the longest series in which only `over` varies: at least three values of it. Of
    several the one with the largest layer."""
    fixed = [key for key in ("cell", "dtype", "H", "I", "T", "B") if key != over]
    candidates = groups(rows, *fixed)
    chosen = max(candidates.values(), key=lambda group: (len(values(group, over)), group[0]["H"]), default=[])
    return chosen if len(values(chosen, over)) >= 3 else []


def mapped_backends(rows: Sequence[Row]) -> list[str]:
    """The backends that get a heat map: each once, inside a CUDA graph where it was timed there."""
    backends = in_order(BACKENDS, [row["backend"] for row in rows])
    return [name for name in backends if name + GRAPH not in backends]


@dataclass(frozen=True)
class Figure:
    """A file that `draw` makes.

    Args:
        name: of the file.
        kind: "ratio", "time" or "scaling".
        workload: that is shown; "" for a scaling.
        backend: that is shown; "" where all are.
    """

    name: str
    kind: str
    workload: str = ""
    backend: str = ""


def figures_of(record: Record) -> list[Figure]:
    """The figures that `draw` makes of this record."""
    rows, figures = plain(record), []
    workloads = in_order(WORKLOADS, [row["workload"] for row in rows])
    stem = f"{record.device}-{record.suite}"
    for workload in workloads:
        own = [row for row in rows if row["workload"] == workload]
        if is_grid(own):
            for backend in mapped_backends(own):
                figures.append(Figure(f"{stem}-ratio-{workload}-{backend}.png", "ratio", workload, backend))
            figures.append(Figure(f"{stem}-time-{workload}.png", "time", workload))
    if any(
        sweep([row for row in rows if row["workload"] == workload], over) for workload in workloads for over in "TB"
    ):
        figures.append(Figure(f"{stem}-scaling.png", "scaling"))
    return figures


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


def save(figure: Any, path: Path, record: Record) -> None:
    from PIL import Image, PngImagePlugin  # a part of matplotlib's installation

    figure.supxlabel(caption(record), fontsize=7, color="#555555")
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=100)
    import_pyplot().close(figure)
    # A palette is enough, and a third of the size.
    note = PngImagePlugin.PngInfo()
    note.add_text(SOURCE, fingerprint(record))
    Image.open(drawn).convert("RGB").quantize(128, method=Image.Quantize.MAXCOVERAGE).save(
        path, optimize=True, pnginfo=note
    )


def panels(count: int) -> tuple[int, int]:
    columns = min(count, MOST_COLUMNS)
    return math.ceil(count / columns), columns


def ratio_map(record: Record, workload: str, backend: str, path: Path) -> None:
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
    title = f"torch.nn's time / rnnfast's: {workload}, {where}, suite {record.suite}\nabove 1 rnnfast is faster"
    figure.suptitle(title, fontsize=11)
    save(figure, path, record)


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
    for backend in backends:
        base = backend.removesuffix(GRAPH)
        style = {"color": COLOURS.get(base, "#009e73"), "marker": MARKERS.get(base, "v"), "linestyle": "-"}
        label = f"rnnfast, {base}"
        if backend.endswith(GRAPH):
            style |= {"markerfacecolor": "white", "linestyle": (0, (4, 1, 1, 1))}
            label += " in a CUDA graph"
        yield label, *series([row for row in rows if row["backend"] == backend], "us_per_step"), style
    xs, ys = series([row for row in rows if row["backend"] == backends[0]], "limit_us_per_step")
    if xs:
        yield "limit (see docs/performance.md)", xs, ys, {"color": "black", "linestyle": ":", "linewidth": 1}


def draw_lines(axis: Any, rows: Sequence[Row], over: str, title: str) -> None:
    from matplotlib.ticker import LogLocator

    for label, xs, ys, style in lines_of(rows, over):
        axis.plot(xs, ys, label=label, markersize=4, **{"linewidth": 1.3, **style})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    ticks = values(rows, over)
    axis.set_xticks(ticks, ticks, fontsize=7, rotation=90 if len(ticks) > 7 else 0)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.minorticks_off()
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axis.grid(True, which="major", color="#dddddd", linewidth=0.6)
    axis.set_title(title)


def legend(figure: Any, axes: Sequence[Any], title: str) -> None:
    """One for all panels, under the figure's title."""
    found = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        found.values(),
        found.keys(),
        title=title,
        title_fontsize=11,
        loc="outside upper center",
        ncols=min(3, len(found)),
        frameon=False,
    )


def most_common(rows: Sequence[Row], key: str) -> Any:
    return Counter(row[key] for row in rows).most_common(1)[0][0]


def time_figure(record: Record, workload: str, path: Path) -> None:
    """A line of panels for each cell: batch sizes side by side, time against H. Of several types, 16 bits."""
    plt = import_pyplot()
    rows = [row for row in plain(record) if row["workload"] == workload]
    dtypes = in_order(("bfloat16", "float16", "float32"), [row["dtype"] for row in rows])
    rows = [row for row in rows if row["dtype"] == dtypes[0]]
    rows = [row for row in rows if row["T"] == most_common(rows, "T")]
    batches = values(rows, "B")
    if len(batches) > MOST_COLUMNS:
        # Evenly, with the smallest and the largest.
        batches = [batches[round(i * (len(batches) - 1) / (MOST_COLUMNS - 1))] for i in range(MOST_COLUMNS)]
    cells = in_order(CELLS, [row["cell"] for row in rows])
    size = (1 + 2.6 * len(batches), 1.2 + 2.1 * len(cells))
    figure, axes = plt.subplots(
        len(cells), len(batches), figsize=size, squeeze=False, layout="constrained", sharex=True, sharey="row"
    )
    for line, cell in zip(axes, cells, strict=True):
        for axis, batch in zip(line, batches, strict=True):
            own = [row for row in rows if (row["cell"], row["B"]) == (cell, batch)]
            if own:
                draw_lines(axis, own, "H", f"{cell}, B = {batch}")
        line[0].set_ylabel("µs a step")
    for axis in axes[-1]:
        axis.set_xlabel("hidden size H")
    title = f"Time a step, {workload}, {dtypes[0]}, T = {most_common(rows, 'T')}, suite {record.suite}"
    legend(figure, list(axes.flat), title)
    save(figure, path, record)


def scaling_figure(record: Record, path: Path) -> None:
    """Panels of the longest series over T and over B, for each workload."""
    plt = import_pyplot()
    rows = plain(record)
    drawn = []
    for workload in in_order(WORKLOADS, [row["workload"] for row in rows]):
        for over in "TB":
            series = sweep([row for row in rows if row["workload"] == workload], over)
            if series:
                drawn.append((workload, over, series))
    lines, columns = panels(len(drawn))
    size = (max(1 + 2.8 * columns, 5.5), 1.4 + 2.3 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis in axes.flat[len(drawn) :]:
        axis.set_visible(False)
    for axis, (workload, over, series) in zip(axes.flat, drawn, strict=False):
        first = series[0]
        other = "B" if over == "T" else "T"
        title = f"{workload}: {first['cell']} {first['dtype']}\nH = {first['H']}, {other} = {first[other]}"
        draw_lines(axis, series, over, title)
        axis.set_xlabel({"T": "steps T", "B": "batch size B"}[over])
        axis.set_ylabel("µs a step")
    legend(figure, list(axes.flat), f"Scaling, suite {record.suite}")
    save(figure, path, record)


def draw(record: Record, out: Path) -> list[Path]:
    """Draws every figure of the record into the folder."""
    paths = []
    for figure in figures_of(record):
        path = out / figure.name
        if figure.kind == "ratio":
            ratio_map(record, figure.workload, figure.backend, path)
        elif figure.kind == "time":
            time_figure(record, figure.workload, path)
        else:
            scaling_figure(record, path)
        paths.append(path)
    return paths


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the result files")
    parser.add_argument("--out", type=Path, default=FIGURES, help="folder of the figures (default docs/figures)")
    options = parser.parse_args()
    drawn = [path for record in load_all(options.results) for path in draw(record, options.out)]
    if options.out == FIGURES:
        for path in set(FIGURES.glob("*.png")) - set(drawn):
            path.unlink()
            print(f"removed: {path} (nothing in the results makes it any more)")
    for path in drawn:
        print(f"written: {path} ({path.stat().st_size >> 10} KB)")
    if not drawn:
        print(f"no result file in {options.results} has the shapes for a figure")
    return 0


if __name__ == "__main__":
    sys.exit(main())

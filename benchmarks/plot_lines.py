"""The figures with lines: the time of a step against H, and against T and B."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from plot import (
    CELLS,
    MOST_COLUMNS,
    import_pyplot,
    in_order,
    legend,
    lines_of,
    of_workload,
    panels,
    plain,
    sweep,
    values,
    workloads_of,
)
from records import Record, Row


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


def most_common(rows: Sequence[Row], key: str) -> Any:
    return Counter(row[key] for row in rows).most_common(1)[0][0]


def time_figure(record: Record, workload: str) -> Any:
    """A line of panels for each cell: batch sizes side by side, time against H. Of several types, 16 bits."""
    plt = import_pyplot()
    rows = of_workload(plain(record), workload)
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
    return figure


def scaling_figure(record: Record) -> Any:
    """Panels of the longest series over T and over B, for each workload."""
    plt = import_pyplot()
    rows = plain(record)
    drawn = []
    for workload in workloads_of(rows):
        for over in "TB":
            series = sweep(of_workload(rows, workload), over)
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
    return figure

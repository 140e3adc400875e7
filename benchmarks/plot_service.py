"""The figure of a service's cases: how long single calls take with pauses between them, or beside neighbours."""

from __future__ import annotations

from typing import Any

from plot import (
    BACKENDS,
    COLOURS,
    MARKERS,
    WORKLOADS,
    groups,
    import_pyplot,
    in_order,
    legend,
    looks,
    of_workload,
    panels,
    workloads_of,
)
from records import Record, condition, in_conditions, is_served, shape_of

# More panels are no picture.
MOST_PANELS = 16


def latency_figure(record: Record) -> Any:
    """A panel for each shape and workload, a line for each condition: of every side the 50th percentile, and a whisker
    to the 90th."""
    plt = import_pyplot()
    from matplotlib.ticker import LogLocator, NullLocator

    rows = [{**row, "shape": shape_of(row)} for row in record.rows if is_served(row)]
    several = len(workloads_of(rows)) > 1
    by_panel = [
        (f"{shape}, {workload}" if several else shape, group)
        for workload in in_order(WORKLOADS, [row["workload"] for row in rows])
        for (shape,), group in groups(of_workload(rows, workload), "shape").items()
    ]
    conditions = in_conditions(rows)
    backends = in_order(BACKENDS, [row["backend"] for row in rows])
    # torch.nn's times are in every row.
    sides = {"torch.nn": ("torch.nn", COLOURS["torch.nn"], "torch_")}
    sides |= {name: (label, colour, "") for name, (label, colour, _) in looks(backends).items()}
    lines, columns = panels(min(len(by_panel), MOST_PANELS))
    height = 0.13 * len(sides) + 0.12
    size = (max(1.4 + 2.7 * columns, 5.5), 1.3 + lines * (0.65 + height * len(conditions)))
    figure, axes = plt.subplots(
        lines, columns, figsize=size, squeeze=False, layout="constrained", sharex=True, sharey=True
    )
    for axis in axes.flat[len(by_panel) :]:
        axis.set_visible(False)
    for axis, (title, own) in zip(axes.flat, by_panel, strict=False):
        for number, (name, (label, colour, prefix)) in enumerate(sides.items()):
            of_side = groups([row for row in own if name in ("torch.nn", row["backend"])], "case").values()
            shown = [group[0] for group in of_side]
            places = [conditions.index(condition(row)) + 0.8 * ((number + 0.5) / len(sides) - 0.5) for row in shown]
            middle, far = ([row[f"{prefix}{each}_us_per_step"] for row in shown] for each in ("p50", "p90"))
            axis.hlines(places, middle, far, color=colour, linewidth=1)
            axis.plot(far, places, color=colour, marker="|", markersize=5, linestyle="none")
            marker = MARKERS.get(name, "v")
            axis.plot(middle, places, color=colour, marker=marker, markersize=4, linestyle="none", label=label)
        for place in range(1, len(conditions), 2):
            axis.axhspan(place - 0.5, place + 0.5, color="#f3f3f3", zorder=0)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.tick_params(axis="x", labelsize=7, rotation=90)
        axis.grid(True, axis="x", color="#dddddd", linewidth=0.6)
        axis.set_axisbelow(True)
        # A name is no formula.
        axis.set_title(title, parse_math=False)
        axis.tick_params(axis="y", labelsize=8)
    axes[0][0].set_yticks(range(len(conditions)), conditions)
    axes[0][0].set_ylim(len(conditions) - 0.5, -0.5)
    for axis in axes[-1]:
        axis.set_xlabel("µs a step")
    title = f"Single calls, suite {record.suite}: median and, at the whisker's end, 90th percentile"
    if len(by_panel) > MOST_PANELS:
        title += f"\nof {len(by_panel)} shapes the first {MOST_PANELS}"
    legend(figure, list(axes.flat), title)
    return figure

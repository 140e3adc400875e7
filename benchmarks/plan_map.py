"""What the plan of the CUDA kernels chooses over 2,000 shapes, as pictures: predicted by csrc/cuda/plan.h.

    python benchmarks/plan_map.py                        # those of docs/predicted.md, into docs/figures/plan
    python benchmarks/plan_map.py --card h100 --cell GRU --type tf32 --out out    # one of one's own
    python benchmarks/plan_map.py --csv out/plans.csv    # every card, cell, type and pass as a table

A row of panels is a card, a cell, a type and a pass, over H and B: which kernels are chosen, what a step should take,
and cuDNN's time, known or estimated (cudnn_estimate.py), over that.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import itertools
import math
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from card_model import CARDS
from cudnn_estimate import Estimate, estimate
from plan_cliffs import BATCHES, HIDDEN_SIZES, STEPS, Case, cases, plans
from plot import FIGURES, encoded, import_pyplot

FOLDER = FIGURES / "plan"
CELLS = ("LSTM", "GRU")
TYPES = ("bfloat16", "float16", "tf32", "float32")
# Colours of the plans, of Okabe and Ito's palette; a name that is not here is grey.
PLAN_COLOURS = {
    "block": "#56b4e9", "cluster": "#009e73", "grid": "#0072b2", "grid-barrier": "#cc79a7", "step": "#d55e00",
    "split": "#e69f00",
}  # fmt: skip
UNKNOWN = "#999999"
# Where the axes have their numbers.
TICKS_H = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
TICKS_B = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
# Microseconds at the ends of the colours, and how many times faster or slower.
US_FROM, US_TO, RATIO_TO = 0.5, 512, 8


class Picture(NamedTuple):
    """A file: its name without ending, and what its rows of panels are."""

    name: str
    rows: tuple[Case, ...]


def both_passes(card: str, mode: str, arithmetic: str) -> tuple[Case, ...]:
    return tuple(Case(CARDS[card], mode, arithmetic, backward) for backward in (False, True))


def forward(card: str, mode: str, arithmetic: str) -> Case:
    return both_passes(card, mode, arithmetic)[0]


# What the pages show: a card each, what other types and cells change, and the slices of one.
PICTURES = (
    *(Picture(card, both_passes(card, "LSTM", "bfloat16")) for card in ("a100", "h100", "rtx-4090", "b200")),
    Picture("h100-slices", tuple(forward(f"h100-{part}", "LSTM", "bfloat16") for part in ("1g", "2g", "3g"))),
    Picture(
        "h100-types",
        (
            *(forward("h100", "LSTM", arithmetic) for arithmetic in ("float16", "tf32", "float32")),
            forward("h100", "GRU", "bfloat16"),
        ),
    ),
)


@functools.lru_cache(maxsize=64)
def estimates(case: Case) -> dict[tuple[int, int], Estimate]:
    """cuDNN over the grid."""
    return {
        shape: estimate(case.card, case.mode, case.arithmetic, *shape, case.backward)
        for shape in itertools.product(HIDDEN_SIZES, BATCHES)
    }


def fingerprint(picture: Picture) -> str:
    """Of all that the picture shows, so that a test can tell a stale one."""
    text = []
    for case in picture.rows:
        cudnn = estimates(case)
        text += [f"{case} {plan.name} {plan.predicted_us:.4g} {cudnn[at].us:.4g}" for at, plan in plans(case).items()]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()[:16]


# ---- drawing --------------------------------------------------------------------------------------------------------


def grid_of(values: dict[tuple[int, int], float]) -> list[list[float]]:
    return [[values[hidden, batch] for batch in BATCHES] for hidden in HIDDEN_SIZES]


def axes_of(axis: Any, title: str) -> None:
    axis.set_xticks([BATCHES.index(batch) for batch in TICKS_B], TICKS_B, fontsize=7)
    axis.set_yticks([HIDDEN_SIZES.index(hidden) for hidden in TICKS_H], TICKS_H, fontsize=7)
    axis.set_xlabel("batch size B")
    axis.set_ylabel("hidden size H")
    axis.set_title(title, fontsize=8)


def draw_families(axis: Any, case: Case, names: list[str]) -> None:
    from matplotlib.colors import ListedColormap

    found = plans(case)
    values = grid_of({shape: float(names.index(plan.name)) for shape, plan in found.items()})
    colours = ListedColormap([PLAN_COLOURS.get(name, UNKNOWN) for name in names])
    axis.imshow(values, cmap=colours, vmin=-0.5, vmax=len(names) - 0.5, aspect="auto", origin="lower")
    axes_of(axis, f"{case}: plan")


def draw_times(axis: Any, case: Case) -> Any:
    from matplotlib.colors import LogNorm

    values = grid_of({shape: plan.predicted_us for shape, plan in plans(case).items()})
    image = axis.imshow(
        values, cmap="viridis", norm=LogNorm(US_FROM, US_TO, clip=True), aspect="auto", origin="lower"
    )  # fmt: skip
    axes_of(axis, "predicted us a step")
    return image


def draw_ratios(axis: Any, case: Case) -> Any:
    from matplotlib.colors import Normalize

    found, cudnn = plans(case), estimates(case)
    values = grid_of({shape: math.log2(cudnn[shape].us / plan.predicted_us) for shape, plan in found.items()})
    most = math.log2(RATIO_TO)
    # 24 colours, so that 1 lies between two of them.
    colours = import_pyplot().get_cmap("PuOr", 24)
    image = axis.imshow(values, cmap=colours, norm=Normalize(-most, most, clip=True), aspect="auto", origin="lower")
    for (hidden, batch), each in cudnn.items():
        if each.known:
            axis.plot(BATCHES.index(batch), HIDDEN_SIZES.index(hidden), marker="x", color="black", markersize=6)
    axes_of(axis, "cuDNN's time, estimated / predicted")
    return image


def drawn(picture: Picture, dpi: int = 100) -> bytes:
    """The picture as a PNG file."""
    from matplotlib.patches import Patch

    plt = import_pyplot()
    present = {plan.name for case in picture.rows for plan in plans(case).values()}
    names = [*(name for name in PLAN_COLOURS if name in present), *sorted(present - set(PLAN_COLOURS))]
    size = (11.5, 1.3 + 2.7 * len(picture.rows))
    figure, axes = plt.subplots(len(picture.rows), 3, figsize=size, squeeze=False, layout="constrained")
    for line, case in zip(axes, picture.rows, strict=True):
        draw_families(line[0], case, names)
        line[0].legend(
            handles=[Patch(color=PLAN_COLOURS.get(name, UNKNOWN), label=name) for name in names],
            loc="lower left", fontsize=7, framealpha=0.9,
        )  # fmt: skip
        bar = figure.colorbar(draw_times(line[1], case), ax=line[1], ticks=[0.5, 2, 8, 32, 128, 512])
        bar.ax.set_yticklabels(["0.5", "2", "8", "32", "128", "512"])
        bar = figure.colorbar(draw_ratios(line[2], case), ax=line[2], ticks=[-3, -2, -1, 0, 1, 2, 3])
        bar.ax.set_yticklabels(["1/8", "1/4", "1/2", "1", "2", "4", "8"])
    figure.suptitle(
        "PREDICTED by a cost model, nothing was measured: plan, time of a step, and cuDNN's estimated time over it\n"
        "(above 1, purple: rnnfast would be faster; a cross: cuDNN's time is known there)", fontsize=9,
    )  # fmt: skip
    caption = f"predicted; training, T = {STEPS}, the recurrence alone, outside of a CUDA graph; both axes are uneven"
    return encoded(figure, caption, fingerprint(picture), dpi)


# ---- in numbers -----------------------------------------------------------------------------------------------------


def spread(ratios: list[float]) -> str:
    """Median, least and most."""
    if not ratios:
        return ""
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


@functools.cache
def summary() -> str:
    """Markdown: cuDNN's estimated time over the predicted one, for persistent kernels and for launches, where cuDNN's
    kernel for small H is not what is compared with."""
    lines = [
        "| LSTM, bfloat16 | persistent: shapes | ratio | shapes below 0.95 | launches each step: B <= 16 | B >= 256 |"
    ]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for card, backward in itertools.product(CARDS, (False, True)):
        case = both_passes(card, "LSTM", "bfloat16")[backward]
        cudnn = estimates(case)
        ratios = {
            shape: (plan.persistent, cudnn[shape].us / plan.predicted_us)
            for shape, plan in plans(case).items()
            if cudnn[shape].path != "small H"
        }
        held = [ratio for persistent, ratio in ratios.values() if persistent]
        few, many = (
            [ratio for (_, batch), (persistent, ratio) in ratios.items() if not persistent and low <= batch <= high]
            for low, high in ((1, 16), (256, 1024))
        )
        cells = (len(held), spread(held), sum(ratio < 0.95 for ratio in held), spread(few), spread(many))
        name = f"{case.card.name}, {'backward' if backward else 'forward'}"
        lines.append("| " + " | ".join(map(str, (name, *cells))) + " |")
    return "\n".join(lines)


# ---- as a table -----------------------------------------------------------------------------------------------------


def write_table(path: Path) -> None:
    """Every card, cell, type and pass, a line for each shape."""
    from tqdm import tqdm  # for the command alone

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        lines = csv.writer(file)
        lines.writerow("card cell type pass H B plan predicted_us limited_by cudnn_us cudnn_path cudnn_known".split())
        for case in tqdm(cases(tuple(CARDS), CELLS), unit="map", disable=None):
            cudnn = estimates(case)
            for (hidden, batch), plan in plans(case).items():
                about = (case.card.name, case.mode, case.arithmetic, "backward" if case.backward else "forward")
                each = cudnn[hidden, batch]
                predicted = (plan.name, f"{plan.predicted_us:.4g}", plan.limited_by)
                lines.writerow((*about, hidden, batch, *predicted, f"{each.us:.4g}", each.path, each.known))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, help="a picture of this card (default: those of the pages)")
    parser.add_argument("--cell", choices=CELLS, default="LSTM")
    parser.add_argument("--type", choices=TYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the pictures")
    parser.add_argument("--csv", type=Path, help="write a table there, and no picture")
    options = parser.parse_args(arguments)
    if options.card and options.out == FOLDER:
        parser.error("--card: a picture that the pages do not show needs --out FOLDER")
    return options


def main(arguments: list[str] | None = None) -> int:
    from tqdm import tqdm  # for the command alone

    options = parse(arguments)
    if options.csv:
        write_table(options.csv)
        return 0
    pictures: tuple[Picture, ...] = PICTURES
    if options.card:
        name = f"{options.card}-{options.cell.lower()}-{options.type}"
        pictures = (Picture(name, both_passes(options.card, options.cell, options.type)),)
    options.out.mkdir(parents=True, exist_ok=True)
    for picture in tqdm(pictures, unit="picture", disable=None):
        path = options.out / f"{picture.name}.png"
        path.write_bytes(drawn(picture))
        print(f"written: {path} ({path.stat().st_size / 1024:.0f} KB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())

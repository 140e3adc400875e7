"""Trains two models side by side, with the same seed and data, and reports how they compare: what the demos share.

The two sides take turns in blocks of steps, so that a busy moment of the machine meets both: the ratio of their speeds
is the median over the blocks. Ctrl-C ends the training after the step in progress; what was measured is reported.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import matplotlib as mpl
import torch
from tqdm import tqdm

import rnnfast
from rnnfast.benchmark.timing import Ratio, environment, synchronize

mpl.use("Agg")
import matplotlib.pyplot as plt

COLOURS = {"torch.nn": "#b0b0b0", "rnnfast": "#c2410c"}
# Both sides compute the same, each with its own float32 rounding, which training amplifies step by step: over the first
# steps the losses agree to rounding, later (smoothed over SMOOTH steps) to a small part of what the seed alone changes.
EARLY_STEPS, EARLY_TOLERANCE = 20, 1e-5
SMOOTH, TOLERANCE = 20, 0.01


# Trains on batch number i; gives the loss (a tensor) and how many units (tokens, images) it saw.
Step = Callable[[int], tuple[torch.Tensor, int]]


@dataclass
class Side:
    """One of the two that are compared.

    Args:
        name: "torch.nn" or "rnnfast".
        model: what is trained.
        step: a training step.
    """

    name: str
    model: torch.nn.Module
    step: Step
    losses: list[float] = field(default_factory=list)
    # Units a second, one number a block.
    speeds: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        return statistics.median(self.speeds)


class Interrupt:
    """While entered, Ctrl-C sets ``asked`` and lets the step in progress finish; a second one interrupts at once."""

    def __enter__(self) -> Interrupt:
        self.asked = False
        self.previous = signal.signal(signal.SIGINT, self.handle)
        return self

    def handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *exception: object) -> None:
        signal.signal(signal.SIGINT, self.previous)


def race(sides: Sequence[Side], steps: int, unit: str, seconds: float, device: torch.device, block: int = 10) -> bool:
    """Train all sides in turn, a block of steps each.

    Args:
        sides: who takes part; their ``losses``, ``speeds`` and ``seconds`` are filled in.
        steps: how many steps each takes.
        unit: what a side's step counts, for the progress bars.
        seconds: the training ends before the block that would take all sides together beyond this (if it takes as long
            as the one before).
        device: where it happens (a clock is read only after the device's queue is empty).
        block: steps in a turn.

    Returns:
        Whether Ctrl-C ended it. All sides have the same number of losses: an unfinished block is dropped.
    """
    bars = [
        tqdm(total=steps, desc=f"{s.name:>8}", position=i, unit="step", mininterval=0.5) for i, s in enumerate(sides)
    ]
    with Interrupt() as interrupt:
        done, last = 0, 0.0
        while done < steps and sum(s.seconds for s in sides) + last < seconds and not interrupt.asked:
            count = min(block, steps - done)
            turn = list(enumerate(sides))
            measured: dict[int, tuple[list[float], int, float]] = {}
            for i, side in turn if done // block % 2 else reversed(turn):
                losses, units = [], 0
                synchronize(device)
                start = time.perf_counter()
                for number in range(done, done + count):
                    loss, seen = side.step(number)
                    losses.append(loss.detach())
                    units += seen
                    bars[i].update()
                    if interrupt.asked:
                        break
                synchronize(device)
                measured[i] = (torch.stack(losses).tolist(), units, time.perf_counter() - start)
                if interrupt.asked:
                    break
            else:
                for i, (losses, units, elapsed) in measured.items():
                    sides[i].losses += losses
                    sides[i].speeds.append(units / elapsed)
                    sides[i].seconds += elapsed
                    bars[i].set_postfix_str(f"loss {losses[-1]:.3f}, {sides[i].speed:,.0f} {unit}/s")
                last = sum(elapsed for _, _, elapsed in measured.values())
            done += count
        for bar in bars:
            bar.close()
        if done < steps and not interrupt.asked:
            print(f"The time is up after {done} of {steps} steps.")
        return interrupt.asked


def smooth(losses: Sequence[float], width: int = SMOOTH) -> list[float]:
    """The running mean over the last ``width`` values (over as many as there are, at the start)."""
    sums = [0.0]
    for loss in losses:
        sums.append(sums[-1] + loss)
    return [(sums[i + 1] - sums[max(0, i + 1 - width)]) / min(i + 1, width) for i in range(len(losses))]


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)


def report(
    name: str,
    title: str,
    sides: Sequence[Side],
    unit: str,
    loss_unit: str,
    device: torch.device,
    out: Path,
    interrupted: bool,
    scores: Callable[[], dict[str, list[float]]],
) -> bool:
    """Print both sides' speeds and losses, write ``<name>-<device>.json`` and ``.png`` into ``out``.

    Args:
        name: the files' stem.
        title: the chart's first line.
        sides: torch.nn's, then rnnfast's, after `race`.
        unit: what speeds count ("tokens").
        loss_unit: the loss axis' unit.
        device: where it ran.
        out: folder of the files, made if missing.
        interrupted: whether Ctrl-C ended the training.
        scores: gives more to print and to keep: what it is -> [torch.nn's value, rnnfast's value].

    Returns:
        Whether the two loss curves agree.
    """
    if interrupted:
        print("Interrupted: this is what was measured so far.")
    if not sides[0].losses:
        print("No block of steps was finished: there is nothing to report.")
        return True
    theirs, ours = sides
    ratio = Ratio.of([1 / s for s in theirs.speeds], [1 / s for s in ours.speeds])
    early = largest_difference(theirs.losses[:EARLY_STEPS], ours.losses[:EARLY_STEPS])
    whole = largest_difference(smooth(theirs.losses), smooth(ours.losses))
    agree = early <= EARLY_TOLERANCE and whole <= TOLERANCE
    finals = [smooth(s.losses)[-1] for s in sides]
    lines = [
        ("", theirs.name, ours.name),
        (f"{unit}/s", f"{theirs.speed:,.0f}", f"{ours.speed:,.0f}"),
        ("training, s", f"{theirs.seconds:.1f}", f"{ours.seconds:.1f}"),
        (f"loss, last {min(SMOOTH, len(ours.losses))} steps", f"{finals[0]:.4f}", f"{finals[1]:.4f}"),
    ]
    extra = scores()
    lines += [(key, *(f"{value:.4f}" for value in values)) for key, values in extra.items()]
    print(f"\n{title}: {len(ours.losses)} steps each, {device.type}")
    for line in lines:
        print(f"  {line[0]:<24}{line[1]:>12}{line[2]:>12}")
    print(f"  rnnfast is {ratio.median:.2f} times as fast (20th to 80th percentile {ratio.p20:.2f} to {ratio.p80:.2f})")
    print(
        f"  largest difference of the losses: {early:.1e} over the first {min(EARLY_STEPS, len(ours.losses))} steps "
        f"(allowed {EARLY_TOLERANCE:.0e}), {whole:.4f} of the smoothed curves (allowed {TOLERANCE}): "
        + ("they agree" if agree else "THEY DO NOT AGREE")
    )
    out.mkdir(parents=True, exist_ok=True)
    stem = out / f"{name}-{device.type}"
    record = {
        **environment(device),
        "name": name,
        "unit": unit,
        "steps": len(ours.losses),
        "interrupted": interrupted,
        "ratio": round(ratio.median, 4),
        "p20": round(ratio.p20, 4),
        "p80": round(ratio.p80, 4),
        "largest_difference_early": early,
        "largest_difference_smoothed": whole,
        "agree": agree,
        **extra,
        "sides": {s.name: {"per_second": round(s.speed, 1), "losses": [round(x, 5) for x in s.losses]} for s in sides},
    }
    stem.with_suffix(".json").write_text(json.dumps(record) + "\n")
    titles = [
        f"{title}\n{record['device']}, torch {torch.__version__}",
        f"loss by step, largest difference {whole:.1e}",
        "loss by training time",
        f"throughput, {ratio.median:.2f} times",
    ]
    plot(stem.with_suffix(".png"), titles, sides, unit, loss_unit)
    print(f"  written: {stem.with_suffix('.png')} and .json", flush=True)
    return agree


def plot(path: Path, titles: Sequence[str], sides: Sequence[Side], unit: str, loss_unit: str) -> None:
    """Three panels: the loss by step (the curves lie on each other), the loss by training time, the throughput.

    ``titles`` are those of the figure and of the panels.
    """
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, (by_step, by_time, speed) = plt.subplots(
        1, 3, figsize=(13, 4.2), width_ratios=(5, 5, 3), layout="constrained"
    )
    figure.suptitle(titles[0], fontsize=12)
    for i, side in enumerate(sides):
        losses = smooth(side.losses)
        count = len(losses)
        # The first side as a broad pale line, the second thin upon it: where they agree, both can be seen.
        style = {"color": COLOURS[side.name], "linewidth": (5, 1.5)[i], "label": side.name}
        by_step.plot(range(1, count + 1), losses, **style)
        by_time.plot([side.seconds * (n + 1) / count for n in range(count)], losses, **style)
        # Error bars: the 20th to 80th percentile over the blocks of steps.
        ranked = sorted(side.speeds)
        spread = [[side.speed - ranked[len(ranked) // 5]], [ranked[-1 - len(ranked) // 5] - side.speed]]
        bar = speed.bar(side.name, side.speed, color=COLOURS[side.name], yerr=spread, capsize=4, width=0.6)
        speed.bar_label(bar, labels=[f"{side.speed:,.0f}"], padding=4)
    label = f"loss ({loss_unit}), {SMOOTH}-step mean"
    by_step.set(xlabel="training step", ylabel=label, title=titles[1])
    by_time.set(xlabel="training time (s)", ylabel=label, title=titles[2])
    speed.set(ylabel=f"{unit} per second", title=titles[3])
    speed.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:,.0f}"))
    speed.margins(y=0.15)
    for axes in (by_step, by_time):
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def arguments(description: str | None, steps: int) -> argparse.ArgumentParser:
    """The options that every demo has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=steps, help=f"training steps of each side (default {steps})")
    parser.add_argument("--minutes", type=float, default=4.0, help="end after this much training in all (default 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", type=torch.device, help="default: the GPU where rnnfast has kernels for it, or cpu")
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the PNG and the numbers go (default out)")
    return parser


def pick_device(asked: torch.device | None) -> torch.device:
    """The device asked for; without a wish the GPU, if there is one and rnnfast has a backend of its own for it."""
    if asked is not None:
        return asked
    if torch.cuda.is_available():
        available = rnnfast.backends()
        if available["cuda"].available or available["triton"].available:
            return torch.device("cuda")
        print("There is a GPU, but rnnfast has no kernels for it yet: training on the CPU.")
    return torch.device("cpu")


def run(main: Callable[[], int]) -> None:
    """Run a demo's ``main`` and exit with its status; Ctrl-C outside the training ends it without a traceback."""
    try:
        status = main()
    except KeyboardInterrupt:
        print("\nInterrupted.")
        status = 130
    raise SystemExit(status)

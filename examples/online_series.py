"""Predict a series while it comes in: sensors, read a block at a time, whose process changes halfway.

The process is the Mackey-Glass equation, whose next value depends on one 17 steps ago, later on one 23 steps ago. A GRU
predicts six steps ahead and is trained on each few steps as they come (the error that is drawn is the one before that).
Truncated backpropagation through time with k2 = k1 sees no further back than the steps it trains on; with a longer k2
its gradients reach the value that matters. Sensors drop out now and then: `resets` says where a row begins anew.
Ctrl-C ends it with what was measured so far.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

import rnnfast
from rnnfast.benchmark.timing import environment
from side_by_side import Interrupt, run

mpl.use("Agg")
import matplotlib.pyplot as plt

SENSORS, BLOCK, AHEAD = 16, 50, 6
DELAYS = (17, 23)
SUBSTEPS = 10  # of the integration, for each step of the series
# Steps: that a point of the curve is the mean of, and a number of the table.
SMOOTH, NEAR = 400, 1000
COLOURS = ("#b0b0b0", "#2563eb", "#c2410c")


def mackey_glass(steps: int, change: np.ndarray, random: np.random.Generator) -> torch.Tensor:
    """dx/dt = 0.2 x(t - delay) / (1 + x(t - delay)^10) - 0.1 x(t) (Mackey and Glass 1977), once a unit of time.

    Args:
        steps: of the series, after the time in which the beginning is forgotten.
        change: (rows,), the step from which the delay is the second of `DELAYS`, of each series.

    Returns:
        (steps, rows), of mean 0 and standard deviation 1, from different beginnings.
    """
    forgotten, longest, row = 300, max(DELAYS) * SUBSTEPS, np.arange(len(change))
    values = np.empty((longest + (forgotten + steps) * SUBSTEPS, len(change)))
    values[:longest] = 0.9 + 0.3 * random.random(len(change))
    begins = longest + (forgotten + change) * SUBSTEPS
    for t in range(longest, len(values)):
        now, before = values[t - 1], values[t - SUBSTEPS * np.where(t < begins, *DELAYS), row]
        values[t] = now + (0.2 * before / (1 + before**10) - 0.1 * now) / SUBSTEPS
    series = values[longest + forgotten * SUBSTEPS :: SUBSTEPS]
    return torch.from_numpy((series - series.mean()) / series.std()).float()


class Sensors(IterableDataset[dict[str, torch.Tensor]]):
    """Blocks of `BLOCK` steps: "input" and "target" (BLOCK, SENSORS, 1), "resets" (BLOCK, SENSORS)."""

    def __init__(self, steps: int, seed: int) -> None:
        super().__init__()
        random, blocks = np.random.default_rng(seed), steps // BLOCK
        # One block in forty a sensor is off for a while before it.
        off = random.integers(20, 200, (blocks, SENSORS)) * (random.random((blocks, SENSORS)) < 1 / 40)
        off[0] = 0
        self.resets = torch.from_numpy(off > 0)
        self.missed = torch.from_numpy(off.cumsum(0))
        half = blocks // 2
        change = half * BLOCK + self.missed[half].numpy()
        series = mackey_glass(steps + int(self.missed[-1].max()) + AHEAD, change, random)
        self.series = series + 0.05 * torch.from_numpy(random.standard_normal(series.shape)).float()

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        sensor = torch.arange(SENSORS)
        for block in range(len(self.missed)):
            at = torch.arange(block * BLOCK, (block + 1) * BLOCK).unsqueeze(1) + self.missed[block]
            resets = torch.zeros(BLOCK, SENSORS, dtype=torch.bool)
            resets[0] = self.resets[block]
            yield {
                "input": self.series[at, sensor].unsqueeze(-1),
                "target": self.series[at + AHEAD, sensor].unsqueeze(-1),
                "resets": resets,
            }


class Forecaster(torch.nn.Module):
    """A GRU of one layer and what reads its state; called as `rnnfast.tbptt` calls it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.rnn = rnnfast.GRU(1, hidden_size)
        self.head = torch.nn.Linear(hidden_size, 1)

    def forward(
        self, x: torch.Tensor, state: torch.Tensor | None, resets: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        output, state = self.rnn(x, state, resets=resets)
        # What is learned is the difference from now.
        return x + self.head(output), state


@dataclass
class Learner:
    """Who predicts, and the squared error of each chunk before it was trained on."""

    name: str
    errors: list[float] = field(default_factory=list)
    seconds: float = 0.0


def learn(learner: Learner, stream: DataLoader[dict[str, torch.Tensor]], k1: int, k2: int, chunks: int) -> bool:
    """Trains on the stream once, as it comes. Returns whether Ctrl-C ended it."""
    torch.manual_seed(0)
    model = Forecaster(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    start = time.perf_counter()
    with Interrupt() as interrupt:
        parts = rnnfast.tbptt(model, stream, k1, k2)
        for chunk in tqdm(parts, total=chunks, desc=f"{learner.name:>12}", unit="chunk", mininterval=0.5):
            loss = (chunk.output - chunk.target["target"]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            learner.errors.append(loss.item())
            if interrupt.asked:
                break
        learner.seconds = time.perf_counter() - start
        return interrupt.asked


def smooth(errors: list[float], chunks: int) -> torch.Tensor:
    """The root of the mean over the last `chunks` chunks."""
    sums = torch.tensor([0.0, *errors], dtype=torch.float64).cumsum(0)
    first = (torch.arange(len(errors)) + 1 - chunks).clamp_min(0)
    last = torch.arange(len(errors)) + 1
    return ((sums[last] - sums[first]) / (last - first)).sqrt()


def plot(path: Path, learners: list[Learner], k1: int, half: int) -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    figure, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for learner, colour in zip(learners, COLOURS, strict=False):
        steps = [k1 * (i + 1) for i in range(len(learner.errors))]
        axes.plot(steps, smooth(learner.errors, SMOOTH // k1), color=colour, label=learner.name)
    axes.axvline(half, color="black", linewidth=0.8, linestyle=":")
    axes.annotate(
        f"the delay changes\nfrom {DELAYS[0]} to {DELAYS[1]} steps", (half, 0), (6, 6),
        xycoords=("data", "axes fraction"), textcoords="offset points",
    )  # fmt: skip
    axes.set(
        xlabel="steps of the stream", ylabel=f"error (RMS of {SMOOTH} steps, in standard deviations)", yscale="log",
        title=f"{AHEAD} steps ahead, learned while the stream comes in",
    )  # fmt: skip
    axes.yaxis.set_major_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(mpl.ticker.StrMethodFormatter("{x:g}"))
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12_000, help="of the stream (default 12000)")
    parser.add_argument("--k1", type=int, default=5, help="train each so many steps (default 5)")
    parser.add_argument("--k2", type=int, default=50, help="and go back so many (default 50)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where the PNG and the numbers go (default out)")
    options = parser.parse_args()
    for name, least, most in (
        ("steps", 2 * BLOCK, 10**9), ("k1", 1, SMOOTH), ("k2", options.k1 + 1, 10**9),
    ):  # fmt: skip
        value = getattr(options, name)
        if not least <= value <= most:
            parser.error(f"--{name}: expected from {least} to {most}, got {value}")
    blocks = options.steps // BLOCK
    steps, half = blocks * BLOCK, blocks // 2 * BLOCK
    # Each item is a block already.
    stream: DataLoader[dict[str, torch.Tensor]] = DataLoader(Sensors(steps, options.seed), batch_size=None)
    differences = torch.cat([block["input"] - block["target"] for block in stream])
    learners = [Learner("last value", [part.square().mean().item() for part in differences.split(options.k1)])]
    interrupted = False
    for k2 in (options.k1, options.k2):
        if not interrupted:
            learners.append(Learner(f"k2 = {k2}"))
            interrupted = learn(learners[-1], stream, options.k1, k2, -(-steps // options.k1))
    if interrupted:
        print("Interrupted: this is what was measured so far.")
    near = {"before": (half - NEAR, half), "just after": (half, half + NEAR), "at the end": (steps - NEAR, steps)}
    print(f"\n{AHEAD} steps ahead, k1 = {options.k1}: error in standard deviations")
    print(f"  {'':<12}" + "".join(f"{words:>12}" for words in near) + f"{'seconds':>10}")
    scores: dict[str, list[float | None]] = {}
    for learner in learners:
        scores[learner.name] = []
        for begin, end in near.values():
            part = learner.errors[max(0, begin) // options.k1 : end // options.k1]
            scores[learner.name].append(round((sum(part) / len(part)) ** 0.5, 4) if part else None)
        columns = "".join(f"{'' if score is None else f'{score:.3f}':>12}" for score in scores[learner.name])
        print(f"  {learner.name:<12}{columns}{learner.seconds:>10.1f}")
    options.out.mkdir(parents=True, exist_ok=True)
    stem = options.out / "online-series-cpu"
    record = {
        **environment(torch.device("cpu")), "steps": steps, "k1": options.k1, "interrupted": interrupted,
        "error": scores, "trained": {learner.name: len(learner.errors) * options.k1 for learner in learners[1:]},
        "seconds": {learner.name: round(learner.seconds, 1) for learner in learners[1:]},
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(record) + "\n")
    plot(stem.with_suffix(".png"), learners, options.k1, half)
    print(f"  written: {stem.with_suffix('.png')} and .json", flush=True)
    return 0


if __name__ == "__main__":
    run(main)

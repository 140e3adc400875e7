"""The timing core: both layers on one case, the same weights, checked against each other, timed in turn.

Single numbers mean little on a shared machine, so nothing is timed alone: the candidates run in rounds, each once a
round, the order turning round every time, and what is reported is the median over the rounds of the ratio within a
round, with its 20th and 80th percentile.
"""

from __future__ import annotations

import copy
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import rnnfast
from shapes import Case

MODES = ("fwd", "fwdbwd")


@dataclass(frozen=True)
class Ratio:
    """How many times faster the second of two is than the first: median, 20th and 80th percentile over the rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
        return cls(statistics.median(ratios), ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5])

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.p20:.2f} to {self.p80:.2f})"


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on an accelerator, so that a clock read afterwards has seen it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(calls: Sequence[Callable[[], object]], seconds: float, device: torch.device) -> list[list[float]]:
    """Time the calls in turn for about ``seconds`` in all: for each call its seconds a call, one number a round."""

    def sample(call: Callable[[], object], repeats: int) -> float:
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (time.perf_counter() - start) / repeats

    for call in calls:
        call()
    # Samples of at least 2 ms: the clock and the wake-up of the threads should not be what is measured. But no longer
    # than leaves time for ten rounds.
    estimate = [statistics.median(sample(call, 1) for _ in range(3)) for call in calls]
    repeats = max(1, round(min(2e-3 / min(estimate), seconds / 10 / sum(estimate))))
    samples: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while len(samples[0]) < 5 or (time.perf_counter() < end and len(samples[0]) < 500):
        order = range(len(calls)) if len(samples[0]) % 2 else reversed(range(len(calls)))
        for i in order:
            samples[i].append(sample(calls[i], repeats))
    return samples


def layers(case: Case, device: torch.device) -> tuple[torch.nn.RNNBase, torch.nn.RNNBase]:
    """torch.nn's layer and rnnfast's with the same weights."""
    pair = []
    for home in (torch.nn, rnnfast):
        layer = getattr(home, case.cell)(case.inputs, case.hidden_size, case.layers, bidirectional=case.directions == 2)
        pair.append(layer.to(device, getattr(torch, case.dtype)))
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0], pair[1]


def batch(case: Case, device: torch.device) -> torch.Tensor | PackedSequence:
    """Random input of the case's shape: (T, B, I), or packed rows."""
    generator = torch.Generator().manual_seed(0)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, case.dtype)}
    if not case.packed:
        return torch.randn(case.steps, case.batch, case.inputs, generator=generator).to(**options)
    rows = [torch.randn(n, case.inputs, generator=generator).to(**options) for n in case.lengths]
    return pack_sequence(rows, enforce_sorted=False)


def data(sequence: torch.Tensor | PackedSequence) -> torch.Tensor:
    return sequence.data if isinstance(sequence, PackedSequence) else sequence


def caller(layer: torch.nn.RNNBase, sequence: torch.Tensor | PackedSequence, mode: str) -> Callable[[], object]:
    """What is timed: a forward call without gradients, or forward and backward (gradients of input and weights)."""
    if mode == "fwd":
        layer.eval()

        def forward() -> object:
            with torch.no_grad():
                return layer(sequence)

        return forward

    layer.train()
    leaf = data(sequence).detach().requires_grad_()
    own = sequence._replace(data=leaf) if isinstance(sequence, PackedSequence) else leaf
    with torch.no_grad():
        grad = torch.randn_like(data(layer(own)[0]))
    parameters = [leaf, *layer.parameters()]

    def forward_backward() -> object:
        return torch.autograd.grad(data(layer(own)[0]), parameters, grad)

    return forward_backward


def results(layer: torch.nn.RNNBase, sequence: torch.Tensor | PackedSequence) -> list[torch.Tensor]:
    """Output, last states and the gradients of input and weights, in float64."""
    leaf = data(sequence).detach().to(next(layer.parameters()).dtype).requires_grad_()
    own = sequence._replace(data=leaf) if isinstance(sequence, PackedSequence) else leaf
    output, state = layer(own)
    states = list(state) if isinstance(state, tuple) else [state]
    # Different weights for different elements: a plain sum would hide swapped rows.
    values = [data(output), *states]
    total = sum((v.double() * torch.linspace(0.5, 1.5, v.numel(), device=v.device).view_as(v)).sum() for v in values)
    return [v.detach().double() for v in values + list(torch.autograd.grad(total, [leaf, *layer.parameters()]))]


def agree(theirs: torch.nn.RNNBase, ours: torch.nn.RNNBase, sequence: torch.Tensor | PackedSequence) -> bool:
    """Whether every result's error against float64 is at most twice torch.nn's own plus 1e-6 of the largest value."""
    truth = results(copy.deepcopy(theirs).double(), sequence)
    for exact, them, us in zip(truth, results(theirs, sequence), results(ours, sequence), strict=True):
        allowed = 2 * (them - exact).abs().max() + 1e-6 * exact.abs().max().clamp(min=1)
        # Written so that a NaN on our side fails.
        if not (us - exact).abs().max() <= allowed:
            return False
    return True


def measure(case: Case, mode: str, seconds: float, device: torch.device, correct: bool | None = None) -> dict[str, Any]:
    """Time one case in one mode and give a row of the result file.

    Args:
        case: the layer and its shape.
        mode: "fwd" (no gradients) or "fwdbwd".
        seconds: how long to measure, all candidates together.
        device: where.
        correct: the outcome of :func:`agree` where it is known already.

    Returns:
        A row; ``ratio`` is torch.nn's time over rnnfast's. A packed case also has, for rnnfast and with ``torch_`` for
        torch.nn, ``over_padded``: the packed batch's time over that of the same rows padded to the longest, and
        ``over_dense``: over that of a dense batch with as many tokens and no padding.
    """
    torch.manual_seed(0)
    theirs, ours = layers(case, device)
    sequence = batch(case, device)
    if correct is None:
        correct = agree(theirs, ours, sequence)
    calls = [caller(theirs, sequence, mode), caller(ours, sequence, mode)]
    if case.packed:
        dense = torch.randn(case.steps, case.batch, case.inputs).to(data(sequence))
        padded, _ = pad_packed_sequence(sequence)
        calls += [caller(layer, other, mode) for other in (padded, dense) for layer in (theirs, ours)]
    samples = interleave(calls, seconds, device)
    ratio = Ratio.of(samples[0], samples[1])
    per_step = [statistics.median(s) * 1e6 / case.steps for s in samples]
    with torch.set_grad_enabled(mode == "fwdbwd"):
        explanation = rnnfast.explain(ours, sequence)
    row = {
        "case": case.name,
        "cell": case.cell,
        "layers": case.layers,
        "directions": case.directions,
        "dtype": case.dtype,
        "T": case.steps,
        "B": case.batch,
        "I": case.inputs,
        "H": case.hidden_size,
        "mode": mode,
        "backend": explanation.backend,
        "us_per_step": round(per_step[1], 4),
        "torch_us_per_step": round(per_step[0], 4),
        "ratio": round(ratio.median, 4),
        "p20": round(ratio.p20, 4),
        "p80": round(ratio.p80, 4),
        "limit_us_per_step": None,
        "plan": explanation.kernel,
        "correct": correct,
    }
    if case.packed:
        for i, key in enumerate(("over_padded", "over_dense")):
            row[f"torch_{key}"] = round(Ratio.of(samples[0], samples[2 * i + 2]).median, 4)
            row[key] = round(Ratio.of(samples[1], samples[2 * i + 3]).median, 4)
    return row


def environment(device: torch.device) -> dict[str, Any]:
    """What a result file says about where it comes from: device, versions, commit, date (UTC)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpuinfo = Path("/proc/cpuinfo")
        lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
        model = next(
            (x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")),
            platform.processor() or platform.machine(),
        )
        isa = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown ISA")()
        name = f"{model}, {isa}, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # A tree with changes is marked: its numbers belong to no commit. (New result files are no such change.)
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
        commit = git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "commit": commit,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

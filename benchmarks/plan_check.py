"""The plans of the CUDA kernels side by side on a card: does the one that is chosen win, and is the model right?

    python benchmarks/plan_check.py FOLDER                  # on a card: FOLDER/<card>-plans.jsonl
    python benchmarks/plan_check.py FOLDER --device emulated --hidden 16 --batch 2 --steps 3    # no times, a rehearsal

Of each shape, type and pass the plan that is chosen ("auto") and every plan that is legal by its name are timed in
turn, in the same run. A row of the file says what the model predicted and what was measured, microseconds a step. The
forward pass has its input projection in it, a product of torch's, which is timed by itself and subtracted; backward is
the recurrence alone. `correct` says whether the result is near that of the step kernels: a wrong one is no time.

Exit status 0: every result was near; 1: one was not, or a call failed; 3: there is no card.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from records import whole_lines
from rnnfast import backend, cuda_plan, libraries
from rnnfast.backends import BACKENDS
from rnnfast.benchmark import timing
from rnnfast.cell_types import CELLS
from rnnfast.sequences import Sequences
from rnnfast.signatures import BackwardArguments, LayerArguments, Parameters, flat

# "auto" first: it is compared with the others.
PLANS = cuda_plan.NAMES
HIDDEN_SIZES = (128, 256, 512, 768, 1024)
BATCH_SIZES = (1, 16, 64, 256)
# Types in the order in which they are measured: what is left when the time is up is the last one's.
TYPES = ("bfloat16", "tf32", "float32", "float16")
PASSES = ("forward", "backward")
# The width of the input: the projection is to be small.
INPUT = 16
# How far from the step kernels' a result may be: other orders of a sum, over some hundred steps. What is wrong with a
# kernel is larger.
NEAR = {"bfloat16": 0.1, "float16": 0.02, "tf32": 0.02, "float32": 1e-3}
# What tells shapes and passes apart.
KEY = ("mode", "arithmetic", "H", "B", "T", "pass")
Call = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True)
class Shape:
    """One layer of one direction.

    Args:
        mode: a key of `CELLS`.
        arithmetic: of `TYPES`.
        hidden, batch, steps: H, B, T.
    """

    mode: str
    arithmetic: str
    hidden: int
    batch: int
    steps: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.arithmetic == "tf32" else getattr(torch, self.arithmetic)

    def sizes(self) -> dict[str, Any]:
        """As a row has them."""
        return {
            "mode": self.mode, "arithmetic": self.arithmetic, "H": self.hidden, "B": self.batch, "T": self.steps,
        }  # fmt: skip


class Calls:
    """What is timed of one shape: random data on the device, never zeros.

    Args:
        shape: the layer.
        name: the backend, "cuda" or "emulated".
        device: where the tensors are.
    """

    def __init__(self, shape: Shape, name: str, device: torch.device) -> None:
        self.shape, self.emulated, self.device = shape, name == "emulated", device
        self.kernels = BACKENDS[name].kernels
        gates, H = CELLS[shape.mode].gates, shape.hidden

        def uniform(*sizes: int) -> Tensor:
            return torch.empty(sizes).uniform_(-(H**-0.5), H**-0.5).to(device, shape.dtype)

        self.input = torch.randn(shape.steps, shape.batch, INPUT).to(device, shape.dtype)
        self.weight, self.bias = uniform(gates * H, INPUT), uniform(gates * H)
        self.parameters = Parameters(
            weight_ih=self.weight, weight_hh=uniform(gates * H, H), bias_ih=self.bias, bias_hh=uniform(gates * H)
        )
        # What backward reads, the same for every plan.
        with cuda_plan.prefer("step"):
            output, _, _, cell_states, reserve = self.forward()
            grad = torch.randn(output.shape, device=device).to(shape.dtype)
            saved = (grad, None, None, None, output, cell_states, reserve, None, None)
            self.backward_arguments = flat(BackwardArguments(shape.mode, *saved, Sequences(), self.parameters))
            self.expected = {name: [each.clone() for each in self.call(name)()] for name in PASSES}

    def forward(self) -> Sequence[Tensor]:
        """(output, h_n, c_n, cell_states, reserve), in training."""
        arguments = LayerArguments(self.shape.mode, self.input, None, None, Sequences(), self.parameters)
        return tuple(self.kernels.layer_forward(*flat(arguments)))

    def backward(self) -> Sequence[Tensor]:
        """The gradients of gates and states: the recurrence alone."""
        return tuple(self.kernels.recurrence_backward(*self.backward_arguments))

    def call(self, name: str) -> Call:
        return self.forward if name == "forward" else self.backward

    def projection(self) -> list[Tensor]:
        """The part of forward that is no kernel of ours."""
        return [torch.nn.functional.linear(self.input, self.weight, self.bias)]

    def plan(self, name: str) -> cuda_plan.Plan:
        """What a call takes now."""
        sizes = (self.shape.hidden, self.shape.batch, self.shape.steps)
        return cuda_plan.here(
            self.device, self.shape.mode, self.shape.dtype, *sizes, training=True, backward=name == "backward",
            emulated=self.emulated,
        )  # fmt: skip

    def near(self, name: str, found: Sequence[Tensor]) -> bool:
        """Whether a result is near that of the step kernels; NaN is not."""
        most = NEAR[self.shape.arithmetic]
        pairs = zip(found, self.expected[name], strict=True)
        return all(
            bool((value.float() - other.float()).abs().max() <= most * max(1.0, float(other.float().abs().max())))
            for value, other in pairs
            if value.numel()
        )


def rows_of(calls: Calls, name: str, seconds: float) -> Iterator[dict[str, Any]]:
    """A row of each plan for one pass.

    Args:
        calls: the shape.
        name: of `PASSES`.
        seconds: about how long to measure, all plans together.
    """
    about = {**calls.shape.sizes(), "pass": name}
    chosen: dict[str, cuda_plan.Plan] = {}
    correct = {}
    for asked in PLANS:
        with cuda_plan.prefer(asked):
            plan = calls.plan(name)
            if asked not in ("auto", plan.name):
                yield {**about, "asked": asked, "illegal": plan.why}
                continue
            chosen[asked] = plan
            correct[asked] = calls.near(name, calls.call(name)())
    contexts: list[Any] = [functools.partial(cuda_plan.prefer, asked) for asked in chosen]
    candidates: list[Any] = [calls.call(name)] * len(chosen)
    if name == "forward":
        candidates.append(calls.projection)
        contexts.append(functools.partial(cuda_plan.prefer, "auto"))
    samples = timing.interleave(candidates, seconds, calls.device, contexts)
    steps = calls.shape.steps
    projection = statistics.median(samples[-1]) if name == "forward" else 0.0
    for (asked, plan), times in zip(chosen.items(), samples, strict=False):
        least, middle, most = (1e6 * (value - projection) / steps for value in spread(times))
        yield {
            **about,
            "asked": asked,
            "plan": plan.name,
            "layout": plan.layout,
            "predicted_us": plan.predicted_us,
            "limited_by": plan.limited_by,
            "us": round(middle, 4),
            "p20": round(least, 4),
            "p80": round(most, 4),
            "projection_us": round(1e6 * projection / steps, 4),
            "correct": correct[asked],
        }


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """The 20th percentile, the median and the 80th."""
    ordered = sorted(times)
    at = [ordered[round(part * (len(ordered) - 1))] for part in (0.2, 0.8)]
    return at[0], statistics.median(ordered), at[1]


def summary(rows: Sequence[dict[str, Any]], most: int = 8) -> list[str]:
    """Where the plan that was chosen was not the fastest, and where the model was furthest off, worst first."""
    timed = [row for row in rows if "us" in row and row["us"] > 0 and row["correct"]]
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in timed:
        key = tuple(row[part] for part in KEY)
        groups.setdefault(key, {})[row["asked"]] = row
    losses = []
    for key, group in groups.items():
        if "auto" in group:
            best = min(group.values(), key=lambda row: row["us"])
            losses.append((group["auto"]["us"] / best["us"], key, group["auto"]["plan"], best["plan"]))
    losses.sort(key=lambda loss: loss[0], reverse=True)
    lost = [loss for loss in losses if loss[0] > 1.05]
    wrong = [row for row in rows if not row.get("correct", True)]
    lines = [f"{len(losses)} shapes and passes; in {len(lost)} the plan chosen is at least 5 % slower than the fastest"]
    lines += [f"  {ratio:.2f}x {words(key)}: chosen {own}, fastest {other}" for ratio, key, own, other in lost[:most]]
    lines.append("measured / predicted, of the plans asked for by name: median by plan and pass")
    by_plan: dict[tuple[str, str], list[float]] = {}
    for row in timed:
        if row["asked"] != "auto":
            by_plan.setdefault((row["plan"], row["pass"]), []).append(row["us"] / row["predicted_us"])
    for (plan, name), ratios in by_plan.items():
        low, middle, high = spread(ratios)
        lines.append(f"  {plan:<13} {name:<9} {middle:6.2f} ({low:.2f} to {high:.2f}, {len(ratios)} shapes)")
    lines += [f"WRONG {row['asked']}: {words(tuple(row[part] for part in KEY))}" for row in wrong[:most]]
    return lines


def words(key: tuple[Any, ...]) -> str:
    mode, arithmetic, hidden, batch, steps, name = key
    return f"{mode} {arithmetic} H={hidden} B={batch} T={steps} {name}"


def numbers(text: str) -> list[int]:
    values = [int(word) for word in text.split(",")]
    if min(values) < 1:
        raise argparse.ArgumentTypeError("numbers above 0, with commas")
    return values


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the result file")
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda")
    parser.add_argument("--cells", default="LSTM", help=f"with commas, of {', '.join(CELLS)} (default LSTM)")
    parser.add_argument("--types", default="bfloat16,tf32,float32", help=f"with commas, of {', '.join(TYPES)}")
    parser.add_argument("--hidden", type=numbers, default=list(HIDDEN_SIZES), help="hidden sizes, with commas")
    parser.add_argument("--batch", type=numbers, default=list(BATCH_SIZES), help="batch sizes, with commas")
    parser.add_argument("--steps", type=int, default=256, help="time steps (default 256)")
    parser.add_argument("--seconds", type=float, default=0.1, help="for each shape and pass (default 0.1)")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds after which no shape is begun")
    options = parser.parse_args(arguments)
    options.cells, options.types = options.cells.split(","), options.types.split(",")
    if wrong := [name for name in options.cells if name not in CELLS]:
        parser.error(f"--cells: no such cell: {', '.join(wrong)}; there are {', '.join(CELLS)}")
    if wrong := [name for name in options.types if name not in TYPES]:
        parser.error(f"--types: no such type: {', '.join(wrong)}; there are {', '.join(TYPES)}")
    if options.steps < 1:
        parser.error("--steps: a number above 0 is needed")
    return options


def measure(options: argparse.Namespace, file: Path) -> int:
    """Writes the rows as they come; the exit status."""
    end = time.monotonic() + options.limit
    device = torch.device("cpu" if options.device == "emulated" else "cuda")
    failed = 0
    shapes = itertools.product(options.types, options.cells, options.hidden, options.batch)

    def write(**row: Any) -> None:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    write(what="device", **timing.environment(device))
    for arithmetic, mode, hidden, batch in shapes:
        if time.monotonic() >= end:
            print("the time is up: the rest is not measured")
            break
        shape = Shape(mode, arithmetic, hidden, batch, options.steps)
        tf32 = arithmetic == "tf32"
        if options.device == "emulated":
            torch.ops.rnnfast_emulated.allow_tf32(tf32)
        try:
            with timing.settings(device, tf32), torch.no_grad():
                calls = Calls(shape, options.device, device)
                for name in PASSES:
                    for row in rows_of(calls, name, options.seconds):
                        write(what="plan", **row)
                        failed += not row.get("correct", True)
        except RuntimeError as error:
            # Out of memory, or an error of the kernels, after which nothing else may run.
            failed += 1
            print(f"FAILED {words((*shape.sizes().values(), ''))}: {str(error).splitlines()[0]}")
            write(what="error", **shape.sizes(), error=str(error))
    return int(failed > 0)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.device == "cuda" and (why := libraries.device_problem() or libraries.cuda_problem()):
        print(f"plan_check: {why}", file=sys.stderr)
        return 3
    torch.manual_seed(1)
    with backend(options.device):
        card = options.device if options.device == "emulated" else timing.short_name(torch.device("cuda"))
        options.out.mkdir(parents=True, exist_ok=True)
        file = options.out / f"{card}-plans.jsonl"
        file.unlink(missing_ok=True)
        status = measure(options, file)
    print("\n".join(summary(whole_lines(file))))
    return status


if __name__ == "__main__":
    sys.exit(main())

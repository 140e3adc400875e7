"""Layers with rnnfast's options (`rnnfast/variants/options.py`) in turn with what a user would have instead.

torch.nn has no such layers: what takes its place is the same layer as a loop of PyTorch's operations
(`pytorch_loops.py`), whose time over rnnfast's is a row's ``ratio``. Beside them runs rnnfast's plain layer of the same
size: ``plain_us_per_step`` is its time, and ``over_plain`` the time of the layer with the option over it.

The results are checked as elsewhere (`rnnfast.benchmark.case.compare`), the truth being the loop in float64. Where
something is drawn (dropout, zoneout, in training) all draw the same in the check, from one seed.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

import rnnfast
from pytorch_loops import loop_of
from records import BESIDE, WORKLOADS, Record, Row, in_order, is_variant, loaded
from rnnfast.benchmark import Call, Case, Data, Impossible
from rnnfast.benchmark.case import CELLS, GATES, compare, make_call, make_data, timed_steps
from rnnfast.benchmark.comparison import Candidate, checked_names, first_line, rounded, row_of
from rnnfast.benchmark.cores import core_to_core_ns
from rnnfast.benchmark.load import Watch
from rnnfast.benchmark.timing import Ratio, interleave, peak_memory
from rnnfast.explanation import explain

SEED = 0
# What a row says that it is compared with.
LOOP = "loop"
# What is asked of a layer with options in training, at these sizes: at least so many times as fast as the loop, and at
# most so many times the time of the plain layer.
LEAST_GAIN, MOST_COST = 5.0, 1.5
ASKED_OF = {"T": 100, "B": 16, "I": 256, "H": 256, "dtype": "float32", "workload": "training"}


@dataclass(frozen=True)
class Variant:
    """Options of a layer that are timed together.

    Args:
        options: keyword arguments.
        cells: those that have them.
    """

    options: dict[str, Any]
    cells: tuple[str, ...] = CELLS


_GATED = ("LSTM", "GRU")
VARIANTS = {
    "layer-norm-separate": Variant({"layer_norm": "separate"}),
    "layer-norm-joint": Variant({"layer_norm": "joint"}),
    "rms-norm-joint": Variant({"layer_norm": "joint", "norm": "rms"}),
    "cell-norm-output": Variant({"cell_norm": "output"}, ("LSTM",)),
    "cell-norm-carried": Variant({"cell_norm": "carried"}, ("LSTM",)),
    "layer-and-cell-norm": Variant({"layer_norm": "separate", "cell_norm": "output"}, ("LSTM",)),
    "dreamer-v3": Variant({"preset": "dreamer_v3"}, ("GRU",)),
    "zoneout": Variant({"zoneout": 0.1}),
    "recurrent-dropout": Variant({"recurrent_dropout": 0.25}),
    "candidate-dropout": Variant({"recurrent_dropout": 0.25, "dropout_mode": "candidate"}, _GATED),
    "input-dropout": Variant({"input_dropout": 0.25}),
    "weight-dropout": Variant({"weight_dropout": 0.5}),
    "peephole": Variant({"peephole": True}, ("LSTM",)),
    "coupled": Variant({"coupled": True}, ("LSTM",)),
    "reset-before": Variant({"reset_after": False}, ("GRU",)),
    "heads": Variant({"num_heads": 4}),
    "hard-sigmoid": Variant({"gate_activation": "hard_sigmoid"}, _GATED),
}


@dataclass(frozen=True)
class VariantCase(Case):
    """A layer with options on one shape: one layer, one direction, rows of full length.

    Args:
        variant: its name in `VARIANTS`.
        others: as `Case`, which are its defaults where a loop does not have them.

    Raises:
        ValueError: as `Case`; or there is no such variant, or not of this cell, or not with what else is asked for.
    """

    variant: str = field(default="", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        of_cell = [name for name, variant in VARIANTS.items() if self.cell in variant.cells]
        if self.variant not in of_cell:
            raise ValueError(
                f"variant: expected one of {', '.join(of_cell)} with cell {self.cell}, got {self.variant!r}"
            )
        free = ("cell", "batch", "hidden_size", "steps", "input_size", "dtype", "variant", "model", "source")
        for each in fields(self):
            if each.name not in free and (value := getattr(self, each.name)) != each.default:
                raise ValueError(f"{each.name}: expected {each.default!r} for a variant, got {value!r}")

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of the layer."""
        return VARIANTS[self.variant].options

    @property
    def plain(self) -> Case:
        """The same without options."""
        return Case(**{each.name: getattr(self, each.name) for each in fields(Case)})

    @property
    def name(self) -> str:
        return f"{super().name}-{self.variant}"

    @property
    def row(self) -> dict[str, Any]:
        return {**super().row, "variant": self.variant}

    @property
    def gates(self) -> int:
        return GATES[self.cell] - bool(self.options.get("coupled"))

    @property
    def recurrent_weights(self) -> int:
        """Elements of W_hh; with several heads of its blocks."""
        return self.gates * self.hidden_size * self.hidden_size // self.options.get("num_heads", 1)

    def weights(self) -> int:
        return self.gates * self.hidden_size * self.inputs + self.recurrent_weights


@dataclass(frozen=True)
class Layers:
    """The layer with options, the same as a loop with the same weights, and rnnfast's plain layer."""

    loop: torch.nn.Module
    ours: torch.nn.RNNBase
    plain: torch.nn.RNNBase


def make_layers(case: VariantCase, device: torch.device) -> Layers:
    made = getattr(rnnfast, case.cell)

    def to_case(layer: Any) -> Any:
        return layer.to(device, getattr(torch, case.dtype))

    ours = to_case(made(case.inputs, case.hidden_size, **case.options))
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            # With the 1 of a layer that was not trained two normalised sums drive each other apart: in 100 steps every
            # way of rounding grows a thousandfold, and says nothing of who rounds worse.
            if name.startswith("weight_norm"):
                parameter.mul_(0.3)
    return Layers(loop_of(ours), ours, to_case(made(case.inputs, case.hidden_size)))


def drawn_alike(call: Call) -> list[Tensor]:
    """The call's results, its masks those of one seed."""
    torch.manual_seed(SEED)
    return [value.detach().clone() for value in call()]


def truth_of(loop: Any, case: Case, workload: str, data: Data) -> list[Tensor]:
    """What a call should give: the loop's results in float64."""
    doubled = make_call(copy.deepcopy(loop).double(), case, workload, data.with_values(data.values.double()))
    return drawn_alike(doubled)


def measure(
    case: VariantCase,
    workload: str,
    seconds: float,
    device: torch.device,
    backends: Sequence[str] | None = None,
) -> list[Row]:
    """Checks and times one case under one workload, as `rnnfast.benchmark.measure` does with torch.nn's layer.

    Args:
        case, workload, seconds, device, backends: as there.

    Returns:
        A row for each backend; torch.nn's fields are the loop's.

    Raises:
        Impossible, ValueError: as there; or the device is no CPU.
    """
    if device.type != "cpu":
        raise Impossible("layers with options have kernels for the CPU alone")
    names = checked_names(backends, device)
    torch.manual_seed(SEED)
    layers, data = make_layers(case, device), make_data(case, device)
    with torch.no_grad():
        own_choice = explain(layers.ours, data.rows).backend
    truth = truth_of(layers.loop, case, workload, data)
    loop = Candidate(LOOP, calls=[make_call(layers.loop, case, workload, data)])  # type: ignore[arg-type]
    theirs = drawn_alike(loop.calls[0])
    loop.peak = peak_memory(loop.calls[0], device)

    def prepared(name: str, layer: torch.nn.RNNBase) -> Candidate:
        candidate = Candidate(name, asked=name != own_choice)
        try:
            with candidate.context():
                call = make_call(layer, case, workload, data)
                results = drawn_alike(call)
                # Of another layer than the loop is: other suites look at its results.
                why = None if layer is layers.plain else compare(truth, theirs, results)
                with torch.set_grad_enabled(workload == "training"):
                    candidate.plan = explain(layer, data.rows).kernel
                candidate.peak = peak_memory(call, device)
            if why is None:
                candidate.calls = [call]
            else:
                candidate.fail(why)
        # Whatever a backend raises, the others go on.
        except Exception as error:
            candidate.fail(first_line(error))
        return candidate

    pairs = [(prepared(name, layers.ours), prepared(name, layers.plain)) for name in names]
    timed = [each for pair in pairs if pair[0].calls for each in pair if each.calls]
    conditions = time_in_turn([loop, *timed], seconds)
    return [{**row_with_plain(case, workload, ours, loop, plain), **conditions} for ours, plain in pairs]


def time_in_turn(candidates: Sequence[Candidate], seconds: float) -> Row:
    """Fills in the samples of candidates that all have calls, the loop being the first.

    Returns:
        What a row says of the machine meanwhile, as that of other suites.
    """
    conditions: Row = {"core_to_core_ns": None}
    if len(candidates) < 2:
        return conditions
    distances: list[float] = []

    def look() -> None:
        if (distance := core_to_core_ns()) is not None:
            distances.append(distance)

    calls, contexts = [each.calls for each in candidates], [each.context for each in candidates]
    with Watch(torch.get_num_threads(), seconds) as watch:
        taken = interleave(calls, seconds, torch.device("cpu"), contexts, look)
    for each, samples in zip(candidates, taken, strict=True):
        each.samples = samples
    if distances:
        conditions["core_to_core_ns"] = round(sorted(distances)[-1 - len(distances) // 5], 1)
    return {**conditions, **watch.fields}


def row_with_plain(case: VariantCase, workload: str, ours: Candidate, loop: Candidate, plain: Candidate) -> Row:
    """A row as other cases have it, with the plain layer's time."""
    found = row_of(case, workload, ours, loop)
    found["torch_peak_memory_bytes"] = loop.peak
    found["plain_us_per_step"] = found["over_plain"] = None
    if ours.samples and plain.samples:
        found["plain_us_per_step"] = rounded(plain.seconds() * 1e6 / timed_steps(case, workload))
        found["over_plain"] = rounded(Ratio.of(ours.samples, plain.samples).median)
    return found


# --- what is said of the rows ----------------------------------------------------------------------------------------


def is_asked_of(row: Row) -> bool:
    """Whether the row is of a size and workload for which there is a least gain and a highest cost."""
    return is_variant(row) and all(row[key] == value for key, value in ASKED_OF.items())


def missed(rows: Sequence[Row]) -> list[str]:
    """The rows that are not as fast as is asked of them, a line each."""
    lines = []
    for row in filter(is_asked_of, rows):
        gain, cost = row["ratio"], row.get("over_plain")
        if gain is not None and gain < LEAST_GAIN:
            lines.append(f"{row['case']} {row['backend']}: {gain:.2f} times as fast as the loop")
        if cost is not None and cost > MOST_COST:
            lines.append(f"{row['case']} {row['backend']}: {cost:.2f} times the plain layer's time")
    if lines:
        sizes = ", ".join(f"{key} = {ASKED_OF[key]}" for key in "TBH")
        lines.append(
            f"Asked for in training ({sizes}): at least {LEAST_GAIN:g} times as fast as the loop, at most "
            f"{MOST_COST:g} times the plain layer's time."
        )
    return lines


def speed_table(records: Sequence[Record]) -> str:
    """Each cell, variant and size: how many times as fast as the loop, and in how many times the plain layer's time."""
    rows = [row for record in records for row in record.rows if is_variant(row)]
    if not rows:
        return "There is no result file of the suite `variants` yet."
    workloads = in_order(WORKLOADS, [row["workload"] for row in rows])
    several = len({row["backend"] for row in rows}) > 1
    heads = ["cell, options, size"]
    for workload in workloads:
        heads += [f"{workload}: loop / rnnfast", "rnnfast / plain layer"]
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    by_line: dict[str, dict[str, Row]] = {}
    for row in rows:
        words = f"{row['cell']}, {row['variant']}, T={row['T']}, B={row['B']}, H={row['H']}"
        words += f", {row['dtype']}" * (row["dtype"] != "float32") + f", {row['backend']}" * several
        by_line.setdefault(words, {})[row["workload"]] = row
    for words, own in by_line.items():
        line = [words]
        for workload in workloads:
            found = own.get(workload)
            line += ["", ""] if found is None else [written(found["ratio"]), written(found.get("over_plain"))]
        lines.append(f"| {' | '.join(line)} |")
    parts = ["\n".join(lines)]
    asked = list(filter(is_asked_of, rows))
    costs = [row["over_plain"] for row in asked if row.get("over_plain") is not None]
    if costs:
        gains = [row["ratio"] for row in asked]
        parts.append(
            f"In training at T={ASKED_OF['T']}, B={ASKED_OF['B']}, H={ASKED_OF['H']}: {min(gains):.1f} to "
            f"{max(gains):.1f} times as fast as the loop (geometric mean {statistics.geometric_mean(gains):.1f}),\nin "
            f"{min(costs):.2f} to {max(costs):.2f} times the plain layer's time "
            f"({statistics.geometric_mean(costs):.2f})."
        )
    if beside := sum(loaded([row]) for row in rows):
        parts.append(f"{beside} of the {len(rows)} rows were timed {BESIDE}.")
    return "\n\n".join(parts)


def written(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"

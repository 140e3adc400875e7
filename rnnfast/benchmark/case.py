"""A case of a benchmark: a layer, or a loop of cells, on a shape; both of it, the input, what is called and checked."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence

from .. import cell_types, cells, modules
from ..quantization import TYPES, rounded

CELLS = ("LSTM", "GRU", "RNN")
GATES = {cell: cell_types.CELLS[mode].gates for cell, mode in zip(CELLS, ("LSTM", "GRU", "RNN_TANH"), strict=True)}
DTYPES = ("float32", "bfloat16", "float16", "float64")
# What is done with a layer. Training: forward, then the gradients of input and weights. Streaming: inference, one step
# a call, the state handed from call to call.
WORKLOADS = ("inference", "training", "streaming")
# The calls of one step that are timed together: more say no more.
STREAMED = 16
# More of either are most likely a mistake: milliseconds taken for microseconds, a machine's processes for its cores.
MOST_PAUSE_MS, MOST_NEIGHBOURS = 60_000, 1024

# What a field of `Case` must be, by the name of its type.
KINDS = {"str": "a string", "int": "an integer", "float": "a number", "bool": "true or false"}

# What the other fields of a case are where it is a loop of cells.
BESIDE_CELLS = {
    "layers": 1,
    "directions": 1,
    "packed": False,
    "lengths": False,
    "resets": 0.0,
    "proj_size": 0,
    "pause_ms": 0.0,
    "neighbours": 0,
    "quantized": "",
}

# What is timed: gives its results, in an order that all implementations share.
Call = Callable[[], list[Tensor]]
# A layer, or for a loop of cells a cell; of torch.nn or of rnnfast, whose classes are subclasses of torch.nn's.
Layer = torch.nn.RNNBase | torch.nn.RNNCellBase


class Impossible(Exception):
    """A workload that a case does not have; the text says why."""


@dataclass(frozen=True)
class Case:
    """One layer on one shape, or a loop of cells. An option is a field here; `row` says what a result file calls it.

    Args:
        cell: "LSTM", "GRU" or "RNN".
        batch: rows, B.
        hidden_size: H.
        steps: T; for rows of different lengths the mean.
        input_size: I; 0 means the hidden size.
        layers: L.
        directions: D, 1 or 2.
        dtype: name of a torch dtype.
        packed: a ``PackedSequence`` of ``batch`` rows with lengths from T/2 to 3T/2: B * T tokens, as
            many as the dense case has.
        lengths: the same rows padded to the longest: rnnfast takes ``lengths``, torch.nn packs them and pads the
            result.
        resets: how likely it is that the state is zeroed before a step of a row. torch.nn is called once for every
            stretch of steps in which no row is reset.
        proj_size: P, LSTM only; 0 means no projection.
        pause_ms: milliseconds for which nothing is called before every call, as a service waits for its next request.
        neighbours: other processes that compute meanwhile, each with one busy thread.
        quantized: type of ``rnnfast.quantize_weights``: a second layer of rnnfast has such weights. All layers have the
            rounded ones, so that all compute the same. "" means none.
        cells: a loop of cells, one call a step, in place of a layer: the state is handed from call to call, the outputs
            are stacked.
        model: the model that the shape is taken from.
        source: where that can be read.

    Raises:
        ValueError: a field has another type, or a value that no layer has; the message names it.
    """

    cell: str
    batch: int
    hidden_size: int
    steps: int = 100
    input_size: int = 0
    layers: int = 1
    directions: int = 1
    dtype: str = "float32"
    packed: bool = False
    lengths: bool = False
    resets: float = 0.0
    proj_size: int = 0
    pause_ms: float = 0.0
    neighbours: int = 0
    quantized: str = ""
    cells: bool = False
    model: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        types: dict[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
        for field in fields(self):
            value = getattr(self, field.name)
            # True is an int in Python, and nobody means it.
            if not isinstance(value, types[str(field.type)]) or (isinstance(value, bool) and field.type != "bool"):
                raise ValueError(f"{field.name}: expected {KINDS[str(field.type)]}, got {value!r}")
        for name, words in (("cell", CELLS), ("dtype", DTYPES)):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}: expected one of {', '.join(words)}, got {getattr(self, name)!r}")
        if self.quantized and self.quantized not in TYPES:
            raise ValueError(f"quantized: expected one of {', '.join(TYPES)}, got {self.quantized!r}")
        if self.quantized and self.dtype != "float32":
            raise ValueError(f"quantized: expected none in {self.dtype}, got {self.quantized!r}")
        least = {
            "batch": 1,
            "hidden_size": 1,
            "steps": 1,
            "input_size": 0,
            "layers": 1,
            "directions": 1,
            "proj_size": 0,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise ValueError(f"{name}: expected at least {smallest}, got {getattr(self, name)}")
        if self.directions > 2:
            raise ValueError(f"directions: expected 1 or 2, got {self.directions}")
        if not 0 <= self.resets <= 1:
            raise ValueError(f"resets: expected a probability, 0 to 1, got {self.resets}")
        # Written so that NaN is refused.
        if not 0 <= self.pause_ms <= MOST_PAUSE_MS:
            raise ValueError(f"pause_ms: expected milliseconds, 0 to {MOST_PAUSE_MS}, got {self.pause_ms}")
        if not 0 <= self.neighbours <= MOST_NEIGHBOURS:
            raise ValueError(
                f"neighbours: expected a number of processes, 0 to {MOST_NEIGHBOURS}, got {self.neighbours}"
            )
        if self.proj_size and self.cell != "LSTM":
            raise ValueError(f"proj_size: expected 0, as only an LSTM has a projection, got {self.proj_size}")
        if self.proj_size >= self.hidden_size:
            raise ValueError(f"proj_size: expected less than hidden_size ({self.hidden_size}), got {self.proj_size}")
        if self.packed and self.lengths:
            raise ValueError("lengths: expected one of packed and lengths, got both")
        if self.ragged and self.resets:
            raise ValueError(f"resets: expected 0 for rows of different lengths, got {self.resets}")
        if self.ragged and self.steps < 2:
            raise ValueError(f"steps: expected at least 2 for rows of different lengths, got {self.steps}")
        for name, only in BESIDE_CELLS.items() if self.cells else ():
            if getattr(self, name) != only:
                raise ValueError(f"{name}: expected {only!r} for a loop of cells, got {getattr(self, name)!r}")

    @property
    def inputs(self) -> int:
        return self.input_size or self.hidden_size

    @property
    def outputs(self) -> int:
        """What one direction hands on: P with a projection, H otherwise."""
        return self.proj_size or self.hidden_size

    @property
    def name(self) -> str:
        """For people. Programs read the fields of `row`."""
        parts = [self.cell, f"T{self.steps}", f"B{self.batch}", f"I{self.inputs}", f"H{self.hidden_size}"]
        parts += [f"P{self.proj_size}"] * (self.proj_size > 0)
        parts += [f"L{self.layers}"] * (self.layers > 1) + ["bidirectional"] * (self.directions > 1)
        parts += [self.dtype] * (self.dtype != "float32")
        parts += ["packed"] * self.packed + ["lengths"] * self.lengths + ["resets"] * (self.resets > 0)
        parts += ["cells"] * self.cells + [f"weights-{self.quantized}"] * bool(self.quantized)
        parts += [f"pause{self.pause_ms:g}ms"] * (self.pause_ms > 0)
        parts += [f"neighbours{self.neighbours}"] * (self.neighbours > 0)
        return (f"{self.model} " if self.model else "") + "-".join(parts)

    @property
    def row(self) -> dict[str, Any]:
        """What the rows of a result file say of the case."""
        return {
            "case": self.name,
            "cell": self.cell,
            "layers": self.layers,
            "directions": self.directions,
            "dtype": self.dtype,
            "T": self.steps,
            "B": self.batch,
            "I": self.inputs,
            "H": self.hidden_size,
            "P": self.proj_size,
            "packed": self.packed,
            "lengths": self.lengths,
            "resets": self.resets,
            "pause_ms": self.pause_ms,
            "neighbours": self.neighbours,
            "quantized": self.quantized,
            "cells": self.cells,
            "model": self.model,
        }

    @property
    def served(self) -> bool:
        """Whether it is timed as a service sees it: single calls, with pauses or beside neighbours (`turns.py`)."""
        return self.pause_ms > 0 or self.neighbours > 0

    def why_not(self, workload: str) -> str | None:
        """Why the case has no such workload; None where it has."""
        if workload == "training" and self.served:
            return "a case with a pause or neighbours is a service's, which does not train"
        if workload == "training" and self.quantized:
            return "quantized weights are not trained"
        if workload == "streaming" and (self.ragged or self.resets):
            return "a streaming step has neither lengths nor resets"
        if workload == "streaming" and self.cells:
            return "inference of cells is one step a call already"
        return None

    @property
    def ragged(self) -> bool:
        return self.packed or self.lengths

    @property
    def row_lengths(self) -> list[int]:
        """The rows' lengths where they differ, in no order: spread evenly over T/2 .. 3T/2, their sum exactly B * T."""
        low = self.steps // 2
        spread = [low + 2 * (self.steps - low) * b // max(1, self.batch - 1) for b in range(self.batch)]
        # What integer division left over goes to the shortest rows, one token each.
        for b in range(self.steps * self.batch - sum(spread)):
            spread[b % self.batch] += 1
        random.Random(0).shuffle(spread)
        return spread

    @property
    def layer_inputs(self) -> list[int]:
        """The input size of each layer."""
        return [self.inputs] + [self.directions * self.outputs] * (self.layers - 1)

    def weights(self) -> int:
        """Elements of all weight matrices."""
        gates = GATES[self.cell] * self.hidden_size
        projection = self.proj_size * self.hidden_size
        return sum(self.directions * (gates * (i + self.outputs) + projection) for i in self.layer_inputs)

    def flops(self, workload: str) -> float:
        """Floating point operations of the matrix products for one step of all rows (mean over the steps).

        Two for each weight and row; with gradients three times as many (the output, the gradients of the input and
        the state, the gradients of the weights). What the cells compute between the products is not counted.
        """
        return 2.0 * self.batch * self.weights() * (3 if workload == "training" else 1)

    def bytes(self, workload: str) -> float:
        """Bytes that every implementation has to move for one step of all rows (mean over the steps of a call).

        Forward reads input and weights once a call and writes the output; with gradients, input and weights are read
        again, their gradients written, and the output's gradient read. A streaming step, and each call of a cell, reads
        the weights each time, forward and backward; the weights' gradients are written once also for a loop of cells.
        What an implementation keeps for its backward pass is its own affair.
        """
        size = getattr(torch, self.dtype).itemsize
        once = self.weights() / self.steps
        weights = self.weights() if self.cells or workload == "streaming" else once
        rows_in, rows_out = self.batch * self.inputs, self.batch * self.directions * self.outputs
        if workload == "training":
            return size * (3 * rows_in + 2 * rows_out + 2 * weights + once)
        return size * (rows_in + rows_out + weights)


class Data(NamedTuple):
    """A case's input. Rows are (T, B, I), or packed; lengths (B,) and resets (T, B) where the case has them."""

    rows: Tensor | PackedSequence
    lengths: Tensor | None = None
    resets: Tensor | None = None

    @property
    def values(self) -> Tensor:
        return self.rows.data if isinstance(self.rows, PackedSequence) else self.rows

    def with_values(self, values: Tensor) -> Data:
        """The same with other numbers in the rows."""
        rows = self.rows._replace(data=values) if isinstance(self.rows, PackedSequence) else values
        return self._replace(rows=rows)


def is_ours(layer: torch.nn.Module) -> bool:
    return isinstance(layer, modules.LSTM | modules.GRU | modules.RNN | cells.Cell)


def make_layers(case: Case, device: torch.device) -> tuple[Layer, Layer]:
    """torch.nn's layer and rnnfast's with the same weights, or their cells."""
    options: dict[str, Any] = {}
    if not case.cells:
        options |= {"num_layers": case.layers, "bidirectional": case.directions == 2}
    if case.proj_size:
        options["proj_size"] = case.proj_size
    pair: list[Layer] = []
    for home in (torch.nn, cells if case.cells else modules):
        made = getattr(home, case.cell + "Cell" * case.cells)(case.inputs, case.hidden_size, **options)
        layer: Layer = made.to(device, getattr(torch, case.dtype))
        if isinstance(layer, torch.nn.RNNBase):
            # cuDNN wants its weights in one piece: anything else would cost torch.nn a copy in every call.
            layer.flatten_parameters()
        pair.append(layer)
    if case.quantized:
        with torch.no_grad():
            for weight in pair[0].parameters():
                if weight.dim() == 2:
                    weight.copy_(rounded(weight, case.quantized))
    pair[1].load_state_dict(pair[0].state_dict())
    return pair[0], pair[1]


def make_data(case: Case, device: torch.device, seed: int = 0) -> Data:
    """Random input of the case's shape."""
    generator = torch.Generator().manual_seed(seed)
    options: dict[str, Any] = {"device": device, "dtype": getattr(torch, case.dtype)}
    resets = None
    if case.resets:
        resets = (torch.rand(case.steps, case.batch, generator=generator) < case.resets).to(device)
    if not case.ragged:
        rows = torch.randn(case.steps, case.batch, case.inputs, generator=generator).to(**options)
        return Data(rows, resets=resets)
    sequences = [torch.randn(n, case.inputs, generator=generator).to(**options) for n in case.row_lengths]
    if case.packed:
        return Data(pack_sequence(sequences, enforce_sorted=False))
    # torch.nn's packing wants the lengths on the CPU.
    return Data(torch.nn.utils.rnn.pad_sequence(sequences), lengths=torch.tensor(case.row_lengths))


def _stretches(resets: Tensor) -> list[int]:
    """Where a call of torch.nn has to begin: the first step, and every step at which some row is reset."""
    cuts = [0, *resets.any(1).nonzero().flatten().tolist(), len(resets)]
    return sorted(set(cuts))


def _run(layer: Layer, data: Data, cuts: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
    """Output (its data, if packed) and last states of either layer; (B, H) where it is a cell."""
    if isinstance(layer, torch.nn.RNNCellBase):
        return _run_cell(layer, data.values)
    if is_ours(layer):
        options = {"lengths": data.lengths, "resets": data.resets}
        # Not even an empty keyword is handed over where there is nothing to say: the call is what a user writes.
        output, state = layer(data.rows, **{key: value for key, value in options.items() if value is not None})
    elif data.lengths is not None:
        assert isinstance(data.rows, Tensor)
        packed, state = layer(pack_padded_sequence(data.rows, data.lengths, enforce_sorted=False))
        output, _ = pad_packed_sequence(packed, total_length=data.rows.size(0))
    elif data.resets is not None:
        return _run_stretches(layer, data.values, data.resets, cuts)
    else:
        output, state = layer(data.rows)
    output = output.data if isinstance(output, PackedSequence) else output
    return output, list(state) if isinstance(state, tuple) else [state]


def _run_cell(cell: torch.nn.RNNCellBase, rows: Tensor) -> tuple[Tensor, list[Tensor]]:
    """A loop of calls, as decoders, policies and graph networks have it; the first state is left to the cell."""
    outputs: list[Tensor] = []
    state: Any = None
    for row in rows.unbind(0):
        state = cell(row, state)
        outputs.append(state[0] if isinstance(state, tuple) else state)
    return torch.stack(outputs), list(state) if isinstance(state, tuple) else [state]


def _run_stretches(
    layer: torch.nn.RNNBase, rows: Tensor, resets: Tensor, cuts: Sequence[int]
) -> tuple[Tensor, list[Tensor]]:
    """torch.nn's layer with resets: one call a stretch, the states of the rows that begin anew zeroed before it."""
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    state: Any = None
    for start, end in pairwise(cuts):
        if states:
            goes_on = ~resets[start].view(1, -1, 1)
            states = [value * goes_on for value in states]
            state = tuple(states) if len(states) > 1 else states[0]
        output, state = layer(rows[start:end], state)
        states = list(state) if isinstance(state, tuple) else [state]
        outputs.append(output)
    return torch.cat(outputs), states


def make_call(layer: Layer, case: Case, workload: str, data: Data) -> Call:
    """What is timed.

    Args:
        layer: torch.nn's or rnnfast's; a cell where the case is a loop of cells.
        case: the case.
        workload: one of `WORKLOADS`.
        data: its input.

    Returns:
        A function that gives, for "inference" and "streaming", the output (of the last step) and the last states; for
        "training" the output and the gradients of input and weights, for one fixed gradient of the output.

    Raises:
        Impossible: the case has no such workload.
    """
    if (why := case.why_not(workload)) is not None:
        raise Impossible(why)
    cuts = _stretches(data.resets) if data.resets is not None and not is_ours(layer) else []
    layer.train(workload == "training")
    if is_ours(layer) and data.lengths is not None:
        data = data._replace(lengths=data.lengths.to(data.values.device))
    if workload == "inference":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                output, states = _run(layer, data, cuts)
            return [output, *states]

        return forward
    if workload == "streaming":
        steps = [row.unsqueeze(0) for row in data.values[:STREAMED]]

        def stream() -> list[Tensor]:
            output, state = None, None
            with torch.no_grad():
                for row in steps:
                    output, state = layer(row, state)
            return [output, *(state if isinstance(state, tuple) else (state,))]

        return stream
    leaf = data.values.detach().requires_grad_()
    data = data.with_values(leaf)
    leaves = [leaf, *layer.parameters()]
    with torch.no_grad():
        shape = _run(layer, data, cuts)[0].shape
    # Rounded to the case's type also where the truth is computed.
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(getattr(torch, case.dtype)).to(leaf)

    def forward_backward() -> list[Tensor]:
        output, _ = _run(layer, data, cuts)
        return [output, *torch.autograd.grad(output, leaves, grad)]

    return forward_backward


def timed_steps(case: Case, workload: str) -> int:
    """How many steps one call takes."""
    return min(case.steps, STREAMED) if workload == "streaming" else case.steps


def exact(layer: Layer, case: Case, workload: str, data: Data) -> list[Tensor]:
    """What the call should give: torch.nn's results in float64."""
    truth = make_call(copy.deepcopy(layer).double(), case, workload, data.with_values(data.values.double()))
    return [value.detach() for value in truth()]


def rounding(dtype: torch.dtype, coarse: bool) -> float:
    """By how much of the largest value a result may always be off: how numbers of this type are rounded.

    With weights in int8 the rows are rounded to 16 bits (`quantization.py`). With TF32 operands have 10 bits behind the
    first. cuDNN may take it where it is allowed, and may not: its own error does not say which, so it cannot be the
    yardstick alone.
    """
    if dtype in (torch.float32, torch.float64):
        return 2.0**-10 if coarse and dtype == torch.float32 else 1e-6
    return torch.finfo(dtype).eps


def compare(
    truth: Sequence[Tensor], theirs: Sequence[Tensor], ours: Sequence[Tensor], coarse: bool = False
) -> str | None:
    """Checks a call's results: the error against float64 at most twice torch.nn's own, plus the type's rounding.

    Args:
        truth: from `exact`.
        theirs: torch.nn's results.
        ours: the first so many of the same.
        coarse: whether products of float32 may have been computed in TF32, or from weights in int8.

    Returns:
        None where they pass, otherwise what is wrong.
    """
    # The call may be anybody's (a peer's).
    if not isinstance(ours, list | tuple):
        return f"results: expected a list of tensors, got {type(ours).__name__}"
    for number, us in enumerate(ours):
        if not isinstance(us, Tensor):
            return f"result {number}: expected a tensor, got {type(us).__name__}"
    if not ours:
        return "results: expected at least one, got none"
    for number, (right, them, us) in enumerate(zip(truth, theirs, ours, strict=False)):
        if us.shape != right.shape:
            return f"result {number}: shape {tuple(us.shape)}, expected {tuple(right.shape)}"
        if not right.numel():
            continue
        own = rounding(us.dtype, coarse) * right.abs().max().clamp(min=1)
        allowed = 2 * (them.detach().double() - right).abs().max() + own
        error = (us.detach().double() - right).abs().max()
        # Written so that a NaN on our side fails.
        if not error <= allowed:
            return f"result {number}: error {float(error):.2e}, allowed {float(allowed):.2e}"
    return None

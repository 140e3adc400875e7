"""The shapes that are timed, by name: every benchmark, chart and table takes its cases from here and nowhere else."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product

CELLS = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Case:
    """One layer on one shape. The names of the fields' short forms, T, B, I and H, are those of the result files.

    Args:
        cell: "LSTM", "GRU" or "RNN".
        batch: rows, B.
        hidden_size: H.
        steps: T; for a packed case the mean length of a row.
        input_size: I; 0 means the hidden size.
        packed: a ``PackedSequence`` of ``batch`` rows with lengths from T/2 to 3T/2: B * T tokens, as
            many as the padded case has.
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

    @property
    def inputs(self) -> int:
        return self.input_size or self.hidden_size

    @property
    def name(self) -> str:
        parts = [self.cell, f"T{self.steps}", f"B{self.batch}", f"I{self.inputs}", f"H{self.hidden_size}"]
        parts += [f"L{self.layers}"] * (self.layers > 1) + ["bidirectional"] * (self.directions > 1)
        parts += [self.dtype] * (self.dtype != "float32") + ["packed"] * self.packed
        return "-".join(parts)

    @property
    def lengths(self) -> list[int]:
        """The packed rows' lengths, in no order: spread evenly over T/2 .. 3T/2, their sum exactly B * T."""
        low = self.steps // 2
        spread = [low + 2 * (self.steps - low) * b // max(1, self.batch - 1) for b in range(self.batch)]
        # What integer division left over goes to the shortest rows, one token each.
        for b in range(self.steps * self.batch - sum(spread)):
            spread[b % self.batch] += 1
        random.Random(0).shuffle(spread)
        return spread


SUITES: dict[str, list[Case]] = {
    "bar": [Case(cell, batch, hidden) for cell, batch, hidden in product(CELLS, (1, 8, 64), (64, 256, 512))],
    "small": [Case(cell, batch, hidden, steps=1) for cell, batch, hidden in product(CELLS, (1, 8), (64, 256))],
    "packed": [Case(cell, 64, 256, packed=True) for cell in CELLS],
    "smoke": [Case("LSTM", 2, 8, steps=3), Case("GRU", 3, 8, steps=4, packed=True)],
}

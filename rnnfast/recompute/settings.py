"""What users say of memory: the arguments `recompute` and `memory_budget` of layers."""

from __future__ import annotations

import numbers
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..backends import select
from ..cell_types import CELLS
from ..sequences import Sequences
from .memory import Training, best_way

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Way(NamedTuple):
    """How a call saves memory.

    Attributes:
        how: "gates" or "chunks".
        pieces: how many, 0: as fits.
    """

    how: str
    pieces: int = 0


@dataclass(frozen=True)
class Recompute:
    """What a module was told, checked.

    Attributes:
        how: "gates", "chunks" or "auto".
        pieces: of "chunks": how many, 0: as fits.
        budget: of "auto": bytes.
    """

    how: str
    pieces: int = 0
    budget: int = 0

    def way(
        self,
        mode: str,
        input: Tensor,
        weights: Any,
        sequences: Sequences,
        num_layers: int,
        bidirectional: bool,
        options: Any = None,
    ) -> Way | None:
        """What a call of these layers does; None: it keeps everything.

        Args:
            weights: the parameters of all layers, weight_ih and weight_hh of the first direction in front.
            options: of layers whose options change their recurrence.
            others: as `functional.run_layers`.
        """
        if steps_of(input, sequences) == 1:
            return None
        if self.how != "auto":
            return Way(self.how, self.pieces)
        training = training_of(mode, input, weights, sequences, num_layers, bidirectional, options)
        how = best_way(training, self.budget)
        return None if how is None else Way(how)


def steps_of(input: Tensor, sequences: Sequences) -> Any:
    """T."""
    if sequences.batch_sizes is not None:
        return sequences.batch_sizes.shape[0]
    return input.shape[1 if sequences.batch_first else 0]


def training_of(
    mode: str,
    input: Tensor,
    weights: Any,
    sequences: Sequences,
    num_layers: int,
    bidirectional: bool,
    options: Any = None,
) -> Training:
    """The call, of the arguments of `Recompute.way`, as `memory_of` takes it."""
    rows = 1
    for size in input.shape[:-1]:
        rows *= size
    gates_of_units, state_size = weights[1].shape
    hidden_size = gates_of_units // CELLS[mode].gates if options is None else options.hidden_size(weights[1])
    return Training(
        mode, input.shape[-1], hidden_size, steps_of(input, sequences), rows,
        proj_size=state_size if options is None and state_size != hidden_size else 0,
        num_layers=num_layers, directions=2 if bidirectional else 1, item=input.element_size(),
        whole_backward=options is None and select(input) == "cpu",
        input_gradient=input.requires_grad, options=options,
    )  # fmt: skip


def recompute_of(cls: str, recompute: Any, memory_budget: Any, batch_norm: bool = False) -> Recompute | None:
    """What a layer's arguments say; None: nothing is to be saved.

    Args:
        cls: the layer's class, for messages.
        recompute: None, "gates", "chunks", a number of chunks, or "auto".
        memory_budget: of "auto": bytes, a number or as in "1.5 GB".
        batch_norm: whether the layer has one.

    Raises:
        TypeError, ValueError: they are not, or do not go together.
    """
    if recompute is None or isinstance(recompute, str):
        if recompute not in (None, "gates", "chunks", "auto"):
            raise ValueError(
                f"{cls}: recompute: expected None, 'gates', 'chunks', a number of chunks or 'auto', got {recompute!r}"
            )
    elif isinstance(recompute, bool) or not isinstance(recompute, numbers.Integral):
        raise TypeError(
            f"{cls}: recompute: expected None, 'gates', 'chunks', a number of chunks or 'auto', got {recompute!r}"
        )
    elif not 1 <= int(recompute) < 2**63:
        raise ValueError(f"{cls}: recompute: expected from 1 to 2**63 - 1 chunks, got {recompute!r}")
    if memory_budget is not None and recompute != "auto":
        raise ValueError(f"{cls}: memory_budget: goes with recompute='auto', got recompute={recompute!r}")
    if recompute is None:
        return None
    if batch_norm:
        raise ValueError(
            f"{cls}: recompute: expected None with batch_norm, whose statistics are of all steps, got {recompute!r}"
        )
    if recompute == "auto":
        if memory_budget is None:
            raise ValueError(f"{cls}: memory_budget: expected bytes with recompute='auto', got None")
        return Recompute("auto", budget=bytes_of(cls, memory_budget))
    return Recompute(recompute) if isinstance(recompute, str) else Recompute("chunks", int(recompute))


def bytes_of(cls: str, amount: Any) -> int:
    """Bytes, of a number or a text as "800 MB" or "2GiB".

    Raises:
        TypeError, ValueError: it is neither, or not positive.
    """
    what = f"{cls}: memory_budget: expected bytes, as 2_000_000_000 or '2 GB', got {amount!r}"
    # A whole number may be more than a float can have.
    number: Any = amount
    if isinstance(amount, str):
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMG]?i?B)?\s*", amount, re.IGNORECASE | re.ASCII)
        if found is None:
            raise ValueError(what)
        number = float(found[1]) * _UNITS[(found[2] or "").upper()]
    elif isinstance(amount, bool) or not isinstance(amount, numbers.Real):
        raise TypeError(what)
    if not 1 <= number < 2**63:
        raise ValueError(what)
    return int(number)

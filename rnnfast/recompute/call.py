"""What the ops of recompute are told of a call beside its tensors: one string, because it is the same in every run."""

from __future__ import annotations

import functools
import json
from typing import NamedTuple


class Call(NamedTuple):
    """A call of one layer.

    Attributes:
        how: "gates" or "chunks".
        backend: what runs it; of layers with options what was asked for, as `backends.asked_for` has it.
        mode: a key of `CELLS`.
        batch_first: as in `Sequences`.
        keeps_cell_states: whether every c_t is a result.
        options: `Options.text` of a layer whose options change its recurrence; else "".
        reverse: of such a layer, which has one direction a call: whether it is the reversed one.
        names: of the tensors, in their order.
    """

    how: str
    backend: str
    mode: str
    batch_first: bool
    keeps_cell_states: bool
    options: str
    reverse: bool
    names: tuple[str, ...]

    def text(self) -> str:
        return json.dumps(self)

    @staticmethod
    @functools.lru_cache(maxsize=256)
    def of(text: str) -> Call:
        call = Call._make(json.loads(text))
        return call._replace(names=tuple(call.names))

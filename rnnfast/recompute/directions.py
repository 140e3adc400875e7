"""One direction of a layer over one piece of its steps: forward, and backward with what forward gave made again.

`Direction` is what op.py runs; the layers of `functional.run_layers` and those with options have one each.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..autograd import DIFFERENTIABLE, LAYER, layer_backward
from ..backends import BACKENDS
from ..cell_types import CELLS
from ..sequences import Sequences, entered, zero_beyond
from ..signatures import PLACES
from .call import Call
from .pieces import Pieces

# By kind, "h", "c" and of the sLSTM "l": (B, width), the state.
States = dict[str, Tensor]


class Given(NamedTuple):
    """What a piece's steps take: rows as `Pieces.read` gives them, the states that enter."""

    input: Tensor
    states: States
    sequences: Sequences
    pieces: Pieces
    piece: int


class Made(NamedTuple):
    """What a piece's steps give: rows, the states that leave, every c_t."""

    output: Tensor
    states: States
    cell_states: Tensor | None


class GradientsOfMade(NamedTuple):
    """Of what a piece gives, None where nobody asks: of output, of the states that leave, of every c_t."""

    output: Tensor | None
    states: States
    cell_states: Tensor | None


class Gradients(NamedTuple):
    """Of the input's rows where asked for, of the states that enter, and by name of the parameters that want one."""

    input: Tensor | None
    states: States
    parameters: dict[str, Tensor | None]


class Direction(ABC):
    """One direction of one layer.

    Attributes:
        reverse: whether it is the reversed one.
        widths: by kind of state: how many features it has.
    """

    reverse: bool
    widths: dict[str, int]

    @abstractmethod
    def forward(self, given: Given, keeps_cell_states: bool) -> Made:
        """A piece's steps, nothing saved but, where wanted, every c_t."""

    @abstractmethod
    def backward(self, given: Given, made: Made | None, grads: GradientsOfMade, wanted: set[str]) -> Gradients:
        """The gradients of a piece.

        Args:
            made: what forward gave, where it was kept: then the gates come from one product over all rows, and no step
                runs again. None: forward runs again.
            grads: of what the piece gives.
            wanted: the parameters, and "input", that want a gradient.
        """

    def initial(self, kind: str, like: Tensor, batch: int) -> Tensor:
        """The state of a kind, (B, width), where none was given."""
        # Of the sLSTM log n + m, where n is zero.
        return like.new_full((batch, self.widths[kind]), -torch.inf if kind == "l" else 0.0)


class PlainDirection(Direction):
    """By a backend's ops for layers."""

    def __init__(self, call: Call, tensors: Mapping[str, Tensor], suffix: str) -> None:
        self.reverse = suffix == "_reverse"
        self._mode, self._backend, cell = call.mode, call.backend, CELLS[call.mode]
        self._kernels = BACKENDS[call.backend].kernels
        # A direction by itself stands in the places of the first one.
        of_first = PLACES[::2]
        self._places = [value for name in of_first for value in (tensors.get(name + suffix), None)]
        self._names = {name: name + suffix for name in of_first if name + suffix in tensors}
        rows, state_size = tensors[f"weight_hh{suffix}"].shape
        self.widths = {"h": state_size}
        if cell.has_cell_state:
            self.widths["c"] = rows // cell.gates

    def _arguments(self, given: Given) -> tuple[Any, ...]:
        """From hx on."""
        states = [given.states[kind].unsqueeze(0) for kind in self.widths]
        return (*states, *[None] * (2 - len(states)), *given.sequences, *self._places)

    def forward(self, given: Given, keeps_cell_states: bool) -> Made:
        op = self._kernels.layer_forward if keeps_cell_states else self._kernels.layer
        output, h_n, c_n, *every_c = op(self._mode, given.input, *self._arguments(given))
        states = dict(zip(self.widths, (h_n.squeeze(0), c_n.squeeze(0)), strict=False))
        return Made(output, states, every_c[0] if every_c else None)

    def backward(self, given: Given, made: Made | None, grads: GradientsOfMade, wanted: set[str]) -> Gradients:
        mode, arguments = self._mode, self._arguments(given)
        if made is None:
            output, _, _, cell_states, reserve = self._kernels.layer_forward(mode, given.input, *arguments)
        else:
            output, reserve = made.output, self._reserve(given, made)
            cell_states = output.new_empty(0) if made.cell_states is None else made.cell_states
        of_output, of_states, of_cells = grads
        of_h, of_c = (of_states[kind].unsqueeze(0) if kind in of_states else None for kind in ("h", "c"))
        needs = [False] * len(LAYER)
        for place in DIFFERENTIABLE:
            name = LAYER[place]
            # Of the parameters, which stand in the first direction's places, by their own names.
            own = "input" if name == "input" else self._names.get(name)
            needs[place] = name in ("hx", "cx") or own in wanted
        saved = (output, cell_states, reserve)
        found = layer_backward(
            (self._backend, given.input, mode, of_output, of_h, of_c, of_cells, *saved, *arguments), needs
        )
        by_name = dict(zip(LAYER, found, strict=True))
        states = {}
        for kind, name in zip(self.widths, ("hx", "cx"), strict=False):
            grad = by_name[name]
            assert grad is not None
            states[kind] = grad.squeeze(0)
        parameters = {own: by_name[name] for name, own in self._names.items() if own in wanted}
        return Gradients(by_name["input"], states, parameters)

    def _reserve(self, given: Given, made: Made) -> Tensor:
        """What forward saved, from one step of all rows: the states that entered each are known."""
        rows = made.output.shape[:-1]
        if CELLS[self._mode].reserve == 0:
            return made.output.new_empty(0)
        x = zero_beyond(given.input, given.sequences)
        states = entering(given, made)
        step: list[Any] = [of.flatten(0, -2) for of in (x, *states.values())]
        step += [None] * (3 - len(step))
        results = self._kernels.layer_forward(self._mode, *step, *Sequences(), *self._places)
        reserve: Tensor = results[-1]
        return reserve.view(*rows, reserve.shape[-1])


def entering(given: Given, made: Made) -> States:
    """The states that entered each row: (rows, width)."""
    known = {"h": made.output} | ({} if made.cell_states is None else {"c": made.cell_states})
    return {kind: entered(rows, given.states[kind], False, given.sequences) for kind, rows in known.items()}

"""One direction of a layer with options over one piece of its steps: see `recompute.directions`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import kernels_for_options, select_with_options
from ..cell_types import CELLS
from ..recompute.call import Call
from ..recompute.directions import Direction, Given, Gradients, GradientsOfMade, Made, entering
from ..sequences import Sequences
from . import ops
from .layers import DirectionWeights, recurrence_of, run_direction
from .options import Options
from .reference import MASKS_OF_STEPS, Arguments, Masks

# Of torch.nn's; what the options bring has names of its own.
_OWN = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
# Many calls have the same.
_options_of = functools.lru_cache(maxsize=256)(Options.of_text)
_MASKS = tuple(f"mask_{name}" for name in Masks._fields)


def whole(call: Call, named: Mapping[str, Tensor], sequences: Sequences) -> tuple[Tensor | None, ...]:
    """A direction in one piece: output (rows, H), h_n, c_n, l_n (1, B, H), cell_states (rows, H)."""
    hx, cx, lx = (named[name][0] if name in named else None for name in ("hx", "cx", "lx"))
    output, h_n, c_n, cell_states, l_n = run_direction(
        _options_of(call.options), call.mode, named["input"], hx, cx, lx, _placed(_parameters(named)), sequences,
        call.reverse, Masks(*map(named.get, _MASKS)), True,
    )  # fmt: skip
    return output, h_n.unsqueeze(0), c_n.unsqueeze(0), l_n.unsqueeze(0), cell_states


def _parameters(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in named.items() if name.startswith(("weight_", "bias_"))}


def _placed(weights: Mapping[str, Tensor]) -> DirectionWeights:
    others = {name: value for name, value in weights.items() if name not in _OWN}
    return DirectionWeights(
        weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh"), others, {}
    )


class DirectionWithOptions(Direction):
    """By a backend's ops for layers with options, or by the reference where that runs them."""

    def __init__(self, call: Call, tensors: Mapping[str, Tensor]) -> None:
        self.reverse = call.reverse
        self._mode, self._options = call.mode, _options_of(call.options)
        self._tensors = _parameters(tensors)
        self._masks = Masks(*map(tensors.get, _MASKS))
        hidden_size = self._options.hidden_size(tensors["weight_hh"])
        self.widths = {"h": hidden_size}
        if CELLS[self._mode].has_cell_state:
            self.widths["c"] = hidden_size
        if self._options.is_exponential:
            self.widths["l"] = hidden_size

    def _masks_of(self, given: Given) -> Masks:
        """The masks of a piece's rows."""
        batch = given.pieces.batch_of(given.piece)

        def own(name: str, mask: Tensor | None) -> Tensor | None:
            if mask is None:
                return None
            return given.pieces.read(given.piece, mask).contiguous() if name in MASKS_OF_STEPS else mask[:batch]

        return Masks(*map(own, Masks._fields, self._masks))

    def _call(self, given: Given, weights: Mapping[str, Tensor]) -> tuple[Any, ...]:
        """The arguments of `run_direction`."""
        states = [given.states.get(kind) for kind in ("h", "c", "l")]
        return (
            self._options, self._mode, given.input, *states, _placed(weights), given.sequences, False,
            self._masks_of(given), True,
        )  # fmt: skip

    def forward(self, given: Given, keeps_cell_states: bool) -> Made:
        return self._made(run_direction(*self._call(given, self._tensors)))

    def _made(self, results: tuple[Tensor, ...]) -> Made:
        output, h_n, c_n, cell_states, l_n = results
        left = {"h": h_n, "c": c_n, "l": l_n}
        return Made(output, {kind: left[kind] for kind in self.widths}, cell_states if "c" in self.widths else None)

    def backward(self, given: Given, made: Made | None, grads: GradientsOfMade, wanted: set[str]) -> Gradients:
        def leaf(value: Tensor, needs: bool) -> Tensor:
            return value.detach().requires_grad_(needs)

        with torch.enable_grad():
            x = leaf(given.input, "input" in wanted)
            states = {kind: leaf(state, True) for kind, state in given.states.items()}
            weights = {name: leaf(value, name in wanted) for name, value in self._tensors.items()}
            own = given._replace(input=x, states=states)
            call = self._call(own, weights)
            differentiated = [value for value in (x, *states.values(), *weights.values()) if value.requires_grad]
            found = self._by_known_states(own, made, call, grads, differentiated)
            if found is None:
                now = self._made(run_direction(*call))
                results = [now.output, *now.states.values(), now.cell_states]
                cotangents = [grads.output, *(grads.states.get(kind) for kind in now.states), grads.cell_states]
                found = _pulled_back(results, cotangents, differentiated)
        by_leaf = dict(zip(map(id, differentiated), found, strict=True))
        of_states: dict[str, Tensor] = {}
        for kind, state in states.items():
            grad = by_leaf[id(state)]
            of_states[kind] = torch.zeros_like(state) if grad is None else grad
        return Gradients(
            by_leaf.get(id(x)),
            of_states,
            {name: by_leaf[id(value)] for name, value in weights.items() if name in wanted},
        )

    def _by_known_states(
        self,
        given: Given,
        made: Made | None,
        call: tuple[Any, ...],
        grads: GradientsOfMade,
        differentiated: Sequence[Tensor],
    ) -> Sequence[Tensor | None] | None:
        """The gradients by kernels, which are given what one step of all rows saves; None where that cannot be: l_t of
        the sLSTM is not kept, and the reference saves nothing.

        Args:
            given, made, grads: as for `backward`.
            call: the arguments of `run_direction`.
            differentiated: of what.
        """
        name, why_not = select_with_options(given.input)
        # As `ops.recurrence`, which complex numbers pass by the kernels too.
        if made is None or self._options.is_exponential or why_not is not None or given.input.dtype.is_complex:
            return None
        arguments = recurrence_of(*call)[0]
        variables = (arguments.gates, arguments.hx, arguments.cx, arguments.lx, *arguments.weights)
        by_place = {
            place: variable
            for place, variable in zip(ops.DIFFERENTIABLE, variables, strict=True)
            if variable is not None and variable.requires_grad
        }
        cotangents = (grads.output, grads.states.get("h"), grads.states.get("c"), grads.cell_states, None)
        kernels = kernels_for_options(name)
        with torch.no_grad():
            saved = self._saved(given, made, arguments, kernels.forward)
            found = ops.gradients(kernels.backward, arguments, list(by_place), cotangents, saved)
        return _pulled_back(list(by_place.values()), found, differentiated)

    @staticmethod
    def _saved(given: Given, made: Made, arguments: Arguments, forward: Callable[..., Any]) -> tuple[Tensor, ...]:
        """output, cell_states, reserve, normed, scale, as backward takes them: from one step of all rows."""
        rows, states = arguments.gates, entering(given, made)

        def in_a_line(of_rows: Tensor) -> Tensor:
            return of_rows.flatten(0, -2)

        def of_each_row(name: str, mask: Tensor | None) -> Tensor | None:
            if mask is None:
                return None
            if name in MASKS_OF_STEPS:
                return in_a_line(mask).unsqueeze(0)
            return in_a_line(ops.of_rows(mask, given.sequences, rows).expand(*rows.shape[:-1], -1))

        one_step = arguments._replace(
            gates=in_a_line(rows).unsqueeze(0),
            hx=in_a_line(states["h"]),
            cx=in_a_line(states["c"]) if "c" in states else None,
            sequences=Sequences(),
            masks=Masks(*map(of_each_row, Masks._fields, arguments.masks)),
        )
        *_, reserve, normed, scale = forward(True, *ops.flat(one_step))
        cells = made.output.new_empty(0) if made.cell_states is None else made.cell_states
        # (0,) where there is none.
        each = (
            value if value.dim() == 1 else value.view(*rows.shape[:-1], value.shape[-1])
            for value in (reserve, normed, scale)
        )
        return (made.output, cells, *each)


def _pulled_back(
    results: Sequence[Tensor | None], cotangents: Sequence[Tensor | None], differentiated: Sequence[Tensor]
) -> Sequence[Tensor | None]:
    """The gradients of `differentiated`, where the results have these."""
    pairs = [
        (result, grad)
        for result, grad in zip(results, cotangents, strict=True)
        if result is not None and grad is not None
    ]
    return torch.autograd.grad(
        [result for result, _ in pairs], differentiated, [grad for _, grad in pairs], allow_unused=True
    )

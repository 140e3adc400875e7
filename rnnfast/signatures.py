"""The ops' arguments: their names and types, and what each is. csrc/schemas.h and csrc/places.h have the same for C++.

A layer's parameters have fixed places among the arguments, None where there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

# What an argument or a result is. ROWS: (T, B, ...), with batch_first (B, T, ...), packed (rows, ...), of one step
# (B, ...). STATE: (D, B, ...), of one step (B, ...). BATCH: (B,). SIZES: batch_sizes. WEIGHT: a parameter.
# OTHER: anything that is not a tensor.
ROWS, STATE, BATCH, SIZES, WEIGHT, OTHER = range(6)

# The kinds of parameters, each with two places: of the first direction and of the reversed one. A new kind is a line
# here, at the end (saved programs count places), one in csrc/places.h, and two names in the Functions of autograd.py.
KINDS = (
    "weight_ih",
    "weight_hh",
    "bias_ih",
    "bias_hh",
    "weight_hr",
)
PLACES = tuple(f"{kind}{direction}" for kind in KINDS for direction in ("", "_reverse"))
# Where each kind's first place is; its second one follows.
IH, HH, BIAS_IH, BIAS_HH, HR = range(0, len(PLACES), 2)
Places = tuple[Tensor | None, ...]


class Argument(NamedTuple):
    """One argument of an op."""

    name: str
    type: str
    role: int


class Signature(NamedTuple):
    """An op's arguments, and its results by their roles."""

    arguments: tuple[Argument, ...]
    results: tuple[int, ...]

    @property
    def roles(self) -> tuple[int, ...]:
        return tuple(argument.role for argument in self.arguments)

    def schema(self, name: str) -> str:
        """The op's schema, as torch.library takes it."""
        arguments = ", ".join(
            f"{argument.type} {argument.name}" + ("=None" if argument.role == WEIGHT else "")
            for argument in self.arguments
        )
        results = ", ".join(["Tensor"] * len(self.results))
        return f"{name}({arguments}) -> {results if len(self.results) == 1 else f'({results})'}"


_MODE = Argument("mode", "str", OTHER)
_BATCH_FIRST = Argument("batch_first", "bool", OTHER)
_INPUT = Argument("input", "Tensor", ROWS)
_SHARED = (
    Argument("hx", "Tensor?", STATE),
    Argument("cx", "Tensor?", STATE),
    Argument("batch_sizes", "Tensor?", SIZES),
    Argument("lengths", "Tensor?", BATCH),
    Argument("resets", "Tensor?", ROWS),
)
_PARAMETERS = tuple(Argument(name, "Tensor?", WEIGHT) for name in PLACES)
_STATES = (ROWS, STATE, STATE)
_SAVED = (ROWS, ROWS)

OPS = {
    "input_projection": Signature((_MODE, _INPUT, *_PARAMETERS), (ROWS,)),
    "recurrence_forward": Signature(
        (
            _MODE, _BATCH_FIRST, Argument("save_reserve", "bool", OTHER), Argument("gates", "Tensor", ROWS), *_SHARED,
            *_PARAMETERS,
        ),
        _STATES + _SAVED,
    ),
    "recurrence_backward": Signature(
        (
            _MODE,
            _BATCH_FIRST,
            Argument("grad_output", "Tensor?", ROWS),
            Argument("grad_h_n", "Tensor?", STATE),
            Argument("grad_c_n", "Tensor?", STATE),
            Argument("grad_cell_states", "Tensor?", ROWS),
            Argument("output", "Tensor?", ROWS),
            Argument("cell_states", "Tensor", ROWS),
            Argument("reserve", "Tensor", ROWS),
            *_SHARED,
            *_PARAMETERS,
        ),
        (ROWS, ROWS, STATE, STATE, ROWS),
    ),
    "layer_forward": Signature((_MODE, _BATCH_FIRST, _INPUT, *_SHARED, *_PARAMETERS), _STATES + _SAVED),
    "layer": Signature((_MODE, _BATCH_FIRST, _INPUT, *_SHARED, *_PARAMETERS), _STATES),
}  # fmt: skip


def place_weights(weights: Sequence[Tensor], directions: int, bias: bool) -> Places:
    """One layer's parameters, in torch.nn's order, in their places."""
    each = len(weights) // directions
    places: list[Tensor | None] = [None] * len(PLACES)
    for d in range(directions):
        own = weights[d * each : (d + 1) * each]
        places[IH + d], places[HH + d] = own[0], own[1]
        if bias:
            places[BIAS_IH + d], places[BIAS_HH + d] = own[2], own[3]
        if each % 2:
            places[HR + d] = own[-1]
    return tuple(places)


def of_kind(places: Sequence[Any], kind: int) -> list[Any]:
    """One kind of parameter, a tensor for each direction that has it. `places` may end early, as arguments may."""
    return [weight for weight in places[kind : kind + 2] if weight is not None]


def filled(op: str, arguments: Sequence[Any]) -> tuple[Any, ...]:
    """All of an op's arguments: the dispatcher leaves out those at the end that are None."""
    return (*arguments, *[None] * (len(OPS[op].arguments) - len(arguments)))


def rows_of_one_step(rows: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether these rows are one step, (B, ...), and not packed."""
    return rows.dim() == 2 and batch_sizes is None


def is_one_step(op: str, arguments: Sequence[Any]) -> bool:
    """Whether an op is given one step. (For input_projection rows are rows.)"""
    given = {argument.name: value for argument, value in zip(OPS[op].arguments, arguments, strict=False)}
    model = next(given[name] for name in ("input", "gates", "output", "reserve") if given.get(name) is not None)
    return rows_of_one_step(model, given.get("batch_sizes", model))


def as_sequence(op: str, function: Callable[..., Any], arguments: Sequence[Any]) -> tuple[Tensor, ...]:
    """One step through a function that knows only sequences: as one of T = 1, and its results without that T."""
    lifted = [
        value.unsqueeze(0) if argument.role in (ROWS, STATE) and value is not None and value.dim() == 2 else value
        for value, argument in zip(arguments, OPS[op].arguments, strict=False)
    ]
    # No views: callers write into the states of cells.
    results = [value.squeeze(0).clone() if value.dim() == 3 else value for value in function(*lifted)]
    if op != "recurrence_backward":
        # h_n would be the output again.
        results[1] = results[0].new_empty(0)
    return tuple(results)

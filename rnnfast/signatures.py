"""The ops' arguments: records that they travel in, and the schemas made of them.

C++ has csrc/schemas.h and csrc/parameters.h.

Inside rnnfast the arguments are records; they are laid out flat, in the order of the op's schema, where an op or a
kernel is called, and nowhere else.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from .cell_types import CELLS
from .sequences import ROLES as SEQUENCE_ROLES
from .sequences import Role, Sequences


class Parameters(NamedTuple):
    """One layer's parameters, None where there is none: each kind has two places, of the first direction and of the
    reversed one. A new kind is two lines here, at the end (saved programs count places), one in `KINDS`, two in
    csrc/parameters.h, two names in each Function of autograd.py, and its gradient there.
    """

    weight_ih: Tensor | None = None
    weight_ih_reverse: Tensor | None = None
    weight_hh: Tensor | None = None
    weight_hh_reverse: Tensor | None = None
    bias_ih: Tensor | None = None
    bias_ih_reverse: Tensor | None = None
    bias_hh: Tensor | None = None
    bias_hh_reverse: Tensor | None = None
    weight_hr: Tensor | None = None
    weight_hr_reverse: Tensor | None = None

    def each(self, kind: str) -> list[Tensor]:
        """The parameters of a kind, one for each direction that has it."""
        place = PLACE_OF[kind]
        return [parameter for parameter in self[place : place + 2] if parameter is not None]

    @property
    def directions(self) -> int:
        return 2 if any(parameter is not None for parameter in self[1::2]) else 1

    @property
    def is_projected(self) -> bool:
        return self.weight_hr is not None


class Kind(NamedTuple):
    """A kind of parameter.

    Attributes:
        shape: its sizes, of `gates` (G*H), `input` (I), `state` (P with projection, else H) and `hidden` (H).
        option: what a layer has it with, `bias` or `projection`; "" always.
    """

    shape: tuple[str, ...]
    option: str = ""


# In the order in which torch.nn keeps a layer's parameters of one direction.
KINDS = {
    "weight_ih": Kind(("gates", "input")),
    "weight_hh": Kind(("gates", "state")),
    "bias_ih": Kind(("gates",), "bias"),
    "bias_hh": Kind(("gates",), "bias"),
    "weight_hr": Kind(("state", "hidden"), "projection"),
}
# What the time loop multiplies with.
OF_RECURRENCE = tuple(name for name, kind in KINDS.items() if len(kind.shape) == 2 and "input" not in kind.shape)
PLACES = Parameters._fields
# Where each kind's first place is; its second one follows.
PLACE_OF = {kind: 2 * i for i, kind in enumerate(KINDS)}


def _kinds_of(bias: bool, projection: bool) -> tuple[str, ...]:
    has = {"": True, "bias": bias, "projection": projection}
    return tuple(name for name, kind in KINDS.items() if has[kind.option])


def _places_of(directions: int, kinds: tuple[str, ...]) -> tuple[tuple[int, ...], Callable[[Any], Any]]:
    """Where each place's parameter stands in torch.nn's list of a layer's, behind the list for those that lack; and
    what fetches them."""
    where = [directions * len(kinds)] * len(PLACES)
    for d in range(directions):
        for i, name in enumerate(kinds):
            where[PLACE_OF[name] + d] = d * len(kinds) + i
    return tuple(where), operator.itemgetter(*where)


_dynamo_traces = torch.compiler.is_dynamo_compiling

# Made once, and no cache: these stand on the path of every call, and Dynamo warns of caches.
_KINDS_OF = {(bias, projection): _kinds_of(bias, projection) for bias in (False, True) for projection in (False, True)}
_PLACES_OF = {
    (directions * len(kinds), directions, bias): _places_of(directions, kinds)
    for (bias, _), kinds in _KINDS_OF.items()
    for directions in (1, 2)
}


def kinds_of(bias: bool, projection: bool) -> tuple[str, ...]:
    """The kinds that a layer with these options has."""
    return _KINDS_OF[bias, projection]


def suffixes_of(num_layers: int, bidirectional: bool) -> list[str]:
    """What the names of a layer's parameters end with, in torch.nn's order: by layer, by direction."""
    return [f"_l{layer}{way}" for layer in range(num_layers) for way in (("", "_reverse") if bidirectional else ("",))]


def shapes_of(gates: int, input_size: int, hidden_size: int, state_size: int) -> dict[str, tuple[int, ...]]:
    """By kind: the shape of a layer's parameters of that kind, whose cell has so many gates."""
    sizes = {"gates": gates * hidden_size, "input": input_size, "state": state_size, "hidden": hidden_size}
    return {name: tuple([sizes[size] for size in kind.shape]) for name, kind in KINDS.items()}


def place_weights(weights: Sequence[Tensor], directions: int, bias: bool) -> tuple[Tensor | None, ...]:
    """One layer's parameters from a list in torch.nn's order, direction by direction, kind by kind.

    Returns:
        A parameter for each of `PLACES`, or None: what `Parameters` has, flat, as the ops take them.
    """
    where, getter = _PLACES_OF[len(weights), directions, bias]
    given = [*weights, None]
    if _dynamo_traces():
        # Dynamo does not know itemgetter, which is three times as fast.
        return tuple([given[i] for i in where])
    places: tuple[Tensor | None, ...] = getter(given)
    return places


class LayerArguments(NamedTuple):
    """What `layer_forward` and `layer` take."""

    mode: str
    input: Tensor
    hx: Tensor | None
    cx: Tensor | None
    sequences: Sequences
    parameters: Parameters


class QuantizedArguments(NamedTuple):
    """What `quantized_layer` takes: first what packed weights do not say, then `LayerArguments`.

    Attributes:
        weights: a key of `quantization.TYPES`; the matrices among the parameters are packed so.
        hidden_size, proj_size: H, and P, 0 without projection.
    """

    weights: str
    hidden_size: int
    proj_size: int
    mode: str
    input: Tensor
    hx: Tensor | None
    cx: Tensor | None
    sequences: Sequences
    parameters: Parameters

    @property
    def state_size(self) -> int:
        return self.proj_size or self.hidden_size

    @property
    def layer(self) -> LayerArguments:
        """The same without what is said of the weights."""
        return LayerArguments(self.mode, self.input, self.hx, self.cx, self.sequences, self.parameters)

    def unpacked(self, input_size: int, unpack: Callable[[str, Any, tuple[int, int]], Any]) -> Parameters:
        """The parameters with what `unpack` makes of each packed one: (the name of its place, it, the matrix's shape).

        input_size: I, which the input says where it is a tensor.
        """
        shapes = shapes_of(CELLS[self.mode].gates, input_size, self.hidden_size, self.state_size)
        places = list(self.parameters)
        for kind, place in PLACE_OF.items():
            if len(shapes[kind]) == 2:
                rows, columns = shapes[kind]
                for i in (place, place + 1):
                    places[i] = None if places[i] is None else unpack(PLACES[i], places[i], (rows, columns))
        return Parameters(*places)


class BackwardArguments(NamedTuple):
    """What `recurrence_backward` takes."""

    mode: str
    grad_output: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    grad_cell_states: Tensor | None
    output: Tensor | None
    cell_states: Tensor
    reserve: Tensor
    hx: Tensor | None
    cx: Tensor | None
    sequences: Sequences
    parameters: Parameters

    @property
    def like(self) -> Tensor:
        """A tensor of rows that is there: of one step the output need not be."""
        return self.reserve if self.output is None else self.output


class LayerBackwardArguments(NamedTuple):
    """What `layer_backward` takes (csrc/schemas.h)."""

    mode: str
    by_aten: bool
    wanted: int
    input: Tensor
    grad_output: Tensor | None
    grad_h_n: Tensor | None
    grad_c_n: Tensor | None
    grad_cell_states: Tensor | None
    output: Tensor | None
    cell_states: Tensor | None
    reserve: Tensor | None
    hx: Tensor | None
    cx: Tensor | None
    sequences: Sequences
    parameters: Parameters

    @property
    def differentiated(self) -> list[Any]:
        """What a gradient is wanted of, in the order of the results; None for the others."""
        cx = self.cx if CELLS[self.mode].has_cell_state else None
        each = (self.input, self.hx, cx, *self.parameters)
        return [value if self.wanted >> i & 1 else None for i, value in enumerate(each)]


_Record = TypeVar("_Record", bound="LayerArguments | BackwardArguments | LayerBackwardArguments | QuantizedArguments")


def flat(record: tuple[Any, ...]) -> tuple[Any, ...]:
    """A record's arguments in the order of the op's schema: every record ends with sequences and parameters."""
    return (*record[:-2], *record[-2], *record[-1])


def nested(kind: type[_Record], arguments: Sequence[Any]) -> _Record:
    """The record of arguments that came flat. The dispatcher leaves out those at the end that are None."""
    record: Any = kind
    own = len(kind._fields) - 2
    rest = own + len(Sequences._fields)
    return cast("_Record", record(*arguments[:own], Sequences(*arguments[own:rest]), Parameters(*arguments[rest:])))


_ROLES = {
    "input": Role.ROWS,
    "hx": Role.STATE,
    "cx": Role.STATE,
    "grad_output": Role.ROWS,
    "grad_h_n": Role.STATE,
    "grad_c_n": Role.STATE,
    "grad_cell_states": Role.ROWS,
    "output": Role.ROWS,
    "cell_states": Role.ROWS,
    "reserve": Role.ROWS,
    **SEQUENCE_ROLES,
    **dict.fromkeys(PLACES, Role.WEIGHT),
}
# Arguments that are no `Tensor?`.
_TYPES = {
    **dict.fromkeys(("mode", "weights"), "str"),
    **dict.fromkeys(("hidden_size", "proj_size"), "int"),
    **dict.fromkeys(("input", "cell_states", "reserve"), "Tensor"),
    "batch_first": "bool",
}


def taking_flat(record: type[_Record], function: Callable[[_Record], Any]) -> Callable[..., Any]:
    """A function of a record, as one of the op's arguments."""
    return functools.wraps(function)(lambda *arguments: function(nested(record, arguments)))


class Signature(NamedTuple):
    """An op's arguments by the record that they travel in, and its results by their roles."""

    record: type[LayerArguments] | type[BackwardArguments] | type[QuantizedArguments]
    results: tuple[Role, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of the arguments, in the order of the schema."""
        return (*self.record._fields[:-2], *Sequences._fields, *PLACES)

    def schema(self, name: str) -> str:
        """The op's schema, as torch.library takes it."""
        arguments = ", ".join(
            f"{_TYPES.get(argument, 'Tensor?')} {argument}" + ("=None" if argument in PLACES else "")
            for argument in self.names
        )
        return f"{name}({arguments}) -> ({', '.join(['Tensor'] * len(self.results))})"


_STATES = (Role.ROWS, Role.STATE, Role.STATE)

# The ops of every backend.
OPS = {
    "recurrence_backward": Signature(BackwardArguments, (Role.ROWS, Role.ROWS, Role.STATE, Role.STATE, Role.ROWS)),
    "layer_forward": Signature(LayerArguments, (*_STATES, Role.ROWS, Role.ROWS)),
    "layer": Signature(LayerArguments, _STATES),
}
# Of the CPU library and the reference alone.
QUANTIZED_LAYER = Signature(QuantizedArguments, _STATES)
EVERY_OP = OPS | {"quantized_layer": QUANTIZED_LAYER}


def role_of(argument: str) -> Role:
    """What the argument of that name is, in every op that has it."""
    return _ROLES.get(argument, Role.OTHER)


def as_sequence(function: Callable[..., Any], record: _Record, has_h_n: bool) -> tuple[Tensor, ...]:
    """One step through a function that knows only sequences: as one of T = 1, and its results without that T.

    Args:
        function: takes the record.
        record: of one step.
        has_h_n: whether the second result is h_n, which of one step would be the output again.
    """
    fields = record._asdict()
    fields["sequences"] = record.sequences._replace(batch_first=False)
    for name, value in fields.items():
        if role_of(name) in (Role.ROWS, Role.STATE) and value is not None and value.dim() == 2:
            fields[name] = value.unsqueeze(0)
    # No views: callers write into the states of cells.
    results = [value.squeeze(0).clone() if value.dim() == 3 else value for value in function(type(record)(**fields))]
    if has_h_n:
        results[1] = results[0].new_empty(0)
    return tuple(results)


def check_output(op: str, record: LayerArguments | BackwardArguments) -> None:
    """Raises RuntimeError where a backward pass lacks the output of forward, and it is not one step that needs none."""
    if isinstance(record, LayerArguments) or record.output is not None:
        return
    if not is_one_step(record) or CELLS[record.mode].reserve == 0:
        raise RuntimeError(
            f"{op}: output: expected a tensor, got None (which one step of a cell with a reserve allows)"
        )


def is_one_step(record: LayerArguments | BackwardArguments) -> bool:
    """Whether an op is given one step: rows (B, features), states (B, features)."""
    rows = record.input if isinstance(record, LayerArguments) else record.like
    return record.sequences.is_one_step(rows)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that steps compute in: 16-bit types in float32."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype

"""The loops over pieces: each piece is like a call of its own.

Forward runs the pieces one after the other, and keeps the states between them; with "gates" also h_t, which is the
output, and c_t. Backward runs the pieces from the last to the first: with "chunks" each runs forward again, from the
states before it, and then backward; with "gates" the states that entered each step are known, so what forward would
have saved comes from one step of all rows of a piece, a product in place of a loop. (Checkpoints in time: Chen et al.
2016, https://arxiv.org/abs/1604.06174; Gruslys et al. 2016, https://arxiv.org/abs/1606.03401.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..autograd import without_autocast
from ..backends import backend
from ..sequences import Sequences, check_tensor
from ..signatures import compute_dtype
from .call import Call
from .directions import Direction, Given, GradientsOfMade, Made, PlainDirection, States
from .pieces import Pieces, steps_of_a_piece

# The states, and what they are called among the tensors.
KINDS = {"h": "hx", "c": "cx", "l": "lx"}
# Of forward's results: what a gradient may come to, then the states between the pieces.
RESULTS = ("output", "h", "c", "l", "cell_states")
BORDERS = tuple(f"borders_{kind}" for kind in KINDS)


def directions_of(call: Call, tensors: Mapping[str, Tensor]) -> list[Direction]:
    """The directions of a call."""
    if call.options:
        # Layers with options are made of plain ones, which come here.
        from ..variants.recomputed import DirectionWithOptions

        return [DirectionWithOptions(call, tensors)]
    return [PlainDirection(call, tensors, suffix) for suffix in ("", "_reverse") if f"weight_hh{suffix}" in tensors]


def sequences_of(call: Call, tensors: Mapping[str, Tensor]) -> Sequences:
    """What a call says of its rows."""
    given: dict[str, Any] = {name: tensors[name] for name in Sequences._fields if name in tensors}
    return Sequences(**given, batch_first=call.batch_first)


def _pieces(call: Call, count: int, tensors: Mapping[str, Tensor], direction: Direction) -> Pieces:
    input, sequences = tensors["input"], sequences_of(call, tensors)
    if sequences.batch_sizes is not None:
        steps = sequences.batch_sizes.numel()
    else:
        steps = input.shape[1 if sequences.batch_first else 0]
    length = steps_of_a_piece(count, steps, math.prod(input.shape[:-1]))
    return Pieces(input, sequences, length, direction.reverse)


def empty_results(
    call: Call, direction: Direction, directions: int, input: Tensor, batch: Any, count: Any
) -> dict[str, Tensor]:
    """By name: forward's results, which it fills.

    Args:
        direction: one of them.
        directions: how many.
        batch, count: B, and how many pieces.
    """
    rows, widths = input.shape[:-1], direction.widths
    made = {"output": input.new_empty(*rows, directions * widths["h"])}
    if "c" in widths and (call.keeps_cell_states or call.how == "gates"):
        made["cell_states"] = input.new_empty(*rows, directions * widths["c"])
    for kind, width in widths.items():
        made[kind] = input.new_empty(directions, batch, width)
        made[f"borders_{kind}"] = input.new_empty(count, directions, batch, width)
    return made


def in_order(results: Mapping[str, Tensor], input: Tensor) -> tuple[Tensor, ...]:
    """Forward's results as the op gives them."""
    return tuple([results[name] if name in results else input.new_empty(0) for name in (*RESULTS, *BORDERS)])


def _columns(rows: Tensor, direction: int, width: int) -> Tensor:
    """A direction's part of (rows, D*width), a view."""
    return rows.narrow(-1, direction * width, width)


def _given(pieces: Pieces, piece: int, input: Tensor, states: States) -> Given:
    batch = pieces.batch_of(piece)
    own = {kind: state[:batch].contiguous() for kind, state in states.items()}
    return Given(pieces.read(piece, input), own, pieces.sequences_of(piece), pieces, piece)


def forward(text: str, count: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The op `forward`.

    Args:
        text: of a `Call`.
        count: how many pieces, 0: as many as fits.
        tensors: those that the call names: input (rows, I), hx (D, B, P or H), cx and lx (D, B, H), what `Sequences`
            has, parameters, masks.

    Returns:
        output (rows, D*P or D*H); h_n, c_n and of the sLSTM l_n (D, B, .); cell_states (rows, D*H), with "gates" or
        where wanted; the states that entered each piece, (pieces, D, B, .) for h, c, l. (0,) for what does not apply.
    """
    call = Call.of(text)
    named = dict(zip(call.names, tensors, strict=True))
    input = named["input"]
    results: dict[str, Tensor] = {}
    with torch.no_grad(), backend(call.backend):
        directions = directions_of(call, named)
        _check(call, named, directions)
        for d, direction in enumerate(directions):
            pieces = _pieces(call, count, named, direction)
            if d == 0:
                results = empty_results(call, direction, len(directions), input, pieces.batch, pieces.count)
            states = {}
            for kind in direction.widths:
                given = named.get(KINDS[kind])
                states[kind] = direction.initial(kind, input, pieces.batch) if given is None else given[d].clone()
            for piece in pieces.order():
                for kind, state in states.items():
                    results[f"borders_{kind}"][piece, d].copy_(state)
                made = direction.forward(_given(pieces, piece, input, states), "cell_states" in results)
                pieces.write(piece, _columns(results["output"], d, direction.widths["h"]), made.output)
                if "cell_states" in results and made.cell_states is not None:
                    pieces.write(piece, _columns(results["cell_states"], d, direction.widths["c"]), made.cell_states)
                for kind, state in made.states.items():
                    states[kind][: state.shape[0]] = state
            for kind, state in states.items():
                results[kind][d].copy_(state)
    return in_order(results, input)


def _check(call: Call, named: Mapping[str, Tensor], directions: Sequence[Direction]) -> None:
    """Checks of the whole call what a piece shows nothing of: that rows, and the states that enter, fit it.

    Raises:
        RuntimeError: they do not.
    """
    op, input = f"rnnfast::{'variant_forward' if call.options else 'layer'}", named["input"]
    _, batch = sequences_of(call, named).check(op, input)
    for kind, width in directions[0].widths.items():
        state = named.get(KINDS[kind])
        if state is not None:
            check_tensor(op, KINDS[kind], state, input, (len(directions), batch, width))


class _Sums:
    """The gradients of a call, as the pieces bring them."""

    def __init__(self, wanted: Sequence[str], named: Mapping[str, Tensor]) -> None:
        """
        Args:
            wanted: names of tensors.
            named: the tensors by name.
        """
        self._wanted, self._named = wanted, named
        data = ("input", *KINDS.values())
        self._whole = {
            name: torch.empty_like(named[name], memory_format=torch.contiguous_format)
            for name in wanted
            if name in data
        }
        # Of 16-bit types in more, and rounded once.
        dtype = compute_dtype(named["input"].dtype)
        self._sums = {name: torch.zeros_like(named[name], dtype=dtype) for name in wanted if name not in data}

    def add_input(self, pieces: Pieces, piece: int, grad: Tensor | None, first: bool) -> None:
        """A direction's part of a piece; first: whether it is the first direction's."""
        if "input" in self._whole:
            assert grad is not None
            pieces.write(piece, self._whole["input"], grad, add=not first)

    def add_parameters(self, grads: Mapping[str, Tensor | None]) -> None:
        for name, grad in grads.items():
            if grad is not None:
                self._sums[name].add_(grad)

    def set_states(self, direction: int, grads: States) -> None:
        """Of the states that entered the first step of a direction."""
        for kind, grad in grads.items():
            if KINDS[kind] in self._whole:
                self._whole[KINDS[kind]][direction].copy_(grad)

    def in_order(self) -> list[Tensor]:
        found = self._whole | {name: total.to(self._named[name].dtype) for name, total in self._sums.items()}
        return [found[name] for name in self._wanted]


def backward(
    text: str,
    count: int,
    wanted: Sequence[str],
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    """The op `backward`.

    Args:
        text, count, tensors: as for `forward`.
        wanted: names of tensors that want a gradient.
        results: of forward: output and cell_states, which with "chunks" nobody looks at, and the states between pieces.
        grads: of output, h_n, c_n, l_n, cell_states.

    Returns:
        The gradients, in the order of `wanted`.
    """
    call = Call.of(text)
    named = dict(zip(call.names, tensors, strict=True))
    input = named["input"]
    output, cell_states, *of_borders = results
    borders = dict(zip(KINDS, of_borders, strict=True))
    of_result = dict(zip(RESULTS, grads, strict=True))
    sums = _Sums(wanted, named)
    with torch.no_grad(), backend(call.backend), without_autocast(input.device.type):
        for d, direction in enumerate(directions_of(call, named)):
            pieces = _pieces(call, count, named, direction)

            def part(rows: Tensor | None, kind: str, piece: int) -> Tensor | None:
                """This direction's, of a piece, of (rows, D*width)."""
                width = direction.widths.get(kind)  # noqa: B023
                if rows is None or width is None:
                    return None
                return pieces.read(piece, _columns(rows, d, width)).contiguous()  # noqa: B023

            carried = {}
            for kind in direction.widths:
                grad = of_result[kind]
                carried[kind] = torch.zeros_like(borders[kind][0, d]) if grad is None else grad[d].clone()
            for piece in reversed(list(pieces.order())):
                batch, entered = pieces.batch_of(piece), {kind: borders[kind][piece, d] for kind in direction.widths}
                made = None
                if call.how == "gates":
                    of_piece = part(output, "h", piece)
                    assert of_piece is not None
                    made = Made(of_piece, {}, part(cell_states, "c", piece))
                of_made = GradientsOfMade(
                    part(of_result["output"], "h", piece),
                    {kind: grad[:batch] for kind, grad in carried.items()},
                    part(of_result["cell_states"], "c", piece),
                )
                found = direction.backward(_given(pieces, piece, input, entered), made, of_made, set(wanted))
                sums.add_input(pieces, piece, found.input, first=d == 0)
                sums.add_parameters(found.parameters)
                for kind, state in found.states.items():
                    carried[kind][: state.shape[0]] = state
            sums.set_states(d, carried)
    return sums.in_order()

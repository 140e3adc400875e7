"""The steps of a call in pieces: their rows, what `Sequences` says of them, in the order of one direction."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from ..sequences import Sequences

# A piece of so many rows is as fast as a larger one, whose call prepares the weights for as long (measured on a CPU:
# docs/performance.md).
_ROWS = 2048
# Shorter calls are not cut into fewer.
_PIECES = 8


# Sizes may be symbols of a program that is being traced, which Python's functions would bind to what they are now;
# Dynamo is the other way about.
_dynamo_traces = torch.compiler.is_dynamo_compiling


def larger(one: int, other: int) -> int:
    return max(one, other) if _dynamo_traces() else torch.sym_max(one, other)  # type: ignore[no-any-return]


def smaller(one: int, other: int) -> int:
    return min(one, other) if _dynamo_traces() else torch.sym_min(one, other)  # type: ignore[no-any-return]


def _root(number: int) -> int:
    """Rounded down."""
    return int(math.sqrt(number)) if _dynamo_traces() else torch.sym_int(torch.sym_sqrt(number))  # type: ignore[no-any-return]


def steps_of_a_piece(count: int, steps: int, rows: int) -> int:
    """How many steps a piece has.

    Args:
        count: how many pieces were asked for; 0: as fits.
        steps: T.
        rows: of all steps together.
    """
    if count:
        return larger(1, -(-steps // count))
    # What is kept, a state for each piece, and what a piece takes, about five for each step, are least together where
    # there are as many.
    least = _root(steps // 5)
    fast = smaller(-(-_ROWS * steps // larger(rows, 1)), -(-steps // _PIECES))
    return larger(larger(1, least), fast)


def count_of_pieces(steps: int, length: int) -> int:
    """How many pieces of that length T steps have."""
    return -(-steps // length)


class Pieces:
    """What one direction of a layer takes, piece by piece.

    A piece is some steps. It looks like a call of a direction that runs forwards: the rows of the reversed direction
    are turned around, each row's steps by themselves, so that a row that ends inside a piece begins with its last step.
    The states that enter and leave a piece have a row for each of the batch, or of packed rows for each that has a step
    in it.

    Attributes:
        steps: T.
        batch: B.
        count: how many pieces there are.
    """

    def __init__(self, rows: Tensor, sequences: Sequences, length: int, reverse: bool) -> None:
        """
        Args:
            rows: (rows, F), for their shape and device.
            sequences: of the whole call.
            length: how many steps a piece has; the last may have fewer.
            reverse: whether the direction is the reversed one.
        """
        self._sequences, self._reverse, self._device = sequences, reverse, rows.device
        self._time = 1 if sequences.batch_first and sequences.batch_sizes is None else 0
        self._sizes = None if sequences.batch_sizes is None else sequences.batch_sizes.tolist()
        if self._sizes is None:
            self.steps, self.batch = rows.shape[self._time], rows.shape[1 - self._time]
        else:
            self.steps, self.batch = len(self._sizes), max(self._sizes, default=0)
            # Where each step's rows begin, and the end.
            self._starts = [0]
            for size in self._sizes:
                self._starts.append(self._starts[-1] + size)
        self._length = length
        self.count = count_of_pieces(self.steps, length)
        self._resets = self._boundaries()
        # Of the piece that was asked for last.
        self._turns: tuple[int, Tensor] | None = None

    def order(self) -> Iterable[int]:
        """The pieces in the order in which the direction takes them."""
        return reversed(range(self.count)) if self._reverse else range(self.count)

    def batch_of(self, piece: int) -> int:
        """How many rows of the batch have states in a piece: the first ones."""
        return self.batch if self._sizes is None else self._sizes[self._ends(piece)[0]]

    def sequences_of(self, piece: int) -> Sequences:
        """What an op is told of a piece's rows."""
        begin, end = self._ends(piece)
        given = self._sequences
        if given.batch_sizes is not None:
            return Sequences(given.batch_sizes[begin:end])
        resets = None
        if self._resets is not None:
            resets = self._turned(piece, self._resets.narrow(self._time, begin, end - begin).unsqueeze(-1))
            resets = resets.squeeze(-1).contiguous()
        return given._replace(lengths=self._lengths_in(piece), resets=resets)

    def read(self, piece: int, rows: Tensor) -> Tensor:
        """Of (rows, F) those of a piece, in the direction's order. A view where that is the order of the rows."""
        return self._turned(piece, self._view(piece, rows))

    def write(self, piece: int, rows: Tensor, value: Tensor, add: bool = False) -> None:
        """Puts what `read` would give where it stands in (rows, F), or adds it to what is there."""
        target = self._view(piece, rows)
        value = self._turned(piece, value)
        if add:
            target.add_(value)
        else:
            target.copy_(value)

    def _ends(self, piece: int) -> tuple[int, int]:
        """The steps [begin, end)."""
        begin = piece * self._length
        return begin, min(begin + self._length, self.steps)

    def _view(self, piece: int, rows: Tensor) -> Tensor:
        begin, end = self._ends(piece)
        if self._sizes is None:
            return rows.narrow(self._time, begin, end - begin)
        first, last = self._starts[begin], self._starts[end]
        return rows.narrow(0, first, last - first)

    def _lengths_in(self, piece: int) -> Tensor | None:
        """How many steps of the piece each row has."""
        lengths, (begin, end) = self._sequences.lengths, self._ends(piece)
        return None if lengths is None else (lengths - begin).clamp(0, end - begin)

    def _boundaries(self) -> Tensor | None:
        """Resets as the direction meets them: True where the state is zeroed before the step."""
        resets, lengths, time = self._sequences.resets, self._sequences.lengths, self._time
        if resets is None or not self._reverse:
            return resets
        # On its way back from t to t - 1 the reversed direction crosses the boundary of t, unless its row ends there.
        after = torch.cat((resets.narrow(time, 1, self.steps - 1), torch.zeros_like(resets.narrow(time, 0, 1))), time)
        if lengths is None:
            return after
        step = torch.arange(1, self.steps + 1, device=resets.device)
        inside = step < lengths.unsqueeze(1) if time else step.unsqueeze(1) < lengths
        return after & inside

    def _turned(self, piece: int, rows: Tensor) -> Tensor:
        """A piece's rows, (rows of the piece, F), from their own order to the direction's, or back: it is the same."""
        if not self._reverse:
            return rows
        if self._sizes is None and self._sequences.lengths is None:
            return rows.flip(self._time)
        if self._turns is None or self._turns[0] != piece:
            self._turns = piece, self._turn(piece)
        return rows.flatten(0, -2).index_select(0, self._turns[1]).view(rows.shape)

    def _turn(self, piece: int) -> Tensor:
        """Which row stands where, of rows in a line: each one's steps turned around. What is no step stays."""
        begin, end = self._ends(piece)
        if self._sizes is not None:
            # Where the sizes are, whatever torch's default device is.
            own, device = self._sequences.batch_sizes, torch.device("cpu")
            assert own is not None
            sizes, steps = own[begin:end], torch.arange(end - begin, device=device)
            starts = sizes.cumsum(0) - sizes
            step = torch.repeat_interleave(steps, sizes)
            column = torch.arange(step.numel(), device=device) - starts[step]
            lengths = (sizes.unsqueeze(1) > torch.arange(self.batch_of(piece), device=device)).sum(0)
            return (starts[lengths[column] - 1 - step] + column).to(self._device)
        lengths_in = self._lengths_in(piece)
        assert lengths_in is not None
        step = torch.arange(end - begin, device=self._device).unsqueeze(1)
        row = torch.arange(self.batch, device=self._device)
        from_step = torch.where(step < lengths_in, lengths_in - 1 - step, step)
        if self._time == 0:
            return (from_step * self.batch + row).flatten()
        return (row * (end - begin) + from_step).t().flatten()

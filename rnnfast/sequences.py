"""How the rows of a call lie, and which of them count: packed rows, lengths, resets.

`Sequences` is the record that travels from the modules to the ops; csrc/sequences.h has the same for C++. A new input
of every step is a field of it, checked in `dense_sequences` (what users give) and `Sequences.check` (what ops get), and
heeded in `DenseRows` and in what stands below it.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Role(enum.Enum):
    """What an argument or a result of an op is."""

    ROWS = enum.auto()  # (T, B, ...), with batch_first (B, T, ...), packed (rows, ...), of one step (B, ...)
    STATE = enum.auto()  # (D, B, ...), of one step (B, ...)
    BATCH = enum.auto()  # (B,)
    SIZES = enum.auto()  # batch_sizes
    WEIGHT = enum.auto()  # a parameter
    OTHER = enum.auto()  # anything that is not a tensor


def are_one_step(rows: Tensor, batch_sizes: Tensor | None) -> bool:
    """Whether these rows are one step, (B, features), and not packed."""
    return rows.dim() == 2 and batch_sizes is None


def check_tensor(op: str, name: str, tensor: Tensor, like: Tensor, shape: Sequence[int]) -> None:
    """Checks that what an op is given as `name` is of this shape, and of the type and on the device of `like`.

    Raises:
        RuntimeError: it is not.
    """
    if tuple(tensor.shape) != tuple(shape):
        raise RuntimeError(f"{op}: {name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if tensor.dtype != like.dtype or tensor.device != like.device:
        raise RuntimeError(
            f"{op}: {name}: expected {like.dtype} on {like.device}, got {tensor.dtype} on {tensor.device}"
        )


class Sequences(NamedTuple):
    """The arguments that say how rows lie, in the order in which every op has them.

    Attributes:
        batch_sizes: (T,) int64 on the CPU, not increasing: rows are packed, (t, b) at `batch_sizes[:t].sum() + b`.
        lengths: (B,) int64, dense only: row b ends after lengths[b] steps, which may be 0.
        resets: bool (T, B), with batch_first (B, T), dense only: True at t starts a new segment at t. The state is
            zeroed before step t; in the reversed direction between step t and step t-1.
        batch_first: whether dense rows are (B, T).
    """

    batch_sizes: Tensor | None = None
    lengths: Tensor | None = None
    resets: Tensor | None = None
    batch_first: bool = False

    @property
    def every_row_counts(self) -> bool:
        """Whether rows are dense, all of length T, and no segment ends before its row."""
        return self.batch_sizes is None and self.lengths is None and self.resets is None

    def is_one_step(self, rows: Tensor) -> bool:
        """As `are_one_step`."""
        return are_one_step(rows, self.batch_sizes)

    def beside(self, tensor: Tensor) -> Sequences:
        """With everything that belongs on the device of `tensor` there. A copy from the host waits for the device."""
        lengths, resets = (
            given if given is None or given.device == tensor.device else given.to(tensor.device)
            for given in (self.lengths, self.resets)
        )
        return self._replace(lengths=lengths, resets=resets)

    def time_major(self) -> Sequences:
        """Of the same rows laid out as (T, B)."""
        resets = (
            self.resets.transpose(0, 1).contiguous() if self.batch_first and self.resets is not None else self.resets
        )
        return self._replace(resets=resets, batch_first=False)

    def check(self, op: str, like: Tensor) -> tuple[int, int]:
        """Checks what an op is given; for backends whose kernels have no checks of their own.

        Args:
            op: its name.
            like: a tensor of rows, dense (T, B, features) or packed.
        Returns:
            T and B.
        Raises:
            RuntimeError: something does not fit.
        """

        def check(condition: bool, message: str) -> None:
            if not condition:
                raise RuntimeError(f"{op}: {message}")

        if self.batch_sizes is not None:
            sizes = self.batch_sizes
            check(like.dim() == 2, f"with batch_sizes rows are packed: expected 2 dimensions, got {like.dim()}")
            on_host = sizes.device.type == "cpu" and sizes.dtype == torch.int64 and sizes.dim() == 1
            check(on_host, "batch_sizes: expected a 1-D int64 tensor on the CPU")
            check(self.lengths is None and self.resets is None, "lengths and resets go with dense rows")
            values = sizes.tolist()
            falling = all(size > 0 for size in values) and values == sorted(values, reverse=True)
            check(falling, "batch_sizes: expected positive sizes that do not increase")
            total = sum(values)
            check(total == like.size(0), f"batch_sizes: expected a sum of {like.size(0)}, got {total}")
            return len(values), values[0] if values else 0
        check(like.dim() == 3, f"expected 3 dimensions, got {like.dim()}")
        batch, steps = (like.size(0), like.size(1)) if self.batch_first else (like.size(1), like.size(0))
        if self.lengths is not None:
            given = self.lengths
            right = given.device == like.device and given.dtype == torch.int64 and tuple(given.shape) == (batch,)
            check(right, f"lengths: expected {batch} int64 on the device of the data")
            if like.device.type == "cpu" and batch:
                least, most = int(given.min()), int(given.max())
                check(least >= 0 and most <= steps, f"lengths: expected values from 0 to {steps}")
        if self.resets is not None:
            given, shape = self.resets, tuple(like.shape[:2])
            right = given.device == like.device and given.dtype == torch.bool and tuple(given.shape) == shape
            check(right, f"resets: expected bool of shape {shape} on the device of the data")
        return steps, batch


# What the fields are.
ROLES = {"batch_sizes": Role.SIZES, "lengths": Role.BATCH, "resets": Role.ROWS, "batch_first": Role.OTHER}

# ---- what users give ------------------------------------------------------------------------------------------------


class RowOptions(NamedTuple):
    """What a call of a layer may say of its rows, as users give it: see `dense_sequences`."""

    lengths: Tensor | Sequence[int] | None = None
    resets: Tensor | None = None

    def of_a_batch_of_one(self, steps: int, axis: int) -> RowOptions:
        """What was given for unbatched input, (T, features), where `axis` is to become that of the batch."""
        lengths, resets = self
        if resets is not None:
            if resets.dim() != 1:
                raise ValueError(f"Expected resets of shape (T,) = ({steps},), got {tuple(resets.shape)}")
            resets = resets.unsqueeze(axis)
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths.unsqueeze(0)
        return RowOptions(lengths, resets)

    def refuse_with(self, packed: str) -> None:
        """Raises ValueError if anything was given; packed: what says that rows are packed."""
        if self.lengths is not None:
            raise ValueError(f"lengths cannot be given with {packed}, which carries its own")
        if self.resets is not None:
            raise ValueError(f"resets cannot be given with {packed}: pass a padded input with lengths instead")


# Of dense rows of which nothing was said, by batch_first.
EVERY_ROW_COUNTS = {first: Sequences(batch_first=first) for first in (False, True)}


def dense_sequences(input: Tensor, batch_first: bool, options: RowOptions) -> Sequences:
    """Checks what goes with dense rows, and brings it to the form that the ops take.

    Args:
        input: (T, N, I), with batch_first (N, T, I).
        batch_first: as there.
        options: lengths (N,), integers with 0 <= lengths <= T, as a tensor on any device or as a sequence; resets bool
            (T, N), with batch_first (N, T), on any device.
    Returns:
        The record, its tensors on the device of the input.
    Raises:
        TypeError: lengths are not integers, or resets not bool.
        ValueError: wrong shape, or lengths out of range. On an accelerator, and while a graph is traced, the range is
            not looked at: reading it would halt the device, or break the graph.
    """
    lengths, resets = options
    first, second = input.shape[0], input.shape[1]
    if lengths is not None:
        steps, batch = (second, first) if batch_first else (first, second)
        lengths = as_lengths(lengths, steps, batch)
    if resets is not None:
        if resets.dtype != torch.bool:
            raise TypeError(f"resets should be a bool tensor, got {resets.dtype}")
        if resets.dim() != 2 or resets.shape[0] != first or resets.shape[1] != second:
            axes = "(N, T)" if batch_first else "(T, N)"
            raise ValueError(f"Expected resets of shape {axes} = ({first}, {second}), got {tuple(resets.shape)}")
    return Sequences(None, lengths, resets, batch_first).beside(input)


def packed_sequences(batch_sizes: Tensor) -> Sequences:
    """Checks what goes with packed rows.

    Raises:
        ValueError: batch_sizes are not (T,) int64 on the CPU.
    """
    if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
        raise ValueError(
            f"batch_sizes should be 1-D int64 on the CPU, got {batch_sizes.dim()}-D {batch_sizes.dtype} on "
            f"{batch_sizes.device}"
        )
    return Sequences(batch_sizes)


def as_lengths(lengths: Tensor | Sequence[int], steps: int, batch: int) -> Tensor:
    """Checks lengths that users give, and brings them to int64; what they are and what is raised: `dense_sequences`."""
    if not isinstance(lengths, Tensor):
        # On the CPU whatever torch's default device is: there they can be looked at.
        try:
            lengths = torch.tensor(lengths, device="cpu", dtype=None if len(lengths) else torch.int64)
        except (OverflowError, RuntimeError, TypeError, ValueError) as error:
            if "overflow" in str(error).lower():
                raise ValueError(f"lengths should be from 0 to T = {steps}, got {list(lengths)}") from error
            raise TypeError(f"lengths should be integers, got {lengths!r}") from error
    if lengths.dtype.is_floating_point or lengths.dtype.is_complex or lengths.dtype == torch.bool:
        raise TypeError(f"lengths should be integers, got a tensor of {lengths.dtype}")
    if lengths.dim() != 1 or lengths.shape[0] != batch:
        raise ValueError(f"Expected lengths of shape (N,) = ({batch},), got {tuple(lengths.shape)}")
    # Comparisons come after: there are none for most unsigned types. Beyond 2**63 the result is negative.
    converted = lengths.to(torch.int64)
    if batch > 0 and _readable(converted) and (int(converted.min()) < 0 or int(converted.max()) > steps):
        wrong = next(length for length in lengths.tolist() if not 0 <= length <= steps)
        raise ValueError(f"lengths should be from 0 to T = {steps}, got {wrong}")
    return converted


def _readable(tensor: Tensor) -> bool:
    """Whether the values of `tensor` can be looked at here without breaking a graph or waiting for a device."""
    return (
        not torch.compiler.is_compiling()
        and tensor.device.type == "cpu"
        and type(tensor) is Tensor  # not a FakeTensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


# ---- one layout inside the reference, three outside -----------------------------------------------------------------


def masked(mask: Tensor | None, value: Tensor) -> Tensor:
    """value where mask holds, else zero: not a product, so that NaN and its gradient stop here."""
    return value if mask is None else torch.where(mask, value, 0)


def select(mask: Tensor | None, value: Tensor, other: Tensor) -> Tensor:
    return value if mask is None else torch.where(mask, value, other)


@dataclasses.dataclass(frozen=True)
class DenseRows:
    """How the rows of a call lie, and which of them count.

    Inside, everything is dense and time-major; :meth:`read` and :meth:`write` translate. ``active`` (T, B, 1) is False
    where a row has ended, ``boundary`` (T, B, 1) is True where a segment begins; None where that holds nowhere.
    """

    steps: int
    batch: int
    batch_first: bool
    active: Tensor | None
    boundary: Tensor | None
    # packed only: the row that (t, b) is read from, (T*B,), and the position t*B + b where each row is found, (rows,)
    sources: Tensor | None = None
    positions: Tensor | None = None

    @staticmethod
    def of(like: Tensor, sequences: Sequences) -> DenseRows:
        """The layout of a call whose tensors of rows are shaped like ``like``, (rows, features)."""
        batch_sizes, lengths, resets, batch_first = sequences
        if batch_sizes is not None:
            sizes = batch_sizes.tolist()
            steps, batch = len(sizes), max(sizes, default=0)
            # On the sizes' device, whatever torch's default one is.
            column = torch.arange(batch, device=batch_sizes.device)
            taken = column < batch_sizes.unsqueeze(1)
            row = (batch_sizes.cumsum(0) - batch_sizes).unsqueeze(1) + column
            # a place without a row reads row 0, and read() masks it
            sources = torch.where(taken, row, 0).flatten().to(like.device)
            positions = taken.flatten().nonzero().squeeze(1).to(like.device)
            return DenseRows(steps, batch, False, taken.unsqueeze(2).to(like.device), None, sources, positions)
        batch, steps = like.shape[:2] if batch_first else (like.shape[1], like.shape[0])
        active: Tensor | None = None
        boundary: Tensor | None = None
        if lengths is not None:
            active = (torch.arange(steps, device=like.device).unsqueeze(1) < lengths).unsqueeze(2)
        if resets is not None:
            boundary = (resets.transpose(0, 1) if batch_first else resets).unsqueeze(2)
            boundary = boundary if active is None else boundary & active
        return DenseRows(steps, batch, batch_first, active, boundary)

    def read(self, value: Tensor) -> Tensor:
        """(rows, F) to (T, B, F), zero where there is no row or where it has ended."""
        if self.sources is not None:
            value = value.index_select(0, self.sources).reshape(self.steps, self.batch, value.shape[-1])
        elif self.batch_first:
            value = value.transpose(0, 1)
        return masked(self.active, value)

    def write(self, value: Tensor) -> Tensor:
        """(T, B, F) to (rows, F), contiguous, zero where a row has ended."""
        if self.positions is not None:
            return value.reshape(self.steps * self.batch, value.shape[-1]).index_select(0, self.positions)
        value = masked(self.active, value)
        return (value.transpose(0, 1) if self.batch_first else value).contiguous()

    def order(self, reverse: bool) -> Iterable[int]:
        """The steps in the order in which a direction takes them."""
        return reversed(range(self.steps)) if reverse else range(self.steps)

    def masks(self, reverse: bool) -> tuple[Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Per step (B, 1): whether the row is active, and whether its step takes over the state: no boundary before it.

        The reversed direction crosses the boundary of t on its way from t to t-1; one beyond a row's end is none.
        """
        keep = self.active
        if self.boundary is not None:
            boundary = self.boundary
            if reverse:
                boundary = torch.cat([boundary[1:], torch.zeros_like(boundary[:1])])
            keep = ~boundary if self.active is None else self.active & ~boundary
        nowhere: Sequence[Tensor | None] = [None] * self.steps
        return nowhere if self.active is None else self.active.unbind(), nowhere if keep is None else keep.unbind()

    def states_before(self, initial: Tensor, states: Tensor, reverse: bool) -> list[Tensor]:
        """The state that each step started from, in order of t, each (B, F).

        Args:
            initial: (B, F), the state before the first step.
            states: (T, B, F), the state after each step.
            reverse: whether the direction is the reversed one.
        """
        active, keep = self.masks(reverse)
        after = states.unbind()
        before = [initial] * self.steps
        state = initial
        for t in self.order(reverse):
            before[t] = masked(keep[t], state)
            state = select(active[t], after[t], state)
        return before


def zero_beyond(rows: Tensor, sequences: Sequences) -> Tensor:
    """`rows` with zeros beyond each row's length.

    The time loop never reads what stands there, but a weight's gradient is one product over all steps, in which even a
    NaN times a gradient of zero would spread.
    """
    lengths = sequences.lengths
    if lengths is None:
        return rows
    step = torch.arange(rows.shape[1 if sequences.batch_first else 0], device=rows.device)
    beyond = step >= lengths.unsqueeze(1) if sequences.batch_first else step.unsqueeze(1) >= lengths
    return rows.masked_fill(beyond.unsqueeze(-1), 0)


# ---- the state that entered each step, in the callers' layout --------------------------------------------------------


def entered(output: Tensor, state: Tensor | None, reverse: bool, sequences: Sequences) -> Tensor:
    """The state that each step of one direction started from, in the layout of `output`.

    Args:
        output: (rows, P or H), the state after each step.
        state: (B, P or H), before the first one; None for zeros.
        reverse: whether the direction is the reversed one.
    """
    if sequences.batch_sizes is not None:
        of_packed = _entered_packed_views if _on_device(output, sequences.batch_sizes) else _entered_packed
        return of_packed(output, state, sequences.batch_sizes, reverse)
    previous = _entered_dense(output, state, reverse, sequences)
    # A row without a step has a state all the same, which may hold anything.
    return zero_beyond(previous, sequences)


def _entered_dense(output: Tensor, state: Tensor | None, reverse: bool, sequences: Sequences) -> Tensor:
    lengths, resets, time = sequences.lengths, sequences.resets, 1 if sequences.batch_first else 0
    steps = output.size(time)
    at_edge = (torch.zeros_like(output.select(time, 0)) if state is None else state).unsqueeze(time)
    if not reverse:
        previous = torch.cat((at_edge, output.narrow(time, 0, steps - 1)), time)
        return previous if resets is None else previous.masked_fill(resets.unsqueeze(-1), 0)
    previous = torch.cat((output.narrow(time, 1, steps - 1), at_edge), time)
    if resets is not None:
        # The reversed direction zeroes the state after step t, that is before step t - 1.
        after = torch.cat((resets.narrow(time, 1, steps - 1), torch.zeros_like(resets.narrow(time, 0, 1))), time)
        previous = previous.masked_fill(after.unsqueeze(-1), 0)
    if lengths is not None and state is not None:
        # hx enters at each row's own last step; a reset just behind it (beyond the row) does nothing.
        t = torch.arange(steps, device=output.device).unsqueeze(1 - time)
        previous = torch.where((t == (lengths - 1).unsqueeze(time)).unsqueeze(-1), at_edge, previous)
    return previous


def _entered_packed(output: Tensor, state: Tensor | None, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """The state that entered each packed row of one direction: (rows, P)."""
    rows, batch = output.size(0), None if state is None else state.size(0)
    steps = torch.arange(batch_sizes.size(0), device=batch_sizes.device)
    starts = batch_sizes.cumsum(0) - batch_sizes
    step = torch.repeat_interleave(steps, batch_sizes, output_size=rows)
    column = torch.arange(rows, device=batch_sizes.device) - starts[step]
    # Where each row's predecessor stands in `output`; -1 for the rows that hx enters.
    if not reverse:
        before = (step - 1).clamp_min(0)
        source = torch.where(step > 0, starts[before] + column, -1)
    else:
        after = (step + 1).clamp_max(batch_sizes.size(0) - 1)
        active = (step + 1 < batch_sizes.size(0)) & (column < batch_sizes[after])
        source = torch.where(active, starts[after] + column, -1)
    source, column = source.to(output.device), column.to(output.device)
    inside = (source >= 0).unsqueeze(-1)
    previous = output.index_select(0, source.clamp_min(0))
    if state is None or batch is None:
        return previous.masked_fill(~inside, 0)
    return torch.where(inside, previous, state.index_select(0, column))


def _on_device(output: Tensor, batch_sizes: Tensor) -> bool:
    """Whether `_entered_packed_views` serves better: on CUDA, unless a graph is traced, where sizes are symbols.

    Index lists made on the host would have to be copied, which halts the host and cannot be captured in a CUDA graph.
    """
    return (
        output.is_cuda
        and not torch.compiler.is_compiling()
        and type(batch_sizes) is Tensor  # not a FakeTensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(batch_sizes)
    )


def _entered_packed_views(output: Tensor, state: Tensor | None, batch_sizes: Tensor, reverse: bool) -> Tensor:
    """What `_entered_packed` returns, put together from views: nothing goes from the host to the device."""
    sizes = batch_sizes.tolist()
    if state is None:
        state = output.new_zeros(sizes[0] if sizes else 0, output.size(1))
    parts = []
    # Of the rows of one step, those that a neighbouring step precedes, and behind them those that the state enters.
    # A run of steps of equal size is one view: there the neighbours' rows lie one behind the other.
    start = 0
    for first, last in _runs(sizes):
        size, steps = sizes[first], last - first
        end = start + steps * size
        if not reverse:
            before = sizes[first - 1] if first > 0 else 0
            parts.append(state[:size] if first == 0 else output[start - before : start - before + size])
            parts.append(output[start : end - size])
        else:
            after = sizes[last] if last < len(sizes) else 0
            parts.append(output[start + size : end])
            parts.append(output[end : end + after])
            parts.append(state[after:size])
        start = end
    return torch.cat(parts) if parts else output


def _runs(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """The stretches [first, last) of equal numbers."""
    starts = [t for t in range(len(sizes)) if t == 0 or sizes[t] != sizes[t - 1]]
    return list(zip(starts, [*starts[1:], len(sizes)], strict=True))

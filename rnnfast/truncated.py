"""Truncated backpropagation through time over a stream: `tbptt`, an iterator over chunks with the state carried on."""

from __future__ import annotations

import copy
import itertools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .sequences import ROLES, Role, RowOptions, as_lengths

# The entries of a mapping that the module takes; the others are targets.
_INPUT, _LENGTHS = "input", "lengths"
_OF_STEPS = tuple(name for name in RowOptions._fields if ROLES[name] is Role.ROWS)


# Two with tensors have no answer to whether they are equal.
@dataclass(frozen=True, eq=False)
class Chunk:
    """The new steps of a window.

    Attributes:
        output: what the module gave for them, with the window's graph behind it.
        input: (k1, B, ...), with batch_first (B, k1, ...); of the stream's last chunk perhaps fewer steps.
        target: the same steps of what the stream has beside that: of (x, y) y, of longer tuples a tuple, of a mapping a
            dict of the entries that the module did not get, of a tensor None.
        options: by name what the module got of each step: resets, if the stream has them, bool (k1, B), with
            batch_first (B, k1), without a batch (k1,).
        valid: of the same shape: False where a row had ended; None where no lengths were given.
        begin, end: the steps [begin, end), counted from the stream's first one.
    """

    output: Any
    input: Tensor
    target: Any
    options: dict[str, Tensor]
    valid: Tensor | None
    begin: int
    end: int


class _Part(NamedTuple):
    """Steps of one block of the stream, or of several.

    Attributes:
        tensors: by name, or of a tuple by place, each cut in time.
        lengths: (B,), within the part; None where every step counts.
        begin, end: which steps of the stream they are.
    """

    tensors: dict[Any, Tensor]
    lengths: Tensor | None
    begin: int
    end: int


class Tbptt(Iterator[Chunk]):
    """What `tbptt` returns."""

    def __init__(
        self, module: Callable[..., Any], stream: Any, k1: int, k2: int | None, state: Any, batch_first: bool | None
    ) -> None:
        self._k1 = _positive("k1", k1)
        self._k2 = self._k1 if k2 is None else _positive("k2", k2)
        if self._k2 < self._k1:
            raise ValueError(f"tbptt: k2: expected at least k1 = {k1}, so that each step has a gradient, got {k2}")
        self._module, self._batch_first = module, _check_module(module, batch_first)
        self._layer = _behind(module)
        self._state = state
        # The steps where the next window and the next chunk begin, and the state before the window.
        self._window_begin, self._chunk_begin, self._window_state = 0, 0, state
        self._parts: list[_Part] = []
        self._blocks_read = 0
        self._form: _Form | None = None
        self._failure: Exception | None = None
        is_block = isinstance(stream, (Tensor, tuple, Mapping, PackedSequence))
        if not is_block and not isinstance(stream, Iterable):
            raise TypeError(f"tbptt: stream: expected tensors or an iterable of blocks, got {type(stream).__name__}")
        self._blocks = iter([stream] if is_block else stream)
        self._steps = self._read_block() if is_block else None

    @property
    def state(self) -> Any:
        """The state after the last chunk, detached; before the first one the state that was given."""
        return self._state

    def __len__(self) -> int:
        """How many chunks there are in all.

        Raises:
            TypeError: the stream is an iterable, whose steps nobody knows before.
        """
        if self._steps is None:
            raise TypeError("tbptt: a stream of blocks has no length before its end")
        return -(-self._steps // self._k1)

    def __next__(self) -> Chunk:
        begin, end = self._chunk_begin, self._chunk_begin + self._k1
        while self._end < end and self._read_block() is not None:
            pass
        end = min(end, self._end)
        if begin == end:
            raise StopIteration
        # The next window begins there: the state before it must be known.
        next_window = max(self._window_begin, end + self._k1 - self._k2)
        outputs, new = [], []
        state = window_state = self._window_state
        for part in self._window(self._window_begin, end, {begin, next_window}):
            output, state = self._run(part, state)
            if part.end == next_window:
                window_state = _detached(state)
            if part.begin >= begin:
                outputs.append(output)
                new.append(part)
        self._state = _detached(state)
        self._window_begin, self._chunk_begin, self._window_state = next_window, end, window_state
        self._parts = [part for part in self._parts if part.end > next_window]
        return self._chunk(outputs, new)

    # --- the stream ---------------------------------------------------------------------------------------------

    @property
    def _end(self) -> int:
        """How many steps of the stream were read."""
        return self._parts[-1].end if self._parts else self._chunk_begin

    def _read_block(self) -> int | None:
        """Reads one, and says how many steps it has; None at the stream's end.

        What failed once fails again: without the steps that could not be read the others do not follow each other.
        """
        if self._failure is not None:
            raise self._failure
        try:
            for block in self._blocks:
                part = self._part_of(block)
                self._blocks_read += 1
                if part.begin < part.end:
                    self._parts.append(part)
                return part.end - part.begin
        except Exception as failure:
            self._failure = failure
            raise
        return None

    def _part_of(self, block: Any) -> _Part:
        """A block, checked."""
        where = f"tbptt: stream: block {self._blocks_read}"
        tensors, lengths = _entries(where, block)
        input = tensors[_INPUT]
        if input.dim() == 0:
            raise ValueError(f"{where}: input: expected at least 1 dimension, got a tensor of none")
        axis = self._axis(input)
        steps, batch = input.shape[axis], None if self._is_unbatched(input) else input.shape[1 - axis]
        for name, tensor in tensors.items():
            if tensor.dim() <= axis or tensor.shape[axis] != steps:
                raise ValueError(
                    f"{where}: {_named(name)}: expected {steps} steps in dimension {axis}, as of the input, "
                    f"got shape {tuple(tensor.shape)}"
                )
        lengths = _checked_lengths(where, lengths, batch, steps)
        # Not isinstance: a subclass may take them.
        if type(self._layer) in (nn.RNN, nn.LSTM, nn.GRU):
            for name, value in ((_LENGTHS, lengths), *((name, tensors.get(name)) for name in _OF_STEPS)):
                if value is not None:
                    raise TypeError(
                        f"{where}: {name}: expected none with torch.nn.{type(self._layer).__name__}, got some; "
                        "rnnfast's layers take them"
                    )
        form = _Form(isinstance(block, Mapping), {name: _form_of(tensor, axis) for name, tensor in tensors.items()})
        if self._form is not None and form != self._form:
            raise ValueError(f"{where}: expected {self._form.in_words()}, as in block 0, got {form.in_words()}")
        self._form = form
        return _Part(tensors, lengths, self._end, self._end + steps)

    def _axis(self, input: Tensor) -> int:
        """The dimension of time."""
        return 1 if self._batch_first and not self._is_unbatched(input) else 0

    def _is_unbatched(self, input: Tensor) -> bool:
        """Of a layer (T, I); of models, which may take token ids (T, B), only (T,)."""
        return input.dim() < (3 if isinstance(self._layer, nn.RNNBase) else 2)

    def _window(self, begin: int, end: int, cuts: set[int]) -> list[_Part]:
        """The steps [begin, end) of the stream, in parts that end at each of `cuts`; and where a block has lengths, at
        its end."""
        found: list[list[_Part]] = []
        borders = sorted({begin, end} | {cut for cut in cuts if begin < cut < end})
        for first, last in itertools.pairwise(borders):
            between: list[_Part] = []
            for part in self._parts:
                a, b = max(first, part.begin), min(last, part.end)
                if a >= b:
                    continue
                own = self._cut(part, a, b)
                if own.lengths is not None or (between and between[-1].lengths is not None):
                    found.append(between)
                    between = []
                between.append(own)
            found.append(between)
        return [self._joined(parts) for parts in found if parts]

    def _cut(self, part: _Part, begin: int, end: int) -> _Part:
        axis, first, steps = self._axis(part.tensors[_INPUT]), begin - part.begin, end - begin
        tensors = {name: tensor.narrow(axis, first, steps) for name, tensor in part.tensors.items()}
        lengths = None if part.lengths is None else (part.lengths - first).clamp(0, steps)
        return _Part(tensors, lengths, begin, end)

    def _joined(self, parts: list[_Part]) -> _Part:
        """Parts that follow each other as one, which says nothing of lengths."""
        if len(parts) == 1:
            return parts[0]
        axis = self._axis(parts[0].tensors[_INPUT])
        tensors = {name: torch.cat([part.tensors[name] for part in parts], axis) for name in parts[0].tensors}
        return _Part(tensors, None, parts[0].begin, parts[-1].end)

    # --- the module ---------------------------------------------------------------------------------------------

    def _run(self, part: _Part, state: Any) -> tuple[Any, Any]:
        given: dict[str, Any] = {} if part.lengths is None else {_LENGTHS: part.lengths}
        given |= {name: part.tensors[name] for name in _OF_STEPS if name in part.tensors}
        results = self._module(part.tensors[_INPUT], state, **given)
        if not isinstance(results, tuple) or len(results) != 2:
            got = f"a tuple of {len(results)}" if isinstance(results, tuple) else type(results).__name__
            raise TypeError(f"tbptt: module: expected module(input, state) to return (output, state), got {got}")
        output, state = results
        axis, steps = self._axis(part.tensors[_INPUT]), part.end - part.begin

        def check(tensor: Tensor) -> Tensor:
            if tensor.dim() <= axis or tensor.shape[axis] != steps:
                raise ValueError(
                    f"tbptt: module: expected an output of {steps} steps in dimension {axis}, "
                    f"got shape {tuple(tensor.shape)}"
                )
            return tensor

        return _mapped("an output", output, check), state

    def _chunk(self, outputs: list[Any], parts: list[_Part]) -> Chunk:
        assert self._form is not None
        axis = self._axis(parts[0].tensors[_INPUT])
        tensors = dict(self._joined(parts).tensors)
        valid = None
        if any(part.lengths is not None for part in parts):
            valid = torch.cat([self._valid(part) for part in parts], axis)
        input, options = tensors.pop(_INPUT), {}
        target: Any = None
        if self._form.is_mapping:
            options = {name: tensors.pop(name) for name in _OF_STEPS if name in tensors}
            target = tensors
        elif tensors:
            target = tuple(tensors.values()) if len(tensors) > 1 else tensors[1]
        return Chunk(_together(outputs, axis), input, target, options, valid, parts[0].begin, parts[-1].end)

    def _valid(self, part: _Part) -> Tensor:
        input = part.tensors[_INPUT]
        axis, steps = self._axis(input), part.end - part.begin
        if part.lengths is None:
            rows = input.shape[: 1 if self._is_unbatched(input) else 2]
            return torch.ones(rows, dtype=torch.bool, device=input.device)
        step, lengths = torch.arange(steps, device=input.device), part.lengths.to(input.device)
        if lengths.dim() == 0:
            return step < lengths
        return step < lengths.unsqueeze(1) if axis else step.unsqueeze(1) < lengths


def tbptt(
    module: Callable[..., Any],
    stream: Any,
    k1: int,
    k2: int | None = None,
    *,
    state: Any = None,
    batch_first: bool | None = None,
) -> Tbptt:
    """Truncated backpropagation through time: an iterator over the chunks of a stream, the state carried on.

    Every `k1` steps there is a chunk, with the module's output of its new steps; what the caller makes of it (a loss,
    `backward`, a step of an optimizer) goes back through `k2` steps, its own and those before. A window begins with the
    state that was there, detached. With k2 > k1 its first k2 - k1 steps run once more, with the current weights, so
    that gradients go through them; so does all else that the module does as it runs (dropout is drawn anew, batch norms
    take statistics again). Each step's loss is counted once. A window may take several calls of the module, cut where
    the next window begins, where the chunk begins, and where a block with lengths ends. Source: Williams and Peng 1990,
    https://doi.org/10.1162/neco.1990.2.4.490, where this is BPTT(h; h') with h = k2, h' = k1.

    Args:
        module: called as `module(input, state)`, returns `(output, state)`: a recurrent layer of rnnfast or torch.nn
            with one direction, or a model around such. Output and state are tensors, or tensors in tuples, lists and
            mappings. It gets None for the state at the beginning, if none is given.
        stream: one block, or an iterable of blocks such as a DataLoader, each of which goes on in every row where the
            one before ended. A block is the input, (T, B, ...), with batch_first (B, T, ...), where T may differ from
            block to block; a tuple of it and of targets with the same steps; or a mapping with "input", and perhaps
            "resets" (bool (T, B): True where a new segment begins) and "lengths" ((B,): how many of the block's steps
            each row has), which the module gets by name, and targets by any other name. Without a batch: (T, I) of a
            layer, (T,) of a model, with lengths of shape (). Blocks are cut and joined to chunks of k1 steps; they are
            kept as long as a window needs them, and must not be written into until then. As the stream itself a tuple
            is one block, and a list several; as a block of an iterable both are one.
        k1: steps of a chunk; the stream's last one may have fewer.
        k2: over how many steps gradients go back from a chunk's end, k1 if None, never fewer. A shorter last chunk goes
            back over fewer.
        state: the one to begin with; gradients reach it from the windows that begin with it, with k2 > k1 several (so
            that a graph behind it must be kept by `retain_graph`).
        batch_first: how the blocks lie, and the output; the module's own attribute if None, False where it has none.

    Returns:
        An iterator of `rnnfast.truncated.Chunk`; its `state` is the state after the last chunk, detached. It has a
        length where the stream is one block.

    Raises:
        TypeError, ValueError: an argument is not as said; in iteration: a block, or what the module returned.

    Example::

        for chunk in rnnfast.tbptt(lstm, (x, y), k1=50, k2=100):
            loss = (chunk.output - chunk.target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    """
    return Tbptt(module, stream, k1, k2, state, batch_first)


# --- checks -------------------------------------------------------------------------------------------------------


class _Form(NamedTuple):
    """What every block of a stream has in common.

    Attributes:
        is_mapping: whether it is a mapping.
        tensors: by name type and shape.
    """

    is_mapping: bool
    tensors: dict[Any, str]

    def in_words(self) -> str:
        return "a mapping of " * self.is_mapping + ", ".join(
            f"{_named(name)} {of}" for name, of in self.tensors.items()
        )


def _form_of(tensor: Tensor, axis: int) -> str:
    """Type and shape, but for the number of steps."""
    sizes = ["T" if i == axis else str(size) for i, size in enumerate(tensor.shape)]
    return f"{str(tensor.dtype).removeprefix('torch.')} ({', '.join(sizes)})"


def _positive(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"tbptt: {name}: expected a number of steps, got {value!r}")
    if int(value) < 1:
        raise ValueError(f"tbptt: {name}: expected at least 1 step, got {value!r}")
    return int(value)


def _behind(module: Any) -> Any:
    """The module, of a program of torch.compile what it was made of."""
    return getattr(module, "_orig_mod", module)


def _check_module(module: Any, batch_first: Any) -> bool:
    """Whether the stream is batch_first."""
    if batch_first is not None and not isinstance(batch_first, bool):
        raise TypeError(f"tbptt: batch_first: expected True, False or None, got {batch_first!r}")
    if not callable(module):
        raise TypeError(f"tbptt: module: expected one called as module(input, state), got {type(module).__name__}")
    if isinstance(module, nn.RNNCellBase):
        raise TypeError(f"tbptt: module: expected a layer or a model, got a cell, {type(module).__name__}")
    own = getattr(module, "batch_first", None)
    if batch_first is not None and isinstance(_behind(module), nn.RNNBase) and own != batch_first:
        raise ValueError(f"tbptt: batch_first: expected {own}, as the module has it, got {batch_first}")
    for name, layer in module.named_modules() if isinstance(module, nn.Module) else ():
        if not isinstance(layer, nn.RNNBase):
            continue
        what = type(layer).__name__ + (f" {name!r}" if name else "")
        if layer.bidirectional:
            raise ValueError(
                "tbptt: module: expected layers of one direction, because the reversed one begins at the stream's end, "
                f"got a bidirectional {what}"
            )
        if layer.batch_first and batch_first is None and own is None:
            raise ValueError(
                "tbptt: batch_first: expected True or False for a model around a layer with batch_first=True, here "
                f"{what}, got None"
            )
    return bool(own) if batch_first is None else batch_first


def _entries(where: str, block: Any) -> tuple[dict[Any, Tensor], Any]:
    """A block's tensors by name, or beside the input by their place, but for its lengths."""
    if isinstance(block, PackedSequence):
        raise TypeError(f"{where}: expected padded rows, with 'lengths' in a mapping, got a PackedSequence")
    entries: dict[Any, Any]
    if isinstance(block, Mapping):
        if _INPUT not in block:
            raise ValueError(f"{where}: expected an entry 'input', got {', '.join(map(repr, block)) or 'none'}")
        entries = dict(block)
        for name in _OF_STEPS:
            if entries.get(name, ...) is None:
                del entries[name]
    elif isinstance(block, (tuple, list)):
        if not block:
            raise ValueError(f"{where}: expected the input and perhaps targets, got nothing")
        entries = {_INPUT: block[0], **dict(enumerate(block[1:], 1))}
    else:
        entries = {_INPUT: block}
    lengths = entries.pop(_LENGTHS, None)
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {_named(name)}: expected a tensor, got {type(value).__name__}")
    return entries, lengths


def _checked_lengths(where: str, lengths: Any, batch: int | None, steps: int) -> Tensor | None:
    """(B,), without a batch ()."""
    if lengths is None:
        return None
    try:
        if batch is not None:
            return as_lengths(lengths, steps, batch)
        return as_lengths(lengths.unsqueeze(0) if isinstance(lengths, Tensor) else [lengths], steps, 1).squeeze(0)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


def _named(name: Any) -> str:
    return f"target {name}" if isinstance(name, int) else str(name)


# --- nests of tensors ---------------------------------------------------------------------------------------------


def _detached(state: Any) -> Any:
    return _mapped("a state", state, Tensor.detach, numbers_too=True)


def _mapped(what: str, nest: Any, function: Callable[[Tensor], Tensor], numbers_too: bool = False) -> Any:
    """The same nest of function(tensor); None stays, and numbers where they may be there."""
    if isinstance(nest, Tensor):
        return function(nest)
    if isinstance(nest, MutableMapping):
        # Of the same class, with whatever else it has.
        mapped = copy.copy(nest)
        for name, value in nest.items():
            mapped[name] = _mapped(what, value, function, numbers_too)
        return mapped
    if isinstance(nest, (tuple, list)):
        values = [_mapped(what, value, function, numbers_too) for value in nest]
        return type(nest)(*values) if hasattr(nest, "_fields") else type(nest)(values)
    if nest is None or (numbers_too and isinstance(nest, (numbers.Number, str))):
        return nest
    # What holds tensors out of sight would carry a graph on; a number in an output is that of one call of several.
    raise TypeError(
        f"tbptt: module: expected {what} of tensors, in tuples, lists and mappings, got {type(nest).__name__}"
    )


def _together(nests: list[Any], axis: int) -> Any:
    """Nests of the same form as one: their tensors joined in time."""
    first = nests[0]
    if len(nests) == 1:
        return first
    if isinstance(first, Tensor):
        return torch.cat(nests, axis)
    if isinstance(first, MutableMapping):
        together = copy.copy(first)
        for name in first:
            together[name] = _together([nest[name] for nest in nests], axis)
        return together
    if isinstance(first, (tuple, list)):
        values = [_together(list(each), axis) for each in zip(*nests, strict=True)]
        return type(first)(*values) if hasattr(first, "_fields") else type(first)(values)
    return first

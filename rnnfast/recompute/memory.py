"""What training a layer takes of memory, from its shape alone: results, what is kept for backward, and what a backward
pass needs beside that.

Counted are the tensors whose size grows with the number of steps, and the states between pieces. Not counted: the
input, parameters and their gradients, workspaces of a few steps, and what torch's allocator holds back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..cell_types import CELLS
from .pieces import count_of_pieces, larger, smaller, steps_of_a_piece

# By setting, in the order in which "auto" tries them: None keeps everything.
WAYS: tuple[str | None, ...] = (None, "gates", "chunks")


@dataclass(frozen=True)
class Training:
    """A call of a module that will be differentiated.

    Attributes:
        mode: a key of `CELLS`.
        input_size, hidden_size: I, H; proj_size: P, 0 without projection.
        steps: T.
        rows: of all steps together: T*B, less where rows are packed.
        num_layers, directions: L, D.
        item: bytes of a number of the layer's type.
        whole_backward: whether backward goes through the steps without the gradients of all gates at once, as the C++
            op for layers on the CPU does.
        output_gradient: whether the loss looks at every step's output, and not at the last states alone.
        input_gradient: whether the input wants a gradient.
        options: `Options` where they change the recurrence.
    """

    mode: str
    input_size: int
    hidden_size: int
    steps: int
    rows: int
    proj_size: int = 0
    num_layers: int = 1
    directions: int = 1
    item: int = 4
    whole_backward: bool = False
    output_gradient: bool = True
    input_gradient: bool = False
    options: Any = None

    @property
    def state_size(self) -> int:
        return self.proj_size or self.hidden_size


class Memory(NamedTuple):
    """Bytes.

    Attributes:
        kept: between forward and backward: the output of the layers, and what is saved.
        peak: the most at one time.
    """

    kept: int
    peak: int


def memory_of(training: Training, how: str | None, pieces: int = 0) -> Memory:
    """What a call takes.

    Args:
        training: of which shape.
        how: None, "gates" or "chunks".
        pieces: how many, 0: as fits.
    """
    of_direction, directions, item = _per_row(training), training.directions, training.item
    # Of one layer.
    kept_of_row, beside_of_row = of_direction.output, 0
    of_borders, rows_of_piece = 0, 0
    if how is None:
        kept_of_row += of_direction.cell_states + of_direction.saved
        beside_of_row = 0 if training.whole_backward else of_direction.grad_gates
    else:
        kept_of_row += of_direction.cell_states if how == "gates" else 0
        length = steps_of_a_piece(pieces, training.steps, training.rows)
        batch = -(-training.rows // larger(training.steps, 1))
        of_borders = count_of_pieces(training.steps, length) * batch * (of_direction.output + of_direction.carried)
        rows_of_piece = smaller(training.rows, length * batch)
    of_rows = training.rows * (kept_of_row * item + of_direction.mask_bytes)
    kept = training.num_layers * directions * (of_rows + of_borders * item)
    has_layers = training.num_layers > 1
    of_input = max(training.input_size, has_layers * directions * of_direction.output)
    beside_of_row = directions * (beside_of_row + of_direction.output * training.output_gradient)
    beside_of_row += of_input if has_layers or training.input_gradient else 0
    # One direction at a time: what forward makes of a piece again, and its gradients.
    of_piece = rows_of_piece * (of_input + of_direction.of_piece)
    return Memory(kept, kept + item * (training.rows * beside_of_row + of_piece))


class _PerRow(NamedTuple):
    """Numbers that a row of one direction of a layer has, and bytes of masks."""

    output: int
    cell_states: int
    carried: int  # beside h
    saved: int  # beside output and cell_states
    mask_bytes: int
    grad_gates: int

    @property
    def of_piece(self) -> int:
        """What a piece's forward and backward have at the same time."""
        return 2 * (self.output + self.cell_states) + self.saved + self.grad_gates


def _per_row(training: Training) -> _PerRow:
    cell, options, hidden_size = CELLS[training.mode], training.options, training.hidden_size
    cells = hidden_size if cell.has_cell_state else 0
    if options is None:
        width = cell.gates * hidden_size
        grad_gates = width * (2 if cell.split_gate is not None else 1)
        return _PerRow(training.state_size, cells, cells, cell.reserve * hidden_size, 0, grad_gates)
    # Layers with options are made of plain ones, which ask here.
    from ..variants.ops import reserve_width

    width = options.gates(cell.gates) * hidden_size
    # The gates' input part, and with a norm of its own what that took; what the time loop saves.
    saved = width + reserve_width(training.mode, width, hidden_size)
    saved += width * (options.layer_norm == "separate") + width * (options.layer_norm is not None)
    carried = cells * (2 if options.is_exponential else 1)
    return _PerRow(hidden_size, cells, carried, saved, options.masks_of_steps * hidden_size, 2 * width)


def best_way(training: Training, budget: int) -> str | None:
    """The first of `WAYS`, which are in the order of their speed, whose peak is within `budget` bytes; the last of them
    if none is."""
    for how in WAYS[:-1]:
        if memory_of(training, how).peak <= budget:
            return how
    return WAYS[-1]


def in_words(size: float) -> str:
    """Bytes as people read them: "819 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5 or unit == "GB":
            return f"{size:.3g} {unit}" if size < 999.5 else f"{size:,.0f} {unit}"
        size /= 1000
    raise AssertionError

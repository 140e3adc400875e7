"""Stacked layers with options: masks, directions, and which of them need a time loop of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import functional
from ..autocasting import with_autocast
from ..cell_types import CELLS
from ..recompute.calls import recomputed_direction, trains
from ..recompute.settings import Recompute, Way
from ..sequences import Sequences, zero_beyond
from ..signatures import kinds_of
from . import ops, reference
from .batch_norm import BatchNorm, Statistics
from .draws import chosen, dropped, dropped_weights
from .options import Options
from .reference import Arguments, Masks, Weights


class DirectionWeights(NamedTuple):
    """All parameters of one direction of one layer: torch.nn's, and by kind those of the options; and the running
    statistics of a batch norm."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor | None
    others: dict[str, Tensor]
    statistics: dict[str, Statistics]


# Layers without an option that changes the recurrence: (input, hx, cx, the parameters in torch.nn's order, whether
# every c_t is wanted) to output, h_n, c_n, every c_t.
PlainLayer = Callable[[Tensor, Tensor | None, Tensor | None, list[Tensor], bool], Any]


def draw_masks(
    options: Options, training: bool, batch: Any, hidden_size: int, rows: Tensor, has_cell_state: bool
) -> Masks:
    """What one direction of one layer draws, from torch's generator, in the order of `Masks`; nothing in evaluation.

    Args:
        batch: B.
        hidden_size: H.
        rows: (rows, .), for their number, type and device.
        has_cell_state: of the cell.
    """
    recurrent, candidate, kept_h, kept_c = None, None, None, None
    if training and options.recurrent_dropout > 0:
        mask = dropped((batch, hidden_size), options.recurrent_dropout, rows)
        recurrent, candidate = (mask, None) if options.dropout_mode == "state" else (None, mask)
    if training and options.zoneout[0] > 0:
        kept_h = chosen((*rows.shape[:-1], hidden_size), options.zoneout[0], rows)
    if training and options.zoneout[1] > 0 and has_cell_state:
        kept_c = chosen((*rows.shape[:-1], hidden_size), options.zoneout[1], rows)
    return Masks(recurrent, candidate, kept_h, kept_c)


def run_direction(
    options: Options,
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    lx: Tensor | None,
    weights: DirectionWeights,
    sequences: Sequences,
    reverse: bool,
    masks: Masks,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction of one layer whose options change the recurrence.

    Args:
        input: (rows, I), zero beyond a row's length.
        hx, cx: (B, H), None for zeros; lx: of the sLSTM, as in `Arguments`.
        masks: from `draw_masks`.
        training: whether a batch norm takes the batch's statistics.

    Returns:
        output (rows, H), h_n, c_n (B, H), cell_states (rows, H), of the sLSTM l_n (B, H); (0,) for what does not apply.
    """
    arguments, batch_norm, bias = recurrence_of(
        options, mode, input, hx, cx, lx, weights, sequences, reverse, masks, training
    )
    if batch_norm is not None and batch_norm.of_each_step:
        ops.warn_of_reference(arguments.gates, options.why_no_kernel)
        return reference.forward(arguments, batch_norm, bias)
    return ops.recurrence(arguments)


def recurrence_of(
    options: Options,
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    lx: Tensor | None,
    weights: DirectionWeights,
    sequences: Sequences,
    reverse: bool,
    masks: Masks,
    training: bool,
) -> tuple[Arguments, BatchNorm | None, Tensor | None]:
    """What `run_direction` runs: the arguments of the recurrence, and of `reference.forward` beside them."""
    _check_shapes(options, mode, input, weights)
    others = weights.others
    batch_norm = None
    if options.batch_norm is not None:
        statistics = weights.statistics
        of_norm = (
            others["weight_batch_norm_ih"], others.get("weight_batch_norm_hh"), others.get("weight_batch_norm_c"),
        )  # fmt: skip
        batch_norm = BatchNorm(
            training, options.batch_norm_momentum, options.norm_eps, statistics["ih"], statistics.get("hh"),
            statistics.get("c"), of_norm, others.get("bias_batch_norm_c"),
        )  # fmt: skip
    gates, bias_hn, bias = reference.input_gates(
        options, mode, input, weights.weight_ih, weights.bias_ih, weights.bias_hh, others.get("weight_norm_ih"),
        sequences, batch_norm,
    )  # fmt: skip
    of_loop = Weights(weights.weight_hh, bias_hn, *(others.get(name) for name in Weights._fields[2:]))
    arguments = Arguments(
        mode, options.words, options.norm_eps, *options.zoneout, reverse, options.num_heads, gates, hx, cx, lx,
        sequences, of_loop, masks,
    )  # fmt: skip
    return arguments, batch_norm, bias


def _check_shapes(options: Options, mode: str, input: Tensor, weights: DirectionWeights) -> None:
    """Raises RuntimeError unless torch.nn's parameters are of their shapes: a bias of one value would be broadcast."""
    size = weights.weight_hh.shape[1]
    width = options.gates(CELLS[mode].gates) * size * options.num_heads
    wanted = {
        "weight_ih": (width, input.shape[-1]),
        "weight_hh": (width, size),
        "bias_ih": (width,),
        "bias_hh": (width,),
    }
    for kind, shape in wanted.items():
        found: Tensor | None = getattr(weights, kind)
        if found is not None and found.shape != shape:
            raise RuntimeError(f"rnnfast: {kind}: expected shape {shape}, got {tuple(found.shape)}")


def _batch_of(input: Tensor, hx: Tensor | None, sequences: Sequences) -> Any:
    if hx is not None:
        return hx.size(1)
    if sequences.batch_sizes is not None:
        return int(sequences.batch_sizes[0]) if sequences.batch_sizes.numel() else 0
    return input.size(0 if sequences.batch_first else 1)


def run_layers(
    options: Options,
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Sequence[Sequence[DirectionWeights]],
    sequences: Sequences,
    *,
    dropout: float,
    training: bool,
    plain_layer: PlainLayer,
    return_cell_states: bool = False,
    way: Way | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Stacked layers. The caller has checked the arguments; types are those to compute in.

    Each layer draws, in this order: the mask of its input; for each direction the elements of W_hh that are dropped,
    then what `draw_masks` says; and, but for the last, the dropout of its output.

    Args:
        weights: by layer and direction.
        cx: (L*D, B, H), of the sLSTM (L*D, B, 2H), with `Arguments.lx` behind it; so c_n.
        plain_layer: what runs a layer whose recurrence is the plain one.
        way: how training saves memory, of layers whose recurrence is another; None: not at all.
        others: as `functional.run_layers`.
    """
    has_cell_state = CELLS[mode].has_cell_state
    directions = len(weights[0])
    # Of packed rows it is a number in a tensor: not looked at for nothing.
    masks_sequences = training and (options.recurrent_dropout > 0 or options.input_dropout > 0)
    batch = _batch_of(input, hx, sequences) if masks_sequences else 0
    lx = None
    if cx is not None and options.is_exponential:
        cx, lx = cx.chunk(2, -1)
    states_h: list[Tensor] = []
    states_c: list[Tensor] = []
    output, cell_states = input, None
    for layer, of_layer in enumerate(weights):
        x = zero_beyond(output, sequences) if layer == 0 and options.changes_recurrence else output
        if training and options.input_dropout > 0:
            mask = dropped((batch, x.shape[-1]), options.input_dropout, x)
            x = x * ops.of_rows(mask, sequences, x)
        parts = []
        of_layer_now = []
        for d, of_direction in enumerate(of_layer):
            weight_hh = of_direction.weight_hh
            if training and options.weight_dropout > 0:
                weight_hh = dropped_weights(weight_hh, options.weight_dropout)
            of_layer_now.append(of_direction._replace(weight_hh=weight_hh))
            if not options.changes_recurrence:
                continue
            number = layer * directions + d
            hidden_size = options.hidden_size(weight_hh)
            masks = draw_masks(options, training, batch, hidden_size, x, has_cell_state)
            call = (
                options, mode, x, None if hx is None else hx[number], None if cx is None else cx[number],
                None if lx is None else lx[number], of_layer_now[-1], sequences, d == 1, masks,
            )  # fmt: skip
            if way is None:
                parts.append(run_direction(*call, training))
            else:
                parts.append(recomputed_direction(way, return_cell_states and layer + 1 == len(weights), *call))
        if parts:
            outputs, h_n, c_n, every_c, l_n = zip(*parts, strict=True)
            output = outputs[0] if directions == 1 else torch.cat(outputs, -1)
            states_h += h_n
            with_log = options.is_exponential
            states_c += [torch.cat(both, -1) for both in zip(c_n, l_n, strict=True)] if with_log else c_n
            if return_cell_states and has_cell_state:
                cell_states = every_c[0] if directions == 1 else torch.cat(every_c, -1)
        else:
            first = layer * directions
            flat = [
                weight
                for one in of_layer_now
                for weight in (one.weight_ih, one.weight_hh, one.bias_ih, one.bias_hh, *one.others.values())
                if weight is not None
            ]
            output, of_h, of_c, cell_states = plain_layer(
                x,
                None if hx is None else hx.narrow(0, first, directions),
                None if cx is None else cx.narrow(0, first, directions),
                flat,
                return_cell_states and layer + 1 == len(weights),
            )
            states_h += of_h.unbind(0)
            states_c += () if of_c is None else of_c.unbind(0)
        if training and dropout > 0 and layer + 1 < len(weights):
            # torch.nn draws these on time-major rows, also with batch_first: so do we, for the same masks.
            turned = sequences.batch_first and sequences.batch_sizes is None
            output = torch.dropout(output.transpose(0, 1).contiguous() if turned else output, dropout, True)
            output = output.transpose(0, 1) if turned else output
    return (
        output,
        torch.stack(states_h),
        torch.stack(states_c) if has_cell_state else None,
        cell_states if return_cell_states else None,
    )


def _of_options(module: Any, options: Options, input: Tensor) -> list[list[Tensor]]:
    """The parameters of a module's options, by layer and direction, in the order of `Options.parameters`.

    Raises:
        RuntimeError: one is not of its shape, or not as the input.
    """
    kinds = options.parameters(module._gates(), module.hidden_size, CELLS[module._mode()].has_cell_state)
    found = []
    for suffix in module._suffixes():
        of_direction = [getattr(module, kind + suffix) for kind in kinds]
        for (kind, (size, _)), parameter in zip(kinds.items(), of_direction, strict=True):
            if parameter.shape != (size,):
                raise RuntimeError(
                    f"{type(module).__name__}: {kind}{suffix}: expected shape ({size},), got {tuple(parameter.shape)}"
                )
        module._check_weights(input, of_direction)
        found.append(of_direction)
    return found


def _grouped(
    options: Options, module: Any, own: Sequence[Tensor], added: Sequence[Tensor], directions: int
) -> list[list[DirectionWeights]]:
    """By layer and direction: torch.nn's parameters in its order, and those of options in that of `_of_options`."""
    bias = bool(module.bias)
    kinds = kinds_of(bias, getattr(module, "proj_size", 0) > 0)
    of_module = module._gates(), module.hidden_size, CELLS[module._mode()].has_cell_state
    new, kept = tuple(options.parameters(*of_module)), tuple(options.statistics(*of_module))
    suffixes = module._suffixes()
    every = []
    for n in range(len(own) // len(kinds)):
        given = dict(zip(kinds, own[n * len(kinds) : (n + 1) * len(kinds)], strict=True))
        given |= dict(zip(new, added[n * len(new) : (n + 1) * len(new)], strict=True))
        every.append(
            DirectionWeights(
                given.pop("weight_ih"), given.pop("weight_hh"), given.pop("bias_ih", None), given.pop("bias_hh", None),
                given,
                {
                    kind: Statistics(*(getattr(module, f"running_{of}_{kind}{suffixes[n]}") for of in ("mean", "var")))
                    for kind in kept
                },
            )
        )  # fmt: skip
    return [every[n : n + directions] for n in range(0, len(every), directions)]


def run_module_layers(module: Any, options: Options) -> Callable[..., Any]:
    """`functional.run_layers` for layers with options: a function of the same arguments.

    Raises:
        RuntimeError, ValueError: in the call: a parameter of an option is not as the others.
    """

    def run(
        mode: str,
        input: Tensor,
        hx: Tensor | None,
        cx: Tensor | None,
        weights: Sequence[Tensor],
        sequences: Sequences,
        *,
        bias: bool,
        num_layers: int,
        bidirectional: bool,
        dropout: float,
        training: bool,
        return_cell_states: bool,
        recompute: Recompute | None = None,
        **_: Any,
    ) -> Any:
        others = [parameter for each in _of_options(module, options, input) for parameter in each]
        count = len(weights)

        def run_cast(input: Tensor, hx: Tensor | None, cx: Tensor | None, every: Sequence[Tensor]) -> Any:
            def plain_layer(
                x: Tensor, h: Tensor | None, c: Tensor | None, flat: list[Tensor], cell_states: bool
            ) -> Any:
                return functional.run_layers(
                    mode, x, h, c, flat, sequences, bias=bias, bidirectional=bidirectional,
                    return_cell_states=cell_states, recompute=recompute,
                )  # fmt: skip

            way = None
            if recompute is not None and options.changes_recurrence and trains(input, (hx, cx, *every)):
                way = recompute.way(mode, input, every, sequences, num_layers, bidirectional, options)
            grouped = _grouped(options, module, every[:count], every[count:], 2 if bidirectional else 1)
            return run_layers(
                options, mode, input, hx, cx, grouped, sequences, dropout=dropout, training=training,
                plain_layer=plain_layer, return_cell_states=return_cell_states, way=way,
            )  # fmt: skip

        return with_autocast(mode, input, hx, cx, [*weights, *others], run_cast)

    return run


def run_module_step(
    module: Any,
    options: Options,
    mode: str,
    input: Tensor,
    h: Tensor | None,
    c: Tensor | None,
    weights: Sequence[Tensor],
) -> tuple[Tensor, Tensor | None]:
    """One step of a cell with options.

    Args:
        input: (B, I).
        h, c: (B, H), None for zeros.
        weights: torch.nn's, in its order.

    Returns:
        h' (B, H), and c' where the cell has one.
    """
    (others,) = _of_options(module, options, input)
    count, has_cell_state = len(weights), CELLS[mode].has_cell_state

    def run_cast(input: Tensor, h: Tensor | None, c: Tensor | None, every: Sequence[Tensor]) -> Any:
        ((one,),) = _grouped(options, module, every[:count], every[count:], 1)
        if not options.changes_recurrence:
            output, _, c_n, _ = functional.run_layers(mode, input, h, c, every[:count], Sequences(), bias=module.bias)
            return output, c_n
        row = input.unsqueeze(0)
        hidden_size = options.hidden_size(one.weight_hh)
        masks = draw_masks(options, module.training, row.shape[1], hidden_size, row, has_cell_state)
        _, h_n, c_n, _, _ = run_direction(
            options, mode, row, h, c, None, one, Sequences(), False, masks, module.training
        )
        return h_n, c_n if has_cell_state else None

    result: tuple[Tensor, Tensor | None] = with_autocast(mode, input, h, c, [*weights, *others], run_cast)
    return result

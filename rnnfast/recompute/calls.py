"""Layers that recompute, as `functional.run_layers` and layers with options call them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..backends import asked_for, select, wants_gradient
from ..sequences import Sequences
from ..signatures import PLACES
from .call import Call
from .op import recomputed
from .settings import Way


def trains(input: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether anything will be kept for a backward pass of this call that could be made again instead.

    Programs that are saved, transforms and forward-mode derivatives do not recompute: they get what they always do.
    """
    return (
        torch.is_grad_enabled()
        and wants_gradient(input, others)
        and forward_ad._current_level < 0
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None
        # Up to torch 2.11 Dynamo takes torch.compiler.is_exporting() for true whenever it traces.
        and not torch.compiler._is_exporting_flag
    )


def _text(*call: Any) -> str:
    return Call(*call).text()


# The effect of torch.compiler.assume_constant_result, which would import Dynamo.
_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def recomputed_layer(
    way: Way, keeps_cell_states: bool, mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A layer, of the arguments of the op `layer`: output, h_n, c_n, and every c_t where wanted.

    Raises:
        RuntimeError: as the op `layer` does.
    """
    sequences, places = Sequences(*others[:4]), others[4:]
    given = {"input": input, "hx": hx, "cx": cx, **sequences._asdict(), **dict(zip(PLACES, places, strict=True))}
    tensors = _tensors(given)
    text = _text(way.how, select(input), mode, sequences.batch_first, keeps_cell_states, "", False, tuple(tensors))
    results = recomputed(text, way.pieces, list(tensors.values()))
    output, h_n, c_n, _, cell_states = results[:5]
    return output, h_n, c_n, cell_states


def _tensors(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of what a call is given what there is, but for what its text says."""
    return {name: value for name, value in given.items() if isinstance(value, Tensor)}


def recomputed_direction(
    way: Way,
    keeps_cell_states: bool,
    options: Any,
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    lx: Tensor | None,
    weights: Any,
    sequences: Sequences,
    reverse: bool,
    masks: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One direction of a layer with options: what `variants.layers.run_direction` takes and returns."""
    states = {"hx": hx, "cx": cx, "lx": lx}
    given = {"input": input, **{name: None if state is None else state.unsqueeze(0) for name, state in states.items()}}
    given |= sequences._asdict() | weights._asdict() | weights.others
    given |= {f"mask_{name}": mask for name, mask in masks._asdict().items()}
    tensors = _tensors(given)
    text = _text(
        way.how, asked_for(), mode, sequences.batch_first, keeps_cell_states, options.text, reverse, tuple(tensors)
    )
    results = recomputed(text, way.pieces, list(tensors.values()))
    output, h_n, c_n, l_n, cell_states = results[:5]
    h_n, c_n, l_n = (state.squeeze(0) for state in (h_n, c_n, l_n))
    return output, h_n, c_n, cell_states, l_n

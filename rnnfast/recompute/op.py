"""Layers that save little and make the rest again, as torch knows them: the derivative; and ops, in Python, for
programs: torch.compile puts one node into its graph, however many pieces there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import libraries
from .._after_import import after_import
from ..autograd import Layer, without_autocast
from ..backends import backend as backend_of
from ..signatures import PLACES
from ..vmap import is_any_batched
from .call import Call
from .loops import RESULTS, backward, directions_of, empty_results, forward, in_order, sequences_of
from .pieces import count_of_pieces, steps_of_a_piece

NAMESPACE = "rnnfast_recompute"


# --- shapes, for tracing ------------------------------------------------------------------------------------------


def _fake_forward(text: str, count: int, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    call = Call.of(text)
    named = dict(zip(call.names, tensors, strict=True))
    input, directions = named["input"], directions_of(call, named)
    steps, batch = _sizes(call, named)
    pieces = count_of_pieces(steps, steps_of_a_piece(count, steps, math.prod(input.shape[:-1])))
    return in_order(empty_results(call, directions[0], len(directions), input, batch, pieces), input)


def _sizes(call: Call, named: Mapping[str, Tensor]) -> tuple[Any, Any]:
    """T and B, as far as shapes say."""
    input, batch_sizes = named["input"], named.get("batch_sizes")
    if batch_sizes is None:
        return (input.shape[1], input.shape[0]) if call.batch_first else (input.shape[0], input.shape[1])
    state = named.get("hx", named.get("cx"))
    batch = torch.library.get_ctx().new_dynamic_size() if state is None else state.shape[1]
    return batch_sizes.shape[0], batch


def _fake_backward(
    text: str,
    count: int,
    wanted: Sequence[str],
    tensors: Sequence[Tensor],
    results: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> list[Tensor]:
    named = dict(zip(Call.of(text).names, tensors, strict=True))
    return [torch.empty_like(named[name], memory_format=torch.contiguous_format) for name in wanted]


# --- closed to Dynamo ---------------------------------------------------------------------------------------------


def _keep(ctx: Any, text: str, count: int, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """What backward needs."""
    output, _, _, _, cell_states, *borders = results
    # What "chunks" makes again is not kept.
    kept = [output, cell_states] if Call.of(text).how == "gates" else []
    ctx.text, ctx.count, ctx.given = text, count, len(tensors)
    ctx.save_for_backward(*tensors, *kept, *borders)
    ctx.mark_non_differentiable(*borders)
    ctx.set_materialize_grads(False)


# What runs. Once Dynamo is imported each is one that it does not look into (`_close`): where a program of torch.compile
# breaks before the op, Dynamo looks into all that Python runs from there on, and would compile loops over pieces, which
# differ from each other.
_bodies: dict[str, Callable[..., Any]] = {"forward": forward, "backward": backward, "keep": _keep}


def _close(dynamo: Any) -> None:
    for name, function in _bodies.items():
        _bodies[name] = dynamo.disable(function)


def _run_forward(text: str, count: int, tensors: Sequence[Tensor]) -> Any:
    return _bodies["forward"](text, count, tensors)


def _run_backward(text: str, count: int, *others: Any) -> Any:
    return _bodies["backward"](text, count, *others)


# --- the derivative -----------------------------------------------------------------------------------------------


def _gradients(
    run: Callable[..., Sequence[Tensor]], ctx: Any, needs: Sequence[bool], grads: Sequence[Any]
) -> list[Tensor | None]:
    """The gradients of the call's tensors.

    Args:
        run: `backward`, or the op.
        needs: which tensors want one.
        grads: of forward's results.
    """
    call, of_results = Call.of(ctx.text), grads[: len(RESULTS)]
    saved = ctx.saved_tensors
    tensors, kept = saved[: ctx.given], saved[ctx.given :]
    wanted = [name for name, need in zip(call.names, needs, strict=True) if need]
    found: dict[str, Tensor | None] = {}
    if all(grad is None for grad in of_results):
        return [None] * len(tensors)
    if torch.is_grad_enabled() or is_any_batched(*of_results):
        found = _differentiable_gradients(call, wanted, tensors, of_results)
    else:
        if call.how == "chunks":
            nothing = kept[0].new_empty(0)
            kept = (nothing, nothing, *kept)
        results = run(ctx.text, ctx.count, wanted, list(tensors), list(kept), list(of_results))
        found = dict(zip(wanted, results, strict=True))
    return [found.get(name) for name in call.names]


class Recomputed(torch.autograd.Function):
    """The op `forward` with its derivative, for who calls it in Python: tools that look at every operation (profilers,
    counters) see what runs inside."""

    @staticmethod
    def forward(ctx: Any, text: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        results: tuple[Tensor, ...] = _run_forward(text, count, tensors)
        _bodies["keep"](ctx, text, count, tensors, results)
        return results

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        return None, None, *_gradients(_run_backward, ctx, ctx.needs_input_grad[2:], grads)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    text, count, tensors = inputs
    _bodies["keep"](ctx, text, count, tensors, output)


def _backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
    op = torch.ops.rnnfast_recompute.backward
    return None, None, _gradients(op, ctx, ctx.needs_input_grad[2], grads)


def recomputed(text: str, count: int, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`loops.forward`, with its derivative: in a program one node, else an autograd Function."""
    if torch.compiler.is_compiling():
        results: Sequence[Tensor] = torch.ops.rnnfast_recompute.forward(text, count, list(tensors))
        return results
    return Recomputed.apply(text, count, *tensors)


def _differentiable_gradients(
    call: Call, wanted: Sequence[str], tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> dict[str, Tensor | None]:
    """The gradients with a graph of their own, or several at once: of the layer run again in one piece, as any."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), backend_of(call.backend), without_autocast(tensors[0].device.type):
        # Tensors of their own, through which no path leads from one argument to another.
        own = {
            name: value.view_as(value) if name in wanted else value
            for name, value in zip(call.names, tensors, strict=True)
        }
        results = zip(_whole(call, own), grads, strict=True)
        pairs = [(result, grad) for result, grad in results if result is not None and grad is not None]
        found = torch.autograd.grad(
            [result for result, _ in pairs],
            [own[name] for name in wanted],
            [grad for _, grad in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    return dict(zip(wanted, found, strict=True))


def _whole(call: Call, named: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
    """What `forward` returns before the states between pieces, without pieces."""
    sequences = sequences_of(call, named)
    if call.options:
        # As in `directions_of`.
        from ..variants.recomputed import whole

        return whole(call, named, sequences)
    output, h_n, c_n, cell_states, _ = Layer.apply(
        call.backend, call.mode, named["input"], named.get("hx"), named.get("cx"), *sequences, *map(named.get, PLACES)
    )
    return output, h_n, c_n, None, cell_states


# --- telling torch ------------------------------------------------------------------------------------------------


def register() -> None:
    """Defines the ops, the first time that a process asks."""

    def registered() -> torch.library.Library:
        library = torch.library.Library(NAMESPACE, "DEF")
        library.define(f"forward(str call, int count, Tensor[] tensors) -> ({', '.join(['Tensor'] * 8)})")
        library.define(
            "backward(str call, int count, str[] wanted, Tensor[] tensors, Tensor[] results, Tensor?[] grads)"
            " -> Tensor[]"
        )
        library.impl("forward", _run_forward, "CompositeExplicitAutograd")
        library.impl("backward", _run_backward, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::forward", _fake_forward, lib=library)
        torch.library.register_fake(f"{NAMESPACE}::backward", _fake_backward, lib=library)
        torch.library.register_autograd(f"{NAMESPACE}::forward", _backward, setup_context=_setup, lib=library)
        return library

    libraries.registered_once(NAMESPACE, registered)
    after_import("torch._dynamo", _close)

"""Calls of the ops of layers with options, and what tests of their kernels ask of each."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from rnnfast.variants import ops as variant_ops
from rnnfast.variants.reference import Arguments, Masks, Weights
from test_variants_refusals import arguments, changed
from variant_layers import SEED, R, run

LSTM, GRU = 4, 3


def by_reference(compute: Callable[[], Any]) -> Any:
    with rnnfast.backend("reference"):
        return compute()


def arguments_of_backward(layer: Any, x: Tensor) -> list[list[Any]]:
    """Of each `variant_backward` that runs, by whatever backend, all of them."""
    kept: list[list[Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "variant_backward" in str(func):
                # The dispatcher leaves out those at the end that are None.
                kept.append([*args, *[None] * (len(func._schema.arguments) - len(args))])
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(layer, x)
    return kept


def random_call(rng: random.Random, mode: str, size: int, batch: int, steps: int, **given: Any) -> Arguments:
    """All that goes together of a cell's options, in one call."""
    count = {"LSTM": LSTM, "GRU": GRU}.get(mode, 1)
    is_lstm, width = mode == "LSTM", count * size
    weights: dict[str, Tensor] = {"weight_norm_hh": 1 + R(width) / 4}
    if mode == "GRU":
        weights["bias_hn"] = R(size)
    if is_lstm:
        weights |= {"weight_norm_c": 1 + R(size) / 4, "bias_norm_c": R(size), "weight_peephole": R(3 * size) / 4}
    masks = {"recurrent": (R(batch, size) > 0) * 2.0, "zoneout_h": R(steps, batch, size) > 1}
    masks = {name: mask if mask.dtype == torch.bool else mask.double() for name, mask in masks.items()}
    base = arguments(mode)
    call = base._replace(
        words=rng.choice(["", "carried"]) if is_lstm else "rms", zoneout_c=0.2 * is_lstm, reverse=rng.random() < 0.5,
        gates=R(steps, batch, width), hx=R(batch, size), cx=R(batch, size) if is_lstm else None,
        weights=Weights(R(width, size) / size**0.5, **weights), masks=Masks(**masks),
    )  # fmt: skip
    return changed(call, given)


def leaves_of(call: Arguments) -> list[Tensor]:
    return [tensor for tensor in (call.gates, call.hx, call.cx, *call.weights) if tensor is not None]


def with_gradients(call: Arguments, rounded: torch.dtype | None = None) -> list[Tensor]:
    """Results and gradients, for the same cotangents in every type. rounded: to which type these are, by default the
    call's."""
    for leaf in leaves_of(call):
        leaf.requires_grad_()
    results = [result for result in variant_ops.recurrence(call) if result.numel()]
    torch.manual_seed(SEED)
    grads = [torch.randn(result.shape, dtype=torch.float64) / result.numel() ** 0.5 for result in results]
    grads = [grad.to(rounded or result.dtype).to(result.dtype) for grad, result in zip(grads, results, strict=True)]
    found = torch.autograd.grad(results, leaves_of(call), grads, allow_unused=True, materialize_grads=True)
    return [*(each.detach() for each in results), *found]


def cast(call: Arguments, dtype: torch.dtype) -> Arguments:
    def to(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype)
        # of Weights and Masks
        return type(value)(*map(to, value)) if isinstance(value, tuple) else value

    return Arguments(*map(to, call))


def check_that_masked_zoneout_is_a_choice(mode: str) -> None:
    """What is infinite goes the way that was chosen and leaves nothing on the other, where 0 times it is no number."""
    call = random_call(random.Random(9), mode, 4, 2, 1)
    call = changed(call, {"weights": Weights(call.weights.weight_hh), "words": "", "masks": {"recurrent": None}})
    call = call._replace(masks=call.masks._replace(zoneout_h=torch.tensor([[[True, False] * 2] * 2])))
    hx = call.hx
    assert hx is not None
    gates = call.gates.clone().requires_grad_()
    output = variant_ops.recurrence(call._replace(gates=gates, hx=hx.requires_grad_()))[0]
    grads = torch.autograd.grad(output, [gates, hx], torch.full_like(output, torch.inf))
    last_gate, of_hx = grads[0][..., -4:], grads[1]
    assert torch.equal(last_gate[..., 0::2], torch.zeros(1, 2, 2, dtype=last_gate.dtype))
    assert not last_gate[..., 1::2].isfinite().any()
    assert not of_hx[:, 0::2].isfinite().any()

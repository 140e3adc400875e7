"""Layers with options under torch.compile, torch.export, torch.jit.trace and torch.func: the same results."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.func import functional_call, grad, jacrev, jvp, vmap

from module_cases import leaves
from variant_layers import (
    DRAWING,
    EXACT,
    LAYERS,
    LENGTHS,
    SEED,
    B,
    I,
    R,
    T,
    call,
    every_layer,
    loss_of,
    made,
    run,
    same,
)

# --- tracing and transforms ---------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("_fresh_dynamo")
@pytest.mark.parametrize("name", ["LSTM separate", "GRU reset before", "LSTM zoneout"])
def test_compiles_whole(name: str) -> None:
    """In training too; there zoneout draws in another way than uncompiled, but the same for the same seed."""
    layer, x, lengths = made(name, bidirectional=True), R(T, B, I), torch.tensor(LENGTHS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    in_training = run(compiled, x, lengths=lengths)
    same(run(compiled, x, lengths=lengths), in_training)
    layer.train("zoneout" not in LAYERS[name][1])
    expected = run(layer, x, lengths=lengths)
    same(run(compiled, x, lengths=lengths), expected, **EXACT)
    assert layer.training or not torch.allclose(in_training[0], expected[0])


@pytest.mark.parametrize(("name", "strict"), [("LSTM peephole", False), ("GRU joint", True)], ids=["LSTM", "GRU"])
def test_export(name: str, strict: bool) -> None:
    layer = made(name, num_layers=2).eval()
    sizes = {"input": {0: torch.export.Dim("steps", min=2, max=64), 1: torch.export.Dim("batch", min=2, max=64)}}
    program = torch.export.export(layer, (R(T, B, I),), dynamic_shapes=sizes, strict=strict)
    for x in (R(T, B, I), R(T + 4, B + 2, I)):
        same(leaves(program.module()(x)), call(layer, x), **EXACT)


@pytest.mark.parametrize("name", ["LSTM separate", "GRU reset before", "LSTM plain loop"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_jit_trace(name: str) -> None:
    layer = made(name).eval()
    traced, x = torch.jit.trace(layer, (R(T, B, I),)), R(T + 3, B + 2, I)
    same(leaves(traced(x)), call(layer, x))


@pytest.mark.parametrize("name", ["LSTM zoneout", "LSTM dropouts", "GRU reset before"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_what_is_traced_in_training_goes_on_drawing(name: str) -> None:
    traced, x, found = torch.jit.trace(made(name), (R(T, B, I),), check_trace=False), R(T, B, I), []
    for seed in (SEED, SEED, SEED + 1):
        torch.manual_seed(seed)
        found.append(traced(x)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[1], found[2])


@every_layer
def test_vmap_and_gradients_of_single_samples(name: str) -> None:
    layer, x = made(name).eval(), R(T, B, I)
    same(vmap(lambda row: layer(row)[0], in_dims=1, out_dims=1)(x), call(layer, x)[0], **EXACT)
    weights = {key: parameter.detach() for key, parameter in layer.named_parameters()}
    loss = lambda weights, row: loss_of(leaves(functional_call(layer, weights, (row,))))  # noqa: E731
    every = vmap(grad(loss), in_dims=(None, 1))(weights, x)
    for n in range(B):
        own = torch.autograd.grad(loss_of(call(layer, x[:, n])), list(layer.parameters()))
        same([gradient[n] for gradient in every.values()], own, **EXACT)


@pytest.mark.parametrize("name", DRAWING)
@pytest.mark.parametrize("randomness", ["same", "different"])
def test_vmap_draws_as_it_is_told(name: str, randomness: str) -> None:
    layer, x = made(name), R(T, 1, I).expand(T, 20, I)
    output = vmap(lambda row: layer(row)[0], in_dims=1, out_dims=1, randomness=randomness)(x)
    assert torch.allclose(output, output[:, :1].expand_as(output)) == (randomness == "same")


@pytest.mark.parametrize("name", ["LSTM joint rms", "LSTM peephole", "GRU separate", "GRU reset before"])
def test_jacobians_and_forward_mode(name: str) -> None:
    """jacrev gives what the kernels' backward passes do row by row, and jvp is their transposed."""
    layer, x = made(name, bidirectional=True).eval(), R(3, 2, I)
    leaf = x.clone().requires_grad_()
    output = layer(leaf)[0]
    rows = [torch.autograd.grad(value, leaf, retain_graph=True)[0] for value in output.flatten()]
    expected, direction = torch.stack(rows).view(*output.shape, *x.shape), R(*x.shape)
    same(jacrev(lambda x: layer(x)[0])(x), expected, **EXACT)
    primal, tangent = jvp(lambda x: layer(x)[0], (x,), (direction,))
    same([primal, tangent], [output.detach(), torch.tensordot(expected, direction, 3)], **EXACT)

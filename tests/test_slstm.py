"""SLSTM is the sLSTM of its paper, whose loop stands here with its stabiliser; ours has none, and states in a form of
their own that stand for the same."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import rnnfast

T, B, I = 7, 4, 3  # noqa: E741
DOUBLE = {"dtype": torch.float64}


def loop(module: Any, x: Tensor, states: Any = None, resets: Tensor | None = None) -> tuple[Tensor, ...]:
    """One layer, one direction, as published: output, h, c, n, m."""
    hidden_size, heads = module.hidden_size, module.weight_hh_l0.shape[1]
    # (4H, H) with the heads' blocks on its diagonal.
    of_unit = torch.arange(hidden_size) // heads
    beside = of_unit.repeat(4).unsqueeze(1) != of_unit
    dense = module.weight_hh_l0.repeat(1, hidden_size // heads).masked_fill(beside, 0)
    h, c, n, m = states or [x.new_zeros(x.shape[1], hidden_size) for _ in range(4)]
    outputs = []
    for t in range(x.shape[0]):
        if resets is not None:
            h, c, n, m = (torch.where(resets[t].unsqueeze(1), 0, state) for state in (h, c, n, m))
        gates = F.linear(x[t], module.weight_ih_l0, module.bias_ih_l0) + F.linear(h, dense, module.bias_hh_l0)
        i, f, z, o = gates.chunk(4, -1)
        new_m = torch.where(n == 0, i, torch.maximum(F.logsigmoid(f) + m, i))
        kept = torch.where(n == 0, 0, torch.exp(F.logsigmoid(f) + m - new_m))
        taken = torch.exp(i - new_m)
        c, n, m = kept * c + taken * z.tanh(), kept * n + taken, new_m
        h = o.sigmoid() * c / n
        outputs.append(h)
    return torch.stack(outputs), h, c, n, m


def wide(module: Any) -> Any:
    """Gates far from 0, so that the stabiliser has something to do."""
    for parameter in module.parameters():
        torch.nn.init.uniform_(parameter, -2, 2)
    return module


def unstabilised(c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """What c, n and m stand for: c / n, and the log of n."""
    return c / n, n.log() + m


@pytest.mark.parametrize("given", ["no states", "states", "resets"])
@pytest.mark.parametrize(("hidden_size", "heads"), [(5, 1), (32, 1), (12, 3), (36, 2)])
def test_it_is_the_published_one(hidden_size: int, heads: int, given: str) -> None:
    module = wide(rnnfast.SLSTM(I, hidden_size, num_heads=heads, **DOUBLE))
    x = torch.randn(T, B, I, **DOUBLE, requires_grad=True)
    states = [torch.rand(1, B, hidden_size, **DOUBLE).add_(0.1).requires_grad_() for _ in range(4)]
    hx = tuple(states) if given == "states" else None
    resets = torch.rand(T, B) < 0.3 if given == "resets" else None
    output, (h, c, n, m) = module(x, hx, resets=resets)
    expected, *final = loop(module, x, [state[0] for state in states] if hx else None, resets)
    found = (output, h[0], *unstabilised(c[0], n[0], m[0]))
    wanted = (expected, final[0], *unstabilised(*final[1:]))
    leaves = [x, *module.parameters(), *(states if hx else [])]
    weights = [torch.randn_like(value) for value in wanted]
    for actual, right in zip(found, wanted, strict=True):
        assert_close(actual, right, rtol=1e-10, atol=1e-10)
    gradients = [
        torch.autograd.grad(sum((value * w).sum() for value, w in zip(values, weights, strict=True)), leaves)
        for values in (found, wanted)
    ]
    for actual, right in zip(*gradients, strict=True):
        assert_close(actual, right, rtol=1e-9, atol=1e-9)


def test_directions_layers_and_lengths() -> None:
    """Each row by itself, both ways, is what the padded batch gives; and packed rows are the same."""
    module = wide(rnnfast.SLSTM(I, 6, num_layers=2, bidirectional=True, num_heads=2, **DOUBLE))
    x, lengths = torch.randn(T, B, I, **DOUBLE), [T, 2, 5, 1]
    output, states = module(x, lengths=lengths)
    packed, packed_states = module(pack_padded_sequence(x, lengths, enforce_sorted=False))
    assert_close(pad_packed_sequence(packed)[0], output)
    for state, same in zip(states, packed_states, strict=True):
        assert_close(state, same)
    for row, length in enumerate(lengths):
        alone, final = module(x[:length, row])
        assert_close(output[:length, row], alone)
        assert not output[length:, row].any()
        for state, right in zip(states, final, strict=True):
            assert_close(state[:, row], right)


def test_a_row_without_steps_hands_its_state_on() -> None:
    module = rnnfast.SLSTM(I, 5, **DOUBLE)
    states = tuple(torch.rand(1, 2, 5, **DOUBLE) + 0.1 for _ in range(4))
    _, (h, c, n, m) = module(torch.randn(T, 2, I, **DOUBLE), states, lengths=[0, T])
    assert_close(h[0, 0], states[0][0, 0])
    for actual, right in zip(
        unstabilised(c[0, 0], n[0, 0], m[0, 0]), unstabilised(*(s[0, 0] for s in states[1:])), strict=True
    ):
        assert_close(actual, right)
    _, (_, c, n, m) = module(torch.randn(T, 2, I, **DOUBLE), lengths=[0, T])
    assert not c[0, 0].any()
    assert not n[0, 0].any()
    assert not m[0, 0].any()


def test_a_stream_in_pieces_is_the_stream() -> None:
    module = wide(rnnfast.SLSTM(I, 8, num_layers=2, **DOUBLE))
    x = torch.randn(T, B, I, **DOUBLE)
    first, states = module(x[:3])
    assert_close(torch.cat([first, module(x[3:], states)[0]]), module(x)[0])


@pytest.mark.parametrize("lengths", [None, [3, 0]], ids=["full", "lengths"])
def test_first_and_second_derivatives(lengths: Any) -> None:
    module = rnnfast.SLSTM(2, 3, bidirectional=True, layer_norm="separate", **DOUBLE)
    tensors = [torch.randn(3, 2, 2, **DOUBLE), *(torch.rand(2, 2, 3, **DOUBLE) + 0.1 for _ in range(4))]

    def run(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        output, (h, c, _, m) = module(x, states, lengths=lengths)
        return output, h, c, m

    wanted = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(run, wanted, fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, wanted, fast_mode=True)


def test_without_states_second_derivatives_are_numbers() -> None:
    module, x = rnnfast.SLSTM(2, 3, **DOUBLE), torch.randn(3, 2, 2, **DOUBLE, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], (x,), fast_mode=True)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 5e-7), (torch.bfloat16, 0.012), (torch.float16, 1.5e-3)])
def test_other_types(dtype: torch.dtype, most: float) -> None:
    module = rnnfast.SLSTM(I, 20, num_heads=2, **DOUBLE)
    x = torch.randn(T, B, I, **DOUBLE)
    right = module(x)[0]
    assert (copy.deepcopy(module).to(dtype)(x.to(dtype))[0].double() - right).abs().max() < most * right.abs().max()


def test_large_gates_stay_finite() -> None:
    module = rnnfast.SLSTM(I, 5)
    with torch.no_grad():
        module.bias_ih_l0[:5] = 1000.0
    x = torch.randn(T, B, I, requires_grad=True)
    output, states = module(x)
    output.sum().backward()
    assert all(value.isfinite().all() for value in (output, *states, x.grad))


def test_it_pickles_and_compiles() -> None:
    module = pickle.loads(pickle.dumps(rnnfast.SLSTM(I, 6, num_heads=2, recurrent_dropout=0.1).eval()))
    x = torch.randn(T, B, I)
    compiled = torch.compile(module, fullgraph=True)
    assert_close(compiled(x)[0], module(x)[0])
    assert "num_heads=2" in repr(module)
    assert "gate_activation" not in repr(module)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"peephole": True}, TypeError, "SLSTM: peephole: not an option of the sLSTM"),
        ({"reset_after": False}, TypeError, "SLSTM: reset_after: not an option of the sLSTM"),
        ({"gate_activation": "sigmoid"}, TypeError, "SLSTM: gate_activation: not an option of the sLSTM"),
        ({"num_heads": 4}, ValueError, "SLSTM: num_heads: expected a divisor of hidden_size=6, got 4"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_it_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error) as raised:
        rnnfast.SLSTM(I, 6, **options)
    assert message in str(raised.value)


def test_states_that_do_not_fit() -> None:
    module, x = rnnfast.SLSTM(I, 6), torch.randn(T, B, I)
    state = torch.zeros(1, B, 6)
    with pytest.raises(RuntimeError, match="expected four states, h, c, n and m, got 2"):
        module(x, (state, state))
    with pytest.raises(RuntimeError, match="four states of one shape"):
        module(x, (state, state, state, state[:, :1]))
    with pytest.raises(RuntimeError, match=r"Expected hidden\[0\] size \(1, 4, 6\)"):
        module(x, (state[:, :1],) * 4)

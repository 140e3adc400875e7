"""Layers with options at their edges: each test holds a fault that there was once."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.rnn import pack_padded_sequence
from torch.testing import assert_close

import rnnfast
from option_calls import check_that_masked_zoneout_is_a_choice
from rnnfast.variants.draws import chosen, dropped_weights

DRAWS: list[dict[str, Any]] = [
    {"zoneout": 0.5}, {"zoneout": 1.0}, {"weight_dropout": 0.5}, {"recurrent_dropout": 0.5, "input_dropout": 0.5},
]  # fmt: skip


@pytest.mark.parametrize("options", DRAWS, ids=str)
def test_another_default_device_changes_nothing(options: dict[str, Any]) -> None:
    """Masks belong where the data are: on another device the op's shapes once passed for its results."""
    module = rnnfast.LSTM(4, 8, layer_norm="joint", **options)
    x = torch.randn(5, 3, 4, requires_grad=True)
    packed = pack_padded_sequence(x, [5, 3, 2])
    for given in (x, packed):
        results = []
        for device in ("cpu", "meta"):
            torch.manual_seed(1)
            with torch.device(device):
                output = module(given)[0]
                output = output if isinstance(output, torch.Tensor) else output.data
                results += [output, torch.autograd.grad(output.sum(), x, retain_graph=True)[0]]
        assert_close(results[2:], results[:2])


def test_the_op_refuses_tensors_of_two_devices() -> None:
    """What torch calls for a tensor on the meta device must not pass for the kernels' results."""
    settings = "GRU", "", 1e-5, 0.0, 0.0, False, 1
    gates, weight_hh = torch.randn(5, 3, 24), torch.empty(24, 8, device="meta")
    with pytest.raises(RuntimeError, match="expected all tensors on cpu, got one on meta"):
        torch.ops.rnnfast.variant_forward(False, *settings, gates, *[None] * 6, False, weight_hh, *[None] * 11)
    rows, sizes, weight_hh = torch.randn(5, 24), torch.tensor([3, 2], device="meta"), torch.randn(24, 8)
    with pytest.raises(RuntimeError, match="batch_sizes: expected a tensor on the CPU, got one on meta"):
        torch.ops.rnnfast.variant_forward(
            False, *settings, rows, None, None, None, sizes, None, None, False, weight_hh, *[None] * 11
        )


@pytest.mark.parametrize("bound", [-2.5, 2.5])
def test_the_corners_of_the_hard_sigmoid_have_no_slope(bound: float) -> None:
    """In the kernels and in plain PyTorch, which second derivatives go through."""
    module = rnnfast.GRU(1, 1, gate_activation="hard_sigmoid", dtype=torch.float64)
    for parameter in module.parameters():
        nn.init.constant_(parameter, 0.3)
    with torch.no_grad():
        module.weight_ih_l0[1], module.weight_hh_l0[1], module.bias_hh_l0[1] = 0, 0, 0
        module.bias_ih_l0[1] = bound
    x = torch.ones(2, 1, 1, dtype=torch.float64)
    grads = [
        torch.autograd.grad(module(x)[0].sum(), module.bias_ih_l0, create_graph=create_graph)[0]
        for create_graph in (False, True)
    ]
    assert_close(grads[0], grads[1])
    assert grads[0][1] == 0


def test_what_overflows_in_a_norm_is_no_number() -> None:
    module = rnnfast.LSTM(4, 8, layer_norm="joint")
    with torch.no_grad():
        module.weight_ih_l0.mul_(1e25)
    assert module(torch.randn(2, 3, 4))[0].isnan().all()


@pytest.mark.parametrize("options", [{"layer_norm": "joint"}, {"zoneout": 0.5}, {"weight_dropout": 0.5}], ids=str)
def test_a_trace_is_the_layer(options: dict[str, Any]) -> None:
    module, x = rnnfast.LSTM(4, 6, **options), torch.randn(5, 3, 4)
    torch.jit.trace(module, (x,), check_trace=False)
    module.eval()
    traced = torch.jit.trace(module, (x,))
    assert_close(traced(x)[0], module(x)[0])


def test_a_preset_brings_no_option_that_a_cell_refuses() -> None:
    with pytest.raises(TypeError, match="GRUCell: preset: 'light_gru' has batch_norm"):
        rnnfast.GRUCell(4, 8, preset="light_gru")


@pytest.mark.parametrize("make", [rnnfast.LSTM, rnnfast.LSTMCell])
def test_forget_bias_reaches_the_gate_behind_a_joint_norm(make: Callable[..., nn.Module]) -> None:
    module = make(4, 8, layer_norm="joint", bias=False, forget_bias=3.0)
    (bias,) = (parameter for name, parameter in module.named_parameters() if name.startswith("bias_norm"))
    assert bias.tolist() == [0.0] * 8 + [3.0] * 8 + [0.0] * 16
    with pytest.raises(ValueError, match="forget_bias: expected None with a joint norm that has no bias"):
        make(4, 8, layer_norm="joint", norm="rms", forget_bias=3.0)


def test_chrono_behind_a_joint_norm() -> None:
    module = rnnfast.init.chrono_(rnnfast.LSTM(4, 8, layer_norm="joint"), 50)
    i, f, *others = module.bias_norm_l0.chunk(4)
    assert_close(i, -f)
    assert f.min() >= 0
    assert f.max() > 0
    assert not any(part.any() for part in others)


def test_initialisations_refuse_what_is_computed() -> None:
    module = weight_norm(rnnfast.LSTM(4, 8), "weight_hh_l0")
    with pytest.raises(ValueError, match="weight_hh_l0: expected a parameter"):
        rnnfast.init.orthogonal_(module)
    with pytest.raises(ValueError, match="expected gates that are sigmoids, got an SLSTM"):
        rnnfast.init.chrono_(rnnfast.SLSTM(4, 8), 50)


@pytest.mark.parametrize("p", [1e-6, 0.3, 1 - 1e-5])
def test_dropped_weights_keep_their_mean(p: float) -> None:
    torch.manual_seed(0)
    weight = torch.ones(1000, 1000, dtype=torch.float64)
    deviation = (max(p, 2**-16) / (1 - p)) ** 0.5 / 1000
    assert abs(dropped_weights(weight, p).mean().item() - 1) < 5 * deviation


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_mask_has_its_share_everywhere(p: float) -> None:
    """All four parts of a drawn number alike, and none tied to the next."""
    torch.manual_seed(0)
    mask = chosen((400_000,), p, torch.empty(0)).double().view(-1, 4)
    assert (mask.mean(0) - p).abs().max() < 5 * (p * (1 - p) / 100_000) ** 0.5
    assert (torch.corrcoef(mask.t()) - torch.eye(4)).abs().max() < 5 / 100_000**0.5
    assert chosen((7, 3), p, torch.empty(0)).shape == (7, 3)


def test_options_alone_leave_the_initial_values() -> None:
    """From the same seed: those of torch.nn."""
    made = []
    for options in ({}, {"zoneout": 0.1}, {"layer_norm": "joint", "cell_norm": "carried"}):
        torch.manual_seed(3)
        made.append(rnnfast.LSTM(4, 8, 2, bidirectional=True, **options))
    for module in made[1:]:
        for name, parameter in made[0].named_parameters():
            assert torch.equal(dict(module.named_parameters())[name], parameter)


def test_dropout_between_layers_draws_torchs_masks() -> None:
    for batch_first in (False, True):
        outputs = []
        for make in (nn.LSTM, rnnfast.LSTM):
            torch.manual_seed(0)
            options = {} if make is nn.LSTM else {"forget_bias": 1.0}
            module = make(4, 6, 2, dropout=0.5, batch_first=batch_first, **options)
            for parameter in module.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
            outputs.append(module(torch.randn(5, 3, 4))[0])
        assert_close(outputs[1], outputs[0])


def test_constructors_say_what_they_take() -> None:
    parameters = inspect.signature(rnnfast.LSTMCell).parameters
    assert list(parameters)[:5] == ["input_size", "hidden_size", "bias", "device", "dtype"]
    assert parameters["peephole"].default is False
    assert "recurrent_dropout" not in parameters


def test_numbers_of_numpy() -> None:
    module = rnnfast.LSTM(4, 8, num_heads=np.int64(2), zoneout=np.float32(0.25))
    assert (module._options.num_heads, module._options.zoneout) == (2, (0.25, 0.25))
    with pytest.raises(ValueError, match="forget_bias: expected a finite number"):
        rnnfast.LSTM(4, 8, forget_bias=10**400)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_zoneout_by_a_mask_is_a_choice(name: str, mode: str) -> None:
    with rnnfast.backend(name):
        check_that_masked_zoneout_is_a_choice(mode)

"""`quantize_weights` where something goes wrong: nothing is lost, and what cannot be packed is left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import quantization, quantized_modules


@pytest.mark.parametrize("failing", [1, 3])
def test_an_error_while_packing_leaves_the_module_as_it_was(monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    module, x, calls = torch.nn.LSTM(4, 5, 2), torch.randn(3, 2, 4), 0
    before, expected = dict(module.named_parameters()), module(x)[0]

    def pack(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == failing:
            raise MemoryError
        return quantization.pack(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(quantized_modules, "pack", pack)
        with pytest.raises(MemoryError):
            rnnfast.quantize_weights(module, "int8")
    assert type(module) is torch.nn.LSTM
    assert all(value is before[name] for name, value in module.named_parameters())
    assert torch.equal(module(x)[0], expected)
    assert list(rnnfast.quantize_weights(module, "int8").swapped) == [""]


def unknown_cell() -> torch.nn.Module:
    return torch.nn.RNNCell(4, 5, nonlinearity="foo")


def unknown_layer() -> torch.nn.Module:
    layer = rnnfast.RNN(4, 5)
    layer.mode = "foo"
    return layer


def other_layer() -> torch.nn.Module:
    layer = rnnfast.RNN(4, 5)
    layer.mode = "LSTM"
    return layer


def sparse_cell() -> torch.nn.Module:
    cell = rnnfast.GRUCell(4, 5)
    cell.weight_hh = torch.nn.Parameter(cell.weight_hh.detach().to_sparse())
    return cell


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (unknown_cell, "its mode or nonlinearity is unknown"),
        (unknown_layer, "its mode or nonlinearity is unknown"),
        (other_layer, "its attributes do not fit its weights"),
        (sparse_cell, "weight_hh is torch.sparse_coo"),
    ],
)
def test_what_cannot_be_packed_is_left_as_it_was(make: Callable[[], torch.nn.Module], reason: str) -> None:
    module = make()
    before = type(module), list(module.named_parameters())
    report = rnnfast.quantize_weights(module, "int8")
    assert report.left == {"": reason}
    assert (type(module), list(module.named_parameters())) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("keep_vars", [False, True])
def test_floating_weights_are_assigned(dtype: torch.dtype, keep_vars: bool) -> None:
    source = rnnfast.LSTM(4, 5).to(dtype)
    module, twin, x = rnnfast.LSTM(4, 5), rnnfast.LSTM(4, 5), torch.randn(3, 2, 4)
    rnnfast.quantize_weights(module, "int8")
    module.load_state_dict(source.state_dict(keep_vars=keep_vars), assign=True)
    twin.load_state_dict(source.float().state_dict())
    rnnfast.quantize_weights(twin, "int8")
    assert torch.equal(module(x)[0], twin(x)[0])
    assert not list(module.parameters())


def test_weights_on_the_meta_device_are_refused_by_name() -> None:
    module = rnnfast.LSTM(4, 5)
    rnnfast.quantize_weights(module, "int8")
    with pytest.raises(RuntimeError, match="weight_ih_l0"):
        module.load_state_dict(rnnfast.LSTM(4, 5, device="meta").state_dict())


def test_in_inference_mode_buffers_are_ordinary_tensors() -> None:
    module = rnnfast.GRU(16, 16, bias=False)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.inference_mode():
        rnnfast.quantize_weights(module, "float32")
    assert not any(value.is_inference() for value in module.buffers())
    module.load_state_dict(state)


def test_what_was_packed_does_not_change_with_the_parameter() -> None:
    """Of one column and 16 rows, which lie in a panel as they did before."""
    module, x = rnnfast.RNN(1, 16, bias=False), torch.randn(3, 2, 1)
    parameter = module.weight_ih_l0
    rnnfast.quantize_weights(module, "float32")
    before = module(x)[0]
    with torch.no_grad():
        parameter.zero_()
    assert torch.equal(module(x)[0], before)


def test_what_takes_no_part_in_a_derivative_is_computed() -> None:
    module, x = rnnfast.LSTM(4, 5), torch.randn(3, 2, 4)
    rnnfast.quantize_weights(module, "bf16")

    def loss(w: Tensor) -> Tensor:
        with torch.no_grad():
            features = module(x)[0]
        return (features @ w).square().sum()

    features = module(x)[0].detach().flatten(0, 1)
    found = torch.func.hessian(loss)(torch.randn(5))
    torch.testing.assert_close(found, 2 * features.t() @ features)


def test_the_report_counts_the_weights_alone() -> None:
    module = rnnfast.LSTM(4, 5)
    module.register_buffer("big", torch.zeros(10**6))
    assert "4.0 MB" not in rnnfast.quantize_weights(module, "int8").swapped[""]


def test_keys_of_a_state_dict_are_attributes() -> None:
    module = rnnfast.LSTM(4, 5)
    rnnfast.quantize_weights(module, "int8")
    for name, value in module.state_dict().items():
        assert torch.equal(getattr(module, name), value)

"""How exact the kernels' sigmoid and tanh are, in units in the last place of the true value."""

import pytest
import torch

from cases import selected

ULPS = 2.5


def in_ulps(actual, expected):
    rounded = expected.to(actual.dtype).abs()
    ulp = torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded
    return ((actual.double() - expected).abs() / ulp.double()).max().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigmoid_and_tanh(backend, dtype):
    """Through the recurrence with weights of zero: tanh is the RNN's output, sigmoid the LSTM's input gate."""
    x = torch.cat([torch.linspace(-12, 12, 20000), 1e-3 * torch.randn(10000), torch.randn(10000)]).to(dtype)
    nothing = [None] * 5

    def run(mode, gates):
        weight_hh = torch.zeros(gates, 1, dtype=dtype)
        weight_ih = torch.ones(gates, 1, dtype=dtype)
        return selected.layer_forward(mode, x.view(1, -1, 1), *nothing, False, weight_ih, None, weight_hh)

    assert in_ulps(run("RNN_TANH", 1)[0].flatten(), x.double().tanh()) <= ULPS
    assert in_ulps(run("LSTM", 4)[4].view(-1, 4)[:, 0], x.double().sigmoid()) <= ULPS

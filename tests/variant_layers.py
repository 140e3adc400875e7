"""The layers with options that tests of what users expect go over, and how they are called and compared."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import rnnfast
from module_cases import leaves

SEED = 77
T, B, I, H = 5, 3, 4, 6  # noqa: E741
DOUBLE = {"dtype": torch.float64}
# Of one float64 computation from another.
EXACT = {"rtol": 1e-10, "atol": 1e-10}
LENGTHS = [3, 5, 0]
WAYS = {"num_layers": 2, "bidirectional": True}

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM separate": ("LSTM", {"layer_norm": "separate", "cell_norm": "output"}),
    "LSTM joint rms": ("LSTM", {"layer_norm": "joint", "cell_norm": "carried", "norm": "rms"}),
    "LSTM peephole": ("LSTM", {"peephole": True, "coupled": True}),
    "LSTM hard heads": ("LSTM", {"gate_activation": "hard_sigmoid", "num_heads": 2}),
    "LSTM zoneout": ("LSTM", {"zoneout": (0.2, 0.4)}),
    "LSTM dropouts": ("LSTM", {"recurrent_dropout": 0.3, "dropout_mode": "candidate", "weight_dropout": 0.2}),
    "LSTM plain loop": ("LSTM", {"forget_bias": 1.0, "input_dropout": 0.3, "weight_dropout": 0.2}),
    "GRU separate": ("GRU", {"layer_norm": "separate", "zoneout": 0.3}),
    "GRU joint": ("GRU", {"layer_norm": "joint", "recurrent_dropout": 0.3, "dropout_mode": "candidate"}),
    "GRU reset before": ("GRU", {"reset_after": False, "recurrent_dropout": 0.3, "num_heads": 3}),
    "GRU light": ("GRU", {"reset_gate": False, "candidate_activation": "relu"}),
    "RNN joint": ("RNN", {"layer_norm": "joint", "zoneout": 0.2}),
}
CANDIDATE = {"recurrent_dropout": 0.4, "dropout_mode": "candidate"}
OF_LAYERS_ALONE = rnnfast.LSTMCell._refused.keys()
PROBABILITIES = ["zoneout", "recurrent_dropout", "input_dropout", "weight_dropout"]
DRAWING = [name for name, (_, options) in LAYERS.items() if options.keys() & set(PROBABILITIES)]
OWN_LOOP = [name for name in LAYERS if name != "LSTM plain loop"]
LSTMS = [name for name in LAYERS if name.startswith("LSTM")]
every_layer = pytest.mark.parametrize("name", LAYERS)


def R(*size: int) -> Tensor:
    return torch.randn(*size, **DOUBLE)


def randomise(module: nn.Module) -> None:
    """No parameter stays at a value that would hide what it does."""
    for name, parameter in module.named_parameters():
        nn.init.uniform_(parameter, -0.4, 0.4)
        if name.startswith("weight_norm"):
            parameter.data += 1


def made(name: str, **arguments: Any) -> Any:
    kind, options = LAYERS[name]
    module = getattr(rnnfast, kind)(I, H, **{**DOUBLE, **arguments}, **options)
    randomise(module)
    return module


def cell_of(name: str, layer: Any) -> Any:
    """The cell of the layer's parameters, in evaluation: with what a cell has of its options."""
    kind, options = LAYERS[name]
    options = {option: value for option, value in options.items() if option not in OF_LAYERS_ALONE}
    cell = getattr(rnnfast, kind + "Cell")(I, H, dtype=layer.weight_hh_l0.dtype, **options)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    return cell.eval()


def states(name: str, *size: int) -> list[Tensor]:
    return [R(*size) for _ in range(1 + name.startswith("LSTM"))]


def call(module: nn.Module, x: Any, hx: Any = None, **options: Any) -> list[Tensor]:
    """All results, with the same draws in every call. hx: a list of states."""
    torch.manual_seed(SEED)
    return leaves(module(x, None if hx is None else tuple(hx) if len(hx) == 2 else hx[0], **options))


def loss_of(results: list[Tensor]) -> Any:
    return sum(((i + 1) * result.square()).sum() for i, result in enumerate(results))


def run(module: nn.Module, x: Tensor, hx: Any = None, **options: Any) -> list[Tensor]:
    """The results of `call`, and every gradient, of the input, the states and the parameters."""
    x, *hx = [tensor.detach().clone().requires_grad_() for tensor in [x, *(hx or [])]]
    results = call(module, x, hx or None, **options)
    gradients = torch.autograd.grad(loss_of(results), [x, *hx, *module.parameters()])
    return [*(result.detach() for result in results), *gradients]


def same(some: Any, others: Any, **tolerance: float) -> None:
    """By default bit for bit."""
    for one, other in zip(leaves(some), leaves(others), strict=True):
        assert torch.equal(one, other) if not tolerance else assert_close(one, other, **tolerance) is None

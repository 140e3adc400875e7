"""Initialisations of recurrent modules, for ours and torch.nn's, layers and cells, in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .cell_types import CELLS
from .signatures import suffixes_of
from .variants.options import finite_number

__all__ = ["chrono_", "orthogonal_"]


def _suffixes(function: str, module: nn.Module) -> list[str]:
    """The endings of the names of a module's parameters, one for each layer and direction.

    Raises:
        TypeError: the module is not a recurrent layer or cell.
    """
    if isinstance(module, nn.RNNCellBase):
        return [""]
    if isinstance(module, nn.RNNBase):
        return suffixes_of(module.num_layers, bool(module.bidirectional))
    raise TypeError(
        f"rnnfast.init.{function}: module: expected an LSTM, GRU, RNN or one of their cells, "
        f"got {type(module).__name__}"
    )


def _parameter(function: str, module: nn.Module, name: str) -> Tensor:
    """Of that name.

    Raises:
        ValueError: it is computed from others, which are not to be filled so.
    """
    found = module._parameters.get(name)
    if found is None:
        raise ValueError(
            f"rnnfast.init.{function}: module: {name}: expected a parameter, got what is computed from others"
        )
    return found


@torch.no_grad()
def orthogonal_(module: nn.Module, gain: float = 1.0) -> nn.Module:
    """Makes the recurrent weights of each gate an orthogonal matrix times `gain`: with ``num_heads`` each head's.

    At first h neither grows nor shrinks by a product with them. Source: Saxe et al. 2014,
    https://arxiv.org/abs/1312.6120; of each gate by itself, as is usual with gated layers. With a projection,
    ``weight_hh`` is (G*H, P), and what is made orthogonal is each gate's (H, P).

    Args:
        module: a layer or a cell, of rnnfast or of torch.nn.
        gain: the size of the singular values.

    Returns:
        The module.

    Raises:
        TypeError: it is not a recurrent module. ValueError: its weights are parametrized.
    """
    gain = finite_number("rnnfast.init.orthogonal_", "gain", gain)
    for suffix in _suffixes("orthogonal_", module):
        weight = _parameter("orthogonal_", module, f"weight_hh{suffix}")
        columns, projected = weight.shape[1], getattr(module, "proj_size", 0) > 0
        # A block of each gate, of each head.
        size: Any = module.hidden_size if projected else columns
        for block in weight.split(size):
            nn.init.orthogonal_(block, gain)
    return module


@torch.no_grad()
def chrono_(module: nn.Module, max_steps: float) -> nn.Module:
    r"""Chrono initialisation: the gate that keeps the state gets biases with which units forget over 1 to `max_steps`.

    The keeping gate's bias is :math:`\log u` with u uniform on [1, max_steps - 1], of the LSTM the input gate's the
    negative of it; both in ``bias_ih``, zeros in their place in ``bias_hh``. Source: Tallec and Ollivier 2018,
    https://arxiv.org/abs/1804.11188. The keeping gate is f of the LSTM; coupled, f = 1 - i, it is i, whose bias is
    :math:`-\log u`; of the GRU z. Where a gate lets go, its bias is :math:`-\log u`.

    Args:
        module: a layer or a cell with gates, of rnnfast or of torch.nn, with biases.
        max_steps: the longest time that the task asks to remember, in steps; more than 2.

    Returns:
        The module.

    Raises:
        TypeError: it is not a recurrent module.
        ValueError: it has no gates that are sigmoids, no biases or parametrized ones, or max_steps is not more than 2.
    """
    if not finite_number("rnnfast.init.chrono_", "max_steps", max_steps) > 2:
        raise ValueError(f"rnnfast.init.chrono_: max_steps: expected more than 2, got {max_steps!r}")
    suffixes = _suffixes("chrono_", module)
    options: Any = getattr(module, "_options", None)
    joint = options is not None and options.layer_norm == "joint"
    if not module.bias and not joint:
        raise ValueError("rnnfast.init.chrono_: module: expected one with bias=True")
    if joint and options.norm == "rms":
        raise ValueError("rnnfast.init.chrono_: module: a joint norm takes biases off again, and norm='rms' has none")
    for suffix in suffixes:
        # Behind a joint norm it is the norm's own bias that counts.
        bias_ih = _parameter("chrono_", module, f"bias_norm{suffix}" if joint else f"bias_ih{suffix}")
        bias_hh = torch.zeros_like(bias_ih) if joint else _parameter("chrono_", module, f"bias_hh{suffix}")
        size: Any = module.hidden_size
        long = torch.empty_like(bias_ih[:size]).uniform_(1, max_steps - 1).log_()
        for gate, sign in _memory_gates(module):
            bias_ih[gate * size : (gate + 1) * size] = sign * long
            bias_hh[gate * size : (gate + 1) * size] = 0
    return module


def _memory_gates(module: nn.Module) -> tuple[tuple[int, int], ...]:
    """`CellType.memory_gates` of a module, with its options heeded."""
    options: Any = getattr(module, "_options", None)
    if options is not None and options.is_exponential:
        raise ValueError("rnnfast.init.chrono_: module: expected gates that are sigmoids, got an SLSTM")
    if options is not None and options.coupled:
        return ((0, -1),)
    mode = getattr(module, "_own_mode", None) or getattr(module, "mode", None)
    if mode is None:
        mode = "LSTM" if isinstance(module, nn.LSTMCell) else "GRU" if isinstance(module, nn.GRUCell) else None
    cell = CELLS.get(str(mode))
    if cell is None or not cell.memory_gates:
        raise ValueError("rnnfast.init.chrono_: module: expected one with gates, got an RNN")
    if options is not None and not options.reset_gate:
        return tuple((gate - 1, sign) for gate, sign in cell.memory_gates)
    return cell.memory_gates

"""The arguments of FlashRNN's function, of the LSTM, the GRU and the Elman network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..modules import GRU, LSTM, RNN
from .common import Direction, Layer, check_shape, module_of, tensor_of

_FUNCTION = "from_flashrnn"

# By function: ours, how many gates R has, and how many b.
_FUNCTIONS: dict[str, tuple[type[Layer], int, int]] = {"lstm": (LSTM, 4, 4), "gru": (GRU, 3, 4), "elman": (RNN, 1, 1)}


def from_flashrnn(
    R: Any,
    b: Any,
    weight_ih: Any,
    bias_ih: Any = None,
    *,
    function: str = "lstm",
    recurrent_shape: str = "GHDP",
    bias_shape: str = "GHD",
    batch_first: bool = True,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Layer:
    """An LSTM, GRU or RNN that computes what ``flashrnn(Wx, R, b, function=...)`` does, and the linear layer before it.

    FlashRNN's layouts: Wx (N, T, G, heads, D), R (G, heads, D, P), b (G, heads, D), with D = P = H / heads: unit d of a
    head has the weights R[g, head, d, :] with the units of its own head. The LSTM's gates stand as i, f, z, o, where z
    is our g. The GRU's stand as r, z, n in Wx and as n, r, z in R; its b has four: R's n, r, z, Wx's n.
    Sources: NX-AI/flashrnn, README.md, flashrnn/flashrnn/flashrnn.py (`FlashRNNConfig`, `rnn_function_registry`), and
    flashrnn/flashrnn/vanilla/{__init__,lstm,gru,elman}.py.

    FlashRNN takes Wx ready; ours makes it of x, so the weights of the linear layer that did are needed.

    Args:
        R: the recurrent matrices.
        b: the biases.
        weight_ih: (G*H, I) of the linear layer, whose output, seen as (G, heads, D), is Wx.
        bias_ih: (G*H,) of the linear layer, None: it has none.
        function: ``"lstm"``, ``"gru"`` or ``"elman"``, whose nonlinearity is tanh.
        recurrent_shape, bias_shape: the order of the dimensions of R and b, as in FlashRNN's configuration: G gates, H
            heads, D units of a head, P those of the step before. ``"HPGD"`` and ``"HDGP"`` are the layouts (heads, head
            dimension, gates, head dimension) of its kernels.
        batch_first: of the layer; FlashRNN's default is (N, T, ...).
        dtype, device: of the parameters; None: those of R.

    Returns:
        rnnfast.LSTM, GRU or RNN, in evaluation mode; with several heads its `num_heads` is that of R.

    Raises:
        TypeError, ValueError: another function (of sLSTM, say), or shapes that are not those above.
    """
    if function not in _FUNCTIONS:
        raise ValueError(f"{_FUNCTION}: function: expected {', '.join(map(repr, _FUNCTIONS))}, got {function!r}")
    kind, gates, biases = _FUNCTIONS[function]
    recurrent = _arranged("R", R, recurrent_shape, "GHDP")
    check_shape(_FUNCTION, "R, as GHDP", recurrent, gates, "heads", "D", "D")
    heads, size = recurrent.shape[1:3]
    check_shape(_FUNCTION, "R, as GHDP", recurrent, gates, heads, size, size)
    bias = _arranged("b", b, bias_shape, "GHD")
    check_shape(_FUNCTION, "b, as GHD", bias, biases, heads, size)
    weight = tensor_of(_FUNCTION, "weight_ih", weight_ih)
    check_shape(_FUNCTION, "weight_ih", weight, gates * heads * size, "I")
    of_gates = list(bias.flatten(1))
    if function == "gru":
        recurrent = recurrent[[1, 2, 0]]
        beside_state = torch.cat([torch.zeros_like(of_gates[0]), torch.zeros_like(of_gates[0]), of_gates[0]])
        of_gates = of_gates[1:]
    else:
        beside_state = torch.zeros_like(bias.flatten())
    beside_input = torch.cat(of_gates)
    if bias_ih is not None:
        given = tensor_of(_FUNCTION, "bias_ih", bias_ih)
        check_shape(_FUNCTION, "bias_ih", given, gates * heads * size)
        beside_input = beside_input + given
    direction = Direction(weight, recurrent.flatten(0, 2), beside_input, beside_state)
    return module_of(kind, [direction], dtype or recurrent.dtype, device, num_heads=heads, batch_first=batch_first)


def _arranged(argument: str, value: Any, given: str, wanted: str) -> Tensor:
    """With the dimensions in the order `wanted`, from the order `given`."""
    if sorted(given) != sorted(wanted):
        name = "recurrent_shape" if argument == "R" else "bias_shape"
        raise ValueError(f"{_FUNCTION}: {name}: expected the letters of {wanted!r} in any order, got {given!r}")
    tensor = tensor_of(_FUNCTION, argument, value)
    check_shape(_FUNCTION, argument, tensor, *given)
    return tensor.permute([given.index(letter) for letter in wanted])

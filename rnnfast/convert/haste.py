"""haste_pytorch's LSTM, GRU, LayerNormLSTM and LayerNormGRU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..modules import GRU, LSTM
from .common import Direction, Layer, check_shape, in_order, module_of, tensor_of

_FUNCTION = "from_haste"

# What a layer has, by what it is.
_KEYS = {
    "LSTM": {"kernel", "recurrent_kernel", "bias"},
    "GRU": {"kernel", "recurrent_kernel", "bias", "recurrent_bias"},
    "LayerNormLSTM": {"kernel", "recurrent_kernel", "bias", "gamma", "gamma_h", "beta_h"},
    "LayerNormGRU": {"kernel", "recurrent_kernel", "bias", "recurrent_bias", "gamma"},
}


def from_haste(
    source: Any,
    *,
    prefix: str = "",
    zoneout: float | None = None,
    dropout: float | None = None,
    batch_first: bool | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> Layer:
    """An LSTM or GRU with the weights of a layer of haste_pytorch 0.3 or later, or of its state dict.

    Haste's layouts: kernel (I, G*H), recurrent_kernel (H, G*H), bias (G*H,), with gates in the order i, g, f, o (LSTM)
    and z, r, h (GRU); of the GRU recurrent_bias (3*H,); with layer norm gamma (2, G*H), the gains of W x and of R h; of
    the LayerNormLSTM gamma_h and beta_h (H,), of the norm of c under the tanh. A layer norm is our
    ``layer_norm="separate"``, and the LSTM's also our ``cell_norm="output"``. Sources: lmnt-com/haste,
    frameworks/pytorch/{lstm,gru,layer_norm_lstm,layer_norm_gru}.py (the `...Script` functions and "Variables"), and
    lib/layer_norm_forward_gpu.cu.cc for the epsilon, 1e-5 as in our default.

    Args:
        source: the layer, or a state dict.
        prefix: of the layer's keys in the state dict, with its last dot.
        zoneout: probability that a unit keeps its h, our ``zoneout=(zoneout, 0)``. None: the layer's, 0 with a state
            dict.
        dropout: probability for an element of the recurrent matrix, our `weight_dropout`. None: the layer's, or 0.
        batch_first: None: the layer's, or False.
        dtype, device: of the parameters; None: those of the kernel.

    Returns:
        rnnfast.LSTM or GRU, in evaluation mode.

    Raises:
        TypeError, ValueError: `source` is neither, its keys are not those of one of the four layers (of IndRNN, say),
            or its tensors are not of the shapes above.
    """
    attributes: Any = None
    if not isinstance(source, Mapping):
        if not hasattr(source, "state_dict"):
            raise TypeError(f"{_FUNCTION}: source: expected a module or a state dict, got {type(source).__name__}")
        attributes, source = source, source.state_dict()
    found = {key.removeprefix(prefix): value for key, value in source.items() if key.startswith(prefix)}
    name = next((name for name, keys in _KEYS.items() if keys == found.keys()), None)
    if name is None:
        wanted = "; ".join(f"{name}: {', '.join(sorted(keys))}" for name, keys in _KEYS.items())
        raise ValueError(
            f"{_FUNCTION}: source: expected the keys of one of haste's layers ({wanted}) after prefix={prefix!r}, "
            f"got {', '.join(sorted(found)) or 'none'}"
        )
    tensors = {key: tensor_of(_FUNCTION, key, value) for key, value in found.items()}

    is_lstm = name.endswith("LSTM")
    # Where our i, f, g, o and r, z, n stand.
    order = (0, 2, 1, 3) if is_lstm else (1, 0, 2)
    check_shape(_FUNCTION, "recurrent_kernel", tensors["recurrent_kernel"], "H", f"{len(order)} H")
    hidden_size = tensors["recurrent_kernel"].shape[0]
    width = len(order) * hidden_size
    shapes: dict[str, tuple[int | str, ...]] = {
        "kernel": ("I", width), "recurrent_kernel": (hidden_size, width), "gamma": (2, width),
        "gamma_h": (hidden_size,), "beta_h": (hidden_size,),
    }  # fmt: skip
    for key, tensor in tensors.items():
        check_shape(_FUNCTION, key, tensor, *shapes.get(key, (width,)))

    direction = Direction(
        in_order(tensors["kernel"].t(), hidden_size, order),
        in_order(tensors["recurrent_kernel"].t(), hidden_size, order),
        in_order(tensors["bias"], hidden_size, order),
        None if is_lstm else in_order(tensors["recurrent_bias"], hidden_size, order),
    )
    options: dict[str, Any] = {}
    if "gamma" in tensors:
        options["layer_norm"] = "separate"
        of_input, of_state = (in_order(row, hidden_size, order) for row in tensors["gamma"])
        direction.others |= {"weight_norm_ih": of_input, "weight_norm_hh": of_state}
    if "gamma_h" in tensors:
        options["cell_norm"] = "output"
        direction.others |= {"weight_norm_c": tensors["gamma_h"], "bias_norm_c": tensors["beta_h"]}

    def setting(given: Any, attribute: str, default: Any) -> Any:
        return given if given is not None else getattr(attributes, attribute, default)

    return module_of(
        LSTM if is_lstm else GRU, [direction], dtype or tensors["kernel"].dtype, device,
        batch_first=bool(setting(batch_first, "batch_first", False)),
        zoneout=(float(setting(zoneout, "zoneout", 0)), 0.0),
        weight_dropout=float(setting(dropout, "dropout", 0)), **options,
    )  # fmt: skip

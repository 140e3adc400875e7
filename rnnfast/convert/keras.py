"""Keras' LSTM, GRU, SimpleRNN and Bidirectional, of Keras 3 and 2."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch

from ..modules import GRU, LSTM, RNN
from .common import Direction, Layer, check_shape, in_order, module_of, tensor_of, with_hard_sigmoid

_FUNCTION = "from_keras"

# By cell: ours, and where our gates stand in Keras' order: i, f, c, o are our i, f, g, o; z, r, h our z, r, n.
_CELLS: dict[str, tuple[type[Layer], tuple[int, ...]]] = {
    "LSTM": (LSTM, (0, 1, 2, 3)),
    "GRU": (GRU, (1, 0, 2)),
    "SimpleRNN": (RNN, (0,)),
}
# Those whose activation is recurrent_activation, in our order.
_GATES = {"LSTM": (0, 1, 3), "GRU": (0, 1)}
_NONLINEARITIES = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid", "linear": "identity"}
# The slope of hard_sigmoid by Keras' version; its offset is 0.5.
_SLOPES = {2: 0.2, 3: 1 / 6}
# What is read of a configuration, with Keras' defaults.
_DEFAULTS: dict[str, Any] = {
    "activation": "tanh",
    "recurrent_activation": "sigmoid",
    "reset_after": True,
    "dropout": 0.0,
    "recurrent_dropout": 0.0,
    "go_backwards": False,
    "stateful": False,
    "time_major": False,
    "merge_mode": "concat",
}


def from_keras(
    source: Any,
    cell: str | None = None,
    *,
    bidirectional: bool = False,
    keras_version: int | None = None,
    batch_first: bool | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
    **settings: Any,
) -> Layer:
    """An LSTM, GRU or RNN with the weights of a Keras layer, or of the arrays that its `get_weights` gives.

    Keras' layouts: kernel (I, G*H), recurrent_kernel (H, G*H), bias (G*H,), of the GRU with reset_after (2, 3*H). Gates
    stand in the order i, f, c, o (LSTM) and z, r, h (GRU). Sources: `build` and `call` of the cells in
    keras/src/layers/rnn/{lstm,gru,simple_rnn,bidirectional}.py of keras-team/keras, and tf_keras/activations.py of
    keras-team/tf-keras for the hard_sigmoid of Keras 2.

    The layer gives the whole sequence and the final states; with ``return_sequences=False`` Keras gives the same as
    h_n, ``torch.cat(tuple(h_n), -1)`` if bidirectional. Keras' mask is our `lengths` where rows are padded at the end.

    Args:
        source: a Keras layer that was built: LSTM, GRU, SimpleRNN, RNN of one of their cells, or Bidirectional of such;
            or a sequence of arrays: kernel, recurrent_kernel and, if there is one, bias; if bidirectional, those of the
            backward layer after them.
        cell: with arrays ``"LSTM"``, ``"GRU"`` or ``"SimpleRNN"``; of a layer its class tells.
        bidirectional: with arrays, whether they are of two directions.
        keras_version: 2 or 3, for ``recurrent_activation="hard_sigmoid"``: clip(0.2 x + 0.5, 0, 1) in Keras 2,
            relu6(x + 3) / 6 in Keras 3, which becomes ours when the gates' weights are multiplied by 5/6. None: the
            version of the layer's library.
        batch_first: of the layer; None: as Keras has it, (N, T, I), or with time_major (T, N, I).
        dtype, device: of the parameters; None: those of the kernel.
        settings: by the names of Keras' configuration, and in place of what that says: activation,
            recurrent_activation, reset_after (without it, the shape of the bias tells), dropout, recurrent_dropout,
            go_backwards, stateful, time_major, merge_mode. dropout becomes `input_dropout`, recurrent_dropout
            `recurrent_dropout`, each with one mask for all gates and directions, where Keras may draw several.

    Returns:
        rnnfast.LSTM, GRU or RNN, in evaluation mode.

    Raises:
        TypeError, ValueError: `source` is no such layer, has no weights yet, or they are not of the shapes above;
            activations that ours lack (the LSTM and the GRU have tanh; gates sigmoid and hard_sigmoid; the RNN tanh,
            relu, sigmoid and linear); go_backwards, stateful, or a merge_mode that is not ``"concat"``.
    """
    if not settings.keys() <= _DEFAULTS.keys():
        unknown = ", ".join(sorted(settings.keys() - _DEFAULTS.keys()))
        raise TypeError(f"{_FUNCTION}: settings: expected some of {', '.join(_DEFAULTS)}, got {unknown}")
    if hasattr(source, "get_config"):
        if cell is not None or bidirectional:
            raise TypeError(f"{_FUNCTION}: cell, bidirectional: expected with arrays alone, got them with a layer")
        if keras_version is None:
            keras_version = _version_of(source)
        cell, config, groups = _read(source)
        given = {**config, **settings}
    else:
        if cell not in _CELLS:
            raise ValueError(f"{_FUNCTION}: cell: expected {', '.join(map(repr, _CELLS))} with arrays, got {cell!r}")
        groups, given = _grouped(source, bidirectional), settings
        if cell == "GRU" and "reset_after" not in given and len(groups[0]) == 3:
            given = {**given, "reset_after": tensor_of(_FUNCTION, "bias", groups[0][2]).dim() == 2}
    setting = {**_DEFAULTS, **given}
    _refuse(setting)
    options = _options(cell, setting)
    directions = [_direction(cell, arrays, setting["reset_after"]) for arrays in groups]
    dtype = dtype or directions[0].weight_ih.dtype
    if options.get("gate_activation") == "hard_sigmoid":
        if keras_version not in _SLOPES:
            raise ValueError(
                f"{_FUNCTION}: keras_version: expected 2 or 3 with recurrent_activation='hard_sigmoid', "
                f"got {keras_version!r}"
            )
        for direction in directions:
            with_hard_sigmoid(direction, _GATES[cell], _SLOPES[keras_version], 0.5)
    return module_of(
        _CELLS[cell][0], directions, dtype, device,
        batch_first=not setting["time_major"] if batch_first is None else batch_first, **options,
    )  # fmt: skip


def _version_of(layer: Any) -> int | None:
    """The version of Keras that a layer is of, None where its class does not tell."""
    for cls in type(layer).__mro__:
        package = cls.__module__.partition(".")[0]
        if package in ("tf_keras", "tensorflow"):
            return 2
        if package == "keras":
            version = str(getattr(sys.modules.get("keras"), "__version__", "")).partition(".")[0]
            return int(version) if version.isdecimal() else None
    return None


def _read(layer: Any) -> tuple[str, dict[str, Any], list[list[Any]]]:
    """A layer's cell, configuration, and arrays by direction."""
    if not (hasattr(layer, "forward_layer") and hasattr(layer, "backward_layer")):
        cell, config = _configuration(layer)
        return cell, config, [_weights(layer)]
    cell, config = _configuration(layer.forward_layer)
    other_cell, other = _configuration(layer.backward_layer)
    if config.get("go_backwards", False) or not other.get("go_backwards", True):
        raise ValueError(
            f"{_FUNCTION}: go_backwards: expected False of forward_layer and True of backward_layer, "
            f"got {config.get('go_backwards')!r} and {other.get('go_backwards')!r}"
        )
    for name in ("cell", *_DEFAULTS):
        of_both = (cell, other_cell) if name == "cell" else (config.get(name), other.get(name))
        if name != "go_backwards" and of_both[0] != of_both[1]:
            raise ValueError(
                f"{_FUNCTION}: {name}: expected the same of forward_layer and backward_layer, "
                f"got {of_both[0]!r} and {of_both[1]!r}"
            )
    config = {**config, "merge_mode": getattr(layer, "merge_mode", "concat")}
    return cell, config, [_weights(layer.forward_layer), _weights(layer.backward_layer)]


def _configuration(layer: Any) -> tuple[str, dict[str, Any]]:
    name, config = type(layer).__name__, layer.get_config()
    if name == "RNN":
        name = type(layer.cell).__name__.removesuffix("Cell")
        config = {**layer.cell.get_config(), **config}
    if name not in _CELLS:
        raise TypeError(
            f"{_FUNCTION}: source: expected Keras' {', '.join(_CELLS)}, RNN of such a cell, Bidirectional of these, or "
            f"arrays, got {name}"
        )
    return name, {key: value for key, value in config.items() if key in _DEFAULTS}


def _weights(layer: Any) -> list[Any]:
    arrays = list(layer.get_weights())
    if not arrays:
        raise ValueError(
            f"{_FUNCTION}: source: expected a layer that was built, got {type(layer).__name__} without weights"
        )
    return arrays


def _grouped(arrays: Sequence[Any], bidirectional: bool) -> list[list[Any]]:
    """Arrays by direction."""
    every, directions = list(arrays), 2 if bidirectional else 1
    if len(every) not in (2 * directions, 3 * directions):
        raise ValueError(
            f"{_FUNCTION}: source: expected kernel, recurrent_kernel and perhaps bias of "
            f"{'two directions' if bidirectional else 'one direction'}, got {len(every)} arrays"
        )
    each = len(every) // directions
    return [every[n : n + each] for n in range(0, len(every), each)]


def _refuse(setting: dict[str, Any]) -> None:
    """What our layers do not do."""
    ways = {
        "go_backwards": "give our layer x.flip(time) and convert with go_backwards=False",
        "stateful": "hand each call the states of the one before, and convert with stateful=False",
        "merge_mode": "convert with merge_mode='concat' and merge the halves of the output",
    }
    for name, way in ways.items():
        if setting[name] != _DEFAULTS[name]:
            raise ValueError(f"{_FUNCTION}: {name}: expected {_DEFAULTS[name]!r}, got {setting[name]!r}: {way}")


def _options(cell: str, setting: dict[str, Any]) -> dict[str, Any]:
    """Arguments of our layer."""

    def chosen(name: str, allowed: Sequence[str]) -> str:
        value = "linear" if setting[name] is None else setting[name]
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(
                f"{_FUNCTION}: {name}: expected {' or '.join(map(repr, allowed))} for {cell}, got {setting[name]!r}"
            )
        return value

    options = {"input_dropout": float(setting["dropout"]), "recurrent_dropout": float(setting["recurrent_dropout"])}
    if cell == "SimpleRNN":
        return {**options, "nonlinearity": _NONLINEARITIES[chosen("activation", tuple(_NONLINEARITIES))]}
    chosen("activation", ("tanh",))
    gate_activation = chosen("recurrent_activation", ("sigmoid", "hard_sigmoid"))
    reset_after = {"reset_after": bool(setting["reset_after"])} if cell == "GRU" else {}
    return {**options, "gate_activation": gate_activation, **reset_after}


def _direction(cell: str, arrays: Sequence[Any], reset_after: bool) -> Direction:
    """The arrays of one direction as ours."""
    if len(arrays) not in (2, 3):
        raise ValueError(
            f"{_FUNCTION}: source: expected kernel, recurrent_kernel and perhaps bias, got {len(arrays)} arrays"
        )
    order = _CELLS[cell][1]
    names = ("kernel", "recurrent_kernel", "bias")
    kernel, recurrent_kernel, *biases = (
        tensor_of(_FUNCTION, name, array) for name, array in zip(names, arrays, strict=False)
    )
    check_shape(_FUNCTION, "recurrent_kernel", recurrent_kernel, "H", f"{len(order)} H")
    hidden_size = recurrent_kernel.shape[0]
    width = len(order) * hidden_size
    check_shape(_FUNCTION, "recurrent_kernel", recurrent_kernel, hidden_size, width)
    check_shape(_FUNCTION, "kernel", kernel, "I", width)
    direction = Direction(in_order(kernel.t(), hidden_size, order), in_order(recurrent_kernel.t(), hidden_size, order))
    if not biases:
        return direction
    (bias,) = biases
    if cell == "GRU" and reset_after:
        check_shape(_FUNCTION, "bias, with reset_after=True", bias, 2, width)
        direction.bias_ih, direction.bias_hh = (in_order(row, hidden_size, order) for row in bias)
    else:
        check_shape(_FUNCTION, "bias" + ", with reset_after=False" * (cell == "GRU"), bias, width)
        direction.bias_ih = in_order(bias, hidden_size, order)
    return direction

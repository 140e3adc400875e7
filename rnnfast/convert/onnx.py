"""ONNX's LSTM, GRU and RNN."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..modules import GRU, LSTM, RNN
from .common import Direction, Layer, check_shape, in_order, module_of, tensor_of, with_hard_sigmoid

_FUNCTION = "from_onnx"

States: TypeAlias = Tensor | tuple[Tensor | None, Tensor | None] | None

# By operator: ours, and where our gates stand in ONNX's order: i, o, f, c are our i, f, g, o; z, r, h our r, z, n.
_OPERATORS: dict[str, tuple[type[Layer], tuple[int, ...]]] = {
    "LSTM": (LSTM, (0, 2, 3, 1)),
    "GRU": (GRU, (1, 0, 2)),
    "RNN": (RNN, (0,)),
}
# With input_forget: our i, g, o, without f.
_COUPLED = (0, 3, 1)
# The gates among our blocks of rows.
_GATES = {"LSTM": (0, 1, 3), "GRU": (0, 1), "coupled": (0, 2)}
_ACTIVATIONS = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"], "RNN": ["Tanh"]}
_NONLINEARITIES = {"tanh": "tanh", "relu": "relu", "sigmoid": "sigmoid"}
_INPUTS = ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P")


def from_onnx(
    source: Any,
    initializers: Mapping[str, Any] | Iterable[Any] | None = None,
    *,
    name: str | None = None,
    dtype: torch.dtype | None = None,
    device: Any = None,
) -> tuple[Layer, States]:
    """An LSTM, GRU or RNN with the weights of a node of an ONNX graph, and the node's initial states if it has them.

    ONNX's layouts, for D directions: W (D, G*H, I), R (D, G*H, H), B (D, 2*G*H), those of W and then those of R; of the
    LSTM P (D, 3*H). Gates stand in the order i, o, f, c (LSTM; P has i, o, f) and z, r, h (GRU). ``input_forget=1`` is
    our `coupled`, P our `peephole`, ``linear_before_reset=0`` our ``reset_after=False``, ``layout=1`` our
    `batch_first`. HardSigmoid with any alpha and beta becomes our hard sigmoid, with its slope and offset in the
    weights and biases. Sources: the operators LSTM, GRU and RNN in docs/Operators.md and onnx/defs/rnn/defs.cc of
    onnx/onnx; in which order alpha and beta are taken: onnxruntime/core/providers/cpu/rnn/rnn_helpers.cc of
    microsoft/onnxruntime.

    What the layer returns is ONNX's Y, Y_h and Y_c, but that ONNX's Y is (T, D, N, H) or (N, T, D, H), ours (T, N, D*H)
    or (N, T, D*H), and that with layout=1 ONNX's states are (N, D, H), ours (D, N, H). ONNX's sequence_lens is
    `lengths` of our call.

    Args:
        source: a ModelProto; or a NodeProto, with `initializers`.
        initializers: the constants that the node reads: a mapping of names to arrays or TensorProtos, or TensorProtos
            that have names, as ``graph.initializer``. Of a model they are its initializers and Constant nodes.
        name: in a model, the node's name or that of one of its outputs; None: it has only one such node.
        dtype, device: of the parameters; None: those of W.

    Returns:
        The layer, in evaluation mode, and (D, N, H) states for its calls: h_0, or (h_0, c_0); None for the node's that
        are zero or computed by the graph. If just one of the two is a constant, None stands for the other.

    Raises:
        TypeError, ValueError: no such node; W, R, B or P are no constants or not of the shapes above; sequence_lens is
            a constant; activations that ours lack (the LSTM and the GRU have Tanh, gates Sigmoid and HardSigmoid; the
            RNN Tanh, Relu, Sigmoid and Affine with alpha 1 and beta 0), or others for each direction; a clip;
            ``direction="reverse"``.
    """
    if hasattr(source, "graph"):
        if initializers is not None:
            raise TypeError(f"{_FUNCTION}: initializers: expected None with a model, which has its own")
        node, constants = _node_of(source.graph, name)
    else:
        if name is not None:
            raise TypeError(f"{_FUNCTION}: name: expected None with a node, got {name!r}")
        node, constants = source, _named(initializers or {})
    operator = str(getattr(node, "op_type", type(node).__name__))
    if operator not in _OPERATORS:
        raise ValueError(f"{_FUNCTION}: source: expected a node {', '.join(_OPERATORS)}, got {operator}")
    attributes = {attribute.name: _value_of(attribute) for attribute in node.attribute}
    inputs = {key: value for key, value in zip(_INPUTS, node.input, strict=False) if value}
    directions = _directions(attributes)
    coupled = operator == "LSTM" and attributes.get("input_forget", 0) != 0
    kind, order = _OPERATORS[operator]
    order = _COUPLED if coupled else order
    found = _constants(operator, inputs, constants, directions, attributes)
    hidden_size = found["R"].shape[2]
    every = [_direction({key: value[d] for key, value in found.items()}, hidden_size, order) for d in range(directions)]
    options: dict[str, Any] = _activations(operator, coupled, attributes, every)
    if operator == "LSTM":
        options |= {"coupled": coupled, "peephole": "P" in found}
    if operator == "GRU":
        options["reset_after"] = attributes.get("linear_before_reset", 0) != 0
    batch_first = attributes.get("layout", 0) != 0
    dtype = dtype or found["W"].dtype
    module = module_of(kind, every, dtype, device, batch_first=batch_first, **options)

    def state(key: str) -> Tensor | None:
        if inputs.get(key) not in constants:
            return None
        value = _tensor(key, constants[inputs[key]])
        shape = ("N", directions, hidden_size) if batch_first else (directions, "N", hidden_size)
        check_shape(_FUNCTION, key, value, *shape)
        value = value.transpose(0, 1) if batch_first else value
        return value.to(device=device, dtype=dtype).clone(memory_format=torch.contiguous_format)

    h = state("initial_h")
    if operator != "LSTM":
        return module, h
    c = state("initial_c")
    # One that the node does not have is zero.
    if c is not None and "initial_h" not in inputs:
        h = torch.zeros_like(c)
    if h is not None and "initial_c" not in inputs:
        c = torch.zeros_like(h)
    return module, None if h is None and c is None else (h, c)


def _node_of(graph: Any, name: str | None) -> tuple[Any, dict[str, Any]]:
    """The node of a graph, and the graph's constants by name."""
    constants = _named(graph.initializer)
    for node in graph.node:
        if node.op_type == "Constant":
            attributes = {attribute.name: attribute for attribute in node.attribute}
            if "value" in attributes:
                constants[node.output[0]] = attributes["value"].t
        elif node.op_type == "Identity" and node.input[0] in constants:
            constants[node.output[0]] = constants[node.input[0]]
    nodes = [node for node in graph.node if node.op_type in _OPERATORS]
    chosen = [node for node in nodes if name is None or name == node.name or name in node.output]
    if len(chosen) != 1:
        there = ", ".join(repr(node.name or node.output[0]) for node in nodes) or "none"
        wanted = "that of one node" if name is None else "a node"
        raise ValueError(f"{_FUNCTION}: name: expected {wanted} among {there}, got {name!r}")
    return chosen[0], constants


def _named(constants: Any) -> dict[str, Any]:
    return dict(constants) if isinstance(constants, Mapping) else {tensor.name: tensor for tensor in constants}


def _value_of(attribute: Any) -> Any:
    """Of an AttributeProto, by its type: FLOAT, INT, STRING, FLOATS, INTS, STRINGS."""
    kinds = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints", 8: "strings"}
    value = getattr(attribute, kinds[attribute.type]) if attribute.type in kinds else None
    if isinstance(value, bytes):
        return value.decode()
    if attribute.type in (6, 7, 8):
        return [each.decode() if isinstance(each, bytes) else each for each in value or ()]
    return value


def _tensor(argument: str, value: Any) -> Tensor:
    """An array, or a TensorProto, which is read by the library that it came from."""
    if hasattr(value, "raw_data"):
        value = importlib.import_module("onnx.numpy_helper").to_array(value)
    return tensor_of(_FUNCTION, argument, value)


def _directions(attributes: Mapping[str, Any]) -> int:
    """How many; and refuses what no direction of ours does."""
    clip = attributes.get("clip")
    if clip is not None and not math.isinf(clip):
        raise ValueError(f"{_FUNCTION}: clip: expected none, got {clip:g}")
    direction = attributes.get("direction", "forward")
    if direction not in ("forward", "bidirectional"):
        raise ValueError(
            f"{_FUNCTION}: direction: expected 'forward' or 'bidirectional', got {direction!r}"
            + ": set it to 'forward', and flip what our layer gets and gives along the time" * (direction == "reverse")
        )
    return 2 if direction == "bidirectional" else 1


def _constants(
    operator: str,
    inputs: Mapping[str, str],
    constants: Mapping[str, Any],
    directions: int,
    attributes: Mapping[str, Any],
) -> dict[str, Tensor]:
    """W, R, and B and P where the node has them."""
    if inputs.get("sequence_lens") in constants:
        raise ValueError(
            f"{_FUNCTION}: sequence_lens: expected no constant: take it off the node, and give our calls lengths"
        )
    found = {}
    for key in ("W", "R", "B", "P"):
        if key not in inputs and key in "BP":
            continue
        if inputs.get(key) not in constants:
            raise ValueError(f"{_FUNCTION}: {key}: expected a constant, got {inputs.get(key, '')!r}, which is none")
        found[key] = _tensor(key, constants[inputs[key]])
    gates = len(_OPERATORS[operator][1])
    check_shape(_FUNCTION, "R", found["R"], directions, f"{gates} H", "H")
    hidden_size = found["R"].shape[2]
    if attributes.get("hidden_size", hidden_size) != hidden_size:
        raise ValueError(
            f"{_FUNCTION}: hidden_size: expected that of R, {hidden_size}, got {attributes['hidden_size']}"
        )
    width = gates * hidden_size
    check_shape(_FUNCTION, "R", found["R"], directions, width, hidden_size)
    check_shape(_FUNCTION, "W", found["W"], directions, width, "I")
    for key, size in (("B", 2 * width), ("P", 3 * hidden_size)):
        if key in found:
            check_shape(_FUNCTION, key, found[key], directions, size)
    return found


def _direction(found: Mapping[str, Tensor], hidden_size: int, order: Sequence[int]) -> Direction:
    """The parameters of one direction as ours."""
    direction = Direction(in_order(found["W"], hidden_size, order), in_order(found["R"], hidden_size, order))
    if "B" in found:
        direction.bias_ih, direction.bias_hh = (in_order(each, hidden_size, order) for each in found["B"].chunk(2))
    if "P" in found:
        # i, o, f there; here i, f, o, or where f = 1 - i that has none i, o.
        of_gates = (0, 1) if order == _COUPLED else (0, 2, 1)
        direction.others["weight_peephole"] = in_order(found["P"], hidden_size, of_gates)
    return direction


def _activations(
    operator: str, coupled: bool, attributes: Mapping[str, Any], every: Sequence[Direction]
) -> dict[str, Any]:
    """Our arguments for the activations, with slopes and offsets of hard sigmoids now in the weights."""
    default = _ACTIVATIONS[operator]
    names = list(attributes.get("activations") or default * len(every))
    # The default of the RNN is two in any case.
    if operator == "RNN":
        names = names[: max(len(every), 1)]
    if len(names) != len(default) * len(every):
        raise ValueError(
            f"{_FUNCTION}: activations: expected {len(default)} for each of {len(every)} directions, got {len(names)}"
        )
    alphas, betas = (iter(attributes.get(f"activation_{letter}") or ()) for letter in ("alpha", "beta"))
    kinds = []
    for d, direction in enumerate(every):
        first, *others = (name.lower() for name in names[d * len(default) : (d + 1) * len(default)])
        if operator == "RNN":
            kinds.append(_nonlinearity(first, alphas, betas))
            continue
        if first not in ("sigmoid", "hardsigmoid") or any(other != "tanh" for other in others):
            raise ValueError(
                f"{_FUNCTION}: activations: expected Sigmoid or HardSigmoid and then Tanh for {operator}, got {names}"
            )
        kinds.append("hard_sigmoid" if first == "hardsigmoid" else "sigmoid")
        if first == "hardsigmoid":
            gates = _GATES["coupled" if coupled else operator]
            with_hard_sigmoid(direction, gates, next(alphas, 0.2), next(betas, 0.5))
    if len(set(kinds)) > 1:
        raise ValueError(f"{_FUNCTION}: activations: expected the same for both directions, got {names}")
    return {"nonlinearity" if operator == "RNN" else "gate_activation": kinds[0]}


def _nonlinearity(name: str, alphas: Iterable[float], betas: Iterable[float]) -> str:
    """Of our RNN."""
    if name == "affine" and (next(iter(alphas), None), next(iter(betas), None)) == (1, 0):
        return "identity"
    if name not in _NONLINEARITIES:
        raise ValueError(
            f"{_FUNCTION}: activations: expected Tanh, Relu, Sigmoid, or Affine with activation_alpha 1 and "
            f"activation_beta 0 for RNN, got {name}"
        )
    return _NONLINEARITIES[name]

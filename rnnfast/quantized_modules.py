"""`quantize_weights`, and the layers and cells that it makes: ours, with weights rounded and packed once.

Only what concerns the weights differs: where they are kept (buffers, as nothing is to be trained), what their shapes
are compared with, and what runs a layer (the op `quantized_layer`). All else is shared with the classes derived from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from . import cells, modules
from .backends import BACKENDS, select_quantized
from .cell_types import CELLS, CellType
from .patch import FORWARD_REPLACED, OURS, Report, subclass_in_words, swap, title, why_not_ours
from .quantization import MOST_COLUMNS_OF_INT8, TYPES, error, gates_of, pack, rounded
from .quantized_op import refuse_tangents
from .signatures import kinds_of, shapes_of

_PACKED_AS = "packed_as"


def _names(module: nn.Module) -> list[str]:
    """The names of a layer's or a cell's parameters."""
    names: Any = getattr(module, "_flat_weights_names", None)
    return list(kinds_of(bool(module.bias), False)) if names is None else names


def _shapes(module: nn.Module, gates: int) -> dict[str, tuple[int, ...]]:
    """By name: the shapes that the parameters of a layer or a cell have as long as they are not packed."""
    sizes: Any = module
    state_size = getattr(module, "proj_size", 0) or sizes.hidden_size
    above = state_size * (2 if getattr(module, "bidirectional", False) else 1)
    found = {}
    for name in _names(module):
        kind, _, layer = name.partition("_l")
        first = layer.partition("_")[0] in ("", "0")
        found[name] = shapes_of(gates, sizes.input_size if first else above, sizes.hidden_size, state_size)[kind]
    return found


def _bytes(tensors: list[Tensor]) -> str:
    count = sum(tensor.nbytes for tensor in tensors)
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


class Quantized(nn.Module):
    """What layers and cells with packed weights share.

    Attributes:
        weights_type: "float32", "bf16" or "int8".
    """

    weights_type: str
    _mode: Callable[[], str]
    # I, H and P that the weights were packed for, whatever the attributes say since.
    _packed_for: tuple[int, int, int]

    def __init__(self, *_: Any, **__: Any) -> None:
        raise TypeError(f"{type(self).__name__} is made by rnnfast.quantize_weights(model, dtype) alone")

    def reset_parameters(self) -> None:
        """Raises RuntimeError: there are no parameters."""
        raise RuntimeError(f"{type(self).__name__}: its weights are quantized, there are no parameters to reset")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, weights={self.weights_type}"

    # ---- making ----

    def take(self, weights_type: str) -> str:
        """Packs the parameters, in their stead: the end of the report's line. After an error they are still there."""
        self.weights_type = weights_type
        sizes: Any = self
        self._packed_for = (sizes.input_size, sizes.hidden_size, getattr(self, "proj_size", 0))
        # Ordinary tensors, also in inference mode: others could not be loaded into outside of it.
        with torch.inference_mode(False), torch.no_grad():
            before = {name: self._parameters[name].detach() for name in _names(self)}  # type: ignore[union-attr]
            matrices = [weight for weight in before.values() if weight.dim() == 2]
            off = error(matrices, [rounded(matrix, weights_type) for matrix in matrices])
            after = {
                name: self._pack(name, weight) if weight.dim() == 2 else weight.clone()
                for name, weight in before.items()
            }
        for name, buffer in after.items():
            del self._parameters[name]
            self.register_buffer(name, buffer)
        if isinstance(self, nn.RNNBase):
            # It keeps a list of the weights besides, which would keep the parameters alive.
            self._init_flat_weights()
        sizes_in_words = f"{_bytes(list(before.values()))} -> {_bytes(list(after.values()))}"
        return f"{weights_type} weights, {sizes_in_words}, error of the weights {100 * off:.2g} %"

    def _pack(self, name: str, weight: Tensor) -> Tensor:
        return pack(weight, gates_of(name, CELLS[self._mode()].gates), self.weights_type)

    # ---- state dicts ----

    def _packed_as(self) -> list[int]:
        """What the packed tensors do not show by themselves, to know them by in a state dict."""
        return [8 * TYPES[self.weights_type].itemsize, *self._packed_for]

    @property
    def packed_as(self) -> Tensor:
        """What stands in a state dict beside the weights: int64, bits of a weight, I, H, P."""
        return torch.tensor(self._packed_as(), device="cpu")

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + _PACKED_AS] = self.packed_as

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Takes what an equal module saved, and floating-point weights of an unquantized one, which it packs."""
        packed_as, expected = state_dict.pop(prefix + _PACKED_AS, None), self._packed_as()
        if isinstance(packed_as, Tensor):
            packed_as = packed_as.tolist()
        fits = packed_as is None or packed_as == expected
        some_packed = False
        for name, shape in _shapes(self, CELLS[self._mode()].gates).items():
            key, own = prefix + name, self._buffers[name]
            value = state_dict.get(key)
            if not isinstance(value, Tensor):
                continue
            if len(shape) != 2:
                if value.is_floating_point():
                    # With assign=True it becomes the buffer.
                    state_dict[key] = value.detach().float()
                continue
            why_not = None
            if value.dtype is torch.uint8:
                some_packed = True
                if own is not None and value.shape != own.shape:
                    why_not = f"expected packed weights of shape {tuple(own.shape)}, got {tuple(value.shape)}"
            elif not value.is_floating_point() or value.shape != shape:
                what = f"{tuple(value.shape)} of {value.dtype}"
                why_not = f"expected packed weights, or {shape} of a floating type to pack, got {what}"
            else:
                with torch.inference_mode(False), torch.no_grad():
                    value = value.detach().float()
                    state_dict[key] = self._pack(name, value)
                if not value.is_meta and not rounded(value, self.weights_type).isfinite().all():
                    why_not = f"some weights are not finite as {self.weights_type}"
            if why_not is not None:
                error_msgs.append(f"{key}: {why_not}")
            if why_not is not None or (value.dtype is torch.uint8 and not fits):
                # Nothing is loaded there, and no second message made.
                state_dict[key] = own
        if some_packed and packed_as is None and strict:
            missing_keys.append(prefix + _PACKED_AS)
        if not fits:
            error_msgs.append(
                f"{prefix + _PACKED_AS}: expected weights of (bits, input_size, hidden_size, proj_size) {expected}, "
                f"got {packed_as}"
            )
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    # ---- calling ----

    def _weights(self) -> list[Tensor]:
        """As an unquantized module's."""
        buffers = self._buffers
        weights: list[Any] = [buffers.get(name) for name in _names(self)]
        for i, weight in enumerate(weights):
            if weight is None:
                raise RuntimeError(f"{type(self).__name__}: {_names(self)[i]} is missing, or was replaced by another")
        return weights

    def _check_weights(self, input: Tensor, weights: list[Tensor]) -> None:
        """Raises RuntimeError unless each of `weights` is of the type that it was made in, and beside the input."""
        for weight in weights:
            if not (weight.is_cpu and input.is_cpu) and weight.device != input.device:
                modules.check_alike(input, weight, "parameter")
            if weight.dtype is not torch.uint8 and (weight.dtype is not torch.float32 or weight.dim() != 1):
                raise RuntimeError(
                    f"{type(self).__name__}: expected weights packed by rnnfast.quantize_weights and biases of "
                    f"torch.float32, got {tuple(weight.shape)} of {weight.dtype}; .float() undoes .half() and the like"
                )

    def _wrong_type(self, dtype: torch.dtype) -> str:
        return f"{type(self).__name__}: layers whose weights are quantized take torch.float32 alone, got {dtype}"

    def _kernel(self, mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, *others: Any) -> Any:
        """What runs a layer: takes the arguments of the op `layer`."""
        for tensor in (input, hx, cx):
            # Under autocast the checks let these pass.
            if tensor is not None and tensor.dtype is not torch.float32:
                raise RuntimeError(self._wrong_type(tensor.dtype))
        if forward_ad._current_level >= 0:
            refuse_tangents(input, hx, cx)
        run: Any = BACKENDS[select_quantized(input)].quantized
        return run(self.weights_type, *self._packed_for[1:], mode, input, hx, cx, *others)


class QuantizedLayers(Quantized, modules.Recurrent):
    """What the layers share."""

    def _refuse_input(self, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        if dtype is not torch.float32:
            raise ValueError(self._wrong_type(dtype))

    def _refuse_sizes(self, weight_hh: Tensor, state_size: int) -> None:
        """Asked about every packed weight, whose shape is never that of the matrix."""
        if self._mode() not in CELLS:
            super()._refuse_sizes(weight_hh, state_size)
        sizes = (self.input_size, self.hidden_size, self.proj_size)
        if sizes != self._packed_for:
            raise RuntimeError(
                f"{type(self).__name__}: the weights were packed for input_size, hidden_size, proj_size = "
                f"{self._packed_for}, these are now {sizes}"
            )


class QuantizedCell(Quantized, cells.Cell):
    """What the cells share."""

    @property
    def _sizes(self) -> tuple[int, int]:  # type: ignore[override]
        return self._packed_for[:2]

    def _check_weights(self, input: Tensor, weights: list[Tensor]) -> None:
        super()._check_weights(input, weights)
        expected = self._packed_for[0]
        if input.shape[1] != expected:
            raise RuntimeError(f"input has inconsistent input_size: got {input.shape[1]} expected {expected}")
        if input.dtype is not torch.float32 and not torch._C._is_any_autocast_enabled():
            raise RuntimeError(self._wrong_type(input.dtype))


class QuantizedLSTM(QuantizedLayers, modules.LSTM):
    """`rnnfast.LSTM` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedGRU(QuantizedLayers, modules.GRU):
    """`rnnfast.GRU` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedRNN(QuantizedLayers, modules.RNN):
    """`rnnfast.RNN` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedMGU(QuantizedLayers, modules.MGU):
    """`rnnfast.MGU` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedLSTMCell(QuantizedCell, cells.LSTMCell):
    """`rnnfast.LSTMCell` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedGRUCell(QuantizedCell, cells.GRUCell):
    """`rnnfast.GRUCell` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedRNNCell(QuantizedCell, cells.RNNCell):
    """`rnnfast.RNNCell` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


class QuantizedMGUCell(QuantizedCell, cells.MGUCell):
    """`rnnfast.MGUCell` for inference, its weights packed; made by `rnnfast.quantize_weights`."""


_QUANTIZED: dict[type[nn.Module], type[nn.Module]] = {
    modules.LSTM: QuantizedLSTM,
    modules.GRU: QuantizedGRU,
    modules.RNN: QuantizedRNN,
    modules.MGU: QuantizedMGU,
    cells.LSTMCell: QuantizedLSTMCell,
    cells.GRUCell: QuantizedGRUCell,
    cells.RNNCell: QuantizedRNNCell,
    cells.MGUCell: QuantizedMGUCell,
}
_QUANTIZED |= {theirs: _QUANTIZED[ours] for theirs, ours in OURS.items()}


def quantize_weights(model: nn.Module, dtype: str) -> Report:
    """Rounds and packs the weights of each recurrent layer and cell inside `model`, in place, for inference on the CPU.

    Layers and cells of rnnfast's, and those of torch.nn's that `accelerate` would take, become ones whose weights are
    packed once, where the others' are packed in every call; they compute in float32. The module objects stay, with
    their names and hooks. Their weights and biases are buffers afterwards, of the same names: there is no way back, no
    derivative, and nothing for an optimizer. A state dict is that of the packed weights; loading takes one of those or
    one of floating-point weights, which are packed then. `return_cell_states` is gone.

    Args:
        model: any module, or such a layer itself.
        dtype: what weights are rounded to. "bf16"; "int8", with a scale for each row, where inputs and states are
            rounded too, each row to 16 bits of its largest magnitude, and NaN or an infinity in a row makes all that
            the row is multiplied to NaN; "float32", which rounds nothing.
    Returns:
        Report: what was quantized, with sizes and the error of the weights, ||W - W'|| / ||W|| over all matrices of a
            module; and which recurrent modules were left alone and why. Left alone are those that `accelerate` leaves,
            subclasses, weights that are computed (parametrized, pruned), of another type than float32, on another
            device than the CPU, or not finite once rounded, and what is quantized already.
    Raises:
        ValueError: dtype is none of these.
        TypeError: model is no module.
    """
    if not isinstance(dtype, str) or dtype not in TYPES:
        expected = ", ".join(map(repr, TYPES))
        raise ValueError(f"rnnfast.quantize_weights: dtype should be one of {expected}, got {dtype!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"rnnfast.quantize_weights: model should be a torch.nn.Module, got {type(model).__name__}")

    def become(module: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> str:
        old = type(module)
        module.__class__ = table[old]
        assert isinstance(module, Quantized)
        try:
            return f"{title(old)} -> {module.take(dtype)}"
        except BaseException:
            # Out of memory, or Ctrl-C: it stays what it was.
            if all(module._parameters.get(name) is not None for name in _names(module)):
                module.__class__ = old  # type: ignore[assignment]
            raise

    return swap(model, _QUANTIZED, lambda module, exact: _why_not(module, exact, dtype), become)


def _cell_of(module: nn.Module) -> CellType | None:
    """The cell of a layer or a cell of rnnfast's or torch.nn's; None where it is unknown, which forward refuses."""
    ours: Any = _QUANTIZED[type(module)]
    if isinstance(module, nn.RNNBase):
        return CELLS.get(ours._own_mode or module.mode)
    try:
        return CELLS.get(ours._mode(module))
    except RuntimeError:
        return None


def _why_not(module: nn.Module, exact: bool, dtype: str) -> str | None:
    """Why this module's weights cannot be quantized, None where they can, or there are none.

    exact: whether its class is one of those that have their like here.
    """
    if isinstance(module, Quantized):
        return f"already quantized, to {module.weights_type}"
    if isinstance(module, (modules.Recurrent, cells.Cell)):
        if not exact:
            return subclass_in_words(module)
        if "forward" in vars(module):
            return FORWARD_REPLACED
        if module._options is not None:
            return f"there are no kernels for quantized weights with {module._options}"
    elif (reason := why_not_ours(module, exact)) is not None or not exact:
        return reason
    if parametrize.is_parametrized(module):
        return "its weights are computed: parametrized"
    for size in ("input_size", "hidden_size"):
        if getattr(module, size) == 0:
            return f"its {size} is 0"
    parameters = {name: module._parameters.get(name) for name in _names(module)}
    for name, parameter in parameters.items():
        if parameter is None:
            return f"its weights are computed: {name} is no parameter"
        if type(parameter) is not nn.Parameter:
            return f"{name} is of class {type(parameter).__name__}"
        if parameter.layout is not torch.strided:
            return f"{name} is {parameter.layout}"
        if parameter.is_meta:
            return "its weights have no values: they are on the meta device"
        if not parameter.is_cpu:
            return f"its weights are on {parameter.device}, not on the CPU"
        if parameter.dtype is not torch.float32:
            return f"its weights are {parameter.dtype}, not torch.float32"
    weights = {name: parameter.detach() for name, parameter in parameters.items() if parameter is not None}
    cell = _cell_of(module)
    if cell is None:
        return "its mode or nonlinearity is unknown"
    shapes = _shapes(module, cell.gates)
    if any(tuple(weight.shape) != shapes[name] for name, weight in weights.items()):
        return "its attributes do not fit its weights"
    matrices = {name: weight for name, weight in weights.items() if weight.dim() == 2}
    for name, weight in matrices.items():
        if dtype == "int8" and weight.shape[1] > MOST_COLUMNS_OF_INT8:
            return f"{name} has {weight.shape[1]:,} columns, int8 takes at most {MOST_COLUMNS_OF_INT8:,}"
        if not rounded(weight, dtype).isfinite().all():
            return f"{name} is not finite as {dtype}"
    return None

"""What the converters share: reading arrays, the order of gates, slopes of the hard sigmoid, and making the layer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..modules import GRU, LSTM, RNN

Layer: TypeAlias = LSTM | GRU | RNN

# Our hard sigmoid: clip(0.2 x + 0.5, 0, 1).
_SLOPE, _OFFSET = 0.2, 0.5


@dataclasses.dataclass
class Direction:
    """The parameters of one direction of one layer, as ours are: torch.nn's, and by kind those of options."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None
    others: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def has_bias(self) -> bool:
        return self.bias_ih is not None or self.bias_hh is not None

    def parameters(self, bias: bool) -> dict[str, Tensor]:
        """By kind; a bias that is missing is zero."""
        found = {"weight_ih": self.weight_ih, "weight_hh": self.weight_hh, **self.others}
        for kind, value in (("bias_ih", self.bias_ih), ("bias_hh", self.bias_hh)):
            if bias:
                found[kind] = torch.zeros_like(self.weight_hh[:, 0]) if value is None else value
        return found


def tensor_of(function: str, argument: str, value: Any) -> Tensor:
    """An array of any library, a nested list or a tensor as a tensor of floating type.

    Raises:
        TypeError: it is none.
    """
    wanted = f"{function}: {argument}: expected an array of a floating type"
    if not isinstance(value, Tensor):
        if hasattr(value, "numpy"):
            value = value.numpy()
        if hasattr(value, "strides"):
            value = value.copy()  # numpy's views may run backwards
        try:
            # numpy has bfloat16 from elsewhere, and torch does not know it.
            brain = str(getattr(value, "dtype", None)) == "bfloat16"
            value = torch.tensor(value.view("int16")).view(torch.bfloat16) if brain else torch.tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{wanted}, got {type(value).__name__}") from error
    if not value.is_floating_point():
        raise TypeError(f"{wanted}, got one of {value.dtype}")
    found: Tensor = value.detach()
    return found


def check_shape(function: str, argument: str, value: Tensor, *shape: int | str) -> None:
    """Raises ValueError unless `value` is of `shape`, where a word stands for any number."""
    fits = len(shape) == value.dim() and all(
        isinstance(wanted, str) or wanted == size for wanted, size in zip(shape, value.shape, strict=True)
    )
    if not fits:
        words = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
        raise ValueError(f"{function}: {argument}: expected shape ({words}), got {tuple(value.shape)}")


def in_order(value: Tensor, hidden_size: int, order: Sequence[int]) -> Tensor:
    """The gates' blocks of `hidden_size` rows that `order` names."""
    return value.unflatten(0, (-1, hidden_size))[list(order)].flatten(0, 1)


def with_hard_sigmoid(direction: Direction, gates: Sequence[int], slope: float, offset: float) -> None:
    """Makes the gates' clip(slope x + offset, 0, 1) ours, clip(0.2 y + 0.5, 0, 1), y = (slope x + offset - 0.5) / 0.2.

    That is exact but for the rounding of the new weights: x is linear in what is scaled here.

    Args:
        direction: is changed.
        gates: which of its blocks of rows are such gates'.
    """
    # Attributes of ONNX are float32.
    scale = 1.0 if math.isclose(slope, _SLOPE, rel_tol=1e-7) else slope / _SLOPE
    shift = 0.0 if math.isclose(offset, _OFFSET, rel_tol=1e-7) else (offset - _OFFSET) / _SLOPE
    if scale == 1 and shift == 0:
        return
    hidden_size = direction.weight_hh.shape[1]
    is_gate = torch.zeros(direction.weight_hh.shape[0] // hidden_size, dtype=torch.bool)
    is_gate[list(gates)] = True
    rows = is_gate.repeat_interleave(hidden_size).to(direction.weight_hh.device)

    def scaled(value: Tensor) -> Tensor:
        """In float64, so that they are rounded once."""
        value = value.double()
        return torch.where(rows.reshape(-1, *[1] * (value.dim() - 1)), scale * value, value)

    direction.weight_ih, direction.weight_hh = scaled(direction.weight_ih), scaled(direction.weight_hh)
    if shift != 0 and direction.bias_ih is None:
        direction.bias_ih = torch.zeros_like(direction.weight_hh[:, 0])
    if direction.bias_ih is not None:
        direction.bias_ih = scaled(direction.bias_ih) + shift * rows
    if direction.bias_hh is not None:
        direction.bias_hh = scaled(direction.bias_hh)
    if "weight_peephole" in direction.others:
        direction.others["weight_peephole"] = scale * direction.others["weight_peephole"].double()


def module_of(
    kind: type[Layer],
    directions: Sequence[Direction],
    dtype: torch.dtype,
    device: Any,
    num_heads: int = 1,
    **arguments: Any,
) -> Layer:
    """A layer of these parameters, in evaluation mode.

    Args:
        dtype, device: of its parameters; without a device they stay where they are.
        num_heads: also where there is no such option; then it has to be 1.
        arguments: of the layer, beside its sizes.
    """
    bias = any(direction.has_bias for direction in directions)
    weight_ih, weight_hh = directions[0].weight_ih, directions[0].weight_hh
    if num_heads > 1:
        arguments["num_heads"] = num_heads
    # Random numbers are not to be drawn for it.
    module = kind(
        weight_ih.shape[1], weight_hh.shape[1] * num_heads, bias=bias, bidirectional=len(directions) == 2,
        device="meta", **arguments,
    )  # fmt: skip
    state = {}
    for direction, suffix in zip(directions, module._suffixes(), strict=True):
        for name, value in direction.parameters(bias).items():
            moved = value.to(device=device, dtype=dtype)
            state[name + suffix] = moved.clone(memory_format=torch.contiguous_format)
    module.load_state_dict(state, assign=True)
    return module.eval()

"""Matrices of weights rounded and packed once, as the op `quantized_layer` reads them: in panels, uint8 (panels, lines,
64), which `.half()` and the like leave alone. How panels lie: csrc/cpu/panels.h.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from .signatures import KINDS

# What weights may be rounded to, by the names that users and the op have for them.
TYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

# Beyond it the sums of products of int8 might not fit int32.
MOST_COLUMNS_OF_INT8 = 65536

_ROWS, _WORD = 16, 4
_LINE = _ROWS * _WORD
_MOST = 127


def gates_of(name: str, gates: int) -> int:
    """How many blocks of rows of the parameter of that name lie in turns: one for each gate; of a projection's, one."""
    kind = next(kind for kind in KINDS if name.startswith(kind))
    return gates if KINDS[kind].shape[0] == "gates" else 1


def packed_shape(weights: str, gates: int, rows: int, columns: int) -> tuple[int, int, int]:
    """The shape of a packed matrix (rows, columns); `weights` is a key of `TYPES`, `gates` as for `pack`."""
    lines = -(-columns // _each_word(weights)) + (2 if weights == "int8" else 0)
    return gates * -(-(rows // gates) // _ROWS), lines, _LINE


def pack(weight: Tensor, gates: int, weights: str) -> Tensor:
    """Rounds and packs a matrix.

    Args:
        weight: (R, K) float32.
        gates: how many equal blocks of rows lie in turns (`gates_of`); it divides R.
        weights: a key of `TYPES`.
    Returns:
        uint8 (panels, lines, 64), contiguous.
    """
    columns = weight.shape[1]
    blocks = weight.unflatten(0, (gates, -1))
    # (G, H, K) to panels (U*G, 16, K).
    blocks = pad(blocks, (0, 0, 0, -blocks.shape[1] % _ROWS)).unflatten(1, (-1, _ROWS))
    panels = blocks.transpose(0, 1).reshape(-1, _ROWS, columns)
    if weights != "int8":
        return _lines(panels.to(TYPES[weights]))
    values, scales = _rounded_to_int8(panels)
    sums = values.sum(-1, keepdim=True, dtype=torch.int32)
    return torch.cat([_lines(values), _lines(scales), _lines(sums)], 1)


def unpack(packed: Tensor, gates: int, rows: int, columns: int, weights: str) -> Tensor:
    """The matrix that was packed, as it was rounded.

    Args:
        packed: what `pack` returned.
        gates, weights: as `pack` was given them.
        rows, columns: the matrix's, R and K.
    Returns:
        (R, K) float32.
    Raises:
        ValueError: `packed` is not a matrix of that size and type.
    """
    shape = packed_shape(weights, gates, rows, columns)
    if packed.dtype is not torch.uint8 or tuple(packed.shape) != shape:
        raise ValueError(f"expected packed weights, uint8 {shape}, got {packed.dtype} {tuple(packed.shape)}")
    if weights == "int8":
        panels = _panels(packed[:, :-2], torch.int8, columns) * _panels(packed[:, -2:-1], torch.float32, 1)
    else:
        panels = _panels(packed, TYPES[weights], columns).float()
    blocks = panels.unflatten(0, (-1, gates)).transpose(0, 1).reshape(gates, -1, columns)
    return blocks[:, : rows // gates].reshape(rows, columns)


def rounded(weight: Tensor, weights: str) -> Tensor:
    """What `unpack` gives of a float32 matrix once it is packed, without packing it. (R, K), as `weight`."""
    if weights != "int8":
        return weight.to(TYPES[weights]).float()
    values, scales = _rounded_to_int8(weight)
    return values * scales


def error(before: list[Tensor], after: list[Tensor]) -> float:
    """How far the matrices `after` are from those `before`: the root of the sum of squares, relative."""

    def norm(matrices: list[Tensor]) -> float:
        norms = [torch.linalg.vector_norm(matrix, dtype=torch.float64) for matrix in matrices]
        return torch.stack(norms).norm().item()

    whole = norm(before)
    return norm([a - b for a, b in zip(before, after, strict=True)]) / whole if whole else 0.0


def _each_word(weights: str) -> int:
    return _WORD // TYPES[weights].itemsize


def _rounded_to_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) float32 to int8, and a scale for each row (..., 1): a weight is int8 * scale.

    The largest of a row becomes 127. Scales have 17 significant bits, so that the product is exact in float32, and what
    was unpacked packs to the same again; the nearest int8 is another one only where two are as near.
    """
    scales = rows.abs().amax(-1, keepdim=True) / _MOST
    scales = ((scales.view(torch.int32) + 0x40) & ~0x7F).view(torch.float32)
    values = torch.where(scales > 0, rows / scales, 0).round().clamp(-_MOST, _MOST)
    return values.to(torch.int8), scales


def _lines(panels: Tensor) -> Tensor:
    """(panels, 16, K) to lines, uint8 (panels, lines, 64)."""
    each = _WORD // panels.itemsize
    words = pad(panels, (0, -panels.shape[2] % each)).unflatten(2, (-1, each))
    # A copy in any case: what was packed must not change with the matrix.
    return words.transpose(1, 2).clone(memory_format=torch.contiguous_format).flatten(2).view(torch.uint8)


def _panels(lines: Tensor, dtype: torch.dtype, columns: int) -> Tensor:
    """Lines to (panels, 16, columns): what `_lines` made."""
    lines = lines.contiguous()
    if lines.storage_offset() % dtype.itemsize:
        # A view of another type has to be aligned.
        lines = lines.clone()
    words = lines.view(dtype).unflatten(2, (_ROWS, -1))
    return words.transpose(1, 2).flatten(2)[..., :columns]

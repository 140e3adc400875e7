"""Which kernels run a call, and in what tiles: tables with reasons instead of timing on first use.

Nothing here looks at T. B chooses between two tiles of the step kernels, nothing else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

# Forces a family, for tests and measurements.
_forced: str | None = None


class Tiles(NamedTuple):
    """A configuration of a kernel: BLOCK_B batch rows, BLOCK_N units, BLOCK_K terms of the sum at a time."""

    batch: int
    units: int
    terms: int
    warps: int
    stages: int


# The hidden sizes (padded to a power of two) that the persistent kernels take, and the warps for each, by bytes of an
# element and gates. What bounds them is W_hh: it lies in shared memory, 163 KiB a program on sm_80 and 227 KiB on sm_90
# and sm_100, beside 8 KiB for h. Warps: so many that registers hold the rest of a turn without spilling, forward and
# backward, on all three (tests/test_triton_compile.py).
# float32 here is TF32. Exact float32 has no tensor cores to run on, and on some chips 64 KiB: the step kernels take it.
_PERSISTENT = {
    2: {
        1: {16: 4, 32: 4, 64: 4, 128: 8, 256: 16},
        3: {16: 4, 32: 4, 64: 8, 128: 8},
        4: {16: 4, 32: 4, 64: 8, 128: 8},
    },
    4: {
        1: {16: 4, 32: 4, 64: 8, 128: 8},
        3: {16: 4, 32: 8, 64: 8},
        4: {16: 4, 32: 8},
    },
}


def _persistent_sizes(gates: int, itemsize: int) -> dict[int, int]:
    """Of a number of gates that the table lacks, the sizes of the next larger one that it has: they need no less."""
    table = _PERSISTENT[itemsize]
    return next((sizes for larger, sizes in table.items() if larger >= gates), {})


def persistent_tiles(gates: int, dtype: torch.dtype, precision: str, hidden_size: int) -> Tiles | None:
    """The persistent kernels' configuration for a hidden size; None where they do not hold it."""
    if dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee"):
        return None
    sizes = _persistent_sizes(gates, dtype.itemsize)
    padded = max(16, power_of_two(hidden_size))
    # Rows that begin anywhere are read element by element: that takes the registers that the largest size lacks.
    if padded not in sizes or (hidden_size % 16 and padded == max(sizes)):
        return None
    # 16 rows: the least that a tensor core multiplies, and more programs to share a batch.
    return Tiles(16, padded, padded, sizes[padded], 1)


# At most so many rows are few: small tiles, so that all multiprocessors have some. With more of them a program takes
# more: it reads its part of W_hh for its own rows only, which would come from the L2 once every 16 rows.
FEW_ROWS = 32

# The step kernels' tiles, of a kernel that adds up one product and of one that adds up a product for each gate: the
# largest that need no spilling in any cell (tests/test_triton_compile.py). By bytes of an element (4: TF32), by whether
# H and P are multiples of 16, by whether rows are few. Where sizes are no such multiples, rows begin anywhere and are
# read element by element: each has an address in registers, which leaves room for less.
_STEP = {
    (2, True, True): (Tiles(16, 32, 128, 4, 3), Tiles(16, 16, 64, 4, 4)),
    (2, True, False): (Tiles(64, 64, 64, 8, 3), Tiles(64, 32, 64, 8, 3)),
    (2, False, True): (Tiles(16, 32, 64, 4, 3), Tiles(16, 16, 64, 4, 3)),
    (2, False, False): (Tiles(64, 32, 32, 8, 3), Tiles(64, 16, 64, 8, 3)),
    (4, True, True): (Tiles(16, 32, 64, 4, 3), Tiles(16, 16, 32, 4, 4)),
    (4, True, False): (Tiles(64, 32, 32, 8, 3), Tiles(64, 32, 16, 8, 4)),
    (4, False, True): (Tiles(16, 32, 64, 4, 3), Tiles(16, 16, 32, 4, 4)),
    (4, False, False): (Tiles(64, 32, 32, 8, 3), Tiles(64, 16, 32, 8, 3)),
}
# Without tensor cores, for any number of rows: float32 that is not TF32, and float64.
_EXACT_STEP = {
    4: (Tiles(16, 32, 32, 4, 2), Tiles(16, 32, 16, 8, 2)),
    8: (Tiles(16, 16, 16, 4, 2), Tiles(16, 16, 16, 4, 2)),
}


def step_tiles(
    products: int, dtype: torch.dtype, precision: str, batch: int, hidden_size: int, state_size: int
) -> Tiles:
    """The step kernels' configuration. products: how many a program adds up at a time, forward one for each gate."""
    if dtype == torch.float64 or (dtype == torch.float32 and precision == "ieee"):
        one, each = _EXACT_STEP[dtype.itemsize]
    else:
        multiples = hidden_size % 16 == 0 and state_size % 16 == 0
        one, each = _STEP[dtype.itemsize, multiples, batch <= FEW_ROWS]
    return one if products == 1 else each


def product_tiles(products: int, dtype: torch.dtype, precision: str, batch: int, size: int) -> Tiles:
    """Those of the products of layers with options, of which a program adds up so many, one after the other."""
    # Rows that begin anywhere have an address for each element in registers, and each product its own.
    alike = products if size % 16 else 1
    return step_tiles(alike, dtype, precision, batch, size, size)


# What a program of the row kernels (variant_step.py) takes at least, in values of one gate: so few that small batches
# fill a card, so many that a program is worth its start. And how many of them a thread has, by bytes of an element: so
# many that the widest combination of options needs no spilling up to H = 2048 in 16 bits, 1024 in float32 and 512 in
# float64 (tests/test_triton_compile.py).
_ROW_VALUES = 512
_A_THREAD = {2: 4, 4: 4, 8: 2}
_MOST_WARPS = 16


def row_tiles(hidden_size: int, dtype: torch.dtype, whole_rows: bool) -> Tiles:
    """The row kernels' configuration. whole_rows: whether a norm wants all units of a row in one program."""
    padded = max(16, power_of_two(hidden_size))
    units = padded if whole_rows else min(padded, _ROW_VALUES)
    rows = max(1, _ROW_VALUES // units)
    warps = max(1, rows * units // (32 * _A_THREAD[dtype.itemsize]))
    return Tiles(rows, units, 0, min(warps, _MOST_WARPS), 1)


def power_of_two(size: int) -> int:
    """The least power of two that is not smaller: Triton's tiles have such sizes."""
    return 1 << (size - 1).bit_length()


def options(tiles: Tiles, backend: str) -> dict[str, int | bool]:
    """What Triton is to be told of a configuration beside its constants. backend: of Triton, `cuda` or `hip`."""
    found: dict[str, int | bool] = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        # The default of all versions so far. Later ones want a word.
        "enable_fp_fusion": True,
    }
    if backend == "cuda":
        # All that a program's threads can have. Left alone, ptxas spills a few, so that more programs fit a
        # multiprocessor.
        found["maxnreg"] = min(255, 65536 // (32 * tiles.warps))
    return found


def family(gates: int, dtype: torch.dtype, precision: str, hidden_size: int, projected: bool) -> str:
    """`persistent` where one program can hold W_hh, else `step`.

    Raises:
        RuntimeError: a family is forced (`only`) that cannot run this call.
    """
    # On AMD a program has 64 KiB of shared memory at most, for which nobody has made a table yet.
    known = torch.version.hip is None
    fits = known and not projected and persistent_tiles(gates, dtype, precision, hidden_size) is not None
    if _forced == "persistent" and not fits:
        raise RuntimeError(f"rnnfast: the persistent Triton kernels do not hold H {hidden_size}, {dtype} ({precision})")
    if _forced is not None:
        return _forced
    return "persistent" if fits else "step"


@contextlib.contextmanager
def only(name: str | None) -> Iterator[None]:
    """Runs one family of kernels, `persistent` or `step`, for tests and measurements. Not for one thread alone."""
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before

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
    padded = max(16, 1 << (hidden_size - 1).bit_length())
    # Rows that begin anywhere are read element by element: that takes the registers that the largest size lacks.
    if padded not in sizes or (hidden_size % 16 and padded == max(sizes)):
        return None
    # 16 rows: the least that a tensor core multiplies, and more programs to share a batch.
    return Tiles(16, padded, padded, sizes[padded], 1)


def step_tiles(products: int, dtype: torch.dtype, precision: str, batch: int) -> Tiles:
    """The step kernels' configuration. products: how many a program adds up at a time, forward one for each gate."""
    if dtype == torch.float64:
        return Tiles(16, 16, 16, 4, 2)
    if dtype == torch.float32 and precision == "ieee":
        return Tiles(16, 32, 32, 4, 2)
    wide = dtype == torch.float32
    # A program reads its part of W_hh for its own rows only. Few rows: small tiles, so that all multiprocessors have
    # some. Many: more rows a program, or W_hh would come from the L2 once every 16 rows.
    if batch <= 32:
        return Tiles(16, 32 if products == 1 else 16, 64 if wide else 128, 4, 3)
    return Tiles(64, 64 if products == 1 else 32, 32 if wide else 64, 8, 3)


def options(tiles: Tiles, persistent: bool, backend: str) -> dict[str, int | bool]:
    """What Triton is to be told of a configuration beside its constants. backend: of Triton, `cuda` or `hip`."""
    found: dict[str, int | bool] = {
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        # The default of all versions so far. Later ones want a word.
        "enable_fp_fusion": True,
    }
    if persistent and backend == "cuda" and tiles.units <= 64:
        # Left alone, ptxas spills a few registers so that more programs fit a multiprocessor. Where W_hh leaves no room
        # for a second one anyway it does not, and the limit makes it do worse.
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

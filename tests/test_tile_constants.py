"""The tile constants of the CUDA kernels: a value that the kernels do not work with is a compile error that names the
constant, and values that are said to be legal compile. Changed copies of the headers, checked by the host compiler.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import pytest

from build_emulated import COMMON_FLAGS
from setup import CSRC, cuda_sources, cxx_compiler

PRODUCT, BLOCK, FORWARD = "cuda/product.cuh", "cuda/step/block.cuh", "cuda/step/forward.cuh"
ARITHMETIC, EMULATOR = "cuda/arithmetic.cuh", "emulator/emulator.h"
PERSISTENT = "cuda/persistent/persistent.h"
TILE = "kTileWeights = 16, kTileBatch = 8;"
LANES = "kLaneWeights = 2 * kWeightTiles_, kLaneStates = kBatchTiles_;"

# (file, what stands there, what is put in its place, the message; of the unit rnn, or that of its type).
REFUSED = {
    "kUnits": (BLOCK, "kUnits = 16;", "kUnits = 32;", "kUnits must be kTileWeights"),
    "kTileWeights": (PRODUCT, TILE, TILE.replace("16", "32"), "kTileWeights must be 16 and kTileBatch 8"),
    "kTileBatch": (PRODUCT, TILE, TILE.replace("8;", "4;"), "kTileWeights must be 16 and kTileBatch 8"),
    "no warps": (BLOCK, "kUsualWarps = 8;", "kUsualWarps = 0;", "kWarps must be 1 to 32"),
    "warps": (BLOCK, "kUsualWarps = 8;", "kUsualWarps = 33;", "kWarps must be 1 to 32"),
    "warps that do not fit": (BLOCK, "kUsualWarps = 8;", "kUsualWarps = 16;", "too large a tile for shared memory"),
    "UnitProduct": (BLOCK, "BlockProduct<Type, 1,", "BlockProduct<Type, 2,", "UnitProduct must have one weight tile"),
    "gates": (FORWARD, "::kGates, kBatchTiles,", "::kGates + 1, kBatchTiles,", "must have kGates weight tiles"),
    "kChunk": (PRODUCT, "kChunk = 4 * kVector;", "kChunk = 8 * kVector;", "kChunk must be 4 * kVector"),
    "kLaneWeights": (PRODUCT, LANES, LANES.replace("2 *", "4 *"), "kLaneWeights and kLaneStates must be 2 and 1"),
    "kLaneStates": (PRODUCT, LANES, LANES.replace("= kB", "= 2 * kB"), "kLaneWeights and kLaneStates must be 2 and 1"),
    "kChunkWords": (PRODUCT, "kLaneStates) * 32;", "kLaneStates) * 16;", "kChunkWords must be a word of 16 bytes"),
    "kColumn": (PRODUCT, "kColumn = kWeights + 4;", "kColumn = kWeights - 4;", "kColumn must be at least kWeights"),
    "kBudget": (PRODUCT, "kBudget = 96 << 10,", "kBudget = 100 << 10,", "kBudget must be at most 99 KB"),
    "kMostDepth": (PRODUCT, "kMostDepth = 6;", "kMostDepth = 1;", "kMostDepth must be at least 2"),
    "no tiles": (ARITHMETIC, "kLargeBatchTiles = 4;", "kLargeBatchTiles = 0;", "kBatchTiles must be at least 1"),
    "kTensorCores": (ARITHMETIC, "kTensorCores = true;", "kTensorCores = false;", "must be true for 16-bit types"),
    "float32 on tensor cores": (
        ARITHMETIC,
        "kTensorCores = false;",
        "kTensorCores = true;",
        "must be false for Float32",
    ),
    "kOctet": (PERSISTENT, "kOctet = 8;", "kOctet = 16;", "kOctet and kBatchTile must be 8"),
    "kBatchTile": (PERSISTENT, "kBatchTile = 8;", "kBatchTile = 16;", "kOctet and kBatchTile must be 8"),
    "kRowTiles": (PERSISTENT, "kRowTiles = 2;", "kRowTiles = 4;", "kRowTiles must be 2"),
    "kChunkBytes": (PERSISTENT, "kChunkBytes = 64;", "kChunkBytes = 128;", "kChunkBytes must be 64"),
    "kChunkFragments": (PERSISTENT, "= 2 * kRowTiles,", "= kRowTiles,", "kChunkFragments must be two a row tile"),
    "kFragmentBytes": (PERSISTENT, "kFragmentBytes = 512;", "kFragmentBytes = 256;", "kFragmentBytes a word of 16"),
    "kMostWarps": (PERSISTENT, "kMostWarps = 8;", "kMostWarps = 33;", "kMostWarps must be 6 to 8"),
    "too few warps": (PERSISTENT, "kMostWarps = 8;", "kMostWarps = 4;", "kMostWarps must be 6 to 8"),
    "kMostCells": (PERSISTENT, "kMostCells = 4;", "kMostCells = 0;", "kMostCells must be at least 1"),
    "most_batch_tiles": (PERSISTENT, "? 2 : 4;", "? 2 : 8;", "most_batch_tiles must be 1, 2 or 4"),
    "kMostCluster": (PERSISTENT, "kMostCluster = 16;", "kMostCluster = 32;", "kMostCluster must be 2 to 16"),
    "no registers": (PERSISTENT, "? 6 : many ? 7 : 8};", "? 0 : many ? 7 : 8};", "in_registers must be 1 or more"),
    "all registers": (PERSISTENT, "? 6 : many ? 7 : 8};", "? 6 : many ? 7 : 16};", "at most 255 registers"),
    "sum_row": (PERSISTENT, "return batch + 4;", "return batch + 1;", "sum_row must be at least the batch"),
    "kSourceParts": (PERSISTENT, "kSourceParts = 8;", "kSourceParts = 0;", "kSourceParts must be at least 1"),
    "kWordItems": (PERSISTENT, "kWordItems = 3;", "kWordItems = 4;", "kWordItems must be 3"),
    "kWarpSize": (EMULATOR, "kWarpSize = 32;", "kWarpSize = 16;", "kWarpSize must be 32"),
}
LEGAL = {
    "as it is": (BLOCK, "kUnits = 16;", "kUnits = 16;"),
    "few warps": (BLOCK, "kUsualWarps = 8;", "kUsualWarps = 3;"),
    "a chunk less": (PRODUCT, "kMostDepth = 6;", "kMostDepth = 2;"),
    "all that is granted": (PRODUCT, "kBudget = 96 << 10,", "kBudget = 99 << 10,"),
    "other banks": (PRODUCT, "kColumn = kWeights + 4;", "kColumn = kWeights;"),
    "six warps": (PERSISTENT, "kMostWarps = 8;", "kMostWarps = 6;"),
    "more cells": (PERSISTENT, "kMostCells = 4;", "kMostCells = 8;"),
    "small clusters": (PERSISTENT, "kMostCluster = 16;", "kMostCluster = 8;"),
    "two batch tiles": (PERSISTENT, "? 2 : 4;", "? 2 : 2;"),
    "fewer registers": (PERSISTENT, "? 6 : many ? 7 : 8};", "? 6 : many ? 7 : 4};"),
    "one tile": (ARITHMETIC, "kLargeBatchTiles = 4;", "kLargeBatchTiles = 1;"),
    "five tiles": (ARITHMETIC, "kLargeBatchTiles = 4;", "kLargeBatchTiles = 5;"),
}


@cache
def unit(file: str) -> Path:
    """The smallest with tensor cores, of the kernels that the header is of."""
    kernels = "persistent" if file == PERSISTENT else "step"
    return next(source for source in cuda_sources() if source.stem == f"{kernels}_rnn_bfloat16")


def compile_changed(folder: Path, file: str, old: str, new: str) -> subprocess.CompletedProcess[str]:
    """Of a copy of all headers in which every `old` is `new`."""
    shutil.copytree(CSRC, folder / "csrc", ignore=shutil.ignore_patterns("*.cpp", "*.cu", "cpu"))
    header = folder / "csrc" / file
    text = header.read_text()
    assert old in text, f"{file} does not have {old!r} any more"
    header.write_text(text.replace(old, new))
    # The copy comes first; headers find each other from where they are.
    flags = ["-I", str(folder / "csrc"), *COMMON_FLAGS, "-fsyntax-only", "-x", "c++"]
    command = [*cxx_compiler().split(), *flags, str(unit(file))]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def some(names: Iterable[str], usual: set[str]) -> list[object]:
    """All names; those that `make test` leaves to the exhaustive run are marked."""
    return [pytest.param(name, marks=[] if name in usual else [pytest.mark.exhaustive]) for name in names]


@pytest.mark.parametrize(
    "name", some(REFUSED, {"kUnits", "kChunk", "kMostDepth", "float32 on tensor cores", "kMostWarps"})
)
def test_a_value_that_does_not_work_is_a_compile_error(name: str, tmp_path: Path) -> None:
    file, old, new, message = REFUSED[name]
    done = compile_changed(tmp_path, file, old, new)
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if "error: static assertion failed" in line]
    assert any(message in error for error in errors), done.stderr[:2000]


@pytest.mark.parametrize("name", some(LEGAL, {"as it is"}))
def test_a_legal_value_compiles(name: str, tmp_path: Path) -> None:
    done = compile_changed(tmp_path, *LEGAL[name])
    assert done.returncode == 0, done.stderr[:2000]

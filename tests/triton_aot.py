"""Compiles every configuration of the Triton kernels for GPUs that are not here, and reads what each takes.

python tests/triton_aot.py [--targets sm_80 sm_90 sm_100 gfx942] [--only PATTERN]: one line of JSON a kernel.
test_triton_compile.py runs it in a process of its own, where TRITON_INTERPRET is not set.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

# Before Triton is imported. FP_FUSION: what it does by default in all versions that we know; later ones ask for a word.
os.environ.pop("TRITON_INTERPRET", None)
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rnnfast.cell_types import CELLS, NONLINEARITIES
from rnnfast.sequences import Sequences
from rnnfast.triton import layers, persistent, plan, step, variant_layers, variant_step
from rnnfast.triton import table as tb
from rnnfast.variants.reference import Arguments, Masks, Weights

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# One type of 16 bits stands for both, and one RNN for all: they differ in single instructions.
MODES = [mode for mode in CELLS if mode not in NONLINEARITIES.values() or mode == "RNN_TANH"]
ARITHMETICS = [
    (torch.bfloat16, "ieee"),
    (torch.float32, "tf32"),
    (torch.float32, "ieee"),
    (torch.float64, "ieee"),
]


# Of layers with options: by name the cell, words, and of which vectors (in units of H) and masks there are.
OPTIONS: dict[str, tuple[str, str, dict[str, int], tuple[str, ...]]] = {
    "LSTM norms peephole": (
        "LSTM", "carried", {"weight_norm_hh": 4, "weight_peephole": 3, "weight_norm_c": 1, "bias_norm_c": 1},
        ("recurrent", "zoneout_h", "zoneout_c"),
    ),
    "LSTM joint hard": ("LSTM", "rms hard_sigmoid", {"weight_norm": 4}, ("candidate",)),
    "sLSTM": ("LSTM", "exponential", {}, ()),
    "GRU separate": ("GRU", "", {"bias_hn": 1, "weight_norm_hh": 3}, ("recurrent", "zoneout_h")),
    "GRU joint": ("GRU", "relu", {"weight_norm": 3, "bias_norm": 3}, ("candidate",)),
    "GRU reset": ("GRU", "reset_first", {}, ("recurrent",)),
    "RNN joint": ("RNN_TANH", "", {"weight_norm": 1}, ("zoneout_h",)),
}  # fmt: skip
# The widest row that is promised not to spill, by bytes of an element.
WIDEST = {2: 2048, 4: 1024, 8: 512}

# Sizes that kernels are given, and of which Triton knows whether they are multiples of 16: that allows wide loads.
SIZES = ("H", "state_size")
EVERY_ALIGNMENT = (SIZES, (), ("H",), ("state_size",))
# Of the kernels of layers with options.
SIZES_WITH_OPTIONS = ("H", "size")


class Configuration(NamedTuple):
    """A kernel with its constants, and which of its sizes are multiples of 16."""

    family: str
    kernel: str
    mode: str
    dtype: torch.dtype
    precision: str
    tiles: plan.Tiles
    projected: bool
    aligned: tuple[str, ...]

    def __str__(self) -> str:
        words = [self.family, self.kernel, self.mode, str(self.dtype).removeprefix("torch."), self.precision]
        words += [f"{self.tiles.batch}x{self.tiles.units}"]
        words += ["projected"] if self.projected else []
        words += ["H % 16"] if "H" not in self.aligned else []
        words += ["P % 16"] if self.projected and "state_size" not in self.aligned else []
        return " ".join(words)


def configurations() -> Iterator[Configuration]:
    """Everything that plan.py can choose."""
    for mode, (dtype, precision), aligned in itertools.product(MODES, ARITHMETICS, EVERY_ALIGNMENT):
        cell = CELLS[mode]
        kind = (mode, dtype, precision)
        alike = len(aligned) != 1  # as H and state_size are without a projection
        for size in (16, 32, 64, 128, 256) if alike else ():
            tiles = plan.persistent_tiles(cell.gates, dtype, precision, size if aligned else size - 1)
            if tiles is not None:
                for kernel in ("forward", "backward"):
                    yield Configuration("persistent", kernel, *kind, tiles, False, aligned)
        sizes = [1024 if size in aligned else 1023 for size in SIZES]
        possible = ([False] if alike else []) + ([True] if cell.may_project else [])
        for batch, projected in itertools.product((plan.FEW_ROWS, plan.FEW_ROWS + 1), possible):
            for kernel in ("forward", "backward"):
                # as layers.py has it
                tiles = plan.step_tiles(1 if kernel == "backward" else cell.gates, dtype, precision, batch, *sizes)
                yield Configuration("step", kernel, *kind, tiles, projected, aligned)
                if projected:
                    tiles = plan.step_tiles(1, dtype, precision, batch, *sizes)
                    yield Configuration("step", f"project_{kernel}", *kind, tiles, True, aligned)


def variant(name: str) -> variant_layers.Variant:
    """What kernels are told of one of OPTIONS."""
    mode, words, sizes, drawn = OPTIONS[name]
    width, size = CELLS[mode].gates * 4, 4
    weights = {kind: torch.empty(count * size) for kind, count in sizes.items()}
    masks = {kind: torch.empty(1, size) for kind in drawn}
    arguments = Arguments(
        mode, words, 1e-5, 0.0, 0.0, False, 1, torch.empty(1, 1, width), None, None, None, Sequences(),
        Weights(torch.empty(width, size), **weights), Masks(**masks),
    )  # fmt: skip
    return variant_layers.variant_of("aot", arguments)[0]


def configurations_with_options() -> Iterator[Configuration]:
    """The kernels of layers with options: usual and the widest rows, and each product."""
    for name, (dtype, precision) in itertools.product(OPTIONS, ARITHMETICS):
        told = variant(name)
        of_rows = ["forward", "backward"] + (["reset", "reset_backward"] if told.reset_first else [])
        for kernel, size in itertools.product(of_rows, (256, WIDEST[dtype.itemsize])):
            tiles = plan.row_tiles(size, dtype, bool(told.gate_norm or told.cell_norm))
            yield Configuration("options", kernel, name, dtype, precision, tiles, False, SIZES_WITH_OPTIONS)
        # A product knows nothing of the options but the number of gates.
        products = ("multiply", "multiply_backward") if name in ("sLSTM", "GRU reset") else ()
        for kernel, batch in itertools.product(products, (plan.FEW_ROWS, plan.FEW_ROWS + 1)):
            for size, aligned in ((1024, SIZES_WITH_OPTIONS), (1023, ())):
                added_up = told.gates if kernel == "multiply_backward" else 1
                tiles = plan.product_tiles(added_up, dtype, precision, batch, size)
                yield Configuration("options", kernel, name, dtype, precision, tiles, False, aligned)


def compile_for(target: str, configuration: Configuration, ones: tuple[str, ...] = ()) -> Any:
    """The compiled kernel. ones: arguments that are 1, of which Triton makes constants."""
    c = configuration
    kernel = getattr({"persistent": persistent, "step": step, "options": variant_step}[c.family], c.kernel)
    if c.family == "options":
        told = variant(c.mode)
        known = layers.types(c.dtype, c.precision) | {"VARIANT": told, "GATES": told.gates, "COUNT": told.gates}
        known |= {"SLOT": tb.GRAD_GATES if "backward" in c.kernel else tb.ENTERING, "FIRST": 0, "OF_LATER": True}
    else:
        known = layers.constants(c.mode, c.dtype, c.precision)
    every = known | {
        "PROJECTED": c.projected,
        "BLOCK_B": c.tiles.batch,
        "BLOCK_N": c.tiles.units,
        "BLOCK_K": c.tiles.terms,
        **dict.fromkeys(ones, 1),
    }
    names = kernel.arg_names
    signature = {name: "constexpr" if name.isupper() and len(name) > 1 else "i32" for name in names}
    signature |= {"table": "*i64"} | dict.fromkeys(ones, "constexpr")
    multiples = {"table", *c.aligned} - set(ones)
    attributes = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name in multiples}
    constants = {(i,): every[name] for i, name in enumerate(names) if signature[name] == "constexpr"}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = plan.options(c.tiles, TARGETS[target].backend)
    return triton.compile(source, target=TARGETS[target], options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and local memory of the one kernel in a cubin, as cuobjdump says."""
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True).stdout
    return {name.lower(): int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text.decode())}


def measure(work: tuple[str, Configuration]) -> dict[str, Any]:
    target, configuration = work
    compiled = compile_for(target, configuration)
    found: dict[str, Any] = {
        "triton": triton.__version__,
        "target": target,
        "configuration": str(configuration),
        "family": configuration.family,
        "shared": compiled.metadata.shared,
    }
    return found | (resources(compiled.asm["cubin"]) if "cubin" in compiled.asm else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--only", default="", help="only configurations whose name matches this regular expression")
    arguments = parser.parse_args()
    distinct = [
        c
        for c in dict.fromkeys([*configurations(), *configurations_with_options()])
        if re.search(arguments.only, str(c))
    ]
    work = [(target, c) for target in arguments.targets for c in distinct]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for found in pool.map(measure, work):
            print(json.dumps(found), flush=True)


if __name__ == "__main__":
    sys.exit(main())

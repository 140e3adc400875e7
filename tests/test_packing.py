"""Weights that the CPU kernels read as they lie, and weights that they pack (csrc/cpu/packing.h): each shape of product
against float64, with gradients; and nothing beyond the last weight is read."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import rnnfast
import setup
from rnnfast import ops
from rnnfast.benchmark.case import GATES
from setup import COMMON_FLAGS, cxx_compiler
from test_build import in_new_process, needs_library
from tolerances import check

ROOT = Path(__file__).resolve().parent.parent


class Shape(NamedTuple):
    """A call: the sizes, and of which lengths its sequences are (None: all T)."""

    cell: str
    T: int
    B: int
    I: int  # noqa: E741
    H: int
    P: int = 0
    lengths: list[int] | None = None
    directions: int = 1

    @property
    def gates(self) -> int:
        return GATES[self.cell]

    def uses(self, threads: int) -> dict[str, tuple[int, int, int, int]]:
        """Of each matrix: rows, rows a step, weights in a row, weights of a share."""
        T, B, rows, state = self.T, self.B, self.gates * self.H, self.P or self.H
        threads = max(1, threads // self.directions)
        found = {
            "hh": (T * B, B, state, rows * state // threads),
            "ih": (T * B, T * B, self.I, rows * self.I // threads),
        }
        return found | ({"hr": (T * B, B, self.H, state * self.H // threads)} if self.P else {})

    def __str__(self) -> str:
        parts = [f"{self.cell} T{self.T} B{self.B} I{self.I} H{self.H}", f"P{self.P}" if self.P else ""]
        parts += ["lengths" if self.lengths else "", "both directions" if self.directions == 2 else ""]
        return " ".join(filter(None, parts))


SHAPES = [
    # One row a step: long rows of weights, whole and ragged, few steps and many; more steps than a chunk has.
    Shape("LSTM", 60, 1, 40, 192),
    Shape("GRU", 24, 1, 24, 208),
    Shape("RNN", 270, 1, 24, 32),
    Shape("LSTM", 9, 1, 200, 200),
    Shape("LSTM", 30, 1, 200, 200),
    Shape("RNN", 45, 1, 3, 1000),
    Shape("LSTM", 3, 1, 33, 47),
    Shape("GRU", 25, 1, 320, 20),
    Shape("LSTM", 1, 1, 1, 1),
    # Some rows a step, which meet the weights in threes and what is left; more than a buffer of sums holds.
    Shape("LSTM", 4, 2, 256, 256),
    Shape("GRU", 5, 4, 31, 224),
    Shape("RNN", 3, 5, 96, 320),
    Shape("LSTM", 2, 17, 130, 288),
    Shape("GRU", 1, 14, 120, 200),
    Shape("LSTM", 10, 3, 300, 256),
    Shape("RNN", 20, 2, 50, 530),
    Shape("LSTM", 50, 2, 16, 64),
    # Sequences of several lengths, directions, projections.
    Shape("LSTM", 6, 5, 250, 272, lengths=[2, 6, 0, 5, 1]),
    Shape("GRU", 30, 1, 70, 240, lengths=[17], directions=2),
    Shape("LSTM", 7, 1, 60, 330, P=200),
    Shape("LSTM", 40, 1, 60, 256, P=192, directions=2),
    Shape("LSTM", 4, 7, 210, 290, P=70),
    Shape("LSTM", 20, 8, 20, 100, P=30),
    Shape("LSTM", 25, 1, 10, 90, P=40),
    Shape("LSTM", 1, 3, 20, 130, P=45),
]
ISAS = {"avx512": 64, "avx2": 32, "portable": 16}  # bytes of a vector
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, isa = torch.get_num_threads(), ops.cpu_isa()
    yield
    torch.set_num_threads(threads)
    if isa:
        ops.use_cpu_isa(isa)


def use_isa(name: str) -> None:
    try:
        ops.use_cpu_isa(name)
    except RuntimeError as error:
        pytest.skip(f"{name}: {str(error).splitlines()[0]}")


# ---- the choice ------------------------------------------------------------------------------------------------------

PROGRAM = """
#include <cstdio>

#include "packing.h"

int main() {
  long rows, rows_a_step, k, lanes, narrow, bytes;
  while (std::scanf("%ld %ld %ld %ld %ld %ld", &rows, &rows_a_step, &k, &lanes, &narrow, &bytes) == 6)
    std::puts(rnnfast::cpu::reads_as_it_lies({rows, rows_a_step, k, lanes, narrow != 0, bytes}) ? "lies" : "packed");
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packing")
    (folder / "main.cpp").write_text(PROGRAM)
    command = [*cxx_compiler().split(), *COMMON_FLAGS, "-Wno-unused-function", f"-I{ROOT / 'csrc/cpu'}"]
    subprocess.run([*command, str(folder / "main.cpp"), "-o", str(folder / "choice")], check=True)
    return folder / "choice"


def choices(program: Path, uses: list[tuple[int, ...]]) -> list[str]:
    lines = "\n".join(" ".join(map(str, use)) for use in uses)
    return subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_shapes_below_meet_both_choices_of_every_matrix(program: Path, dtype: torch.dtype, isa: str) -> None:
    size, narrow = max(dtype.itemsize, 4), dtype.itemsize < 4
    names, uses = [], []
    for shape, threads in itertools.product(SHAPES, [1, 2]):
        for matrix, (rows, at_once, k, weights) in shape.uses(threads).items():
            steps = "one row" if at_once == 1 else "some rows"
            names.append(f"{matrix} {steps if matrix != 'ih' else ''}")
            uses.append((rows, at_once, k, ISAS[isa] // size, int(narrow), weights * size))
    met = set(zip(names, choices(program, uses), strict=True))
    assert met == set(itertools.product(set(names), ["lies", "packed"]))


def test_the_choice_changes_once_as_rows_are_added(program: Path) -> None:
    for k, lanes, narrow, batch in itertools.product([1, 15, 64, 200, 256, 700, 2048], [4, 8, 16], [0, 1], [1, 3, 0]):
        uses = [(n, batch or n, k, lanes, narrow, 4 * k * k) for n in range(batch or 1, 400, batch or 1)]
        found = choices(program, uses)
        assert found == sorted(found), (k, lanes, narrow, batch)  # first "lies", then "packed"
        assert found[0] == "lies"


# ---- the results -----------------------------------------------------------------------------------------------------


def results(layer: nn.Module, shape: Shape, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """The output and every gradient."""
    x = x.clone().requires_grad_()
    if shape.lengths is None:
        output, _ = layer(x)
    elif isinstance(layer, (rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN)):
        output, _ = layer(x, lengths=torch.tensor(shape.lengths))
    else:  # torch.nn knows no empty sequence
        rows = []
        for b, length in enumerate(shape.lengths):
            row = layer(x[:length, b])[0] if length else x.new_zeros(0, grad.shape[2])
            rows.append(torch.cat([row, x.new_zeros(shape.T - length, grad.shape[2])]))
        output = torch.stack(rows, 1)
    inputs = {"input": x, **dict(layer.named_parameters())}
    gradients = torch.autograd.grad(output, list(inputs.values()), grad.to(output.dtype))
    return {"output": output.detach(), **{f"grad {name}": g for name, g in zip(inputs, gradients, strict=True)}}


def layer_of(namespace: Any, shape: Shape) -> nn.Module:
    options = {"proj_size": shape.P} if shape.P else {}
    layer: nn.Module = getattr(namespace, shape.cell)(shape.I, shape.H, bidirectional=shape.directions == 2, **options)
    return layer


def available_isas() -> list[str]:
    """The widest first; all where there is no library, and no test runs."""
    if ops.library_error is not None:
        return list(ISAS)
    found, before = [], ops.cpu_isa()
    for name in ISAS:
        with contextlib.suppress(RuntimeError):
            found.append(ops.use_cpu_isa(name))
    ops.use_cpu_isa(before)
    return found


def result_cases() -> Iterator[Any]:
    """All; by default each shape in float32 on the widest vectors, and on one other kernel in turn."""
    kernels = list(itertools.product(DTYPES, available_isas()))
    for i, shape in enumerate(SHAPES):
        for k, (dtype, isa) in enumerate(kernels):
            default = k in (0, 1 + i % (len(kernels) - 1))
            marks = [] if default else [pytest.mark.exhaustive]
            yield pytest.param(shape, dtype, isa, id=f"{shape} {dtype} {isa}", marks=marks)


@needs_library
@pytest.mark.parametrize(("shape", "dtype", "isa"), list(result_cases()))
def test_results_and_gradients_against_float64(shape: Shape, dtype: torch.dtype, isa: str) -> None:
    ops.use_cpu_isa(isa)
    torch.manual_seed(7)
    theirs, ours = layer_of(nn, shape).to(dtype), layer_of(rnnfast, shape).to(dtype)
    ours.load_state_dict(theirs.state_dict())
    truth = layer_of(nn, shape).double()
    truth.load_state_dict(theirs.state_dict())
    x = torch.randn(shape.T, shape.B, shape.I).to(dtype)
    grad = torch.randn(shape.T, shape.B, (shape.P or shape.H) * shape.directions).to(dtype)
    want, yardstick = results(truth, shape, x.double(), grad.double()), results(theirs, shape, x, grad)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got = results(ours, shape, x, grad)
        with torch.inference_mode():
            lengths = {} if shape.lengths is None else {"lengths": torch.tensor(shape.lengths)}
            assert torch.equal(ours(x, **lengths)[0], got["output"])
        for name, value in got.items():
            check(name, value, want[name], yardstick[name], grows=name.startswith(("grad weight", "grad bias")))


# ---- what lies behind ------------------------------------------------------------------------------------------------


class BeforeTheEnd:
    """Tensors that end where a page begins which may not be touched."""

    def __init__(self) -> None:
        self.maps: list[mmap.mmap] = []

    def place(self, value: Tensor) -> Tensor:
        bytes_, page = value.numel() * value.element_size(), mmap.PAGESIZE
        whole = (bytes_ + page - 1) // page * page
        memory = mmap.mmap(-1, whole + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(address + whole), ctypes.c_size_t(page), 0) != 0:
            raise OSError(ctypes.get_errno(), "mprotect")
        self.maps.append(memory)
        placed = torch.frombuffer(memory, dtype=value.dtype, count=value.numel(), offset=whole - bytes_)
        return placed.view(value.shape).copy_(value)


PARTS = """
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>

#include "vec.h"

using namespace rnnfast::cpu;

// Every count, at both ends of a page between two that may not be touched.
template <class V, class Value> bool right(char* page, long size) {
  constexpr int kCount = sizeof(V) / sizeof(Value);
  for (int count = -1; count < kCount; ++count)
    for (const bool at_end : {false, true}) {
      const int some = count < 0 ? 0 : count;
      Value* const values = reinterpret_cast<Value*>(at_end ? page + size : page) - (at_end ? some : 0);
      for (int i = 0; i < some; ++i) values[i] = static_cast<Value>(i + 1);
      const V loaded = load_some<V>(values, count);
      for (int i = 0; i < kCount; ++i)
        if (loaded[i] != static_cast<Value>(i < some ? i + 1 : 0)) return false;
      store_some(values, loaded + loaded, count);
      for (int i = 0; i < some; ++i)
        if (values[i] != static_cast<Value>(2 * i + 2)) return false;
    }
  return true;
}

int main() {
  const long size = sysconf(_SC_PAGESIZE);
  char* const pages =
      static_cast<char*>(mmap(nullptr, 3 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  char* const page = pages + size;
  if (mprotect(page, size, PROT_READ | PROT_WRITE) != 0) return 2;
  std::puts(right<Vector<float>, float>(page, size) && right<Vector<double>, double>(page, size) &&
                    right<HalfBits, uint16_t>(page, size) ? "right" : "wrong");
}
"""


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_parts_of_vectors_are_loaded_and_stored_and_nothing_else(tmp_path: Path, isa: str) -> None:
    """Masked instructions, which the sanitizers of `make fuzz` do not see."""
    use_isa(isa)
    flags = setup.ISAS.get(platform.machine(), setup.ISAS["other"])[isa]
    (tmp_path / "main.cpp").write_text(PARTS)
    warnings = ["-Wno-psabi", "-Wno-unused-function"]
    command = [*cxx_compiler().split(), *COMMON_FLAGS, "-O1", *flags, *warnings, f"-I{ROOT / 'csrc/cpu'}"]
    subprocess.run([*command, str(tmp_path / "main.cpp"), "-o", str(tmp_path / "parts")], check=True)
    done = subprocess.run([tmp_path / "parts"], capture_output=True, text=True, check=True)
    assert done.stdout == "right\n"


GUARDED = """
import sys
sys.path.insert(0, {tests!r})
import torch, rnnfast, test_packing
from rnnfast import ops
ops.use_cpu_isa({isa!r})
guarded = test_packing.BeforeTheEnd()
for shape in test_packing.SHAPES:
    for dtype in test_packing.DTYPES:
        torch.manual_seed(3)
        layer = test_packing.layer_of(rnnfast, shape).to(dtype)
        x = torch.randn(shape.T, shape.B, shape.I).to(dtype)
        lengths = {{}} if shape.lengths is None else {{"lengths": torch.tensor(shape.lengths)}}
        with torch.no_grad():
            want = layer(x, **lengths)[0]
            for parameter in layer.parameters():
                parameter.data = guarded.place(parameter.data)
            got = layer(guarded.place(x), **lengths)[0]
        print(torch.equal(got, want))
"""


@needs_library
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_behind_the_last_weight_is_touched(isa: str) -> None:
    use_isa(isa)
    said = in_new_process(GUARDED.format(tests=str(ROOT / "tests"), isa=isa)).split()
    assert said == ["True"] * (len(SHAPES) * len(DTYPES))

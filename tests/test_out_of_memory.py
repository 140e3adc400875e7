"""Memory that an op cannot have: the error says which tensor, of which op, and how large; nothing in it is a path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import rnnfast
from emulated_library import emulated_problem
from rnnfast import libraries, ops
from rnnfast.backends import BACKENDS, KernelsWithOptions
from rnnfast.cell_types import CELLS
from rnnfast.variants import ops as variant_ops
from test_variants_refusals import arguments

ROOT = Path(__file__).resolve().parent.parent
H = 1024
# Petabytes of results, more than an address holds: no system promises them. An input without features takes nothing.
ROWS = 2**36
RESULT = ROWS * 64 * H * 4

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=f"no C++ library: {ops.library_error}")


@pytest.fixture(params=["cpu", "emulated"])
def library(request: pytest.FixtureRequest) -> str:
    if request.param == "emulated" and (why := emulated_problem()) is not None:
        pytest.skip(why)
    return str(request.param)


def layer(name: str, input: Tensor, backend: str, mode: str = "LSTM") -> Any:
    gates = CELLS[mode].gates
    weight_ih, weight_hh = torch.zeros(gates * H, input.size(-1)), torch.zeros(gates * H, H)
    arguments = (mode, input, *[None] * 5, False, weight_ih, None, weight_hh)
    return getattr(BACKENDS[backend].kernels, name)(*arguments)


def message_of(run: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        run()
    assert type(caught.value) is RuntimeError
    text = str(caught.value)
    assert str(ROOT) not in text
    # torch's own words name a file of its sources, without a folder.
    assert not re.search(r"\w/\w|\.h\b", text), text
    return text


@pytest.mark.parametrize("name", ["layer_forward", "layer"])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_results(library: str, name: str, mode: str) -> None:
    text = message_of(lambda: layer(name, torch.zeros(ROWS, 64, 0), library, mode))
    wanted = f"rnnfast::{name}: out of memory: output of shape ({ROWS}, 64, {H}), float32, needs {RESULT} bytes"
    assert text.startswith(f"{wanted} ({RESULT / 2**30:.1f} GiB) on cpu")


def test_a_layer_whose_input_is_expanded(library: str) -> None:
    module = rnnfast.LSTM(1, H)
    input = torch.zeros(1, 1, 1).expand(2**41, 64, 1)
    for gradients in (True, False):
        with rnnfast.backend(library), torch.set_grad_enabled(gradients):
            text = message_of(lambda: module(input))
        assert re.match(r"rnnfast::\w+: out of memory: output of shape \(2199023255552, 64, ", text)


def test_backward(library: str) -> None:
    output = torch.zeros(1, 1, 1).expand(ROWS, 64, H)
    nothing = torch.zeros(0)
    text = message_of(
        lambda: BACKENDS[library].kernels.recurrence_backward(
            "RNN_TANH", None, None, None, None, output, nothing, nothing, *[None] * 5, False, None, None,
            torch.zeros(H, H),
        )
    )  # fmt: skip
    wanted = f"a contiguous copy of output of shape ({ROWS}, 64, {H}), float32, needs {RESULT} bytes"
    assert text.startswith(f"rnnfast::recurrence_backward: out of memory: {wanted}")


def test_a_product() -> None:
    wide = torch.zeros(1, 1).expand(2**24, 2**24)
    text = message_of(lambda: torch.ops.rnnfast.matmul(torch.zeros(2**24, 0), torch.zeros(0, 2**24)))
    assert text.startswith(f"rnnfast::matmul: out of memory: the product of shape ({2**24}, {2**24}), float32, needs")
    text = message_of(lambda: torch.ops.rnnfast.matmul(torch.zeros(1, 2**24), wide.t()[:, ::2]))
    assert text.startswith("rnnfast::matmul: out of memory: a contiguous copy of b of shape")


def test_sizes_that_64_bits_do_not_count(library: str) -> None:
    text = message_of(lambda: layer("layer", torch.zeros(2**47, 1024, 0), library))
    assert "out of memory" not in text
    assert re.match(
        r"rnnfast::\w+: could not allocate \w+ of shape \(140737488355328, 1024, \d+\), float32: so many", text
    )


# What a call lacks further on, where the process may take only so many more megabytes than it has.
SCARCE = """
import resource, sys
import torch
from torch import zeros
import rnnfast
from rnnfast.backends import BACKENDS

if sys.argv[1] == "emulated":
    rnnfast.registration.load_emulated()
ops = BACKENDS[sys.argv[1]].kernels
{prepared}
with open("/proc/self/statm") as file:
    taken = int(file.read().split()[0]) * resource.getpagesize()
soft, hard = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (taken + (int(sys.argv[2]) << 20), hard))
try:
    {call}
    text = "nothing was lacking"
except RuntimeError as error:
    text = str(error)
resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
print(text)
"""


# By mode, and output, cells and reserve; without gradients, states or rows of their own lengths.
BACKWARD = "ops.recurrence_backward('{}', None, None, None, None, {}, *[None] * 5, False, None, None, weight)"


def lacking(library: str, megabytes: int, prepared: str, call: str) -> str:
    environment = dict(os.environ)
    if library == "emulated":
        import build_emulated

        environment.setdefault(libraries.EMULATED_VARIABLE, str(build_emulated.LIBRARY))
    done = subprocess.run(
        [sys.executable, "-c", SCARCE.format(prepared=prepared, call=call), library, str(megabytes)],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


needs_limits = pytest.mark.skipif(sys.platform != "linux", reason="address space is counted in Linux's /proc")


@needs_limits
def test_what_forward_saves(library: str) -> None:
    """32 MiB of output and as many of cells are there; 128 MiB of reserve are not."""
    text = lacking(
        library,
        112,
        "rows, weight_ih, weight = zeros(512, 64, 0), zeros(1024, 0), zeros(1024, 256)",
        "ops.layer_forward('LSTM', rows, *[None] * 5, False, weight_ih, None, weight)",
    )
    wanted = "reserve of shape (512, 64, 1024), float32, needs 134217728 bytes (128.0 MiB) on cpu"
    assert text.startswith(f"rnnfast::layer_forward: out of memory: {wanted}")


@needs_limits
def test_what_backward_returns(library: str) -> None:
    text = lacking(
        library,
        64,
        "rows, reserve, weight = zeros(512, 64, 256), zeros(512, 64, 1024), zeros(1024, 256)",
        BACKWARD.format("LSTM", "rows, rows, reserve"),
    )
    wanted = "grad_gates of shape (512, 64, 1024), float32, needs 134217728 bytes (128.0 MiB) on cpu"
    assert text.startswith(f"rnnfast::recurrence_backward: out of memory: {wanted}")


@needs_limits
def test_weights_transposed_for_backward() -> None:
    if (why := emulated_problem()) is not None:
        pytest.skip(why)
    text = lacking(
        "emulated",
        40,
        "row, weight = zeros(1, 1, 4096), zeros(4096, 4096)",
        BACKWARD.format("RNN_TANH", "row, row, row"),
    )
    wanted = "a contiguous copy of weight_hh transposed of shape (4096, 4096), float32, needs 67108864 bytes"
    assert text.startswith(f"rnnfast::recurrence_backward: out of memory: {wanted}")


@needs_limits
def test_the_workspace() -> None:
    text = lacking(
        "cpu",
        40,
        "rows, weight_ih, weight = zeros(16, 16, 0), zeros(4096, 0), zeros(4096, 4096)",
        "ops.layer_forward('RNN_TANH', rows, *[None] * 5, False, weight_ih, None, weight)",
    )
    assert re.match(
        r"rnnfast::layer_forward: out of memory: the workspace needs \d+ bytes \([\d.]+ MiB\) on cpu\n", text
    )


def test_no_message_of_the_libraries_names_a_path_of_the_machine_that_built_them() -> None:
    """The CUDA library's machine code knows the files of its lines; what its messages name are those of the ops."""
    found = sorted((ROOT / "rnnfast").glob("_C_*.so"))
    if not found:
        pytest.skip("the libraries are not built in this tree")
    for library in found:
        paths = re.findall(rb"[\w./-]*/(?:torch/csrc/[\w./]+|ops\w*\.cpp|checks\.h)", library.read_bytes())
        assert paths
        assert not [path for path in paths if path.startswith(b"/")], library.name


# ---- torch.OutOfMemoryError, for CUDA tensors -----------------------------------------------------------------------


@pytest.fixture
def as_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors go the way of CUDA tensors."""
    monkeypatch.setattr(libraries, "follow_tf32", lambda: True)
    libraries.follow_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
    monkeypatch.setattr(BACKENDS["cpu"], "kernels", ops.on_cuda(BACKENDS["cpu"].kernels))
    monkeypatch.setattr(BACKENDS["cpu"], "with_options", KernelsWithOptions.of("cuda", "rnnfast"))


@pytest.mark.usefixtures("as_on_cuda")
def test_out_of_memory_is_torchs_own_error() -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"^rnnfast::layer_forward: out of memory: output of shape"):
        layer("layer_forward", torch.zeros(ROWS, 64, 0), "cpu")
    with pytest.raises(torch.OutOfMemoryError, match="output of shape"):
        rnnfast.GRU(1, H)(torch.zeros(1, 1, 1).expand(2**41, 64, 1))


def test_so_it_is_of_layers_with_options(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> Any:
        raise RuntimeError("rnnfast::variant_forward: out of memory: output of shape")

    namespace = types.SimpleNamespace(variant_forward=out_of_memory, variant_backward=out_of_memory)
    monkeypatch.setattr(torch.ops, "rnnfast", namespace)
    for name, kind in (("cuda", torch.OutOfMemoryError), ("cpu", RuntimeError)):
        with pytest.raises(RuntimeError, match=r"^rnnfast::variant_forward: out of memory: output of shape$") as raised:
            KernelsWithOptions.of(name, "rnnfast").forward(True)
        assert raised.type is kind
    # And of backward, where the op is that of a namespace.
    given = arguments()
    for is_cuda, kind in ((True, torch.OutOfMemoryError), (False, RuntimeError)):
        on_device = given._replace(gates=types.SimpleNamespace(is_cuda=is_cuda))
        with pytest.raises(RuntimeError, match="out of memory: output") as raised:
            variant_ops.gradients(out_of_memory, on_device, [], [], [given.gates] * 5)
        assert raised.type is kind


@pytest.mark.usefixtures("as_on_cuda")
def test_other_errors_stay_what_they_are() -> None:
    message_of(lambda: layer("layer", torch.zeros(2**50, 64, 0), "cpu"))
    assert message_of(lambda: layer("layer", torch.zeros(1, 1, 2, 3), "cpu")).endswith("dimensions, got 4")


@pytest.mark.usefixtures("as_on_cuda")
@pytest.mark.parametrize("options", [{}, {"layer_norm": "joint"}], ids=["plain", "options"])
def test_it_compiles_whole(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    module = rnnfast.LSTM(3, 5, **options)
    input = torch.randn(4, 2, 3)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert_close(compiled(input)[0], module(input)[0])
    compiled(input)[0].sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    torch._dynamo.reset()

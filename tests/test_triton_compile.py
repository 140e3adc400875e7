"""The Triton kernels compiled ahead of time, without a GPU: what each configuration takes, and what makes Triton
compile anew. By the Triton that is installed, and by the older ones that `make triton-versions` puts beside it.
Compilations run in processes of their own, where TRITON_INTERPRET is not set.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rnnfast.triton import availability

if availability.error is not None:
    pytest.skip(availability.error, allow_module_level=True)

# What a program may have, in bytes: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"; for
# gfx942 the CDNA3 ISA guide.
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
TESTS = Path(__file__).parent
ROOT = TESTS.parent
INSTALLED = "installed"
OLDER = re.findall(r"^OLDER_TRITON := (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[0].split()


@pytest.fixture(params=[INSTALLED, *OLDER])
def version(request: pytest.FixtureRequest) -> str:
    """Of Triton."""
    if request.param != INSTALLED and not (folder_of(request.param) / "triton").exists():
        pytest.skip(f"Triton {request.param} is not in build: make triton-versions")
    return str(request.param)


def folder_of(version: str) -> Path:
    return ROOT / "build" / f"triton-{version}"


def python(version: str, *arguments: str, interpreted: bool = False) -> str:
    """The output of a Python process with that Triton, which compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment["TRITON_INTERPRET"] = "1"
    # What stands there may be another Triton.
    first = [] if version == INSTALLED else [str(folder_of(version))]
    environment["PYTHONPATH"] = os.pathsep.join([*first, str(ROOT), str(TESTS), *sys.path])
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def measured(version: str, target: str, pattern: str) -> list[dict[str, Any]]:
    lines = python(version, str(TESTS / "triton_aot.py"), "--targets", target, "--only", pattern).splitlines()
    found = [json.loads(line) for line in lines]
    assert found, f"no configuration matches {pattern}"
    return found


def check_resources(version: str, found: list[dict[str, Any]]) -> None:
    """Shared memory that the target has, and no stack, which is where registers are spilled to."""
    for kernel in found:
        name = f"{kernel['configuration']} for {kernel['target']} by Triton {kernel['triton']}"
        assert version in (INSTALLED, kernel["triton"]), name
        assert kernel["shared"] <= SHARED_LIMIT[kernel["target"]], f"{name}: {kernel['shared']} bytes of shared memory"
        if kernel["target"] != "gfx942":
            assert kernel["stack"] == kernel["local"] == 0, f"{name}: spills"


# The largest of the persistent kernels; of the step kernels each kind of product, and the largest tiles.
USUAL = "|".join(
    [
        "persistent .* (LSTM|GRU) bfloat16 ieee 16x128",
        "step forward GRU (bfloat16|float64) ieee 16x16( H|$)",
        r"step .* LSTM bfloat16 ieee 64x\d+( H|$)",
        "options .* LSTM norms peephole bfloat16 ieee 1x2048",
        "options .*(reset|multiply)[a-z_]* GRU reset bfloat16 ieee (1x512|16x)",
    ]
)


@pytest.mark.parametrize(
    ("target", "pattern"),
    [
        ("sm_90", USUAL),
        *(
            pytest.param(target, family, marks=pytest.mark.exhaustive)
            for target in ("sm_80", "sm_90", "sm_100")
            for family in ("persistent", "step", "options")
        ),
    ],
)
def test_shared_memory_and_spills(version: str, target: str, pattern: str) -> None:
    check_resources(version, measured(version, target, pattern))


@pytest.mark.parametrize(
    "pattern", ["step forward LSTM bfloat16 ieee 16", pytest.param("step .* bfloat16", marks=pytest.mark.exhaustive)]
)
def test_amd(pattern: str) -> None:
    """Nothing in the kernels is CUDA's own. The step kernels: AMD's 64 KiB hold other sizes than the table's."""
    check_resources(INSTALLED, measured(INSTALLED, "gfx942", pattern))


def test_every_entry_of_the_plan_is_compiled() -> None:
    code = """
import triton_aot as t
from rnnfast.triton import plan
tiles = {family: {c.tiles for c in t.configurations() if c.family == family} for family in ("persistent", "step")}
assert tiles["step"] == {tiles for pair in [*plan._STEP.values(), *plan._EXACT_STEP.values()] for tiles in pair}
tables = [sizes.items() for table in plan._PERSISTENT.values() for sizes in table.values()]
entries = {entry for table in tables for entry in table}
assert {(found.units, found.warps) for found in tiles["persistent"]} == entries
"""
    python(INSTALLED, "-c", code)


COUNT = """
import itertools, sys
import torch
from triton.runtime.jit import JITFunction
from rnnfast.sequences import Sequences
from rnnfast.signatures import BackwardArguments, LayerArguments, Parameters, flat
from rnnfast.triton import layers, variant_layers
from rnnfast.variants import ops as variant_ops
from rnnfast.variants.reference import Arguments, Masks, Weights

# Instead of a launch: what Triton would look its compiled kernel up by.
keys = set()

def run(self, *arguments, grid, warmup, **options):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature
    binder = create_function_from_signature(self.signature, self.params, make_backend(GPUTarget("cuda", 90, 32)))
    bound, specialization, rest = binder(*arguments, **options)
    keys.add((self.fn.__name__, self.fn.__module__, str(specialization), str(rest)))

JITFunction.run = run

def call(T, B, H, dtype, packed=False, **given):
    tensor = lambda *shape: torch.zeros(shape, dtype=dtype)
    rows = (T * B,) if packed else (T, B)
    state = [tensor(1, B, H) if given.get("initial") else None for _ in ("hx", "cx")]
    sizes = torch.full((T,), B) if packed else None
    sequences = Sequences(sizes, torch.full((B,), T) if given.get("lengths") else None)
    parameters = Parameters(weight_ih=tensor(4 * H, 3), weight_hh=tensor(4 * H, H))
    forward = layers.layer_forward if given.get("save") else layers.layer
    forward(*flat(LayerArguments("LSTM", tensor(*rows, 3), *state, sequences, parameters)))
    saved = [tensor(*rows, H), tensor(*rows, H), tensor(*rows, 4 * H)]
    gradients = [tensor(*rows, H), None, None, None]
    layers.recurrence_backward(*flat(BackwardArguments("LSTM", *gradients, *saved, *state, sequences, parameters)))

counts = {}
for family, H, dtype in (("persistent", 64, torch.bfloat16), ("step", 160, torch.bfloat16)):
    keys.clear()
    for T, B in itertools.product((1, 2, 7, 16, 33), (1, 3, 16, 32)):
        for options in ({}, {"initial": True}, {"lengths": True, "save": True}, {"packed": True}):
            call(T, B, H, dtype, **options)
    small = len(keys)
    call(3, 100, H, dtype)
    call(5, 4096, H, dtype)
    call(2, 33, H, dtype)
    counts[family] = [small, len(keys)]

def call_with_options(T, B, H, packed=False, initial=False, lengths=False):
    tensor = lambda *shape: torch.zeros(shape, dtype=torch.bfloat16)
    rows = (T * B,) if packed else (T, B)
    sequences = Sequences(torch.full((T,), B) if packed else None, torch.full((B,), T) if lengths else None)
    state = [tensor(B, H) if initial else None for _ in ("hx", "cx")]
    weights = Weights(tensor(4 * H, H), weight_norm=tensor(4 * H))
    numbers, gates = (1e-5, 0.0, 0.0, False, 1), tensor(*rows, 4 * H)
    given = Arguments("LSTM", "", *numbers, gates, *state, None, sequences, weights, Masks())
    flat_given = variant_ops.flat(given)
    output, _, _, cell_states, *_, reserve, normed, scale = variant_layers.variant_forward(True, *flat_given)
    grads = [torch.zeros_like(output), None, None, None, None]
    variant_layers.variant_backward(*grads, output, cell_states, reserve, normed, scale, *flat_given)

keys.clear()
for T, B in itertools.product((1, 2, 33), (1, 3, 16, 32)):
    for options in ({}, {"initial": True}, {"lengths": True}, {"packed": True}):
        call_with_options(T, B, 160, **options)
small = len(keys)
call_with_options(3, 100, 160)
counts["options"] = [small, len(keys)]
import json
print(json.dumps(counts))
"""


def test_no_compilation_for_another_length_or_batch(version: str) -> None:
    """One for forward, one for backward (with options two each), one for the table; a large batch has tiles of its own
    in products, the same for all."""
    assert json.loads(python(version, "-c", COUNT)) == {
        "persistent": [3, 3], "step": [3, 5], "options": [5, 7],
    }  # fmt: skip


def test_a_hidden_size_of_one(version: str) -> None:
    """Triton makes a constant of it."""
    code = """
import triton_aot as t
c = next(c for c in t.configurations() if c.family == "step" and c.mode == "LSTM" and not c.aligned)
for kernel in ("forward", "backward"):
    t.compile_for("sm_90", c._replace(kernel=kernel), ones=("H", "state_size"))
found = [c for c in t.configurations_with_options() if c.mode == "GRU reset" and c.dtype == t.torch.bfloat16]
for c in {c.kernel: c._replace(aligned=()) for c in found}.values():
    t.compile_for("sm_90", c, ones=("H", "size") if c.kernel.startswith("multiply") else ("H",))
    if c.kernel.startswith("multiply"):  # as many heads as units
        t.compile_for("sm_90", c, ones=("size",))
"""
    python(version, "-c", code)


def test_float64_in_the_interpreter(version: str) -> None:
    """Which is not tl.dot's there: against torch.nn, results and gradients."""
    code = """
from triton_interpreter import triton_problem
assert triton_problem() is None
import torch, rnnfast
for kind, options in (("LSTM", {"proj_size": 3}), ("GRU", {})):
    ours = getattr(rnnfast, kind)(5, 19, dtype=torch.float64, **options)
    theirs = getattr(torch.nn, kind)(5, 19, dtype=torch.float64, **options)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(3, 2, 5, dtype=torch.float64)
    results = []
    for module, backend in ((ours, "triton"), (theirs, "auto")):
        with rnnfast.backend(backend):
            output = module(input)[0]
            results.append([output, *torch.autograd.grad(output.sin().sum(), list(module.parameters()))])
    for own, other in zip(*results, strict=True):
        assert (own - other).abs().max() < 1e-13, kind
"""
    python(version, "-c", code, interpreted=True)

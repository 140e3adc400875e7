"""What the CUDA build promises without a card: machine code for the architectures asked for, in registers and on tensor
cores where meant; a library that every torch loads; and errors that say what to do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

import cuda_resources
import setup as build
from cuda_tools import cuda_tool, run_tool
from launches import Launch, launches
from rnnfast.cell_types import CELLS

LIBRARY = Path(__file__).resolve().parent.parent / "rnnfast" / "_C_cuda.so"

needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="the CUDA library is not built in this tree: make cuda")
needs_cuobjdump = pytest.mark.skipif(
    cuda_tool("cuobjdump") is None or cuda_tool("nvdisasm") is None,
    reason="no cuobjdump or nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)
needs_objects = pytest.mark.skipif(
    not (cuda_resources.BUILD / "_C_cuda.so").exists(),
    reason="no object files of a whole CUDA build in this tree: make cuda",
)

# A minute and a half of cuobjdump, in each process that asks: not for every run, as what ptxas and the loops say is.
disassembles_it_all = pytest.mark.exhaustive

# How the kernels multiply, by the type named in their template arguments. Float32 of the persistent kernels is apart.
TENSOR_CORE_TYPES = {"Float16": "HMMA.16816.F32", "BFloat16": "HMMA.16816.F32.BF16", "Tf32": "HMMA.1688.F32.TF32"}
SCALAR_TYPES = {"Float32": "FFMA", "Float64": "DFMA"}
# Strict float32 of the persistent kernels is three TF32 products of numbers that were split in two.
PERSISTENT_TYPES = {**TENSOR_CORE_TYPES, "Float32": TENSOR_CORE_TYPES["Tf32"]}
# What csrc/cuda/persistent/persistent.h calls kChunkFragments and kRowTiles, and the registers of a fragment.
FRAGMENTS, ROW_TILES, FRAGMENT_REGISTERS = 4, 2, 4


@cache
def machine_code() -> dict[tuple[str, str], Counter[str]]:
    """By (kernel, architecture): how often each opcode stands in the code."""
    code: dict[tuple[str, str], Counter[str]] = {}
    arch, counts = "", Counter[str]()
    for line in run_tool("cuobjdump", "-sass", str(LIBRARY)).splitlines():
        if found := re.search(r"^arch = (\w+)|code for (sm_\w+)", line):
            arch = found[1] or found[2]
        elif found := re.search(r"Function : (\w+)", line):
            counts = code.setdefault((found[1], arch), Counter())
        elif found := re.search(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", line):
            counts[found[1]] += 1
    names = cuda_resources.readable([symbol for symbol, _ in code])
    return {(names[symbol], arch): counts for (symbol, arch), counts in code.items()}


def of_type(name: str, kernel: str) -> bool:
    return re.search(rf"\b{name}\b", kernel) is not None


def persistent_kernels() -> list[tuple[cuda_resources.Kernel, Launch]]:
    """All but those that are a trap on that architecture."""
    known = launches()
    found = [(kernel, known[kernel.kernel]) for kernel in cuda_resources.resources() if kernel.kernel in known]
    return [(kernel, launch) for kernel, launch in found if launch.exchange and launch.has_body(kernel.arch)]


@disassembles_it_all
@needs_library
@needs_cuobjdump
def test_the_library_has_code_for_every_architecture_asked_for() -> None:
    listed = run_tool("cuobjdump", "-lelf", str(LIBRARY))
    built = set(re.findall(r"\.(sm_\w+)\.cubin", listed))
    asked = os.environ.get("RNNFAST_CUDA_ARCHS")
    if asked:
        assert {f"sm_{arch.replace('.', '')}" for arch in re.split(r"[;,\s]+", asked)} <= built
    assert built
    # PTX of an architecture with a letter would run on no other.
    later = any(arch.removeprefix("sm_").isdecimal() for arch in built)
    assert (".ptx" in run_tool("cuobjdump", "-lptx", str(LIBRARY))) == later, "later cards need PTX"
    kernels = {arch: {kernel for kernel, of in machine_code() if of == arch} for arch in built}
    assert len(set(map(frozenset, kernels.values()))) == 1, "an architecture lacks kernels"


@needs_objects
@needs_cuobjdump
def test_kernels_do_not_spill() -> None:
    kernels = cuda_resources.resources()
    assert kernels
    spilling = [kernel for kernel in kernels if kernel.spills or kernel.stack]
    assert not spilling


@needs_objects
@needs_cuobjdump
def test_the_main_loop_on_tensor_cores_is_what_its_tiles_ask_for() -> None:
    """A chunk is two mma for each weight and batch tile, and two 16-byte words a lane of a weight tile, one of a batch
    tile."""
    kernels = cuda_resources.resources()
    of_types = [
        kernel
        for kernel in kernels
        if kernel.kernel.startswith("step_") and any(of_type(name, kernel.kernel) for name in TENSOR_CORE_TYPES)
    ]
    assert of_types
    for kernel in of_types:
        name, arguments = kernel.kernel.rstrip(">").split("<")
        family, tiles = arguments.split(", ")[0], int(arguments.split(", ")[-1])
        gates = next((cell.gates for mode, cell in CELLS.items() if mode.lower().startswith(family)), 1)
        weights = gates if name == "step_forward" else 1
        assert (kernel.hmma, kernel.ldgsts) == (2 * weights * tiles, 2 * weights + tiles), kernel
        assert kernel.ldg == 0, kernel
        assert kernel.occupancy > 0, kernel


@needs_objects
@needs_cuobjdump
def test_two_blocks_of_a_step_kernel_fit_an_sm_of_a_card_that_overlaps_launches() -> None:
    """One of them of the next step, which loads its weights while this one runs."""
    kernels = [k for k in cuda_resources.resources() if k.kernel.startswith("step_") and k.arch == "sm_90a"]
    assert [kernel for kernel in kernels if kernel.blocks < 2] == []


@needs_objects
@needs_cuobjdump
def test_persistent_kernels_are_all_there_and_named_so() -> None:
    built = {(kernel.kernel, kernel.arch) for kernel in cuda_resources.resources()}
    archs = {arch for _, arch in built}
    wanted = {launch.kernel for launch in launches().values() if launch.exchange}
    assert len(wanted) == 16 * len(build.CUDA_FAMILIES) * (len(build.CUDA_ARITHMETICS) - 1)
    assert {(name, arch) for name in wanted for arch in archs} <= built
    assert all("persistent" in name for name in wanted)
    assert {name for name, _ in built if "persistent" in name} - wanted == {"persistent_offsets"}


@needs_objects
@needs_cuobjdump
def test_the_time_loop_multiplies_what_its_layout_asks_for() -> None:
    """A chunk is an mma for each fragment of weights and batch tile, and an ldmatrix for each batch tile. Unrolled are
    the chunks held in registers; a loop of a chunk follows in each of these passes, and another is for the passes
    beyond."""
    assert persistent_kernels()
    for kernel, launch in persistent_kernels():
        passes, chunks = launch.held
        in_loop = passes * chunks + passes + 1
        products = 3 if launch.arithmetic == "Float32" else 1
        assert kernel.matrix == PERSISTENT_TYPES[launch.arithmetic], kernel
        assert (kernel.hmma, kernel.ldsm) == (
            in_loop * FRAGMENTS * launch.tiles * products,
            in_loop * launch.tiles,
        ), kernel
        # What the block keeps on chip is read again in every step, and nothing is copied from elsewhere.
        assert (kernel.bar > 0, kernel.ldgsts) == (True, 0), kernel


@needs_objects
@needs_cuobjdump
def test_persistent_kernels_take_what_the_plan_assumes() -> None:
    """An SM holds one block with all its warps and all the shared memory that a plan may ask for; the held weights and
    the sums that they are added to leave registers for the rest."""
    for kernel, launch in persistent_kernels():
        passes, chunks = launch.held
        held = passes * chunks * FRAGMENTS * FRAGMENT_REGISTERS
        sums = (2 if launch.tiles == 1 else 1) * ROW_TILES * launch.tiles * 4
        assert held >= 64, kernel
        assert held + sums < kernel.registers <= 255, kernel
        # Registers are given out to a warp in pieces of 256, eight a thread.
        assert -(-kernel.registers // 8) * 8 * kernel.threads <= 64 << 10, kernel
        assert (kernel.blocks, kernel.threads) == (1, 256), kernel
        assert (kernel.spills, kernel.stack, kernel.shared) == (0, 0, 0), kernel


@needs_objects
@needs_cuobjdump
def test_a_cluster_kernel_has_no_time_loop_where_there_are_no_clusters() -> None:
    known = launches()
    traps = [
        kernel
        for kernel in cuda_resources.resources()
        if kernel.kernel in known and not known[kernel.kernel].has_body(kernel.arch)
    ]
    assert all((kernel.loop, kernel.hmma, kernel.matrix) == (0, 0, "") for kernel in traps)
    assert all("cluster" in kernel.kernel and kernel.arch < "sm_90" for kernel in traps)


@needs_library
@needs_objects
def test_the_library_is_small_enough() -> None:
    """For the architectures of `make cuda`, or one of them, compressed as from nvcc 13.0 on."""
    megabytes = {"8.0": 20, "9.0a": 20}
    if not megabytes.keys() >= set(build.built_archs()):
        pytest.skip(f"the library is built for {', '.join(build.built_archs())}")
    if "--compress-mode=size" not in (cuda_resources.BUILD / "build.ninja").read_text():
        pytest.skip("its machine code is compressed less well: by an nvcc before 13.0, or in an earlier build")
    assert (cuda_resources.BUILD / "_C_cuda.so").stat().st_size <= 10**6 * sum(
        map(megabytes.__getitem__, build.built_archs())
    )


@disassembles_it_all
@needs_library
@needs_cuobjdump
def test_kernels_use_no_local_memory() -> None:
    local = {
        where: [opcode for opcode in counts if re.match(r"(LDL|STL)\b", opcode)]
        for where, counts in machine_code().items()
    }
    assert not {where: opcodes for where, opcodes in local.items() if opcodes}


@disassembles_it_all
@needs_library
@needs_cuobjdump
@pytest.mark.parametrize("name", [*TENSOR_CORE_TYPES, *SCALAR_TYPES])
def test_products_run_where_they_should(name: str) -> None:
    """16-bit and TF32 kernels on tensor cores; float32 and float64 kernels nowhere near them, because they round, but
    for persistent kernels of float32, which multiply in parts. A library multiplies for the split kernels and those of
    layers with options."""
    known = launches()
    kernels = {where: counts for where, counts in machine_code().items() if of_type(name, where[0])}
    assert kernels
    for where, counts in kernels.items():
        matrix = {opcode for opcode in counts if re.match(r"(UTC)?[A-Z]G?MMA\b", opcode)}
        if where[0].startswith(("split_", "variant_")):
            assert not matrix, where
        elif known[where[0]].exchange:
            if known[where[0]].has_body(where[1]):
                assert matrix == {PERSISTENT_TYPES[name]}, (where, matrix)
        elif name in TENSOR_CORE_TYPES:
            assert any(opcode.startswith(TENSOR_CORE_TYPES[name]) for opcode in matrix), (where, matrix)
            assert name != "Float16" or not any("BF16" in opcode for opcode in matrix), (where, matrix)
        else:
            assert not matrix, where
            assert any(opcode.startswith(SCALAR_TYPES[name]) for opcode in counts), where


@disassembles_it_all
@needs_library
@needs_cuobjdump
def test_kernels_that_wait_for_other_blocks_give_up_in_the_end() -> None:
    """A block that is not running must not hang the card: both polls, for tags and for flags, end in an assertion, the
    one call of a function that these kernels have."""
    kernels = {where: counts for where, counts in machine_code().items() if re.search(r"persistent_.*grid", where[0])}
    assert kernels
    assert {where: counts["CALL.ABS.NOINC"] for where, counts in kernels.items() if counts["CALL.ABS.NOINC"] != 2} == {}


@needs_library
def test_the_library_needs_nothing_of_cuda_to_load() -> None:
    """Static runtime, and no symbol of libtorch_cuda: a torch for the CPU has neither."""
    if shutil.which("readelf") is None:
        pytest.skip("no readelf")
    listed = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", listed)
    assert "libtorch_cpu.so" in needed
    assert not [name for name in needed if re.search(r"cuda|cudart|python", name)]


@needs_library
def test_without_a_card_the_library_loads_and_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    code = """
import torch, rnnfast
from rnnfast import libraries
assert libraries.cuda_error is None, libraries.cuda_error
cuda = rnnfast.backends()["cuda"]
assert not cuda.available
print(cuda.reason)
try:
    with rnnfast.backend("cuda"):
        rnnfast.LSTM(3, 4)(torch.zeros(2, 1, 3))
except RuntimeError as error:
    print(error)
rnnfast.LSTM(3, 4)(torch.zeros(2, 1, 3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no CUDA device" in done.stdout
    assert "rnnfast.backend: 'cuda' is not available: no CUDA device" in done.stdout


# ---- setup.py: what it does with the nvcc that it finds --------------------------------------------------------------


def fake_nvcc(folder: Path, release: str = "13.0", codes: str = "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120") -> str:
    """An nvcc that answers questions and fails to compile."""
    nvcc = folder / "nvcc"
    listed = codes.replace(" ", "\n")
    nvcc.write_text(
        f"#!/bin/sh\ncase $1 in\n--version) echo 'Cuda compilation tools, release {release}, V{release}.1' ;;\n"
        f"--list-gpu-code) echo '{listed}' ;;\n*) echo 'error: broken kernel' >&2; exit 2 ;;\nesac\n"
    )
    nvcc.chmod(0o755)
    return str(nvcc)


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment in which no variable that setup.py reads is set."""
    for name in "RNNFAST_CUDA RNNFAST_CUDA_ARCHS CUDA_HOME CUDA_PATH NVCC_CCBIN NVCC_THREADS CXX MAX_JOBS".split():
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_the_default_architectures_and_those_asked_for(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path)
    assert build.cuda_archs(nvcc) == ["8.0", "8.6", "8.9", "9.0a", "10.0a", "12.0"]
    for asked in ["8.0;9.0a", "8.0 9.0a", "8.0, 9.0a;", "8.0;9.0a;8.0"]:
        environment.setenv("RNNFAST_CUDA_ARCHS", asked)
        assert build.cuda_archs(nvcc) == ["8.0", "9.0a"]


def test_code_for_each_architecture_and_ptx_that_later_cards_run() -> None:
    flags = build.code_flags(["8.0", "9.0a"])
    assert flags[1::2] == [
        "arch=compute_80,code=sm_80",
        "arch=compute_90a,code=sm_90a",
        "arch=compute_80,code=compute_80",
    ]
    assert build.code_flags(["9.0a"])[1::2] == ["arch=compute_90a,code=sm_90a"]


@pytest.mark.parametrize("asked", ["80", "sm_80", "8.0;ninety", "7.5"])
def test_an_architecture_that_makes_no_sense(asked: str, tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("RNNFAST_CUDA_ARCHS", asked)
    with pytest.raises(SystemExit, match=r"RNNFAST_CUDA_ARCHS: '?(80|sm_80|ninety|7\.5)"):
        build.cuda_archs(fake_nvcc(tmp_path))


def test_an_nvcc_that_does_not_know_an_architecture(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    nvcc = fake_nvcc(tmp_path, "12.4", "sm_80 sm_86 sm_89 sm_90")
    with pytest.raises(SystemExit, match=r"12\.4.*10\.0a, 12\.0: set RNNFAST_CUDA_ARCHS='8\.0;8\.6;8\.9;9\.0a'"):
        build.cuda_archs(nvcc)
    with pytest.raises(SystemExit, match=r"nvcc 11\.8 .* is too old"):
        build.cuda_archs(fake_nvcc(tmp_path, "11.8"))


def test_an_nvcc_that_does_not_run(tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'no libcudafe' >&2\nexit 1\n")
    nvcc.chmod(0o755)
    with pytest.raises(SystemExit, match=r"fails: no libcudafe\nRNNFAST_CUDA=0 builds without"):
        build.cuda_archs(str(nvcc))


def test_a_missing_host_compiler(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("NVCC_CCBIN", "/nowhere/g++")
    with pytest.raises(SystemExit, match=r"host compiler '/nowhere/g\+\+' was not found.*NVCC_CCBIN"):
        build.host_compiler()


def test_a_compile_error_stops_the_build(
    tmp_path: Path, environment: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    environment.setattr(build, "CUDA_BUILD", tmp_path / "build")
    environment.setattr(build, "CUDA_UNITS", tmp_path / "units")
    with pytest.raises(SystemExit, match="did not compile; nvcc's message is above"):
        build.build_cuda(fake_nvcc(tmp_path))
    assert "error: broken kernel" in capfd.readouterr().out


def test_a_unit_for_every_family_and_arithmetic(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    environment.setattr(build, "CUDA_UNITS", tmp_path)
    units = build.cuda_sources()
    families = re.search(r"enum class Family \{ (.*) \}", (build.CSRC / "cells.h").read_text())
    assert families
    assert families[1].split(", ") == build.CUDA_FAMILIES
    types = re.findall(r"^struct (\w+) \{", (build.CSRC / "cuda/arithmetic.cuh").read_text(), re.MULTILINE)
    assert types == build.CUDA_ARITHMETICS
    texts = {unit: unit.read_text() for unit in units if unit.parent == tmp_path}
    # Of the persistent kernels none for float64; of the split ones TF32 is float32, and so of those of layers with
    # options, which the MGU does not have.
    of_layers, with_options = len(build.CUDA_FAMILIES) * (3 * len(types) - 2), (len(build.CUDA_FAMILIES) - 1) * 4
    assert len(set(texts.values())) == len(texts) == of_layers + with_options
    assert not any("PersistentInstance" in text and "Float64" in text for text in texts.values())
    assert not any("SplitInstance" in text and "Tf32" in text for text in texts.values())
    assert not any("VariantInstance" in text and ("mgu" in text or "Tf32" in text) for text in texts.values())


def test_units_are_written_where_they_change(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    """What has the same text keeps its time, so that nothing is compiled again."""
    environment.setattr(build, "CUDA_UNITS", tmp_path)
    same, other = [unit for unit in build.cuda_sources() if unit.parent == tmp_path][:2]
    text = other.read_text()
    other.write_text("")
    for unit in [same, other]:
        os.utime(unit, (0, 0))
    build.cuda_sources()
    assert same.stat().st_mtime == 0
    assert other.stat().st_mtime > 0
    assert other.read_text() == text
    assert set(tmp_path.iterdir()) == {unit for unit in build.cuda_sources() if unit.parent == tmp_path}


def test_where_nvcc_is_looked_for(tmp_path: Path, environment: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    nvcc = fake_nvcc(tmp_path / "bin")
    environment.setenv("CUDA_HOME", str(tmp_path))
    assert build.find_nvcc() == nvcc
    assert build.libraries() == ["rnnfast._C_cpu", "rnnfast._C_cuda"]
    environment.setenv("RNNFAST_CUDA", "0")
    assert build.find_nvcc() is None
    assert build.libraries() == ["rnnfast._C_cpu"]
    environment.setenv("RNNFAST_CUDA", "maybe")
    with pytest.raises(SystemExit, match="RNNFAST_CUDA=maybe: expected 0"):
        build.find_nvcc()
    environment.delenv("RNNFAST_CUDA")
    environment.setenv("CUDA_HOME", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="no bin/nvcc"):
        build.find_nvcc()

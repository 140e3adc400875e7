"""What tells of CUDA kernels without a card: SASS taken apart, occupancy, tables of two builds; and what the commands
say of bad input.
"""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("rich", reason="benchmarks/sass.py prints with rich: pip install rnnfast[bench]")

import cuda_resources
import machine_code
import sass
import setup as build
from cuda_tools import cuda_tool
from launches import Occupancy, launches, most_dynamic, occupancies

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# As nvdisasm -c -g prints it, shortened: a loop (0020 to 00a0) in another (0010 to 00b8), which a CALL leaves, a
# slow way (0100) that the compiler has put behind the end and that jumps back into the loop, and another loop (00c0).
LISTING = """
	.target	sm_90a
//--------------------- .text._Z6kernelv --------------------------
	.section	.text._Z6kernelv,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=32"
	.align	128
_Z6kernelv:
.text._Z6kernelv:
	//## File "/src/kernel.cuh", line 3
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_40:
	//## File "/src/kernel.cuh", line 5
        /*0010*/                   IMAD.MOV.U32 R4, RZ, RZ, R1 ;
.L_x_41:
	//## File "/src/kernel.cuh", line 7
        /*0020*/                   BSSY B0, `(.L_x_42) ;
        /*0030*/              @!P1 BRA `(.L_x_43) ;
        /*0040*/              @!PT LDS RZ, [RZ] ;
        /*0050*/                   LDGSTS.E.BYPASS.128 [R87], desc[UR10][R84.64] ;
        /*0058*/                   IADD3 R84, P1, R84, 0x10, RZ ;
.L_x_44:
        /*0060*/                   BSYNC B0 ;
.L_x_42:
	//## File "/src/other.h", line 9
        /*0070*/                   LDS.128 R8, [R4] ;
        /*0080*/                   HMMA.16816.F32.BF16 R80, R108, R92, R80 ;
        /*0090*/                   HMMA.16816.F32.BF16 R84, R108, R94, R84 ;
        /*00a0*/               @P0 BRA `(.L_x_41) ;
        /*00b0*/               @P2 CALL.REL.NOINC `(.L_x_46) ;
        /*00b8*/                   BRA `(.L_x_40) ;
.L_x_46:
        /*00c0*/                   MUFU.EX2 R0, R1 ;
        /*00c8*/               @P3 BRA `(.L_x_46) ;
        /*00d0*/                   EXIT ;
.L_x_43:
	//## File "/src/kernel.cuh", line 8
        /*0100*/                   LDG.E.U16 R5, desc[UR10][R90.64] ;
        /*0120*/                   BRA `(.L_x_44) ;
.L_x_45:
        /*0130*/                   BRA `(.L_x_45) ;
        /*0140*/                   NOP ;
"""


# The inner loop by the way with the asynchronous copy.
COPYING = [0x20, 0x30, 0x40, 0x50, 0x58, 0x60, 0x70, 0x80, 0x90, 0xA0]


@pytest.fixture
def kernel() -> machine_code.Function:
    return machine_code.functions(LISTING)["_Z6kernelv"]


# ---- machine_code ----------------------------------------------------------------------------------------------------


def test_instructions_have_their_lines_and_kinds(kernel: machine_code.Function) -> None:
    assert len(kernel.instructions) == 21
    copy = kernel.instructions[5]
    assert (copy.address, copy.mnemonic, copy.file, copy.line) == (0x50, "LDGSTS", "/src/kernel.cuh", 7)
    counts = machine_code.counts(kernel.instructions)
    # The LDS under @!PT is never carried out.
    assert (counts["LDS"], counts["HMMA"], counts["LDGSTS"], counts["LDG"], counts["MUFU"]) == (1, 2, 1, 1, 1)
    assert counts["branches"] == 8
    assert sum(counts.values()) == 21


def test_loops_are_found_and_code_moved_behind_the_end_is_none(kernel: machine_code.Function) -> None:
    outer, inner, last = kernel.loops
    assert (outer.first, outer.depth, outer.innermost, outer.iteration) == (0x10, 1, False, ())
    assert (inner.first, inner.depth, inner.innermost) == (0x20, 2, True)
    # The slow way at 0100 is in the body. The endless loop that the assembler puts behind every kernel is not reached.
    assert [i.address for i in inner.instructions] == [*COPYING, 0x100, 0x120]
    assert ([i.address for i in last.iteration], last.depth) == ([0xC0, 0xC8], 1)
    assert kernel.main_loop() is inner


def test_an_iteration_is_the_way_with_the_copies(kernel: machine_code.Function) -> None:
    """Though the slow one is shorter here."""
    loop = kernel.main_loop()
    assert loop is not None
    assert [i.address for i in loop.iteration] == COPYING
    counts = machine_code.counts(loop.iteration)
    assert (counts["HMMA"], counts["LDGSTS"], counts["LDG"]) == (2, 1, 0)


@pytest.mark.parametrize(("copies", "main"), [((0, 1), 1), ((1, 0), 0), ((2, 1), 1), ((1, 2), 0)])
def test_of_loops_with_as_many_products_the_main_one_copies_in_few_instructions(
    copies: tuple[int, int], main: int
) -> None:
    """The other multiplies vectors that start anywhere."""
    lines = [".section\t.text._Z1kv"]
    for n, count in enumerate(copies):
        of_loop = ["LDGSTS.E.BYPASS.128 [R87], desc[UR10][R84.64]"] * count or ["LDG.E.U16 R5, desc[UR10][R90.64]"]
        of_loop += ["HMMA.16816.F32.BF16 R80, R108, R92, R80", f"@P0 BRA `(.L_x_{n})"]
        lines += [f".L_x_{n}:", *(f"/*{256 * n + 16 * i:04x}*/ {text} ;" for i, text in enumerate(of_loop))]
    text = "\n".join(line if line.startswith(".L") else "\t" + line for line in [*lines, "/*0300*/ EXIT ;"])
    found = machine_code.functions(text + "\n")["_Z1kv"]
    assert [loop.products() for loop in found.loops] == [1, 1]
    assert found.main_loop() is found.loops[main]


def test_a_time_loop_is_found_with_its_longest_way() -> None:
    """The outermost with products and a barrier: each loop inside once, here by the longer of its two ways."""
    barrier = "BAR.SYNC.DEFER_BLOCKING 0x0"
    kernel = machine_code.functions(LISTING.replace("IMAD.MOV.U32 R4, RZ, RZ, R1", barrier))["_Z6kernelv"]
    outer, inner, last = kernel.loops
    assert kernel.main_loop() is kernel.time_loop() is outer
    assert (outer.is_time, inner.is_time, last.is_time) == (True, False, False)
    assert [i.address for i in outer.iteration] == [0x10, *COPYING, 0xB0, 0xB8]
    assert (outer.has(inner), outer.has(last), outer.has(outer)) == (True, False, False)
    # Without a barrier there is none, nor where no loop is inside.
    assert machine_code.functions(LISTING)["_Z6kernelv"].time_loop() is None
    alone = LISTING.replace("BRA `(.L_x_40)", "IMAD").replace("IADD3 R84, P1, R84, 0x10, RZ", barrier)
    assert machine_code.functions(alone)["_Z6kernelv"].time_loop() is None


def test_the_table_of_a_time_loop_goes_by_sections(tmp_path: Path) -> None:
    """By the headings above the kernel's own line, where the rest was inlined."""
    source = tmp_path / "kernel.cuh"
    source.write_text(
        "\nfor (;;) {\n  // ---- while others travel: the gates ----\n  a();\n  // ---- product ----\n  b();\n"
    )
    chain = f'''	//## File "/src/other.h", line 9 inlined at "/src/more.h", line 4
	//## File "/src/more.h", line 4 inlined at "{source}", line 6
	//## File "{source}", line 6
'''
    text = LISTING.replace("IMAD.MOV.U32 R4, RZ, RZ, R1", "BAR.SYNC.DEFER_BLOCKING 0x0")
    text = text.replace('	//## File "/src/other.h", line 9\n', chain).replace(
        '/src/kernel.cuh", line 7', f'{source}", line 4'
    )
    kernel = machine_code.functions(text)["_Z6kernelv"]
    product = next(i for i in kernel.instructions if i.mnemonic == "HMMA")
    assert (product.file, product.line, product.place) == ("/src/other.h", 9, (str(source), 6))
    assert product.opcode == "HMMA.16816.F32.BF16"
    time_loop = kernel.time_loop()
    assert time_loop is not None
    table = sass.time_table(kernel, time_loop)
    assert list(table.columns[0].cells) == [
        "kernel",
        "loop 1 body",
        "iteration 1",
        "  elsewhere",
        "  while others travel",
        "  product",
        "iteration 2, while others travel",
    ]
    assert list(table.columns[-1].cells) == ["21", "15", "13", "1", "6", "6", "10"]


def test_a_kernel_without_loop_or_code() -> None:
    text = LISTING.replace("@P0 BRA", "@P0 IMAD").replace("@P3 BRA", "@P3 IMAD").replace("BRA `(.L_x_40)", "IMAD")
    straight = machine_code.functions(text)["_Z6kernelv"]
    assert straight.loops == []
    assert straight.main_loop() is None
    assert machine_code.functions("\t.target sm_80\n") == {}
    assert machine_code.Function("empty").loops == []


def test_names_are_short() -> None:
    name = "void rnnfast::gpu::step_forward<(rnnfast::Family)1, rnnfast::gpu::Tf32, 4>(rnnfast::gpu::StepForward)"
    assert machine_code.short_name(name) == "step_forward<gru, Tf32, 4>"
    assert machine_code.short_name("rnnfast::gpu::(anonymous namespace)::probe()") == "probe"
    name = (
        "void rnnfast::gpu::persistent_forward<(rnnfast::Family)0, rnnfast::gpu::Tf32, (rnnfast::gpu::Exchange)2, 4>()"
    )
    assert machine_code.short_name(name) == "persistent_forward<lstm, Tf32, grid, 4>"
    exchanges = re.search(r"enum class Exchange \{ (.*) \}", (build.CSRC / "cuda/persistent/persistent.h").read_text())
    assert exchanges
    assert exchanges[1].split(", ") == machine_code.EXCHANGES


# ---- launches and occupancy ------------------------------------------------------------------------------------------


def test_every_unit_has_launches() -> None:
    found = launches()
    assert {launch.unit for launch in found.values()} == {
        source.stem for source in build.cuda_sources() if source.parent == build.CUDA_UNITS
    }
    # Two sizes of batch; forward, backward, and of the LSTM the two of a projection.
    for family in build.CUDA_FAMILIES:
        for arithmetic in build.CUDA_ARITHMETICS:
            of_unit = [
                launch for launch in found.values() if launch.unit == build.cuda_unit("step", family, arithmetic)
            ]
            assert len(of_unit) == (8 if family == "lstm" else 4)
            assert all((launch.family, launch.arithmetic) == (family, arithmetic) for launch in of_unit)
            assert not any(launch.exchange or launch.dynamic is None for launch in of_unit)
    # Forward and backward, of a block with 1 and 2 tiles, of a cluster and the grid with 4 too.
    unit = [launch for launch in found.values() if launch.unit == "persistent_gru_tf32"]
    tiles = [("block", 1), ("block", 2), *((exchange, n) for exchange in ("cluster", "grid") for n in (1, 2, 4))]
    assert [(launch.exchange, launch.tiles) for launch in unit] == 2 * tiles
    assert not any(launch.unit == "persistent_gru_float64" for launch in found.values())


def test_a_persistent_launch_has_the_most_that_a_plan_may_choose() -> None:
    launch = launches()["persistent_backward<lstm, Float32, cluster, 4>"]
    assert (launch.threads, launch.dynamic, launch.held) == (256, None, (1, 5))
    assert [launch.has_body(arch) for arch in ("sm_80", "sm_89", "sm_90a", "sm_120")] == [False, False, True, True]
    assert all(launches()["persistent_forward<rnn, Tf32, grid, 1>"].has_body(arch) for arch in ("sm_80", "sm_90a"))
    # By the data sheets: what an SM has but 1 KB.
    known = {arch: most_dynamic(arch) >> 10 for arch in ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")}
    assert known == {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90a": 227, "sm_100a": 227, "sm_120": 99}
    # An SM can hold a block with all of it, and not with more.
    for arch, kilobytes in known.items():
        one, none = occupancies([(arch, 256, 255, 0, (kilobytes + more) << 10) for more in (0, 1)])
        assert (one.blocks, none.blocks) == (1, 0)
    with pytest.raises(SystemExit, match=r"sm_87: .*costs\.h has no card of this architecture"):
        most_dynamic("sm_87")


def test_a_launch_has_the_sizes_of_the_kernels_own_code() -> None:
    """By hand from product.cuh: 4 warps; partial sums 4 * 32 * (64 + 4) floats; two chunks of (8 + 4) * 32 words."""
    launch = launches()["step_forward<lstm, BFloat16, 4>"]
    assert (launch.threads, launch.dynamic) == (128, 4 * 32 * 68 * 4 + 2 * 4 * 12 * 32 * 16)


@pytest.mark.parametrize(
    ("arch", "blocks", "large", "small", "warps"),
    [
        ("sm_80", 3, 2, 32, 64),
        ("sm_86", 1, 1, 16, 48),
        ("sm_89", 1, 1, 24, 48),
        ("sm_90a", 4, 2, 32, 64),
        ("sm_100a", 4, 2, 32, 64),
        ("sm_120", 1, 1, 24, 48),
    ],
)
def test_what_an_sm_holds(arch: str, blocks: int, large: int, small: int, warps: int) -> None:
    """By hand from the table of the CUDA Programming Guide: an SM has 164, 100 or 228 KB of shared memory, of which a
    block takes one more than it asks for; 2048 or 1536 threads; 32, 16 or 24 blocks; 65536 registers, 256 at a time."""
    found = occupancies(
        [
            (arch, 128, 32, 0, 50 << 10),  # 51 KB a block
            (arch, 1024, 32, 0, 0),
            (arch, 32, 16, 0, 0),
            (arch, 256, 129, 0, 0),  # 129 registers are given out as 136: 34816 a block
        ]
    )
    assert found[0] == Occupancy(blocks, round(100 * 4 * blocks / warps), "shared memory")
    assert (found[1].blocks, found[1].percent) == (large, round(100 * 32 * large / warps))
    assert "threads" in found[1].limited_by
    assert found[2] == Occupancy(small, round(100 * small / warps), "blocks")
    assert found[3] == Occupancy(1, round(100 * 8 / warps), "registers")


def test_a_block_that_no_sm_can_hold() -> None:
    (found,) = occupancies([("sm_86", 128, 32, 0, 100 << 10)])
    assert found == Occupancy(0, 0, "shared memory")


def test_an_architecture_without_limits() -> None:
    with pytest.raises(SystemExit, match=r"sm_87: .*occupancy\.cpp has no limits of this architecture"):
        occupancies([("sm_90", 128, 32, 0, 0), ("sm_87", 128, 32, 0, 0)])


def test_a_kernel_that_is_not_in_the_launch_code_is_named() -> None:
    mangled = "_ZN7rnnfast3gpu8step_newILNS_6FamilyE0ENS0_4Tf32ELi1EEEvNS0_11StepForwardE"
    with pytest.raises(SystemExit, match=r"step_new<lstm, Tf32, 1>: .*occupancy\.cpp does not print this kernel"):
        cuda_resources.launched([a_kernel(mangled)])


# ---- tables of two builds --------------------------------------------------------------------------------------------


def a_kernel(name: str, arch: str = "sm_90a", registers: int = 100, **others: int) -> cuda_resources.Kernel:
    """Of 256 threads, two blocks an SM."""
    return cuda_resources.Kernel(
        name, arch, registers, 0, 0, 0, 1024, 256, 2, 25, "registers", bytes=4096, seconds=1.0
    )._replace(**others)


def written(path: Path, kernels: list[cuda_resources.Kernel]) -> dict[tuple[str, str], dict[str, str]]:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([cuda_resources.Kernel._fields, *kernels])
    return cuda_resources.read_table(path)


def test_changes_between_two_builds(tmp_path: Path) -> None:
    same, changed, gone = a_kernel("same"), a_kernel("changed"), a_kernel("gone")
    before = written(tmp_path / "before.csv", [same, changed, gone])
    assert cuda_resources.changes(before, [same, changed, gone]) == []
    assert cuda_resources.changes(before, [same._replace(seconds=9.0), changed, gone]) == [], "time is no change"
    now = [same, changed._replace(registers=120, occupancy=12, lds=48), a_kernel("new", spills=8)]
    assert cuda_resources.changes(before, now) == [
        "sm_90a changed: registers 100 -> 120, occupancy 25 -> 12, lds 0 -> 48",
        "sm_90a gone: gone",
        "sm_90a new: new, 100 registers, 8 bytes of spills",
    ]


def test_other_architectures_are_said_once(tmp_path: Path) -> None:
    before = written(tmp_path / "before.csv", [a_kernel("one"), a_kernel("two"), a_kernel("one", "sm_80")])
    now = [a_kernel("one"), a_kernel("two"), a_kernel("one", "sm_120"), a_kernel("two", "sm_120")]
    assert cuda_resources.changes(before, now) == [
        "sm_120: built for it now, not before",
        "sm_80: built for it before, not now",
    ]


def test_a_table_of_fewer_columns_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    old = tmp_path / "old.csv"
    old.write_text("kernel,arch,registers,spills,stack,shared,bytes,seconds\nk,sm_90a,90,0,0,0,4096,1.0\n")
    assert cuda_resources.changes(cuda_resources.read_table(old), [a_kernel("k")]) == ["sm_90a k: registers 90 -> 100"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file or directory"),
        (b"\x00\xff\x90", "is no CSV file"),
        (b"name,value\na,1\n", "is no table of cuda_resources.py: it has no column arch, bytes, kernel, registers"),
        (b"", "it has no column"),
    ],
)
def test_a_table_that_is_none(content: bytes | None, message: str, tmp_path: Path) -> None:
    old = tmp_path / "old.csv"
    if content is not None:
        old.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(old)) + f".*{message}"):
        cuda_resources.read_table(old)


# ---- the commands ----------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Call:
    """Calls a module's main() with arguments, in a tree without a CUDA build: (status, stdout, stderr)."""
    (tmp_path / "cuda").mkdir()
    monkeypatch.setattr(build, "CUDA_BUILD", tmp_path / "cuda")
    monkeypatch.setattr(cuda_resources, "BUILD", tmp_path / "cuda")
    monkeypatch.setattr(sass, "PARTS", tmp_path / "parts")
    monkeypatch.setattr(cuda_resources, "PARTS", tmp_path / "parts")

    def called(module: object, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        status = 0
        try:
            module.main()  # type: ignore[attr-defined]
        except SystemExit as error:
            status = error.code if isinstance(error.code, int) else 1
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return called


def an_nvcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """One that notes each file it is asked to compile and fails; its notes."""
    notes = folder / "notes"
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\ncase $1 in\n--version) echo 'release 13.0, V13.0.1' ;;\n--list-gpu-code) echo sm_80 sm_90 ;;\n"
        f'*) echo "$@" >> {notes}; echo "error: broken kernel"; exit 2 ;;\nesac\n'
    )
    nvcc.chmod(0o755)
    for name in ("RNNFAST_CUDA", "RNNFAST_CUDA_ARCHS", "NVCC_CCBIN", "CXX", "MAX_JOBS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(folder))
    return notes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["step_sideways"],
            "KERNEL: no kernel has 'step_sideways' in its name; expected a regular expression for names",
        ),
        (["step_project", "--cell", "gru"], "KERNEL: no kernel of gru has 'step_project' in its name"),
        (["step_("], r"KERNEL: 'step_(' is no regular expression: missing )"),
        (["step_forward", "--cell", "cnn"], "argument --cell: invalid choice: 'cnn'"),
        (
            ["step_forward", "--arch", "9.9"],
            r"ARCH: expected a compute capability that .*nvcc compiles for \(8.0, 9.0\)",
        ),
        (["step_forward", "--arch", "sm_90"], "got 'sm_90'"),
        (["step_forward", "--arch", "9.0;8.0"], "got '9.0;8.0'"),
    ],
)
def test_what_sass_does_not_know(
    arguments: list[str], message: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    an_nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(sass, "cuda_tool", lambda name: name)
    status, out, err = call(sass, *arguments)
    assert (status, out) == (2, "")
    assert re.search(message if "\\(" in message else re.escape(message), err), err


@pytest.mark.parametrize("tool", ["cuobjdump", "nvdisasm"])
def test_sass_without_a_tool(tool: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "cuda_tool", lambda name: None if name == tool else name)
    assert call(sass, "step_forward")[0] == 2
    status, _, err = call(sass, "step_forward")
    assert (status, f"{tool} was not found: pip install" in err) == (2, True)


def test_sass_without_nvcc(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sass, "cuda_tool", lambda name: name)
    monkeypatch.setenv("RNNFAST_CUDA", "0")
    status, _, err = call(sass, "step_forward", "--cell", "lstm", "--type", "tf32")
    assert (status, "no nvcc to compile for 9.0a" in err) == (2, True)


def test_sass_lists_where_many_kernels_match(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And compiles none of their units."""
    notes = an_nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(sass, "cuda_tool", lambda name: name)
    status, out, err = call(sass, "step_forward", "--arch", "9.0a")
    assert status == 2
    assert "40 kernels match 'step_forward': name one, narrow with --cell and --type" in err
    listed = [line.split("  ")[0] for line in out.splitlines()[1:]]
    assert listed == [name for name in launches() if name.startswith("step_forward<")]
    assert not notes.exists()


def test_sass_compiles_one_unit_for_one_architecture(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = an_nvcc(tmp_path, monkeypatch)
    monkeypatch.setattr(sass, "cuda_tool", lambda name: name)
    status, out, err = call(sass, "step_backward<gru, Tf32, 4>", "--arch", "8.0")
    assert status == 1
    assert "compiling for 8.0: step_gru_tf32" in err
    assert "broken kernel" in out
    (compiled,) = notes.read_text().splitlines()
    assert "step_gru_tf32.cu" in compiled
    assert re.findall(r"arch=\S+", compiled) == ["arch=compute_80,code=sm_80", "arch=compute_80,code=compute_80"]


def test_one_unit_is_compiled_as_the_whole_library_is(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes = an_nvcc(tmp_path, monkeypatch)
    monkeypatch.setenv("RNNFAST_CUDA_ARCHS", "8.0;9.0a")
    status, out, _ = call(cuda_resources, "--unit", "step_gru_tf32")
    assert (status, "broken kernel" in out) == (1, True)
    (alone,) = notes.read_text().splitlines()
    notes.unlink()
    monkeypatch.setenv("MAX_JOBS", "1")
    with pytest.raises(SystemExit):
        build.build_cuda(build.find_nvcc() or "")
    assert (tmp_path / "cuda/build.ninja").read_text().count(": nvcc ") == len(build.cuda_sources())
    file = (tmp_path / "cuda/build.ninja").read_text()
    (flags,) = re.findall(r"step_gru_tf32\.o: nvcc .*\n  flags = (.*)", file)
    assert flags in alone


@pytest.mark.parametrize(
    ("release", "flags"),
    [("12.9", ["-Xfatbin", "-compress-all"]), ("13.0", ["--compress-mode=size"]), ("14.1", ["--compress-mode=size"])],
)
def test_code_is_compressed_as_far_as_nvcc_and_its_drivers_can(release: str, flags: list[str], tmp_path: Path) -> None:
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    nvcc.chmod(0o755)
    assert build.compression_flags(str(nvcc)) == flags


def test_a_unit_that_there_is_none_of(call: Call) -> None:
    status, out, err = call(cuda_resources, "--unit", "step_cnn_tf32")
    assert (status, out) == (2, "")
    assert "--unit: no compile unit is called 'step_cnn_tf32'; there are: device, persistent_call, " in err


def test_resources_without_a_build(call: Call) -> None:
    status, _, err = call(cuda_resources)
    assert (status, "the CUDA library is not built: `make cuda` builds it" in err) == (2, True)
    (build.CUDA_BUILD / "build.ninja").write_text(f"build {build.CUDA_BUILD}/step_gru_tf32.o: nvcc step_gru_tf32.cu\n")
    (build.CUDA_BUILD / ".ninja_log").write_text("# ninja log v5\n")
    with pytest.raises(SystemExit, match="1 of 1 units are not built, step_gru_tf32 first: make cuda"):
        cuda_resources.resources(build.CUDA_BUILD)
    status, _, err = call(cuda_resources, "--before", "/nowhere/old.csv")
    assert (status, "--before: /nowhere/old.csv: No such file" in err) == (2, True)


def test_a_listing_is_of_the_kernel_alone(kernel: machine_code.Function) -> None:
    """Labels counted from 0, loops beside the addresses, a line where the source line changes."""
    text = "\n".join(sass.listing(kernel))
    assert "L_x_" not in text
    assert text.splitlines()[:6] == [
        "    ; kernel.cuh:3",
        "     0         LDC R1, c[0x0][0x28]",
        "L0:",
        "    ; kernel.cuh:5",
        "    10 loop 1  IMAD.MOV.U32 R4, RZ, RZ, R1",
        "L1:",
    ]
    assert "    a0 loop 2  @P0 BRA L1" in text
    moved = LISTING.replace("L_x_4", "L_x_9")
    assert "\n".join(sass.listing(machine_code.functions(moved)["_Z6kernelv"])) == text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
@pytest.mark.skipif(
    cuda_tool("cuobjdump") is None or cuda_tool("nvdisasm") is None,
    reason="no cuobjdump or nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm",
)
def test_sass_of_a_kernel() -> None:
    """From the source to the tables; what is compiled once is there the next time."""
    command = [sys.executable, BENCHMARKS / "sass.py", "step_backward<rnn, BFloat16, 4>", "--arch", "9.0a"]
    environment = {**os.environ, "RNNFAST_CUDA": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("step_backward<rnn, BFloat16, 4> for sm_90a: ")
    # One gate of four tiles of batch indices, k16 at a time: eight mma a chunk, whose operands are six 16-byte words.
    rows = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line[:1].isupper()}
    assert (rows["HMMA"][-1], rows["LDGSTS"][-1], rows["LDS"][-1], rows["LDG"][-1]) == ("8", "6", "6", "0")
    assert re.search(r"^    ; csrc/cuda/product\.cuh:\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"^ +[0-9a-f]+ loop \d  HMMA\.16816\.F32\.BF16 ", done.stdout, re.MULTILINE)
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (again.stdout, again.stderr) == (done.stdout, "")

"""The bench on which a kernel is written: `make kernel-test` and `make debug`, what a failure, a race and a mistyped
name say, and how little of it a build needs. docs/kernels.md shows all of it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import build_emulated
import kernel_test
import sanitizer_report
from build_emulated import ROOT, instance_of

EMULATOR = ROOT / "csrc/emulator"
TEMPLATE = ROOT / "tests/cpp/template.cpp"
# Nothing here takes longer, compilation included.
SECONDS = 300


def line_of(text: str, path: Path = TEMPLATE) -> int:
    """The line of a file on which a text stands for the first time."""
    return path.read_text()[: path.read_text().index(text)].count("\n") + 1


BARRIER = f"template.cpp:{line_of('sync_threads();')}"


def bench(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """tests/kernel_test.py with these arguments."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tests/kernel_test.py"), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SECONDS,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture(scope="module", autouse=True)
def compiler() -> None:
    try:
        build_emulated.cxx_compiler()
        build_emulated.Ninja.program()
    except SystemExit as error:
        pytest.skip(str(error))


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_failure_says_where_what_and_how_to_have_it_again() -> None:
    done = bench("template", "sums", "--skip", BARRIER)
    assert done.returncode == 1, done.stderr
    found = re.search(
        r"^tests/cpp/template\.cpp:(\d+): sums: (\d) of 3 wrong; worst at index (\d) \(row (\d)\): "
        r"got \S+, expected -?[\d.]+; error \S+, allowed 1e-06\n"
        r"  in sums, rows 3, count 200, seed (\d+)\n"
        rf"  again: (make kernel-test K=template CASE=sums SEED=\5 SKIP={BARRIER})$",
        done.stdout,
        re.MULTILINE,
    )
    assert found, done.stdout
    assert int(found[1]) == line_of("expect_close(")
    assert found[3] == found[4]
    # The command repeats this failure, and no other seed's.
    words = dict(word.split("=", 1) for word in shlex.split(found[6])[2:])
    again = bench(words["K"], words["CASE"], "--seed", words["SEED"], "--skip", words["SKIP"])
    assert again.returncode == 1
    assert found[0] in again.stdout
    assert set(re.findall(r"seed (\d+)$", again.stdout, re.MULTILINE)) == {found[5]}


def test_a_failure_of_a_layer_names_shape_and_element() -> None:
    wait = "block.cuh:" + str(line_of("wait_for_previous_grid();", ROOT / "csrc/cuda/step/block.cuh"))
    done = bench("step", "lstm-float32", "--skip", wait)
    assert done.returncode == 1, done.stderr
    assert re.search(
        r"^tests/cpp/layer_call\.h:\d+: \w+: \d+ of \d+ wrong; worst at index \d+ "
        r"\(step \d, batch \d, direction \d(, \w+ \d+)?, unit \d+\): got \S+, expected \S+; error \S+, allowed 4e-06\n"
        r"  in lstm-float32, LSTM T=\d B=\d H=\d+ D=\d.*, overlapping launches, seed (\d+)\n"
        rf"  again: make kernel-test K=test_step CASE=lstm-float32 SEED=\2 SKIP={wait}$",
        done.stdout,
        re.MULTILINE,
    ), done.stdout


def test_a_nan_is_wrong_wherever_it_stands(tmp_path: Path) -> None:
    """Once only the last element's counted."""
    (tmp_path / "nan.cpp").write_text(
        """
#include "compare.h"
int main() {
  const double nan = __builtin_nan("");
  const std::vector<double> truth = {1, 2, 3};
  const auto check = [&](std::vector<double> values) {
    return rnnfast::test::expect_close("x", [&](size_t i) { return values[i]; }, values.size(), truth, 0.1);
  };
  const bool wrong = check({nan, 2, 3}) || check({1, nan, 3}) || check({1, 2, nan});
  return wrong || check({1, 2}) || check({1, 2, 4}) || !check({1, 2, 3.2});
}
"""
    )
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpp'}"]
    program = tmp_path / "nan"
    compiler = build_emulated.cxx_compiler().split()
    subprocess.run([*compiler, *flags, str(tmp_path / "nan.cpp"), "-o", str(program)], check=True, timeout=SECONDS)
    done = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "x: 1 of 3 wrong; worst at index 1: got nan, expected 2; error nan, allowed 0.1" in done.stdout


# ---- races ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["race-no-barrier"], ["sums", "--skip", BARRIER]], ids=["planted", "left-out"])
def test_a_race_is_told_by_the_kernel_s_lines(arguments: list[str]) -> None:
    done = bench("template", *arguments, "--sanitizer", "thread")
    assert done.returncode == 66, done.stderr
    stores, adds = (line_of(text) for text in ("shared[thread_index()] = sum;", "if (thread_index() < half)"))
    stacks = re.findall(
        r"^  (?:Previous )?(?:[Ww]rite|[Rr]ead) of size 4 at \S+ by kernel row_sums, block \(0,0,0\), thread \d+:\n"
        r"    #0 row_sums<\w+> tests/cpp/template\.cpp:(\d+)\n         (.*)$",
        done.stderr,
        re.MULTILINE,
    )
    assert len(stacks) == 2, done.stderr
    assert {int(line) for line, _ in stacks} <= {stores, adds}
    for line, text in stacks:
        assert text == TEMPLATE.read_text().splitlines()[int(line) - 1].strip()
    assert "std::" not in done.stderr
    assert re.search(r"^  again: make kernel-test K=template CASE=\S+( SEED=0)? SAN=thread", done.stderr, re.MULTILINE)


def test_a_copy_that_is_not_waited_for_is_named_by_its_line() -> None:
    """TSan has room for 63 characters, and the copy no frame in the kernel.

    In float32 the vectors of this case are copied in so many pieces that TSan forgets who made the first.
    """
    product = ROOT / "csrc/cuda/product.cuh"
    wait = f"product.cuh:{line_of('cp_async_wait<kDepth - 1>();', product)}"
    done = bench("step", "lstm-float64", "--skip", wait, "--sanitizer", "thread")
    assert done.returncode == 66, done.stderr
    found = re.search(
        r"^  (?:Previous )?[Ww]rite of size \d+ at \S+ by cp_async at (csrc/cuda/\S+):(\d+), issued by "
        r"kernel step_\S*, block \(\d,\d,\d\), thread \d+:\n         (.*)$",
        done.stderr,
        re.MULTILINE,
    )
    assert found, done.stderr
    assert "cp_async<" in found[3]
    assert found[3] == (ROOT / found[1]).read_text().splitlines()[int(found[2]) - 1].strip()


def test_an_equation_that_is_wrong_everywhere_is_found(tmp_path: Path) -> None:
    """The reference shares csrc/cells.h with the kernels."""
    text = (ROOT / "csrc/cells.h").read_text()
    for old, new in [
        ("const Value i = Math::sigmoid(in.x[0] + in.rec[0]);", "const Value i = Math::sigmoid(in.x[1] + in.rec[1]);"),
        ("dgates[1] = at.dh * (at.previous.h - n)", "dgates[1] = at.dh * (n - at.previous.h)"),
        ("return {previous.h + f * (n - previous.h)", "return {n + f * (previous.h - n)"),
    ]:
        assert old in text
        text = text.replace(old, new, 1)
    (tmp_path / "cells.h").write_text(text)
    (tmp_path / "check.cpp").write_text(
        """
#include "cell_truth.h"
int main() {
  for (const rnnfast::CellTraits& cell : rnnfast::kCells) {
    const long failures = check::state().failures;
    rnnfast::test::check_cell_equations(cell.mode);
    std::printf("%s %s\\n", cell.name, check::state().failures == failures ? "right" : "wrong");
  }
}
"""
    )
    kernel_test.built("plain", "template", None)
    emulator = sorted(str(build_emulated.BUILD / "plain" / f"{file.name}.o") for file in EMULATOR.glob("*.cpp"))
    flags = ["-std=c++20", "-DRNNFAST_EMULATED", f"-I{tmp_path}", f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/cpp'}"]
    command = [*build_emulated.cxx_compiler().split(), *flags, str(tmp_path / "check.cpp"), *emulator]
    subprocess.run([*command, "-o", f"{tmp_path}/check"], check=True, timeout=SECONDS)
    done = subprocess.run([f"{tmp_path}/check"], capture_output=True, text=True, check=False)
    verdicts = dict(re.findall(r"^(\w+) (right|wrong)$", done.stdout, re.MULTILINE))
    assert len(verdicts) == 7
    assert {name for name, verdict in verdicts.items() if verdict == "wrong"} == {"LSTM", "GRU", "MGU"}


def test_an_overrun_names_the_cuda_thread() -> None:
    done = bench("test_emulator", "overrun-shared", "--sanitizer", "address")
    assert done.returncode == 65, done.stderr
    faults = ROOT / "tests/cpp/emulator_faults.h"
    assert f"#0 rnnfast::test::overrun_kernel() tests/cpp/{faults.name}:{line_of('void overrun_kernel', faults)}\n" in (
        done.stderr
    )
    assert re.search(r"^  kernel kernel, block \(0,0,0\), thread 31$", done.stderr, re.MULTILINE)
    assert "Shadow byte" not in done.stderr


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("void std::__invoke_impl<void, void (* const&)(int*)>(std::__invoke_other)", "std::__invoke_impl"),
        ("decltype(auto) std::apply<void (* const&)(int*)>(void (* const&)(int*))", "std::apply"),
        ("void constant<int, std::integral_constant<bool, true> >(int*)", "constant"),
        ("std::array<int, 2ul> (anonymous namespace)::pair<std::less<int> >(int)", "pair"),
        ("rnnfast::gpu::launch<int*>(LaunchConfig const&)::{lambda()#1}::operator()() const", "rnnfast::gpu::launch"),
        ("row_sums<true>", "row_sums"),
        ("main", "main"),
    ],
)
def test_a_frame_is_known_by_its_function_s_own_name(function: str, name: str) -> None:
    """Once what it returned or took made a kernel's frame one of the standard library's."""
    assert sanitizer_report.qualified_name(function) == name


def test_a_crash_says_where_and_loses_no_failure() -> None:
    done = bench("emulator", "crash-after-failure")
    assert done.returncode == 128 + signal.SIGSEGV, done.stderr
    assert re.search(r"^tests/cpp/test_emulator\.cpp:\d+: 1 == 2: 1 and 2$", done.stdout, re.MULTILINE)
    assert done.stderr == (
        "Segmentation fault\n"
        "  kernel kernel, block (0,0,0), thread 3\n"
        "  in crash-after-failure\n"
        "  again: make kernel-test K=test_emulator CASE=crash-after-failure\n"
        "kernel_test.py: test_emulator was ended by SIGSEGV\n"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_hangs_says_where_as_it_is_ended(number: signal.Signals) -> None:
    kernel_test.built("plain", "test_emulator", None)
    command = [sys.executable, str(ROOT / "tests/kernel_test.py"), "emulator", "hang-in-loop", "--sites"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # It is told as it happens, not at the end.
        assert re.match(r"site tests/cpp/emulator_faults\.h:\d+ sync_threads$", process.stderr.readline())
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT
    assert "  kernel kernel, block (0,0,0), thread 2, last at sync_threads tests/cpp/emulator_faults.h:" in errors
    assert "  in hang-in-loop\n" in errors
    assert "threads now\n  kernel kernel, block (0,0,0):\n" in errors


def test_output_without_a_report_stays_as_it_is() -> None:
    text = "site a.h:3 sync_threads\n    #0 not a stack\n"
    assert sanitizer_report.readable(text, Path("program")) == text


# ---- names that do not exist ----------------------------------------------------------------------------------------


def test_a_synchronisation_that_is_not_reached_is_refused() -> None:
    done = bench("template", "sums", "--skip", "template.cpp:1")
    assert done.returncode == 3
    assert done.stderr == (
        "template: no synchronisation at template.cpp:1 was reached; known sites:\n"
        f"  tests/cpp/{BARRIER} sync_threads\n"
    )


def test_a_mutation_that_nothing_notices_is_told() -> None:
    """Without an earlier start of the next grid everything is as right. The path may be absolute."""
    forward = ROOT / "csrc/cuda/step/forward.cuh"
    line = line_of("allow_next_grid();", forward)
    done = bench("step", "lstm-float32", "--seed", "1", "--skip", f"{forward}:{line}")
    assert done.returncode == kernel_test.SKIP_NOT_NOTICED, done.stdout + done.stderr
    assert done.stderr == (
        f"test_step: nothing noticed that the synchronisation at csrc/cuda/step/forward.cuh:{line} was left out\n"
    )


def test_names_have_no_detours() -> None:
    done = bench("step", "rnn-tanh-float32", "--sites")
    assert done.returncode == 0, done.stderr
    sites = re.findall(r"^site (\S+) \w+$", done.stderr, re.MULTILINE)
    assert any(site.startswith("csrc/cuda/product.cuh:") for site in sites)
    assert not any(".." in site for site in sites)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "K=(none): expected a program of tests/cpp: test_async, "),
        (["test_stop"], "K=test_stop: expected a program of tests/cpp: test_async, "),
        (["template", "sum"], "CASE=sum: expected a case of template: sums, race-no-barrier"),
        (["step", "lstm-float"], "CASE=lstm-float: expected a case of test_step: lstm-float64, lstm-float32, "),
        (["template", "--seed", "seven"], "argument --seed: invalid int value: 'seven'"),
        (["template", "--seed", "-1"], "--seed: expected a whole number from 0 to 2^64 - 1, got -1"),
        (["template", "--sanitizer", "memory"], "argument --sanitizer: invalid choice: 'memory'"),
        (["template", "--debug", "--sanitizer", "thread"], "--debug: not with --sanitizer"),
        (["template", "--thread", "3"], "--thread: only with --debug"),
        (["template", "--debug", "--thread", "-1"], "--thread: expected a thread of the block, from 0 on, got -1"),
        (["template", "--debug", "--block", "1;2"], "argument --block: '1;2': expected x, x,y or x,y,z"),
        (
            ["template", "--skip", "template.cpp"],
            "RNNFAST_EMULATOR_SKIP: expected file:line of a synchronisation, got ",
        ),
    ],
)
def test_wrong_arguments_are_told_in_words(arguments: list[str], said: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("variable", "value"), [("SEED", "seven"), ("SEED", "-1"), ("SEED", ""), ("RESIDENT", "0"), ("STACK", "64k")]
)
def test_variables_that_make_no_sense_are_errors(variable: str, value: str) -> None:
    name = f"RNNFAST_EMULATOR_{variable}"
    done = bench("template", **{name: value})
    assert done.returncode == 2
    assert re.search(rf"template: {name}: expected a whole number from \d+ to \d+, got '{value}'$", done.stderr.strip())


def test_the_library_refuses_them_too() -> None:
    assert build_emulated.build(["library"], quiet=True)
    code = f"""
import torch, rnnfast
from rnnfast.registration import load_emulated
load_emulated({str(build_emulated.LIBRARY)!r})
with rnnfast.backend("emulated"):
    rnnfast.LSTM(3, 4)(torch.zeros(2, 1, 3))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "RNNFAST_EMULATOR_SEED": "seven"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "RNNFAST_EMULATOR_SEED: expected a whole number from 0 to 18446744073709551615, got 'seven'" in done.stderr


# ---- a debugger -----------------------------------------------------------------------------------------------------


def test_gdb_stops_in_one_thread_of_a_kernel() -> None:
    if shutil.which("gdb") is None:
        pytest.skip("no gdb: apt-get install gdb")
    # Four blocks at a time, of which this kernel has three.
    commands = ["cuda-thread", "print count", "backtrace", f"tbreak {TEMPLATE}:{BARRIER.partition(':')[2]}", "continue"]
    commands += ["cuda-threads", "print sum", "next", "cuda-thread", "print $cuda_thread()"]
    commands += [f'print $cuda_block("{axis}")' for axis in "xyz"]
    stop = ["--block", "1", "--thread", "5", "--kernel", "row_sums"]
    done = bench("template", "sums", "--debug", *stop, *(word for line in commands for word in ("--gdb", line)))
    text = done.stdout + done.stderr
    assert "kernel row_sums, block (1,0,0), thread 5\n" in text, text
    assert "$1 = 200\n" in text
    assert re.search(r"^#0  .*row_sums<true>.* \(sums=0x\w+, data=0x\w+, count=200\)", text, re.MULTILINE), text
    assert "\n#1 " not in text
    assert "\n#11 " not in text
    assert re.search(r"^\$2 = -?[\d.]+$", text, re.MULTILINE), text
    # It has come to the barrier, and back from it.
    barrier = f"sync_threads at tests/cpp/{BARRIER}"
    assert f"kernel row_sums, block (1,0,0), thread 5, last at {barrier.replace(' at ', ' ')}\n" in text, text
    assert re.findall(r"^\$([3-6]) = (-?\d+)$", text, re.MULTILINE) == [("3", "5"), ("4", "1"), ("5", "0"), ("6", "0")]
    if "cuda-threads: this gdb cannot call a function on a processor with AMX" in text:
        # Where gdb cannot call the program's functions all else holds, and it says so.
        assert "amx_tile" in Path("/proc/cpuinfo").read_text()
        return
    # Those before it are at the barrier.
    assert "  kernel row_sums, block (1,0,0):\n    threads 6-63: not begun\n    thread 5: runs" in text, text
    assert f"    threads 0-4: waits: {barrier}\n" in text, text


def test_gdb_says_what_there_is_where_nothing_stopped() -> None:
    if shutil.which("gdb") is None:
        pytest.skip("no gdb: apt-get install gdb")
    for stop in (["--kernel", "row_sum_of"], ["--thread", "64"], ["--block", "0,1"]):
        done = bench("template", "sums", "--seed", "0", "--debug", *stop, "--gdb", "cuda-thread")
        assert "in its name began in block" in done.stdout, done.stdout
        assert "  row_sums: 3,1,1 blocks of 64 threads\n  row_sums: 1,1,1 blocks of 64 threads\n" in done.stdout
        assert "the program has ended, or not begun" in done.stderr


def test_without_gdb_it_says_so(tmp_path: Path) -> None:
    done = bench("template", "--debug", PATH=str(tmp_path))
    assert done.returncode == 2
    assert "--debug needs gdb: apt-get install gdb" in done.stderr


# ---- what is built --------------------------------------------------------------------------------------------------


def test_a_case_is_built_with_its_own_kernels_alone() -> None:
    assert instance_of("test_step", "lstm-float32") == "lstm-float32"
    assert instance_of("test_step", "rnn-tanh-bfloat16") == "rnn-bfloat16"
    assert instance_of("test_step", "large") is None
    assert instance_of("test_exchange", "lstm-float32") is None
    assert instance_of("test_persistent", "rnn-tanh-grid-barrier-tf32") == "rnn-tf32"
    assert instance_of("test_persistent", "lstm-block-float64") is None
    # The kernels that it lacks say so.
    path = kernel_test.built("plain", "test_step", "rnn-float32")
    done = subprocess.run([str(path), "gru-float32"], capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 1
    assert "this program has the kernels of one family and arithmetic, and not these" in done.stdout


def test_a_program_that_does_not_compile(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(build_emulated, "build", lambda targets, quiet: False)
    with pytest.raises(SystemExit) as raised:
        kernel_test.built("plain", "template", None)
    assert raised.value.code == kernel_test.NOT_COMPILED
    assert capsys.readouterr().err == "kernel_test.py: plain/template does not compile\n"


def made(*arguments: str) -> subprocess.CompletedProcess[str]:
    """make in this environment."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    stamps = sorted(Path(sys.prefix).glob(".torch-*"))
    if not stamps:
        pytest.skip("this environment was not made by make")
    # Where another make runs this test its own variables would speak.
    environment = {name: value for name, value in os.environ.items() if "MAKE" not in name}
    variables = [f"VENV={sys.prefix}", f"TORCH={stamps[0].name.removeprefix('.torch-')}"]
    command = ["make", *variables, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def test_make_kernel_test() -> None:
    done = made("kernel-test", "K=template", "CASE=sums", "SEED=3", f"SKIP={BARRIER}")
    assert done.returncode == 2, done.stderr
    assert "in sums, rows 3, count 200, seed 3\n" in done.stdout
    assert made("kernel-test", "K=template", "CASE=sums", "SITES=1").returncode == 0


def test_make_debug_and_builds_ask_for_what_they_say() -> None:
    variables = ["K=step", "CASE=lstm-float32", "SEED=7", "KERNEL=step_forward", "BLOCK=1,0,0", "THREAD=5"]
    told = made("-n", "debug", *variables).stdout
    assert "tests/kernel_test.py --debug 'step' 'lstm-float32' --seed '7' --kernel 'step_forward'" in told
    assert "--block '1,0,0' --thread '5'" in told
    # Neither compiles CUDA code unless that is asked for, however the tree stands.
    for target in ("build", "test"):
        for asked, flag in [([], "'0'"), (["RNNFAST_CUDA=1"], "'1'")]:
            told = made("-n", "-W", "setup.py", target, *asked).stdout
            assert f"RNNFAST_CUDA={flag} " in told or (Path("/dev/nvidia0").exists() and not asked), told
            assert "make: the C++ library" in told
    assert "build_ext" not in made("-n", "-W", "setup.py", "emulated").stdout

"""benchmarks/gpu_check.py without a card: both runs with stand-ins for all that they run, and what the CPU can run."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

import card_kit
import gpu_check
import shapes
from card_machine import FACTS, FIRE, HANG, ROOT, ROW, SCRIPT, Machine, describe
from rnnfast import cuda_plan
from stages import Missing

STAGES = {
    "first": ["about", "microbench", "programs", "kernels", "plans", "tests"],
    "measure": ["about", "tests", "flashrnn", "grid", "models", "compare", "ncu", "triton", "alone"],
}
BACKENDS = ("cuda", "triton")
# A file of outcomes; half a line, of a process that was killed, is passed over.
OUTCOMES = '{{"kernels": "{}"}}\n{{"test": "test_b", "outcome": "passed"}}\n{{"test": "test_c", "outc'


def in_order(parts: list[str], calls: list[str]) -> bool:
    """Whether each part is in a call, later than the part before it."""
    rest = iter(calls)
    return all(any(part in call for call in rest) for part in parts)


def processes_of(folder: Path) -> list[int]:
    """Those that have the folder in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.fsencode(folder) in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


# ---- both runs, with stand-ins --------------------------------------------------------------------------------------


def test_first_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    done = machine.check("first")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = machine.table()
    assert list(dict.fromkeys(row[0] for row in rows)) == STAGES["first"]
    assert {row[2] for row in rows} == {"ok"}, rows
    calls = machine.calls()
    parts = [f"microbench-90a {part}" for part in gpu_check.MICROBENCHMARKS]
    programs = ["card_tests-90a --seconds 10 persistent", "card_tests-90a --seconds 10 -persistent"]
    tests = ["test_gpu_ops.py -m", "test_gpu_ops.py test_gpu_parity.py", "pytest gpu test_bench.py -m"]
    assert in_order(["gpu_check.py facts", *parts, *programs, *tests], calls)
    for tool in ("memcheck", "racecheck", "synccheck", "initcheck"):
        assert any(call.startswith(f"compute-sanitizer --tool {tool}") for call in calls)
    assert any("memcheck --report-api-errors no" in call for call in calls)
    assert all("--launch-timeout 0 --error-exitcode 99" in call for call in calls if "--tool" in call)
    # The outcomes of the first tests keep the second from running them again; nothing is exhaustive, nothing alone.
    tests = [call for call in calls if "-m pytest" in call]
    assert all("-m gpu and not exhaustive and not alone" in call and "--maxfail=30" in call for call in tests)
    # On a plan that is asked for by name all are run again, each into a file of its own.
    on_plans = [call for call in tests if "--outcomes plan-" in call]
    assert sorted(re.findall(r"--outcomes plan-(\S+).jsonl", " ".join(on_plans))) == sorted(gpu_check.PLANS)
    assert not any("--except-passed" in call for call in on_plans)
    tests = [call for call in tests if call not in on_plans]
    assert all("--except-passed now-" in call for call in tests)
    # Where one backend fails in everything, the other has its say.
    assert [call.count("-k triton") for call in tests] in ([0, 1, 0, 1], [0, 1, 1, 0], [1, 0, 0, 1], [1, 0, 1, 0])
    assert all(re.search(r"-n \d+ --dist worksteal", call) for call in tests)
    # Nothing is compiled, and torch is imported once to find out what is here.
    assert not any("nvcc" in call or "setup.py" in call for call in calls)
    assert sum("facts" in call for call in calls) == 1
    assert done.stdout.rstrip().endswith("NVIDIA H100 80GB HBM3: 22 ok, 0 failed, 0 skipped")
    assert "rnnfast: abc123" in (machine.out / "table.txt").read_text()
    assert "1 tests passed" in done.stdout
    files = {"logs.txt", "table.txt", "tests.jsonl", "h100-microbench.jsonl"}
    files |= {f"plan-{plan}.jsonl" for plan in gpu_check.PLANS}
    assert {path.name for path in machine.out.iterdir()} == files


def test_second_run(tmp_path: Path) -> None:
    machine, after = Machine(tmp_path), tmp_path / "earlier"
    after.mkdir()
    (after / "tests.jsonl").write_text(OUTCOMES.format(card_kit.kernels()))
    done = machine.check("measure", "--after", str(after))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = machine.table()
    assert list(dict.fromkeys(row[0] for row in rows)) == STAGES["measure"]
    assert {row[2] for row in rows} == {"ok"}, rows
    order = ["pytest gpu test_bench.py -m", "--suite flashrnn", "--suite grid", "--suite corners,models"]
    order += ["plan_check.py out --limit", "ncu ", "--suite grid", "gpu and not exhaustive and alone"]
    calls = machine.calls()
    assert in_order(order, calls)
    assert "-n 1 " in calls[-1]
    assert "--except-passed earlier-0.jsonl" in next(call for call in calls if "-m pytest" in call)
    # Triton is timed last, and no suite before it touches it.
    suites = [call for call in calls if "--suite" in call]
    assert ["triton" in call for call in suites] == [False, False, False, True]
    assert all("--case-limit" in call and "--limit" in call for call in suites)
    (report,) = (call for call in calls if call.startswith("ncu"))
    assert "--clock-control none --kill yes" in report
    assert "--hidden 128" in report
    assert re.search(r"^h100 +flashrnn +inference +cuda +1 +0 +0.50", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("run", STAGES)
def test_whoever_hangs_takes_no_time_from_the_next(tmp_path: Path, run: str) -> None:
    """All of them do, and do not listen: still each is begun, has at least its own seconds, and is gone at the end."""
    programs = ("microbench", "card_tests", "-m pytest", "--suite", "plan_check", "ncu ", "compute-sanitizer")
    seconds = {"first": 12, "measure": 14}[run]
    machine = Machine(tmp_path, **dict.fromkeys(programs, HANG))
    (machine.out).mkdir()
    (machine.out / "h100-sizes.json").write_text(json.dumps({"suite": "sizes", "rows": [ROW]}))
    begin = time.monotonic()
    done = machine.check(run, "--seconds", str(seconds))
    assert time.monotonic() - begin < seconds + 5
    assert done.returncode == 1
    rows = machine.table()
    assert list(dict.fromkeys(row[0] for row in rows)) == STAGES[run]
    assert {row[2] for row in rows if row[0] != "about"} <= {"TIMEOUT", "noted", "skipped"}
    assert all(any(row[2] == "TIMEOUT" for row in rows if row[0] == stage) for stage in STAGES[run][1:])
    assert all(note.endswith("so far") for _, _, outcome, note in rows if outcome == "TIMEOUT")
    limits = dict(re.findall(r"^--- (\w+), at most ([\d.]+) s", done.stdout, re.MULTILINE))
    check = gpu_check.Check(options(tmp_path), machine.out)
    stages = check.stages(run)
    scale = (seconds - min(gpu_check.RESERVE, seconds / 4)) / sum(stage.seconds for stage in stages)
    for stage in stages:
        assert float(limits[stage.name]) >= 0.9 * scale * stage.seconds, stage.name
    assert not processes_of(tmp_path)


@pytest.mark.parametrize("run", STAGES)
def test_whoever_fails_does_not_stop_the_next(tmp_path: Path, run: str) -> None:
    programs = ("microbench", "card_tests", "-m pytest", "--suite", "plan_check", "--tool")
    machine = Machine(tmp_path, **dict.fromkeys(programs, FIRE))
    done = machine.check(run)
    assert done.returncode == 1
    rows = machine.table()
    assert list(dict.fromkeys(row[0] for row in rows)) == STAGES[run]
    others = [row for row in rows if row[0] not in ("about", "ncu") and row[1] != "initcheck"]
    assert {row[2:] for row in others} == {("FAILED", "status 3: on fire")}
    assert all(row[2] == "skipped" and row[3].startswith("no result file in ") for row in rows if row[0] == "ncu")
    assert [row[2] for row in rows if row[1] == "initcheck"] == ["noted"] * (run == "first")


def test_half_a_result_file_is_passed_over(tmp_path: Path) -> None:
    """Of a suite that was killed; ncu and the table look for the others."""
    machine = Machine(tmp_path)
    machine.out.mkdir()
    (machine.out / "h100-grid.json").write_text('{"suite": "grid", "rows": [')
    done = machine.check("measure", "--stages", "flashrnn,ncu,triton")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [row[:3] for row in machine.table()[1:]] == [
        ("flashrnn", "", "ok"),
        ("ncu", "case 1", "ok"),
        ("triton", "", "ok"),
    ]


def test_a_sanitizer_that_looked_at_nothing_has_not_passed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"--tool racecheck": "echo Awaiting target completion"})
    assert machine.check("first", "--stages", "kernels").returncode == 1
    outcomes = {job: outcome for stage, job, outcome, _ in machine.table() if stage == "kernels"}
    assert outcomes == {**dict.fromkeys(outcomes, "ok"), "racecheck": "FAILED"}


def test_a_look_around_that_fails_leaves_nothing_to_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path, facts=FIRE)
    assert machine.check("first").returncode == 1
    assert {row[2:] for row in machine.table()[1:]} == {("skipped", "stage about failed: logs.txt has the reason")}
    # Where there is a card, what needs no torch is tried all the same.
    (tmp_path / "bin/nvidia-smi").symlink_to(tmp_path / "bin/ncu")
    assert machine.check("first").returncode == 1
    outcomes = {stage: outcome for stage, _, outcome, _ in machine.table() if stage != "about"}
    assert outcomes == {"microbench": "ok", "programs": "ok", **dict.fromkeys(("kernels", "plans", "tests"), "skipped")}


@pytest.mark.parametrize("words", ["yes yes", "tr '\\\\0' x < /dev/zero"], ids=["lines", "one line"])
def test_a_program_that_writes_without_end_does_not_fill_the_log(tmp_path: Path, words: str) -> None:
    machine = Machine(tmp_path, card_tests=words)
    assert machine.check("first", "--stages", "programs", "--seconds", "4").returncode == 1
    assert ("programs", "persistent", "TIMEOUT") in [row[:3] for row in machine.table()]
    assert (machine.out / "logs.txt").stat().st_size < 5 << 20


def test_nothing_is_left_running_after_a_kill(tmp_path: Path) -> None:
    machine = Machine(tmp_path, card_tests="echo half way; sleep 60")
    command, environment = machine.command("first", "--stages", "programs")
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    log, deadline = machine.out / "logs.txt", time.monotonic() + 30
    while "half way" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    while (left := processes_of(tmp_path)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left


def test_stages_by_name(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    assert machine.check("measure", "--stages", "cudnn,models").returncode == 0
    assert [row[0] for row in machine.table()] == ["about", "cudnn", "models"]
    done = machine.check("first", "--stages", "lunch")
    assert done.returncode == 2
    assert "no stage of first is called lunch; there are: about, microbench" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_what_was_known_is_there_however_it_ends(tmp_path: Path, number: signal.Signals) -> None:
    machine = Machine(tmp_path, card_tests="echo half way; sleep 60")
    command, environment = machine.command("first")
    # As in the background of a shell, where SIGINT is ignored.
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    log = machine.out / "logs.txt"
    deadline = time.monotonic() + 30
    while (
        "programs:persistent| half way" not in (log.read_text() if log.exists() else "") and time.monotonic() < deadline
    ):
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(20) == (-number if number == signal.SIGKILL else 130)
    assert "programs:persistent| half way" in log.read_text()
    rows = machine.table()
    assert [row[:3] for row in rows][:2] == [("about", "", "ok"), ("microbench", "device", "ok")]
    # Who can still say so says what has not been run.
    last = ("programs", "kernels", "plans", "tests")
    ended = [(stage, outcome) for stage, _, outcome, _ in rows if stage in last]
    assert ended == [] if number == signal.SIGKILL else [(stage, "ended") for stage in last]


# ---- what is brought along ------------------------------------------------------------------------------------------


def test_libraries_of_other_sources_are_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    manifest = machine.kit / "manifest.json"
    good = json.loads(manifest.read_text())
    changed = {**good["compiled"], "csrc/cells.h": "another", "csrc/gone.h": "0"}
    unnamed = {name: known for name, known in good["files"].items() if not name.startswith("microbench")}
    for text, why in (
        (
            json.dumps({**good, "compiled": changed}),
            "(commit abc123; differs: csrc/cells.h, csrc/gone.h): run `make card`",
        ),
        (json.dumps({**good, "files": unnamed}), "does not have microbench: run `make card` again"),
        (
            json.dumps({**good, "files": {**good["files"], "_C_cuda.so": "0"}}),
            "_C_cuda.so is not the one of `make card`",
        ),
        (
            json.dumps({**good, "files": {**good["files"], "card_tests-80": "0"}}),
            "card_tests-80 is not there: bring it",
        ),
        (json.dumps(good)[:50], "manifest.json cannot be read: bring it along"),
        ("", "manifest.json is not there: bring it along"),
    ):
        manifest.write_text(text) if text else manifest.unlink()
        for device in ("cuda", "cpu"):
            done = machine.check("first", "--device", device)
            assert done.returncode == 2
            assert why in done.stderr
    assert not machine.journal.exists()
    assert not machine.out.exists()


def test_every_source_counts() -> None:
    compiled = card_kit.sources(*card_kit.LIBRARY_SOURCES, *card_kit.PROGRAM_SOURCES)
    python = card_kit.sources(*card_kit.PACKAGE, *card_kit.SCRIPTS)
    assert {"setup.py", "benchmarks/microbench/kernels.cuh", "tests/cpp/card_tests.cpp"} <= compiled.keys()
    assert "benchmarks/run.py" in python
    tracked = subprocess.run(
        ["git", "ls-files", "csrc", "rnnfast"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert set(tracked.stdout.split()) - {"rnnfast/py.typed"} <= {*compiled, *python}


def test_changed_scripts_are_named(tmp_path: Path) -> None:
    """Nothing compiled is of other sources then, so nothing is refused, but the commit is not what was run."""
    machine = Machine(tmp_path)
    manifest = machine.kit / "manifest.json"
    changed = json.loads(manifest.read_text())
    changed["python"]["benchmarks/run.py"] = "another"
    manifest.write_text(json.dumps(changed))
    done = machine.check("first", "--stages", "programs")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rnnfast: abc123-changed" in done.stdout


def test_outcomes_of_other_kernels_do_not_count(tmp_path: Path) -> None:
    """Neither those of a run that is named nor those that lie in the folder."""
    machine, after = Machine(tmp_path), tmp_path / "after"
    for folder in (after, machine.out):
        folder.mkdir()
        (folder / "tests.jsonl").write_text(OUTCOMES.format("other"))
    done = machine.check("measure", "--after", str(after), "--stages", "tests")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not any("earlier" in call for call in machine.calls())
    assert f"{after}: its tests are of other kernels, so all are due" in done.stdout
    assert (machine.out / "tests-other.jsonl").exists()
    # Of the same kernels they do, wherever the command is given.
    (after / "tests.jsonl").write_text(OUTCOMES.format(card_kit.kernels()))
    command, environment = machine.command("measure", "--after", after.name, "--stages", "tests")
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for call in [call for call in machine.calls() if "-m pytest" in call][-2:]:
        assert "earlier-0.jsonl" in call
        assert "earlier-1.jsonl" in call


def test_whoever_runs_no_test_has_not_passed(tmp_path: Path) -> None:
    machine = Machine(tmp_path, **{"-m pytest": "echo 638 skipped in 6.63s"})
    done = machine.check("measure", "--stages", "tests")
    assert done.returncode == 3
    assert {row[1:] for row in machine.table() if row[0] == "tests"} == {
        ("cuda", "skipped", "638 skipped in 6.63s"),
        ("triton", "skipped", "638 skipped in 6.63s"),
    }
    assert done.stdout.rstrip().endswith("NOTHING was checked: see the table")


# ---- what is said to the programs -----------------------------------------------------------------------------------


def options(folder: Path, **others: Any) -> Namespace:
    return Namespace(**{"after": None, "device": "cuda", "kit": folder, "python": sys.executable, **others})


@pytest.fixture
def check(tmp_path: Path) -> gpu_check.Check:
    """On a machine with a card."""
    result = gpu_check.Check(options(tmp_path), tmp_path)
    result.facts = FACTS
    return result


def test_without_a_sanitizer_the_table_says_so(check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch) -> None:
    (check.kit.folder / "card_tests-90a").touch()
    jobs = [job.name for job in check.kernels(50.0)]
    assert {"memcheck", "racecheck"} <= set(jobs) or gpu_check.cuda_tool("compute-sanitizer") is None
    monkeypatch.setattr(gpu_check, "cuda_tool", lambda name: None)
    assert check.kernels(50.0)[-1] == Missing("sanitizers", "no compute-sanitizer")
    assert check.ncu(50.0) == "no ncu"


@pytest.mark.parametrize("stage", ["flashrnn", "grid", "models", "triton"])
def test_the_suites_know_their_options(check: gpu_check.Check, stage: str) -> None:
    pytest.importorskip("rich", reason="benchmarks/run.py prints with rich: pip install rnnfast[bench]")
    (job,) = getattr(check, stage)(50.0)
    done = subprocess.run([*job.command, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("pattern", "suite", "count"),
    [(gpu_check.HEADLINE, "flashrnn", 8), (gpu_check.GRID, "grid", 24), (gpu_check.TRITON, "grid", 12)],
)
def test_the_shapes_that_are_chosen_are_there(pattern: str, suite: str, count: int) -> None:
    assert sum(bool(re.search(pattern, case.name)) for case in shapes.SUITES[suite]) == count


def collected(*arguments: str) -> set[str]:
    """The names of the tests that pytest would run on a card."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_the_tests_of_the_card_are_all_run_on_each_backend(check: gpu_check.Check) -> None:
    """Nothing is dropped on the way: a green run says something of every backend. (And no test is run twice.)"""
    parts = []
    for stage in ("tests", "alone"):
        command = list(getattr(check, stage)(50.0)[0].command)
        command = command[3 : command.index("-q")]
        parts.append(collected(*command[: command.index("-k")] if "-k" in command else command))
    assert not parts[0] & parts[1]
    everything = collected("-m", "gpu and not exhaustive")
    assert {test for test in everything if "sanitizer" not in test} <= parts[0] | parts[1] <= everything
    for part in parts:
        on = {backend: {re.sub(r"\[.*", "", test) for test in part if f"[{backend}" in test} for backend in BACKENDS}
        assert on["cuda"] == on["triton"] != set(), part
    assert sum("[triton" in test for test in everything) > 1500


def test_every_plan_is_forced_in_turn(check: gpu_check.Check) -> None:
    """On tests of the CUDA kernels alone, in full and in graphs, and as many at once as there are cores for."""
    jobs = check.plans(50.0)
    assert [job.environment["RNNFAST_CUDA_PLAN"] for job in jobs] == [job.name for job in jobs] == list(gpu_check.PLANS)
    assert {*gpu_check.PLANS, "auto"} == set(cuda_plan.NAMES)
    command = list(jobs[0].command)
    found = collected(*command[3 : command.index("-q")])
    assert not any("[triton" in test for test in found)
    names = {re.sub(r".*::|\[.*", "", test) for test in found}
    assert names == {"test_against_float64", "test_parity", "test_cells", "test_graph_of_forward_and_backward"}
    assert 500 < len(found) < 1200
    assert "RNNFAST_CUDA_PLAN" not in check.tests(50.0)[0].environment


def test_the_seconds_of_the_stages_are_those_of_the_run() -> None:
    for run, stages in gpu_check.SHARES.items():
        assert sum(own for own, _ in stages.values()) <= gpu_check.SECONDS[run] - gpu_check.RESERVE
        assert all(own <= most for own, most in stages.values())


LOST = """
import pytest, torch
from gpu_conftest import *
from gpu_conftest import end_if_lost

@pytest.fixture(autouse=True)
def _without_tf32(request):
    yield
    end_if_lost(request)

@pytest.fixture(autouse=True)
def backend():
    return ""
"""
LOSES = """
import pytest, torch

def broken(*_):
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

@pytest.mark.parametrize("number", range(6))
def test_number(number, monkeypatch):
    # What has been lost once is lost for the rest of the process.
    if number == 3:
        torch.cuda.synchronize = broken
"""


def test_a_process_that_has_lost_its_card_takes_no_test_along(tmp_path: Path) -> None:
    """It ends and another takes its place: what comes after passes, and the file of outcomes has the reason."""
    pytest.importorskip("xdist", reason="several processes are pytest-xdist's: pip install pytest-xdist")
    shutil.copy(ROOT / "tests/gpu/conftest.py", tmp_path / "gpu_conftest.py")
    (tmp_path / "test_lost.py").write_text(LOSES)
    start = "import torch; torch.cuda.synchronize = lambda *_: None\n"
    (tmp_path / "conftest.py").write_text(start + LOST)
    outcomes = tmp_path / "outcomes"
    paths = os.pathsep.join(map(str, (tmp_path, ROOT, ROOT / "tests/gpu", ROOT / "benchmarks")))
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "no:cacheprovider", "--outcomes", str(outcomes)]
    # What is left out stands in a file that nobody writes: the process that takes its place finds the same tests.
    earlier = tmp_path / "earlier"
    earlier.write_text('{"test": "test_lost.py::test_number[0]", "outcome": "passed"}\n')
    command += ["--except-passed", str(earlier)]
    environment = {**os.environ, "PYTHONPATH": paths, "RNNFAST_GPU_TESTS_DEVICE": "cpu"}
    done = subprocess.run(
        [*command, "--rootdir", str(tmp_path), str(tmp_path)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    rows = [json.loads(line) for line in outcomes.read_text().splitlines()]
    assert sum(row["outcome"] == "passed" for row in rows) == 5
    failed = [row for row in rows if row["outcome"] == "failed"]
    assert failed
    assert all("test_number[3]" in row["test"] for row in failed)
    assert any("the CUDA context is lost: CUDA error: an illegal" in row.get("text", "") for row in failed)


# ---- without a card -------------------------------------------------------------------------------------------------


def on_this_machine(out: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    kit = out.parent / "kit"
    kit.mkdir(exist_ok=True)
    for name in card_kit.PROGRAMS:
        (kit / f"{name}-90a").write_text(name)
    describe(kit)
    command = [sys.executable, str(SCRIPT), arguments[0], str(out), "--kit", str(kit), *arguments[1:]]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


@pytest.mark.parametrize("run", STAGES)
def test_without_a_card_every_stage_says_why_it_skips(tmp_path: Path, run: str) -> None:
    done = on_this_machine(tmp_path / "out", run)
    assert done.returncode == 3, done.stdout + done.stderr
    text = (tmp_path / "out/table.txt").read_text()
    for stage in STAGES[run][1:]:
        assert re.search(rf"^{stage} +skipped +0.0  no CUDA device", text, re.MULTILINE)
    assert text in done.stdout
    assert "NOTHING was checked: no CUDA device" in done.stdout.splitlines()[-1]
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["logs.txt", "table.txt", "tests.jsonl"]


def test_rehearsal_on_the_cpu(tmp_path: Path) -> None:
    """A suite and tests that are really run; the result file and the outcomes are read again."""
    pytest.importorskip("rich", reason="benchmarks/run.py prints with rich: pip install rnnfast[bench]")
    out = tmp_path / "out"
    done = on_this_machine(out, "measure", "--device", "cpu", "--stages", "flashrnn,ncu,alone")
    assert done.returncode == 0, done.stdout + (out / "logs.txt").read_text()
    assert re.search(r"^cpu +smoke +inference +cpu +\d+ +0 +", done.stdout, re.MULTILINE)
    assert re.search(r"^ncu +skipped +0.0  a rehearsal on the CPU", done.stdout, re.MULTILINE)
    done = on_this_machine(out, "first", "--device", "cpu", "--stages", "kernels")
    assert done.returncode == 0, done.stdout + (out / "logs.txt").read_text()
    assert re.search(r"^[1-9]\d* tests passed$", done.stdout, re.MULTILINE)
    # What has passed is not run again.
    done = on_this_machine(out, "first", "--device", "cpu", "--stages", "kernels")
    assert done.returncode == 0, done.stdout
    assert re.search(r"^kernels +ok .* (no tests ran|deselected) in", done.stdout, re.MULTILINE)


def test_wrong_arguments_are_errors(tmp_path: Path) -> None:
    for arguments, why in (
        (["first"], "a folder for the results is needed"),
        (["measure", str(tmp_path), "--after", str(tmp_path / "lunch")], "there is no such folder"),
        (["first", str(SCRIPT)], "is no folder"),
        (["first", str(tmp_path), "--seconds", "-5"], "--seconds -5: a number above 0 is needed"),
        (["second", str(tmp_path)], "invalid choice"),
    ):
        done = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert why in done.stderr


def test_cudnn_without_a_card_says_so() -> None:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "benchmarks/microbench/cudnn.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr

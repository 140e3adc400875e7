"""benchmarks/gpu_check.sh without a card: every stage says why it skips; and what can run on the CPU does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STAGES = "build tests sanitizer flashrnn grid models ncu microbench cudnn".split()


def check(out: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if not name.startswith("GPU_CHECK_")}
    return subprocess.run(
        ["bash", str(ROOT / "benchmarks/gpu_check.sh"), str(out)],
        env={**variables, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )


def table(out: Path) -> dict[str, tuple[str, str]]:
    """(outcome, note) of each stage, from the table in the folder."""
    text = (out / "table.txt").read_text()
    rows = re.findall(r"^(\w+) +(ok|skipped|FAILED|TIMEOUT) +\d+ +(.*)$", text, re.MULTILINE)
    return {stage: (outcome, note) for stage, outcome, note in rows}


def python_that(tmp_path: Path, does: str) -> str:
    """A Python that runs `does` (shell) in place of a suite."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\ncase "$*" in *--suite*) {does} ;; esac\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return str(program)


def test_without_a_card_every_stage_says_why_it_skips(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = check(out, GPU_CHECK_STAGES="all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert not done.stderr
    rows = table(out)
    assert list(rows) == STAGES
    assert {outcome for outcome, _ in rows.values()} == {"skipped"}
    assert all("no CUDA device" in note or "does not see the card" in note for _, note in rows.values())
    # The table stands last, and in a file; the logs in one other.
    assert done.stdout.rstrip().endswith((out / "table.txt").read_text().rstrip())
    assert sorted(path.name for path in out.iterdir()) == ["logs.txt", "table.txt"]
    assert all(f"==================== {stage}\n" in (out / "logs.txt").read_text() for stage in STAGES)


def test_suite_on_the_cpu(tmp_path: Path) -> None:
    """The options that the script gives are those that benchmarks/run.py knows, and the result file is read again."""
    pytest.importorskip("rich", reason="benchmarks/run.py prints with rich: pip install rnnfast[bench]")
    done = check(tmp_path, GPU_CHECK_STAGES="flashrnn ncu", GPU_CHECK_DEVICE="cpu")
    rows = table(tmp_path)
    assert rows["flashrnn"][0] == "ok", (tmp_path / "logs.txt").read_text()
    assert rows["ncu"] == ("skipped", "a rehearsal on the CPU")
    assert done.returncode == 0
    assert (tmp_path / "cpu-smoke.json").exists()
    assert re.search(r"^cpu +smoke +fwd +cpu +\d+ +0 +", done.stdout, re.MULTILINE)


def test_the_options_of_the_card_are_known() -> None:
    """What the script says to benchmarks/run.py on a card; --help ends it before anything is measured."""
    pytest.importorskip("rich", reason="benchmarks/run.py prints with rich: pip install rnnfast[bench]")
    script = (ROOT / "benchmarks/gpu_check.sh").read_text()
    call = re.search(r'--suite "\$1" (.*?)\n\}', script, re.DOTALL)
    assert call is not None
    text = call[1].replace("\\\n", " ").replace('"${GPU_CHECK_DTYPES:-bfloat16,float32}"', "bfloat16,float32")
    options = text.replace('"$seconds"', "5").replace('"$out"', "out").split()
    for suite in ("flashrnn", "grid", "models"):
        command = [sys.executable, str(ROOT / "benchmarks/run.py"), "--suite", suite, *options, "--help"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_a_failure_does_not_stop_the_next_stage(tmp_path: Path) -> None:
    out = tmp_path / "out"
    python = python_that(tmp_path, "echo the card is on fire; exit 3")
    done = check(out, GPU_CHECK_STAGES="flashrnn grid", GPU_CHECK_DEVICE="cpu", PYTHON=python)
    assert done.returncode == 1
    assert table(out) == dict.fromkeys(("flashrnn", "grid"), ("FAILED", "status 3: the card is on fire"))


def test_a_stage_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    out = tmp_path / "out"
    python = python_that(tmp_path, "echo so far; sleep 300")
    done = check(out, GPU_CHECK_STAGES="models", GPU_CHECK_DEVICE="cpu", GPU_CHECK_SECONDS="28", PYTHON=python)
    assert done.returncode == 1
    outcome, note = table(out)["models"]
    assert outcome == "TIMEOUT"
    assert re.fullmatch(r"after 1\d s: so far", note)


def test_without_time_a_stage_is_skipped(tmp_path: Path) -> None:
    done = check(tmp_path, GPU_CHECK_STAGES="models", GPU_CHECK_DEVICE="cpu", GPU_CHECK_SECONDS="12")
    assert done.returncode == 0
    assert table(tmp_path)["models"] == ("skipped", "no time left of 12 s (GPU_CHECK_STAGES runs the rest)")


def test_wrong_arguments_are_errors(tmp_path: Path) -> None:
    done = check(tmp_path, GPU_CHECK_STAGES="tests lunch")
    assert done.returncode == 2
    assert "no stage is called lunch" in done.stdout


def test_microbench_compiles_without_spills() -> None:
    if shutil.which("nvcc") is None and not Path("/usr/local/cuda/bin/nvcc").exists() and "CUDA_HOME" not in os.environ:
        pytest.skip("nvcc was not found")
    script = ROOT / "benchmarks/microbench/run.sh"
    done = subprocess.run(["bash", str(script), "--build-only", "9.0a"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes spill stores", Path(done.stdout.strip() + ".log").read_text())
    assert len(spills) >= 15
    assert set(spills) == {"0"}


def test_microbench_without_a_card_says_so(tmp_path: Path) -> None:
    """Also what says how fast cuDNN is."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    script = ROOT / "benchmarks/microbench/cudnn.py"
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "no CUDA device" in done.stderr

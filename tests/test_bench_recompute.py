"""benchmarks/recompute.py: what it times and weighs, and its table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="tables and figures need matplotlib: pip install rnnfast[bench]")

import recompute
import shapes
from rnnfast.benchmark import Case
from rnnfast.recompute.memory import WAYS

ROOT = Path(__file__).resolve().parent.parent

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_setting_is_timed_beside_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "RECOMPUTE", [Case("GRU", 2, 8, steps=40)])
    monkeypatch.setattr(recompute, "peak_elsewhere", lambda *_: {"taken": 5, "process": 9})
    rows = recompute.measure(0, 2)
    assert [row["recompute"] for row in rows] == list(WAYS)
    assert [rows[0][name] for name in ("ratio", "least", "most", "taken")] == [1, 1, 1, 5]
    assert all(0 < row["least"] <= row["ratio"] <= row["most"] and row["seconds"] > 0 for row in rows)


def test_the_most_memory_is_that_of_the_call() -> None:
    """In a process of its own, where no test before left memory that serves again."""
    program = (
        "import json, recompute; from rnnfast.benchmark import Case; "
        "print(json.dumps(recompute.peak(Case('RNN', 8, 64, steps=20_000, input_size=4), None)))"
    )
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "benchmarks")))
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    # The output, in float32.
    assert 20_000 * 8 * 64 * 4 < found["taken"] < found["process"]


def test_the_table_has_a_line_for_each_setting(tmp_path: Path) -> None:
    rows = [
        {
            "cell": "LSTM", "T": 1000, "B": 1, "I": 2, "H": 3, "recompute": way, "seconds": 2.0, "ratio": 1.25,
            "least": 1.2, "most": 1.5, "taken": 2_000_000,
        }
        for way in WAYS
    ]  # fmt: skip
    (tmp_path / recompute.NAME).write_text(json.dumps({"rows": rows, "isa": "avx2", "device": "a processor"}))
    lines = recompute.table(tmp_path).splitlines()
    assert lines[2] == "| LSTM T=1,000 B=1 I=2 H=3 | `None` | 2.00 s |  | 2 MB |"
    assert lines[3] == '|  | `"gates"` | 2.00 s | 1.25 (1.20 to 1.50) | 2 MB |'
    assert lines[-1] == "Instruction set `avx2`; a processor."
    assert "no result file" in recompute.table(tmp_path / "nowhere")

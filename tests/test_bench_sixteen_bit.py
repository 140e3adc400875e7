"""benchmarks/sixteen_bit.py: what it times, its table; and no figures of curves that would be points."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rnnfast.benchmark import Case

pytest.importorskip("matplotlib", reason="tables and figures need matplotlib: pip install rnnfast[bench]")

import plot
import records
import shapes
import sixteen_bit

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_type_is_timed_beside_float32():
    before = torch.backends.mkldnn.rnn.fp32_precision
    rows = sixteen_bit.measure(Case("GRU", 2, 8, steps=3), "training", 0.02)
    assert [row["type"] for row in rows] == list(sixteen_bit.TYPES)
    assert rows[0]["gain"] == 1.0
    assert all(row["us_per_step"] > 0 and row["gain"] > 0 for row in rows)
    assert torch.backends.mkldnn.rnn.fp32_precision == before


def test_the_table_has_means_and_the_least(tmp_path: Path):
    gains = {(1, "bfloat16"): [1.0, 4.0], (8, "bfloat16"): [3.0], (64, "bfloat16"): [3.0], (8, "float16"): [0.5]}
    rows = [
        {"B": batch, "type": kind, "workload": "inference", "gain": gain}
        for (batch, kind), each in gains.items()
        for gain in each
    ]
    data = {"rows": rows, "isa": "avx2", "device": "a processor"}
    (tmp_path / sixteen_bit.NAME).write_text(json.dumps(data))
    table = sixteen_bit.table(tmp_path).splitlines()
    assert table[2] == "| 1 | inference |  | 2.00 (1.00) |  |"
    assert table[4] == "| 8 and more | inference |  | 3.00 (3.00) | 0.50 (0.50) |"
    assert "no result file" in sixteen_bit.table(tmp_path / "nowhere")


@pytest.mark.parametrize(("suite", "curves"), [("sizes", True), ("sixteen-bit", False)])
def test_time_against_h_is_drawn_where_there_are_curves(suite: str, curves: bool):
    cases = [replace(case, dtype="bfloat16") for case in shapes.SUITES[suite]]
    rows = [
        {**case.row, "workload": "inference", "backend": "cpu", "correct": True, "ratio": 1.5, "us_per_step": 1.0}
        for case in dict.fromkeys(cases)
    ]
    record = records.Record(Path(f"cpu-{suite}.json"), {"suite": suite, "rows": rows}, "cpu")
    kinds = {figure.kind for figure in plot.figures_of(record)}
    assert "ratio" in kinds
    assert ("time" in kinds) == curves

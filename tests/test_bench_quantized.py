"""Benchmarks of quantized weights: a candidate more, what it is checked against, the table."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rnnfast.benchmark import Case, Impossible, measure
from rnnfast.benchmark.case import make_layers
from rnnfast.quantization import rounded

pytest.importorskip("matplotlib", reason="tables and figures need matplotlib: pip install rnnfast[bench]")

import plot
import quantization
import records

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["float32", "bf16", "int8"])
def test_a_layer_with_quantized_weights_is_one_more_candidate(kind: str):
    case = Case("LSTM", 2, 24, steps=3, proj_size=9, quantized=kind)
    assert case.name.endswith(f"weights-{kind}")
    rows = measure(case, "inference", 0.02, CPU)
    assert [row["backend"] for row in rows] == ["cpu", "cpu-quantized"]
    for row in rows:
        assert row["correct"], row["failure"]
        assert row["quantized"] == kind
    assert f"{kind} weights packed once" in rows[1]["plan"]
    assert "packed once" not in rows[0]["plan"]
    theirs, ours = make_layers(case, CPU)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, ours.state_dict()[name])
        if weight.dim() == 2:
            assert torch.equal(weight, rounded(weight, kind))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantized": "int4"}, "quantized: expected one of float32, bf16, int8, got 'int4'"),
        ({"quantized": "int8", "dtype": "bfloat16"}, "quantized: expected none in bfloat16, got 'int8'"),
    ],
)
def test_weights_that_cannot_be_quantized_so(fields: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        Case("LSTM", 2, 8, **fields)


def test_quantized_weights_are_not_trained():
    with pytest.raises(Impossible, match="quantized weights are not trained"):
        measure(Case("LSTM", 2, 8, steps=3, quantized="int8"), "training", 0.02, CPU)


def test_the_table_of_quantized_weights_divides_by_their_times():
    def rows(cell: str, hidden: int, **times: float) -> list[dict[str, Any]]:
        case = Case(cell, 1, hidden, quantized="int8")
        same = {**case.row, "correct": True, "ratio": 1.0}
        return [{**same, "backend": name.replace("_", "-"), "us_per_step": time} for name, time in times.items()]

    found = [*rows("LSTM", 64, cpu=6.0, cpu_quantized=3.0, peer=3.0), *rows("GRU", 64, cpu=8.0, cpu_quantized=1.0)]
    found += rows("LSTM", 512, cpu=5.0, cpu_quantized=10.0)
    data = {"suite": "quantized", "rows": found}
    table = quantization.speed_table([records.Record(Path("cpu-quantized.json"), data, "cpu")]).splitlines()
    assert table[0].endswith("| not quantized / quantized | peer / quantized |")
    assert table[2:] == [
        "| int8 |  | 1 | LSTM 64; GRU 64 | 4.00 (2.00) | 1.00 (1.00) |",
        "| int8 |  | 1 | LSTM 512 | 0.50 (0.50) |  |",
    ]
    assert plot.figures_of(records.Record(Path("cpu-quantized.json"), data, "cpu")) == []

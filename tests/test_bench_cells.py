"""Benchmarks of cells: loops of calls that agree with float64 and with a layer, what cannot be, limits, tables."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import cli
from rnnfast.benchmark import Case, Impossible, comparison, measure
from rnnfast.benchmark.case import BESIDE_CELLS, CELLS, compare, exact, is_ours, make_call, make_data, make_layers

pytest.importorskip("matplotlib", reason="tables and figures need matplotlib: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import limits
import peers
import plot
import readme
import records
import service
import shapes
from isolation import Settings

CPU = torch.device("cpu")
TINY = Case("LSTM", 2, 8, steps=3, input_size=5, cells=True)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["inference", "training"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_agrees_with_float64(cell: str, steps: int, workload: str):
    case = replace(TINY, cell=cell, steps=steps)
    theirs, ours = make_layers(case, CPU)
    assert type(theirs) is getattr(torch.nn, f"{cell}Cell")
    assert type(ours) is getattr(rnnfast, f"{cell}Cell")
    assert (is_ours(theirs), is_ours(ours)) == (False, True)
    data = make_data(case, CPU)
    results = [make_call(layer, case, workload, data)() for layer in (theirs, ours)]
    truth = exact(theirs, case, workload, data)
    assert all(value.dtype == torch.float64 for value in truth)
    assert compare(truth, *results) is None
    # The output and h, or the gradients of the input, two weights and two biases; c besides.
    expected = 6 if workload == "training" else 2 + (cell == "LSTM")
    assert len(truth) == len(results[0]) == len(results[1]) == expected
    (row,) = measure(case, workload, 0.01, CPU)
    assert row["correct"], row["failure"]
    assert row["ratio"] > 0
    assert "one step" in row["plan"]


@pytest.mark.parametrize("workload", ["inference", "training"])
def test_a_loop_of_cells_is_a_layer(workload: str):
    """The same weights, input and gradient of the output: the same results."""
    (cell, _), data = make_layers(TINY, CPU), make_data(TINY, CPU)
    layer_case = replace(TINY, cells=False)
    layer = make_layers(layer_case, CPU)[0]
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    looped, whole = make_call(cell, TINY, workload, data)(), make_call(layer, layer_case, workload, data)()
    for one, other in zip(looped, whole, strict=True):
        torch.testing.assert_close(one, other.squeeze(0) if one.dim() < other.dim() else other)


@pytest.mark.parametrize("workload", ["inference", "training"])
def test_a_wrong_cell_fails_and_is_not_timed(monkeypatch: pytest.MonkeyPatch, workload: str):
    """In the cell state alone, which only the calls after it show."""
    forward = rnnfast.LSTMCell.forward

    def off(self: rnnfast.LSTMCell, *arguments: Any) -> tuple[Tensor, Tensor]:
        h, c = forward(self, *arguments)
        return h, c * 1.001

    monkeypatch.setattr(rnnfast.LSTMCell, "forward", off)
    timed: list[Any] = []
    monkeypatch.setattr(comparison, "interleave", lambda *arguments: timed.append(arguments))
    (row,) = measure(TINY, workload, 0.01, CPU)
    assert not row["correct"]
    assert "result 0: error" in row["failure"]
    assert row["us_per_step"] is row["ratio"] is None
    assert not timed


# --- cases -----------------------------------------------------------------------------------------------------------


def test_the_name_and_the_row_say_it():
    assert TINY.name == "LSTM-T3-B2-I5-H8-cells"
    assert replace(TINY, dtype="bfloat16", model="mine").name == "mine LSTM-T3-B2-I5-H8-bfloat16-cells"
    assert TINY.row["cells"] is True
    assert replace(TINY, cells=False).row["cells"] is False


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("layers", 2, "layers: expected 1 for a loop of cells, got 2"),
        ("directions", 2, "directions: expected 1 for a loop of cells, got 2"),
        ("packed", True, "packed: expected False for a loop of cells, got True"),
        ("lengths", True, "lengths: expected False for a loop of cells, got True"),
        ("resets", 0.5, "resets: expected 0.0 for a loop of cells, got 0.5"),
        ("proj_size", 4, "proj_size: expected 0 for a loop of cells, got 4"),
        ("pause_ms", 1.0, "pause_ms: expected 0.0 for a loop of cells, got 1.0"),
        ("neighbours", 1, "neighbours: expected 0 for a loop of cells, got 1"),
        ("quantized", "int8", "quantized: expected '' for a loop of cells, got 'int8'"),
    ],
)
def test_what_no_cell_has_is_refused(field: str, value: Any, message: str):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **{field: value})
    # A layer has it, and nothing was forgotten here.
    assert replace(TINY, cells=False, **{field: value})
    assert field in BESIDE_CELLS
    assert len(BESIDE_CELLS) == 9


def test_there_is_no_streaming_of_cells():
    with pytest.raises(Impossible, match="inference of cells is one step a call already"):
        measure(TINY, "streaming", 0.01, CPU)


@pytest.mark.parametrize("name", peers.NAMES)
def test_peers_are_layers(name: str):
    reasons: list[tuple[str, str]] = []
    rows = measure(
        TINY, "inference", 0.01, CPU, peers=peers.named([name]), skipped=lambda *reason: reasons.append(reason)
    )
    assert [row["backend"] for row in rows] == ["cpu"]
    assert reasons == [(name, "a peer is a layer, and this case is a loop of cells")]
    assert not service.needs_turns(TINY, "inference", Settings(0.01, CPU, None, [name], True, 1))


def test_the_command_line_has_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "bench.json"
    options = "bench --cells --cell gru --hidden 8 --batch 2 --steps 4 --seconds 0.01 --json".split()
    assert cli.main([*options, str(path)]) == 0
    assert capsys.readouterr().out.startswith("GRU-T4-B2-I8-H8-cells: ")
    assert all(row["cells"] for row in json.loads(path.read_text())["rows"])


def test_the_suite():
    cases = shapes.SUITES["cells"]
    own = [case for case in cases if not case.model]
    assert all(case.cells and case.dtype == "float32" for case in cases)
    assert {case.cell for case in own} == set(CELLS)
    assert {case.steps for case in own} == {1, 20}
    assert len(own) == 36
    assert {case.model for case in cases} == {"", "Tacotron2 decoder", "GatedGraphConv", "BabyAI PPO"}


# --- limits ----------------------------------------------------------------------------------------------------------


def test_bytes_have_the_weights_of_each_step():
    case = replace(TINY, steps=10)
    rows, weights = 2 * 5, 32 * (5 + 8)
    assert case.weights() == weights
    assert case.bytes("inference") == 4 * (rows + 2 * 8 + weights)
    # Forward and backward, and the gradients once.
    assert case.bytes("training") == 4 * (3 * rows + 2 * 2 * 8 + 2 * weights + weights / 10)
    one = replace(case, steps=1)
    for workload in ("inference", "training"):
        assert one.bytes(workload) == replace(one, cells=False).bytes(workload)


def machine(near: float, memory: float, call: float = 0.0) -> limits.Machine:
    """One core with infinite arithmetic, so many bytes a second from a level that holds all, and from memory."""
    levels = (limits.Level("near", 1e6, near), limits.Level("memory", math.inf, memory, shared=True))
    return limits.Machine("m", 1, {"float32": 1e18}, levels, ((math.inf, 1.0),), call, False, "test")


def test_the_chain_reads_all_weights_in_each_step():
    case = replace(TINY, steps=1000)
    fast = machine(near=1e10, memory=1e18)
    assert limits.chain(case, "inference", fast, 1e18) == pytest.approx(4 * 32 * (5 + 8) / 1e10)
    assert limits.chain(replace(case, cells=False), "inference", fast, 1e18) == pytest.approx(4 * 32 * 8 / 1e10)


def test_each_step_is_a_call_or_two():
    called = machine(near=1e18, memory=1e18, call=1e-5)
    assert limits.limit_us_per_step(replace(TINY, steps=1000), "inference", called) == pytest.approx(10.0)
    assert limits.limit_us_per_step(replace(TINY, steps=1000), "training", called) == pytest.approx(20.0)


@pytest.mark.parametrize("workload", ["inference", "training"])
def test_memory_gives_the_weights_once(workload: str):
    """Cells may find them in a cache in all steps but the first, so that more would be no limit."""
    slow = machine(near=1e18, memory=1e3)
    layer = limits.limit_us_per_step(replace(TINY, cells=False), workload, slow)
    assert limits.limit_us_per_step(TINY, workload, slow) == pytest.approx(layer)


# --- figures and tables ----------------------------------------------------------------------------------------------


def record(cases: list[Case], ratio: float = 2.0) -> records.Record:
    rows = [
        {
            **case.row,
            "workload": workload,
            "backend": "cpu",
            "correct": True,
            "ratio": ratio,
            "p20": ratio,
            "p80": ratio,
            "us_per_step": 1.0,
            "torch_us_per_step": ratio,
            "limit_us_per_step": None,
        }
        for case in cases
        for workload in ("inference", "training")
    ]
    data = {"suite": "cells", "device": "a processor", "torch": "2.13.0", "rows": rows}
    return records.Record(Path("cpu-cells.json"), data, "cpu")


def test_no_figure_mixes_cells_and_layers():
    layers = [replace(case, cells=False) for case in shapes.SUITES["cells"] if not case.model]
    assert [figure.kind for figure in plot.figures_of(record(shapes.SUITES["cells"]))] == ["bars"]
    mixed = record([*layers, *shapes.SUITES["cells"]])
    assert {figure.kind for figure in plot.figures_of(mixed)} > {"bars"}
    assert not any(map(records.is_loop, plot.plain(mixed)))
    assert all(map(records.is_loop, plot.unmapped(mixed)))
    # Of files from before there were such cases all rows are of layers.
    older = [{key: value for key, value in row.items() if key != "cells"} for row in mixed.rows[:4]]
    assert all(map(plot.is_plain, older))
    assert not any(map(records.is_loop, older))


def test_the_table_of_cells():
    assert readme.cell_speeds([]) == "There is no result file of the suite `cells` yet."
    fast = record(shapes.SUITES["cells"])
    fast.rows[0].update(ratio=0.5, p20=0.4, p80=0.6)
    lines = readme.cell_speeds([fast]).splitlines()
    assert lines[0] == "Ratio of torch.nn's time to rnnfast's: a processor, torch 2.13.0."
    assert lines[2] == "| cell | inference: mean | worst | training: mean | worst |"
    # The geometric mean of 0.5 and five times 2.
    assert lines[4] == "| LSTMCell, T = 20 | 1.59 | 0.50 (B=1, H=64) | 2.00 | 2.00 (B=1, H=64) |"
    assert lines[9] == "| RNNCell, T = 1 | 2.00 | 2.00 (B=1, H=64) | 2.00 | 2.00 (B=1, H=64) |"
    assert lines[11].startswith("| GatedGraphConv: GRUCell, T = 5 | 2.00 | 2.00 (B=2000, H=64) |")
    assert "LSTM inference, T=20, B=1, H=64: 0.50 (0.40 to 0.60)." in " ".join(lines)
    assert lines[-1].startswith("![bars of the ratio of each case, suite cells, cpu](figures/cpu-cells-bars.png)")

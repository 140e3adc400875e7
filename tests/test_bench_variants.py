"""Benchmarks of layers with options: loops that compute what the layers do, what a case and a row say, tables."""

from __future__ import annotations

import json
import math
import pickle
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import rnnfast
from rnnfast.benchmark import Impossible
from rnnfast.benchmark.case import CELLS, make_call, make_data

pytest.importorskip("matplotlib", reason="tables and figures need matplotlib: pip install rnnfast[bench]")
pytest.importorskip("jinja2", reason="the page is written with jinja2: pip install rnnfast[bench]")
pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import isolation
import limits
import peers
import plot
import pytorch_loops
import readme
import records
import report
import run
import service
import shapes
import variants
from variants import ASKED_OF, VARIANTS, VariantCase

CPU = torch.device("cpu")
SUITE = shapes.SUITES["variants"]
PAIRS = [(cell, name) for cell in CELLS for name, variant in VARIANTS.items() if cell in variant.cells]
TINY = VariantCase("LSTM", 2, 8, steps=4, input_size=5, variant="layer-norm-joint")

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the loops -------------------------------------------------------------------------------------------------------


def randomise(layer: nn.Module) -> None:
    """No parameter stays at a value that would hide what it does."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        values = torch.rand(parameter.shape, generator=generator).double() - 0.5
        parameter.data.copy_(values + name.startswith("weight_norm"))


@pytest.mark.parametrize("workload", ["training", "inference", "streaming"])
@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_loops_compute_what_the_layers_do(cell: str, name: str, workload: str) -> None:
    """In training with all gradients, and with the masks of one seed; in streaming with states that are handed on."""
    case = VariantCase(cell, 3, 8, steps=5, input_size=6, dtype="float64", variant=name)
    layers, data = variants.make_layers(case, CPU), make_data(case, CPU)
    randomise(layers.ours)
    loop = pytorch_loops.loop_of(layers.ours)
    ours, theirs = (
        variants.drawn_alike(make_call(layer, case, workload, data))  # type: ignore[arg-type]
        for layer in (layers.ours, loop)
    )
    names = [parameter.removesuffix("_l0") for parameter, _ in layers.ours.named_parameters()]
    assert names == [parameter for parameter, _ in loop.named_parameters()]
    assert len(ours) == (2 + len(names) if workload == "training" else 2 + (cell == "LSTM"))
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        assert_close(one, other, rtol=1e-10, atol=1e-10, msg=lambda text, number=number: f"result {number}: {text}")
        assert one.abs().max() > 0


@pytest.mark.parametrize("name", ["zoneout", "recurrent-dropout", "candidate-dropout", "input-dropout"])
def test_what_is_drawn_changes_the_training_alone(name: str) -> None:
    case = VariantCase("LSTM", 3, 8, steps=5, variant=name)
    layers, data = variants.make_layers(case, CPU), make_data(case, CPU)
    for layer in (layers.ours, layers.loop):
        for workload, same in (("training", False), ("inference", True)):
            call = make_call(layer, case, workload, data)  # type: ignore[arg-type]
            assert torch.equal(call()[0], call()[0]) == same


def test_each_option_is_some_variants() -> None:
    timed = {option for variant in VARIANTS.values() for option in variant.options}
    assert timed >= set(
        "layer_norm cell_norm norm zoneout recurrent_dropout dropout_mode input_dropout weight_dropout peephole "
        "coupled reset_after num_heads gate_activation preset".split()
    )
    # Whether a cell has an option the layers know, and refuse what they do not have.
    for cell in CELLS:
        for name, variant in VARIANTS.items():
            if cell in variant.cells:
                assert getattr(rnnfast, cell)(8, 8, **variant.options)._options is not None
            else:
                with pytest.raises(ValueError):
                    getattr(rnnfast, cell)(8, 8, **variant.options)
                with pytest.raises(ValueError, match=f"variant: expected one of layer-norm-separate, .* got '{name}'"):
                    VariantCase(cell, 2, 8, variant=name)


# --- cases -----------------------------------------------------------------------------------------------------------


def test_the_suite() -> None:
    assert all(isinstance(case, VariantCase) and case.dtype == "float32" and case.steps == 100 for case in SUITE)
    assert len({case.name for case in SUITE}) == len(SUITE)
    asked = {(case.cell, case.variant) for case in SUITE if (case.batch, case.hidden_size) == (16, 256)}
    assert asked == set(PAIRS)
    others = {(case.batch, case.hidden_size): set() for case in SUITE}
    for case in SUITE:
        others[case.batch, case.hidden_size].add((case.cell, case.variant))
    assert set(others) == {(16, 256), (1, 128), (64, 512)}
    assert others[64, 512] == {(cell, "layer-norm-joint") for cell in CELLS}
    assert all(case.why_not(workload) is None for case in SUITE for workload in ("inference", "training", "streaming"))


def test_the_name_and_the_row_say_it() -> None:
    assert TINY.name == "LSTM-T4-B2-I5-H8-layer-norm-joint"
    assert replace(TINY, dtype="bfloat16").name == "LSTM-T4-B2-I5-H8-bfloat16-layer-norm-joint"
    assert TINY.row == {**TINY.plain.row, "case": TINY.name, "variant": "layer-norm-joint"}
    assert type(TINY.plain) is not VariantCase
    assert TINY.plain.name == "LSTM-T4-B2-I5-H8"
    assert pickle.loads(pickle.dumps(TINY)) == TINY != TINY.plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"variant": ""}, "variant: expected one of layer-norm-separate, .* with cell LSTM, got ''"),
        ({"cell": "RNN", "variant": "peephole"}, "variant: expected one of .* with cell RNN, got 'peephole'"),
        ({"layers": 2}, "layers: expected 1 for a variant, got 2"),
        ({"directions": 2}, "directions: expected 1 for a variant, got 2"),
        ({"packed": True}, "packed: expected False for a variant, got True"),
        ({"lengths": True}, "lengths: expected False for a variant, got True"),
        ({"resets": 0.5}, "resets: expected 0.0 for a variant, got 0.5"),
        ({"proj_size": 4}, "proj_size: expected 0 for a variant, got 4"),
        ({"pause_ms": 1.0}, "pause_ms: expected 0.0 for a variant, got 1.0"),
        ({"neighbours": 1}, "neighbours: expected 0 for a variant, got 1"),
        ({"quantized": "int8"}, "quantized: expected '' for a variant, got 'int8'"),
        ({"cells": True}, "cells: expected False for a variant, got True"),
        ({"batch": 0}, "batch: expected at least 1, got 0"),
    ],
    ids=str,
)
def test_what_no_variant_has_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(TINY, **changes)


@pytest.mark.parametrize(("cell", "name"), PAIRS)
def test_flops_are_those_of_the_weights_that_there_are(cell: str, name: str) -> None:
    case = VariantCase(cell, 3, 8, steps=5, input_size=6, variant=name)
    layer = variants.make_layers(case, CPU).ours
    assert case.weights() == sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    assert case.recurrent_weights == layer.weight_hh_l0.numel()
    assert case.flops("training") == 3 * case.flops("inference") == 6 * 3 * case.weights()
    if name not in ("coupled", "heads"):
        assert case.weights() == case.plain.weights()
        assert case.bytes("training") == case.plain.bytes("training")


@pytest.mark.parametrize(("name", "share"), [("zoneout", 1), ("heads", 1 / 4), ("coupled", 3 / 4)])
def test_the_chain_reads_the_weights_that_there_are(name: str, share: float) -> None:
    levels = (limits.Level("near", 1e6, 1e10), limits.Level("memory", math.inf, 1e18, shared=True))
    machine = limits.Machine("m", 1, {"float32": 1e18}, levels, ((math.inf, 1.0),), 0.0, False, "test")
    case = VariantCase("LSTM", 1, 32, steps=1000, variant=name)
    assert limits.chain(case, "inference", machine, 1e18) == pytest.approx(share * 4 * 128 * 32 / 1e10)


# --- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["inference", "training", "streaming"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["layer-and-cell-norm", "zoneout"])
def test_a_row_has_the_loop_and_the_plain_layer(name: str, dtype: str, workload: str) -> None:
    (row,) = variants.measure(replace(TINY, variant=name, dtype=dtype), workload, 0.01, CPU)
    assert row["correct"], row["failure"]
    assert (row["backend"], row["against"], row["variant"]) == ("cpu", "loop", name)
    assert "options" in row["plan"]
    assert 0 < row["p20"] <= row["ratio"] <= row["p80"]
    assert min(row["plain_us_per_step"], row["us_per_step"], row["torch_us_per_step"], row["over_plain"]) > 0
    assert row["peak_memory_bytes"] > 0
    assert row["torch_peak_memory_bytes"] > 0
    assert {"core_to_core_ns", "others_busy", "contended"} <= set(row)


@pytest.fixture
def wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Layers with options a little off in their output; gives what is timed all the same."""
    forward = rnnfast.LSTM.forward

    def off(self: Any, *arguments: Any, **options: Any) -> Any:
        output, state = forward(self, *arguments, **options)
        return output * (1.001 if self._options is not None else 1), state

    monkeypatch.setattr(rnnfast.LSTM, "forward", off)
    timed: list[Any] = []
    monkeypatch.setattr(variants, "interleave", lambda *arguments: timed.append(arguments))
    return timed


@pytest.mark.parametrize("workload", ["inference", "training", "streaming"])
def test_a_wrong_layer_fails_and_is_not_timed(wrong_kernel: list[Any], workload: str) -> None:
    (row,) = variants.measure(TINY, workload, 0.01, CPU)
    assert not row["correct"]
    assert "result 0: error" in row["failure"]
    assert row["us_per_step"] is row["ratio"] is row["over_plain"] is row["plain_us_per_step"] is None
    assert not wrong_kernel


def test_a_failing_backend_fails_and_the_others_go_on() -> None:
    rows = variants.measure(TINY, "training", 0.01, CPU, backends=["cuda", "cpu", "reference"])
    assert [row["correct"] for row in rows] == [False, True, True]
    assert all((row["ratio"] is None) == (row["backend"] == "cuda") for row in rows)
    assert rows[2]["over_plain"] > 0


def test_there_are_kernels_for_the_cpu_alone() -> None:
    with pytest.raises(Impossible, match="kernels for the CPU alone"):
        variants.measure(TINY, "training", 0.01, torch.device("cuda"))
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
        variants.measure(TINY, "training", 0.01, CPU, backends=["cpuu"])


def test_it_is_measured_in_a_process_of_its_own_and_without_peers() -> None:
    reasons: list[tuple[str, str]] = []
    settings = isolation.Settings(0.01, CPU, None, ["onnxruntime"], True, 1)
    assert not service.needs_turns(TINY, "inference", settings)
    (row,) = isolation.Processes().measure(TINY, "inference", settings, lambda *why: reasons.append(why))
    assert row["correct"], row["failure"]
    assert row["over_plain"] > 0
    assert reasons == [("onnxruntime", "a peer is a layer without options")]
    assert peers.NAMES


def test_the_command_measures_the_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(shapes.SUITES, "variants", [TINY, replace(TINY, cell="GRU", variant="reset-before")])
    monkeypatch.setattr(run, "this_machine", lambda *arguments: None)
    monkeypatch.setattr(run.signal, "signal", lambda *arguments: None)
    arguments = "--suite variants --seconds 0.01 --threads 1 --patience 0 --in-process --out".split()
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments, str(tmp_path)])
    assert run.main() == 0
    printed = capsys.readouterr().out
    assert "plain layer" in printed
    assert "ratio = the time of a loop of PyTorch's operations / the row's time" in printed
    record = records.load(tmp_path / "cpu-variants.json")
    assert record is not None
    assert [row["variant"] for row in record.rows] == 2 * ["layer-norm-joint"] + 2 * ["reset-before"]


# --- tables and figures ----------------------------------------------------------------------------------------------


def rows_of(cases: Sequence[Any], ratio: float = 8.0, over_plain: float | None = 1.2) -> list[dict[str, Any]]:
    return [
        {
            **case.row,
            "workload": workload,
            "backend": "cpu",
            "correct": True,
            "failure": None,
            "ratio": ratio,
            "p20": ratio,
            "p80": ratio,
            "us_per_step": 1.0,
            "torch_us_per_step": ratio,
            "limit_us_per_step": 0.5,
            "plain_us_per_step": over_plain and 1 / over_plain,
            "over_plain": over_plain,
            "peak_memory_bytes": 1,
            "torch_peak_memory_bytes": 1,
        }
        for case in cases
        for workload in ("inference", "training")
    ]


def written(folder: Path, rows: Sequence[dict[str, Any]], suite: str = "variants") -> records.Record:
    about = {"device": "a processor", "torch": "2.13.0", "commit": "0" * 12, "date": "2026-01-02T03:04:05Z"}
    (folder / f"cpu-{suite}.json").write_text(json.dumps({**about, "suite": suite, "rows": rows}))
    record = records.load(folder / f"cpu-{suite}.json")
    assert record is not None
    return record


def test_what_is_asked_of_them() -> None:
    rows = rows_of(SUITE)
    assert sum(map(variants.is_asked_of, rows)) == len(PAIRS)
    assert variants.missed(rows) == []
    training = [row for row in rows if variants.is_asked_of(row)]
    training[0].update(ratio=4.5)
    training[1].update(over_plain=1.625)
    training[2].update(ratio=None, over_plain=None)
    # In inference, and at other sizes, nothing is.
    rows[0].update(ratio=0.5, over_plain=9.0)
    rows[-1].update(ratio=0.5, over_plain=9.0)
    size = "-".join(f"{key}{ASKED_OF[key]}" for key in "TBIH")
    assert variants.missed(rows) == [
        f"LSTM-{size}-layer-norm-separate cpu: 4.50 times as fast as the loop",
        f"LSTM-{size}-layer-norm-joint cpu: 1.62 times the plain layer's time",
        "Asked for in training (T = 100, B = 16, H = 256): at least 5 times as fast as the loop, at most 1.5 times the "
        "plain layer's time.",
    ]
    assert variants.missed([{**TINY.plain.row, "ratio": 0.1}]) == []


def test_the_table(tmp_path: Path) -> None:
    assert variants.speed_table([]) == "There is no result file of the suite `variants` yet."
    rows = rows_of(SUITE)
    rows[1].update(ratio=2.0, over_plain=None)
    rows[3].update(ratio=16.0, over_plain=1.4, contended=True)
    text = variants.speed_table([written(tmp_path, rows)])
    lines = text.splitlines()
    assert lines[0] == (
        "| cell, options, size | inference: loop / rnnfast | rnnfast / plain layer | training: loop / rnnfast "
        "| rnnfast / plain layer |"
    )
    assert lines[2] == "| LSTM, layer-norm-separate, T=100, B=16, H=256 | 8.00 | 1.20 | 2.00 |  |"
    assert lines[3] == "| LSTM, layer-norm-joint, T=100, B=16, H=256 | 8.00 | 1.20 | 16.00 | 1.40 |"
    assert len([line for line in lines if line.startswith("| ")]) == 2 + len(SUITE)
    assert "In training at T=100, B=16, H=256: 2.0 to 16.0 times as fast as the loop (geometric mean" in text
    assert "in 1.20 to 1.40 times the plain layer's time" in text
    assert text.endswith(f"1 of the {len(rows)} rows were timed beside other load.")


def test_figures_say_that_they_are_of_loops(tmp_path: Path) -> None:
    layers = [case.plain for case in SUITE if case.variant == "layer-norm-joint"]
    record = written(tmp_path, rows_of(SUITE))
    assert [figure.kind for figure in plot.figures_of(record)] == ["bars"]
    assert not any(map(plot.is_plain, record.rows))
    for rows, against in (
        (rows_of(SUITE), "a PyTorch loop"),
        (rows_of([*SUITE, *layers[:3]]), "torch.nn or a PyTorch loop"),
        (rows_of(layers[:3]), "torch.nn"),
    ):
        figure = plot.bars_figure(written(tmp_path, rows))
        assert {axis.get_xlabel() for axis in figure.axes} == {f"times as fast as {against}"}
        assert f"above 1 faster than {against}\n" in figure.legends[0].get_title().get_text()


def test_lines_are_drawn_where_they_were(tmp_path: Path) -> None:
    cases = [replace(TINY.plain, batch=batch, hidden_size=hidden) for batch in (1, 2, 4) for hidden in (8, 16, 32)]
    record = written(tmp_path, rows_of(cases), "grid")
    kinds = [figure.kind for figure in plot.figures_of(record)]
    assert kinds == ["ratio", "time", "ratio", "time", "scaling"]
    for figure in plot.figures_of(record):
        assert plot.drawn(record, figure).startswith(b"\x89PNG")


def test_nothing_else_is_said_with_their_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in records.RESULTS.glob("cpu-*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cpu-variants.json").unlink(missing_ok=True)
    without = readme.blocks(tmp_path)
    before = {name: without[name]() for name in without if name.startswith("cpu ") and "kept" not in name}
    record = written(tmp_path, rows_of(SUITE, ratio=0.01))
    blocks = readme.blocks(tmp_path)
    assert {name: blocks[name]() for name in before if name != "cpu repeat"} == {
        name: text for name, text in before.items() if name != "cpu repeat"
    }
    assert set(blocks) - set(without) == {"variant speeds"}
    assert blocks["variant speeds"]().endswith("(figures/cpu-variants-bars.png)")
    # `python -m rnnfast bench` has none of them.
    assert records.worst_of([record], 3) == []


def test_the_page_has_columns_of_them(tmp_path: Path) -> None:
    layer = written(tmp_path, rows_of([TINY.plain], ratio=2.0, over_plain=None), "sizes")
    record = written(tmp_path, rows_of([TINY], ratio=8.0, over_plain=1.25))
    text = report.page([layer, record], None)
    assert records.AGAINST_LOOPS in text.replace("&#39;", "'")
    assert "2 of layers with options, in none of the ratios here" in text
    assert "<dd>2.00<small>of all rows of rnnfast in all suites" in text
    for shown in (">plain layer µs/step<", ">over plain layer<", ">0.80<", ">1.25<"):
        assert shown in text
    text = report.page([layer], None)
    assert "plain layer µs/step" not in text
    assert "options" not in text.split("<main>")[0]


def test_the_short_table_says_what_they_are_compared_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = written(tmp_path, rows_of([TINY]))
    monkeypatch.setattr(sys, "argv", ["records.py", str(record.path)])
    assert records.main() == 0
    assert capsys.readouterr().out.endswith(records.AGAINST_LOOPS + "\n")

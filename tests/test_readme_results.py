"""What the pages say about speed is what the result files say, and their figures were drawn from them."""

import argparse
import importlib.util
import itertools
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import plot
import readme
import records
import shapes
import step_model
from rnnfast.benchmark import command

ADVICE = "run `make readme-figures`"

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed: pip install rnnfast[bench]"
)


def test_every_block_is_as_the_result_files_are():
    texts = [path.read_text(encoding="utf-8") for path in readme.DOCUMENTS]
    for text in texts:
        assert readme.filled(text) == text, ADVICE
    # None was lost, and none is written twice by different hands.
    found = re.findall(r"<!-- results: (.+?) -->", "".join(texts))
    assert sorted(found) == sorted(readme.blocks())


def test_a_number_that_was_changed_is_noticed():
    checked = set()
    for text in (path.read_text(encoding="utf-8") for path in readme.DOCUMENTS):
        for name in re.findall(r"<!-- results: (.+?) -->", text):
            block = re.search(rf"<!-- results: {name} -->.*?<!-- end of {name} -->", text, re.DOTALL)
            assert block is not None
            number = re.search(r"(?<!torch )\b\d\.\d+(?![\d.])", block[0])
            if number is not None:
                at = block.start() + number.start()
                assert readme.filled(text[:at] + "7.77" + text[at + len(number[0]) :]) == text, name
                checked.add(name)
    assert {"cpu summary", "cpu speeds", "cpu slower", "cpu packed", "character model", "digits", "textbook"} <= checked


def test_no_speed_stands_outside_the_blocks():
    text = readme.README.read_text(encoding="utf-8")
    text = re.sub(r"<!-- results: (.+?) -->.*?<!-- end of \1 -->", "", text, flags=re.DOTALL)
    found = re.findall(r"[^\n]*\b\d+(?:\.\d+)?(?: ?%| ?x faster| times (?:as|faster)| ?[mµu]s\b)[^\n]*", text)
    assert not found


def test_wrong_markers_are_errors():
    with pytest.raises(ValueError, match="no block is called 'nothing'"):
        readme.filled("<!-- results: nothing -->\n<!-- end of nothing -->")
    with pytest.raises(ValueError, match="begin as"):
        readme.filled("<!-- results: textbook -->\nwithout an end")


def test_figures_show_the_result_files():
    expected = {figure.name: record for record in records.load_all() for figure in plot.figures_of(record)}
    there = {path.name for path in plot.FIGURES.glob("*.png")}
    assert there == set(expected), ADVICE
    for name, record in expected.items():
        assert plot.source_of(plot.FIGURES / name) == plot.fingerprint(record), f"{name}: {ADVICE}"
    assert sum(path.stat().st_size for path in plot.FIGURES.glob("*.png")) < 3 << 20


@pytest.mark.parametrize("name", ["charlm-lstm", "digits-gru"])
def test_the_demos_agreed(name):
    assert json.loads((records.RESULTS / f"{name}-cpu.json").read_text())["agree"]


# ---- result files that are not there yet: a card's ------------------------------------------------------------------


def row(
    cell: str, dtype: str, B: int, H: int, T: int, workload: str, backend: str, ratio: float | None
) -> dict[str, Any]:
    return {
        "case": f"{cell}-T{T}-B{B}-I{H}-H{H}-{dtype}",
        "cell": cell,
        "layers": 1,
        "directions": 1,
        "dtype": dtype,
        "T": T,
        "B": B,
        "I": H,
        "H": H,
        **dict.fromkeys(("P", "packed", "lengths", "resets"), 0),
        "model": "",
        "workload": workload,
        "backend": backend,
        "us_per_step": None if ratio is None else 2.0 / ratio,
        "torch_us_per_step": 2.0,
        "ratio": ratio,
        "p20": ratio,
        "p80": ratio,
        "limit_us_per_step": 0.5,
        "plan": "step",
        "correct": ratio is not None,
        "failure": None if ratio is not None else "result 0: error 1, allowed 0.1",
        "against": "torch-graph" if backend.endswith("-graph") else "torch",
    }


@pytest.fixture
def card(tmp_path: Path) -> Path:
    """A folder with the results of a card: a grid and a sweep over T, one row of it wrong."""
    about = {"device": "NVIDIA H200", "torch": "2.11.0", "cuda": "13.0", "cudnn": 91000, "commit": "0" * 12}
    about["date"] = "2026-01-01T00:00:00Z"
    grid = [
        row(cell, dtype, B, H, 100, "inference", backend, 2.0 if backend == "cuda" else 0.5)
        for cell, dtype, B, H, backend in itertools.product(
            ("LSTM", "GRU"), ("bfloat16", "float32"), (1, 16), (64, 256, 1024), ("cuda", "cuda-graph")
        )
    ]
    sweep = [row("LSTM", "bfloat16", 16, 768, T, "training", "cuda", 4.0) for T in (128, 256, 512)]
    sweep.append(row("LSTM", "bfloat16", 16, 768, 1024, "training", "cuda", None))
    for suite, rows in (("grid", grid), ("flashrnn", sweep)):
        (tmp_path / f"h200-{suite}.json").write_text(json.dumps({**about, "suite": suite, "rows": rows}))
    return tmp_path


def test_gpu_block(card: Path):
    text = readme.gpu(records.load_all(card))
    assert "NVIDIA H200, torch 2.11.0, cuda 13.0" in text
    assert "| grid, LSTM, cuda | 2.00 | 2.00 (B=1, H=64, bfloat16) |" in text
    assert "| grid, GRU, cuda-graph | 0.50 |" in text
    assert "| flashrnn, LSTM, cuda |  |  | 4.00 | 4.00 (B=16, H=768, bfloat16) |" in text
    assert "Of 51 rows in these files torch.nn is faster in 24" in text
    assert "1 rows gave wrong results or failed, and were not timed." in text


def test_rows_beside_other_load_are_counted(card: Path):
    path = card / "h200-flashrnn.json"
    data = json.loads(path.read_text())
    for each, loaded in zip(data["rows"], (True, False, None), strict=False):
        each["contended"] = loaded
    path.write_text(json.dumps(data))
    assert "\n1 of the 51 rows were timed beside other load.\n" in readme.gpu(records.load_all(card))


def test_worst_cases(card: Path):
    lines = readme.worst_cases(records.load_all(card), 3).splitlines()
    expected = (
        "| grid | LSTM-T100-B1-I64-H64-bfloat16 | inference | cuda-graph | 4.00 | 2.00 | 0.50 (0.50 to 0.50) | 12 |"
    )
    assert lines[2] == expected
    assert len(lines) == 5


def test_constants_of_a_card(tmp_path: Path):
    assert "no result file" in readme.microbenchmarks(tmp_path)
    lines = [{"what": "device", "name": "A card"}, {"what": "launch", "ctas": 1, "us": 1.5, "correct": True}]
    (tmp_path / "h200-microbench.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert readme.microbenchmarks(tmp_path) == "A card, launch:\n\n| ctas | us |\n| --- | --- |\n| 1 | 1.5 |"


def test_step_model():
    """Against a case computed by hand: 64 blocks of (64 + 16) rows of 1024 16-bit values, 5.5 TB/s; beside it a launch,
    h from L2, a barrier, and two warps on each sub-core with a cell a thread: five functions, four gates."""
    step = step_model.step("LSTM", "bfloat16", 16, 1024)
    assert (step.blocks, step.l2_bytes, step.bound) == (64, 64 * 80 * 1024 * 2, "L2")
    cells = 2 * (5 * 24 + 4 * 15 + 100) / 1.755e9
    assert step.seconds == pytest.approx(1.3e-6 + 0.18e-6 + cells + 64 * 80 * 2048 / 5.5e12)
    backward = step_model.step("LSTM", "bfloat16", 16, 1024, backward=True)
    assert backward.l2_bytes == 64 * (16 + 16) * 4096 * 2


def test_worst_cases_become_options_of_the_bench_command(card: Path):
    lines = records.worst_of(records.load_all(card), 2)
    assert len(lines) == 2
    assert lines[0].endswith("--backends cuda")
    from rnnfast.cli import main

    options = lines[0].replace("--backends cuda", "--backends reference").split()
    # The shape is a card's; a smaller one says as much about the options.
    for name, small in (("--hidden", "4"), ("--input", "4"), ("--batch", "2"), ("--steps", "3")):
        options[options.index(name) + 1] = small
    assert main(["bench", *options, "--seconds", "0.01"]) == 0


@pytest.mark.parametrize("suite", ["smoke", "models", "quantized", "cells"])
def test_a_row_has_all_that_the_bench_command_needs(suite: str):
    """A case's row, written as the command's options, gives the case again."""
    parser = argparse.ArgumentParser()
    command.add_options(parser)
    for case in shapes.SUITES[suite]:
        if case.served:
            continue
        backend = "cpu-quantized" if case.quantized else "cpu-graph"
        row = {**case.row, "workload": "training", "backend": backend}
        options = parser.parse_args(records.bench_options(row).split())
        assert (options.workload, options.backends) == (["training"], ["cpu"])
        assert command.case_of(options).row == replace(case, model="").row


def test_short_table(card: Path):
    lines = records.short_table(records.load_all(card)).splitlines()
    assert re.fullmatch(r"h200 +grid +inference +cuda +24 +0 +2\.00 +2\.00 +LSTM-T100-B1-I64-H64-bfloat16", lines[1])
    assert re.fullmatch(r"h200 +flashrnn +training +cuda +3 +1 +4\.00 +4\.00 +\S+", lines[3])


def test_changes_between_two_runs(card: Path, tmp_path: Path):
    """A second run in which the CUDA rows of one cell are faster by half, and one case is missing."""
    later = tmp_path / "later"
    later.mkdir()
    for path in card.glob("*.json"):
        data = json.loads(path.read_text())
        for each in data["rows"]:
            if (each["cell"], each["backend"], data["suite"]) == ("GRU", "cuda", "grid"):
                each.update({key: 1.5 * each[key] for key in ("ratio", "p20", "p80")})
        data["rows"] = [each for each in data["rows"] if each["case"] != "GRU-T100-B1-I64-H64-bfloat16"]
        (later / path.name).write_text(json.dumps(data))
    before, now = records.load_all(card), records.load_all(later)
    found = {(c.suite, c.cell, c.workload, c.backend): c for c in records.changes(before, now)}
    changed = found["grid", "GRU", "inference", "cuda"]
    assert (changed.cases, changed.before, changed.now) == (11, pytest.approx(2.0), pytest.approx(3.0))
    same = found["grid", "LSTM", "inference", "cuda"]
    assert (same.cases, same.before, same.now, same.factor) == (12, pytest.approx(2.0), pytest.approx(2.0), 1.0)
    whole = found["grid", "all", "", ""]
    assert whole.now / whole.before == pytest.approx(1.5 ** (11 / 46))
    assert whole.factor == pytest.approx(1.5)
    assert "GRU" in whole.most
    # The wrong row of the sweep has no ratio.
    assert found["flashrnn", "all", "", ""].cases == 3
    lines = records.change_table(records.changes(before, now)).splitlines()
    assert re.fullmatch(
        r"h200 +grid +GRU +inference +cuda +11 +2\.00 +3\.00( +\+50\.0% +changed){2} +GRU-T100-\S+ inference",
        lines[3],
    ), lines


@needs_matplotlib
def test_figures_of_a_card(card: Path, tmp_path: Path):
    grid, flashrnn = records.load_all(card)
    drawn = plot.draw(grid, tmp_path) + plot.draw(flashrnn, tmp_path)
    names = ["grid-ratio-inference-cuda-graph", "grid-time-inference", "flashrnn-scaling", "flashrnn-bars"]
    assert [path.name for path in drawn] == [f"h200-{name}.png" for name in names]
    assert plot.source_of(drawn[0]) == plot.fingerprint(grid)
    assert plot.source_of(drawn[2]) == plot.fingerprint(flashrnn) != plot.fingerprint(grid)

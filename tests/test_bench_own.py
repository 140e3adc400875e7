"""Suites and peers of one's own, parts of suites, and the page that describes them, run as it stands there."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnnfast.backends import BACKENDS
from rnnfast.benchmark import Case, comparison

pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import peers
import records
import run
import shapes

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
TINY = {"cell": "LSTM", "batch": 2, "hidden_size": 8, "steps": 5}
QUICK = ["--seconds", "0.01", "--threads", "1", "--patience", "0"]


@pytest.fixture
def suite(monkeypatch, capsys, tmp_path):
    """Runs the command in this process, its files in tmp_path; gives the exit status and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "this_machine", lambda *arguments: None)
    monkeypatch.setattr(run.signal, "signal", lambda *arguments: None)
    before = torch.get_num_threads()

    def call(*arguments):
        words = ["run.py", *map(str, arguments), *QUICK, "--in-process", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", words)
        try:
            status = run.main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    yield call
    torch.set_num_threads(before)


# --- shapes ----------------------------------------------------------------------------------------------------------


def written(folder, value, name="my.json"):
    path = folder / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


def test_a_suite_from_a_file(tmp_path):
    every = {"input_size": 3, "layers": 2, "directions": 2, "dtype": "float64", "resets": 0.5, "proj_size": 4}
    every |= {"pause_ms": 0.5, "neighbours": 3, "packed": False, "lengths": False, "model": "mine", "source": "here"}
    path = written(tmp_path, [TINY, {**TINY, **every}, {**TINY, "resets": 1}, {**TINY, "cells": True}])
    expected = [Case(**TINY), Case(**TINY, **every), Case(**TINY, resets=1), Case(**TINY, cells=True)]
    assert shapes.read(path) == ("my", expected)
    assert shapes.read(written(tmp_path, {"name": "other", "cases": [TINY]}))[0] == "other"


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("[1,", "expected JSON: "),
        ([], "expected a list of cases, or an object with cases and a name; got []"),
        ({"cases": {}}, "expected a list of cases"),
        ({"cases": [TINY], "title": "x"}, "title: unknown, expected one of name, cases"),
        ({"cases": [TINY], "name": "../up"}, "name: expected letters, digits"),
        ({"cases": [TINY], "name": "sizes"}, "name: 'sizes' is one of the suites here"),
        ({"cases": [TINY], "name": 101 * "x"}, "name: expected at most 100 characters (bytes in UTF-8), got 101"),
        ({"cases": [TINY], "name": 34 * "\u4e00"}, "name: expected at most 100 characters (bytes in UTF-8), got 102"),
        (100_000 * "[", "expected a list of cases, got lists or objects nested too deeply to read"),
        ([TINY, 5], "case 1: expected an object, got 5"),
        ([{**TINY, "hidden": 8}], "case 0: hidden: unknown, expected one of cell, batch, hidden_size, steps"),
        ([{"cell": "GRU", "batch": 2}], "case 0: hidden_size: expected an integer, got nothing"),
        ([{**TINY, "steps": "5"}], "case 0: steps: expected an integer, got '5'"),
        ([{**TINY, "steps": 5.5}], "case 0: steps: expected an integer, got 5.5"),
        ([{**TINY, "layers": True}], "case 0: layers: expected an integer, got True"),
        ([{**TINY, "packed": 1}], "case 0: packed: expected true or false, got 1"),
        ([{**TINY, "batch": 0}], "case 0: batch: expected at least 1, got 0"),
        ([{**TINY, "directions": 3}], "case 0: directions: expected 1 or 2, got 3"),
        ([{**TINY, "cell": "lstm"}], "case 0: cell: expected one of LSTM, GRU, RNN, got 'lstm'"),
        ([{**TINY, "dtype": "int8"}], "case 0: dtype: expected one of float32"),
        ('[{"cell": "GRU", "batch": 1, "hidden_size": 1, "resets": NaN}]', "case 0: resets: expected a probability"),
        ([{**TINY, "proj_size": 8}], "case 0: proj_size: expected less than hidden_size (8), got 8"),
        ([{**TINY, "cell": "GRU", "proj_size": 4}], "case 0: proj_size: expected 0"),
        ([{**TINY, "packed": True, "lengths": True}], "case 0: lengths: expected one of packed and lengths"),
        ([{**TINY, "packed": True, "resets": 0.1}], "case 0: resets: expected 0 for rows of different lengths"),
        ([{**TINY, "packed": True, "steps": 1}], "case 0: steps: expected at least 2"),
        ([{**TINY, "pause_ms": -1}], "case 0: pause_ms: expected milliseconds, 0 to 60000, got -1"),
        ([{**TINY, "pause_ms": "50ms"}], "case 0: pause_ms: expected a number, got '50ms'"),
        ('[{"cell": "GRU", "batch": 1, "hidden_size": 1, "pause_ms": NaN}]', "case 0: pause_ms: expected milliseconds"),
        ([{**TINY, "neighbours": 0.5}], "case 0: neighbours: expected an integer, got 0.5"),
        ([{**TINY, "neighbours": -2}], "case 0: neighbours: expected a number of processes, 0 to 1024, got -2"),
        ([{**TINY, "cells": "GRU"}], "case 0: cells: expected true or false, got 'GRU'"),
        ([{**TINY, "cells": True, "layers": 2}], "case 0: layers: expected 1 for a loop of cells, got 2"),
        ([{**TINY, "neighbours": True}], "case 0: neighbours: expected an integer, got True"),
        ([TINY, {**TINY, "cell": "GRU"}, TINY], "case 2: expected a name of its own, got that of case 0"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_a_file_that_cannot_be_is_refused(tmp_path, suite, value, why):
    path = written(tmp_path, value)
    with pytest.raises(ValueError, match=re.escape(f"{path}: {why}")):
        shapes.read(path)


def test_the_command_refuses_such_a_file(tmp_path, suite):
    status, printed = suite("--shapes", written(tmp_path, [{**TINY, "directions": 3}]))
    assert status == 2
    assert "run.py: error: argument --shapes: " in printed
    assert "case 0: directions: expected 1 or 2, got 3" in printed
    status, printed = suite("--shapes", tmp_path / "none.json")
    assert (status, "none.json: cannot be read: No such file" in printed) == (2, True)
    path = written(tmp_path, [TINY])
    status, printed = suite("--shapes", path, "--shapes", path)
    assert (status, "got two that are called 'my'" in printed) == (2, True)


def test_cases_that_differ_in_type_alone_are_run_once_in_another(tmp_path, suite):
    path = written(tmp_path, [TINY, {**TINY, "dtype": "float64"}])
    assert suite("--shapes", path, "--dtype", "float64", "--workload", "inference")[0] == 0
    assert len(records.load(tmp_path / "partial" / "cpu-my.json").rows) == 1


def test_own_and_other_suites_are_run_together(tmp_path, suite):
    status, printed = suite("--shapes", written(tmp_path, [TINY], "mine.json"), "--suite", "smoke")
    assert status == 0, printed
    files = {path.name: records.load(path) for path in tmp_path.glob("cpu-*.json")}
    assert sorted(files) == ["cpu-mine.json", "cpu-smoke.json"]
    assert (files["cpu-mine.json"].suite, files["cpu-mine.json"].device) == ("mine", "cpu")
    assert [row["case"] for row in files["cpu-mine.json"].rows] == ["LSTM-T5-B2-I8-H8"] * 2
    # A suite that nobody knows comes behind those that have a place.
    assert [record.suite for record in records.load_all(tmp_path)] == ["mine", "smoke"]


# --- parts of suites -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "whole"),
    [
        ([], True),
        (["--cases", "T5"], True),
        (["--dtype", "float64,float32"], True),
        (["--backends", "cpu,reference"], True),
        (["--cases", "GRU"], False),
        (["--dtype", "float64"], False),
        (["--workload", "training"], False),
        (["--backends", "reference"], False),
    ],
    ids=str,
)
def test_a_part_does_not_take_the_place_of_the_whole(tmp_path, suite, options, whole):
    place = written(tmp_path, "older", "cpu-my.json")
    shapes_file = written(tmp_path, [TINY, {**TINY, "cell": "GRU"}])
    status, printed = suite("--shapes", shapes_file, *options)
    assert status == 0, printed
    part = tmp_path / "partial" / "cpu-my.json"
    assert (place.read_text() == "older", part.exists()) == (not whole, not whole)
    assert ("A part of the suite: it does not take the place of the whole." in printed) == (not whole)
    assert f"written: {place if whole else part}" in printed
    if not whole:
        assert records.load(part).rows


def test_what_the_time_cut_off_is_a_part(tmp_path, suite, monkeypatch):
    """The clock goes on by a minute with every case."""
    place = written(tmp_path, "older", "cpu-smoke.json")
    now = [0.0]
    real = run.measure_here

    def slow(*arguments):
        now[0] += 60.0
        return real(*arguments)

    monkeypatch.setattr(run, "measure_here", slow)
    monkeypatch.setattr(run.time, "monotonic", lambda: now[0])
    status, printed = suite("--suite", "smoke", "--limit", "150")
    assert status == 0, printed
    assert "The time is up: 2 of 8 cases measured." in printed
    assert place.read_text() == "older"
    assert len(records.load(tmp_path / "partial" / "cpu-smoke.json").rows) == 2


def test_cases_that_match_nothing_are_an_error(suite, tmp_path):
    status, printed = suite("--suite", "smoke", "--cases", "B64")
    assert status == 2
    assert "expected a part of a case's name in smoke, such as LSTM-T3-B2-I8-H8, GRU-T4-B3" in printed
    assert printed.endswith("got 'B64'\n")
    status, printed = suite("--suite", "smoke", "--cases", "(")
    assert (status, "expected a regular expression, got '('" in printed) == (2, True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ([], "expected --suite or --shapes, got neither"),
        (["--suite", "smoke", "--limit", "-1"], "--limit: expected a number of at least 0, got '-1'"),
        (["--suite", "smoke", "--case-limit", "nan"], "--case-limit: expected a number of at least 0, got 'nan'"),
        (["--suite", "smoke", "--device", "tpu"], "--device: expected cpu or cuda, got 'tpu'"),
        (["--suite", "smoke", "--backends", "cpuu"], "--backends: cpuu: choose from auto, cpu, "),
    ],
    ids=str,
)
def test_wrong_options_are_errors(suite, options, why):
    status, printed = suite(*options)
    assert (status, why in printed) == (2, True), printed


# --- peers -----------------------------------------------------------------------------------------------------------

RIGHT = """
from rnnfast.benchmark.case import make_call

def peer(layer, case, workload, data):
    return make_call(layer, case, workload, data)
"""


def test_a_peer_is_a_file(tmp_path, suite):
    written(tmp_path, RIGHT, "mine.py")
    shapes_file = written(tmp_path, [TINY])
    status, printed = suite("--shapes", shapes_file, "--peers", "./mine.py,torchrl", "--workload", "inference")
    assert status == 0, printed
    rows = records.load(tmp_path / "partial" / "cpu-my.json").rows
    assert [row["backend"] for row in rows] == ["cpu", "mine"]
    assert rows[1]["ratio"] > 0
    assert "skipped: torchrl: TorchRL needs a CUDA device" in printed


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("return lambda: [2 * value for value in call()]", "result 0: error"),
        ("return lambda: call()[0]", "results: expected a list of tensors, got Tensor"),
        ("return lambda: [value[:1] for value in call()]", "result 0: shape"),
        ("return lambda: []", "results: expected at least one, got none"),
        ("return lambda: None", "results: expected a list of tensors, got NoneType"),
        ("return lambda: [call()[0], 5]", "result 1: expected a tensor, got int"),
        ("return 5", "peer: expected a function without arguments, got int"),
        ("raise KeyError('no weights')", "raised KeyError: 'no weights' (wrong.py, line 6)"),
        ("return lambda: [data.values.zero_(), *call()][1:]", "changed the input"),
        ("return lambda: [layer.bias_hh_l0.data.zero_(), *call()][1:]", "changed the weights (bias_hh_l0)"),
        ("return lambda: (call(), layer.double())[0]", "changed the weights (weight_ih_l0)"),
        ("return lambda: (call(), data.values.resize_(0))[0]", "changed the input"),
    ],
)
def test_a_peer_that_is_wrong_or_fails_is_not_timed(tmp_path, suite, body, why):
    text = RIGHT.replace("return make_call", "call = make_call") + f"    {body}\n"
    written(tmp_path, text, "wrong.py")
    status, printed = suite("--shapes", written(tmp_path, [TINY]), "--peers", "wrong.py")
    assert status == 1, printed
    (own, *failed) = records.load(tmp_path / "cpu-my.json").data["rows"]
    failed = [row for row in failed if row["backend"] == "wrong"]
    assert own["correct"]
    assert len(failed) == 2
    for row in failed:
        assert not row["correct"]
        assert row["us_per_step"] is row["ratio"] is None
        assert row["failure"].startswith(why)


# From its third call on, after the one that is checked and the one that warms up, it does something else.
LATE = """
from rnnfast.benchmark import Impossible
from rnnfast.benchmark.case import make_call

def peer(layer, case, workload, data):
    call = make_call(layer, case, workload, data)
    times = []

    def late():
        times.append(1)
        if len(times) > 2:
            {}
        return call()

    return late
"""
LATE_LINE = LATE[: LATE.index("{}")].count("\n") + 1


@pytest.mark.parametrize(
    ("body", "begin", "end"),
    [
        (
            "raise ValueError('no more')",
            "raised ValueError: no more (late.py, ",
            f"line {LATE_LINE}) while it was timed",
        ),
        ("raise Impossible('late')", "raised Impossible: late (late.py, ", f"line {LATE_LINE}) while it was timed"),
        ("return [2 * value for value in call()]", "result 0: error ", ", after the timing"),
        ("data.values.zero_()", "changed the input", ", after the timing"),
    ],
)
def test_a_peer_that_goes_wrong_late_fails_alone(tmp_path, suite, body, begin, end):
    written(tmp_path, LATE.format(body), "late.py")
    written(tmp_path, RIGHT, "mine.py")
    status, printed = suite("--shapes", written(tmp_path, [TINY]), "--peers", "late.py,mine.py")
    assert status == 1, printed
    rows = records.load(tmp_path / "cpu-my.json").data["rows"]
    assert [row["backend"] for row in rows] == 2 * ["cpu", "late", "mine"]
    for row in rows:
        if row["backend"] == "late":
            assert row["failure"].startswith(begin)
            assert row["failure"].endswith(end)
            assert row["us_per_step"] is row["ratio"] is None
        else:
            assert row["correct"], row["failure"]
            assert row["rounds"] >= 5


def test_what_an_error_leaves_is_written(tmp_path, suite, monkeypatch):
    real, seen = run.measure_here, []

    def fails(*arguments):
        seen.append(arguments)
        if len(seen) == 3:
            raise MemoryError("no more")
        return real(*arguments)

    monkeypatch.setattr(run, "measure_here", fails)
    place = written(tmp_path, "older", "cpu-smoke.json")
    with pytest.raises(MemoryError, match="no more"):
        suite("--suite", "smoke")
    assert place.read_text() == "older"
    assert len(records.load(tmp_path / "interrupted" / "cpu-smoke.json").rows) == 2


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("gone.py", None, "gone.py: there is no such file"),
        ("broken.py", "def peer(:", "broken.py does not import: SyntaxError: "),
        ("ends.py", "import sys; sys.exit(0)", "ends.py does not import: SystemExit: 0"),
        ("needs.py", "import no_such_library", "does not import: ModuleNotFoundError: No module named 'no_such_lib"),
        ("lacks.py", "def pear(): pass", "lacks.py: expected a function peer(layer, case, workload, data), found none"),
        ("torchrl.py", RIGHT, "torchrl.py: 'torchrl' is taken; expected a file of another name"),
        ("cpu.py", RIGHT, "cpu.py: 'cpu' is taken"),
        ("my-graph.py", RIGHT, "my-graph.py: 'my-graph' is taken"),
        ("cpu-one-thread.py", RIGHT, "cpu-one-thread.py: 'cpu-one-thread' is taken"),
        (
            "unknown",
            None,
            "expected all, a path that ends in .py, or of flashrnn, haste_pytorch, onnxruntime, torchrl;",
        ),
    ],
)
def test_a_file_that_is_no_peer_is_refused(tmp_path, suite, name, text, why):
    if text is not None:
        written(tmp_path, text, name)
    status, printed = suite("--suite", "smoke", "--peers", name)
    assert (status, why in printed) == (2, True), printed
    assert "run.py: error: argument --peers: " in printed


def test_two_peers_of_one_name_are_refused(tmp_path, suite):
    (tmp_path / "sub").mkdir()
    for folder in (tmp_path, tmp_path / "sub"):
        written(folder, RIGHT, "same.py")
    status, printed = suite("--suite", "smoke", "--peers", "same.py,sub/same.py")
    assert (status, "sub/same.py: 'same' is given twice" in printed) == (2, True)


def test_the_peers_here_are_files_like_ones_own():
    assert peers.NAMES == ["flashrnn", "haste_pytorch", "onnxruntime", "torchrl"]
    for name in peers.NAMES:
        assert peers.load(str(peers.FOLDER / f"{name}.py")) is peers.load(name)


# --- comparing two runs ----------------------------------------------------------------------------------------------


def record_of(folder, *rows):
    """A result file of rows (case, ratio, p20, p80, torch.nn's time, own time, contended)."""
    folder.mkdir(exist_ok=True)
    names = ("case", "ratio", "p20", "p80", "torch_us_per_step", "us_per_step", "contended")
    same = {"cell": "GRU", "dtype": "float32", "workload": "training", "backend": "cpu", "correct": True}
    made = [{**dict(zip(names, row, strict=True)), **same} for row in rows]
    (folder / "cpu-my.json").write_text(json.dumps({"suite": "my", "rows": made}))
    return records.load_all(folder)


def test_noise_is_told_from_change(tmp_path):
    before = record_of(
        tmp_path / "a",
        ("moves", 2.0, 1.9, 2.1, 2.0, 1.0, False),
        ("wide", 2.0, 1.0, 4.0, 2.0, 1.0, False),
    )
    now = record_of(
        tmp_path / "b",
        ("moves", 2.6, 2.5, 2.7, 2.6, 1.0, False),
        ("wide", 2.5, 1.2, 5.0, 2.5, 1.0, False),
    )
    group, whole = records.changes(before, now)
    assert (group.changed, group.most_changed, group.loaded) == (False, True, False)
    assert group.most == "moves training"
    # sqrt(1.9 * 1.0) to sqrt(2.1 * 4.0), and then sqrt(2.5 * 1.2) to sqrt(2.7 * 5.0): they overlap.
    assert (whole.changed, whole.most_changed) == (False, True)
    line = records.change_table([group]).splitlines()[1]
    assert re.search(r"\+27\.5%  +within noise  +\+30\.0%  +changed  +moves training$", line), line
    now = record_of(tmp_path / "b", ("wide", 2.5, 4.1, 5.0, 2.5, 1.0, True))
    (group, _) = records.changes(before, now)
    assert (group.changed, group.loaded) == (True, True)
    line = records.change_table([group]).splitlines()[1]
    assert re.search(r" changed\? .* changed\? +wide \(beside other load\) training$", line), line


def test_a_ratio_that_contradicts_its_times_is_explained(tmp_path):
    (record,) = record_of(
        tmp_path / "a",
        ("good", 2.0, 1.9, 2.1, 2.05, 1.0, False),
        ("outside", 2.0, 1.9, 2.1, 34.0, 1.0, True),
        ("opposite", 1.3, 0.7, 2.0, 0.9, 1.0, False),
        ("almost one", 1.001, 0.98, 1.02, 0.999, 1.0, False),
    )
    lines = records.contradictions(record.rows)
    assert lines[0] == (
        "outside (beside other load) training cpu: the ratio is 2.00 (1.90 to 2.10), that of the two times is 34.00"
    )
    assert lines[1].startswith("opposite training cpu: the ratio is 1.30 (0.70 to 2.00), that of the two times is 0.90")
    assert "Trust neither" in lines[2]
    assert len(lines) == 3
    assert records.contradictions(record.rows[:1]) == []
    many = records.contradictions([record.rows[1]] * 14)
    assert (len(many), many[10]) == (12, "... and 4 more")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["nowhere"], "nowhere: expected a folder or a result file, got neither: it does not exist"),
        (["a", "--before", "nowhere"], "nowhere: expected a folder or a result file"),
        (["empty"], "empty: expected results of a suite, got no such files"),
        (["a", "--before", "empty"], "empty: expected results of a suite"),
        (["text.json"], "text.json: expected a result file, got no JSON"),
        (["demo.json"], "demo.json: expected results of a suite, got no such file"),
        (["short.json"], "short.json: row 0: expected cell, got none"),
        (["deep.json"], "deep.json: expected a result file, got no JSON"),
        (["a", "--before", "other"], "--before: other: expected cases of the results now, got none of them"),
        (["a", "--worst", "0"], "--worst: expected an integer of at least 1, got 0"),
    ],
    ids=str,
)
def test_wrong_places_are_errors(tmp_path, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(tmp_path)
    record_of(Path("a"), ("one", 2.0, 1.9, 2.1, 2.0, 1.0, False))
    record_of(Path("other"), ("two", 2.0, 1.9, 2.1, 2.0, 1.0, False))
    Path("empty").mkdir()
    short = '{"suite": "s", "rows": [{"case": "c"}]}'
    for name, text in (("text", "x"), ("demo", "{}"), ("short", short), ("deep", 100_000 * "[")):
        Path(f"{name}.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["records.py", *arguments])
    with pytest.raises(SystemExit) as end:
        records.main()
    assert end.value.code == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("field", ["us_per_step", "torch_us_per_step", "ratio", "p20", "p80"])
@pytest.mark.parametrize("value", [0, -1.5, None, "2", True, float("nan"), float("inf"), []], ids=str)
def test_a_timed_row_has_positive_numbers(tmp_path, monkeypatch, capsys, field, value):
    if field == "ratio" and value is None:
        return  # that of a row that was not timed
    good = ("good", 2.0, 1.9, 2.1, 2.0, 1.0, False)
    (record,) = record_of(tmp_path / "a", good, good)
    record.data["rows"][1][field] = value
    record.path.write_text(json.dumps(record.data))
    monkeypatch.setattr(sys, "argv", ["records.py", str(tmp_path / "a")])
    with pytest.raises(SystemExit) as end:
        records.main()
    assert end.value.code == 2
    why = f"cpu-my.json: row 1: {field}: expected a finite number above 0, got {json.dumps(value)}\n"
    assert why in capsys.readouterr().err


def test_a_row_never_has_a_zero(monkeypatch):
    """Of a time that is nothing at four digits."""
    monkeypatch.setattr(comparison, "interleave", lambda calls, *more: [[1e-12, 1e-12] for _ in calls])
    monkeypatch.setattr(comparison.Ratio, "of", lambda slow, fast: comparison.Ratio(1e-9, 0.0, 1e-5))
    (row,) = comparison.measure(Case(**TINY), "inference", 0.01, torch.device("cpu"))
    for field in records.POSITIVE:
        assert row[field] == 0.0001, field


# --- whose rows ------------------------------------------------------------------------------------------------------


def test_ours_are_rnnfasts_backends():
    assert set(records.OURS) == set(BACKENDS)
    assert records.GRAPH == comparison.GRAPH
    assert [records.is_ours(name) for name in ("cuda-graph", "emulated", "torch-graph", "mine")] == [1, 1, 0, 0]
    assert [records.is_peer(name) for name in ("cuda-graph", "emulated", "torch-graph", "mine")] == [0, 0, 0, 1]
    assert records.is_ours("cpu-one-thread")
    assert not records.is_peer("cpu-one-thread")


def test_peers_are_no_part_of_all(tmp_path, monkeypatch, capsys):
    good = ("good", 2.0, 1.9, 2.1, 2.0, 1.0, False)
    for folder, factor in (("a", 1), ("b", 4)):
        (record,) = record_of(tmp_path / folder, good, good)
        (_, peer) = record.data["rows"]
        peer.update(backend="mine", **{field: factor * peer[field] for field in ("ratio", "p20", "p80")})
        record.path.write_text(json.dumps(record.data))
    before, now = (records.load_all(tmp_path / folder) for folder in "ab")
    found = {(change.cell, change.backend): change for change in records.changes(before, now)}
    assert found["GRU", "mine"].now == pytest.approx(8.0)
    assert (found["all", ""].cases, found["all", ""].now) == (1, pytest.approx(2.0))
    monkeypatch.setattr(sys, "argv", ["records.py", str(tmp_path / "b"), "--before", str(tmp_path / "a")])
    assert records.main() == 0
    printed = capsys.readouterr().out
    assert "ratio = torch.nn's time / the row's time" in printed
    assert "1 rows of peers are not in all, which is rnnfast's own backends" in printed
    # Each backend has a line of its own as before.
    lines = [line.split() for line in records.short_table(now).splitlines()[1:]]
    assert [(line[3], line[6]) for line in lines] == [("cpu", "2.00"), ("mine", "8.00")]


# --- the page --------------------------------------------------------------------------------------------------------


def block(kind, number=0):
    return re.findall(rf"^```{kind}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)[number]


def command(line, folder, *quick):
    """A command of the page, on tiny measurements."""
    words = shlex.split(line)
    assert words[0] == "python"
    quick = [*QUICK, *quick] if words[1].endswith("run.py") else []
    words = [sys.executable, str(ROOT / words[1]), *words[2:], *quick]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_page_from_zero_to_a_compared_result(tmp_path):
    """Its files and commands, the shapes made smaller."""
    cases = json.loads(block("json"))
    for case in cases:
        case.update(batch=min(case["batch"], 3), hidden_size=8, steps=6)
        case.update({"input_size": 5} if "input_size" in case else {})
    (tmp_path / "my.json").write_text(json.dumps(cases))
    (tmp_path / "my_loop.py").write_text(block("python"))
    printed = command(block("sh").strip(), tmp_path)
    rows = records.load(tmp_path / "out/mine/cpu-my.json").data["rows"]
    assert [(row["case"], row["workload"]) for row in rows if row["backend"] == "my_loop"] == [
        ("LSTM-T6-B3-I8-H8", "inference"),
        ("LSTM-T6-B3-I8-H8", "training"),
    ]
    assert all(row["correct"] for row in rows), printed
    for line in block("text", 1).splitlines():
        if line.startswith(("skipped: ", "written: ")):
            assert line in printed
    for line in [*block("sh", 1).splitlines(), *block("sh", 2).splitlines()]:
        if not line.startswith("#"):
            printed = command(line, tmp_path, "--in-process")
    assert re.search(r"^cpu +my +LSTM +training +cpu +2 .*(changed|within noise)", printed, re.MULTILINE), printed


def test_what_the_page_quotes_is_said(tmp_path, suite):
    cases = json.loads(block("json"))
    cases[1]["directions"] = 3
    written(tmp_path, cases)
    _, printed = suite("--shapes", "my.json")
    assert block("text").strip() in printed
    source = "".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    assert "cases were timed {BESIDE}, which took up to " in source
    assert f"cases were timed {records.BESIDE}, which took up to" in block("text", 2)

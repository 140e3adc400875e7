"""Figures for every suite, with words about those that cannot be made, and the page of `records.py --html`."""

from __future__ import annotations

import base64
import json
import os
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib", reason="figures are drawn with matplotlib: pip install rnnfast[bench]")
pytest.importorskip("jinja2", reason="the page is written with jinja2: pip install rnnfast[bench]")

import plot
import plot_service
import readme
import records
import report
import shapes
from records import Record, Row
from rnnfast.benchmark import Case
from rnnfast.benchmark.timing import environment

ABOUT = {"device": "A processor, 2 threads", "torch": "2.13.0", "cuda": None, "cudnn": None, "commit": "0" * 12}
ABOUT["date"] = "2026-01-02T03:04:05Z"


def row(case: Case, ratio: float | None = 2.0, workload: str = "inference", **changes: Any) -> Row:
    """As `rnnfast.benchmark.measure` gives it; without a ratio that of a wrong result."""
    timed = {"ratio": ratio, "p20": ratio and 0.95 * ratio, "p80": ratio and 1.05 * ratio}
    return {
        **case.row,
        **timed,
        "workload": workload,
        "backend": "cpu",
        "us_per_step": ratio and 10.0 / ratio,
        "torch_us_per_step": ratio and 10.0,
        "limit_us_per_step": 1.0,
        "percent_of_limit": ratio and 10 * ratio,
        "plan": "step",
        "correct": ratio is not None,
        "failure": None if ratio is not None else "result 0: error 1, allowed 0.1",
        "against": "torch",
        "peak_memory_bytes": 1_500_000,
        "torch_peak_memory_bytes": 2_500_000,
        **changes,
    }


def write(folder: Path, suite: str, rows: Sequence[Row], name: str = "cpu", **about: Any) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{suite}.json"
    path.write_text(json.dumps({**ABOUT, **about, "suite": suite, "rows": rows}))
    return path


def record(folder: Path, suite: str, rows: Sequence[Row]) -> Record:
    loaded = records.load(write(folder, suite, rows))
    assert loaded is not None
    return loaded


GRID = [Case("LSTM", batch, hidden) for batch in (1, 8) for hidden in (16, 32, 64)]
PACKED = Case("LSTM", 4, 16, packed=True)


def run(monkeypatch: pytest.MonkeyPatch, program: Any, *arguments: object) -> int:
    """A program's exit status."""
    monkeypatch.setattr(sys, "argv", [Path(program.__file__).name, *map(str, arguments)])
    try:
        return int(program.main())
    except SystemExit as end:
        return int(end.code or 0)


# ---- figures --------------------------------------------------------------------------------------------------------


def test_a_suite_without_a_grid_gets_bars(tmp_path: Path) -> None:
    made = record(tmp_path, "models", [row(case) for case in shapes.SUITES["models"]])
    assert [figure.name for figure in plot.figures_of(made)] == ["cpu-models-bars.png"]
    heat, scaling = plot.lacking(made)
    assert heat.startswith("no heat map and no time against H of inference: ")
    assert "at least 3 hidden sizes and 2 batch sizes of one cell" in heat
    assert heat.endswith("here: at most 1 and 1 (GRU)")
    assert scaling.startswith("no scaling of inference: it needs at least 3 values of T or of B")


def test_bars_show_what_no_heat_map_shows(tmp_path: Path) -> None:
    grid = [row(case, 2.0, workload) for case in GRID for workload in ("inference", "training")]
    whole = record(tmp_path, "grid", grid)
    assert "bars" not in {figure.kind for figure in plot.figures_of(whole)}
    assert [sentence.split(":")[0] for sentence in plot.lacking(whole)] == ["no scaling of inference, training"]
    mixed = record(tmp_path, "grid", [*grid, row(PACKED)])
    assert [figure.kind for figure in plot.figures_of(mixed)] == ["ratio", "time", "ratio", "time", "bars"]
    assert [each["case"] for each in plot.unmapped(mixed)] == [PACKED.name]
    # Training with two hidden sizes.
    part = record(tmp_path, "grid", [each for each in grid if each["workload"] == "inference" or each["H"] > 16])
    assert [figure.kind for figure in plot.figures_of(part)] == ["ratio", "time", "bars"]
    assert {(each["workload"], each["H"]) for each in plot.unmapped(part)} == {("training", 32), ("training", 64)}
    assert plot.lacking(part)[0].startswith("no heat map and no time against H of training: ")
    assert plot.lacking(part)[0].endswith("here: at most 2 and 2 (LSTM)")


def test_a_record_without_a_timed_row_has_no_figure(tmp_path: Path) -> None:
    failed = record(tmp_path, "models", [row(PACKED, None)])
    assert plot.figures_of(failed) == []
    assert plot.lacking(failed) == ["no figure: none of its rows was timed"]


@pytest.mark.parametrize(
    ("backends", "count", "shown"), [(1, 60, 60), (1, 61, 60), (2, 61, 60), (4, 40, 30), (40, 11, 10)]
)
def test_of_many_cases_the_lowest_are_shown(backends: int, count: int, shown: int) -> None:
    # The ratios rise and fall again, in the suite's order.
    ratios = {f"case {number}": 1.0 + min(number, count - number) for number in range(count)}
    rows = [
        {"case": case, "ratio": ratio * (1 + backend), "backend": str(backend)}
        for case, ratio in ratios.items()
        for backend in range(backends)
    ]
    cases, omitted = plot.shown_cases(rows)
    assert (len(cases), omitted) == (shown, count - shown)
    assert cases == [case for case in ratios if case in cases]
    assert max(ratios[case] for case in cases) <= min(
        (ratio for case, ratio in ratios.items() if case not in cases), default=99.0
    )


def test_bars_are_the_ratios(tmp_path: Path) -> None:
    # Two dollar signs are no formula.
    odd = Case("GRU", 4, 16, packed=True, model="$x_1$ model")
    rows = [row(PACKED, 4.0), row(odd, 0.5), row(PACKED, 3.0, "training"), row(odd, None, "training")]
    figure = plot.bars_figure(record(tmp_path, "packed", rows))
    inference, training = figure.axes
    assert [axis.get_title() for axis in (inference, training)] == ["inference", "training"]
    assert [label.get_text() for label in inference.get_yticklabels()] == [PACKED.name, odd.name]
    assert not any(label.get_parse_math() for label in inference.get_yticklabels())

    def bars(axis: Any) -> list[tuple[float, float]]:
        return [(bar.get_x(), bar.get_x() + bar.get_width()) for group in axis.containers for bar in group]

    assert bars(inference) == [(1, 4.0), (1, 0.5)]
    assert bars(training) == [(1, 3.0)]
    whiskers = [list(line.get_xdata()) for line in inference.lines]
    assert whiskers == [pytest.approx([3.8, 4.2]), pytest.approx([0.475, 0.525]), [1, 1]]
    assert [text.get_text() for text in inference.texts] == ["4.00", "0.50"]
    low, high = inference.get_xlim()
    assert low < 0.475 < 4.2 < high
    # The first case is at the top.
    assert inference.get_ylim() == (1.5, -0.5)


def test_omitted_cases_are_told(tmp_path: Path) -> None:
    rows = [row(Case("LSTM", batch, 16, packed=True), 1.0 + batch) for batch in range(1, 64)]
    figure = plot.bars_figure(record(tmp_path, "packed", rows))
    (legend,) = figure.legends
    assert "3 of 63 cases are left out, those with the highest ratios" in legend.get_title().get_text()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert (len(labels), labels[-1]) == (60, Case("LSTM", 60, 16, packed=True).name)


def served(case: Case, backend: str, middle: float, far: float, **changes: Any) -> Row:
    """A row of a case with a pause or neighbours; torch.nn takes 10 and 40."""
    times = {"p50_us_per_step": middle, "p90_us_per_step": far}
    times |= {"torch_p50_us_per_step": 10.0, "torch_p90_us_per_step": 40.0}
    return row(case, 10.0 / middle, backend=backend, **times, **changes)


PLAIN = Case("LSTM", 1, 16)
PAUSE, BESIDE = Case("LSTM", 1, 16, pause_ms=50.0), Case("LSTM", 1, 16, neighbours=2)
SERVED = [
    served(case, backend, 5.0, 8.0) for case in (BESIDE, PAUSE) for backend in ("cpu", "cpu-one-thread", "theirs")
]


def test_single_calls_have_a_figure_of_their_own(tmp_path: Path) -> None:
    # As many sizes as a heat map needs, which would mix the conditions.
    many = [served(Case(case.cell, case.batch, case.hidden_size, pause_ms=1), "cpu", 5.0, 8.0) for case in GRID]
    assert [figure.kind for figure in plot.figures_of(record(tmp_path, "many", many))] == ["latency"]
    made = record(tmp_path, "service", [*SERVED, row(PACKED)])
    assert [figure.name for figure in plot.figures_of(made)] == ["cpu-service-latency.png", "cpu-service-bars.png"]
    assert [each["case"] for each in plot.unmapped(made)] == [PACKED.name]
    picture = plot_service.latency_figure(made)
    (axis,) = picture.axes
    assert axis.get_title() == PLAIN.name
    assert [label.get_text() for label in axis.get_yticklabels()] == ["pause of 50 ms", "2 neighbours"]
    markers = {line.get_label(): list(line.get_xdata()) for line in axis.lines if not line.get_label().startswith("_")}
    sides = ["torch.nn", "rnnfast, cpu", "rnnfast, cpu, one thread", "theirs"]
    assert markers == {side: [10.0, 10.0] if side == "torch.nn" else [5.0, 5.0] for side in sides}
    whiskers = {
        tuple(segment[:, 0]) for lines in axis.collections for segment in getattr(lines, "get_segments", list)()
    }
    assert whiskers == {(10.0, 40.0), (5.0, 8.0)}
    assert plot.drawn(made, plot.figures_of(made)[0]).startswith(b"\x89PNG")


def test_the_page_has_the_percentiles_of_single_calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "now", "service", [*SERVED, row(PACKED)])
    _, page = written(tmp_path / "now", monkeypatch)
    lines = page.table("All rows")
    assert [line["p90 µs/step"] for line in lines] == 6 * ["8.00"] + ["-"]
    assert lines[0]["torch.nn p90 µs/step"] == "40.00"
    assert page.all("img")[0]["alt"].startswith("times of single calls with pauses or beside neighbours, suite service")


def test_readme_has_a_table_of_single_calls(tmp_path: Path) -> None:
    assert "no result file" in readme.service([])
    failed = served(PAUSE, "theirs", 5.0, 8.0) | {"ratio": None, "correct": False}
    made = record(tmp_path, "service", [*SERVED, served(Case("GRU", 1, 16, pause_ms=50), "cpu", 20.0, 10.0), failed])
    text = readme.service([made])
    assert "| pause of 50 ms | 2 | 1.00 | 0.50 (GRU, B=1, H=16) | 4.47 | 2.00 | 2.00 (LSTM, B=1, H=16) | 5.00 |" in text
    assert "\n| 2 neighbours | 1 | 2.00 |" in text
    assert "(figures/cpu-service-latency.png)" in text
    # They have no part in what is said of the other suites.
    for path in records.RESULTS.glob("cpu-*.json"):
        if not (tmp_path / path.name).exists():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with_them, without = readme.blocks(tmp_path), readme.blocks()
    for name in ("cpu speeds", "cpu slower", "cpu worst", "cpu figures"):
        assert with_them[name]() == without[name]()
    assert with_them["cpu service"]() == text


def test_backends_look_different() -> None:
    looks = plot.looks(["cuda", "cuda-graph", "triton", "reference", "onnxruntime", "scripted"])
    assert len({look[1:] for look in looks.values()}) == 6
    assert len({look[1] for look in plot.looks(["cpu", "cpu-one-thread", "onnxruntime"]).values()}) == 3
    assert [look[0] for look in looks.values()] == [
        "rnnfast, cuda",
        "rnnfast, cuda in a CUDA graph",
        "rnnfast, triton",
        "rnnfast, reference",
        "onnxruntime",
        "scripted",
    ]


def test_a_peer_is_called_by_its_name_in_every_figure(tmp_path: Path) -> None:
    """Once lines called it rnnfast's."""
    rows = [{**row(case), "backend": backend} for case in GRID for backend in ("cpu", "my_loop")]
    labels = [label for label, *_ in plot.lines_of(rows, "H")]
    assert "my_loop" in labels
    assert "rnnfast, cpu" in labels
    assert not any(label == "rnnfast, my_loop" for label in labels)
    made = record(tmp_path, "grid", rows)
    for backend, name in (("cpu", "rnnfast"), ("my_loop", "my_loop")):
        title = plot.ratio_map(made, "inference", backend).get_suptitle()
        assert title.startswith(f"torch.nn's time / {name}'s: ")
        assert title.endswith(f"above 1 {name} is faster")


def test_plot_says_what_it_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "packed", [row(PACKED)])
    assert run(monkeypatch, plot, "--results", tmp_path) == 0
    # Other results are no reason to touch the pages' figures.
    bars = tmp_path / "figures" / "cpu-packed-bars.png"
    assert plot.source_of(bars) is not None
    printed = capsys.readouterr().out
    assert "cpu-packed.json: suite packed, 1 rows timed\n" in printed
    assert f"  written: {bars} (" in printed
    assert "\n  no heat map and no time against H of inference: " in printed
    assert "here: no plain layer\n" in printed
    assert printed.endswith(f"plain layers have {plot.PLAIN_IN_WORDS}\n")


def test_plot_without_result_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, words in (
        (tmp_path / "none", "expected a folder of result files, got"),
        (tmp_path, "no result file of a suite"),
    ):
        assert run(monkeypatch, plot, "--results", folder, "--out", tmp_path / "out") == 2
        said = capsys.readouterr().err
        assert f"plot.py: error: argument --results: {words}" in said
        assert str(folder) in said
    (tmp_path / "cpu-broken.json").write_text("{")
    assert run(monkeypatch, plot, "--results", tmp_path) == 2
    assert "cannot read the result files" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- the page -------------------------------------------------------------------------------------------------------

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Reads a page: every element closed in its turn; tables by their region's label, images, all attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.cards: list[tuple[str, str]] = []
        self.text = ""
        self.label = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        known = {name: value or "" for name, value in attributes}
        self.elements.append((tag, known))
        if tag not in VOID:
            self.open.append(tag)
        if known.get("role") == "region":
            self.label = known["aria-label"]
            self.tables[self.label] = []
        if tag == "tr":
            self.tables[self.label].append([])
        if tag in ("th", "td"):
            self.tables[self.label][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" in self.open or "style" in self.open:
            return
        self.text += data
        if self.open[-4:] and self.open[3:5] == ["dl", "div"] and data.strip():
            name, value = ("", "") if self.open[-1] == "dt" else self.cards.pop()
            in_head = self.open[-1] == "dt"
            self.cards.append((data, "") if in_head else (name, value + data.strip()))
        if "td" in self.open or "th" in self.open:
            self.tables[self.label][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def table(self, label: str) -> list[dict[str, str]]:
        head, *lines = self.tables[label]
        return [dict(zip(head, line, strict=True)) for line in lines]


EVIL = Case("GRU", 4, 16, packed=True, model="<script>alert(1)</script> & \"'")


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two suites, one of them with a wrong row and with names that are markup."""
    folder = tmp_path / "now"
    write(folder, "grid", [row(case, 1.0 + number) for number, case in enumerate(GRID)])
    write(
        folder,
        "packed",
        [row(PACKED, 0.5), row(EVIL, 3.0), row(EVIL, None, "training", failure="<b>wrong</b>")],
        commit="1" * 12 + "-dirty",
        python="3.11.0",
        governor="<i>powersave</i>",
    )
    return folder


def written(folder: Path, monkeypatch: pytest.MonkeyPatch, *more: object) -> tuple[str, Page]:
    path = folder.parent / "report.html"
    assert run(monkeypatch, records, folder, "--html", path, *more) == 0
    text = path.read_text(encoding="utf-8")
    return text, Page(text)


def test_page_needs_nothing_else(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, page = written(results, monkeypatch)
    assert text.startswith("<!DOCTYPE html>\n")
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in text
    assert not page.all("link")
    assert [script for script in page.all("script") if "src" in script] == []
    images = page.all("img")
    assert [image["alt"] for image in images] == [
        "heat map of the ratios over H and B, inference, suite grid, cpu",
        "time of a step against H, inference, suite grid, cpu",
        "bars of the ratio of each case, suite packed, cpu",
    ]
    for image in images:
        kind, _, data = image["src"].partition(",")
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert png.startswith(b"\x89PNG\r\n\x1a\n")
        # Shown smaller than it is, for screens with small pixels.
        assert int(image["width"]) == pytest.approx(int.from_bytes(png[16:20], "big") / 1.5, abs=1)
    anchors = {link["href"] for link in page.all("a")}
    identifiers = {f"#{attributes['id']}" for _, attributes in page.elements if "id" in attributes}
    assert anchors == identifiers == {"#machine", "#summary", "#changes", "#figures", "#rows"}


def test_page_has_every_row(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, page = written(results, monkeypatch)
    rows = page.table("All rows")
    assert [line["case"] for line in rows] == [*(case.name for case in GRID), PACKED.name, EVIL.name, EVIL.name]
    assert rows[1] == {
        "suite": "grid",
        "case": GRID[1].name,
        "workload": "inference",
        "backend": "cpu",
        "results": "agree",
        "ratio": "2.00",
        "p20 to p80": "1.90 to 2.10",
        "torch.nn µs/step": "10.00",
        "µs/step": "5.00",
        "limit µs/step": "1.00",
        "% of limit": "20",
        "peak MB": "1.50",
        "torch.nn peak MB": "2.50",
    }
    assert (rows[-1]["results"], rows[-1]["ratio"]) == ("FAILED<b>wrong</b>", "-")
    # Names are text wherever they stand, and no markup of theirs is the page's.
    assert len(page.all("script")) == 1
    assert not page.all("b")
    assert not page.all("i")
    assert "<script>alert" not in text


def test_page_sums_up(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, page = written(results, monkeypatch)
    lines = page.table("Summary")
    assert [(line["suite"], line["cell"], line["workload"]) for line in lines] == [
        ("grid", "LSTM", "inference"),
        ("packed", "LSTM", "inference"),
        ("packed", "GRU", "inference"),
        ("packed", "GRU", "training"),
    ]
    assert (lines[0]["rows"], lines[0]["failed"], lines[0]["mean ratio"]) == ("6", "0", "2.99")
    assert (lines[0]["worst ratio"], lines[0]["worst case"]) == ("1.00", GRID[0].name)
    assert (lines[3]["rows"], lines[3]["failed"], lines[3]["mean ratio"]) == ("0", "1", "-")
    words = " ".join(page.text.split())
    assert "come from 2 different machines or versions" in words
    assert "The source had changes that are in no commit." in words
    # What a later version records is shown too.
    for shown in ("A processor, 2 threads", "2.13.0", "2026-01-02 03:04:05 UTC", "3.11.0", "<i>powersave</i>"):
        assert shown in words, shown
    assert "No earlier result files were given." in words
    assert "No heat map and no time against H of inference: they need" in words


def test_page_says_what_changed(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = tmp_path / "before"
    write(before, "grid", [row(case, (1.0 + number) / 1.25) for number, case in enumerate(GRID)])
    _, page = written(results, monkeypatch, "--before", before)
    part, whole = page.table("What changed")
    assert (part["suite"], part["cell"], part["cases"]) == ("grid", "LSTM", "6")
    assert (part["before"], part["now"], part["change"]) == ("2.40", "2.99", "+25.0%")
    assert (whole["cell"], whole["workload"], whole["largest change"]) == ("all", "all", "+25.0%")
    assert (part["verdict"], part["its verdict"]) == ("changed", "changed")
    write(before, "grid", [row(case, 1.01 + number) for number, case in enumerate(GRID)])
    _, page = written(results, monkeypatch, "--before", before)
    assert {line["verdict"] for line in page.table("What changed")} == {"within noise"}
    write(before, "grid", [row(PACKED)])
    _, page = written(results, monkeypatch, "--before", before)
    assert "What changed" not in page.tables
    assert "no case in common" in page.text


def test_several_devices_and_noise(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row(GRID[0], core_to_core_ns=25.0),
        row(GRID[1], core_to_core_ns=80.0),
        row(GRID[2], p20=1.5, p80=2.5, contended=True, others_busy=1.25),
        row(GRID[3], core_to_core_ns=None),
    ]
    write(results, "sizes", rows, name="other", device="Another processor")
    _, page = written(results, monkeypatch)
    marked = [(line["device"], line["noise"]) for line in page.table("All rows") if line["suite"] == "sizes"]
    assert marked == [
        ("other", ""),
        ("other", "noisycores far apart (80 ns)"),
        ("other", "noisybeside other load (1.2 cores); p20 to p80 is 50% of the ratio"),
        ("other", ""),
    ]
    # Beside the ratio, before what a narrow window cuts off.
    heads = page.tables["All rows"][0]
    assert heads[: heads.index("noise") + 1] == ["device", "suite", "case", "workload", "backend", "ratio", "noise"]
    assert cards(page)["Noisy rows"] == "2of 13 rows"
    assert "2 of 4" in page.text
    assert "contradict" not in page.text


def cards(page: Page) -> dict[str, str]:
    """What stands on top of a page."""
    return dict(page.cards)


def test_peers_are_no_part_of_rnnfasts_cards(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = [row(GRID[0], 4.0), row(GRID[0], 1.0, backend="torch-graph"), row(GRID[0], 0.25, backend="my_loop")]
    folder = tmp_path / "peers"
    write(folder, "sizes", [*rows, row(GRID[1], 1.0, backend="reference")])
    _, page = written(folder, monkeypatch)
    shown = cards(page)
    assert shown["Rows timed"] == "41 of peers, in none of the ratios here"
    assert shown["Faster than torch.nn"] == "2of 2 rows of rnnfast"
    assert shown["Mean ratio"] == "2.00of all rows of rnnfast in all suites"
    assert shown["Worst ratio"] == f"1.00{GRID[1].name}, inference, reference"
    assert {line["backend"] for line in page.table("Summary")} == {"cpu", "reference", "torch-graph", "my_loop"}
    write(folder, "sizes", rows[2:])
    _, page = written(folder, monkeypatch)
    assert "Mean ratio" not in cards(page)


def test_page_of_fields_that_are_null_or_not_there(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = row(GRID[0], None)
    del failed["failure"]
    write(results, "sizes", [failed, row(GRID[1], contended=True, others_busy=None)])
    _, page = written(results, monkeypatch)
    lines = [line for line in page.table("All rows") if line["suite"] == "sizes"]
    assert lines[0]["results"] == "FAILEDthe file does not say why"
    assert lines[1]["noise"] == "noisybeside other load"


def test_page_says_what_it_compares(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = tmp_path / "earlier"
    write(before, "grid", [row(GRID[0])], date="2025-12-31T23:00:00Z", commit="abc123")
    monkeypatch.chdir(tmp_path)
    _, page = written(results, monkeypatch, "--before", before)
    words = " ".join(page.text.split())
    assert "beforeearlier: measured 2025-12-31 23:00:00 UTC, commit of rnnfast abc123" in words
    commits = f"{'0' * 12}, {'1' * 12}-dirty"
    assert f"now{os.path.relpath(results)}: measured 2026-01-02 03:04:05 UTC, commit of rnnfast {commits}" in words


def test_page_explains_a_contradiction(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(results, "sizes", [row(GRID[0], us_per_step=20.0)])
    _, page = written(results, monkeypatch)
    assert "Ratios that contradict their times" in page.text
    assert "the ratio is 2.00 (1.90 to 2.10), that of the two times is 0.50" in page.text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{now}", "--html", "{now}/none/r.html"], "argument --html: expected a file in a folder that exists, got"),
        (["{now}", "--html", "{folder}"], "argument --html: cannot write"),
        (["{now}", "--html", "{now}/cpu-grid.json"], "argument --html: expected a file that ends in .html, got "),
        (["{now}", "--html", "{now}/grid"], "argument --html: expected a file that ends in .html, got "),
        (["{empty}", "--html", "{now}/r.html"], "empty: expected results of a suite, got no such files"),
        (["{now}", "--html", "{now}/r.html", "--before", "{empty}"], "empty: expected results of a suite, got no such"),
    ],
)
def test_a_page_that_cannot_be_written(
    arguments: list[str],
    words: str,
    results: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = {"now": results, "empty": tmp_path / "empty", "folder": tmp_path / "folder.html"}
    places["empty"].mkdir()
    places["folder"].mkdir()
    filled = [argument.format(**places) for argument in arguments]
    before = (results / "cpu-grid.json").read_text()
    assert run(monkeypatch, records, *filled) == 2
    said = capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said
    assert not (results / "r.html").exists()
    assert (results / "cpu-grid.json").read_text() == before


def test_a_missing_library_is_named(
    results: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "report")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert run(monkeypatch, records, results, "--html", results / "r.html") == 2
    assert "--html: jinja2 is not installed: pip install rnnfast[bench]" in capsys.readouterr().err


def test_result_files_say_where_they_come_from() -> None:
    where = environment(torch.device("cpu"))
    for key in ("processor", "cores", "system", "python", "rnnfast", "torch", "commit"):
        assert where[key], key
    assert set(where) - set(report.FIELDS) == {"date"}

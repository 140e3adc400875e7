"""benchmarks/plan_check.py without a card: on the emulated library, where its times mean nothing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch

import plan_check
from emulated_library import emulated_problem
from records import whole_lines
from rnnfast import cuda_plan, libraries

SMALL = "--device emulated --hidden 16,40 --batch 2 --steps 3 --seconds 0 --types bfloat16,tf32".split()


@pytest.fixture
def emulated(one_thread: None) -> None:
    if (why := emulated_problem()) is not None:
        pytest.skip(why)


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [row for row in whole_lines(folder / "emulated-plans.jsonl") if row["what"] == "plan"]


def test_every_plan_of_every_shape(emulated: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.ops.rnnfast_emulated.prefer_plan("step")
    assert plan_check.main([str(tmp_path), *SMALL]) == 0
    assert torch.ops.rnnfast_emulated.prefer_plan(before) == "step"
    torch.ops.rnnfast_emulated.allow_tf32(False)
    rows = rows_in(tmp_path)
    assert {(row["H"], row["arithmetic"], row["pass"], row["asked"]) for row in rows} == {
        (hidden, arithmetic, name, asked)
        for hidden in (16, 40)
        for arithmetic in ("bfloat16", "tf32")
        for name in ("forward", "backward")
        for asked in cuda_plan.NAMES
    }
    for row in rows:
        assert row["correct"]
        assert row["plan"] == row["asked"] or row["asked"] == "auto"
        assert row["predicted_us"] > 0
        assert row["p20"] <= row["us"] <= row["p80"]
        assert (row["projection_us"] > 0) == (row["pass"] == "forward")
        assert (row["layout"].keys() >= {"group", "warps"}) == (row["plan"] not in ("step", "split"))
    assert "measured / predicted, of the plans asked for by name" in capsys.readouterr().out

    # The next one begins anew.
    assert plan_check.main([str(tmp_path), *SMALL, "--limit", "0"]) == 0
    printed = capsys.readouterr().out
    assert "the time is up: the rest is not measured" in printed
    assert not rows_in(tmp_path)


def test_what_is_wrong_or_not_legal_says_so(
    emulated: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "--device emulated --hidden 8 --batch 2 --steps 3 --seconds 0 --types float32".split()
    monkeypatch.setitem(plan_check.NEAR, "float32", -1.0)
    assert plan_check.main([str(tmp_path), *options]) == 1
    rows = rows_in(tmp_path)
    refused = {row["asked"]: row["illegal"] for row in rows if "illegal" in row}
    assert refused.keys() == {"cluster", "grid", "grid-barrier"}
    assert all("too few units for two blocks" in why for why in refused.values())
    assert "WRONG block: LSTM float32 H=8 B=2 T=3 backward" in capsys.readouterr().out

    def broken(*_: Any) -> Any:
        raise RuntimeError("the card is lost\nand more")

    monkeypatch.setattr(plan_check, "Calls", broken)
    assert plan_check.main([str(tmp_path), *options]) == 1
    assert "FAILED LSTM float32 H=8 B=2 T=3" in capsys.readouterr().out
    (error,) = (row for row in whole_lines(tmp_path / "emulated-plans.jsonl") if row["what"] == "error")
    assert error["error"] == "the card is lost\nand more"


def test_the_summary_has_the_worst_first() -> None:
    def row(hidden: int, asked: str, plan: str, us: float, predicted: float = 1.0) -> dict[str, Any]:
        sizes = {"mode": "LSTM", "arithmetic": "bfloat16", "H": hidden, "B": 1, "T": 9, "pass": "forward"}
        return {**sizes, "asked": asked, "plan": plan, "us": us, "predicted_us": predicted, "correct": True}

    rows = [row(8, "auto", "block", 2.0), row(8, "step", "step", 1.0), row(8, "block", "block", 2.0, 4.0)]
    rows += [row(9, "auto", "step", 3.0), row(9, "step", "step", 3.0), row(9, "block", "block", 1.0, 4.0)]
    rows += [
        row(7, "auto", "step", 1.0),
        row(7, "step", "step", 1.0),
        {**row(7, "grid", "grid", 0.1), "correct": False},
    ]
    lines = plan_check.summary(rows)
    assert lines[0] == "3 shapes and passes; in 2 the plan chosen is at least 5 % slower than the fastest"
    assert lines[1] == "  3.00x LSTM bfloat16 H=9 B=1 T=9 forward: chosen step, fastest block"
    assert lines[2] == "  2.00x LSTM bfloat16 H=8 B=1 T=9 forward: chosen block, fastest step"
    assert any(line.split()[:3] == ["block", "forward", "0.38"] for line in lines)
    assert lines[-1] == "WRONG grid: LSTM bfloat16 H=7 B=1 T=9 forward"


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for words, why in (
        ("--cells SRU", "no such cell: SRU; there are LSTM"),
        ("--types int8", "no such type: int8"),
        ("--hidden 0", "numbers above 0"),
        ("--steps 0", "--steps: a number above 0"),
    ):
        with pytest.raises(SystemExit):
            plan_check.parse([str(tmp_path), *words.split()])
        assert why in capsys.readouterr().err
    with pytest.raises(argparse.ArgumentTypeError):
        plan_check.numbers("0")
    monkeypatch.setattr(libraries, "device_problem", lambda: "no CUDA device")
    assert plan_check.main([str(tmp_path)]) == 3
    assert "plan_check: no CUDA device" in capsys.readouterr().err

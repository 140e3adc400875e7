"""The plan over its grid of shapes: no cliff without a reason, pictures that are up to date, cuDNN's estimate.

All times are predictions, and nothing here is timed.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path

import pytest

import cudnn_estimate
import plan_cliffs
import plan_map
import plot
from card_model import CARDS
from plan_cliffs import BATCHES, HIDDEN_SIZES, Case
from rnnfast import ops

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=str(ops.library_error))

ADVICE = "run `make readme-figures`"
H100 = CARDS["h100"]


# ---- cliffs ---------------------------------------------------------------------------------------------------------


def test_the_grid_has_shapes_that_are_no_multiples_of_anything() -> None:
    assert len(HIDDEN_SIZES) * len(BATCHES) >= 2000
    assert list(HIDDEN_SIZES) == sorted(set(HIDDEN_SIZES))
    assert list(BATCHES) == sorted(set(BATCHES))
    assert (HIDDEN_SIZES[0], HIDDEN_SIZES[-1], BATCHES[0], BATCHES[-1]) == (16, 4096, 1, 1024)
    assert sum(size % 8 != 0 for size in HIDDEN_SIZES) > 20


@pytest.mark.parametrize("case", plan_cliffs.cases(), ids=str)
def test_no_cliff_without_a_reason(case: Case) -> None:
    found = {str(pair): plan_cliffs.reason(pair) for pair in plan_cliffs.cliffs(case)}
    assert [pair for pair, why in found.items() if why is None] == []
    assert set(found.values()) <= set(plan_cliffs.REASONS)
    # More work may take a little less time where whole tiles of a larger size fit better.
    assert [str(pair) for pair in plan_cliffs.falls(case, 0.95)] == []


def test_a_cliff_that_nothing_explains_is_noticed() -> None:
    case = Case(H100, "LSTM", "bfloat16", False)
    for name in ("step", "grid"):
        before, after = (case.plan(hidden, 16, name) for hidden in (768, 769))
        pair = plan_cliffs.Pair(case, (768, 16), (769, 16), before, after)
        assert not pair.is_cliff
        slower = pair._replace(after=dataclasses.replace(after, predicted_us=3 * after.predicted_us))
        assert slower.is_cliff
        assert plan_cliffs.reason(slower) is None, name


def test_a_family_that_is_not_known_yet_is_no_error() -> None:
    case = Case(H100, "LSTM", "bfloat16", False)
    before, after = (dataclasses.replace(case.plan(2048, batch), name="other", layout={}) for batch in (256, 257))
    pair = plan_cliffs.Pair(case, (2048, 256), (2048, 257), before, after)
    assert plan_cliffs.reason(pair) in (None, *plan_cliffs.REASONS)


@pytest.mark.parametrize("case", plan_cliffs.cases(("h100",)), ids=str)
def test_no_batch_would_be_faster_in_parts(case: Case) -> None:
    """The plan itself divides it where persistent kernels hold a part."""
    assert plan_cliffs.turns(case) == []


def test_a_batch_that_would_be_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_cliffs, "WORTH", 0.5)
    found = plan_cliffs.turns(Case(H100, "LSTM", "bfloat16", True))
    assert found
    assert all(gain > plan_cliffs.WORTH and 2 <= count <= plan_cliffs.MOST_TURNS for _, count, gain in found)


# ---- cuDNN ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "arithmetic", "hidden", "batch", "backward", "path"),
    [
        ("LSTM", "float16", 768, 16, False, "persistent"),
        ("LSTM", "bfloat16", 768, 16, False, "standard"),
        ("GRU", "float16", 768, 16, False, "standard"),
        ("LSTM", "float16", 768, 12, False, "standard"),
        ("LSTM", "float16", 768, 136, False, "standard"),
        ("LSTM", "float16", 700, 16, False, "standard"),
        ("LSTM", "float16", 1152, 16, False, "standard"),
        ("RNN_TANH", "float16", 896, 96, False, "standard"),
        ("LSTM", "tf32", 192, 512, False, "small H"),
        ("LSTM", "tf32", 193, 512, False, "standard"),
        ("GRU", "bfloat16", 128, 1, True, "small H"),
        ("GRU", "bfloat16", 129, 1, True, "standard"),
        ("LSTM", "float64", 64, 1, False, "standard"),
    ],
)
def test_which_way_cudnn_goes(mode: str, arithmetic: str, hidden: int, batch: int, backward: bool, path: str) -> None:
    assert cudnn_estimate.path_of(H100, mode, arithmetic, hidden, batch, backward) == path
    # A slice has too few SMs for the persistent kernel.
    assert cudnn_estimate.path_of(CARDS["h100-3g"], mode, arithmetic, hidden, batch, backward) != "persistent"


def test_what_is_known_of_cudnn_is_said_to_be() -> None:
    forward, backward = (cudnn_estimate.estimate(H100, "LSTM", "float16", 768, 16, each) for each in (False, True))
    assert forward.known
    assert backward.known
    assert 1.7 < forward.us < 1.96
    assert 2.5 < backward.us < 3.1
    others = [("LSTM", "float16", 768, 24), ("LSTM", "bfloat16", 768, 16), ("GRU", "float16", 768, 16)]
    assert not any(cudnn_estimate.estimate(H100, *shape).known for shape in others)


def test_the_standard_path_is_at_least_two_launches() -> None:
    for card in CARDS.values():
        least = 2 * card.constant("launch")
        times = [cudnn_estimate.standard_us(card, "LSTM", "bfloat16", 512, batch, False) for batch in (1, 64, 1024)]
        assert times[0] >= least
        assert times == sorted(times)


# ---- pictures -------------------------------------------------------------------------------------------------------


def test_the_pictures_show_what_the_plan_says_now() -> None:
    there = {path.name for path in plan_map.FOLDER.glob("*")}
    assert there == {f"{picture.name}.png" for picture in plan_map.PICTURES}, ADVICE
    for picture in plan_map.PICTURES:
        path = plan_map.FOLDER / f"{picture.name}.png"
        assert plot.source_of(path) == plan_map.fingerprint(picture), f"{path.name}: {ADVICE}"
    assert sum(path.stat().st_size for path in plan_map.FOLDER.glob("*.png")) < 1 << 19


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
def test_a_picture_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_map.main(["--card", "h100-1g", "--cell", "GRU", "--type", "tf32", "--out", str(tmp_path)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["h100-1g-gru-tf32.png"]
    assert "written: " in capsys.readouterr().out
    with pytest.raises(SystemExit):
        plan_map.main(["--card", "h100"])

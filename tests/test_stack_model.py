"""What overlap would give stacks (benchmarks/stack_model.py): predictions within what is possible. Nothing is timed."""

from __future__ import annotations

import pytest

import stack_model
from card_model import CARDS
from rnnfast import ops
from rnnfast.benchmark.case import Case
from stack_model import WAYS, gains, today

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=str(ops.library_error))

H100 = CARDS["h100"]


@pytest.mark.parametrize("card", ["a100", "h100", "h100-1g"])
def test_nothing_gains_more_than_is_there(card: str) -> None:
    device = CARDS[card]
    for case in stack_model.realistic():
        products = stack_model.share_of_products(case, device)
        assert 0 < products < 1
        found = {name: gains(case, device, way) for name, way in WAYS.items()}
        if found["wavefront"].training is not None:
            # No more than all layers at once; a layer beside others is no faster than alone.
            assert found["wavefront"].training < 1 - 1 / case.layers, case.name
            assert case.directions == 1
        for name in ("beside", "aside"):
            assert 0 <= (found[name].training or 0.0) <= products, (name, case.name)


def test_what_cannot_overlap() -> None:
    both = Case("LSTM", 16, 256, 500, layers=3, directions=2)
    assert stack_model.wavefront(both, H100) is None
    assert stack_model.wavefront(Case("LSTM", 16, 256, 500), H100) is None
    # Launches step by step take the whole card.
    assert stack_model.wavefront(Case("LSTM", 256, 2048, 500, layers=2), H100) is None
    # One chunk is no chunk.
    assert stack_model.wavefront(Case("LSTM", 16, 256, 8, layers=2), H100) is None


def test_longer_sequences_gain_more_of_a_wavefront() -> None:
    found = [gains(Case("LSTM", 16, 256, steps, layers=4), H100, stack_model.wavefront) for steps in (50, 200, 1000)]
    assert [pair.training for pair in found] == sorted(pair.training or 0.0 for pair in found)


def test_a_call_is_the_sum_of_its_parts() -> None:
    one, three = (today(Case("LSTM", 16, 256, 100, layers=layers), H100) for layers in (1, 3))
    assert three.forward == pytest.approx(3 * one.forward)
    assert three.backward == pytest.approx(3 * one.backward)


def test_the_tables() -> None:
    text = stack_model.all_tables()
    blocks = [block.splitlines() for block in text.split("\n\n")]
    for lines in blocks[:2]:
        assert len({line.count("|") for line in lines}) == 1
    assert all(case.model in text for case in stack_model.realistic())
    assert stack_model.percent(0.2) == "**+20 %**"
    assert (stack_model.percent(-0.1), stack_model.percent(0.001), stack_model.percent(None)) == ("-10 %", "0", "-")

"""Layers with options by the Triton kernels, in Triton's interpreter.

What they share with other backends' stands in test_variants_backends.py; here is what is their own: tiles, turns,
captured graphs, the schema in Python.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import rnnfast
from option_calls import GRU, LSTM, by_reference, random_call, with_gradients
from rnnfast.variants import ops as variant_ops
from rnnfast.variants import reference
from rnnfast.variants.reference import Weights
from test_variants_refusals import arguments, changed
from triton_interpreter import triton_problem
from variant_layers import EXACT, R, same

if (_why := triton_problem()) is not None:
    pytest.skip(_why, allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from rnnfast.triton import graphs, plan, variant_layers


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with rnnfast.backend("triton"):
        yield


# --- of the kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "size", "batch"),
    [("LSTM", 40, 2), ("GRU", 40, 2), ("GRU", 3, 18), pytest.param("LSTM", 3, 18, marks=pytest.mark.exhaustive)],
    ids=["LSTM units", "GRU units", "GRU rows", "LSTM rows"],
)
def test_several_tiles(mode: str, size: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than a program takes of a product, or of rows without a norm; more rows than one takes."""
    monkeypatch.setattr(plan, "_ROW_VALUES", 16)
    call = random_call(random.Random(size), mode, size, batch, 2)
    plain = call._replace(weights=call.weights._replace(weight_norm_hh=None, weight_norm_c=None, bias_norm_c=None))
    tiles = [plan.row_tiles(size, torch.float64, whole_rows) for whole_rows in (True, False)]
    assert [(of.batch, of.units) for of in tiles] == [(1, max(16, 64 * (size == 40))), (1, 16)]
    for each in (call, plain):
        same(with_gradients(each), by_reference(lambda each=each: with_gradients(each)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "GRU reset", "sLSTM"])
def test_turns_past_the_last_do_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph holds a fixed number of turns: here each call is run with some more."""
    call = random_call(random.Random(2), mode.split()[0].removeprefix("s"), 5, 3, 3)
    if mode == "GRU reset":
        call = changed(call, {"words": "reset_first", "weights": {"weight_norm_hh": None, "bias_hn": None}})
    if mode == "sLSTM":
        call = call._replace(words="exponential", zoneout_c=0.0, lx=R(3, 5), weights=Weights(call.weights.weight_hh))
    call = changed(call, {"sequences": {"lengths": torch.tensor([2, 3, 0]), "resets": torch.rand(3, 3) < 0.4}})
    expected, real = with_gradients(call), graphs.run
    monkeypatch.setattr(graphs, "run", lambda key, values, turns, *rest: real(key, values, turns + 4, *rest))
    same(with_gradients(call), expected)


# --- of the ops ---------------------------------------------------------------------------------------------------


def test_there_is_one_schema() -> None:
    """Python's, which Triton's ops are defined with, is C++'s."""
    if not rnnfast.backends()["cpu"].available:
        pytest.skip(rnnfast.backends()["cpu"].reason)
    for op in variant_ops.schemas():
        schemas = [
            str(getattr(getattr(torch.ops, space), op).default._schema) for space in ("rnnfast", "rnnfast_triton")
        ]
        assert schemas[0].replace("rnnfast::", "rnnfast_triton::") == schemas[1]


def test_every_cell_has_a_variant() -> None:
    for mode in ("LSTM", "GRU", *reference._NONLINEARITIES):
        variant, size = variant_layers.variant_of("x", arguments(mode))
        assert (variant.gates, size) == ({"LSTM": LSTM, "GRU": GRU}.get(mode, 1), 6)


def test_keys_of_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say all that launches depend on beside the table, and nothing more: neither T nor what lies where."""
    keys: list[Any] = []
    monkeypatch.setattr(graphs, "run", lambda key, *_: keys.append(key))

    def key_of(size: int = 5, batch: int = 3, steps: int = 4, mode: str = "GRU", **given: Any) -> Any:
        call = random_call(random.Random(7), mode, size, batch, steps, **given)
        variant_layers.variant_forward(True, *variant_ops.flat(call))
        return keys.pop()

    base = key_of()
    assert hash(base) == hash(key_of(steps=9))
    assert base == key_of(steps=9) == key_of(hx=None) == key_of(eps=0.5)
    others = [
        key_of(size=6), key_of(batch=100), key_of(mode="LSTM"), key_of(zoneout_h=0.5, masks={"zoneout_h": None}),
        key_of(words=""), key_of(masks={"recurrent": None}), key_of(num_heads=5, weights={"weight_hh": R(15, 1)}),
        key_of(words="reset_first", weights={"weight_norm_hh": None, "bias_hn": None}),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


class Replayed:
    """In the place of a CUDA graph, stream and event: launches are noted while a graph is captured, and done again."""

    capturing: Replayed | None = None

    def __init__(self, *_: Any) -> None:
        self.launches: list[Callable[[], None]] = []

    def capture_begin(self, **_: Any) -> None:
        Replayed.capturing = self

    def capture_end(self) -> None:
        Replayed.capturing = None

    def replay(self) -> None:
        for launch in self.launches:
            launch()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize("mode", ["LSTM", "GRU reset"])
def test_captured_graphs_serve_other_lengths(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device: the table, of its true size, is all that a replay finds."""
    original = InterpretedFunction.run

    def run(kernel: Any, *given: Any, **named: Any) -> None:
        if Replayed.capturing is not None:
            Replayed.capturing.launches.append(lambda: original(kernel, *given, **named))
        else:
            original(kernel, *given, **named)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(graphs, "_captured", type(graphs._captured)())
    for name in ("CUDAGraph", "Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Replayed)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made, real = graphs.new_table, graphs.run
    monkeypatch.setattr(graphs, "new_table", lambda _, *size: made(torch.device("cpu"), *size).fill_(-7))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(graphs, "run", lambda key, values, turns, _, launch: real(key, values, turns, device, launch))
    for steps in (9, 10):
        call = random_call(random.Random(8), mode.split()[0], 3, 2, steps)
        if mode == "GRU reset":
            call = changed(call, {"words": "reset_first", "weights": {"weight_norm_hh": None, "bias_hn": None}})
        call = changed(call, {"sequences": {"lengths": torch.tensor([steps, 4]), "resets": R(steps, 2) > 1}})
        same(with_gradients(call), by_reference(lambda call=call: with_gradients(call)), **EXACT)
    assert len(graphs._captured) == 2

"""Layers made of Keras' weights: against loops of numpy, and against Keras itself where it is installed."""

import os
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import rnnfast
from convert_cases import (
    Array,
    F,
    H,
    N,
    T,
    check,
    check_layer,
    hard_sigmoid,
    keras_arrays,
    keras_loop,
    sigmoid,
)
from rnnfast import convert


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


KERAS_GATES = {
    "sigmoid": (None, sigmoid),
    "hard_sigmoid": (2, hard_sigmoid(0.2, 0.5)),
    "hard_sigmoid of 3": (3, lambda x: np.clip(x + 3, 0, 6) / 6),
}


@pytest.mark.parametrize("gates", KERAS_GATES)
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("cell", "reset_after"), [("LSTM", True), ("GRU", True), ("GRU", False)])
def test_keras_gated(
    cell: str, reset_after: bool, bias: bool, bidirectional: bool, gates: str, rng: np.random.Generator
) -> None:
    version, function = KERAS_GATES[gates]
    every = [keras_arrays(rng, cell, bias, reset_after) for _ in range(1 + bidirectional)]
    x = 2 * rng.normal(size=(T, N, F))
    # Without a bias its shape cannot tell.
    settings = {"reset_after": reset_after} if cell == "GRU" and not bias else {}
    module = convert.from_keras(
        [array for arrays in every for array in arrays], cell, bidirectional=bidirectional, keras_version=version,
        batch_first=False, recurrent_activation=gates.split()[0], **settings,
    )  # fmt: skip
    assert type(module) is getattr(rnnfast, cell)
    assert module.bias is bias
    check_layer(
        module, x, [keras_loop(cell, a, x, np.tanh, function, reset_after, d == 1) for d, a in enumerate(every)]
    )


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("activation", ["tanh", "relu", "sigmoid", "linear", None])
def test_keras_simple(activation: str | None, bidirectional: bool, rng: np.random.Generator) -> None:
    functions = {"tanh": np.tanh, "relu": lambda v: np.maximum(v, 0), "sigmoid": sigmoid}
    every = [[a / 4 for a in keras_arrays(rng, "SimpleRNN", True, True)] for _ in range(1 + bidirectional)]
    x = rng.normal(size=(T, N, F))
    of_all = [array for arrays in every for array in arrays]
    module = convert.from_keras(of_all, "SimpleRNN", bidirectional=bidirectional, activation=activation)
    assert module.batch_first
    function = functions.get(str(activation), lambda v: v)
    check_layer(module, x, [keras_loop("SimpleRNN", a, x, function, reverse=d == 1) for d, a in enumerate(every)])


def fake_keras(name: str, arrays: list[Array], library: str = "keras", **config: Any) -> Any:
    """A layer as far as `from_keras` looks at it, of a class that says that it is of `library`."""
    members = {
        "__module__": f"{library}.src.layers.rnn",
        "get_weights": lambda _: arrays,
        "get_config": lambda _: config,
    }
    return type(name, (), members)()


@pytest.mark.parametrize(("library", "version"), [("keras", "2.12.0"), ("keras", "3.4.1"), ("tf_keras", "2.17.0")])
def test_hard_sigmoid_is_that_of_the_layers_library(
    library: str, version: str, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, SimpleNamespace(__version__=version))
    arrays, x = keras_arrays(rng, "LSTM", True, True), rng.normal(size=(T, N, F))
    layer = fake_keras("LSTM", arrays, library, recurrent_activation="hard_sigmoid", units=H)
    function = hard_sigmoid(1 / 6 if version[0] == "3" else 0.2, 0.5)
    check_layer(convert.from_keras(layer), x, [keras_loop("LSTM", arrays, x, np.tanh, function)])
    other = hard_sigmoid(0.2 if version[0] == "3" else 1 / 6, 0.5)
    module = convert.from_keras(layer, keras_version=2 if version[0] == "3" else 3)
    check_layer(module, x, [keras_loop("LSTM", arrays, x, np.tanh, other)])


def test_keras_settings_become_options(rng: np.random.Generator) -> None:
    config = {"dropout": 0.25, "recurrent_dropout": 0.5, "reset_after": False, "time_major": True, "units": H}
    layer = fake_keras("GRU", keras_arrays(rng, "GRU", True, False), **config)
    module = convert.from_keras(layer)
    assert "reset_after=False" in module.extra_repr()
    assert "input_dropout=0.25" in module.extra_repr()
    assert "recurrent_dropout=0.5" in module.extra_repr()
    assert not module.batch_first
    assert convert.from_keras(layer, batch_first=True, dropout=0).batch_first
    cell = fake_keras("LSTMCell", [], units=H, dropout=0.5)
    wrapped = fake_keras("RNN", keras_arrays(rng, "LSTM", False, True), go_backwards=False)
    wrapped.cell = cell
    assert "input_dropout=0.5" in convert.from_keras(wrapped).extra_repr()


def fake_bidirectional(rng: np.random.Generator, forward: Any = None, backward: Any = None, **others: Any) -> Any:
    layers = (
        fake_keras("LSTM", keras_arrays(rng, "LSTM", True, True), **{"go_backwards": back, **(config or {})})
        for back, config in ((False, forward), (True, backward))
    )
    return SimpleNamespace(
        **dict(zip(("forward_layer", "backward_layer"), layers, strict=True)), get_config=dict, **others
    )


KERAS_ERRORS = {
    "cell: expected 'LSTM', 'GRU', 'SimpleRNN' with arrays, got None": lambda a: convert.from_keras(a),
    "got them with a layer": lambda a: convert.from_keras(fake_keras("LSTM", a), "LSTM"),
    "source: expected Keras' .* got CuDNNLSTM": lambda a: convert.from_keras(fake_keras("CuDNNLSTM", a)),
    "expected a layer that was built, got LSTM": lambda _: convert.from_keras(fake_keras("LSTM", [])),
    "of one direction, got 6 arrays": lambda a: convert.from_keras(a * 2, "LSTM"),
    "of two directions, got 3 arrays": lambda a: convert.from_keras(a, "LSTM", bidirectional=True),
    "got 4 arrays": lambda a: convert.from_keras(fake_keras("LSTM", [*a, a[0]])),
    r"settings: expected .* got units": lambda a: convert.from_keras(a, "LSTM", units=4),
    r"keras_version: expected 2 or 3": lambda a: convert.from_keras(a, "LSTM", recurrent_activation="hard_sigmoid"),
    r"activation: expected 'tanh' for LSTM, got 'relu'": lambda a: convert.from_keras(a, "LSTM", activation="relu"),
    r"activation: expected 'sigmoid' or 'hard_sigmoid' for LSTM, got None": lambda a: convert.from_keras(
        a, "LSTM", recurrent_activation=None
    ),
    r"got \{'class_name'": lambda a: convert.from_keras(fake_keras("LSTM", a, activation={"class_name": "function"})),
    r"go_backwards: expected False, got True": lambda a: convert.from_keras(fake_keras("LSTM", a, go_backwards=True)),
    r"stateful: expected False, got True": lambda a: convert.from_keras(fake_keras("LSTM", a, stateful=True)),
    r"recurrent_kernel: expected shape \(H, 3 H\)": lambda a: (
        convert.from_keras(a, "GRU", reset_after=False)
        if a[1].ndim != 2
        else convert.from_keras([a[0], a[1][0], a[2]], "GRU")
    ),
    r"recurrent_kernel: expected shape \(4, 12\), got \(4, 16\)": lambda a: convert.from_keras(a, "GRU"),
    r"kernel: expected shape \(I, 16\), got \(5, 12\)": lambda a: convert.from_keras([a[0][:, :12], *a[1:]], "LSTM"),
    r"bias: expected shape \(16,\), got \(4,\)": lambda a: convert.from_keras([*a[:2], a[2][:4]], "LSTM"),
    r"with reset_after=True: expected shape \(2, 12\), got \(12,\)": lambda a: convert.from_keras(
        [each[..., :12] for each in a], "GRU", reset_after=True
    ),
    r"kernel: expected an array of a floating type, got one of torch.int64": lambda a: convert.from_keras(
        [a[0].astype(int), *a[1:]], "LSTM"
    ),
    "kernel: expected an array of a floating type, got str": lambda a: convert.from_keras(["w", *a[1:]], "LSTM"),
}


@pytest.mark.parametrize("message", KERAS_ERRORS)
def test_keras_errors(message: str, rng: np.random.Generator) -> None:
    with pytest.raises((TypeError, ValueError), match=f"^from_keras: .*{message}"):
        KERAS_ERRORS[message](keras_arrays(rng, "LSTM", True, True))


def test_keras_bidirectional_errors(rng: np.random.Generator) -> None:
    with pytest.raises(ValueError, match=r"go_backwards: expected False of forward_layer .* got True and True"):
        convert.from_keras(fake_bidirectional(rng, {"go_backwards": True}))
    with pytest.raises(ValueError, match=r"dropout: expected the same .* got None and 0\.5"):
        convert.from_keras(fake_bidirectional(rng, {}, {"dropout": 0.5}))
    with pytest.raises(ValueError, match="merge_mode: expected 'concat', got 'sum'"):
        convert.from_keras(fake_bidirectional(rng, merge_mode="sum"))
    assert convert.from_keras(fake_bidirectional(rng, merge_mode="sum"), merge_mode="concat").bidirectional


@pytest.fixture(scope="module")
def keras() -> Any:
    os.environ.setdefault("KERAS_BACKEND", "torch")
    return pytest.importorskip("keras", reason="Keras is not installed")


KERAS_LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"use_bias": False, "recurrent_activation": "hard_sigmoid"}),
    ("LSTM", {"recurrent_activation": "hard_sigmoid", "dropout": 0.5, "recurrent_dropout": 0.5}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("GRU", {"recurrent_activation": "hard_sigmoid"}),
    ("GRU", {"reset_after": False, "recurrent_activation": "hard_sigmoid", "use_bias": False}),
    ("SimpleRNN", {}),
    ("SimpleRNN", {"activation": "relu", "dropout": 0.1}),
    ("SimpleRNN", {"activation": "sigmoid"}),
    ("SimpleRNN", {"activation": None}),
    ("RNN", {}),
]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("name", "arguments"), KERAS_LAYERS)
def test_keras_itself(
    keras: Any, name: str, arguments: dict[str, Any], bidirectional: bool, rng: np.random.Generator
) -> None:
    # Keras multiplies float64 in float32.
    theirs = keras.layers.RNN(keras.layers.LSTMCell(H), return_sequences=True, return_state=True)
    if name != "RNN":
        theirs = getattr(keras.layers, name)(H, return_sequences=True, return_state=True, **arguments)
    theirs = keras.layers.Bidirectional(theirs) if bidirectional else theirs
    x = torch.randn(N, T, F)
    theirs(x)
    theirs.set_weights([rng.normal(size=weight.shape) / 2 for weight in theirs.get_weights()])
    output, *states = (each.detach().cpu().numpy() for each in theirs(x))
    ours = convert.from_keras(theirs)
    with torch.no_grad():
        found, found_states = ours(x)
    check(found, output, 1e-6)
    found_states = found_states if isinstance(found_states, tuple) else (found_states,)
    # By direction: h, c there, and here h of both.
    by_direction = [states[n : n + len(found_states)] for n in range(0, len(states), len(found_states))]
    for n, state in enumerate(found_states):
        check(state, np.stack([of_direction[n] for of_direction in by_direction]), 2e-6)
    cell, settings = "LSTM" if name == "RNN" else name, {k: v for k, v in arguments.items() if k != "use_bias"}
    of_arrays = convert.from_keras(theirs.get_weights(), cell, bidirectional=bidirectional, keras_version=3, **settings)
    check(of_arrays(x)[0].detach(), output, 1e-6)

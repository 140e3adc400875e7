"""accelerate and restore: in place, nothing but the class changes, and what is left alone is said with its reason."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import rnnfast
from rnnfast.cli import main


class Tagger(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)
        self.layers = nn.ModuleList([nn.LSTM(4, 5, 2, bidirectional=True, **kwargs), nn.GRU(10, 6, **kwargs)])
        self.rnn = nn.RNN(6, 6, nonlinearity="relu", **kwargs)
        self.cells = nn.ModuleDict({"lstm": nn.LSTMCell(6, 5), "gru": nn.GRUCell(5, 5), "rnn": nn.RNNCell(5, 5)})
        self.out = nn.Linear(5, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in (*self.layers, self.rnn):
            x, _ = layer(x)
        h, c = self.cells["lstm"](x[-1])
        h = self.cells["rnn"](c, self.cells["gru"](h))
        return self.out(h)


NAMES = ["layers.0", "layers.1", "rnn", "cells.lstm", "cells.gru", "cells.rnn"]


def classes(model):
    return [type(model.get_submodule(name)) for name in NAMES]


OURS = [rnnfast.LSTM, rnnfast.GRU, rnnfast.RNN, rnnfast.LSTMCell, rnnfast.GRUCell, rnnfast.RNNCell]
THEIRS = [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell]


def test_swaps_everything_in_place_and_back():
    model, tokens = Tagger().double(), torch.randint(11, (7, 3))
    before, parameters, keys = model(tokens), list(model.parameters()), list(model.state_dict())
    objects = [model.get_submodule(name) for name in NAMES]
    report = rnnfast.accelerate(model)
    assert classes(model) == OURS
    assert list(report.swapped) == NAMES
    assert report.left == {}
    assert "layers.0: torch.nn.LSTM -> rnnfast.LSTM" in str(report)
    assert all(model.get_submodule(name) is module for name, module in zip(NAMES, objects, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert list(model.state_dict()) == keys
    assert_close(model(tokens), before)

    again = rnnfast.accelerate(model)
    assert (again.swapped, again.left) == ({}, {})
    assert classes(model) == OURS

    report = rnnfast.restore(model)
    assert classes(model) == THEIRS
    assert list(report.swapped) == NAMES
    assert report.swapped["rnn"] == "rnnfast.RNN -> torch.nn.RNN"
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert torch.equal(model(tokens), before)
    assert rnnfast.restore(model).swapped == {}


@pytest.mark.parametrize("ours", range(6))
def test_the_model_itself_may_be_a_layer(ours):
    layer = THEIRS[ours](4, 5)
    report = rnnfast.accelerate(layer)
    assert type(layer) is OURS[ours]
    assert list(report.swapped) == [""]
    assert "(the model)" in str(report)
    rnnfast.restore(layer)
    assert type(layer) is THEIRS[ours]


def test_optimizer_state_and_hooks_stay():
    """Training goes on where it was: the same losses as without the swap, hooks still run."""
    tokens, target = torch.randint(11, (7, 3)), torch.randint(3, (3,))
    plain = Tagger().double()
    swapped = copy.deepcopy(plain)
    calls, losses = [], []
    for model in (plain, swapped):
        model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        losses.append([])
        for step in range(6):
            if model is swapped and step == 3:
                rnnfast.accelerate(model)
            if model is swapped and step == 5:
                rnnfast.restore(model)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), target)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert len(calls) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-9)
    assert losses[0][-1] < losses[0][0]


def test_tied_and_shared_modules():
    layer = nn.GRU(4, 4, dtype=torch.float64)
    layer.weight_hh_l0 = layer.weight_ih_l0
    model = nn.ModuleList([layer, layer])
    input = torch.randn(5, 2, 4, dtype=torch.float64)
    before = layer(input)
    assert list(rnnfast.accelerate(model).swapped) == ["0"]
    assert model[0] is model[1]
    assert layer.weight_hh_l0 is layer.weight_ih_l0
    for a, b in zip(layer(input), before, strict=True):
        assert_close(a, b)


def test_what_it_leaves_alone_it_says():
    class Mine(nn.LSTM):
        pass

    class LSTM(nn.Module):  # a name alone says nothing
        def __init__(self):
            super().__init__()
            self.inner = nn.LSTM(4, 5)

    replaced = nn.GRU(4, 5)
    replaced.forward = lambda input: input
    odd = nn.RNN(4, 5)
    odd.mode = "RNN_SINE"
    model = nn.ModuleDict(
        {
            "mine": Mine(4, 5),
            "wrapped": LSTM(),
            "scripted": torch.jit.script(nn.LSTM(4, 5)),
            "replaced": replaced,
            "odd": odd,
            "linear": nn.Linear(4, 5),
        }
    )
    report = rnnfast.accelerate(model)
    assert list(report.swapped) == ["wrapped.inner"]
    assert set(report.left) == {"mine", "scripted", "replaced", "odd"}
    assert "Mine is a subclass" in report.left["mine"]
    assert "ScriptModule" in report.left["scripted"]
    assert "forward was replaced" in report.left["replaced"]
    assert "unknown mode 'RNN_SINE'" in report.left["odd"]
    assert type(model["mine"]) is Mine
    for name, reason in report.left.items():
        assert f"{name}: left alone: {reason}" in str(report)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="this torch has no quantized engine")
def test_quantized_layers_are_left_alone():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(4, 5)), {nn.LSTM}, dtype=torch.qint8)
    report = rnnfast.accelerate(model)
    assert report.swapped == {}
    assert report.left == {"0": "quantized"}


def test_restore_leaves_what_torch_does_not_have():
    class Mine(rnnfast.GRU):
        pass

    model = nn.ModuleDict(
        {
            "linear": rnnfast.RNN(4, 5, nonlinearity="identity"),
            "cell": rnnfast.RNNCell(4, 5, nonlinearity="identity"),
            "mine": Mine(4, 5),
            "lstm": rnnfast.LSTM(4, 5),
        }
    )
    assert rnnfast.accelerate(model).left == {}
    report = rnnfast.restore(model)
    assert list(report.swapped) == ["lstm"]
    assert report.left["linear"] == report.left["cell"] == "torch.nn has no nonlinearity 'identity'"
    assert "Mine is a subclass" in report.left["mine"]


def test_parametrized_layers():
    """torch gives each parametrized module a class of its own: it is made anew from ours, and back."""

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    layer, other = nn.LSTM(4, 5, dtype=torch.float64), nn.LSTM(4, 5, dtype=torch.float64)
    for module in (layer, other):
        parametrize.register_parametrization(module, "weight_hh_l0", Half())
    twin, input = copy.deepcopy(layer), torch.randn(6, 3, 4, dtype=torch.float64)
    before = layer(input)[0]
    report = rnnfast.accelerate(layer)
    assert report.swapped == {"": "torch.nn.LSTM -> rnnfast.LSTM"}
    assert isinstance(layer, rnnfast.LSTM)
    assert not isinstance(twin, rnnfast.LSTM)  # shares the class that layer had
    assert_close(layer(input)[0], before)
    parametrize.register_parametrization(layer, "weight_ih_l0", Half())
    assert_close(twin(input)[0], before)
    rnnfast.restore(layer)
    assert not isinstance(layer, rnnfast.LSTM)
    assert isinstance(layer, nn.LSTM)
    rnnfast.accelerate(layer)
    parametrize.remove_parametrizations(layer, "weight_hh_l0")
    parametrize.remove_parametrizations(layer, "weight_ih_l0")
    assert type(layer) is rnnfast.LSTM


def test_reports_are_for_devices_with_kernels():
    layer = nn.GRU(4, 5, device="meta")
    assert list(rnnfast.accelerate(layer).swapped) == [""]


def test_info_prints_versions_and_every_backend(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert rnnfast.__version__ in text
    assert torch.__version__ in text
    for name, can in rnnfast.backends().items():
        assert f"backend {name}" in text
        assert can.reason in text
    with pytest.raises(SystemExit):
        main(["nonsense"])

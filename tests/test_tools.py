"""Tools that know only torch.nn's layers: rnnfast.exporting, and what FX, TorchScript and the ONNX exporter get."""

import copy
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import rnnfast
from module_cases import KINDS, leaves, raised, same

CELLS = [f"{kind}Cell" for kind in KINDS]


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.rnn = layer

    def forward(self, x):
        return self.rnn(x)


class Stateful(Net):
    def forward(self, x, hx):
        return self.rnn(x, hx)


def made(kind, **options):
    """A layer or cell of ours, an input for it, and a state."""
    layer = getattr(rnnfast, kind)(4, 5, **options)
    shape = (3,) if kind in CELLS else (6, 3)
    hx = torch.randn(3, 5) if kind in CELLS else torch.randn(1 + bool(options), 3, 5)
    return layer, torch.randn(*shape, 4), (hx, hx.clone()) if kind.startswith("LSTM") else hx


# --- exporting ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS + CELLS)
def test_exporting_swaps_for_the_block(kind):
    ours, input, _ = made(kind)
    model = nn.Sequential(ours, nn.Identity())
    parameters, expected = list(model.parameters()), model(input)
    with rnnfast.exporting(model) as inside:
        assert inside is model
        assert type(ours) is getattr(nn, kind)
        assert model[0] is ours
        same(model(input), expected)
        with rnnfast.exporting(model):
            assert type(ours) is getattr(nn, kind)
        assert type(ours) is getattr(nn, kind)
    assert type(ours) is getattr(rnnfast, kind)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    def fails():
        with rnnfast.exporting(ours):
            assert type(ours) is getattr(nn, kind)
            raise KeyError("x")

    assert raised(fails)[0] is KeyError
    assert type(ours) is getattr(rnnfast, kind)


def test_exporting_swaps_back_what_it_swapped_only():
    model = nn.ModuleDict(
        {
            "theirs": nn.GRU(4, 5),
            "kept": rnnfast.GRU(4, 5),
            "replaced": rnnfast.GRU(4, 5),
            "removed": rnnfast.LSTM(4, 5),
            "accelerated": rnnfast.RNN(4, 5),
            "halved": rnnfast.LSTMCell(4, 5),
        }
    )
    removed = model["removed"]
    with rnnfast.exporting(model):
        model["replaced"] = nn.Linear(4, 5)
        del model["removed"]
        model["added"] = nn.LSTM(4, 5)
        rnnfast.accelerate(model["accelerated"])
        parametrize.register_parametrization(model["halved"], "weight_hh", nn.Identity())
    assert type(model["theirs"]) is nn.GRU
    assert type(model["added"]) is nn.LSTM
    assert type(removed) is nn.LSTM
    assert type(model["kept"]) is rnnfast.GRU
    assert type(model["replaced"]) is nn.Linear
    assert type(model["accelerated"]) is rnnfast.RNN
    assert isinstance(model["halved"], rnnfast.LSTMCell)


def test_exporting_says_what_it_cannot_swap():
    model = nn.Sequential(rnnfast.RNN(4, 5, nonlinearity="identity"), rnnfast.GRU(5, 5))
    text = "(?s)not all layers.* 0: left alone: torch.nn has no nonlinearity 'identity'"
    block = rnnfast.exporting(model)
    with pytest.warns(UserWarning, match=text):
        block.__enter__()
    assert type(model[0]) is rnnfast.RNN
    assert type(model[1]) is nn.GRU
    block.__exit__(None, None, None)
    assert type(model[1]) is rnnfast.GRU


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="this torch has no quantized engine")
@pytest.mark.parametrize("inplace", [False, True])
def test_quantize_dynamic(inplace):
    model, input = nn.Sequential(rnnfast.LSTM(4, 5)), torch.randn(6, 3, 4)
    expected = model(input)[0]
    with rnnfast.exporting(model):
        quantized = torch.ao.quantization.quantize_dynamic(model, {nn.LSTM}, dtype=torch.qint8, inplace=inplace)
    assert type(quantized[0]) is torch.ao.nn.quantized.dynamic.LSTM
    assert_close(quantized(input)[0], expected, atol=0.05, rtol=0)
    assert type(model[0]) is (torch.ao.nn.quantized.dynamic.LSTM if inplace else rnnfast.LSTM)


# --- FX -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS + CELLS)
@pytest.mark.parametrize("accelerated", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_fx_takes_them_for_leaves(kind, accelerated, given):
    ours, input, hx = made(kind)
    if accelerated:
        rnnfast.restore(ours), rnnfast.accelerate(ours)
    model, arguments = (Stateful(ours), (input, hx)) if given else (Net(ours), (input,))
    traced = torch.fx.symbolic_trace(model)
    assert [(n.op, n.target) for n in traced.graph.nodes if n.op.startswith("call")] == [("call_module", "rnn")]
    same(traced(*arguments), model(*arguments))
    # Again, from the traced module; and in another module, as a part.
    again = torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(traced)) if not given else traced)
    same(again(*arguments), model(*arguments))
    with torch.no_grad():
        assert leaves(torch.fx.Interpreter(traced).run(*arguments))[0].shape == leaves(model(*arguments))[0].shape
    same(torch.fx.Transformer(traced).transform()(*arguments), model(*arguments))


def test_fx_keeps_our_own_arguments():
    class Options(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(rnnfast.LSTM(4, 5))

        def forward(self, x, h, c, lengths, resets):
            return self.inner[0](x, (h, c), lengths=lengths, resets=resets, return_cell_states=True)

    model = Options()
    x, lengths, resets = torch.randn(6, 3, 4), torch.tensor([6, 2, 0]), torch.rand(6, 3) < 0.3
    arguments = (x, torch.randn(1, 3, 5), torch.randn(1, 3, 5), lengths, resets)
    traced = torch.fx.symbolic_trace(model)
    (node,) = [n for n in traced.graph.nodes if n.op == "call_module"]
    assert node.target == "inner.0"
    assert set(node.kwargs) == {"lengths", "resets", "return_cell_states"}
    same(traced(*arguments), model(*arguments))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_prepare_fx(kind):
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    ours, input, _ = made(kind)
    model = Net(ours).eval()
    prepared = prepare_fx(model, QConfigMapping().set_global(default_dynamic_qconfig), (input,))
    assert "rnn" in [n.target for n in prepared.graph.nodes if n.op == "call_module"]
    same(prepared(input), model(input))


# --- TorchScript ----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS + CELLS)
def test_torchscript_gets_torchs_layers_and_says_so(kind):
    ours, input, _ = made(kind)
    model = Net(ours)
    expected = model(input)
    with pytest.warns(
        UserWarning, match=rf"torch.nn.{kind} takes the place of rnnfast.{kind}.*rnnfast.exporting\(model"
    ):
        scripted = torch.jit.script(model)
    same(scripted(input), expected)
    # torch.jit.script puts it into the model.
    assert type(model.rnn) is getattr(nn, kind)
    assert all(a is b for a, b in zip(model.rnn.parameters(), ours.parameters(), strict=True))
    name = "weight_hh_l0" if kind in KINDS else "weight_hh"
    assert getattr(scripted.rnn, name) is getattr(ours, name)
    rnnfast.accelerate(model)
    assert type(model.rnn) is getattr(rnnfast, kind)
    same(model(input), expected)
    with warnings.catch_warnings(), rnnfast.exporting(model):
        warnings.simplefilter("error", UserWarning)
        same(torch.jit.script(model)(input), expected)
    assert type(model.rnn) is getattr(rnnfast, kind)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS + CELLS)
def test_torchscript_of_a_subclass_names_the_way_out(kind):
    mine = type("Mine", (getattr(rnnfast, kind),), {"__module__": "somewhere"})(4, 5)
    error, text = raised(lambda: torch.jit.script(Net(mine)))
    assert error is RuntimeError
    assert f"somewhere.Mine is a subclass of rnnfast.{kind}, which cannot be scripted" in text
    assert "rnnfast.exporting(model)" in text


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_what_torch_does_not_have_is_refused(kind):
    ours = getattr(rnnfast, kind)(4, 5, nonlinearity="identity")
    error, text = raised(lambda: torch.jit.script(Net(ours)))
    assert (error, text) == (RuntimeError, f"torch.jit.script: rnnfast.{kind}: torch.nn has no nonlinearity 'identity'")


# --- ONNX -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def _in_onnx_export(monkeypatch):
    """What torch.onnx.export(dynamo=False) does to a model, without the package onnx."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.usefixtures("_in_onnx_export")
@pytest.mark.parametrize("kind", KINDS + CELLS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True}], ids=str)
def test_the_onnx_exporter_gets_torchs_ops(kind, given, options):
    ours, input, hx = made(kind, **({} if kind in CELLS else options))
    model, arguments = (Stateful(ours), (input, hx)) if given else (Net(ours), (input,))
    traced = torch.jit.trace(model.eval(), arguments)
    ops = [node.kind() for node in traced.inlined_graph.nodes()]
    # torch's cells are compositions.
    assert {"RNN": "aten::rnn_tanh", **dict.fromkeys(CELLS, "aten::linear")}.get(kind, f"aten::{kind.lower()}") in ops
    assert not [op for op in ops if op.startswith("rnnfast")]
    same(traced(*arguments), model(*arguments))


@pytest.mark.usefixtures("_in_onnx_export")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_the_onnx_exporter_knows_no_argument_of_ours():
    class Ragged(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.rnn = layer

        def forward(self, x, lengths):
            return self.rnn(x, lengths=lengths)[0]

    input, lengths = torch.randn(6, 3, 4), torch.tensor([6, 2, 1])
    text = "torch.onnx.export: rnnfast.GRU: torch.nn has no argument lengths"
    assert raised(lambda: torch.jit.trace(Ragged(rnnfast.GRU(4, 5)), (input, lengths))) == (RuntimeError, text)
    linear = rnnfast.RNN(4, 5, nonlinearity="identity")
    text = "torch.onnx.export: rnnfast.RNN: torch.nn has no nonlinearity 'identity'"
    assert raised(lambda: torch.jit.trace(linear, (input,))) == (RuntimeError, text)
    # Outside the exporter nothing changes.
    assert linear(input)[0].shape == (6, 3, 5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", KINDS + CELLS)
def test_torch_jit_trace(kind):
    """Without gradients our op is recorded; with them ours is an autograd.Function, which TorchScript cannot hold."""
    ours, input, _ = made(kind)
    model, expected = Net(ours), ours(input)
    with torch.no_grad():
        traced = torch.jit.trace(model, (input,))
        assert "rnnfast::layer" in str(traced.inlined_graph)
        same(traced(input), expected)
    with rnnfast.exporting(model):
        traced = torch.jit.trace(model, (input,))
    assert "rnnfast::" not in str(traced.inlined_graph)
    same(traced(input), expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS + CELLS)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_the_onnx_models_are_torchs(kind, given):
    onnx = pytest.importorskip("onnx")
    import io

    ours, input, hx = made(kind)
    model, arguments = (Stateful(ours), (input, hx)) if given else (Net(ours), (input,))

    def nodes():
        file = io.BytesIO()
        torch.onnx.export(model.eval(), arguments, file, dynamo=False)
        return [node.op_type for node in onnx.load_from_string(file.getvalue()).graph.node]

    got = nodes()
    with rnnfast.exporting(model):
        assert got == nodes()


@pytest.mark.parametrize("kind", [*KINDS, *CELLS])
def test_a_leaf_whose_state_alone_is_a_proxy(kind):
    """A decoder with a constant start token."""

    class Decoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = getattr(rnnfast, kind)(3, 4)
            self.register_buffer("start", torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3))

        def forward(self, h):
            return self.rnn(self.start, (h, h) if kind.startswith("LSTM") else h)[0]

    model = Decoder()
    h = torch.randn(2, 4) if kind in CELLS else torch.randn(1, 2, 4)
    assert_close(torch.fx.symbolic_trace(model)(h), model(h))


def test_a_call_says_nothing():
    """What torch logs of its own functions does not show where nothing is wrong."""
    code = "import torch, rnnfast; rnnfast.LSTM(3, 4)(torch.randn(5, 2, 3)); rnnfast.GRUCell(3, 4)(torch.randn(2, 3))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""

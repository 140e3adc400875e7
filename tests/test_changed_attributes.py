"""Attributes set after construction: as in torch.nn, or an error of its class; never numbers of another layer."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

import rnnfast
from module_cases import KINDS, pair, raised

STACKS = [
    {},
    {"num_layers": 4},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 4, "bias": False},
    {"batch_first": True},
]
# Equal sizes everywhere: nothing but the attribute tells one layer's weights from another's.
SIZES = (5, 5)
CHANGES = {
    "num_layers": (0, -1, 1, 2, 3, 4, 5, "2", None),
    "bias": (False, True, 1, None),
    "bidirectional": (False, True),
    "hidden_size": (4, 6, 0),
    "proj_size": (0, 2),
    "input_size": (4, 6),
    "mode": ("LSTM", "GRU", "RNN_TANH", "RNN_RELU", "RNN_SINE"),
    "dropout": (-1, -0.5, float("nan"), 1.5, "0.5", None, 0, 1, 0.0),
    "batch_first": (True, False, 1, None),
}


def outcome(module, *arguments):
    """What calling `module` gives: the results, or the exception."""
    torch.manual_seed(3)
    try:
        return module(*arguments)
    except Exception as error:
        return error


def agree(ours, theirs, right):
    """Results are torch.nn's where those are right; an error is one of its class, or stands for its wrong numbers."""
    if isinstance(theirs, Exception):
        # torch.nn's own are subclasses of RuntimeError here and there; ours is the plain one.
        allowed = (type(theirs), RuntimeError) if isinstance(theirs, RuntimeError) else type(theirs)
        assert isinstance(ours, allowed), (ours, theirs)
    elif right:
        assert not isinstance(ours, Exception), ours
        assert_close(ours[0], theirs[0])
    else:
        assert isinstance(ours, RuntimeError), ours


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", STACKS, ids=str)
@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_attribute_is_torchs_or_an_error(kind, options, name):
    stacked, directions = options.get("num_layers", 1), 1 + options.get("bidirectional", False)
    for value in CHANGES[name]:
        theirs, ours = pair(kind, *SIZES, **options)
        if name == "dropout":
            theirs.train(), ours.train()
        setattr(theirs, name, value), setattr(ours, name, value)
        # What oneDNN makes of weights that are not those that it takes them for.
        wrong = kind == "LSTM" and (
            name == "hidden_size"
            or (name == "bias" and value is False and options.get("bias", True) and stacked * directions > 1)
            or (name == "bidirectional" and value is False and directions == 2)
        )
        agree(outcome(ours, input := torch.randn(6, 3, 5)), outcome(theirs, input), not wrong)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_fewer_layers_are_the_first(kept, bidirectional):
    """torch.nn's LSTM takes that; in float32 alone, as it happens."""
    ours = rnnfast.LSTM(5, 5, num_layers=4, bidirectional=bidirectional, dtype=torch.float64)
    fewer = rnnfast.LSTM(5, 5, num_layers=kept, bidirectional=bidirectional, dtype=torch.float64)
    fewer.load_state_dict({name: weight for name, weight in ours.state_dict().items() if name in fewer.state_dict()})
    ours.num_layers = kept
    input = torch.randn(6, 3, 5, dtype=torch.float64)
    for a, b in zip((ours(input)[0], *ours(input)[1]), (fewer(input)[0], *fewer(input)[1]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_the_messages_say_module_attribute_expected_and_got(kind):
    layer = getattr(rnnfast, kind)(4, 5, num_layers=2)
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    input = torch.randn(6, 3, 4)

    def changed(name, value):
        before = getattr(layer, name)
        setattr(layer, name, value)
        try:
            return raised(lambda: layer(input))
        finally:
            setattr(layer, name, before)

    error, text = changed("num_layers", 3)
    assert error is RuntimeError
    assert text.startswith(f"{kind}: num_layers=3, bias=True, bidirectional=False, proj_size=0 need 12 weights, but")
    assert "made with 8: weight_ih_l0" in text
    assert changed("hidden_size", 7) == (
        RuntimeError,
        f"{kind}: hidden_size=7, proj_size=0 need weight_hh_l0 of shape ({gates * 7}, 7), got ({gates * 5}, 5)",
    )
    assert changed("dropout", "a") == (TypeError, f"{kind}: dropout should be a number, got str")
    assert changed("dropout", -0.5) == (RuntimeError, "dropout probability has to be between 0 and 1, but got -0.5")
    assert changed("bias", 1) == (TypeError, f"{kind}: bias should be of type bool, got: int")
    assert changed("batch_first", None) == (TypeError, f"{kind}: batch_first should be of type bool, got: NoneType")
    assert changed("num_layers", "2") == (TypeError, f"{kind}: num_layers should be of type int, got: str")
    layer(input)


def test_no_number_of_weights_fits_what_is_no_flag():
    layer = rnnfast.LSTM(4, 5, proj_size=2)
    layer.bias, layer.num_layers = "yes", 5
    assert raised(lambda: layer(torch.randn(6, 3, 4))) == (TypeError, "LSTM: bias should be of type bool, got: str")


def _as_buffer(cell):
    bias = cell.bias_ih
    del cell.bias_ih
    cell.register_buffer("bias_ih", bias.data)


def test_other_uses_of_attributes_go_on_working():
    layer = rnnfast.RNN(4, 5, num_layers=2)
    input = torch.randn(6, 3, 4)
    layer.dropout = torch.tensor(0.5)
    assert layer(input)[0].shape == (6, 3, 5)
    layer.dropout, layer.nonlinearity = 2, "relu"  # not looked at: in eval mode, and after construction
    assert layer.eval()(input)[0].shape == (6, 3, 5)
    layer.mode = "RNN_RELU"
    assert (layer(input)[0] >= 0).all()
    # Surgery: attributes and weights change together.
    layer = rnnfast.GRU(4, 5)
    layer.input_size, layer.hidden_size = 3, 7
    for name, parameter in rnnfast.GRU(3, 7).named_parameters():
        setattr(layer, name, parameter)
    assert layer(torch.randn(6, 3, 3))[0].shape == (6, 3, 7)


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [True, False], ids=["hx", "zeros"])
def test_cells(kind, bias, given):
    for name, value in (("hidden_size", 4), ("hidden_size", 6), ("input_size", 3), ("input_size", 6)):
        theirs, ours = pair(kind, 5, 5, bias=bias)
        setattr(theirs, name, value), setattr(ours, name, value)
        for hidden in (5, 6) if given else (0,):
            hx = torch.randn(3, hidden)
            arguments = (torch.randn(3, 5), (hx, hx) if kind == "LSTMCell" else hx)[: 2 if given else 1]
            agree(outcome(ours, *arguments), outcome(theirs, *arguments), True)
    # torch.nn does not ask for `bias`.
    cell = getattr(rnnfast, kind)(5, 5, bias=bias)
    cell.bias = not bias
    made = "with" if bias else "without"
    text = f"{kind}: bias={not bias}, but the cell was made {made} biases"
    assert raised(lambda: cell(torch.randn(3, 5))) == (RuntimeError, text)
    if bias:
        # Wherever the biases are now.
        for hide in (lambda c: parametrize.register_parametrization(c, "bias_ih", nn.Identity()), _as_buffer):
            cell = getattr(rnnfast, kind)(5, 5)
            hide(cell)
            cell.bias = False
            assert text in raised(lambda cell=cell: cell(torch.randn(3, 5)))[1]
    cell = getattr(rnnfast, kind)(5, 5, bias=bias)
    cell.hidden_size = 0
    assert raised(lambda: cell(torch.randn(3, 5)))[0] is RuntimeError


def test_a_changed_mode_of_rnn():
    theirs, ours = nn.RNN(4, 5), rnnfast.RNN(4, 5)
    input, h = torch.randn(6, 3, 4), torch.randn(1, 3, 5)
    for mode in ("LSTM", "GRU", "RNN_SINE", None):
        theirs.mode = ours.mode = mode
        for arguments in ((input,), (input, h)):
            expected = raised(lambda arguments=arguments: theirs(*arguments))
            error, text = raised(lambda arguments=arguments: ours(*arguments))
            assert (error, text) == (
                expected[0],
                expected[1].replace(" or RNN_RELU", ", RNN_RELU, RNN_IDENTITY or RNN_SIGMOID"),
            )

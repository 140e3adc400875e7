"""The layers are torch.nn's to the letter: what they store, what they compute, what they refuse and in which words."""

import itertools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pack_sequence, pad_packed_sequence
from torch.testing import assert_close

import rnnfast
from module_cases import CASES, KINDS, R, leaves, pair, raised, random_states, same, state
from rnnfast.modules import Recurrent

# --- what is stored -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_parameters_and_attributes_are_torchs(kind, options):
    theirs, ours = pair(kind, 4, 5, **options)
    assert isinstance(ours, getattr(nn, kind))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    stored = "mode input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size"
    for name in [*stored.split(), "_flat_weights_names", "_all_weights"]:
        assert getattr(ours, name) == getattr(theirs, name), name
    assert all(a is getattr(ours, name) for a, name in zip(ours._flat_weights, ours._flat_weights_names, strict=True))
    assert [[id(w) for w in ws] for ws in ours.all_weights] == [
        [id(getattr(ours, name)) for name in names] for names in ours._all_weights
    ]
    assert repr(ours) == repr(theirs)


def test_repr_shows_what_is_not_default():
    layer = rnnfast.LSTM(4, 5, 2, bias=False, batch_first=True, dropout=0.1, bidirectional=True, proj_size=2)
    shown = "LSTM(4, 5, proj_size=2, num_layers=2, bias=False, batch_first=True, dropout=0.1, bidirectional=True)"
    assert repr(layer) == shown
    assert repr(rnnfast.RNN(4, 5, nonlinearity="relu")) == "RNN(4, 5)"
    assert repr(rnnfast.RNN(4, 5, nonlinearity="identity")) == "RNN(4, 5, nonlinearity=identity)"


@pytest.mark.parametrize(
    ("kind", "args", "kwargs"),
    [
        *[(kind, (4, 5), {"dropout": p}) for kind in KINDS for p in (-0.1, 1.1, True)],
        *[(kind, (0, 5), {}) for kind in KINDS],
        *[(kind, (4, 0), {}) for kind in KINDS],
        *[(kind, (4, 5, 0), {}) for kind in KINDS],
        *[(kind, (4.0, 5), {}) for kind in KINDS],
        *[(kind, (4, 5.0), {}) for kind in KINDS],
        *[(kind, (4, 5), {"bias": 1}) for kind in KINDS],
        *[(kind, (4, 5), {"batch_first": 1}) for kind in KINDS],
        ("LSTM", (4, 5), {"dropout": "a"}),
        ("LSTM", (4, 5), {"dropout": "0.5"}),
        ("LSTM", (4, 5), {"proj_size": -1}),
        ("LSTM", (4, 5), {"proj_size": 5}),
        ("GRU", (4, 5), {"proj_size": 0}),
        ("RNN", (4, 5), {"proj_size": 2}),
        ("RNN", (4, 5), {"nonlinearity": "x"}),
        ("RNN", (4, 5, 1, "x"), {}),
        ("RNN", (4, 5, 1, "identity", 1), {}),
    ],
)
def test_constructor_errors_are_torchs(kind, args, kwargs):
    theirs = tuple("tanh" if a == "identity" else a for a in args)
    expected = raised(lambda: getattr(nn, kind)(*theirs, **kwargs))
    assert raised(lambda: getattr(rnnfast, kind)(*args, **kwargs)) == expected


def test_constructor_messages_by_the_letter():
    assert raised(lambda: rnnfast.LSTM(4, 5, dropout=True)) == (
        ValueError,
        "dropout should be a number in range [0, 1] representing the probability of an element being zeroed",
    )
    assert raised(lambda: rnnfast.RNN(4, 5, nonlinearity="x")) == (
        ValueError,
        "Unknown nonlinearity 'x'. Select from 'tanh' or 'relu'.",
    )
    assert raised(lambda: rnnfast.GRU(4, 5, proj_size=0)) == (
        ValueError,
        "proj_size argument is only supported for LSTM, not RNN or GRU",
    )
    assert raised(lambda: Recurrent("FOO", 4, 5)) == (ValueError, "Unrecognized RNN mode: FOO")
    assert raised(lambda: rnnfast.LSTM(4, 5, bias=1)) == (TypeError, "bias should be of type bool, got: int")


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_of_one_layer_warns(kind):
    text = (
        "dropout option adds dropout after all but last recurrent layer, so non-zero dropout expects num_layers "
        "greater than 1, but got dropout=0.5 and num_layers=1"
    )
    with pytest.warns(UserWarning, match="^" + re.escape(text) + "$"):
        getattr(rnnfast, kind)(4, 5, dropout=0.5)


def test_arguments_by_position():
    layer = rnnfast.RNN(4, 5, 2, "relu", False, True)
    assert (layer.mode, layer.num_layers, layer.bias, layer.batch_first) == ("RNN_RELU", 2, False, True)
    layer = rnnfast.RNN(4, 5, 2, "identity", False, True)
    assert (layer.mode, layer.num_layers, layer.bias, layer.batch_first) == ("RNN_IDENTITY", 2, False, True)
    assert rnnfast.LSTM(4, 5, 1, True, False, 0.0, True, 2).proj_size == 2
    assert rnnfast.LSTM(4, 5, bidirectional=1)(torch.randn(2, 3, 4))[0].shape == (2, 3, 10)


# --- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_results_are_torchs(kind, options, given):
    theirs, ours = pair(kind, 4, 5, **options, dtype=torch.float64)
    theirs.eval(), ours.eval()
    layers = theirs.num_layers * (2 if theirs.bidirectional else 1)
    size = theirs.proj_size or 5

    def hx(*batch):
        if not given:
            return None
        h = torch.randn(layers, *batch, size, dtype=torch.float64)
        return [h, torch.randn(layers, *batch, 5, dtype=torch.float64)] if kind == "LSTM" else h

    dense, alone = torch.randn(6, 3, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    packed = pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in (2, 6, 4)], enforce_sorted=False)
    in_order = pack_sequence([torch.randn(n, 4, dtype=torch.float64) for n in (6, 4, 2)])
    batch = 6 if ours.batch_first else 3
    for input, states in ((dense, hx(batch)), (alone, hx()), (packed, hx(3)), (in_order, hx(3)), (dense[:, :1], None)):
        expected, got = theirs(input, states), ours(input, states)
        same(got, expected)
        assert type(got[0]) is type(expected[0])
    for a, b in zip(ours(packed)[0][1:], packed[1:], strict=True):
        assert torch.equal(a, b)


def test_nonlinearities():
    input = torch.randn(6, 3, 4, dtype=torch.float64)
    for nonlinearity in ("tanh", "relu"):
        theirs, ours = pair("RNN", 4, 5, 2, nonlinearity, dtype=torch.float64)
        same(ours(input), theirs(input))
    ours = rnnfast.RNN(4, 5, nonlinearity="identity", dtype=torch.float64)
    h, expected = torch.zeros(3, 5, dtype=torch.float64), []
    for x in input:
        h = x @ ours.weight_ih_l0.T + ours.bias_ih_l0 + h @ ours.weight_hh_l0.T + ours.bias_hh_l0
        expected.append(h)
    output, h_n = ours(input)
    assert_close(output, torch.stack(expected))
    assert_close(h_n[0], h)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind):
    theirs, ours = pair(kind, 4, 5, 2, bidirectional=True)
    same(ours(torch.randn(6, 0, 4)), theirs(torch.randn(6, 0, 4)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_equal_packing(kind, batch_first):
    ours = getattr(rnnfast, kind)(4, 5, 2, bidirectional=True, batch_first=batch_first, dtype=torch.float64)
    lengths = torch.tensor([2, 6, 4])
    input = torch.randn(3, 6, 4, dtype=torch.float64)
    packed, states = ours(pack_padded_sequence(input, lengths, batch_first=True, enforce_sorted=False))
    expected, _ = pad_packed_sequence(packed, batch_first=batch_first)
    for given in (lengths, [2, 6, 4], lengths.int()):
        output, states_n = ours(input if batch_first else input.transpose(0, 1), lengths=given)
        assert_close(output, expected)
        same(states_n, states)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_length_zero(kind):
    ours = getattr(rnnfast, kind)(4, 5, bidirectional=True, dtype=torch.float64)
    input, hx = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True), state(kind, 2, 3, 5)
    output, states = ours(input, hx, lengths=[3, 0, 6])
    assert torch.equal(output[:, 1], torch.zeros(6, 10, dtype=torch.float64))
    for after, before in zip(leaves(states), leaves(hx), strict=True):
        assert torch.equal(after[:, 1], before[:, 1])
        assert not torch.equal(after[:, 0], before[:, 0])
    output.sum().backward()
    assert torch.equal(input.grad[:, 1], torch.zeros(6, 4, dtype=torch.float64))
    assert torch.equal(input.grad[3:, 0], torch.zeros(3, 4, dtype=torch.float64))
    ours(input, hx, lengths=torch.zeros(3, dtype=torch.int64))[0].sum().backward()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_resets_cut_the_sequence(kind, batch_first):
    """Each segment alone through torch.nn: hx serves the first segment forward, and the last in reverse."""
    theirs, ours = pair(kind, 4, 5, bidirectional=True, dtype=torch.float64)
    ours.batch_first = batch_first
    input, hx = torch.randn(7, 2, 4, dtype=torch.float64), state(kind, 2, 2, 5)
    resets = torch.zeros(7, 2, dtype=torch.bool)
    resets[3, 0] = resets[5, 0] = resets[6, 1] = True
    axes = (lambda t: t.transpose(0, 1)) if batch_first else (lambda t: t)
    output, states = ours(axes(input), hx, resets=axes(resets))
    output = axes(output)
    for row, cuts in ((0, [0, 3, 5, 7]), (1, [0, 6, 7])):
        for start, end in itertools.pairwise(cuts):
            parts = [part[:, row : row + 1].clone() for part in leaves(hx)]
            for part in parts:
                part[0] *= start == 0
                part[1] *= end == 7
            segment, ends = theirs(input[start:end, row : row + 1], tuple(parts) if kind == "LSTM" else parts[0])
            assert_close(output[start:end, row], segment[:, 0])
            for got, expected in zip(leaves(states), leaves(ends), strict=True):
                if end == 7:
                    assert_close(got[0, row], expected[0, 0])
                if start == 0:
                    assert_close(got[1, row], expected[1, 0])


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"proj_size": 2}, {"num_layers": 2}], ids=str)
def test_cell_states(options):
    """Every c_t, with gradient: the last one of a sequence cut short at t."""
    ours = rnnfast.LSTM(4, 5, **options, dtype=torch.float64)
    input = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    output, states, cells = ours(input, return_cell_states=True)
    same((output, states), ours(input))
    assert cells.shape == (6, 3, 10 if ours.bidirectional else 5)
    for t in range(6):
        assert_close(cells[t, :, :5], ours(input[: t + 1])[1][1][-2 if ours.bidirectional else -1])
    (one,) = torch.autograd.grad(cells[3, :, :5].square().sum(), input)
    c = ours(input[:4])[1][1][-2 if ours.bidirectional else -1]
    (other,) = torch.autograd.grad(c.square().sum(), input)
    assert_close(one, other)
    with torch.no_grad():
        assert_close(ours(input, return_cell_states=True)[2], cells.detach())


def test_cell_states_of_every_layout():
    ours = rnnfast.LSTM(4, 5, dtype=torch.float64)
    input, lengths = torch.randn(6, 3, 4, dtype=torch.float64), torch.tensor([2, 6, 4])
    cells = ours(input, lengths=lengths, return_cell_states=True)[2]
    packed = ours(pack_padded_sequence(input, lengths, enforce_sorted=False), return_cell_states=True)[2]
    assert isinstance(packed, PackedSequence)
    assert_close(pad_packed_sequence(packed)[0], cells)
    assert_close(ours(input[:, 1], return_cell_states=True)[2], cells[:, 1])
    ours.batch_first = True
    assert_close(ours(input.transpose(0, 1), lengths=lengths, return_cell_states=True)[2], cells.transpose(0, 1))


def test_unbatched_lengths_and_resets():
    ours = rnnfast.GRU(4, 5, dtype=torch.float64)
    input, resets = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 0, 1, 0, 0, 0], dtype=torch.bool)
    for batch_first in (False, True):
        ours.batch_first = batch_first
        output, h_n = ours(input, lengths=torch.tensor([4]), resets=resets)
        assert output.shape == (6, 5)
        assert h_n.shape == (1, 5)
        assert_close(output[:2], ours(input[:2])[0])
        assert_close(output[2:4], ours(input[2:4])[0])
        assert not output[4:].any()


def test_dropout_is_torchs_and_repeats():
    """torch's generator decides: the same seed gives the masks of torch.nn on the CPU."""
    for kind in KINDS:
        theirs, ours = pair(kind, 4, 5, 3, dropout=0.5, dtype=torch.float64)
        input = torch.randn(6, 3, 4, dtype=torch.float64)
        results = []
        for layer in (theirs, ours, ours):
            torch.manual_seed(3)
            results.append(layer(input)[0])
        assert_close(results[1], results[0])
        assert torch.equal(results[1], results[2])
        ours.eval()
        same(ours(input), theirs.eval()(input))


# --- what is refused ------------------------------------------------------------------------------------------------

REFUSED = {
    "1-D": lambda m, kind: m(R(4)),
    "4-D": lambda m, kind: m(R(1, 2, 3, 4)),
    "dtype": lambda m, kind: m(R(2, 3, 4).double()),
    "integers": lambda m, kind: m(torch.ones(2, 3, 4, dtype=torch.int64)),
    "input size": lambda m, kind: m(R(2, 3, 7)),
    "input size unbatched": lambda m, kind: m(R(2, 7)),
    "state batch": lambda m, kind: m(R(2, 3, 4), random_states(kind, 1, 2, 5)),
    "state layers": lambda m, kind: m(R(2, 3, 4), random_states(kind, 2, 3, 5)),
    "state size": lambda m, kind: m(R(2, 3, 4), random_states(kind, 1, 3, 6)),
    "state 2-D": lambda m, kind: m(R(2, 3, 4), random_states(kind, 1, 5)),
    "state 3-D": lambda m, kind: m(R(2, 4), random_states(kind, 1, 3, 5)),
    "no steps": lambda m, kind: m(R(0, 3, 4)),
    "no steps unbatched": lambda m, kind: m(R(0, 4)),
    "input device": lambda m, kind: m(R(2, 3, 4, device="meta")),
    "state device": lambda m, kind: m(R(2, 3, 4), torch.utils._pytree.tree_map(_meta, random_states(kind, 1, 3, 5))),
}


def _meta(tensor):
    return tensor.to("meta")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_forward_errors_are_torchs(kind, case):
    theirs, ours = pair(kind, 4, 5)
    assert raised(lambda: REFUSED[case](ours, kind)) == raised(lambda: REFUSED[case](theirs, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_more_forward_errors_are_torchs(kind):
    def one_bad_weight(layer):
        layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.to("meta"))
        layer(R(2, 3, 4))

    theirs, ours = pair(kind, 4, 5)
    assert raised(lambda: one_bad_weight(ours)) == raised(lambda: one_bad_weight(theirs))
    if kind == "LSTM":
        theirs, ours = pair(kind, 4, 5, proj_size=2)
        for shapes in (((1, 3, 5), (1, 3, 5)), ((1, 3, 2), (1, 3, 2))):
            call = [lambda m=m, s=shapes: m(R(2, 3, 4), tuple(R(*shape) for shape in s)) for m in (ours, theirs)]
            assert raised(call[0]) == raised(call[1])
        three = (R(1, 3, 2), R(1, 3, 5), R(1, 3, 5))
        assert raised(lambda: ours(R(2, 3, 4), three)) == raised(lambda: theirs(R(2, 3, 4), three))


def test_forward_messages_by_the_letter():
    lstm, gru = rnnfast.LSTM(4, 5), rnnfast.GRU(4, 5)
    assert raised(lambda: lstm(R(1, 2, 3, 4)))[1] == "LSTM: Expected input to be 2D or 3D, got 4D instead"
    assert raised(lambda: rnnfast.RNN(4, 5)(R(1, 2, 3, 4)))[1].endswith("2D or 3D, got 4D tensor instead")
    assert raised(lambda: gru(R(2, 3, 7)))[1] == "input.size(-1) must be equal to input_size. Expected 4, got 7"
    assert raised(lambda: gru(R(2, 3, 4), R(1, 2, 5)))[1] == "Expected hidden size (1, 3, 5), got [1, 2, 5]"
    assert raised(lambda: gru(R(2, 3, 4), R(1, 5)))[1] == (
        "For batched 3-D input, hx should also be 3-D but got 2-D tensor"
    )
    assert raised(lambda: lstm(R(2, 4), (R(1, 1, 5), R(1, 1, 5))))[1] == (
        "For unbatched 2-D input, hx and cx should also be 2-D but got (3-D, 3-D) tensors"
    )
    assert raised(lambda: lstm(R(2, 3, 4), (R(1, 3, 5), R(1, 2, 5))))[1] == (
        "Expected hidden[1] size (1, 3, 5), got [1, 2, 5]"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_packed_input_gets_the_clear_errors(kind):
    """torch.nn's LSTM skips its checks for packed input; the words are those that its GRU uses."""
    layer = getattr(rnnfast, kind)(4, 5)
    name = "hidden[0]" if kind == "LSTM" else "hidden"
    cases = [
        ([R(3, 7), R(2, 7)], None, RuntimeError, "input.size(-1) must be equal to input_size. Expected 4, got 7"),
        ([R(3, 2, 4), R(2, 2, 4)], None, RuntimeError, "input must have 2 dimensions, got 3"),
        ([R(3, 4), R(2, 4)], (1, 5, 5), RuntimeError, f"Expected {name} size (1, 2, 5), got [1, 5, 5]"),
        ([R(3, 4), R(2, 4)], (5, 5), RuntimeError, f"Expected {name} size (1, 2, 5), got [5, 5]"),
        (
            [R(3, 4).double(), R(2, 4).double()],
            None,
            ValueError,
            "RNN input dtype (torch.float64) does not match weight dtype (torch.float32). "
            "Convert input: input.to(torch.float32), or convert model: model.to(torch.float64)",
        ),
    ]
    for rows, shape, error, text in cases:
        for enforce_sorted in (True, False):
            packed = pack_sequence(rows, enforce_sorted=enforce_sorted)
            hx = None if shape is None else random_states(kind, *shape)
            assert raised(lambda packed=packed, hx=hx: layer(packed, hx)) == (error, text)


@pytest.mark.parametrize("kind", KINDS)
def test_state_of_another_type_is_refused(kind):
    layer, hx = getattr(rnnfast, kind)(4, 5), state(kind, 1, 3, 5)
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        layer(R(2, 3, 4), hx)
    layer.weight_hh_l0 = nn.Parameter(layer.weight_hh_l0.double())
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not the same dtype"):
        layer(R(2, 3, 4))


def test_lengths_and_resets_are_checked():
    layer, input = rnnfast.GRU(4, 5), R(6, 3, 4)
    packed = pack_sequence([R(3, 4), R(2, 4)])
    no_resets = torch.zeros(6, 3, dtype=torch.bool)
    for lengths in ([1, 2, 7], [1, -1, 2]):
        with pytest.raises(ValueError, match=f"lengths should be from 0 to T = 6, got {[7, -1][-1 in lengths]}"):
            layer(input, lengths=lengths)
    for lengths in ([1, 2], torch.ones(3, 1, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"Expected lengths of shape \(N,\) = \(3,\), got"):
            layer(input, lengths=lengths)
    for lengths in ([1.0, 2.0, 3.0], torch.ones(3, dtype=torch.bool), 3, ["a"] * 3, [[1], [2, 3], []]):
        with pytest.raises(TypeError, match="lengths should be integers"):
            layer(input, lengths=lengths)
    with pytest.raises(ValueError, match="lengths cannot be given with a PackedSequence"):
        layer(packed, lengths=[3, 2])
    with pytest.raises(ValueError, match="resets cannot be given with a PackedSequence"):
        layer(packed, resets=no_resets)
    with pytest.raises(TypeError, match=r"resets should be a bool tensor, got torch\.int64"):
        layer(input, resets=no_resets.long())
    with pytest.raises(ValueError, match=r"Expected resets of shape \(T, N\) = \(6, 3\), got \(3, 6\)"):
        layer(input, resets=no_resets.T)
    with pytest.raises(ValueError, match=r"Expected resets of shape \(T,\) = \(6,\), got \(6, 3\)"):
        layer(input[:, 0], resets=no_resets)
    layer.batch_first = True
    with pytest.raises(ValueError, match=r"Expected resets of shape \(N, T\) = \(3, 6\), got \(6, 3\)"):
        layer(input.transpose(0, 1), resets=no_resets)
    with pytest.raises(TypeError):
        layer(input, None, [1, 2, 3])  # keyword-only
    with pytest.raises(TypeError):
        layer(input, return_cell_states=True)  # the LSTM's alone

"""A layer with options beyond torch.nn's is a layer like any other: what users may expect of it, one promise a test.

What the options compute is for test_variants.py, with float64 and published forms as the truth. Here a layer is held
against itself: stored and loaded, in other types, compiled, mapped, differentiated again, fed in other ways, and given
what it must refuse.
"""

from __future__ import annotations

import copy
import pickle
import statistics
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import rnnfast
from module_cases import leaves
from rnnfast.variants.options import NAMES, Options
from tolerances import error
from variant_layers import (
    CANDIDATE,
    DOUBLE,
    DRAWING,
    EXACT,
    LAYERS,
    LENGTHS,
    LSTMS,
    OF_LAYERS_ALONE,
    OWN_LOOP,
    SEED,
    WAYS,
    B,
    H,
    I,
    R,
    T,
    call,
    cell_of,
    every_layer,
    loss_of,
    made,
    randomise,
    run,
    same,
    states,
)

# --- what a module is ---------------------------------------------------------------------------------------------


@every_layer
def test_a_state_dict_goes_round(name: str) -> None:
    layer, other, x = made(name, **WAYS), made(name, **WAYS), R(T, B, I)
    assert not torch.equal(call(layer, x)[0], call(other, x)[0])
    other.load_state_dict(layer.state_dict())
    same(run(other, x), run(layer, x))
    plain = getattr(rnnfast, LAYERS[name][0])(I, H, **WAYS)
    shapes = [{key: value.shape for key, value in module.state_dict().items()} for module in (layer, plain)]
    if shapes[0] == shapes[1]:
        plain.load_state_dict(layer.state_dict())
        return
    for module, given, found in ((plain, layer, "Unexpected"), (layer, plain, "Missing")):
        match = rf'{found} key\(s\) in state_dict: "weight_|size mismatch for weight_hh_l0'
        with pytest.raises(RuntimeError, match=match):
            module.load_state_dict(given.state_dict())


@every_layer
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_are_the_same(name: str, how: str) -> None:
    layer, x = made(name, num_layers=2), R(T, B, I)
    twin = copy.deepcopy(layer) if how == "deepcopy" else pickle.loads(pickle.dumps(layer))
    assert (type(twin), twin._options, repr(twin)) == (type(layer), layer._options, repr(layer))
    assert all(f"{option}={value!r}" in repr(layer) for option, value in LAYERS[name][1].items() if option != "zoneout")
    same(run(twin, x), run(layer, x))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
def test_defaults_change_nothing(kind: str) -> None:
    names = [name for name in NAMES if name not in OF_LAYERS_ALONE or not kind.endswith("Cell")]
    defaults = {name: getattr(Options(), name) for name in names} | {"zoneout": 0.0}
    found = []
    for options in ({}, defaults):
        torch.manual_seed(SEED)
        found.append((getattr(rnnfast, kind)(3, 5, **options), torch.get_rng_state()))
    (plain, after_plain), (ours, after_ours) = found
    torch.manual_seed(SEED)
    same(list(plain.parameters()), list(getattr(nn, kind)(3, 5).parameters()))
    assert torch.equal(after_plain, torch.get_rng_state())
    assert torch.equal(after_ours, after_plain)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in plain.named_parameters()]
    same(list(ours.parameters()), list(plain.parameters()))
    assert (repr(ours), ours._options, vars(ours).keys()) == (repr(plain), None, vars(plain).keys())
    x = torch.randn(*(() if kind.endswith("Cell") else (T,)), B, 3)
    same(run(ours, x), run(plain, x))


@every_layer
def test_parameters_start_as_documented(name: str) -> None:
    kind, options = LAYERS[name]
    fresh, again = getattr(rnnfast, kind)(I, H, **WAYS, **options), made(name, **WAYS)
    again.reset_parameters()
    for module in (fresh, again):
        parameters = dict(module.named_parameters())
        for key, parameter in parameters.items():
            if "norm" in key:
                assert (parameter == (1 if key.startswith("weight") else 0)).all(), key
            elif not key.startswith("bias") or "forget_bias" not in options:
                assert parameter.abs().max() <= H**-0.5, key
                assert parameter.unique().numel() > 0.9 * parameter.numel(), key
        for suffix in module._suffixes() if "forget_bias" in options else []:
            i, f, *others = (parameters["bias_ih" + suffix] + parameters["bias_hh" + suffix]).chunk(4)
            assert (f == 1).all()
            assert all(0 < bias.abs().max() <= 2 * H**-0.5 and bias.std() > 0 for bias in (i, *others))


# --- types --------------------------------------------------------------------------------------------------------


def check_near(draws: list[tuple[list[Tensor], list[Tensor], list[Tensor]]], of: torch.dtype) -> None:
    """The truth is float64 on the same numbers, the yardstick what torch's operations make of them in the same type.

    Norms of a few features enlarge what chance there is: more than tolerances.py has it is left to chance, but not
    what would show that something was computed in fewer bits. Of several draws the errors' medians count, because in
    single ones either may be ten times the other.

    Args:
        draws: of each the results, the yardstick's and the true ones.
    """
    for each in zip(*(zip(*draw, strict=True) for draw in draws), strict=True):
        assert all(one.dtype == yardstick.dtype for one, yardstick, _ in each)
        units = [torch.finfo(of).eps * max(1.0, true.abs().max().item()) for *_, true in each]
        own = statistics.median(error(one, true) / unit for (one, _, true), unit in zip(each, units, strict=True))
        theirs = statistics.median(
            error(other, true) / unit for (_, other, true), unit in zip(each, units, strict=True)
        )
        assert own <= min(3 * theirs + 4, 1000)


@every_layer
@pytest.mark.parametrize("to", ["half", "bfloat16", "float"])
def test_other_types_are_near_float64(name: str, to: str) -> None:
    draws = []
    for _ in range(5):
        layer = getattr(made(name, bidirectional=True).eval(), to)()
        dtype = layer.weight_hh_l0.dtype
        x, *hx = [tensor.to(dtype) for tensor in (R(T, B, I), *states(name, 2, B, H))]
        actual = run(layer, x, hx)
        assert {result.dtype for result in actual} == {dtype}
        with rnnfast.backend("reference"):
            reference = run(layer, x, hx)
        expected = run(copy.deepcopy(layer).to(torch.float64), x.double(), [state.double() for state in hx])
        draws.append((actual, reference, expected))
    check_near(draws, dtype)


@every_layer
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_autocast_is_as_for_plain_layers(name: str, lower: torch.dtype) -> None:
    layer, x = made(name, dtype=torch.float32).eval(), torch.randn(T, B, I)
    for module, input in ((layer, x), (cell_of(name, layer), x[0])):
        plain = type(module)(I, H)
        with torch.autocast("cpu", dtype=lower):
            wanted, results = leaves(plain(input)), call(module, input)
            with rnnfast.backend("reference"):
                reference = call(module, input)
        assert [result.dtype for result in results] == [result.dtype for result in wanted]
        expected = call(copy.deepcopy(module).double(), input.double())
        check_near([(results, reference, expected)], results[0].dtype)
        loss_of([result.float() for result in results]).backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())


# --- gradients, again and again -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in ("LSTM hard heads", "GRU light")])
def test_double_backward(name: str) -> None:
    """A stack with lengths, in training: gradients with a graph are those without, and their derivative along a
    direction is what they change by."""
    layer = made(name, **WAYS)
    x, *hx = wanted = [R(T, B, I), *states(name, 4, B, H), *layer.parameters()]
    hx = hx[: 1 + name.startswith("LSTM")]
    direction = [torch.randn_like(leaf.requires_grad_()) for leaf in wanted]

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        loss = loss_of(call(layer, x, hx, lengths=LENGTHS))
        return torch.autograd.grad(loss, wanted, create_graph=create_graph)

    first, step, ends = gradients(True), 1e-5, []
    same(first, gradients(False), **EXACT)
    second = torch.autograd.grad(first, wanted, direction)
    for sign in (1, -2):
        with torch.no_grad():
            for leaf, along in zip(wanted, direction, strict=True):
                leaf += sign * step * along
        ends.append(gradients(False))
    for actual, ahead, behind in zip(second, *ends, strict=True):
        assert error(actual, (ahead - behind) / (2 * step)) <= 1e-5 * max(1.0, actual.abs().max().item())


@every_layer
def test_second_backward_equals_the_first_and_nothing_is_written(name: str) -> None:
    layer = made(name, **WAYS)
    wanted = [R(T, B, I), *states(name, 4, B, H), *layer.parameters()]
    before = [leaf.requires_grad_().detach().clone() for leaf in wanted]
    unpacked = []

    def unpack(pair: tuple[Tensor, Tensor]) -> Tensor:
        # As bits: where a row has ended, saved values are undefined and may be NaN.
        assert torch.equal(*(tensor.detach().contiguous().view(torch.uint8) for tensor in pair))
        unpacked.append(pair)
        return pair[0]

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor, tensor.detach().clone()), unpack):
        results = call(layer, wanted[0], wanted[1 : 2 + name.startswith("LSTM")], lengths=LENGTHS)
        outputs, loss = [result.detach().clone() for result in results], loss_of(results)
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        for retain_graph in (True, False):
            same(torch.autograd.grad(loss, wanted, retain_graph=retain_graph), first)
    assert len(unpacked) > 10
    same([*results, *wanted], [*outputs, *before])


@every_layer
def test_gradients_of_some_arguments_alone(name: str) -> None:
    layer, x, hx = made(name), R(T, B, I), states(name, 1, B, H)
    every = [x, *hx, *layer.parameters()]
    expected = run(layer, x, hx)[-len(every) :]
    for leaf in every:
        leaf.requires_grad_(False)
    assert not any(result.requires_grad for result in call(layer, x, hx))
    for leaf, gradient in zip(every, expected, strict=True):
        leaf.requires_grad_(True)
        same(torch.autograd.grad(loss_of(call(layer, x, hx)), leaf), [gradient], **EXACT)
        leaf.requires_grad_(False)


@pytest.mark.parametrize("name", OWN_LOOP)
def test_what_is_changed_before_backward_is_noticed(name: str) -> None:
    """Weights, and the output. A W_hh that loses elements is read as a copy."""
    layer, x = made(name), R(T, B, I).requires_grad_()
    weights = [parameter for key, parameter in layer.named_parameters() if key.startswith("weight")]
    for changed in [None, *weights]:
        results = call(layer, x)
        with torch.no_grad():
            (results[0] if changed is None else changed).mul_(1.5)
        if changed is not layer.weight_hh_l0 or "weight_dropout" not in LAYERS[name][1]:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss_of(results[1:]).backward()


# --- chance -------------------------------------------------------------------------------------------------------


@every_layer
def test_the_same_seed_gives_the_same_bits(name: str) -> None:
    layer, x = made(name, **WAYS, dtype=torch.float32), torch.randn(T, B, I)
    first = run(layer, x)
    for _ in range(3):
        same(run(layer, x), first)
    assert torch.equal(layer(x)[0], first[0]) == (name not in DRAWING)


@every_layer
def test_evaluation_draws_nothing(name: str) -> None:
    layer, x = made(name, **WAYS), R(T, B, I)
    cell, before = cell_of(name, made(name)), torch.get_rng_state()
    output = layer.eval()(x)[0]
    same(layer(x)[0], output)
    cell(x[0])
    assert torch.equal(torch.get_rng_state(), before)
    layer.train()(x)
    assert torch.equal(torch.get_rng_state(), before) == (name not in DRAWING)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["LSTM separate", "LSTM joint rms", "LSTM peephole", "GRU joint", "GRU reset before"])
def test_any_number_of_threads(name: str) -> None:
    """Whoever computes it, a value of a step is the same sum; those over all rows may be cut in another way."""
    kind, options = LAYERS[name]
    layer, x, results = getattr(rnnfast, kind)(64, 96, **options), torch.randn(20, 32, 64), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        results.append(run(layer, x))
    for others in results[1:]:
        same(others[:2], results[0][:2])
        same(others, results[0], rtol=2e-5, atol=2e-4)


LINEAR = {"nonlinearity": "identity"}
# One step, whose last state is linear in what is drawn.
DRAWN: dict[str, tuple[str, dict[str, Any]]] = {
    "state": ("RNN", {"recurrent_dropout": 0.4, **LINEAR}),
    "candidate of an LSTM": ("LSTM", CANDIDATE),
    "candidate of a GRU": ("GRU", CANDIDATE),
    "input": ("RNN", {"input_dropout": 0.4, **LINEAR}),
    "weight": ("RNN", {"weight_dropout": 0.4, **LINEAR}),
    "zoneout of h": ("GRU", {"zoneout": 0.3}),
    "zoneout of c": ("LSTM", {"zoneout": (0.0, 0.3)}),
}


@pytest.mark.parametrize("which", DRAWN)
def test_evaluation_is_the_mean_of_training(which: str) -> None:
    """Over many equal rows; W_hh is drawn once a call, and there over many equal units."""
    kind, options = DRAWN[which]
    rows, units = (1, 4000) if which == "weight" else (4000, 3)
    layer = getattr(rnnfast, kind)(I, units, **DOUBLE, **options)
    randomise(layer)
    if units > rows:
        layer.weight_hh_l0.data = layer.weight_hh_l0[:1].expand(units, units)
        layer.weight_ih_l0.data.zero_(), layer.bias_ih_l0.data.zero_(), layer.bias_hh_l0.data.zero_()
    x, *hx = [R(1, 1, size).expand(1, rows, size) for size in (I, units, units)[: 2 + (kind == "LSTM")]]
    with torch.no_grad():
        drawn, mean = (call(layer.train(mode), x, hx)[-1][0] for mode in (True, False))
    drawn, mean = (drawn.T, mean.T) if units > rows else (drawn, mean)
    assert (drawn.std(0) > 1e-6).all()
    assert ((drawn.mean(0) - mean[0]).abs() < 4 * drawn.std(0) / len(drawn) ** 0.5).all()


def test_masks_last_for_a_sequence_or_for_a_step() -> None:
    """By an h that is doubled at every step, or set to the input, if nothing is drawn."""
    ones, eye, arguments = torch.ones(1, B, 40), torch.eye(40), {"bias": False, **LINEAR}
    with torch.no_grad():
        layer = rnnfast.RNN(40, 40, recurrent_dropout=0.5, **arguments)
        layer.weight_hh_l0.copy_(eye)
        output = layer(torch.zeros(T, B, 40), ones)[0]
        assert [step.unique().tolist() for step in output] == [[0, 2 ** (t + 1)] for t in range(T)]
        layer = rnnfast.RNN(40, 40, input_dropout=0.5, **arguments)
        layer.weight_hh_l0.zero_(), layer.weight_ih_l0.copy_(eye)
        of_input = layer(ones.expand(T, B, 40))[0]
        assert of_input.unique().tolist() == [0, 2]
        same(of_input, of_input[:1].expand_as(of_input))
        layer = rnnfast.RNN(40, 40, zoneout=0.5, **arguments)
        layer.weight_hh_l0.copy_(2 * eye)
        doubled = torch.cat([ones, layer(torch.zeros(T, B, 40), ones)[0]]).diff(dim=0) > 0
    for draws, size in ((output[0], B), (of_input[0], B), (doubled.flatten(0, 1), T * B)):
        assert len({tuple(row.tolist()) for row in draws}) == size
        assert 0.4 < (draws > 0).float().mean() < 0.6


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_zoneout_of_all_keeps_the_state(kind: str, training: bool) -> None:
    x, hx = R(T, B, I), states(kind, 2, B, H)
    layer = getattr(rnnfast, kind)(I, H, bidirectional=True, zoneout=1, **DOUBLE).train(training)
    output, *final = results = run(layer, x, hx)
    same(final[: len(hx)], hx)
    same(output, torch.cat([*hx[0]], -1).expand_as(output))
    of_x, *of_hx = results[1 + len(hx) :]
    assert not any(gradient.any() for gradient in (of_x, *of_hx[len(hx) :]))
    for zoneout in ((1, 0), (0, 1)) if kind == "LSTM" else ():
        layer = rnnfast.LSTM(I, H, bidirectional=True, zoneout=zoneout, **DOUBLE).train(training)
        kept = [torch.equal(state, start) for state, start in zip(call(layer, x, hx)[1:], hx, strict=True)]
        assert kept == [bool(p) for p in zoneout]


@pytest.mark.parametrize("option", ["recurrent_dropout", "weight_dropout", "input_dropout"])
def test_dropping_all_leaves_zeros(option: str) -> None:
    layer, plain, x = rnnfast.GRU(I, H, **{option: 1.0}, **DOUBLE), rnnfast.GRU(I, H, **DOUBLE), R(T, B, I)
    plain.load_state_dict(layer.state_dict())
    nn.init.zeros_(plain.weight_ih_l0 if option == "input_dropout" else plain.weight_hh_l0)
    results = run(layer, x)
    same(results[:2], call(plain, x), **EXACT)
    assert all(result.isfinite().all() for result in results)


# --- the ways to call a layer -------------------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["memory as it comes", "memory of NaN"])
def _memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """The second: whatever torch allocates is NaN until it is written."""
    torch.use_deterministic_algorithms(request.param)
    assert not request.param or torch.empty(100).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_memory")
@every_layer
def test_padding_does_not_matter(name: str) -> None:
    layer, clean, hx = made(name, **WAYS), R(T, B, I), states(name, 4, B, H)
    clean[3:, 0] = clean[:, 2] = 0
    padded = clean.clone()
    padded[3:, 0] = padded[:, 2] = float("nan")
    actual = run(layer, padded, hx, lengths=LENGTHS)
    same(actual, run(layer, clean, hx, lengths=LENGTHS))
    assert all(result.isfinite().all() for result in actual)
    for rows in (actual[0], actual[1 + len(hx)]):  # the output, and the gradient of x
        assert rows[:3, 0].any()
        assert not rows[3:, 0].any()
        assert not rows[:, 2].any()
    same([state[:, 2] for state in actual[1 : 1 + len(hx)]], [state[:, 2] for state in hx])


@every_layer
@pytest.mark.parametrize("lengths", [None, []], ids=["dense", "lengths"])
def test_no_rows(name: str, lengths: Any) -> None:
    layer, x, hx = made(name, **WAYS), R(T, 0, I), states(name, 4, 0, H)
    results = run(layer, x, hx, lengths=lengths)
    assert results[0].shape == (T, 0, 2 * H)
    wanted = [*hx, x, *hx, *layer.parameters()]
    assert [result.shape for result in results[1:]] == [tensor.shape for tensor in wanted]
    assert not any(gradient.any() for gradient in results)
    assert all(state.shape == (0, H) for state in leaves(cell_of(name, made(name))(x[0])))


@every_layer
def test_one_step_and_loops_of_cells(name: str) -> None:
    layer, x, hx = made(name).eval(), R(T, B, I), states(name, 1, B, H)
    output, *final = call(layer, x, hx)
    same(call(layer, x[:1], hx)[:2], [output[:1], output[:1]], **EXACT)
    cell, state, every = cell_of(name, layer), [s[0] for s in hx], []
    for x_t in x:
        state = call(cell, x_t, state)
        every.append(state[0])
    same([torch.stack(every), *(s[None] for s in state)], [output, *final], **EXACT)
    same(call(cell, x[0, 0]), [s[0] for s in call(cell, x[0])], **EXACT)


@every_layer
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_layouts(name: str, training: bool) -> None:
    """The batch first, one row without a batch, and packed rows in any order; with the same draws, where these are of
    a sequence."""
    draws = training and name in DRAWING
    if draws and "zoneout" in LAYERS[name][1]:
        pytest.skip("zoneout draws for each row as the rows lie")
    layer, first = (made(name, **WAYS, batch_first=batch_first).train(training) for batch_first in (False, True))
    first.load_state_dict(layer.state_dict())
    x, resets, lengths = R(T, B, I), torch.rand(T, B) < 0.4, torch.tensor([5, 3, 1] if draws else [3, 5, 1])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=draws)
    for hx in (states(name, 4, B, H), None):
        expected = call(layer, x, hx, lengths=LENGTHS, resets=resets)
        output, *final = call(first, x.transpose(0, 1), hx, lengths=LENGTHS, resets=resets.T)
        same([output.transpose(0, 1), *final], expected, **EXACT)
        torch.manual_seed(SEED)
        output, final = layer(packed, None if hx is None else tuple(hx) if len(hx) == 2 else hx[0])
        expected = call(layer, x, hx, lengths=lengths)
        same([pad_packed_sequence(output)[0], *leaves(final)], expected, **EXACT)
        row = call(layer, x[:, :1], None if hx is None else [state[:, :1] for state in hx])
        alone = call(layer, x[:, 0], None if hx is None else [state[:, 0] for state in hx])
        same(alone, [result[:, 0] for result in row], **EXACT)


@every_layer
def test_resets_make_separate_segments(name: str) -> None:
    layer, x, hx = made(name, **WAYS).eval(), R(T, B, I), states(name, 4, B, H)
    resets = torch.zeros(T, B, dtype=torch.bool)
    resets[[2, 4]] = True
    found, ahead = [], torch.tensor([True, False, True, False]).view(4, 1, 1)
    for number, piece in enumerate(x.split([2, 2, 1])):
        # hx is for the first segment of the forward directions, and the last of the others.
        found.append(call(layer, piece, [s * (ahead * (number == 0) + ~ahead * (number == 2)) for s in hx]))
    final = [torch.where(ahead, last, start) for last, start in zip(found[-1][1:], found[0][1:], strict=True)]
    same(call(layer, x, hx, resets=resets), [torch.cat([results[0] for results in found]), *final], **EXACT)


@pytest.mark.parametrize("name", LSTMS)
def test_cell_states_are_those_of_single_steps(name: str) -> None:
    layer, x, hx, lengths = made(name, num_layers=2).eval(), R(T, B, I), states(name, 2, B, H), torch.tensor([5, 4, 1])
    *results, cell_states = call(layer, x, hx, return_cell_states=True)
    same(results, call(layer, x, hx))
    state, every = hx, []
    for x_t in x.split(1):
        _, *state = call(layer, x_t, state)
        every.append(state[1][-1])
    same(cell_states, torch.stack(every), **EXACT)
    of_packed = layer(pack_padded_sequence(x, lengths), hx, return_cell_states=True)[2]
    same(pad_packed_sequence(of_packed)[0], call(layer, x, hx, lengths=lengths, return_cell_states=True)[-1], **EXACT)


@every_layer
def test_no_state_is_a_state_of_zeros(name: str) -> None:
    layer, x = made(name, **WAYS), R(T, B, I)
    same(call(layer, x), call(layer, x, [torch.zeros_like(state) for state in states(name, 4, B, H)]))


@every_layer
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_results_share_no_memory(name: str, backend: str) -> None:
    """So that any may be written, and kept without keeping another."""
    layer, x = made(name), R(T, B, I)
    cell, options = cell_of(name, layer), {"return_cell_states": True} if name in LSTMS else {}
    for module, input, state, kwargs in (
        (layer, x, states(name, 1, B, H), options),
        (layer, x[:1], states(name, 1, B, H), options),
        (layer, x[:, 0], states(name, 1, H), options),
        (cell, x[0], states(name, B, H), {}),
        (cell, x[0, 0], states(name, H), {}),
    ):
        for wants in (True, False):
            with torch.set_grad_enabled(wants), rnnfast.backend(backend):
                tensors = [*call(module, input, state, **kwargs), x, *state, *module.parameters()]
            assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == len(tensors)

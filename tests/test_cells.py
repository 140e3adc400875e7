"""The cells are torch.nn's to the letter, and one step of the same recurrence that the layers run."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.testing import assert_close

import rnnfast

KINDS = ["LSTMCell", "GRUCell", "RNNCell"]
R = torch.randn


def pair(kind, *args, **kwargs):
    """torch.nn's cell and ours, with the same parameters."""
    torch.manual_seed(7)
    theirs = getattr(nn, kind)(*args, **kwargs)
    torch.manual_seed(7)
    return theirs, getattr(rnnfast, kind)(*args, **kwargs)


def leaves(result):
    return [result] if isinstance(result, torch.Tensor) else list(result)


def same(ours, theirs):
    assert type(ours) is type(theirs)
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_close(a, b)


def states(kind, *shape, dtype=None):
    h, c = R(*shape, dtype=dtype), R(*shape, dtype=dtype)
    return (h, c) if kind == "LSTMCell" else h


def raised(call):
    with pytest.raises(Exception) as caught:
        call()
    return type(caught.value), str(caught.value)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
def test_parameters_and_repr_are_torchs(kind, bias):
    theirs, ours = pair(kind, 4, 5, bias)
    assert isinstance(ours, getattr(nn, kind))
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (ours.input_size, ours.hidden_size, ours.bias) == (4, 5, bias)
    assert (ours.bias_ih is None) == (ours.bias_hh is None) == (not bias)
    assert repr(ours) == repr(theirs)


def test_nonlinearity_of_the_rnn_cell():
    theirs, ours = pair("RNNCell", 4, 5, True, "relu")
    assert repr(ours) == repr(theirs) == "RNNCell(4, 5, nonlinearity=relu)"
    same(ours(R(3, 4).fill_(0.5)), theirs(R(3, 4).fill_(0.5)))
    linear = rnnfast.RNNCell(4, 5, nonlinearity="identity")
    x, h = R(3, 4), R(3, 5)
    assert_close(linear(x, h), x @ linear.weight_ih.T + linear.bias_ih + h @ linear.weight_hh.T + linear.bias_hh)
    theirs, ours = pair("RNNCell", 4, 5, nonlinearity="foo")  # not before forward
    assert raised(lambda: ours(x)) == raised(lambda: theirs(x)) == (RuntimeError, "Unknown nonlinearity: foo")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
@pytest.mark.parametrize("batch", [(3,), (), (1,), (0,)], ids=str)
def test_results_and_gradients_are_torchs(kind, bias, given, batch):
    theirs, ours = pair(kind, 4, 5, bias, dtype=torch.float64)
    grads = []
    x0 = R(*batch, 4, dtype=torch.float64)
    hx = states(kind, *batch, 5, dtype=torch.float64) if given else None
    for cell in (theirs, ours):
        x = x0.clone().requires_grad_()
        start = None if hx is None else [s.clone().requires_grad_() for s in leaves(hx)]
        given_hx = None if start is None else (tuple(start) if kind == "LSTMCell" else start[0])
        result = cell(x, given_hx)
        wanted = [x, *(start or []), *cell.parameters()]
        total = sum(((i + 1) * out.square()).sum() for i, out in enumerate(leaves(result)))
        grads.append((result, torch.autograd.grad(total, wanted)))
    same(grads[1][0], grads[0][0])
    for a, b in zip(grads[1][1], grads[0][1], strict=True):
        assert_close(a, b)
    with torch.no_grad():
        same(ours(x0, hx), theirs(x0, hx))


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_cells_is_the_layer(kind):
    cell = getattr(rnnfast, kind)(4, 5, dtype=torch.float64)
    layer = getattr(rnnfast, kind.removesuffix("Cell"))(4, 5, dtype=torch.float64)
    for name, p in cell.named_parameters():
        getattr(layer, name + "_l0").data.copy_(p)
    input, hx, outputs = R(6, 3, 4, dtype=torch.float64), None, []
    for x in input:
        hx = cell(x, hx)
        outputs.append(leaves(hx)[0])
    assert_close(torch.stack(outputs), layer(input)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_of_zero(kind):
    theirs, ours = pair(kind, 4, 0)
    same(ours(R(2, 4)), theirs(R(2, 4)))
    same(ours(R(4)), theirs(R(4)))
    assert all(out.requires_grad for out in leaves(ours(R(2, 4), states(kind, 2, 0))))
    theirs, ours = pair(kind, 0, 5)
    same(ours(R(2, 0)), theirs(R(2, 0)))


REFUSED = {
    "input 3-D": lambda m, kind: m(R(1, 3, 4)),
    "input 0-D": lambda m, kind: m(R(())),
    "state 3-D": lambda m, kind: m(R(3, 4), states(kind, 1, 3, 5)),
    "input size": lambda m, kind: m(R(3, 7)),
    "input size unbatched": lambda m, kind: m(R(7)),
    "batch": lambda m, kind: m(R(3, 4), states(kind, 2, 5)),
    "batch and size": lambda m, kind: m(R(3, 4), states(kind, 2, 6)),
    "state size": lambda m, kind: m(R(3, 4), states(kind, 3, 6)),
    "batched, state not": lambda m, kind: m(R(3, 4), states(kind, 5)),
    "unbatched, state is": lambda m, kind: m(R(4), states(kind, 1, 5)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", REFUSED)
def test_errors_are_torchs(kind, case):
    theirs, ours = pair(kind, 4, 5)
    assert raised(lambda: REFUSED[case](ours, kind)) == raised(lambda: REFUSED[case](theirs, kind))


def test_errors_of_the_second_state_are_torchs():
    theirs, ours = pair("LSTMCell", 4, 5)
    for hx in (
        (R(3, 5), R(2, 5)),
        (R(3, 5), R(3, 6)),
        (R(3, 5), R(1, 3, 5)),
        (R(3, 5),),
        (R(3, 5), R(3, 5), R(3, 5)),
    ):
        assert raised(lambda hx=hx: ours(R(3, 4), hx)) == raised(lambda hx=hx: theirs(R(3, 4), hx))


@pytest.mark.parametrize("kind", KINDS)
def test_messages_by_the_letter(kind):
    cell, word = getattr(rnnfast, kind)(4, 5), "hx[0]" if kind == "LSTMCell" else "hidden"
    assert raised(lambda: cell(R(1, 3, 4))) == (ValueError, f"{kind}: Expected input to be 1D or 2D, got 3D instead")
    assert raised(lambda: cell(R(3, 4), states(kind, 1, 3, 5))) == (
        ValueError,
        f"{kind}: Expected {word} to be 1D or 2D, got 3D instead",
    )
    assert raised(lambda: cell(R(3, 7))) == (RuntimeError, "input has inconsistent input_size: got 7 expected 4")
    assert raised(lambda: cell(R(3, 4), states(kind, 3, 6))) == (
        RuntimeError,
        "hidden0 has inconsistent hidden_size: got 6, expected 5",
    )
    assert raised(lambda: cell(R(3, 4), states(kind, 2, 5))) == (
        RuntimeError,
        "Input batch size 3 doesn't match hidden0 batch size 2",
    )


@pytest.mark.parametrize("kind", KINDS)
def test_types_and_devices_that_do_not_fit(kind):
    """torch.nn gives raw errors of the product here."""
    cell = getattr(rnnfast, kind)(4, 5)
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not the same dtype"):
        cell(R(3, 4).double())
    with pytest.raises(RuntimeError, match="Input and hidden tensors are not the same dtype"):
        cell(R(3, 4), states(kind, 3, 5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="Input and parameter tensors are not at the same device"):
        cell(R(3, 4, device="meta"))
    with pytest.raises(RuntimeError, match="hidden0 has inconsistent hidden_size"):
        cell(R(4), states(kind, 5, 5))  # crashes the process in torch.nn


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lower", [torch.bfloat16, torch.float16])
def test_autocast_types_are_torchs(kind, lower):
    theirs, ours = pair(kind, 4, 5)
    for input_type in (torch.float32, torch.bfloat16):
        for state_type in (None, torch.float32, torch.bfloat16):
            x = R(3, 4, dtype=input_type)
            hx = None if state_type is None else states(kind, 3, 5, dtype=state_type)
            with torch.autocast("cpu", dtype=lower):
                got, expected = leaves(ours(x, hx)), leaves(theirs(x, hx))
            assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
            for a, b in zip(got, expected, strict=True):
                assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)
    with torch.autocast("cpu", dtype=lower):
        result = leaves(ours(R(3, 4)))
    assert result[0].dtype == (lower if kind == "RNNCell" else torch.float32)
    sum(out.float().sum() for out in result).backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_what_people_do_to_modules(kind):
    theirs, ours = pair(kind, 4, 5, dtype=torch.float64)
    x = R(3, 4, dtype=torch.float64)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(twin) is type(ours)
        same(twin(x), ours(x))
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    weights = {name: 2 * p.detach() for name, p in ours.named_parameters()}
    same(torch.func.functional_call(ours, weights, (x,)), torch.func.functional_call(theirs, weights, (x,)))
    for cell in (theirs, ours):
        parametrizations.weight_norm(cell, "weight_ih")
        prune.ln_structured(cell, "weight_hh", amount=0.4, n=2, dim=0)
    same(ours(x), theirs(x))
    meta = getattr(rnnfast, kind)(4, 5, device="meta")
    assert all(out.shape == (3, 5) for out in leaves(meta(x.float().to("meta"))))


@pytest.mark.parametrize("kind", KINDS)
def test_double_backward_and_per_sample_gradients(kind):
    theirs, ours = pair(kind, 4, 5, dtype=torch.float64)
    x0, seconds = R(3, 4, dtype=torch.float64), []
    for cell in (theirs, ours):
        x = x0.clone().requires_grad_()
        (first,) = torch.autograd.grad(sum(out.square().sum() for out in leaves(cell(x))), x, create_graph=True)
        seconds.append(torch.autograd.grad(first.square().sum(), [x, *cell.parameters()]))
    for a, b in zip(*seconds, strict=True):
        assert_close(b, a)
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(weights, x):
        return sum(out.square().sum() for out in leaves(torch.func.functional_call(ours, weights, (x,))))

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, x0)
    for n in range(3):
        alone = torch.func.grad(loss)(weights, x0[n])
        for name in weights:
            assert_close(grads[name][n], alone[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_type_trains(kind, dtype):
    ours = getattr(rnnfast, kind)(4, 5, dtype=dtype)
    result = leaves(ours(R(3, 4, dtype=dtype), states(kind, 3, 5, dtype=dtype)))
    assert all(out.dtype == dtype for out in result)
    sum(out.sum() for out in result).backward()
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_cells_compiles_whole(kind):
    cell = getattr(rnnfast, kind)(4, 5)

    def run(input):
        hx = None
        for x in input:
            hx = cell(x, hx)
        return leaves(hx)[0]

    input = R(4, 3, 4)
    assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(input), run(input))

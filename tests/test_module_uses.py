"""What people do to the layers: copies, pickles, functional calls, replaced weights, transforms, types."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import rnnfast
from module_cases import CASES, KINDS, R, leaves, pair, random_states, same, torch_autocasts

# --- what people do to modules --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_state_dict_both_ways_copies_and_pickles(kind, options):
    theirs = getattr(nn, kind)(4, 5, **options).eval()
    ours = getattr(rnnfast, kind)(4, 5, **options).eval()
    input = R(6, 3, 4)
    ours.load_state_dict(theirs.state_dict())
    same(ours(input), theirs(input))
    for p in ours.parameters():
        p.data.mul_(1.5)
    theirs.load_state_dict(ours.state_dict())
    same(ours(input), theirs(input))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(ours)
        same(twin(input), ours(input))
        twin.weight_hh_l0.data.zero_()
        assert ours.weight_hh_l0.any()
    assert "_flat_weight_refs" not in ours.__getstate__()


def test_old_pickles():
    """Before 1.8 there was no proj_size; older still, all_weights held the parameters themselves."""
    ours = rnnfast.LSTM(4, 5, 2, bidirectional=True)
    old = ours.__getstate__()
    del old["proj_size"]
    old["_all_weights"] = [list(weights) for weights in ours.all_weights]
    twin = rnnfast.LSTM.__new__(rnnfast.LSTM)
    twin.__setstate__(old)
    assert twin.proj_size == 0
    assert twin._flat_weights_names == ours._flat_weights_names
    assert twin._all_weights == ours._all_weights
    same(twin(R(6, 3, 4).fill_(0.3)), ours(R(6, 3, 4).fill_(0.3)))
    older = ours.__getstate__()
    older["all_weights"] = older.pop("_all_weights")
    twin = rnnfast.LSTM.__new__(rnnfast.LSTM)
    twin.__setstate__(older)
    assert twin._all_weights == ours._all_weights


def test_meta_device_and_assign():
    source = rnnfast.GRU(4, 5, 2)
    layer = rnnfast.GRU(4, 5, 2, device="meta")
    output, h_n = layer(R(6, 3, 4, device="meta"))
    assert (output.shape, h_n.shape, output.device.type) == ((6, 3, 5), (2, 3, 5), "meta")
    layer.load_state_dict(source.state_dict(), assign=True)
    input = R(6, 3, 4)
    same(layer(input), source(input))
    layer = rnnfast.GRU(4, 5, 2, device="meta").to_empty(device="cpu")
    layer.load_state_dict(source.state_dict())
    same(layer(input), source(input))


def test_functional_call_sees_the_given_weights():
    theirs, ours = pair("LSTM", 4, 5, 2, dtype=torch.float64)
    input = R(6, 3, 4, dtype=torch.float64)
    weights = {name: R(p.shape, dtype=torch.float64, requires_grad=True) for name, p in ours.named_parameters()}
    before = ours(input)
    same(torch.func.functional_call(ours, weights, (input,)), torch.func.functional_call(theirs, weights, (input,)))
    torch.func.functional_call(ours, weights, (input,))[0].sum().backward()
    assert all(weight.grad is not None for weight in weights.values())
    assert all(p.grad is None for p in ours.parameters())
    same(ours(input), before)


def test_weights_set_replaced_deleted_and_tied():
    theirs, ours = pair("GRU", 4, 5, 2, dtype=torch.float64)
    input = R(6, 3, 4, dtype=torch.float64)
    new = nn.Parameter(R(15, 5, dtype=torch.float64))
    for layer in (theirs, ours):
        layer.weight_hh_l0 = new
        assert layer._flat_weights[1] is new
    same(ours(input), theirs(input))
    for layer in (theirs, ours):  # not through __setattr__
        layer._parameters["weight_hh_l1"] = new
    same(ours(input), theirs(input))
    ours(input)[0].sum().backward()
    tied = new.grad.clone()
    new.grad = None
    theirs(input)[0].sum().backward()
    assert_close(tied, new.grad)
    before = ours(input)
    del ours.weight_hh_l0
    assert not hasattr(ours, "weight_hh_l0")
    ours.double()
    with pytest.raises(RuntimeError, match="GRU: parameter weight_hh_l0 is missing"):
        ours(input)
    ours.weight_hh_l0 = new
    same(ours(input), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_prune_parametrize(kind):
    input = R(6, 3, 4, dtype=torch.float64)

    class Half(nn.Module):
        def forward(self, weight):
            return weight / 2

    def old_weight_norm(layer):
        nn.utils.weight_norm(layer, "weight_hh_l0")
        layer.weight_hh_l0_g.data.mul_(0.5)

    def new_weight_norm(layer):
        parametrizations.weight_norm(layer, "weight_ih_l0")

    def pruned(layer):
        prune.ln_structured(layer, "weight_hh_l0", amount=0.4, n=2, dim=0)

    def parametrized(layer):
        parametrize.register_parametrization(layer, "weight_hh_l0", Half())

    for change in (old_weight_norm, new_weight_norm, pruned, parametrized):
        theirs, ours = pair(kind, 4, 5, dtype=torch.float64)
        change(theirs), change(ours)
        same(ours(input), theirs(input))
        ours(input)[0].square().sum().backward()
        theirs(input)[0].square().sum().backward()
        for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
            assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
        for p in (*ours.parameters(), *theirs.parameters()):
            p.data.mul_(0.9)
        same(ours(input), theirs(input))


def test_dropout_set_after_construction_and_frozen_weights():
    theirs, ours = pair("LSTM", 4, 5, 2, dtype=torch.float64)
    input = R(6, 3, 4, dtype=torch.float64)
    for layer in (theirs, ours):
        layer.dropout = 0.5
        layer.weight_hh_l0.requires_grad_(False)
    results = []
    for layer in (theirs, ours):
        torch.manual_seed(5)
        results.append(layer(input))
        results[-1][0].sum().backward()
    same(results[1], results[0])
    assert ours.weight_hh_l0.grad is None
    assert_close(ours.weight_ih_l0.grad, theirs.weight_ih_l0.grad)


def test_flatten_parameters_and_data_parallel_replicas():
    ours = rnnfast.LSTM(4, 5, 2)
    ours.flatten_parameters()
    input = R(6, 3, 4)
    replica = ours._replicate_for_data_parallel()
    assert replica._flat_weights is not ours._flat_weights
    assert replica._flat_weights_names is not ours._flat_weights_names
    for name, p in ours.named_parameters():  # what torch.nn.parallel.replicate does with the copies
        setattr(replica, name, p * 2)
    expected = torch.func.functional_call(ours, {name: p * 2 for name, p in ours.named_parameters()}, (input,))
    same(replica(input), expected)
    assert ours._flat_weights[0] is ours.weight_ih_l0


def test_backward_in_eval_mode_and_twice_through_the_graph():
    theirs, ours = pair("LSTM", 4, 5, dtype=torch.float64)
    ours.eval(), theirs.eval()
    input = R(4, 2, 4, dtype=torch.float64, requires_grad=True)
    grads = [torch.autograd.grad(layer(input)[0].sum(), input, create_graph=True)[0] for layer in (ours, theirs)]
    assert_close(grads[0], grads[1])
    seconds = [
        torch.autograd.grad(grad.square().sum(), layer.weight_hh_l0)[0]
        for grad, layer in zip(grads, (ours, theirs), strict=True)
    ]
    assert_close(seconds[0], seconds[1])


@pytest.mark.parametrize("kind", KINDS)
def test_per_sample_gradients(kind):
    """vmap(grad) over the batch against one backward pass a sample."""
    ours = getattr(rnnfast, kind)(4, 5, dtype=torch.float64)
    input = R(6, 3, 4, dtype=torch.float64)
    weights = {name: p.detach() for name, p in ours.named_parameters()}

    def loss(weights, sample):
        return torch.func.functional_call(ours, weights, (sample,))[0].square().sum()

    grads = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 1))(weights, input)
    for n in range(3):
        alone = torch.autograd.grad(ours(input[:, n])[0].square().sum(), tuple(ours.parameters()))
        for name, expected in zip(weights, alone, strict=True):
            assert_close(grads[name][n], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode(kind):
    ours = getattr(rnnfast, kind)(4, 5, dtype=torch.float64)
    input, tangent = R(6, 3, 4, dtype=torch.float64), R(6, 3, 4, dtype=torch.float64)
    _, along = torch.func.jvp(lambda x: ours(x)[0], (input,), (tangent,))
    step = 1e-6
    numeric = (ours(input + step * tangent)[0] - ours(input - step * tangent)[0]) / (2 * step)
    assert_close(along, numeric, rtol=1e-6, atol=1e-8)


# --- types ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_type_trains(kind, dtype):
    ours = getattr(rnnfast, kind)(4, 5, 2, bidirectional=True, dtype=dtype)
    output, states = ours(R(6, 3, 4, dtype=dtype))
    output.sum().backward()
    assert all(tensor.dtype == dtype for tensor in [output, *leaves(states)])
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in ours.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("train", [False, True])
def test_autocast_types_are_torchs(kind, layers, train):
    if not torch_autocasts(kind, torch.bfloat16):
        pytest.skip("torch.nn's LSTM fails under autocast to bfloat16 on this processor")
    theirs, ours = pair(kind, 4, 5, layers)
    for input in (R(6, 3, 4), R(6, 3, 4, dtype=torch.bfloat16)):
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.set_grad_enabled(train):
            got, expected = leaves(ours(input)), leaves(theirs(input))
        assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in expected]
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, rtol=0, atol=4 * torch.finfo(torch.bfloat16).eps)
    dtype = torch.float32 if kind == "GRU" else torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(R(6, 3, 4))[0].dtype == dtype
        assert ours(pack_sequence([R(3, 4), R(2, 4)]))[0].data.dtype == dtype
        assert ours(R(6, 3, 4), random_states(kind, layers, 3, 5))[0].dtype == dtype


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_to_float16_trains(kind):
    """What torch.nn's LSTM fails at on the CPU."""
    ours = getattr(rnnfast, kind)(4, 5, 2)
    with torch.autocast("cpu", dtype=torch.float16):
        output, _ = ours(R(6, 3, 4))
    output.float().sum().backward()
    assert output.dtype == (torch.float32 if kind == "GRU" else torch.float16)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in ours.parameters())

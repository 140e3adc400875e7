"""Our modules on the card against torch.nn's there (cuDNN), both against torch.nn in float64 on the CPU."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnfast
from test_parity import COVERING, GRID, Case, compare, test_lengths_are_packing_without_packing  # noqa: F401
from tolerances import check


def without_dropout(cases: list[Case]) -> list[Case]:
    """cuDNN draws masks of its own between layers: with dropout there is nothing to compare with."""
    return [case for case in cases if not case.layers[1]]


@pytest.mark.parametrize("case", without_dropout(COVERING), ids=str)
def test_parity(device: str, case: Case) -> None:
    compare(case, device)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", without_dropout([case for case in GRID if case not in set(COVERING)]), ids=str)
def test_parity_whole_grid(device: str, case: Case) -> None:
    compare(case, device)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_sizes_that_cudnn_likes(device: str, kind: str) -> None:
    """Many blocks in every direction of the matrix, in each type."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        ours = getattr(rnnfast, kind)(96, 256, dtype=dtype, device=device)
        theirs = getattr(nn, kind)(96, 256, dtype=dtype, device=device)
        theirs.load_state_dict(ours.state_dict())
        exact = copy.deepcopy(theirs).to("cpu", torch.float64)
        input = torch.randn(12, 40, 96, dtype=torch.float64).to(dtype)
        expected = exact(input.double())[0]
        output, yardstick = ours(input.to(device))[0], theirs(input.to(device))[0]
        check(f"output in {dtype}", output.cpu(), expected, yardstick.cpu())
        # of a size that leaves the gradients of the weights near 1
        grad = (torch.randn(expected.shape, dtype=torch.float64) / 120).to(dtype)
        wanted = torch.autograd.grad(expected, list(exact.parameters()), grad.double())
        found, own = (
            torch.autograd.grad(result, list(module.parameters()), grad.to(device))
            for result, module in ((output, ours), (yardstick, theirs))
        )
        for (name, _), value, other, theirs_value in zip(exact.named_parameters(), found, wanted, own, strict=True):
            check(f"gradient of {name} in {dtype}", value.cpu(), other, theirs_value.cpu())


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_cells(device: str, kind: str) -> None:
    ours = getattr(rnnfast, kind)(6, 17, dtype=torch.float64, device=device)
    theirs = getattr(nn, kind)(6, 17, dtype=torch.float64, device=device)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(5, 6, dtype=torch.float64, device=device)
    results = []
    for module in (ours, theirs):
        state = None
        for _ in range(3):
            state = module(input, state)
        output = state[0] if isinstance(state, tuple) else state
        results.append([output, *torch.autograd.grad(output.sin().sum(), list(module.parameters()))])
    for value, other in zip(*results, strict=True):
        check(kind, value, other, other)


@pytest.mark.parametrize("training", [True, False])
def test_dropout_between_layers(device: str, training: bool) -> None:
    """What is dropped is zero and the rest scaled: with p = 0.5 the second layer's input is 0 or twice the output."""
    module = rnnfast.RNN(4, 64, num_layers=2, dropout=0.5, bias=False, nonlinearity="relu", device=device)
    module.train(training)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_hh_l1.zero_()
        module.weight_ih_l1.copy_(torch.eye(64))
    input = torch.randn(50, 8, 4, device=device)
    plain = (input @ module.weight_ih_l0.T).relu()
    output = module(input)[0]
    if not training:
        assert torch.allclose(output, plain, atol=1e-6)
        return
    kept = output != 0
    assert torch.allclose(output[kept], 2 * plain[kept], atol=1e-5)
    share = kept.double().sum() / (plain != 0).double().sum()
    assert 0.45 < share < 0.55
    assert not torch.equal(module(input)[0], output)


def test_a_model_moves_to_the_card_and_back(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.GRU(4, 5, num_layers=2, batch_first=True)).double()
    assert "1" in str(rnnfast.accelerate(model))
    input = torch.randn(2, 6, 3, dtype=torch.float64)
    expected = model(input.to("cpu"))[0] if device == "cpu" else None
    with rnnfast.backend("auto"):
        before = model(input)[0]
        after = model.to(device)(input.to(device))[0]
        again = model.to("cpu")(input)[0]
    check("on the device", after.cpu(), before, before)
    assert torch.equal(again, before)
    assert expected is None or torch.equal(expected, before)


def test_lengths_and_resets_are_moved(device: str) -> None:
    module = rnnfast.LSTM(3, 5, dtype=torch.float64, device=device)
    input = torch.randn(6, 4, 3, dtype=torch.float64, device=device)
    lengths, resets = torch.tensor([6, 0, 2, 5]), torch.rand(6, 4) < 0.3
    expected = module(input, lengths=lengths.to(device), resets=resets.to(device))[0]
    assert torch.equal(module(input, lengths=lengths.tolist(), resets=resets)[0], expected)
    weights = list(module.parameters())
    found = rnnfast.functional.lstm(input, weights, lengths=lengths, resets=resets)[0]
    assert torch.equal(found, expected)


def test_packed_sequences_of_the_host(device: str) -> None:
    """Packed on the CPU and moved, as a data loader does."""
    module = rnnfast.GRU(3, 5, bidirectional=True, dtype=torch.float64)
    packed = pack_padded_sequence(torch.randn(6, 3, 3, dtype=torch.float64), torch.tensor([2, 6, 1]), False, False)
    with rnnfast.backend("cpu"):
        expected, expected_h = module(packed)
    output, h_n = module.to(device)(packed.to(device))
    assert output.batch_sizes.device.type == "cpu"
    check("output", output.data.cpu(), expected.data, expected.data)
    check("h_n", h_n.cpu(), expected_h, expected_h)

"""Types: autocast, TF32, and the one layout of what forward keeps for backward."""

import copy

import pytest
import torch
from gpu_device import ON_CARD, tf32
from torch import Tensor, nn

import rnnfast
from cases import MODES, make_call, random_grads, reference, selected
from rnnfast import reference as plain
from test_ops import check_results, double, on
from tolerances import check, error

KINDS = ["LSTM", "GRU", "RNN"]


@pytest.mark.parametrize("inner", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(device: str, kind: str, inner: torch.dtype, given: torch.dtype) -> None:
    """The types of all results and gradients are torch.nn's, and the values are as near as torch.nn's."""
    if not ON_CARD and kind == "LSTM" and inner == torch.float16:
        pytest.skip("torch.nn fails under CPU autocast to float16")
    ours = getattr(rnnfast, kind)(6, 17, num_layers=2, bidirectional=True, dtype=given, device=device)
    theirs = getattr(nn, kind)(6, 17, num_layers=2, bidirectional=True, dtype=given, device=device)
    theirs.load_state_dict(ours.state_dict())
    exact = copy.deepcopy(theirs).to("cpu", torch.float64)
    input = torch.randn(5, 4, 6, dtype=torch.float64).to(given)
    found = []
    for module in (ours, theirs):
        with torch.autocast(device, inner):
            output, states = module(input.to(device))
        states = states if isinstance(states, tuple) else (states,)
        grads = torch.autograd.grad(output.float().sum(), list(module.parameters()))
        found.append([output, *states, *grads])
    output, states = exact(input.double())
    states = states if isinstance(states, tuple) else (states,)
    expected = [output, *states, *torch.autograd.grad(output.sum(), list(exact.parameters()))]
    for index, (value, other, wanted) in enumerate(zip(*found, expected, strict=True)):
        # PyTorch casts for cuDNN's RNNs to float16 whatever autocast says (ATen/cudnn/AutocastRNN.cpp); we do not.
        halved = ON_CARD and inner == torch.bfloat16 and other.dtype == torch.float16
        right = inner if halved else other.dtype
        assert value.dtype == right, f"result {index}: {value.dtype}, torch.nn gives {other.dtype}"
        own, torchs = error(value.cpu(), wanted), error(other.cpu(), wanted)
        # gradients come in the type of the parameters with the precision of the inner type
        scale = max(1.0, wanted.abs().max().item())
        assert own <= 2 * torchs + torch.finfo(inner).eps * scale, f"result {index}: {own}, torch.nn {torchs}"


def test_training_with_autocast_and_a_scaler(device: str) -> None:
    model = rnnfast.GRU(6, 17, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler(device, enabled=ON_CARD)
    input = torch.randn(5, 4, 6, device=device)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        with torch.autocast(device, torch.float16):
            loss = (model(input)[0].float() - 0.3).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def cut(value: Tensor) -> Tensor:
    """float32 as a tensor core reads it in TF32: 10 bits of the fraction, the rest ignored."""
    return (value.contiguous().view(torch.int32) & -0x2000).view(torch.float32)


def tf32_error(module: nn.Module, input: Tensor, expected: Tensor) -> float:
    """Largest error of the outputs where every product's operands are cut to TF32, and nothing else is."""
    linear = plain.F.linear

    def coarse(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear(cut(input), cut(weight), bias)

    with torch.no_grad(), rnnfast.backend("reference"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain.F, "linear", coarse)
        return error(copy.deepcopy(module).to("cpu")(input)[0], expected)


def recurrent_error(kind: str, device: str, allowed: bool) -> tuple[float, float, Tensor]:
    """Largest error of the outputs in float32 against float64, ours and what it is measured by; and our output."""
    torch.manual_seed(3)
    ours = getattr(rnnfast, kind)(32, 256, device=device)
    theirs = getattr(nn, kind)(32, 256, device=device)
    theirs.load_state_dict(ours.state_dict())
    input = torch.randn(20, 32, 32)
    expected = copy.deepcopy(theirs).to("cpu", torch.float64)(input.double())[0]
    with tf32(allowed), torch.no_grad():
        output, yardstick = ours(input.to(device))[0], theirs(input.to(device))[0]
    usual = error(yardstick.cpu(), expected)
    if allowed:
        # cuDNN may take TF32 where it is allowed, and may not: its own error does not say which.
        usual = max(usual, tf32_error(ours, input, expected))
    return error(output.cpu(), expected), usual, output.cpu()


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_only_where_torch_allows_it(device: str, kind: str) -> None:
    exact, exact_usual, exact_output = recurrent_error(kind, device, False)
    coarse, coarse_usual, coarse_output = recurrent_error(kind, device, True)
    assert exact <= 2 * exact_usual + 1e-6
    # 10 bits of mantissa: a float32 recurrence is some thousand times nearer
    assert exact < 1e-5
    # Were nothing cut, the yardstick would be float32's own error.
    assert coarse_usual > 1e-5
    assert coarse <= 2 * coarse_usual + 1e-6
    if ON_CARD:
        assert not torch.equal(exact_output, coarse_output)
        assert coarse > 10 * exact
    assert torch.equal(recurrent_error(kind, device, False)[2], exact_output)


@pytest.mark.parametrize("kind", KINDS)
def test_tf32_in_the_backward_pass(device: str, kind: str) -> None:
    """The flag counts at the time of the backward pass."""
    module = getattr(rnnfast, kind)(8, 256, device=device)
    output = module(torch.randn(20, 16, 8, device=device))[0]
    grads = []
    for allowed in (False, True, False):
        with tf32(allowed):
            grads.append(torch.autograd.grad(output.sum(), [module.weight_hh_l0], retain_graph=True)[0])
    assert torch.equal(grads[0], grads[2])
    assert torch.equal(grads[0], grads[1]) != ON_CARD
    assert torch.allclose(grads[0], grads[1], rtol=0.01, atol=0.01 * grads[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["dense", "packed"])
@pytest.mark.parametrize("mode", MODES)
def test_forward_here_and_backward_on_the_cpu(device: str, mode: str, layout: str, dtype: torch.dtype) -> None:
    """And the reverse: there is one layout of what forward keeps."""
    extra = {"lengths": True, "resets": True} if layout == "dense" else {}
    host = make_call(mode, D=2, T=6, B=7, H=21, layout=layout, dtype=dtype, **extra)
    here = host.on(device)
    saved = {"here": here.forward(selected), "host": host.forward(reference)}
    with rnnfast.backend("cpu"):
        saved["cpu"] = host.forward(selected)
    grads = random_grads(saved["host"])
    exact = host.to(torch.float64)
    for forward, results in saved.items():
        results = on("cpu", results)
        expected = exact.backward(reference, double(grads), double(results))
        own = host.backward(reference, grads, results)
        check_results(
            host, on("cpu", here.backward(selected, on(device, grads), on(device, results))), own, expected, forward
        )
        with rnnfast.backend("cpu"):
            check_results(host, host.backward(selected, grads, results), own, expected, f"{forward}, then cpu")


def test_a_nan_stays_in_its_row(device: str) -> None:
    module = rnnfast.LSTM(3, 20, device=device)
    input = torch.randn(6, 5, 3, device=device)
    expected = module(input)[0]
    input[2, 1] = float("nan")
    output = module(input)[0]
    assert output[2:, 1].isnan().all()
    rest = [0, 2, 3, 4]
    check("the other rows", output[:, rest].cpu(), expected[:, rest].cpu().double(), expected[:, rest].cpu())

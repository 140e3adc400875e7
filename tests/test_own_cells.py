"""The cells that torch.nn lacks, MGU and RNNs of other nonlinearities, against loops written here from their papers."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.testing import assert_close

import rnnfast
from rnnfast import functional
from tolerances import check_equal

I, H, T, B = 3, 5, 4, 3  # noqa: E741


def mgu(x: Tensor, h: Tensor, w_ih: Tensor, w_hh: Tensor, b_ih: Tensor | None, b_hh: Tensor | None) -> Tensor:
    """Zhou et al. 2016, equations 8, with the gate behind the product as in torch.nn's GRU."""
    outer, inner = linear(x, w_ih, b_ih), linear(h, w_hh, b_hh)
    f = torch.sigmoid(outer[:, :H] + inner[:, :H])
    candidate = torch.tanh(outer[:, H:] + f * inner[:, H:])
    return (1 - f) * h + f * candidate


def elman(function: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda x, h, w_ih, w_hh, b_ih, b_hh: function(linear(x, w_ih, b_ih) + linear(h, w_hh, b_hh))


Steps = dict[str, tuple[Callable[..., nn.Module], Callable[..., nn.Module], Callable[..., Tensor]]]
KINDS: Steps = {
    "MGU": (rnnfast.MGU, rnnfast.MGUCell, mgu),
    **{
        f"RNN {name}": (
            lambda *args, name=name, **options: rnnfast.RNN(*args, nonlinearity=name, **options),
            lambda *args, name=name, **options: rnnfast.RNNCell(*args, nonlinearity=name, **options),
            elman(function),
        )
        for name, function in (("sigmoid", torch.sigmoid), ("identity", lambda a: a))
    },
}
over_kinds = pytest.mark.parametrize("kind", KINDS)


def loop(kind: str, module: Any, x: Tensor, h_0: Tensor, resets: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Layers and directions, (T, B, I), a step at a time."""
    step, last = KINDS[kind][2], []
    for layer in range(module.num_layers):
        outputs = []
        for d, suffix in enumerate(["", "_reverse"][: 1 + module.bidirectional]):
            weights = [getattr(module, f"weight_{kind}_l{layer}{suffix}") for kind in ("ih", "hh")]
            biases = [
                getattr(module, f"bias_{kind}_l{layer}{suffix}") if module.bias else None for kind in ("ih", "hh")
            ]
            h, states = h_0[len(last)], [h_0[0]] * len(x)
            for t in reversed(range(len(x))) if d else range(len(x)):
                if resets is not None and not d:
                    h = torch.where(resets[t].unsqueeze(1), 0, h)
                h = states[t] = step(x[t], h, *weights, *biases)
                if resets is not None and d and t:
                    h = torch.where(resets[t].unsqueeze(1), 0, h)
            last.append(h)
            outputs.append(torch.stack(states))
        x = torch.cat(outputs, -1)
    return x, torch.stack(last)


def gradients(results: tuple[Tensor, Tensor], inputs: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(results[0].sin().sum() + (results[1] ** 2).sum(), inputs))


OPTIONS: dict[str, dict[str, Any]] = {
    "one": {},
    "two layers, two directions": {"num_layers": 2, "bidirectional": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("with_resets", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@over_kinds
@pytest.mark.parametrize("backend", ["reference", "cpu-avx512", "emulated", "triton"], indirect=True)
def test_against_a_loop(backend: str, kind: str, options: str, with_resets: bool) -> None:
    module = KINDS[kind][0](I, H, dtype=torch.float64, **OPTIONS[options])
    x = torch.randn(T, B, I, dtype=torch.float64, requires_grad=True)
    count = module.num_layers * (2 if module.bidirectional else 1)
    h_0 = torch.randn(count, B, H, dtype=torch.float64, requires_grad=True)
    resets = torch.rand(T, B) < 0.3 if with_resets else None
    ours, wanted = module(x, h_0, resets=resets), loop(kind, module, x, h_0, resets)
    inputs = [x, h_0, *module.parameters()]
    for actual, expected in zip([*ours, *gradients(ours, inputs)], [*wanted, *gradients(wanted, inputs)], strict=True):
        check_equal(kind, actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@over_kinds
@pytest.mark.parametrize("backend", ["cpu-avx512", "emulated"], indirect=True)
def test_other_types_are_near(backend: str, kind: str, dtype: torch.dtype) -> None:
    module = KINDS[kind][0](I, H, bidirectional=True)
    x, h_0 = torch.randn(T, B, I), torch.zeros(2, B, H)
    wanted = loop(kind, module, x, h_0)
    low = copy.deepcopy(module).to(dtype)
    tolerance = 1e-6 if dtype == torch.float32 else 0.05
    for actual, expected in zip(low(x.to(dtype)), wanted, strict=True):
        assert (actual.float() - expected).abs().max() < tolerance


@over_kinds
def test_ragged_rows(kind: str) -> None:
    """lengths and packed rows say the same; each row is as by itself."""
    module = KINDS[kind][0](I, H, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, B, I, dtype=torch.float64), torch.tensor([4, 3, 1])
    output, h_n = module(x, lengths=lengths)
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths)
    assert_close(nn.utils.rnn.pad_packed_sequence(module(packed)[0])[0], output)
    assert_close(module(packed)[1], h_n)
    for b, length in enumerate(lengths.tolist()):
        assert_close(module(x[:length, b])[0], output[:length, b])


@over_kinds
def test_cell_and_function_are_the_layer(kind: str) -> None:
    make, make_cell, _ = KINDS[kind]
    module, cell = make(I, H), make_cell(I, H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in module.state_dict().items()})
    x, h = torch.randn(B, I), torch.randn(B, H)
    expected = module(x.unsqueeze(0), h.unsqueeze(0))[0][0]
    assert_close(cell(x, h), expected)
    assert_close(cell(x[0], h[0]), expected[0])
    name, _, nonlinearity = kind.partition(" ")
    function = getattr(functional, name.lower())
    given = {"nonlinearity": nonlinearity} if nonlinearity else {}
    assert_close(function(x.unsqueeze(0), module._flat_weights, h.unsqueeze(0), **given)[0][0], expected)


@over_kinds
def test_derivatives_of_higher_order(kind: str) -> None:
    module = KINDS[kind][0](2, 3, dtype=torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x,))[0]

    inputs = (torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True), *values)
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


def test_mgu_is_a_module_like_the_others() -> None:
    torch.manual_seed(3)
    module = rnnfast.MGU(I, H, 2, batch_first=True, dropout=0.5, bidirectional=True)
    assert isinstance(module, nn.RNNBase)
    assert {name: tuple(value.shape) for name, value in module.named_parameters()} == {
        f"{name}_l{layer}{suffix}": shape
        for layer in range(2)
        for suffix in ("", "_reverse")
        for name, shape in (
            ("weight_ih", (2 * H, 2 * H if layer else I)),
            ("weight_hh", (2 * H, H)),
            ("bias_ih", (2 * H,)),
            ("bias_hh", (2 * H,)),
        )
    }
    assert all(value.abs().max() <= H**-0.5 for value in module.parameters())
    torch.manual_seed(3)
    again = rnnfast.MGU(I, H, 2, batch_first=True, dropout=0.5, bidirectional=True)
    again.eval(), module.eval()
    x = torch.randn(B, T, I)
    expected = module(x)[0]
    for twin in (again, copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], expected)
    assert repr(module) == "MGU(3, 5, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True)"
    double = rnnfast.MGU(I, H, dtype=torch.float64)
    assert all(value.dtype == torch.float64 for value in double.parameters())
    assert rnnfast.MGU(I, H, device="meta")(torch.empty(T, B, I, device="meta"))[0].shape == (T, B, H)


@over_kinds
def test_it_compiles_whole(kind: str) -> None:
    module, x = KINDS[kind][0](I, H), torch.randn(T, B, I)
    expected = module(x)[0]
    torch._dynamo.reset()
    assert_close(torch.compile(module, fullgraph=True, backend="aot_eager")(x)[0], expected)
    torch._dynamo.reset()


def test_what_torch_nn_lacks_stays() -> None:
    model = nn.ModuleDict({"mgu": rnnfast.MGU(I, H), "cell": rnnfast.MGUCell(I, H), "lstm": rnnfast.LSTM(I, H)})
    report = rnnfast.restore(model)
    assert report.left == {"mgu": "torch.nn has no MGU", "cell": "torch.nn has no MGU"}
    assert type(model["lstm"]) is nn.LSTM
    for module in (model["mgu"], model["cell"]):
        with pytest.raises(RuntimeError, match=r"torch\.jit\.script: .*: torch\.nn has no MGU"):
            torch.jit.script(module)
    assert not rnnfast.accelerate(nn.ModuleList([rnnfast.MGU(I, H)])).swapped


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rnnfast.MGU(I, 0), ValueError, "hidden_size must be greater than zero"),
        (lambda: rnnfast.MGU(I, H)(torch.zeros(T, B, I + 1)), RuntimeError, "Expected 3, got 4"),
        (lambda: rnnfast.MGU(I, H)(torch.zeros(T)), ValueError, "MGU: Expected input to be 2D or 3D, got 1D"),
        (lambda: rnnfast.MGU(I, H)(torch.zeros(T, B, I), torch.zeros(1, B, H + 1)), RuntimeError, "hidden size"),
        (lambda: rnnfast.MGUCell(I, H)(torch.zeros(B, I), torch.zeros(B, 1)), RuntimeError, "hidden_size"),
        (lambda: rnnfast.MGUCell(I, H)(torch.zeros(B, I, 1)), ValueError, "MGUCell: Expected input to be 1D or 2D"),
        (lambda: rnnfast.RNN(I, H, nonlinearity="gelu"), ValueError, "[Uu]nknown nonlinearity"),
    ],
)
def test_wrong_arguments(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

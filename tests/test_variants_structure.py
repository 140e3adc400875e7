"""Layers of another structure compute what was published: heads, the light GRU, DreamerV3's GRU; and initialisations.

Heads are held against torch.nn's own layers, whose W_hh has zeros beside the blocks, and against FlashRNN's product;
the rest against plain loops in the authors' order of gates, which take our parameters turned into theirs.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.testing import assert_close

import rnnfast
from module_cases import leaves
from variant_loops import dreamer_gru

DOUBLE = {"dtype": torch.float64}
T, B, I, H = 6, 3, 4, 6  # noqa: E741
ENDS = [4, 6, 2]
KINDS = ["LSTM", "GRU", "RNN"]
WAYS = {"num_layers": 2, "bidirectional": True}
NO_RESET = {"reset_gate": False}
BEFORE = {"reset_after": False}
RELU = {"candidate_activation": "relu"}
LIGHT = {**NO_RESET, **RELU}
BATCH_NORM = {"batch_norm": "sequence"}
DREAMER = {"preset": "dreamer_v3", "bias": False}
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])

pytestmark = pytest.mark.usefixtures("one_thread")


def R(*size: int) -> Tensor:
    return torch.randn(*size, **DOUBLE)


def same(actual: Any, expected: Any, what: Any) -> None:
    """Of float64 computations and others."""
    for one, other in zip(leaves(actual), leaves(expected), strict=True):
        assert_close(one, other, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


def made(kind: str, *sizes: int, **arguments: Any) -> Any:
    """No parameter and no statistic stays at a value that would hide what it does."""
    module = getattr(rnnfast, kind)(*(sizes or (I, H)), **{**DOUBLE, **arguments})
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        nn.init.uniform_(value, -0.5, 0.5)
        if name.startswith(("weight_norm", "weight_batch_norm", "running_var")):
            value.data += 1
    return module


def states_of(module: Any) -> list[Tensor]:
    layers = (module.num_layers * (1 + module.bidirectional),) if isinstance(module, nn.RNNBase) else ()
    count = 1 + isinstance(module, (nn.LSTM, nn.LSTMCell))
    return [R(*layers, B, module.hidden_size).requires_grad_() for _ in range(count)]


def as_hx(states: list[Tensor]) -> Any:
    return tuple(states) if len(states) == 2 else states[0]


def packed(x: Tensor) -> Any:
    return pack_padded_sequence(x, torch.tensor(ENDS), enforce_sorted=False)


def padded(results: Any) -> Any:
    return pad_packed_sequence(results[0])[0], results[1]


def gradients(results: Any, wanted: dict[str, Tensor]) -> list[Tensor]:
    loss = sum((r * torch.linspace(-1, 1, r.numel(), **DOUBLE).view_as(r)).sum() for r in leaves(results))
    return list(torch.autograd.grad(loss, list(wanted.values()), retain_graph=True))


def check(module: nn.Module, x: Tensor, states: list[Tensor], actual: Any, expected: Any) -> None:
    """Results, and the gradients of input, states and parameters."""
    same(actual, expected, "result")
    wanted = {"x": x, **{f"state {n}": state for n, state in enumerate(states)}, **dict(module.named_parameters())}
    for name, one, other in zip(wanted, gradients(actual, wanted), gradients(expected, wanted), strict=True):
        same(one, other, f"gradient of {name}")


# --- heads --------------------------------------------------------------------------------------------------------


def with_zeros(module: Any) -> dict[str, Tensor]:
    """The parameters, W_hh as a layer without heads has it: zero but for the blocks."""
    heads, found = module._options.num_heads, dict(module.named_parameters())
    for name, weight in module.named_parameters():
        if name.startswith("weight_hh"):
            gates = weight.split(module.hidden_size)
            found[name] = torch.cat([torch.block_diag(*gate.chunk(heads)) for gate in gates])
    return found


HEADS: list[tuple[str, int, int, dict[str, Any]]] = [
    ("LSTM", 36, 3, WAYS),
    ("LSTM", 64, 4, {}),
    ("LSTM", 7, 7, {"bias": False, "bidirectional": True}),
    ("GRU", 33, 3, WAYS),
    ("GRU", 10, 5, {"bias": False}),
    ("RNN", 36, 3, WAYS),
    ("RNN", 14, 2, {"nonlinearity": "relu", "bias": False}),
]


@pytest.mark.parametrize(("kind", "size", "heads", "options"), HEADS, ids=[f"{k} {h}/{n}" for k, h, n, _ in HEADS])
def test_heads_are_blocks_of_torchs_layer(kind: str, size: int, heads: int, options: Any) -> None:
    module, plain = made(kind, I, size, num_heads=heads, **options), getattr(nn, kind)(I, size, **DOUBLE, **options)
    x, states = R(T, B, I).requires_grad_(), states_of(module)
    check(module, x, states, module(x, as_hx(states)), functional_call(plain, with_zeros(module), (x, as_hx(states))))
    expected = padded(functional_call(plain, with_zeros(module), (packed(x), as_hx(states))))
    check(module, x, states, module(x, as_hx(states), lengths=ENDS), expected)
    check(module, x, states, padded(module(packed(x), as_hx(states))), expected)


# Other options are held against published forms elsewhere: here it counts that the blocks do not change them.
BESIDE: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {"layer_norm": "separate", "cell_norm": "output", "zoneout": (0.3, 0.2)}),
    ("LSTM", {"layer_norm": "joint", "norm": "rms", "peephole": True, "coupled": True}),
    ("GRU", {"layer_norm": "joint", "zoneout": 0.4}),
    ("GRU", {**BEFORE, "zoneout": 0.3, "recurrent_dropout": 0.2}),
    ("GRU", {**LIGHT, "zoneout": 0.3}),
    ("RNN", {"layer_norm": "separate", "zoneout": 0.5}),
    ("LSTM", BATCH_NORM),
    ("GRU", {"batch_norm": "recurrent"}),
]


@pytest.mark.filterwarnings("ignore:rnnfast. layers with options")
@pytest.mark.parametrize(("kind", "options"), BESIDE, ids=[" ".join([kind, *options]) for kind, options in BESIDE])
@modes
def test_heads_beside_other_options(kind: str, options: dict[str, Any], training: bool) -> None:
    module = made(kind, I, 15, num_heads=3, **WAYS, **options).train(training)
    plain = getattr(rnnfast, kind)(I, 15, **DOUBLE, **WAYS, **options).train(training)
    x, states, results = R(T, B, I).requires_grad_(), states_of(module), []
    whole = {**with_zeros(module), **{name: value.clone() for name, value in module.named_buffers()}}
    for of, given in ((module, {}), (plain, whole)):
        torch.manual_seed(3)
        results.append(functional_call(of, given, (x, as_hx(states)), {"lengths": ENDS}))
    check(module, x, states, *results)


def flashrnn(kind: str, module: Any, x: Tensor, states: list[Tensor]) -> tuple[Tensor, Any]:
    """FlashRNN's vanilla form (Pöppel et al. 2024, https://arxiv.org/abs/2412.07752): R of shape (head, in, gate, out).

    Gates are i, f, z, o of the LSTM; of the GRU the recurrent ones g, r, z, with g the candidate's, and those of the
    input r, z, n. Each has a bias of its own.
    """
    heads, size = module._options.num_heads, module.hidden_size // module._options.num_heads
    ours, of_h = {"LSTM": ("ifzo", "ifzo"), "GRU": ("rzn", "nrz"), "RNN": ("h", "h")}[kind]

    def in_order(name: str, order: str) -> Tensor:
        pieces = dict(zip(ours, getattr(module, f"{name}_l0").chunk(len(ours)), strict=True))
        return torch.stack([pieces[gate] for gate in order]).unflatten(1, (heads, size))

    r = in_order("weight_hh", of_h).permute(1, 3, 0, 2)
    w_x = torch.einsum("tbi,gndi->tbgnd", x, in_order("weight_ih", ours)) + in_order("bias_ih", ours)
    y, *c = (state[0].unflatten(-1, (heads, size)) for state in states)
    outputs = []
    for w in w_x:
        ry = torch.einsum("bnk,nkgd->bgnd", y, r) + in_order("bias_hh", of_h)
        if kind == "LSTM":
            i, f, z, o = (w + ry).unbind(1)
            c = [f.sigmoid() * c[0] + i.sigmoid() * z.tanh()]
            y = o.sigmoid() * c[0].tanh()
        elif kind == "GRU":
            g, reset, z = ry[:, 0], (w[:, 0] + ry[:, 1]).sigmoid(), (w[:, 1] + ry[:, 2]).sigmoid()
            y = z * y + (1 - z) * torch.tanh(w[:, 2] + reset * g)
        else:
            y = torch.tanh((w + ry)[:, 0])
        outputs.append(y.flatten(1))
    return torch.stack(outputs), as_hx([state.flatten(1)[None] for state in (y, *c)])


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_flashrnns(kind: str) -> None:
    module = made(kind, I, 20, num_heads=5)
    x, states = R(T, B, I).requires_grad_(), states_of(module)
    for backend in ("auto", "reference"):
        with rnnfast.backend(backend):
            check(module, x, states, module(x, as_hx(states)), flashrnn(kind, module, x, states))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_cells_with_heads_are_torchs(kind: str, bias: bool) -> None:
    module = made(f"{kind}Cell", I, 12, num_heads=4, bias=bias)
    plain = getattr(nn, f"{kind}Cell")(I, 12, bias=bias, **DOUBLE)
    x, states = R(B, I).requires_grad_(), states_of(module)
    check(module, x, states, module(x, as_hx(states)), functional_call(plain, with_zeros(module), (x, as_hx(states))))
    same(module(x[0]), functional_call(plain, with_zeros(module), (x[0],)), "unbatched, from zeros")


# --- the GRU of other gates ---------------------------------------------------------------------------------------


def gru_outputs(p: dict[str, Tensor], options: dict[str, Any], x: Tensor, h: Tensor) -> Tensor:
    """One sequence (T_n, I) from h (H,). Without r, 1 is in its place."""
    names, outputs = "rzn" if options.get("reset_gate", True) else "zn", []

    def product(which: str, gate: str, value: Tensor) -> Tensor:
        part = slice(names.index(gate) * len(h), (names.index(gate) + 1) * len(h))
        return p[f"weight_{which}"][part] @ value + (p[f"bias_{which}"][part] if f"bias_{which}" in p else 0.0)

    for x_t in x:
        gates = {gate: torch.sigmoid(product("ih", gate, x_t) + product("hh", gate, h)) for gate in names[:-1]}
        r, z = gates.get("r", torch.ones_like(h)), gates["z"]
        recurrent = r * product("hh", "n", h) if options.get("reset_after", True) else product("hh", "n", r * h)
        n = product("ih", "n", x_t) + recurrent
        n = torch.where(n > 0, n, 0) if options.get("candidate_activation") == "relu" else torch.tanh(n)
        h = z * h + (1 - z) * n
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("options", [NO_RESET, RELU, LIGHT, BEFORE, {**BEFORE, **RELU}], ids=str)
@pytest.mark.parametrize(("bias", "heads"), [(True, 1), (False, 1), (True, 3)], ids=["bias", "no bias", "heads"])
def test_gates_of_the_gru(options: dict[str, Any], bias: bool, heads: int) -> None:
    """Ravanelli et al. 2018, https://arxiv.org/abs/1803.10225, but for its batch norm; of r Cho et al. 2014."""
    module = made("GRU", I, 9, bias=bias, num_heads=heads, **WAYS, **options)
    assert len(module.weight_hh_l0) == 9 * (3 if options.get("reset_gate", True) else 2)
    x, (h,) = R(T, B, I).requires_grad_(), states_of(module)
    rows, final = [x[:end, n] for n, end in enumerate(ENDS)], []
    for layer in range(2):
        found = []
        for way in ("", "_reverse"):
            suffix, start = f"_l{layer}{way}", h[len(final)]
            p = {n.removesuffix(suffix): v for n, v in with_zeros(module).items() if n.endswith(suffix)}
            turned = [row.flip(0) if way else row for row in rows]
            every = [gru_outputs(p, options, row, of) for row, of in zip(turned, start, strict=True)]
            final.append(torch.stack([each[-1] for each in every]))
            found.append([each.flip(0) if way else each for each in every])
        rows = [torch.cat(each, 1) for each in zip(*found, strict=True)]
    expected = torch.stack([F.pad(row, (0, 0, 0, T - len(row))) for row in rows], 1), torch.stack(final)
    check(module, x, [h], module(x, h, lengths=ENDS), expected)
    with rnnfast.backend("reference"):
        check(module, x, [h], padded(module(packed(x), h)), expected)


@pytest.mark.parametrize("options", [LIGHT, DREAMER, {"num_heads": 3}], ids=str)
def test_a_loop_of_cells_is_the_layer(options: dict[str, Any]) -> None:
    layer, cell, x, h = made("GRU", **options), rnnfast.GRUCell(I, H, **DOUBLE, **options), R(T, B, I), R(1, B, H)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in layer.state_dict().items()})
    outputs = list(itertools.accumulate(x, lambda state, x_t: cell(x_t, state), initial=h[0]))[1:]
    same((torch.stack(outputs), outputs[-1][None]), layer(x, h), "loop")
    same(cell(x[0, 0]), cell(x[0], torch.zeros(B, H, **DOUBLE))[0], "unbatched, from zeros")


def speechbrains(ours: Any, norm: nn.BatchNorm1d, layer: int, x: Tensor, h: Tensor, drop_mask: Any = 1.0) -> Tensor:
    """One layer of speechbrain/nnet/RNN.py's LiGRU, batches first: w for 2H candidates and then gates, behind it
    BatchNorm1d over batch and time, u for both. Two directions are one batch of twice the size, with the same weights.
    """
    p = {name: torch.cat(value.chunk(2)[::-1]) for name, value in ours.named_parameters() if f"_l{layer}" in name}
    x = torch.cat([x, x.flip(1)]) if ours.bidirectional else x
    # Of the batch norm beta is what the biases are in ours.
    beta = p[f"bias_ih_l{layer}"] + p[f"bias_hh_l{layer}"] if ours.bias else torch.zeros_like(norm.bias)
    affine, w = {"weight": p[f"weight_batch_norm_ih_l{layer}"], "bias": beta}, x @ p[f"weight_ih_l{layer}"].t()
    w, hiddens = functional_call(norm, affine, w.flatten(0, 1)).view_as(w), []
    for k in range(w.shape[1]):
        candidate, z = (w[:, k] + h @ p[f"weight_hh_l{layer}"].t()).chunk(2, 1)
        z = torch.sigmoid(z)
        h = (1 - z) * drop_mask * torch.relu(candidate) + z * h
        hiddens.append(h)
    forward, *back = torch.stack(hiddens, 1).chunk(1 + ours.bidirectional)
    return torch.cat([forward, *(each.flip(1) for each in back)], 2)


def speechbrains_norm(ours: Any, layer: int) -> nn.BatchNorm1d:
    norm = nn.BatchNorm1d(2 * ours.hidden_size, momentum=0.05, **DOUBLE)
    for name in ("running_mean", "running_var"):
        norm.get_buffer(name).copy_(torch.cat(ours.get_buffer(f"{name}_ih_l{layer}").chunk(2)[::-1]))
    return norm


@pytest.mark.parametrize("bias", [True, False], ids=["beta", "no beta"])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_ligru_is_speechbrains(bias: bool, dropout: float) -> None:
    """Two layers, three training steps and evaluation."""
    options = {"recurrent_dropout": dropout, "dropout_mode": "candidate"} if dropout else {}
    ours = made("LiGRU", num_layers=2, batch_first=True, bias=bias, batch_norm_momentum=0.05, **options)
    norms = [speechbrains_norm(ours, layer) for layer in range(2)]
    for step in range(4):
        for module in (ours, *norms):
            module.train(step < 3)
        x, h = R(B, T, I).requires_grad_(), R(2, B, H).requires_grad_()
        torch.manual_seed(step)
        actual = ours(x, h)
        torch.manual_seed(step)
        outputs = [x]
        for layer, norm in enumerate(norms):
            mask = F.dropout(torch.ones(B, H, **DOUBLE), dropout) if dropout and step < 3 else 1.0
            outputs.append(speechbrains(ours, norm, layer, outputs[-1], h[layer], mask))
        check(ours, x, [h], actual, (outputs[2], torch.stack([output[:, -1] for output in outputs[1:]])))
        for layer, norm in enumerate(norms):
            again = speechbrains_norm(ours, layer)
            same([again.running_mean, again.running_var], [norm.running_mean, norm.running_var], f"step {step}")


@modes
def test_ligru_of_two_directions_is_speechbrains_where_they_share_weights(training: bool) -> None:
    ours = made("LiGRU", batch_first=True, bidirectional=True, batch_norm_momentum=0.05).train(training)
    ours.load_state_dict({name: ours.state_dict()[name.removesuffix("_reverse")] for name in ours.state_dict()})
    x, norm = R(B, T, I), speechbrains_norm(ours, 0).train(training)
    same(ours(x)[0], speechbrains(ours, norm, 0, x, torch.zeros(2 * B, H, **DOUBLE)), "output")
    same(ours.running_mean_ih_l0_reverse, torch.cat(norm.running_mean.chunk(2)[::-1]), "mean")


@modes
def test_ligru_is_a_preset(training: bool) -> None:
    ligru, x = made("LiGRU", **WAYS), R(T, B, I)
    others = [rnnfast.GRU(I, H, **WAYS, **DOUBLE, **of) for of in ({"preset": "light_gru"}, {**LIGHT, **BATCH_NORM})]
    for other in others:
        other.load_state_dict(ligru.state_dict())
    found = [module.train(training)(x) for module in (ligru, *others)]
    assert all(torch.equal(one, other) for each in found[1:] for one, other in zip(each, found[0], strict=True))


def dreamers(ours: Any, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """loops.dreamer_gru with our parameters: z = 1 - update = sigmoid(1 - N(.)), and its gates are r, n, update."""
    p = {name.removesuffix("_l0"): parameter.chunk(3) for name, parameter in ours.named_parameters()}
    linear = torch.cat([torch.cat([p[name][k] for k in (0, 2, 1)]) for name in ("weight_ih", "weight_hh")], 1)
    (r, z, n), (b_r, b_z, b_n) = p["weight_norm"], p["bias_norm"]
    return dreamer_gru(linear, (torch.cat([r, n, -z]), torch.cat([b_r, b_n, 1 - b_z])), x, h)


@pytest.mark.parametrize("scale", [1.0, 0.01], ids=["usual", "small, where the epsilon decides"])
def test_dreamers_gru(scale: float) -> None:
    layer, cell = made("GRU", **DREAMER), made("GRUCell", **DREAMER)
    x, h, x_t = ((scale * R(*size)).requires_grad_() for size in ((T, B, I), (B, H), (B, I)))
    output, h_n = dreamers(layer, x, h)
    check(layer, x, [h], layer(x, h[None]), (output, h_n[None]))
    check(cell, x_t, [h], cell(x_t, h), dreamers(cell, x_t[None], h)[1])


@pytest.mark.parametrize("kind", ["GRU", "GRUCell"])
def test_dreamers_gru_begins_as_there(kind: str) -> None:
    """With a LayerNorm of weight one and bias zero; and so again after reset_parameters."""
    module, one = getattr(rnnfast, kind)(I, H, **DREAMER), torch.ones(H)
    for _ in range(2):
        p = {name.removesuffix("_l0"): value for name, value in module.state_dict().items()}
        assert torch.equal(p["weight_norm"], torch.cat([one, -one, one]))
        assert torch.equal(p["bias_norm"], torch.cat([0 * one, one, 0 * one]))
        nn.init.constant_(p["weight_norm"], 7.0), nn.init.constant_(p["bias_norm"], 7.0)
        module.reset_parameters()


# --- layers like any others ---------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LiGRU": ("LiGRU", {}),
    "LSTM heads": ("LSTM", {"num_heads": 3}),
    "GRU heads": ("GRU", {"num_heads": 3}),
    "GRU heads before": ("GRU", {"num_heads": 3, **BEFORE}),
    "RNN heads": ("RNN", {"num_heads": 3}),
    "light heads": ("GRU", {"num_heads": 2, **LIGHT}),
    "dreamer": ("GRU", DREAMER),
}


@pytest.mark.parametrize("name", LAYERS)
def test_first_and_second_derivatives(name: str) -> None:
    kind, options = LAYERS[name]
    module = made(kind, 2, 6, **options)
    names, states = [name for name, _ in module.named_parameters()], states_of(module)

    def run(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        hx, weights = list(others[: len(states)]), dict(zip(names, others[len(states) :], strict=True))
        return tuple(leaves(functional_call(module, weights, (x, as_hx(hx)))))

    wanted = tuple(v.detach().requires_grad_() for v in (R(3, B, 2), *states, *module.parameters()))
    assert torch.autograd.gradcheck(run, wanted, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, wanted, fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_other_types_are_near_float64(name: str, dtype: torch.dtype) -> None:
    """Results, gradients and statistics, on the whole: at relu's kink a last bit decides about a single gradient."""
    kind, options = LAYERS[name]
    module = made(kind, I, 36, bidirectional=True, dtype=dtype, **options)
    true, x, found = copy.deepcopy(module).double(), R(T, 16, I).to(dtype), []
    for of in (module, true):
        results = leaves(of(x.to(of.weight_hh_l0.dtype)))
        loss = sum(result.square().sum() for result in results)
        found.append([*results, *torch.autograd.grad(loss, list(of.parameters())), *of.buffers()])
    within = 8 if dtype == torch.float32 else 16 if module._options.candidate_activation == "relu" else 1.5
    for one, other in zip(*found, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= within * torch.finfo(dtype).eps * other.norm()


@pytest.mark.parametrize("name", ["LiGRU", "LSTM heads"])
def test_compiles_whole(name: str) -> None:
    """In training, with what is written into the statistics."""
    torch._dynamo.reset()
    module, x, found = made(LAYERS[name][0], **LAYERS[name][1]), R(T, B, I), []
    other = copy.deepcopy(module)
    for run, of in ((torch.compile(module, fullgraph=True, backend="aot_eager"), module), (other, other)):
        results = leaves(run(x))
        found.append([*results, *gradients(results, dict(of.named_parameters())), *of.buffers()])
    same(*found, name)


# --- initialisations ----------------------------------------------------------------------------------------------

# By name: what is made, and of chrono_ the gates whose bias is log u, and its negative; None: there is no such gate.
Signs = tuple[tuple[int, ...], tuple[int, ...]] | None
OF_LSTM, OF_GRU, OF_FIRST = ((1,), (0,)), ((1,), ()), ((), (0,))
MADE: dict[str, tuple[Callable[..., Any], dict[str, Any], Signs]] = {
    "nn.LSTM": (nn.LSTM, WAYS, OF_LSTM),
    "nn.LSTM projected": (nn.LSTM, {"proj_size": 4, "num_layers": 2}, OF_LSTM),
    "nn.GRU": (nn.GRU, WAYS, OF_GRU),
    "nn.LSTMCell": (nn.LSTMCell, {}, OF_LSTM),
    "a class of nn.LSTMCell": (type("Mine", (nn.LSTMCell,), {}), {}, OF_LSTM),
    "LSTM heads": (rnnfast.LSTM, {"num_heads": 2, **WAYS}, OF_LSTM),
    "LSTM coupled": (rnnfast.LSTM, {"coupled": True, "peephole": True, **WAYS}, OF_FIRST),
    "GRU heads": (rnnfast.GRU, {"num_heads": 3, **WAYS}, OF_GRU),
    "LiGRU": (rnnfast.LiGRU, WAYS, ((0,), ())),
    "MGU": (rnnfast.MGU, WAYS, OF_FIRST),
    "RNN heads": (rnnfast.RNN, {"num_heads": 2}, None),
    "LSTMCell": (rnnfast.LSTMCell, {"num_heads": 2, "coupled": True}, OF_FIRST),
    "GRUCell": (rnnfast.GRUCell, {"num_heads": 2, **NO_RESET}, ((0,), ())),
}


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("gain", [1.0, 0.3])
def test_orthogonal(name: str, gain: float) -> None:
    """Each gate's matrix, and each head's, and nothing else."""
    module = MADE[name][0](I, H, **DOUBLE, **MADE[name][1])
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert rnnfast.init.orthogonal_(module, gain) is module
    for key, value in module.state_dict().items():
        if "weight_hh" not in key:
            assert torch.equal(value, before[key]), key
            continue
        blocks = [block for gate in value.split(H) for block in gate.chunk(MADE[name][1].get("num_heads", 1))]
        for block in blocks:
            same(torch.linalg.svdvals(block), torch.full((block.shape[1],), gain, **DOUBLE), key)
        assert not any(torch.equal(one, other) for one, other in itertools.combinations(blocks, 2))


@pytest.mark.parametrize("name", [name for name, (_, _, signs) in MADE.items() if signs is not None])
def test_chrono(name: str) -> None:
    """log u of the gate that keeps, its negative of the one that lets in, u uniform from 1 to T - 1; nothing else."""
    make, options, (keeps, lets_in) = MADE[name]
    module = make(I, H, **DOUBLE, **options)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    assert rnnfast.init.chrono_(module, 50) is module
    for key, value in module.state_dict().items():
        if not key.startswith("bias"):
            assert torch.equal(value, before[key]), key
            continue
        gates, others = value.split(H), before[key].split(H)
        for gate in set(range(len(gates))) - {*keeps, *lets_in}:
            assert torch.equal(gates[gate], others[gate]), key
        logs = [gates[gate] for gate in keeps] + [-gates[gate] for gate in lets_in]
        if key.startswith("bias_hh"):
            assert not any(log.any() for log in logs)
            continue
        assert all(torch.equal(log, logs[0]) for log in logs)
        assert logs[0].min() >= 0
        assert logs[0].max() <= math.log(49)
        assert len(logs[0].unique()) == H


def test_chrono_is_uniform_in_time() -> None:
    module = rnnfast.init.chrono_(nn.LSTM(1, 1000, bidirectional=True), 11)
    time = module.bias_ih_l0[1000:2000].exp()
    for part, expected in ((time.mean(), 5.5), (time.min(), 1.0), (time.max(), 10.0), (time.std(), 9 / 12**0.5)):
        assert abs(part.item() - expected) < 0.3
    assert not torch.equal(module.bias_ih_l0[:2000], module.bias_ih_l0_reverse[:2000])


LSTM = nn.LSTM(1, 1)
WITH_BIAS = (nn.GRUCell, rnnfast.LSTMCell, rnnfast.MGUCell)
WITHOUT_GATES = (nn.RNN, nn.RNNCell, rnnfast.RNN, rnnfast.RNNCell)
NOT_TO_BE: list[tuple[str, Any, Any, type[Exception], str]] = [
    *(
        (function, module, 9, TypeError, f"module: expected an LSTM, GRU, RNN or one of their cells, got {got}")
        for function in ("orthogonal_", "chrono_")
        for module, got in ((nn.Linear(2, 3), "Linear"), (None, "NoneType"))
    ),
    *(
        (function, LSTM, value, kind, f"{argument}: expected .*, got {re.escape(repr(value))}$")
        for function, argument, more in (("chrono_", "max_steps", (2, -3)), ("orthogonal_", "gain", ()))
        for kind, values in ((ValueError, (float("nan"), float("inf"), *more)), (TypeError, ("a", None, [9])))
        for value in values
    ),
    *(("chrono_", of(1, 1), 9, ValueError, "module: expected one with gates, got an RNN") for of in WITHOUT_GATES),
    *(("chrono_", of(1, 1, False), 9, ValueError, "module: expected one with bias=True") for of in WITH_BIAS),
]


@pytest.mark.parametrize(("function", "module", "value", "kind", "text"), NOT_TO_BE)
def test_initialisations_refuse(function: str, module: Any, value: Any, kind: type[Exception], text: str) -> None:
    """Before anything is written."""
    before = copy.deepcopy(module)
    with pytest.raises(kind, match=f"^rnnfast.init.{function}: {text}"):
        getattr(rnnfast.init, function)(module, value)
    for one, other in zip(module.parameters(), before.parameters(), strict=True) if module is not None else ():
        assert torch.equal(one, other)


# --- what is refused ----------------------------------------------------------------------------------------------

ACT = "candidate_activation"
WRONG: list[tuple[str, str, tuple[Any, ...], type[Exception], str]] = [
    ("LSTM", "num_heads", (1.5, "2", None, True), TypeError, "an int"),
    ("RNN", "num_heads", (0, -2), ValueError, "at least 1"),
    *((kind + c, "num_heads", (4,), ValueError, "a divisor of hidden_size=6") for kind in KINDS for c in ("", "Cell")),
    ("GRU", "reset_gate", (1, None, "no"), TypeError, "a bool"),
    ("GRUCell", ACT, ("sigmoid", None, True), ValueError, "one of 'tanh', 'relu'"),
    ("GRU", "preset", ("dreamer", 3, True, [""]), ValueError, "one of None, 'dreamer_v3', 'light_gru'"),
    ("LiGRU", "batch_norm", (None, "recurrent"), ValueError, "'sequence' with preset='light_gru'"),
]
REFUSED: list[tuple[str, dict[str, Any], Any, str]] = [
    *(
        (cls, {option: value}, kind, f"{option}: expected {expected}, got {value!r}")
        for cls, option, values, kind, expected in WRONG
        for value in values
    ),
    ("LSTM", {"num_heads": 2, "proj_size": 2}, ValueError, "proj_size: expected 0 with num_heads=2, got 2"),
    ("GRU", {**NO_RESET, **BEFORE}, ValueError, "reset_after: expected True with reset_gate=False"),
    *((kind, NO_RESET, ValueError, "reset_gate: expected True: the GRU alone has it") for kind in ("LSTM", "RNNCell")),
    *((kind, RELU, ValueError, f"{ACT}: expected 'tanh': the GRU alone has it") for kind in ("RNN", "LSTM")),
    *((kind, {"preset": "dreamer_v3"}, ValueError, "preset: 'dreamer_v3' is a GRU") for kind in ("LSTM", "RNNCell")),
    ("GRU", {**DREAMER, "norm_eps": 1.0}, ValueError, "norm_eps: expected 0.001 with preset='dreamer_v3', got 1.0"),
    ("LiGRU", {"layer_norm": "joint"}, ValueError, "batch_norm: expected None with layer_norm or cell_norm"),
    ("GRUCell", {"preset": "light_gru"}, (TypeError, ValueError), ""),  # it has no batch norm, by whatever name
]


@pytest.mark.parametrize(("cls", "given", "kind", "text"), REFUSED)
def test_bad_values_are_refused(cls: str, given: dict[str, Any], kind: Any, text: str) -> None:
    with pytest.raises(kind, match=re.escape(f"{cls}: {text}")):
        getattr(rnnfast, cls)(I, H, **given)

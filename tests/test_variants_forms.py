"""Layers with options compute what was published: variant_loops.py has the forms. Every gradient, and the second ones.

What a layer drew in training is drawn here once more, from the same seed, in the order that `layers.run_layers`
documents.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
import variant_loops as loops
from variant_cases import GATES, SEED, dropped, kept, randomise, same, weight_mask

# --- published forms ----------------------------------------------------------------------------------------------

T, B, I, H = 6, 3, 4, 5  # noqa: E741


@dataclasses.dataclass
class Given:
    """What a published form is made of: our module, its parameters without the suffix, and its input and states."""

    module: nn.RNNBase
    p: dict[str, Tensor]
    x: Tensor
    h: Tensor
    c: Tensor

    def by_gate(self, name: str, order: str, ours: str = "ifgo") -> list[Tensor]:
        """A parameter in pieces, one a gate, in the author's order."""
        pieces = dict(zip(ours, self.p[name].chunk(len(ours)), strict=True))
        return [pieces[gate] for gate in order]

    def in_order(self, name: str, order: str, ours: str = "ifgo") -> Tensor:
        return torch.cat(self.by_gate(name, order, ours))

    @property
    def bias(self) -> Tensor:
        return self.p["bias_ih"] + self.p["bias_hh"]

    @property
    def both(self) -> Tensor:
        return torch.cat([self.p["weight_ih"], self.p["weight_hh"]], 1)

    @property
    def states(self) -> tuple[Tensor, ...]:
        return (self.x, self.h, self.c) if isinstance(self.module, rnnfast.LSTM) else (self.x, self.h)

    def mask(self, p: float, *size: int) -> Tensor:
        """Of dropout; ones in evaluation."""
        return dropped(p, *size, like=self.x) if self.module.training else self.x.new_ones(size)

    def kept(self, p: float) -> Tensor:
        """Where zoneout keeps the old state: in training drawn, else everywhere that share of it."""
        if not self.module.training:
            return torch.full((T, B, H), p, dtype=torch.float64)
        return kept(p, T, B, H).double()


def no_bias(given: Given) -> None:
    """For forms whose only bias is that of the norm."""
    for name, parameter in given.module.named_parameters():
        if name.startswith(("bias_ih", "bias_hh")):
            nn.init.zeros_(parameter)


def as_torchaudio(given: Given) -> tuple[Tensor, ...]:
    no_bias(given)
    p = given.p
    g_norm, c_norm = (p["weight_norm"], p["bias_norm"]), (p["weight_norm_c"], p["bias_norm_c"])
    return loops.torchaudio_lstm(p["weight_ih"], p["weight_hh"], g_norm, c_norm, 1e-5, *given.states)


def torchaudios_own(given: Given) -> tuple[Tensor, ...]:
    try:
        rnnt = importlib.import_module("torchaudio.models.rnnt")
    except (ImportError, OSError) as why:  # not there, or built for another torch
        pytest.skip(f"torchaudio: {why}")
    no_bias(given)
    ours = {
        "x2g.weight": "weight_ih", "p2g.weight": "weight_hh", "g_norm.weight": "weight_norm",
        "g_norm.bias": "bias_norm", "c_norm.weight": "weight_norm_c", "c_norm.bias": "bias_norm_c",
    }  # fmt: skip
    theirs = rnnt._CustomLSTM(I, H, layer_norm=True).double()
    weights = {name: given.p[our] for name, our in ours.items()}
    output, (h, c) = torch.func.functional_call(theirs, weights, (given.x, [given.h, given.c]))
    return output, h, c


def as_fastrnns(given: Given) -> tuple[Tensor, ...]:
    p = given.p
    of_i, of_h = (p["weight_norm_ih"], p["bias_ih"]), (p["weight_norm_hh"], p["bias_hh"])
    of_c = (p["weight_norm_c"], p["bias_norm_c"])
    return loops.fastrnns_lstm(p["weight_ih"], p["weight_hh"], of_i, of_h, of_c, *given.states)


def as_haste_lstm(given: Given) -> tuple[Tensor, ...]:
    p = given.p
    kernel, recurrent = (given.in_order(name, "igfo").t() for name in ("weight_ih", "weight_hh"))
    bias = given.in_order("bias_ih", "igfo") + given.in_order("bias_hh", "igfo")
    gamma = [given.in_order(name, "igfo") for name in ("weight_norm_ih", "weight_norm_hh")]
    mask, of_c = 1 - given.kept(0.3) if given.module.training else None, (p["weight_norm_c"], p["bias_norm_c"])
    return loops.haste_lstm(kernel, recurrent, bias, gamma, *of_c, 0.3, mask, *given.states)


def as_haste_gru(given: Given) -> tuple[Tensor, ...]:
    names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_norm_ih", "weight_norm_hh")
    kernel, recurrent, bias, recurrent_bias, *gamma = (given.in_order(name, "zrn", "rzn") for name in names)
    mask = 1 - given.kept(0.3) if given.module.training else None
    return loops.haste_gru(kernel.t(), recurrent.t(), bias, recurrent_bias, gamma, 0.3, mask, *given.states)


def as_dreamer(given: Given) -> tuple[Tensor, ...]:
    """Our z is 1 - update = sigmoid(-(update - 1)): the norm's weight has the other sign, its bias is 1 - beta."""
    no_bias(given)
    linear = torch.cat([given.in_order(name, "rnz", "rzn") for name in ("weight_ih", "weight_hh")], 1)
    r, n, z = given.by_gate("weight_norm", "rnz", "rzn")
    beta_r, beta_n, beta_z = given.by_gate("bias_norm", "rnz", "rzn")
    return loops.dreamer_gru(linear, (torch.cat([r, n, -z]), torch.cat([beta_r, beta_n, 1 - beta_z])), *given.states)


def as_ba(given: Given) -> tuple[Tensor, ...]:
    no_bias(given)
    p = given.p
    return loops.ba_rnn(p["weight_ih"], p["weight_hh"], p["weight_norm"], p["bias_norm"], *given.states)


def as_krueger(given: Given) -> tuple[Tensor, ...]:
    d_h, d_c = given.kept(0.2), given.kept(0.5)
    return loops.zoneout_lstm((given.p["weight_ih"], given.p["weight_hh"], given.bias), d_h, d_c, *given.states)


def as_gal(given: Given) -> tuple[Tensor, ...]:
    z_x, z_h = given.mask(0.4, B, I), given.mask(0.5, B, H)
    return loops.gal_lstm(given.both, given.bias, z_x, z_h, *given.states)


def as_semeniuta(given: Given) -> tuple[Tensor, ...]:
    return loops.semeniuta_lstm(given.both, given.bias, given.mask(0.5, B, H), *given.states)


def as_semeniuta_gru(given: Given) -> tuple[Tensor, ...]:
    """Their z is 1 - ours: of the other sign before the sigmoid."""
    w, u, b_ih, b_hh = (given.by_gate(name, "zrn", "rzn") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    b, d = [-b_ih[0] - b_hh[0], b_ih[1] + b_hh[1], b_ih[2]], given.mask(0.5, B, H)
    return loops.semeniuta_gru([-w[0], *w[1:]], [-u[0], *u[1:]], b, b_hh[2], d, *given.states)


def as_heads(given: Given) -> tuple[Tensor, ...]:
    """As FlashRNN (https://arxiv.org/abs/2412.07752) has heads: each an LSTM of torch.nn of its own, on the same x."""
    found = []
    for n in range(H):
        theirs = nn.LSTM(I, 1, dtype=torch.float64)
        weights = {f"{name}_l0": p[n::H] for name, p in given.p.items()}
        states = tuple(state[None, :, n : n + 1].contiguous() for state in (given.h, given.c))
        output, (h, c) = torch.func.functional_call(theirs, weights, (given.x, states))
        found.append((output, h[0], c[0]))
    return tuple(torch.cat(each, -1) for each in zip(*found, strict=True))


def as_cho(given: Given) -> tuple[Tensor, ...]:
    w, u, b_ih, b_hh = (given.by_gate(name, "rzn", "rzn") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return loops.cho_gru(w, u, [one + other for one, other in zip(b_ih, b_hh, strict=True)], *given.states)


def as_ravanelli(given: Given) -> tuple[Tensor, ...]:
    w, u, b_ih, b_hh = (given.by_gate(name, "zn", "zn") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    return loops.ravanelli_gru(w, u, [one + other for one, other in zip(b_ih, b_hh, strict=True)], *given.states)


def as_merity(given: Given) -> tuple[Tensor, ...]:
    """AWD-LSTM, https://arxiv.org/abs/1708.02182: torch.nn's own layer, given a W_hh whose elements were dropped."""
    weights: dict[str, Tensor] = dict(given.module.named_parameters())
    if given.module.training:
        weight = weights["weight_hh_l0"]
        weights["weight_hh_l0"] = weight * weight_mask(0.4, *weight.shape, like=weight)
    theirs = nn.LSTM(I, H, dtype=torch.float64)
    output, (h, c) = torch.func.functional_call(theirs, weights, (given.x, (given.h[None], given.c[None])))
    return output, h[0], c[0]


def as_greff(given: Given, has_f: bool, peephole: bool) -> tuple[Tensor, ...]:
    ours, order = ("ifgo", "gifo") if has_f else ("igo", "giio")  # without f, anything stands in its place
    w, r, b_ih, b_hh = (given.by_gate(name, order, ours) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    b = [one + other for one, other in zip(b_ih, b_hh, strict=True)]
    p = given.by_gate("weight_peephole", order[1:], ours.replace("g", "")) if peephole else None
    return loops.greff_lstm(w, r, b, p, not has_f, *given.states)


def as_keras(given: Given) -> tuple[Tensor, ...]:
    given.x.data *= 20  # that no piece of the line is left out
    return loops.keras_lstm(given.p["weight_ih"].t(), given.p["weight_hh"].t(), given.bias, *given.states)


_HASTE = {"layer_norm": "separate", "cell_norm": "output", "zoneout": (0.3, 0.0)}
_CANDIDATE = {"recurrent_dropout": 0.5, "dropout_mode": "candidate"}
_BOTH = {"peephole": True, "coupled": True}
FORMS: dict[str, tuple[str, dict[str, Any], Callable[[Given], tuple[Tensor, ...]]]] = {
    "torchaudio": ("LSTM", {"layer_norm": "joint", "cell_norm": "carried"}, as_torchaudio),
    "torchaudio's own": ("LSTM", {"layer_norm": "joint", "cell_norm": "carried"}, torchaudios_own),
    "fastrnns": ("LSTM", {"layer_norm": "separate", "cell_norm": "carried"}, as_fastrnns),
    "haste LSTM": ("LSTM", _HASTE, as_haste_lstm),
    "haste GRU": ("GRU", {"layer_norm": "separate", "zoneout": 0.3}, as_haste_gru),
    "dreamer": ("GRU", {"layer_norm": "joint", "norm_eps": 1e-3}, as_dreamer),
    "layer norm RNN": ("RNN", {"layer_norm": "joint"}, as_ba),
    "zoneout": ("LSTM", {"zoneout": (0.2, 0.5)}, as_krueger),
    "variational": ("LSTM", {"recurrent_dropout": 0.5, "input_dropout": 0.4}, as_gal),
    "candidate LSTM": ("LSTM", _CANDIDATE, as_semeniuta),
    "candidate GRU": ("GRU", _CANDIDATE, as_semeniuta_gru),
    "reset before": ("GRU", {"reset_after": False}, as_cho),
    "light GRU": ("GRU", {"reset_gate": False, "candidate_activation": "relu"}, as_ravanelli),
    "heads": ("LSTM", {"num_heads": H}, as_heads),
    "weight drop": ("LSTM", {"weight_dropout": 0.4}, as_merity),
    "peephole": ("LSTM", {"peephole": True}, lambda given: as_greff(given, True, True)),
    "coupled": ("LSTM", {"coupled": True}, lambda given: as_greff(given, False, False)),
    "peephole coupled": ("LSTM", _BOTH, lambda given: as_greff(given, False, True)),
    "hard sigmoid": ("LSTM", {"gate_activation": "hard_sigmoid"}, as_keras),
}
# Where something is drawn in training; in evaluation it has its expectation.
DRAWING = ["haste LSTM", "haste GRU", "zoneout", "variational", "candidate LSTM", "candidate GRU", "weight drop"]
FORM_RUNS = [(name, True) for name in FORMS] + [(name, False) for name in DRAWING]


@pytest.mark.parametrize(
    ("name", "training"), FORM_RUNS, ids=[f"{name}-{'train' if train else 'eval'}" for name, train in FORM_RUNS]
)
def test_a_published_form(name: str, training: bool) -> None:
    kind, options, form = FORMS[name]
    module = getattr(rnnfast, kind)(I, H, dtype=torch.float64, **options).train(training)
    randomise(module)
    x, h, c = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in ((T, B, I), (B, H), (B, H)))
    parameters = dict(module.named_parameters())
    given = Given(module, {name.removesuffix("_l0"): p for name, p in parameters.items()}, x, h, c)
    torch.manual_seed(SEED)
    expected = form(given)
    torch.manual_seed(SEED)
    output, final = module(x, (h[None], c[None]) if kind == "LSTM" else h[None])
    actual = [output, *(state[0] for state in (final if kind == "LSTM" else (final,)))]
    assert len(expected) == len(actual)
    grads = [torch.randn_like(result) for result in actual]
    wanted = {"x": x, "h": h, **({"c": c} if kind == "LSTM" else {}), **parameters}
    of_ours = torch.autograd.grad(actual, list(wanted.values()), grads)
    of_theirs = torch.autograd.grad(list(expected), list(wanted.values()), grads, materialize_grads=True)
    # What the author does not have was set to zero, where it has a gradient all the same.
    without = [name for name in wanted if name.startswith(("bias_ih", "bias_hh")) and not wanted[name].any()]
    for which, one, other in zip(("output", "h_n", "c_n"), actual, expected, strict=False):
        same(one, other, which)
    for which, one, other in zip(wanted, of_ours, of_theirs, strict=True):
        if which not in without:
            same(one, other, f"gradient of {which}")


def test_the_preset_begins_as_dreamer_does() -> None:
    """Before any training: the norm's weight is one, and its bias zero."""
    module = rnnfast.GRU(I, H, bias=False, preset="dreamer_v3", dtype=torch.float64)
    x, h, c = (torch.randn(size, dtype=torch.float64) for size in ((T, B, I), (B, H), (B, H)))
    given = Given(module, {name.removesuffix("_l0"): p for name, p in module.named_parameters()}, x, h, c)
    linear = torch.cat([given.in_order(name, "rnz", "rzn") for name in ("weight_ih", "weight_hh")], 1)
    ones, zeros = x.new_ones(3 * H), x.new_zeros(3 * H)
    expected, _ = loops.dreamer_gru(linear, (ones, zeros), x, h)
    same(module(x, h[None])[0], expected, "output")


# --- gradients of gradients ---------------------------------------------------------------------------------------

_ALL = {"cell_norm": "carried", "peephole": True, "coupled": True, "zoneout": 0.3, "recurrent_dropout": 0.4}
OF_ONE: list[tuple[str, dict[str, Any]]] = [
    *((kind, {"layer_norm": norm}) for kind in GATES for norm in ("separate", "joint")),
    *((kind, {"layer_norm": norm, "norm": "rms"}) for kind in GATES for norm in ("separate", "joint")),
    *((kind, {"zoneout": 0.4}) for kind in GATES),
    *((kind, {"recurrent_dropout": 0.4}) for kind in GATES),
    *((kind, {"recurrent_dropout": 0.4, "dropout_mode": "candidate"}) for kind in ("LSTM", "GRU")),
    *((kind, {"gate_activation": "hard_sigmoid"}) for kind in ("LSTM", "GRU")),
    ("GRU", {"reset_after": False}),
    ("GRU", {"reset_after": False, "recurrent_dropout": 0.4}),
    ("GRU", {"reset_gate": False}),
    ("GRU", {"candidate_activation": "relu"}),
    *((kind, {"num_heads": 3}) for kind in GATES),
    ("GRU", {"num_heads": 3, "reset_after": False}),
    ("LSTM", {"input_dropout": 0.4}),
    ("LSTM", {"weight_dropout": 0.4}),
    ("LSTM", {"cell_norm": "output"}),
    ("LSTM", {"cell_norm": "carried"}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"coupled": True}),
    ("LSTM", {"layer_norm": "separate", **_ALL}),
    ("LSTM", {"layer_norm": "joint", "norm": "rms", **_ALL}),
]


@pytest.mark.parametrize(
    ("kind", "options"),
    OF_ONE,
    ids=[" ".join([kind, *(f"{n}={v}" for n, v in options.items())]) for kind, options in OF_ONE],
)
@pytest.mark.usefixtures("one_thread")
def test_first_and_second_derivatives(kind: str, options: dict[str, Any]) -> None:
    directions = 2 if len(options) > 3 else 1
    module = getattr(rnnfast, kind)(2, 3, bidirectional=directions == 2, dtype=torch.float64, **options)
    randomise(module)
    names = [name for name, _ in module.named_parameters()]
    states = [torch.randn(directions, 2, 3, dtype=torch.float64) for _ in range(1 + (kind == "LSTM"))]
    tensors = [torch.randn(3, 2, 2, dtype=torch.float64), *states, *(p.detach() for p in module.parameters())]

    def run(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(SEED)
        hx, weights = others[: len(states)], dict(zip(names, others[len(states) :], strict=True))
        output, final = torch.func.functional_call(module, weights, (x, hx if kind == "LSTM" else hx[0]))
        return (output, *(final if kind == "LSTM" else (final,)))

    wanted = tuple(tensor.requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(run, wanted, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, wanted, fast_mode=True)

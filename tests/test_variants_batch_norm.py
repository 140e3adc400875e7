"""Layers with batch norm compute what was published, keep the running statistics of it, and use them in evaluation.

The truth is a loop over lists of sequences of their own lengths, in which nothing is padded: a batch norm there sees
what counts and nothing else. Its parts are the equations of the papers: of "sequence" Laurent et al. 2016,
https://arxiv.org/abs/1510.01378, and Deep Speech 2, https://arxiv.org/abs/1512.02595; of "recurrent" Cooijmans et al.
2017, https://arxiv.org/abs/1603.09025.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_sequence
from torch.testing import assert_close

import rnnfast
from module_cases import leaves
from rnnfast.variants import ops as variant_ops
from tolerances import error
from variant_loops import Layout

DOUBLE = {"dtype": torch.float64}
T, B, I, H = 6, 4, 3, 5  # noqa: E741
ENDS = [3, T, 2, 4]
KINDS = ["LSTM", "GRU", "RNN"]
WHICH = ["sequence", "recurrent"]
WHY = "recurrent batch norm takes statistics over the batch in each step"
SLOW = f"rnnfast: layers with options beyond torch.nn's run through the slow reference implementation: {WHY}"
every_kind = pytest.mark.parametrize("kind", KINDS)
both = pytest.mark.parametrize("which", WHICH)

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:rnnfast. layers with options")]


def R(*size: int) -> Tensor:
    return torch.randn(*size, **DOUBLE)


def same(actual: Tensor, expected: Tensor, what: str) -> None:
    """Of one float64 computation and another."""
    assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda text: f"{what}: {text}")


# --- the loop -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Norms:
    """The batch norms of one direction of one layer.

    Attributes:
        of: the module.
        p: gamma and beta, by name without the suffix of layer and direction.
        running: the statistics, by name without that suffix; brought up to date in training.
    """

    of: Any
    p: dict[str, Tensor]
    running: dict[str, Tensor]

    def __call__(self, kind: str, values: Tensor, number: int | None = None) -> Tensor:
        """Of (n, F), the values that count; number: of the step, where each has statistics of its own."""
        means, variances = self.running[f"running_mean_{kind}"], self.running[f"running_var_{kind}"]
        if number is not None:
            last = len(means) - 1
            means, variances = means[min(number, last)], variances[min(number, last)]
        mean, variance, n, momentum = (
            means.clone(),
            variances.clone(),
            len(values),
            self.of._options.batch_norm_momentum,
        )
        if self.of.training:
            mean = values.sum(0) / n
            variance = (values - mean).pow(2).sum(0) / n
        if self.of.training and n > 1:
            means.copy_((1 - momentum) * means + momentum * mean.detach())
            variances.copy_((1 - momentum) * variances + momentum * (variance.detach() * n / (n - 1)))
        normed = (values - mean) / torch.sqrt(variance + self.of._options.norm_eps)
        return normed * self.p[f"weight_batch_norm_{kind}"] + self.p.get(f"bias_batch_norm_{kind}", 0.0)


def lstm_step(x: Tensor, recurrent: Tensor, b: list[Any], h: Tensor, c: Tensor, norm_c: Any) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + recurrent + b[0] + b[1]).chunk(4, 1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(norm_c(c)), c


def gru_step(x: Tensor, recurrent: Tensor, b: list[Any], h: Tensor, c: Tensor, norm_c: Any) -> tuple[Tensor, Tensor]:
    of_x, of_h = (x + b[0]).chunk(3, 1), (recurrent + b[1]).chunk(3, 1)
    r, z = (torch.sigmoid(of_x[k] + of_h[k]) for k in (0, 1))
    return (1 - z) * torch.tanh(of_x[2] + r * of_h[2]) + z * h, c


def rnn_step(x: Tensor, recurrent: Tensor, b: list[Any], h: Tensor, c: Tensor, norm_c: Any) -> tuple[Tensor, Tensor]:
    return torch.tanh(x + recurrent + b[0] + b[1]), c


STEPS = {"LSTM": lstm_step, "GRU": gru_step, "RNN": rnn_step}


def one_direction(
    kind: str, norms: Norms, rows: list[Tensor], h: Tensor, c: Tensor, backwards: bool
) -> tuple[list[Tensor], Tensor, Tensor]:
    """rows: for each sequence (T_n, I); h, c: (B, H). Steps are numbered as the direction takes them."""
    p, each_step = norms.p, norms.of._options.batch_norm == "recurrent"
    from_x = [row @ p["weight_ih"].t() for row in rows]
    if not each_step:
        from_x = list(norms("ih", torch.cat(from_x)).split([len(row) for row in rows]))
    biases = [p.get("bias_ih", 0.0), p.get("bias_hh", 0.0)]
    every_h, every_c, steps = list(h), list(c), max(len(row) for row in rows)
    outputs = [[h.new_zeros(h.shape[1])] * len(row) for row in rows]
    for number in range(steps):
        t = steps - 1 - number if backwards else number
        there = [n for n, row in enumerate(rows) if t < len(row)]
        x_t = torch.stack([from_x[n][t] for n in there])
        h_t, c_t = (torch.stack([of[n] for n in there]) for of in (every_h, every_c))
        recurrent = h_t @ p["weight_hh"].t()
        if each_step:
            x_t, recurrent = norms("ih", x_t, number), norms("hh", recurrent, number)
        norm_c = (lambda value, number=number: norms("c", value, number)) if each_step else (lambda value: value)
        h_t, c_t = STEPS[kind](x_t, recurrent, biases, h_t, c_t, norm_c)
        for n, new_h, new_c in zip(there, h_t, c_t, strict=True):
            every_h[n], every_c[n], outputs[n][t] = new_h, new_c, new_h
    stacked = [torch.stack(each) if each else h.new_zeros(0, h.shape[1]) for each in outputs]
    return stacked, torch.stack(every_h), torch.stack(every_c)


def all_layers(
    kind: str, module: Any, running: dict[str, Tensor], rows: list[Tensor], h0: Tensor, c0: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Every layer and direction of what `module` computes, with those statistics."""
    parameters, final_h, final_c = dict(module.named_parameters()), [], []
    for layer in range(module.num_layers):
        by_way = []
        for d, way in enumerate(("", "_reverse")[: 1 + module.bidirectional]):
            suffix, number = f"_l{layer}{way}", len(final_h)
            own, kept = (
                {name.removesuffix(suffix): value for name, value in of.items() if name.endswith(suffix)}
                for of in (parameters, running)
            )
            outputs, h, c = one_direction(kind, Norms(module, own, kept), rows, h0[number], c0[number], d == 1)
            by_way.append(outputs)
            final_h.append(h)
            final_c.append(c)
        rows = [torch.cat(each, 1) for each in zip(*by_way, strict=True)]
    return rows, torch.stack(final_h), torch.stack(final_c)


# --- held against the layers --------------------------------------------------------------------------------------


def made(kind: str, which: str, input_size: int = I, hidden_size: int = H, **arguments: Any) -> Any:
    """No parameter and no statistic stays at a value that would hide what it does."""
    module = getattr(rnnfast, kind)(input_size, hidden_size, batch_norm=which, **{**DOUBLE, **arguments})
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        nn.init.uniform_(value, -0.5, 0.5)
        if name.startswith(("weight_batch_norm", "running_var")):
            value.data += 1
    return module


def loss_of(results: Any) -> Any:
    return sum((result * torch.linspace(-1, 1, result.numel(), **DOUBLE).view_as(result)).sum() for result in results)


def check_call(kind: str, module: Any, layout: Layout) -> None:
    """Results, every gradient, and the statistics after the call."""
    count, batch = module.num_layers * (1 + module.bidirectional), len(layout.ends)
    x, h, c = (v.requires_grad_() for v in (R(layout.steps, batch, I), R(count, batch, H), R(count, batch, H)))
    wanted = {"x": x, "h": h} | ({"c": c} if kind == "LSTM" else {}) | dict(module.named_parameters())
    running = {name: value.clone() for name, value in module.named_buffers()}
    rows = [x[:end, n] for n, end in enumerate(layout.ends)]
    outputs, *states = all_layers(kind, module, running, rows, h, c)
    padded = torch.stack([nn.functional.pad(o, (0, 0, 0, layout.steps - len(o))) for o in outputs], 1)
    expected = [padded, *states][: 2 + (kind == "LSTM")]
    # What stands beyond a row's length is nobody's.
    beyond = torch.arange(layout.steps)[:, None] >= torch.tensor(layout.ends)
    given = layout.given(x.masked_fill(beyond[..., None], float("nan")))
    options = {} if layout.packed or min(layout.ends) == layout.steps else {"lengths": layout.ends}
    output, final = module(given, (h, c) if kind == "LSTM" else h, **options)
    actual = [layout.padded(output), *leaves(final)]
    for name, one, other in zip(("output", "h_n", "c_n"), actual, expected, strict=False):
        same(one, other, name)
    for name, value in module.named_buffers():
        same(value, running[name], name)
    ours, theirs = (torch.autograd.grad(loss_of(results), list(wanted.values())) for results in (actual, expected))
    for name, one, other in zip(wanted, ours, theirs, strict=True):
        same(one, other, f"gradient of {name}")


LAYOUTS = {
    "dense": Layout("dense", T, [T] * B),
    "batch first": Layout("batch_first", T, [T] * B),
    "lengths": Layout("dense", T, [4, T, 0, 2]),
    "lengths batch first": Layout("batch_first", T, [1, T, 4, 4]),
    "packed": Layout("packed", T, [T, 5, 3, 1]),
    "packed unsorted": Layout("packed unsorted", T, [2, T, 3, 5]),
}
# What beside the loop's equations is not at its default.
OPTIONS: dict[str, dict[str, Any]] = {"LSTM": {"norm_eps": 1e-2}, "GRU": {"bias": False}, "RNN": {}}
CASES = [("LSTM", name) for name in LAYOUTS] + [
    (kind, name) for kind in KINDS[1:] for name in ("dense", "lengths", "packed unsorted")
]


@both
@pytest.mark.parametrize(("kind", "name"), CASES, ids=map(" ".join, CASES))
def test_is_as_published(kind: str, name: str, which: str) -> None:
    """Three training steps, with other lengths each, and then evaluation with what they left."""
    layout = LAYOUTS[name]
    options = OPTIONS[kind] | {"bidirectional": True, "batch_first": layout.name == "batch_first"}
    options |= {"num_layers": 2} if which == "sequence" or name == "lengths" else {}
    options |= {"batch_norm_momentum": 0.3} if name != "dense" else {}
    # Fewer than there are steps: those beyond share the last.
    options |= {"batch_norm_steps": T - 2} if which == "recurrent" and name != "packed" else {}
    module = made(kind, which, **options)
    for by in range(3):
        turned = [*layout.ends[by:], *layout.ends[:by]]
        check_call(kind, module, layout if name == "packed" else dataclasses.replace(layout, ends=turned))
    check_call(kind, module.eval(), layout)


BESIDE: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in KINDS),
    ("LSTM", {"zoneout": 0.3, "peephole": True, "coupled": True}),
    ("LSTM", {"num_heads": 5, "recurrent_dropout": 0.4, "weight_dropout": 0.2}),
    ("GRU", {"reset_after": False, "gate_activation": "hard_sigmoid"}),
    ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.4, "dropout_mode": "candidate"}),
]


@pytest.mark.parametrize(("kind", "options"), BESIDE, ids=[" ".join([kind, *options]) for kind, options in BESIDE])
def test_sequence_is_torchs_batch_norm_before_a_layer(kind: str, options: dict[str, Any]) -> None:
    """A product, torch.nn.BatchNorm1d over all steps and rows, and a layer that takes it as it is: torch.nn's own, or
    with other options ours."""
    module = made(kind, "sequence", batch_norm_momentum=0.2, norm_eps=1e-3, **options)
    width = len(module.weight_hh_l0)
    norm = nn.BatchNorm1d(width, eps=1e-3, momentum=0.2, **DOUBLE)
    plain = getattr(rnnfast if options else nn, kind)(width, H, **DOUBLE, **options)
    given = {name: p for name, p in module.named_parameters() if "batch_norm" not in name}
    given["weight_ih_l0"] = torch.eye(width, **DOUBLE)
    for name in ("running_mean", "running_var"):
        norm.get_buffer(name).copy_(module.get_buffer(f"{name}_ih_l0"))
    norm.weight = module.weight_batch_norm_ih_l0
    for step in range(4):
        for each in (module, norm, plain):
            each.train(step < 3)
        x = R(T, B, I)
        product = norm((x @ module.weight_ih_l0.t()).reshape(T * B, -1)).view(T, B, -1)
        torch.manual_seed(step)
        actual = leaves(module(x))
        torch.manual_seed(step)
        expected = leaves(functional_call(plain, given, product))
        grads = [torch.autograd.grad(loss_of(of), list(module.parameters())) for of in (actual, expected)]
        ours = [*actual, *grads[0], *module.buffers()]
        for one, other in zip(ours, [*expected, *grads[1], norm.running_mean, norm.running_var], strict=True):
            same(one, other, f"step {step}")


@every_kind
@both
def test_begins_as_documented(kind: str, which: str) -> None:
    """gamma is 1, of a recurrent one 0.1; beta is 0; the statistics are those of nothing: mean 0 and variance 1."""
    module = getattr(rnnfast, kind)(I, H, bidirectional=True, batch_norm=which)
    widths, steps = {"ih": {"LSTM": 4, "GRU": 3, "RNN": 1}[kind] * H}, ()
    if which == "recurrent":
        widths |= {"hh": widths["ih"]} | ({"c": H} if kind == "LSTM" else {})
        steps = (100,)
    expected: dict[str, Tensor] = {}
    for suffix in ("_l0", "_l0_reverse"):
        for of, width in widths.items():
            expected[f"weight_batch_norm_{of}{suffix}"] = torch.full((width,), 1.0 if which == "sequence" else 0.1)
            expected[f"running_mean_{of}{suffix}"] = torch.zeros(*steps, width)
            expected[f"running_var_{of}{suffix}"] = torch.ones(*steps, width)
        expected |= {f"bias_batch_norm_c{suffix}": torch.zeros(H)} if "c" in widths else {}
    plain = getattr(nn, kind)(I, H, bidirectional=True).state_dict()
    assert module.state_dict().keys() == plain.keys() | expected.keys()
    for _ in range(2):
        assert all(torch.equal(module.state_dict()[name], value) for name, value in expected.items())
        module(torch.randn(T, B, I))
        assert not torch.equal(module.running_mean_ih_l0, expected["running_mean_ih_l0"])
        module.reset_parameters()


# --- few rows, and steps ------------------------------------------------------------------------------------------


@every_kind
@both
@pytest.mark.parametrize("lengths", [[0, 0, 0, 0], [0, 1, 0, 0]], ids=["no row", "one row"])
def test_no_variance_leaves_the_statistics(kind: str, which: str, lengths: list[int]) -> None:
    """Where no row counts, the states are those given; of one row there is no variance, and its norm is beta."""
    module, h, c = made(kind, which), R(1, B, H).requires_grad_(), R(1, B, H)
    before, given = [value.clone() for value in module.buffers()], torch.full((T, B, I), float("nan"), **DOUBLE)
    given[0, 1] = 1.0
    output, final = module(given, (h, c) if kind == "LSTM" else h, lengths=lengths)
    assert all(torch.equal(one, two) for one, two in zip(module.buffers(), before, strict=True))
    kept = [n for n in range(B) if not lengths[n]]
    for state, start in zip(leaves(final), (h, c), strict=False):
        assert torch.equal(state[:, kept], start[:, kept])
    assert not output[1:].any()
    if lengths[1]:
        p = {name.removesuffix("_l0"): value for name, value in module.named_parameters()}
        nothing = torch.zeros(1, len(module.weight_ih_l0), **DOUBLE)
        recurrent = h[:, 1] @ p["weight_hh"].t() if which == "sequence" else nothing
        beta = p.get("bias_batch_norm_c")
        norm_c = (lambda value: value) if which == "sequence" else (lambda value: torch.zeros_like(value) + beta)
        expected, _ = STEPS[kind](nothing, recurrent, [p["bias_ih"], p["bias_hh"]], h[:, 1], c[:, 1], norm_c)
        same(output[0, 1], expected[0], "output")
    loss_of([output, *leaves(final)]).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in [*module.parameters(), h])


@both
def test_one_row_is_refused_in_training(which: str) -> None:
    """As torch.nn.BatchNorm1d refuses it; and a batch of none leaves the statistics as they were."""
    for given in (R(1, 1, I), R(1, I), *([pack_sequence([R(1, I)])] if which == "sequence" else [])):
        module = made("LSTM", which)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
            module(given)
        module.eval()(given)
    module = made("GRU", which)
    before = [value.clone() for value in module.buffers()]
    assert module(R(T, 0, I))[0].shape == (T, 0, H)
    assert all(torch.equal(one, two) for one, two in zip(module.buffers(), before, strict=True))


@every_kind
def test_each_step_has_its_statistics(kind: str) -> None:
    """With a momentum of one they are those of the last batch; steps that it does not have stay as they were."""
    module = made(kind, "recurrent", batch_norm_momentum=1.0, batch_norm_steps=T + 2)
    before, x = module.running_mean_ih_l0.clone(), R(T, B, I)
    module(x)
    variance, mean = torch.var_mean(x @ module.weight_ih_l0.t(), 1)
    same(module.running_mean_ih_l0[:T], mean, "mean")
    same(module.running_var_ih_l0[:T], variance, "variance")
    assert torch.equal(module.running_mean_ih_l0[T:], before[T:])


def test_later_steps_share_the_last_statistics() -> None:
    """Evaluated on longer sequences than there are statistics: those of the last step serve on."""
    short, long = (made("LSTM", "recurrent", batch_norm_steps=steps).eval() for steps in (3, T))
    for name, value in short.state_dict().items():
        more = [value[-1:].expand(T - 3, -1)] if name.startswith("running") else []
        long.state_dict()[name].copy_(torch.cat([value, *more]))
    x = R(T, B, I)
    same(short(x)[0], long(x)[0], "output")
    long.running_var_ih_l0[-1] += 1
    assert error(short(x)[0][:-1], long(x)[0][:-1]) < 1e-12 < error(short(x)[0], long(x)[0])


@both
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_padding_does_not_matter(which: str, training: bool) -> None:
    """More steps that no row has change nothing, in either direction."""
    module = made("LSTM", which, bidirectional=True).train(training)
    other, x = copy.deepcopy(module), R(T, B, I)
    output, final = module(x, lengths=ENDS)
    longer, same_final = other(torch.cat([x, R(3, B, I)]), lengths=ENDS)
    for one, two in zip([longer[:T], *same_final, *other.buffers()], [output, *final, *module.buffers()], strict=True):
        same(one, two, "padded")


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_lengths_that_are_all_the_steps_change_nothing(which: str, dtype: torch.dtype) -> None:
    """Where the sum of what is normalised is more than float16 can hold, too."""
    module, x = made("GRU", which, dtype=dtype, bias=False), (10 + 10 * R(T, 512, I)).to(dtype)
    for name in ("weight_ih_l0", "weight_batch_norm_ih_l0"):
        getattr(module, name).data.abs_().add_(1)
    other = copy.deepcopy(module)
    assert 512 * (x[0] @ module.weight_ih_l0.t()).mean() > torch.finfo(torch.float16).max / T
    one, two = leaves(module(x)), leaves(other(x, lengths=[T] * 512))
    for actual, expected in zip([*two, *other.buffers()], [*one, *module.buffers()], strict=True):
        assert error(actual, expected) <= 4 * torch.finfo(dtype).eps * max(1.0, expected.abs().max().item())


# --- a module like any other --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("given", [(None, None), (None, ENDS), (ENDS, None), (ENDS, ENDS[::-1])], ids=str)
def test_two_calls_and_one_backward(which: str, given: tuple[Any, Any]) -> None:
    """What a call does to the statistics is of no matter to the gradients of those before it."""
    module, separate, total = made("LSTM", which), [], torch.zeros(())
    for lengths in given:
        x, twin = R(T, B, I), copy.deepcopy(module)
        total = total + module(x, lengths=lengths)[0].square().sum()
        separate.append(torch.autograd.grad(twin(x, lengths=lengths)[0].square().sum(), list(twin.parameters())))
    total.backward()
    for p, *each in zip(module.parameters(), *separate, strict=True):
        same(p.grad, sum(each), "gradient")


@every_kind
@both
def test_a_state_dict_goes_round(kind: str, which: str) -> None:
    """With the running statistics, which evaluation needs, and does not write."""
    module, other = (made(kind, which, num_layers=2, bidirectional=True) for _ in range(2))
    before = [value.clone() for value in module.buffers()]
    with torch.no_grad():
        module(R(T, B, I))
    assert not any(torch.equal(one, two) for one, two in zip(module.buffers(), before, strict=True))
    torch.save(module.state_dict(), stored := io.BytesIO())
    stored.seek(0)
    other.load_state_dict(torch.load(stored, weights_only=True))
    x, trained = R(T, B, I), [value.clone() for value in module.buffers()]
    module.eval()
    for lengths in (None, ENDS):
        expected = leaves(module(x, lengths=lengths))
        for twin in (other.eval(), copy.deepcopy(module)):
            for one, two in zip(
                [*leaves(twin(x, lengths=lengths)), *twin.buffers()], [*expected, *trained], strict=True
            ):
                assert torch.equal(one, two)
    missing = {name: value for name, value in module.state_dict().items() if name != "running_var_ih_l1_reverse"}
    with pytest.raises(RuntimeError, match=r'Missing key.*: "running_var_ih_l1_reverse"'):
        other.load_state_dict(missing)


# By how many of a type's eps a result may be off: of 16 bits, and of float32. A recurrent norm divides by what little
# variance there is in a step, again and again: over seeds most are within a fifth of this.
WITHIN = {"sequence": (3, 20), "recurrent": (60, 200)}


@both
@pytest.mark.parametrize("lengths", [None, [6, 3, 0, 4] * 8], ids=["dense", "lengths"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types_are_near_float64(which: str, dtype: torch.dtype, lengths: Any) -> None:
    """Results, gradients and statistics."""
    module = made("LSTM", which, I, 8, bidirectional=True, dtype=dtype)
    true = copy.deepcopy(module).double()
    names = ["output", "h_n", "c_n", *dict(module.named_parameters()), *dict(module.named_buffers())]
    for training in (True, False):
        x, found = (1 + 2 * R(T, 32, I)).to(dtype), []
        for of in (module.train(training), true.train(training)):
            results = leaves(of(x.to(of.weight_hh_l0.dtype), lengths=lengths))
            loss = sum(result.square().sum() for result in results)
            found.append([*results, *torch.autograd.grad(loss, list(of.parameters())), *of.buffers()])
        for name, one, other in zip(names, *found, strict=True):
            assert one.dtype == dtype
            own = error(one, other) / max(1.0, other.abs().max().item()) / torch.finfo(dtype).eps
            assert own <= WITHIN[which][dtype is torch.float32], f"{name}: {own:.3g} eps"


@both
def test_autocast_keeps_statistics_in_their_type(which: str) -> None:
    module, x = made("LSTM", which, dtype=torch.float32), torch.randn(T, B, I)
    true = copy.deepcopy(module)
    true(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x)[0]
    output.float().square().sum().backward()
    assert output.dtype == torch.bfloat16
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in module.parameters())
    for name, value in module.named_buffers():
        assert_close(value, true.get_buffer(name), rtol=0, atol=0.05)


@both
@pytest.mark.parametrize(("kind", "lengths"), [("LSTM", None), ("LSTM", [1, 2, 2]), ("GRU", [1, 2, 2]), ("RNN", None)])
def test_first_and_second_derivatives(kind: str, which: str, lengths: Any) -> None:
    module = made(kind, which, 2, 2)
    names, count = [name for name, _ in module.named_parameters()], 1 + (kind == "LSTM")

    def run(x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        hx, weights = others[:count], dict(zip(names, others[count:], strict=True))
        given = (x, tuple(hx) if count == 2 else hx[0])
        return tuple(leaves(functional_call(module, weights, given, {"lengths": lengths})))

    tensors = R(2, 3, 2), *(R(1, 3, 2) for _ in range(count)), *module.parameters()
    wanted = tuple(tensor.detach().requires_grad_() for tensor in tensors)
    assert torch.autograd.gradcheck(run, wanted, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, wanted, fast_mode=True)


# --- what is said, and what is refused ----------------------------------------------------------------------------


def test_recurrent_batch_norm_says_once_that_it_is_slow() -> None:
    variant_ops._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made("LSTM", "sequence")(R(T, B, I))
        with rnnfast.backend("reference"):
            made("LSTM", "recurrent")(R(T, B, I))
        assert not caught
        for kind in [*KINDS, *KINDS]:
            made(kind, "recurrent", bidirectional=True)(R(T, B, I))
    assert [(each.category, str(each.message)) for each in caught] == [(UserWarning, SLOW)]


@every_kind
def test_explain_says_what_runs(kind: str) -> None:
    found = rnnfast.explain(made(kind, "recurrent"), R(T, B, I))
    assert (found.backend, found.reason) == ("reference", WHY)
    found = rnnfast.explain(made(kind, "sequence"), R(T, B, I))
    assert (found.backend, found.reason) == ("cpu", "has batch_norm='sequence'")


PART, OF, COUNT = "batch_norm_momentum", "batch_norm", "batch_norm_steps"
NAN, INF = float("nan"), float("inf")
# By option, and what else is given: what of another type and out of bounds it gets, and what it expects then.
WRONG: list[tuple[str, dict[str, Any], tuple[Any, ...], tuple[Any, ...], str, str]] = [
    (OF, {}, (), ("batch", True, 1, ["sequence"]), "", "one of None, 'sequence', 'recurrent'"),
    (PART, {OF: "sequence"}, ("a", True, None, [0.5]), (-0.1, 1.5, NAN, INF), "a number", "number from 0 to 1"),
    (COUNT, {OF: "recurrent"}, (1.0, "2", True, None), (0, -1), "an int", "at least 1"),
    ("norm_eps", {OF: "recurrent"}, ("a", None), (-1.0, NAN), "a number", "number of at least 0"),
]
# Of the text, ".." stands for anything.
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(
        ("GRU", {**others, option: value}, kind, f"{option}: expected ..{expected}, got {value!r}")
        for option, others, types, values, of_type, of_range in WRONG
        for kind, wrong, expected in ((TypeError, types, of_type), (ValueError, values, of_range))
        for value in wrong
    ),
    *(
        ("GRU", {OF: which, "layer_norm": "joint"}, ValueError, f"{OF}: expected None with layer_norm")
        for which in WHICH
    ),
    ("LSTM", {OF: "sequence", "cell_norm": "output"}, ValueError, f"{OF}: expected None with layer_norm or cell_norm"),
    ("LSTM", {OF: "sequence", "proj_size": 2}, ValueError, "proj_size: expected 0 with batch_norm='sequence', got 2"),
    # There r stands between h and the product that is normalised.
    ("GRU", {OF: "recurrent", "reset_after": False}, ValueError, f"{OF}: expected"),
    ("GRU", {PART: 0.2}, ValueError, f"{PART}: goes with batch_norm='sequence' or 'recurrent'"),
    ("GRU", {COUNT: 5, OF: "sequence"}, ValueError, f"{COUNT}: goes with batch_norm='recurrent'"),
    *(
        (f"{kind}Cell", {option: value}, TypeError, f"{option}: an option of layers alone")
        for kind in KINDS
        for option, value in ((OF, "sequence"), (PART, 0.2), (COUNT, 5))
    ),
]


@pytest.mark.parametrize(("cls", "given", "kind", "text"), REFUSED)
def test_bad_values_are_refused(cls: str, given: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind, match=re.escape(f"{cls}: {text}").replace(r"\.\.", ".*")):
        getattr(rnnfast, cls)(I, H, **given)

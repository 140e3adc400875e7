"""Layers with options by the Triton kernels, in Triton's interpreter.

What they compute: the random combinations of test_variants.py, against loops in plain PyTorch, a row at a time. Then
what is the kernels' own: tiles, turns, types, what forward keeps for backward, what their ops refuse.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
import test_variants
from rnnfast.variants import ops as variant_ops
from rnnfast.variants import reference
from rnnfast.variants.reference import Arguments, Masks, Weights
from test_variants_refusals import OF_CALLS, OF_OPS, WRONG_CALLS, arguments, as_leaf, changed, raised
from tolerances import error
from triton_interpreter import triton_problem
from variant_layers import EXACT, LENGTHS, OWN_LOOP, SEED, WAYS, B, I, R, T, loss_of, made, run, same

if (_why := triton_problem()) is not None:
    pytest.skip(_why, allow_module_level=True)

from triton.runtime.interpreter import InterpretedFunction

from rnnfast.triton import graphs, plan, variant_layers, variant_step

LSTM, GRU = 4, 3


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with rnnfast.backend("triton"):
        yield


def by_reference(compute: Callable[[], Any]) -> Any:
    with rnnfast.backend("reference"):
        return compute()


# --- what they compute --------------------------------------------------------------------------------------------


# Together they have every option that the kernels see, masks with their gradients, and four kinds of cell.
USUAL = {7, 11, 16, 18, 22, 30, 35, 37}


@pytest.mark.parametrize(
    "number",
    [number if number in USUAL else pytest.param(number, marks=pytest.mark.exhaustive) for number in range(40)],
)
def test_any_combination(number: int) -> None:
    test_variants.check_exactly(number)


@pytest.mark.parametrize("options", [{}, {"num_heads": 3}])
def test_slstm(options: dict[str, Any]) -> None:
    layer, lengths = rnnfast.SLSTM(I, 6, dtype=torch.float64, bidirectional=True, **options), torch.tensor(LENGTHS)
    torch.nn.init.uniform_(layer.bias_hh_l0, -3, 3)
    x, states = R(T, B, I), [R(2, B, 6) for _ in range(2)]
    states.append(R(2, B, 6).exp())
    states.append(R(2, B, 6))
    resets = torch.rand(T, B) < 0.3

    def results() -> list[Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in (x, *states)]
        output, final = layer(leaves[0], tuple(leaves[1:]), lengths=lengths, resets=resets)
        every = [output, *final]
        # m is a matter of how n is divided: what it says with n is in the others.
        return [*every, *torch.autograd.grad(loss_of([output, final[0]]), [*leaves[:2], *layer.parameters()])]

    same(results(), by_reference(results), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["LSTM", "LiGRU"])
def test_batch_norm_of_the_input(kind: str) -> None:
    """Whose time loop is the kernels'."""
    layer = getattr(rnnfast, kind)(I, 5, dtype=torch.float64, **{"LSTM": {"batch_norm": "sequence"}}.get(kind, {}))
    x, lengths = R(T, B, I), torch.tensor(LENGTHS)
    same(run(layer, x, lengths=lengths), by_reference(lambda: run(layer, x, lengths=lengths)), **EXACT)


@pytest.mark.parametrize("name", OWN_LOOP)
def test_explain_and_ops_say_what_runs(name: str) -> None:
    layer, x = made(name), R(T, B, I)
    launches = "four" if name == "GRU reset before" else "two"
    found = rnnfast.explain(layer, x)
    assert (found.backend, found.kernel) == (
        "triton", f"{launches} launches a step for layers with options (Triton), one direction a call",
    )  # fmt: skip
    (kept,) = arguments_of_backward(layer, x)
    assert len(kept) == len(torch.ops.rnnfast_triton.variant_backward.default._schema.arguments)


def arguments_of_backward(layer: Any, x: Tensor) -> list[list[Any]]:
    """Of each `variant_backward` that runs, by whatever backend, all of them."""
    kept: list[list[Any]] = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "variant_backward" in str(func):
                # The dispatcher leaves out those at the end that are None.
                kept.append([*args, *[None] * (len(func._schema.arguments) - len(args))])
            return func(*args, **(kwargs or {}))

    with Recorder():
        run(layer, x)
    return kept


# --- of the kernels -----------------------------------------------------------------------------------------------


def random_call(rng: random.Random, mode: str, size: int, batch: int, steps: int, **given: Any) -> Arguments:
    """All that goes together of a cell's options, in one call."""
    count = {"LSTM": LSTM, "GRU": GRU}.get(mode, 1)
    is_lstm, width = mode == "LSTM", count * size
    weights: dict[str, Tensor] = {"weight_norm_hh": 1 + R(width) / 4}
    if mode == "GRU":
        weights["bias_hn"] = R(size)
    if is_lstm:
        weights |= {"weight_norm_c": 1 + R(size) / 4, "bias_norm_c": R(size), "weight_peephole": R(3 * size) / 4}
    masks = {"recurrent": (R(batch, size) > 0) * 2.0, "zoneout_h": R(steps, batch, size) > 1}
    masks = {name: mask if mask.dtype == torch.bool else mask.double() for name, mask in masks.items()}
    base = arguments(mode)
    call = base._replace(
        words=rng.choice(["", "carried"]) if is_lstm else "rms", zoneout_c=0.2 * is_lstm, reverse=rng.random() < 0.5,
        gates=R(steps, batch, width), hx=R(batch, size), cx=R(batch, size) if is_lstm else None,
        weights=Weights(R(width, size) / size**0.5, **weights), masks=Masks(**masks),
    )  # fmt: skip
    return changed(call, given)


def leaves_of(call: Arguments) -> list[Tensor]:
    # What W_hh gets of no step at all is no question that a layer asks.
    weights = call.weights if call.gates.shape[0] else call.weights[1:]
    return [tensor for tensor in (call.gates, call.hx, call.cx, *weights) if tensor is not None]


def with_gradients(call: Arguments, rounded: torch.dtype | None = None) -> list[Tensor]:
    """Results and gradients, for the same cotangents in every type. rounded: to which type these are, by default the
    call's."""
    for leaf in leaves_of(call):
        leaf.requires_grad_()
    results = [result for result in variant_ops.recurrence(call) if result.numel()]
    torch.manual_seed(SEED)
    grads = [torch.randn(result.shape, dtype=torch.float64) / result.numel() ** 0.5 for result in results]
    grads = [grad.to(rounded or result.dtype).to(result.dtype) for grad, result in zip(grads, results, strict=True)]
    found = torch.autograd.grad(results, leaves_of(call), grads, allow_unused=True, materialize_grads=True)
    return [*(each.detach() for each in results), *found]


def cast(call: Arguments, dtype: torch.dtype) -> Arguments:
    def to(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.detach().to(dtype)
        # of Weights and Masks
        return type(value)(*map(to, value)) if isinstance(value, tuple) else value

    return Arguments(*map(to, call))


@pytest.mark.parametrize(
    ("mode", "size", "batch"),
    [("LSTM", 40, 2), ("GRU", 40, 2), ("GRU", 3, 18), pytest.param("LSTM", 3, 18, marks=pytest.mark.exhaustive)],
    ids=["LSTM units", "GRU units", "GRU rows", "LSTM rows"],
)
def test_several_tiles(mode: str, size: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More units than a program takes of a product, or of rows without a norm; more rows than one takes."""
    monkeypatch.setattr(plan, "_ROW_VALUES", 16)
    call = random_call(random.Random(size), mode, size, batch, 2)
    plain = call._replace(weights=call.weights._replace(weight_norm_hh=None, weight_norm_c=None, bias_norm_c=None))
    tiles = [plan.row_tiles(size, torch.float64, whole_rows) for whole_rows in (True, False)]
    assert [(of.batch, of.units) for of in tiles] == [(1, max(16, 64 * (size == 40))), (1, 16)]
    for each in (call, plain):
        same(with_gradients(each), by_reference(lambda each=each: with_gradients(each)), rtol=1e-10, atol=1e-10)


def test_gradients_of_vectors_over_many_turns() -> None:
    """They are summed in pieces: here in two."""
    steps = variant_step.TURNS_SUMMED.value + 6
    call = random_call(random.Random(1), "RNN_TANH", 3, 2, steps)
    same(with_gradients(call), by_reference(lambda: with_gradients(call)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["LSTM", "GRU", "GRU reset", "sLSTM"])
def test_turns_past_the_last_do_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph holds a fixed number of turns: here each call is run with some more."""
    call = random_call(random.Random(2), mode.split()[0].removeprefix("s"), 5, 3, 3)
    if mode == "GRU reset":
        call = changed(call, {"words": "reset_first", "weights": {"weight_norm_hh": None, "bias_hn": None}})
    if mode == "sLSTM":
        call = call._replace(words="exponential", zoneout_c=0.0, lx=R(3, 5), weights=Weights(call.weights.weight_hh))
    call = changed(call, {"sequences": {"lengths": torch.tensor([2, 3, 0]), "resets": torch.rand(3, 3) < 0.4}})
    expected, real = with_gradients(call), graphs.run
    monkeypatch.setattr(graphs, "run", lambda key, values, turns, *rest: real(key, values, turns + 4, *rest))
    same(with_gradients(call), expected)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0)])
def test_no_steps_and_no_rows(mode: str, steps: int, batch: int) -> None:
    call = random_call(random.Random(3), mode, 5, batch, steps)
    same(with_gradients(call), by_reference(lambda: with_gradients(call)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["LSTM", "GRU", "RNN_TANH"])
def test_other_types_are_near_float64(mode: str, dtype: torch.dtype) -> None:
    """The yardstick is the reference in the same type; products of masked states are rounded to 16 bits once more."""
    call = cast(random_call(random.Random(4), mode, 16, 5, 4), dtype)
    actual, yardstick = with_gradients(call), by_reference(lambda: with_gradients(cast(call, dtype)))
    expected = by_reference(lambda: with_gradients(cast(call, torch.float64), dtype))
    for one, own, true in zip(actual, yardstick, expected, strict=True):
        assert one.dtype == dtype
        unit = torch.finfo(dtype).eps * max(1.0, true.abs().max().item())
        assert error(one, true) <= 2 * error(own, true) + unit


def test_wide_sums_stay_in_the_compute_type() -> None:
    """Of 16-bit tensors, over so many rows that a sum in 16 bits would no longer grow."""
    call = random_call(random.Random(5), "GRU", 4, 70, 20)
    call = cast(call._replace(weights=Weights(call.weights.weight_hh, R(4))), torch.bfloat16)
    leaf = call.weights.bias_hn
    assert leaf is not None
    leaf.requires_grad_()
    (grad,) = torch.autograd.grad(variant_ops.recurrence(call)[0].sum(), leaf)
    exact = cast(call, torch.float64)
    wanted = exact.weights.bias_hn
    assert wanted is not None
    wanted.requires_grad_()
    (true,) = torch.autograd.grad(by_reference(lambda: variant_ops.recurrence(exact)[0].sum()), wanted)
    assert error(grad, true) < 0.012 * true.abs().max()


@pytest.mark.parametrize("name", ["LSTM separate", "LSTM joint rms", "GRU separate", "GRU reset before", "RNN joint"])
def test_what_forward_keeps_is_what_the_cpu_keeps(name: str) -> None:
    """Each goes on where the other's forward pass ended."""
    if not rnnfast.backends()["cpu"].available:
        pytest.skip(rnnfast.backends()["cpu"].reason)
    layer, x = made(name).eval(), R(T, B, I)
    found = {}
    spaces = {"cpu": "rnnfast", "triton": "rnnfast_triton"}
    for backend, first in spaces.items():
        with rnnfast.backend(backend):
            (kept,) = arguments_of_backward(layer, x)
        for second in spaces.values():
            found[first, second] = getattr(torch.ops, second).variant_backward(*kept)
    expected = found["rnnfast", "rnnfast"]
    for results in found.values():
        same(list(results), list(expected), rtol=1e-12, atol=1e-12)


# --- of the ops ---------------------------------------------------------------------------------------------------


def test_there_is_one_schema() -> None:
    """Python's, which Triton's ops are defined with, is C++'s."""
    if not rnnfast.backends()["cpu"].available:
        pytest.skip(rnnfast.backends()["cpu"].reason)
    for op in variant_ops.schemas():
        schemas = [
            str(getattr(getattr(torch.ops, space), op).default._schema) for space in ("rnnfast", "rnnfast_triton")
        ]
        assert schemas[0].replace("rnnfast::", "rnnfast_triton::") == schemas[1]


# What the dimensions of gates must be: a single step is not for these kernels, nor called by any layer.
OTHER_WORDS = {
    "gates: expected 2 or 3 dimensions": "expected 3 dimensions",
    "mode: expected one of": "mode: expected LSTM, GRU or an RNN, got 'lstm'",
    "mode: expected LSTM": "mode: expected LSTM, GRU or an RNN, got 'MGU'",
    "expected a tensor of dtype": "expected a floating type",
    "weight_hh: expected the dtype": "weight_hh: expected torch.float32",
    "hx: expected the dtype": "hx: expected torch.float64",
    "weight_hh: expected shape": "weight_hh: expected (G*H",
    "lengths: expected an int64": "lengths: expected 3 int64",
    "resets: expected shape": "resets: expected bool of shape",
    "gates: expected packed rows": "with batch_sizes rows are packed",
    "lengths: expected values from 0 to 5, got 6": "lengths: expected values from 0 to 5",
}


@pytest.mark.parametrize(("text", "mode", "changes"), WRONG_CALLS, ids=OF_CALLS)
def test_wrong_arguments(text: str, mode: str, changes: dict[str, Any]) -> None:
    right = arguments(mode)
    wrong = changed(right, changes)
    text = next((other for begin, other in OTHER_WORDS.items() if text.startswith(begin)), text)
    # Shapes as Python writes them.
    text = text.replace("(7)", "(7,)").replace("(6)", "(6,)").replace("(18)", "(18,)").replace("(24)", "(24,)")
    saved = torch.ops.rnnfast_triton.variant_forward(True, *variant_ops.flat(right))
    for op, given in (
        ("forward", [True]),
        ("backward", [torch.ones_like(saved[0]), *[None] * 4, saved[0], saved[3], *saved[5:]]),
    ):
        call = getattr(torch.ops.rnnfast_triton, f"variant_{op}")
        kind, found = raised(lambda call=call, given=given: call(*given, *variant_ops.flat(wrong)))
        assert kind is RuntimeError
        assert found.startswith(f"rnnfast_triton::variant_{op}: {text}"), found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["LSTM", "GRU reset before"])
def test_opcheck(case: str) -> None:
    given = OF_OPS[case]()
    torch.library.opcheck(
        torch.ops.rnnfast_triton.variant_forward.default, [True, *map(as_leaf, variant_ops.flat(given))]
    )


def test_compiles_whole() -> None:
    torch._dynamo.reset()
    layer, x, lengths = made("GRU reset before", bidirectional=True).eval(), R(T, B, I), torch.tensor(LENGTHS)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    same(run(compiled, x, lengths=lengths), run(layer, x, lengths=lengths), **EXACT)
    torch._dynamo.reset()


def test_second_derivatives() -> None:
    call = random_call(random.Random(6), "LSTM", 3, 2, 2)

    def of_a_gradient() -> list[Tensor]:
        gates, weight = (tensor.clone().requires_grad_() for tensor in (call.gates, call.weights.weight_hh))
        output = variant_ops.recurrence(call._replace(gates=gates, weights=call.weights._replace(weight_hh=weight)))[0]
        (grad,) = torch.autograd.grad(output.square().sum(), gates, create_graph=True)
        return [grad.detach(), *torch.autograd.grad(grad.square().sum(), [gates, weight])]

    same(of_a_gradient(), by_reference(of_a_gradient), **EXACT)


def test_layers_and_directions() -> None:
    layer, x = made("LSTM separate", **WAYS), R(T, B, I)
    same(run(layer, x), by_reference(lambda: run(layer, x)), **EXACT)


def test_every_cell_has_a_variant() -> None:
    for mode in ("LSTM", "GRU", *reference._NONLINEARITIES):
        variant, size = variant_layers.variant_of("x", arguments(mode))
        assert (variant.gates, size) == ({"LSTM": LSTM, "GRU": GRU}.get(mode, 1), 6)


def test_what_overflows_in_a_norm_does_not_pass_for_zero() -> None:
    layer = rnnfast.LSTM(I, 6, layer_norm="joint")
    x = torch.randn(T, B, I) * 1e22
    assert layer(x)[0].isnan().all()
    assert by_reference(lambda: layer(x)[0]).isnan().all()


def test_keys_of_captured_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """They say all that launches depend on beside the table, and nothing more: neither T nor what lies where."""
    keys: list[Any] = []
    monkeypatch.setattr(graphs, "run", lambda key, *_: keys.append(key))

    def key_of(size: int = 5, batch: int = 3, steps: int = 4, mode: str = "GRU", **given: Any) -> Any:
        call = random_call(random.Random(7), mode, size, batch, steps, **given)
        variant_layers.variant_forward(True, *variant_ops.flat(call))
        return keys.pop()

    base = key_of()
    assert hash(base) == hash(key_of(steps=9))
    assert base == key_of(steps=9) == key_of(hx=None) == key_of(eps=0.5)
    others = [
        key_of(size=6), key_of(batch=100), key_of(mode="LSTM"), key_of(zoneout_h=0.5, masks={"zoneout_h": None}),
        key_of(words=""), key_of(masks={"recurrent": None}), key_of(num_heads=5, weights={"weight_hh": R(15, 1)}),
        key_of(words="reset_first", weights={"weight_norm_hh": None, "bias_hn": None}),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


class Replayed:
    """In the place of a CUDA graph, stream and event: launches are noted while a graph is captured, and done again."""

    capturing: Replayed | None = None

    def __init__(self, *_: Any) -> None:
        self.launches: list[Callable[[], None]] = []

    def capture_begin(self, **_: Any) -> None:
        Replayed.capturing = self

    def capture_end(self) -> None:
        Replayed.capturing = None

    def replay(self) -> None:
        for launch in self.launches:
            launch()

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.mark.parametrize("mode", ["LSTM", "GRU reset"])
def test_captured_graphs_serve_other_lengths(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device: the table, of its true size, is all that a replay finds."""
    original = InterpretedFunction.run

    def run(kernel: Any, *given: Any, **named: Any) -> None:
        if Replayed.capturing is not None:
            Replayed.capturing.launches.append(lambda: original(kernel, *given, **named))
        else:
            original(kernel, *given, **named)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(graphs, "_captured", type(graphs._captured)())
    for name in ("CUDAGraph", "Event", "Stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, Replayed)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    made, real = graphs.new_table, graphs.run
    monkeypatch.setattr(graphs, "new_table", lambda _, *size: made(torch.device("cpu"), *size).fill_(-7))
    device = torch.device("cuda", 0)
    monkeypatch.setattr(graphs, "run", lambda key, values, turns, _, launch: real(key, values, turns, device, launch))
    for steps in (9, 10):
        call = random_call(random.Random(8), mode.split()[0], 3, 2, steps)
        if mode == "GRU reset":
            call = changed(call, {"words": "reset_first", "weights": {"weight_norm_hh": None, "bias_hn": None}})
        call = changed(call, {"sequences": {"lengths": torch.tensor([steps, 4]), "resets": R(steps, 2) > 1}})
        same(with_gradients(call), by_reference(lambda call=call: with_gradients(call)), **EXACT)
    assert len(graphs._captured) == 2

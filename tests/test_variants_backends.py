"""Layers with options by kernels for other devices, on the processor: Triton's in its interpreter, the CUDA kernels in
the emulator.

What they compute: the random combinations of test_variants.py, against loops in plain PyTorch, a row at a time; types;
what forward keeps for backward, what their ops refuse. test_triton_variants.py and tests/cpp/test_variant.cpp have what
is each one's own.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
import test_variants
from emulated_library import emulated_problem
from option_calls import (
    arguments_of_backward,
    by_reference,
    cast,
    check_that_masked_zoneout_is_a_choice,
    random_call,
    with_gradients,
)
from rnnfast.variants import ops as variant_ops
from rnnfast.variants.reference import Weights
from setup import CSRC
from test_variants_refusals import OF_CALLS, OF_OPS, WRONG_CALLS, arguments, as_leaf, changed, raised
from tolerances import error
from triton_interpreter import triton_problem
from variant_layers import EXACT, LENGTHS, OWN_LOOP, WAYS, B, I, R, T, loss_of, made, run, same

# By backend: where its ops are, and what explain says of the launches.
NAMESPACES = {"triton": "rnnfast_triton", "emulated": "rnnfast_emulated"}
WORDS = {"triton": "(Triton)", "emulated": "(CUDA, emulated on the processor)"}
PROBLEMS = {"triton": triton_problem, "emulated": emulated_problem}


@pytest.fixture(params=NAMESPACES, autouse=True)
def name_of_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    name: str = request.param
    if (why := PROBLEMS[name]()) is not None:
        pytest.skip(why)
    with rnnfast.backend(name):
        yield name


def op_of(backend: str, name: str) -> Any:
    return getattr(getattr(torch.ops, NAMESPACES[backend]), name)


# --- what they compute --------------------------------------------------------------------------------------------


# For Triton's interpreter, which takes a hundred times as long. Together they have every option that the kernels see,
# masks with their gradients, and four kinds of cell.
USUAL = {7, 11, 16, 18, 22, 30, 35, 37}


@pytest.mark.parametrize(
    ("name_of_backend", "first"),
    [
        *(pytest.param("triton", i, marks=[] if i in USUAL else [pytest.mark.exhaustive]) for i in range(40)),
        *(("emulated", first) for first in range(0, 200, 20)),
    ],
    indirect=["name_of_backend"],
)
def test_any_combination(name_of_backend: str, first: int) -> None:
    for number in range(first, first + (20 if name_of_backend == "emulated" else 1)):
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
def test_explain_and_ops_say_what_runs(name_of_backend: str, name: str) -> None:
    layer, x = made(name), R(T, B, I)
    launches = "four" if name == "GRU reset before" else "two"
    found = rnnfast.explain(layer, x)
    assert (found.backend, found.kernel) == (
        name_of_backend,
        f"{launches} launches a step for layers with options {WORDS[name_of_backend]}, one direction a call",
    )
    (kept,) = arguments_of_backward(layer, x)
    assert len(kept) == len(op_of(name_of_backend, "variant_backward").default._schema.arguments)


# --- of the kernels -----------------------------------------------------------------------------------------------


def test_gradients_of_vectors_over_many_turns(name_of_backend: str) -> None:
    """They are summed in pieces of so many turns: here in two."""
    (turns,) = re.findall(r"constexpr int64_t kTurnsSummed = (\d+);", (CSRC / "variants/params.h").read_text())
    if name_of_backend == "triton":
        from rnnfast.triton import variant_step

        assert variant_step.TURNS_SUMMED.value == int(turns)
    steps = int(turns) + 6
    call = random_call(random.Random(1), "RNN_TANH", 3, 2, steps)
    same(with_gradients(call), by_reference(lambda: with_gradients(call)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
@pytest.mark.parametrize(("steps", "batch"), [(0, 3), (4, 0)])
def test_no_steps_and_no_rows(mode: str, steps: int, batch: int) -> None:
    call = random_call(random.Random(3), mode, 5, batch, steps)
    same(with_gradients(call), by_reference(lambda: with_gradients(call)))


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_zoneout_by_a_mask_is_a_choice(name_of_backend: str, mode: str) -> None:
    check_that_masked_zoneout_is_a_choice(mode)


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
def test_what_forward_keeps_is_what_the_cpu_keeps(name_of_backend: str, name: str) -> None:
    """Each goes on where the other's forward pass ended."""
    if not rnnfast.backends()["cpu"].available:
        pytest.skip(rnnfast.backends()["cpu"].reason)
    layer, x = made(name).eval(), R(T, B, I)
    found = {}
    spaces = {"cpu": "rnnfast", name_of_backend: NAMESPACES[name_of_backend]}
    for backend, first in spaces.items():
        with rnnfast.backend(backend):
            (kept,) = arguments_of_backward(layer, x)
        for second in spaces.values():
            found[first, second] = getattr(torch.ops, second).variant_backward(*kept)
    expected = found["rnnfast", "rnnfast"]
    for results in found.values():
        same(list(results), list(expected), rtol=1e-12, atol=1e-12)


# --- of the ops ---------------------------------------------------------------------------------------------------


# Triton's, whose checks are in Python. A single step is not for those kernels, nor called by any layer.
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
def test_wrong_arguments(name_of_backend: str, text: str, mode: str, changes: dict[str, Any]) -> None:
    right = arguments(mode)
    wrong = changed(right, changes)
    namespace = "rnnfast"
    if name_of_backend == "triton":
        namespace = "rnnfast_triton"
        text = next((other for begin, other in OTHER_WORDS.items() if text.startswith(begin)), text)
        # Shapes as Python writes them.
        text = text.replace("(7)", "(7,)").replace("(6)", "(6,)").replace("(18)", "(18,)").replace("(24)", "(24,)")
    saved = op_of(name_of_backend, "variant_forward")(True, *variant_ops.flat(right))
    for op, given in (
        ("forward", [True]),
        ("backward", [torch.ones_like(saved[0]), *[None] * 4, saved[0], saved[3], *saved[5:]]),
    ):
        call = op_of(name_of_backend, f"variant_{op}")
        kind, found = raised(lambda call=call, given=given: call(*given, *variant_ops.flat(wrong)))
        assert kind is RuntimeError
        assert found.startswith(f"{namespace}::variant_{op}: {text}"), found


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", ["LSTM", "GRU reset before"])
def test_opcheck(name_of_backend: str, case: str) -> None:
    given = OF_OPS[case]()
    op = op_of(name_of_backend, "variant_forward").default
    torch.library.opcheck(op, [True, *map(as_leaf, variant_ops.flat(given))])


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


def test_what_overflows_in_a_norm_does_not_pass_for_zero() -> None:
    layer = rnnfast.LSTM(I, 6, layer_norm="joint")
    x = torch.randn(T, B, I) * 1e22
    assert layer(x)[0].isnan().all()
    assert by_reference(lambda: layer(x)[0]).isnan().all()

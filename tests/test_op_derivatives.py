"""The ops by themselves, as a captured program calls them: their schemas, and that each carries its derivative."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from cases import MODES, Call, make_call, reference
from rnnfast import ops
from rnnfast.autograd import Layer, RecurrenceBackward
from rnnfast.cell_types import CELLS
from rnnfast.signatures import OPS
from rnnfast.triton import availability
from tolerances import check_equal

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason=f"no C++ library: {ops.library_error}")

LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"D": 2},
    "batch first, lengths, resets": {"D": 2, "layout": "batch_first", "lengths": True, "resets": True},
    "packed": {"D": 2, "layout": "packed"},
    "no bias, no states": {"bias": False, "initial": False},
    "one step": {"T": 1},
}
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)
over_modes = pytest.mark.parametrize(
    ("mode", "P"), [(mode, P) for mode in MODES for P in (0, 2) if not P or CELLS[mode].may_project]
)


def random_call(mode: str, P: int, layout: str, dtype: torch.dtype = torch.float64) -> Call:
    call = make_call(mode, P=P, dtype=dtype, **LAYOUTS[layout])
    if layout == "one step":
        call.input = call.input.squeeze(0)
        call.hx = None if call.hx is None else call.hx.squeeze(0)
        call.cx = None if call.cx is None else call.cx.squeeze(0)
    return call


@pytest.mark.parametrize("name", OPS)
def test_both_tables_of_arguments_agree(name: str) -> None:
    schema = OPS[name].schema(f"rnnfast::{name}")
    assert str(getattr(torch.ops.rnnfast, name).default._schema) == schema
    if availability.error is None:
        assert str(getattr(torch.ops.rnnfast_triton, name).default._schema) == schema.replace(
            "rnnfast", "rnnfast_triton", 1
        )


def test_the_functions_name_every_argument_of_their_op() -> None:
    for function, op in ((Layer, "layer_forward"), (RecurrenceBackward, "recurrence_backward")):
        names = OPS[op].names
        assert tuple(inspect.signature(function.forward).parameters)[-len(names) :] == names


def test_no_op_takes_lists() -> None:
    """A list of tensors is emptied by the stable interface, and comes as None where it is empty."""
    for name in [*OPS, "matmul"]:
        schema = getattr(torch.ops.rnnfast, name).default._schema
        assert not [argument for argument in schema.arguments if "List" in str(argument.type)], schema


# The second derivative is the reference's, plain PyTorch with checks of its own.
@pytest.mark.parametrize(
    ("name", "differentiated"), [*((name, False) for name in OPS), ("layer", True), ("layer_forward", True)]
)
def test_a_tensor_without_data_among_others_is_refused(name: str, differentiated: bool) -> None:
    """The dispatcher takes what is registered for tracing there, whose results nobody has filled."""
    for layout in ("batch first, lengths, resets", "packed"):
        call = random_call("LSTM", 2, layout)
        saved = reference.layer_forward("LSTM", call.input, *call.shared)
        first = [*saved[:4], saved[0], *saved[3:]] if name == "recurrence_backward" else [call.input]
        arguments = ["LSTM", *first, *call.shared]
        if differentiated:
            arguments[-2] = arguments[-2].clone().requires_grad_()
        for i, value in enumerate(arguments):
            if not isinstance(value, Tensor):
                continue
            given = [*arguments[:i], value.detach().to("meta"), *arguments[i + 1 :]]
            # The first of all is what the others are compared with.
            named = "hx" if OPS[name].names[i] == "input" else OPS[name].names[2 if i == 1 else i]
            words = "a tensor on the CPU" if value is call.batch_sizes else "the device of"
            with pytest.raises(RuntimeError, match=f"rnnfast::.*: {named}: expected {words}"):
                getattr(torch.ops.rnnfast, name)(*given)
    with pytest.raises(RuntimeError, match="rnnfast::matmul: b: expected the device of"):
        torch.ops.rnnfast.matmul(torch.randn(2, 3), torch.randn(3, 2, device="meta"))


def of_op(name: str, call: Call, namespace: Any, saved: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """One op on a call's tensors. saved: what forward returned, and gradients of it."""
    op = getattr(namespace, name)
    if name == "recurrence_backward":
        return tuple(op(call.mode, *saved, *call.shared))
    return tuple(op(call.mode, call.input, *call.shared))


@over_layouts
@over_modes
@pytest.mark.parametrize("name", OPS)
def test_derivatives_of_every_op(name: str, mode: str, P: int, layout: str) -> None:
    """First and second, of a call that knows nothing of our autograd Functions."""
    call = random_call(mode, P, layout).leaves()
    saved: list[Tensor | None] = []
    if name == "recurrence_backward":
        with torch.no_grad():
            output, h_n, c_n, cell_states, reserve = reference.layer_forward(mode, call.input, *call.shared)
            grads = [torch.randn_like(value) if value.numel() else None for value in (output, h_n, c_n, cell_states)]
        saved = [*grads, output, cell_states, reserve]
        saved = [None if value is None else value.detach().requires_grad_(value.numel() > 0) for value in saved]
    inputs = [tensor for tensor in [*call.tensors().values(), *saved] if tensor is not None and tensor.requires_grad]

    def derivatives(namespace: Any) -> list[Tensor | None]:
        results = of_op(name, call, namespace, tuple(saved))
        # The reserve is not meant for anybody: kernels need not differentiate it.
        count = 4 if name == "layer_forward" else len(results)
        torch.manual_seed(1)
        first = torch.autograd.grad(
            sum((r * torch.randn_like(r)).sum() for r in results[:count]), inputs, allow_unused=True, create_graph=True
        )
        given = [g for g in first if g is not None and g.requires_grad]
        second = torch.autograd.grad(sum(g.sin().sum() for g in given), inputs, allow_unused=True) if given else []
        return [*first, *second]

    for index, (actual, expected) in enumerate(
        zip(derivatives(torch.ops.rnnfast), derivatives(reference), strict=True)
    ):
        if actual is None or expected is None:
            assert actual is None or not actual.any()
            assert expected is None or not expected.any()
        else:
            check_equal(str(index), actual, expected, 1e-9)


@over_layouts
@pytest.mark.parametrize("name", ["layer", "layer_forward"])
def test_opcheck_with_gradients(name: str, layout: str) -> None:
    call = random_call("LSTM", 2, layout).leaves()
    if call.lengths is not None:
        # The reserve is undefined beyond a row's length, and opcheck compares all of it.
        call.lengths.fill_(call.steps)
    arguments = ("LSTM", call.input, *call.shared)
    torch.library.opcheck(getattr(torch.ops.rnnfast, name).default, arguments)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor], Tensor], Tensor]] = {
    "grad": lambda f, x: grad(f)(x),
    "grad of grad": lambda f, x: grad(lambda y: grad(f)(y).pow(2).sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "grad of vmap": lambda f, x: grad(lambda y: vmap(f)(torch.stack([y, 2 * y])).sin().sum())(x),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
    "hessian": lambda f, x: hessian(f)(x),
    "jvp in no_grad": lambda f, x: torch.no_grad()(lambda: jvp(f, (x,), (torch.ones_like(x),))[1])(),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("layout", ["dense", "packed", "one step"])
@pytest.mark.parametrize("name", ["layer", "layer_forward"])
def test_torch_func_on_an_op(name: str, layout: str, transform: str) -> None:
    """As deep as torch.func goes: a level that is passed over gives wrong numbers, or zeros, without a word."""
    call = random_call("LSTM", 2, layout)

    def loss(namespace: Any) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            results = of_op(name, dataclasses.replace(call, input=x), namespace, ())
            return sum((value.sin() * value).sum() for value in results[:3])

        return run

    apply = TRANSFORMS[transform]
    check_equal(transform, apply(loss(torch.ops.rnnfast), call.input), apply(loss(reference), call.input), 1e-10)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell"])
@pytest.mark.filterwarnings("ignore")
def test_torch_func_on_a_program(kind: str, transform: str) -> None:
    module = getattr(rnnfast, kind)(3, 4, dtype=torch.float64)
    x = torch.randn((2, 3) if kind.endswith("Cell") else (5, 2, 3), dtype=torch.float64)

    def loss(program: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            result = program(x)
            return (result if isinstance(result, Tensor) else result[0]).sin().sum()

        return run

    expected = TRANSFORMS[transform](loss(module), x)
    for program in (torch.export.export(module, (x,)).module(), torch.jit.trace(module, (x,))):
        check_equal(transform, TRANSFORMS[transform](loss(program), x), expected, 1e-10)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("LSTM", {}),
        ("LSTM", {"proj_size": 2}),
        ("GRU", {}),
        ("RNN", {}),
        ("LSTM", {"peephole": True, "layer_norm": "separate"}),
        ("GRU", {"num_heads": 2, "reset_after": False}),
    ],
    ids=str,
)
def test_operations_are_counted(kind: str, options: dict[str, Any]) -> None:
    """Two for each multiplication with a weight; backward has each product twice, once for each operand."""
    T, B, I, H = 5, 3, 4, 6  # noqa: E741
    module = getattr(rnnfast, kind)(I, H, bidirectional=True, **options)
    weights = sum(weight.numel() for weight in module.parameters() if weight.dim() == 2)
    x = torch.randn(T, B, I, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        output, _ = module(x)
    assert forward.get_total_flops() == 2 * T * B * weights
    with torch.no_grad(), FlopCounterMode(display=False) as inference:
        module(x)
    assert inference.get_total_flops() == 2 * T * B * weights
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    # Without a state to enter it, the first step has no product for weight_hh's gradient; with options it has zeros.
    recurrent = sum(w.numel() for name, w in module.named_parameters() if name.startswith("weight_hh"))
    has_options = module._options is not None
    assert backward.get_total_flops() == 2 * 2 * T * B * weights - 2 * B * recurrent * (not has_options)

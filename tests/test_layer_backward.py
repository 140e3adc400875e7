"""The op `layer_backward`, a layer's whole backward pass in some steps at a time: against the reference, in as many
chunks as it takes, however rows lie and whoever makes the products."""

from typing import Any

import pytest
import torch
from torch.testing import assert_close

import rnnfast
from rnnfast import autograd, backward_op, ops
from rnnfast.benchmark.timing import peak_memory
from rnnfast.signatures import LayerBackwardArguments
from test_step_ops import MODES

pytestmark = pytest.mark.skipif(ops.library_error is not None, reason="the C++ library is not built")

# Wide enough for three chunks of 256 rows and more, with a last one that is not full; no size that vectors divide.
STEPS, BATCH, IN, HIDDEN = 43, 17, 5, 130
FORMS = ["time-major", "batch first", "packed", "lengths", "resets", "resets, batch first"]


def layer_of(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    return getattr(rnnfast, kind)(IN, HIDDEN, dtype=torch.float64, **options)


def given_to(layer: Any, form: str, dtype: torch.dtype, states: bool = True, steps: int = STEPS) -> tuple[Any, ...]:
    """The arguments of the op for this layer and random data, with every gradient that comes in."""
    layer.to(dtype)
    first = "batch first" in form
    rows = (BATCH, steps) if first else (steps, BATCH)
    lengths = torch.randint(0, steps + 1, (BATCH,))
    sequences: list[Any] = [None, None, None, first]
    input = torch.randn(*rows, IN, dtype=dtype)
    if form == "lengths":
        sequences[1] = lengths
        # Nobody may look at what is beyond a row's end.
        for b, length in enumerate(lengths):
            input[int(length) :, b] = torch.nan
    elif form.startswith("resets"):
        sequences[2] = torch.rand(rows) < 0.1
    elif form == "packed":
        sizes = [int((lengths + 1 > t).sum()) for t in range(int(lengths.max()) + 1)]
        sequences[0] = torch.tensor(sizes)
        input = torch.randn(sum(sizes), IN, dtype=dtype)
    directions, size = 2 if layer.bidirectional else 1, layer.proj_size or HIDDEN
    hx = torch.randn(directions, BATCH, size, dtype=dtype) if states else None
    cx = torch.randn(directions, BATCH, HIDDEN, dtype=dtype) if states and layer.mode == "LSTM" else None
    kinds = ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]
    weights = [getattr(layer, f"{kind}_l0{suffix}", None) for kind in kinds for suffix in ("", "_reverse")]
    weights = [None if weight is None else weight.detach() for weight in weights]
    mode = MODES[type(layer).__name__]
    output, h_n, c_n, cell_states, reserve = torch.ops.rnnfast.layer_forward(mode, input, hx, cx, *sequences, *weights)
    grads = [torch.randn_like(output), torch.randn_like(h_n)]
    grads += [torch.randn_like(c_n), torch.randn_like(cell_states)] if layer.mode == "LSTM" else [None, None]
    return (mode, False, ~(~0 << 13), input, *grads, output, cell_states, reserve, hx, cx, *sequences, *weights)


def run(arguments: tuple[Any, ...], **change: Any) -> tuple[Any, ...]:
    return torch.ops.rnnfast.layer_backward(*changed(arguments, **change))


def changed(arguments: tuple[Any, ...], **change: Any) -> tuple[Any, ...]:
    names = LayerBackwardArguments._fields[:13]
    return tuple(change.get(name, value) for name, value in zip(names, arguments, strict=False)) + arguments[13:]


def assert_same(got: tuple[Any, ...], right: tuple[Any, ...], near: float) -> None:
    for i, (a, b) in enumerate(zip(got, right, strict=True)):
        assert (a is None) == (b is None), i
        if a is not None:
            assert_close(
                a, b, rtol=near, atol=near * max(1.0, float(b.abs().max())), msg=lambda text, i=i: f"{i}: {text}"
            )


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize(("by_aten", "threads"), [(False, 2), (True, 1)], ids=["own products", "ATen's"])
def test_every_gradient(kind: str, form: str, directions: int, by_aten: bool, threads: int) -> None:
    """In float64, against the reference."""
    arguments = given_to(layer_of(kind, bidirectional=directions == 2), form, torch.float64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        got = run(arguments, by_aten=by_aten)
    finally:
        torch.set_num_threads(before)
    assert_same(got, backward_op.by_reference(*arguments), 1e-13)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", [1, 2])
def test_a_projection(form: str, directions: int) -> None:
    arguments = given_to(layer_of("LSTM", bidirectional=directions == 2, proj_size=7), form, torch.float64)
    assert_same(run(arguments), backward_op.by_reference(*arguments), 1e-13)


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("form", ["time-major", "batch first", "packed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types(kind: str, form: str, dtype: torch.dtype) -> None:
    """16-bit types in one chunk: sums of several would take more memory than the gates' gradients."""
    check_type(given_to(layer_of(kind), form, dtype), dtype)


def check_type(arguments: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Against the reference in float64."""
    wide = tuple(
        value.double() if isinstance(value, torch.Tensor) and value.dtype == dtype else value for value in arguments
    )
    near = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}[dtype]
    got = [None if result is None else result.double() for result in run(arguments)]
    assert_same(tuple(got), backward_op.by_reference(*wide), near)


# Three chunks of 1024 rows and more, where every row has every step.
MANY_STEPS = 180


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_types_in_chunks(kind: str, form: str, directions: int, dtype: torch.dtype) -> None:
    layer = layer_of(kind, bidirectional=directions == 2)
    check_type(given_to(layer, form, dtype, steps=MANY_STEPS), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["time-major", "lengths", "without states"])
def test_a_projection_in_16_bits_in_chunks(form: str, dtype: torch.dtype) -> None:
    layer = layer_of("LSTM", bidirectional=True, proj_size=7)
    check_type(given_to(layer, form, dtype, states=form != "without states", steps=MANY_STEPS), dtype)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("steps", [500, STEPS], ids=["three chunks", "one chunk"])
def test_16_bit_gradients_are_rounded_once(isa: str, dtype: torch.dtype, threads: int, steps: int) -> None:
    """The gates' gradients here are those that come in, and the states are biases, without a digit lost: a gradient
    that is then off by more than half a unit of its last digit was rounded before it was all there."""
    layer = rnnfast.RNN(IN, HIDDEN, nonlinearity="relu", dtype=dtype)
    for name, parameter in layer.named_parameters():
        parameter.data = torch.rand_like(parameter) + 0.5 if name == "bias_ih_l0" else torch.zeros_like(parameter)
    input, hx = torch.randn(steps, BATCH, IN).to(dtype), torch.randn(1, BATCH, HIDDEN).to(dtype)
    grad = torch.randn(steps, BATCH, HIDDEN).to(dtype)
    before, isa_before = torch.get_num_threads(), ops.use_cpu_isa("")
    try:
        ops.use_cpu_isa(isa)
        torch.set_num_threads(threads)
        with rnnfast.backend("cpu"):
            output, _ = layer(input, hx)
            output.backward(grad)
    except RuntimeError as error:
        if "use_cpu_isa" not in str(error):
            raise
        pytest.skip(str(error).splitlines()[0])
    finally:
        torch.set_num_threads(before)
        ops.use_cpu_isa(isa_before)
    of_rows = grad.double().flatten(0, 1)
    entered = torch.cat([hx, output.detach()[:-1]]).double().flatten(0, 1)
    for got, rows in (
        (layer.weight_ih_l0.grad, input.double().flatten(0, 1)),
        (layer.weight_hh_l0.grad, entered),
        (layer.bias_ih_l0.grad, torch.ones(len(entered), 1).double()),
        (layer.bias_hh_l0.grad, torch.ones(len(entered), 1).double()),
    ):
        right = (of_rows.t() @ rows).view_as(got)
        away = (got.double() - right).abs()
        # An exponent of the result decides what its last digit is worth. Sums are in float32.
        digit = torch.exp2(right.abs().log2().floor()) * torch.finfo(dtype).eps
        assert (away <= 0.5 * digit + 1e-7 * (of_rows.abs().t() @ rows.abs()).view_as(got)).all()
        assert away.any()


@pytest.mark.parametrize("form", ["time-major", "packed"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "proj_size": 7}, {"bias": False}], ids=str)
def test_one_result_is_the_same_as_that_of_all(form: str, options: dict[str, Any]) -> None:
    arguments = given_to(layer_of("LSTM", **options), form, torch.float32, states=not options.get("bias", True))
    every = run(arguments)
    for i, result in enumerate(every):
        alone = run(arguments, wanted=1 << i)
        assert [value is not None for value in alone] == [i == j and result is not None for j in range(13)]
        if result is not None:
            assert torch.equal(alone[i], result)
    assert run(arguments, wanted=0) == (None,) * 13


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_few_steps_and_rows(kind: str, steps: int, batch: int) -> None:
    layer = layer_of(kind)
    arguments = list(given_to(layer, "time-major", torch.float64))
    for i, value in enumerate(arguments[:13]):
        if isinstance(value, torch.Tensor) and value.dim() == 3:
            rows = value[:steps] if value.size(0) == STEPS else value
            arguments[i] = rows[:, :batch].contiguous()
    got = run(tuple(arguments))
    if steps and batch:
        assert_same(got, backward_op.by_reference(*arguments), 1e-13)
        return
    for result in (got[0], *got[3:]):
        assert result is None or not result.any()
    if batch:
        assert torch.equal(got[1], arguments[5])


def test_layers_take_it_and_what_is_differentiated_twice_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    at_once = autograd._at_once
    monkeypatch.setattr(autograd, "_at_once", lambda *arguments: calls.append(1) or at_once(*arguments))
    layer = rnnfast.GRU(3, 4, dtype=torch.float64)
    input = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    with rnnfast.backend("cpu"):
        layer(input)[0].sum().backward()
        assert len(calls) == 1
        (grad,) = torch.autograd.grad(layer(input)[0].sum(), input, create_graph=True)
        torch.autograd.grad(grad.square().sum(), input)
    assert len(calls) == 1


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_gradients_of_gates_are_never_there_for_all_steps(kind: str, dtype: torch.dtype) -> None:
    layer = getattr(rnnfast, kind)(32, 32, dtype=dtype)
    input = torch.randn(6000, 8, 32, dtype=dtype)
    output = [layer(input)[0]]

    def backward() -> None:
        output.pop().sum().backward()

    of_all = 6000 * 8 * 32 * dtype.itemsize * (4 if kind == "LSTM" else 3)
    with rnnfast.backend("cpu"):
        used = peak_memory(backward, torch.device("cpu"))
    # What the sum's gradient takes, (T, B, H), as it is made contiguous; a chunk and the weights are small.
    assert used is not None
    assert 0 < used < 0.5 * of_all


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "ELMAN"}, "mode: expected one of"),
        ({"input": torch.zeros(STEPS, BATCH + 1, IN)}, "expected shape"),
        ({"input": torch.zeros(STEPS, BATCH, IN + 1)}, "weight_ih: expected shape"),
        ({"input": torch.zeros(STEPS, BATCH, IN, dtype=torch.float64)}, "weight_hh: expected the dtype"),
        ({"output": None}, "output: expected a tensor, got None"),
        ({"cell_states": None}, "cell_states: expected a tensor, got None"),
        ({"reserve": None}, "reserve: expected a tensor, got None"),
        ({"grad_output": torch.zeros(STEPS, BATCH, 1)}, "grad_output: expected shape"),
        ({"grad_h_n": torch.zeros(1, BATCH, 1)}, "grad_h_n: expected shape"),
        ({"grad_c_n": torch.zeros(2, BATCH, HIDDEN)}, "grad_c_n: expected shape"),
        ({"hx": torch.zeros(1, 1, HIDDEN)}, "hx: expected shape"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], message: str) -> None:
    arguments = given_to(layer_of("LSTM"), "time-major", torch.float32)
    with pytest.raises(RuntimeError, match=f"rnnfast::layer_backward: .*{message}"):
        run(arguments, **change)


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("wanted", [~(~0 << 13), 0b1001])
def test_shapes_and_derivatives_of_the_op_by_itself(kind: str, wanted: int) -> None:
    """What programs that call it get: as traced, and differentiated."""
    arguments = changed(given_to(layer_of(kind), "batch first", torch.float64), wanted=wanted)
    real = run(arguments)
    meta = torch.ops.rnnfast.layer_backward(
        *(value.to("meta") if isinstance(value, torch.Tensor) else value for value in arguments)
    )
    shapes = [[None if result is None else result.shape for result in each] for each in (real, meta)]
    assert shapes[0] == shapes[1]
    grad_output = arguments[4].requires_grad_()
    results = run(changed(arguments, grad_output=grad_output))
    assert_same(tuple(None if result is None else result.detach() for result in results), real, 1e-13)
    (twice,) = torch.autograd.grad(results[0].square().sum(), grad_output)
    right = backward_op.by_reference(*changed(arguments, grad_output=grad_output))[0]
    assert_close(twice, torch.autograd.grad(right.square().sum(), grad_output)[0])


def test_sums_of_very_many_rows_keep_their_digits() -> None:
    """One after the other, 256,000 numbers are summed to four digits or five."""
    layer = rnnfast.RNN(1, 1)
    input = torch.rand(1000, 256, 1)
    grads = []
    for dtype in (torch.float32, torch.float64):
        layer.to(dtype)
        layer.zero_grad()
        with rnnfast.backend("cpu"):
            layer(input.to(dtype))[0].sum().backward()
        grads.append([parameter.grad.double() for parameter in layer.parameters()])
    for got, right in zip(*grads, strict=True):
        assert_close(got, right, rtol=1e-6, atol=0)

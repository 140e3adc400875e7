"""Derivatives of a layer: first, second, under every torch.func transform, and what is kept for them."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import rnnfast
from cases import MODES, WITH_CELL_STATE, Call, make_call, random_grads, reference
from emulated_library import emulated_problem
from rnnfast import ops, sequences
from rnnfast.cell_types import CELLS
from rnnfast.functional import run_layers
from tolerances import check_equal

LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {},
    "batch_first": {"layout": "batch_first"},
    "packed": {"layout": "packed"},
    "lengths": {"lengths": True},
    "resets": {"resets": True, "layout": "batch_first"},
    "lengths+resets": {"lengths": True, "resets": True},
}
PROJECTED = [(mode, P) for mode in MODES for P in (0, 2) if not P or CELLS[mode].may_project]
PROJECTED_IDS = [mode + ("-projected" if P else "") for mode, P in PROJECTED]
Results = dict[str, Tensor]
NAMES = ["output", "h_n", "c_n", "cell_states"]

exhaustive = pytest.mark.exhaustive
over_layouts = pytest.mark.parametrize("layout", LAYOUTS)
# The reference has no registered ops.
only_cpu = pytest.mark.parametrize("backend", ["cpu"], indirect=True)
over_modes = pytest.mark.parametrize(("mode", "P"), PROJECTED, ids=PROJECTED_IDS)


@pytest.fixture(params=["reference", "cpu", "emulated"], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "emulated":
        if (why := emulated_problem()) is not None:
            pytest.skip(why)
        with rnnfast.backend("emulated"):
            yield request.param
        return
    available = rnnfast.backends()[request.param]
    if not available.available:
        pytest.skip(f"backend {request.param}: {available.reason}")
    with rnnfast.backend(request.param):
        yield request.param


def flat_weights(call: Call) -> list[Tensor]:
    lists = (call.weight_ih, call.weight_hh, call.bias_ih, call.bias_hh, call.weight_hr)
    return [tensors[d] for d in range(call.directions) for tensors in lists if tensors]


def named(mode: str, results: tuple[Tensor | None, ...]) -> Results:
    kept = NAMES if mode in WITH_CELL_STATE else NAMES[:2]
    return {name: value for name, value in zip(NAMES, results, strict=False) if value is not None and name in kept}


def layer(call: Call, values: list[Tensor] | None = None) -> Results:
    """The call as rnnfast runs it."""
    call = call if values is None else call.with_tensors(values)
    results = run_layers(
        call.mode,
        call.input,
        call.hx,
        call.cx,
        flat_weights(call),
        call.sequences,
        # not bool() of a list, which Dynamo traces from 2.13 on only
        bias=len(call.bias_ih) > 0,
        bidirectional=call.directions == 2,
        training=True,
        return_cell_states=call.mode in WITH_CELL_STATE,
    )
    return named(call.mode, results)


def plain(call: Call, values: list[Tensor] | None = None) -> Results:
    """The call in plain PyTorch, differentiated by PyTorch."""
    call = call if values is None else call.with_tensors(values)
    return named(
        call.mode,
        reference.layer_forward(call.mode, call.input, *call.shared),
    )


def scalar(results: Results) -> Tensor:
    """A number that depends on every result, in no linear way."""
    return sum((value * value + value.sin()).sum() for value in results.values())


def compare(actual: Any, expected: Any, tolerance: float = 1e-10) -> None:
    if isinstance(expected, dict):
        assert list(actual) == list(expected)
        for name in expected:
            check_equal(name, actual[name], expected[name], tolerance)
    else:
        assert len(actual) == len(expected)
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            check_equal(str(index), a, e, tolerance)


# ---- first and second derivatives -----------------------------------------------------------------------------------


def derivatives(function: Callable[..., Results], call: Call, grads: Results, directions: list[Tensor]) -> list[Tensor]:
    """Results, their gradients, and the gradients of those: in every input and every incoming gradient."""
    inputs = list(call.tensors().values())
    results = function(call)
    first = torch.autograd.grad(
        [results[name] for name in grads], inputs, list(grads.values()), create_graph=True, materialize_grads=True
    )
    second = torch.autograd.grad(first, [*inputs, *grads.values()], directions, materialize_grads=True)
    return [*results.values(), *first, *second]


@over_layouts
@over_modes
@pytest.mark.parametrize("D", [1, 2])
@pytest.mark.parametrize("initial", [True, False], ids=["hx", "zeros"])
def test_first_and_second_derivatives(mode: str, P: int, layout: str, D: int, initial: bool) -> None:
    call = make_call(mode, P=P, D=D, initial=initial, bias=initial, **LAYOUTS[layout]).leaves()
    grads = {name: value.requires_grad_() for name, value in random_grads(plain(call)).items()}
    directions = [torch.randn_like(value) for value in call.tensors().values()]
    compare(derivatives(layer, call, grads, directions), derivatives(plain, call, grads, directions))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "packed"])
@over_modes
@pytest.mark.parametrize(("T", "B"), [(1, 3), (4, 1), (4, 0), (1, 0)])
@pytest.mark.parametrize("initial", [True, False], ids=["hx", "zeros"])
def test_degenerate_sizes(mode: str, P: int, layout: str, T: int, B: int, initial: bool) -> None:
    call = make_call(mode, T=T, B=B, P=P, D=2, initial=initial, **LAYOUTS[layout]).leaves()
    inputs = list(call.tensors().values())
    ours, theirs = layer(call), plain(call)
    compare(ours, theirs)
    compare(torch.autograd.grad(scalar(ours), inputs), torch.autograd.grad(scalar(theirs), inputs))


@over_layouts
@over_modes
def test_gradcheck_and_gradgradcheck(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, T=3, B=2, I=2, H=3, P=P, D=2, **LAYOUTS[layout]).leaves()
    inputs = tuple(call.tensors().values())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(values)).values())

    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@over_modes
def test_every_entry_of_the_jacobians(mode: str, P: int) -> None:
    call = make_call(mode, T=2, B=1, I=1, H=2 if not P else 3, P=P, D=2).leaves()
    inputs = tuple(call.tensors().values())

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(values)).values())

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("mode", ["LSTM", "GRU"])
def test_third_derivative(mode: str) -> None:
    call = make_call(mode, T=2, B=2, I=1, H=2).leaves()
    found = []
    for function in (layer, plain):
        value = scalar(function(call))
        for _ in range(3):
            (slope,) = torch.autograd.grad(value, call.input, create_graph=True)
            value = slope.sin().sum()
        found.append(value.unsqueeze(0))
    compare([found[0]], [found[1]])


# ---- only what is asked for -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "packed", "lengths"])
@over_modes
def test_one_gradient_alone_is_the_same(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, P=P, D=2, **LAYOUTS[layout])
    every = call.leaves()
    expected = torch.autograd.grad(scalar(layer(every)), list(every.tensors().values()))
    for index, name in enumerate(call.tensors()):
        values = [value.detach().clone() for value in call.tensors().values()]
        values[index].requires_grad_()
        (alone,) = torch.autograd.grad(scalar(layer(call, values)), [values[index]])
        assert torch.equal(alone, expected[index]), name


@over_layouts
@over_modes
def test_one_result_alone(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, P=P, D=2, **LAYOUTS[layout]).leaves()
    inputs = list(call.tensors().values())
    for name in layer(call):
        expected = torch.autograd.grad(plain(call)[name].sin().sum(), inputs, materialize_grads=True)
        compare(torch.autograd.grad(layer(call)[name].sin().sum(), inputs, materialize_grads=True), expected)


def test_results_without_gradient_path() -> None:
    call = make_call("LSTM")
    results = layer(call)
    assert not any(value.requires_grad for value in results.values())
    with torch.no_grad():
        assert not any(value.requires_grad for value in layer(call.leaves()).values())


@over_modes
def test_no_grad_gives_the_same_results(mode: str, P: int) -> None:
    call = make_call(mode, P=P, D=2).leaves()
    with torch.no_grad():
        without = layer(call)
    compare(without, layer(call), 1e-14)


@pytest.mark.parametrize("layout", ["dense", "lengths"])
def test_gradient_beyond_the_end_of_a_row_is_ignored(layout: str) -> None:
    call = make_call("LSTM", P=2, D=2, T=6, lengths=True).leaves()
    inputs = list(call.tensors().values())
    beyond = (~call.alive()).unsqueeze(-1)
    gradient = torch.randn_like(layer(call)["output"])
    poisoned = gradient.masked_fill(beyond, float("nan"))
    expected = torch.autograd.grad(layer(call)["output"], inputs, gradient)
    compare(torch.autograd.grad(layer(call)["output"], inputs, poisoned), expected, 0.0)


# ---- what is kept ---------------------------------------------------------------------------------------------------


@over_layouts
@over_modes
def test_second_backward_is_bitwise_the_first(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, P=P, D=2, dtype=torch.float32, **LAYOUTS[layout]).leaves()
    inputs = list(call.tensors().values())
    value = scalar(layer(call))
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    second = torch.autograd.grad(value, inputs, retain_graph=True)
    with_graph = torch.autograd.grad(value, inputs, create_graph=True)
    again = torch.autograd.grad(scalar(layer(call)), inputs)
    for other in (second, again):
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    # What is to be differentiated again is made of other parts, and sums in another order.
    for a, b in zip(first, with_graph, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, float(b.detach().abs().max())))


@over_modes
def test_saved_tensors_are_few_and_never_written(mode: str, P: int) -> None:
    call = make_call(mode, P=P, D=2, dtype=torch.float32).leaves()
    saved: list[tuple[Tensor, Tensor]] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = layer(call)
    sum(value.sum() for value in results.values()).backward()
    for tensor, before in saved:
        assert torch.equal(tensor, before)
    # The gates are not among them: only what is alive anyway, the output, the cells and the reserve.
    alive = {value.data_ptr() for value in [*call.tensors().values(), *results.values()]}
    others = [tensor for tensor, _ in saved if tensor.data_ptr() not in alive and tensor.numel()]
    reserve = CELLS[mode].reserve
    assert [tuple(tensor.shape) for tensor in others] == ([(5, 4, 2 * reserve * 5)] if reserve else [])


def test_writing_to_a_saved_result_is_an_error() -> None:
    call = make_call("GRU").leaves()
    output = layer(call)["output"]
    output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_gradients_of_the_two_biases_do_not_share_memory() -> None:
    call = make_call("LSTM", D=2).leaves()
    scalar(layer(call)).backward()
    before = call.bias_hh[0].grad.clone()
    call.bias_ih[0].grad.zero_()
    assert torch.equal(call.bias_hh[0].grad, before)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint(reentrant: bool) -> None:
    call = make_call("LSTM", D=2, lengths=True).leaves()
    inputs = list(call.tensors().values())
    expected = torch.autograd.grad(scalar(layer(call)), inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(values)).values())

    results = checkpoint(function, *inputs, use_reentrant=reentrant)
    scalar(dict(zip(NAMES, results, strict=True))).backward()
    compare([value.grad for value in inputs], expected, 0.0)


def test_backward_in_another_thread() -> None:
    call = make_call("GRU", lengths=True).leaves()
    inputs = list(call.tensors().values())
    value = scalar(layer(call))
    expected = torch.autograd.grad(value, inputs, retain_graph=True)
    found: list[tuple[Tensor, ...]] = []
    thread = threading.Thread(target=lambda: found.append(torch.autograd.grad(value, inputs)))
    thread.start()
    thread.join()
    compare(found[0], expected, 0.0)


# ---- torch.func -----------------------------------------------------------------------------------------------------


def batch_of(call: Call, dims: list[int | None], samples: int) -> list[Tensor]:
    return [
        value if dim is None else torch.randn(samples, *value.shape, dtype=value.dtype).to(value.device).movedim(0, dim)
        for value, dim in zip(call.tensors().values(), dims, strict=True)
    ]


def looped(function: Callable[..., Any], values: list[Tensor], dims: list[int | None], samples: int) -> Any:
    results = [
        function(*[value if dim is None else value.select(dim, i) for value, dim in zip(values, dims, strict=True)])
        for i in range(samples)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def dims_for(call: Call, which: str) -> list[int | None]:
    chosen = {
        "input": {"input": 0},
        "data": {"input": 1, "hx": 2, "cx": 0},
        "states": {"hx": 0, "cx": 1},
        "weights": {name: 0 for name in call.tensors() if name.startswith(("weight", "bias"))},
        "one weight": {"weight_hh[0]": 1},
        "everything": dict.fromkeys(call.tensors(), 0),
    }[which]
    return [chosen.get(name) for name in call.tensors()]


WHICH = [
    "data",
    "one weight",
    *(pytest.param(w, marks=exhaustive) for w in ["input", "states", "weights", "everything"]),
]


@over_layouts
@over_modes
@pytest.mark.parametrize("which", WHICH)
def test_vmap(mode: str, P: int, layout: str, which: str) -> None:
    call = make_call(mode, P=P, D=2, **LAYOUTS[layout])
    dims = dims_for(call, which)
    values = batch_of(call, dims, 3)

    def function(*members: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(members)).values())

    compare(vmap(function, in_dims=tuple(dims))(*values), looped(function, values, dims, 3))


@pytest.mark.parametrize("out_of", ["lengths", "resets"])
def test_vmap_over_lengths_and_resets(out_of: str) -> None:
    call = make_call("LSTM", D=2, lengths=True, resets=True)
    many = torch.stack([getattr(make_call("LSTM", lengths=True, resets=True), out_of) for _ in range(3)])

    def function(value: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(dataclasses.replace(call, **{out_of: value})).values())

    compare(vmap(function)(many), looped(function, [many], [0], 3))


@over_layouts
@over_modes
def test_per_sample_gradients(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, P=P, D=2, **LAYOUTS[layout])
    dims = dims_for(call, "data")
    values = batch_of(call, dims, 3)

    def function(*members: Tensor) -> tuple[Tensor, ...]:
        return grad(lambda every: scalar(layer(call, list(every))))(members)

    compare(vmap(function, in_dims=tuple(dims))(*values), looped(function, values, dims, 3))


@over_modes
@pytest.mark.parametrize("which", ["data", "weights", "everything"])
def test_grad_of_vmap(mode: str, P: int, which: str) -> None:
    call = make_call(mode, P=P, D=2)
    dims = dims_for(call, which)
    values = batch_of(call, dims, 3)

    def function(*members: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(members)).values())

    def loss(run: Callable[..., Any]) -> Callable[..., Tensor]:
        return lambda every: sum(result.sin().sum() for result in run(*every))

    actual = grad(loss(vmap(function, in_dims=tuple(dims))))(tuple(values))
    compare(actual, grad(loss(lambda *every: looped(function, list(every), dims, 3)))(tuple(values)))


@over_layouts
@over_modes
def test_func_grad_and_grad_of_grad(mode: str, P: int, layout: str) -> None:
    call = make_call(mode, P=P, D=2, T=3, B=3, **LAYOUTS[layout])
    values = tuple(call.tensors().values())

    def slope(function: Callable[..., Results]) -> Callable[..., tuple[Tensor, ...]]:
        return grad(lambda every: scalar(function(call, list(every))))

    def curvature(function: Callable[..., Results]) -> tuple[Tensor, ...]:
        return grad(lambda every: sum(value.sin().sum() for value in slope(function)(every)))(values)

    compare(slope(layer)(values), slope(plain)(values))
    compare(curvature(layer), curvature(plain))


@over_modes
def test_jacobians_and_hessian(mode: str, P: int) -> None:
    call = make_call(mode, P=P, D=2, T=2, B=2, I=2, H=3)
    values = list(call.tensors().values())

    def output(function: Callable[..., Results], index: int) -> Callable[[Tensor], Tensor]:
        return lambda value: function(call, [*values[:index], value, *values[index + 1 :]])["output"]

    for index in range(len(values)):
        expected = torch.autograd.functional.jacobian(output(plain, index), values[index])
        compare([jacrev(output(layer, index))(values[index])], [expected])
        compare([jacfwd(output(layer, index))(values[index])], [expected])
    expected = hessian(lambda value: output(plain, 0)(value).sin().sum())(values[0])
    compare([hessian(lambda value: output(layer, 0)(value).sin().sum())(values[0])], [expected])
    twice = jacrev(jacrev(lambda value: output(layer, 0)(value).sin().sum()))(values[0])
    compare([twice], [expected])


@over_layouts
def test_forward_mode(layout: str) -> None:
    call = make_call("LSTM", P=2, D=2, **LAYOUTS[layout])
    values = tuple(call.tensors().values())
    tangents = tuple(torch.randn_like(value) for value in values)

    def function(*members: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(call, list(members)).values())

    _, forward = jvp(function, values, tangents)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(v, t) for v, t in zip(values, tangents, strict=True)]
        dual = [forward_ad.unpack_dual(result).tangent for result in function(*duals)]
    compare(dual, forward, 1e-14)
    # <J t, g> = <t, J^T g>
    results, pull_back = vjp(function, *values)
    gradients = tuple(torch.randn_like(result) for result in results)
    left = sum((f * g).sum() for f, g in zip(forward, gradients, strict=True))
    right = sum((t * p).sum() for t, p in zip(tangents, pull_back(gradients), strict=True))
    compare([left], [right])


def test_functional_call_on_an_ensemble() -> None:
    class Tagger(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.call = make_call("GRU", initial=False)
            self.weights = torch.nn.ParameterList(flat_weights(self.call))

        def forward(self, input: Tensor) -> Tensor:
            return layer(self.call, [input, *self.weights])["output"]

    models = [Tagger() for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    input = torch.randn(5, 4, 3, dtype=torch.float64)
    outputs = vmap(lambda p, b: functional_call(models[0], (p, b), (input,)))(parameters, buffers)
    compare([outputs], [torch.stack([model(input) for model in models])])


# ---- the product ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 5, 3), (4, 0, 3), (0, 2, 3), (33, 65, 17)])
def test_matmul_values(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    m, k, n = shape
    # Integers: every product and sum is exact.
    a = torch.randint(-3, 4, (m, k)).to(dtype)
    b = torch.randint(-3, 4, (k, n)).to(dtype)
    expected = (a.double() @ b.double()).to(dtype)
    wide = torch.zeros(m, k + 3, dtype=dtype)
    wide[:, 1 : k + 1] = a
    for left in (a, a.t().contiguous().t(), wide[:, 1 : k + 1]):
        for right in (b, b.t().contiguous().t()):
            assert torch.equal(ops.matmul(left, right), expected)


def test_matmul_derivatives() -> None:
    a = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    b = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.matmul, (a, b))
    assert torch.autograd.gradgradcheck(ops.matmul, (a, b))
    many = torch.randn(5, 3, 4, dtype=torch.float64)
    compare([vmap(ops.matmul, in_dims=(0, None))(many, b)], [many @ b])
    compare([vmap(ops.matmul, in_dims=(None, 0))(b, many.transpose(1, 2)[:, :2])], [b @ many.transpose(1, 2)[:, :2]])


# ---- the ops themselves ---------------------------------------------------------------------------------------------


@over_layouts
@over_modes
@pytest.mark.parametrize("initial", [False, pytest.param(True, marks=exhaustive)], ids=["zeros", "hx"])
@only_cpu
def test_opcheck(mode: str, P: int, layout: str, initial: bool) -> None:
    call = make_call(mode, P=P, D=2, T=3, initial=initial, **LAYOUTS[layout])
    if call.lengths is not None:
        # The reserve is undefined beyond a row's length, and opcheck compares all of it.
        call.lengths.fill_(call.steps)
    namespace = torch.ops.rnnfast
    calls: list[tuple[Any, tuple[Any, ...]]] = []

    class Recorder:
        def __getattr__(self, name: str) -> Callable[..., Any]:
            op = getattr(namespace, name).default

            def run(*arguments: Any) -> Any:
                calls.append((op, arguments))
                return op(*arguments)

            return run

    saved = call.forward(Recorder())
    call.backward(Recorder(), random_grads(saved), saved)
    call.inference(Recorder())
    assert len(calls) == 3
    for op, arguments in calls:
        torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@only_cpu
def test_opcheck_matmul(dtype: torch.dtype) -> None:
    a, b = torch.randn(4, 3, dtype=dtype), torch.randn(5, 3, dtype=dtype).t()
    torch.library.opcheck(torch.ops.rnnfast.matmul.default, (a, b))


@over_layouts
@pytest.mark.parametrize("which", ["data", "everything"])
@only_cpu
def test_vmap_over_the_ops(layout: str, which: str) -> None:
    call = make_call("LSTM", P=2, D=2, **LAYOUTS[layout])
    dims = dims_for(call, which)
    values = batch_of(call, dims, 3)
    namespace = torch.ops.rnnfast

    def function(*members: Tensor) -> tuple[Tensor, ...]:
        one = call.with_tensors(list(members))
        saved = one.forward(namespace)
        grads = {name: value.cos() for name, value in saved.items() if name != "reserve"}
        gradients = one.backward(namespace, grads, saved)
        return (*list(saved.values())[:4], *gradients.values(), *one.inference(namespace).values())

    actual = vmap(function, in_dims=tuple(dims))(*values)
    # grad_gates_hh does not apply to the LSTM.
    kept = [i for i, value in enumerate(actual) if value.numel()]
    expected = looped(function, values, dims, 3)
    compare([actual[i] for i in kept], [expected[i] for i in kept])


@only_cpu
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_states_that_entered_packed_rows_from_views(reverse: bool, initial: bool) -> None:
    """The way without an index list, which CUDA tensors take, gives what the other one gives."""
    for T, B in ((1, 1), (1, 4), (9, 1), (4, 2), (9, 6), (7, 13), (40, 5)):
        call = make_call("GRU", T=T, B=B, layout="packed", initial=initial)
        output, state = torch.randn(len(call.input), 3), torch.randn(B, 3) if initial else None
        expected = sequences._entered_packed(output, state, call.batch_sizes, reverse)
        assert torch.equal(sequences._entered_packed_views(output, state, call.batch_sizes, reverse), expected)

"""The modules that rnnfast.quantize_weights makes: what it says and leaves alone, state dicts and copies, derivatives,
programs, refusals."""

from __future__ import annotations

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

import rnnfast
from cases import MODES
from module_cases import leaves, raised, random_states
from rnnfast import ops
from rnnfast.quantization import TYPES
from rnnfast.signatures import QUANTIZED_LAYER
from test_build import needs_library

LAYERS = ["LSTM", "GRU", "RNN", "MGU"]
CELLS = [f"{kind}Cell" for kind in LAYERS]
each_kind = pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
each_type = pytest.mark.parametrize("weights", TYPES)


def made(kind: str, weights: str = "int8", sizes: tuple[int, int] = (4, 5), **options: Any) -> Any:
    module = getattr(rnnfast, kind)(*sizes, **options)
    assert rnnfast.quantize_weights(module, weights).left == {}
    return module


def input_of(kind: str, *batch: int) -> Tensor:
    return torch.randn(*(() if kind in CELLS else (6,)), *(batch or (3,)), 4)


def first(result: Any) -> Tensor:
    return leaves(result)[0]


# ---- in place, and the report ----------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.LSTM(32, 40, 2, bidirectional=True), rnnfast.GRU(80, 20), rnnfast.MGU(20, 20)])
        self.cell = nn.RNNCell(20, 20)
        self.out = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, _ = layer(x)
        return self.out(self.cell(x[-1]))


@each_type
def test_in_place_with_names_and_hooks(weights: str) -> None:
    model, x, calls = Model(), torch.randn(5, 3, 32), []
    with torch.no_grad():
        before = model(x)
    objects, names = list(model.modules()), [name for name, _ in model.named_parameters()]
    old = [weakref.ref(parameter) for parameter in model.layers[0].parameters()]
    model.layers[1].register_forward_hook(lambda *_: calls.append(1))
    report = rnnfast.quantize_weights(model, weights)
    assert list(report.swapped) == ["layers.0", "layers.1", "layers.2", "cell"]
    assert report.left == {}
    assert report.swapped["layers.0"].startswith(f"torch.nn.LSTM -> {weights} weights, ")
    assert report.swapped["layers.1"].startswith(f"rnnfast.GRU -> {weights} weights, ")
    assert list(model.modules()) == objects
    assert [type(layer).__name__ for layer in model.layers] == ["QuantizedLSTM", "QuantizedGRU", "QuantizedMGU"]
    assert isinstance(model.layers[0], rnnfast.LSTM)
    assert isinstance(model.cell, rnnfast.RNNCell)
    assert [name for name, _ in model.named_parameters()] == ["out.weight", "out.bias"]
    assert {name for name, _ in model.named_buffers()} == {name for name in names if not name.startswith("out")}
    assert not any(reference() for reference in old)
    assert f"weights={weights}" in repr(model.layers[2])
    assert "weights" in repr(model.cell)
    assert (model(x) - before).abs().max() < {"float32": 1e-5, "bf16": 0.01, "int8": 0.03}[weights]
    assert calls == [1]
    # Again, to another type too, by accelerate and restore: nothing more.
    for again in (rnnfast.quantize_weights(model, weights), rnnfast.quantize_weights(model, "bf16")):
        assert again.swapped == {}
        assert again.left == dict.fromkeys(report.swapped, f"already quantized, to {weights}")
    assert rnnfast.accelerate(model).swapped == rnnfast.accelerate(model).left == {}
    assert rnnfast.restore(model).left == dict.fromkeys(report.swapped, "its weights are quantized")
    with pytest.warns(UserWarning, match="layers.0: left alone: its weights are quantized"), rnnfast.exporting(model):
        pass


def test_the_report_says_sizes_and_errors() -> None:
    layer = rnnfast.LSTM(256, 256)
    text = rnnfast.quantize_weights(layer, "int8").swapped[""]
    assert text.startswith("rnnfast.LSTM -> int8 weights, 2.1 MB -> 0.5 MB, error of the weights 0.")
    assert text.endswith(" %")
    small = rnnfast.GRUCell(4, 16)
    text = rnnfast.quantize_weights(small, "float32").swapped[""]
    assert text == "rnnfast.GRUCell -> float32 weights, 4.2 kB -> 4.2 kB, error of the weights 0 %"


class Mine(rnnfast.GRU):
    pass


class Theirs(nn.LSTM):
    pass


def changed(module: Any, change: Callable[[Any], Any]) -> nn.Module:
    change(module)
    return module


def halved(module: Any) -> None:
    parametrize.register_parametrization(module, "weight_hh_l0", parametrizations._WeightNorm())


def put(value: float) -> Callable[[Any], Any]:
    return lambda module: module.weight_hh_l0.data.fill_(value)


LEFT = {
    "subclass": (Mine(4, 5), "Mine is a subclass of rnnfast's class"),
    "torch_subclass": (Theirs(4, 5), "Theirs is a subclass, which may rely on what torch.nn does inside"),
    "replaced": (changed(rnnfast.GRU(4, 5), lambda module: setattr(module, "forward", id)), "its forward was replaced"),
    "torch_replaced": (changed(nn.GRU(4, 5), lambda module: setattr(module, "forward", id)), "forward was replaced"),
    "parametrized": (changed(nn.LSTM(4, 5), halved), "its weights are computed: parametrized"),
    "pruned": (
        changed(rnnfast.RNN(4, 5), lambda module: prune.random_unstructured(module, "weight_hh_l0", 0.5)),
        "its weights are computed: weight_hh_l0 is no parameter",
    ),
    "float64": (rnnfast.LSTM(4, 5, dtype=torch.float64), "its weights are torch.float64, not torch.float32"),
    "float16": (nn.LSTMCell(4, 5, dtype=torch.float16), "its weights are torch.float16, not torch.float32"),
    "meta": (rnnfast.LSTM(4, 5, device="meta"), "its weights have no values: they are on the meta device"),
    "lazy": (
        changed(rnnfast.GRU(4, 5), lambda m: setattr(m, "weight_hh_l0", nn.UninitializedParameter())),
        "weight_hh_l0 is of class UninitializedParameter",
    ),
    "nan": (changed(rnnfast.LSTM(4, 5), put(float("nan"))), "weight_hh_l0 is not finite as int8"),
    "empty": (rnnfast.LSTMCell(4, 0), "its hidden_size is 0"),
    "no_input": (nn.GRUCell(0, 4), "its input_size is 0"),
    "wide": (rnnfast.RNN(65_537, 1), "weight_ih_l0 has 65,537 columns, int8 takes at most 65,536"),
    "resized": (changed(rnnfast.LSTM(4, 5), lambda module: setattr(module, "input_size", 3)), "do not fit its weights"),
    "scripted": (torch.jit.script(nn.GRU(4, 5)), "a ScriptModule"),
}


def test_what_it_leaves_alone_it_says() -> None:
    model = nn.ModuleDict({name: module for name, (module, _) in LEFT.items()} | {"linear": nn.Linear(2, 3)})
    before = {name: type(module) for name, module in model.items()}
    report = rnnfast.quantize_weights(model, "int8")
    assert report.swapped == {}
    assert set(report.left) == set(LEFT)
    for name, (_, reason) in LEFT.items():
        assert reason in report.left[name]
    assert {name: type(module) for name, module in model.items()} == before


def test_what_other_types_can_hold_decides() -> None:
    for weights in ("bf16", "int8", "float32"):
        layer = changed(rnnfast.GRU(4, 5), put(torch.finfo(torch.float32).max))
        left = rnnfast.quantize_weights(layer, weights).left
        assert left == ({"": "weight_hh_l0 is not finite as bf16"} if weights == "bf16" else left)
    assert left == {}
    assert rnnfast.quantize_weights(rnnfast.RNN(65_537, 1), "bf16").left == {}
    with pytest.warns(FutureWarning):
        normed = weight_norm(rnnfast.GRU(4, 5), "weight_hh_l0")
    assert "weight_hh_l0 is no parameter" in rnnfast.quantize_weights(normed, "bf16").left[""]


def test_wrong_arguments() -> None:
    for dtype in ("int4", torch.int8, None):
        text = "dtype should be one of 'float32', 'bf16', 'int8', got "
        with pytest.raises(ValueError, match=text):
            rnnfast.quantize_weights(rnnfast.GRU(4, 5), dtype)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"model should be a torch.nn.Module, got list"):
        rnnfast.quantize_weights([rnnfast.GRU(4, 5)], "int8")  # type: ignore[arg-type]
    layer = made("GRU")
    with pytest.raises(TypeError, match=r"QuantizedGRU is made by rnnfast.quantize_weights"):
        type(layer)(4, 5)
    with pytest.raises(RuntimeError, match="no parameters to reset"):
        layer.reset_parameters()


def test_every_cell_can_be_quantized() -> None:
    """As tests/test_structure.py says that every one has a layer and a cell."""
    for mode in MODES:
        kind, _, nonlinearity = mode.partition("_")
        options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        for name in (kind, f"{kind}Cell"):
            module = made(name, **options)
            assert module._mode() == mode
            assert type(module).__name__ == f"Quantized{name}"


# ---- copies and state dicts ------------------------------------------------------------------------------------------


@each_kind
def test_copies_and_whole_modules(kind: str) -> None:
    module, x = made(kind), input_of(kind)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    twins = [copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)]
    for twin in twins:
        assert type(twin) is type(module)
        assert torch.equal(first(twin(x)), first(module(x)))


@each_type
@each_kind
def test_state_dicts(kind: str, weights: str) -> None:
    float_one, x = getattr(rnnfast, kind)(4, 5), input_of(kind)
    source, into, late = copy.deepcopy(float_one), made(kind, weights), made(kind, weights)
    rnnfast.quantize_weights(source, weights)
    expected, state = first(source(x)), source.state_dict()
    assert set(state) == {*float_one.state_dict(), "packed_as"}
    into.load_state_dict(state)
    assert torch.equal(first(into(x)), expected)
    # Of floating point, of other types too, and inside another module.
    model = nn.Sequential(late)
    model.load_state_dict(nn.Sequential(float_one).state_dict(), assign=True)
    assert torch.equal(first(late(x)), expected)
    late.load_state_dict(float_one.double().state_dict())
    assert torch.equal(first(late(x)), expected)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    assert late.load_state_dict(torch.load(file, weights_only=True)).missing_keys == []


def test_state_dicts_that_do_not_fit() -> None:
    layer = made("LSTM", "int8", (8, 5))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    matrices = {name: value for name, value in before.items() if name.startswith("weight")}

    def why_not(state: dict[str, Any], **options: Any) -> str:
        error, text = raised(lambda: layer.load_state_dict(state, **options))
        assert error is RuntimeError
        now = layer.state_dict()
        assert all(torch.equal(now[name], weight) for name, weight in matrices.items())
        return text

    # Eight columns: as many lines in bf16 as in int8. And seven columns as many as eight.
    other = {**before, "packed_as": made("LSTM", "bf16", (8, 5)).state_dict()["packed_as"]}
    text = r"packed_as: expected weights of (bits, input_size, hidden_size, proj_size) [8, 8, 5, 0], got "
    assert f"{text}[16, 8, 5, 0]" in why_not(other)
    assert f"{text}[8, 7, 5, 0]" in why_not(made("LSTM", "int8", (7, 5)).state_dict())
    assert f"{text}nonsense" in why_not({**before, "packed_as": "nonsense"})
    assert 'Missing key(s) in state_dict: "packed_as"' in why_not({k: v for k, v in before.items() if k != "packed_as"})
    for value in (torch.zeros(2, 2), matrices["weight_ih_l0"].char(), torch.zeros(20, 8, dtype=torch.int64)):
        text = "weight_ih_l0: expected packed weights, or (20, 8) of a floating type to pack, got "
        assert text in why_not({**before, "weight_ih_l0": value})
    assert "weight_ih_l0: expected packed weights of shape (4, 4, 64), got (4, 3, 64)" in why_not(
        {**before, "weight_ih_l0": matrices["weight_ih_l0"][:, :3]}
    )
    assert "weight_ih_l0: some weights are not finite as int8" in why_not(
        {**before, "weight_ih_l0": torch.full((20, 8), float("inf"))}
    )
    assert layer.load_state_dict({}, strict=False).unexpected_keys == []


# ---- derivatives -----------------------------------------------------------------------------------------------------

NO_DERIVATIVE = "rnnfast: quantized weights have no derivative"


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the op that raises
@pytest.mark.parametrize("backend", ["auto", "reference"])
@each_kind
def test_derivatives_are_errors(kind: str, backend: str) -> None:
    module, x = made(kind), input_of(kind)
    expected = module(x)
    assert not first(expected).requires_grad
    with rnnfast.backend(backend):
        for hx in (None, random_states(kind.removesuffix("Cell"), *(() if kind in CELLS else (1,)), 3, 5)):
            for wants in [x, *([] if hx is None else leaves(hx))]:
                wants.requires_grad_()
                output = first(module(x, hx))
                wants.requires_grad_(False)
                if hx is None:
                    assert_close(output, first(expected), atol=1e-3, rtol=0)
                with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
                    output.sum().backward()
                with torch.no_grad():
                    assert not first(module(x, hx)).requires_grad
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            grad(lambda x: first(module(x)).sum())(x)
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            vmap(grad(lambda x: first(module(x)).sum()))(torch.stack([x, x]))
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            jvp(lambda x: first(module(x)), (x,), (x,))
        with torch.no_grad(), torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            module(torch.autograd.forward_ad.make_dual(x, x))
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            torch.autograd.functional.hessian(lambda x: first(module(x)).sum(), x)
        many = torch.stack([x, 2 * x])
        assert_close(vmap(lambda x: first(module(x)))(many), torch.stack([first(module(x)) for x in many]))
        biased = {name: value.requires_grad_() for name, value in module.named_buffers() if value.is_floating_point()}
        with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
            first(functional_call(module, biased, (x,))).sum().backward()


# ---- programs --------------------------------------------------------------------------------------------------------


COMPILED = [("LSTM", "auto"), ("LSTM", "reference"), ("MGU", "auto"), ("LSTMCell", "auto"), ("RNNCell", "reference")]


@needs_library
@pytest.mark.parametrize(("kind", "backend"), COMPILED)
def test_compiled_in_one_graph(kind: str, backend: str) -> None:
    torch._dynamo.reset()
    module = nn.Sequential(nn.Linear(4, 4), made(kind))
    fast = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    with rnnfast.backend(backend):
        for batch in (3, 5):
            x = input_of(kind, batch)
            with torch.no_grad():
                assert_close(first(fast(x)), first(module(x)))
            # Something before it wants gradients: forward works, and backward alone raises.
            output = first(fast(x))
            assert_close(output, first(module(x)))
            with pytest.raises(RuntimeError, match=NO_DERIVATIVE):
                output.sum().backward()


@needs_library
def test_inductor() -> None:
    torch._dynamo.reset()
    module, x = made("LSTM", "bf16", num_layers=2, bidirectional=True), input_of("LSTM")
    lengths = torch.tensor([6, 2, 0])
    with torch.no_grad():
        found = torch.compile(module, fullgraph=True)(x, lengths=lengths)
    assert_close(leaves(found), leaves(module(x, lengths=lengths)))


@needs_library
@pytest.mark.parametrize(("kind", "strict"), [("LSTM", False), ("GRU", True), ("RNN", False), ("LSTMCell", False)])
def test_exported(kind: str, strict: bool) -> None:
    module, x = made(kind), input_of(kind)
    program = torch.export.export(module, (x,), strict=strict)
    assert "rnnfast.quantized_layer.default" in str(program.graph)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(first(torch.export.load(file).module()(x)), first(module(x)))


@needs_library
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_other_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("LSTM", "GRUCell"):
        module, x = made(kind), input_of(kind)
        model = nn.Sequential(module)
        reason = f"rnnfast.Quantized{kind}: its weights are quantized"
        assert raised(lambda: torch.jit.script(model)) == (RuntimeError, f"torch.jit.script: {reason}")  # noqa: B023
        traced = torch.jit.trace(module, (x,))
        assert "rnnfast::quantized_layer" in str(traced.inlined_graph)
        assert torch.equal(first(traced(x)), first(module(x)))
        graph = torch.fx.symbolic_trace(model)
        assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0"]
        assert torch.equal(first(graph(x)), first(module(x)))
        with monkeypatch.context() as patched:
            patched.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            error = raised(lambda: torch.jit.trace(module, (x,)))  # noqa: B023
        assert error == (RuntimeError, f"torch.onnx.export: {reason}")


@needs_library
def test_numbers_of_operations_and_the_schema() -> None:
    for kind, options in (("LSTM", {"proj_size": 2}), ("GRU", {"bidirectional": True}), ("MGUCell", {})):
        plain, x = getattr(rnnfast, kind)(4, 5, **options), input_of(kind)
        counts = []
        for module in (plain, made(kind, **options)):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                module(x)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
    schema = str(torch.ops.rnnfast.quantized_layer.default._schema)
    assert schema == QUANTIZED_LAYER.schema("rnnfast::quantized_layer")


# ---- what is said and refused ----------------------------------------------------------------------------------------


def test_explain() -> None:
    layer, x = made("LSTM", num_layers=2), input_of("LSTM")
    if ops.library_error is None:
        for input in (x, x.clone().requires_grad_()):
            found = rnnfast.explain(layer, input)
            assert found.backend == "cpu"
            assert f"C++ time loop ({ops.cpu_isa()}), int8 weights packed once, inference" in str(found)
    with rnnfast.backend("reference"):
        assert "int8 weights packed once, unpacked in every call, 1 direction" in str(rnnfast.explain(layer, x))
    cell = made("RNNCell", "bf16")
    assert "bf16 weights packed once" in rnnfast.explain(cell, torch.randn(1, 4).requires_grad_()).kernel


@each_kind
def test_refusals_of_calls(kind: str) -> None:
    module, x = made(kind), input_of(kind)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        with pytest.raises((RuntimeError, ValueError), match=f"take torch.float32 alone, got {dtype}"):
            module(x.to(dtype))
    with pytest.raises(RuntimeError, match="of a floating type"):
        module(x.byte())
    with pytest.raises(RuntimeError, match="not at the same device"):
        module(x.to("meta"))
    # As the unquantized module says it.
    plain = getattr(rnnfast, kind)(4, 5)
    wrong = torch.randn(*(() if kind in CELLS else (1,)), 2, 5)
    hx = (wrong, wrong) if kind.startswith("LSTM") else wrong
    for arguments in ((x[..., :3],), (x, hx), (x.unsqueeze(0).unsqueeze(0),)):
        assert raised(lambda: module(*arguments)) == raised(lambda: plain(*arguments))  # noqa: B023
    module.to("meta")
    with pytest.raises(RuntimeError, match=r"run on the CPU alone, the input is on meta"):
        module(x.to("meta"))


@each_kind
def test_other_types_leave_packed_weights_alone(kind: str) -> None:
    module, x = made(kind), input_of(kind)
    expected = first(module(x))
    module.half()
    with pytest.raises(RuntimeError, match=r"biases of torch.float32, got \(\d+,\) of torch.float16; .float"):
        module(x)
    module.float()
    assert_close(first(module(x)), expected, atol=1e-3, rtol=1e-3)


def test_changed_attributes_and_weights() -> None:
    layer, x = made("GRU", sizes=(4, 17)), input_of("GRU")
    for name in ("hidden_size", "input_size"):
        value = getattr(layer, name)
        setattr(layer, name, value + 1)
        with pytest.raises(RuntimeError, match=r"packed for .* = \(4, 17, 0\), these are now|input.size\(-1\) must be"):
            layer(x if name == "hidden_size" else torch.randn(6, 3, 5))
        setattr(layer, name, value)
    layer.bias = False
    with pytest.raises(RuntimeError, match="need 2 weights, but the module was made with 4"):
        layer(x)
    layer.bias = True
    layer.weight_hh_l0 = torch.randn(51, 17)
    with pytest.raises(RuntimeError, match=r"expected weights packed by rnnfast.quantize_weights.* \(51, 17\)"):
        layer(x)
    del layer.weight_hh_l0
    with pytest.raises(RuntimeError, match="weight_hh_l0 is missing"):
        layer(x)
    cell = made("GRUCell")
    cell.input_size = 6
    with pytest.raises(RuntimeError, match="input has inconsistent input_size: got 6 expected 4"):
        cell(torch.randn(3, 6))
    short = made("LSTM", num_layers=2)
    short.num_layers = 1
    assert short(x)[1][0].shape == (1, 3, 5)


def test_no_every_c_t_and_no_other_backend() -> None:
    layer, x = made("LSTM"), input_of("LSTM")
    with pytest.raises(RuntimeError, match="return_cell_states: quantized layers do not return every c_t"):
        layer(x, return_cell_states=True)
    for name, can in rnnfast.backends().items():
        if can.available and name not in ("cpu", "reference"):
            text = f"backend '{name}' was asked for by name, but quantized weights are taken by .*'reference' alone"
            with rnnfast.backend(name):
                for call in (lambda: layer(x), lambda: rnnfast.explain(layer, x)):
                    with pytest.raises(RuntimeError, match=text):
                        call()

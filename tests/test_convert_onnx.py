"""Layers made of ONNX nodes: against loops of numpy, and against ONNX Runtime where it is installed."""

import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rnnfast
from convert_cases import Array, F, H, N, T, check, check_layer, hard_sigmoid, over_time, sigmoid
from rnnfast import convert


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def attribute(name: str, value: Any) -> Any:
    """An AttributeProto."""
    of_list = {float: (6, "floats"), int: (7, "ints"), bytes: (8, "strings")}
    of_one = {float: (1, "f"), int: (2, "i"), bytes: (3, "s")}
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, list):
        value = [each.encode() if isinstance(each, str) else each for each in value]
    kind, place = of_list[type(value[0])] if isinstance(value, list) else of_one[type(value)]
    return SimpleNamespace(name=name, type=kind, **{place: value})


def onnx_node(operator: str, inputs: list[str], **attributes: Any) -> Any:
    """A NodeProto."""
    return SimpleNamespace(
        op_type=operator,
        name="",
        input=inputs,
        output=["Y"],
        attribute=[attribute(*each) for each in attributes.items()],
    )


def onnx_arrays(
    rng: np.random.Generator, operator: str, directions: int, dtype: Any = np.float64, leave_out: str = ""
) -> dict[str, Array]:
    """By the names of the operator's inputs."""
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[operator]
    shapes = {
        "W": (directions, gates * H, F),
        "R": (directions, gates * H, H),
        "B": (directions, 2 * gates * H),
        "initial_h": (directions, N, H),
    }
    shapes |= {"initial_c": (directions, N, H), "P": (directions, 3 * H)} if operator == "LSTM" else {}
    left = leave_out.split()
    return {key: rng.normal(size=shape).astype(dtype) / 2 for key, shape in shapes.items() if key not in left}


def onnx_inputs(operator: str, arrays: dict[str, Array]) -> list[str]:
    names = ["X", "W", "R", "B", "sequence_lens", "initial_h"] + ["initial_c", "P"] * (operator == "LSTM")
    return ["X", *(name if name in arrays else "" for name in names[1:])]


def onnx_loop(
    operator: str,
    arrays: dict[str, Array],
    x: Array,
    f: Callable[[Array], Array] = sigmoid,
    direction: int = 0,
    input_forget: bool = False,
    linear_before_reset: bool = False,
) -> list[Array]:
    """docs/Operators.md of onnx/onnx; f of the RNN is its only activation."""
    w, r = arrays["W"][direction], arrays["R"][direction]
    gates = len(w) // H
    wb, rb = np.split(arrays["B"][direction] if "B" in arrays else np.zeros(2 * gates * H), 2)
    peephole = arrays["P"][direction] if "P" in arrays else np.zeros(3 * H)
    (wi, *ws), (ri, *rs) = np.split(w, gates), np.split(r, gates)
    (wbi, *wbs), (rbi, *rbs) = np.split(wb, gates), np.split(rb, gates)

    def lstm(xt: Array, h: Array, c: Array) -> tuple[Array, Array]:
        wo, wf, wc = ws
        ro, rf, rc = rs
        wbo, wbf, wbc = wbs
        rbo, rbf, rbc = rbs
        pi, po, pf = np.split(peephole, 3)
        it = f(xt @ wi.T + h @ ri.T + pi * c + wbi + rbi)
        ft = 1 - it if input_forget else f(xt @ wf.T + h @ rf.T + pf * c + wbf + rbf)
        ct = np.tanh(xt @ wc.T + h @ rc.T + wbc + rbc)
        new = ft * c + it * ct
        ot = f(xt @ wo.T + h @ ro.T + po * new + wbo + rbo)
        return ot * np.tanh(new), new

    def gru(xt: Array, h: Array) -> tuple[Array]:
        wr, wh = ws
        rr, rh = rs
        wbr, wbh = wbs
        rbr, rbh = rbs
        zt = f(xt @ wi.T + h @ ri.T + wbi + rbi)
        rt = f(xt @ wr.T + h @ rr.T + wbr + rbr)
        inner = rt * (h @ rh.T + rbh) if linear_before_reset else (rt * h) @ rh.T + rbh
        return ((1 - zt) * np.tanh(xt @ wh.T + inner + wbh) + zt * h,)

    def rnn(xt: Array, h: Array) -> tuple[Array]:
        return (f(xt @ wi.T + h @ ri.T + wbi + rbi),)

    step = {"LSTM": lstm, "GRU": gru, "RNN": rnn}[operator]
    names = ["initial_h", "initial_c"] if operator == "LSTM" else ["initial_h"]
    states = [arrays[key][direction] if key in arrays else np.zeros((x.shape[1], H)) for key in names]
    return over_time(step, x, *states, reverse=direction == 1)


# Of one direction: names and numbers of the gates' activation, and the function.
ONNX_GATES: dict[str, tuple[list[str], dict[str, list[float]], Callable[[Array], Array]]] = {
    "none": ([], {}, sigmoid),
    "Sigmoid": (["Sigmoid"], {}, sigmoid),
    "HardSigmoid": (["HardSigmoid"], {}, hard_sigmoid(0.2, 0.5)),
    "HardSigmoid(0.3, 0.4)": (["hardsigmoid"], {"alpha": [0.3], "beta": [0.4]}, hard_sigmoid(0.3, 0.4)),
}
ONNX_CASES: list[tuple[str, dict[str, int]]] = [
    ("LSTM", {}),
    ("LSTM", {"input_forget": 1}),
    ("GRU", {}),
    ("GRU", {"linear_before_reset": 1}),
]
LEAVE_OUT = ["", "B", "P initial_h initial_c", "B P"]


def onnx_attributes(operator: str, directions: int, gates: str, options: dict[str, int]) -> dict[str, Any]:
    names, numbers, _ = ONNX_GATES[gates]
    attributes: dict[str, Any] = {"hidden_size": H, **options}
    if directions == 2:
        attributes["direction"] = "bidirectional"
    if names:
        attributes["activations"] = [*names, *["Tanh"] * (2 if operator == "LSTM" else 1)] * directions
    return attributes | {f"activation_{key}": value * directions for key, value in numbers.items()}


@pytest.mark.parametrize("gates", ONNX_GATES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("leave_out", LEAVE_OUT)
@pytest.mark.parametrize(("operator", "options"), ONNX_CASES)
def test_onnx_gated(
    operator: str, options: dict[str, int], leave_out: str, directions: int, gates: str, rng: np.random.Generator
) -> None:
    arrays = onnx_arrays(rng, operator, directions, leave_out=leave_out)
    x = 2 * rng.normal(size=(T, N, F))
    attributes = onnx_attributes(operator, directions, gates, options)
    module, hx = convert.from_onnx(onnx_node(operator, onnx_inputs(operator, arrays), **attributes), arrays)
    assert type(module) is getattr(rnnfast, operator)
    flags = {key: value == 1 for key, value in options.items()}
    expected = [onnx_loop(operator, arrays, x, ONNX_GATES[gates][2], d, **flags) for d in range(directions)]
    assert (hx is None) == ("initial_h" in leave_out)
    check_layer(module, x, expected, hx)


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("name", ["", "Tanh", "Relu", "Sigmoid", "Affine"])
def test_onnx_rnn(name: str, directions: int, rng: np.random.Generator) -> None:
    functions = {"Relu": lambda v: np.maximum(v, 0), "Sigmoid": sigmoid, "Affine": lambda v: v}
    arrays, x = onnx_arrays(rng, "RNN", directions), rng.normal(size=(T, N, F))
    # The operator's default has two names for one direction, too.
    attributes: dict[str, Any] = {"activations": [name or "Tanh"] * 2}
    if name == "Affine":
        attributes |= {"activation_alpha": [1.0] * directions, "activation_beta": [0.0] * directions}
    if directions == 2:
        attributes["direction"] = "bidirectional"
    attributes = attributes if name else {key: value for key, value in attributes.items() if key == "direction"}
    module, hx = convert.from_onnx(onnx_node("RNN", onnx_inputs("RNN", arrays), **attributes), arrays)
    function = functions.get(name, np.tanh)
    check_layer(module, x, [onnx_loop("RNN", arrays, x, function, d) for d in range(directions)], hx)


def test_onnx_directions_have_their_own_slopes(rng: np.random.Generator) -> None:
    arrays, x = onnx_arrays(rng, "GRU", 2, leave_out="B"), 2 * rng.normal(size=(T, N, F))
    attributes = {
        "direction": "bidirectional",
        "activations": ["HardSigmoid", "Tanh"] * 2,
        "activation_alpha": [0.2, 0.4],
        "activation_beta": [0.5, 0.1],
    }
    module, hx = convert.from_onnx(onnx_node("GRU", onnx_inputs("GRU", arrays), **attributes), arrays)
    functions = hard_sigmoid(0.2, 0.5), hard_sigmoid(0.4, 0.1)
    check_layer(module, x, [onnx_loop("GRU", arrays, x, functions[d], d) for d in range(2)], hx)


def test_onnx_layout(rng: np.random.Generator) -> None:
    arrays, x = onnx_arrays(rng, "LSTM", 2), rng.normal(size=(T, N, F))
    turned = {key: a.swapaxes(0, 1) if key.startswith("initial") else a for key, a in arrays.items()}
    node = onnx_node("LSTM", onnx_inputs("LSTM", arrays), direction="bidirectional", layout=1)
    module, hx = convert.from_onnx(node, turned)
    assert module.batch_first
    check_layer(module, x, [onnx_loop("LSTM", arrays, x, direction=d) for d in range(2)], hx)


def test_onnx_states_that_are_no_constants(rng: np.random.Generator) -> None:
    arrays = onnx_arrays(rng, "LSTM", 1)
    inputs = onnx_inputs("LSTM", arrays)
    of_graph = {key: value for key, value in arrays.items() if key != "initial_c"}
    _, (h, c) = convert.from_onnx(onnx_node("LSTM", inputs), of_graph)
    assert c is None
    check(h, arrays["initial_h"])
    without_c = ["" if name == "initial_c" else name for name in inputs]
    _, (h, c) = convert.from_onnx(onnx_node("LSTM", without_c), of_graph)
    check(c, np.zeros((1, N, H)))
    _, hx = convert.from_onnx(onnx_node("LSTM", inputs), {key: arrays[key] for key in "WRBP"})
    assert hx is None


ONNX_ERRORS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "source: expected a node LSTM, GRU, RNN, got Gemm": ({"operator": "Gemm"}, {}),
    "direction: expected 'forward' or 'bidirectional', got 'reverse': .* flip": ({}, {"direction": "reverse"}),
    "direction: expected .* got 'sideways'": ({}, {"direction": "sideways"}),
    "clip: expected none, got 3": ({}, {"clip": 3.0}),
    "hidden_size: expected that of R, 4, got 5": ({}, {"hidden_size": 5}),
    "activations: expected 3 for each of 1 directions, got 2": ({}, {"activations": ["Sigmoid", "Tanh"]}),
    "activations: expected Sigmoid or HardSigmoid and then Tanh for LSTM": (
        {}, {"activations": ["Sigmoid", "Relu", "Tanh"]},
    ),
    "activations: expected Tanh, Relu, .* got affine": (
        {"operator": "RNN"}, {"activations": ["Affine"], "activation_alpha": [2.0], "activation_beta": [0.0]},
    ),
    "activations: expected Tanh, Relu, .* got elu": ({"operator": "RNN"}, {"activations": ["Elu"]}),
    "activations: expected the same for both directions": (
        {"directions": 2, "operator": "RNN"}, {"direction": "bidirectional", "activations": ["Tanh", "Relu"]},
    ),
    "W: expected a constant, got 'W'": ({"without": "W"}, {}),
    "sequence_lens: expected no constant": ({"extra": "sequence_lens"}, {}),
    r"R: expected shape \(2, 16, 4\), got \(1, 16, 4\)|R: expected shape \(2, 4 H, H\)": (
        {}, {"direction": "bidirectional"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("message", ONNX_ERRORS)
def test_onnx_errors(message: str, rng: np.random.Generator) -> None:
    how, attributes = ONNX_ERRORS[message]
    operator = how.get("operator", "LSTM")
    arrays = onnx_arrays(rng, operator if operator != "Gemm" else "LSTM", how.get("directions", 1))
    inputs = onnx_inputs(operator, arrays)
    if "without" in how:
        del arrays[how["without"]]
    if "extra" in how:
        inputs[4], arrays[how["extra"]] = how["extra"], np.full(N, T)
    with pytest.raises(ValueError, match=f"^from_onnx: ({message})"):
        convert.from_onnx(onnx_node(operator, inputs, **attributes), arrays)


def test_onnx_wrong_shapes(rng: np.random.Generator) -> None:
    for key, message in (
        ("W", r"\(1, 16, I\)"),
        ("B", r"\(1, 32\)"),
        ("P", r"\(1, 12\)"),
        ("initial_h", r"\(1, N, 4\)"),
    ):
        arrays = onnx_arrays(rng, "LSTM", 1)
        arrays[key] = arrays[key][..., :3, :] if arrays[key].ndim == 3 else arrays[key][:, :3]
        arrays[key] = arrays[key].reshape(3, 1, 4) if key == "initial_h" else arrays[key]
        with pytest.raises(ValueError, match=f"^from_onnx: {key}: expected shape {message}, got"):
            convert.from_onnx(onnx_node("LSTM", onnx_inputs("LSTM", arrays)), arrays)


@pytest.fixture(scope="module")
def onnx() -> Any:
    return pytest.importorskip("onnx", reason="onnx is not installed")


def onnx_model(
    onnx: Any, operator: str, arrays: dict[str, Array], constant_nodes: bool = False, **attributes: Any
) -> Any:
    """Input X, outputs Y, Y_h and of the LSTM Y_c; a second input lengths where the arrays have sequence_lens."""
    helper, to_tensor, float32 = onnx.helper, onnx.numpy_helper.from_array, onnx.TensorProto.FLOAT
    outputs = ["Y", "Y_h"] + ["Y_c"] * (operator == "LSTM")
    ranks = {"Y": ["t", "d", "n", "h"], "Y_h": ["d", "n", "h"], "Y_c": ["d", "n", "h"]}
    node = helper.make_node(operator, onnx_inputs(operator, arrays), outputs, name="rnn", **attributes)
    constants = {key: value for key, value in arrays.items() if key != "sequence_lens"}
    tensors = [to_tensor(value, key) for key, value in constants.items()]
    nodes = [node]
    if constant_nodes:
        nodes = [helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in tensors] + [node]
    graph_inputs = [helper.make_tensor_value_info("X", float32, ["t", "n", F])]
    if "sequence_lens" in arrays:
        graph_inputs.append(helper.make_tensor_value_info("sequence_lens", onnx.TensorProto.INT32, ["n"]))
    graph = helper.make_graph(
        nodes, "graph", graph_inputs, [helper.make_tensor_value_info(name, float32, ranks[name]) for name in outputs],
        initializer=[] if constant_nodes else tensors,
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)


def check_runtime(onnx: Any, operator: str, arrays: dict[str, Array], x: Array, **attributes: Any) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    model = onnx_model(onnx, operator, arrays, **attributes)
    onnx.checker.check_model(model)
    lengths = arrays.get("sequence_lens")
    feeds = {"X": x} | ({} if lengths is None else {"sequence_lens": lengths})
    session = runtime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, *states = session.run(None, feeds)
    module, hx = convert.from_onnx(model)
    with torch.no_grad():
        more = {} if lengths is None else {"lengths": torch.as_tensor(lengths)}
        output, found = module(torch.as_tensor(x), hx, **more)
    # The operator's outputs are (T, D, N, H).
    check(output.unflatten(-1, (-1, H)).transpose(1, 2), y, 3e-6)
    for state, expected in zip(found if isinstance(found, tuple) else (found,), states, strict=True):
        check(state, expected, 3e-6)


@pytest.mark.parametrize("gates", ONNX_GATES)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("leave_out", LEAVE_OUT)
@pytest.mark.parametrize(("operator", "options"), ONNX_CASES)
def test_onnx_runtime_gated(
    onnx: Any,
    operator: str,
    options: dict[str, int],
    leave_out: str,
    directions: int,
    gates: str,
    rng: np.random.Generator,
) -> None:
    arrays = onnx_arrays(rng, operator, directions, np.float32, leave_out)
    x = rng.normal(size=(T, N, F)).astype(np.float32)
    check_runtime(onnx, operator, arrays, x, **onnx_attributes(operator, directions, gates, options))


@pytest.mark.parametrize("name", ["Tanh", "Relu", "Sigmoid", "Affine"])
def test_onnx_runtime_rnn(onnx: Any, name: str, rng: np.random.Generator) -> None:
    arrays, x = onnx_arrays(rng, "RNN", 2, np.float32), rng.normal(size=(T, N, F)).astype(np.float32)
    attributes = {"activation_alpha": [1.0] * 2, "activation_beta": [0.0] * 2} if name == "Affine" else {}
    check_runtime(
        onnx, "RNN", arrays, x, hidden_size=H, direction="bidirectional", activations=[name] * 2, **attributes
    )


def test_onnx_runtime_takes_slopes_in_order(onnx: Any, rng: np.random.Generator) -> None:
    arrays, x = onnx_arrays(rng, "LSTM", 2, np.float32), rng.normal(size=(T, N, F)).astype(np.float32)
    check_runtime(
        onnx, "LSTM", arrays, x, hidden_size=H, direction="bidirectional",
        activations=["HardSigmoid", "Tanh", "Tanh"] * 2, activation_alpha=[0.25, 0.4], activation_beta=[0.5, 0.3],
    )  # fmt: skip


@pytest.mark.parametrize("operator", ["LSTM", "GRU", "RNN"])
def test_onnx_runtime_lengths(onnx: Any, operator: str, rng: np.random.Generator) -> None:
    arrays, x = onnx_arrays(rng, operator, 2, np.float32), rng.normal(size=(T, N, F)).astype(np.float32)
    arrays["sequence_lens"] = np.array([7, 2, 5], np.int32)
    check_runtime(onnx, operator, arrays, x, hidden_size=H, direction="bidirectional")


def test_onnx_model_of_torch(onnx: Any) -> None:
    """Exported layers, of which each is chosen by its name; the older exporter has a node for a layer."""
    theirs = nn.LSTM(F, H, num_layers=2, bidirectional=True)
    buffer = io.BytesIO()
    torch.onnx.export(theirs, (torch.randn(T, N, F),), buffer, dynamo=False)
    model = onnx.load_from_string(buffer.getvalue())
    names = [node.name for node in model.graph.node if node.op_type == "LSTM"]
    with pytest.raises(ValueError, match=f"name: expected that of one node among '{names[0]}', '{names[1]}', got None"):
        convert.from_onnx(model)
    with pytest.raises(ValueError, match=r"name: expected a node among .* got 'nothing'"):
        convert.from_onnx(model, name="nothing")
    output = x = torch.randn(T, N, F)
    for name in names:
        module, _ = convert.from_onnx(model, name=name)
        output, _ = module(output)
    torch.testing.assert_close(output, theirs(x)[0], atol=2e-6, rtol=0)


def test_onnx_model_forms(onnx: Any, rng: np.random.Generator) -> None:
    arrays = onnx_arrays(rng, "GRU", 1, np.float32)
    model = onnx_model(onnx, "GRU", arrays, hidden_size=H)
    modules = [
        convert.from_onnx(model, name="rnn")[0],
        convert.from_onnx(model, name="Y_h")[0],
        convert.from_onnx(onnx_model(onnx, "GRU", arrays, constant_nodes=True, hidden_size=H))[0],
        convert.from_onnx(model.graph.node[0], model.graph.initializer)[0],
        convert.from_onnx(model.graph.node[0], {each.name: each for each in model.graph.initializer})[0],
        convert.from_onnx(model.graph.node[0], arrays)[0],
    ]
    for module in modules[1:]:
        for key, value in modules[0].state_dict().items():
            assert torch.equal(module.state_dict()[key], value)
    with pytest.raises(TypeError, match="initializers: expected None with a model"):
        convert.from_onnx(model, {})
    with pytest.raises(TypeError, match="name: expected None with a node, got 'rnn'"):
        convert.from_onnx(model.graph.node[0], arrays, name="rnn")


def test_onnx_bfloat16(onnx: Any, rng: np.random.Generator) -> None:
    types = pytest.importorskip("ml_dtypes")
    arrays = onnx_arrays(rng, "GRU", 1, types.bfloat16)
    module, hx = convert.from_onnx(onnx_model(onnx, "GRU", arrays, hidden_size=H))
    assert module.weight_hh_l0.dtype == hx.dtype == torch.bfloat16
    check(module.weight_hh_l0.detach().float()[:H], arrays["R"].astype(np.float32)[0, H : 2 * H], 0)

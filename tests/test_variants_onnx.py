"""Layers with the options that ONNX has too compute what its operators LSTM and GRU do, as onnxruntime runs them.

Their equations, of gates in another order and under other names: https://onnx.ai/onnx/operators/onnx__LSTM.html and
onnx__GRU.html. A float64 loop over these says who is wrong where the two differ.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from tolerances import error

onnx = pytest.importorskip("onnx", reason="models for onnxruntime are written with onnx: pip install onnx")
runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is asked where it is installed: pip install it")

T, B, I, H = 7, 4, 5, 9  # noqa: E741
# Of float32, from one order of summation and one approximation of tanh to another.
TOLERANCE = 1e-5
ORDER = {"LSTM": "iofg", "GRU": "zrn"}  # ONNX calls our g c, and our n h
HARD = {"gate_activation": "hard_sigmoid"}
_BOTH = {"peephole": True, "coupled": True}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("LSTM", {"peephole": True}),
    ("LSTM", {"coupled": True}),
    ("LSTM", _BOTH),
    ("LSTM", HARD),
    ("LSTM", {**_BOTH, **HARD}),
    ("GRU", {}),
    ("GRU", {"reset_after": False}),
    ("GRU", HARD),
    ("GRU", {"reset_after": False, **HARD}),
]
IDS = [" ".join([kind, *(f"{name}={value}" for name, value in options.items())]) for kind, options in CASES]


def gates(kind: str, options: dict[str, Any]) -> str:
    """Ours, in our order."""
    return "rzn" if kind == "GRU" else "igo" if options.get("coupled") else "ifgo"


def in_order(value: Tensor, ours: str, theirs: str) -> Tensor:
    """Rows of gates (G*H, ...) in the other order. Of a gate that we do not have, any numbers: nobody may use them."""
    pieces = dict(zip(ours, value.detach().chunk(len(ours)), strict=True))
    unused = torch.full_like(pieces[ours[0]], 3.0)
    return torch.cat([pieces.get(gate, unused) for gate in theirs])


def session_of(layer: nn.RNNBase, kind: str, options: dict[str, Any], has_lengths: bool) -> Any:
    """A session whose model is the one operator, with the weights of the layer in it."""
    ours, theirs, suffixes = gates(kind, options), ORDER[kind], layer._suffixes()

    def stacked(name: str, suffix_to: Any) -> Any:
        return onnx.numpy_helper.from_array(torch.stack([suffix_to(suffix) for suffix in suffixes]).numpy(), name)

    def of(kind_of_parameter: str, suffix: str, order: str = theirs, named: str = ours) -> Tensor:
        return in_order(getattr(layer, kind_of_parameter + suffix), named, order)

    constants = [
        stacked("W", lambda suffix: of("weight_ih", suffix)),
        stacked("R", lambda suffix: of("weight_hh", suffix)),
        stacked("B", lambda suffix: torch.cat([of("bias_ih", suffix), of("bias_hh", suffix)])),
    ]
    states = ["h", "c"] if kind == "LSTM" else ["h"]
    inputs = ["x", "W", "R", "B", "lengths" if has_lengths else "", *(f"{state}0" for state in states)]
    if options.get("peephole"):
        named = ours.replace("g", "")
        constants.append(stacked("P", lambda suffix: of("weight_peephole", suffix, "iof", named)))
        inputs.append("P")
    directions = len(suffixes)
    attributes: dict[str, Any] = {"hidden_size": H, "direction": "bidirectional" if directions == 2 else "forward"}
    if kind == "GRU":
        attributes["linear_before_reset"] = int(options.get("reset_after", True))
    if options.get("coupled"):
        attributes["input_forget"] = 1
    if "gate_activation" in options:
        # Of each direction one alpha and one beta, as only the first of its functions has any.
        attributes["activations"] = ["HardSigmoid", *["Tanh"] * len(states)] * directions
        attributes |= {"activation_alpha": [0.2] * directions, "activation_beta": [0.5] * directions}
    outputs = ["y", *(f"{state}_n" for state in states)]
    node = onnx.helper.make_node(kind, inputs, outputs, **attributes)

    def tensor(name: str, shape: list[Any], type: int = onnx.TensorProto.FLOAT) -> Any:
        return onnx.helper.make_tensor_value_info(name, type, shape)

    given = [tensor("x", [T, B, I]), *(tensor(f"{state}0", [directions, B, H]) for state in states)]
    given += [tensor("lengths", [B], onnx.TensorProto.INT32)] * has_lengths
    made = [tensor("y", [T, directions, B, H]), *(tensor(f"{state}_n", [directions, B, H]) for state in states)]
    graph = onnx.helper.make_graph([node], kind, given, made, constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 14)], ir_version=8)
    onnx.checker.check_model(model)
    settings = runtime.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 3
    return runtime.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def by_equations(
    layer: nn.RNNBase, kind: str, options: dict[str, Any], x: Tensor, states: list[Tensor], ends: list[int]
) -> list[Tensor]:
    """The operators' equations in float64, by their documentation, each row of the batch by itself.

    Returns Y (T, D, B, H), Y_h and of the LSTM Y_c (D, B, H).
    """

    def f(value: Tensor) -> Tensor:
        return (0.2 * value + 0.5).clamp(0, 1) if "gate_activation" in options else value.sigmoid()

    ours, suffixes = gates(kind, options), layer._suffixes()
    y = torch.zeros(T, len(suffixes), B, H, dtype=torch.float64)
    final = [state.double().clone() for state in states]
    for d, suffix in enumerate(suffixes):

        def of(name: str, ours: str = ours, suffix: str = suffix) -> dict[str, Tensor]:
            value = getattr(layer, name + suffix).detach().double()
            return dict(zip(ours, value.chunk(len(ours)), strict=True))

        w, r, wb, rb = (of(name) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
        p = of("weight_peephole", ours.replace("g", "")) if options.get("peephole") else dict.fromkeys("ifo", 0.0)
        for n in range(B):
            h, *others = (state[d, n] for state in final)
            for t in range(ends[n])[:: -1 if d else 1]:
                from_x = {gate: w[gate] @ x[t, n].double() + wb[gate] for gate in ours}
                z = {gate: from_x[gate] + r[gate] @ h + rb[gate] for gate in ours}
                if kind == "LSTM":
                    (c,) = others
                    i = f(z["i"] + p["i"] * c)
                    forget = 1 - i if options.get("coupled") else f(z["f"] + p["f"] * c)
                    c = forget * c + i * z["g"].tanh()
                    h, others = f(z["o"] + p["o"] * c) * c.tanh(), [c]
                else:
                    update, reset = f(z["z"]), f(z["r"])
                    if options.get("reset_after", True):
                        new = from_x["n"] + reset * (r["n"] @ h + rb["n"])
                    else:
                        new = from_x["n"] + r["n"] @ (reset * h) + rb["n"]
                    h = (1 - update) * new.tanh() + update * h
                y[t, d, n] = h
            for state, value in zip(final, [h, *others], strict=True):
                state[d, n] = value
    return [y, *final]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=IDS)
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("lengths", [None, [7, 3, 1, 5]], ids=["all steps", "lengths"])
def test_onnxruntime_agrees(kind: str, options: dict[str, Any], bidirectional: bool, lengths: list[int] | None) -> None:
    layer = getattr(rnnfast, kind)(I, H, bidirectional=bidirectional, **options)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, -0.8, 0.8)
    x = 3 * torch.randn(T, B, I)  # beyond both kinks of the hard sigmoid
    states = [torch.randn(1 + bidirectional, B, H) for _ in range(1 + (kind == "LSTM"))]
    with torch.no_grad():
        output, final = layer(x, tuple(states) if kind == "LSTM" else states[0], lengths=lengths)
    actual = [output.unflatten(-1, (-1, H)).transpose(1, 2), *(final if kind == "LSTM" else [final])]

    feed = {"x": x.numpy(), **{f"{name}0": state.numpy() for name, state in zip("hc", states, strict=False)}}
    if lengths is not None:
        feed["lengths"] = torch.tensor(lengths, dtype=torch.int32).numpy()
    theirs = session_of(layer, kind, options, lengths is not None).run(None, feed)

    expected = by_equations(layer, kind, options, x, states, lengths or [T] * B)
    names = ["Y", "Y_h", "Y_c"][: len(expected)]
    for name, one, other, true in zip(names, actual, theirs, expected, strict=True):
        assert error(torch.from_numpy(other), true) <= TOLERANCE, f"onnxruntime is not as ONNX says: {name}"
        assert error(one, true) <= TOLERANCE, f"{name} is not as ONNX says"
        assert error(one, torch.from_numpy(other)) <= TOLERANCE, name

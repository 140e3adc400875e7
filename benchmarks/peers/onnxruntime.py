"""onnxruntime, as an application would use it: a model file with the weights in it, the default session, NumPy arrays
in and out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peers import library, need, weights
from rnnfast.benchmark import Call, Case, Data
from rnnfast.benchmark.case import GATES, STREAMED

# Behind a call the threads of its pool spin for milliseconds, on the cores of whoever has the next turn.
THREADS_STAY_AWAKE = True

# Where ONNX has the gate that stands at each place in its order: LSTM i o f c of torch's i f g o; GRU z r h of r z n.
ONNX_ORDER = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2), "RNN": (0,)}


def onnx_order(cell: str, value: Tensor) -> Tensor:
    """Rows of gates (G*H, ...) in ONNX's order."""
    gates = value.detach().cpu().float().chunk(GATES[cell])
    return torch.cat([gates[place] for place in ONNX_ORDER[cell]])


def onnx_model(layer: torch.nn.RNNBase, case: Case) -> bytes:
    """A model file of the layer.

    Inputs: x (T, B, I), h0 and, for the LSTM, c0 (D*L, B, H), and for rows of different lengths `lengths` (B,) int32.
    Outputs: output (T, B, D*H), h_n and c_n (D*L, B, H), as torch.nn has them.
    """
    onnx = library("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    kind = onnx.TensorProto.FLOAT
    nodes, constants = [], []

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.contiguous().numpy(), name))
        return name

    directions, lstm = case.directions, case.cell == "LSTM"
    states = ["h", "c"] if lstm else ["h"]
    joined = constant("joined", torch.tensor([0, 0, -1]))
    cuts = constant("cuts", torch.tensor([directions] * case.layers))
    for state in states:
        parts = [f"{state}0_{number}" for number in range(case.layers)]
        if case.layers > 1:
            nodes.append(helper.make_node("Split", [f"{state}0", cuts], parts, axis=0))
        else:
            nodes.append(helper.make_node("Identity", [f"{state}0"], parts))
    below = "x"
    for number in range(case.layers):
        of_layer = [weights(layer, number, direction) for direction in range(directions)]
        w, r = (
            constant(f"{name}_{number}", torch.stack([onnx_order(case.cell, each[place]) for each in of_layer]))
            for place, name in enumerate("WR")
        )
        b = constant(
            f"B_{number}",
            torch.stack([torch.cat([onnx_order(case.cell, each[place]) for place in (2, 3)]) for each in of_layer]),
        )
        options: dict[str, Any] = {
            "hidden_size": case.hidden_size,
            "direction": "bidirectional" if directions == 2 else "forward",
        }
        if case.cell == "GRU":
            # torch's: the reset gate multiplies W_hn h + b_hn, not h.
            options["linear_before_reset"] = 1
        inputs = [below, w, r, b, "lengths" if case.lengths else "", *(f"{state}0_{number}" for state in states)]
        outputs = [f"Y_{number}", *(f"Y_{state}_{number}" for state in states)]
        nodes.append(helper.make_node(case.cell, inputs, outputs, **options))
        # Y is (T, D, B, H).
        nodes.append(helper.make_node("Transpose", [f"Y_{number}"], [f"turned_{number}"], perm=[0, 2, 1, 3]))
        below = "output" if number == case.layers - 1 else f"output_{number}"
        nodes.append(helper.make_node("Reshape", [f"turned_{number}", joined], [below]))
    for state in states:
        parts = [f"Y_{state}_{number}" for number in range(case.layers)]
        nodes.append(helper.make_node("Concat", parts, [f"{state}_n"], axis=0))

    def tensor(name: str, shape: list[Any], type: int = kind) -> Any:
        return helper.make_tensor_value_info(name, type, shape)

    stacked = [directions * case.layers, "B", case.hidden_size]
    ins = [tensor("x", ["T", "B", case.inputs]), *(tensor(f"{state}0", stacked) for state in states)]
    ins += [tensor("lengths", ["B"], onnx.TensorProto.INT32)] * case.lengths
    outs = [tensor("output", ["T", "B", directions * case.hidden_size])]
    outs += [tensor(f"{state}_n", stacked) for state in states]
    graph = helper.make_graph(nodes, case.cell, ins, outs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def peer(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
    """onnxruntime's CPU provider, with as many threads as torch has."""
    need(workload != "training", "onnxruntime computes no gradients")
    need(data.values.device.type == "cpu", "onnxruntime is compared on the CPU")
    need(case.dtype == "float32", "onnxruntime's CPU layers are in float32")
    need(not case.resets, "ONNX has no resets")
    need(not case.proj_size, "ONNX has no projection")
    need(not case.packed, "ONNX has no packed rows")
    runtime = library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    session = runtime.InferenceSession(onnx_model(layer, case), options, providers=["CPUExecutionProvider"])
    states = ["h", "c"] if case.cell == "LSTM" else ["h"]
    zeros = torch.zeros(case.directions * case.layers, case.batch, case.hidden_size).numpy()
    feed = {"x": data.values.numpy(), **{f"{state}0": zeros for state in states}}
    if data.lengths is not None:
        feed["lengths"] = data.lengths.int().numpy()

    def forward() -> list[Tensor]:
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    rows = [row.unsqueeze(0).numpy() for row in data.values[:STREAMED]]

    def stream() -> list[Tensor]:
        given, results = dict(feed), []
        for row in rows:
            given["x"] = row
            results = session.run(None, given)
            given.update({f"{state}0": value for state, value in zip(states, results[1:], strict=True)})
        return [torch.from_numpy(value) for value in results]

    return stream if workload == "streaming" else forward

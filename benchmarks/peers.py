"""Other libraries' recurrent layers, for comparison: each as a call that gives what torch.nn's gives, in its order.

`PEERS` has an adapter for each library: from torch.nn's layer, the case, the workload and the data it builds the call
that `rnnfast.benchmark.measure` checks, as it checks rnnfast's own, and then times. An adapter raises `Impossible`,
which says why, where the library is not installed or does not have what the case needs; nothing is timed then.

onnxruntime is used as an application would: a model file with the weights in it, the default session, NumPy arrays in
and out. The others are GPU libraries. They take the input's gates as an argument (FlashRNN), or make them themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rnnfast.benchmark import Impossible, Peer
from rnnfast.benchmark.case import GATES, STREAMED, Call, Case, Data


def library(name: str) -> Any:
    """The library's module.

    Raises:
        Impossible: it is not installed, or does not load here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        # The name alone where the library itself is missing; its own error where it is there and something else is not.
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        raise Impossible(f"{name} is not installed" if missing else f"{name} does not load: {error}") from error
    except (OSError, RuntimeError) as error:
        raise Impossible(f"{name} does not load: {str(error).splitlines()[0]}") from error


def need(condition: bool, reason: str) -> None:
    """Raises `Impossible` unless the condition holds."""
    if not condition:
        raise Impossible(reason)


def weights(layer: torch.nn.RNNBase, number: int, direction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight_ih (G*H, in), weight_hh (G*H, H), bias_ih (G*H,), bias_hh (G*H,) of a layer and direction."""
    suffix = f"_l{number}" + "_reverse" * direction
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return w_ih, w_hh, b_ih, b_hh


# --- onnxruntime -----------------------------------------------------------------------------------------------------

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


def onnxruntime(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
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


# --- GPU libraries ---------------------------------------------------------------------------------------------------


def need_plain_layer(case: Case, data: Data, name: str) -> None:
    """Raises `Impossible` unless the case is one layer, one direction, dense rows, on a CUDA device."""
    need(data.values.device.type == "cuda", f"{name} needs a CUDA device")
    need(case.layers == 1 and case.directions == 1, f"{name} has one layer and one direction")
    need(not case.ragged, f"{name} takes dense rows only")
    need(not case.proj_size, f"{name} has no projection")


def trained(forward: Callable[[Tensor], Tensor], workload: str, data: Data, leaves: list[Tensor], mine: int) -> Call:
    """The call of a library whose layer is differentiable.

    Args:
        forward: input (T, B, I) -> output (T, B, H).
        workload: "inference" or "training".
        data: the input.
        leaves: the weights, whose gradients are computed too.
        mine: how many of these are laid out as torch.nn's, and so are handed back to be checked.
    """
    need(workload != "streaming", "compared over whole sequences only")
    if workload == "inference":

        def inference() -> list[Tensor]:
            with torch.no_grad():
                return [forward(data.values)]

        return inference
    leaf = data.values.detach().requires_grad_()
    with torch.no_grad():
        shape = forward(leaf).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(leaf)

    def training() -> list[Tensor]:
        output = forward(leaf)
        return [output, *torch.autograd.grad(output, [leaf, *leaves], grad)[: 1 + mine]]

    return training


def flashrnn(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
    """FlashRNN's fused CUDA kernels; the input's gates are made by torch, one head."""
    need_plain_layer(case, data, "FlashRNN")
    need(not case.resets, "FlashRNN has no resets")
    need(case.dtype in ("bfloat16", "float16", "float32"), f"FlashRNN has no {case.dtype}")
    module = library("flashrnn")
    # Releases differ in where the function stands.
    function = module.flashrnn if callable(getattr(module, "flashrnn", None)) else library("flashrnn.flashrnn").flashrnn
    w_ih, w_hh, b_ih, b_hh = weights(layer, 0, 0)
    gates, hidden = GATES[case.cell], case.hidden_size
    # FlashRNN's GRU: gates r, z, n of the input; n, r, z of the state; biases of both parts, n twice.
    order = (2, 0, 1) if case.cell == "GRU" else tuple(range(gates))

    def forward(x: Tensor) -> Tensor:
        wx = F.linear(x, w_ih).transpose(0, 1).reshape(case.batch, case.steps, gates, 1, hidden)
        r = torch.stack([w_hh.view(gates, 1, hidden, hidden)[place] for place in order])
        if case.cell == "GRU":
            both = b_ih + b_hh
            b = torch.stack([b_hh[2 * hidden :], both[:hidden], both[hidden : 2 * hidden], b_ih[2 * hidden :]])
        else:
            b = b_ih + b_hh
        b = b.view(-1, 1, hidden)
        name = {"LSTM": "lstm", "GRU": "gru", "RNN": "elman"}[case.cell]
        states, _ = function(wx, r, b, function=name, backend="cuda_fused", dtype=case.dtype)
        # (states, B, T, heads, H): h is the first state.
        return states[0, :, :, 0].transpose(0, 1)

    return trained(forward, workload, data, [w_ih, w_hh, b_ih, b_hh], 4)


def haste(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
    """haste's LSTM and GRU; its weights are laid out in its own way: of the gradients the input's alone is checked."""
    need_plain_layer(case, data, "haste")
    need(not case.resets, "haste has no resets")
    need(case.cell in ("LSTM", "GRU"), "haste has no plain RNN")
    need(case.dtype in ("float32", "float64"), "haste has no 16-bit types")
    module = library("haste_pytorch")
    theirs = getattr(module, case.cell)(case.inputs, case.hidden_size).to(data.values)
    theirs.from_native_weights(*(value.detach() for value in weights(layer, 0, 0)))
    theirs.train(workload == "training")
    return trained(lambda x: theirs(x)[0], workload, data, list(theirs.parameters()), 0)


def torchrl(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
    """TorchRL's Triton kernels, with resets; (B, T, I) inside, so that their input is laid out anew in each call."""
    need_plain_layer(case, data, "TorchRL")
    need(case.cell in ("LSTM", "GRU"), "TorchRL has no plain RNN")
    need(case.dtype == "float32", "TorchRL's kernels take float32")
    # There is no public function below TorchRL's modules, which want dictionaries of tensors.
    module = library("torchrl.modules.tensordict_module._rnn_triton")
    function = getattr(module, f"{case.cell.lower()}_triton", None)
    need(function is not None, "this TorchRL has no Triton kernels")
    parameters = list(weights(layer, 0, 0))
    zeros = data.values.new_zeros(case.batch, case.steps, case.hidden_size)
    if data.resets is None:
        begins = torch.zeros(case.batch, case.steps, dtype=torch.bool, device=zeros.device)
    else:
        begins = data.resets.t().contiguous()
    states = [zeros] * (2 if case.cell == "LSTM" else 1)
    # The same precision as the other sides.
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "ieee"

    def forward(x: Tensor) -> Tensor:
        results = function(x.transpose(0, 1).contiguous(), *states, *parameters, begins, input_precision=precision)
        output: Tensor = results[0].transpose(0, 1)
        return output

    return trained(forward, workload, data, parameters, 4)


PEERS: dict[str, Peer] = {
    "onnxruntime": onnxruntime,
    "flashrnn": flashrnn,
    "haste_pytorch": haste,
    "torchrl": torchrl,
}

"""FlashRNN's fused CUDA kernels; the input's gates, which it takes as an argument, are made by torch; one head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from peers import library, need, need_plain_layer, trained, weights
from rnnfast.benchmark import Call, Case, Data
from rnnfast.benchmark.case import GATES


def peer(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
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

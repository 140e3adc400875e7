"""haste's LSTM and GRU; its weights are laid out in its own way: of the gradients the input's alone is checked."""

from __future__ import annotations

import torch

from peers import library, need, need_plain_layer, trained, weights
from rnnfast.benchmark import Call, Case, Data


def peer(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
    need_plain_layer(case, data, "haste")
    need(not case.resets, "haste has no resets")
    need(case.cell in ("LSTM", "GRU"), "haste has no plain RNN")
    need(case.dtype in ("float32", "float64"), "haste has no 16-bit types")
    module = library("haste_pytorch")
    theirs = getattr(module, case.cell)(case.inputs, case.hidden_size).to(data.values)
    theirs.from_native_weights(*(value.detach() for value in weights(layer, 0, 0)))
    theirs.train(workload == "training")
    return trained(lambda x: theirs(x)[0], workload, data, list(theirs.parameters()), 0)

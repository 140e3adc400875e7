"""TorchRL's Triton kernels, with resets; (B, T, I) inside, so that their input is laid out anew in each call."""

from __future__ import annotations

import torch
from torch import Tensor

from peers import library, need, need_plain_layer, trained, weights
from rnnfast.benchmark import Call, Case, Data


def peer(layer: torch.nn.RNNBase, case: Case, workload: str, data: Data) -> Call:
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

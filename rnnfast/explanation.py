"""`explain`: which backend and kernel run a module's call, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backends import BACKENDS, asked_for, select, torch_runs_cell, torch_runs_layers, why_reference
from .cells import Cell
from .modules import Recurrent
from .sequences import Sequences


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is one readable paragraph.

    Attributes:
        backend: name of the backend that runs the call, `torch.nn` where torch's own does.
        kernel: what runs inside that backend.
        reason: why this backend.
    """

    backend: str
    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"backend {self.backend}: {self.kernel}; {self.reason}"


def explain(module: Any, input: Any) -> Explanation:
    """Says which backend and which kernel run `module(input)`, and why.

    Args:
        module: a layer or a cell, of rnnfast or of torch.nn.
        input: its input, a tensor (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence; for a cell (B, I)
            or (I,).

    Returns:
        Explanation: backend, kernel, and the reason.

    Raises:
        TypeError: `module` is not a recurrent module, or `input` is neither a tensor nor a PackedSequence.
        RuntimeError: a backend was asked for by name that cannot run this input.
    """
    cell = isinstance(module, torch.nn.RNNCellBase)
    if not cell and not isinstance(module, torch.nn.RNNBase):
        raise TypeError(
            f"rnnfast.explain: module should be an LSTM, GRU, RNN or one of their cells, got {type(module).__name__}"
        )
    packed = isinstance(input, torch.nn.utils.rnn.PackedSequence) and not cell
    data = input.data if packed else input
    if not isinstance(data, Tensor):
        raise TypeError(
            f"rnnfast.explain: input should be a tensor{'' if cell else ' or a PackedSequence'}, "
            f"got {type(input).__name__}"
        )
    if not isinstance(module, (Cell, Recurrent)):
        return Explanation("torch.nn", "torch.nn's own", "a module of torch.nn; rnnfast.accelerate(model) swaps it")
    mode, weights = module._mode(), module._weights()
    training = torch.is_grad_enabled() and (data.requires_grad or any(weight.requires_grad for weight in weights))
    torchs: str | None = None
    if training and not packed:
        if isinstance(module, Cell):
            torchs = torch_runs_cell(mode, data if data.dim() == 2 else data.unsqueeze(0), None, None, weights)
        else:
            batched = data if data.dim() == 3 else data.unsqueeze(0 if module.batch_first else 1)
            sequences = Sequences(batch_first=bool(module.batch_first))
            torchs = torch_runs_layers(mode, batched, None, sequences, weights)
    if torchs:
        return Explanation("torch.nn", "torch's own op for one step, in training", torchs)

    name, asked = select(data), asked_for()
    reason = f"asked for by name ({asked!r})" if asked != "auto" else f"the fastest available for {data.device.type!r}"
    kernel = BACKENDS[name].kernel(mode, module, data)
    if name != "reference":
        kernel += ", with reserve for backward" if training else ", inference"
    elif asked == "auto":
        reason = f"fallback: {why_reference(data.device.type)}"
    if isinstance(module, Cell):
        kernel += ", one step"
    else:
        kernel += f", {2 if module.bidirectional else 1} direction(s) a call, {module.num_layers} call(s)"
    if packed:
        kernel += ", packed rows as they are"
    return Explanation(name, kernel, reason)

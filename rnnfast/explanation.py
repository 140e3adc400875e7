"""`explain`: which backend and kernel run a module's call, and why."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from . import cuda_plan, libraries, ops
from .backends import (
    BACKENDS,
    asked_for,
    kernels_for_options,
    select,
    select_quantized,
    select_with_options,
    torch_runs_cell,
    torch_runs_layers,
    why_reference,
)
from .cells import Cell
from .modules import Recurrent
from .recompute.calls import trains
from .recompute.memory import in_words, memory_of
from .recompute.settings import Recompute, training_of
from .sequences import Sequences


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is one readable paragraph.

    Attributes:
        backend: name of the backend that runs the call, `torch.nn` where torch's own does.
        kernel: what runs inside that backend.
        reason: why this backend.
        plan: for the CUDA kernels: what csrc/cuda/plan.h chooses for a call's forward pass, in words: on the input's
            own device and with the plan that is preferred (`cuda_plan.prefer`). On the meta device: what it would
            choose on an H100. Else None.
        why: why that plan.
        predicted_us: microseconds a step of that plan. A prediction, not measured; so the rest.
        limited_by: what decides there: "launch", "exchange", "mma", "issue", "shared memory", "L2", "HBM" or "latency".
        recompute: of a layer told to save memory in training: what it does, and what that takes.
        backward_plan, backward_why, predicted_backward_us: the same of the backward pass, where there is one.
    """

    backend: str
    kernel: str
    reason: str
    plan: str | None = None
    predicted_us: float | None = None
    limited_by: str | None = None
    backward_plan: str | None = None
    predicted_backward_us: float | None = None
    why: str | None = None
    backward_why: str | None = None
    recompute: str | None = None

    def __str__(self) -> str:
        text = f"backend {self.backend}: {self.kernel}; {self.reason}"
        if self.plan is not None:
            text += f"; plan: {self.plan}; predicted, not measured: {self.predicted_us:.2f} us a step forward"
            if self.predicted_backward_us is not None:
                text += f", {self.predicted_backward_us:.2f} us backward"
            text += f", limited by {self.limited_by}; this plan: {self.why}"
        return text if self.recompute is None else f"{text}; {self.recompute}"


def explain(module: Any, input: Any) -> Explanation:
    """Says which backend and which kernel run `module(input)`, and why.

    Args:
        module: a layer or a cell, of rnnfast or of torch.nn.
        input: its input, a tensor (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence; for a cell (B, I)
            or (I,).

    Returns:
        Explanation: backend, kernel, and the reason; of CUDA kernels also the plan and its predicted time.

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
    if module._options is not None and module._options.changes_recurrence:
        found = _with_options(module, data)
        return replace(found, recompute=_recompute(module, input))
    mode, weights = module._mode(), module._weights()
    quantized: str | None = getattr(module, "weights_type", None)
    # With quantized weights there is no training.
    wanted = torch.is_grad_enabled() and (data.requires_grad or any(weight.requires_grad for weight in weights))
    training = wanted and quantized is None
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

    name, asked = (select if quantized is None else select_quantized)(data), asked_for()
    reason = f"asked for by name ({asked!r})" if asked != "auto" else f"the fastest available for {data.device.type!r}"
    found = Explanation(name, BACKENDS[name].kernel(mode, module, data), reason)
    on_meta = data.device.type == "meta"
    if name in ("cuda", "emulated") or (on_meta and name == "cpu"):
        found = _with_plan(found, module, input, mode, training)
    about = []
    if quantized is not None:
        about.append(f"{quantized} weights packed once{', unpacked in every call' if name == 'reference' else ''}")
    if name != "reference":
        about.append("with reserve for backward" if training else "inference")
    elif asked == "auto":
        found = replace(found, reason=f"fallback: {why_reference(data.device.type)}")
    if isinstance(module, Cell):
        about.append("one step")
    else:
        about.append(f"{2 if module.bidirectional else 1} direction(s) a call, {module.num_layers} call(s)")
    if packed:
        about.append("packed rows as they are")
    return replace(found, kernel=", ".join([found.kernel, *about]), recompute=_recompute(module, input))


def _recompute(module: Any, input: Any) -> str | None:
    """How a call of a layer saves memory in training, in words; None where it was not told to, or nobody trains."""
    told: Recompute | None = getattr(module, "_recompute", None)
    packed = isinstance(input, torch.nn.utils.rnn.PackedSequence)
    data = input.data if packed else input
    weights = None if told is None else module._weights()
    if told is None or weights is None or not trains(data, weights):
        return None
    if not packed and data.dim() == 2:
        data = data.unsqueeze(0 if module.batch_first else 1)
    sequences = Sequences(input.batch_sizes if packed else None, batch_first=bool(module.batch_first) and not packed)
    options = module._options if module._options is not None and module._options.changes_recurrence else None
    call = (module._mode(), data, weights, sequences, module.num_layers, bool(module.bidirectional), options)
    way = told.way(*call)
    memory = memory_of(training_of(*call), *(way or (None,)))
    what = f"recompute={module.recompute!r}"
    if told.how == "auto":
        what += f" within {in_words(told.budget)} takes {None if way is None else way.how!r}"
    elif way is None:
        what += " has nothing to make again in one step"
    return f"{what}: keeps {in_words(memory.kept)} for backward, takes {in_words(memory.peak)} at most"


def _with_options(module: Any, data: Tensor) -> Explanation:
    """Of a module whose options give it a time loop of its own."""
    name, why_not = select_with_options(data)
    why_not = module._options.why_no_kernel or why_not
    if why_not is None:
        kernel = kernels_for_options(name).kernel(not module._options.reset_after)
        return Explanation(name, f"{kernel}, one direction a call", f"has {module._options}")
    return Explanation("reference", BACKENDS["reference"].kernel("", module, data), why_not)


def _with_plan(found: Explanation, module: Any, input: Any, mode: str, training: bool) -> Explanation:
    """With the plan of one call of the CUDA kernels: a layer with all its directions, and of a module's layers the
    first. (The others differ in their input alone, which the plan does not depend on.)"""
    packed = isinstance(input, torch.nn.utils.rnn.PackedSequence)
    data = input.data if packed else input
    if ops.library_error is not None:
        return found
    if packed:
        steps, batch = len(input.batch_sizes), int(input.batch_sizes[0])
    elif isinstance(module, Cell):
        steps, batch = 1, data.shape[0] if data.dim() == 2 else 1
    else:
        steps, batch = data.shape[0], data.shape[1] if data.dim() == 3 else 1
        if module.batch_first and data.dim() == 3:
            steps, batch = batch, steps
    directions, projection = (2 if getattr(module, "bidirectional", False) else 1), getattr(module, "proj_size", 0)

    shape = (module.hidden_size, batch, steps, directions, projection)
    on_device = data.device.type != "meta"

    def planned(backward: bool) -> cuda_plan.Plan:
        if not on_device:
            arithmetic = cuda_plan.arithmetic_of(data.dtype)
            products = libraries.products_take_tf32()
            return cuda_plan.plan(
                mode, arithmetic, *shape, training=training, backward=backward, products_tf32=products
            )
        return cuda_plan.here(
            data.device, mode, data.dtype, *shape, training=training, backward=backward,
            emulated=found.backend == "emulated",
        )  # fmt: skip

    forward, back = planned(False), planned(True) if training else None
    kernel = found.kernel
    if found.backend != "cpu":
        kernel = f"{forward.kernels} ({found.kernel})"
        if back is not None and back.kernels != forward.kernels:
            kernel = f"forward {forward.kernels}, backward {back.kernels} ({found.kernel})"
    return replace(
        found,
        kernel=kernel,
        plan=str(forward),
        why=forward.why,
        predicted_us=forward.predicted_us,
        limited_by=forward.limited_by,
        backward_plan=None if back is None else str(back),
        backward_why=None if back is None else back.why,
        predicted_backward_us=None if back is None else back.predicted_us,
    )

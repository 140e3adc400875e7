"""Which backend computes a recurrence, and why: the only place where that is decided.

The backends are `cpu` (the C++ kernels), `reference` (plain PyTorch, any device and dtype), `cuda` and `triton`.
`auto`, the default, takes the fastest one that can run the tensor at hand and may fall back to `reference` (with one
warning); a backend that is asked for by name runs or raises an error that names what is missing.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import ops

NAMES = ("auto", "cpu", "cuda", "triton", "reference")

_NOT_BUILT = {
    "cuda": "the CUDA library is not part of this build",
    "triton": "the Triton kernels are not part of this build",
}

# The name asked for by `with backend(...)`, of this thread alone.
_asked = threading.local()
_asked.name = "auto"

_warned: set[str] = set()


class Availability(NamedTuple):
    """Whether a backend can run here, and the reason in words."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found. `str()` of it is one readable paragraph.

    Attributes:
        backend: name of the backend that runs the call.
        kernel: what runs inside that backend.
        reason: why this backend.
        prediction: predicted time a step in microseconds, or None where the backend has no cost model.
    """

    backend: str
    kernel: str
    reason: str
    prediction: float | None = None

    def __str__(self) -> str:
        text = f"backend {self.backend}: {self.kernel}; {self.reason}"
        if self.prediction is not None:
            text += f"; predicted {self.prediction:.2f} us a step"
        return text


# A backend with a cost model puts a function here: (mode, hidden_size, batch, dtype, training) -> microseconds a step.
predictors: dict[str, Callable[[str, int, int, torch.dtype, bool], float]] = {}


def backends() -> dict[str, Availability]:
    """The backends and whether each can run here.

    Returns:
        dict from name (`cpu`, `cuda`, `triton`, `reference`) to `Availability(available, reason)`.
    """
    described = {
        "cpu": f"C++ kernels, instruction set {ops.cpu_isa()}",
        "reference": "plain PyTorch: any device and dtype, slow",
    }
    missing = {name: _missing(name) for name in NAMES if name != "auto"}
    return {name: Availability(why is None, described[name] if why is None else why) for name, why in missing.items()}


def _missing(name: str) -> str | None:
    """Why the backend cannot run here, None where it can."""
    return ops.library_error if name == "cpu" else _NOT_BUILT.get(name)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Asks for one backend, in this thread, for the calls inside the `with`.

    Args:
        name: `auto`, `cpu`, `cuda`, `triton` or `reference`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; the message says what is missing.
    """
    if name not in NAMES:
        raise ValueError(f"rnnfast.backend: unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    missing = _missing(name)
    if missing is not None:
        raise RuntimeError(f"rnnfast.backend: {name!r} is not available: {missing}")
    before = getattr(_asked, "name", "auto")
    _asked.name = name
    try:
        yield
    finally:
        _asked.name = before


def select(tensor: Tensor) -> str:
    """Name of the backend that runs a recurrence on `tensor` (only its device matters).

    Raises:
        RuntimeError: a backend was asked for by name that cannot run this tensor.
    """
    name = getattr(_asked, "name", "auto")
    # The two common cases first: this is on the path of every call.
    if name == "auto":
        if tensor.is_cpu and ops.library_error is None:
            return "cpu"
        return _automatic(tensor.device.type)
    if name == "cpu" and tensor.device.type not in ("cpu", "meta"):
        raise RuntimeError(
            f"rnnfast: backend 'cpu' was asked for by name, but the input is on {tensor.device}; "
            "move the input and the module to the CPU, or leave the choice to 'auto'"
        )
    return name


def _automatic(device: str) -> str:
    """`auto`'s choice where it is not simply the C++ CPU kernels."""
    # Shapes on the meta device come from the same fake kernels that tracing uses.
    if device == "meta":
        return "cpu" if ops.library_error is None else "reference"
    _warn_once(device)
    return "reference"


def _reason(device: str) -> str:
    if device == "cpu":
        return str(ops.library_error)
    return _NOT_BUILT["cuda"] if device == "cuda" else f"there are no kernels for {device!r} devices"


def _warn_once(device: str) -> None:
    # Dynamo must not trace through the bookkeeping of warnings.
    if torch.compiler.is_compiling() or device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"rnnfast runs its slow reference implementation on {device!r} tensors: {_reason(device)}",
        UserWarning,
        stacklevel=5,
    )


def explain(module: Any, input: Any) -> Explanation:
    """Says which backend and which kernel run `module(input)`, and why.

    Args:
        module: an LSTM, GRU or RNN, of rnnfast or of torch.nn.
        input: its input, a tensor (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence.

    Returns:
        Explanation: backend, kernel, reason and, where the backend has a cost model, the predicted time a step.

    Raises:
        TypeError: `module` is not a recurrent module, or `input` is neither a tensor nor a PackedSequence.
        RuntimeError: a backend was asked for by name that cannot run this input.
    """
    if not isinstance(module, torch.nn.RNNBase):
        raise TypeError(f"rnnfast.explain: module should be an LSTM, GRU or RNN, got {type(module).__name__}")
    packed = isinstance(input, torch.nn.utils.rnn.PackedSequence)
    data = input.data if packed else input
    if not isinstance(data, Tensor):
        raise TypeError(f"rnnfast.explain: input should be a tensor or a PackedSequence, got {type(input).__name__}")
    if not type(module).__module__.startswith("rnnfast"):
        return Explanation("torch.nn", "torch.nn's own", "a module of torch.nn; rnnfast.accelerate(model) swaps it")
    if packed:
        batch = int(input.batch_sizes[0])
    elif data.dim() == 2:
        batch = 1
    else:
        batch = data.size(0 if module.batch_first else 1)
    training = torch.is_grad_enabled() and (data.requires_grad or any(p.requires_grad for p in module.parameters()))

    name = select(data)
    asked = getattr(_asked, "name", "auto")
    reason = f"asked for by name ({asked!r})" if asked != "auto" else f"the fastest available for {data.device.type!r}"
    if name == "reference" and asked == "auto":
        reason = f"fallback: {_reason(data.device.type)}"
    if name == "reference":
        kernel = "a loop over the steps in plain PyTorch"
    else:
        kernel = f"C++ time loop ({ops.cpu_isa()}), " + ("with reserve for backward" if training else "inference")
    kernel += f", {2 if module.bidirectional else 1} direction(s) a call, {module.num_layers} call(s)"
    if packed:
        kernel += ", packed rows as they are"
    predictor = predictors.get(name)
    prediction = predictor(module.mode, module.hidden_size, batch, data.dtype, training) if predictor else None
    return Explanation(name, kernel, reason, prediction)

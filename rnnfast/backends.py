"""Which backend computes a recurrence, and why: the only place where that is decided.

The backends are `cpu` (the C++ kernels), `cuda` (the CUDA kernels), `triton` and `reference` (plain PyTorch, any device
and dtype); developers have `emulated` too, the CUDA kernels compiled for the processor.
`auto`, the default, takes the fastest one that can run the tensor at hand and may fall back to `reference` (with one
warning); a backend that is asked for by name runs or raises an error that names what is missing.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import libraries, ops

NAMES = ("auto", "cpu", "cuda", "triton", "reference")

# The devices whose tensors a backend's kernels take. Shapes on the meta device come from the fake kernels of tracing.
_DEVICES = {
    "cpu": ("cpu", "meta"),
    "cuda": ("cuda", "meta"),
    "triton": ("cpu", "meta") if libraries.triton_interpreted() else ("cuda", "meta"),
    "emulated": ("cpu", "meta"),
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
        backend: name of the backend that runs the call, `torch.nn` where torch's own does.
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
        dict from name (`cpu`, `cuda`, `triton`, `reference`, and `emulated` where it was loaded) to
        `Availability(available, reason)`.
    """
    names = [name for name in NAMES if name != "auto"] + (["emulated"] if ops.emulated_loaded else [])
    missing = {name: _missing(name) for name in names}
    return {name: Availability(why is None, why or _describe(name)) for name, why in missing.items()}


def _describe(name: str) -> str:
    """What an available backend is, in words."""
    if name == "cpu":
        return f"C++ kernels, instruction set {ops.cpu_isa()}"
    if name == "cuda":
        return f"CUDA kernels, one launch a step, for {torch.ops.rnnfast.cuda_archs()}"
    if name == "triton":
        where = "in Triton's interpreter on the CPU: very slow" if libraries.triton_interpreted() else "compiled on use"
        return f"Triton kernels, {where}"
    if name == "emulated":
        return "the CUDA kernels compiled for the processor, for tests: very slow"
    return "plain PyTorch: any device and dtype, slow"


def _missing(name: str) -> str | None:
    """Why the backend cannot run here, None where it can."""
    if name == "cpu":
        return ops.library_error
    if name == "cuda":
        return libraries.cuda_problem()
    return libraries.triton_problem() if name == "triton" else None


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Asks for one backend, in this thread, for the calls inside the `with`.

    Args:
        name: `auto`, `cpu`, `cuda`, `triton` or `reference`; for developers `emulated`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; the message says what is missing.
    """
    if name == "emulated":
        ops.load_emulated()
    elif name not in NAMES:
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
    devices = _DEVICES.get(name)
    if devices is not None and tensor.device.type not in devices:
        raise RuntimeError(
            f"rnnfast: backend {name!r} was asked for by name, but the input is on {tensor.device}; move the input and "
            f"the module to {'the CPU' if devices[0] == 'cpu' else 'a CUDA device'}, or leave the choice to 'auto'"
        )
    return name


def _automatic(device: str) -> str:
    """`auto`'s choice where it is not simply the C++ CPU kernels."""
    if device == "cuda" and libraries.cuda_ready():
        return "cuda"
    # Not for what the interpreter alone could do: a name must ask for that.
    if device == "cuda" and not libraries.triton_interpreted() and libraries.triton_ready():
        return "triton"
    if device == "meta":
        return "cpu" if ops.library_error is None else "reference"
    _warn_once(device)
    return "reference"


# Bound once: on the path of every training call.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled


def torchs_step_is_faster(mode: str, batch: int, one_gate: int, cell: bool) -> str | None:
    """Whether torch's own op is faster than our kernels in training of one step on the CPU.

    The table that this rule comes from is in docs/performance.md.

    Args:
        mode: LSTM, GRU, RNN_TANH, RNN_RELU or RNN_IDENTITY.
        batch: B.
        one_gate: weights of one gate, H * (I + H).
        cell: whether a cell is called, else layers.

    Returns:
        The reason in words; None where ours is to run.
    """
    if mode == "RNN_IDENTITY":  # torch has no such op
        return None
    if batch == 1 and one_gate >= 2**15:
        return "torch's own op reads the weights for a single row faster"
    if mode not in ("LSTM", "GRU") and 0 < batch * one_gate < (2**20 if cell else 2**18):
        return "in so small a step what surrounds the kernels decides, and torch's own op has less of it"
    return None


def torch_runs_cell(
    mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Sequence[Tensor]
) -> str | None:
    """Whether a cell's call in grad mode is better left to torch's own op: so for some sizes in training on the CPU.

    Args:
        mode: LSTM, GRU, RNN_TANH, RNN_RELU or RNN_IDENTITY.
        input: (B, I).
        hx, cx: (B, H), None for zeros.
        weights: weight_ih (G*H, I), weight_hh (G*H, H) and, where there are, the biases.

    Returns:
        Why torch's own op runs it; None where our kernels do.
    """
    if _is_compiling() or _tracing_state() is not None:
        return None
    hidden_size = weights[1].shape[1]
    reason = torchs_step_is_faster(mode, input.shape[0], hidden_size * (input.shape[1] + hidden_size), True)
    return reason if reason and _is_plain_training(input, (hx, cx, *weights)) else None


def torch_runs_layers(
    mode: str, batch_first: bool, input: Tensor, hx: Tensor | None, weights: Sequence[Tensor]
) -> str | None:
    """As `torch_runs_cell`, for layers over `input`, (T, B, I) or with batch_first (B, T, I): one step of GRU and RNN.

    torch.nn's LSTM goes another way on the CPU, and ours was faster at T = 1 at every size measured.
    """
    # A tracer would record this look at the shapes.
    if mode == "LSTM" or _is_compiling() or _tracing_state() is not None or input.shape[1 if batch_first else 0] != 1:
        return None
    batch, hidden_size = input.shape[0 if batch_first else 1], weights[1].shape[1]
    reason = torchs_step_is_faster(mode, batch, hidden_size * (input.shape[2] + hidden_size), False)
    return reason if reason and _is_plain_training(input, (hx, *weights)) else None


def _is_plain_training(input: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether torch's op may stand in: nobody asked for a backend, and autograd looks on, and nothing else does."""
    return (
        input.is_cpu
        # In 16 bits torch rounds within the step.
        and input.dtype in (torch.float32, torch.float64)
        and getattr(_asked, "name", "auto") == "auto"
        and ops.library_error is None
        and not _functorch_active()
        and not _autocast_active()
        and forward_ad._current_level < 0
        and any(tensor is not None and tensor.requires_grad for tensor in (input, *others))
    )


def _reason(device: str) -> str:
    if device == "cpu":
        return str(ops.library_error)
    if device == "cuda":
        triton = libraries.triton_problem() or "TRITON_INTERPRET is set"
        return f"CUDA kernels: {libraries.cuda_problem()}; Triton kernels: {triton}"
    return f"there are no kernels for {device!r} devices"


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


def _triton_kernel(mode: str, module: Any, data: Tensor) -> str:
    from .triton import layers  # imports Triton

    family = layers.family_of(mode, data.dtype, module.hidden_size, getattr(module, "proj_size", 0) > 0)
    return {"persistent": "one launch a layer (Triton)", "step": "one launch a step (Triton)"}[family]


def _mode_of(module: Any) -> str:
    if isinstance(module, torch.nn.RNNBase):
        return module.mode
    if isinstance(module, torch.nn.RNNCell):
        return f"RNN_{module.nonlinearity.upper()}"
    return "LSTM" if isinstance(module, torch.nn.LSTMCell) else "GRU"


def explain(module: Any, input: Any) -> Explanation:
    """Says which backend and which kernel run `module(input)`, and why.

    Args:
        module: an LSTM, GRU, RNN, LSTMCell, GRUCell or RNNCell, of rnnfast or of torch.nn.
        input: its input, a tensor (T, B, I), (B, T, I) with batch_first, (T, I), or a PackedSequence; for a cell (B, I)
            or (I,).

    Returns:
        Explanation: backend, kernel, reason and, where the backend has a cost model, the predicted time a step.

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
    from . import cells, modules  # which import this module

    if not isinstance(module, (cells.Cell, modules.Recurrent)):
        return Explanation("torch.nn", "torch.nn's own", "a module of torch.nn; rnnfast.accelerate(model) swaps it")
    mode, weights = _mode_of(module), module._weights()
    training = torch.is_grad_enabled() and (data.requires_grad or any(weight.requires_grad for weight in weights))
    torchs: str | None = None
    if packed:
        batch = int(input.batch_sizes[0])
    elif cell:
        rows = data if data.dim() == 2 else data.unsqueeze(0)
        batch = rows.size(0)
        torchs = torch_runs_cell(mode, rows, None, None, weights) if training else None
    else:
        axis = 0 if module.batch_first else 1
        rows = data if data.dim() == 3 else data.unsqueeze(axis)
        batch = rows.size(axis)
        torchs = torch_runs_layers(mode, bool(module.batch_first), rows, None, weights) if training else None
    if torchs:
        return Explanation("torch.nn", "torch's own op for one step, in training", torchs)

    name = select(data)
    asked = getattr(_asked, "name", "auto")
    reason = f"asked for by name ({asked!r})" if asked != "auto" else f"the fastest available for {data.device.type!r}"
    if name == "reference" and asked == "auto":
        reason = f"fallback: {_reason(data.device.type)}"
    if name == "reference":
        kernel = "a loop over the steps in plain PyTorch"
    else:
        kernel = {
            "cpu": f"C++ time loop ({ops.cpu_isa()})",
            "cuda": "one launch a step (CUDA)",
            "triton": _triton_kernel(mode, module, data) if name == "triton" else "",
            "emulated": "one launch a step (CUDA, emulated on the processor)",
        }[name]
        kernel += ", with reserve for backward" if training else ", inference"
    if cell:
        kernel += ", one step"
    else:
        kernel += f", {2 if module.bidirectional else 1} direction(s) a call, {module.num_layers} call(s)"
    if packed:
        kernel += ", packed rows as they are"
    predictor = predictors.get(name)
    prediction = predictor(mode, module.hidden_size, batch, data.dtype, training) if predictor else None
    return Explanation(name, kernel, reason, prediction)

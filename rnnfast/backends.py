"""Which backend computes a recurrence, and why: what a backend is stands here, and nowhere else.

The backends are `cpu` (the C++ kernels), `cuda` (the CUDA kernels), `triton` and `reference` (plain PyTorch, any device
and dtype); developers have `emulated` too, the CUDA kernels compiled for the processor.
`auto`, the default, takes the fastest one that can run the tensor at hand and may fall back to `reference` (with one
warning); a backend that is asked for by name runs or raises an error that names what is missing.
"""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import libraries, ops, reference
from .cell_types import CELLS
from .sequences import Sequences
from .signatures import OPS, taking_flat
from .triton import availability


class KernelsWithOptions(NamedTuple):
    """What a backend has for layers with options.

    Attributes:
        forward: the op `variant_forward`, with its derivative.
        backward: the op `variant_backward`.
        kernel: (whether r multiplies h itself): what runs, in words.
        refuses: why they cannot take a tensor now, None where they can; None: they always can.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    kernel: Callable[[bool], str]
    refuses: Callable[[Tensor], str | None] | None = None

    @classmethod
    def of(cls, name: str, namespace: str) -> KernelsWithOptions:
        """The ops of a namespace, those of the backend of that name."""
        of_namespace = getattr(torch.ops, namespace)
        forward, backward = of_namespace.variant_forward, of_namespace.variant_backward
        if name == "cuda":
            return cls(ops.with_torchs_memory_error(forward), backward, _WITH_OPTIONS[name], _other_products)
        return cls(forward, backward, _WITH_OPTIONS[name])


def _other_products(tensor: Tensor) -> str | None:
    """Why torch's own products, which these kernels count on, are not what a recurrence may have."""
    if tensor.dtype == torch.float32 and libraries.products_alone_take_tf32():
        return "torch's products of float32 are in TF32 now, which recurrences may not use"
    if tensor.dtype == torch.float16 and libraries.products_take_half_sums():
        return "torch's products of float16 add up in float16 now, and can give no sums in float32"
    return None


# By backend: the kernels for layers with options, in words; in the order in which `auto` asks them. Triton's stand
# before the CUDA kernels: a CUDA graph launches them, where the others call a library from the host in every step, and
# a small step does not take as long (predicted: docs/predicted.md).
_WITH_OPTIONS: dict[str, Callable[[bool], str]] = {
    "cpu": lambda _: f"C++ time loop for layers with options ({ops.cpu_isa()})",
    "triton": lambda reset_first: f"{_launches_with_options(reset_first)} (Triton)",
    "cuda": lambda reset_first: f"{_launches_with_options(reset_first)} (CUDA: the library's product, then whole rows)",
    "emulated": lambda reset_first: f"{_launches_with_options(reset_first)} (CUDA, emulated on the processor)",
}


def _launches_with_options(reset_first: bool) -> str:
    return f"{'four' if reset_first else 'two'} launches a step for layers with options"


@dataclass
class Backend:
    """One backend.

    Attributes:
        name: by which it is asked for.
        devices: the types of device whose tensors it takes; empty: any. Shapes on the meta device come from the fake
            kernels of tracing.
        problem: why it cannot run here, None where it can. Dynamo must not look into it.
        describe: what it is where it runs, in words.
        kernel: (mode, module, input): which of its kernels run a module's call, in words; of CUDA kernels their plan
            says more (`explanation.py`).
        kernels: its functions; an op that is not loaded raises.
        differentiable: its ops for programs that run without rnnfast's Python: with their derivatives.
        automatic: whether `auto` may take it.
        for_developers: whether it is listed only where it was loaded.
        load: brings it into the process, where asking for it does that.
        quantized: the op `quantized_layer`, None where weights must not be quantized.
        with_options: its kernels for layers with options (`variants/`), None where the reference runs those.
    """

    name: str
    devices: tuple[str, ...]
    problem: Callable[[], str | None]
    describe: Callable[[], str]
    kernel: Callable[[str, Any, Tensor], str]
    kernels: ops.Kernels
    differentiable: ops.Kernels
    automatic: bool = True
    for_developers: bool = False
    load: Callable[[], None] | None = None
    quantized: Callable[..., Any] | None = None
    with_options: KernelsWithOptions | None = None

    def use(self, namespace: str) -> None:
        """Makes the ops of a namespace, with derivatives, those of this backend."""
        self.kernels, self.differentiable = ops.without_derivatives(namespace), ops.overloads(namespace)


def _missing(name: str, problem: Callable[[], str | None]) -> ops.Kernels:
    def missing(*_: Any) -> Any:
        raise RuntimeError(f"rnnfast: backend {name!r} is not available: {problem()}")

    return ops.Kernels(*[missing] * len(ops.Kernels._fields))


def _of_library(name: str, namespace: str, problem: Callable[[], str | None], loaded: bool, **others: Any) -> Backend:
    """A backend whose kernels are ops of torch."""
    missing = _missing(name, problem)
    backend = Backend(name, problem=problem, kernels=missing, differentiable=missing, **others)
    if loaded:
        backend.use(namespace)
    return backend


def _triton_in_words() -> str:
    where = "in Triton's interpreter on the CPU: very slow" if availability.interpreted() else "compiled on use"
    return f"Triton kernels, {where}"


def _triton_kernel(mode: str, module: Any, data: Tensor) -> str:
    from .triton import layers  # imports Triton

    family = layers.family_of(mode, data.dtype, module.hidden_size, getattr(module, "proj_size", 0) > 0)
    return {"persistent": "one launch a layer (Triton)", "step": "one launch a step (Triton)"}[family]


def _cpu_kernel(mode: str, module: Any, data: Tensor) -> str:
    isa = ops.cpu_isa()
    allowed = data.dtype == torch.float32 and libraries.bf16_allowed()
    pairs = isa in ops.ISAS_WITH_PAIRS and (data.dtype == torch.bfloat16 or allowed)
    return f"C++ time loop ({isa}{', larger products in bfloat16' if pairs else ''})"


_CPU = _of_library(
    "cpu", "rnnfast", lambda: libraries.cpu_problem(), libraries.cpu_error is None, devices=("cpu", "meta"),
    describe=lambda: f"C++ kernels, instruction set {ops.cpu_isa()}",
    kernel=_cpu_kernel,
    quantized=ops.quantized_layer("rnnfast") if libraries.cpu_error is None else None,
    with_options=KernelsWithOptions.of("cpu", "rnnfast") if libraries.cpu_error is None else None,
)  # fmt: skip
if libraries.cpu_error is None:
    _CPU.kernels = ops.on_cpu(_CPU.kernels)
_CUDA = _of_library(
    "cuda", "rnnfast", lambda: libraries.cuda_problem(), libraries.cuda_error is None, devices=("cuda", "meta"),
    describe=lambda: f"CUDA kernels, one launch a layer or some a step, for {torch.ops.rnnfast.cuda_archs()}",
    kernel=lambda *_: "CUDA",
    with_options=KernelsWithOptions.of("cuda", "rnnfast") if libraries.cuda_error is None else None,
)  # fmt: skip
if libraries.cuda_error is None:
    _CUDA.kernels = ops.on_cuda(_CUDA.kernels)
# Its ops are defined, and handed over, by registration.py.
_TRITON = _of_library(
    "triton", "rnnfast_triton", lambda: availability.problem(), False,
    devices=("cpu", "meta") if availability.interpreted() else ("cuda", "meta"), describe=_triton_in_words,
    kernel=_triton_kernel,
    # Not for what the interpreter alone could do: a name must ask for that.
    automatic=not availability.interpreted(),
)  # fmt: skip
_EMULATED = _of_library(
    "emulated", "rnnfast_emulated", libraries.emulated_problem, libraries.emulated_problem() is None,
    devices=("cpu", "meta"),
    describe=lambda: "the CUDA kernels compiled for the processor, for tests: very slow",
    kernel=lambda *_: "CUDA, emulated on the processor", automatic=False, for_developers=True,
)  # fmt: skip
_FUNCTIONS = ops.Kernels(*(taking_flat(OPS[name].record, getattr(reference, name)) for name in ops.Kernels._fields))
_REFERENCE = Backend(
    "reference", devices=(), problem=lambda: None, describe=lambda: "plain PyTorch: any device and dtype, slow",
    kernel=lambda *_: "a loop over the steps in plain PyTorch", kernels=_FUNCTIONS, differentiable=_FUNCTIONS,
    automatic=False,
)  # fmt: skip

# Its op for quantized weights is defined, and handed over, by registration.py.
# In the order in which `auto` asks them.
BACKENDS = {backend.name: backend for backend in (_CPU, _CUDA, _TRITON, _REFERENCE, _EMULATED)}
# What may be asked for, but for what only developers have.
NAMES = ("auto", *(name for name, backend in BACKENDS.items() if not backend.for_developers))

# The name asked for by `with backend(...)`, of this thread alone.
_asked = threading.local()
_asked.name = "auto"

_warned: set[str] = set()


class Availability(NamedTuple):
    """Whether a backend can run here, and the reason in words."""

    available: bool
    reason: str


def backends() -> dict[str, Availability]:
    """The backends and whether each can run here.

    Returns:
        dict from name (`cpu`, `cuda`, `triton`, `reference`, and `emulated` where it was loaded) to
        `Availability(available, reason)`.
    """
    missing = {name: backend.problem() for name, backend in BACKENDS.items()}
    return {
        name: Availability(why is None, why or BACKENDS[name].describe())
        for name, why in missing.items()
        if why is None or not BACKENDS[name].for_developers
    }


def has_kernels(device: str) -> bool:
    """Whether a backend that `auto` may take runs tensors of that type of device here."""
    return _automatic(device) is not None


def asked_for() -> str:
    """The name that `with backend(...)` asks for in this thread, `auto` outside of any."""
    return getattr(_asked, "name", "auto")


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Asks for one backend, in this thread, for the calls inside the `with`.

    Args:
        name: `auto`, `cpu`, `cuda`, `triton` or `reference`; for developers `emulated`.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: the backend is not available here; the message says what is missing.
    """
    found = BACKENDS.get(name)
    if found is None and name != "auto":
        raise ValueError(f"rnnfast.backend: unknown backend {name!r}, expected one of {', '.join(NAMES)}")
    if found is not None and found.load is not None and found.problem() is not None:
        found.load()
    missing = None if found is None else found.problem()
    if missing is not None:
        raise RuntimeError(f"rnnfast.backend: {name!r} is not available: {missing}")
    before = asked_for()
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
    # The common case first: this is on the path of every call.
    if name == "auto":
        if tensor.is_cpu and ops.library_error is None:
            return "cpu"
        device = tensor.device.type
        found = _automatic(device)
        if found is None and device != "meta":
            _warn_once(device)
        return found or "reference"
    devices = BACKENDS[name].devices
    if devices and tensor.device.type not in devices:
        raise RuntimeError(
            f"rnnfast: backend {name!r} was asked for by name, but the input is on {tensor.device}; move the input and "
            f"the module to {'the CPU' if devices[0] == 'cpu' else 'a CUDA device'}, or leave the choice to 'auto'"
        )
    return name


def select_quantized(tensor: Tensor) -> str:
    """As `select`, for weights that are quantized.

    Raises:
        RuntimeError: the tensor is not on the CPU, or a backend was asked for by name that takes no such weights.
    """
    name = asked_for()
    if name != "auto" and BACKENDS[name].quantized is None:
        takes = " and ".join(repr(backend.name) for backend in BACKENDS.values() if backend.quantized is not None)
        raise RuntimeError(
            f"rnnfast: backend {name!r} was asked for by name, but quantized weights are taken by {takes} alone"
        )
    if not tensor.is_cpu:
        raise RuntimeError(
            f"rnnfast: layers whose weights are quantized run on the CPU alone, the input is on {tensor.device}: move "
            "it and the module there"
        )
    return select(tensor)


def select_with_options(tensor: Tensor) -> tuple[str, str | None]:
    """As `select`, for layers with options: the first backend that has kernels for them, where none was asked for.

    Returns:
        Its name; and why it is the reference, in words, None where it is another.
    Raises:
        RuntimeError: a backend was asked for by name that cannot run this tensor.
    """
    name = select(tensor)
    if asked_for() == "auto" and (name != "cpu" or BACKENDS[name].with_options is None):
        name = _automatic(tensor.device.type, tensor) or name
    kernels = BACKENDS[name].with_options
    if kernels is not None:
        refused = kernels.refuses and kernels.refuses(tensor)
        return (name, None) if refused is None else ("reference", f"the backend {name!r}: {refused}")
    if name == "reference":
        return name, "asked for by name" if asked_for() == name else why_reference(tensor.device.type)
    why = f"the backend {name!r} has no kernels for these options yet"
    if name == "cuda" and (without_triton := availability.problem()):
        why += f"; Triton kernels: {without_triton}"
    return "reference", why


def kernels_for_options(name: str) -> KernelsWithOptions:
    """Those of the backend of that name, which has some."""
    found = BACKENDS[name].with_options
    assert found is not None
    return found


def _automatic(device: str, with_options: Tensor | None = None) -> str | None:
    """The first backend that can run tensors of this type of device, None where only the reference does.

    with_options: a tensor of such a device: the first that has kernels for layers with options, which take it.
    """
    for name in BACKENDS if with_options is None else _WITH_OPTIONS:
        backend = BACKENDS[name]
        if not backend.automatic or device not in backend.devices or backend.problem() is not None:
            continue
        if with_options is None:
            return name
        kernels = backend.with_options
        if kernels is not None and (kernels.refuses is None or kernels.refuses(with_options) is None):
            return name
    return None


# Bound once: on the path of every training call.
_is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled


def torchs_step_is_faster(mode: str, batch: int, one_gate: int, cell: bool, follows: bool) -> str | None:
    """Whether torch's own op is faster than our kernels in training of one step on the CPU.

    The table that this rule comes from is in docs/performance.md.

    Args:
        mode: a key of `CELLS`.
        batch: B.
        one_gate: weights of one gate, H * (I + H).
        cell: whether a cell is called, else layers.
        follows: whether the state came from a step before it, so that the gradients of the weights can be put off
            (`steps.py`).

    Returns:
        The reason in words; None where ours is to run.
    """
    kind = CELLS[mode]
    if kind.torch_cell is None or batch == 0:
        return None
    makers = ops.atens_products_are_the_makers()
    if kind.gates == 1 and batch * one_gate < (math.inf if makers else 2**20 if cell else 2**18):
        return "in so small a step what surrounds the kernels decides, and torch's own op has less of it"
    if batch == 1 and one_gate >= 2**15 and not makers and not follows:
        return "torch's own op reads the weights for a single row faster, where no other step led to this one"
    return None


def torch_runs_cell(
    mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Sequence[Tensor]
) -> str | None:
    """Whether a cell's call in grad mode is better left to torch's own op: so for some sizes in training on the CPU.

    Args:
        mode: a key of `CELLS`.
        input: (B, I).
        hx, cx: (B, H), None for zeros.
        weights: weight_ih (G*H, I), weight_hh (G*H, H) and, where there are, the biases.

    Returns:
        Why torch's own op runs it; None where our kernels do.
    """
    if _is_compiling() or _tracing_state() is not None:
        return None
    reason = torch_runs_plain_cell(mode, input, hx, cx, weights)
    return reason if reason and is_plain_call() else None


def torch_runs_plain_cell(
    mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Sequence[Tensor | None]
) -> str | None:
    """As `torch_runs_cell`, where nothing but autograd looks on."""
    hidden_size, batch = weights[1].shape[1], input.shape[0]  # type: ignore[union-attr]
    follows = hx is not None and hx.grad_fn is not None
    reason = torchs_step_is_faster(mode, batch, hidden_size * (input.shape[1] + hidden_size), True, follows)
    return reason if reason and _is_training(input, (hx, cx, *weights)) else None


def torch_runs_layers(
    mode: str, input: Tensor, hx: Tensor | None, sequences: Sequences, weights: Sequence[Tensor]
) -> str | None:
    """As `torch_runs_cell`, for layers over `input`, (T, B, I) or with batch_first (B, T, I): one step of GRU and RNN.

    torch.nn's LSTM goes another way on the CPU, and ours was faster at T = 1 at every size measured.
    """
    if CELLS[mode].torch_layers is None or not sequences.every_row_counts or input.dim() != 3:
        return None
    # A tracer would record this look at the shapes.
    if _is_compiling() or _tracing_state() is not None:
        return None
    steps, batch = (input.shape[1], input.shape[0]) if sequences.batch_first else (input.shape[0], input.shape[1])
    if steps != 1:
        return None
    hidden_size = weights[1].shape[1]
    follows = hx is not None and hx.grad_fn is not None
    reason = torchs_step_is_faster(mode, batch, hidden_size * (input.shape[2] + hidden_size), False, follows)
    return reason if reason and _is_training(input, (hx, *weights)) and is_plain_call() else None


def _is_training(input: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether torch's op may stand in for a step in grad mode: nobody asked for a backend, somebody for gradients."""
    return (
        input.is_cpu
        # In 16 bits torch rounds within the step.
        and input.dtype in (torch.float32, torch.float64)
        and asked_for() == "auto"
        and ops.library_error is None
        and wants_gradient(input, others)
    )


def wants_gradient(input: Tensor, others: Sequence[Tensor | None]) -> bool:
    """Whether anything wants a gradient."""
    if input.requires_grad:
        return True
    for tensor in others:  # noqa: SIM110 (a generator would cost more than the loop)
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def is_plain_call() -> bool:
    """Whether nothing but autograd looks on: no compiler, tracer, transform, autocast or forward-mode derivative."""
    return not (
        _is_compiling()
        or _functorch_active()
        or _autocast_active()
        or forward_ad._current_level >= 0
        or _tracing_state() is not None
    )


def why_reference(device: str) -> str:
    """Why no backend but the reference runs tensors of this type of device here."""
    if device == "cpu":
        return str(ops.library_error)
    if device == "cuda":
        triton = availability.problem() or "TRITON_INTERPRET is set"
        return f"CUDA kernels: {libraries.cuda_problem()}; Triton kernels: {triton}"
    return f"there are no kernels for {device!r} devices"


def _warn_once(device: str) -> None:
    # Dynamo must not trace through the bookkeeping of warnings.
    if torch.compiler.is_compiling() or device in _warned:
        return
    _warned.add(device)
    warnings.warn(
        f"rnnfast runs its slow reference implementation on {device!r} tensors: {why_reference(device)}",
        UserWarning,
        stacklevel=5,
    )

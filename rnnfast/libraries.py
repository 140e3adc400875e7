"""Loads the compiled libraries that lie beside this file, and says why where one does not load.

`_C_cpu.so` holds the schemas of all ops and the CPU kernels, `_C_cuda.so` their CUDA kernels. `_C_emulated.so`, for
developers, is the CUDA kernels compiled for the processor: it is loaded only when asked for.
"""

from __future__ import annotations

import contextlib
import glob
import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch.utils import _python_dispatch

# Where `load_emulated` finds its library when it is given no path.
EMULATED_VARIABLE = "RNNFAST_EMULATED_LIBRARY"


_Made = TypeVar("_Made")


def registered_once(key: str, register: Callable[[], _Made]) -> _Made:
    """Runs `register` the first time that this process asks for `key`; later, what it returned then.

    What is registered with torch lives as long as the process, and a second registration is an error. This module does
    not live as long: it may be reloaded, or dropped from sys.modules and imported again. So what was made is remembered
    on a module of torch's.

    Args:
        key: names the registration.
        register: makes it. What it returns is kept alive, as a torch.library.Library must be.
    Returns:
        What `register` returned when it ran.
    """
    made: dict[str, Any] = vars(torch.library).setdefault("_rnnfast_registered", {})
    if key not in made:
        made[key] = register()
    return cast("_Made", made[key])


def _is_loaded(op: str, key: str) -> bool:
    """Whether a library with this kernel is in the process: loading a second one, a copy or not, would end it."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(op, key))
    except RuntimeError:  # there is no op of that name
        return False


def _load(pattern: str, key: str, advice: str) -> str | None:
    """Loads the library of that name, whose kernels are for that dispatch key; the reason in words where that fails."""
    if _is_loaded("rnnfast::layer_forward", key):
        return None
    failures = []
    found = sorted(glob.glob(os.path.join(glob.escape(os.path.dirname(os.path.abspath(__file__))), pattern)))
    for path in found:
        try:
            torch.ops.load_library(path)
        except (OSError, RuntimeError) as error:
            failures.append(f"library {os.path.basename(path)} does not load: {error}")
        else:
            return None
    return "; the ".join(failures) if found else f"library ({pattern}) is not built: {advice}"


def _load_cpu() -> str | None:
    why = _load("_C_cpu*.so", "CPU", "run `pip install .` where a C++ compiler is found")
    return None if why is None else f"the C++ {why}"


def _load_cuda() -> str | None:
    if cpu_error is not None:
        return f"the CUDA library needs the C++ library: {cpu_error}"
    advice = "nvcc was not found at install time, or RNNFAST_CUDA=0 was set; install it again with nvcc on PATH"
    why = _load("_C_cuda*.so", "CUDA", advice)
    return None if why is None else f"the CUDA {why}"


# None where the library is loaded, else why it is not. The CUDA library refers to schemas of the other.
cpu_error: str | None = _load_cpu()
cuda_error: str | None = _load_cuda()


def cpu_problem() -> str | None:
    """Why the C++ kernels cannot run here, None where they can."""
    return cpu_error


# What the CUDA library said about this machine; None until it was asked.
_machine_problem: str | None = None


def cuda_problem() -> str | None:
    """Why the CUDA kernels cannot run here, None where they can.

    The driver is asked once, and not before somebody has a CUDA tensor or names the backend: a process that has
    initialised CUDA cannot fork into children that use it.
    """
    global _machine_problem
    if cuda_error is not None:
        return cuda_error
    if _machine_problem is None:
        _machine_problem = torch.ops.rnnfast.cuda_problem()
        if not _machine_problem and torch.version.cuda is None:
            _machine_problem = f"this PyTorch ({torch.__version__}) is built without CUDA"
    return _machine_problem or None


def device_problem() -> str | None:
    """Why torch has no CUDA device here, None where it has one."""
    if torch.cuda.is_available():
        return None
    if not (torch.version.cuda or torch.version.hip):
        return f"no CUDA device; this PyTorch ({torch.__version__}) is built without CUDA"
    # The CUDA library asks the driver itself.
    why = cuda_problem() or ""
    return why if why.startswith("no CUDA device") else "no CUDA device"


# Makes a call that no tracer, and no other mode, sees.
_untraced: Any = getattr(_python_dispatch, "_disable_current_modes", contextlib.nullcontext)
# The values that were handed to the CUDA library last: for recurrences, and two for torch's own products.
_tf32_told: tuple[bool, bool, bool] | None = None


def _public_precision(backend: str, operation: str) -> str:
    flags: Any = torch.backends.cudnn.rnn if operation == "rnn" else torch.backends.cuda.matmul
    if backend == "mkldnn":
        flags = torch.backends.mkldnn.rnn  # type: ignore[attr-defined]
    return str(flags.fp32_precision)


# What the public properties read, at a twentieth of their price.
_precision: Callable[[str, str], str] = getattr(torch._C, "_get_fp32_precision_getter", _public_precision)


def tf32_allowed() -> bool:
    """Whether float32 recurrences may use TF32: where torch's flag for cuDNN's RNNs says so.

    The flag is `torch.backends.cudnn.rnn.fp32_precision`, which `torch.backends.cudnn.allow_tf32` sets too. (Reading
    the latter is an error once a program has set the former.)
    """
    return bool(_precision("cuda", "rnn") == "tf32")


def products_take_tf32() -> bool:
    """Whether torch's own products of float32 are in TF32: what `torch.backends.cuda.matmul.fp32_precision` says.

    Some CUDA kernels leave a product to torch, which follows its own flag; where that one says TF32 and
    `tf32_allowed` not, they are no choice.
    """
    return bool(_precision("cuda", "matmul") == "tf32")


def products_alone_take_tf32() -> bool:
    """Whether torch's own products of float32 are in TF32, and recurrences may not be."""
    return products_take_tf32() and not tf32_allowed()


# What torch.backends.cuda.matmul.allow_fp16_accumulation reads.
_half_sums: Callable[[], bool] = getattr(torch._C, "_get_cublas_allow_fp16_accumulation", lambda: False)


def products_take_half_sums() -> bool:
    """Whether torch's own products of float16 add up in float16; then none of them gives sums in float32, which the
    kernels that leave a product to torch want."""
    return _half_sums()


def follow_tf32() -> bool:
    """Tells the CUDA library whether it may use TF32, and how torch's products are rounded.

    Returns:
        What is allowed now.
    """
    global _tf32_told
    told = (tf32_allowed(), products_take_tf32(), products_take_half_sums())
    if told != _tf32_told:
        # Behind the back of whoever traces: in an exported program the call would set the flag at each run, unknown to
        # Python.
        with _untraced():
            torch.ops.rnnfast.cuda_allow_tf32(*told)
        _tf32_told = told
    return told[0]


# What the CPU library was told last.
_bf16_told: bool | None = None


def bf16_allowed() -> bool:
    """Whether the CPU's float32 recurrences may multiply in bfloat16: where `torch.backends.mkldnn.rnn.fp32_precision`
    says so, or `torch.backends.fp32_precision`, which that follows."""
    return bool(_precision("mkldnn", "rnn") == "bf16")


def follow_bf16() -> bool:
    """Tells the CPU library whether float32 recurrences may multiply in bfloat16.

    Returns:
        What is allowed now.
    """
    global _bf16_told
    told = bf16_allowed()
    if told != _bf16_told:
        with _untraced():
            torch.ops.rnnfast.cpu_allow_bf16(told)
        _bf16_told = told
    return told


# The effect of torch.compiler.assume_constant_result, which would import Dynamo: Dynamo calls these while it traces and
# puts nothing into the graph. So a compiled graph has the settings of the last trace or eager call.
cpu_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
cuda_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]
follow_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
products_alone_take_tf32._dynamo_marked_constant = True  # type: ignore[attr-defined]
products_take_half_sums._dynamo_marked_constant = True  # type: ignore[attr-defined]
bf16_allowed._dynamo_marked_constant = True  # type: ignore[attr-defined]
follow_bf16._dynamo_marked_constant = True  # type: ignore[attr-defined]


def emulated_problem() -> str | None:
    """Why the emulated kernels cannot run here, None where they can."""
    return (
        None
        if _is_loaded("rnnfast_emulated::layer_forward", "CPU")
        else "not loaded: `with rnnfast.backend('emulated')` does"
    )


emulated_problem._dynamo_marked_constant = True  # type: ignore[attr-defined]


def load_emulated_library(path: str | None) -> None:
    """Loads the emulated library at `path`, or at the path in the environment variable.

    Raises:
        RuntimeError: there is none, or it does not load; the message says how to build it.
    """
    path = path or os.environ.get(EMULATED_VARIABLE, "")
    if not path or not os.path.exists(path):
        where = f"{path} does not exist" if path else f"{EMULATED_VARIABLE} is not set"
        raise RuntimeError(
            f"rnnfast: backend 'emulated' is not available: {where}; build the library with "
            f"`python tests/build_emulated.py` and set {EMULATED_VARIABLE} to its path (build/emulated/_C_emulated.so)"
        )
    if _is_loaded("rnnfast_emulated::layer_forward", "CPU"):
        return
    try:
        torch.ops.load_library(os.path.abspath(path))
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"rnnfast: backend 'emulated' is not available: {path} does not load: {error}") from error

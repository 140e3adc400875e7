"""Which CUDA kernels run a layer, in which layout, and what a step should take: csrc/cuda/plan.h, as Python sees it.

`plan` needs no GPU, only the C++ library; `here` asks the library that would run a call for the plan that it would
take. `prefer` makes calls take another. All times are predictions of a cost model, none was measured.
"""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import libraries, ops

# The plan that calls of this process prefer from the start.
VARIABLE = "RNNFAST_CUDA_PLAN"
# What may be asked for by name; "auto" chooses.
NAMES = ("auto", "step", "split", "block", "cluster", "grid", "grid-barrier")
# Architectures with a well known card in csrc/cuda/plan/costs.h.
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
# How values are stored and multiplied: float32 as it is, or in TF32.
ARITHMETICS = ("float64", "float32", "tf32", "bfloat16", "float16")


class Illegal(ValueError):
    """A plan that was asked for by name and cannot be; the text says why."""


@dataclass(frozen=True)
class Plan:
    """A plan of one layer, forward or backward.

    Attributes:
        name: "step", "split", "block", "cluster", "grid" or "grid-barrier".
        persistent: whether a launch does all steps.
        predicted_us: microseconds a step, what a call takes once spread over its steps. A prediction.
        limited_by: what decides: a key of `limits_us`.
        limits_us: what each limit would take alone, microseconds a step: launch, exchange, mma, issue, shared memory,
            L2, HBM, latency.
        recompute: whether backward makes the gates again in place of reading the reserve: never, it saves no time.
        why: in words.
        layout: sizes of the launch, as csrc/cuda/plan/plan_json.h lists them.
        device: what was known of the device: name, sm, sms, shared_per_block, largest_cluster.
    """

    name: str
    persistent: bool
    predicted_us: float
    limited_by: str
    limits_us: dict[str, float]
    recompute: bool
    why: str
    layout: dict[str, int]
    device: dict[str, Any]

    @property
    def kernels(self) -> str:
        """In a few words: which kernels, and how many launches."""
        at = self.layout
        launches = _NUMBERS.get(at.get("launches", 1))  # none where there is no row
        if self.name == "split":
            return f"a library's product and a kernel for the cell: {launches} launches a step"
        if not self.persistent:
            return f"{launches} launch{'' if launches == 'one' else 'es'} a step"
        exchange = "one block alone" if self.name == "block" else f"exchange {self.name}"
        several = self.name.startswith("grid") and at["waves"] > 1
        count = f"{at['waves']} launches, each" if several else "one launch"
        return f"persistent, {exchange}: {count} for all steps"

    def __str__(self) -> str:
        at = self.layout
        if not self.persistent:
            launches, blocks = at.get("launches", 0), at.get("blocks", 0)  # none where there is no row
            if self.name == "split":
                return (
                    f"split: {_count(launches, 'launch', 'es')} a step, a product of {_count(blocks, 'block')} by the "
                    "library and a kernel of whole rows"
                )
            return f"{self.name}: {_count(launches, 'launch', 'es')} a step, of {_count(blocks, 'block')}"
        # Groups that meet through L2 follow in launches of their own.
        what = "launches" if self.name.startswith("grid") else "waves"
        waves = f", in {at['waves']} {what}" if at["waves"] > 1 else ""
        return (
            f"{self.name}: {_count(at['groups'], 'group')} of {_count(at['group'], 'block')}{waves}; a block: "
            f"{at['units']} units of {8 * at['batch_tiles']} batch indices, {_count(at['warps'], 'warp')}, "
            f"{(at['shared_bytes'] + 1023) // 1024} KB of shared memory"
        )


_NUMBERS = {1: "one", 2: "two", 4: "four"}


def _count(number: int, what: str, plural: str = "s") -> str:
    return f"{number} {what}{'' if number == 1 else plural}"


def plan(
    mode: str,
    arithmetic: str,
    hidden_size: int,
    batch: int,
    steps: int = 1000,
    directions: int = 1,
    projection: int = 0,
    *,
    training: bool = False,
    backward: bool = False,
    in_graph: bool = False,
    sm: int = 90,
    sms: int = 0,
    name: str = "auto",
    products_tf32: bool = True,
) -> Plan:
    """The plan of one layer.

    Args:
        mode: a key of `CELLS`.
        arithmetic: of `ARITHMETICS`.
        hidden_size, batch, steps, directions: H, B, T, D.
        projection: P, 0 for none.
        training: whether forward writes what backward needs.
        backward: plan the backward pass.
        in_graph: launches cost what they do inside a CUDA graph.
        sm: the architecture, 10 * major + minor. One that is not of `ARCHITECTURES` is taken for the nearest before it.
        sms: SMs of the device, as of a MIG slice; 0: those of a well known card.
        name: of `NAMES`.
        products_tf32: whether torch's own products of float32 are in TF32 too where `arithmetic` is "tf32": what
            `torch.backends.cuda.matmul.allow_tf32` says, False unless a program sets it. The plan `split` leaves its
            products to torch.

    Raises:
        Illegal: no layout of that name is possible for the shape on the device.
        RuntimeError: an argument is out of range, or the C++ library is not loaded.
    """
    if ops.library_error is not None:
        raise RuntimeError(f"rnnfast: a plan needs the C++ library: {ops.library_error}")
    sizes = (hidden_size, batch, steps, directions, projection)
    passes = (training, backward, in_graph)
    text = torch.ops.rnnfast.cuda_plan(mode, arithmetic, *sizes, *passes, sm, sms, name, products_tf32)
    return _told(text, Illegal)


def here(
    device: torch.device,
    mode: str,
    dtype: torch.dtype,
    hidden_size: int,
    batch: int,
    steps: int,
    directions: int = 1,
    projection: int = 0,
    *,
    training: bool = False,
    backward: bool = False,
    emulated: bool = False,
) -> Plan:
    """The plan that a call would take now: on this very device, with the plan that is preferred, TF32 as torch's flags
    say. In a CUDA graph it is the same.

    Args:
        device: a CUDA device; with `emulated` it does not matter.
        mode: a key of `CELLS`.
        dtype: float32, float64, bfloat16 or float16.
        hidden_size, batch, steps, directions: H, B, T, D.
        projection: P, 0 for none.
        training: whether forward writes what backward needs.
        backward: the plan of the backward pass.
        emulated: ask the emulated library, whose device is a small one.

    Raises:
        RuntimeError: the library is not loaded, or the device does not say what it is.
    """
    sizes = (hidden_size, batch, steps, directions, projection)
    name = str(dtype).removeprefix("torch.")
    if emulated:
        if (why := libraries.emulated_problem()) is not None:
            raise RuntimeError(f"rnnfast: backend 'emulated' is not available: {why}")
        text = torch.ops.rnnfast_emulated.plan_here(mode, name, *sizes, training, backward)
    else:
        if (problem := libraries.cuda_problem()) is not None:
            raise RuntimeError(f"rnnfast: backend 'cuda' is not available: {problem}")
        libraries.follow_tf32()
        with torch.cuda.device(device):
            text = torch.ops.rnnfast.cuda_plan_here(mode, name, *sizes, training, backward)
    return _told(text, RuntimeError)


def _preferring() -> list[Callable[[str], str]]:
    """Of each library that is loaded what sets the plan that it prefers."""
    setters: list[Callable[[str], str]] = []
    if libraries.cuda_error is None:
        setters.append(torch.ops.rnnfast.cuda_prefer_plan)
    if libraries.emulated_problem() is None:
        setters.append(torch.ops.rnnfast_emulated.prefer_plan)
    return setters


@contextlib.contextmanager
def prefer(name: str) -> Iterator[None]:
    """Has the CUDA kernels, and the emulated ones, run by the plan of this name inside the `with`.

    For tests and comparisons: the choice is the process's, of all its threads (autograd runs the backward passes of
    CUDA tensors in threads of its own). Where the plan is not legal for a call (a persistent one of float64, of a
    projection, or of a shape that does not fit the device), the step kernels run; `rnnfast.explain` says so. A graph
    that was captured before keeps its kernels. Without this, calls take what the environment variable RNNFAST_CUDA_PLAN
    names, else "auto" ("step" in the emulated library).

    Args:
        name: of `NAMES`: "auto" (the cheapest by the model), "step", "split", "block", "cluster", "grid" or
            "grid-barrier".

    Raises:
        ValueError: the name is unknown.
        RuntimeError: neither library is loaded. The emulated one is from the first `with rnnfast.backend("emulated")`
            on.
    """
    if name not in NAMES:
        raise ValueError(f"rnnfast.cuda_plan.prefer: unknown plan {name!r}, expected one of {', '.join(NAMES)}")
    setters = _preferring()
    if not setters:
        raise RuntimeError(
            f"rnnfast.cuda_plan.prefer: no library with CUDA kernels is loaded: {libraries.cuda_error}; backend "
            f"'emulated' {libraries.emulated_problem()}"
        )
    before = [setter(name) for setter in setters]
    try:
        yield
    finally:
        for setter, earlier in zip(setters, before, strict=True):
            setter(earlier)


def _told(text: str, error: type[Exception]) -> Plan:
    """A plan from what an op tells; an exception of that class where that is why there is none."""
    found: dict[str, Any] = json.loads(text)
    if "error" in found:
        raise error(found["error"])
    return Plan(
        name=found["plan"],
        persistent=found["kernels"] == "persistent",
        predicted_us=found["predicted_us"],
        limited_by=found["limited_by"],
        limits_us=found["limits_us"],
        recompute=found["recompute"],
        why=found["why"],
        layout={key: value for key, value in found.items() if type(value) is int},
        device=found["device"],
    )


@dataclass(frozen=True)
class Constant:
    """A constant of the cost model: its value, its unit, and where it is from ("estimated: ...", "data sheet ...",
    "measured on CARD: FILE")."""

    name: str
    unit: str
    value: float
    source: str


def constants(sm: int) -> list[Constant]:
    """The table of the model's constants for an architecture (csrc/cuda/plan/costs.h)."""
    return [Constant(**json.loads(line)) for line in torch.ops.rnnfast.cuda_plan_constants(sm).splitlines()]


def arithmetic_of(dtype: torch.dtype) -> str:
    """How values of a dtype are multiplied on a GPU, by torch's flags as they are now."""
    if dtype == torch.float32:
        return "tf32" if libraries.tf32_allowed() else "float32"
    return str(dtype).removeprefix("torch.")


def _check_variable() -> None:
    """A warning where the environment asks for a plan that there is not: the libraries ignore it."""
    wanted = os.environ.get(VARIABLE)
    if wanted and wanted not in NAMES:
        warnings.warn(f"{VARIABLE}={wanted}: no such plan, it is ignored; there are {', '.join(NAMES)}", stacklevel=2)


_check_variable()

"""Whether the Triton kernels can run here. Unlike the rest of this package it does not import Triton."""

from __future__ import annotations

import importlib.util
import os

from .. import libraries

# None where Triton is installed, else why its kernels cannot be had. It is imported by the first call: that takes long.
error: str | None = None if importlib.util.find_spec("triton") else "Triton is not installed: pip install triton"


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: TRITON_INTERPRET=1 before Triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "") in ("1", "true", "on", "yes")


def problem() -> str | None:
    """Why the kernels cannot run here, None where they can."""
    if error is not None:
        return error
    return None if interpreted() else libraries.device_problem()


# The effect of torch.compiler.assume_constant_result, which would import Dynamo.
problem._dynamo_marked_constant = True  # type: ignore[attr-defined]

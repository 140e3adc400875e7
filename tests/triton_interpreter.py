"""Triton's interpreter, which runs the Triton kernels on the CPU: switched on before anything imports Triton.

Where there is a CUDA device the kernels are to be compiled, and tests/gpu runs them: there it stays off, unless
TRITON_INTERPRET=1 is set.
"""

import functools
import os
from typing import Any

import torch

# device_count leaves the driver alone, so that tests can fork.
if torch.cuda.device_count() == 0:
    os.environ.setdefault("TRITON_INTERPRET", "1")

from rnnfast.triton import availability


@functools.cache
def triton_problem() -> str | None:
    """Prepares the interpreter; why the Triton kernels cannot run in it, None where they can."""
    if availability.error is not None:
        return availability.error
    if not availability.interpreted():
        return "Triton compiles for the CUDA device here: TRITON_INTERPRET=1 runs this in its interpreter"
    _patch_once()
    return None


def _patch_once() -> None:
    """Eight times the speed: a kernel's call of its own helpers does not put the interpreter's functions into
    triton.language once more, as the launch has done that already.

    And an index out of an array of one element: Triton 3.6 makes it in a way that numpy allows up to 2.3 only.
    """
    from triton.runtime import interpreter

    InterpretedFunction = interpreter.InterpretedFunction
    original = InterpretedFunction.__call__
    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_and_index(tensor: Any, *scope: Any) -> None:
        patch_tensor(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patch_tensor_and_index

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        if self.fn.__module__.startswith("rnnfast."):
            return self.rewrite()(*arguments, **named)
        return original(self, *arguments, **named)

    InterpretedFunction.__call__ = call

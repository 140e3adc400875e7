"""The device of these tests, and what the tests do with it."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from rnnfast import libraries

DEVICE = os.environ.get("RNNFAST_GPU_TESTS_DEVICE", "cuda")
ON_CARD = DEVICE != "cpu"


# Why the tests cannot run here.
MISSING = libraries.device_problem() if ON_CARD else None

only_on_card = pytest.mark.skipif(not ON_CARD, reason="RNNFAST_GPU_TESTS_DEVICE=cpu: means something on a card only")


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether cuDNN's and our recurrences, and the products around them, may use TF32."""
    # Not the newer fp32_precision: once it is set for one kind of op, torch.export fails where it reads these.
    settings = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [setting.allow_tf32 for setting in settings]
    try:
        for setting in settings:
            setting.allow_tf32 = allowed
        yield
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """A CUDA graph of what `function` launches: what replays it, and the results that each replay fills anew."""
    if not ON_CARD:
        results = function()

        def again() -> None:
            for tensor, value in zip(results, function(), strict=True):
                tensor.copy_(value)

        return again, results
    # Torch wants some runs on another stream first: libraries allocate what they need.
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = function()
    return graph.replay, results


@contextlib.contextmanager
def no_host_synchronisation() -> Iterator[None]:
    """Torch raises an error where the host would wait for the device."""
    if not ON_CARD:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

"""The launches of a step loop, a stretch of them captured in a CUDA graph where there are many.

A graph holds some turns and is replayed until all are done: its kernels find sizes, addresses and the number of turns
already done in the table (table.py), which is filled anew for each call. So two graphs, a short and
a long one, serve every T and every tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import table as tb

# From so many turns on. Estimated: a launch from Python takes some 20 us, one inside a graph little more than 1, a
# replay some 10, so that a graph of eight turns takes a quarter of their time, and its capture, once, as long as they.
FEWEST_TURNS = 8
# Turns of a graph, for fewer than MANY_TURNS and for others. Those past the end do nothing, but cost a launch each,
# which tells where there are few. The longer graph is replayed a quarter as often.
SHORT, LONG = 8, 32
MANY_TURNS = 64
# Graphs kept. Each takes about a kilobyte a launch.
CAPACITY = 128
# Launch options of the kernels that fill tables.
_SMALL = {"num_warps": 1, "enable_fp_fusion": True}


class _Captured(NamedTuple):
    graph: Any
    table: Tensor
    # Recorded behind the last replay: until then the table belongs to it.
    done: Any


_captured: OrderedDict[Hashable, _Captured] = OrderedDict()
_lock = threading.Lock()


def new_table(device: torch.device, size: int = tb.SIZE) -> Tensor:
    """For `size` values: with room for all that launches of `fill` write."""
    return torch.empty(-(-size // tb.SIZE) * tb.SIZE, dtype=torch.int64, device=device)


def fill(table: Tensor, values: Sequence[int]) -> None:
    """Writes values to the beginning of `table`, in the order of the stream."""
    for start in range(0, len(values), tb.SIZE):
        some = values[start : start + tb.SIZE]
        tb.fill[(1,)](table[start:], *some, *[0] * (tb.SIZE - len(some)), **_SMALL)


def advance(table: Tensor, turns: int) -> None:
    """Notes in the table that so many turns are done."""
    tb.advance[(1,)](table, turns, **_SMALL)


def run(
    key: Hashable, values: list[int], turns: int, device: torch.device, launch: Callable[[Tensor, int], None]
) -> None:
    """Launches every turn of a call.

    Args:
        key: everything that the launches depend on beside the table: kernels, their constants, grids and device.
        values: the table's, with TURN 0.
        turns: how many.
        device: where.
        launch: (table, turn), launches one turn.
    """
    chunk = SHORT if turns < MANY_TURNS else LONG
    table = new_table(device, len(values))
    # Inside somebody else's capture the launches become part of that graph.
    if device.type != "cuda" or turns < FEWEST_TURNS or torch.cuda.is_current_stream_capturing():
        fill(table, values)
        for turn in range(turns):
            launch(table, turn)
        return
    done = 0
    with _lock:
        key = (key, chunk)
        entry = _captured.get(key)
        if entry is None:
            # Kernels are compiled and loaded by their first launch, which no capture may contain.
            fill(table, values)
            for turn in range(chunk):
                launch(table, turn)
            done = chunk
            # In a thread of its own: where torch.compile's CUDA graphs warm up, or in torch.cuda.use_mem_pool, all that
            # this thread allocates comes from a pool that others write over, and what is kept here would be lost. Such
            # a pool is for the thread that asked for it alone (tests/test_triton.py holds torch to that).
            with ThreadPoolExecutor(1) as thread:
                entry = thread.submit(
                    _capture, torch.cuda.current_stream(device), device, len(values), chunk, launch
                ).result()
            _captured[key] = entry
            if len(_captured) > CAPACITY:
                _captured.popitem(last=False)[1].done.synchronize()
        _captured.move_to_end(key)
        stream = torch.cuda.current_stream(device)
        stream.wait_event(entry.done)
        values[tb.TURN.value] = done
        fill(entry.table, values)
        for _ in range(done, turns, chunk):
            entry.graph.replay()
        entry.done.record(stream)


def _capture(
    stream: Any, device: torch.device, size: int, turns: int, launch: Callable[[Tensor, int], None]
) -> _Captured:
    graph = torch.cuda.CUDAGraph()
    # The stream whose turn comes first allocates; its device becomes the current one.
    with torch.cuda.stream(stream):
        table = new_table(device, size)
        advance(new_table(device), turns)  # so that it is loaded
    with torch.cuda.stream(torch.cuda.Stream(device)):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for turn in range(turns):
                launch(table, turn)
            advance(table, turns)
        finally:
            graph.capture_end()
    return _Captured(graph, table, torch.cuda.Event())

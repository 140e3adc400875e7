"""How near to each other the processor's cores are: what a step pays for each synchronisation of its threads.

On a virtual machine the threads' processors move between real cores, and with them the time that a cache line takes
from one thread to the other: 25 ns within a group of cores that share a cache, 200 ns beyond, for seconds or minutes.
Layers that synchronise their threads often become faster or slower with it, up to twice, others do not. A ratio between
two layers therefore means little without it, and it is measured in every round.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator

import torch

from .. import libraries

# A case whose cores were this many times as far apart as they can be is one to measure again.
FAR = 2.0
# Seconds between two looks while waiting for the cores to come near.
LOOK = 0.2


def core_to_core_ns(rounds: int = 100) -> float | None:
    """Nanoseconds in which a word that one of torch's threads wrote is read by the next.

    Args:
        rounds: through all threads, in each of three measurements, of which the median counts.

    Returns:
        Nanoseconds; None where torch has one thread, or rnnfast's library for the CPU is missing.
    """
    if torch.get_num_threads() < 2 or libraries.cpu_error is not None:
        return None
    seconds = statistics.median(torch.ops.rnnfast.core_latency(rounds) for _ in range(3))
    return 1e9 * float(seconds) or None


class Nearness:
    """The nearest that the cores were seen, and how long it may take until they are as near again.

    Args:
        patience: seconds that may be spent on waiting, all together.
        look: gives `core_to_core_ns`, now.
    """

    def __init__(self, patience: float, look: Callable[[], float | None] = core_to_core_ns) -> None:
        self.patience = patience
        self.nearest = math.inf
        self._look = look

    def see(self, nanoseconds: float | None) -> None:
        """Takes note of how near the cores have been."""
        if nanoseconds is not None:
            self.nearest = min(self.nearest, nanoseconds)

    def far(self, nanoseconds: float | None) -> bool:
        """Whether so long a way is far, by what was seen before."""
        return nanoseconds is not None and nanoseconds > FAR * self.nearest

    @contextlib.contextmanager
    def spending(self) -> Iterator[None]:
        """What is done inside goes off the patience."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self.patience -= time.monotonic() - begin

    def wait(self) -> bool:
        """Waits until the cores are near; False where patience is at its end before."""
        with self.spending():
            end = time.monotonic() + self.patience
            while time.monotonic() < end:
                if not self.far(self._look()):
                    return True
                time.sleep(LOOK)
        return False

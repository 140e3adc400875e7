"""How a service's calls are timed: one at a time, with pauses between them, or beside processes that keep cores busy.

The pool of threads that a library keeps goes on spinning for milliseconds behind a call, and sleeps later; what a call
costs after a pause is the waking, too. `interleave` (`timing.py`) sees nothing of that, as its calls follow each other.
Here every candidate has a process of its own, and one of them has its turn while the others sleep:

* A turn is one call that is not timed, then samples: a pause, then one call that is timed. The first call leaves the
  caches and the pool as a service's last request left them. Without a pause the samples are back to back.
* The next turn begins when all threads of the process before are at rest (`at_rest`).
* All have the same number of samples a turn, and each round is once through all, every other one backwards: the samples
  of a round are compared with each other, as they were taken within seconds.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

# Seconds that a turn's samples take about.
TURN = 8e-3
# Samples of a turn: at least so many without a pause, and with one; at most so many, so that there is more than a turn.
LEAST_BACK_TO_BACK, LEAST_PAUSED, MOST_OF_A_TURN = 3, 1, 20
# Samples of a candidate for each second that a case is measured, at least: with long pauses it takes longer.
SAMPLES_A_SECOND = 12
LEAST_SAMPLES, MOST_SAMPLES = 3, 500
# By how many times the seconds asked for calls may take longer, without their pauses, to be so many.
LONGER = 5
# Seconds between two looks at threads that should come to rest, and after which they are given up. Where the system
# tells nothing of threads, seconds in which pools do come to rest.
LOOK, MOST_UNREST, UNSEEN = 5e-4, 5.0, 0.05

# A turn of a candidate: seconds of the pause and the number of samples, to the seconds of each. None: it has failed.
Turn = Callable[[float, int], list[float] | None]


def take_turn(call: Callable[[], object], pause: float, count: int) -> list[float]:
    """The seconds of so many calls, each behind a pause of so many seconds; of the call before them nothing is said."""
    call()
    samples = []
    for _ in range(count):
        if pause:
            time.sleep(pause)
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return samples


def at_rest(process: int) -> bool | None:
    """Whether no thread of a process runs, or wants to; None where the system does not tell, or the process is gone."""
    try:
        threads = list(Path(f"/proc/{process}/task").iterdir())
    except OSError:
        return None
    for thread in threads:
        # One that has ended since then is at rest.
        with contextlib.suppress(OSError, IndexError):
            # The state stands behind the program's name, which is in brackets.
            if (thread / "stat").read_text(errors="replace").rpartition(")")[2].split()[0] == "R":
                return False
    return True


def comes_to_rest(process: int, most: float = MOST_UNREST) -> bool:
    """Waits until all threads of a process are at rest; False where they are not within so many seconds."""
    end = time.monotonic() + most
    quiet = 0
    # Twice: between two rounds of its loop a spinning thread may just sleep.
    while quiet < 2:
        now = at_rest(process)
        if now is None:
            time.sleep(UNSEEN)
            return True
        quiet = quiet + 1 if now else 0
        if quiet < 2 and time.monotonic() > end:
            return False
        time.sleep(LOOK)
    return True


def in_turns(candidates: Sequence[Turn], pause: float, seconds: float) -> list[list[float]]:
    """Times the candidates.

    Args:
        candidates: their turns. One that fails has no turn any more, and no samples; without the first, against which
            the others are compared, there is no sense in going on.
        pause: seconds before each sample.
        seconds: how long to measure, all together, if that is enough for `SAMPLES_A_SECOND`; otherwise as long as these
            take, but no more than `LONGER` times as long beside the pauses.

    Returns:
        For each candidate the seconds of its samples, as many of each; none of those that have failed.
    """
    samples: list[list[float]] = [[] for _ in candidates]
    running = list(range(len(candidates)))

    def round_of(count: int, order: Sequence[int]) -> None:
        for number in order:
            if 0 not in running:
                return
            taken = candidates[number](pause, count)
            if taken is None:
                running.remove(number)
                samples[number].clear()
            else:
                samples[number] += taken

    fewest = LEAST_PAUSED if pause else LEAST_BACK_TO_BACK
    # How long calls take, and nothing more: pages, plans and clocks find their level meanwhile.
    round_of(fewest, list(running))
    usual = statistics.median([statistics.median(each) for each in samples if each] or [TURN])
    count = min(max(fewest, round(TURN / (pause + usual))), MOST_OF_A_TURN)
    for each in samples:
        each.clear()
    least = max(LEAST_SAMPLES, math.ceil(SAMPLES_A_SECOND * seconds))
    begin = time.monotonic()
    latest = LONGER * seconds + least * len(running) * pause
    turns = 0

    def wanted() -> bool:
        passed = time.monotonic() - begin
        enough = max(MOST_SAMPLES, least) if passed < seconds else least if passed < latest else LEAST_SAMPLES
        return turns * count < enough

    while 0 in running and wanted():
        turns += 1
        # Neither always finds what the same other one left.
        round_of(count, running[:: 1 if turns % 2 else -1])
    return samples if 0 in running else [[] for _ in candidates]


def p90(samples: Sequence[float]) -> float:
    """The 90th percentile, between two samples where it falls there."""
    return statistics.quantiles(samples, n=10, method="inclusive")[-1]

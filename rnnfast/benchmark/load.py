"""What other processes compute beside a case: a compiler next to it makes a ratio of anything.

What they take is the time for which the processors were busy less the time that this process and its children took,
both as the kernel counts them. (Children count when they have ended. Of a case's processes that are there all the while
the numbers are given.) The load average and the pressure of /proc/pressure are no use here: they count the
threads of the case itself, the first over a minute besides. Only the processors on which this process may run are
looked at (a container's, where it has some of its own), and time that a hypervisor gave to other machines is others'.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

STAT = Path("/proc/stat")
# Seconds of a tick, in which the kernel counts.
TICK = 0.01
# Where the times of a processor stand: user, nice, system, idle, iowait, irq, softirq, steal.
IDLE, IOWAIT = 3, 4
# Cores that others always take a little of: less is no load.
SLACK = 0.1
# Seconds of a look before and after a case; the least that ticks can tell anything about.
LOOK, LEAST = 0.1, 0.05


@dataclass(frozen=True)
class Reading:
    """The clocks at one moment, in seconds: the wall's, those of the processors (all together), and our processes'."""

    wall: float
    busy: float
    counted: float
    own: float
    processors: int


def processors() -> set[int]:
    """The numbers of those on which this process may run."""
    try:
        return os.sched_getaffinity(0)
    except AttributeError:
        return set(range(os.cpu_count() or 1))


def taken_by(process: int) -> float:
    """Seconds of processors that a process took, by its number; 0 where it is gone."""
    try:
        text = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    # Behind the program's name, in brackets, which may have spaces of its own: the state, ten more, user, system.
    words = text.rpartition(")")[2].split()
    return TICK * (int(words[11]) + int(words[12]))


def read(ours: Iterable[int] = ()) -> Reading | None:
    """The clocks now; None where the system has none for single processors (macOS, Windows), or writes them in a way of
    its own (some sandboxes). `ours` are numbers of processes whose time is no other's."""
    try:
        import resource

        lines = [line.split() for line in STAT.read_text(encoding="ascii").splitlines()]
        of_each = {words[0]: [TICK * int(word) for word in words[1:9]] for words in lines if words[0].startswith("cpu")}
    except (ImportError, OSError, ValueError, IndexError):
        return None
    # Some containers number theirs anew.
    mine = [of_each[f"cpu{number}"] for number in processors() if f"cpu{number}" in of_each]
    mine = mine or [times for name, times in of_each.items() if name != "cpu"]
    if not mine or any(len(times) <= IOWAIT for times in mine):
        return None
    idle = sum(times[IDLE] + times[IOWAIT] for times in mine)
    counted = sum(map(sum, mine))
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own = sum(each.ru_utime + each.ru_stime for each in usage) + sum(map(taken_by, ours))
    return Reading(time.monotonic(), counted - idle, counted, own, len(mine))


def others_between(before: Reading | None, after: Reading | None) -> float | None:
    """How many cores other processes took between two readings, in the mean.

    Returns:
        Cores, less what the kernel's clock may be wrong by; None where the system does not tell, or the time between
        was too short to say.
    """
    if before is None or after is None or after.wall - before.wall < LEAST:
        return None
    seconds = after.wall - before.wall
    # A sandbox may have the file, with zeros in it.
    if after.counted - before.counted < seconds * after.processors / 2:
        return None
    # Each processor is counted in ticks, wrong by one at most, and not all of them the same way.
    error = TICK * after.processors**0.5
    busy = after.busy - before.busy - (after.own - before.own)
    return round(max(0.0, busy - error) / seconds, 3)


def look(seconds: float = LOOK, ours: Sequence[int] = ()) -> float | None:
    """How many cores other processes take now, without those whose numbers are given; sleeps for so many seconds."""
    before = read(ours)
    if before is None or seconds < LEAST:
        return None
    time.sleep(seconds)
    return others_between(before, read(ours))


def room(threads: int) -> float:
    """How many cores others may take before a case of so many threads is disturbed.

    Half of those that its threads leave free (two of a system's processors are mostly one core, and all share caches
    and memory), and `SLACK`.
    """
    return SLACK + max(0, len(processors()) - threads) / 2


def contended(others: float | None, threads: int) -> bool:
    """Whether others took more cores than there was `room` for beside a case of so many threads."""
    return others is not None and others > room(threads)


class Watch:
    """Surrounds what is timed, and knows then what others took.

    Args:
        threads: that are busy meanwhile and no load: those of what is timed, and of its neighbours.
        seconds: that it takes about: the looks before and after are no longer than a tenth of it each.
        ours: numbers of the case's processes beside this one, which are there all the while.

    Attributes:
        fields: of a result file's row: ``load_before``, ``others_busy`` and ``load_after`` are the cores that others
            took in a tenth of a second before, while it was timed, and in a tenth of a second after; None where that
            cannot be told, as in less than `LEAST` seconds. ``contended``: whether ``others_busy`` was too much.
    """

    def __init__(self, threads: int, seconds: float, ours: Sequence[int] = ()) -> None:
        self.threads = threads
        self.ours = ours
        self.seconds = min(LOOK, seconds / 10)
        self.fields: dict[str, float | bool | None] = {}

    def __enter__(self) -> Watch:
        self.fields["load_before"] = look(self.seconds, self.ours)
        self._begin = read(self.ours)
        return self

    def __exit__(self, *error: object) -> None:
        others = others_between(self._begin, read(self.ours))
        self.fields["others_busy"] = others
        self.fields["load_after"] = look(self.seconds, self.ours)
        self.fields["contended"] = contended(others, self.threads)

"""A suite while it is measured: what its cases wait for, their rows, what is measured again, the result file."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from isolation import Settings, Skipped
from limits import Machine, limit_us_per_step
from records import INTERRUPTED, PARTIAL, Row, loaded
from rnnfast.benchmark import Case, default_backends
from rnnfast.benchmark.command import WORKLOADS_TIMED
from rnnfast.benchmark.cores import Nearness
from rnnfast.benchmark.load import contended, look
from rnnfast.benchmark.timing import short_name

# Seconds of a look at the load while waiting for its end.
LOAD_LOOK = 0.3


def progress(name: str, total: int) -> tqdm[NoReturn]:
    """A bar that counts cases. A log does not need every step of it."""
    return tqdm(total=total, desc=name, unit="case", mininterval=0.2 if sys.stderr.isatty() else 2.0, miniters=1)


Measurer = Callable[[Case, str, Settings, Skipped], list[Row]]


class Conditions:
    """What a case waits for, and without which it is measured again: near cores, and no load of other processes.

    Args:
        nearness: of the cores; its patience is for all waiting.
        threads: that a case takes.
        look: gives the cores that others take now.
    """

    def __init__(
        self, nearness: Nearness, threads: int, look: Callable[[], float | None] = lambda: look(LOAD_LOOK)
    ) -> None:
        self.nearness = nearness
        self._threads = threads
        self._look = look
        # As far as is known: each look takes its time, so there is one at first, and then after signs of a load.
        self._loaded = True

    def see(self, rows: Sequence[Row]) -> None:
        """Takes note of how a case was timed."""
        self.nearness.see(core_distance(rows))
        self._loaded = loaded(rows) or any(contended(row.get("load_after"), self._threads) for row in rows)

    def bad(self, rows: Sequence[Row]) -> bool:
        """Whether a case was timed with far cores or beside other load."""
        return loaded(rows) or self.nearness.far(core_distance(rows))

    def wait(self) -> bool:
        """Waits until the cores are near and the load is gone; False where patience is at its end before."""
        while self.nearness.wait():
            if not self._loaded:
                return True
            with self.nearness.spending():
                self._loaded = contended(self._look(), self._threads)
        return False


def in_types(cases: Sequence[Case], dtypes: Sequence[str] | None) -> list[Case]:
    """Each case in each of these types, instead of its own; as it is where there are none."""
    return [replace(case, dtype=dtype) if dtype else case for case in cases for dtype in dtypes or [None]]


def core_distance(rows: Sequence[Row]) -> float | None:
    """How far apart the cores were when a case was timed, in nanoseconds."""
    return next((row.get("core_to_core_ns") for row in rows), None)


def disturbance(rows: Sequence[Row]) -> tuple[float, float]:
    """For choosing the better of two measurements: the load first, then the cores."""
    load = max((row["others_busy"] for row in rows if row.get("contended")), default=0.0)
    return load, core_distance(rows) or 0.0


class Suite:
    """One suite while it is measured.

    Args:
        name: of the suite.
        cases: all that it has.
        options: the command line.
        measurer: measures a case under a workload.
        conditions: that cases wait for; the same for all suites.
    """

    def __init__(
        self, name: str, cases: Sequence[Case], options: argparse.Namespace, measurer: Measurer, conditions: Conditions
    ) -> None:
        self.name = name
        self.options = options
        self.measurer = measurer
        self.conditions = conditions
        chosen = [case for case in in_types(cases, options.dtype) if options.cases.search(case.name)]
        self.skipped: list[str] = []
        # Each once: cases that differ in their types alone are one with --dtype.
        asked = dict.fromkeys((case, workload) for case in chosen for workload in options.workload)
        self.work = [(case, workload) for case, workload in asked if case.why_not(workload) is None]
        for case, workload in asked:
            if (why := case.why_not(workload)) is not None:
                self.skip(f"workload {workload}", why)
        usual = {(case, workload) for case in cases for workload in WORKLOADS_TIMED if case.why_not(workload) is None}
        backends = options.backends
        # Whether it has all that there is without options that choose.
        self.whole = usual <= set(self.work) and (
            backends is None or set(default_backends(options.device)) <= set(backends)
        )
        # What was measured, by its place in the suite.
        self.measured: dict[int, list[Row]] = {}
        self.interrupted = self.out_of_time = False

    @property
    def rows(self) -> list[Row]:
        """In the suite's order, in whichever they were measured."""
        return [row for _, rows in sorted(self.measured.items()) for row in rows]

    def skip(self, what: str, why: str) -> None:
        if f"{what}: {why}" not in self.skipped:
            self.skipped.append(f"{what}: {why}")

    def measure(self, end: float) -> None:
        """Measures all cases and workloads, or until Ctrl-C, or until the clock (``time.monotonic``) reads ``end``.

        Whatever else ends it leaves the suite interrupted too, with the rows so far, and is raised again.
        """
        places = list(range(len(self.work)))
        if end < float("inf"):
            # If not all can be measured, then some of each kind.
            random.Random(0).shuffle(places)
        longest = 0.0
        with progress(self.name, len(places)) as bar:
            try:
                for place in places:
                    case, workload = self.work[place]
                    # Waiting neither goes beyond the end nor counts as the time that a case takes.
                    nearness = self.conditions.nearness
                    nearness.patience = min(nearness.patience, end - time.monotonic())
                    bar.set_postfix_str("waiting for near cores and the end of other load")
                    self.conditions.wait()
                    bar.set_postfix_str(f"{case.name} {workload}")
                    begin = time.monotonic()
                    if begin + longest > end:
                        self.out_of_time = True
                        break
                    self.measured[place] = self.measure_case(case, workload)
                    self.conditions.see(self.measured[place])
                    bar.update()
                    # The first has a process to start, and on a GPU a device: seconds that no other takes. One that
                    # failed, at the limit of a case perhaps, says nothing of the others.
                    usual = len(self.measured) > 1 or self.options.device.type == "cpu"
                    if usual and all(row["correct"] for row in self.measured[place]):
                        longest = max(longest, time.monotonic() - begin)
            except KeyboardInterrupt:
                self.interrupted = True
            except BaseException:
                self.interrupted = True
                raise

    def measure_case(self, case: Case, workload: str) -> list[Row]:
        options = self.options
        settings = Settings(
            seconds=options.seconds,
            device=options.device,
            backends=options.backends,
            peers=options.peers,
            tf32=not options.no_tf32,
            threads=options.threads,
            keep_memory=options.keep_memory,
        )
        return self.measurer(case, workload, settings, self.skip)

    def fill_in_limits(self, machine: Machine) -> None:
        for place, rows in self.measured.items():
            for row in rows:
                limit = limit_us_per_step(self.work[place][0], row["workload"], machine, not self.options.no_tf32)
                if limit is not None:
                    row["limit_us_per_step"] = round(limit, 4)
                    if row["us_per_step"]:
                        row["percent_of_limit"] = round(100 * limit / row["us_per_step"], 1)

    def write(self, where: dict[str, Any]) -> Path | None:
        """Writes the result file; its path, None where nothing was measured."""
        if not self.rows:
            return None
        folder = self.options.out
        if self.interrupted:
            folder /= INTERRUPTED
        elif not self.whole or self.out_of_time:
            folder /= PARTIAL
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{short_name(self.options.device)}-{self.name}.json"
        text = json.dumps({**where, "suite": self.name, "rows": self.rows}, indent=1) + "\n"
        # Whole or not at all: who measures may be killed.
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        if folder == self.options.out:
            # What was a part of it says nothing more.
            (folder / PARTIAL / path.name).unlink(missing_ok=True)
        return path


def measure_again(suites: Sequence[Suite], conditions: Conditions) -> None:
    """Measures cases again that were timed with far cores or beside other load, when the cores are near and the load is
    gone, and keeps of each what was disturbed least. Ends with the patience, or on Ctrl-C, with all results valid.
    """
    # What was wrong once stays reported, and is not tried until it is right.
    waiting = [
        (suite, place)
        for suite in suites
        for place, rows in suite.measured.items()
        if conditions.bad(rows) and all(row["correct"] for row in rows)
    ]
    if not waiting:
        return
    with progress("again, what was disturbed", len(waiting)) as bar, contextlib.suppress(KeyboardInterrupt):
        while waiting and conditions.wait():
            suite, place = waiting.pop(0)
            case, workload = suite.work[place]
            bar.set_postfix_str(f"{case.name} {workload}")
            with conditions.nearness.spending():
                rows, before = suite.measure_case(case, workload), suite.measured[place]
            suite.measured[place] = rows
            conditions.see(rows)
            # So does a result that is wrong this time.
            if all(row["correct"] for row in rows):
                suite.measured[place] = min(rows, before, key=disturbance)
            if conditions.bad(suite.measured[place]):
                waiting.append((suite, place))
            else:
                bar.update()

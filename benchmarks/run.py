"""Checks, then times rnnfast's layers against torch.nn's on named suites of shapes; a table and a result file for each.

    python benchmarks/run.py --suite sizes,one-step,packed
    python benchmarks/run.py --suite grid --device cuda --dtype bfloat16,float32 --workload training --limit 100
    python benchmarks/run.py --suite models --peers all

A ratio is torch.nn's time over rnnfast's: above 1 rnnfast is faster. Where a result is wrong or a backend fails the row
says so, is not timed, and the exit status is 1. Ctrl-C keeps what was measured by then, in OUT/interrupted: half a
suite does not take the place of a whole one.

On a CPU the cases wait while its cores are far apart (rnnfast/benchmark/cores.py), and what was timed with far ones is
measured again at the end when they are near: all within --patience seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from isolation import Processes, Settings, Skipped, measure_here
from limits import Machine, at_least, better, describe, limit_us_per_step, this_machine
from peers import PEERS
from records import CELLS, RESULTS, WORKLOADS, Row, mean_ratio, rank, worst
from rnnfast.benchmark import Case
from rnnfast.benchmark.case import DTYPES
from rnnfast.benchmark.command import add_measuring_options, listed
from rnnfast.benchmark.cores import Nearness
from rnnfast.benchmark.timing import environment, short_name
from rnnfast.libraries import device_problem
from shapes import SUITES

# A packed batch's time over that of the same rows padded, and over that of a dense batch of as many tokens.
PACKED_KEYS = ("torch_over_padded", "over_padded", "over_dense")
# How long each of a processor's rates is measured, at most.
PROBE_SECONDS = 0.4


def progress(name: str, total: int) -> tqdm[NoReturn]:
    """A bar that counts cases. A log does not need every step of it."""
    return tqdm(total=total, desc=name, unit="case", mininterval=0.2 if sys.stderr.isatty() else 2.0, miniters=1)


Measurer = Callable[[Case, str, Settings, Skipped], list[Row]]


class Suite:
    """One suite while it is measured.

    Args:
        name: in `SUITES`.
        options: the command line.
        measurer: measures a case under a workload.
        nearness: of the cores; the same for all suites.
    """

    def __init__(self, name: str, options: argparse.Namespace, measurer: Measurer, nearness: Nearness) -> None:
        self.name = name
        self.options = options
        self.measurer = measurer
        self.nearness = nearness
        dtypes = options.dtype or [None]
        cases = [replace(case, dtype=dtype) if dtype else case for case in SUITES[name] for dtype in dtypes]
        self.work = [
            (case, workload) for case in cases if re.search(options.cases, case.name) for workload in options.workload
        ]
        # What was measured, by its place in the suite.
        self.measured: dict[int, list[Row]] = {}
        self.skipped: list[str] = []
        self.interrupted = self.out_of_time = False

    @property
    def rows(self) -> list[Row]:
        """In the suite's order, in whichever they were measured."""
        return [row for _, rows in sorted(self.measured.items()) for row in rows]

    def distance(self, place: int) -> float | None:
        """How far apart the cores were when the case at this place was timed, in nanoseconds."""
        return next((row.get("core_to_core_ns") for row in self.measured[place]), None)

    def skip(self, what: str, why: str) -> None:
        if f"{what}: {why}" not in self.skipped:
            self.skipped.append(f"{what}: {why}")

    def measure(self, end: float) -> None:
        """Measures all cases and workloads, or until Ctrl-C, or until the clock (``time.monotonic``) reads ``end``."""
        places = list(range(len(self.work)))
        if end < float("inf"):
            # If not all can be measured, then some of each kind.
            random.Random(0).shuffle(places)
        longest = 0.0
        with progress(self.name, len(places)) as bar:
            try:
                for place in places:
                    case, workload = self.work[place]
                    bar.set_postfix_str(f"{case.name} {workload}")
                    # Waiting neither goes beyond the end nor counts as the time that a case takes.
                    self.nearness.patience = min(self.nearness.patience, end - time.monotonic())
                    self.nearness.wait()
                    begin = time.monotonic()
                    if begin + longest > end:
                        self.out_of_time = True
                        break
                    self.measured[place] = self.measure_case(case, workload)
                    self.nearness.see(self.distance(place))
                    bar.update()
                    # The first has a process to start, and on a GPU a device: seconds that no other takes. One that
                    # failed, at the limit of a case perhaps, says nothing of the others.
                    usual = len(self.measured) > 1 or self.options.device.type == "cpu"
                    if usual and all(row["correct"] for row in self.measured[place]):
                        longest = max(longest, time.monotonic() - begin)
            except KeyboardInterrupt:
                self.interrupted = True

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
        folder = self.options.out / "interrupted" if self.interrupted else self.options.out
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{short_name(self.options.device)}-{self.name}.json"
        text = json.dumps({**where, "suite": self.name, "rows": self.rows}, indent=1) + "\n"
        # Whole or not at all: who measures may be killed.
        temporary = path.with_suffix(".tmp")
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
        return path


def measure_far_again(suites: Sequence[Suite], nearness: Nearness) -> None:
    """Measures cases again that were timed while the cores were far apart, when they are near, and keeps of each what
    was timed with the nearest cores. Ends with the patience, or on Ctrl-C, with all results valid.
    """
    # What was wrong once stays reported, and is not tried until it is right.
    waiting = [
        (suite, place)
        for suite in suites
        for place, rows in suite.measured.items()
        if nearness.far(suite.distance(place)) and all(row["correct"] for row in rows)
    ]
    if not waiting:
        return
    with progress("again, cores were far apart", len(waiting)) as bar, contextlib.suppress(KeyboardInterrupt):
        while waiting and nearness.wait():
            suite, place = waiting.pop(0)
            case, workload = suite.work[place]
            bar.set_postfix_str(f"{case.name} {workload}")
            with nearness.spending():
                rows, before = suite.measure_case(case, workload), suite.measured[place]
            suite.measured[place] = rows
            nearness.see(suite.distance(place))
            # So does a result that is wrong this time.
            if all(row["correct"] for row in rows):
                suite.measured[place] = min(rows, before, key=lambda rows: rows[0]["core_to_core_ns"])
            if nearness.far(suite.distance(place)):
                waiting.append((suite, place))
            else:
                bar.update()


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def table(suite: str, rows: Sequence[Row], where: dict[str, Any]) -> Table:
    """Every row."""
    result = Table(
        title=f"{suite}: {where['device']}, torch {where['torch']}", caption="ratio = torch.nn's time / rnnfast's time"
    )
    for name in ("case", "workload", "backend"):
        result.add_column(name, no_wrap=True)
    heads = ["torch.nn\nus/step", "\nus/step", "\nratio", "\np20 to p80", "limit\nus/step", "% of\nlimit"]
    heads += ["\nGflop/s", "\nGB/s", "\ntokens/s", "peak\nMB"]
    packed = any(PACKED_KEYS[0] in row for row in rows)
    if packed:
        heads += ["packed / padded\ntorch.nn", "\nrnnfast", "packed / dense\nrnnfast"]
    for name in heads:
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("results")
    for row in rows:
        peak = row["peak_memory_bytes"]
        cells = [row["case"], row["workload"], row["backend"]]
        cells += [number(row[key], ".2f") for key in ("torch_us_per_step", "us_per_step", "ratio")]
        cells += [f"{row['p20']:.2f} to {row['p80']:.2f}" if row["p20"] is not None else ""]
        cells += [number(row["limit_us_per_step"], ".2f"), number(row["percent_of_limit"], ".0f")]
        cells += [
            number(row["gflop_per_s"], ".0f"),
            number(row["gbyte_per_s"], ".2f"),
            number(row["tokens_per_s"], ","),
        ]
        cells += [number(None if peak is None else peak / 1e6, ".1f")]
        cells += [number(row.get(key), ".2f") for key in PACKED_KEYS] if packed else []
        good = row["correct"] and row["ratio"] is not None and row["ratio"] >= 1
        result.add_row(*cells, "agree" if row["correct"] else "FAILED", style=None if good else "red")
    return result


def summary(suite: str, rows: Sequence[Row]) -> Table:
    """For each cell, type, workload and backend the geometric mean of the ratios and the worst case."""
    result = Table(title=f"{suite}: torch.nn's time / rnnfast's time")
    for name in ("cell", "type", "workload", "backend"):
        result.add_column(name, no_wrap=True)
    for name in ("cases", "geometric mean", "worst"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("worst case", no_wrap=True)
    keys = ("cell", "dtype", "workload", "backend")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["correct"] and row["ratio"] is not None:
            groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    for key in sorted(
        groups, key=lambda key: (rank(CELLS, key[0]), rank(DTYPES, key[1]), rank(WORKLOADS, key[2]), key[3])
    ):
        low = worst(groups[key])
        result.add_row(
            *key, str(len(groups[key])), f"{mean_ratio(groups[key]):.2f}", f"{low['ratio']:.2f}", low["case"]
        )
    return result


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    suites = ", ".join(f"{name} ({len(cases)})" for name, cases in sorted(SUITES.items()))
    parser.add_argument(
        "--suite", required=True, type=listed(sorted(SUITES)), help=f"with commas, of (number of cases): {suites}"
    )
    add_measuring_options(parser)
    parser.add_argument("--dtype", type=listed(DTYPES), help="instead of the cases' own type (float32)")
    parser.add_argument(
        "--peers",
        type=lambda text: list(PEERS) if text == "all" else listed(list(PEERS))(text),
        default=[],
        help=f"other libraries: all, or of {','.join(PEERS)}",
    )
    parser.add_argument("--cases", default="", metavar="REGEX", help="only cases in whose name this is found")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="end by then, with cases of all kinds measured")
    parser.add_argument(
        "--patience",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="CPU: how long at most to wait for near cores, and to measure again what was timed with far ones "
        "(default 60, all suites together)",
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="all cases in this process, for a debugger; otherwise (Linux) each has one of its own on a CPU, and on a "
        "GPU they share one, which is started anew if it dies",
    )
    parser.add_argument(
        "--case-limit",
        type=float,
        metavar="SECONDS",
        help="a case that takes longer is ended and counts as failed (not with --in-process)",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default benchmarks/results)")
    return parser.parse_args()


def terminated(number: int, frame: FrameType | None) -> None:
    """A time limit from outside is no reason to lose what was measured."""
    raise KeyboardInterrupt


def main() -> int:
    options = parse()
    if options.device.type == "cuda" and (why := device_problem()) is not None:
        print(f"run.py: --device {options.device}: {why}", file=sys.stderr)
        return 2
    end = time.monotonic() + options.limit if options.limit is not None else float("inf")
    signal.signal(signal.SIGTERM, terminated)
    # Two, unless told otherwise: numbers from different machines are then easier to compare.
    options.threads = options.threads or 2
    torch.set_num_threads(options.threads)
    # Wide enough for the table where there is no terminal to ask.
    console = Console(width=None if sys.stdout.isatty() else 240)
    dtypes = options.dtype or sorted({case.dtype for name in options.suite for case in SUITES[name]})
    probe = min(PROBE_SECONDS, options.seconds)
    machine = this_machine(options.device, dtypes, probe)
    if machine is None:
        console.print("no limit: benchmarks/limits.py has no data sheet of this device")
    # On a GPU the threads of the processor have nothing to hand over.
    nearness = Nearness(options.patience) if options.device.type == "cpu" else Nearness(0.0, lambda: None)
    in_process = options.in_process or not sys.platform.startswith("linux")
    # On a GPU each process would first have to initialise the device, for seconds.
    processes = Processes(lasting=options.device.type != "cpu", most=options.case_limit)
    measurer: Measurer = measure_here if in_process else processes.measure
    suites: list[Suite] = []
    for name in options.suite:
        suite = Suite(name, options, measurer, nearness)
        suites.append(suite)
        print(f"{name}: {len(suite.work)} cases, {options.seconds} s each", flush=True)
        suite.measure(end)
        # Now already: what comes later may fail.
        suite.write(environment(options.device))
        if suite.interrupted:
            break
    if options.device.type == "cpu" and not suites[-1].interrupted:
        nearness.patience = min(nearness.patience, end - time.monotonic())
        measure_far_again(suites, nearness)
    if machine is not None:
        if options.device.type == "cpu" and not suites[-1].interrupted:
            again = this_machine(options.device, dtypes, probe)
            machine = better(machine, again) if again else machine
        reached = [(row["dtype"], 1e9 * row["gflop_per_s"]) for s in suites for row in s.rows if row["gflop_per_s"]]
        machine = at_least(machine, reached)
        print(describe(machine))
    for suite in suites:
        if machine is not None:
            suite.fill_in_limits(machine)
        report(suite, console)
    if suites[-1].interrupted:
        return 130
    return int(any(not row["correct"] for suite in suites for row in suite.rows))


def report(suite: Suite, console: Console) -> None:
    """Writes and prints what was measured of a suite."""
    where = environment(suite.options.device)
    rows = suite.rows
    path = suite.write(where)
    if rows:
        console.print(table(suite.name, rows, where))
        console.print(summary(suite.name, rows))
    for row in rows:
        if not row["correct"]:
            print(f"FAILED, not timed: {row['case']} {row['workload']} {row['backend']}: {row['failure']}")
    for reason in suite.skipped:
        print(f"skipped: {reason}")
    far = sum(suite.nearness.far(suite.distance(place)) for place in suite.measured)
    if far:
        print(f"{far} of {len(suite.work)} cases were timed with cores far apart: their ratios are not comparable")
    if suite.interrupted:
        print(f"Interrupted: {len(rows)} rows measured" + (f", written: {path}" if path else ""))
        return
    if suite.out_of_time:
        print(f"The time is up: {len(suite.measured)} of {len(suite.work)} cases measured.")
    print(f"written: {path}" if path else "nothing was measured", flush=True)


if __name__ == "__main__":
    sys.exit(main())

"""Checks, then times rnnfast's layers against torch.nn's on named suites of shapes; a table and a result file for each.

    python benchmarks/run.py --suite sizes,one-step,packed
    python benchmarks/run.py --suite grid --device cuda --dtype bfloat16,float32 --workload training --limit 100
    python benchmarks/run.py --suite models --peers all
    python benchmarks/run.py --shapes my.json --peers ./my_peer.py     # one's own: docs/benchmarks.md

A ratio is torch.nn's time over rnnfast's: above 1 rnnfast is faster. Where a result is wrong or a backend fails the row
says so, is not timed, and the exit status is 1. A part of a suite does not take the place of a whole one: what Ctrl-C
or an error left goes to OUT/interrupted, and what was asked for in part (--cases, fewer types, workloads or backends
than without these options), or was cut off by --limit, to OUT/partial.

On a CPU the cases wait while its cores are far apart (rnnfast/benchmark/cores.py) or other processes compute
(rnnfast/benchmark/load.py), and what was timed with far cores or beside such a load is measured again at the end when
they are near and it is gone: all within --patience seconds.
"""

from __future__ import annotations

import argparse
import re
import signal
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import peers
import service
from isolation import Processes, Settings, Skipped, measure_here
from limits import at_least, better, describe, this_machine
from records import (
    BESIDE,
    CELLS,
    RESULTS,
    WORKLOADS,
    Row,
    condition,
    contradictions,
    in_conditions,
    is_served,
    is_variant,
    loaded,
    mean_ratio,
    rank,
    worst,
)
from rnnfast.benchmark import Case
from rnnfast.benchmark.case import DTYPES
from rnnfast.benchmark.command import add_measuring_options, listed, number
from rnnfast.benchmark.cores import Nearness
from rnnfast.benchmark.timing import environment
from rnnfast.libraries import device_problem
from shapes import SUITES, read
from suite import Conditions, Measurer, Suite, core_distance, disturbance, in_types, measure_again
from variants import missed

# A packed batch's time over that of the same rows padded, and over that of a dense batch of as many tokens.
PACKED_KEYS = ("torch_over_padded", "over_padded", "over_dense")
# The time of the plain layer beside one with options, and the latter's over it.
VARIANT_KEYS = ("plain_us_per_step", "over_plain")
RATIO = "ratio = torch.nn's time / the row's time"
# Of layers with options, which torch.nn does not have.
LOOP_RATIO = "ratio = the time of a loop of PyTorch's operations / the row's time"
# How long each of a processor's rates is measured, at most.
PROBE_SECONDS = 0.4


def written(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def ratio_in_words(rows: Sequence[Row]) -> str:
    return LOOP_RATIO if any(map(is_variant, rows)) else RATIO


def table(suite: str, rows: Sequence[Row], where: dict[str, Any]) -> Table:
    """Every row."""
    result = Table(title=f"{suite}: {where['device']}, torch {where['torch']}", caption=ratio_in_words(rows))
    for name in ("case", "workload", "backend"):
        result.add_column(name, no_wrap=True)
    times = {"torch_us_per_step": "torch.nn\nus/step", "us_per_step": "\nus/step"}
    if any(map(is_served, rows)):
        # Of other cases than a service's there are medians alone.
        times = {"torch_us_per_step": "torch.nn us/step\np50", "torch_p90_us_per_step": "\np90"}
        times |= {"us_per_step": "us/step\np50", "p90_us_per_step": "\np90"}
    varied = any(map(is_variant, rows))
    if varied:
        times = {"torch_us_per_step": "loop\nus/step", "us_per_step": "\nus/step"}
    heads = [*times.values(), "\nratio", "\np20 to p80", "limit\nus/step", "% of\nlimit"]
    heads += ["\nGflop/s", "\nGB/s", "\ntokens/s", "peak\nMB"]
    packed = any(PACKED_KEYS[0] in row for row in rows)
    if packed:
        heads += ["packed / padded\ntorch.nn", "\nrnnfast", "packed / dense\nrnnfast"]
    heads += ["plain layer\nus/step", "\nover it"] * varied
    for name in heads:
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("results")
    for row in rows:
        peak = row["peak_memory_bytes"]
        cells = [row["case"], row["workload"], row["backend"]]
        cells += [written(row.get(key), ".2f") for key in (*times, "ratio")]
        cells += [f"{row['p20']:.2f} to {row['p80']:.2f}" if row["p20"] is not None else ""]
        cells += [written(row["limit_us_per_step"], ".2f"), written(row["percent_of_limit"], ".0f")]
        cells += [
            written(row["gflop_per_s"], ".0f"),
            written(row["gbyte_per_s"], ".2f"),
            written(row["tokens_per_s"], ","),
        ]
        cells += [written(None if peak is None else peak / 1e6, ".1f")]
        cells += [written(row.get(key), ".2f") for key in PACKED_KEYS] if packed else []
        cells += [written(row.get(key), ".2f") for key in VARIANT_KEYS] if varied else []
        good = row["correct"] and row["ratio"] is not None and row["ratio"] >= 1
        said = "agree" if row["correct"] else "FAILED"
        result.add_row(*cells, said + f" {BESIDE}" * bool(row.get("contended")), style=None if good else "red")
    return result


def summary(suite: str, rows: Sequence[Row]) -> Table:
    """For each cell, type, workload and backend, and a service's conditions, the geometric mean of the ratios and the
    worst case."""
    result = Table(title=suite, caption=ratio_in_words(rows))
    served = any(map(is_served, rows))
    for name in ("cell", "type", "workload", "backend", *["condition"] * served):
        result.add_column(name, no_wrap=True)
    for name in ("cases", "geometric mean", "worst"):
        result.add_column(name, justify="right", no_wrap=True)
    result.add_column("worst case", no_wrap=True)
    keys = ("cell", "dtype", "workload", "backend")
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row["correct"] and row["ratio"] is not None:
            group = (*(row[key] for key in keys), *[condition(row)] * served)
            groups.setdefault(group, []).append(row)
    orders = (CELLS, DTYPES, WORKLOADS, (), in_conditions(rows))
    for key in sorted(groups, key=lambda key: tuple(map(rank, orders, key))):
        low = worst(groups[key])
        result.add_row(
            *key, str(len(groups[key])), f"{mean_ratio(groups[key]):.2f}", f"{low['ratio']:.2f}", low["case"]
        )
    return result


def regex(text: str) -> re.Pattern[str]:
    """For argparse: a regular expression."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"expected a regular expression, got {text!r}: {error}") from error


def own_suite(text: str) -> tuple[str, list[Case]]:
    """For argparse: a file of shapes."""
    try:
        return read(Path(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse() -> argparse.Namespace:
    """The command line; ``suites`` are those asked for by name and by file, the cases of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    named = ", ".join(f"{name} ({len(cases)})" for name, cases in sorted(SUITES.items()))
    parser.add_argument(
        "--suite", type=listed(sorted(SUITES)), default=[], help=f"with commas, of (number of cases): {named}"
    )
    parser.add_argument(
        "--shapes",
        type=own_suite,
        action="append",
        default=[],
        metavar="JSON",
        help="a suite of one's own: a list of cases (may be given again)",
    )
    add_measuring_options(parser)
    parser.add_argument("--dtype", type=listed(DTYPES), help="instead of the cases' own type (float32)")
    parser.add_argument(
        "--peers",
        type=peers.chosen,
        default=[],
        help=f"other libraries: all, or of {','.join(peers.NAMES)}; a path that ends in .py: one of one's own",
    )
    parser.add_argument(
        "--cases", type=regex, default="", metavar="REGEX", help="only cases in whose name this is found"
    )
    seconds = number(float, 0)
    parser.add_argument(
        "--limit", type=seconds, metavar="SECONDS", help="end by then, with cases of all kinds measured"
    )
    parser.add_argument(
        "--patience",
        type=seconds,
        default=60.0,
        metavar="SECONDS",
        help="CPU: how long at most to wait for near cores and the end of other load, and to measure again what was "
        "timed without (default 60, all suites together)",
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="all cases in this process, for a debugger; otherwise (Linux) each has one of its own on a CPU, and on a "
        "GPU they share one, which is started anew if it dies; cases with a pause or neighbours always have several",
    )
    parser.add_argument(
        "--case-limit",
        type=seconds,
        metavar="SECONDS",
        help="a case that takes longer is ended and counts as failed (not with --in-process); where "
        "candidates have a process each, the one whose preparation or turn does",
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default benchmarks/results)")
    options = parser.parse_args()
    if not options.suite and not options.shapes:
        parser.error("expected --suite or --shapes, got neither")
    options.suites = {name: SUITES[name] for name in options.suite}
    for name, cases in options.shapes:
        if name in options.suites:
            parser.error(f"argument --shapes: expected suites of different names, got two that are called {name!r}")
        options.suites[name] = cases
    if not any(options.cases.search(name) for name in case_names(options)):
        some = ", ".join(list(dict.fromkeys(case_names(options)))[:3])
        parser.error(
            f"argument --cases: expected a part of a case's name in {', '.join(options.suites)}, such as {some}; "
            f"got {options.cases.pattern!r}"
        )
    there = next(path for path in (options.out, *options.out.absolute().parents) if path.exists())
    if not there.is_dir():
        parser.error(f"argument --out: expected a folder, got {options.out}: {there} is a file")
    if options.device.type == "cuda" and (why := device_problem()) is not None:
        parser.error(f"argument --device: {options.device}: {why}")
    return options


def case_names(options: argparse.Namespace) -> list[str]:
    """The names of all cases that there are, in the types asked for."""
    return [case.name for cases in options.suites.values() for case in in_types(cases, options.dtype)]


def terminated(number: int, frame: FrameType | None) -> None:
    """A time limit from outside is no reason to lose what was measured."""
    raise KeyboardInterrupt


def main() -> int:
    options = parse()
    end = time.monotonic() + options.limit if options.limit is not None else float("inf")
    signal.signal(signal.SIGTERM, terminated)
    # Two, unless told otherwise: numbers from different machines are then easier to compare.
    options.threads = options.threads or 2
    torch.set_num_threads(options.threads)
    # Wide enough for the table where there is no terminal to ask.
    console = Console(width=None if sys.stdout.isatty() else 240)
    dtypes = options.dtype or sorted({case.dtype for cases in options.suites.values() for case in cases})
    probe = min(PROBE_SECONDS, options.seconds)
    machine = this_machine(options.device, dtypes, probe)
    if machine is None:
        console.print("no limit: benchmarks/limits.py has no data sheet of this device")
    # On a GPU the threads of the processor have nothing to hand over.
    nearness = Nearness(options.patience) if options.device.type == "cpu" else Nearness(0.0, lambda: None)
    conditions = Conditions(nearness, options.threads)
    in_process = options.in_process or not sys.platform.startswith("linux")
    # On a GPU each process would first have to initialise the device, for seconds.
    processes = Processes(lasting=options.device.type != "cpu", most=options.case_limit)
    usual: Measurer = measure_here if in_process else processes.measure
    served: Measurer = partial(service.measure, most=options.case_limit)

    def measurer(case: Case, workload: str, settings: Settings, skipped: Skipped) -> list[Row]:
        in_turns = case.served or (not in_process and service.needs_turns(case, workload, settings))
        return (served if in_turns else usual)(case, workload, settings, skipped)

    suites: list[Suite] = []
    for name, cases in options.suites.items():
        suite = Suite(name, cases, options, measurer, conditions)
        suites.append(suite)
        print(f"{name}: {len(suite.work)} cases, {options.seconds} s each", flush=True)
        try:
            suite.measure(end)
        finally:
            # Now already: what comes later may fail. What an error left is not lost either.
            suite.write(environment(options.device))
        if suite.interrupted:
            break
    if options.device.type == "cpu" and not suites[-1].interrupted:
        nearness.patience = min(nearness.patience, end - time.monotonic())
        measure_again(suites, conditions)
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
    for line in [*contradictions(rows), *missed(rows)]:
        print(line)
    measured = suite.measured.values()
    far = sum(suite.conditions.nearness.far(core_distance(of_case)) for of_case in measured)
    if far:
        print(f"{far} of {len(suite.work)} cases were timed with cores far apart: their ratios are not comparable")
    beside = [disturbance(of_case)[0] for of_case in measured if loaded(of_case)]
    if beside:
        print(
            f"WARNING: {len(beside)} of {len(suite.work)} cases were timed {BESIDE}, which took up to "
            f"{max(beside):.1f} cores: do not trust their ratios."
            + " With a larger --patience they wait for its end."
            * (suite.options.device.type == "cpu")
        )
    if suite.interrupted:
        print(f"Interrupted: {len(rows)} rows measured" + (f", written: {path}" if path else ""))
        return
    if suite.out_of_time:
        print(f"The time is up: {len(suite.measured)} of {len(suite.work)} cases measured.")
    if path and path.parent != suite.options.out:
        print("A part of the suite: it does not take the place of the whole.")
    print(f"written: {path}" if path else "nothing was measured", flush=True)


if __name__ == "__main__":
    sys.exit(main())

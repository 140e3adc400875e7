"""Measures each candidate of a case in a process of its own, in turns: a case with a pause or neighbours
(`Case.served`), and one with a peer whose threads stay awake (`needs_turns`).

In one process the pools of two libraries would disturb each other: they spin for milliseconds behind each call. What a
turn is, and when the next one begins, stands in `rnnfast/benchmark/turns.py`. The weights, the input and the number of
threads are the same in all processes, and each checks the results of its own candidate before it is timed. torch.nn has
one, each of rnnfast's backends, and each peer; with a pause or neighbours the backend `cpu` has a second one with a
single thread.

Neighbours compute in processes of their own while the candidates take their turns. They are no load that a case should
wait for or that its rows warn of: the time that they take is not counted.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection

import torch

import peers
from isolation import Ended, Settings, Skipped, Worker
from records import ONE_THREAD, Row
from rnnfast.benchmark import Case, Impossible
from rnnfast.benchmark.case import timed_steps
from rnnfast.benchmark.comparison import (
    Candidate,
    PeerError,
    alone,
    check_again,
    checked_names,
    first_line,
    rounded,
    row_of,
    with_quantized,
)
from rnnfast.benchmark.load import Watch
from rnnfast.benchmark.timing import keep_freed_memory
from rnnfast.benchmark.turns import comes_to_rest, in_turns, p90, take_turn
from variants import VariantCase

# The backend that has a second row, with one thread.
THREADED = "cpu"
# How many numbers a neighbour counts between two looks whether there still is a program that wants it.
COUNTED = 1_000_000
# Asked of a candidate's process when all turns are over.
OVER = "over"


@dataclass(frozen=True)
class Task:
    """What a candidate's process is told first: `name` is its row's; `peer` a peer's name or path."""

    case: Case
    workload: str
    settings: Settings
    name: str
    peer: str | None = None


# --- in the processes ------------------------------------------------------------------------------------------------


def prepared(task: Task) -> Candidate:
    """The task's candidate, checked.

    Raises:
        Impossible: the peer does not have what the case needs.
    """
    single = task.name.endswith(ONE_THREAD)
    torch.set_num_threads(1 if single else task.settings.threads)
    if task.settings.keep_memory and not keep_freed_memory():
        raise OSError("--keep-memory needs glibc")
    peer = None if task.peer is None else peers.named([task.peer])[task.name]
    candidate = alone(task.case, task.workload, task.name.removesuffix(ONE_THREAD), peer)
    candidate.name = task.name
    return candidate


def sent(candidate: Candidate) -> Candidate:
    """What a process can tell the parent of its candidate."""
    return replace(candidate, calls=[], check=None)


def _serve(parent: Connection) -> None:
    """A candidate: says first whether it is right, then takes the turns that it is told to; waits in between."""
    task: Task = parent.recv()
    try:
        candidate = prepared(task)
    except RuntimeError as error:
        # Of this candidate, most likely: its failure, not the suite's.
        candidate = Candidate(task.name, failure=first_line(error))
    except Exception as error:
        parent.send(error)
        return
    parent.send(sent(candidate))
    while (told := parent.recv()) != OVER:
        pause, count = told
        try:
            with candidate.context():
                said: list[float] | str = take_turn(candidate.calls[0], pause, count)
        # Whatever a library raises, the others go on.
        except PeerError as error:
            said = f"{error.why} while it was timed"
        except Exception as error:
            said = f"{first_line(error)} while it was timed"
        parent.send(said)
    check_again(candidate)
    parent.send(sent(candidate))


def _compute(parent: Connection) -> None:
    """A neighbour: it is busy until the parent ends it, or has itself been ended in a way that left it no time to."""
    parent.send("busy")
    program = multiprocessing.parent_process()
    while program is None or program.is_alive():
        for _ in range(COUNTED):
            pass


# --- in the parent ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """So many processes, each with one busy thread, while the context lasts; gives their numbers."""
    with contextlib.ExitStack() as stack:
        found = []
        for _ in range(count):
            worker = stack.enter_context(Worker(_compute))
            worker.start()
            # It says that it is about to begin.
            worker.answer()
            found.append(worker.process or 0)
        yield found


@dataclass
class Runner:
    """A candidate's process, as the parent sees it.

    Args:
        worker: the process.
        candidate: what it says of its candidate; with the samples at the end.
        most: seconds that one answer may take; None: any number.
    """

    worker: Worker
    candidate: Candidate
    most: float | None

    def fail(self, why: str) -> None:
        self.candidate.fail(why)
        self.worker.end()

    def turn(self, pause: float, count: int) -> list[float] | None:
        """Its samples, when its process is at rest again; None where it has failed."""
        try:
            self.worker.tell((pause, count))
            # Pauses are no fault of the candidate's.
            said = self.worker.answer(None if self.most is None else self.most + pause * count)
        except Ended as end:
            return self.fail(f"{end} while it was timed")
        if isinstance(said, str):
            return self.fail(said)
        process = self.worker.process
        if process is not None and not comes_to_rest(process):
            return self.fail("its process goes on computing between its turns, and would disturb the others")
        found: list[float] = said
        return found

    def finish(self, samples: Sequence[float]) -> None:
        """Takes the samples, unless the results are wrong by now."""
        self.candidate.samples = list(samples)
        try:
            self.worker.tell(OVER)
            last: Candidate = self.worker.answer(self.most)
        except Ended as end:
            return self.fail(f"{end}, after the timing")
        if last.failure is not None:
            self.fail(last.failure)
        return None


def needs_turns(case: Case, workload: str, settings: Settings) -> bool:
    """Whether the candidates must have a process each: calls of a service, or a peer whose threads stay awake, which
    would slow down all others in one process with it. Packed rows are compared with padded ones in one process, what
    trains is timed there, and cells and layers with options have no peers."""
    if case.served:
        return True
    if settings.device.type != "cpu" or workload == "training" or case.packed or case.cells:
        return False
    if isinstance(case, VariantCase):
        return False
    return any(map(peers.threads_stay_awake, settings.peers))


def names_of(case: Case, settings: Settings) -> list[tuple[str, str | None]]:
    """The candidates beside torch.nn: names, and of peers what stands for them."""
    found: list[tuple[str, str | None]] = []
    for name in with_quantized(checked_names(settings.backends, settings.device), case):
        found.append((name, None))
        if case.served and name == THREADED and settings.threads > 1:
            found.append((name + ONE_THREAD, None))
    return found + [(peers.name_of(each), each) for each in settings.peers]


def ready(task: Task, worker: Worker, most: float | None) -> Candidate:
    """The task's candidate, in its process, which begins with this.

    Raises:
        Impossible: the peer does not have what the case needs.
    """
    worker.start()
    try:
        worker.tell(task)
        said = worker.answer(most)
    except Ended as end:
        return Candidate(task.name, failure=str(end))
    if isinstance(said, Exception):
        raise said
    found: Candidate = said
    return found


def measure(case: Case, workload: str, settings: Settings, skipped: Skipped, most: float | None = None) -> list[Row]:
    """As `isolation.measure_here`, where the candidates need a process each (`needs_turns`).

    Args:
        case, workload, settings, skipped: as there.
        most: seconds that a candidate may take to make itself ready, and then for a turn without its pauses.
    """
    try:
        if (why := case.why_not(workload)) is not None:
            raise Impossible(why)
        if settings.device.type != "cpu":
            raise Impossible("a case with a pause or neighbours is timed on the CPU")
        names = names_of(case, settings)
    except Impossible as reason:
        skipped(f"workload {workload}", str(reason))
        return []
    with contextlib.ExitStack() as stack:
        runners = []
        # One after the other: threads that wait for each other take long where others have their cores.
        for name, peer in [("torch", None), *names]:
            worker = stack.enter_context(Worker(_serve))
            try:
                candidate = ready(Task(case, workload, settings, name, peer), worker, most)
            except Impossible as reason:
                skipped(name, str(reason))
            else:
                runners.append(Runner(worker, candidate, most))
        conditions = timed(runners, case, settings)
    torch_nn, *candidates = (runner.candidate for runner in runners)
    return [{**row(case, workload, candidate, torch_nn), **conditions} for candidate in candidates]


def timed(runners: Sequence[Runner], case: Case, settings: Settings) -> Row:
    """Fills in the candidates' samples, the first runner's being torch.nn's.

    Returns:
        What a row says of the machine meanwhile: the fields of `Watch`. How far apart the cores are belongs to no case
        here: the threads of each call are woken anew, often on one and the same core at first.
    """
    conditions: Row = {"core_to_core_ns": None}
    for runner in runners:
        if runner.candidate.failure is not None:
            runner.worker.end()
    running = [runner for runner in runners if runner.candidate.failure is None]
    # Neither torch.nn alone nor the others without it say anything.
    if len(running) < 2 or running[0] is not runners[0]:
        return conditions
    with neighbours(case.neighbours) as others:
        processes = [runner.worker.process for runner in running]
        ours = [process for process in processes if process is not None]
        for process in ours:
            comes_to_rest(process)
        with Watch(settings.threads + case.neighbours, settings.seconds, [*ours, *others]) as watch:
            samples = in_turns([runner.turn for runner in running], 1e-3 * case.pause_ms, settings.seconds)
    for runner, taken in zip(running, samples, strict=True):
        if runner.candidate.failure is None:
            runner.finish(taken)
    return {**conditions, **watch.fields}


def row(case: Case, workload: str, candidate: Candidate, torch_nn: Candidate) -> Row:
    """A row as other cases have it, with the 50th and the 90th percentile of both sides."""
    if torch_nn.failure is not None and candidate.failure is None:
        candidate.fail(f"torch.nn: {torch_nn.failure}")
    found = row_of(case, workload, candidate, torch_nn)
    found["torch_peak_memory_bytes"] = torch_nn.peak
    for prefix, side in (("", candidate), ("torch_", torch_nn)):
        for name, percentile in (("p50", statistics.median), ("p90", p90)):
            value = None
            if side.samples:
                value = rounded(percentile(side.samples) * 1e6 / timed_steps(case, workload))
            found[f"{prefix}{name}_us_per_step"] = value
    return found

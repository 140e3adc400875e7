"""Measures each case in a process of its own, that starts like a user's: nothing of earlier cases in its heap.

What the cases before left in the allocator decides how many page faults a layer takes: torch.nn's LSTM in training at
B = 64, H = 256 gets 64 MB of fresh pages from the kernel every iteration, or none, and is then a quarter faster. A
program that trains one model is in the first state. Besides, a crash ends one case, and not the suite.

The processes are forks of a server that has imported torch and nothing else: rnnfast, and the threads of torch's pool,
which do not survive a fork, come in each anew.

(`Worker` is one such process. The candidates of a case with pauses have one each: service.py.)

On a GPU, where a process takes seconds to begin, one serves all cases until it dies: `Processes(lasting=True)`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from types import TracebackType
from typing import Any

import torch

import peers
import variants
from records import Row
from rnnfast.benchmark import Case, Impossible, failed_rows, measure
from rnnfast.benchmark.timing import keep_freed_memory

# torch.profiler, which tells the peak of memory, takes a second to import the last of these.
PRELOADED = ["torch", "torch._dynamo"]
# Seconds for a process to end that has said its last.
PATIENCE = 10


@dataclass(frozen=True)
class Settings:
    """What is the same for all cases of a command: `measure` describes each; peers are names and paths."""

    seconds: float
    device: torch.device
    backends: Sequence[str] | None
    peers: Sequence[str]
    tf32: bool
    threads: int
    keep_memory: bool = False


# Told of each peer or workload that cannot take part, and why.
Skipped = Callable[[str, str], None]


def measure_here(case: Case, workload: str, settings: Settings, skipped: Skipped) -> list[Row]:
    """Measures in this process; no rows where the case has no such workload."""
    torch.set_num_threads(settings.threads)
    if settings.keep_memory and not keep_freed_memory():
        raise OSError("--keep-memory needs glibc")
    try:
        if isinstance(case, variants.VariantCase):
            for each in settings.peers:
                skipped(peers.name_of(each), "a peer is a layer without options")
            return variants.measure(case, workload, settings.seconds, settings.device, settings.backends)
        return measure(
            case,
            workload,
            settings.seconds,
            settings.device,
            backends=settings.backends,
            peers=peers.named(settings.peers),
            tf32=settings.tf32,
            skipped=skipped,
        )
    except Impossible as reason:
        skipped(f"workload {workload}", str(reason))
        return []


def _device_lost(device: torch.device) -> bool:
    """Whether the process is of no more use: a CUDA context does not survive some errors, an access out of bounds among
    them."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except (AssertionError, RuntimeError):  # the first from a torch without CUDA
        return True
    return False


def _serve(parent: Connection) -> None:
    """Measures what it is sent, case after case."""
    while True:
        case, workload, settings = parent.recv()
        reasons: list[tuple[str, str]] = []
        try:
            rows: list[Row] | Exception = measure_here(
                case, workload, settings, lambda what, why, to=reasons: to.append((what, why))
            )
        except RuntimeError as error:
            # Of the device, most likely: the case's failure, not the suite's.
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            rows = failed_rows(case, workload, settings.backends, settings.device, why)
        except Exception as error:
            rows = error
        parent.send((rows, reasons, _device_lost(settings.device)))


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Signals to end that come inside take effect behind it. What is started inside never hears of them: it inherits
    the mask. (The mask alone is not enough: another thread of this process may take the signal.)
    """
    signals = (signal.SIGINT, signal.SIGTERM)
    came: list[int] = []
    handlers = [signal.signal(number, lambda number, frame: came.append(number)) for number in signals]
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in zip(signals, handlers, strict=True):
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


@dataclass(frozen=True)
class _Answer:
    """Of a process: the rows, or the error that is to be raised; what was skipped, and why; and how it came to its end,
    where that was not meant to be. Without an answer there are no rows; a lost device may leave some."""

    rows: list[Row] | Exception | None = None
    reasons: Sequence[tuple[str, str]] = ()
    end: str | None = None


class Ended(Exception):
    """Of a process that gave no answer; the text says how it came to its end."""


class Worker:
    """A process that answers. Ctrl-C is the parent's business: it ends the process, as every error here does.

    Args:
        serve: what it does, given its end of a pipe.
    """

    def __init__(self, serve: Callable[[Connection], None]) -> None:
        self._serve = serve
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)
        self._process: ForkServerProcess | None = None
        self._pipe: Connection | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    @property
    def process(self) -> int | None:
        """The process's number."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Starts the process, unless it runs."""
        if self._process is not None and self._process.is_alive():
            return
        self.end()
        with _interrupts_later():
            self._pipe, there = self._context.Pipe()
            process = self._context.Process(target=self._serve, args=(there,), daemon=True)
            process.start()
            self._process = process
            there.close()

    def end(self) -> int | None:
        """Ends the process; what it ended with, if it had ended by itself."""
        status = None
        if self._process is not None:
            self._process.join(0)
            status = self._process.exitcode
            self._process.kill()
            self._process.join()
        if self._pipe is not None:
            self._pipe.close()
        self._process = self._pipe = None
        return status

    def tell(self, message: object) -> None:
        """Sends a message to the process.

        Raises:
            Ended: it has died.
        """
        with self._ending():
            self._open().send(message)

    def answer(self, most: float | None = None) -> Any:
        """What the process says next.

        Args:
            most: seconds that this may take; the process is ended then. None: any number.

        Raises:
            Ended: it has died, or is ended.
        """
        with self._ending():
            pipe = self._open()
            if not pipe.poll(most):
                raise Ended(f"ended after {most:g} s")
            return pipe.recv()

    def _open(self) -> Connection:
        if self._pipe is None:
            raise Ended("the process was not started, or is ended")
        return self._pipe

    @contextlib.contextmanager
    def _ending(self) -> Iterator[None]:
        """Whatever is raised inside ends the process."""
        try:
            yield
        except (EOFError, ConnectionError) as error:
            # It has closed its end of the pipe: it is about to end, if it has not.
            if self._process is not None:
                self._process.join(PATIENCE)
            raise Ended(died(self.end())) from error
        except BaseException:
            self.end()
            raise


class Processes:
    """Measures cases in processes of their own.

    Args:
        lasting: one process measures case after case, for devices that take seconds to initialise. Where it dies, or
            the device is lost to it, another takes its place.
        most: seconds that a case may take; its process is ended then, and the case counts as failed. None: any number.
    """

    def __init__(self, lasting: bool = False, most: float | None = None) -> None:
        self._lasting = lasting
        self._most = most
        self._worker = Worker(_serve)

    def measure(self, case: Case, workload: str, settings: Settings, skipped: Skipped) -> list[Row]:
        """As `measure_here`, in a process of its own, or in the lasting one.

        Where it dies, or takes too long, the case has failed. Where there are peers that is most likely of their doing:
        the case is then measured once more without them, and they have failed, not rnnfast. So it is where the device
        is lost.
        """

        def failed(names: Sequence[str] | None, why: str) -> list[Row]:
            return failed_rows(case, workload, names, settings.device, why)

        answer = self._ask(case, workload, settings)
        of_peers: list[Row] = []
        if answer.end is not None and settings.peers:
            why = f"{answer.end} with this peer" + ", or one beside it" * (len(settings.peers) > 1)
            answer = self._ask(case, workload, replace(settings, peers=[]))
            if answer.end is not None:
                why = answer.end  # which needs no peer
            of_peers = failed([peers.name_of(each) for each in settings.peers], why)
        for what, reason in answer.reasons:
            skipped(what, reason)
        if isinstance(answer.rows, Exception):
            raise answer.rows
        rows = failed(settings.backends, str(answer.end)) if answer.rows is None else answer.rows
        return [*rows, *of_peers]

    def _ask(self, case: Case, workload: str, settings: Settings) -> _Answer:
        """What a process says of a case."""
        try:
            self._worker.start()
            self._worker.tell((case, workload, settings))
            rows, reasons, lost = self._worker.answer(self._most)
        except Ended as end:
            return _Answer(end=str(end))
        if lost or not self._lasting:
            self._worker.end()
        return _Answer(rows, reasons, "the device was lost" if lost else None)


def died(status: int | None) -> str:
    """How a process ended that gave no answer."""
    if status is not None and status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with exit status {status}"

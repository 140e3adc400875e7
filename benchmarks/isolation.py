"""Measures each case in a process of its own, that starts like a user's: nothing of earlier cases in its heap.

What the cases before left in the allocator decides how many page faults a layer takes: torch.nn's LSTM in training at
B = 64, H = 256 gets 64 MB of fresh pages from the kernel every iteration, or none, and is then a quarter faster. A
program that trains one model is in the first state. Besides, a crash ends one case, and not the suite.

The processes are forks of a server that has imported torch and nothing else: rnnfast, and the threads of torch's pool,
which do not survive a fork, come in each anew.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext

import torch

from peers import PEERS
from records import Row
from rnnfast.benchmark import Case, Impossible, failed_rows, measure
from rnnfast.benchmark.timing import keep_freed_memory

# torch.profiler, which tells the peak of memory, takes a second to import the last of these.
PRELOADED = ["torch", "torch._dynamo"]


@dataclass(frozen=True)
class Settings:
    """What is the same for all cases of a command: `measure` describes each."""

    seconds: float
    device: torch.device
    backends: Sequence[str] | None
    peers: Sequence[str]
    tf32: bool
    threads: int
    keep_memory: bool = False


# Told of each peer or mode that cannot take part, and why.
Skipped = Callable[[str, str], None]


def measure_here(case: Case, mode: str, settings: Settings, skipped: Skipped) -> list[Row]:
    """Measures in this process; no rows where the case has no such mode."""
    torch.set_num_threads(settings.threads)
    if settings.keep_memory and not keep_freed_memory():
        raise OSError("--keep-memory needs glibc")
    try:
        return measure(
            case,
            mode,
            settings.seconds,
            settings.device,
            backends=settings.backends,
            peers={name: PEERS[name] for name in settings.peers},
            tf32=settings.tf32,
            skipped=skipped,
        )
    except Impossible as reason:
        skipped(f"mode {mode}", str(reason))
        return []


def _child(answer: Connection, case: Case, mode: str, settings: Settings) -> None:
    reasons: list[tuple[str, str]] = []
    try:
        rows: list[Row] | Exception = measure_here(case, mode, settings, lambda what, why: reasons.append((what, why)))
    except Exception as error:
        rows = error
    answer.send((rows, reasons))


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


class Processes:
    """Starts the processes. Ctrl-C is the parent's business: it ends them."""

    def __init__(self) -> None:
        self._context: ForkServerContext = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOADED)

    def measure(self, case: Case, mode: str, settings: Settings, skipped: Skipped) -> list[Row]:
        """As `measure_here`, in a new process. Its death is a failure of the case."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_child, args=(there, case, mode, settings), daemon=True)
        try:
            with _interrupts_later():
                process.start()
                there.close()
            rows, reasons = here.recv()
        except EOFError:
            process.join()
            return failed_rows(case, mode, settings.backends, settings.device, died(process.exitcode))
        finally:
            # Nothing to do for a process that has answered; on Ctrl-C the end of it. (None where it could not start.)
            if process.pid is not None:
                process.kill()
                process.join()
            here.close()
        for what, why in reasons:
            skipped(what, why)
        if isinstance(rows, Exception):
            raise rows
        result: list[Row] = rows
        return result


def died(status: int | None) -> str:
    """How a process ended that gave no answer."""
    if status is not None and status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with exit status {status}"

"""Runs programs one after the other within a time limit that no one of them can take from the next.

Every stage has so many seconds for itself. What earlier stages leave over a stage may have too, up to its `most`, but
never what belongs to those that come after. Who does not end by then is told to, and some seconds later is killed with
everything that it has started. All output goes into one log, line by line, as it comes, and the table is written anew
behind every stage: when the whole is ended from outside, what was known by then is on disk.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO

# Of a stage's limit, at most so many seconds are for ending what was told to end.
GRACE = 5.0
# Bytes of a line, and of a job, that the log takes: of a program that writes without end it takes the beginning.
LINE, MOST = 4096, 2 << 20
# The longest note that a table bears.
NOTE = 110


@dataclass(frozen=True)
class Job:
    """A program that a stage runs.

    Args:
        command: program and arguments.
        name: tells it from others of its stage.
        most: seconds, at most; of a job that runs by itself.
        stop: what it is sent when its time is up. The suites write what they have on SIGINT.
        output: the file that its standard output is appended to; None: the log.
        environment: variables besides those that are there.
        good: exit statuses that are a success.
        nothing: a last line in which this is found (a regular expression) says that there was nothing to do: skipped.
        proof: a line in which this is found (a regular expression) makes it a success, whatever its exit status.
        needs: without a line in which this is found (a regular expression) it is no success.
        informative: its failure is worth knowing, and none of the stage's.
    """

    command: Sequence[str]
    name: str = ""
    most: float = float("inf")
    stop: signal.Signals = signal.SIGINT
    output: Path | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    good: tuple[int, ...] = (0,)
    nothing: str = ""
    proof: str = ""
    needs: str = ""
    informative: bool = False


@dataclass(frozen=True)
class Missing:
    """A job of a stage that is not run, and why."""

    name: str
    why: str


@dataclass(frozen=True)
class Stage:
    """What is run between two looks at the clock.

    Args:
        name: in the table.
        seconds: its own.
        most: seconds that it may have where others have left some.
        jobs: given its limit, tells what to run; or, a text, why nothing is.
        together: side by side, not one after the other.
    """

    name: str
    seconds: float
    most: float
    jobs: Callable[[float], Sequence[Job | Missing] | str]
    together: bool = False


@dataclass(frozen=True)
class Outcome:
    """A line of the table."""

    stage: str
    job: str
    outcome: str
    seconds: float
    note: str

    @property
    def failed(self) -> bool:
        return self.outcome in ("FAILED", "TIMEOUT")

    def line(self) -> str:
        return f"{self.stage:11} {self.job:12} {self.outcome:8} {self.seconds:6.1f}  {self.note}".rstrip()


HEAD = f"{'stage':11} {'job':12} {'outcome':8} {'s':>6}  note"


def plain(text: str, most: int = NOTE) -> str:
    """Without what terminals are told, and no longer than a table bears."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return "".join(c if " " <= c <= "~" else " " for c in text).strip()[:most]


class Log:
    """A file that several programs write to, each line with the name of its writer."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._file = path.open("a", encoding="utf-8", errors="replace")

    def write(self, writer: str, text: str) -> None:
        # A full disk, or a reader that comes late, is no reason to end anything.
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._file.write(f"{writer}| {text}\n")
            self._file.flush()

    def close(self) -> None:
        with self._lock, contextlib.suppress(OSError):
            self._file.close()


class Running:
    """A job that was started, in a process group of its own."""

    def __init__(self, job: Job, writer: str, log: Log) -> None:
        self.job = job
        self.begin = time.monotonic()
        self.lines: deque[str] = deque(maxlen=200)
        self.proven = self.told = False
        self.complete = not job.needs
        self._writer, self._log = writer, log
        log.write(writer, "$ " + " ".join(job.command))
        self._output: IO[bytes] | None = job.output.open("ab") if job.output else None
        self.process = subprocess.Popen(
            job.command,
            stdin=subprocess.DEVNULL,
            stdout=self._output or subprocess.PIPE,
            stderr=subprocess.PIPE if self._output else subprocess.STDOUT,
            env={**os.environ, **job.environment},
            start_new_session=True,
        )
        stream = self.process.stderr if self._output else self.process.stdout
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()
        # Ends the job's group when this process is gone, even if it was killed: then its end of the pipe is closed.
        self._warden = subprocess.Popen(
            ["sh", "-c", "read _; kill -9 -$0", str(self.process.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _read(self, stream: IO[bytes]) -> None:
        taken = 0
        for raw in iter(lambda: stream.readline(LINE), b""):
            # Of a progress bar, which writes over its line again and again, the last state.
            line = raw.decode(errors="replace").rstrip().rpartition("\r")[2]
            size = len(self._writer) + len(raw) + 2
            if taken <= MOST:
                self._log.write(self._writer, line if taken + size <= MOST else "(more than the log takes)")
            taken += size
            if plain(line):
                self.lines.append(plain(line))
                self.proven = self.proven or bool(self.job.proof and re.search(self.job.proof, line))
                self.complete = self.complete or bool(re.search(self.job.needs, line))

    def _signal(self, number: signal.Signals, everything: bool) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            (os.killpg if everything else os.kill)(self.process.pid, number)

    def wait_until(self, end: float) -> bool:
        """Whether it has ended by then (`time.monotonic`); waits so long."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(max(0.0, end - time.monotonic()))
        return self.process.returncode is not None

    def tell(self) -> None:
        """Tells it to end: the leader alone, which tells its own, or has something to say that theirs would spoil."""
        self.told = True
        self._signal(self.job.stop, everything=False)

    def outcome(self) -> Outcome:
        """What came of it; it is killed first, and all that it has started."""
        self.end()
        seconds = time.monotonic() - self.begin
        status, last = self.process.returncode, self.last_words()
        if status is None:
            return Outcome("", self.job.name, "FAILED", seconds, plain(f"cannot be killed: {last}"))
        if self.told and not self.proven:
            return Outcome("", self.job.name, "TIMEOUT", seconds, plain(f"after {seconds:.0f} s: {last}"))
        if status in self.job.good and self.job.nothing and re.search(self.job.nothing, last):
            return Outcome("", self.job.name, "skipped", seconds, last)
        if (status in self.job.good and self.complete) or self.proven:
            return Outcome("", self.job.name, "ok", seconds, last)
        how = f"status {status}" if status >= 0 else signal.Signals(-status).name
        return Outcome("", self.job.name, "FAILED", seconds, plain(f"{how}: {last}"))

    def last_words(self) -> str:
        """The last line that is not empty: of what the log has, else of the output's file."""
        if not self.lines and self.job.output:
            self.lines.extend(map(plain, self.job.output.read_text(encoding="utf-8", errors="replace").splitlines()))
        return next((line for line in reversed(self.lines) if line), "")

    def end(self) -> None:
        """Kills what is left of the job."""
        self._signal(signal.SIGKILL, everything=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # A driver may hold on to it.
            self.process.wait(GRACE)
        self._reader.join(2)
        self._warden.kill()
        self._warden.communicate()
        if self._output:
            self._output.close()


class Run:
    """One run of stages.

    Args:
        stages: in their order.
        seconds: for all together; each stage's seconds are scaled to it.
        out: folder of the log and the table.
        head, tail: what stands above and below the table; asked anew each time that it is written.
        state: the machine's, for the log, before each stage.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        seconds: float,
        out: Path,
        head: Callable[[], str] = lambda: "",
        tail: Callable[[], str] = lambda: "",
        state: Callable[[], str] = lambda: "",
    ) -> None:
        self.stages = stages
        self.out = out
        self.head = head
        self.tail = tail
        self.state = state
        self.outcomes: list[Outcome] = []
        self.log = Log(out / "logs.txt")
        self._end = time.monotonic() + seconds
        self._scale = seconds / sum(stage.seconds for stage in stages)

    def run(self) -> None:
        """Runs every stage. On Ctrl-C, or on SIGTERM where it raises the same, ends what runs and writes the table."""
        number = 0
        try:
            for number in range(len(self.stages)):
                self._run_stage(number)
                self.write()
            number = len(self.stages)
        finally:
            # Interrupted: this one in its midst.
            for stage in self.stages[number:]:
                self._add(stage, Outcome("", "", "ended", 0.0, "interrupted here or before"))
            self.write()
            self.log.close()

    def limit(self, number: int) -> float:
        """Seconds that a stage may take from now on."""
        stage = self.stages[number]
        others = self._scale * sum(later.seconds for later in self.stages[number + 1 :])
        left = self._end - time.monotonic() - others
        return min(left, self._scale * stage.most)

    def _run_stage(self, number: int) -> None:
        stage, limit, begin = self.stages[number], self.limit(number), time.monotonic()
        print(f"--- {stage.name}, at most {limit:.1f} s", flush=True)
        self.log.write(stage.name, f"at most {limit:.1f} s {self.state()}".rstrip())
        try:
            jobs = stage.jobs(limit)
        except Exception as error:  # whatever it is: the other stages are not to pay for it
            self._add(stage, Outcome("", "", "FAILED", 0.0, plain(f"{type(error).__name__}: {error}")))
            return
        if isinstance(jobs, str):
            self._add(stage, Outcome("", "", "skipped", 0.0, plain(jobs)))
            return
        running: list[Running] = []
        try:
            for job in jobs:
                if isinstance(job, Missing):
                    self._add(stage, Outcome("", job.name, "skipped", 0.0, plain(job.why)))
                    continue
                if begin + limit <= time.monotonic():
                    self._add(stage, Outcome("", job.name, "skipped", 0.0, "the stage's time is up"))
                    continue
                writer = f"{stage.name}:{job.name}" if job.name else stage.name
                try:
                    running.append(Running(job, writer, self.log))
                except OSError as error:
                    self._add(stage, Outcome("", job.name, "FAILED", 0.0, plain(str(error))))
                    continue
                if not stage.together:
                    self._finish(stage, running, begin + limit)
            self._finish(stage, running, begin + limit)
        finally:
            for one in running:
                one.end()

    def _finish(self, stage: Stage, running: list[Running], end: float) -> None:
        """Waits for all, but not beyond `end`: in time they are told to end, and who does not listen is killed."""
        if not running:
            return
        if len(running) == 1:
            end = min(end, running[0].begin + running[0].job.most)
        grace = min(GRACE, (end - running[0].begin) / 4)
        late = [one for one in running if not one.wait_until(end - grace)]
        for one in late:
            one.tell()
        for one in late:
            one.wait_until(end)
        while running:
            outcome = running[0].outcome()
            if outcome.failed and running[0].job.informative:
                outcome = replace(outcome, outcome="noted")
            self._add(stage, outcome)
            running.pop(0)

    def _add(self, stage: Stage, outcome: Outcome) -> None:
        outcome = replace(outcome, stage=stage.name)
        self.outcomes.append(outcome)
        self.log.write(stage.name, outcome.line())
        print(outcome.line(), flush=True)

    def table(self) -> str:
        return "\n".join([HEAD, *(outcome.line() for outcome in self.outcomes)])

    def write(self) -> None:
        """The table, into its file."""
        parts = []
        for part in (self.head, self.table, self.tail):
            try:
                parts.append(part())
            except Exception as error:  # whatever it is: the rest of the table is not lost for it
                parts.append(f"{type(error).__name__}: {error}")
        text = "\n\n".join(part for part in parts if part)
        temporary = self.out / "table.tmp"
        with contextlib.suppress(OSError):
            temporary.write_text(text + "\n", encoding="utf-8", errors="replace")
            temporary.replace(self.out / "table.txt")

"""How things are timed: several candidates in turn, and what the numbers of the turns say.

Single numbers mean little on a shared machine, so nothing is timed alone: the candidates run in rounds, each twice a
round, once in turn and once in turn backwards, so that what one leaves in the caches for the next falls on all alike.
What is reported is the median over the rounds of the ratio within a round, with its 20th and 80th percentile.

On the CPU a sample is as many calls as last 4 ms, by the clock. On a CUDA device it is one call between two events,
after the L2 cache was filled with something else; the inputs change from call to call (a candidate has one call for
each of its inputs). Writing over the cache takes the device some ten microseconds: so long the host is ahead.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import __version__

Calls = Sequence[Callable[[], object]]

MOST_ROUNDS = 500
# The device's own clock is steadier than the processor's.
LEAST_ROUNDS, LEAST_ROUNDS_CUDA = 5, 3
# Seconds of a sample on the CPU.
SAMPLE = 4e-3


@dataclass(frozen=True)
class Ratio:
    """How many times faster the second of two is than the first: median, 20th and 80th percentile over the rounds."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        ratios = sorted(a / b for a, b in zip(slow, fast, strict=True))
        return cls(statistics.median(ratios), ratios[len(ratios) // 5], ratios[-1 - len(ratios) // 5])

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.p20:.2f} to {self.p80:.2f})"


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on an accelerator, so that a clock read afterwards has seen it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    candidates: Sequence[Calls | Callable[[], object]],
    seconds: float,
    device: torch.device,
    contexts: Sequence[Callable[[], contextlib.AbstractContextManager[object]]] = (),
    each_round: Callable[[], object] = lambda: None,
) -> list[list[float]]:
    """Times the candidates in turn.

    Args:
        candidates: each a call, or a list of calls that do the same with different inputs.
        seconds: about how long to measure, all together.
        device: where they run.
        contexts: for each candidate (or none) what makes the context manager in which its samples are taken.
        each_round: called between the rounds.

    Returns:
        For each candidate its seconds a call, one number a round: the mean of its two samples.
    """
    many: list[Calls] = [[c] if callable(c) else c for c in candidates]
    surround = list(contexts) or [contextlib.nullcontext] * len(many)
    take = _cuda_sampler(device) if device.type == "cuda" else _clock_sample

    def sample(number: int, repeats: int) -> float:
        with surround[number]():
            return take(many[number], repeats)

    # Caches, autotuners and the device's clock find their level. (Checked candidates have been called before.)
    for number, calls in enumerate(many):
        with surround[number]():
            for call in calls:
                call()
    synchronize(device)
    estimate = []
    for number in range(len(many)):
        first = sample(number, 1)
        # A call of half a second need not be tried thrice to know that it is long.
        estimate.append(first if first > 0.5 else statistics.median([first, sample(number, 1), sample(number, 1)]))
    # Samples so long that the clock's resolution and the wake-up of the threads are not what is measured. But no longer
    # than leaves time for ten rounds.
    repeats = 1
    if device.type != "cuda":
        repeats = max(1, round(min(SAMPLE / min(estimate), seconds / 20 / sum(estimate))))
    samples: list[list[float]] = [[] for _ in many]
    least = LEAST_ROUNDS_CUDA if device.type == "cuda" else LEAST_ROUNDS
    end = time.perf_counter() + seconds
    while len(samples[0]) < least or (time.perf_counter() < end and len(samples[0]) < MOST_ROUNDS):
        there = [sample(number, repeats) for number in range(len(many))]
        back = [sample(number, repeats) for number in reversed(range(len(many)))]
        for number, taken in enumerate(samples):
            taken.append((there[number] + back[-1 - number]) / 2)
        each_round()
    return samples


def _clock_sample(calls: Calls, repeats: int) -> float:
    start = time.perf_counter()
    for number in range(repeats):
        calls[number % len(calls)]()
    return (time.perf_counter() - start) / repeats


def _cuda_sampler(device: torch.device) -> Callable[[Calls, int], float]:
    """A function that gives the seconds of one call on the device, the calls taking turns."""
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 64 << 20)
    flush = torch.empty(2 * cache, dtype=torch.int8, device=device)
    # How often each list of calls was sampled, to take its inputs in turn.
    turns: dict[int, int] = {}

    def sample(calls: Calls, repeats: int) -> float:
        del repeats
        turn = turns[id(calls)] = turns.get(id(calls), -1) + 1
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        calls[turn % len(calls)]()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    return sample


def capture(call: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """The call as a CUDA graph: what is returned replays it and gives the graph's own result tensors.

    Raises:
        RuntimeError: the call cannot be captured (it waits for the device, or copies to the host).
    """
    # Everything that happens only once (workspaces, autotuning) must have happened before.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay() -> list[Tensor]:
        graph.replay()
        return results

    return replay


def keep_freed_memory() -> bool:
    """Lets glibc's allocator keep all memory that is freed, for the rest of the process, as jemalloc and others do.

    Otherwise it takes buffers beyond 32 MB from the kernel each time, page by page, and gives them back. A layer that
    needs such buffers spends much of its time on that.

    Returns:
        False where the C library has no such setting.
    """
    # From malloc.h: how many buffers may come from the kernel each by itself, and from what size on the end of the heap
    # is given back.
    mmap_max, trim_threshold = -4, -1
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(mmap_max, 0)) and bool(mallopt(trim_threshold, 2**31 - 1))


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes that torch's allocator hands out during a call, at the highest, on top of what there was before.

    None where this torch does not tell. What a library allocates past torch's allocator is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The profiler's library speaks on stderr when it starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            call()
        # The public table adds allocations up by operator; only the raw events have their order.
        kineto: Any = profile.profiler
        events = [event for event in kineto.kineto_results.events() if event.name() == "[memory]"]
        now = highest = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            highest = max(highest, now)
        return highest
    except (AttributeError, RuntimeError):
        return None


@contextlib.contextmanager
def settings(device: torch.device, tf32: bool) -> Iterator[None]:
    """torch.nn's best settings on CUDA, the same for both sides: cuDNN searches, TF32 is allowed throughout or not."""
    if device.type != "cuda":
        yield
        return
    backends = torch.backends
    before = (backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32)
    backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = True, tf32, tf32
    try:
        yield
    finally:
        backends.cudnn.benchmark, backends.cudnn.allow_tf32, backends.cuda.matmul.allow_tf32 = before


def processor() -> str:
    """The processor's name, where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def short_name(device: torch.device) -> str:
    """The device in a file's name: "cpu", "h200", "rtx-4090"."""
    if device.type != "cuda":
        return device.type
    return shorten(torch.cuda.get_device_name(device))


def shorten(name: str) -> str:
    """A GPU's name without its maker, its memory and how it is plugged in."""
    words = re.split(r"[\s_-]+", name.lower())
    noise = r"nvidia|geforce|tesla|gpu|laptop|generation|\d+gb|hbm\w*|sxm\w*|pcie|nvl|mig.*"
    return "-".join(word for word in words if word and not re.fullmatch(noise, word)) or "cuda"


def commit() -> str:
    """The commit of this checkout, "-dirty" behind it where the tree has changes: their numbers belong to no commit.
    (New results and figures are no such change.) Without a repository what the variable RNNFAST_COMMIT says."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        # An installed package may lie inside a repository that is not ours.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != Path(__file__).resolve().parents[2]:
            raise OSError
        generated = (":!/benchmarks/results", ":!/docs/figures")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", *generated)
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RNNFAST_COMMIT", "unknown")


def environment(device: torch.device) -> dict[str, Any]:
    """What a result file says about where it comes from: device, machine, versions, commit, date (UTC)."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        isa = getattr(torch.backends.cpu, "get_cpu_capability", lambda: "unknown ISA")()
        name = f"{processor()}, {isa}, {torch.get_num_threads()} thread" + "s" * (torch.get_num_threads() > 1)
    return {
        "device": name,
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "python": platform.python_version(),
        "rnnfast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }

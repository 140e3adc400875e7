"""The least time a step could take: a floor for any implementation on a machine, and what that is made of.

    python benchmarks/limits.py [--device cuda]     # what is known of this machine

A step cannot be faster than the slowest of three things that may all go on at once:

1. arithmetic: the matrix products' operations over the machine's peak for the type;
2. traffic: what has to be moved in any case (`Case.bytes`) over the bandwidth of the memory that holds it;
3. the chain: step t needs h of step t-1. Its cores form groups; a group has a part of the rows, each of its cores an
   equal part of the hidden units. Each step a core multiplies, and reads its part of the recurrent weights again, from
   the nearest levels that hold it; if a group has several cores they also hand h to each other. The best number of
   groups counts. With gradients the chain is walked twice. Layers and directions may run beside each other.

On top comes the cost of being called, spread over the steps. Gate functions, and what an implementation keeps for its
backward pass, are left out: the floor is to be below every implementation, and near a good one.

In a loop of cells (`Case.cells`) each step is a call, or two with gradients, and the chain has the input's weights too,
as in streaming. The traffic has the weights once a loop: where they are read again they may come from nearer, and the
chain has that.

A CPU's numbers are measured, in some seconds (`measure_cpu`), before the suites and after them: the better counts, as
others on the machine can only take away; and no peak is below what a case of a suite reached. A GPU's are those of its
maker's data sheets (`GPUS`) and, where these are silent (caches, latencies), estimates: limits on a GPU are therefore
predictions, not measurements.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from rnnfast.benchmark.case import GATES, Case, timed_steps
from rnnfast.benchmark.cores import core_to_core_ns
from variants import VariantCase


@dataclass(frozen=True)
class Level:
    """Memory of one kind.

    Args:
        name: "registers", "shared", "L2", "L3", "memory".
        bytes: what each core has of it, or all cores together.
        bandwidth: bytes a second, for each core or for all together.
        shared: whether bytes and bandwidth are those of all cores together.
    """

    name: str
    bytes: float
    bandwidth: float
    shared: bool = False


@dataclass(frozen=True)
class Machine:
    """What a limit is made from.

    Args:
        name: of the device.
        cores: that work at the same time; SMs on a GPU.
        flops: operations a second of all cores, by type; "tf32" beside "float32" on a GPU.
        levels: from the nearest to memory, which comes last and holds everything.
        handovers: (cores in a group, seconds) by rising number of cores: the least time for what one core computed to
            reach the others; the first entry with enough cores counts.
        call: seconds that a call takes whatever it does.
        flushed: whether every call finds its input and weights in memory (the GPU's method of timing).
        source: where the numbers come from.
    """

    name: str
    cores: int
    flops: dict[str, float]
    levels: tuple[Level, ...]
    handovers: tuple[tuple[float, float], ...]
    call: float
    flushed: bool
    source: str

    def reading(self, size: float, active: int) -> float:
        """Seconds in which each of ``active`` cores reads ``size`` bytes of its own, as near as they fit."""
        longest = 0.0
        for level in self.levels:
            part = min(size, level.bytes / active if level.shared else level.bytes)
            longest = max(longest, part / (level.bandwidth / active if level.shared else level.bandwidth))
            size -= part
        return longest

    def home(self, size: float) -> float:
        """Bandwidth, bytes a second, of the nearest shared level that holds ``size`` bytes."""
        shared = [level for level in self.levels if level.shared]
        if self.flushed:
            return shared[-1].bandwidth
        return next(level.bandwidth for level in shared if level.bytes >= size)

    def handover(self, cores: int) -> float:
        return next(seconds for most, seconds in self.handovers if cores <= most)

    def peak(self, dtype: str, tf32: bool) -> float:
        return self.flops["tf32" if tf32 and dtype == "float32" and "tf32" in self.flops else dtype]


def better(one: Machine, other: Machine) -> Machine:
    """One machine measured twice: of each number the better."""
    flops = {name: max(rate, other.flops.get(name, 0.0)) for name, rate in one.flops.items()}
    levels = tuple(
        replace(a, bandwidth=max(a.bandwidth, b.bandwidth)) for a, b in zip(one.levels, other.levels, strict=True)
    )
    handovers = tuple((most, min(a, b)) for (most, a), (_, b) in zip(one.handovers, other.handovers, strict=True))
    return replace(one, flops=flops, levels=levels, handovers=handovers, call=min(one.call, other.call))


def at_least(machine: Machine, reached: Iterable[tuple[str, float]]) -> Machine:
    """The machine with no peak below what was reached on it: (type, operations a second)."""
    flops = dict(machine.flops)
    for dtype, rate in reached:
        flops[dtype] = max(rate, flops.get(dtype, 0.0))
    return replace(machine, flops=flops)


def chain(case: Case, workload: str, machine: Machine, peak: float) -> float:
    """Seconds of one step of the recurrence, once through (third item above)."""
    chains = case.directions * case.layers
    size = getattr(torch, case.dtype).itemsize
    if case.cells or workload == "streaming":
        # Nothing can be made in advance: the input's weights belong to the step as well.
        elements = case.weights() / chains
    elif isinstance(case, VariantCase):
        elements = case.recurrent_weights
    else:
        elements = GATES[case.cell] * case.hidden_size * case.outputs + case.proj_size * case.hidden_size
    work = 2.0 * case.batch * chains * elements
    best = math.inf
    for groups in range(1, min(machine.cores, chains * case.batch) + 1):
        for cores in {1, min(machine.cores // groups, case.hidden_size)}:
            # A group with several chains holds the weights of each.
            weights = elements * size * max(1.0, chains / groups) / cores
            active = groups * cores
            arithmetic = work / (peak * active / machine.cores)
            handover = machine.handover(cores) if cores > 1 else 0.0
            best = min(best, max(arithmetic, machine.reading(weights, active)) + handover)
    return best


def limit_us_per_step(case: Case, workload: str, machine: Machine, tf32: bool = True) -> float | None:
    """The floor, in microseconds a step.

    Args:
        case: the layer and its shape.
        workload: "inference", "training" or "streaming".
        machine: where.
        tf32: whether float32 products may be in TF32 there.

    Returns:
        Microseconds, or None for a type whose peak is not known.
    """
    try:
        peak = machine.peak(case.dtype, tf32)
    except KeyError:
        return None
    steps = timed_steps(case, workload)
    arithmetic = case.flops(workload) / peak
    once = replace(case, cells=False).bytes(workload)
    traffic = once / machine.home(once * (1 if workload == "streaming" else steps))
    walks = 2 if workload == "training" else 1
    # The last layer is done so many steps after the first as there are layers between them.
    latest = 1 if workload == "streaming" else (steps + case.layers - 1) / steps
    calls = walks / (1 if case.cells or workload == "streaming" else steps) * machine.call
    return 1e6 * (max(arithmetic, traffic, walks * latest * chain(case, workload, machine, peak)) + calls)


def best_seconds(call: Callable[[], object], seconds: float, repeats: int = 1) -> float:
    """The shortest time of a call, of many: what the machine can do when nothing disturbs it."""
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        best = min(best, (time.perf_counter() - start) / repeats)
    return best


def cache_sizes() -> tuple[int, int]:
    """Bytes of a core's own L2 cache and of the cache that cores share; usual sizes where the system does not tell."""
    sizes = {}
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level, kind = int((index / "level").read_text()), (index / "type").read_text().strip()
            text = (index / "size").read_text().strip()
        except (OSError, ValueError):
            continue
        if kind != "Instruction":
            sizes[level] = int(text.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(text[-1], 0)
    return sizes.get(2, 1 << 20), sizes.get(3, sizes.get(2, 1 << 20) * 8)


def measure_cpu(dtypes: Iterable[str] = ("float32",), seconds: float = 0.4) -> Machine:
    """Measures this processor: the fastest product per type, reading from each level, a call that does nothing.

    Args:
        dtypes: types whose product is measured.
        seconds: for each of the numbers.
    """
    threads = min(torch.get_num_threads(), os.cpu_count() or 1)
    nothing = torch.zeros(1)
    call = best_seconds(lambda: nothing.neg(), seconds / 4, 20)

    def product(name: str) -> float:
        a, b = (torch.randn(768, 1024).to(getattr(torch, name)), torch.randn(1024, 1024).to(getattr(torch, name)))
        calls: list[Callable[[], object]] = [lambda: a @ b]
        # On processors of other makers than Intel the library behind torch may run at half the speed of ours.
        if hasattr(torch.ops.rnnfast, "matmul"):
            calls.append(lambda: torch.ops.rnnfast.matmul(a, b))
        return 2.0 * 768 * 1024 * 1024 / min(best_seconds(each, seconds) for each in calls)

    def reading(size: int) -> float:
        # A sum is one addition for each number read: nothing else in torch reads faster.
        numbers = torch.ones(size // 4)
        return size / (best_seconds(numbers.sum, seconds, max(1, (1 << 20) // size)) - call)

    private, common = cache_sizes()
    flops = {name: product(name) for name in dtypes}
    torch.set_num_threads(1)
    try:
        near = reading(private // 2)
    finally:
        torch.set_num_threads(threads)
    # What others on the machine leave of a shared cache is not known: measured well inside it, not at its edge.
    middle, far = reading(max(2 * threads * private, common // 4)), reading(max(8 * common, 256 << 20))
    levels = (
        Level("L2", private, near),
        Level("L3", common, max(middle, far), shared=True),
        Level("memory", math.inf, far, shared=True),
    )
    # None where there is one thread: then nothing is handed over.
    handover = 1e-9 * min(core_to_core_ns() or 0.0 for _ in range(20))
    source = "measured: products, sums over arrays, an empty call, a word from core to core"
    return Machine("CPU", threads, flops, levels, ((math.inf, handover),), call, False, source)


@dataclass(frozen=True)
class Gpu:
    """A line of a data sheet. Tflop/s are dense, on tensor cores except for float64 and float32.

    Args:
        sms: streaming multiprocessors.
        half: bfloat16 and float16 with float32 accumulation.
        tf32, float32, float64: by type.
        memory: GB/s.
        l2: MB.
        shared: KB of shared memory that a block may use on each SM.
        clock: GHz, boost.
        clusters: whether SMs can write into each other's shared memory (compute capability 9.0 and later).
    """

    sms: int
    half: float
    tf32: float
    float32: float
    float64: float
    memory: float
    l2: float
    shared: float
    clock: float
    clusters: bool


# After NVIDIA's data sheets and white papers, from memory and not yet held to them line by line: one more reason why
# limits on a GPU are predictions. The longest name that is part of the device's name counts.
GPUS = {
    "B200": Gpu(148, 2250, 1125, 75, 37, 8000, 126, 227, 1.96, True),
    "GH200": Gpu(132, 989, 494, 67, 34, 4000, 50, 227, 1.98, True),
    "H200": Gpu(132, 989, 494, 67, 34, 4800, 50, 227, 1.98, True),
    "H100 PCIe": Gpu(114, 756, 378, 51, 26, 2000, 50, 227, 1.76, True),
    "H100 NVL": Gpu(132, 835, 418, 60, 30, 3900, 50, 227, 1.79, True),
    "H100": Gpu(132, 989, 494, 67, 34, 3350, 50, 227, 1.98, True),
    "A100": Gpu(108, 312, 156, 19.5, 9.7, 2039, 40, 163, 1.41, False),
    "A10": Gpu(72, 125, 62.5, 31.2, 0.98, 600, 6, 99, 1.70, False),
    "A40": Gpu(84, 150, 75, 37.4, 0.58, 696, 6, 99, 1.74, False),
    "L4": Gpu(58, 121, 60, 30.3, 0.47, 300, 48, 99, 2.04, False),
    "L40S": Gpu(142, 362, 183, 91.6, 1.4, 864, 96, 99, 2.52, False),
    "RTX 3090": Gpu(82, 71, 35.6, 35.6, 0.56, 936, 6, 99, 1.70, False),
    "RTX 4090": Gpu(128, 165, 82.6, 82.6, 1.3, 1008, 72, 99, 2.52, False),
    "RTX 5090": Gpu(170, 210, 105, 105, 1.6, 1792, 96, 99, 2.41, False),
}
# Registers of an SM that can hold weights, next to what a kernel computes with (of 256).
REGISTERS = 112 << 10
# Estimates: a launch inside a stream; h through the L2 cache; h into the shared memory of another SM of the cluster (16
# SMs at most).
LAUNCH, THROUGH_L2, IN_CLUSTER, CLUSTER = 2.0e-6, 0.5e-6, 0.1e-6, 16


def gpu(name: str) -> Machine | None:
    """The machine of a device's name, as ``torch.cuda.get_device_name`` gives it; None where no data sheet is here."""
    known = [key for key in GPUS if re.search(rf"\b{key}(?!\d)", name, re.IGNORECASE)]
    if not known:
        return None
    sheet = GPUS[max(known, key=len)]
    clock = sheet.clock * 1e9
    levels = (
        Level("registers", REGISTERS, math.inf),
        # 128 bytes a clock and SM from shared memory, 64 from L2.
        Level("shared", sheet.shared * 1024, 128 * clock),
        Level("L2", sheet.l2 * 1e6, 64 * clock * sheet.sms, shared=True),
        Level("memory", math.inf, sheet.memory * 1e9, shared=True),
    )
    tera = {"bfloat16": sheet.half, "float16": sheet.half, "tf32": sheet.tf32}
    tera |= {"float32": sheet.float32, "float64": sheet.float64}
    return Machine(
        name,
        sheet.sms,
        {key: value * 1e12 for key, value in tera.items()},
        levels,
        ((CLUSTER, IN_CLUSTER), (math.inf, THROUGH_L2)) if sheet.clusters else ((math.inf, THROUGH_L2),),
        LAUNCH,
        True,
        "data sheet; bandwidth of caches, handover and launch estimated",
    )


def this_machine(device: torch.device, dtypes: Iterable[str], seconds: float = 0.4) -> Machine | None:
    """The machine behind a device: measured for a CPU (``seconds`` for each number), from the table for a GPU, and None
    where it is not there."""
    if device.type == "cuda":
        return gpu(torch.cuda.get_device_name(device))
    return measure_cpu(dtypes, seconds)


def describe(machine: Machine) -> str:
    """What a machine's limits are made from, in a few lines."""
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} Gflop/s" for name, rate in machine.flops.items())
    levels = ", ".join(
        f"{level.name} {level.bandwidth / 1e9:,.0f} GB/s" + ("" if level.shared else " a core")
        for level in machine.levels
        if level.bandwidth < math.inf
    )
    handovers = ", ".join(f"{seconds * 1e6:.2f} us" for _, seconds in machine.handovers)
    return (
        f"limit from {machine.cores} cores ({machine.source}): {rates}; {levels}; handover {handovers}; "
        f"call {machine.call * 1e6:.1f} us"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = this_machine(options.device, ("float32", "bfloat16"))
    print(describe(machine) if machine else "no data sheet for this device: add it to GPUS")


if __name__ == "__main__":
    main()

"""What a step of the step kernels (csrc/cuda/step/) should cost at least on a Hopper card. A prediction: its machine
constants are from data sheets and others' measurements, not from this project's own; benchmarks/microbench measures
them. Here they are what a kernel may hope for; those of limits.py are what nothing can beat.

    python benchmarks/step_model.py            # the table of docs/performance.md

A step costs at least its launch, and then the longest of three: what all blocks read from L2 over L2's bandwidth, what
the busiest SM reads over its own path to L2, and its products. What is left out makes it longer: latencies (the product
begins when the step before has ended), the exchange of partial sums, gates read and reserve written in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from rnnfast.benchmark.case import GATES

SMS, CLOCK = 132, 1.755e9
# Seconds from one launch to the next, dependent launches inside a CUDA graph.
LAUNCH = 1.3e-6
# Bytes a second: all of L2, and what one SM can take (64 bytes a clock).
L2, L2_TO_SM = 5.5e12, 64 * CLOCK
# Operations a second of one SM: mma.sync on 16-bit types, on TF32, and FFMA.
SM_FLOPS = {
    "bfloat16": 4 * 4096 / 6 * CLOCK,
    "float16": 4 * 4096 / 6 * CLOCK,
    "tf32": 4 * 2048 / 6 * CLOCK,
    "float32": 256 * CLOCK,
}
SIZES = {"bfloat16": 2, "float16": 2, "tf32": 4, "float32": 4}
# From step/block.cuh, product.cuh and arithmetic.cuh: hidden units a block, and its states for small and large batches.
UNITS, SMALL_BATCH = 16, 8
LARGE_BATCH = {"bfloat16": 32, "float16": 32, "tf32": 32, "float32": 16}


@dataclass(frozen=True)
class Step:
    """One launch.

    Args:
        blocks: of the launch.
        l2_bytes: all that they read from L2 for their product.
        seconds: the least it takes, launch included.
        bound: what decides: "L2", "path to the SM" or "product".
    """

    blocks: int
    l2_bytes: int
    seconds: float
    bound: str


def step(cell: str, dtype: str, batch: int, hidden: int, backward: bool = False) -> Step:
    """The model for one direction.

    A block multiplies 16 units' rows of the weights (all gates forward; backward their columns, G times as long) with
    the states of its batch rows, absent ones included.
    """
    size, gates = SIZES[dtype], GATES[cell]
    rows = SMALL_BATCH if batch <= SMALL_BATCH else LARGE_BATCH[dtype]
    blocks = math.ceil(batch / rows) * math.ceil(hidden / UNITS)
    weight_rows, length = (UNITS, gates * hidden) if backward else (gates * UNITS, hidden)
    block_bytes = (weight_rows + rows) * length * size
    block_flops = 2 * weight_rows * rows * length
    on_busiest = math.ceil(blocks / SMS)
    times = {
        "L2": blocks * block_bytes / L2,
        "path to the SM": on_busiest * block_bytes / L2_TO_SM,
        "product": on_busiest * block_flops / SM_FLOPS[dtype],
    }
    bound = max(times, key=lambda name: times[name])
    return Step(blocks, blocks * block_bytes, LAUNCH + times[bound], bound)


def table(cell: str = "LSTM", dtypes: tuple[str, ...] = ("bfloat16", "float32")) -> str:
    """Markdown: forward and backward over hidden and batch sizes."""
    lines = [f"| {cell}: H | B | blocks |"]
    lines[0] += "".join(f" {dtype}: MB forward | us forward | us backward | bound by |" for dtype in dtypes)
    lines.append("| ---: | ---: | ---: |" + " ---: | ---: | ---: | --- |" * len(dtypes))
    for hidden in (128, 256, 512, 1024, 2048):
        for batch in (1, 16, 64, 256):
            both = [(step(cell, dtype, batch, hidden), step(cell, dtype, batch, hidden, True)) for dtype in dtypes]
            line = f"| {hidden} | {batch} | {', '.join(dict.fromkeys(str(f.blocks) for f, _ in both))} |"
            for forward, backward in both:
                bounds = ", ".join(dict.fromkeys((forward.bound, backward.bound)))
                line += f" {forward.l2_bytes / 1e6:.1f} | {forward.seconds * 1e6:.1f} |"
                line += f" {backward.seconds * 1e6:.1f} | {bounds} |"
            lines.append(line)
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

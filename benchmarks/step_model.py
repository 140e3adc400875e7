"""What a step of the step kernels (csrc/cuda/step/) should take on a Hopper card: a prediction of the cost model in
csrc/cuda/plan/, where its constants stand with their sources. Those of limits.py are what nothing can beat.

    python benchmarks/step_model.py            # the table of docs/predicted.md

A step takes its launch (here inside a CUDA graph), then the longest of: what all blocks read from L2 over L2's
bandwidth, what the busiest SM reads over its own path to L2, its products, and weights from memory where L2 does not
hold them; before that h from L2, after it the cells.
"""

from __future__ import annotations

from dataclasses import dataclass

from rnnfast import cuda_plan

MODES = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN_TANH"}


@dataclass(frozen=True)
class Step:
    """One launch.

    Args:
        blocks: of the launch.
        l2_bytes: all that they read from L2 for their product.
        seconds: what it should take, launch included.
        bound: what takes longest beside the launch: "L2" (with the path from there to an SM), "mma", "issue"
            (instructions: of cells, and of products without tensor cores) or "HBM".
    """

    blocks: int
    l2_bytes: int
    seconds: float
    bound: str


def step(cell: str, dtype: str, batch: int, hidden: int, backward: bool = False) -> Step:
    """The model for one direction.

    A block multiplies 16 units' rows of the weights (all gates forward; backward their columns, G times as long) with
    the states of its batch rows; in place of absent ones all read the same.
    """
    plan = cuda_plan.plan(MODES[cell], dtype, hidden, batch, backward=backward, in_graph=True, sm=90, name="step")
    times = {name: plan.limits_us[name] for name in ("L2", "mma", "issue", "HBM")}
    bound = max(times, key=lambda name: times[name])
    return Step(plan.layout["blocks"], plan.layout["l2_bytes"], 1e-6 * plan.predicted_us, bound)


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

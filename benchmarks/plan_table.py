"""The plan of the CUDA kernels over a grid of shapes, and what a step should take: predicted by csrc/cuda/plan.h.

python benchmarks/plan_table.py            # the table of docs/predicted.md
python benchmarks/plan_table.py --sm 80    # for another architecture
"""

from __future__ import annotations

import argparse

from cudnn_estimate import KNOWN
from rnnfast import cuda_plan

HIDDEN_SIZES = (64, 128, 256, 512, 768, 1024, 2048)
BATCHES = (1, 16, 64, 256)
TYPES = ("bfloat16", "float16", "tf32", "float32")


def short(plan: cuda_plan.Plan) -> str:
    """ "grid 2 x 64": two groups of 64 blocks."""
    return f"{plan.name} {plan.layout['groups']} x {plan.layout['group']}" if plan.persistent else plan.name


def cell(arithmetic: str, hidden: int, batch: int, sm: int, mode: str = "LSTM") -> str:
    """Plan, microseconds and limit of both passes, as cells of a table."""
    parts = []
    for backward in (False, True):
        plan = cuda_plan.plan(mode, arithmetic, hidden, batch, 1024, training=True, backward=backward, sm=sm)
        parts.append(f" {short(plan)} | {plan.predicted_us:.2f} | {plan.limited_by} ")
    return "|".join(parts)


def cudnn(types: list[str], hidden: int, batch: int) -> str:
    known = KNOWN.get((hidden, batch))
    return f"{known.forward} / {known.backward} ({known.what})" if known and known.what in types else "not known"


def table(sm: int = 90) -> str:
    """Markdown: types that get the same plans throughout share their rows."""
    shapes = [(hidden, batch) for hidden in HIDDEN_SIZES for batch in BATCHES]
    alike: dict[tuple[str, ...], list[str]] = {}
    for arithmetic in TYPES:
        alike.setdefault(tuple(cell(arithmetic, *shape, sm) for shape in shapes), []).append(arithmetic)
    lines = ["| type | H | B | forward: plan | us | limited by | backward: plan | us | limited by | cuDNN: us |"]
    lines.append("| --- | ---: | ---: | --- | ---: | --- | --- | ---: | --- | --- |")
    for cells, types in alike.items():
        for (hidden, batch), text in zip(shapes, cells, strict=True):
            lines.append(f"| {', '.join(types)} | {hidden} | {batch} |{text}| {cudnn(types, hidden, batch)} |")
    return "\n".join(lines)


def constants(sm: int = 90) -> str:
    """Markdown: the constants of the model for an architecture, with their sources."""
    lines = ["| constant | value | unit | source |", "| --- | ---: | --- | --- |"]
    lines += [f"| {c.name} | {c.value:g} | {c.unit} | {c.source} |" for c in cuda_plan.constants(sm)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sm", type=int, choices=cuda_plan.ARCHITECTURES, default=90)
    options = parser.parse_args()
    print(f"predicted, not measured\n\n{table(options.sm)}\n\n{constants(options.sm)}")


if __name__ == "__main__":
    main()

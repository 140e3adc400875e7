"""How rnnfast's layers on a CPU gain from 16 bits: in bfloat16, in float16, and in float32 where bfloat16 products are
allowed (`torch.backends.mkldnn.rnn.fp32_precision = "bf16"`), each beside the plain float32 layer, in one process and
in turn. The shapes are those of the suite `sixteen-bit`, which compares each type with torch.nn's. Writes
`cpu-sixteen-bit-types.json`, and makes of it a table of docs/performance.md.

    python benchmarks/sixteen_bit.py            # three minutes
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import shapes
from records import RESULTS, Row
from rnnfast import ops
from rnnfast.benchmark.case import Case, make_call, make_data, make_layers
from rnnfast.benchmark.timing import environment, interleave

NAME = "cpu-sixteen-bit-types.json"
SUITE = "sixteen-bit"
PLAIN, ALLOWED = "float32", "float32, bfloat16 products"
TYPES = {PLAIN: "float32", ALLOWED: "float32", "bfloat16": "bfloat16", "float16": "float16"}
WORKLOADS = ("inference", "training")
CPU = torch.device("cpu")


@contextlib.contextmanager
def bf16_allowed() -> Iterator[None]:
    flags: Any = torch.backends.mkldnn.rnn  # type: ignore[attr-defined]
    before = flags.fp32_precision
    flags.fp32_precision = "bf16"
    try:
        yield
    finally:
        flags.fp32_precision = before


def cases() -> list[Case]:
    """The suite's shapes, each once."""
    return list(dict.fromkeys(replace(case, dtype="float32") for case in shapes.SUITES[SUITE]))


def measure(case: Case, workload: str, seconds: float) -> list[Row]:
    """The times of every type, medians of rounds in which they take turns."""
    calls = []
    for dtype in TYPES.values():
        typed = replace(case, dtype=dtype)
        torch.manual_seed(0)
        calls.append(make_call(make_layers(typed, CPU)[1], typed, workload, make_data(typed, CPU)))
    contexts = [bf16_allowed if name == ALLOWED else contextlib.nullcontext for name in TYPES]
    samples = interleave(calls, seconds, CPU, contexts)
    return [
        {
            **case.row,
            "workload": workload,
            "type": name,
            "us_per_step": statistics.median(taken) * 1e6 / case.steps,
            # Of each round its own: what slows the machine down slows both.
            "gain": statistics.median(plain / own for plain, own in zip(samples[0], taken, strict=True)),
        }
        for name, taken in zip(TYPES, samples, strict=True)
    ]


def table(results: Path) -> str:
    """By rows of a step and workload: the time of the float32 layer over that of each type."""
    path = results / NAME
    if not path.exists():
        return "There is no result file of `benchmarks/sixteen_bit.py` yet."
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in TYPES if name != PLAIN]
    lines = [f"| rows of a step | | {' | '.join(names)} |", f"| --- | --- |{' ---: |' * len(names)}"]
    groups = {"1": lambda row: row["B"] == 1, "8 and more": lambda row: row["B"] >= 8}
    for words, belongs in groups.items():
        for workload in WORKLOADS:
            line = [words, workload]
            for name in names:
                gains = [
                    row["gain"]
                    for row in data["rows"]
                    if row["type"] == name and row["workload"] == workload and belongs(row)
                ]
                line.append(f"{statistics.geometric_mean(gains):.2f} ({min(gains):.2f})" if gains else "")
            lines.append(f"| {' | '.join(line)} |")
    return "\n".join([*lines, "", f"Instruction set `{data['isa']}`; {data['device']}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--seconds", type=float, default=4, help="measuring time of a shape and workload (default 4)")
    options = parser.parse_args()
    asked = [(case, workload) for case in cases() for workload in WORKLOADS]
    rows = [row for pair in tqdm(asked, desc="shapes") for row in measure(*pair, options.seconds)]
    found = {"isa": ops.cpu_isa(), "rows": rows}
    (options.out / NAME).write_text(json.dumps(environment(CPU) | found, indent=1) + "\n", encoding="utf-8")
    print(table(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

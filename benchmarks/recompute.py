"""What `recompute` costs and saves on a CPU: time of training, all settings in turn in one process, and the most memory
that the operating system gave, each in a process of its own. Writes `cpu-recompute.json`, and makes of it a table of
docs/performance.md.

    python benchmarks/recompute.py              # ten minutes, 8 GB
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import rnnfast
import shapes
from records import RESULTS
from rnnfast import ops
from rnnfast.benchmark.case import Case
from rnnfast.benchmark.timing import environment
from rnnfast.recompute.memory import WAYS, in_words

NAME = "cpu-recompute.json"
CPU = torch.device("cpu")


def made(case: Case, way: str | None) -> Any:
    """The layer of a case."""
    torch.manual_seed(0)
    return getattr(rnnfast, case.cell)(case.inputs, case.hidden_size, recompute=way)


def train(module: Any, x: torch.Tensor, grad: torch.Tensor | None) -> float:
    """One forward and backward pass; seconds. grad: of the output, None: the loss is a sum over the last state."""
    begin = time.perf_counter()
    output, last = module(x)
    if grad is None:
        (last[0] if isinstance(last, tuple) else last).sum().backward()
    else:
        output.backward(grad)
    return time.perf_counter() - begin


def times(case: Case, rounds: int) -> dict[str | None, list[float]]:
    """Seconds by setting, one of each round, the settings in turn."""
    modules = {way: made(case, way) for way in WAYS}
    x, grad = torch.randn(case.steps, case.batch, case.inputs), torch.randn(case.steps, case.batch, case.hidden_size)
    found: dict[str | None, list[float]] = {way: [] for way in WAYS}
    for number in range(rounds + 1):
        for way, module in modules.items():
            taken = train(module, x, grad)
            # The first round is for memory and caches.
            if number:
                found[way].append(taken)
    return found


def _resident(of: str) -> int:
    """Bytes of this process, "VmRSS" now, "VmHWM" at most."""
    found = re.search(rf"{of}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1]) << 10


def peak(case: Case, way: str | None) -> dict[str, int]:
    """Of this process: the bytes that a pass took beyond what was there with the input, and all of them. The loss looks
    at the last state."""
    module = made(case, way)
    train(module, torch.randn(64, case.batch, case.inputs), None)
    x = torch.randn(case.steps, case.batch, case.inputs)
    # The most begins anew.
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = _resident("VmRSS")
    train(module, x, None)
    return {"taken": _resident("VmHWM") - before, "process": _resident("VmHWM")}


def peak_elsewhere(number: int, way: str | None) -> dict[str, int]:
    """`peak` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--peak", str(number), str(way)], capture_output=True, text=True, check=True
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def measure(number: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each setting of a case."""
    case = shapes.RECOMPUTE[number]
    taken = times(case, rounds)
    rows = []
    for way in WAYS:
        ratios = [own / plain for own, plain in zip(taken[way], taken[None], strict=True)]
        rows.append(
            {
                **case.row,
                "recompute": way,
                "seconds": statistics.median(taken[way]),
                "ratio": statistics.median(ratios),
                "least": min(ratios),
                "most": max(ratios),
                **peak_elsewhere(number, way),
            }
        )
    return rows


def table(results: Path) -> str:
    """Time beside that without recompute, and memory."""
    path = results / NAME
    if not path.exists():
        return "There is no result file of `benchmarks/recompute.py` yet."
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    lines = ["| | recompute | time | ratio | memory |", "| --- | --- | ---: | ---: | ---: |"]
    before = None
    for row in data["rows"]:
        what = f"{row['cell']} T={row['T']:,} B={row['B']} I={row['I']} H={row['H']}"
        ratio = f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})" if row["recompute"] else ""
        way = "`None`" if row["recompute"] is None else f'`"{row["recompute"]}"`'
        columns = (what if what != before else "", way, f"{row['seconds']:.2f} s", ratio, in_words(row["taken"]))
        lines.append(f"| {' | '.join(columns)} |")
        before = what
    return "\n".join([*lines, "", f"Instruction set `{data['isa']}`; {data['device']}."])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--rounds", type=int, default=7, help="how often each setting is timed (default 7)")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "WAY"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak is not None:
        number, way = options.peak
        print(json.dumps(peak(shapes.RECOMPUTE[int(number)], None if way == "None" else way)))
        return 0
    numbers = tqdm(range(len(shapes.RECOMPUTE)), desc="shapes")
    rows = [row for number in numbers for row in measure(number, options.rounds)]
    found = environment(CPU) | {"isa": ops.cpu_isa(), "rows": rows}
    (options.out / NAME).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(table(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time rnnfast's layers against torch.nn's on named suites of shapes; print a table and write a result file per suite.

    python benchmarks/run.py bar small packed

A ratio is torch.nn's time over rnnfast's: above 1 rnnfast is faster. Exit status 1 says that a case's results
were wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from shapes import CELLS, SUITES
from timing import MODES, environment, measure

HERE = Path(__file__).parent


# A packed batch's time over that of the same rows padded, and over that of a dense batch of as many tokens.
PACKED_KEYS = ("torch_over_padded", "over_padded", "over_dense")


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))


def table(suite: str, rows: list[dict[str, Any]], environment: dict[str, Any]) -> Table:
    """Every row, and per cell and mode the geometric mean of the ratios and the worst case."""
    result = Table(
        title=f"{suite}: {environment['device']}, torch {environment['torch']}",
        caption="ratio = torch.nn's time / rnnfast's time",
    )
    packed = any(PACKED_KEYS[0] in row for row in rows)
    for name in ("case", "mode"):
        result.add_column(name)
    for name in ("torch.nn\nus/step", "rnnfast\nus/step", "ratio", "p20", "p80"):
        result.add_column(name, justify="right")
    if packed:
        for name in ("packed / padded\ntorch.nn", "packed / padded\nrnnfast", "packed / dense\nrnnfast"):
            result.add_column(name, justify="right")
    result.add_column("results")
    for row in rows:
        cells = [row["case"], row["mode"], f"{row['torch_us_per_step']:.2f}", f"{row['us_per_step']:.2f}"]
        cells += [f"{row[key]:.2f}" for key in ("ratio", "p20", "p80")]
        if packed:
            cells += [f"{row[key]:.2f}" if key in row else "" for key in PACKED_KEYS]
        colour = "red" if row["ratio"] < 1 or not row["correct"] else None
        result.add_row(*cells, "agree" if row["correct"] else "WRONG", style=colour)
    result.add_section()
    for cell in CELLS:
        for mode in MODES:
            group = [row for row in rows if row["cell"] == cell and row["mode"] == mode]
            if group:
                worst = min(group, key=lambda row: row["ratio"])
                text = f"{cell}: geometric mean of {len(group)}; worst {worst['ratio']:.2f} at {worst['case']}"
                result.add_row(text, mode, "", "", f"{geometric_mean(row['ratio'] for row in group):.2f}", style="bold")
    return result


def markdown(records: list[dict[str, Any]]) -> str:
    """For the README: of every suite, per cell, the geometric mean and the worst case of either mode."""
    lines = [f"Ratio of torch.nn's time to rnnfast's: {records[0]['device']}, torch {records[0]['torch']}.", ""]
    lines.append("| suite, cell | " + " | ".join(f"{mode}: mean | worst" for mode in MODES) + " |")
    lines.append("| --- |" + " ---: | --- |" * len(MODES))
    for record in records:
        for cell in CELLS:
            line = [f"{record['suite']}, {cell}"]
            for mode in MODES:
                group = [row for row in record["rows"] if row["cell"] == cell and row["mode"] == mode]
                if group:
                    worst = min(group, key=lambda row: row["ratio"])
                    line += [f"{geometric_mean(row['ratio'] for row in group):.2f}"]
                    line += [f"{worst['ratio']:.2f} (B={worst['B']}, H={worst['H']})"]
                else:
                    line += ["", ""]
            if any(line[1:]):
                lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="+", choices=sorted(SUITES), metavar="suite", help=" ".join(sorted(SUITES)))
    parser.add_argument("--modes", nargs="+", default=MODES, choices=MODES)
    parser.add_argument("--seconds", type=float, default=3.0, help="measuring time of a row (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the result files (default benchmarks/results)"
    )
    parser.add_argument("--markdown", action="store_true", help="measure nothing: print a summary of the result files")
    options = parser.parse_args()
    paths = {suite: options.out / f"{options.device.type}-{suite}.json" for suite in options.suites}
    if options.markdown:
        for path in paths.values():
            if not path.exists():
                parser.error(f"there is no {path}: run the suite first")
        print(markdown([json.loads(path.read_text()) for path in paths.values()]))
        return 0
    torch.set_num_threads(options.threads)
    console = Console(width=None if sys.stdout.isatty() else 140)
    status = 0
    for suite in options.suites:
        rows: list[dict[str, Any]] = []
        interrupted = False
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
            task = progress.add_task(suite, total=len(SUITES[suite]) * len(options.modes))
            try:
                console.print(f"{suite}: {len(SUITES[suite]) * len(options.modes)} rows, {options.seconds} s each")
                for case in SUITES[suite]:
                    correct = None
                    for mode in options.modes:
                        progress.update(task, description=f"{suite}: {case.name} {mode}")
                        rows.append(measure(case, mode, options.seconds, options.device, correct))
                        correct = rows[-1]["correct"]
                        progress.advance(task)
            except KeyboardInterrupt:
                interrupted = True
        record = {**environment(options.device), "suite": suite, "rows": rows}
        if rows:
            console.print(table(suite, rows, record))
        if interrupted:
            # Half a suite must not take the place of a whole one's file.
            console.print(f"Interrupted: {len(rows)} rows measured, no result file written.")
            return 130
        if not all(row["correct"] for row in rows):
            status = 1
        options.out.mkdir(parents=True, exist_ok=True)
        paths[suite].write_text(json.dumps(record, indent=1) + "\n")
        console.print(f"written: {paths[suite]}")
    return status


if __name__ == "__main__":
    sys.exit(main())

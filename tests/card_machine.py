"""A machine with a card, as benchmarks/gpu_check.py sees it, without one: stand-ins for the programs that it runs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import card_kit

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks/gpu_check.py"
# What gpu_check finds on a machine with a card.
FACTS: dict[str, Any] = {
    "python": "3.12.3",
    "problem": None,
    "modules": ["pytest", "xdist", "rich", "tqdm"],
    "libraries": {"cpu": None, "cuda": None, "triton": None},
    "card": "NVIDIA H100 80GB HBM3",
    "short": "h100",
    "capability": "9.0",
}
# A row of a suite's result file, as far as the choice of the worst cases looks at it.
ROW = {
    "case": "LSTM-T100-B1-I128-H128",
    "cell": "LSTM",
    "dtype": "bfloat16",
    "workload": "inference",
    "backend": "cuda",
    **dict.fromkeys(("ratio", "p20", "p80"), 0.5),
    "us_per_step": 2.0,
    "torch_us_per_step": 1.0,
    "correct": True,
    **dict.fromkeys(("I", "H"), 128),
    **dict.fromkeys(("B", "layers", "directions"), 1),
    "T": 100,
    **dict.fromkeys(("P", "packed", "lengths", "resets"), 0),
}
OK, FIRE, HANG = "echo fine", "echo on fire; exit 3", "echo so far; trap '' INT TERM; sleep 300"


def describe(kit: Path) -> None:
    """Writes the manifest of a folder with programs: that of this tree and of its libraries."""
    card_kit.Kit(kit).write("abc123", "9.0a")
    if not all(path.exists() for path in card_kit.LIBRARIES):
        pytest.skip("the CUDA library is not built in this tree: make cuda")


class Machine:
    """A machine whose programs are stand-ins: each writes down that it was called, and does what it is told to.

    Args:
        folder: of all files.
        behaviour: by a part of a program's command line, what it does (shell); all others end at once.
    """

    def __init__(self, folder: Path, **behaviour: str) -> None:
        self.folder, self.out, self.kit = folder, folder / "out", folder / "kit"
        self.journal = folder / "journal"
        # Of chosen cases.
        part = self.out / "partial"
        suite = {"suite": "flashrnn", "rows": [ROW]}
        does = {
            "gpu_check.py facts": f"echo '{json.dumps(FACTS)}'",
            "--suite flashrnn": f"mkdir -p {part}; echo '{json.dumps(suite)}' > {part}/h100-flashrnn.json",
            "-m pytest": f'echo \'{{"test": "test_a", "outcome": "passed"}}\' >> {self.out}/tests.jsonl; echo 1 passed',
            "--tool": "echo '========= ERROR SUMMARY: 0 errors'",
            "ncu ": "echo '    Duration   us   12.3'; exit 9",
            **behaviour,
        }
        cases = "\n".join(f'  *"{words}"*) {what} ;;' for words, what in reversed(does.items()))
        text = (
            f'#!/bin/sh\necho "$0 $*" >> {self.journal}\ncase "$(basename "$0") $*" in\n{cases}\n  *) {OK} ;;\nesac\n'
        )
        for place in ("bin/python", "bin/compute-sanitizer", "bin/ncu", "kit/card_tests-90a", "kit/microbench-90a"):
            program = folder / place
            program.parent.mkdir(exist_ok=True)
            program.write_text(text)
            program.chmod(0o755)
        describe(self.kit)

    def command(self, run: str, *options: str) -> tuple[list[str], dict[str, str]]:
        given = ["--kit", str(self.kit), "--python", str(self.folder / "bin/python"), *options]
        path = f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}"
        return [sys.executable, str(SCRIPT), run, str(self.out), *given], {**os.environ, "PATH": path}

    def check(self, run: str, *options: str) -> subprocess.CompletedProcess[str]:
        command, environment = self.command(run, *options)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)

    def calls(self) -> list[str]:
        """The command lines, in the order in which they began, without folders."""
        return [re.sub(r"\S*/", "", line) for line in self.journal.read_text().splitlines()]

    def table(self) -> list[tuple[str, str, str, str]]:
        """(stage, job, outcome, note) of each row of the table in the folder."""
        text = (self.out / "table.txt").read_text()
        rows = re.findall(
            r"^(\w+) {1,10}(.{12}) (ok|skipped|noted|ended|FAILED|TIMEOUT) +[\d.]+ *(.*)$", text, re.MULTILINE
        )
        return [(stage, job.strip(), outcome, note) for stage, job, outcome, note in rows]

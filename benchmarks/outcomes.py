"""Files of tests' outcomes, as tests/gpu/conftest.py writes them (`--outcomes`): a JSON object a line."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from records import whole_lines
from stages import plain


def kernels_of(outcomes: Path) -> str:
    """Of which kernels a file of outcomes is, as its first line has it."""
    return next((str(row["kernels"]) for row in whole_lines(outcomes) if "kernels" in row), "unknown")


def failures(outcomes: Path, most: int = 12) -> list[str]:
    """How many tests passed and failed, by the file that the tests write, and the last words of those that failed."""
    if not outcomes.exists():
        return []
    last = {row["test"]: row for row in whole_lines(outcomes) if "test" in row}
    if not last:
        return []
    wrong = [row for row in last.values() if row["outcome"] == "failed"]
    counts = Counter(row["outcome"] for row in last.values())
    lines = [", ".join(f"{count} tests {outcome}" for outcome, count in counts.items())]
    for row in wrong[:most]:
        words = [line for line in row.get("text", "").splitlines() if line.strip()]
        lines.append(plain(f"FAILED {row['test']}: {(words or ['?'])[-1].strip()}", 300))
    return lines + [f"and {len(wrong) - most} more"] * (len(wrong) > most)

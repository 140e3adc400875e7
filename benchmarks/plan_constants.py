"""From a card's result file of benchmarks/microbench to the lines of `kMeasured` in csrc/cuda/plan/costs.h, which
replace the estimates of that architecture:

    python benchmarks/plan_constants.py benchmarks/results/h200-microbench.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from records import Row, whole_lines


def measured(rows: Sequence[Row]) -> dict[str, float]:
    """The constants that the rows tell, by their names in `enum class Constant`, in the units of its table.

    Raises:
        ValueError: the rows do not say which card they are of.
    """
    device = next((row for row in rows if row["what"] == "device"), None)
    if device is None:
        raise ValueError("no row of what = 'device': which card is it of?")
    # A wrong result says nothing about how long a right one takes.
    rows = [row for row in rows if row.get("correct")]
    found: dict[str, float] = {}

    def least(key: str, own: list[Row]) -> None:
        """The exchange itself: that of the fewest bytes."""
        if own:
            found[key] = min(own, key=lambda row: row["bytes"])["us"]

    dependent = float(device["capability"]) >= 9.0
    for key, graph in (("launch", False), ("graph_launch", True)):
        own = [row for row in rows if row["what"] == "launch" and row["graph"] == graph]
        own = [row for row in own if row["dependent"] == dependent]
        if own:
            found[key] = max(own, key=lambda row: row["ctas"])["us"]

    grid = [row for row in rows if row["what"] == "grid_exchange"]
    # A group of 64 blocks is what the plan takes most; fewer or more change little.
    ctas = min({row["ctas"] for row in grid}, key=lambda number: abs(number - 64), default=0)
    least("grid_exchange", [row for row in grid if row["ctas"] == ctas and row["way"] == "polling"])
    least("grid_barrier_exchange", [row for row in grid if row["ctas"] == ctas and row["way"] == "flags"])

    # All clusters that the card holds at the same time.
    cluster = [row for row in rows if row["what"] == "cluster_exchange" and row["way"] == "st_async"]
    cluster = [row for row in cluster if row["ctas"] == 8]
    cluster = [row for row in cluster if row["clusters"] == max(row["clusters"] for row in cluster)]
    least("cluster_exchange", cluster)
    if len(cluster) > 1:
        small, large = (choose(cluster, key=lambda row: row["bytes"]) for choose in (min, max))
        more_bytes = (large["bytes"] - small["bytes"]) * 7 / 8
        clocks = (large["us"] - small["us"]) * device["clock_mhz"]
        if clocks > 0:
            found["dsmem_bandwidth"] = more_bytes / clocks

    # Enough sums at once that no product waits for the one before it.
    mma = [row for row in rows if row["what"] == "mma" and row["weights"] == "registers"]
    if mma:
        found["mma"] = max(mma, key=lambda row: row["n"])["clocks_an_mma"]
    return found


def lines(path: Path) -> list[str]:
    """The lines of kMeasured.

    Raises:
        OSError: the file cannot be read.
        ValueError: it does not say which card it is of.
    """
    rows = whole_lines(path)
    found = measured(rows)
    device = next(row for row in rows if row["what"] == "device")
    sm = round(10 * float(device["capability"]))
    source = f"measured on {device['name']}: {path.name}"
    return [f'    {{Constant::{name}, {sm}, {value:.4g}, "{source}"}},' for name, value in found.items()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    try:
        found = lines(options.file)
    except (OSError, ValueError) as error:
        parser.error(f"{options.file}: {error}")
    print(f"constexpr std::array<MeasuredConstant, {len(found)}> kMeasured = {{{{")
    print("\n".join(found))
    print("}};")
    return 0


if __name__ == "__main__":
    sys.exit(main())

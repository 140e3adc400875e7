"""`python -m rnnfast bench`: one case, from the command line."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

from .. import libraries
from ..backends import NAMES
from ..quantization import TYPES
from .case import CELLS, DTYPES, WORKLOADS, Case, Impossible
from .comparison import GRAPH, Row, measure
from .timing import environment, keep_freed_memory

# Those that are timed unless others are asked for.
WORKLOADS_TIMED = ("inference", "training")
EXAMPLE = "example: python -m rnnfast bench --cell lstm --hidden 512 --batch 16 --workload inference,training"


def listed(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """For argparse: a list with commas, of these words."""

    def parse(text: str) -> list[str]:
        words = [word.strip() for word in text.split(",") if word.strip()]
        wrong = [word for word in words if word not in allowed]
        if wrong or not words:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong) or 'nothing'}: choose from {', '.join(allowed)}")
        return words

    return parse


def number(
    kind: type[int] | type[float], least: float, above: bool = False, most: float = math.inf
) -> Callable[[str], Any]:
    """For argparse: a finite number of at least so much, or above it, and at most `most`."""

    def parse(text: str) -> int | float:
        what = f"{'an integer' if kind is int else 'a number'} {'above' if above else 'of at least'} {least}"
        what += f" and at most {most}" if most < math.inf else ""
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf or (above and value == least):
            raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
        return value

    return parse


def backend_names(text: str) -> list[str]:
    """For argparse: a list with commas, of rnnfast's backends."""
    return listed([*NAMES, *(name + GRAPH for name in ("torch", *NAMES)), "emulated"])(text)


def device(text: str) -> torch.device:
    """For argparse: a device on which layers are timed."""
    try:
        found = torch.device(text)
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text!r}")
    return found


def add_measuring_options(parser: argparse.ArgumentParser) -> None:
    """What a single case and a suite share."""
    parser.add_argument("--device", default="cpu", type=device, help="cpu (default) or cuda")
    parser.add_argument(
        "--workload",
        type=listed(WORKLOADS),
        default=list(WORKLOADS_TIMED),
        help=f"of {','.join(WORKLOADS)} (default inference,training); streaming: one step a call",
    )
    parser.add_argument(
        "--backends",
        type=backend_names,
        help="rnnfast's, such as cuda,cuda-graph,triton,torch-graph (default: all here)",
    )
    parser.add_argument(
        "--seconds",
        type=number(float, 0, above=True),
        default=3.0,
        help="measuring time of a case and workload (default 3)",
    )
    parser.add_argument("--threads", type=number(int, 1), help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="glibc: freed memory is kept, not given back to the system: no page faults, on either side",
    )
    parser.add_argument("--no-tf32", action="store_true", help="CUDA: float32 without TF32, on both sides")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m rnnfast bench`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Checks rnnfast's layer against torch.nn's with the same weights, then times both in turn.\n"
        "A ratio is torch.nn's time over rnnfast's: above 1 rnnfast is faster.\n\n" + EXAMPLE
    )
    # Each option is a field of `Case`.
    parser.add_argument("--cell", type=str.upper, choices=CELLS, default="LSTM", help="lstm (default), gru or rnn")
    parser.add_argument(
        "--hidden", dest="hidden_size", type=number(int, 1), default=256, help="hidden size (default 256)"
    )
    parser.add_argument(
        "--input", dest="input_size", type=number(int, 0), default=0, help="input size (default: the hidden size)"
    )
    parser.add_argument("--proj", dest="proj_size", type=number(int, 0), default=0, help="projection size, LSTM only")
    parser.add_argument("--batch", type=number(int, 1), default=16, help="rows (default 16)")
    parser.add_argument("--steps", type=number(int, 1), default=100, help="time steps (default 100)")
    parser.add_argument("--layers", type=number(int, 1), default=1)
    parser.add_argument("--bidirectional", dest="directions", action="store_const", const=2, default=1)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--packed", action="store_true", help="a PackedSequence, rows of half to 1.5 times --steps")
    parser.add_argument("--lengths", action="store_true", help="the same rows padded, with lengths=")
    parser.add_argument(
        "--resets", type=number(float, 0), default=0.0, help="how likely a row starts anew before a step"
    )
    parser.add_argument("--cells", action="store_true", help="a loop of cells, one call a step, in place of a layer")
    parser.add_argument("--quantized", choices=TYPES, default="", help="also a layer with such weights (inference)")
    add_measuring_options(parser)
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")


def case_of(options: argparse.Namespace) -> Case:
    """The case that the options of `add_options` describe."""
    given = vars(options)
    return Case(**{field.name: given[field.name] for field in fields(Case) if field.name in given})


def lines(rows: Sequence[Row]) -> list[str]:
    """The rows as an aligned table."""
    head = ["workload", "backend", "torch.nn us/step", "us/step", "ratio", "p20", "p80", "tokens/s", "peak MB"]
    head += ["results"]
    body = [head]
    for row in rows:
        if row["correct"]:
            peak = row["peak_memory_bytes"]
            numbers = [f"{row[key]:.2f}" for key in ("torch_us_per_step", "us_per_step", "ratio", "p20", "p80")]
            numbers += [f"{row['tokens_per_s']:,}", f"{peak / 1e6:.1f}" if peak is not None else "", "agree"]
        else:
            numbers = [""] * 7 + [f"FAILED, not timed: {row['failure']}"]
        body.append([row["workload"], row["backend"], *numbers])
    widths = [max(len(line[column]) for line in body) for column in range(len(head))]
    # Words to the left, numbers to the right.
    return [
        "  ".join(
            text.ljust(width) if column in (0, 1, len(head) - 1) else text.rjust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in body
    ]


def run(options: argparse.Namespace) -> int:
    """Measures and prints.

    Args:
        options: what `add_options` describes.

    Returns:
        The exit status: 0, 1 where results are wrong or a backend failed, 130 after Ctrl-C.
    """
    if options.keep_memory and not keep_freed_memory():
        print("rnnfast bench: --keep-memory needs glibc")
        return 2
    if options.device.type == "cuda" and (why := libraries.device_problem()) is not None:
        print(f"rnnfast bench: --device {options.device}: {why}")
        return 2
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        case = case_of(options)
    except ValueError as error:
        print(f"rnnfast bench: {error}")
        return 2
    where = environment(options.device)
    print(f"{case.name}: {where['device']}, torch {where['torch']}", flush=True)
    rows: list[Row] = []
    status = 0
    try:
        for workload in options.workload:
            rows += measure(
                case, workload, options.seconds, options.device, backends=options.backends, tf32=not options.no_tf32
            )
    except (Impossible, ValueError) as error:
        print(f"rnnfast bench: {error}")
        status = 2
    except KeyboardInterrupt:
        print("Interrupted: this is what was measured so far.")
        status = 130
    if rows:
        print("\n".join(lines(rows)))
        distances = [row["core_to_core_ns"] for row in rows if row.get("core_to_core_ns")]
        if distances:
            print(f"A word takes {max(distances):.0f} ns from core to core: what waits for threads depends on that.")
        beside = [row["others_busy"] for row in rows if row.get("contended")]
        if beside:
            print(f"Other processes took up to {max(beside):.1f} cores meanwhile: do not trust these ratios.")
    if options.json and rows:
        record: dict[str, Any] = {**where, "suite": "command line", "rows": rows}
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return status or int(not all(row["correct"] for row in rows))

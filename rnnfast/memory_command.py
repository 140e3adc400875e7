"""`python -m rnnfast memory`: what training a layer takes under each setting of `recompute`; nothing is allocated."""

from __future__ import annotations

import argparse

from .benchmark.command import number
from .cell_types import CELLS
from .explain_command import MODES
from .recompute.memory import WAYS, Training, best_way, in_words, memory_of
from .recompute.settings import bytes_of

_MOST = 1 << 31
_ITEMS = {"fp32": 4, "fp64": 8, "bf16": 2, "fp16": 2}
EXAMPLE = "example: python -m rnnfast memory --cell lstm --hidden 256 --batch 8 --steps 100000"


def _budget(text: str) -> int:
    try:
        return bytes_of("memory", text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected bytes, as 2000000000 or '2 GB', got {text!r}") from None


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m rnnfast memory`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Says what training a layer takes of memory under each setting of recompute=, from its shape.\n"
        "Counted is what grows with the steps; not the input, parameters, or the process itself.\n\n" + EXAMPLE
    )
    parser.add_argument("--cell", type=str.lower, choices=list(MODES), default="lstm", help="default lstm")
    parser.add_argument("--hidden", type=number(int, 1, most=_MOST), required=True, help="hidden size H")
    parser.add_argument("--input", type=number(int, 1, most=_MOST), help="input size I (default: H)")
    parser.add_argument("--batch", type=number(int, 1, most=_MOST), default=16, help="batch B (default 16)")
    parser.add_argument("--steps", type=number(int, 1, most=_MOST), default=1000, help="time steps T (default 1000)")
    parser.add_argument("--layers", type=number(int, 1, most=_MOST), default=1, help="L (default 1)")
    parser.add_argument("--directions", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--projection", type=number(int, 0, most=_MOST), default=0, help="projection size P, 0 for none (default)"
    )
    parser.add_argument("--dtype", type=str.lower, choices=list(_ITEMS), default="fp32", help="default fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default cpu")
    parser.add_argument("--chunks", type=number(int, 1, most=_MOST), default=0, help="how many (default: as fits)")
    parser.add_argument(
        "--last-step", action="store_true", help="the loss looks at the last states alone, not at every step's output"
    )
    parser.add_argument("--input-gradient", action="store_true", help="the input wants a gradient")
    parser.add_argument("--budget", type=_budget, help="bytes, as '2 GB': which setting recompute='auto' takes")


def report(options: argparse.Namespace) -> str:
    """What the command prints."""
    mode = MODES[options.cell]
    training = Training(
        mode, options.input or options.hidden, options.hidden, options.steps, options.steps * options.batch,
        proj_size=options.projection, num_layers=options.layers, directions=options.directions,
        item=_ITEMS[options.dtype], whole_backward=options.device == "cpu", output_gradient=not options.last_step,
        input_gradient=options.input_gradient,
    )  # fmt: skip
    shape = f"I={training.input_size}, H={training.hidden_size}, B={options.batch}, T={options.steps}"
    shape += f", {options.layers} layers" if options.layers > 1 else ""
    shape += ", two directions" if options.directions == 2 else ""
    shape += f", P={options.projection}" if options.projection else ""
    lines = [
        f"{mode}, {shape}, {options.dtype}, training on {options.device}",
        "",
        f"{'recompute':<12}{'kept for backward':>20}{'at most':>14}",
    ]
    for how in WAYS:
        memory = memory_of(training, how, options.chunks if how == "chunks" else 0)
        lines.append(f"{how or 'None'!s:<12}{in_words(memory.kept):>20}{in_words(memory.peak):>14}")
    own = in_words(training.rows * training.directions * training.state_size * training.item)
    lines += ["", f"of this every step's output of a layer: {own}"]
    if options.budget is not None:
        how, budget = best_way(training, options.budget), in_words(options.budget)
        within = memory_of(training, how).peak <= options.budget
        lines.append(
            f"recompute='auto', memory_budget={budget!r}: {how!r}" + ("" if within else ", which does not fit either")
        )
    return "\n".join(lines)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints the report; the exit status."""
    if options.projection and not CELLS[MODES[options.cell]].may_project:
        parser.error(f"--projection: {options.cell} has none")
    if options.projection >= options.hidden:
        parser.error(f"--projection: expected less than --hidden {options.hidden}, got {options.projection}")
    print(report(options))
    return 0

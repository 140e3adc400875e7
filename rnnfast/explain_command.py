"""`python -m rnnfast explain`: which CUDA kernels a layer should run on, and what a step should take; no GPU needed."""

from __future__ import annotations

import argparse

from . import ops
from .benchmark.command import number
from .cell_types import CELLS
from .cuda_plan import ARCHITECTURES, NAMES, Illegal, Plan, plan

MODES = {"lstm": "LSTM", "gru": "GRU", "rnn": "RNN_TANH", **{name.lower(): name for name in CELLS}}
_TYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64", "tf32": "tf32"}
_TYPES |= {name: name for name in _TYPES.values()}
# What csrc/cuda/plan/plan_json.h and csrc/cpu/ops_plan.cpp take.
_MOST, _MOST_SMS, _MOST_SM = 1 << 31, (1 << 16) - 1, 999
EXAMPLE = "example: python -m rnnfast explain --cell lstm --hidden 512 --batch 16 --dtype bf16 --sm 90"


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `python -m rnnfast explain`."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.description = (
        "Says which CUDA kernels a layer should run on, in which layout, and what a step should take.\n"
        "The times are predicted by a cost model, not measured; no GPU is needed.\n\n" + EXAMPLE
    )
    parser.add_argument("--cell", type=str.lower, choices=list(MODES), default="lstm", help="default lstm")
    parser.add_argument("--hidden", type=number(int, 1, most=_MOST), required=True, help="hidden size H")
    parser.add_argument("--batch", type=number(int, 1, most=_MOST), default=16, help="batch B (default 16)")
    parser.add_argument(
        "--dtype", type=str.lower, choices=list(_TYPES), default="bf16",
        help="default bf16; fp32: as it is; tf32: float32 multiplied in TF32",
    )  # fmt: skip
    parser.add_argument(
        "--sm", type=number(int, ARCHITECTURES[0], most=_MOST_SM), default=90,
        help=f"architecture (default 90); cards of {', '.join(map(str, ARCHITECTURES))} are known",
    )  # fmt: skip
    parser.add_argument(
        "--sms", type=number(int, 1, most=_MOST_SMS), default=0, help="SMs, as of a MIG slice (default: the card's)"
    )
    parser.add_argument("--steps", type=number(int, 1, most=_MOST), default=1000, help="time steps T (default 1000)")
    parser.add_argument("--directions", type=int, choices=(1, 2), default=1)
    parser.add_argument(
        "--projection", type=number(int, 0, most=_MOST), default=0, help="projection size P, 0 for none (default)"
    )
    parser.add_argument("--graph", action="store_true", help="inside a CUDA graph: launches cost less")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--training", action="store_true", help="forward with reserve, and backward (default)")
    which.add_argument("--inference", action="store_true", help="forward without reserve")
    which.add_argument("--backward", action="store_true", help="backward alone")
    parser.add_argument("--plan", choices=NAMES, default="auto", help="this plan alone (default auto: the cheapest)")


def report(options: argparse.Namespace) -> str:
    """What the command prints.

    Raises:
        Illegal: there is no plan of the name asked for.
    """
    mode, arithmetic = MODES[options.cell], _TYPES[options.dtype]
    passes: dict[str, Plan] = {}
    for name in ["backward"] if options.backward else ["forward"] if options.inference else ["forward", "backward"]:
        passes[name] = plan(
            mode, arithmetic, options.hidden, options.batch, options.steps, options.directions, options.projection,
            training=not options.inference, backward=name == "backward", in_graph=options.graph, sm=options.sm,
            sms=options.sms, name=options.plan,
        )  # fmt: skip
    device = next(iter(passes.values())).device
    shape = f"H={options.hidden}, B={options.batch}, T={options.steps}"
    shape += ", two directions" if options.directions == 2 else ""
    shape += f", P={options.projection}" if options.projection else ""
    lines = [
        f"{mode}, {shape}, {arithmetic}, {'inference' if options.inference else 'training'}",
        f"on {device['name']}: sm_{device['sm']}, {device['sms']} SMs",
        "predicted, not measured",
        "",
    ]
    for name, found in passes.items():
        lines += [
            f"{name:<10}{found}",
            f"{'':<10}{found.predicted_us:.2f} us a step, limited by {found.limited_by}",
            f"{'':<10}{found.why}",
        ]
    lines += ["", f"{'us a step, each alone':<24}" + "".join(f"{name:>10}" for name in passes)]
    for limit in next(iter(passes.values())).limits_us:
        lines.append(f"  {limit:<22}" + "".join(f"{found.limits_us[limit]:>10.3f}" for found in passes.values()))
    return "\n".join(lines)


def run(options: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    """Prints the report; the exit status."""
    if ops.library_error is not None:
        parser.error(f"a plan needs the C++ library: {ops.library_error}")
    if options.projection and not CELLS[MODES[options.cell]].may_project:
        parser.error(f"--projection: {options.cell} has none")
    try:
        print(report(options))
    except Illegal as error:
        parser.error(f"--plan {options.plan}: {error}")
    return 0

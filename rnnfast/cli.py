"""`python -m rnnfast`: `info` says what is installed here, which backends run, and why the others do not; `bench` times
a layer against torch.nn's; `explain` predicts what a layer takes on a GPU; `memory` says what training takes."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from . import __version__, explain_command, libraries, memory_command, ops
from .backends import backends
from .benchmark import command
from .benchmark.timing import processor

__all__ = ["info", "main"]


def _devices() -> str:
    """What the CUDA library, with a runtime of its own, sees of devices."""
    count = torch.ops.rnnfast.cuda_device_count()
    return f"{count} CUDA device{'' if count == 1 else 's'} seen"


def info() -> str:
    """Versions, processor, instruction set in use, CUDA kernels and backends with reasons, as aligned lines of text."""
    forced = os.environ.get("RNNFAST_CPU_ISA")
    isa = ops.cpu_isa() or "none: the C++ library is not loaded"
    rows = [
        ("rnnfast", f"{__version__} in {os.path.dirname(os.path.abspath(__file__))}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", f"{processor()}, {torch.get_num_threads()} threads"),
        ("CPU kernels", isa + (f" (RNNFAST_CPU_ISA={forced})" if forced else "")),
    ]
    if libraries.cuda_error is None:
        rows.append(("CUDA kernels", f"for {torch.ops.rnnfast.cuda_archs()}; {_devices()}"))
    else:
        rows.append(("CUDA kernels", f"none: {libraries.cuda_error}"))
    if torch.cuda.is_available():
        rows.append(("GPU", ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))))
    rows += [
        (f"backend {name}", ("available: " if can.available else "not available: ") + can.reason)
        for name, can in backends().items()
    ]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after `python -m rnnfast`; None takes those of this process.
    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m rnnfast", description="Fast recurrent layers for PyTorch.")
    parser.add_argument("--version", action="version", version=f"rnnfast {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="versions, instruction set, backends and why each can run or not")
    timing = commands.add_parser("bench", help="check a layer against torch.nn's, then time both in turn")
    command.add_options(timing)
    plans = commands.add_parser(
        "explain", help="which CUDA kernels, and what a step should take: predicted, no GPU needed"
    )
    explain_command.add_options(plans)
    memory = commands.add_parser("memory", help="what training a layer takes of memory, with and without recompute=")
    memory_command.add_options(memory)
    options = parser.parse_args(arguments)
    if options.command == "bench":
        return command.run(options)
    if options.command == "explain":
        return explain_command.run(options, plans)
    if options.command == "memory":
        return memory_command.run(options, memory)
    print(info())
    return 0

"""`python -m rnnfast info`: what is installed here, which backends run, and why the others do not."""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Sequence

import torch

from . import __version__, ops
from .backends import backends

__all__ = ["info", "main"]


def _processor() -> str:
    """The processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def info() -> str:
    """Versions, processor, instruction set in use and backends with reasons, as aligned lines of text."""
    forced = os.environ.get("RNNFAST_CPU_ISA")
    isa = ops.cpu_isa() or "none: the C++ library is not loaded"
    rows = [
        ("rnnfast", f"{__version__} in {os.path.dirname(os.path.abspath(__file__))}"),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'not in this build'})"),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("processor", f"{_processor()}, {torch.get_num_threads()} threads"),
        ("CPU kernels", isa + (f" (RNNFAST_CPU_ISA={forced})" if forced else "")),
    ]
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
    parser.parse_args(arguments)
    print(info())
    return 0

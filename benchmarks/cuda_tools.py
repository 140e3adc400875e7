"""The programs of the CUDA toolkit that read what nvcc made. Needs the standard library alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sysconfig
from pathlib import Path


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: of CUDA_HOME or CUDA_PATH, as nvcc is (setup.py), else on PATH, of the usual
    place, in the packages of NVIDIA's that carry some of them (nvidia-cuda-cuobjdump, -nvdisasm), or triton's."""
    packages = Path(sysconfig.get_paths()["platlib"])
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    usual = [Path("/usr/local/cuda/bin"), *packages.glob("nvidia/cu*/bin"), packages / "triton/backends/nvidia/bin"]
    places = [[Path(home) / "bin"] if home else [], map(Path, os.get_exec_path()), usual]
    return next((str(path / name) for path in itertools.chain(*places) if os.access(path / name, os.X_OK)), None)


def missing(name: str) -> str:
    """What to say of a program that was not found."""
    return f"{name} was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm"


def run_tool(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """What the tool prints; SystemExit where it is missing or fails."""
    tool = cuda_tool(name)
    if tool is None:
        raise SystemExit(missing(name))
    # cuobjdump calls the nvdisasm that it finds on PATH.
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tool, *arguments], cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout

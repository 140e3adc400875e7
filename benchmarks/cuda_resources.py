"""Writes build/cuda_resources.csv: what each kernel of the CUDA library takes, as ptxas and the cubins say.

Reads the build folder of setup.py (`make cuda` builds, then runs this). Columns: kernel, arch, registers (a thread),
spills (bytes stored and loaded), stack (bytes a thread), shared (static, bytes a block), bytes (of machine code),
seconds (to compile its unit, all architectures, beside whatever else the build ran at that time).
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import struct
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from setup import CUDA_BUILD as BUILD  # noqa: E402
from setup import CUDA_FAMILIES  # noqa: E402

TABLE = ROOT / "build" / "cuda_resources.csv"


class Kernel(NamedTuple):
    kernel: str
    arch: str
    registers: int
    spills: int
    stack: int
    shared: int
    bytes: int
    seconds: float


def cuda_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, where the toolkit is, in the packages of NVIDIA's that carry some of them
    (nvidia-cuda-cuobjdump, -nvdisasm), or triton's."""
    packages = Path(sysconfig.get_paths()["platlib"])
    folders = [Path(home) / "bin" for home in [os.environ.get("CUDA_HOME"), "/usr/local/cuda"] if home]
    folders += [*packages.glob("nvidia/cu*/bin"), packages / "triton/backends/nvidia/bin"]
    return shutil.which(name) or next((str(path / name) for path in folders if (path / name).exists()), None)


def run_tool(name: str, *arguments: str, cwd: Path | None = None) -> str:
    """What the tool prints; SystemExit where it is missing or fails."""
    tool = cuda_tool(name)
    if tool is None:
        raise SystemExit(f"{name} was not found: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    # cuobjdump calls the nvdisasm that it finds on PATH.
    path = os.pathsep.join([str(Path(tool).parent), os.environ.get("PATH", "")])
    done = subprocess.run(
        [tool, *arguments], cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"{name} {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


def readable(symbols: list[str]) -> dict[str, str]:
    """Mangled kernel names as name<arguments>, without return type, parameters and our namespaces; families by name."""
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = {}
    for symbol, name in zip(symbols, done.stdout.splitlines(), strict=True):
        name = re.sub(r"\b(rnnfast|gpu)::|\(anonymous namespace\)::|^void ", "", name)
        name = re.sub(r"\(Family\)(\d+)", lambda found: CUDA_FAMILIES[int(found[1])], name)
        depth = 0
        for end, character in enumerate(name):
            depth += (character == "<") - (character == ">")
            if character == "(" and depth == 0:
                name = name[:end]
                break
        names[symbol] = name
    return names


def code_sizes(cubin: bytes) -> dict[str, int]:
    """Bytes of machine code of each kernel: its section .text.<mangled name> in a 64-bit ELF file."""
    table = struct.unpack_from("<Q", cubin, 0x28)[0]
    entry, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = []
    for index in range(count):
        name = struct.unpack_from("<I", cubin, table + index * entry)[0]
        offset, size = struct.unpack_from("<QQ", cubin, table + index * entry + 0x18)
        sections.append((name, offset, size))
    strings = sections[names][1]
    sizes = {}
    for name, _, size in sections:
        start = strings + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        if text.startswith(".text."):
            sizes[text.removeprefix(".text.")] = size
    return sizes


def cubins(binary: Path, folder: Path) -> list[tuple[str, Path]]:
    """(architecture, file) of each piece of machine code in an object or library, unpacked into `folder`."""
    run_tool("cuobjdump", "-xelf", "all", str(binary), cwd=folder)
    found = [(re.search(r"\.(sm_\w+)\.cubin$", path.name), path) for path in sorted(folder.glob("*.cubin"))]
    return [(match[1], path) for match, path in found if match]


ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def unit_resources(log: Path, seconds: float) -> list[Kernel]:
    """The kernels of one compile unit, from the log of ptxas -v and the object beside it; names still mangled."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = {arch: code_sizes(path.read_bytes()) for arch, path in cubins(log.with_suffix(""), Path(folder))}
    kernels = []
    for part in log.read_text().split("ptxas info    : Compiling ")[1:]:
        entry, stack, used = ENTRY.search("Compiling " + part), STACK.search(part), USED.search(part)
        if not (entry and stack and used):
            continue
        symbol, arch = entry.groups()
        kernels.append(
            Kernel(
                symbol,
                arch,
                registers=int(used[1]),
                spills=int(stack[2]) + int(stack[3]),
                stack=int(stack[1]),
                shared=int(used[2] or 0),
                bytes=sizes.get(arch, {}).get(symbol, 0),
                seconds=seconds,
            )
        )
    if not kernels or any(kernel.bytes == 0 for kernel in kernels):
        raise SystemExit(f"{log} does not fit the object beside it: remove both and build again")
    return kernels


def resources(build: Path = BUILD) -> list[Kernel]:
    """Every kernel of the CUDA library for every architecture."""
    seconds = {}
    for line in (build / ".ninja_log").read_text().splitlines()[1:]:
        start, end, _, output, _ = line.split("\t")
        seconds[Path(output).name] = (int(end) - int(start)) / 1000
    # An object whose source is gone stays in the folder: only what the library is linked from counts.
    linked = re.findall(r"^build (\S+\.o): nvcc", (build / "build.ninja").read_text(), re.MULTILINE)
    objects = [Path(path) for path in linked]
    kernels = [kernel for path in objects for kernel in unit_resources(Path(f"{path}.log"), seconds[path.name])]
    names = readable(sorted({kernel.kernel for kernel in kernels}))
    return sorted(kernel._replace(kernel=names[kernel.kernel]) for kernel in kernels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=TABLE)
    out = parser.parse_args().out
    if not (BUILD / "build.ninja").exists():
        raise SystemExit("the CUDA library is not built: `make cuda` builds it where nvcc is found")
    kernels = resources()
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(Kernel._fields)
        writer.writerows(kernels)
    for arch in sorted({kernel.arch for kernel in kernels}):
        of_arch = [kernel for kernel in kernels if kernel.arch == arch]
        print(
            f"{arch}: {len(of_arch)} kernels, {sum(kernel.bytes for kernel in of_arch) >> 10} KiB of code, at most "
            f"{max(kernel.registers for kernel in of_arch)} registers, {sum(k.spills > 0 for k in of_arch)} with spills"
        )
    print(f"written: {os.path.relpath(out)}")


if __name__ == "__main__":
    main()

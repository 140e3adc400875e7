"""Builds rnnfast's C++ library: one shared object without a Python symbol, for torch >= 2.10 and CPython >= 3.10.

The compiler is driven through a small ninja file: the kernels are compiled once for each instruction set, with
dependency tracking.
Environment: CXX (compiler), CXXFLAGS (added), MAX_JOBS (compilations at once).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_LIBRARY = "_C_cpu.so"

COMMON_FLAGS = (
    "-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror -DTORCH_TARGET_VERSION=0x020a000000000000".split()
)
# The kernels throw nothing and include no torch header. -Wno-psabi: vectors are passed only inside one compile unit.
KERNEL_FLAGS = "-fno-exceptions -fno-rtti -Wno-psabi".split()
# (name in RNNFAST_CPU_ISA, table in kernels.h, flags)
ISAS = {
    "x86_64": [
        ("portable", "kKernelsPortable", []),
        ("avx2", "kKernelsAvx2", ["-mavx2", "-mfma"]),
        ("avx512", "kKernelsAvx512", "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma".split()),
    ],
    # Elsewhere the compiler's baseline: on aarch64 that is NEON.
    "other": [("portable", "kKernelsPortable", [])],
}


def ninja_program() -> str:
    try:
        import ninja  # the PyPI package carries the program

        program = str(Path(ninja.BIN_DIR) / "ninja")
        if Path(program).exists():
            return program
    except ImportError:
        pass
    program = shutil.which("ninja")
    if program is None:
        raise SystemExit("rnnfast needs ninja to build: pip install ninja")
    return program


def quoted(words: list[str]) -> str:
    return " ".join(word.replace("$", "$$") for word in words)


def ninja_path(path: Path | str) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


class BuildLibrary(build_ext):
    """Compiles and links the CPU library with ninja, in place of setuptools' own compiler calls."""

    def build_extension(self, ext: Extension) -> None:
        import torch  # only its headers and libraries are used

        torch_root = Path(torch.__file__).parent
        cxx = os.environ.get("CXX", "c++")
        if shutil.which(cxx.split()[0]) is None:
            raise SystemExit(f"rnnfast needs a C++ compiler to build: {cxx!r} was not found (set CXX, or install g++)")
        build_dir = ROOT / "build" / f"cpu-{platform.machine()}"
        build_dir.mkdir(parents=True, exist_ok=True)
        library = build_dir / CPU_LIBRARY

        # As a system directory: warnings in torch's own headers are not ours to mend.
        includes = ["-isystem", str(torch_root / "include")]
        extra = os.environ.get("CXXFLAGS", "").split()
        lines = [
            "rule compile",
            f"  command = {cxx} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = compile $out",
            "rule link",
            f"  command = {cxx} -shared -o $out $in -L{torch_root / 'lib'} -ltorch_cpu -ltorch -lc10 -pthread",
            "  description = link $out",
        ]
        objects = []

        def compile_unit(source: str, name: str, flags: list[str]) -> None:
            out = build_dir / f"{name}.o"
            objects.append(ninja_path(out))
            lines.append(f"build {ninja_path(out)}: compile {ninja_path(ROOT / 'csrc' / source)}")
            lines.append(f"  flags = {quoted(COMMON_FLAGS + flags + extra)}")

        compile_unit("ops.cpp", "ops", includes)
        compile_unit("cpu/ops_cpu.cpp", "ops_cpu", includes)
        compile_unit("cpu/isa.cpp", "isa", [])
        for isa, table, flags in ISAS.get(platform.machine(), ISAS["other"]):
            defines = [f"-DRNNFAST_ISA={isa}", f"-DRNNFAST_KERNELS={table}"]
            compile_unit("cpu/kernels.cpp", f"kernels_{isa}", KERNEL_FLAGS + flags + defines)
        lines.append(f"build {ninja_path(library)}: link {' '.join(objects)}")
        ninja_file = build_dir / "build.ninja"
        text = "\n".join(lines) + "\n"
        if not ninja_file.exists() or ninja_file.read_text() != text:
            ninja_file.write_text(text)
        command = [ninja_program(), "-C", str(build_dir)]
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        if subprocess.run(command, check=False).returncode != 0:
            raise SystemExit("rnnfast: the C++ library did not compile; the compiler's message is above")

        target = Path(self.get_ext_fullpath(ext.name)).parent / CPU_LIBRARY
        target.parent.mkdir(parents=True, exist_ok=True)
        # Through a temporary name: a process that has the old library mapped keeps it.
        temporary = target.with_suffix(".tmp")
        shutil.copy2(library, temporary)
        temporary.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], CPU_LIBRARY)


class AnyPythonWheel(bdist_wheel):
    """The library has no Python symbol: one wheel a platform serves every CPython."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


if sys.platform != "linux":
    print(f"rnnfast: the C++ library is built on Linux only; on {sys.platform} the reference backend serves")

setup(
    ext_modules=[Extension("rnnfast._C_cpu", sources=[])] if sys.platform == "linux" else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)

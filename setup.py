"""Builds rnnfast's C++ libraries without a Python symbol, for torch >= 2.10 and CPython >= 3.10: `_C_cpu.so`, and where
nvcc is found `_C_cuda.so`, whether or not this machine has a GPU or its torch knows CUDA.

The compilers are driven through small ninja files, with dependency tracking.
Environment: CXX (compiler), CXXFLAGS (added), MAX_JOBS (compilations at once); RNNFAST_CUDA (0: no CUDA library, 1: an
error where there can be none), RNNFAST_CUDA_ARCHS (as in "8.0;9.0a"), CUDA_HOME (another nvcc than the one on PATH),
NVCC_THREADS (architectures of one file compiled at once), NVCC_CCBIN (nvcc's host compiler).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
CPU = "rnnfast._C_cpu"
CUDA = "rnnfast._C_cuda"
CPU_BUILD = ROOT / "build" / f"cpu-{platform.machine()}"
CUDA_BUILD = ROOT / "build" / f"cuda-{platform.machine()}"
CUDA_UNITS = ROOT / "build" / "cuda-units"

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COMMON_FLAGS = f"-std=c++20 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Werror {STABLE_ABI}".split()
# The kernels throw nothing and include no torch header. -Wno-psabi: vectors are passed only inside one compile unit.
KERNEL_FLAGS = "-fno-exceptions -fno-rtti -Wno-psabi".split()
# Names in RNNFAST_CPU_ISA, each with its flags; kernels.h and isa.cpp have them too. Those that have kernels of their
# own for some types alone stand in DTYPE_ISAS and PANEL_ISAS.
ISAS = {
    "x86_64": {
        "portable": [],
        "avx2": ["-mavx2", "-mfma"],
        "avx512": "-mavx512f -mavx512vl -mavx512bw -mavx512dq -mavx2 -mfma".split(),
    },
    # Elsewhere the compiler's baseline: on aarch64 that is NEON.
    "other": {"portable": []},
}
DTYPES = ["float32", "float64", "bfloat16", "float16"]
AVX512_BF16 = [*ISAS["x86_64"]["avx512"], "-mavx512bf16"]
# Of float32 these are the kernels whose products are in bfloat16.
DTYPE_ISAS = {
    "avx512_bf16": (["bfloat16", "float32"], AVX512_BF16),
    "amx_bf16": (["bfloat16", "float32"], [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"]),
}
# Types of weights that are packed once, and what has kernels of its own for them.
PANELS = ["float32", "bfloat16", "int8"]
PANEL_ISAS = {"avx512_vnni": ("int8", [*ISAS["x86_64"]["avx512"], "-mavx512vnni"])}

# nvcc 12.8 is the first that knows them all. 80 runs on 86 to 89 too, but 90a and 100a serve one generation each.
CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0a;12.0"
# No fast-math: exp, tanh and division keep the precision that the tolerances of the tests count on.
NVCC_FLAGS = "-std=c++20 -O3 -lineinfo --Werror all-warnings -Xcompiler -Wall,-Wextra,-fPIC,-fvisibility=hidden".split()
NVCC_FLAGS += ["-I", str(CSRC)]

# The kernels' compile units: for each family of cells (Family in csrc/cells.h) and each arithmetic
# (csrc/cuda/arithmetic.cuh) the template that each kind of kernel instantiates: its header, its name, and the families
# and arithmetics that it lacks.
CUDA_FAMILIES = ["lstm", "gru", "rnn", "mgu"]
CUDA_ARITHMETICS = ["Float64", "Float32", "Tf32", "BFloat16", "Float16"]
CUDA_KERNELS: dict[str, tuple[str, str, list[str]]] = {
    "step": ("cuda/step/launch.cuh", "StepInstance", []),
    "persistent": ("cuda/persistent/launch.cuh", "PersistentInstance", ["Float64"]),
    "split": ("cuda/split/launch.cuh", "SplitInstance", ["Tf32"]),
    "variant": ("cuda/variants/launch.cuh", "VariantInstance", ["mgu", "Tf32"]),
}


def without_cuda(reason: str) -> SystemExit:
    return SystemExit(f"rnnfast: {reason}\nRNNFAST_CUDA=0 builds without the CUDA kernels.")


class Ninja:
    """The ninja file of one build folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    @staticmethod
    def path(path: Path | str) -> str:
        return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")

    @staticmethod
    def words(words: Iterable[str]) -> str:
        return shlex.join(words).replace("$", "$$")

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        self.lines += ["  depfile = $out.d", "  deps = gcc"] if depfile else []

    def edge(self, rule: str, out: Path | str, inputs: Iterable[Path | str], flags: Iterable[str] = ()) -> Path:
        out = self.folder / out
        self.lines.append(f"build {self.path(out)}: {rule} {' '.join(self.path(path) for path in inputs)}")
        self.lines.append(f"  flags = {self.words(flags)}")
        return out

    def phony(self, name: str, inputs: Iterable[Path | str]) -> None:
        self.lines.append(f"build {name}: phony {' '.join(self.path(path) for path in inputs)}")

    def default(self, targets: Iterable[str]) -> None:
        """What is built where no target is named; without this, everything."""
        self.lines.append(f"default {' '.join(targets)}")

    def run(self, targets: Iterable[Path | str] = (), quiet: bool = False) -> bool:
        """Brings the targets up to date, by default the default ones; with no line added, by the file that is there."""
        import fcntl  # Unix only, as this build is

        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "build.ninja"
        text = "\n".join(self.lines) + "\n" if self.lines else file.read_text()
        command = [self.program(), "-C", str(self.folder)] + ["--quiet"] * quiet
        if jobs := os.environ.get("MAX_JOBS"):
            command += ["-j", jobs]
        with (self.folder / "lock").open("w") as lock:
            # Two builds at once would spoil ninja's log.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists() or file.read_text() != text:
                file.write_text(text)
            return subprocess.run(command + [str(target) for target in targets], check=False).returncode == 0

    @staticmethod
    def program() -> str:
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


def cxx_compiler() -> str:
    cxx = os.environ.get("CXX", "c++")
    if shutil.which(cxx.split()[0]) is None:
        raise SystemExit(f"rnnfast needs a C++ compiler to build: {cxx!r} was not found (set CXX, or install g++)")
    return cxx


def torch_root() -> Path:
    # Only its headers and libraries are used: not imported, which takes seconds.
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise SystemExit("rnnfast needs torch to build: pip install torch")
    return Path(found.origin).parent


def torch_includes(torch: Path | None = None) -> list[str]:
    """The host compiler's flags for the headers of `torch`, by default of the one that is installed."""
    include = (torch or torch_root()) / "include"
    # Messages name source files: not with their place on the machine that built the library. The last map goes first.
    names = [f"-fmacro-prefix-map={ROOT}/=", f"-fmacro-prefix-map={include}/="]
    # As a system directory: warnings in torch's own headers are not ours to mend.
    return ["-isystem", str(include), *names]


def build_cpu(folder: Path = CPU_BUILD, added: Iterable[str] = (), quiet: bool = False) -> Path:
    """Brings the C++ library of a build folder up to date; `added` are flags of every file and of the link."""
    cxx = cxx_compiler()
    extra = [*added, *os.environ.get("CXXFLAGS", "").split()]
    ninja = Ninja(folder)
    ninja.rule("compile", f"{cxx} $flags -MMD -MF $out.d -c $in -o $out")
    ninja.rule("link", f"{cxx} -shared -o $out $in $flags", depfile=False)

    def unit(source: str, name: str, flags: list[str]) -> Path:
        return ninja.edge("compile", f"{name}.o", [CSRC / source], COMMON_FLAGS + flags + extra)

    objects = [
        unit("ops.cpp", "ops", torch_includes()),
        unit("cpu/ops_cpu.cpp", "ops_cpu", torch_includes()),
        unit("cpu/ops_plan.cpp", "ops_plan", torch_includes()),
        unit("cpu/variants/ops.cpp", "ops_variants", torch_includes()),
        *(unit(f"cpu/{name}.cpp", name, []) for name in ("helpers", "isa", "job", "pool", "team")),
    ]
    kernels: list[tuple[str, str, list[str]]] = []
    panels: list[tuple[str, str, list[str]]] = []
    for isa, flags in ISAS.get(platform.machine(), ISAS["other"]).items():
        kernels += [(isa, dtype, flags) for dtype in DTYPES]
        panels += [(isa, panel, flags) for panel in PANELS]
    if platform.machine() == "x86_64":
        kernels += [(isa, dtype, flags) for isa, (dtypes, flags) in DTYPE_ISAS.items() for dtype in dtypes]
        panels += [(isa, panel, flags) for isa, (panel, flags) in PANEL_ISAS.items()]
    for isa, dtype, flags in kernels:
        names = [f"-DRNNFAST_ISA={isa}", f"-DRNNFAST_DTYPE={dtype}"]
        objects.append(unit("cpu/kernels.cpp", f"kernels_{isa}_{dtype}", KERNEL_FLAGS + flags + names))
        if isa not in DTYPE_ISAS:
            objects.append(unit("cpu/variants/kernels.cpp", f"variants_{isa}_{dtype}", KERNEL_FLAGS + flags + names))
    for isa, panel, flags in panels:
        names = [f"-DRNNFAST_ISA={isa}", f"-DRNNFAST_PANEL={panel}"]
        objects.append(unit("cpu/panel_kernels.cpp", f"panels_{isa}_{panel}", KERNEL_FLAGS + flags + names))
    libraries = [f"-L{torch_root() / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10", "-ldl", "-pthread"]
    library = ninja.edge("link", "_C_cpu.so", objects, [*libraries, *added])
    if not ninja.run(quiet=quiet):
        raise SystemExit("rnnfast: the C++ library did not compile; the compiler's message is above")
    return library


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, else of PATH, else of the usual place; None where there is none, or RNNFAST_CUDA=0."""
    wanted = os.environ.get("RNNFAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"rnnfast: RNNFAST_CUDA={wanted}: expected 0 (no CUDA library) or 1 (it must be built)")
    if wanted == "0" or sys.platform != "linux":
        return None
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        nvcc = shutil.which("nvcc", path=str(Path(home) / "bin"))
        if nvcc is None:
            raise without_cuda(f"CUDA_HOME is {home}, where there is no bin/nvcc")
    else:
        nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if nvcc is None and wanted == "1":
        raise SystemExit("rnnfast: RNNFAST_CUDA=1, but no nvcc was found: put it on PATH or set CUDA_HOME")
    return nvcc


def host_compiler() -> list[str]:
    """nvcc's flags for its host compiler: NVCC_CCBIN, else CXX where that is one program, else nvcc's own choice."""
    cxx = os.environ.get("CXX", "")
    chosen = os.environ.get("NVCC_CCBIN") or (cxx if len(cxx.split()) == 1 else "")
    name = chosen or "g++"
    if shutil.which(name) is None and not (Path(name) / "g++").exists():
        raise without_cuda(f"nvcc's host compiler {name!r} was not found: install g++, or set NVCC_CCBIN or CXX")
    return ["-ccbin", chosen] if chosen else []


def nvcc_answer(nvcc: str, question: str) -> str:
    done = subprocess.run([nvcc, question], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise without_cuda(f"`{nvcc} {question}` fails: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def nvcc_release(nvcc: str) -> tuple[int, int] | None:
    """Its version, as (13, 0)."""
    found = re.search(r"release (\d+)\.(\d+)", nvcc_answer(nvcc, "--version"))
    return (int(found[1]), int(found[2])) if found else None


def compression_flags(nvcc: str) -> list[str]:
    """Compressed machine code: a third of the size. From 13.0 on by the better of two ways, a fifth: the drivers that
    know that one are those that 13.0 needs anyway."""
    release = nvcc_release(nvcc)
    return ["--compress-mode=size"] if release and release >= (13, 0) else ["-Xfatbin", "-compress-all"]


def known_archs(nvcc: str) -> list[str]:
    """The compute capabilities that this nvcc compiles for; 9.0a and 10.0f are in its list without their letters."""
    return [f"{major}.{minor}" for major, minor in re.findall(r"sm_(\d+)(\d)\b", nvcc_answer(nvcc, "--list-gpu-code"))]


def cuda_archs(nvcc: str, listed: str = "", name: str = "RNNFAST_CUDA_ARCHS") -> list[str]:
    """The compute capabilities to build for, as in "9.0a"; an error where this nvcc does not know one.

    Args:
        listed: as in "8.0;9.0a"; what the environment says where it is empty.
        name: what errors call the list.
    """
    listed = listed or os.environ.get("RNNFAST_CUDA_ARCHS", "").strip("; ") or CUDA_ARCHS
    archs = list(dict.fromkeys(re.split(r"[;,\s]+", listed)))
    for arch in archs:
        if not re.fullmatch(r"\d+\.\d[af]?", arch):
            raise SystemExit(f"rnnfast: {name}: {arch!r} is no compute capability, as those in '8.0;9.0a'")
        if float(arch.rstrip("af")) < 8:
            raise SystemExit(f"rnnfast: {name}: {arch}: the kernels need compute capability 8.0 or later")
    found = nvcc_release(nvcc)
    release = f"{found[0]}.{found[1]}" if found else "of unknown version"
    if found and found[0] < 12:
        raise without_cuda(f"nvcc {release} ({nvcc}) is too old: C++20 needs 12.0, and the default architectures 12.8")
    known = known_archs(nvcc)
    unknown = [arch for arch in archs if arch.rstrip("af") not in known]
    if unknown:
        usable = ";".join(arch for arch in archs if arch not in unknown) or "8.0"
        raise without_cuda(
            f"nvcc {release} ({nvcc}) does not compile for {', '.join(unknown)}: "
            f"set {name}='{usable}', or take nvcc 12.8 or later for the default list"
        )
    return archs


def code_flags(archs: list[str]) -> list[str]:
    """Machine code for each, and PTX of the last without a letter, for later cards (PTX of 90a runs on 9.0 alone)."""
    flags = []
    numbers = [arch.replace(".", "") for arch in archs]
    for number in numbers:
        flags += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    for number in [number for number in numbers if number.isdigit()][-1:]:
        flags += ["-gencode", f"arch=compute_{number},code=compute_{number}"]
    return flags


def cuda_ops_flags(archs: list[str], torch: Path | None = None) -> list[str]:
    """nvcc's flags for the one file of the CUDA library that includes torch's headers."""
    # gcc 12 takes the tensor of an empty std::optional for one that is read.
    flags = [*NVCC_FLAGS, *host_compiler(), "--forward-unknown-to-host-compiler", "-Wno-maybe-uninitialized"]
    return flags + torch_includes(torch) + [STABLE_ABI, "-DUSE_CUDA", f'-DRNNFAST_CUDA_ARCH_LIST="{";".join(archs)}"']


def write_changed(path: Path, text: str) -> None:
    """Writes a source that is made here. An unchanged file keeps its time, for ninja."""
    if not path.exists() or path.read_text() != text:
        # Never half written: builds may run at once.
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(text)
        temporary.replace(path)


def cuda_unit(kernels: str, family: str, arithmetic: str) -> str:
    """The name of the compile unit of one kind of kernel, as in "step_lstm_bfloat16"."""
    return f"{kernels}_{family}_{arithmetic.lower()}"


def cuda_instances() -> list[tuple[str, str, str]]:
    """(kind of kernel, family, arithmetic) of every compile unit."""
    return [
        (kernels, family, arithmetic)
        for family, arithmetic in itertools.product(CUDA_FAMILIES, CUDA_ARITHMETICS)
        for kernels, (_, _, lacking) in CUDA_KERNELS.items()
        if family not in lacking and arithmetic not in lacking
    ]


def cuda_sources() -> list[Path]:
    """The CUDA library's compile units but the ops; brings those that are made from a list up to date."""
    CUDA_UNITS.mkdir(parents=True, exist_ok=True)
    units = []
    for kernels, family, arithmetic in cuda_instances():
        header, instance, _ = CUDA_KERNELS[kernels]
        unit = CUDA_UNITS / f"{cuda_unit(kernels, family, arithmetic)}.cu"
        arguments = f"rnnfast::Family::{family}, rnnfast::gpu::{arithmetic}"
        write_changed(unit, f'#include "{header}"\n\ntemplate struct rnnfast::gpu::{instance}<{arguments}>;\n')
        units.append(unit)
    return sorted(CSRC.glob("cuda/**/*.cu")) + units


def cuda_ninja(nvcc: str, archs: list[str], folder: Path) -> tuple[Ninja, Path]:
    """The ninja file of the CUDA library in a build folder, and the library. An object has the name of its unit."""
    flags = NVCC_FLAGS + compression_flags(nvcc) + host_compiler() + code_flags(archs)
    flags += ["--threads", os.environ.get("NVCC_THREADS", "1")]
    ninja = Ninja(folder)
    # What ptxas says of registers and spills goes to a file beside the object: benchmarks/cuda_resources.py reads it.
    run = f"{shlex.quote(nvcc)} $flags -c $in -o $out"
    ninja.rule("nvcc", f"{run} -MD -MF $out.d -Xptxas -v > $out.log 2>&1 || {{ cat $out.log; exit 1; }}")
    ninja.rule("compile", f"{run} -MD -MF $out.d")
    ninja.rule("link", f"{shlex.quote(nvcc)} -shared -cudart static -nodlink -o $out $in $flags", depfile=False)
    objects = [ninja.edge("nvcc", f"{source.stem}.o", [source], flags) for source in cuda_sources()]
    objects.append(ninja.edge("compile", "ops_cuda.o", [CSRC / "cuda/ops_cuda.cpp"], cuda_ops_flags(archs)))
    # --no-undefined: a symbol of libtorch_cuda would keep the library from loading in a torch for the CPU.
    libraries = [f"-L{torch_root() / 'lib'}", "-ltorch_cpu", "-ltorch", "-lc10"]
    libraries += host_compiler() + ["-Xlinker", "--no-undefined,--exclude-libs,ALL"]
    return ninja, ninja.edge("link", "_C_cuda.so", objects, libraries)


def built_archs() -> list[str]:
    """The compute capabilities that the CUDA library's build folder is for."""
    file = CUDA_BUILD / "build.ninja"
    numbers = re.findall(r"code=sm_(\d+)(\d[af]?)\b", file.read_text()) if file.exists() else []
    return list(dict.fromkeys(f"{major}.{minor}" for major, minor in numbers))


def build_cuda(nvcc: str) -> Path:
    ninja, library = cuda_ninja(nvcc, cuda_archs(nvcc), CUDA_BUILD)
    if not ninja.run():
        raise without_cuda("the CUDA library did not compile; nvcc's message is above")
    return library


class BuildLibraries(build_ext):
    """Compiles and links with ninja, in place of setuptools' own compiler calls."""

    def run(self) -> None:
        super().run()
        # A library that this build leaves out must not stay behind from an earlier one, nor travel in the wheel.
        for name in {CPU, CUDA} - {ext.name for ext in self.extensions}:
            Path(self.get_ext_fullpath(name)).unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        library = build_cpu() if ext.name == CPU else build_cuda(find_nvcc() or "nvcc")
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        # Through a temporary name: a process that has the old library mapped keeps it.
        temporary = target.with_suffix(".tmp")
        shutil.copy2(library, temporary)
        temporary.replace(target)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"


class AnyPythonWheel(bdist_wheel):
    """The libraries have no Python symbol: one wheel a platform serves every CPython."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def libraries() -> list[str]:
    if sys.platform != "linux":
        print(f"rnnfast: the C++ library is built on Linux only; on {sys.platform} the reference backend serves")
        return []
    if find_nvcc() is None:
        print("rnnfast: no nvcc, or RNNFAST_CUDA=0: the CUDA library is not built")
        return [CPU]
    return [CPU, CUDA]


# tests/build_emulated.py imports this file for what stands above.
if __name__ == "__main__":
    setup(
        ext_modules=[Extension(name, sources=[]) for name in libraries()],
        cmdclass={"build_ext": BuildLibraries, "bdist_wheel": AnyPythonWheel},
    )

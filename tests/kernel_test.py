"""Builds one program of tests/cpp with the emulator, and nothing else, and runs some of its cases: `make kernel-test`
and `make debug` call this.

    python tests/kernel_test.py test_step lstm-float32 [--seed 7] [--sanitizer thread] [--skip block.cuh:54]
    python tests/kernel_test.py test_step lstm-float32 --debug [--kernel step_forward] [--block 1,0,0] [--thread 5]

Exit status: 0: all well; 1: a check failed; 2: wrong arguments; 3: nothing reached the synchronisation that --skip
names; 4: it does not compile; 5: nothing noticed what --skip left out; 65 and 66: ASan's and TSan's report; 128 and a
signal's number: that ended it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import build_emulated
from build_emulated import BUILD, ROOT, fixed_addresses, instance_of, instances
from sanitizer_report import readable

VARIANTS = {None: "plain", "thread": "tsan", "address": "asan"}
# What the sanitizers exit with. One report is enough.
SANITIZER_OPTIONS = {
    "ASAN_OPTIONS": "exitcode=65",
    "UBSAN_OPTIONS": "print_stacktrace=1:exitcode=65",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=1",
}
# What a program exits with where nothing reached the synchronisation to be left out (tests/cpp/emulated_main.h).
SKIP_NOT_REACHED = 3
NOT_COMPILED = 4
# Where a test passed although it was left out.
SKIP_NOT_NOTICED = 5
# Seconds for a program to say its last words.
PATIENCE = 2
# A thread's stack without optimisation.
DEBUG_STACK = 1 << 20


class UnknownName(Exception):
    """What was asked for does not exist."""


def program_of(name: str) -> str:
    """The program called so, with or without its test_."""
    known = build_emulated.programs()
    for found in (name, f"test_{name}"):
        if found in known:
            return found
    raise UnknownName(f"K={name or '(none)'}: expected a program of tests/cpp: {', '.join(known)}")


def built(variant: str, program: str, instance: str | None) -> Path:
    """The program, up to date; with the kernels of one family and arithmetic alone, where these are given."""
    target = f"{variant}/{program}.{instance}" if instance else f"{variant}/{program}"
    began = time.monotonic()
    if not build_emulated.build([target], quiet=True):
        print(f"kernel_test.py: {target} does not compile", file=sys.stderr)
        raise SystemExit(NOT_COMPILED)
    print(f"built {(BUILD / target).relative_to(ROOT)} in {time.monotonic() - began:.1f} s", flush=True)
    return BUILD / target


def built_for(variant: str, program: str, cases: list[str]) -> Path:
    """The program for these cases, all of which it has, with no more kernels than they run."""
    small = next(iter(instances(program)), None)
    of_cases = {instance_of(program, case) for case in cases}
    chosen = of_cases.pop() if len(of_cases) == 1 else None
    path = built(variant, program, chosen or (small if cases else None))
    # Whatever the variables ask for is the run's business.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RNNFAST_EMULATOR")}
    command = [*fixed_addresses(), str(path), "--list"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    known = [line.removesuffix(" (by name only)") for line in done.stdout.splitlines()]
    for case in cases:
        if not any(name == case or name.startswith(f"{case}/") for name in known):
            raise UnknownName(f"CASE={case}: expected a case of {program}: {', '.join(known)}")
    return path if chosen or not cases or small is None else built(variant, program, None)


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """Signals to end that come inside take effect behind it: what is started inside is known then."""
    came: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda number, frame: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    for number in came:
        signal.raise_signal(number)


def run(program: Path, arguments: list[str], environment: dict[str, str], sanitized: bool) -> int:
    """Runs it; a sanitizer's report comes shortened, behind the results."""
    process, errors = None, ""
    try:
        with interrupts_later():
            process = subprocess.Popen(
                [*fixed_addresses(), str(program), *arguments],
                env={**os.environ, **SANITIZER_OPTIONS, **environment},
                stderr=subprocess.PIPE if sanitized else None,
                text=True,
                errors="replace",
            )
        errors = process.communicate()[1] or ""
    except KeyboardInterrupt:
        if process is None:
            raise
        # At a terminal it hears of Ctrl-C itself, and says where it is.
        for end in (lambda: None, lambda: process.send_signal(signal.SIGINT), process.kill):
            end()
            with contextlib.suppress(subprocess.TimeoutExpired):
                errors = process.communicate(timeout=PATIENCE)[1] or ""
                break
    sys.stdout.flush()
    sys.stderr.write(readable(errors, program))
    if process.returncode < 0:
        name = signal.Signals(-process.returncode).name
        print(f"kernel_test.py: {program.name} was ended by {name}", file=sys.stderr)
        return 128 - process.returncode
    return process.returncode


def index(text: str) -> str:
    """A block's index as gdb_kernel.py takes it: three numbers."""
    numbers = text.split(",")
    if not 1 <= len(numbers) <= 3 or not all(re.fullmatch(r"\d+", number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r}: expected x, x,y or x,y,z")
    return ",".join([*numbers, "0", "0"][:3])


def debug(
    gdb: str, program: Path, arguments: list[str], options: argparse.Namespace, environment: dict[str, str]
) -> int:
    """gdb at the beginning of a kernel, in one CUDA thread."""
    stop = f"kernel-break {options.block or '0,0,0'} {options.thread or 0} {options.kernel}".rstrip()
    command = [gdb, "-q", *(["-batch"] if options.gdb else []), "-x", str(ROOT / "tests/gdb_kernel.py")]
    for line in [stop, "run", *options.gdb]:
        command += ["-ex", line]
    command += ["--args", str(program), *arguments]
    environment = {"RNNFAST_EMULATOR_STACK": str(DEBUG_STACK), **os.environ, **environment}
    # Ctrl-C is gdb's.
    process = subprocess.Popen(command, env=environment, cwd=ROOT)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:
            continue


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", nargs="?", default="", help="of tests/cpp, with or without test_")
    parser.add_argument("cases", nargs="*", metavar="case", help="by name, or all of name/...; without any, all")
    parser.add_argument("--seed", type=int, help="data and schedule of this seed alone")
    parser.add_argument("--sanitizer", choices=["thread", "address"], help="under TSan, or under ASan and UBSan")
    parser.add_argument("--skip", metavar="FILE:LINE", help="leave the synchronisation on this line out")
    parser.add_argument("--sites", action="store_true", help="print each synchronisation that is reached")
    stop = parser.add_argument_group("in gdb")
    stop.add_argument("--debug", action="store_true", help="compiled for a debugger, and gdb at the kernel's beginning")
    stop.add_argument("--kernel", default="", metavar="NAME", help="stop in a kernel in whose name this is found")
    stop.add_argument("--block", type=index, metavar="X,Y,Z", help="block index (default 0,0,0)")
    stop.add_argument("--thread", type=int, metavar="N", help="thread of the block (default 0)")
    stop.add_argument("--gdb", action="append", default=[], metavar="COMMAND", help="run this there, and end")
    options = parser.parse_args()
    if options.debug and options.sanitizer:
        parser.error("--debug: not with --sanitizer")
    for name in ("kernel", "block", "thread", "gdb"):
        if getattr(options, name) not in (None, "", []) and not options.debug:
            parser.error(f"--{name}: only with --debug")
    if (options.thread or 0) < 0:
        parser.error(f"--thread: expected a thread of the block, from 0 on, got {options.thread}")
    gdb = shutil.which("gdb") or ""
    if options.debug and not gdb:
        parser.error("--debug needs gdb: apt-get install gdb")
    if options.seed is not None and not 0 <= options.seed < 1 << 64:
        parser.error(f"--seed: expected a whole number from 0 to 2^64 - 1, got {options.seed}")
    variant = "debug" if options.debug else VARIANTS[options.sanitizer]
    try:
        program = built_for(variant, program_of(options.program), options.cases)
    except UnknownName as error:
        # Of the variables, not of this program's own usage.
        parser.exit(2, f"kernel_test.py: {error}\n")
    environment = {}
    if options.skip is not None:
        environment["RNNFAST_EMULATOR_SKIP"] = options.skip.removeprefix(f"{ROOT}/").removeprefix("./")
    if options.sites:
        environment["RNNFAST_EMULATOR_LIST_SITES"] = "1"
    arguments = [] if options.seed is None else ["--seed", str(options.seed)]
    arguments += options.cases
    if options.debug:
        return debug(gdb, program, arguments, options, environment)
    return run(program, arguments, environment, options.sanitizer is not None)


def interrupted(number: int, frame: FrameType | None) -> None:
    """Whoever ends this program ends the one that it runs."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    # SIGINT too: what a shell starts in the background ignores it.
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, interrupted)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)

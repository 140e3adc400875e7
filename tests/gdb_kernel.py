"""gdb commands for kernels in the emulator; `make debug` loads this, and docs/emulator.md shows their use.

kernel-break X,Y,Z THREAD [NAME]   stop where this thread of this block begins a kernel in whose name NAME is found
cuda-thread                        which CUDA thread this is
cuda-threads                       where all threads are, and what they wait for
$cuda_thread(), $cuda_block("z")   the running thread's number in its block, and its block's index: for conditions

All but cuda-threads reads memory and calls nothing in the program: gdb 13.1 cannot call a function on a processor
with AMX, whose registers it does not know.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

import gdb
from gdb.FrameDecorator import FrameDecorator


def running() -> gdb.Value | None:
    """The emulator's Fiber of the CUDA thread that runs, or None on the host."""
    fiber = gdb.parse_and_eval("rnnfast::emulator::scheduler()::instance.current")
    return fiber.dereference() if int(fiber) else None


def name_of(fiber: gdb.Value) -> str:
    """As name_of() in csrc/emulator/report.cpp, which gdb cannot call everywhere."""
    kernel = fiber["block"]["grid"]["name"]["_M_dataplus"]["_M_p"].string()
    block = ",".join(str(int(fiber["block_index"][axis])) for axis in "xyz")
    return f"kernel {kernel}, block ({block}), thread {int(fiber['linear_thread'])}"


def last_site(fiber: gdb.Value) -> str:
    """Its last synchronisation and where, or "" before the first."""
    site = fiber["site"]["_M_impl"]
    if not int(site):
        return ""
    file, line = os.path.normpath(site["_M_file_name"].string()), int(site["_M_line"])
    return f"{fiber['what'].string()} {file}:{line}"


def first_line(entry: int) -> int:
    """The address behind a function's prologue, where its arguments can be read."""
    table = gdb.find_pc_line(entry).symtab.linetable()
    end = gdb.block_for_pc(entry).end
    later = sorted(line.pc for line in table if entry < line.pc < end)
    return later[0] if later else entry


def require_process() -> None:
    if not gdb.selected_inferior().pid:
        raise gdb.GdbError("the program has ended, or not begun")


def require_calls() -> None:
    """Raises where this gdb cannot call a function of the program; a call that fails half-way would derange it."""
    try:
        for _ in range(2):
            gdb.execute("set var $mxcsr = $mxcsr ^ 0x20")
    except gdb.error as error:
        # Of other processors than x86 there is no such register, and no such trouble.
        if "extended state" in str(error):
            raise gdb.GdbError(
                f"cuda-threads: this gdb cannot call a function on a processor with AMX, a newer one may: {error}"
            ) from error


class AtKernel(gdb.Breakpoint):
    """At the first line of a kernel, in one of its threads."""

    def __init__(self, entry: int, block: str, thread: str) -> None:
        super().__init__(f"*{first_line(entry)}")
        axes = zip("xyz", block.split(","), strict=True)
        same = [f'$cuda_block("{axis}") == {number}' for axis, number in axes]
        self.condition = " && ".join([f"$cuda_thread() == {thread}", *same])


class AtLaunch(gdb.Breakpoint):
    """At every launch; puts a breakpoint into the kernel, and goes on."""

    def __init__(self, block: str, thread: str, name: str) -> None:
        super().__init__("rnnfast::emulator::launch", internal=True)
        self.wanted = (block, thread)
        self.name = name
        self.kernels: dict[int, AtKernel] = {}
        self.launched: dict[str, None] = {}
        gdb.events.exited.connect(self.ended)

    def stop(self) -> bool:
        # Of a reference's target.
        launch = gdb.selected_frame().read_var("launch").referenced_value()
        entry, name = int(launch["entry"]), launch["name"].string()
        grid, threads = [int(launch["grid"][axis]) for axis in "xyz"], int(launch["threads"])
        self.launched[f"{name}: {','.join(map(str, grid))} blocks of {threads} threads"] = None
        block, thread = self.wanted
        there = all(int(at) < size for at, size in zip(block.split(","), grid, strict=True)) and int(thread) < threads
        if there and entry not in self.kernels and self.name in name:
            self.kernels[entry] = AtKernel(entry, *self.wanted)
        return False

    def ended(self, event: gdb.ExitedEvent) -> None:
        """Where nothing stopped, says what there was to stop in."""
        if any(kernel.is_valid() and kernel.hit_count for kernel in self.kernels.values()):
            return
        block, thread = self.wanted
        print(f"no kernel with {self.name!r} in its name began in block {block}, thread {thread}; launched were")
        print("\n".join(f"  {line}" for line in self.launched) or "  none")


class KernelBreak(gdb.Command):
    """kernel-break X,Y,Z THREAD [NAME]: stop where this thread begins a kernel in whose name NAME is found."""

    def __init__(self) -> None:
        super().__init__("kernel-break", gdb.COMMAND_BREAKPOINTS)

    def invoke(self, argument: str, from_tty: bool) -> None:
        words = argument.split(maxsplit=2)
        if len(words) < 2 or words[0].count(",") != 2:
            raise gdb.GdbError("kernel-break: expected X,Y,Z THREAD [NAME], as in 0,0,0 5 step_forward")
        AtLaunch(words[0], words[1], words[2] if len(words) > 2 else "")


class CudaThread(gdb.Command):
    """cuda-thread: which CUDA thread this is."""

    def __init__(self) -> None:
        super().__init__("cuda-thread", gdb.COMMAND_STATUS)

    def invoke(self, argument: str, from_tty: bool) -> None:
        require_process()
        fiber = running()
        if fiber is not None:
            last = last_site(fiber)
            print(name_of(fiber) + (f", last at {last}" if last else ""))


class CudaThreads(gdb.Command):
    """cuda-threads: where all threads are, and what they wait for."""

    def __init__(self) -> None:
        super().__init__("cuda-threads", gdb.COMMAND_STATUS)

    def invoke(self, argument: str, from_tty: bool) -> None:
        require_process()
        require_calls()
        gdb.execute("call (void)rnnfast::emulator::print_threads()")


class CudaThreadNumber(gdb.Function):
    """$cuda_thread(): the running CUDA thread's number in its block, -1 on the host."""

    def __init__(self) -> None:
        super().__init__("cuda_thread")

    def invoke(self) -> int:
        fiber = running()
        return -1 if fiber is None else int(fiber["linear_thread"])


class CudaBlock(gdb.Function):
    """$cuda_block("z"): the running CUDA thread's block index along an axis, -1 on the host."""

    def __init__(self) -> None:
        super().__init__("cuda_block")

    def invoke(self, axis: gdb.Value) -> int:
        letter = axis.string()
        if letter not in ("x", "y", "z"):
            raise gdb.GdbError(f'$cuda_block: expected "x", "y" or "z", got "{letter}"')
        fiber = running()
        return -1 if fiber is None else int(fiber["block_index"][letter])


class KernelFrames:
    """Leaves out of a backtrace what stands between a kernel and the host."""

    name = "kernel-frames"
    priority = 100
    enabled = True

    def filter(self, frames: Iterator[FrameDecorator]) -> Iterator[FrameDecorator]:
        # Below the first frame of a stack there is one without a name.
        own = re.compile(r"(?!std::|rnnfast::emulator::|rnnfast::gpu::launch<)\D")
        return (frame for frame in frames if own.match(str(frame.function() or 0)))


kernel_frames = KernelFrames()
gdb.frame_filters[kernel_frames.name] = kernel_frames
for each in (KernelBreak, CudaThread, CudaThreads, CudaThreadNumber, CudaBlock):
    each()
for setting in ("pagination off", "confirm off", "print thread-events off", "breakpoint pending on"):
    gdb.execute(f"set {setting}")

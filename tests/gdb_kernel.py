"""gdb commands for kernels in the emulator; `make debug` loads this, and docs/emulator.md shows their use.

kernel-break X,Y,Z THREAD [NAME]   stop where this thread of this block begins a kernel in whose name NAME is found
cuda-thread                        which CUDA thread this is
cuda-threads                       where all threads are, and what they wait for
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import gdb
from gdb.FrameDecorator import FrameDecorator

SELF = "rnnfast::emulator::self()"


def first_line(entry: int) -> int:
    """The address behind a function's prologue, where its arguments can be read."""
    table = gdb.find_pc_line(entry).symtab.linetable()
    end = gdb.block_for_pc(entry).end
    later = sorted(line.pc for line in table if entry < line.pc < end)
    return later[0] if later else entry


def require_process() -> None:
    if not gdb.selected_inferior().pid:
        raise gdb.GdbError("the program has ended, or not begun")


class AtKernel(gdb.Breakpoint):
    """At the first line of a kernel, in one of its threads."""

    def __init__(self, entry: int, block: str, thread: str) -> None:
        super().__init__(f"*{first_line(entry)}")
        index = zip("xyz", block.split(","), strict=True)
        same = [f"{SELF}.block_index.{axis} == {number}" for axis, number in index]
        self.condition = " && ".join([f"{SELF}.linear_thread == {thread}", *same])


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
        gdb.execute('printf "%s\\n", rnnfast::emulator::who_runs().c_str()')


class CudaThreads(gdb.Command):
    """cuda-threads: where all threads are, and what they wait for."""

    def __init__(self) -> None:
        super().__init__("cuda-threads", gdb.COMMAND_STATUS)

    def invoke(self, argument: str, from_tty: bool) -> None:
        require_process()
        gdb.execute("call (void)rnnfast::emulator::print_threads()")


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
for command in (KernelBreak, CudaThread, CudaThreads):
    command()
for setting in ("pagination off", "confirm off", "print thread-events off", "breakpoint pending on"):
    gdb.execute(f"set {setting}")

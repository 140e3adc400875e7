"""What TSan and ASan say of a kernel in the emulator, as its author needs it: kernel, block and thread by name; the
kernel's own frames, each with its line and the line's text; an address in shared memory as a byte of it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# "#0 0x12 in function file:line (program+0x34)", of which all but the function may be missing.
FRAME = re.compile(
    r"^ +#\d+ (?:0x[0-9a-f]+ in )?(?P<function>.+?)(?: (?P<place><null>|[^ ()]*[/.][^ ()]*))?"
    r"(?: \((?P<module>[^()]+)\+0x(?P<at>[0-9a-f]+)\))?$"
)
THREAD = re.compile(r"^ +Thread (?P<number>T\d+) '(?P<name>[^']*)'")
# What stands between a kernel and its test, or below that: of no interest to their author.
HARNESS_FILE = re.compile(r"^/usr/|^csrc/emulator/|^csrc/cuda/primitives/launch\.h|/libsanitizer/|/sysdeps/")
HARNESS = re.compile(
    r"(std::|fiber_main$|rnnfast::emulator::|rnnfast::gpu::launch$|rnnfast::test::(run|runs|finish)$|check::|main$)"
)
# The bytes around an address, as ASan shows them.
SHADOW = re.compile(r"(=>)? *0x[0-9a-f]+: ?\S|Shadow byte|  \w[\w ]+: +(\w\w ?)+$")


def resolved(program: Path, address: str) -> list[tuple[str, str]]:
    """(function, file:line) of an address, inlined calls first; gcc's sanitizers do not find some themselves."""
    tool = shutil.which("addr2line")
    if tool is None:
        return []
    done = subprocess.run(
        [tool, "-Cfie", str(program), f"0x{address}"], capture_output=True, text=True, check=False
    ).stdout.splitlines()
    pairs = zip(done[::2], done[1::2], strict=False)
    return [(function, place.partition(" (")[0]) for function, place in pairs if not place.startswith("?")]


def shown(place: str) -> str:
    """A place without the repository's folder."""
    return re.sub(rf"(^|(?<=\s)){re.escape(str(ROOT))}/", "", place)


def source_line(place: str) -> str:
    """The text at file:line[:column]; "" where there is none."""
    found = re.match(r"(.+?):(\d+)(?::\d+)?$", place)
    if found is None:
        return ""
    path = ROOT / found[1]
    try:
        return path.read_text(encoding="utf-8").splitlines()[int(found[2]) - 1].strip()
    except (OSError, IndexError, UnicodeDecodeError):
        return ""


def long_name(name: str) -> str:
    """The name of a CUDA thread, or of what it issued, of the short one that TSan has room for (csrc/emulator)."""
    name = re.sub(r"(\(\d+,\d+,\d+\)) (\d+) of (.*)", r"kernel \3, block \1, thread \2", name)
    return re.sub(r"^(\w+) (\S+:\d+) by ", r"\1 at \2, issued by ", name)


def qualified_name(function: str) -> str:
    """A demangled function's own name, without what it returns and takes: "std::array<int, 2> a::f<std::less>(int)" is
    "a::f"."""
    name = function.replace("(anonymous namespace)", "").replace("decltype(auto) ", "")
    while (shorter := re.sub(r"<[^<>]*>", "", name)) != name:
        name = shorter
    return (name.partition("(")[0].split() or [""])[-1].removeprefix("::")


def own_frames(line: str, program: Path) -> list[tuple[str, str]] | None:
    """What a line of a stack shows of the kernel and its test: (function, place), several where calls were inlined.

    Returns:
        None where the line is no frame of a stack.
    """
    found = FRAME.match(line)
    if found is None:
        return None
    place = found["place"] or "<null>"
    frames = [(found["function"], place)]
    if place == "<null>" and Path(found["module"] or "").name == program.name:
        frames = resolved(program, found["at"]) or frames
    return [
        (function, shown(place))
        for function, place in frames
        if not HARNESS_FILE.search(shown(place)) and not HARNESS.match(qualified_name(function))
    ]


def readable(text: str, program: Path) -> str:
    """The report in a program's output, shortened; output without one comes back as it is."""
    if "Sanitizer" not in text and "runtime error" not in text:
        return text
    names = {found["number"]: long_name(found["name"]) for line in text.splitlines() if (found := THREAD.match(line))}
    result: list[str] = []
    access = depth = 0
    making_threads = False
    for line in text.splitlines():
        frames = own_frames(line, program)
        if frames is not None:
            for function, place in frames if not making_threads else []:
                result.append(f"    #{depth} {function} {place}")
                if code := source_line(place):
                    result.append(f"         {code}")
                depth += 1
            continue
        depth = 0
        # How the emulator made its threads helps nobody.
        making_threads = THREAD.match(line) is not None
        # Nor do the innermost frame, which the report begins with, and memory around an address.
        if making_threads or SHADOW.match(line) or line.startswith("SUMMARY: "):
            continue
        if found := re.search(r"at (0x[0-9a-f]+) by ", line):
            access = int(found[1], 16)
        if found := re.match(r" +Location is heap block of size (\d+) at (0x[0-9a-f]+)", line):
            line = f"  Location is byte {access - int(found[2], 16)} of the {found[1]} allocated in:"
        line = re.sub(r"thread (T\d+)\b", lambda found: names.get(found[1], found[0]), line)
        line = shown(re.sub(r"\(/\S+/([^/]+)\+0x[0-9a-f]+\) ", "", line))
        if line.strip() or (result and result[-1].strip()):
            result.append(line)
        # What a copy does later has no frame of the kernel's.
        if (issued := re.search(r" by \w+ at (\S+:\d+), issued by ", line)) and (code := source_line(issued[1])):
            result.append(f"         {code}")
    return "\n".join(result) + "\n"

"""Calls rnnfast's ops at random under ASan + UBSan, and under TSan: builds what that takes, and runs the cases.

python tests/fuzz/run.py [--sanitizer address] [--seconds 60] [--seed N]
python tests/fuzz/run.py --op variant_forward --op variant_backward     no other ops
python tests/fuzz/run.py --sanitizer address --seed N --only K          one case again
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from build_emulated import fixed_addresses  # noqa: E402
from build_sanitized import FLAGS, build, companions, library  # noqa: E402
from setup import cxx_compiler  # noqa: E402

# A case without end is a failure too. One alone takes a second at most.
PATIENCE = 120
SUPPRESSED = Path(__file__).with_name("tsan.supp")
# Who asks for more at once gets none, as where memory is short.
MOST_MIB = 512
LIMITS = f"allocator_may_return_null=1:max_allocation_size_mb={MOST_MIB}:halt_on_error=1"
OPTIONS = {
    # Python frees little at its end.
    "address": {
        "ASAN_OPTIONS": f"{LIMITS}:exitcode=65:detect_leaks=0",
        "UBSAN_OPTIONS": "exitcode=65:print_stacktrace=1:halt_on_error=1",
    },
    # The planted faults run in forked children. The one signal, of a case that hangs, asks where its threads are.
    "thread": {
        "TSAN_OPTIONS": f"{LIMITS}:exitcode=66:die_after_fork=0:report_signal_unsafe=0:suppressions={SUPPRESSED}"
    },
}
# Python is not linked with them. libstdc++ beside ASan: it must find what throws before torch brings it.
RUNTIMES = {"address": ["libasan.so", "libubsan.so", "libstdc++.so"], "thread": ["libtsan.so"]}

# Of a report: each refusal of too much memory, the interpreter's own frames, torch's without a name.
NOISE = re.compile(r"failed to allocate|(Python|Objects|Modules|Include)/|^frame #|libffi|pybind11::")


def runtime(name: str) -> str:
    command = [*cxx_compiler().split(), f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(sanitizer: str, seed: int, arguments: list[str], ops: list[str]) -> bool:
    """One sanitizer's cases in a process of their own; False where one failed. `ops`: the words that choose them."""
    if not build(sanitizer, quiet=True):
        return False
    preloaded = [runtime(name) for name in RUNTIMES[sanitizer]] + [str(path) for path in companions(sanitizer)[1:]]
    environment = os.environ | OPTIONS[sanitizer] | {"LD_PRELOAD": " ".join(preloaded)}
    child = [sys.executable, str(Path(__file__).with_name("child.py")), sanitizer, str(seed), *arguments, *ops]
    case, report = (library(sanitizer).with_name(name) for name in ("case", "report"))
    case.write_text("none yet")
    with report.open("w") as errors:
        process = subprocess.Popen([*fixed_addresses(), *child], env=environment, stderr=errors)
    while True:
        try:
            code = process.wait(1)
            break
        except subprocess.TimeoutExpired:
            if time.time() - case.stat().st_mtime > PATIENCE:
                process.send_signal(signal.SIGUSR1)  # the report says where its threads are
                time.sleep(2)
                process.kill()
                code = f"none, it hangs: killed after {PATIENCE} s"
    if code != 0:
        lines = report.read_text(errors="replace").splitlines()
        print(*[line for line in lines if not NOISE.search(line)][:150], sep="\n")
        number, _, call = case.read_text().partition("\n")
        print(f"\n{sanitizer}: exit code {code} in case {number}:\n{call}\nAgain:")
        words = " ".join(["python tests/fuzz/run.py", *("--sanitizer", sanitizer, "--seed", str(seed)), *ops])
        print(f"    {words} --only {number}", flush=True)
    return code == 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", choices=list(FLAGS), action="append", help="default: both, one after the other")
    parser.add_argument("--seconds", type=float, default=60, help="for each sanitizer (default: 60)")
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--only", type=int, help="the number of the one case to run")
    parser.add_argument("--op", action="append", default=[], help="call this op, and others so given, but no more")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    which = ["--seconds", str(arguments.seconds)] if arguments.only is None else ["--only", str(arguments.only)]
    ops = [word for op in arguments.op for word in ("--op", op)]
    passed = [run(name, arguments.seed, which, ops) for name in arguments.sanitizer or FLAGS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())

"""What tests/fuzz/run.py runs under a sanitizer: one case after the other until the time is over, or one alone.

A case is one call, or several at once, made from nothing but the seed and the case's number.
"""

from __future__ import annotations

import argparse
import collections
import faulthandler
import os
import random
import signal
import sys
import threading
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# The package without its __init__, which would load the library that stands beside it.
package = types.ModuleType("rnnfast")
package.__path__ = [str(ROOT / "rnnfast")]
sys.modules["rnnfast"] = package

import calls  # noqa: E402
import variant_calls  # noqa: E402
from calls import OpCall  # noqa: E402

from build_sanitized import companions, library  # noqa: E402
from cases import MODES, make_call  # noqa: E402
from isas import ISAS, WITH_PAIRS  # noqa: E402

COMPARED = 0.2  # of the calls that can be
counted: collections.Counter[str] = collections.Counter()
isas: list[str] = []
TEAMS = ("auto", "alone", "pool", "helpers")


class Progress:
    """Where run.py reads which case a process was at when it died."""

    file: Path
    number = 0

    @classmethod
    def show(cls, text: str) -> None:
        cls.file.write_text(f"{cls.number}\n{text}\n")


def has_isa(name: str) -> bool:
    try:
        return bool(torch.ops.rnnfast.use_cpu_isa(name))
    except RuntimeError:
        return False


def perform(call: OpCall, excused: bool = False) -> Any:
    """The call's results; None where it was refused, as it may be if it is malformed or `excused`."""
    torch.set_num_threads(call.threads)
    counted["calls"] += 1
    try:
        results = call.run()
    except RuntimeError as error:
        if call.well_formed and not excused:
            raise
        counted["refused" if str(error).startswith(f"rnnfast::{call.op}: ") else "refused by torch"] += 1
        return None
    assert not call.must_raise, "expected a RuntimeError"
    return results


def one_call(rng: random.Random, make: Callable[[random.Random], OpCall]) -> None:
    call = make(rng)
    Progress.show(call.describe())
    results = perform(call)
    if results is not None and call.well_formed and call.comparable and rng.random() < COMPARED:
        call.compare(results)
        counted["compared"] += 1


def at_once(works: list[Callable[[], None]]) -> None:
    """Each in a thread of its own; the first that fails is raised."""
    failures: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        start.wait()
        try:
            work()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def several_calls(rng: random.Random) -> None:
    """Calls at once, and another ISA and team meanwhile."""
    made = [rng.choice([calls.well_formed, calls.well_formed, calls.malformed])(rng) for _ in range(rng.choice([2, 3]))]
    made.append(made[0])  # the same tensors
    Progress.show("\n".join(call.describe() for call in made))

    def work(call: OpCall) -> None:
        for _ in range(3):
            results = perform(call)
        if results is not None and call.well_formed and call.comparable:
            call.compare(results)

    def change_isa() -> None:
        for isa in rng.choices(isas, k=20):
            torch.ops.rnnfast.use_cpu_isa(isa)
            torch.ops.rnnfast.use_cpu_team(rng.choice(TEAMS))

    at_once([*(lambda call=call: work(call) for call in made), change_isa])


def steering_changes(rng: random.Random) -> None:
    """batch_sizes, lengths and resets change while an op runs: it may refuse them, and must stay within its memory."""
    packed = rng.random() < 0.5
    sizes: dict[str, Any] = {"T": rng.choice([50, 1000, 8000]), "B": rng.choice([1, 5, 40]), "H": rng.choice([3, 8])}
    sizes |= {"layout": "packed" if packed else rng.choice(["dense", "batch_first"])}
    sizes |= {"lengths": not packed, "resets": not packed}
    op, dtype = rng.choice(calls.STEERED), rng.choice(calls.DTYPES)
    if op in variant_calls.ARGUMENTS:
        given, _ = variant_calls.made(rng, dtype, op, **sizes)
    else:
        made = make_call(rng.choice(MODES), D=rng.choice([1, 2]), dtype=dtype, **sizes)
        names = ("mode", "batch_first", "input", "hx", "cx", "batch_sizes", "lengths", "resets")
        given = {name: getattr(made, name) for name in names} | dict(zip(calls.PLACES, made.places, strict=True))
    changed = [given[name] for name in ("batch_sizes", "lengths", "resets") if given[name] is not None]
    good = [value.clone() for value in changed]
    call = OpCall(op, given, rng.choice([1, 2]))
    call.notes.append("a thread changes batch_sizes, lengths and resets")
    Progress.show(call.describe())
    running = True

    def work() -> None:
        nonlocal running
        try:
            for _ in range(20):
                perform(call, excused=True)
        finally:
            running = False

    def change() -> None:
        while running:
            counted["changes"] += 1
            which = rng.randrange(len(changed))
            tensor, i = changed[which].view(-1), rng.randrange(changed[which].numel())
            wild = rng.choice([0, 1, 2**62, -(2**63)]) if rng.random() < 0.2 else good[which].view(-1)[i].item()
            tensor[i] = wild

    at_once([work, change])


def small_op(rng: random.Random) -> None:
    rounds, name = rng.choice([1, 3, 20, 0, -1, -(2**63)]), rng.choice(["", "AVX2", "avx", "x" * 1000, "avx2\0", *isas])
    team = rng.choice(["", "Auto", "pool\0", "x" * 1000, *TEAMS])
    for op, value, fine in (
        ("core_latency", rounds, rounds > 0),
        ("use_cpu_isa", name, name in ("", *isas)),
        ("use_cpu_team", team, team in ("", *TEAMS)),
    ):
        one_call(rng, lambda _, op=op, value=value, fine=fine: OpCall(
            op, {"value": value}, rng.choice([1, 2]), well_formed=fine, must_raise=not fine, comparable=False
        ))  # fmt: skip


CASES: dict[Callable[[random.Random], None], int] = {
    lambda rng: one_call(rng, calls.well_formed): 45,
    lambda rng: one_call(rng, calls.malformed): 45,
    lambda rng: one_call(rng, calls.at_the_edge): 10,
    small_op: 2,
    several_calls: 5,
    steering_changes: 1,
}


def run_case(seed: int) -> None:
    Progress.show("not yet made")
    rng = random.Random(f"{seed} {Progress.number}")
    torch.manual_seed(rng.getrandbits(63))
    isa = rng.choice(isas)
    torch.ops.rnnfast.use_cpu_isa(isa)
    torch.ops.rnnfast.use_cpu_team(rng.choice(TEAMS))
    # Others must not round what they are allowed to.
    calls.bf16_allowed = isa in WITH_PAIRS and rng.random() < 0.3
    torch.ops.rnnfast.cpu_allow_bf16(calls.bf16_allowed)
    (case,) = rng.choices(list(CASES), list(CASES.values()))
    case(rng)


# The faults that must be found (exit code and words of the report), and what must pass.
PLANTED = {
    "address": {
        "read_past_the_end": (65, "heap-buffer-overflow"),
        "write_past_the_end": (65, "heap-buffer-overflow"),
        "overflow_an_integer": (65, "signed integer overflow"),
    },
    "thread": {"write_one": (66, "data race"), "write_on_all_threads": (66, "data race"), "write_in_order": (0, "")},
}


def check_planted(sanitizer: str, report: Path) -> None:
    """Proves that the sanitizer sees a fault in an op. Each is run in a child, before there is a thread pool."""
    for op, (code, words) in PLANTED[sanitizer].items():
        child = os.fork()
        if child == 0:
            os.dup2(os.open(report, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), 2)
            function, data = getattr(torch.ops.rnnfast_planted, op), torch.zeros(8)
            torch.set_num_threads(2)
            at_once([lambda function=function, data=data: function(data)] * (2 if op == "write_one" else 1))
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said = report.read_text(errors="replace")
        if ended != code or words not in said:
            raise AssertionError(f"planted {op}: expected exit code {code}, got {ended}\n{said}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("sanitizer")
    parser.add_argument("seed", type=int)
    parser.add_argument("--seconds", type=float, default=0)
    parser.add_argument("--only", type=int)
    parser.add_argument("--op", action="append", default=[])
    arguments = parser.parse_args()
    calls.choose(arguments.op)
    faulthandler.register(signal.SIGUSR1)
    torch.set_grad_enabled(False)
    torch.ops.load_library(library(arguments.sanitizer))
    torch.ops.load_library(companions(arguments.sanitizer)[0])
    folder = library(arguments.sanitizer).parent
    isas.extend(filter(has_isa, ISAS))
    Progress.file = folder / "case"
    if arguments.only is not None:
        Progress.number = arguments.only
        run_case(arguments.seed)
        return
    check_planted(arguments.sanitizer, folder / "planted")
    begin = time.monotonic()
    while (seconds := time.monotonic() - begin) < arguments.seconds:
        run_case(arguments.seed)
        Progress.number += 1
    words = ", ".join(f"{count} {what}" for what, count in counted.most_common())
    print(f"{arguments.sanitizer}: {Progress.number} cases, {counted['calls'] / seconds:.0f} calls a second: {words}")


if __name__ == "__main__":
    main()

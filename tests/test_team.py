"""Who does the work of a call on the CPU (csrc/cpu/team.h): any thread may be missing, late, or kept from running, and
the results are the same to the bit."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
from build_emulated import fixed_addresses
from rnnfast import ops
from setup import COMMON_FLAGS, cxx_compiler
from test_build import in_new_process, needs_library

ROOT = Path(__file__).resolve().parent.parent
UNITS = [ROOT / "csrc/cpu" / f"{name}.cpp" for name in ("team", "job", "helpers", "pool")]
SANITIZERS = {"thread": "-fsanitize=thread", "address": "-fsanitize=address,undefined"}
SOURCES = ("alone", "pool", "helpers", "auto")


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    threads, team = torch.get_num_threads(), ops.use_cpu_team("") if ops.library_error is None else ""
    yield
    torch.set_num_threads(threads)
    if team:
        ops.use_cpu_team(team)


# ---- without torch: every piece once, in order, under TSan and ASan --------------------------------------------------


def build(folder: Path, sanitizer: str, cpu: Path = ROOT / "csrc/cpu") -> Path:
    program = folder / f"team_checks-{sanitizer}"
    sources = [ROOT / "tests/cpp/team_checks.cpp", *(cpu / unit.name for unit in UNITS)]
    command = [*cxx_compiler().split(), *COMMON_FLAGS, "-O1", "-g1", SANITIZERS[sanitizer], f"-I{cpu}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program), "-pthread"], check=True)
    return program


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("team")
    return {sanitizer: build(folder, sanitizer) for sanitizer in SANITIZERS}


def run(
    program: Path, mode: str, seconds: float = 2, seed: int = 1, cores: set[int] | None = None, limit: float = 100
) -> str:
    """What the program said, and whether it was stopped after `limit` seconds."""
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    command = [*fixed_addresses(), str(program), mode, str(seconds), str(seed)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=pin
    ) as process:
        try:
            return process.communicate(timeout=limit)[0]
        except subprocess.TimeoutExpired:
            process.kill()
            return process.communicate()[0] + f"stopped after {limit} s"


@pytest.fixture
def neighbours() -> Iterator[None]:
    """Two processes that keep two cores busy."""
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    yield
    for process in busy:
        process.kill()
        process.wait()


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize("mode", ["random", "late", "stuck", "choice"])
def test_every_piece_is_done_once_and_in_order(programs: dict[str, Path], mode: str, sanitizer: str) -> None:
    if mode == "choice" and len(os.sched_getaffinity(0)) < 2:
        pytest.skip("with one core nobody is ever called")
    assert run(programs[sanitizer], mode) == f"{mode}: passed\n"


@pytest.mark.parametrize("sanitizer", SANITIZERS)
def test_the_same_on_one_core(programs: dict[str, Path], sanitizer: str) -> None:
    core = min(os.sched_getaffinity(0))
    assert run(programs[sanitizer], "random", seed=2, cores={core}) == "random: passed\n"
    assert run(programs[sanitizer], "late", seed=3, cores={core}) == "late: passed\n"


def test_the_same_beside_busy_processes(programs: dict[str, Path], neighbours: None) -> None:
    del neighbours
    assert run(programs["thread"], "random", seed=4) == "random: passed\n"


# What orders what, and how the program says that it is missing: without any of these it must fail.
RACE, GONE = "WARNING: ThreadSanitizer: data race", "WARNING: ThreadSanitizer: heap-use-after-free"
FAULTS = {
    "a done piece without its data": (
        "job.cpp",
        "done.store(round + 1, std::memory_order_release)",
        "done.store(round + 1, std::memory_order_relaxed)",
        "random",
        RACE,
    ),
    "a done piece whose data are not waited for": (
        "job.cpp",
        "done.load(std::memory_order_acquire) > round",
        "done.load(std::memory_order_relaxed) > round",
        "random",
        RACE,
    ),
    "a round that is entered before the last is over": (
        "job.cpp",
        "if (round > 0) wait(group, round - 1);",
        "",
        "random",
        RACE,
    ),
    "a piece that two may begin": (
        "job.cpp",
        "!progress.begun.compare_exchange_strong(begun, round + 1, std::memory_order_relaxed)",
        "(progress.begun.store(round + 1), begun < 0)",
        "random",
        RACE,
    ),
    "a job that the caller frees for all": (
        "job.cpp",
        "owners_.fetch_sub(1, std::memory_order_acq_rel) == 1",
        "owners_.fetch_sub(1, std::memory_order_acq_rel) >= 1",
        "late",
        GONE,
    ),
    "a helper that is called without the job": (
        "helpers.cpp",
        "state_.exchange(called, std::memory_order_acq_rel)",
        "state_.exchange(called, std::memory_order_relaxed)",
        "random",
        RACE,
    ),
    "a helper that is free before it has looked at its job": (
        "helpers.cpp",
        "helper.state_.store(idle, std::memory_order_release)",
        "helper.state_.store(idle, std::memory_order_relaxed)",
        "random",
        RACE,
    ),
    "groups that wait for their members": (
        "job.cpp",
        "if (begun || !has_begun(g)) carry(g, 0, begun);",
        "if (begun) carry(g, 0, begun);",
        "stuck",
        "what did not need the sleeper was not done while it slept",
    ),
}


@pytest.mark.exhaustive
@pytest.mark.parametrize("fault", FAULTS)
def test_what_orders_the_threads_is_needed(tmp_path: Path, fault: str) -> None:
    file, text, instead, mode, told = FAULTS[fault]
    cpu = tmp_path / "csrc/cpu"
    cpu.mkdir(parents=True)
    for path in (*(ROOT / "csrc").glob("*.h"), *(ROOT / "csrc/cpu").glob("*.h"), *UNITS):
        (tmp_path / path.relative_to(ROOT)).write_text(path.read_text())
    changed = cpu / file
    assert changed.read_text().count(text) == 1
    changed.write_text(changed.read_text().replace(text, instead))
    program, outputs = build(tmp_path, "thread", cpu), []
    # Memory is no longer safe in such a program: once in a while it crashes or hangs before the sanitizer speaks.
    for seed in range(1, 6):
        outputs.append(run(program, mode, seconds=3, seed=seed, limit=20))
        if told in outputs[-1]:
            return
    pytest.fail(f"nobody said {told!r}, but: {outputs}")


# ---- the layers ------------------------------------------------------------------------------------------------------

# Units shared out, rows in groups, two directions, projections, lengths; more threads than there are tiles of units.
LAYERS = {
    "units": ("LSTM", {}, (20, 1, 200)),
    "lengths": ("LSTM", {}, (30, 9, 120)),
    "few units": ("LSTM", {"bidirectional": True}, (500, 6, 8)),
    "rows": ("GRU", {}, (20, 16, 64)),
    "blocks": ("RNN", {}, (12, 8, 130)),
    "directions": ("LSTM", {"bidirectional": True, "batch_first": True}, (7, 15, 96)),
    # Two threads: their weights are too large to be carried side by side (split.h).
    "directions in turn": ("LSTM", {"bidirectional": True}, (5, 3, 400)),
    "projected": ("LSTM", {"proj_size": 90}, (15, 5, 180)),
    "long": ("GRU", {}, (300, 2, 128)),
}


def results_and_gradients(name: str) -> list[Tensor]:
    cell, options, shape = LAYERS[name]
    torch.manual_seed(5)
    layer: nn.Module = getattr(rnnfast, cell)(shape[-1], shape[-1], **options)
    x = torch.randn(shape).requires_grad_()
    lengths = {"lengths": torch.arange(shape[1]) * shape[0] // shape[1]} if name == "lengths" else {}
    output = layer(x, **lengths)[0]
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(6))
    return [output.detach(), *torch.autograd.grad(output, [x, *layer.parameters()], grad)]


@needs_library
@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize("name", LAYERS)
def test_results_do_not_depend_on_who_was_there(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    ops.use_cpu_team("alone")
    want = results_and_gradients(name)
    assert all(value.abs().max() > 0 for value in want)
    for source in SOURCES:
        ops.use_cpu_team(source)
        for value, expected in zip(results_and_gradients(name), want, strict=True):
            assert torch.equal(value, expected), source
        if source == "helpers":
            assert helpers()


@needs_library
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
@pytest.mark.parametrize(
    ("cell", "options", "shape"),
    [
        ("LSTM", {}, (100, 3, 272)),
        ("LSTM", {"proj_size": 200}, (6, 5, 384)),
        ("GRU", {"num_layers": 2}, (5, 17, 320)),
        ("RNN", {}, (4, 2, 512)),
    ],
    ids=["LSTM", "projected", "GRU", "RNN"],
)
def test_directions_one_after_the_other(
    cell: str, options: dict[str, Any], shape: tuple[int, ...], packed: bool
) -> None:
    """Two threads, and weights of which each thread's share is more than its cache holds (`split.h`)."""
    torch.set_num_threads(2)
    torch.manual_seed(7)
    theirs = getattr(nn, cell)(shape[-1], shape[-1], bidirectional=True, dtype=torch.float64, **options)
    ours = getattr(rnnfast, cell)(shape[-1], shape[-1], bidirectional=True, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    lengths = torch.arange(shape[0], shape[0] - shape[1], -1).clamp(min=1)

    def results(layer: nn.Module) -> list[Tensor]:
        if packed:
            output, states = layer(nn.utils.rnn.pack_padded_sequence(x, lengths))
            output = output.data
        else:
            output, states = layer(x)
        results = [output, *(states if isinstance(states, tuple) else (states,))]
        generator = torch.Generator().manual_seed(8)
        grads = [torch.randn(r.shape, dtype=torch.float64, generator=generator) for r in results]
        return [*results, *torch.autograd.grad(results, [x, *layer.parameters()], grads)]

    for got, expected in zip(results(ours), results(theirs), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-13, atol=1e-13)


def helpers() -> list[str]:
    """What the system tells of each that is in this process."""
    found = []
    for thread in Path("/proc/self/task").iterdir():
        # A thread of the pool may end meanwhile.
        with contextlib.suppress(OSError):
            if (thread / "comm").read_text().strip() == "rnnfast":
                found.append((thread / "status").read_text())
    return found


def digest(name: str) -> str:
    """Of the results and gradients of a layer, for a process to compare with another's."""
    values = [value.numpy().tobytes() for value in results_and_gradients(name)]
    return hashlib.sha256(b"".join(values)).hexdigest()


def check_digests(threads: int, cores: set[int], sources: Sequence[str], repeats: int) -> None:
    """Those of a process that has these cores, against the caller alone in this one."""
    code = f"""
import os, sys
os.sched_setaffinity(0, {cores})
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, test_team
torch.set_num_threads({threads})
for _ in range({repeats}): print(*map(test_team.digest, test_team.LAYERS))
"""
    torch.set_num_threads(threads)
    ops.use_cpu_team("alone")
    want = " ".join(map(digest, LAYERS))
    for source in sources:
        assert in_new_process(code, RNNFAST_CPU_TEAM=source).splitlines() == [want] * repeats, source


@needs_library
@pytest.mark.parametrize("threads", [2, 4, 8])
def test_one_core_for_several_threads(threads: int) -> None:
    check_digests(threads, {min(os.sched_getaffinity(0))}, ["auto", "helpers"] if threads < 8 else ["pool"], 2)


@needs_library
def test_beside_busy_processes(neighbours: None) -> None:
    del neighbours
    check_digests(2, os.sched_getaffinity(0), ["auto"], 2)


# ---- the choice ------------------------------------------------------------------------------------------------------


@needs_library
def test_the_choice_of_a_team() -> None:
    code = "from rnnfast import ops; print(ops.use_cpu_team(''))"
    assert in_new_process(code, RNNFAST_CPU_TEAM="").split() == ["auto"]
    assert in_new_process(code, RNNFAST_CPU_TEAM="helpers").split() == ["helpers"]
    for source in SOURCES:
        assert ops.use_cpu_team(source) == source == ops.use_cpu_team("")
    with pytest.raises(RuntimeError, match="use_cpu_team: name: expected auto, alone, pool or helpers, got both"):
        ops.use_cpu_team("both")
    printed = in_new_process(code, RNNFAST_CPU_TEAM="both")
    assert "RNNFAST_CPU_TEAM=both" in printed
    assert "auto" in printed


def forward_digest(name: str) -> str:
    """Of the output alone: gradients take torch's own operations too, whose pool a forked child waits for."""
    cell, options, shape = LAYERS[name]
    torch.manual_seed(5)
    layer = getattr(rnnfast, cell)(shape[-1], shape[-1], **options)
    with torch.inference_mode():
        return hashlib.sha256(layer(torch.randn(shape))[0].numpy().tobytes()).hexdigest()


@needs_library
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.parametrize("source", ["pool", "helpers", "auto"])
def test_a_forked_child_works_alone(source: str) -> None:
    """Neither the pool's threads nor the helpers are there."""
    code = f"""
import os, sys, warnings
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, test_team
warnings.simplefilter("ignore")
torch.set_num_threads(2)
want = test_team.forward_digest("units")
child = os.fork()
if child == 0:
    os._exit(0 if test_team.forward_digest("units") == want else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), test_team.forward_digest("units") == want)
"""
    assert in_new_process(code, RNNFAST_CPU_TEAM=source).split() == ["0", "True"]


@needs_library
def test_no_more_helpers_than_cores() -> None:
    """However many threads torch may use: those beyond the cores would only take turns with the others."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
import torch, test_team
torch.set_num_threads(16)
for _ in range(20): test_team.forward_digest("rows")
print(len(test_team.helpers()))
"""
    assert int(in_new_process(code)) < len(os.sched_getaffinity(0))
    assert int(in_new_process(code, RNNFAST_CPU_TEAM="helpers")) >= 1


@needs_library
def test_helpers_take_no_signals_but_their_own_faults() -> None:
    """Those are the program's; but whoever reports faults must see a helper's."""
    ops.use_cpu_team("helpers")
    torch.set_num_threads(2)
    forward_digest("rows")
    statuses = helpers()
    assert statuses
    for status in statuses:
        line = next(line for line in status.splitlines() if line.startswith("SigBlk:"))
        blocked = {number + 1 for number in range(64) if int(line.split()[1], 16) >> number & 1}
        assert blocked >= {signal.SIGINT, signal.SIGTERM, signal.SIGALRM, signal.SIGUSR1}
        assert not blocked & {signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL}

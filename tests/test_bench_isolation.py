"""Each case of a suite in a process of its own: the rows come back, whatever happens there."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch

from rnnfast.benchmark import Case

pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")

import isolation
from isolation import Processes, Settings, measure_here

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the processes are forks of a server")

SETTINGS = Settings(0.01, torch.device("cpu"), None, [], True, 1)
TINY = Case("GRU", 2, 8, steps=5)


@pytest.fixture(scope="module")
def processes():
    before = torch.get_num_threads()
    yield Processes()
    torch.set_num_threads(before)


def nothing_skipped(what, why):
    raise AssertionError(f"{what}: {why}")


def test_rows_are_those_of_the_same_process(processes):
    (there,), (here,) = (
        measure(TINY, "training", SETTINGS, nothing_skipped) for measure in (processes.measure, measure_here)
    )
    assert list(there) == list(here)
    times = {"us_per_step", "torch_us_per_step", "ratio", "p20", "p80", "tokens_per_s", "gflop_per_s", "gbyte_per_s"}
    times |= {"load_before", "others_busy", "load_after", "contended"}
    same = [key for key in here if key not in times | {"rounds", "peak_memory_bytes", "torch_peak_memory_bytes"}]
    assert {key: there[key] for key in same} == {key: here[key] for key in same}
    assert there["correct"]
    assert there["ratio"] > 0


def test_reasons_come_back(processes):
    reasons = []
    packed = Case("GRU", 2, 8, steps=5, packed=True)
    assert processes.measure(packed, "streaming", SETTINGS, lambda what, why: reasons.append((what, why))) == []
    assert reasons == [("workload streaming", "a streaming step has neither lengths nor resets")]


def test_errors_come_back(processes):
    settings = Settings(0.01, torch.device("cpu"), ["cpuu"], [], True, 1)
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
        processes.measure(TINY, "inference", settings, nothing_skipped)


class Exits(Case):
    """Ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (3,)


class Crashes(Case):
    def __reduce__(self):
        return ctypes.string_at, (0,)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Exits("GRU", 2, 8), "the process ended with exit status 3"),
        (Crashes("GRU", 2, 8), "the process was ended by SIGSEGV"),
    ],
)
def test_death_of_the_process_fails_the_case_and_the_next_goes_on(processes, case, why):
    (row,) = processes.measure(case, "inference", SETTINGS, nothing_skipped)
    assert (row["correct"], row["failure"], row["ratio"]) == (False, why, None)
    (row,) = processes.measure(TINY, "inference", SETTINGS, nothing_skipped)
    assert row["correct"]


PEER = """
import ctypes, os, time
from rnnfast.benchmark import Call, Case, Data

def peer(layer, case, workload, data):
    {}
    return lambda: list(layer(data.values))
"""


@pytest.mark.parametrize(
    ("body", "most", "why"),
    [
        ("ctypes.string_at(0)", None, "the process was ended by SIGSEGV"),
        ("raise SystemExit(5)", None, "the process ended with exit status 5"),
        ("time.sleep(60)", 2.0, "ended after 2 s"),
    ],
)
@pytest.mark.parametrize("several", [False, True])
def test_a_peer_that_ends_the_process_fails_and_not_rnnfast(processes, tmp_path, monkeypatch, body, most, why, several):
    if several and most is not None:
        return  # as the others, but slow
    paths = [tmp_path / "ends.py", *[tmp_path / "good.py"] * several]
    for path in paths:
        path.write_text(PEER.format(body if path.stem == "ends" else "pass"))
    ask = processes._ask

    def ask_with_limit(case, workload, settings):
        # A busy machine may take long for what is measured without the peer.
        monkeypatch.setattr(processes, "_most", most if settings.peers else None)
        return ask(case, workload, settings)

    monkeypatch.setattr(processes, "_ask", ask_with_limit)
    settings = replace(SETTINGS, peers=[str(path) for path in paths])
    own, *failed = processes.measure(TINY, "inference", settings, nothing_skipped)
    assert (own["backend"], own["correct"]) == ("cpu", True)
    assert own["ratio"] > 0
    assert [row["backend"] for row in failed] == [path.stem for path in paths]
    for row in failed:
        assert row["failure"] == f"{why} with this peer" + ", or one beside it" * several
        assert not row["correct"]


def test_a_case_that_ends_the_process_without_peers_too_is_not_theirs(processes, tmp_path):
    settings = replace(SETTINGS, peers=[str(tmp_path / "any.py")])
    rows = processes.measure(Exits("GRU", 2, 8), "inference", settings, nothing_skipped)
    assert [(row["backend"], row["failure"]) for row in rows] == [
        (name, "the process ended with exit status 3") for name in ("cpu", "any")
    ]


def test_a_device_that_is_lost_beside_peers_is_not_rnnfasts_loss(processes, tmp_path, monkeypatch):
    """No device can be lost here: the answers are made up."""
    asked = []

    def ask(case, workload, settings):
        asked.append(settings.peers)
        rows = isolation.failed_rows(case, workload, settings.backends, settings.device, "CUDA error")
        if not settings.peers:
            rows = measure_here(case, workload, settings, nothing_skipped)
        return isolation._Answer(rows, (), "the device was lost" if settings.peers else None)

    monkeypatch.setattr(processes, "_ask", ask)
    settings = replace(SETTINGS, peers=[str(tmp_path / "any.py")])
    own, peer = processes.measure(TINY, "inference", settings, nothing_skipped)
    assert asked == [settings.peers, []]
    assert own["correct"]
    assert (peer["backend"], peer["failure"]) == ("any", "the device was lost with this peer")


class Sleeps(Case):
    def __reduce__(self):
        return time.sleep, (60,)


class Broken(Case):
    """Fails where nobody expects it: before there are candidates that could."""

    @property
    def row_lengths(self):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nand more")


def test_an_error_of_the_device_fails_the_case_and_not_the_suite(processes):
    (row,) = processes.measure(Broken("GRU", 2, 8, packed=True), "inference", SETTINGS, nothing_skipped)
    assert row["failure"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert not row["correct"]


@pytest.fixture
def lasting():
    processes = Processes(lasting=True, most=30)
    yield processes
    processes._worker.end()


def process_of(processes):
    (row,) = processes.measure(TINY, "inference", SETTINGS, nothing_skipped)
    assert row["correct"]
    return processes._worker.process


@pytest.mark.parametrize("case", [Exits("GRU", 2, 8), Crashes("GRU", 2, 8)])
def test_a_lasting_process_serves_until_it_dies(lasting, case):
    first = process_of(lasting)
    assert process_of(lasting) == first
    (row,) = lasting.measure(case, "inference", SETTINGS, nothing_skipped)
    assert row["failure"].startswith("the process ")
    assert process_of(lasting) != first


def test_a_case_that_takes_too_long_is_ended(lasting):
    first = process_of(lasting)
    lasting._most = 0.3
    begin = time.monotonic()
    (row,) = lasting.measure(Sleeps("GRU", 2, 8), "inference", SETTINGS, nothing_skipped)
    assert time.monotonic() - begin < 30
    assert (row["correct"], row["failure"], row["ratio"]) == (False, "ended after 0.3 s", None)
    lasting._most = 30
    assert process_of(lasting) != first


@pytest.mark.skipif(torch.cuda.is_available(), reason="stands for a lost device with one that is not there")
def test_a_process_that_has_lost_its_device_is_replaced(lasting):
    """A CUDA context that has failed fails for ever: the cases that come after are not to pay for it."""
    first = process_of(lasting)
    # There is no device to lose here; asking for one is an error as well.
    settings = Settings(0.01, torch.device("cuda", 0), ["cpu"], [], True, 1)
    with contextlib.suppress(Exception):
        lasting.measure(TINY, "inference", settings, nothing_skipped)
    assert process_of(lasting) != first


@pytest.fixture
def interruptible():
    """A program that a shell starts in the background is deaf to SIGINT, and so are these tests."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_interrupt_ends_the_process(processes, interruptible):
    timer = threading.Timer(0.5, os.kill, (os.getpid(), isolation.signal.SIGINT))
    timer.start()
    begin = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        processes.measure(Sleeps("GRU", 2, 8), "inference", SETTINGS, nothing_skipped)
    timer.join()
    assert time.monotonic() - begin < 30


def test_interrupt_while_a_process_starts_is_not_lost(interruptible):
    reached = False

    def start():
        nonlocal reached
        with isolation._interrupts_later():
            os.kill(os.getpid(), isolation.signal.SIGINT)
            time.sleep(0.05)
            reached = True

    with pytest.raises(KeyboardInterrupt):
        start()
    assert reached

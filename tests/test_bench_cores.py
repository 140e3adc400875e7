"""How far apart the cores are: measured, waited for, and cases measured again that had far ones."""

import itertools
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from rnnfast import cli, libraries
from rnnfast.benchmark import Case, cores, measure
from rnnfast.benchmark.cores import Nearness, core_to_core_ns

pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import run
from suite import Conditions, measure_again

needs_library = pytest.mark.skipif(libraries.cpu_error is not None, reason=f"{libraries.cpu_error}")


@pytest.fixture
def threads():
    """Sets torch's threads, for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- the measurement -------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.parametrize("count", [2, 3, 8])
def test_a_word_takes_some_time_also_with_more_threads_than_cores(threads, count):
    threads(count)
    distance = core_to_core_ns(20)
    # From a few nanoseconds to the time slices that threads wait for which share a core.
    assert 1 < distance < 1e9


@needs_library
def test_one_thread_has_no_distance(threads):
    threads(1)
    assert core_to_core_ns() is None
    assert torch.ops.rnnfast.core_latency(1) == 0


@needs_library
def test_rounds_must_be_positive():
    with pytest.raises(RuntimeError, match="core_latency: rounds: expected at least 1, got 0"):
        torch.ops.rnnfast.core_latency(0)


@needs_library
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_has_no_pool_to_measure(threads):
    threads(2)
    assert torch.ops.rnnfast.core_latency(1) > 0
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.ops.rnnfast.core_latency(1) == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@needs_library
def test_rows_say_how_far_apart_the_cores_were(threads):
    case = Case("GRU", 2, 8, steps=5)
    threads(2)
    (row,) = measure(case, "inference", 0.01, torch.device("cpu"))
    assert row["core_to_core_ns"] > 0
    threads(1)
    (row,) = measure(case, "inference", 0.01, torch.device("cpu"))
    assert row["core_to_core_ns"] is None


@needs_library
def test_the_command_says_how_far_apart_the_cores_were(threads, capsys):
    command = "bench --cell gru --hidden 8 --batch 2 --steps 5 --workload inference --seconds 0.01".split()
    for count, said in ((2, True), (1, False)):
        threads(count)
        assert cli.main(command) == 0
        assert (" ns from core to core" in capsys.readouterr().out) == said


# --- waiting ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves."""
    now = [100.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def test_near_is_what_was_seen_nearest():
    nearness = Nearness(1.0, lambda: None)
    assert not nearness.far(200.0)
    for distance in (200.0, None, 25.0, 30.0):
        nearness.see(distance)
    assert nearness.nearest == 25.0
    assert [nearness.far(distance) for distance in (None, 25.0, 49.0, 51.0)] == [False, False, False, True]


def test_waiting_ends_when_the_cores_are_near(clock):
    looks = iter([200.0, 210.0, 26.0])
    nearness = Nearness(10.0, lambda: next(looks))
    nearness.see(25.0)
    assert nearness.wait()
    assert clock[0] == pytest.approx(100.0 + 2 * cores.LOOK)
    assert nearness.patience == pytest.approx(10.0 - 2 * cores.LOOK)


def test_waiting_ends_with_the_patience(clock):
    nearness = Nearness(3.0, lambda: 200.0)
    nearness.see(25.0)
    assert not nearness.wait()
    assert 103.0 <= clock[0] < 103.0 + 2 * cores.LOOK
    # None is left for the next.
    assert not nearness.wait()
    assert clock[0] < 103.0 + 2 * cores.LOOK


def test_without_a_distance_nothing_waits(clock):
    assert Nearness(3.0, lambda: None).wait()
    assert clock[0] == 100.0


# --- measuring again -------------------------------------------------------------------------------------------------


class Suite:
    """Cases whose measurements are given: (distance, ratio) or a failure, one after the other."""

    def __init__(self, conditions, *measurements):
        self.coming = [iter(each) for each in measurements]
        self.work = [(SimpleNamespace(name=str(place)), "inference") for place in range(len(measurements))]
        self.measured = {}
        for place, (case, workload) in enumerate(self.work):
            self.measured[place] = self.measure_case(case, workload)
            conditions.see(self.measured[place])

    def measure_case(self, case, workload):
        distance, ratio = next(self.coming[int(case.name)])
        return [{"core_to_core_ns": distance, "ratio": ratio, "correct": ratio is not None}]

    @property
    def ratios(self):
        return [rows[0]["ratio"] for rows in self.measured.values()]


def no_load():
    return 0.0


def test_cases_with_far_cores_are_measured_again_until_they_are_near(clock):
    conditions = Conditions(Nearness(math.inf, itertools.repeat(25.0).__next__), 1, no_load)
    one = Suite(conditions, [(200.0, 2.0), (180.0, 1.9), (25.0, 1.0)], [(26.0, 1.1)])
    two = Suite(conditions, [(27.0, 1.2)], [(190.0, 1.8), (30.0, 1.3)])
    measure_again([one, two], conditions)
    assert one.ratios == [1.0, 1.1]
    assert two.ratios == [1.2, 1.3]


def test_what_was_nearer_is_kept_when_patience_ends(clock):
    looks = iter([25.0, 25.0])
    conditions = Conditions(Nearness(1.0, lambda: next(looks, 200.0)), 1, no_load)
    suite = Suite(conditions, [(150.0, 2.0), (200.0, 3.0), (120.0, 1.5), (25.0, 1.0)], [(25.0, 1.1)])
    measure_again([suite], conditions)
    assert suite.ratios == [1.5, 1.1]


def test_a_result_that_is_wrong_the_second_time_is_reported(clock):
    conditions = Conditions(Nearness(1.0, lambda: 25.0), 1, no_load)
    suite = Suite(conditions, [(200.0, 2.0), (None, None)], [(25.0, 1.1)])
    measure_again([suite], conditions)
    assert suite.ratios == [None, 1.1]


def test_a_case_that_was_wrong_is_not_tried_until_it_is_right(clock):
    conditions = Conditions(Nearness(1.0, lambda: 25.0), 1, no_load)
    suite = Suite(conditions, [(200.0, None), (25.0, 1.0)], [(25.0, 1.1)])
    measure_again([suite], conditions)
    assert suite.ratios == [None, 1.1]


def test_interrupt_while_measuring_again_keeps_all_results(clock):
    def interrupted():
        yield 200.0, 2.0
        raise KeyboardInterrupt

    conditions = Conditions(Nearness(1.0, lambda: 25.0), 1, no_load)
    suite = Suite(conditions, interrupted(), [(25.0, 1.1)])
    measure_again([suite], conditions)
    assert suite.ratios == [2.0, 1.1]


@pytest.mark.usefixtures("one_thread")
def test_a_suite_on_far_cores_says_so(capsys, monkeypatch, tmp_path):
    """The whole command, the distance being what it never was before: near once, then far."""
    distances = itertools.chain([25.0], itertools.repeat(250.0))
    real = run.measure_here

    def far(*arguments):
        rows = real(*arguments)
        distance = next(distances)
        return [{**row, "core_to_core_ns": distance} for row in rows]

    monkeypatch.setattr(run, "measure_here", far)
    monkeypatch.setattr(run, "this_machine", lambda *arguments: None)
    arguments = "run.py --suite smoke --seconds 0.01 --workload inference --threads 1 --in-process --patience 0"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--out", str(tmp_path)])
    assert run.main() == 0
    rows = json.loads((tmp_path / "partial" / "cpu-smoke.json").read_text())["rows"]
    far_rows = len(rows) - 1
    assert far_rows > 0
    assert f"{far_rows} of {len(rows)} cases were timed with cores far apart" in capsys.readouterr().out

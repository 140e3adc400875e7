"""Other processes' load: measured, waited for, what was timed beside it measured again, and what is said of it."""

import itertools
import json
import math
import os
import subprocess
import sys
import time

import pytest
import torch

from rnnfast import cli
from rnnfast.benchmark import Case, cores, load, measure
from rnnfast.benchmark.cores import Nearness

pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import records
import run
from suite import Conditions, measure_again

needs_clocks = pytest.mark.skipif(load.read() is None, reason="this system has no /proc/stat")
FIELDS = ("load_before", "others_busy", "load_after", "contended")


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# --- the measurement -------------------------------------------------------------------------------------------------


def reading(wall, busy, own, idle=0.0, processors=4):
    return load.Reading(wall, busy, busy + idle, own, processors)


def test_others_are_the_busy_time_less_our_own():
    before = reading(10.0, busy=100.0, own=7.0, idle=50.0)
    # Two seconds of four processors: 5 s busy, 3 s of them ours; 2 ticks are what the count may be wrong by.
    after = reading(12.0, busy=105.0, own=10.0, idle=53.0)
    assert load.others_between(before, after) == pytest.approx((2.0 - 0.02) / 2)
    # What we took cannot be more than all.
    assert load.others_between(before, reading(12.0, 105.0, own=13.0, idle=53.0)) == 0.0


def test_what_cannot_be_told_is_none():
    before = reading(10.0, 100.0, 7.0)
    assert load.others_between(before, reading(10.04, 100.16, 7.0)) is None, "too short"
    assert load.others_between(before, reading(12.0, 100.0, 7.0)) is None, "clocks that stand still"
    assert load.others_between(None, before) is None
    assert not load.contended(None, threads=1)


def test_a_system_without_the_file_tells_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(load, "STAT", tmp_path / "stat")
    assert load.read() is None
    assert load.look(60.0) is None, "it must not sleep for nothing"


@pytest.mark.parametrize(
    "text",
    [
        b"cpu 1 2 3 4 5\ncpu0 one two three four five\n",
        b"cpu0 1 2 3\n",
        b"cpu0\n",
        b"cpu0 1 2 3 4 5 6 7 8\n\ncpu1 1 2 3 4 5 6 7 8\n",
        b"cpu0 1 2 3 4 5 6 7 \xff\n",
        b"",
    ],
)
def test_an_odd_file_tells_nothing(monkeypatch, tmp_path, text):
    stat = tmp_path / "stat"
    stat.write_bytes(text)
    monkeypatch.setattr(load, "STAT", stat)
    monkeypatch.setattr(load, "processors", lambda: {0})
    assert load.read() is None


def test_only_the_processors_of_this_process_are_counted(monkeypatch, tmp_path):
    stat = tmp_path / "stat"
    stat.write_text("cpu 0\ncpu0 100 0 0 900 0 0 0 0 5 5\ncpu1 10 20 30 900 1 2 3 34 0 0\nintr 7\n")
    monkeypatch.setattr(load, "STAT", stat)
    monkeypatch.setattr(load, "processors", lambda: {1})
    found = load.read()
    if found is None:
        pytest.skip("this system has no getrusage")
    # user, nice, system, irq, softirq and steal, in ticks.
    assert (found.busy, found.counted, found.processors) == (pytest.approx(0.99), pytest.approx(10.0), 1)
    # A container that numbers its processors anew: all that there are.
    monkeypatch.setattr(load, "processors", lambda: {77})
    assert load.read().processors == 2


@pytest.mark.parametrize(
    ("count", "others", "disturbed"),
    [(2, 0.05, False), (2, 0.5, True), (16, 5.0, False), (16, 8.0, True)],
)
def test_a_load_is_one_that_leaves_no_room(monkeypatch, count, others, disturbed):
    monkeypatch.setattr(load, "processors", lambda: set(range(count)))
    assert load.contended(others, threads=2) == disturbed


@pytest.fixture
def busy():
    """A program that has nothing but the one processor on which this test runs meanwhile: they share it."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(mine)})
    program = "print(flush=True)\nwhile True: pass"
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    child.stdout.readline()
    yield
    child.kill()
    child.communicate()
    os.sched_setaffinity(0, mine)


@needs_clocks
def test_a_busy_program_beside_a_case_is_seen_and_said(busy, threads, capsys):
    threads(1)
    (row,) = measure(Case("GRU", 2, 8, steps=5), "inference", 0.6, torch.device("cpu"))
    assert row["contended"]
    assert row["others_busy"] > load.room(1)
    assert row["load_before"] > 0
    assert row["load_after"] > 0
    command = "bench --cell gru --hidden 8 --batch 2 --steps 5 --workload inference --seconds 0.6".split()
    assert cli.main(command) == 0
    assert " cores meanwhile: do not trust these ratios." in capsys.readouterr().out


@needs_clocks
def test_our_own_work_is_no_load():
    """Against all that was busy: what this process burns must not appear as others'."""
    before = load.read()
    end = time.monotonic() + 0.5
    while time.monotonic() < end:
        sum(range(1000))
    after = load.read()
    busy_cores = (after.busy - before.busy) / (after.wall - before.wall)
    own = (after.own - before.own) / (after.wall - before.wall)
    assert own > 0
    assert load.others_between(before, after) <= max(0.0, busy_cores - own) + 1e-3


# --- waiting and measuring again -------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    """A clock that only sleeping moves."""
    now = [100.0]
    monkeypatch.setattr(cores.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(cores.time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))
    return now


def looks(clock, *values):
    """Gives the values one after the other, the last for ever; each takes a second."""
    coming = itertools.chain(values, itertools.repeat(values[-1]))

    def look():
        clock[0] += 1.0
        return next(coming)

    return look


def conditions(clock, patience, *loads):
    return Conditions(Nearness(patience, lambda: None), 1, looks(clock, *loads))


def row(others=0.0, ratio=1.0, distance=None):
    contended = others > 1.0
    return {"others_busy": others, "contended": contended, "core_to_core_ns": distance, "ratio": ratio, "correct": True}


@pytest.fixture(autouse=True)
def _two_processors(monkeypatch, request):
    if "clock" in request.fixturenames:
        monkeypatch.setattr(load, "processors", lambda: {0, 1})


def test_waits_until_the_load_is_gone(clock):
    waiting = conditions(clock, 10.0, 1.9, 1.5, 0.0)
    assert waiting.wait()
    assert clock[0] == 103.0
    assert waiting.nearness.patience == pytest.approx(7.0)
    # A case without load beside it: the next waits for nothing.
    waiting.see([row()])
    assert waiting.wait()
    assert clock[0] == 103.0
    waiting.see([row(others=1.8)])
    assert waiting.wait()
    assert clock[0] == 104.0
    # One that came at the end of a case.
    waiting.see([{**row(), "load_after": 1.8}])
    assert waiting.wait()
    assert clock[0] == 105.0


def test_waiting_for_the_end_of_a_load_ends_with_the_patience(clock):
    waiting = conditions(clock, 3.0, 1.9)
    assert not waiting.wait()
    assert clock[0] == 103.0
    assert not conditions(clock, 0.0, 1.9).wait()
    assert clock[0] == 103.0, "without patience there is no look"


class Suite:
    """Cases whose measurements are given, one after the other."""

    def __init__(self, waiting, *measurements):
        self.coming = [iter(each) for each in measurements]
        self.work = [(Case("GRU", place + 1, 1), "inference") for place in range(len(measurements))]
        self.measured = {}
        for place, (case, workload) in enumerate(self.work):
            self.measured[place] = self.measure_case(case, workload)
            waiting.see(self.measured[place])

    def measure_case(self, case, workload):
        return [next(self.coming[case.batch - 1])]

    @property
    def ratios(self):
        return [rows[0]["ratio"] for rows in self.measured.values()]


def test_what_was_timed_beside_load_is_measured_again(clock):
    waiting = conditions(clock, math.inf, 0.0)
    suite = Suite(waiting, [row(1.9, 34.0), row(1.2, 5.0), row(0.0, 2.0)], [row(0.0, 3.0)])
    measure_again([suite], waiting)
    assert suite.ratios == [2.0, 3.0]


def test_the_less_disturbed_of_two_measurements_is_kept(clock):
    # Calm when it looks, twice, and a load again while it measures.
    waiting = conditions(clock, 2.5, 0.0, 0.0, 1.9)
    suite = Suite(waiting, [row(1.5, 5.0), row(1.9, 34.0), row(1.2, 4.0), row(1.9, 9.0)])
    measure_again([suite], waiting)
    assert suite.ratios == [4.0]


def test_far_cores_are_better_than_load(clock):
    waiting = Conditions(Nearness(2.5, lambda: 25.0), 1, looks(clock, 0.0))
    waiting.nearness.see(25.0)
    suite = Suite(waiting, [row(1.9, 34.0, 25.0), row(0.0, 2.0, 200.0), row(0.0, 1.5, 30.0)])
    measure_again([suite], waiting)
    assert suite.ratios == [1.5]


# --- what is said ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_a_suite_beside_load_says_so(capsys, monkeypatch, tmp_path):
    """The whole command, and what records.py says of its file."""
    real = run.measure_here
    numbers = itertools.count()

    def beside(*arguments):
        loaded = next(numbers) < 2
        return [{**row, "others_busy": 1.7 * loaded, "contended": loaded} for row in real(*arguments)]

    monkeypatch.setattr(run, "measure_here", beside)
    monkeypatch.setattr(run, "this_machine", lambda *arguments: None)
    arguments = "run.py --suite smoke --seconds 0.01 --threads 1 --in-process --patience 0"
    monkeypatch.setattr(sys, "argv", [*arguments.split(), "--out", str(tmp_path)])
    assert run.main() == 0
    printed = capsys.readouterr().out
    assert "WARNING: 2 of 8 cases were timed beside other load, which took up to 1.7 cores" in printed
    assert printed.count("agree beside other load") == 2
    rows = json.loads((tmp_path / "cpu-smoke.json").read_text())["rows"]
    assert all(set(FIELDS) <= set(row) for row in rows)
    monkeypatch.setattr(sys, "argv", ["records.py", str(tmp_path)])
    assert records.main() == 0
    printed = capsys.readouterr().out
    assert "cpu-smoke.json: 2 of 8 rows were timed beside other load" in printed


def test_files_without_the_fields_are_read_as_before(capsys, monkeypatch, tmp_path):
    old = json.loads((records.RESULTS / "cpu-packed.json").read_text())
    old["rows"] = [{key: value for key, value in row.items() if key not in FIELDS} for row in old["rows"]]
    (tmp_path / "cpu-packed.json").write_text(json.dumps(old))
    monkeypatch.setattr(sys, "argv", ["records.py", str(tmp_path)])
    assert records.main() == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) == 4, printed
    assert records.BESIDE not in printed

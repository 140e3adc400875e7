"""Single calls with pauses or beside neighbours: who has a turn when, what neighbours leave behind, what rows say."""

import itertools
import json
import multiprocessing
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rnnfast.benchmark import Case, Impossible, load, turns
from rnnfast.benchmark import measure as measure_one

pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import records
import run
import service
import shapes
from isolation import Ended, Settings, Worker

needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the processes are forks of a server")
TINY = Case("GRU", 2, 8, steps=5)
PAUSED, BESIDE = replace(TINY, pause_ms=20.0), replace(TINY, neighbours=1)
SETTINGS = Settings(0.01, torch.device("cpu"), None, [], True, 1)
PERCENTILES = ["p50_us_per_step", "p90_us_per_step", "torch_p50_us_per_step", "torch_p90_us_per_step"]


def nothing_skipped(what, why):
    raise AssertionError(f"{what}: {why}")


def gone(process):
    return not Path(f"/proc/{process}").exists()


# --- cases -----------------------------------------------------------------------------------------------------------


def test_names_say_the_conditions():
    name = "LSTM-T100-B1-I256-H256"
    case = Case("LSTM", 1, 256)
    assert case.name == name
    assert not case.served
    for options, end in [
        ({"pause_ms": 50.0}, "-pause50ms"),
        ({"pause_ms": 0.5}, "-pause0.5ms"),
        ({"neighbours": 2}, "-neighbours2"),
        ({"pause_ms": 1, "neighbours": 1}, "-pause1ms-neighbours1"),
    ]:
        changed = replace(case, **options)
        assert changed.name == name + end
        assert changed.served
        assert {key: changed.row[key] for key in options} == options
        assert records.shape_of(changed.row) == name
    assert records.shape_of(case.row) == name
    assert records.condition(replace(case, pause_ms=0.5, neighbours=2).row) == "pause of 0.5 ms, 2 neighbours"
    # Of a file from before there were such cases.
    assert (records.condition({}), records.is_served({})) == ("", False)


def test_the_suite_has_its_conditions():
    cases = shapes.SUITES["service"]
    assert all(case.served and case.dtype == "float32" for case in cases)
    assert {case.pause_ms for case in cases if not case.neighbours} == {1, 10, 50, 200}
    assert {case.neighbours for case in cases if not case.pause_ms} == {1, 2}
    assert records.in_conditions([case.row for case in reversed(cases)]) == [
        *(f"pause of {pause} ms" for pause in (1, 10, 50, 200)), "1 neighbour", "2 neighbours",
    ]  # fmt: skip


def test_what_one_process_cannot_measure_is_refused():
    with pytest.raises(Impossible, match="needs a process for each candidate"):
        measure_one(PAUSED, "inference", 0.01, torch.device("cpu"))


@pytest.mark.parametrize(
    ("workload", "settings", "why"),
    [
        ("training", SETTINGS, "a case with a pause or neighbours is a service's, which does not train"),
        ("inference", replace(SETTINGS, device=torch.device("cuda")), "is timed on the CPU"),
        ("inference", replace(SETTINGS, backends=["cpu-graph"]), "CUDA graphs need a CUDA device"),
    ],
)
def test_what_a_service_does_not_do_is_skipped(workload, settings, why):
    reasons = []
    assert service.measure(PAUSED, workload, settings, lambda *reason: reasons.append(reason)) == []
    assert len(reasons) == 1
    assert reasons[0][0] == f"workload {workload}"
    assert why in reasons[0][1]


# --- turns -----------------------------------------------------------------------------------------------------------


def test_a_pause_before_each_sample_and_none_before_the_first_call(monkeypatch):
    log = []
    monkeypatch.setattr(turns.time, "sleep", lambda seconds: log.append(seconds))
    samples = turns.take_turn(lambda: log.append("call"), 0.05, 3)
    assert log == ["call", *3 * [0.05, "call"]]
    assert len(samples) == 3
    log.clear()
    assert len(turns.take_turn(lambda: log.append("call"), 0.0, 3)) == 3
    assert log == 4 * ["call"]


@pytest.fixture
def clock(monkeypatch):
    """A clock that only the turns of pretended candidates move."""
    now = [100.0]
    monkeypatch.setattr(turns.time, "monotonic", lambda: now[0])
    return now


def pretended(clock, log, name, seconds, fails_at=None):
    """A candidate whose calls take so long."""

    def turn(pause, count):
        clock[0] += (pause + seconds) * count
        log.append((name, pause, count))
        if fails_at is not None and [entry[0] for entry in log].count(name) >= fails_at:
            return None
        return [seconds] * count

    return turn


def test_all_have_as_many_samples_and_each_round_is_once_through_all(clock):
    log = []
    candidates = [pretended(clock, log, name, 2e-3) for name in "abc"]
    samples = turns.in_turns(candidates, 0.0, 0.0)
    # Each call 2 ms, turns of 8 ms; the first round says how long calls are, and does not count.
    assert [entry[1:] for entry in log[:3]] == 3 * [(0.0, 3)]
    assert [entry[1:] for entry in log[3:]] == 3 * [(0.0, 4)]
    assert [len(each) for each in samples] == [4, 4, 4]
    # As many as there is time for.
    assert [len(each) for each in turns.in_turns(candidates, 0.0, 1.0)] == 3 * [pytest.approx(1.0 / 6e-3, abs=4)]
    log.clear()
    samples = turns.in_turns(candidates, 0.2, 1.0)
    assert {entry[1:] for entry in log} == {(0.2, 1)}
    assert [len(each) for each in samples] == 3 * [turns.SAMPLES_A_SECOND]
    names = "".join(entry[0] for entry in log)
    assert names.startswith("abcabccbaabccba")


def test_one_that_fails_has_no_samples_and_the_others_go_on(clock):
    log = []
    candidates = [pretended(clock, log, name, 1e-3, 3 if name == "b" else None) for name in "abc"]
    first, second, third = turns.in_turns(candidates, 0.1, 1.0)
    assert second == []
    assert len(first) == len(third) == turns.SAMPLES_A_SECOND
    assert [entry[0] for entry in log].count("b") == 3


@pytest.mark.parametrize("fails_at", [1, 3])
def test_without_the_one_that_all_are_compared_with_it_ends(clock, fails_at):
    log = []
    candidates = [pretended(clock, log, "a", 1e-3, fails_at), pretended(clock, log, "b", 1e-3)]
    assert turns.in_turns(candidates, 0.1, 1.0) == [[], []]
    assert [entry[0] for entry in log].count("a") == fails_at


def test_calls_that_take_very_long_are_fewer(clock):
    (samples,) = turns.in_turns([pretended(clock, [], "a", 2.0)], 0.0, 1.0)
    assert len(samples) == turns.LEAST_SAMPLES < turns.SAMPLES_A_SECOND


def test_the_percentile():
    assert turns.p90([float(number) for number in range(11)]) == 9.0


# --- processes -------------------------------------------------------------------------------------------------------

# Writes when each of its calls began and ended, by the clock that all processes share.
RECORDS = """
import time
from pathlib import Path
from rnnfast.benchmark.case import make_call

def peer(layer, case, workload, data):
    call = make_call(layer, case, workload, data)
    log = Path(__file__).with_suffix(".log")

    def recorded():
        begin = time.monotonic()
        results = call()
        with log.open("a") as file:
            file.write(f"{begin} {time.monotonic()}\\n")
        return results

    return recorded
"""


# Leaves a file with the number of its process.
PROCESS = """
import os
from pathlib import Path
from rnnfast.benchmark.case import make_call

THREADS_STAY_AWAKE = {awake}

def peer(layer, case, workload, data):
    Path(__file__).with_suffix(".pid").write_text(str(os.getpid()))
    return make_call(layer, case, workload, data)
"""


def spans(path):
    return [tuple(map(float, line.split())) for line in path.with_suffix(".log").read_text().splitlines()]


@pytest.fixture(scope="module")
def paused(tmp_path_factory):
    """A case with a pause, torch.nn, rnnfast and two peers: their rows, and the files of the peers."""
    folder = tmp_path_factory.mktemp("peers")
    paths = [folder / "one.py", folder / "other.py"]
    for path in paths:
        path.write_text(RECORDS)
    settings = replace(SETTINGS, peers=[str(path) for path in paths])
    return service.measure(PAUSED, "inference", settings, nothing_skipped), paths


@needs_linux
def test_rows_have_both_sides_percentiles(paused):
    rows, _ = paused
    assert [row["backend"] for row in rows] == ["cpu", "one", "other"]
    for row in rows:
        assert row["correct"], row["failure"]
        assert (row["case"], row["pause_ms"], row["neighbours"]) == ("GRU-T5-B2-I8-H8-pause20ms", 20.0, 0)
        assert 0 < row["p20"] <= row["ratio"] <= row["p80"]
        assert row["rounds"] == turns.LEAST_SAMPLES
        for prefix in ("", "torch_"):
            assert row[f"{prefix}p50_us_per_step"] == row[f"{prefix}us_per_step"]
            assert row[f"{prefix}p50_us_per_step"] <= row[f"{prefix}p90_us_per_step"]
        assert row["core_to_core_ns"] is None
        assert {"load_before", "others_busy", "load_after", "contended"} <= set(row)
        assert row["peak_memory_bytes"] is None or row["torch_peak_memory_bytes"] > 0
    assert len({row["torch_p90_us_per_step"] for row in rows}) == 1


@needs_linux
def test_there_is_a_pause_before_each_sample(paused):
    """The first call is that of the check, the last that of the check afterwards; turns of two calls are between."""
    for path in paused[1]:
        calls = spans(path)[1:-1]
        assert len(calls) == 2 * (1 + turns.LEAST_SAMPLES)
        for (_, end), (begin, _) in zip(calls[::2], calls[1::2], strict=True):
            assert begin - end >= 1e-3 * PAUSED.pause_ms


@needs_linux
def test_never_two_at_once(paused):
    """Neither calls nor whole turns, whose pauses belong to one candidate."""
    whole = []
    for number, path in enumerate(paused[1]):
        calls = spans(path)[1:-1]
        whole += [(first[0], second[1], number) for first, second in zip(calls[::2], calls[1::2], strict=True)]
    for (_, end, _), (begin, _, _) in itertools.pairwise(sorted(whole)):
        assert end <= begin
    # One, other; one, other; and then backwards.
    assert [number for *_, number in sorted(whole)][:6] == [0, 1, 0, 1, 1, 0]


WRONG = """
import os
from rnnfast.benchmark import Impossible
from rnnfast.benchmark.case import make_call

def peer(layer, case, workload, data):
    call = make_call(layer, case, workload, data)
    times = []

    def wrong():
        times.append(1)
        late = len(times) > 4
        {}
        return call()

    return wrong
"""


@needs_linux
def test_peers_that_are_wrong_or_fail_cost_only_themselves(tmp_path):
    line = WRONG[: WRONG.index("{}")].count("\n") + 1
    bodies = {
        "doubled": ("return [2 * value for value in call()]", "result 0: error"),
        "dies": ("os._exit(3)", "the process ended with exit status 3"),
        "late": ("if late: raise ValueError('no more')", f"raised ValueError: no more (late.py, line {line}) while"),
        "drifts": ("if late: return [2 * value for value in call()]", "result 0: error"),
        "ends": ("if late: os._exit(4)", "the process ended with exit status 4 while it was timed"),
    }
    for name, (body, _) in bodies.items():
        (tmp_path / f"{name}.py").write_text(WRONG.format(body))
    (tmp_path / "lacks.py").write_text(
        WRONG.format("pass").replace("call = ", "raise Impossible('not here')\n    call = ")
    )
    settings = replace(SETTINGS, peers=[str(tmp_path / f"{name}.py") for name in [*bodies, "lacks"]])
    skipped = []
    own, *failed = service.measure(
        replace(PAUSED, pause_ms=1.0), "inference", settings, lambda *reason: skipped.append(reason)
    )
    assert own["correct"]
    assert own["ratio"] > 0
    assert skipped == [("lacks", "not here")]
    assert [row["backend"] for row in failed] == list(bodies)
    for row, (_, why) in zip(failed, bodies.values(), strict=True):
        assert row["failure"].startswith(why), row["backend"]
        assert not row["correct"]
        assert row["us_per_step"] is row["ratio"] is row["p50_us_per_step"] is row["p90_us_per_step"] is None
    assert failed[3]["failure"].endswith(", after the timing")


def test_backend_cpu_has_a_second_row_with_one_thread():
    settings = replace(SETTINGS, threads=2, peers=["onnxruntime", "/far/away/mine.py"])
    assert [name for name, _ in service.names_of(PAUSED, settings)] == ["cpu", "cpu-one-thread", "onnxruntime", "mine"]
    assert [name for name, _ in service.names_of(PAUSED, replace(settings, threads=1, peers=[]))] == ["cpu"]
    assert service.names_of(PAUSED, replace(settings, backends=["reference"], peers=[])) == [("reference", None)]
    # Without a condition only the peer is why it is measured here.
    assert [name for name, _ in service.names_of(TINY, settings)] == ["cpu", "onnxruntime", "mine"]


def test_a_peer_whose_threads_stay_awake_has_a_process_of_its_own(tmp_path):
    awake, asleep = tmp_path / "awake.py", tmp_path / "asleep.py"
    asleep.write_text(RECORDS)
    awake.write_text(RECORDS + "\nTHREADS_STAY_AWAKE = True\n")
    assert service.needs_turns(PAUSED, "inference", SETTINGS)
    for found, expected in [([], False), ([asleep], False), ([asleep, awake], True), (["onnxruntime"], True)]:
        settings = replace(SETTINGS, peers=list(map(str, found)))
        assert service.needs_turns(TINY, "inference", settings) is expected
        # Nor does onnxruntime train, take packed rows, or run on a GPU.
        assert not service.needs_turns(replace(TINY, packed=True), "inference", settings)
        assert not service.needs_turns(TINY, "training", settings)
        assert not service.needs_turns(TINY, "inference", replace(settings, device=torch.device("cuda")))


@needs_linux
@pytest.mark.parametrize("awake", [False, True])
def test_the_suites_give_each_candidate_a_process_where_a_peer_needs_it(tmp_path, monkeypatch, capsys, awake):
    paths = [tmp_path / "one.py", tmp_path / "two.py"]
    paths[0].write_text(PROCESS.format(awake=False))
    paths[1].write_text(PROCESS.format(awake=awake))
    (tmp_path / "mine.json").write_text(json.dumps([{"cell": "GRU", "batch": 2, "hidden_size": 8, "steps": 5}]))
    command = ["run.py", "--shapes", tmp_path / "mine.json", "--workload", "inference", "--seconds", "0.02"]
    command += ["--patience", "0", "--peers", ",".join(map(str, paths)), "--out", tmp_path / "out"]
    monkeypatch.setattr(sys, "argv", list(map(str, command)))
    assert run.main() == 0
    capsys.readouterr()
    rows = json.loads(next((tmp_path / "out").rglob("*.json")).read_text())["rows"]
    assert [row["backend"] for row in rows] == ["cpu", "one", "two"]
    assert all(row["correct"] and row["ratio"] > 0 for row in rows)
    one, two = (path.with_suffix(".pid").read_text() for path in paths)
    assert (one != two) is awake


def test_the_number_of_threads_is_the_parents_or_one():
    before = torch.get_num_threads()
    settings = replace(SETTINGS, threads=2)
    try:
        for name, threads in (("torch", 2), ("cpu", 2), ("cpu-one-thread", 1)):
            candidate = service.prepared(service.Task(PAUSED, "inference", settings, name))
            assert torch.get_num_threads() == threads
            assert (candidate.name, candidate.failure, len(candidate.calls)) == (name, None, 1)
    finally:
        torch.set_num_threads(before)


def test_all_processes_have_the_same_weights_and_input():
    results = []
    for seed, name in ((1, "torch"), (2, "cpu")):
        torch.manual_seed(seed)
        candidate = service.prepared(service.Task(PAUSED, "inference", SETTINGS, name))
        results.append(candidate.calls[0]())
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours)


def _says_nothing(parent):
    parent.recv()
    parent.recv()


@needs_linux
def test_a_worker_that_says_nothing_is_ended():
    with Worker(_says_nothing) as worker:
        worker.start()
        worker.tell("hello")
        with pytest.raises(Ended, match=r"ended after 0\.05 s"):
            worker.answer(0.05)
        with pytest.raises(Ended, match="was not started, or is ended"):
            worker.tell("again")


# --- neighbours ------------------------------------------------------------------------------------------------------


@needs_linux
def test_neighbours_compute_and_are_no_load_of_others():
    with service.neighbours(2) as processes:
        assert len(set(processes)) == 2
        end = time.monotonic() + 60
        while min(map(load.taken_by, processes)) < 0.05:
            assert time.monotonic() < end, "they do nothing"
            time.sleep(0.01)
        # What is busy has not come to rest.
        assert not turns.comes_to_rest(processes[0], 0.05)
        without, with_them = load.read(), load.read(processes)
        if without is not None:
            assert with_them.own - without.own >= 0.1
    assert all(map(gone, processes))
    assert load.taken_by(processes[0]) == 0.0


@needs_linux
def test_neighbours_are_ended_after_an_error():
    context = service.neighbours(1)
    (process,) = context.__enter__()
    assert not gone(process)
    error = ZeroDivisionError()
    assert not context.__exit__(ZeroDivisionError, error, None)
    assert gone(process)


@needs_linux
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_whatever_ends_a_case_ends_its_processes(monkeypatch, error):
    """As an interruption would, an error while the candidates take their turns."""
    seen = []

    class Watch(load.Watch):
        def __init__(self, threads, seconds, ours):
            seen.append((threads, ours))
            super().__init__(threads, 0.0, ours)

    def interrupted(*arguments):
        assert not any(map(gone, seen[0][1]))
        raise error

    monkeypatch.setattr(service, "Watch", Watch)
    monkeypatch.setattr(service, "in_turns", interrupted)
    with pytest.raises(error):
        service.measure(BESIDE, "inference", SETTINGS, nothing_skipped)
    ((threads, ours),) = seen
    # Two candidates and a neighbour, none of them a load, and the neighbour's core is not free.
    assert (threads, len(set(ours))) == (2, 3)
    assert all(map(gone, ours))


def test_a_neighbour_ends_when_its_program_is_gone(monkeypatch):
    """One that was killed cannot end it."""
    looks = iter([True, False])

    class Program:
        def is_alive(self):
            return next(looks)

    class Pipe:
        def send(self, message):
            assert message == "busy"

    monkeypatch.setattr(multiprocessing, "parent_process", Program)
    service._compute(Pipe())
    assert next(looks, None) is None


def test_what_sleeps_is_at_rest():
    """A process that waits for a pipe, as candidates do between their turns."""
    with Worker(_says_nothing) as worker:
        worker.start()
        process = worker.process
        assert process is not None
        assert turns.comes_to_rest(process, 60.0)
    assert turns.at_rest(process) is None


@needs_linux
def test_who_does_not_come_to_rest_fails(monkeypatch):
    monkeypatch.setattr(service, "comes_to_rest", lambda process: False)
    (row,) = service.measure(PAUSED, "inference", SETTINGS, nothing_skipped)
    why = "its process goes on computing between its turns, and would disturb the others"
    assert row["failure"] == f"torch.nn: {why}"


# --- the command -----------------------------------------------------------------------------------------------------


@needs_linux
def test_the_command_measures_such_cases_beside_others(tmp_path, monkeypatch, capsys):
    path = tmp_path / "my.json"
    cell = {"cell": "GRU", "batch": 2, "hidden_size": 8, "steps": 5}
    path.write_text(json.dumps([cell, {**cell, "pause_ms": 1}, {**cell, "neighbours": 1}]))
    monkeypatch.setattr(run, "this_machine", lambda *arguments: None)
    monkeypatch.setattr(run.signal, "signal", lambda *arguments: None)
    arguments = f"run.py --shapes {path} --seconds 0.01 --threads 1 --patience 0 --in-process --out {tmp_path}"
    monkeypatch.setattr(sys, "argv", arguments.split())
    before = torch.get_num_threads()
    try:
        assert run.main() == 0
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr().out
    assert "my: 4 cases" in printed
    assert "skipped: workload training: a case with a pause or neighbours is a service's" in printed
    heads = next(line for line in printed.splitlines() if "p90" in line)
    assert heads.count("p50") == heads.count("p90") == 2
    assert "2 neighbours" not in printed
    # Training of the served cases is nothing that is missing.
    record = records.load(tmp_path / "cpu-my.json")
    name = "GRU-T5-B2-I8-H8"
    assert [(row["case"], row["workload"]) for row in record.rows] == [
        (name, "inference"),
        (name, "training"),
        (f"{name}-pause1ms", "inference"),
        (f"{name}-neighbours1", "inference"),
    ]
    assert [all(row.get(key) for key in PERCENTILES) for row in record.rows] == [False, False, True, True]
    # `python -m rnnfast bench` has neither pauses nor neighbours.
    assert len(records.worst_of([record], 9)) == 2

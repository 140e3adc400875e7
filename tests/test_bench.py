"""The benchmark suite on tiny shapes: what it writes, what it refuses to time, what its cases and limits say."""

import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rnnfast import cli, modules
from rnnfast.benchmark import Case, Impossible, comparison, measure, timing
from rnnfast.benchmark.case import CELLS, compare, exact, make_call, make_data, make_layers

pytest.importorskip("rich", reason="the suites print with rich: pip install rnnfast[bench]")
pytest.importorskip("tqdm", reason="the suites show their progress with tqdm: pip install rnnfast[bench]")

import limits
import shapes
from run import summary, table

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
CPU = torch.device("cpu")
SCHEMA = (
    "case cell layers directions dtype T B I H P packed lengths resets pause_ms neighbours quantized cells model "
    "workload backend us_per_step torch_us_per_step ratio p20 p80 limit_us_per_step plan correct"
).split()
TINY = Case("LSTM", 2, 8, steps=5)


pytestmark = pytest.mark.usefixtures("one_thread")


def command(*arguments):
    return {
        "args": [sys.executable, str(BENCHMARKS / "run.py"), "--threads", "1", "--patience", "0", *map(str, arguments)],
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores Ctrl-C, and so would its children.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }


def run(*arguments, status=0):
    done = subprocess.run(**command(*arguments), capture_output=True, text=True, timeout=240)
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


# --- the suites, as a user runs them ---------------------------------------------------------------------------------


def test_suite_writes_a_row_a_case_and_mode(tmp_path):
    printed = run(
        "--suite", "smoke", "--seconds", 0.02, "--workload", "inference,training,streaming", "--out", tmp_path
    )
    record = json.loads((tmp_path / "cpu-smoke.json").read_text())
    machine = ["device", "processor", "cores", "system", "python", "rnnfast", "torch", "cuda", "cudnn"]
    assert list(record) == [*machine, "commit", "date", "suite", "rows"]
    expected = [
        (case.name, workload)
        for case in shapes.SUITES["smoke"]
        for workload in ("inference", "training", "streaming")
        if workload != "streaming" or not (case.ragged or case.resets)
    ]
    assert [(row["case"], row["workload"]) for row in record["rows"]] == expected
    for row in record["rows"]:
        assert list(row)[: len(SCHEMA)] == SCHEMA
        assert row["correct"], row["failure"]
        assert row["backend"] == "cpu"
        assert 0 < row["p20"] <= row["ratio"] <= row["p80"]
        assert row["limit_us_per_step"] > 0
        assert row["tokens_per_s"] > 0
        assert row["peak_memory_bytes"] > 0
        assert ("over_padded" in row) == row["packed"]
    assert "geometric mean" in printed
    assert "skipped: workload streaming: a streaming step has neither lengths nor resets" in printed


def test_interrupt_keeps_what_is_done_and_the_older_file(tmp_path):
    older = tmp_path / "cpu-sizes.json"
    older.write_text("{}")
    process = subprocess.Popen(
        **command("--suite", "sizes", "--seconds", 0.02, "--out", tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        # The bar counts the cases: "sizes:   4%|... 2/54 [".
        seen = ""
        while not re.search(r" [1-9]\d*/54 ", seen):
            seen += process.stderr.read(1)
            assert process.poll() is None, seen + process.stderr.read()
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    assert "Interrupted" in printed
    assert older.read_text() == "{}"
    kept = json.loads((tmp_path / "interrupted" / "cpu-sizes.json").read_text())["rows"]
    assert 1 <= len(kept) < 54


def test_time_limit_measures_some_and_says_so(tmp_path):
    printed = run("--suite", "smoke", "--seconds", 0.02, "--limit", 0.001, "--out", tmp_path)
    assert "The time is up: 0 of 8 cases measured." in printed
    assert not list(tmp_path.iterdir())


def test_wrong_backend_name_is_refused(tmp_path):
    with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
        measure(TINY, "inference", 0.01, CPU, backends=["cpuu"])


# --- a wrong kernel --------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_kernel(monkeypatch):
    """rnnfast's LSTM, a little off in its output."""
    forward = modules.LSTM.forward

    def off(self, *arguments, **options):
        output, state = forward(self, *arguments, **options)
        return output * 1.001, state

    monkeypatch.setattr(modules.LSTM, "forward", off)


@pytest.mark.parametrize("workload", ["inference", "training", "streaming"])
def test_wrong_kernel_fails_and_is_not_timed(wrong_kernel, monkeypatch, workload):
    timed = []
    monkeypatch.setattr(comparison, "interleave", lambda *arguments: timed.append(arguments))
    (row,) = measure(TINY, workload, 0.01, CPU)
    assert not row["correct"]
    assert "result 0: error" in row["failure"]
    assert row["us_per_step"] is row["ratio"] is row["p20"] is row["p80"] is None
    assert not timed


def test_suite_with_a_wrong_kernel(wrong_kernel, tmp_path, monkeypatch, capsys):
    import run as script

    arguments = ["run.py", "--suite", "smoke", "--seconds", "0.01", "--workload", "inference", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*arguments, "--threads", "1", "--patience", "0", "--in-process"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert script.main() == 1
    finally:
        signal.signal(signal.SIGTERM, before)
    rows = json.loads((tmp_path / "partial" / "cpu-smoke.json").read_text())["rows"]
    assert [row["correct"] for row in rows] == [row["cell"] != "LSTM" for row in rows]
    assert "FAILED, not timed: LSTM-T3-B2-I8-H8 inference cpu: result 0" in capsys.readouterr().out


def test_failing_backend_fails_and_the_others_go_on(monkeypatch):
    def broken(self, *arguments, **options):
        raise RuntimeError("no such kernel\nwith details")

    monkeypatch.setattr(modules.LSTM, "forward", broken)
    rows = measure(TINY, "inference", 0.01, CPU, backends=["cpu"], peers={"theirs": own_call})
    assert [row["correct"] for row in rows] == [False, True]
    assert rows[0]["failure"] == "RuntimeError: no such kernel"
    assert rows[1]["ratio"] > 0


def own_call(layer, case, workload, data):
    """A peer that is torch.nn itself."""
    return make_call(layer, case, workload, data)


def test_nan_and_wrong_shapes_do_not_pass():
    truth = [torch.ones(2, 3, dtype=torch.float64)]
    right = [torch.ones(2, 3)]
    assert compare(truth, right, right) is None
    assert "error nan" in compare(truth, right, [torch.full((2, 3), math.nan)])
    assert "shape (3, 2)" in compare(truth, right, [torch.ones(3, 2)])
    assert "error" in compare(truth, right, [torch.ones(2, 3) + 1e-5])


def test_what_tf32_rounds_is_no_error_where_it_is_allowed():
    """torch.nn's library may compute exactly what ours computes in TF32. No other type gets more room by it."""
    truth = [torch.full((2, 3), 4.0, dtype=torch.float64)]
    exactly = [torch.full((2, 3), 4.0)]
    rounded = [torch.full((2, 3), 4.0 * (1 + 0.9 * 2**-10))]
    assert compare(truth, exactly, rounded, coarse=True) is None
    assert "error" in compare(truth, exactly, rounded)
    assert "error" in compare(truth, exactly, [4.0 * (1 + 1.1 * 2**-10) * torch.ones(2, 3)], coarse=True)
    assert "error" in compare(truth, *([v.double() for v in values] for values in (exactly, rounded)), coarse=True)
    assert "error nan" in compare(truth, exactly, [torch.full((2, 3), math.nan)], coarse=True)


# --- the calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workload", ["inference", "training"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", shapes.SUITES["smoke"], ids=lambda case: case.name)
def test_both_layers_give_the_same_results(case, workload, dtype):
    case = replace(case, dtype=dtype)
    theirs, ours = make_layers(case, CPU)
    data = make_data(case, CPU)
    results = [make_call(layer, case, workload, data)() for layer in (theirs, ours)]
    truth = exact(theirs, case, workload, data)
    assert len(truth) == len(results[0]) == len(results[1])
    assert compare(truth, *results) is None
    if workload == "training":
        # The output, the input's gradient, and one for each parameter.
        assert len(truth) == 2 + len(list(ours.parameters()))


def test_resets_in_torch_nn_are_what_they_say():
    """torch.nn called stretch by stretch against the plain loop over steps."""
    case = Case("GRU", 3, 4, steps=12, resets=0.3)
    layer, _ = make_layers(case, CPU)
    data = make_data(case, CPU)
    assert 0 < data.resets.any(1).sum() < case.steps
    state, outputs = torch.zeros(1, 3, 4), []
    for row, reset in zip(data.rows, data.resets, strict=True):
        output, state = layer(row.unsqueeze(0), state * ~reset.view(1, -1, 1))
        outputs.append(output)
    results = make_call(layer, case, "inference", data)()
    torch.testing.assert_close(results[0], torch.cat(outputs))
    torch.testing.assert_close(results[1], state)


def test_streaming_gives_the_sequences_states():
    case = replace(TINY, layers=2)
    for layer in make_layers(case, CPU):
        data = make_data(case, CPU)
        whole, streamed = (make_call(layer, case, workload, data)() for workload in ("inference", "streaming"))
        torch.testing.assert_close(streamed[0], whole[0][-1:])
        torch.testing.assert_close(streamed[1:], whole[1:])


@pytest.mark.parametrize("case", [replace(TINY, packed=True), replace(TINY, lengths=True), replace(TINY, resets=0.5)])
def test_no_streaming_of_rows_with_lengths_or_resets(case):
    with pytest.raises(Impossible, match="neither lengths nor resets"):
        measure(case, "streaming", 0.01, CPU)


# --- the timing ------------------------------------------------------------------------------------------------------


def test_candidates_take_turns():
    order = []
    calls = [lambda: order.append("a") or time.sleep(1e-3), lambda: order.append("b") or time.sleep(1e-3)]
    samples = timing.interleave(calls, 0.05, CPU)
    assert len(samples[0]) == len(samples[1]) >= timing.LEAST_ROUNDS
    assert all(sample >= 1e-3 for sample in samples[0] + samples[1])
    # Each round there and back: neither always finds what the other left.
    assert "".join(order).endswith("abba" * len(samples[0]))


def test_ratio_is_of_the_rounds():
    ratio = timing.Ratio.of([2.0, 4.0, 6.0, 8.0, 10.0], [1.0, 1.0, 2.0, 2.0, 2.0])
    assert (ratio.p20, ratio.median, ratio.p80) == (3.0, 4.0, 4.0)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_takes_no_page_faults():
    """Against the same program without it: a buffer beyond glibc's largest threshold, again and again."""
    program = """if True:
        import resource, sys, torch
        from rnnfast.benchmark.timing import keep_freed_memory
        if sys.argv[1] == "keep" and not keep_freed_memory():
            sys.exit("no mallopt")
        for turn in range(16):
            if turn == 6:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            torch.zeros(48 << 20, dtype=torch.uint8)
        print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 10)
        """
    faults = {}
    for word in ("keep", "default"):
        done = subprocess.run([sys.executable, "-c", program, word], capture_output=True, text=True, check=True)
        faults[word] = float(done.stdout)
    assert faults["keep"] < 10, faults
    # A page each, be it a huge one.
    assert faults["default"] >= 24, faults


def test_peak_memory_is_the_highest_not_the_sum():
    def call():
        for _ in range(3):
            torch.empty(1000, dtype=torch.uint8).fill_(1)
        return torch.empty(500, dtype=torch.uint8)

    assert 1000 <= timing.peak_memory(call, CPU) < 2000


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
    ],
)
def test_short_names_of_cards(name, short):
    assert timing.shorten(name) == short


# --- CUDA, with a device that only pretends --------------------------------------------------------------------------


class Pretended(str):
    """A device that says "cuda" when asked and holds its tensors on the CPU."""

    type = "cuda"


@pytest.fixture
def pretended_cuda(monkeypatch):
    """What the benchmark uses of torch.cuda, done on the CPU; gives the log of what was asked for."""
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("record")
            self.time = time.perf_counter()

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return 1e3 * (end.time - self.time)

    class Graph:
        def replay(self):
            log.append("replay")

    @contextlib.contextmanager
    def graph(graph):
        log.append("capture")
        yield

    fakes = {
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "Stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda: SimpleNamespace(wait_stream=lambda other: None),
        "synchronize": lambda device=None: None,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 10),
        "get_device_name": lambda device: "NVIDIA H200",
        "memory_allocated": lambda device: 100,
        "max_memory_allocated": lambda device: 350,
        "reset_peak_memory_stats": lambda device: None,
        "empty_cache": lambda: log.append("empty_cache"),
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return log


@pytest.mark.parametrize("workload", ["inference", "training"])
def test_cuda_rows_and_graphs(pretended_cuda, workload):
    names = ["cpu", "cpu-graph", "torch-graph", "cuda"]
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    rows = measure(TINY, workload, 0.01, Pretended("cpu"), backends=names)
    after = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    assert before == after
    assert [row["backend"] for row in rows] == names
    cuda = rows.pop()
    # Asked for by name, a backend runs or fails: the tensors are on the CPU here.
    assert not cuda["correct"]
    assert cuda["us_per_step"] is None
    assert [row["against"] for row in rows] == ["torch", "torch-graph", "torch"]
    for row in rows:
        assert row["correct"], row["failure"]
        assert row["ratio"] > 0
        assert row["torch_graph_us_per_step"] > 0
        assert row["tf32"]
    assert rows[0]["peak_memory_bytes"] == 250
    # Each graph is captured for every input that takes turns.
    assert pretended_cuda.count("capture") == 2 * comparison.INPUTS
    assert "empty_cache" in pretended_cuda


def test_graphs_need_a_cuda_device():
    with pytest.raises(Impossible, match="CUDA device"):
        measure(TINY, "inference", 0.01, CPU, backends=["cpu-graph"])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bench_on_a_card(dtype):
    case = Case("GRU", 16, 64, steps=20, dtype=dtype)
    device = torch.device("cuda")
    for workload in ("inference", "training", "streaming"):
        rows = measure(case, workload, 0.1, device)
        assert rows
        for row in rows:
            assert row["correct"], row["failure"]
            assert row["against"] == ("torch-graph" if row["backend"].endswith("-graph") else "torch")


# --- the command line ------------------------------------------------------------------------------------------------


def test_command_line(tmp_path, capsys):
    path = tmp_path / "bench.json"
    options = (
        "bench --cell gru --hidden 8 --batch 2 --steps 4 --workload inference,training,streaming --seconds 0.01".split()
    )
    assert cli.main([*options, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("GRU-T4-B2-I8-H8: ")
    assert [line.split()[0] for line in printed.splitlines()[2:]] == ["inference", "training", "streaming"]
    assert printed.count("agree") == 3
    assert [list(row)[: len(SCHEMA)] for row in json.loads(path.read_text())["rows"]] == [SCHEMA] * 3


def test_command_line_with_wrong_results(wrong_kernel, capsys):
    assert cli.main("bench --hidden 8 --batch 2 --steps 4 --workload inference --seconds 0.01".split()) == 1
    assert "FAILED, not timed: result 0" in capsys.readouterr().out


def test_command_line_refuses_what_cannot_be(capsys):
    assert cli.main("bench --hidden 8 --packed --workload streaming --seconds 0.01".split()) == 2
    assert "neither lengths nor resets" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        cli.main("bench --workload forward".split())
    assert "forward: choose from inference, training, streaming" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ("--hidden -3", "argument --hidden: expected an integer of at least 1, got '-3'"),
        ("--steps 2.5", "argument --steps: expected an integer of at least 1, got '2.5'"),
        ("--seconds 0", "argument --seconds: expected a number above 0, got '0'"),
        ("--seconds inf", "argument --seconds: expected a number above 0, got 'inf'"),
        ("--resets nan", "argument --resets: expected a number of at least 0, got 'nan'"),
        ("--resets 2", "resets: expected a probability, 0 to 1, got 2.0"),
        ("--device meta", "argument --device: expected cpu or cuda, got 'meta'"),
        ("--backends cpuu", "argument --backends: cpuu: choose from auto, cpu, "),
        ("--cell gru --proj 4", "proj_size: expected 0, as only an LSTM has a projection, got 4"),
        ("--packed --resets 0.1", "resets: expected 0 for rows of different lengths, got 0.1"),
    ],
)
def test_command_line_refuses_wrong_values(capsys, options, why):
    try:
        status = cli.main(["bench", *options.split()])
    except SystemExit as end:
        status = end.code
    printed = capsys.readouterr()
    assert status == 2
    assert why in printed.out + printed.err


# --- shapes ----------------------------------------------------------------------------------------------------------


def test_suites_have_the_shapes_that_they_are_named_for():
    sizes = {(case.cell, case.batch, case.hidden_size, case.steps) for case in shapes.SUITES["sizes"]}
    assert sizes == {(c, b, h, 100) for c in CELLS for b in (1, 8, 64) for h in (64, 256, 512)}
    assert all(case.steps == 1 for case in shapes.SUITES["one-step"])
    headline = shapes.SUITES["flashrnn"][0]
    assert (headline.batch, headline.steps, headline.hidden_size) == (16, 1024, 768)
    assert all(case.model for case in shapes.SUITES["models"])


@pytest.mark.parametrize("suite", shapes.SUITES)
def test_cases_are_named_once_and_say_where_they_come_from(suite):
    cases = shapes.SUITES[suite]
    assert len({case.name for case in cases}) == len(cases)
    assert suite == "smoke" or all(case.source for case in cases)
    for case in cases:
        # Rows of different lengths have exactly the tokens of the dense ones that they are compared with.
        assert sum(case.row_lengths) == case.steps * case.batch
        assert min(case.row_lengths) >= case.steps // 2


def test_flops_and_bytes_of_a_case():
    case = Case("LSTM", 3, 5, steps=10, input_size=2, layers=2, directions=2)
    weights = 2 * 20 * (2 + 5) + 2 * 20 * (10 + 5)
    assert case.weights() == weights == sum(p.numel() for p in make_layers(case, CPU)[1].parameters() if p.dim() == 2)
    assert case.flops("inference") == 2 * 3 * weights
    assert case.flops("training") == 3 * case.flops("inference")
    assert case.bytes("inference") == 4 * (3 * 2 + 3 * 10 + weights / 10)
    projected = Case("LSTM", 1, 6, input_size=2, proj_size=3)
    assert projected.weights() == 24 * (2 + 3) + 3 * 6


# --- limits ----------------------------------------------------------------------------------------------------------


def machine(**options):
    """Two cores of 1 Gflop/s, 1 KB each at 10 GB/s, then memory at 1 GB/s in all."""
    levels = (limits.Level("near", 1e3, 10e9), limits.Level("memory", math.inf, 1e9, shared=True))
    values = {"name": "m", "cores": 2, "flops": {"float32": 2e9}, "levels": levels, "source": "test", "call": 0.0}
    return limits.Machine(**{**values, "handovers": ((math.inf, 1e-6),), "flushed": False, **options})


def test_limit_by_arithmetic():
    # 2 * 64 * 4 * 16 * 32 operations at 2 Gflop/s.
    assert limits.limit_us_per_step(Case("LSTM", 64, 16), "inference", machine()) == pytest.approx(131.072)
    assert limits.limit_us_per_step(Case("LSTM", 64, 16), "training", machine()) == pytest.approx(3 * 131.072)


def test_limit_by_the_chain():
    # One row: a core alone reads 16 KB a step, 15 KB of it from memory. Two cores read 8 KB each, 7 KB of it from
    # memory at half its speed, in 14 us, and hand over in 1 us.
    fast = machine(flops={"float32": 1e15})
    assert limits.chain(Case("LSTM", 1, 32, steps=1000), "inference", fast, 1e15) == pytest.approx(15.384e-6)
    # Weights near enough for one core: nobody needs to hand over.
    small = machine(flops={"float32": 1e15}, levels=(limits.Level("near", 1e6, 10e9), fast.levels[1]))
    assert limits.chain(Case("LSTM", 1, 32, steps=1000), "inference", small, 1e15) == pytest.approx(1.6384e-6)
    # The two directions need not wait for each other.
    both = limits.chain(Case("LSTM", 1, 32, steps=1000, directions=2), "inference", small, 1e15)
    assert both == pytest.approx(1.6384e-6)


def test_limit_by_calls():
    idle = machine(flops={"float32": 1e18}, levels=(limits.Level("memory", math.inf, 1e18, shared=True),), call=1e-5)
    assert limits.limit_us_per_step(Case("GRU", 1, 4, steps=10), "inference", idle) == pytest.approx(1.0, rel=1e-3)
    assert limits.limit_us_per_step(Case("GRU", 1, 4, steps=10), "streaming", idle) == pytest.approx(10.0, rel=1e-3)
    assert limits.limit_us_per_step(Case("GRU", 1, 4, dtype="float16"), "inference", idle) is None


def test_measured_processor_and_data_sheets():
    cpu = limits.measure_cpu(("float32",), seconds=0.01)
    assert cpu.flops["float32"] > 1e8
    assert all(level.bandwidth > 1e8 for level in cpu.levels)
    assert limits.better(cpu, replace(cpu, flops={"float32": 2 * cpu.flops["float32"]})).flops["float32"] > 1e8
    assert limits.at_least(cpu, [("float32", 1.0), ("float32", 1e16)]).flops["float32"] == 1e16
    assert limits.at_least(cpu, [("float32", 1.0)]).flops == cpu.flops
    assert limits.gpu("NVIDIA H100 PCIe").cores == 114
    assert limits.gpu("NVIDIA H100 80GB HBM3").cores == 132
    assert limits.gpu("NVIDIA RTX A4000") is None
    h200 = limits.gpu("NVIDIA H200")
    case = Case("LSTM", 16, 1024, dtype="bfloat16")
    assert 0 < limits.limit_us_per_step(case, "inference", h200) < limits.limit_us_per_step(case, "training", h200)
    # TF32 is another peak than float32.
    single = replace(case, batch=256, dtype="float32")
    assert limits.limit_us_per_step(single, "inference", h200) < limits.limit_us_per_step(
        single, "inference", h200, tf32=False
    )


# --- tables ----------------------------------------------------------------------------------------------------------


def test_tables_show_failures_too():
    good, bad = measure(TINY, "inference", 0.01, CPU, backends=["cpu", "cuda"])
    assert good["correct"]
    assert not bad["correct"]
    where = timing.environment(CPU)
    rows, groups = table("smoke", [good, bad], where), summary("smoke", [good, bad])
    assert (rows.row_count, groups.row_count) == (2, 1)
    # A row may be a peer's.
    assert rows.caption == groups.caption == "ratio = torch.nn's time / the row's time"

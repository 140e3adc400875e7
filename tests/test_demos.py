"""The demos run as a user runs them, on tiny settings, and end cleanly on Ctrl-C."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="the demos draw with matplotlib: pip install rnnfast[bench]")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
TINY_TEXT = "--hidden 8 --layers 2 --batch 4 --chunk 12 --characters 60000 --sample 20 --device cpu".split()
DEMOS = {
    "charlm-lstm": ["train_charlm.py", "--cell", "lstm", *TINY_TEXT],
    "charlm-gru": ["train_charlm.py", "--cell", "gru", *TINY_TEXT],
    "digits-gru": ["train_digits.py", "--hidden", "8", "--device", "cpu"],
}


def command(*arguments):
    script, *options = map(str, arguments)
    # One thread: the settings are tiny, and other tests may share the machine.
    return {
        "args": [sys.executable, str(EXAMPLES / script), *options],
        "env": {**os.environ, "OMP_NUM_THREADS": "1"},
        # A shell's background job ignores Ctrl-C, and so would its children.
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    }


def run(*arguments):
    done = subprocess.run(**command(*arguments), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check_files(folder, name):
    record = json.loads((folder / f"{name}-cpu.json").read_text())
    assert (folder / f"{name}-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert record["agree"]
    losses = [side["losses"] for side in record["sides"].values()]
    assert len(losses[0]) == len(losses[1]) == record["steps"]
    assert all(math.isfinite(x) for x in losses[0] + losses[1])
    # Two processors may round differently, but over a few tiny steps only that.
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3
    return record


@pytest.mark.parametrize("name", DEMOS)
def test_demo_trains_both_sides_alike(name, tmp_path):
    printed = run(*DEMOS[name], "--steps", 12, "--out", tmp_path)
    record = check_files(tmp_path, name)
    assert record["steps"] == 12
    assert not record["interrupted"]
    assert "they agree" in printed
    assert "times as fast" in printed
    assert list(record["sides"]) == ["torch.nn", "rnnfast"]


def test_time_limit_ends_the_training(tmp_path):
    run(*DEMOS["digits-gru"], "--steps", 1000000, "--minutes", 0.001, "--out", tmp_path)
    assert 0 < check_files(tmp_path, "digits-gru")["steps"] < 1000000


def interrupted(seen_first, *arguments):
    """What an example prints that gets Ctrl-C as soon as it has written `seen_first` to its progress bars."""
    process = subprocess.Popen(
        **command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        seen = ""
        while seen_first not in seen:
            seen += process.stderr.read(1)
            assert process.poll() is None, seen + process.stderr.read()
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    assert "Interrupted" in printed
    return printed


@pytest.mark.parametrize("name", ["charlm-lstm", "digits-gru"])
def test_interrupt_ends_the_demo_cleanly(name, tmp_path):
    # The bar shows a loss once both sides have finished a block of steps.
    interrupted("loss", *DEMOS[name], "--steps", 1000000, "--out", tmp_path)
    record = check_files(tmp_path, name)
    assert record["interrupted"]
    assert 0 < record["steps"] < 1000000


def test_the_online_series(tmp_path):
    printed = run("online_series.py", "--steps", 300, "--k1", 7, "--k2", 14, "--out", tmp_path)
    record = json.loads((tmp_path / "online-series-cpu.json").read_text())
    assert (record["steps"], record["k1"], record["interrupted"]) == (300, 7, False)
    # 43 chunks, the last one of six steps.
    assert record["trained"] == {"k2 = 7": 301, "k2 = 14": 301}
    assert list(record["error"]) == ["last value", "k2 = 7", "k2 = 14"]
    assert all(math.isfinite(error) for errors in record["error"].values() for error in errors)
    assert (tmp_path / "online-series-cpu.png").read_bytes().startswith(b"\x89PNG")
    assert "k2 = 14" in printed
    # While the first learner trains: of the second there is nothing.
    interrupted("k2 = 5:", "online_series.py", "--steps", 5000, "--out", tmp_path)
    record = json.loads((tmp_path / "online-series-cpu.json").read_text())
    assert record["interrupted"]
    assert list(record["error"]) == ["last value", "k2 = 5"]
    assert record["error"]["k2 = 5"][2] is None
    for wrong in (["--k1", 0], ["--k1", 10, "--k2", 10], ["--steps", 20]):
        done = subprocess.run(**command("online_series.py", *wrong), capture_output=True, text=True, timeout=60)
        assert (done.returncode, "expected from" in done.stderr) == (2, True)

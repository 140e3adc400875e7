"""Other libraries' layers: they give torch.nn's results, say why they cannot, and wrong ones are not timed."""

from dataclasses import replace

import pytest
import torch

import peers
from rnnfast.benchmark import Case, Impossible, measure
from rnnfast.benchmark.case import CELLS, make_call

CPU = torch.device("cpu")
TINY = Case("LSTM", 2, 8, steps=5)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("workload", ["inference", "streaming"])
@pytest.mark.parametrize("shape", [{}, {"layers": 2}, {"directions": 2, "layers": 2, "lengths": True}], ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_onnxruntime_gives_torchs_results(cell, shape, workload):
    pytest.importorskip("onnxruntime", reason="onnxruntime is compared where it is installed: pip install onnxruntime")
    pytest.importorskip("onnx", reason="its model files are written with onnx: pip install onnx")
    case = Case(cell, 3, 16, steps=7, input_size=5, **shape)
    if case.lengths and workload == "streaming":
        return
    (row,) = measure(case, workload, 0.01, CPU, backends=[], peers=peers.named(["onnxruntime"]))
    assert row["correct"], row["failure"]
    assert row["ratio"] > 0


@pytest.mark.parametrize("name", peers.NAMES)
def test_peers_say_why_they_cannot(name):
    reasons = []
    rows = measure(
        replace(TINY, packed=True), "training", 0.01, CPU, peers=peers.named([name]),
        skipped=lambda *reason: reasons.append(reason),
    )  # fmt: skip
    assert [row["backend"] for row in rows] == ["cpu"]
    assert len(reasons) == 1
    assert reasons[0][0] == name
    assert len(reasons[0][1]) > 10


def test_missing_library_is_named():
    with pytest.raises(Impossible, match="no_such_library is not installed"):
        peers.library("no_such_library")


def test_wrong_peer_is_not_timed():
    def doubled(layer, case, workload, data):
        call = make_call(layer, case, workload, data)
        return lambda: [2 * value for value in call()]

    rows = measure(TINY, "inference", 0.01, CPU, peers={"doubled": doubled})
    assert [row["correct"] for row in rows] == [True, False]
    assert rows[1]["us_per_step"] is None

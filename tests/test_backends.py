"""Choosing a backend: what is there, what is asked for, what is said."""

import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import Tensor

import rnnfast
from rnnfast import functional, ops
from rnnfast.backends import select


def cpu_is_built() -> bool:
    return rnnfast.backends()["cpu"].available


def test_backends_lists_all_with_reasons() -> None:
    found = rnnfast.backends()
    assert list(found) == ["cpu", "cuda", "triton", "reference"]
    assert found["reference"].available
    assert all(isinstance(entry.reason, str) and entry.reason for entry in found.values())
    assert found["cpu"].available == (ops.library_error is None)


def test_unknown_name() -> None:
    with (
        pytest.raises(ValueError, match="unknown backend 'gpu', expected one of auto, cpu, cuda, triton, reference"),
        rnnfast.backend("gpu"),
    ):
        pass


@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_asked_by_name_but_missing(name: str) -> None:
    if rnnfast.backends()[name].available:
        with rnnfast.backend(name):
            return
    reason = rnnfast.backends()[name].reason
    with pytest.raises(RuntimeError, match=f"'{name}' is not available: {reason}"), rnnfast.backend(name):
        pass


def test_selection_and_nesting() -> None:
    tensor = torch.zeros(1)
    automatic = select(tensor)
    assert automatic == ("cpu" if cpu_is_built() else "reference")
    with rnnfast.backend("reference"):
        assert select(tensor) == "reference"
        with rnnfast.backend("auto"):
            assert select(tensor) == automatic
        assert select(tensor) == "reference"
    assert select(tensor) == automatic
    with pytest.raises(KeyError), rnnfast.backend("reference"):
        raise KeyError
    assert select(tensor) == automatic


def test_each_thread_asks_for_itself() -> None:
    found: list[str] = []
    with rnnfast.backend("reference"):
        thread = threading.Thread(target=lambda: found.append(select(torch.zeros(1))))
        thread.start()
        thread.join()
        assert select(torch.zeros(1)) == "reference"
    assert found == [select(torch.zeros(1))]


def test_named_backend_refuses_a_device_it_cannot_run() -> None:
    if not cpu_is_built():
        pytest.skip(rnnfast.backends()["cpu"].reason)

    class Elsewhere:
        is_cpu = False
        device = torch.device("cuda", 0)

    with rnnfast.backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for by name, .* on cuda:0"):
        select(Elsewhere())  # type: ignore[arg-type]


def test_meta_tensors_give_shapes() -> None:
    weights = [torch.empty(20, 3, device="meta"), torch.empty(20, 5, device="meta")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        output, (h_n, c_n) = functional.lstm(torch.empty(4, 2, 3, device="meta"), weights)
    assert (output.shape, h_n.shape, c_n.shape) == ((4, 2, 5), (1, 2, 5), (1, 2, 5))
    assert output.is_meta


WITHOUT_LIBRARY = """
import warnings
import torch
import glob
found, glob.glob = glob.glob, lambda *a, **k: []
import rnnfast
glob.glob = found
assert not rnnfast.backends()["cpu"].available
assert "not built" in rnnfast.backends()["cpu"].reason
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    lstm = rnnfast.LSTM(3, 5)
    for _ in range(2):
        lstm(torch.randn(4, 2, 3))[0].sum().backward()
assert [str(w.message) for w in caught if "reference implementation" in str(w.message)].__len__() == 1, caught
assert "not built" in str(caught[0].message)
try:
    with rnnfast.backend("cpu"):
        pass
except RuntimeError as error:
    assert "'cpu' is not available: the C++ library" in str(error)
else:
    raise AssertionError
assert "fallback" in str(rnnfast.explain(lstm, torch.randn(4, 2, 3)))
"""


def test_without_the_library_it_works_and_warns_once() -> None:
    subprocess.run([sys.executable, "-c", WITHOUT_LIBRARY], check=True)


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    module = rnnfast.LSTM(3, 5, num_layers=2, bidirectional=True)
    input = torch.randn(4, 2, 3)
    found = rnnfast.explain(module, input)
    assert found.backend == select(input)
    assert found.prediction is None
    assert "2 direction(s)" in found.kernel
    assert found.backend in str(found)
    with rnnfast.backend("reference"):
        assert "asked for by name ('reference')" in rnnfast.explain(module, input).reason
    packed = torch.nn.utils.rnn.pack_padded_sequence(input, torch.tensor([4, 2]))
    assert "packed rows" in rnnfast.explain(module, packed).kernel
    assert rnnfast.explain(torch.nn.LSTM(3, 5), input).backend == "torch.nn"


def test_explain_uses_a_cost_model_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []

    def predict(*arguments: object) -> float:
        seen.append(arguments)
        return 1.5

    from rnnfast.backends import predictors

    monkeypatch.setitem(predictors, select(torch.zeros(1)), predict)
    with torch.no_grad():
        found = rnnfast.explain(rnnfast.GRU(3, 5, batch_first=True), torch.randn(4, 2, 3))
    assert seen == [("GRU", 5, 4, torch.float32, False)]
    assert "predicted 1.50 us a step" in str(found)


def test_explain_with_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="module should be an LSTM, GRU or RNN, got Linear"):
        rnnfast.explain(torch.nn.Linear(3, 4), torch.randn(4, 2, 3))
    with pytest.raises(TypeError, match="input should be a tensor or a PackedSequence, got list"):
        rnnfast.explain(rnnfast.LSTM(3, 5), [1.0])


def test_results_agree_across_backends() -> None:
    module = rnnfast.GRU(3, 5, dtype=torch.float64)
    input = torch.randn(4, 2, 3, dtype=torch.float64)
    results: list[Tensor] = []
    for name, entry in rnnfast.backends().items():
        if entry.available:
            with rnnfast.backend(name):
                results.append(module(input)[0])
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 1e-12

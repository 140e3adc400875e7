"""Choosing a backend: what is there, what is asked for, what is said."""

import dataclasses
import functools
import re
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import rnnfast
from cases import make_call, random_grads, reference
from rnnfast import cli, functional, libraries, ops, registration
from rnnfast.backends import BACKENDS, KernelsWithOptions, select, select_with_options
from rnnfast.triton import availability
from triton_interpreter import triton_problem

# The package's function of the same name hides it.
backends_module = sys.modules["rnnfast.backends"]


def cpu_is_built() -> bool:
    return rnnfast.backends()["cpu"].available


def test_backends_lists_all_with_reasons() -> None:
    found = rnnfast.backends()
    assert [name for name in found if name != "emulated"] == ["cpu", "cuda", "triton", "reference"]
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
    with pytest.raises(RuntimeError, match=re.escape(f"'{name}' is not available: {reason}")), rnnfast.backend(name):
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

    with rnnfast.backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' was asked for by name, .* on cuda:0"):
        select(OnCuda())


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
assert "needs the C++ library" in rnnfast.backends()["cuda"].reason
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


# ---- CUDA, with a stand-in for the library's answers ----------------------------------------------------------------


class OnCuda:
    """What `select` looks at of a tensor on a CUDA device."""

    is_cpu = False
    device = torch.device("cuda", 0)
    dtype = torch.float32


@dataclasses.dataclass
class Library:
    """What the CUDA library says of the machine, and what it was asked and told."""

    problem: str = ""
    asked: int = 0
    told: list[bool] = dataclasses.field(default_factory=list)
    told_of_products: list[bool] = dataclasses.field(default_factory=list)

    def cuda_problem(self) -> str:
        self.asked += 1
        return self.problem

    def cuda_archs(self) -> str:
        return "8.0;9.0a"

    def cuda_device_count(self) -> int:
        return 0 if self.problem else 2

    def cuda_allow_tf32(self, recurrences: bool, products: bool, half_sums: bool) -> bool:
        before = self.told[-1] if self.told else False
        self.told.append(recurrences)
        self.told_of_products.append(products)
        return before


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    """Every machine looks as if the CUDA library were built and loaded."""
    if not cpu_is_built():
        pytest.skip(rnnfast.backends()["cpu"].reason)
    library = Library()
    for name in ("cuda_problem", "cuda_archs", "cuda_device_count", "cuda_allow_tf32"):
        stand_in = functools.partial(getattr(library, name))
        # Whoever lists all ops asks each for its overloads.
        # Under one name or the other, as the version has it.
        stand_in.op_overloads = stand_in.overloads = list  # type: ignore[attr-defined]
        monkeypatch.setattr(torch.ops.rnnfast, name, stand_in, raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(libraries, "cuda_error", None)
    monkeypatch.setattr(libraries, "_machine_problem", None)
    monkeypatch.setattr(libraries, "_tf32_told", None)
    monkeypatch.setattr(availability, "problem", lambda: "Triton is not installed")
    monkeypatch.setattr(availability, "interpreted", lambda: False)
    compiled = ops.overloads("rnnfast")
    monkeypatch.setattr(BACKENDS["cuda"], "kernels", ops.on_cuda(ops.without_derivatives("rnnfast")))
    monkeypatch.setattr(BACKENDS["cuda"], "differentiable", compiled)
    # The tests run in Triton's interpreter.
    monkeypatch.setattr(BACKENDS["triton"], "devices", ("cuda", "meta"))
    monkeypatch.setattr(BACKENDS["triton"], "automatic", True)
    monkeypatch.setattr(backends_module, "_warned", set())
    return library


def test_cuda_tensors_go_to_the_cuda_kernels(library: Library) -> None:
    assert select(OnCuda()) == "cuda"
    assert select(torch.zeros(1)) == "cpu"
    with rnnfast.backend("cuda"):
        assert select(OnCuda()) == "cuda"
        with pytest.raises(RuntimeError, match=r"'cuda' was asked for by name, but .* on cpu; .* CUDA device"):
            rnnfast.LSTM(3, 5)(torch.randn(4, 2, 3))
    assert library.asked == 1


def test_cuda_tensors_fall_back_with_one_warning_that_says_why(library: Library) -> None:
    library.problem = "no CUDA device"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert [select(OnCuda()) for _ in range(3)] == ["reference"] * 3
    assert [str(warning.message) for warning in caught] == [
        "rnnfast runs its slow reference implementation on 'cuda' tensors: CUDA kernels: no CUDA device; Triton "
        "kernels: Triton is not installed"
    ]
    assert rnnfast.backends()["cuda"] == (False, "no CUDA device")
    with pytest.raises(RuntimeError, match="'cuda' is not available: no CUDA device"), rnnfast.backend("cuda"):
        pass


def test_cuda_tensors_go_to_triton_where_there_are_no_cuda_kernels(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(availability, "problem", lambda: None)
    assert select(OnCuda()) == "cuda"
    library.problem = "the driver is too old"
    monkeypatch.setattr(libraries, "_machine_problem", None)
    assert select(OnCuda()) == "triton"
    # what the interpreter could do is no reason to take it
    monkeypatch.setattr(BACKENDS["triton"], "automatic", False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert select(OnCuda()) == "reference"


def test_layers_with_options_go_to_triton_first_then_to_the_cuda_kernels(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cuda", "triton"):
        monkeypatch.setattr(BACKENDS[name], "with_options", KernelsWithOptions.of(name, "rnnfast"))
    monkeypatch.setattr(availability, "problem", lambda: None)
    assert (select(OnCuda()), select_with_options(OnCuda())) == ("cuda", ("triton", None))
    with rnnfast.backend("cuda"):
        assert select_with_options(OnCuda()) == ("cuda", None)
    monkeypatch.setattr(availability, "problem", lambda: "Triton is not installed")
    assert select_with_options(OnCuda()) == ("cuda", None)
    monkeypatch.setattr(BACKENDS["cuda"], "with_options", None)
    assert select_with_options(OnCuda()) == (
        "reference",
        "the backend 'cuda' has no kernels for these options yet; Triton kernels: Triton is not installed",
    )
    assert select_with_options(torch.zeros(1)) == ("cpu", None)


@pytest.mark.parametrize(("dtype", "words"), [(torch.float32, "in TF32 now"), (torch.float16, "add up in float16 now")])
def test_products_that_a_recurrence_may_not_have_are_no_choice(
    library: Library, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, words: str
) -> None:
    """Of layers with options: there each step has one of torch's."""
    monkeypatch.setattr(BACKENDS["cuda"], "with_options", KernelsWithOptions.of("cuda", "rnnfast"))
    monkeypatch.setattr(BACKENDS["triton"], "with_options", KernelsWithOptions.of("triton", "rnnfast"))
    tensor = OnCuda()
    tensor.dtype = dtype
    assert select_with_options(tensor) == ("cuda", None)
    flags = {("cuda", "matmul"): "tf32", ("cuda", "rnn"): "ieee"}
    monkeypatch.setattr(libraries, "_precision", lambda backend, operation: flags[backend, operation])
    monkeypatch.setattr(libraries, "_half_sums", lambda: True)
    for asked in ("auto", "cuda"):
        with rnnfast.backend(asked):
            name, why = select_with_options(tensor)
        assert (name, words in str(why)) == ("reference", True)
    monkeypatch.setattr(availability, "problem", lambda: None)
    assert select_with_options(tensor) == ("triton", None)
    tensor.dtype = torch.bfloat16
    monkeypatch.setattr(availability, "problem", lambda: "Triton is not installed")
    assert select_with_options(tensor) == ("cuda", None)
    # What recurrences may use, too, is no matter.
    tensor.dtype, flags["cuda", "rnn"] = torch.float32, "tf32"
    assert select_with_options(tensor) == ("cuda", None)


def test_a_torch_without_cuda_cannot_use_the_library(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "is built without CUDA" in rnnfast.backends()["cuda"].reason


def test_the_driver_is_left_alone_until_somebody_needs_it(library: Library) -> None:
    """A process that has initialised CUDA cannot fork."""
    rnnfast.LSTM(3, 5)(torch.randn(4, 2, 3))[0].sum().backward()
    with rnnfast.backend("cpu"):
        rnnfast.explain(rnnfast.LSTM(3, 5), torch.randn(4, 2, 3))
    assert library.asked == 0
    rnnfast.backends()
    assert library.asked == 1


def test_explain_and_info_name_the_cuda_kernels(library: Library) -> None:
    module, input = rnnfast.LSTM(3, 5, device="meta"), torch.empty(4, 2, 3, device="meta")
    with rnnfast.backend("cuda"):
        kernel = rnnfast.explain(module, input).kernel
        assert kernel.startswith("persistent, one block alone: one launch for all steps (CUDA), with reserve")
        kernel = rnnfast.explain(module.double(), input.double()).kernel
        assert kernel.startswith("one launch a step (CUDA), with reserve")
    assert "8.0;9.0a" in rnnfast.backends()["cuda"].reason
    assert re.search(r"CUDA kernels +for 8.0;9.0a; 2 CUDA devices seen", cli.info())


@pytest.fixture
def tf32_flag() -> Iterator[None]:
    before = torch.backends.cudnn.rnn.fp32_precision
    yield
    torch.backends.cudnn.rnn.fp32_precision = before


def test_tf32_follows_torchs_flag(library: Library, tf32_flag: None) -> None:
    call = make_call("GRU", dtype=torch.float32)
    # float64 takes the same way; these ops run on the CPU, as the tensors are there
    for precision in ("ieee", "ieee", "tf32", "tf32", "ieee"):
        torch.backends.cudnn.rnn.fp32_precision = precision
        call.forward(BACKENDS["cuda"].kernels)
    assert library.told == [False, True, False]


def test_tf32_of_products_follows_torchs_other_flag(library: Library) -> None:
    call = make_call("GRU", dtype=torch.float32)
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            call.forward(BACKENDS["cuda"].kernels)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert library.told_of_products == [False, True, False]


def test_tf32_follows_torchs_older_flag(library: Library) -> None:
    call = make_call("RNN_TANH", dtype=torch.float32)
    saved = call.forward(reference)
    for allowed in (False, True):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            call.backward(BACKENDS["cuda"].kernels, random_grads(saved), saved)
    assert library.told == [False, True]


def test_cuda_calls_compile_in_one_graph(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    """The dispatcher goes by the device, so the CUDA path can be traced with tensors of the CPU."""
    module = rnnfast.LSTM(3, 5, num_layers=2, bidirectional=True)
    input = torch.randn(4, 2, 3)
    expected = module(input)[0]
    monkeypatch.setattr(functional, "select", lambda _: "cuda" if libraries.cuda_problem() is None else "reference")
    torch._dynamo.reset()
    actual = torch.compile(module, fullgraph=True, backend="aot_eager")(input)[0]
    torch._dynamo.reset()
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(output.square().sum(), list(module.parameters())) for output in (actual, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.skipif(libraries.cuda_error is not None, reason=f"no CUDA library: {libraries.cuda_error}")
def test_the_library_answers_without_a_card_too() -> None:
    count, problem = torch.ops.rnnfast.cuda_device_count(), torch.ops.rnnfast.cuda_problem()
    assert count >= 0
    assert count > 0 or "no CUDA device" in problem
    assert re.search(r"\d", torch.ops.rnnfast.cuda_archs())
    before = torch.ops.rnnfast.cuda_allow_tf32(True)
    assert torch.ops.rnnfast.cuda_allow_tf32(before) is True


@pytest.mark.skipif(libraries.cuda_error is not None, reason=f"no CUDA library: {libraries.cuda_error}")
def test_an_exported_program_does_not_set_the_tf32_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though tracing makes the first call after a change of the flag."""
    monkeypatch.setattr(libraries, "_tf32_told", None)
    # The ops that CUDA tensors take, on CPU tensors: the dispatcher goes by these.
    monkeypatch.setattr(BACKENDS["cpu"], "kernels", BACKENDS["cuda"].kernels)
    program = torch.export.export(rnnfast.LSTM(3, 5).eval(), (torch.randn(4, 2, 3),), strict=False)
    assert libraries._tf32_told is not None
    assert torch.ops.rnnfast.cuda_allow_tf32(*libraries._tf32_told) == libraries._tf32_told[0]
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert [target for target in targets if target.startswith("rnnfast")] == ["rnnfast.layer.default"]


# ---- the emulated kernels -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "why"), [("", "is not set"), ("/nowhere/_C_emulated.so", "does not exist")])
def test_emulated_says_how_to_build_it(path: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test may have loaded it.
    monkeypatch.setattr(libraries, "_is_loaded", lambda *_: False)
    monkeypatch.setenv("RNNFAST_EMULATED_LIBRARY", path)
    message = rf"'emulated' is not available: .*{why}; build .* `python tests/build_emulated.py`"
    with pytest.raises(RuntimeError, match=message), rnnfast.backend("emulated"):
        pass
    assert "emulated" not in rnnfast.backends()


def test_a_broken_emulated_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another test may have loaded the right one.
    monkeypatch.setattr(libraries, "_is_loaded", lambda *_: False)
    broken = tmp_path / "_C_emulated.so"
    broken.write_bytes(b"no library")
    with pytest.raises(RuntimeError, match="does not load"):
        registration.load_emulated(str(broken))


# ---- explain --------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    module = rnnfast.LSTM(3, 5, num_layers=2, bidirectional=True)
    input = torch.randn(4, 2, 3)
    found = rnnfast.explain(module, input)
    assert found.backend == select(input)
    assert "2 direction(s)" in found.kernel
    assert found.backend in str(found)
    with rnnfast.backend("reference"):
        assert "asked for by name ('reference')" in rnnfast.explain(module, input).reason
    packed = torch.nn.utils.rnn.pack_padded_sequence(input, torch.tensor([4, 2]))
    assert "packed rows" in rnnfast.explain(module, packed).kernel
    assert rnnfast.explain(torch.nn.LSTM(3, 5), input).backend == "torch.nn"

    class Own(rnnfast.LSTM):
        """A subclass that lives elsewhere."""

    assert rnnfast.explain(Own(3, 5), input).backend == found.backend


@pytest.mark.parametrize("kind", ["LSTMCell", "GRUCell", "RNNCell"])
def test_explain_of_cells(kind: str) -> None:
    cell, automatic = getattr(rnnfast, kind)(3, 5), select(torch.zeros(1))
    for input in (torch.randn(2, 3), torch.randn(3)):
        with torch.no_grad():
            found = rnnfast.explain(cell, input)
            assert found.backend == automatic
        if automatic == "cpu":
            assert "inference, one step" in found.kernel
        with rnnfast.backend("reference"):
            assert rnnfast.explain(cell, input).backend == "reference"
        assert rnnfast.explain(getattr(torch.nn, kind)(3, 5), input).kernel == "torch.nn's own"


def test_explain_with_wrong_arguments() -> None:
    with pytest.raises(TypeError, match="module should be an LSTM, GRU, RNN or one of their cells, got Linear"):
        rnnfast.explain(torch.nn.Linear(3, 4), torch.randn(4, 2, 3))
    with pytest.raises(TypeError, match="input should be a tensor or a PackedSequence, got list"):
        rnnfast.explain(rnnfast.LSTM(3, 5), [1.0])
    with pytest.raises(TypeError, match="input should be a tensor, got PackedSequence"):
        rnnfast.explain(rnnfast.LSTMCell(3, 5), torch.nn.utils.rnn.pack_sequence([torch.randn(4, 3)]))


def test_results_agree_across_backends() -> None:
    triton_problem()  # makes Triton's interpreter fit to run
    module = rnnfast.GRU(3, 5, dtype=torch.float64)
    input = torch.randn(4, 2, 3, dtype=torch.float64)
    results: list[Tensor] = []
    for name, entry in rnnfast.backends().items():
        if entry.available:
            with rnnfast.backend(name):
                results.append(module(input)[0])
    for result in results[1:]:
        assert (result - results[0]).abs().max() < 1e-12

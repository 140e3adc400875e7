"""The Triton kernels in Triton's interpreter: the two families, the choice between them, what torch sees of the ops.

test_ops.py and test_parity.py run on the backends `triton` (kernels as they are chosen) and `triton-step` too.
"""

import inspect
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import rnnfast
from cases import MODES, Call, make_call, random_grads, reference, selected
from rnnfast.cell_types import CELLS
from rnnfast.triton import availability
from test_ops import check_results, double
from tolerances import check_equal, error
from triton_interpreter import triton_problem

if (_why := triton_problem()) is not None:
    pytest.skip(_why, allow_module_level=True)

from rnnfast.triton import graphs, layers, plan

FLOATS = [torch.float16, torch.float32]
GATED = [mode for mode in MODES if CELLS[mode].gates > 1]
LAYOUTS: dict[str, dict[str, Any]] = {
    "dense": {"lengths": True, "resets": True},
    "packed": {"layout": "packed", "initial": False},
    "batch first": {"layout": "batch_first", "resets": True},
}


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with rnnfast.backend("triton"):
        yield


@pytest.fixture
def tf32() -> Iterator[Callable[[bool], None]]:
    before = torch.backends.cudnn.rnn.fp32_precision

    def allow(allowed: bool) -> None:
        torch.backends.cudnn.rnn.fp32_precision = "tf32" if allowed else "ieee"

    yield allow
    torch.backends.cudnn.rnn.fp32_precision = before


def both_passes(call: Call) -> dict[str, Tensor]:
    saved = call.forward(selected)
    torch.manual_seed(7)
    return saved | call.backward(selected, random_grads(saved), saved)


# ---- the kernels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, *(pytest.param(dtype, marks=pytest.mark.exhaustive) for dtype in FLOATS)]
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", ["persistent", "step"])
def test_forward_here_and_backward_by_the_cpu_kernels(family: str, mode: str, layout: str, dtype: torch.dtype) -> None:
    """And the reverse: there is one layout of what forward keeps. Two tiles of batch rows, the last one not full."""
    if not rnnfast.backends()["cpu"].available:
        pytest.skip(rnnfast.backends()["cpu"].reason)
    call = make_call(mode, D=2, T=3, B=18, H=13, dtype=dtype, **LAYOUTS[layout])
    with plan.only(family):
        saved = {"triton": call.forward(selected)}
    with rnnfast.backend("cpu"):
        saved["cpu"] = call.forward(selected)
    grads = random_grads(saved["cpu"])
    exact = call.to(torch.float64)
    own, wanted = call.forward(reference), exact.forward(reference)
    check_results(call, saved["triton"], own, wanted, "forward")
    for forward, results in saved.items():
        expected = exact.backward(reference, double(grads), double(results))
        own = call.backward(reference, grads, results)
        with plan.only(family):
            check_results(call, call.backward(selected, grads, results), own, expected, f"{forward}, then triton")
        with rnnfast.backend("cpu"):
            check_results(call, call.backward(selected, grads, results), own, expected, f"{forward}, then cpu")


@pytest.mark.parametrize("batch", [5, 70])
@pytest.mark.parametrize("mode", GATED)
def test_step_kernels_of_every_tile(mode: str, batch: int) -> None:
    """More hidden units than a program's, a sum longer than its chunk; and a large batch, which has its own tiles."""
    call = make_call(mode, T=2, B=batch, H=69, D=1, lengths=True, dtype=torch.float32)
    exact = call.to(torch.float64)
    saved = call.forward(reference)
    grads = random_grads(saved)
    with plan.only("step"):
        check_results(call, call.forward(selected), saved, exact.forward(reference), "forward")
        own, expected = call.backward(reference, grads, saved), exact.backward(reference, double(grads), double(saved))
        check_results(call, call.backward(selected, grads, saved), own, expected, "backward")


@pytest.mark.parametrize("mode", MODES)
def test_the_families_agree(mode: str) -> None:
    call = make_call(mode, D=2, T=4, B=3, H=9, lengths=True, resets=True, dtype=torch.float32)
    results = []
    for family in ("persistent", "step"):
        with plan.only(family):
            results.append(both_passes(call))
    for name, value in results[0].items():
        if name != "reserve":
            assert error(value, results[1][name]) < 1e-5, name


@pytest.mark.parametrize("family", ["persistent", "step"])
def test_no_steps_at_all(family: str) -> None:
    """hx and cx go through, forward and backward."""
    call = make_call("LSTM", D=2, T=0, B=3, H=5, dtype=torch.float32)
    with plan.only(family):
        saved = call.forward(selected)
        assert torch.equal(saved["h_n"], call.hx)
        assert torch.equal(saved["c_n"], call.cx)
        grads = random_grads(saved)
        found = call.backward(selected, grads, saved)
    assert torch.equal(found["grad_hx"], grads["h_n"])
    assert torch.equal(found["grad_cx"], grads["c_n"])


def test_turns_past_the_last_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured graph holds a fixed number of turns: here each call is run with some more."""
    real = graphs.run
    for mode in GATED:
        call = make_call(mode, D=2, T=3, B=4, H=6, P=3 if CELLS[mode].may_project else 0, lengths=True, resets=True)
        expected = both_passes(call)
        with monkeypatch.context() as patch:
            patch.setattr(graphs, "run", lambda key, values, turns, *rest: real(key, values, turns + 4, *rest))
            found = both_passes(call)
        for name, value in expected.items():
            assert name == "reserve" or torch.equal(found[name], value), name


def test_turns_of_a_graph_begin_where_the_last_replay_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The turns of two replays: the same launches, and a table that counts."""

    def replayed(key: Any, values: list[int], turns: int, device: Any, launch: Callable[..., None]) -> None:
        table = graphs.new_table(device)
        graphs.fill(table, values)
        for _ in range(0, turns, 2):
            launch(table, 0)
            launch(table, 1)
            graphs.advance(table, 2)

    call = make_call("LSTM", D=2, T=5, B=4, H=6, lengths=True, resets=True)
    expected = both_passes(call)
    monkeypatch.setattr(graphs, "run", replayed)
    for name, value in both_passes(call).items():
        assert name == "reserve" or torch.equal(expected[name], value), name


# ---- graphs, with a stand-in for the device -------------------------------------------------------------------------


class Fake:
    """Counts what is asked of streams, events and graphs."""

    capturing = False

    def __init__(self, *_: Any, **__: Any) -> None:
        self.replays = 0
        Fake.made.append(self)

    made: list["Fake"]

    def replay(self) -> None:
        self.replays += 1

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """CUDA as far as graphs.py looks."""
    import contextlib

    Fake.made, Fake.capturing = [], False
    monkeypatch.setattr(graphs, "_captured", type(graphs._captured)())
    monkeypatch.setattr(graphs, "new_table", lambda *_: torch.zeros(graphs.tb.SIZE, dtype=torch.int64))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Fake)
    monkeypatch.setattr(torch.cuda, "Event", Fake)
    monkeypatch.setattr(torch.cuda, "Stream", Fake)
    monkeypatch.setattr(torch.cuda, "current_stream", Fake)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: Fake.capturing)
    return torch.device("cuda", 0)


def replays() -> list[int]:
    return [fake.replays for fake in Fake.made if fake.replays]


@pytest.mark.parametrize(
    ("chunk", "counts"),
    [(graphs.SHORT, (graphs.FEWEST_TURNS, graphs.MANY_TURNS - 1, 21)), (graphs.LONG, (graphs.MANY_TURNS, 97, 2000))],
)
def test_one_graph_serves_every_length(device: torch.device, chunk: int, counts: tuple[int, ...]) -> None:
    turns: list[int] = []
    for count in counts:
        values = [0] * graphs.tb.SIZE
        graphs.run("key", values, count, device, lambda table, turn: turns.append(turn))
    # the first call: a stretch launched, so that everything is compiled, and the same captured
    assert turns == [*range(chunk)] * 2
    assert len(graphs._captured) == 1
    assert replays() == [sum(-(-count // chunk) for count in counts) - 1]


def test_what_is_kept_is_made_in_a_thread_of_its_own(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the caller's thread allocates may belong to a pool of torch.compile's."""
    made: dict[int, int] = {}
    launched: list[int] = []
    new_table = graphs.new_table

    def noted(device: torch.device, *size: int) -> Tensor:
        table = new_table(device, *size)
        made[id(table)] = threading.get_ident()
        return table

    monkeypatch.setattr(graphs, "new_table", noted)
    turns = graphs.FEWEST_TURNS
    graphs.run("key", [0] * graphs.tb.SIZE, turns, device, lambda table, turn: launched.append(threading.get_ident()))
    here = threading.get_ident()
    assert [thread == here for thread in launched] == [True] * graphs.SHORT + [False] * graphs.SHORT
    (kept,) = graphs._captured.values()
    assert made[id(kept.table)] != here
    assert here in made.values()


def test_torchs_memory_pools_are_of_one_thread() -> None:
    """So that what another thread allocates is outside of them: cudagraph-trees' warm-up, torch.cuda.use_mem_pool."""
    from torch._inductor import cudagraph_trees

    for pool in (cudagraph_trees._use_cuda_memory_pool_manager, torch.cuda.use_mem_pool):
        begun = re.findall(r"\w*[bB]eginAllocate\w*", inspect.getsource(pool))
        assert begun == ["_cuda_beginAllocateCurrentThreadToPool"], pool.__name__


def test_no_graph_for_few_turns_or_inside_a_capture(device: torch.device) -> None:
    turns: list[int] = []
    graphs.run("key", [0] * graphs.tb.SIZE, graphs.FEWEST_TURNS - 1, device, lambda table, turn: turns.append(turn))
    Fake.capturing = True
    graphs.run("key", [0] * graphs.tb.SIZE, 200, device, lambda table, turn: turns.append(turn))
    assert graphs.FEWEST_TURNS == 8
    assert turns == [*range(7), *range(200)]
    assert not graphs._captured


def test_the_graphs_used_last_are_kept(device: torch.device) -> None:
    for key in [*range(graphs.CAPACITY), 0, graphs.CAPACITY]:
        graphs.run(key, [0] * graphs.tb.SIZE, 100, device, lambda table, turn: None)
    assert [key for key, _ in graphs._captured] == [*range(2, graphs.CAPACITY), 0, graphs.CAPACITY]


# ---- the choice -----------------------------------------------------------------------------------------------------


def test_small_hidden_sizes_run_persistently(tf32: Callable[[bool], None]) -> None:
    cases = [
        (("LSTM", torch.bfloat16, 128, False), "persistent"),
        (("LSTM", torch.bfloat16, 130, False), "step"),
        (("LSTM", torch.bfloat16, 127, False), "step"),
        (("LSTM", torch.bfloat16, 64, True), "step"),
        (("RNN_TANH", torch.float16, 256, False), "persistent"),
        (("GRU", torch.float32, 64, False), "persistent"),
        (("GRU", torch.float64, 8, False), "step"),
    ]
    tf32(True)
    for arguments, expected in cases:
        assert layers.family_of(*arguments) == expected, arguments
    tf32(False)
    assert layers.family_of("GRU", torch.float32, 64, False) == "step"


def test_a_number_of_gates_that_the_table_lacks() -> None:
    """What holds three gates holds two; five no entry is known to hold."""
    for dtype, hidden_size in ((torch.bfloat16, 128), (torch.float32, 64)):
        found = plan.persistent_tiles(2, dtype, "tf32", hidden_size)
        assert found is not None
        assert found == plan.persistent_tiles(3, dtype, "tf32", hidden_size)
        assert plan.persistent_tiles(2, dtype, "tf32", 2 * hidden_size) is None
        assert plan.persistent_tiles(5, dtype, "tf32", 16) is None


def test_a_forced_family_that_cannot_run() -> None:
    call = make_call("LSTM", P=2)
    with plan.only("persistent"), pytest.raises(RuntimeError, match="persistent Triton kernels do not hold H 5"):
        call.forward(selected)


def test_the_flag_decides_how_float32_is_multiplied(tf32: Callable[[bool], None]) -> None:
    for allowed in (True, False):
        tf32(allowed)
        assert layers.precision_of(torch.float32) == ("tf32" if allowed else "ieee")
        assert layers.precision_of(torch.bfloat16) == "ieee"


def test_it_is_listed_and_explained() -> None:
    assert "interpreter" in rnnfast.backends()["triton"].reason
    found = rnnfast.explain(rnnfast.GRU(3, 5, dtype=torch.float64), torch.randn(4, 2, 3, dtype=torch.float64))
    assert (found.backend, found.kernel.partition(" (Triton)")[0]) == ("triton", "one launch a step")
    found = rnnfast.explain(rnnfast.GRU(3, 5, dtype=torch.float16), torch.randn(4, 2, 3, dtype=torch.float16))
    assert found.kernel.startswith("one launch a layer (Triton)")


def test_without_the_interpreter_it_wants_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="'triton' is not available: no CUDA device"), rnnfast.backend("triton"):
        pass
    monkeypatch.setattr(availability, "error", "Triton is not installed: pip install triton")
    with pytest.raises(RuntimeError, match="pip install triton"), rnnfast.backend("triton"):
        pass


# ---- what torch sees ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "P"), [(mode, P) for mode in GATED for P in (0, 2) if not P or CELLS[mode].may_project]
)
def test_opcheck(mode: str, P: int) -> None:
    call = make_call(mode, D=2, T=2, B=3, H=4, P=P, lengths=True, resets=True)
    saved = call.forward(reference)
    grads = [random_grads(saved).get(name) for name in ("output", "h_n", "c_n", "cell_states")]
    layer = (mode, call.input, *call.shared)
    backward = (mode, *grads, *(saved[name] for name in ("output", "cell_states", "reserve")), *call.shared)
    for name, arguments in {"layer_forward": layer, "layer": layer, "recurrence_backward": backward}.items():
        found = torch.library.opcheck(getattr(torch.ops.rnnfast_triton, name).default, arguments)
        assert set(found.values()) == {"SUCCESS"}, (name, found)


class Tagger(torch.nn.Module):
    """A user's model: our layer inside a larger module."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = rnnfast.LSTM(3, 5, bidirectional=True)
        self.head = torch.nn.Linear(10, 2)

    def forward(self, input: Tensor) -> Tensor:
        return self.head(self.rnn(input)[0])


def test_compiles_in_one_graph_for_every_length() -> None:
    model = Tagger()
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for steps in (3, 4):
        input = torch.randn(steps, 2, 3)
        expected, found = model(input), fast(input)
        check_equal("output", found, expected, 1e-6)
        parameters = list(model.parameters())
        for own, other in zip(
            torch.autograd.grad(found.sum(), parameters), torch.autograd.grad(expected.sum(), parameters), strict=True
        ):
            check_equal("gradient", own, other, 1e-5)
    torch._dynamo.reset()


def test_vmap_and_double_backward() -> None:
    module = rnnfast.GRU(2, 3, dtype=torch.float64)
    inputs = torch.randn(2, 2, 2, 2, dtype=torch.float64)
    expected = torch.stack([module(input)[0] for input in inputs])
    assert error(torch.func.vmap(lambda input: module(input)[0])(inputs), expected) < 1e-12
    input = inputs[0, :1].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda value: module(value)[0], (input,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hx": torch.zeros(2, 4, 6)}, r"hx: expected shape \(2, 4, 5\), got \(2, 4, 6\)"),
        ({"hx": torch.zeros(2, 4, 5)}, "hx: expected torch.float64 on cpu, got torch.float32"),
        ({"lengths": torch.tensor([1, 2, 3, 9])}, "lengths: expected values from 0 to 5"),
        ({"resets": torch.zeros(4, 5, dtype=torch.bool)}, "resets: expected bool of shape"),
        ({"mode": "LSTN"}, "mode must be one of"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], message: str) -> None:
    call = make_call("LSTM", D=2)
    for name, value in change.items():
        setattr(call, name, value)
    with pytest.raises(RuntimeError, match=message):
        call.forward(selected)

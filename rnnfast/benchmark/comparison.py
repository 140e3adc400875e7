"""Compares rnnfast's layer with torch.nn's on one case: the results first, then the time, taken in turn."""

from __future__ import annotations

import contextlib
import copy
import os
import statistics
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..backends import NAMES, backend
from ..backends import backends as installed
from ..explanation import explain
from ..quantized_modules import quantize_weights
from .case import Call, Case, Data, Impossible, Layer, compare, exact, make_call, make_data, make_layers, timed_steps
from .cores import core_to_core_ns
from .load import Watch
from .timing import Ratio, capture, interleave, peak_memory, settings

# A row of the result file.
Row = dict[str, Any]

# Builds another library's call for a case from torch.nn's layer and the data. Its results are the first so many of
# those that `make_call` describes. Raises Impossible, with the reason, where the library is missing or lacks the layer.
Peer = Callable[[torch.nn.RNNBase, Case, str, Data], Call]

GRAPH = "-graph"
# Behind the backend that runs the layer with `Case.quantized` weights.
QUANTIZED = "-quantized"
# Digits behind the point that a row keeps. What is smaller still stays above 0: others divide by it.
DIGITS = 4
# Folders of code that is no peer's.
NO_PEERS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1]))
# How many inputs take turns on a CUDA device, where one alone is not much larger than its L2 cache.
INPUTS, LARGE = 3, 32 << 20


def default_backends(device: torch.device) -> list[str]:
    """The backends that are timed unless others are asked for, each also inside a CUDA graph where there are such."""
    if device.type != "cuda":
        return ["cpu" if installed()["cpu"].available else "reference"]
    available = installed()
    names = [name for name in ("cuda", "triton") if available[name].available]
    return [name + suffix for name in names for suffix in ("", GRAPH)]


@dataclass
class Candidate:
    """One of those that are timed. `failure` says why it is not; a candidate has calls (one an input) or a failure."""

    name: str
    # Whether the backend is asked for by name; not where it is rnnfast's own choice, so that the call is a user's.
    asked: bool = True
    calls: list[Call] = field(default_factory=list)
    failure: str | None = None
    plan: str = ""
    peak: int | None = None
    samples: list[float] = field(default_factory=list)
    # Of a peer, whose code may do anything at any time: says what is wrong with its results and its side effects.
    check: Callable[[], str | None] | None = None

    def fail(self, why: str) -> None:
        """From now on it is not timed, and what was timed of it does not count."""
        self.failure = why
        self.calls, self.samples = [], []

    @property
    def context(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """What surrounds its calls: the choice of the backend."""
        if self.check is not None:
            return lambda: _blamed(self)
        eager = self.name.removesuffix(GRAPH)
        if self.asked and (eager in NAMES or eager == "emulated"):
            return lambda: backend(eager)
        return contextlib.nullcontext

    def seconds(self) -> float:
        return statistics.median(self.samples)


class PeerError(Exception):
    """An error of a peer's call while it and others are timed."""

    def __init__(self, peer: Candidate, error: Exception) -> None:
        super().__init__(peer.name)
        self.peer = peer
        self.why = raised(error)


@contextlib.contextmanager
def _blamed(peer: Candidate) -> Iterator[None]:
    """Surrounds a sample of a peer, so that it costs its calls nothing: what they raise is known to be the peer's."""
    try:
        yield
    except Exception as error:
        raise PeerError(peer, error) from error


def raised(error: Exception) -> str:
    """What a peer raised, with the last line of its traceback that is not torch's or rnnfast's own."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(NO_PEERS)] or frames[-1:]
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"raised {first_line(error)}{where}"


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _attempt(name: str, build: Callable[[Candidate], None], asked: bool = True) -> Candidate:
    """A candidate with `build` run on it; an error of the library becomes its failure."""
    candidate = Candidate(name, asked)
    try:
        with candidate.context():
            build(candidate)
    except Impossible:
        raise
    # Whatever a library raises, the other candidates go on.
    except Exception as error:
        candidate.fail(first_line(error))
    return candidate


def _check(candidate: Candidate, truth: Sequence[Tensor], theirs: Sequence[Tensor], tf32: bool) -> None:
    """Checks what the candidate's first call gives; a wrong one loses its calls and is never timed."""
    why = compare(truth, theirs, candidate.calls[0](), tf32)
    if why is not None:
        candidate.fail(why)


def measure(
    case: Case,
    workload: str,
    seconds: float,
    device: torch.device,
    backends: Sequence[str] | None = None,
    peers: Mapping[str, Peer] | None = None,
    tf32: bool = True,
    skipped: Callable[[str, str], None] = lambda name, why: None,
) -> list[Row]:
    """Checks and times one case under one workload.

    Args:
        case: the layer and its shape.
        workload: "inference", "training" or "streaming".
        seconds: how long to measure, all candidates together.
        device: where.
        backends: rnnfast's backends, "-graph" behind a name for the same inside a CUDA graph; "torch-graph" is torch.nn
            inside one. None: `default_backends`.
        peers: other libraries by name.
        tf32: whether float32 products may use TF32 (CUDA; for both sides).
        skipped: told of each peer that cannot take part, and why.

    Returns:
        A row for each backend and each peer. ``ratio`` is torch.nn's time over the row's; a backend inside a graph is
        compared with torch.nn inside a graph (``against`` says which). Where the results are wrong, or the call raises,
        ``correct`` is False, ``failure`` says how, and nothing of it was timed. So it is where a peer raises while
        it is timed, is wrong after it, or changes the input or torch.nn's weights.

    Raises:
        Impossible: the case has no such workload, or the device no graphs.
        ValueError: there is no such backend.
    """
    if case.served:
        raise Impossible("a case with a pause or neighbours needs a process for each candidate: benchmarks/run.py")
    names = with_quantized(checked_names(backends, device), case)
    with settings(device, tf32):
        torch.manual_seed(0)
        theirs, ours = make_layers(case, device)
        data = [make_data(case, device)]
        if device.type == "cuda" and data[0].values.nbytes < LARGE:
            data += [make_data(case, device, seed) for seed in range(1, INPUTS)]
        torch_nn = _baseline(case, workload, theirs, data, device)
        if torch_nn.failure is not None:
            return failed_rows(case, workload, names, device, f"torch.nn: {torch_nn.failure}")
        candidates = _candidates(
            case, workload, theirs, ours, data, names, torch_nn, peers or {}, skipped, device, tf32
        )
        graph = next((candidate for candidate in candidates if candidate.name == "torch" + GRAPH), None)
        candidates = [
            candidate for candidate in candidates if candidate.name in names or candidate.name in (peers or {})
        ]
        extra = _padded_and_dense(case, workload, theirs, ours, data[0], candidates)
        everyone = [torch_nn, *candidates, *([graph] if graph and graph not in candidates else []), *extra]
        conditions = _time(everyone, seconds, device)
    rows = []
    for candidate in candidates:
        in_a_graph = candidate.name.endswith(GRAPH) and candidate is not graph
        against = graph if in_a_graph and graph and graph.samples else torch_nn
        row = row_of(case, workload, candidate, against)
        row["torch_peak_memory_bytes"] = torch_nn.peak
        row.update(conditions)
        if device.type == "cuda":
            row["torch_graph_us_per_step"] = _us_per_step(case, workload, graph)
            row["tf32"] = tf32 and case.dtype == "float32"
        rows.append(row)
    if extra and rows and candidates[0].samples:
        for number, key in enumerate(("over_padded", "over_dense")):
            there, here = extra[2 * number], extra[2 * number + 1]
            rows[0][f"torch_{key}"] = rounded(Ratio.of(torch_nn.samples, there.samples).median)
            rows[0][key] = rounded(Ratio.of(candidates[0].samples, here.samples).median)
    if device.type == "cuda":
        # A graph's memory goes back to the allocator with the graph, but stays cut to its pieces.
        for candidate in everyone:
            candidate.calls = []
        torch.cuda.empty_cache()
    return rows


def checked_names(backends: Sequence[str] | None, device: torch.device) -> list[str]:
    """The names of rnnfast's backends that are compared; None: `default_backends`.

    Raises:
        Impossible: the device has no graphs.
        ValueError: there is no such backend.
    """
    names = list(default_backends(device) if backends is None else backends)
    for name in names:
        if name != "torch" + GRAPH and name.removesuffix(GRAPH) not in (*NAMES, "emulated"):
            raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}, torch-graph")
    if device.type != "cuda" and any(name.endswith(GRAPH) for name in names):
        raise Impossible("CUDA graphs need a CUDA device")
    return names


def with_quantized(names: list[str], case: Case) -> list[str]:
    """The names of rnnfast's candidates, with the one that has quantized weights if the case wants it."""
    return names + ["cpu" + QUANTIZED] * (bool(case.quantized) and "cpu" in names)


def alone(case: Case, workload: str, name: str, peer: Peer | None = None) -> Candidate:
    """One of those that `measure` would compare on the CPU, checked, for who times it in a process of its own: the
    weights and the input are the same in each.

    Args:
        case, workload: as for `measure`.
        name: "torch", one of rnnfast's backends, or a peer's.
        peer: what builds the call of a peer.

    Raises:
        Impossible: the peer does not have what the case needs, or the case no such workload.
    """
    device = torch.device("cpu")
    torch.manual_seed(0)
    theirs, ours = make_layers(case, device)
    data = [make_data(case, device)]
    torch_nn = _baseline(case, workload, theirs, data, device)
    if name == "torch" or torch_nn.failure is not None:
        return torch_nn

    def impossible(name: str, why: str) -> None:
        raise Impossible(why)

    names, others = ([name], {}) if peer is None else ([], {name: peer})
    (found,) = _candidates(case, workload, theirs, ours, data, names, torch_nn, others, impossible, device, tf32=False)
    return found


def _baseline(case: Case, workload: str, theirs: Layer, data: Sequence[Data], device: torch.device) -> Candidate:
    """torch.nn's candidate."""

    def build(candidate: Candidate) -> None:
        candidate.calls = [make_call(theirs, case, workload, each) for each in data]
        candidate.peak = peak_memory(candidate.calls[0], device)

    return _attempt("torch", build)


def failed_rows(case: Case, workload: str, backends: Sequence[str] | None, device: torch.device, why: str) -> list[Row]:
    """The rows of a case that could not be measured at all.

    Args:
        case, workload, backends, device: as for `measure`.
        why: becomes each row's ``failure``.
    """
    names = default_backends(device) if backends is None else backends
    return [row_of(case, workload, Candidate(name, failure=why), None) for name in names]


def _candidates(
    case: Case,
    workload: str,
    theirs: Layer,
    ours: Layer,
    data: Sequence[Data],
    names: Sequence[str],
    torch_nn: Candidate,
    peers: Mapping[str, Peer],
    skipped: Callable[[str, str], None],
    device: torch.device,
    tf32: bool,
) -> list[Candidate]:
    """All that is compared with torch.nn's call, checked; where there are graphs, torch.nn in one too."""
    coarse = tf32 and device.type == "cuda"
    truth = exact(theirs, case, workload, data[0])
    yardstick = [value.detach().clone() for value in torch_nn.calls[0]()]
    # Of one call: a cell gets one step.
    rows = data[0].values[0] if case.cells else data[0].rows

    def of_backend(candidate: Candidate) -> None:
        layer = ours
        if candidate.name.endswith(QUANTIZED):
            layer = copy.deepcopy(ours)
            quantize_weights(layer, case.quantized)
        candidate.calls = [make_call(layer, case, workload, each) for each in data]
        with torch.set_grad_enabled(workload == "training"):
            candidate.plan = explain(layer, rows).kernel
        _check(candidate, truth, yardstick, coarse or (layer is not ours and case.quantized == "int8"))
        if candidate.calls:
            candidate.peak = peak_memory(candidate.calls[0], device)

    def in_graph(candidate: Candidate) -> None:
        layer = theirs if candidate.name == "torch" + GRAPH else ours
        candidate.calls = [capture(make_call(layer, case, workload, each)) for each in data]
        candidate.plan = "CUDA graph"
        _check(candidate, truth, yardstick, coarse)

    wanted = list(names)
    if "torch" + GRAPH not in wanted and any(name.endswith(GRAPH) for name in wanted):
        wanted.append("torch" + GRAPH)
    with torch.no_grad():  # in training of one step it may be torch's own op, which is no backend
        own_choice = explain(ours, rows).backend
    candidates = [
        _attempt(name, in_graph if name.endswith(GRAPH) else of_backend, name.removesuffix(GRAPH) != own_choice)
        for name in wanted
    ]
    for name, peer in peers.items():
        try:
            candidates.append(_peer(name, peer, theirs, case, workload, data, truth, yardstick, coarse))
        except Impossible as reason:
            skipped(name, str(reason))
    return candidates


def _same(one: Tensor, other: Tensor) -> bool:
    alike = (one.dtype, one.device, one.shape) == (other.dtype, other.device, other.shape)
    return alike and torch.equal(one, other)


def _peer(
    name: str,
    peer: Peer,
    theirs: Layer,
    case: Case,
    workload: str,
    data: Sequence[Data],
    truth: Sequence[Tensor],
    yardstick: Sequence[Tensor],
    coarse: bool,
) -> Candidate:
    """A peer's candidate, checked. It has torch.nn's own weights and the input of all in its hands: where it changes
    them they are put back, since the others go on with them.

    Raises:
        Impossible: the peer does not have what the case needs.
    """
    if not isinstance(theirs, torch.nn.RNNBase):
        raise Impossible("a peer is a layer, and this case is a loop of cells")
    candidate = Candidate(name)
    shared: dict[str, Tensor] = {f"the weights ({key})": value for key, value in theirs.named_parameters()}
    for number, each in enumerate(data):
        of_case = {"the input": each.values, "the lengths": each.lengths, "the resets": each.resets}
        shared |= {f"{key}{f' {number}' * (number > 0)}": value for key, value in of_case.items() if value is not None}
    # The same memory, to which other calls have views of their own, and what stands in it.
    memory = {key: value.detach() for key, value in shared.items()}
    kept = {key: value.clone() for key, value in memory.items()}

    def changed() -> str | None:
        touched = [key for key, value in shared.items() if not _same(value, kept[key])]
        for key in touched:
            memory[key].copy_(kept[key])
            # `layer.half()` and the like have given it other memory.
            shared[key].data = memory[key]
        return f"changed {touched[0]}" if touched else None

    def check() -> str | None:
        wrong = compare(truth, yardstick, candidate.calls[0](), coarse)
        return changed() or wrong

    try:
        for each in data:
            call: Any = peer(theirs, case, workload, each)
            if not callable(call):
                candidate.fail(f"peer: expected a function without arguments, got {type(call).__name__}")
                break
            candidate.calls.append(call)
        if candidate.calls and (why := check()) is not None:
            candidate.fail(why)
    except Impossible:
        changed()
        raise
    # Whatever another's code raises, the other candidates go on.
    except Exception as error:
        candidate.fail(raised(error))
    changed()
    candidate.check = check
    return candidate


def _time(candidates: Sequence[Candidate], seconds: float, device: torch.device) -> Row:
    """Fills in the samples of the candidates that have calls.

    Returns:
        What a row says of the machine meanwhile: the fields of `Watch`, and on the CPU ``core_to_core_ns``, how far
        apart its cores were, in nanoseconds: no farther in four of five rounds.
    """
    # A GPU is fed by one thread.
    watch = Watch(torch.get_num_threads() if device.type == "cpu" else 1, seconds)
    apart: Row = {"core_to_core_ns": None} if device.type == "cpu" else {}
    distances: list[float] = []

    def look() -> None:
        if device.type == "cpu" and (distance := core_to_core_ns()) is not None:
            distances.append(distance)

    while True:
        runners = [candidate for candidate in candidates if candidate.calls]
        # torch.nn alone says nothing.
        if len(runners) < 2:
            return apart
        calls = [candidate.calls for candidate in runners]
        contexts = [candidate.context for candidate in runners]
        distances.clear()
        try:
            with watch:
                taken = interleave(calls, seconds, device, contexts, look)
            break
        # The others are timed again without it: their rounds are to be whole.
        except PeerError as error:
            error.peer.fail(f"{error.why} while it was timed")
    for candidate, samples in zip(runners, taken, strict=True):
        candidate.samples = samples
    for candidate in runners:
        check_again(candidate)
    if distances:
        apart["core_to_core_ns"] = round(sorted(distances)[-1 - len(distances) // 5], 1)
    return {**apart, **watch.fields}


def check_again(candidate: Candidate) -> None:
    """A peer that was right at first may have stopped to be so while it was timed."""
    if candidate.check is None:
        return
    try:
        why = candidate.check()
    except Exception as error:
        why = raised(error)
    if why is not None:
        candidate.fail(f"{why}, after the timing")


def _padded_and_dense(
    case: Case,
    workload: str,
    theirs: Layer,
    ours: Layer,
    data: Data,
    candidates: Sequence[Candidate],
) -> list[Candidate]:
    """What a packed case is compared with besides: torch.nn's and rnnfast's calls on the same rows padded (results
    beyond a row's end are nobody's), then on a dense batch of exactly as many tokens."""
    if not case.packed or not candidates or not candidates[0].calls:
        return []
    assert isinstance(data.rows, PackedSequence)
    padded, _ = pad_packed_sequence(data.rows)
    dense = torch.randn(case.steps, case.batch, case.inputs).to(data.values)
    return [
        Candidate(name, candidates[0].asked, [make_call(layer, case, workload, Data(rows))])
        for rows in (padded, dense)
        for layer, name in ((theirs, "torch"), (ours, candidates[0].name))
    ]


def _us_per_step(case: Case, workload: str, candidate: Candidate | None) -> float | None:
    if candidate is None or not candidate.samples:
        return None
    return rounded(candidate.seconds() * 1e6 / timed_steps(case, workload))


def rounded(value: float) -> float:
    """A time or ratio as a row has it: above 0."""
    return max(round(value, DIGITS), 10.0**-DIGITS)


def row_of(case: Case, workload: str, candidate: Candidate, against: Candidate | None) -> Row:
    """The result file's fields in their order, then what may be useful besides."""
    us, torch_us = _us_per_step(case, workload, candidate), _us_per_step(case, workload, against)
    timed = us is not None and against is not None and against.samples
    ratio = Ratio.of(against.samples, candidate.samples) if timed and against else None
    seconds = us / 1e6 if us else None
    return {
        **case.row,
        "workload": workload,
        "backend": candidate.name,
        "us_per_step": us,
        "torch_us_per_step": torch_us,
        "ratio": rounded(ratio.median) if ratio else None,
        "p20": rounded(ratio.p20) if ratio else None,
        "p80": rounded(ratio.p80) if ratio else None,
        # Whoever knows the machine fills these two in.
        "limit_us_per_step": None,
        "plan": candidate.plan,
        "correct": candidate.failure is None,
        "failure": candidate.failure,
        "against": against.name if against else None,
        "tokens_per_s": round(case.batch / seconds) if seconds else None,
        "gflop_per_s": round(case.flops(workload) / seconds / 1e9, 1) if seconds else None,
        "gbyte_per_s": round(case.bytes(workload) / seconds / 1e9, 2) if seconds else None,
        "percent_of_limit": None,
        "peak_memory_bytes": candidate.peak,
        "rounds": len(candidate.samples),
    }

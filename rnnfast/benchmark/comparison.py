"""Compares rnnfast's layer with torch.nn's on one case: the results first, then the time, taken in turn."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from ..backends import NAMES, backend
from ..backends import backends as installed
from ..explanation import explain
from .case import Call, Case, Data, Impossible, compare, exact, make_call, make_data, make_layers, timed_steps
from .cores import core_to_core_ns
from .timing import Ratio, capture, interleave, peak_memory, settings

# A row of the result file.
Row = dict[str, Any]

# Builds another library's call for a case from torch.nn's layer and the data. Its results are the first so many of
# those that `make_call` describes. Raises Impossible, with the reason, where the library is missing or lacks the layer.
Peer = Callable[[torch.nn.RNNBase, Case, str, Data], Call]

GRAPH = "-graph"
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
class _Candidate:
    """One of those that are timed. `failure` says why it is not; a candidate has calls (one an input) or a failure."""

    name: str
    # Whether the backend is asked for by name; not where it is rnnfast's own choice, so that the call is a user's.
    asked: bool = True
    calls: list[Call] = field(default_factory=list)
    failure: str | None = None
    plan: str = ""
    peak: int | None = None
    samples: list[float] = field(default_factory=list)

    @property
    def context(self) -> Callable[[], contextlib.AbstractContextManager[object]]:
        """What surrounds its calls: the choice of the backend."""
        eager = self.name.removesuffix(GRAPH)
        if self.asked and (eager in NAMES or eager == "emulated"):
            return lambda: backend(eager)
        return contextlib.nullcontext

    def seconds(self) -> float:
        return statistics.median(self.samples)


def _attempt(name: str, build: Callable[[_Candidate], None], asked: bool = True) -> _Candidate:
    """A candidate with `build` run on it; an error of the library becomes its failure."""
    candidate = _Candidate(name, asked)
    try:
        with candidate.context():
            build(candidate)
    except Impossible:
        raise
    # Whatever a library raises, the other candidates go on.
    except Exception as error:
        candidate.calls = []
        candidate.failure = f"{type(error).__name__}: {error}".splitlines()[0]
    return candidate


def _check(candidate: _Candidate, truth: Sequence[Tensor], theirs: Sequence[Tensor], tf32: bool) -> None:
    """Checks what the candidate's first call gives; a wrong one loses its calls and is never timed."""
    candidate.failure = compare(truth, theirs, candidate.calls[0](), tf32)
    if candidate.failure is not None:
        candidate.calls = []


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
        ``correct`` is False, ``failure`` says how, and nothing of it was timed.

    Raises:
        Impossible: the case has no such workload, or the device no graphs.
        ValueError: there is no such backend.
    """
    names = list(default_backends(device) if backends is None else backends)
    for name in names:
        if name != "torch" + GRAPH and name.removesuffix(GRAPH) not in (*NAMES, "emulated"):
            raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(NAMES)}, torch-graph")
    if device.type != "cuda" and any(name.endswith(GRAPH) for name in names):
        raise Impossible("CUDA graphs need a CUDA device")
    with settings(device, tf32):
        torch.manual_seed(0)
        theirs, ours = make_layers(case, device)
        data = [make_data(case, device)]
        if device.type == "cuda" and data[0].values.nbytes < LARGE:
            data += [make_data(case, device, seed) for seed in range(1, INPUTS)]

        def baseline(candidate: _Candidate) -> None:
            candidate.calls = [make_call(theirs, case, workload, each) for each in data]
            candidate.peak = peak_memory(candidate.calls[0], device)

        torch_nn = _attempt("torch", baseline)
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
        distance = _time(everyone, seconds, device)
    rows = []
    for candidate in candidates:
        in_a_graph = candidate.name.endswith(GRAPH) and candidate is not graph
        against = graph if in_a_graph and graph and graph.samples else torch_nn
        row = _row(case, workload, candidate, against)
        row["torch_peak_memory_bytes"] = torch_nn.peak
        if device.type == "cpu":
            row["core_to_core_ns"] = distance
        if device.type == "cuda":
            row["torch_graph_us_per_step"] = _us_per_step(case, workload, graph)
            row["tf32"] = tf32 and case.dtype == "float32"
        rows.append(row)
    if extra and rows and candidates[0].samples:
        for number, key in enumerate(("over_padded", "over_dense")):
            there, here = extra[2 * number], extra[2 * number + 1]
            rows[0][f"torch_{key}"] = round(Ratio.of(torch_nn.samples, there.samples).median, 4)
            rows[0][key] = round(Ratio.of(candidates[0].samples, here.samples).median, 4)
    if device.type == "cuda":
        # A graph's memory goes back to the allocator with the graph, but stays cut to its pieces.
        for candidate in everyone:
            candidate.calls = []
        torch.cuda.empty_cache()
    return rows


def failed_rows(case: Case, workload: str, backends: Sequence[str] | None, device: torch.device, why: str) -> list[Row]:
    """The rows of a case that could not be measured at all.

    Args:
        case, workload, backends, device: as for `measure`.
        why: becomes each row's ``failure``.
    """
    names = default_backends(device) if backends is None else backends
    return [_row(case, workload, _Candidate(name, failure=why), None) for name in names]


def _candidates(
    case: Case,
    workload: str,
    theirs: torch.nn.RNNBase,
    ours: torch.nn.RNNBase,
    data: Sequence[Data],
    names: Sequence[str],
    torch_nn: _Candidate,
    peers: Mapping[str, Peer],
    skipped: Callable[[str, str], None],
    device: torch.device,
    tf32: bool,
) -> list[_Candidate]:
    """All that is compared with torch.nn's call, checked; where there are graphs, torch.nn in one too."""
    coarse = tf32 and device.type == "cuda"
    truth = exact(theirs, case, workload, data[0])
    yardstick = [value.detach().clone() for value in torch_nn.calls[0]()]

    def of_backend(candidate: _Candidate) -> None:
        candidate.calls = [make_call(ours, case, workload, each) for each in data]
        with torch.set_grad_enabled(workload == "training"):
            candidate.plan = explain(ours, data[0].rows).kernel
        _check(candidate, truth, yardstick, coarse)
        if candidate.calls:
            candidate.peak = peak_memory(candidate.calls[0], device)

    def in_graph(candidate: _Candidate) -> None:
        layer = theirs if candidate.name == "torch" + GRAPH else ours
        candidate.calls = [capture(make_call(layer, case, workload, each)) for each in data]
        candidate.plan = "CUDA graph"
        _check(candidate, truth, yardstick, coarse)

    wanted = list(names)
    if "torch" + GRAPH not in wanted and any(name.endswith(GRAPH) for name in wanted):
        wanted.append("torch" + GRAPH)
    with torch.no_grad():  # in training of one step it may be torch's own op, which is no backend
        own_choice = explain(ours, data[0].rows).backend
    candidates = [
        _attempt(name, in_graph if name.endswith(GRAPH) else of_backend, name.removesuffix(GRAPH) != own_choice)
        for name in wanted
    ]
    for name, peer in peers.items():

        def of_peer(candidate: _Candidate, peer: Peer = peer) -> None:
            candidate.calls = [peer(theirs, case, workload, each) for each in data]
            _check(candidate, truth, yardstick, coarse)

        try:
            candidates.append(_attempt(name, of_peer))
        except Impossible as reason:
            skipped(name, str(reason))
    return candidates


def _time(candidates: Sequence[_Candidate], seconds: float, device: torch.device) -> float | None:
    """Fills in the samples of the candidates that have calls.

    Returns:
        On the CPU how far apart its cores were, in nanoseconds (`core_to_core_ns`): no farther in four of five rounds.
    """
    runners = [candidate for candidate in candidates if candidate.calls]
    # torch.nn alone says nothing.
    if len(runners) < 2:
        return None
    calls = [candidate.calls for candidate in runners]
    contexts = [candidate.context for candidate in runners]
    distances: list[float] = []

    def look() -> None:
        if device.type == "cpu" and (distance := core_to_core_ns()) is not None:
            distances.append(distance)

    for candidate, samples in zip(runners, interleave(calls, seconds, device, contexts, look), strict=True):
        candidate.samples = samples
    return round(sorted(distances)[-1 - len(distances) // 5], 1) if distances else None


def _padded_and_dense(
    case: Case,
    workload: str,
    theirs: torch.nn.RNNBase,
    ours: torch.nn.RNNBase,
    data: Data,
    candidates: Sequence[_Candidate],
) -> list[_Candidate]:
    """What a packed case is compared with besides: torch.nn's and rnnfast's calls on the same rows padded (results
    beyond a row's end are nobody's), then on a dense batch of exactly as many tokens."""
    if not case.packed or not candidates or not candidates[0].calls:
        return []
    assert isinstance(data.rows, PackedSequence)
    padded, _ = pad_packed_sequence(data.rows)
    dense = torch.randn(case.steps, case.batch, case.inputs).to(data.values)
    return [
        _Candidate(name, candidates[0].asked, [make_call(layer, case, workload, Data(rows))])
        for rows in (padded, dense)
        for layer, name in ((theirs, "torch"), (ours, candidates[0].name))
    ]


def _us_per_step(case: Case, workload: str, candidate: _Candidate | None) -> float | None:
    if candidate is None or not candidate.samples:
        return None
    return round(candidate.seconds() * 1e6 / timed_steps(case, workload), 4)


def _row(case: Case, workload: str, candidate: _Candidate, against: _Candidate | None) -> Row:
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
        "ratio": round(ratio.median, 4) if ratio else None,
        "p20": round(ratio.p20, 4) if ratio else None,
        "p80": round(ratio.p80, 4) if ratio else None,
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

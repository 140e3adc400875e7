"""cuDNN's own time a step, through torch.nn: LSTM and GRU over hidden sizes, batch sizes and types, inference and
training, called and as a CUDA graph. What the kernels of rnnfast have to beat; nothing of rnnfast runs here.

Prints one JSON object a line: {"what": "cudnn", "cell", "dtype", "T", "B", "H", "workload", "graph", "us"}, `us` in
microseconds a step, the input's product (I = H) included; or "error" in place of "us". float32 is TF32, as the others
use tensor cores too. Exit status 3: no CUDA device.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch

CELLS = ("LSTM", "GRU")
DTYPES = ("bfloat16", "float16", "float32")
HIDDEN_SIZES = (64, 128, 192, 256, 512, 768, 1024, 2048)
BATCH_SIZES = (1, 16, 64, 256)
WORKLOADS = ("inference", "training")


def layer_call(cell: str, dtype: str, steps: int, batch: int, hidden: int, workload: str) -> Callable[[], object]:
    """A call of torch.nn's layer: inference, or forward and backward (gradients of input and weights)."""
    options: dict[str, Any] = {"device": "cuda", "dtype": getattr(torch, dtype)}
    layer = getattr(torch.nn, cell)(hidden, hidden, **options)
    layer.flatten_parameters()
    input = torch.randn(steps, batch, hidden, **options)
    if workload == "inference":
        layer.eval()

        def forward() -> object:
            with torch.no_grad():
                return layer(input)

        return forward
    input.requires_grad_()
    grad = torch.randn(steps, batch, hidden, **options)
    leaves = [input, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(input)[0], leaves, grad)


def graph_of(call: Callable[[], object]) -> Callable[[], object]:
    """The call captured: what replays it. Torch wants some runs on another stream first."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = call()

    def replay(kept: object = kept) -> object:  # holds on to the results, whose memory the graph writes
        graph.replay()
        return kept

    return replay


def microseconds(call: Callable[[], object], seconds: float) -> float:
    """Median time of a call by CUDA events, over at least five samples and about `seconds`."""

    def sample(repeats: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end) / repeats

    for _ in range(2):
        call()
    # A sample of about a millisecond: several short calls, one long one.
    repeats = max(1, min(100, round(1e3 / sample(1))))
    stop = time.perf_counter() + seconds
    samples = [sample(repeats) for _ in range(5)]
    while time.perf_counter() < stop and len(samples) < 100:
        samples.append(sample(repeats))
    return statistics.median(samples)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120, help="stop after so long (default 120)")
    parser.add_argument("--steps", type=int, default=128, help="T (default 128)")
    parser.add_argument("--each", type=float, default=0.02, help="seconds a measurement (default 0.02)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"cudnn.py: no CUDA device (torch {torch.__version__})", file=sys.stderr)
        return 3
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    stop = time.perf_counter() + options.seconds
    cases = list(product(CELLS, DTYPES, HIDDEN_SIZES, BATCH_SIZES))
    # In no order, so that what does not fit into the time is missing evenly.
    random.Random(0).shuffle(cases)
    left_out = 0
    for cell, dtype, hidden, batch in cases:
        if time.perf_counter() > stop:
            left_out += 1
            continue
        for workload in WORKLOADS:
            row = {"what": "cudnn", "cell": cell, "dtype": dtype, "T": options.steps, "B": batch, "H": hidden}
            for graphed in (False, True):
                result: dict[str, Any] = {"workload": workload, "graph": graphed}
                try:
                    call = layer_call(cell, dtype, options.steps, batch, hidden, workload)
                    us = microseconds(graph_of(call) if graphed else call, options.each)
                    result["us"] = round(us / options.steps, 4)
                except RuntimeError as error:  # out of memory; a path that cannot be captured
                    result["error"] = str(error).splitlines()[0]
                print(json.dumps({**row, **result}), flush=True)
    print(json.dumps({"what": "cudnn_end", "left_out": left_out, "cudnn": torch.backends.cudnn.version()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Small calls of every kernel, forward and backward: what compute-sanitizer looks at in test_gpu_sanitizer.py.

RNNFAST_GPU_TESTS_DEVICE=cpu python tests/gpu/sanitized.py     # the same calls on the CPU kernels
"""

import itertools
import os
import sys
from pathlib import Path

import torch

# The tests' helpers, and rnnfast where it is not installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cases import MODES, make_call, random_grads, selected
from rnnfast import backend

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    {"T": 3, "B": 3, "H": 5, "D": 2, "lengths": True, "resets": True},
    {"T": 3, "B": 9, "H": 33, "D": 2, "layout": "packed"},
    {"T": 2, "B": 17, "H": 64, "D": 1, "layout": "batch_first", "initial": False},
    {"T": 2, "B": 1, "H": 1, "D": 1, "bias": False},
]


def main(device: str) -> None:
    """Runs every call; TF32 recurrences too where the device has them."""
    torch.manual_seed(0)
    count = 0
    for tf32, mode, dtype, shape in itertools.product([False, True], MODES, DTYPES, SHAPES):
        if tf32 and dtype != torch.float32:
            continue
        torch.backends.cudnn.allow_tf32 = tf32
        for P in (0, 3) if mode == "LSTM" else (0,):
            call = make_call(mode, P=P, dtype=dtype, **shape).on(device)
            saved = call.forward(selected)
            call.backward(selected, random_grads(saved), saved)
            call.inference(selected)
            count += 1
    if device == "cuda":
        torch.cuda.synchronize()
    print(f"{count} calls on {device}")


if __name__ == "__main__":
    chosen = os.environ.get("RNNFAST_GPU_TESTS_DEVICE", "cuda")
    with backend(chosen):
        main(chosen)

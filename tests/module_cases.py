"""What the tests of the modules share: the kinds and options, pairs of modules, comparisons."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.testing import assert_close

import rnnfast

KINDS = ["LSTM", "GRU", "RNN"]
OPTIONS = [
    {},
    {"num_layers": 3},
    {"bias": False},
    {"batch_first": True},
    {"bidirectional": True},
    {"num_layers": 2, "bidirectional": True, "bias": False, "batch_first": True, "dropout": 0.1},
]
PROJECTED = [{"proj_size": 2}, {"proj_size": 2, "num_layers": 2, "bidirectional": True, "bias": False}]
CASES = [(kind, options) for kind in KINDS for options in OPTIONS] + [("LSTM", options) for options in PROJECTED]


def torch_autocasts(kind: str, dtype: torch.dtype) -> bool:
    """Whether torch.nn's layer runs under autocast on the CPU: its LSTM is then oneDNN's, which has no float16 and
    bfloat16 not on every processor."""
    return kind != "LSTM" or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pair(kind, *args, **kwargs):
    """torch.nn's module and ours, with the same parameters."""
    torch.manual_seed(7)
    theirs = getattr(nn, kind)(*args, **kwargs)
    torch.manual_seed(7)
    return theirs, getattr(rnnfast, kind)(*args, **kwargs)


def state(kind, *shape, dtype=torch.float64):
    hx = torch.randn(*shape, dtype=dtype)
    return (hx, torch.randn(*shape, dtype=dtype)) if kind == "LSTM" else hx


def leaves(results):
    """The tensors in a result, PackedSequences opened."""
    if isinstance(results, PackedSequence):
        return [tensor for tensor in results if tensor is not None]
    if isinstance(results, torch.Tensor):
        return [results]
    return [tensor for item in results for tensor in leaves(item)]


def same(ours, theirs):
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        assert_close(a, b)


def raised(call):
    """Type and text of what `call` raises."""
    with pytest.raises(Exception) as caught, warnings.catch_warnings():  # noqa: PT012
        warnings.simplefilter("ignore")
        call()
    return type(caught.value), str(caught.value)


R = torch.randn


def random_states(kind, *shape):
    return (R(*shape), R(*shape)) if kind == "LSTM" else R(*shape)

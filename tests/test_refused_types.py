"""Types that layers cannot compute in, under autocast too, which would cast them; lengths of every integer type."""

import contextlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import rnnfast
from module_cases import KINDS, leaves, pair, raised
from rnnfast import functional

CELLS = [f"{kind}Cell" for kind in KINDS]
REFUSED = [torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]


def retyped(module, dtype):
    """`module` with all its weights of `dtype`, which an optimizer would not take."""
    for name, weight in list(module.named_parameters()):
        delattr(module, name)
        setattr(module, name, nn.Parameter(weight.detach().to(dtype), requires_grad=False))
    return module


@pytest.mark.parametrize("kind", KINDS + CELLS)
@pytest.mark.parametrize("dtype", REFUSED)
@pytest.mark.parametrize("which", ["input", "hidden", "parameter", "all"])
def test_layers_and_cells_refuse(kind, dtype, which):
    """torch.nn raises a RuntimeError, or a NotImplementedError, which is one; but it computes with complex numbers."""
    layer, cell = getattr(rnnfast, kind)(4, 5), kind in CELLS
    if which in ("parameter", "all"):
        retyped(layer, dtype)
    input = torch.ones((3, 4) if cell else (6, 3, 4), dtype=dtype if which in ("input", "all") else None)
    hx = torch.ones((3, 5) if cell else (1, 3, 5), dtype=dtype if which in ("hidden", "all") else None)
    states = [(hx, hx) if kind.startswith("LSTM") else hx]
    for given in ([*states], [None]) if which != "hidden" else ([*states],):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert raised(lambda given=given: layer(input, *given)) == (
                RuntimeError,
                f"Expected {which if which != 'all' else 'input'} tensors of a floating type "
                f"(float32, float64, bfloat16 or float16), found {dtype}",
            )
        with rnnfast.backend("reference") if which == "all" else contextlib.nullcontext():
            if which == "all" and dtype.is_complex:
                assert leaves(layer(input, *given))[0].dtype == dtype
            else:
                assert issubclass(raised(lambda given=given: layer(input, *given))[0], (RuntimeError, ValueError))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", REFUSED)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_functional_forms_refuse(kind, dtype, autocast):
    call = getattr(functional, kind.lower())
    weights = [weight.detach() for weight in getattr(rnnfast, kind)(4, 5).parameters()]
    input, hx = torch.randn(6, 3, 4), torch.zeros(1, 3, 5)
    wrong = hx.to(dtype)
    cases = {
        "input": (input.to(dtype), weights, None),
        "weights": (input, [weight.to(dtype) for weight in weights], None),
        "hx": (input, weights, (wrong, hx) if kind == "LSTM" else wrong),
        "hx.*": (input, weights, (hx, wrong) if kind == "LSTM" else wrong),
    }
    for label, given in cases.items():
        message = (
            f"{label}.* {dtype}" if autocast is False else f"{label}.* should be of a floating type .*, got {dtype}"
        )
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast), pytest.raises(ValueError, match=message):
            call(*given)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given", [False, True], ids=["zeros", "hx"])
def test_the_functional_forms_need_a_step(kind, batch_first, given):
    call, layer = getattr(functional, kind.lower()), getattr(rnnfast, kind)(4, 5, batch_first=batch_first)
    hx = torch.zeros(1, 3, 5, requires_grad=True)
    hx = ((hx, hx) if kind == "LSTM" else hx) if given else None
    input = torch.randn(3, 0, 4) if batch_first else torch.randn(0, 3, 4)
    text = "Expected sequence length to be larger than 0 in RNN"
    with pytest.raises(ValueError, match=f"^{kind.lower()}: {text}, got input of shape"):
        call(input, list(layer.parameters()), hx, batch_first=batch_first)
    with pytest.raises(ValueError, match=text):
        call(torch.randn(0, 4), list(layer.parameters()), hx, batch_sizes=torch.zeros(0, dtype=torch.int64))
    assert raised(lambda: layer(input, hx)) == (RuntimeError, text)
    assert call(torch.randn(6, 0, 4).transpose(0, int(batch_first)), list(layer.parameters()), batch_first=batch_first)


INTEGERS = [torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", INTEGERS)
def test_lengths_of_every_integer_type(kind, dtype):
    layer, input = getattr(rnnfast, kind)(4, 5), torch.randn(6, 3, 4)
    expected = layer(input, lengths=[6, 0, 2])[0]
    assert torch.equal(layer(input, lengths=torch.tensor([6, 0, 2], dtype=dtype))[0], expected)
    low, high = torch.iinfo(dtype).min, torch.iinfo(dtype).max
    for wrong in [7, high] + ([-1, low] if low < 0 else []):
        text = f"lengths should be from 0 to T = 6, got {wrong}"
        assert raised(lambda wrong=wrong: layer(input, lengths=torch.tensor([2, wrong, 6], dtype=dtype))) == (
            ValueError,
            text,
        )
    for wrong in (2**63, 2**64, -(2**64)):
        with pytest.raises(ValueError, match="lengths should be from 0 to T = 6, got"):
            layer(input, lengths=[2, wrong, 6])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch_first", [False, True])
def test_lengths_do_not_depend_on_the_default_device(kind, batch_first):
    """A list becomes a tensor: on the CPU, where it can be checked."""
    theirs, ours = pair(kind, 4, 5, bidirectional=True, batch_first=batch_first)
    input = torch.randn(3, 6, 4) if batch_first else torch.randn(6, 3, 4)
    packed = nn.utils.rnn.pack_padded_sequence(input, [6, 4, 1], batch_first=batch_first)
    with torch.device("meta"):
        output = ours(input, lengths=[6, 4, 1])[0]
        assert raised(lambda: ours(input, lengths=[7, 4, 1]))[0] is ValueError
        no_rows = input[:0] if batch_first else input[:, :0]
        assert ours(no_rows, lengths=[])[0].shape == (*no_rows.shape[:2], 10)
    expected = nn.utils.rnn.pad_packed_sequence(theirs(packed)[0], batch_first=batch_first)[0]
    assert_close(output, expected)

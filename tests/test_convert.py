"""Layers made of haste's and FlashRNN's weights, against loops of numpy written from their equations; and what all
layers that were converted have in common."""

import copy
import pickle
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from convert_cases import Array, F, H, N, T, check_layer, keras_arrays, keras_loop, over_time, sigmoid
from rnnfast import convert


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


# --- Haste --------------------------------------------------------------------------------------------------------


def haste_arrays(rng: np.random.Generator, name: str) -> dict[str, Array]:
    width = (4 if name.endswith("LSTM") else 3) * H
    shapes: dict[str, tuple[int, ...]] = {"kernel": (F, width), "recurrent_kernel": (H, width), "bias": (width,)}
    shapes |= {"recurrent_bias": (width,)} if name.endswith("GRU") else {}
    shapes |= {"gamma": (2, width)} if name.startswith("LayerNorm") else {}
    shapes |= {"gamma_h": (H,), "beta_h": (H,)} if name == "LayerNormLSTM" else {}
    return {key: rng.normal(size=shape) for key, shape in shapes.items()}


def layer_norm(x: Array, weight: Array, bias: Array | float = 0.0) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def haste_loop(name: str, a: dict[str, Array], x: Array, zoneout: float = 0.0) -> list[Array]:
    """The `...Script` functions of lmnt-com/haste, frameworks/pytorch, in evaluation."""

    def norm(value: Array, n: int) -> Array:
        return layer_norm(value, a["gamma"][n]) if "gamma" in a else value

    def keep(h: Array, new: Array) -> Array:
        return zoneout * h + (1 - zoneout) * new

    def lstm(x_t: Array, h: Array, c: Array) -> tuple[Array, Array]:
        v = norm(h @ a["recurrent_kernel"], 1) + norm(x_t @ a["kernel"], 0) + a["bias"]
        i, g, f, o = np.split(v, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        inner = layer_norm(c, a["gamma_h"], a["beta_h"]) if "gamma_h" in a else c
        return keep(h, sigmoid(o) * np.tanh(inner)), c

    def gru(x_t: Array, h: Array) -> tuple[Array]:
        vx = np.split(norm(x_t @ a["kernel"], 0) + a["bias"], 3, axis=1)
        vh = np.split(norm(h @ a["recurrent_kernel"], 1) + a["recurrent_bias"], 3, axis=1)
        z, r = sigmoid(vx[0] + vh[0]), sigmoid(vx[1] + vh[1])
        g = np.tanh(vx[2] + r * vh[2])
        return (keep(h, z * h + (1 - z) * g),)

    zeros = np.zeros((x.shape[1], H))
    return over_time(lstm, x, zeros, zeros) if name.endswith("LSTM") else over_time(gru, x, zeros)


HASTE = ["LSTM", "GRU", "LayerNormLSTM", "LayerNormGRU"]


@pytest.mark.parametrize("zoneout", [0.0, 0.3])
@pytest.mark.parametrize("name", HASTE)
def test_haste(name: str, zoneout: float, rng: np.random.Generator) -> None:
    arrays, x = haste_arrays(rng, name), rng.normal(size=(T, N, F))
    # A module as far as `from_haste` looks at it.
    theirs = nn.Module()
    for key, value in arrays.items():
        theirs.register_parameter(key, nn.Parameter(torch.as_tensor(value)))
    theirs.batch_first, theirs.zoneout, theirs.dropout = True, zoneout, 0.25
    module = convert.from_haste(theirs)
    assert module.batch_first
    assert "weight_dropout=0.25" in module.extra_repr()
    check_layer(module, x, [haste_loop(name, arrays, x, zoneout)])
    whole = nn.ModuleDict({"encoder": theirs, "other": nn.Linear(2, 2)})
    of_state = convert.from_haste(whole.state_dict(), prefix="encoder.", zoneout=zoneout)
    assert not of_state.batch_first
    check_layer(of_state, x, [haste_loop(name, arrays, x, zoneout)])


def test_haste_errors(rng: np.random.Generator) -> None:
    arrays = haste_arrays(rng, "LSTM")
    with pytest.raises(TypeError, match=r"^from_haste: source: expected a module or a state dict, got list"):
        convert.from_haste([])
    with pytest.raises(ValueError, match=r"prefix='a\.', got none"):
        convert.from_haste(arrays, prefix="a.")
    with pytest.raises(ValueError, match="got bias, kernel, recurrent_scale"):
        convert.from_haste({"kernel": 0, "recurrent_scale": 0, "bias": 0})
    with pytest.raises(ValueError, match=r"^from_haste: bias: expected shape \(16,\), got \(4,\)"):
        convert.from_haste({**arrays, "bias": arrays["bias"][:4]})
    with pytest.raises(ValueError, match=r"^from_haste: recurrent_kernel: expected shape \(4, 12\), got \(4, 16\)"):
        convert.from_haste({**arrays, "recurrent_bias": arrays["bias"], "kernel": arrays["kernel"][:, :12]})


# --- FlashRNN -----------------------------------------------------------------------------------------------------

HEADS = [1, 2, 4]
FLASH_GATES = {"lstm": (4, 4), "gru": (3, 4), "elman": (1, 1)}


def flashrnn_loop(function: str, wx: Array, R: Array, b: Array) -> list[Array]:
    """flashrnn/flashrnn/vanilla of NX-AI/flashrnn: Wx (T, N, G, heads, D), R (G, heads, D, P), b (G, heads, D)."""

    def recurrent(h: Array) -> Array:
        """Ry (N, G, heads, D)."""
        return np.einsum("nhp,ghdp->nghd", h, R)

    def lstm(wx_t: Array, h: Array, c: Array) -> tuple[Array, Array]:
        iraw, fraw, zraw, oraw = np.moveaxis(wx_t + recurrent(h) + b, 1, 0)
        c = sigmoid(fraw) * c + sigmoid(iraw) * np.tanh(zraw)
        return sigmoid(oraw) * np.tanh(c), c

    def gru(wx_t: Array, h: Array) -> tuple[Array]:
        ry = recurrent(h)
        graw = ry[:, 0] + b[0]
        rgate, zgate = sigmoid(wx_t[:, 0] + ry[:, 1] + b[1]), sigmoid(wx_t[:, 1] + ry[:, 2] + b[2])
        nraw = wx_t[:, 2] + b[3]
        return (zgate * h + (1 - zgate) * np.tanh(nraw + rgate * graw),)

    def elman(wx_t: Array, h: Array) -> tuple[Array]:
        return (np.tanh(wx_t[:, 0] + recurrent(h)[:, 0] + b[0]),)

    zeros = np.zeros((wx.shape[1], *R.shape[1:3]))
    step = {"lstm": lstm, "gru": gru, "elman": elman}[function]
    found = over_time(step, wx, *[zeros] * (2 if function == "lstm" else 1))
    return [each.reshape(*each.shape[:-2], -1) for each in found]


@pytest.mark.parametrize("shapes", [("GHDP", "GHD"), ("HPGD", "HGD"), ("HDGP", "HDG")])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("function", FLASH_GATES)
def test_flashrnn(function: str, heads: int, shapes: tuple[str, str], rng: np.random.Generator) -> None:
    gates, biases = FLASH_GATES[function]
    size = H // heads
    R, b = rng.normal(size=(gates, heads, size, size)), rng.normal(size=(biases, heads, size))
    linear = nn.Linear(F, gates * H, dtype=torch.float64)
    x = rng.normal(size=(T, N, F))
    wx = linear(torch.as_tensor(x)).detach().numpy().reshape(T, N, gates, heads, size)
    laid_out = [
        np.transpose(value, ["GHDP".index(letter) for letter in shape])
        for value, shape in zip((R, b), shapes, strict=True)
    ]
    module = convert.from_flashrnn(
        *laid_out, linear.weight, linear.bias, function=function, recurrent_shape=shapes[0], bias_shape=shapes[1]
    )
    assert module.batch_first
    assert module.weight_hh_l0.shape == (gates * H, size)
    check_layer(module, x, [flashrnn_loop(function, wx, R, b)])
    without = convert.from_flashrnn(R, b, linear.weight, function=function, batch_first=False, dtype=torch.float32)
    assert not without.batch_first
    assert without.weight_ih_l0.dtype == torch.float32


def test_flashrnn_errors(rng: np.random.Generator) -> None:
    R, b, weight = rng.normal(size=(4, 1, H, H)), rng.normal(size=(4, 1, H)), rng.normal(size=(4 * H, F))
    with pytest.raises(ValueError, match=r"^from_flashrnn: function: expected 'lstm', 'gru', 'elman', got 'slstm'"):
        convert.from_flashrnn(R, b, weight, function="slstm")
    with pytest.raises(
        ValueError, match=r"^from_flashrnn: recurrent_shape: expected the letters of 'GHDP'.* got 'GHD'"
    ):
        convert.from_flashrnn(R, b, weight, recurrent_shape="GHD")
    with pytest.raises(ValueError, match=r"^from_flashrnn: bias_shape: expected the letters of 'GHD'.* got 'GHP'"):
        convert.from_flashrnn(R, b, weight, bias_shape="GHP")
    with pytest.raises(ValueError, match=r"^from_flashrnn: R: expected shape \(G, H, D, P\), got \(1, 4, 4\)"):
        convert.from_flashrnn(R[0], b, weight)
    with pytest.raises(ValueError, match=r"^from_flashrnn: R, as GHDP: expected shape \(3, heads, D, D\), got"):
        convert.from_flashrnn(R, b, weight, function="gru")
    with pytest.raises(ValueError, match=r"^from_flashrnn: b, as GHD: expected shape \(4, 1, 4\), got \(3, 1, 4\)"):
        convert.from_flashrnn(R, b[:3], weight)
    with pytest.raises(ValueError, match=r"^from_flashrnn: weight_ih: expected shape \(16, I\), got \(3, 5\)"):
        convert.from_flashrnn(R, b, weight[:3])
    with pytest.raises(ValueError, match=r"^from_flashrnn: bias_ih: expected shape \(16,\), got \(5,\)"):
        convert.from_flashrnn(R, b, weight, weight[0])


# --- what all of them give ----------------------------------------------------------------------------------------


def test_a_converted_layer_is_one_like_others(rng: np.random.Generator) -> None:
    arrays = [array.astype(np.float32) for array in keras_arrays(rng, "LSTM", True, True)]
    before = torch.get_rng_state()
    module = convert.from_keras(arrays, "LSTM", recurrent_activation="hard_sigmoid", keras_version=3, dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)
    kept = {key: value.clone() for key, value in module.state_dict().items()}
    for array in arrays:
        array[:] = 0
    x = torch.randn(N, T, F)
    output = module(x)[0]
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())
    assert all(p.is_contiguous() and p.requires_grad and not p.is_meta for p in module.parameters())
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), module.double().float()):
        assert torch.equal(other(x)[0], output)
    assert not torch.equal(module.train()(x)[0], output)
    module(x)[0].sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    module.reset_parameters()
    assert not torch.equal(module.eval()(x)[0], output)


def test_types_and_arrays(rng: np.random.Generator) -> None:
    arrays = keras_arrays(rng, "LSTM", True, True)
    assert convert.from_keras(arrays, "LSTM").weight_ih_l0.dtype == torch.float64
    assert convert.from_keras(arrays, "LSTM", dtype=torch.bfloat16).bias_hh_l0.dtype == torch.bfloat16
    assert convert.from_keras(arrays, "LSTM", device="meta").weight_ih_l0.is_meta
    x = rng.normal(size=(T, N, F))
    expected = [keras_loop("LSTM", arrays, x)]
    with torch.no_grad():
        of_tensors = convert.from_keras([nn.Parameter(torch.as_tensor(array)) for array in arrays], "LSTM")
    check_layer(of_tensors, x, expected)
    check_layer(
        convert.from_keras([array.tolist() for array in arrays], "LSTM", dtype=torch.float64), x, expected, None, 1e-5
    )
    check_layer(convert.from_keras([SimpleNamespace(numpy=lambda a=a: a) for a in arrays], "LSTM"), x, expected)


def test_the_other_libraries_are_not_imported() -> None:
    program = "import sys, rnnfast.convert; print([n for n in ('keras', 'onnx', 'onnxruntime') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

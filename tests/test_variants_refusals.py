"""What runs a layer with options, what it must refuse, and what its ops do with arguments that do not fit."""

from __future__ import annotations

import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import rnnfast
from module_cases import raised
from rnnfast.backends import BACKENDS
from rnnfast.sequences import Sequences
from rnnfast.variants import ops as variant_ops
from rnnfast.variants.options import NAMES
from rnnfast.variants.reference import Arguments, Masks, Weights
from triton_interpreter import triton_problem
from variant_layers import (
    CANDIDATE,
    OF_LAYERS_ALONE,
    OWN_LOOP,
    PROBABILITIES,
    B,
    H,
    I,
    R,
    T,
    cell_of,
    every_layer,
    made,
    run,
    same,
)

# --- what runs, and what is refused -------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """The names of our ops that were called."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names |= {func.name()} if func.name().startswith("rnnfast") else set()
        return func(*args, **(kwargs or {}))


@every_layer
def test_explain_says_what_runs(name: str) -> None:
    layer = made(name)
    for module, x in ((layer, R(T, B, I)), (layer, R(1, B, I)), (cell_of(name, layer), R(B, I))):
        found, own_loop = rnnfast.explain(module, x), module._options is not None and name in OWN_LOOP
        with Recorder() as recorder:
            module(x)
        assert (found.backend, "layers with options" in found.kernel) == ("cpu", own_loop)
        assert ("rnnfast::variant_forward" in recorder.names) == own_loop
        assert (found.reason == f"has {module._options}") == own_loop
    with rnnfast.backend("reference"):
        found = rnnfast.explain(layer, R(T, B, I))
        assert (found.backend, "asked for by name" in found.reason) == ("reference", True)
        with Recorder() as recorder:
            layer(R(T, B, I))
    assert not any("variant" in op for op in recorder.names)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_a_backend_without_kernels_says_so_once(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "triton" and (why := triton_problem()) is not None:
        pytest.skip(why)
    variant_ops._warn_once.cache_clear()
    monkeypatch.setattr(BACKENDS[backend], "with_options", None)
    layer, x = made("LSTM separate", dtype=torch.float32), torch.randn(T, B, I)
    with rnnfast.backend("reference"):
        expected = run(layer, x)
    with warnings.catch_warnings(record=True) as caught, rnnfast.backend("triton" if backend == "triton" else "auto"):
        warnings.simplefilter("always")
        for _ in range(3):
            same(run(layer, x), expected)
        run(made("GRU joint", dtype=torch.float32), x)
        assert rnnfast.explain(layer, x).backend == "reference"
    (warning,) = [each for each in caught if "rnnfast" in str(each.message)]
    assert warning.category is UserWarning
    assert f"slow reference implementation: the backend '{backend}' has no kernels" in str(warning.message)


def test_the_next_backend_that_has_kernels_for_options_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CUDA device, where the first one has none. Here Triton's interpreter stands for a device's Triton."""
    if (why := triton_problem()) is not None:
        pytest.skip(why)
    monkeypatch.setattr(BACKENDS["cpu"], "with_options", None)
    monkeypatch.setattr(BACKENDS["triton"], "automatic", True)
    layer, x = made("LSTM separate"), R(T, B, I)
    with Recorder() as recorder, warnings.catch_warnings():
        warnings.simplefilter("error")
        run(layer, x)
    ours = {op for op in recorder.names if "variant" in op}
    assert ours == {"rnnfast_triton::variant_forward", "rnnfast_triton::variant_backward"}
    assert rnnfast.explain(layer, x).backend == "triton"
    assert rnnfast.explain(rnnfast.LSTM(I, 6), x.float()).backend == "cpu"
    with rnnfast.backend("cpu"):
        assert rnnfast.explain(layer, x).backend == "reference"


@every_layer
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_tools_that_know_torch_nn_alone_refuse(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module, x in ((layer := made(name), R(T, B, I)), (cell_of(name, layer), R(B, I))):
        if module._options is None:
            continue
        cls, nothing = type(module), f"torch.nn has nothing like {module._options}"
        title = f"rnnfast.{cls.__name__}: {nothing}"
        assert raised(lambda module=module: torch.jit.script(module)) == (RuntimeError, f"torch.jit.script: {title}")
        left = rnnfast.quantize_weights(module, "int8").left
        assert left == {"": f"there are no kernels for quantized weights with {module._options}"}
        assert rnnfast.restore(module).left == {"": nothing}
        assert str(rnnfast.accelerate(module)) == "recurrent modules swapped: 0, left alone: 0"
        with pytest.warns(UserWarning, match=re.escape(nothing)), rnnfast.exporting(module):
            assert type(module) is cls
        with monkeypatch.context() as patched:
            patched.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
            refused = raised(lambda module=module, x=x: torch.jit.trace(module, (x,)))
        assert refused == (RuntimeError, f"torch.onnx.export: {title}")


NAN, INF = float("nan"), float("inf")
NO_NUMBERS = ("a", True, torch.tensor(0.5), [0.5])
# By option: the class that is asked, what it expects (between | what only a number is told), and what it gets: of
# another type, and out of bounds.
WRONG: dict[str, tuple[str, str, tuple[Any, ...], tuple[Any, ...]]] = {
    "layer_norm": ("GRU", "one of None, 'separate', 'joint'", (), ("batch", True)),
    "cell_norm": ("LSTM", "one of None, 'output', 'carried'", (), ("both", 1)),
    "norm": ("LSTM", "one of 'layer', 'rms'", (), ("l2", None)),
    "dropout_mode": ("LSTM", "one of 'state', 'candidate'", (), ("input", None)),
    "gate_activation": ("GRU", "one of 'sigmoid', 'hard_sigmoid'", (), ("tanh", None)),
    **dict.fromkeys(("peephole", "coupled"), ("LSTM", "a bool", (1, None, "yes"), ())),
    **dict.fromkeys(("reset_after", "reset_gate"), ("GRU", "a bool", (1, None, "yes"), ())),
    "candidate_activation": ("GRU", "one of 'tanh', 'relu'", (), ("sigmoid", None)),
    "batch_norm": ("RNN", "one of None, 'sequence', 'recurrent'", (), ("batch", True)),
    "batch_norm_momentum": ("LSTM", "a| finite| number| from 0 to 1", (*NO_NUMBERS, None), (-0.1, 1.5, NAN)),
    "batch_norm_steps": ("LSTM", "an int", (1.0, "2", True, None), ()),
    **dict.fromkeys(
        PROBABILITIES[1:], ("RNN", "a| finite| number| from 0 to 1", (*NO_NUMBERS, None), (-0.1, 1.5, NAN, INF))
    ),
    "zoneout": ("LSTM", "a| finite| number| from 0 to 1", (*NO_NUMBERS[:-1], None), (-0.1, 1.5, NAN, INF)),
    "norm_eps": ("LSTM", "a| finite| number| of at least 0", (*NO_NUMBERS, None), (-1e-5, NAN, INF)),
    "forget_bias": ("LSTM", "a| finite| number", NO_NUMBERS, (NAN, INF)),
    "num_heads": ("GRU", "an int", (1.0, "2", True, None), ()),
}
BOTH = {"reset_after": False, "layer_norm": "joint"}
# Class, arguments, what is raised, and how its message goes on behind the class.
REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    *(
        (cls, {option: value}, kind, f": {option}: expected {expected}, got {value!r}")
        for option, (cls, text, types, values) in WRONG.items()
        for kind, wrong, expected in (
            (TypeError, types, "".join(text.split("|")[::2])),
            (ValueError, values, text.replace("|", "")),
        )
        for value in wrong
    ),
    ("GRU", {"peephole": True}, ValueError, ": peephole: expected False: the LSTM alone has it"),
    ("RNN", {"coupled": True}, ValueError, ": coupled: expected False: the LSTM alone has it"),
    ("GRU", {"cell_norm": "output"}, ValueError, ": cell_norm: expected None: the LSTM alone has it"),
    ("RNN", {"forget_bias": 1.0}, ValueError, ": forget_bias: expected None: the LSTM alone has it"),
    ("LSTM", {"reset_after": False}, ValueError, ": reset_after: expected True: the GRU alone has it"),
    ("RNN", {"gate_activation": "hard_sigmoid"}, ValueError, ": gate_activation: expected 'sigmoid': the RNN has no"),
    ("RNN", CANDIDATE, ValueError, ": dropout_mode: expected 'state': the RNN has no gates"),
    ("LSTM", {"dropout_mode": "candidate"}, ValueError, ": dropout_mode: goes with recurrent_dropout"),
    ("LSTM", {"coupled": True, "forget_bias": 1.0}, ValueError, ": forget_bias: expected None with coupled=True"),
    ("LSTM", {"bias": False, "forget_bias": 1.0}, ValueError, ": forget_bias: expected None with bias=False"),
    ("GRU", BOTH, ValueError, ": layer_norm: expected None with reset_after=False, got 'joint'"),
    ("LSTM", {"norm": "rms"}, ValueError, ": norm: goes with"),
    ("GRU", {"norm_eps": 1e-3}, ValueError, ": norm_eps: goes with"),
    ("GRU", {"zoneout": (0.1, 0.2)}, ValueError, ": zoneout: expected one number: there is no cell state, got (0.1, 0"),
    ("LSTM", {"zoneout": (0.1,)}, ValueError, ": zoneout: expected (of h, of c) or one number, got (0.1,)"),
    ("LSTM", {"zoneout": (0.1, 2)}, ValueError, ": zoneout: expected a finite number from 0 to 1, got 2"),
    ("LSTM", {"proj_size": 2, "peephole": True}, ValueError, ": proj_size: expected 0 with peephole=True, got 2"),
    ("LSTM", {"num_heads": 4}, ValueError, ": num_heads: expected a divisor of hidden_size=6, got 4"),
    ("LSTM", {"num_heads": 0}, ValueError, ": num_heads: expected at least 1, got 0"),
    *(("GRUCell", {name: 0.1}, TypeError, f": {name}: an option of layers alone: ") for name in OF_LAYERS_ALONE),
    *(("MGU", {name: 1}, TypeError, f".__init__() got an unexpected keyword argument '{name}'") for name in NAMES),
]
IDS = [" ".join([cls, *(f"{name}={value!r}" for name, value in given.items())]) for cls, given, *_ in REFUSED]


@pytest.mark.parametrize(("cls", "given", "kind", "text"), REFUSED, ids=IDS)
def test_bad_values_are_refused(cls: str, given: dict[str, Any], kind: type[Exception], text: str) -> None:
    for name in (cls, cls + "Cell")[: 1 + (not given.keys() & {*OF_LAYERS_ALONE, "proj_size"})]:
        raises, found = raised(lambda name=name: getattr(rnnfast, name)(I, H, **given))
        assert (raises, found[: len(name + text)]) == (kind, name + text)


@pytest.mark.parametrize("name", ["LSTM joint rms", "LSTM peephole", "GRU separate"])
def test_parameters_of_another_size_are_refused(name: str) -> None:
    layer = made(name)
    for key, parameter in list(layer.named_parameters()):
        layer.register_parameter(key, nn.Parameter(parameter[:1].detach()))
        # Those that torch.nn has too may be found by the operation that they do not fit.
        with pytest.raises(RuntimeError, match=key if "norm" in key or "peephole" in key else None):
            layer(R(T, B, I))
        layer.register_parameter(key, parameter)


# --- the ops ------------------------------------------------------------------------------------------------------


def arguments(mode: str = "LSTM", weights: dict[str, Tensor] | None = None, **given: Any) -> Arguments:
    width = {"LSTM": 4, "GRU": 3}.get(mode, 1) * H
    base = dict.fromkeys(Arguments._fields) | {
        "mode": mode, "words": "", "eps": 1e-5, "zoneout_h": 0.0, "zoneout_c": 0.0, "reverse": False, "num_heads": 1,
        "gates": R(T, B, width), "hx": R(B, H), "cx": R(B, H) if mode == "LSTM" else None, "sequences": Sequences(),
        "weights": Weights(R(width, H)), "masks": Masks(),
    }  # fmt: skip
    return changed(Arguments(**base), {"weights": weights or {}, **given})


def changed(base: Arguments, changes: dict[str, Any]) -> Arguments:
    """A dictionary stands for fields of a record among the arguments."""
    new = {k: getattr(base, k)._replace(**v) if isinstance(v, dict) else v for k, v in changes.items()}
    return base._replace(**new)


def forward(given: Arguments) -> tuple[Tensor, ...]:
    return torch.ops.rnnfast.variant_forward(True, *variant_ops.flat(given))


def for_backward(given: Arguments, of: Arguments, **others: Any) -> list[Any]:
    """After the forward pass of other arguments. others: in the place of gradients, and of what that saved."""
    output, _, _, cell_states, *_, reserve, normed, scale = forward(of)
    taken = {
        "grad_output": torch.ones_like(output), "output": output, "cell_states": cell_states, "reserve": reserve,
        "normed": normed, "scale": scale, **others,
    }  # fmt: skip
    names = [argument.name for argument in torch.ops.rnnfast.variant_backward.default._schema.arguments]
    return [*(taken.get(name) for name in names[: names.index("mode")]), *variant_ops.flat(given)]


def backward(given: Arguments, of: Arguments, **others: Any) -> tuple[Tensor, ...]:
    return torch.ops.rnnfast.variant_backward(*for_backward(given, of, **others))


PACKED = torch.tensor([3, 2])
# What the message begins with, the mode, what is changed of its arguments.
WRONG_CALLS: list[tuple[str, str, dict[str, Any]]] = [
    ("mode: expected one of", "LSTM", {"mode": "lstm"}),
    ("mode: expected LSTM, GRU or an RNN, got MGU", "GRU", {"mode": "MGU"}),
    ("weight_hh: expected", "LSTM", {"mode": "GRU"}),
    ("words: expected no reset_first", "LSTM", {"words": "reset_first"}),
    ("words: expected no reset_first", "GRU", {"words": "reset_first", "weights": {"weight_norm": R(3 * H)}}),
    ("num_heads: expected", "LSTM", {"num_heads": 0}),
    ("weight_hh: expected", "LSTM", {"num_heads": 4}),
    ("zoneout_h: expected a number from 0 to 1, got 1.5", "GRU", {"zoneout_h": 1.5}),
    ("zoneout_c: expected a number from 0 to 1, got nan", "LSTM", {"zoneout_c": NAN}),
    ("gates: expected 2 or 3 dimensions, got 1", "LSTM", {"gates": R(4 * H)}),
    ("gates: expected 2 or 3 dimensions, got 4", "LSTM", {"gates": R(1, T, B, 4 * H)}),
    (f"gates: expected shape ({T}, {B}, 24), got ({T}, {B}, 23)", "LSTM", {"gates": R(T, B, 4 * H - 1)}),
    ("expected a tensor of dtype float32, float64", "LSTM", {"gates": torch.zeros(T, B, 4 * H, dtype=torch.long)}),
    ("weight_hh: expected the dtype", "LSTM", {"gates": torch.zeros(T, B, 4 * H)}),
    ("hx: expected shape (3, 6), got (3, 7)", "LSTM", {"hx": R(B, H + 1)}),
    ("hx: expected shape (3, 6), got (4, 6)", "GRU", {"hx": R(B + 1, H)}),
    ("hx: expected the dtype", "GRU", {"hx": torch.zeros(B, H)}),
    ("cx: expected shape (3, 6), got (1, 3, 6)", "LSTM", {"cx": R(1, B, H)}),
    ("weight_hh: expected a tensor, got None", "LSTM", {"weights": {"weight_hh": None}}),
    ("weight_hh: expected 2 dimensions", "LSTM", {"weights": {"weight_hh": R(4 * H)}}),
    ("weight_hh: expected shape", "LSTM", {"weights": {"weight_hh": R(4 * H + 1, H)}}),
    ("bias_hn: expected None but for a GRU", "LSTM", {"weights": {"bias_hn": R(H)}}),
    ("bias_hn: expected shape (6), got (7)", "GRU", {"weights": {"bias_hn": R(H + 1)}}),
    ("weight_peephole: expected shape (18), got (6)", "LSTM", {"weights": {"weight_peephole": R(H)}}),
    ("weight_peephole, weight_norm_c: expected None", "GRU", {"weights": {"weight_peephole": R(2 * H)}}),
    ("weight_norm: expected None beside", "LSTM", {"weights": {"weight_norm": R(4 * H), "weight_norm_hh": R(4 * H)}}),
    ("weight_norm_hh: expected shape (24), got (24, 1)", "LSTM", {"weights": {"weight_norm_hh": R(4 * H, 1)}}),
    ("bias_norm: expected None without", "LSTM", {"weights": {"bias_norm": R(4 * H)}}),
    ("bias_norm_c: expected None without", "LSTM", {"weights": {"bias_norm_c": R(H)}}),
    ("recurrent_mask: expected shape", "GRU", {"masks": {"recurrent": R(T, B, H)}}),
    ("candidate_mask: expected None", "RNN_TANH", {"masks": {"candidate": R(B, H)}}),
    ("zoneout_h_mask: expected a bool tensor", "GRU", {"masks": {"zoneout_h": R(T, B, H)}}),
    ("zoneout_c_mask: expected shape", "LSTM", {"masks": {"zoneout_c": R(B, T, H) > 0}}),
    ("lengths: expected values from 0 to 5, got 6", "LSTM", {"sequences": {"lengths": torch.tensor([6, 1, 1])}}),
    ("lengths: expected an int64 tensor", "GRU", {"sequences": {"lengths": torch.ones(B)}}),
    ("resets: expected shape", "LSTM", {"sequences": {"resets": R(B, T) > 0}}),
    ("batch_sizes: expected a sum of 4, got", "LSTM", {"gates": R(4, 4 * H), "sequences": {"batch_sizes": PACKED}}),
    ("batch_sizes: expected positive", "RNN_RELU", {"gates": R(5, H), "sequences": {"batch_sizes": PACKED.flip(0)}}),
    ("gates: expected packed rows", "LSTM", {"sequences": {"batch_sizes": PACKED}}),
]


OF_CALLS = [f"{text.split(':')[0]}-{i}" for i, (text, *_) in enumerate(WRONG_CALLS)]


@pytest.mark.parametrize(("text", "mode", "changes"), WRONG_CALLS, ids=OF_CALLS)
def test_wrong_arguments_of_the_ops(text: str, mode: str, changes: dict[str, Any]) -> None:
    right = arguments(mode)
    wrong = changed(right, changes)
    for op, of_op in (("forward", lambda: forward(wrong)), ("backward", lambda: backward(wrong, right))):
        kind, found = raised(of_op)
        assert kind is RuntimeError
        assert found.startswith(f"rnnfast::variant_{op}: {text}")


NORM = {"weight_norm": R(4 * H), "bias_norm": R(4 * H)}
SAVED = {"output": H, "cell_states": H, "reserve": 4 * H, "normed": 4 * H, "scale": 1}


@pytest.mark.parametrize("name", [*SAVED, "grad_output", "grad_cell_states", "grad_h_n", "grad_c_n"])
def test_wrong_saved_tensors_and_gradients(name: str) -> None:
    right = arguments(weights=NORM)
    backward(right, right)
    size = (B, H) if name.endswith("_n") else (T, B, SAVED.get(name, H))
    for wrong in [R(1), R(*size[:-1], size[-1] + 1), R(*size).float(), *([None] if name in SAVED else [])]:
        kind, found = raised(lambda wrong=wrong: backward(right, right, **{name: wrong}))
        assert (kind, found.startswith("rnnfast::variant_backward: "), name in found) == (RuntimeError, True, True)
    assert raised(lambda: backward(right, arguments()))[0] is RuntimeError


OF_OPS: dict[str, Callable[[], Arguments]] = {
    "LSTM": lambda: arguments(weights=NORM, masks={"zoneout_h": R(T, B, H) > 0}, words="rms"),
    "GRU": lambda: arguments("GRU", {"bias_hn": R(H), "weight_norm_hh": R(3 * H)}, masks={"recurrent": R(B, H)}),
    "GRU reset before": lambda: arguments("GRU", words="reset_first hard_sigmoid", hx=None, reverse=True),
    "RNN packed": lambda: arguments("RNN_RELU", gates=R(5, H), sequences={"batch_sizes": PACKED}, zoneout_h=0.3),
}


def as_leaf(value: Any) -> Any:
    """A copy that wants a gradient, of what may have one."""
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().clone().requires_grad_()
    return value


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("case", OF_OPS)
def test_opcheck(case: str) -> None:
    given = OF_OPS[case]()
    torch.library.opcheck(torch.ops.rnnfast.variant_backward.default, for_backward(given, given))
    torch.library.opcheck(torch.ops.rnnfast.variant_forward.default, [True, *map(as_leaf, variant_ops.flat(given))])


# In a process of its own: what other tests left free in pieces grows and shrinks the memory by more than one call's.
NOTHING_IS_KEPT = """
import ctypes, os, weakref
import rnnfast
from variant_layers import DOUBLE, LAYERS, I, R, call, loss_of

libc = ctypes.CDLL(None)

def resident() -> int:
    if hasattr(libc, "malloc_trim"):  # what is free and not returned says nothing
        libc.malloc_trim(0)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

kind, options = LAYERS["LSTM joint rms"]
layer, x = getattr(rnnfast, kind)(I, 66, **DOUBLE, **options), R(20, 256, I)
for number in range(26):
    before = resident() if number == 6 else 0 if number < 6 else before
    results = call(layer, x)
    loss_of(results).backward()
    kept, size = weakref.ref(results[0]), results[0].nbytes
    del results
    assert kept() is None
# The output is the smallest of what a call allocates that is large.
grown = resident() - before
assert grown < 10 * size, f"20 calls kept {grown} bytes, an output has {size}"
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_nothing_is_kept() -> None:
    """Results go without a garbage collection, and with them the memory."""
    done = subprocess.run(
        [sys.executable, "-c", NOTHING_IS_KEPT], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr

"""Random calls of rnnfast's ops: well-formed, with something wrong, and with sizes at the edge of int64."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import variant_calls
from torch import Tensor

from cases import GATES, GRADIENTS, MODES, RESULTS, make_call, reference
from rnnfast import reference as plain
from rnnfast.cell_types import CELLS
from rnnfast.quantization import TYPES, gates_of, pack, packed_shape, unpack
from rnnfast.sequences import Sequences
from rnnfast.signatures import (
    EVERY_OP,
    KINDS,
    PLACES,
    LayerArguments,
    LayerBackwardArguments,
    Parameters,
    QuantizedArguments,
    nested,
)
from run import MOST_MIB
from tolerances import check

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# Around the widths of vectors and tiles.
WIDTHS = [1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 64, 65, 80]
COUNTS = [0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 17, 24]
EDGES = [0, 1, 2, 3, 2**15, 2**20, 2**29, 2**31, 2**33, 2**62]
SPECIAL = [float("nan"), float("inf"), float("-inf"), 0.0, 1e-40, 5e-324, 6e-8, 3e38, -6e4]
# Whether the library may round float32 to bfloat16 in products (`cpu_allow_bf16`).
bf16_allowed = False
RESULT_NAMES = {
    "recurrence_backward": GRADIENTS,
    "layer": RESULTS[:3],
    "quantized_layer": RESULTS[:3],
    "matmul": ["product"],
}
# The ops' arguments.
ARGUMENTS = {op: signature.names for op, signature in EVERY_OP.items()}
ARGUMENTS["layer_backward"] = (*LayerBackwardArguments._fields[:-2], *Sequences._fields, *PLACES)
RESULT_NAMES["layer_backward"] = ["grad_input", "grad_hx", "grad_cx", *(f"grad_{place}" for place in PLACES)]
ARGUMENTS |= variant_calls.ARGUMENTS
RESULT_NAMES |= variant_calls.RESULT_NAMES
# What gives a call its rows, or has one number for each: of another rank it may be well-formed still.
ROWS = ["input", "output", "reserve", "gates", "scale"]
# What is called; of it, what is called at the edge, and while what steers it changes.
CHOSEN = [*ARGUMENTS, "matmul"]
AT_THE_EDGE = ["layer_forward", "layer", "quantized_layer", *variant_calls.ARGUMENTS]
STEERED = ["layer_forward", "variant_forward", "variant_backward"]


def choose(ops: Sequence[str]) -> None:
    """Calls no others from now on, unless there are none: what has none of them is left as it is."""
    if unknown := set(ops) - set(CHOSEN):
        raise ValueError(f"expected some of {', '.join(CHOSEN)}, got {', '.join(sorted(unknown))}")
    for every in (CHOSEN, AT_THE_EDGE, STEERED):
        every[:] = [op for op in every if op in ops] or every


@dataclass
class OpCall:
    """A call of one op: its arguments by name."""

    op: str
    arguments: dict[str, Any]
    threads: int = 1
    well_formed: bool = True
    must_raise: bool = False
    comparable: bool = True
    notes: list[str] = field(default_factory=list)

    def run(self) -> Any:
        return getattr(torch.ops.rnnfast, self.op)(*self.arguments.values())

    def describe(self) -> str:
        lines = [f"torch.ops.rnnfast.{self.op}, {self.threads} threads: {'; '.join(self.notes) or 'well-formed'}"]
        for name, value in self.arguments.items():
            if isinstance(value, Tensor):
                strided = value.layout == torch.strided
                layout = f"strides {value.stride()}" if strided else f"{value.layout}"
                text = f"{value.dtype} {tuple(value.shape)}, {layout}, {value.device}"
                # (Of none it may be a list of very many empty lists.)
                if strided and 0 < value.numel() <= 24 and value.device.type == "cpu" and not value.is_floating_point():
                    text += f", {value.tolist()}"
                lines.append(f"  {name} = {text}")
            else:
                lines.append(f"  {name} = {value!r}")
        return "\n".join(lines)

    def compare(self, results: Any) -> None:
        """Holds the results to the reference in float64."""

        def truth(dtype: torch.dtype | None) -> Sequence[Tensor]:
            values = [
                value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for value in self.arguments.values()
            ]
            beside = {
                "matmul": plain.matmul,
                "quantized_layer": on_unpacked_weights,
                "layer_backward": differentiated,
                **{op: variant_calls.truth(op) for op in variant_calls.ARGUMENTS},
            }
            return tensors((beside.get(self.op) or getattr(reference, self.op))(*values))

        names, results = RESULT_NAMES.get(self.op, RESULTS), tensors(results)
        if self.op in variant_calls.ARGUMENTS:
            results = variant_calls.compared(self.op, self.arguments, results)
        dtype = next((result.dtype for result in results if result is not None), None)
        never_rounded = self.op == "quantized_layer" or self.op in variant_calls.ARGUMENTS
        rounded = bf16_allowed and not never_rounded and dtype == torch.float32
        yardsticks = truth(torch.bfloat16 if rounded else None)
        for name, result, expected, own in zip(names, results, truth(torch.float64), yardsticks, strict=True):
            if result is None:
                assert expected is None, name
                continue
            # Beyond a row's length the reserve is undefined.
            if result.numel() and (name != "reserve" or self.arguments.get("lengths") is None):
                # The rule is for values near 1. A power of two, which rounds nothing.
                scale = 2.0 ** max(0, math.frexp(expected.abs().max().item())[1])
                check(name, *(values / scale for values in (result, expected, own.to(result.dtype))))


def on_unpacked_weights(*arguments: Any) -> Sequence[Tensor]:
    """The reference of the op `quantized_layer`, in the type of the input."""
    call = nested(QuantizedArguments, arguments)
    gates, dtype = CELLS[call.mode].gates, call.input.dtype
    parameters = call.unpacked(
        call.input.shape[-1],
        lambda name, packed, shape: unpack(packed, gates_of(name, gates), *shape, call.weights).to(dtype),
    )
    return plain.layer(call.layer._replace(parameters=parameters))


@torch.enable_grad()
def differentiated(*arguments: Any) -> Sequence[Tensor | None]:
    """The reference of the op `layer_backward`: by autograd, of the reference's layer."""
    call = nested(LayerBackwardArguments, arguments)
    wanted = [None if value is None else value.detach().requires_grad_() for value in call.differentiated]
    leaves = [value for value in wanted if value is not None]
    if not leaves:
        return wanted
    given = (call.input, call.hx, call.cx, *call.parameters)
    input, hx, cx, *places = (old if new is None else new for old, new in zip(given, wanted, strict=True))
    layer = plain.layer_forward(LayerArguments(call.mode, input, hx, cx, call.sequences, Parameters(*places)))
    grads = (call.grad_output, call.grad_h_n, call.grad_c_n, call.grad_cell_states)
    pairs = [
        (result, grad) for result, grad in zip(layer, grads, strict=False) if grad is not None and result.requires_grad
    ]
    if not pairs:
        return [None if value is None else torch.zeros_like(value) for value in wanted]
    found = torch.autograd.grad([result for result, _ in pairs], leaves, [grad for _, grad in pairs], allow_unused=True)
    grads_of = iter(found)
    filled = [None if value is None else next(grads_of) for value in wanted]
    return [
        torch.zeros_like(value) if grad is None and value is not None else grad
        for grad, value in zip(filled, wanted, strict=True)
    ]


def tensors(results: Any) -> Sequence[Tensor]:
    return [results] if isinstance(results, Tensor) else results


def reads(call: OpCall, name: str) -> bool:
    """Whether the op looks at an argument, which others leave alone."""
    op, cell, kind = call.op, CELLS.get(call.arguments.get("mode", "")), name.removesuffix("_reverse")
    if op in variant_calls.ARGUMENTS and (does := variant_calls.reads(call.arguments, name)) is not None:
        return does
    if kind in ("cx", "cell_states", "grad_c_n", "grad_cell_states"):
        return cell is None or cell.has_cell_state
    if kind == "weight_hr":
        return cell is None or cell.may_project
    if kind in ("weight_ih", "bias_ih", "bias_hh"):
        return op != "recurrence_backward"
    return kind != "reserve" or cell is None or cell.reserve > 0


# --- well-formed ------------------------------------------------------------------------------------------------------


def relaid(rng: random.Random, tensor: Tensor) -> Tensor:
    """The same values, laid out otherwise in memory."""
    if tensor.dim() == 0 or tensor.numel() == 0 or rng.random() < 0.6:
        return tensor
    last = tensor.dim() - 1
    way = rng.randrange(6)
    if way == 0:  # rows with something between them
        return torch.cat([tensor, tensor], last).narrow(last, rng.choice([0, tensor.shape[last]]), tensor.shape[last])
    if way == 1:
        return tensor.transpose(0, last).contiguous().transpose(0, last)
    if way == 2:  # off every alignment but that of its type
        return torch.cat([tensor.reshape(-1)[:1], tensor.reshape(-1)])[1:].view(tensor.shape)
    if way == 3:
        return tensor.repeat_interleave(2, last)[..., ::2]
    if way == 4:  # a stride where there is one element says nothing
        strides = [2**62 if size == 1 else stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)]
        return tensor.as_strided(tensor.shape, strides)
    return torch._neg_view(-tensor) if tensor.is_floating_point() else tensor


def matmul(rng: random.Random, dtype: torch.dtype) -> OpCall:
    M, K, N = (rng.choice([0, *WIDTHS]) for _ in range(3))
    a, b = torch.randn(M, K) / max(1, K) ** 0.5, torch.randn(K, N)
    return OpCall("matmul", {"a": a.to(dtype), "b": b.to(dtype)})


def layer_op(rng: random.Random, dtype: torch.dtype, op: str) -> OpCall:
    mode, one_step = rng.choice(MODES), rng.random() < 0.15
    layout = "dense" if one_step else rng.choice(["dense", "batch_first", "packed"])
    T, B = (max(int(layout == "packed"), rng.choice(COUNTS)) for _ in range(2))
    H = rng.choice(WIDTHS)
    ragged = not one_step and layout != "packed"
    P = rng.randint(1, H) if CELLS[mode].may_project and rng.random() < 0.3 else 0
    made = make_call(
        mode,
        T=1 if one_step else T,
        B=B,
        # Without columns nothing can be packed.
        I=rng.choice([0, *WIDTHS][op == "quantized_layer" :]),
        H=H,
        P=P,
        D=1 if one_step else rng.choice([1, 2]),
        bias=rng.random() < 0.7,
        layout=layout,
        lengths=ragged and rng.random() < 0.4,
        resets=ragged and rng.random() < 0.4,
        initial=rng.random() < 0.7,
        dtype=dtype,
    )
    given: dict[str, Any] = dict(zip(PLACES, made.places, strict=True))
    for name in ("mode", "batch_first", "input", "hx", "cx", "batch_sizes", "lengths", "resets"):
        given[name] = getattr(made, name)
    if one_step:
        given |= {name: given[name][0] for name in ("input", "hx", "cx") if given[name] is not None}

    def call(op: str) -> OpCall:
        return OpCall(op, {name: given.get(name) for name in ARGUMENTS[op]})

    if op == "quantized_layer":
        given |= {"weights": rng.choice(list(TYPES)), "hidden_size": H, "proj_size": P}
        for name in PLACES:
            if given[name] is not None and given[name].dim() == 2:
                given[name] = pack(given[name], gates_of(name, GATES[mode]), given["weights"])
    if op == "layer_backward":
        given |= {"by_aten": rng.random() < 0.5, "wanted": rng.choice([-1, rng.getrandbits(13)])}
    if op in ("recurrence_backward", "layer_backward"):
        given |= zip(RESULTS, call("layer_forward").run(), strict=True)
        for name in RESULTS[:4]:
            if given[name].shape != (0,) and rng.random() < 0.8:
                given[f"grad_{name}"] = torch.randn(given[name].shape).to(dtype)
        if one_step and CELLS[mode].reserve and rng.random() < 0.5:
            given["output"] = None
    return call(op)


def well_formed(rng: random.Random, op: str | None = None) -> OpCall:
    dtype, op = rng.choice(DTYPES), op or rng.choice(CHOSEN)
    if op == "quantized_layer":
        dtype = torch.float32
    if op in variant_calls.ARGUMENTS:
        arguments, comparable = variant_calls.well_formed(rng, dtype, op, WIDTHS, COUNTS)
        call = OpCall(op, arguments, comparable=comparable)
    else:
        call = matmul(rng, dtype) if op == "matmul" else layer_op(rng, dtype, op)
    call.threads = rng.choice([1, 2])
    # Where rows are rounded too, as the reference does not do it (tests/test_panels.py).
    call.comparable &= call.arguments.get("weights") != "int8"
    # What forward rounded is not what the reference's forward gives (tests/test_layer_backward.py).
    call.comparable &= op not in ("layer_backward", "variant_backward") or dtype == torch.float64
    given = call.arguments
    for name, value in given.items():
        if isinstance(value, Tensor):
            given[name] = relaid(rng, value)
    if rng.random() < 0.2:
        call.comparable = False
        name = rng.choice([name for name, value in given.items() if isinstance(value, Tensor)])
        if given[name].is_floating_point() and given[name].numel():
            value = given[name] = given[name].contiguous().clone()
            value.view(-1)[: rng.randint(1, value.numel())] = rng.choice(SPECIAL)
    return call


# --- with something wrong ---------------------------------------------------------------------------------------------


def resized(rng: random.Random, tensor: Tensor) -> Tensor:
    shape = list(tensor.shape) or [1]
    d = rng.randrange(len(shape))
    shape[d] = rng.choice([0, 1, shape[d] + 1, max(0, shape[d] - 1), 2 * shape[d], *EDGES])
    return torch.zeros([1] * len(shape), dtype=tensor.dtype).expand(shape)


def of_other_rank(rng: random.Random, tensor: Tensor) -> Tensor:
    others = [tensor.unsqueeze(0), tensor.unsqueeze(-1), tensor.new_zeros(()), tensor.reshape(-1)]
    return rng.choice([other for other in others if other.dim() != tensor.dim()])


def of_other_dtype(rng: random.Random, tensor: Tensor) -> Tensor:
    others = [*DTYPES, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    return torch.zeros(tensor.shape, dtype=rng.choice([dtype for dtype in others if dtype != tensor.dtype]))


def elsewhere(rng: random.Random, tensor: Tensor) -> Tensor:
    return tensor.to("meta") if rng.random() < 0.5 else tensor.to_sparse()


def with_wild_numbers(rng: random.Random, tensor: Tensor) -> Tensor:
    """For batch_sizes and lengths."""
    wild = tensor.clone()
    if wild.numel():
        wild[rng.randrange(len(wild))] = rng.choice([-1, -(2**63), 2**63 - 1, 2**62, 2**32, 1000])
    return wild


def of_other_bytes(rng: random.Random, tensor: Tensor) -> Tensor:
    """For resets and masks: a bool tensor may hold any byte, as a view of uint8 does."""
    return torch.randint(0, 256, tensor.shape, dtype=torch.uint8).view(torch.bool)


Change = Callable[[random.Random, Tensor], Tensor]
CHANGES: list[Change] = [resized, of_other_rank, of_other_dtype, elsewhere]


def spoil(rng: random.Random, call: OpCall) -> None:
    """Puts something wrong into a call."""
    given = call.arguments
    # What a first change made huge stays as it is.
    present = [name for name, value in given.items() if isinstance(value, Tensor) and value.numel() < 2**20]
    name, change, way = rng.choice(present), rng.choice(CHANGES), rng.randrange(10)
    bools = [name for name in ("resets", "zoneout_h_mask", "zoneout_c_mask") if name in present]
    steering = [name for name in ("batch_sizes", "lengths") if name in present] + bools
    call.well_formed = call.must_raise = False
    if way == 0:
        given[name] = None
        call.notes.append(f"{name} is missing")
    elif way == 1 and "mode" in given and rng.random() < 0.7:
        modes = variant_calls.MODES if call.op in variant_calls.ARGUMENTS else MODES
        given["mode"] = rng.choice([*MODES, "", "lstm", "LSTM\0", "x" * 1000])
        call.must_raise = given["mode"] not in modes
        call.notes.append("another mode")
    elif way == 1 and "weights" in given:
        given["weights"] = rng.choice([*TYPES, "", "int4", "x" * 1000])
        call.must_raise = given["weights"] not in TYPES
        call.notes.append("another type of weights")
    elif way == 7 and "hidden_size" in given:
        size = rng.choice(["hidden_size", "proj_size"])
        given[size] = rng.choice([-1, *EDGES, 2**63 - 1, given[size] + 1])
        call.notes.append(f"another {size}")
    elif way >= 7 and "words" in given and rng.random() < 0.5:
        setting, call.must_raise = variant_calls.other_setting(rng, given)
        call.notes.append(f"another {setting}")
    elif way == 2 and (absent := [name for name, value in given.items() if value is None]):
        given[added := rng.choice(absent)] = given[name]
        call.notes.append(f"{added} is given")
    elif way == 3 and "weight_hh_reverse" in present:
        for kind in rng.sample(KINDS, rng.randint(1, len(KINDS))):
            given[kind + rng.choice(["", "_reverse"])] = None
        call.notes.append("some parameters in one direction only")
    elif way <= 6 and steering:
        name = rng.choice(steering)
        change = of_other_bytes if name in bools else with_wild_numbers
        given[name] = change(rng, given[name])
        call.must_raise = name not in bools and given[name].numel() > 0
        call.notes.append(f"{name} {change.__name__}")
    else:
        given[name] = change(rng, given[name])
        certain = change is of_other_dtype or (change is of_other_rank and name not in ROWS)
        call.must_raise = certain and reads(call, name)
        call.notes.append(f"{name} {change.__name__}")


def malformed(rng: random.Random) -> OpCall:
    while True:
        call = well_formed(rng)
        try:
            for _ in range(rng.choice([1, 1, 2])):
                spoil(rng, call)
        except (RuntimeError, IndexError, TypeError):  # there is no such tensor
            continue
        # A second change may undo the first.
        call.must_raise &= len(call.notes) == 1
        return call


# --- sizes at the edge ------------------------------------------------------------------------------------------------

MOST_WORK = 2**24


def is_too_much(rows: int, result: int, weights: int, dtype: torch.dtype) -> bool:
    """Whether a call takes too long: of so many elements, if there is memory for them."""
    refused = max(result, weights) * dtype.itemsize > MOST_MIB << 20
    return not refused and (rows + 1) * weights > MOST_WORK


def at_the_edge(rng: random.Random) -> OpCall:
    """Sizes that agree with each other, of tensors that are one number in memory."""
    while True:
        op, mode, dtype = rng.choice(AT_THE_EDGE), rng.choice(MODES), rng.choice(DTYPES)
        if op in variant_calls.ARGUMENTS:
            try:
                arguments, (T, B, H, result, weights) = variant_calls.at_the_edge(rng, dtype, op, EDGES)
            except (RuntimeError, TypeError):  # more than int64 counts
                continue
            if is_too_much(T * B, result, weights, dtype):
                continue
            return OpCall(op, arguments, well_formed=False, notes=[f"T {T}, B {B}, H {H}"])
        T, B, I, H, P = (rng.choice(EDGES) for _ in range(5))  # noqa: E741
        G, D, batch_first = GATES[mode], rng.choice([1, 2]), rng.random() < 0.5
        projected = CELLS[mode].may_project and rng.random() < 0.4
        state = P if projected else H
        shapes = {"weight_ih": (G * H, I), "weight_hh": (G * H, state), "bias_ih": (G * H,), "bias_hh": (G * H,)}
        shapes |= {"weight_hr": (P, H)} if projected else {}
        weights_type = rng.choice(list(TYPES))
        panels: dict[str, tuple[int, ...]] = {}
        if op == "quantized_layer":
            dtype = torch.float32
            panels = {
                kind: packed_shape(weights_type, gates_of(kind, G), *shape)
                for kind, shape in shapes.items()
                if len(shape) == 2
            }
            shapes |= panels
        shapes |= {f"{kind}_reverse": shape for kind, shape in shapes.items()} if D == 2 else {}
        shapes |= {"input": (B, T, I) if batch_first else (T, B, I), "hx": (D, B, state)}
        given: dict[str, Any] = {"mode": mode, "batch_first": batch_first, "weights": weights_type}
        given |= {"hidden_size": H, "proj_size": P if projected else 0}
        try:
            for name, shape in shapes.items():
                kind = torch.uint8 if name.removesuffix("_reverse") in panels else dtype
                given[name] = torch.zeros((), dtype=kind).expand(shape)
            if rng.random() < 0.3:
                given["lengths"] = torch.zeros((), dtype=torch.int64).expand(B)
        except (RuntimeError, TypeError):  # more than int64 counts
            continue
        if is_too_much(T * B, T * B * D * state, D * G * H * (I + state), dtype):
            continue
        call = OpCall(op, {name: given.get(name) for name in ARGUMENTS[op]})
        call.well_formed = False
        call.notes.append(f"T {T}, B {B}, I {I}, H {H}, P {P}")
        return call

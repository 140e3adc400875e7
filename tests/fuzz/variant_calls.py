"""Random calls of the ops of layers with options, `variant_forward` and `variant_backward`, and what is to come out."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cases import GATES, RESULTS, make_call
from rnnfast.cell_types import CELLS
from rnnfast.sequences import DenseRows, Sequences
from rnnfast.variants import reference
from rnnfast.variants.reference import Arguments, Masks, Weights

MODES = [mode for mode in GATES if mode != "MGU"]
WORDS = ["hard_sigmoid", "rms", "carried", "relu", "reset_first", "exponential"]
# Of one cell alone.
OF_CELL = {"relu": "GRU", "reset_first": "GRU", "exponential": "LSTM"}
# With every gate alone.
NEED_ALL_GATES = {"reset_first", "exponential"}
OF_GATES = ["weight_norm_hh", "weight_norm"]
MASKS = dict(zip(Masks._fields, ["recurrent_mask", "candidate_mask", "zoneout_h_mask", "zoneout_c_mask"], strict=True))
SAVED = ("output", "cell_states", "reserve", "normed", "scale")
STATES = (*RESULTS[:4], "l_n")
RETURNED = (*STATES, "reserve", "normed", "scale")
SETTINGS = Arguments._fields[:-3]
CALL = (*SETTINGS, *Sequences._fields, *Weights._fields, *MASKS.values())
ARGUMENTS = {
    "variant_forward": ("saves", *CALL),
    "variant_backward": (*(f"grad_{name}" for name in STATES), *SAVED, *CALL),
}
# What is compared.
RESULT_NAMES = {
    "variant_forward": list(STATES),
    "variant_backward": [f"grad_{name}" for name in ("gates", "hx", "cx", "lx", *Weights._fields)],
}


def shapes(mode: str, gates: int, H: int, heads: int, rows: Sequence[int], B: int) -> dict[str, tuple[int, ...]]:
    """Of everything that a call may be given."""
    width, state = gates * H, (B, H)
    found: dict[str, tuple[int, ...]] = {
        "gates": (*rows, width),
        **dict.fromkeys(("hx", "cx", "lx"), state),
        "weight_hh": (width, H // heads),
        "bias_hn": (H,),
        "weight_peephole": ((gates - 1) * H,),
        **dict.fromkeys((*OF_GATES, "bias_norm"), (width,)),
        **dict.fromkeys(("weight_norm_c", "bias_norm_c"), (H,)),
        **dict.fromkeys(("recurrent_mask", "candidate_mask"), state),
        **dict.fromkeys(("zoneout_h_mask", "zoneout_c_mask"), (*rows, H)),
        "output": (*rows, H),
        "cell_states": (*rows, H),
        "reserve": (*rows, width + H if mode == "GRU" and gates == 3 else width),
        "normed": (*rows, width),
        "scale": (*rows, 1),
    }
    return found | {
        **dict.fromkeys(("grad_output", "grad_cell_states"), (*rows, H)),
        **dict.fromkeys(("grad_h_n", "grad_c_n", "grad_l_n"), state),
    }


def options(rng: random.Random) -> tuple[dict[str, Any], int, list[str]]:
    """Such as go together: settings; how many gates there are; what is given beside gates and weight_hh."""
    mode = rng.choice(["LSTM", "LSTM", "LSTM", "GRU", "GRU", "GRU", *MODES])
    has_cell = CELLS[mode].has_cell_state
    words = [word for word in WORDS if rng.random() < 0.3 and OF_CELL.get(word, mode) == mode]
    # The coupled LSTM, the GRU without r.
    gates = GATES[mode] - (GATES[mode] > 1 and not NEED_ALL_GATES & set(words) and rng.random() < 0.3)
    if exponential := "exponential" in words:
        words = [word for word in words if word != "hard_sigmoid"]
    norm = None if "reset_first" in words else rng.choice([None, *OF_GATES])
    names = [norm, *(name for name in ("hx", "cx") if rng.random() < 0.7)]
    names += [name for name in ("recurrent_mask", "zoneout_h_mask") if rng.random() < 0.3]
    if norm == "weight_norm":
        names.append(rng.choice([None, "bias_norm"]))
    if mode == "GRU" and gates == 3 and norm != "weight_norm" and "reset_first" not in words:
        names.append(rng.choice([None, "bias_hn"]))
    if exponential:
        names.append(rng.choice([None, "lx"]))
    elif GATES[mode] > 1:
        names.append(rng.choice([None, None, "candidate_mask"]))
    if has_cell and not exponential:
        names += [name for name in ("weight_peephole", "weight_norm_c", "zoneout_c_mask") if rng.random() < 0.4]
        names.append("bias_norm_c" if "weight_norm_c" in names and rng.random() < 0.6 else None)
    if not has_cell and rng.random() < 0.9:
        names = [name for name in names if name != "cx"]
    settings = {
        "mode": mode,
        "words": " ".join(rng.sample(words, len(words))),
        "eps": rng.choice([1e-5, 1e-3, 0.1]),
        "zoneout_h": rng.choice([0.0, 0.0, 0.3, 1.0]),
        "zoneout_c": 0.0 if exponential else rng.choice([0.0, 0.0, 0.6, 1.0]),
        "reverse": rng.random() < 0.5,
    }
    return settings, gates, [name for name in names if name is not None]


def well_formed(
    rng: random.Random, dtype: torch.dtype, op: str, widths: Sequence[int], counts: Sequence[int]
) -> tuple[dict[str, Any], bool]:
    """The arguments by name, and whether the reference has the same of them."""
    one_step = rng.random() < 0.15
    layout = "dense" if one_step else rng.choice(["dense", "batch_first", "packed"])
    ragged = not one_step and layout != "packed"
    T, B = (max(int(layout == "packed"), rng.choice(counts)) for _ in range(2))
    H = rng.choice([0, *widths])
    if rng.random() < 0.2:  # small work stays on one thread
        T, B, H = min(T, 4), rng.choice([9, 17, 24, 33]), rng.choice([64, 65, 80, 96])
    lengths, resets = (ragged and rng.random() < 0.4 for _ in range(2))
    return made(
        rng, dtype, op, T=1 if one_step else T, B=B, H=H, layout=layout, lengths=lengths, resets=resets,
        one_step=one_step,
    )  # fmt: skip


def made(
    rng: random.Random, dtype: torch.dtype, op: str, *, H: int, one_step: bool = False, **sizes: Any
) -> tuple[dict[str, Any], bool]:
    """A call of these sizes, of which `cases.make_call` has the others."""
    settings, gates, names = options(rng)
    mode, heads = settings["mode"], rng.choice([1, 1, *(n for n in (2, 3, 4, 5, 8, 16, H) if n and H % n == 0)])
    rows_alone = make_call("RNN_TANH", I=1, H=1, **sizes)
    rows = rows_alone.input.shape[int(one_step) : -1]
    names += ["gates", "weight_hh"]
    every = shapes(mode, gates, H, heads, rows, rows_alone.batch)
    given: dict[str, Any] = settings | rows_alone.sequences._asdict()
    given |= {"num_heads": heads, "saves": rng.random() < 0.5}
    given |= {name: values(name, every[name], H // heads).to(dtype) for name in names if "zoneout" not in name}
    given |= {name: torch.rand(every[name]) < 0.4 for name in names if "zoneout" in name}
    # In the reference RMSNorm has no bias, and F.layer_norm takes no empty rows.
    comparable = H > 0 and not ("rms" in settings["words"] and {"bias_norm", "bias_norm_c"} & set(names))
    if op == "variant_backward":
        forward = [given.get(name) for name in CALL]
        given |= zip(RETURNED, torch.ops.rnnfast.variant_forward(True, *forward), strict=True)
        for name in STATES:
            if given[name].shape != (0,) and rng.random() < 0.8:
                given[f"grad_{name}"] = torch.randn(given[name].shape).to(dtype)
    return {name: given.get(name) for name in ARGUMENTS[op]}, comparable


def values(name: str, shape: Sequence[int], fan_in: int) -> Tensor:
    """As large as a layer has them, in float64."""
    if name in ("recurrent_mask", "candidate_mask"):
        return (torch.rand(shape, dtype=torch.float64) < 0.6) / 0.6
    if name in ("gates", "hx", "cx", "lx"):
        return torch.randn(shape, dtype=torch.float64)
    bound = max(1, fan_in) ** -0.5
    return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound) + name.startswith("weight_norm")


def at_the_edge(
    rng: random.Random, dtype: torch.dtype, op: str, sizes: Sequence[int]
) -> tuple[dict[str, Any], tuple[int, int, int, int, int]]:
    """Sizes that agree with each other, of tensors that are one number in memory; T, B, H and what says how much work
    it is: the elements of the largest result, and of W_hh.

    Raises:
        RuntimeError, TypeError: there are no such tensors.
    """
    settings, gates, names = options(rng)
    T, B, H = (rng.choice(sizes) for _ in range(3))
    batch_first, heads = rng.random() < 0.5, rng.choice([1, 1, 2, 2**14])
    H -= H % heads
    every = shapes(settings["mode"], gates, H, heads, (B, T) if batch_first else (T, B), B)
    names += ["gates", "weight_hh"]
    if op == "variant_backward":
        names += [*SAVED, *(name for name in every if name.startswith("grad_") and rng.random() < 0.5)]
    types = {name: torch.bool for name in MASKS.values() if "zoneout" in name}
    types["scale"] = torch.float64 if dtype == torch.float64 else torch.float32
    given: dict[str, Any] = settings | {"batch_first": batch_first, "num_heads": heads, "saves": rng.random() < 0.5}
    given |= {name: torch.zeros((), dtype=types.get(name, dtype)).expand(every[name]) for name in names}
    if rng.random() < 0.3:
        given["lengths"] = torch.zeros((), dtype=torch.int64).expand(B)
    width = gates * H if op == "variant_backward" or given["saves"] else H
    return {name: given.get(name) for name in ARGUMENTS[op]}, (T, B, H, T * B * width, gates * H * (H // heads))


# --- with something wrong ---------------------------------------------------------------------------------------------


def other_setting(rng: random.Random, given: dict[str, Any]) -> tuple[str, bool]:
    """Changes a setting that is no tensor; its name, and whether that must be refused."""
    name = rng.choice(["words", "eps", "zoneout_h", "zoneout_c", "reverse", "num_heads"])
    wild = [float("nan"), float("inf"), -1.0, -1e-300, 1.0000001, 2.0, 1e308, 0.5]
    if name == "reverse":
        given[name] = not given[name]
    elif name == "num_heads":
        given[name] = rng.choice([-(2**63), -1, 0, 2, 3, 4, 2**14, 2**14 + 1, 2**33, 2**62, 2**63 - 1])
        return name, not 0 < given[name] <= 2**14
    elif name == "words":
        given[name] = rng.choice(["", "RMS", "rms\0", "x" * 1000, " " * 1000, *WORDS, " ".join(WORDS)])
    else:
        given[name] = rng.choice(wild)
        read = name != "zoneout_c" or given["mode"] == "LSTM"
        return name, read and not 0 <= given[name] <= (float("inf") if name == "eps" else 1)
    return name, False


def reads(given: Mapping[str, Any], name: str) -> bool | None:
    """Whether the ops look at an argument; None of those that other ops have too."""
    if name in ("cx", "zoneout_c_mask"):
        return bool(given["mode"] == "LSTM")
    if name in ("normed", "scale"):
        return any(given[norm] is not None for norm in OF_GATES)
    if name in ("lx", "grad_l_n"):
        return given["mode"] == "LSTM" and "exponential" in given["words"].split()
    return True if name == "reserve" or name in CALL[len(SETTINGS) :] else None


# --- the reference ----------------------------------------------------------------------------------------------------


def arguments_of(given: Mapping[str, Any]) -> Arguments:
    """The reference's record. It has no op of one step: that is a sequence of one."""

    def take(kind: Any, names: Mapping[str, str]) -> Any:
        return kind(**{field: given[name] for field, name in names.items()})

    record = Arguments(
        *(given[name] for name in SETTINGS),
        *(take(kind, {name: name for name in kind._fields}) for kind in (Sequences, Weights)),
        take(Masks, MASKS),
    )
    if not record.sequences.is_one_step(record.gates):
        return record
    masks = record.masks
    kept = {name: as_sequence(getattr(masks, name)) for name in ("zoneout_h", "zoneout_c")}
    sequences = record.sequences._replace(batch_first=False)
    return record._replace(gates=as_sequence(record.gates), sequences=sequences, masks=masks._replace(**kept))


def as_sequence(rows: Tensor | None) -> Tensor | None:
    return None if rows is None else rows.unsqueeze(0)


def forward(op: str, *arguments: Any) -> list[Tensor]:
    given = dict(zip(ARGUMENTS[op], arguments, strict=True))
    results = list(reference.forward(arguments_of(given)))
    one_step = results[0].dim() > given["gates"].dim()
    # output, cell_states
    return [value.squeeze(0) if one_step and value.dim() == 3 else value for value in results]


def truth(op: str) -> Any:
    """The reference's results of an op, as a function of its arguments."""
    return (lambda *arguments: forward(op, *arguments)) if op == "variant_forward" else gradients


@torch.enable_grad()
def gradients(*arguments: Any) -> list[Tensor | None]:
    """Of `variant_backward`, by autograd; None where there is none."""
    op = "variant_backward"
    given = dict(zip(ARGUMENTS[op], arguments, strict=True))
    leaves = {name: given[name].detach().requires_grad_() for name in differentiated(given)}
    results = forward(op, *(given | leaves).values())
    pairs = [
        (result, given[f"grad_{name}"])
        for name, result in zip(STATES, results, strict=True)
        if given[f"grad_{name}"] is not None and result.requires_grad
    ]
    found: dict[str, Tensor] = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if pairs:
        of_results = torch.autograd.grad(
            [result for result, _ in pairs], list(leaves.values()), [grad for _, grad in pairs], allow_unused=True
        )
        found |= {name: grad for name, grad in zip(leaves, of_results, strict=True) if grad is not None}
    return [found.get(name.removeprefix("grad_")) for name in RESULT_NAMES[op]]


def compared(op: str, given: Mapping[str, Any], results: Sequence[Tensor]) -> list[Tensor | None]:
    """What `truth` returns, from an op's results."""
    if op == "variant_forward":
        return list(results[: len(STATES)])
    grad_gates, grad_sums, grad_hx, grad_cx, grad_lx, *of_vectors = results
    of_weight = grad_weight_hh(given, grad_sums if grad_sums.numel() else grad_gates)
    every, there = [grad_gates, grad_hx, grad_cx, grad_lx, of_weight, *of_vectors], differentiated(given)
    names = [name.removeprefix("grad_") for name in RESULT_NAMES[op]]
    return [result if name in there else None for name, result in zip(names, every, strict=True)]


def differentiated(given: Mapping[str, Any]) -> list[str]:
    """What has gradients."""
    names = (name.removeprefix("grad_") for name in RESULT_NAMES["variant_backward"])
    there = [name for name in names if given[name] is not None]
    return [name for name in there if name not in ("cx", "lx") or reads(given, name)]


def grad_weight_hh(given: Mapping[str, Any], grad_sums: Tensor) -> Tensor:
    """Of W_hh (G*H, H / heads), from the gradient of W_hh h."""
    arguments, (output, reserve) = arguments_of(given), (given[name] for name in ("output", "reserve"))
    if grad_sums.dim() < arguments.gates.dim():
        output, reserve, grad_sums = (value.unsqueeze(0) for value in (output, reserve, grad_sums))
    rows = DenseRows.of(arguments.gates, arguments.sequences)
    states, heads, size = rows.read(output), arguments.num_heads, arguments.weights.weight_hh.shape[1]
    hx = output.new_zeros(states.shape[1:]) if arguments.hx is None else arguments.hx
    before = [*rows.states_before(hx, states, arguments.reverse)]
    grads, resets = rows.read(grad_sums), rows.read(reserve)[..., : states.shape[-1]]
    total = torch.zeros(len(arguments.weights.weight_hh) // (heads * size), heads, size, size, dtype=grad_sums.dtype)
    for h, grad, reset in zip(before, grads, resets, strict=True):
        entered = h if arguments.masks.recurrent is None else h * arguments.masks.recurrent
        of_gates = [entered] * len(total)
        if "reset_first" in arguments.words.split():
            of_gates[2] = entered * reset
        by_gate = torch.stack(of_gates, 1).unflatten(-1, (heads, size))
        total += torch.einsum("bghj,bghk->ghjk", grad.unflatten(-1, (len(total), heads, size)), by_gate)
    return total.flatten(0, 2)

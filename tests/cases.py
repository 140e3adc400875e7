"""Random calls of one layer, and the same call made with torch.nn."""

import dataclasses
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnfast import reference as plain
from rnnfast.cell_types import CELLS
from rnnfast.sequences import Sequences
from rnnfast.signatures import OPS, LayerArguments, Parameters, taking_flat

MODES = list(CELLS)
TORCH_MODES = [mode for mode in MODES if CELLS[mode].torch_cell is not None]
WITH_CELL_STATE = [mode for mode in MODES if CELLS[mode].has_cell_state]
GATES = {mode: cell.gates for mode, cell in CELLS.items()}
RESULTS = ["output", "h_n", "c_n", "cell_states", "reserve"]
GRADIENTS = ["grad_gates", "grad_gates_hh", "grad_hx", "grad_cx", "grad_projected"]


# The reference's functions, with the arguments of the ops.
reference = types.SimpleNamespace(
    **{name: taking_flat(signature.record, getattr(plain, name)) for name, signature in OPS.items()}
)


class _Selected:
    """The functions of the backend that a layer would run on now."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        # Not before it is needed: it loads the libraries, and the fuzzer brings one of its own.
        from rnnfast.backends import BACKENDS, select

        def call(*arguments: Any) -> Any:
            like = next(argument for argument in arguments if isinstance(argument, Tensor))
            return getattr(BACKENDS[select(like)].kernels, name)(*arguments)

        return call


selected = _Selected()


@dataclasses.dataclass
class Call:
    """The arguments of one layer."""

    mode: str
    input: Tensor
    weight_ih: list[Tensor]
    weight_hh: list[Tensor]
    bias_ih: list[Tensor]
    bias_hh: list[Tensor]
    weight_hr: list[Tensor]
    hx: Tensor | None
    cx: Tensor | None
    batch_sizes: Tensor | None
    lengths: Tensor | None
    resets: Tensor | None
    batch_first: bool

    def map(self, function: Callable[[Tensor], Tensor]) -> "Call":
        """The same call with function applied to every floating tensor."""

        def apply(value: Any) -> Any:
            if isinstance(value, list):
                return [function(v) for v in value]
            return function(value) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Call(*(apply(getattr(self, field.name)) for field in dataclasses.fields(self)))

    def to(self, dtype: torch.dtype) -> "Call":
        return self.map(lambda value: value.detach().to(dtype))

    def on(self, device: str) -> "Call":
        """The same call with its tensors on a device; batch_sizes belong on the CPU."""
        moved = self.map(lambda value: value.to(device))
        moved.lengths, moved.resets = (None if v is None else v.to(device) for v in (self.lengths, self.resets))
        return moved

    def leaves(self) -> "Call":
        """The same call on fresh leaves that want gradients."""
        return self.map(lambda value: value.detach().clone().requires_grad_())

    def tensors(self) -> dict[str, Tensor]:
        """Every floating tensor by name."""
        named = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            for d, tensor in enumerate(value if isinstance(value, list) else [value]):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    named[f"{field.name}[{d}]" if isinstance(value, list) else field.name] = tensor
        return named

    def with_tensors(self, values: list[Tensor]) -> "Call":
        """The same call with other tensors, in the order of tensors()."""
        iterator = iter(values)
        return self.map(lambda _: next(iterator))

    @property
    def places(self) -> list[Tensor | None]:
        """The parameters in their places among an op's arguments."""
        kinds = [self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh, self.weight_hr]
        return [kind[d] if d < len(kind) else None for kind in kinds for d in range(2)]

    @property
    def shared(self) -> list[Tensor | None]:
        """The arguments that forward and backward share."""
        return [self.hx, self.cx, *self.sequences, *self.places]

    @property
    def sequences(self) -> Sequences:
        return Sequences(self.batch_sizes, self.lengths, self.resets, self.batch_first)

    @property
    def record(self) -> LayerArguments:
        return LayerArguments(self.mode, self.input, self.hx, self.cx, self.sequences, Parameters(*self.places))

    @property
    def directions(self) -> int:
        return len(self.weight_hh)

    @property
    def hidden_size(self) -> int:
        return self.weight_ih[0].shape[0] // GATES[self.mode]

    @property
    def steps(self) -> int:
        return len(self.batch_sizes) if self.batch_sizes is not None else self.input.shape[1 if self.batch_first else 0]

    @property
    def batch(self) -> int:
        if self.batch_sizes is not None:
            return int(self.batch_sizes[0])
        return self.input.shape[0 if self.batch_first else 1]

    def forward(self, ops: Any) -> dict[str, Tensor]:
        return dict(zip(RESULTS, ops.layer_forward(self.mode, self.input, *self.shared), strict=True))

    def backward(self, ops: Any, grads: dict[str, Tensor | None], saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """grads: by the names of results, missing for None. saved: what forward returned."""
        given = [grads.get(name) for name in RESULTS[:4]]
        saved_tensors = [saved["output"], saved["cell_states"], saved["reserve"]]
        results = ops.recurrence_backward(self.mode, *given, *saved_tensors, *self.shared)
        return dict(zip(GRADIENTS, results, strict=True))

    def inference(self, ops: Any) -> dict[str, Tensor]:
        results = ops.layer(self.mode, self.input, *self.shared)
        return dict(zip(RESULTS, results, strict=False))

    def rows_to_dense(self, rows: Tensor) -> Tensor:
        """(rows, F) to (T, B, F), zero where a packed batch has no row. Written with loops, to be independent."""
        if self.batch_sizes is None:
            return rows.transpose(0, 1) if self.batch_first else rows
        pieces = rows.split(self.batch_sizes.tolist())
        return torch.stack([torch.cat([p, p.new_zeros(self.batch - len(p), *p.shape[1:])]) for p in pieces])

    def alive(self) -> Tensor:
        """(T, B) bool."""
        ends = torch.full((self.batch,), self.steps) if self.lengths is None else self.lengths
        if self.batch_sizes is not None:
            ends = (self.batch_sizes.unsqueeze(1) > torch.arange(self.batch)).sum(0)
        return torch.arange(self.steps, device=ends.device).unsqueeze(1) < ends

    def alive_rows(self) -> Tensor | None:
        """bool, (rows,), for dense rows with lengths; otherwise None."""
        if self.lengths is None:
            return None
        return self.alive().T if self.batch_first else self.alive()

    def boundaries(self) -> Tensor:
        """(T, B) bool: resets, time-major."""
        if self.resets is None:
            return torch.zeros(self.steps, self.batch, dtype=torch.bool)
        return self.resets.T if self.batch_first else self.resets


def make_call(
    mode: str,
    *,
    T: int = 5,
    B: int = 4,
    I: int = 3,  # noqa: E741
    H: int = 5,
    P: int = 0,
    D: int = 1,
    bias: bool = True,
    layout: str = "dense",
    lengths: bool = False,
    resets: bool = False,
    initial: bool = True,
    dtype: torch.dtype = torch.float64,
) -> Call:
    """A random call. layout: dense, batch_first or packed. lengths: random, T and (B > 1) zero among them."""
    bound, G, state = 1 / math.sqrt(H), GATES[mode], P or H

    def uniform(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float64).uniform_(-bound, bound).to(dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    batch_sizes = None
    rows: tuple[int, ...] = (B, T) if layout == "batch_first" else (T, B)
    if layout == "packed":
        ends = torch.randint(1, T + 1, (B,)).sort(descending=True).values
        ends[:1] = T
        batch_sizes = (ends > torch.arange(T).unsqueeze(1)).sum(1)
        rows = (int(batch_sizes.sum()),)
    ends = torch.randint(0, T + 1, (B,))
    ends[B // 2 :][:1] = 0
    ends[B - 1 :][:1] = T
    where = torch.rand(T, B) < 0.3
    return Call(
        mode,
        normal(*rows, I),
        [uniform(G * H, I) for _ in range(D)],
        [uniform(G * H, state) for _ in range(D)],
        [uniform(G * H) for _ in range(D)] if bias else [],
        [uniform(G * H) for _ in range(D)] if bias else [],
        [uniform(P, H) for _ in range(D)] if P else [],
        normal(D, B, state) if initial else None,
        normal(D, B, H) if initial and CELLS[mode].has_cell_state else None,
        batch_sizes,
        ends if lengths else None,
        (where.T.contiguous() if layout == "batch_first" else where) if resets else None,
        layout == "batch_first",
    )


def random_grads(results: dict[str, Tensor], names: list[str] | None = None) -> dict[str, Tensor | None]:
    """Gradients for the results that have any, of a size that leaves the weights' gradients near 1."""
    rows = max(1, results["output"].shape[:-1].numel())
    return {
        name: (torch.randn(value.shape, dtype=torch.float64) / math.sqrt(rows)).to(value)
        for name, value in results.items()
        if name != "reserve" and value.shape != (0,) and (names is None or name in names)
    }


def torch_layer(call: Call, directions: list[int]) -> Callable[..., Any]:
    """torch.nn's layer with these directions' weights of the call; takes input and state, differentiable in all."""
    I, H = call.input.shape[-1], call.hidden_size  # noqa: E741
    options = {
        "bias": bool(call.bias_ih),
        "batch_first": call.batch_first,
        "bidirectional": len(directions) == 2,
        "dtype": call.input.dtype,
    }
    if call.mode == "LSTM":
        P = call.weight_hr[0].shape[0] if call.weight_hr else 0
        module: torch.nn.Module = torch.nn.LSTM(I, H, proj_size=P, **options)
    elif call.mode == "GRU":
        module = torch.nn.GRU(I, H, **options)
    else:
        module = torch.nn.RNN(I, H, nonlinearity=call.mode.removeprefix("RNN_").lower(), **options)
    weights = {}
    for suffix, d in zip(["_l0", "_l0_reverse"], directions, strict=False):
        for name in ["weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr"]:
            if getattr(call, name):
                weights[name + suffix] = getattr(call, name)[d]
    return lambda *arguments: torch.func.functional_call(module, weights, arguments)

"""Layers, directions, dropout between layers and packed rows: what torch.nn's modules do, without the module.

`lstm`, `gru`, `rnn` and `mgu` are the public functions; the modules call `run_layers` after their own checks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import reference
from .autocasting import autocasts, by_autocast, to_float32, with_autocast
from .autograd import Layer, apply_layer, layer_in_graph, mark_layer_in_graph
from .backends import BACKENDS, select, torch_runs_layers, wants_gradient
from .cell_types import CELLS, NONLINEARITIES
from .recompute.calls import recomputed_layer, trains
from .recompute.settings import Recompute, recompute_of
from .sequences import RowOptions, Sequences, dense_sequences, packed_sequences
from .signatures import LayerArguments, kinds_of, nested, place_weights, shapes_of
from .steps import has_one_step, run_step

Tensors = Sequence[Tensor]

# Bound once: these stand on the path of every call, where looking each up through its module costs as much as it does.
_functorch_active = torch._C._are_functorch_transforms_active
_autocast_active = torch._C._is_any_autocast_enabled
_grad_enabled = torch.is_grad_enabled


def run_layers(
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Tensors,
    sequences: Sequences,
    *,
    bias: bool,
    num_layers: int = 1,
    bidirectional: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    return_cell_states: bool = False,
    kernel: Callable[..., Any] | None = None,
    recompute: Recompute | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs stacked layers. The caller has checked the arguments.

    Args:
        mode: a key of `CELLS`.
        input: (T, B, I), with batch_first (B, T, I), packed rows (N, I) with batch_sizes, or one step (B, I).
        hx, cx: (L*D, B, P or H), (L*D, B, H), of one step (B, H), None for zeros; cx for cells with a cell state only.
        weights: every parameter, in the order of torch.nn's `_flat_weights`.
        sequences: how the rows lie, and which count.
        dropout: probability, between layers and in training only.
        return_cell_states: whether every c_t of the last layer is wanted.
        kernel: what runs each layer, where it is not for the input to say: it takes the arguments of the op `layer` in
            float32, with weights as only it knows them, and returns that op's results.
        recompute: how training saves memory; None: not at all.

    Returns:
        output (rows, D*P or D*H); h_n (L*D, B, P or H); c_n (L*D, B, H), None without a cell state; cell_states
        (rows, D*H), every c_t of the last layer, None unless asked for.

    Raises:
        RuntimeError: return_cell_states with a kernel of the caller's, which returns no c_t.
    """
    if _autocast_active() and autocasts(input):

        def run_cast(input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Tensors) -> Any:
            return run_layers(
                mode, input, hx, cx, weights, sequences, bias=bias, num_layers=num_layers,
                bidirectional=bidirectional, dropout=dropout, training=training,
                return_cell_states=return_cell_states, kernel=kernel, recompute=recompute,
            )  # fmt: skip

        cast = by_autocast if kernel is None else to_float32
        results: tuple[Tensor, Tensor, Tensor | None, Tensor | None] = with_autocast(
            mode, input, hx, cx, weights, run_cast, cast
        )
        return results

    if kernel is None:
        run = _choose(mode, input, hx, cx, weights, sequences, return_cell_states)
        if recompute is not None and trains(input, (hx, cx, *weights)):
            way = recompute.way(mode, input, weights, sequences, num_layers, bidirectional)
            if way is not None:
                run = functools.partial(recomputed_layer, way, return_cell_states)
    elif return_cell_states:
        raise RuntimeError("return_cell_states: quantized layers do not return every c_t, only the last one")
    else:
        run = kernel
    if run is _torchs:
        return _torchs(mode, input, hx, weights, sequences, bias, num_layers, dropout, training, bidirectional)
    has_cell_state = CELLS[mode].has_cell_state
    if num_layers == 1 and not return_cell_states:
        # The shortest way, for calls of one step: no loop, no slices.
        places = place_weights(weights, 2 if bidirectional else 1, bias)
        results = run(mode, input, hx, cx, *sequences, *places)
        return results[0], results[1], results[2] if has_cell_state else None, None

    # torch.nn draws its dropout masks on time-major outputs, also with batch_first: so do we, for the same masks. The
    # last layer turns back, so that the result is laid out as it always is.
    drops = dropout > 0 and training and num_layers > 1
    transposed = drops and sequences.batch_first and sequences.batch_sizes is None
    inner_sequences = sequences
    if transposed:
        input, inner_sequences = input.transpose(0, 1), sequences.time_major()

    directions = 2 if bidirectional else 1
    each = len(weights) // num_layers
    output, cell_states = input, None
    states_h, states_c = [], []
    for layer in range(num_layers):
        last = layer == num_layers - 1
        if transposed and last:
            output, inner_sequences = output.transpose(0, 1), sequences
        places = place_weights(weights[layer * each : (layer + 1) * each], directions, bias)
        layer_hx = None if hx is None else hx.narrow(0, layer * directions, directions)
        layer_cx = None if cx is None else cx.narrow(0, layer * directions, directions)
        output, h_n, c_n, *saved = run(mode, output, layer_hx, layer_cx, *inner_sequences, *places)
        states_h.append(h_n)
        states_c.append(c_n)
        if last and return_cell_states and has_cell_state:
            cell_states = saved[0]
        if drops and not last:
            output = torch.dropout(output, dropout, True)

    all_h = states_h[0] if num_layers == 1 else torch.cat(states_h)
    all_c = None
    if has_cell_state:
        all_c = states_c[0] if num_layers == 1 else torch.cat(states_c)
    return output, all_h, all_c, cell_states


def _choose(
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    cx: Tensor | None,
    weights: Tensors,
    sequences: Sequences,
    return_cell_states: bool,
) -> Callable[..., Any]:
    """What runs each layer of a call: it takes the arguments of the op `layer`, and returns at least its results. Or
    `_torchs`, which runs all of them at once."""
    if forward_ad._current_level >= 0:
        return _reference
    if not _functorch_active():
        differentiating = _grad_enabled()
        captured = differentiating and _captures()
        if captured or not (differentiating and wants_gradient(input, (hx, cx, *weights))):
            backend = BACKENDS[select(input)]
            # A program gets the op itself, whether or not gradients are wanted now: it carries its derivative.
            kernels = backend.differentiable if captured else backend.kernels
            return kernels.layer_forward if return_cell_states else kernels.layer
        if torch.compiler.is_compiling():
            return functools.partial(Layer.apply, select(input))
        # One step in plain training, where torch's own op is faster.
        if torch_runs_layers(mode, input, hx, sequences, weights):
            return _torchs
        if sequences.every_row_counts and not return_cell_states and has_one_step(input, sequences.batch_first):
            return functools.partial(_step, select(input))
        apply = apply_layer
    else:
        apply = layer_in_graph if torch.compiler.is_compiling() and mark_layer_in_graph() else Layer.apply
    return functools.partial(apply, select(input))


def _step(
    backend: str, mode: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """One step of a layer. With two directions or a projection it is a layer like any other."""
    _, _, _, batch_first, *places = others
    # The kinds that a step has stand first.
    weight_ih, _, weight_hh, _, bias_ih, _, bias_hh, *rest = places
    if any(parameter is not None for parameter in (places[1], *rest)):
        results: tuple[Tensor, Tensor, Tensor] = apply_layer(backend, mode, input, hx, cx, *others)[:3]
        return results
    return run_step((backend, mode, batch_first, weight_ih, weight_hh, bias_ih, bias_hh), input, hx, cx)


def _reference(*arguments: Any) -> tuple[Tensor, ...]:
    """Ordinary differentiable PyTorch, in forward mode too."""
    return reference.layer_forward(nested(LayerArguments, arguments))


def _torchs(
    mode: str,
    input: Tensor,
    hx: Tensor | None,
    weights: Tensors,
    sequences: Sequences,
    bias: bool,
    num_layers: int,
    dropout: float,
    training: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor, None, None]:
    """All layers by torch's own op, for cells whose state is one tensor: `backends.torch_runs_layers` says when."""
    op, batch_first = CELLS[mode].torch_layers, sequences.batch_first
    assert op is not None
    if hx is None:
        batch, directions = input.shape[0 if batch_first else 1], 2 if bidirectional else 1
        hx = input.new_zeros(num_layers * directions, batch, weights[1].shape[1])
    output, h_n = op(input, hx, weights, bias, num_layers, dropout, training, bidirectional, batch_first)
    return output, h_n, None, None


def _captures() -> bool:
    """Whether a program is being made of this call that runs without us: by torch.jit.trace or torch.export."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


# What there are kernels for. Autocast would make any other type one of these without a word, token ids among them.
COMPUTED_TYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})

# --- the public functions -----------------------------------------------------------------------------------------


def lstm(
    input: Tensor,
    weights: Tensors,
    hx: tuple[Tensor, Tensor] | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
    recompute: str | int | None = None,
    memory_budget: float | str | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]] | tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
    """Stacked LSTM layers.

    Equations: https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html (Hochreiter and Schmidhuber 1997; the
    projection: Sak et al. 2014, https://arxiv.org/abs/1402.1128).

    Args:
        input: (T, B, I), with batch_first (B, T, I), or packed rows (N, I) with batch_sizes.
        weights: the parameters in torch.nn's order: for each layer, for each direction weight_ih (4H, I; above the
            first layer D*(P or H) instead of I), weight_hh (4H, P or H), then bias_ih and bias_hh (4H,) each, or
            neither, then weight_hr (P, H) with projection.
        hx: (hx, cx), shapes (L*D, B, P or H) and (L*D, B, H); zeros if None.
        num_layers: L.
        bidirectional: whether each layer has a second direction, reversed in time.
        batch_first: whether input and output are (B, T, ...).
        dropout: probability of zeroing, between layers, with `training`.
        training: whether dropout is active.
        batch_sizes: (T,) int64 on the CPU, not increasing: input is packed rows, as in PackedSequence.
        lengths: (B,) int64, 0 <= lengths[b] <= T: row b ends there; output beyond is zero. Values beyond that range
            count as its ends on an accelerator, where looking at them would halt the device.
        resets: bool (T, B), with batch_first (B, T): True at t starts a new segment, no state crosses its boundary.
            lengths and resets are moved to the input's device.
        return_cell_states: whether every c_t of the last layer is returned too.
        recompute, memory_budget: how training saves memory, as of `rnnfast.LSTM`.

    Returns:
        output (rows, D*(P or H)), (h_n (L*D, B, P or H), c_n (L*D, B, H)), and with return_cell_states the cell_states
        (rows, D*H).

    Raises:
        ValueError: an argument has the wrong shape, type or device. TypeError: lengths are not integers, or resets not
            bool.
    """
    h_0, c_0 = (None, None) if hx is None else hx
    output, h_n, c_n, cell_states = _run(
        "lstm", "LSTM", input, weights, h_0, c_0, num_layers, bidirectional, batch_first, dropout, training,
        batch_sizes, RowOptions(lengths, resets), return_cell_states, recompute, memory_budget,
    )  # fmt: skip
    assert c_n is not None
    if return_cell_states:
        assert cell_states is not None
        return output, (h_n, c_n), cell_states
    return output, (h_n, c_n)


def gru(
    input: Tensor,
    weights: Tensors,
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: str | int | None = None,
    memory_budget: float | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Stacked GRU layers, the reset gate after the product: `n = tanh(W_in x + b_in + r * (W_hn h + b_hn))`.

    Equations: https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html (Cho et al. 2014).

    Args:
        input: (T, B, I), with batch_first (B, T, I), or packed rows (N, I) with batch_sizes.
        weights: the parameters in torch.nn's order: for each layer, for each direction weight_ih (3H, I; above the
            first layer D*H instead of I), weight_hh (3H, H), then bias_ih and bias_hh (3H,) each, or neither.
        hx: (L*D, B, H); zeros if None.
        others: as for `lstm`.

    Returns:
        output (rows, D*H), h_n (L*D, B, H).

    Raises:
        ValueError, TypeError: as for `lstm`.
    """
    output, h_n, _, _ = _run(
        "gru", "GRU", input, weights, hx, None, num_layers, bidirectional, batch_first, dropout, training, batch_sizes,
        RowOptions(lengths, resets), recompute=recompute, memory_budget=memory_budget,
    )  # fmt: skip
    return output, h_n


def rnn(
    input: Tensor,
    weights: Tensors,
    hx: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: str | int | None = None,
    memory_budget: float | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Stacked Elman RNN layers: `h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`.

    Equations: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html (Elman 1990).

    Args:
        input: (T, B, I), with batch_first (B, T, I), or packed rows (N, I) with batch_sizes.
        weights: the parameters in torch.nn's order: for each layer, for each direction weight_ih (H, I; above the
            first layer D*H instead of I), weight_hh (H, H), then bias_ih and bias_hh (H,) each, or neither.
        hx: (L*D, B, H); zeros if None.
        nonlinearity: f, one of "tanh", "relu", "sigmoid" and "identity".
        others: as for `lstm`.

    Returns:
        output (rows, D*H), h_n (L*D, B, H).

    Raises:
        ValueError, TypeError: as for `lstm`; ValueError also where nonlinearity is unknown.
    """
    mode = NONLINEARITIES.get(nonlinearity)
    if mode is None:
        raise ValueError(f"rnn: nonlinearity should be one of {', '.join(NONLINEARITIES)}, got {nonlinearity!r}")
    output, h_n, _, _ = _run(
        "rnn", mode, input, weights, hx, None, num_layers, bidirectional, batch_first, dropout, training, batch_sizes,
        RowOptions(lengths, resets), recompute=recompute, memory_budget=memory_budget,
    )  # fmt: skip
    return output, h_n


def mgu(
    input: Tensor,
    weights: Tensors,
    hx: Tensor | None = None,
    *,
    num_layers: int = 1,
    bidirectional: bool = False,
    batch_first: bool = False,
    dropout: float = 0.0,
    training: bool = False,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    recompute: str | int | None = None,
    memory_budget: float | str | None = None,
) -> tuple[Tensor, Tensor]:
    """Stacked layers of minimal gated units: see `rnnfast.MGU`, for the equations and their source too.

    Args:
        input: (T, B, I), with batch_first (B, T, I), or packed rows (N, I) with batch_sizes.
        weights: the parameters: for each layer, for each direction weight_ih (2H, I; above the first layer D*H instead
            of I), weight_hh (2H, H), then bias_ih and bias_hh (2H,) each, or neither. Gates in the order f, n.
        hx: (L*D, B, H); zeros if None.
        others: as for `lstm`.

    Returns:
        output (rows, D*H), h_n (L*D, B, H).

    Raises:
        ValueError, TypeError: as for `lstm`.
    """
    output, h_n, _, _ = _run(
        "mgu", "MGU", input, weights, hx, None, num_layers, bidirectional, batch_first, dropout, training, batch_sizes,
        RowOptions(lengths, resets), recompute=recompute, memory_budget=memory_budget,
    )  # fmt: skip
    return output, h_n


def _run(
    name: str,
    mode: str,
    input: Tensor,
    weights: Tensors,
    hx: Tensor | None,
    cx: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None,
    options: RowOptions,
    return_cell_states: bool = False,
    recompute: Any = None,
    memory_budget: Any = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Checks the arguments of a public function, and runs the layers."""
    _check_input(name, input, weights, dropout, batch_sizes)
    if input.size(1 if batch_first and batch_sizes is None else 0) == 0:
        # torch.nn's words
        raise ValueError(
            f"{name}: Expected sequence length to be larger than 0 in RNN, got input of shape {list(input.shape)}"
        )
    try:
        if batch_sizes is not None:
            options.refuse_with("packed input (batch_sizes)")
            sequences = packed_sequences(batch_sizes)
        else:
            sequences = dense_sequences(input, batch_first, options)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None
    bias, hidden_size, state_size = _check_weights(name, mode, input, weights, num_layers, bidirectional)
    count = num_layers * (2 if bidirectional else 1)
    has_cell_state = CELLS[mode].has_cell_state
    _check_state(name, "hx[0]" if has_cell_state else "hx", hx, count, state_size, input, sequences)
    _check_state(name, "hx[1]", cx, count, hidden_size, input, sequences)
    return run_layers(
        mode, input, hx, cx, weights, sequences, bias=bias, num_layers=num_layers, bidirectional=bidirectional,
        dropout=dropout, training=training, return_cell_states=return_cell_states,
        recompute=recompute_of(name, recompute, memory_budget),
    )  # fmt: skip


def _check_weights(
    name: str, mode: str, input: Tensor, weights: Tensors, num_layers: int, bidirectional: bool
) -> tuple[bool, int, int]:
    """Checks every parameter: (whether there are biases, H, and P or H)."""
    directions = 2 if bidirectional else 1
    count = num_layers * directions
    each, rest = divmod(len(weights), count) if num_layers > 0 else (0, 1)
    projections = (False, True) if CELLS[mode].may_project else (False,)
    # By their number for a direction of a layer: whether there are biases, and the kinds.
    allowed = {len(kinds_of(bias, p)): (bias, kinds_of(bias, p)) for bias in (False, True) for p in projections}
    if rest or each not in allowed:
        raise ValueError(
            f"{name}: weights should hold {' or '.join(map(str, sorted(allowed)))} tensors for each of {num_layers} "
            f"layer(s) x {directions} direction(s), got {len(weights)} tensors"
        )
    bias, kinds = allowed[each]
    gates = CELLS[mode].gates
    _check_type(name, "weights[0]", weights[0])
    if weights[1].dim() != 2 or weights[1].size(0) % gates:
        raise ValueError(f"{name}: weight_hh should be ({gates}*H, P or H), got {list(weights[1].shape)}")
    hidden_size, state_size = weights[1].size(0) // gates, weights[1].size(1)
    if kinds == kinds_of(bias, False) and hidden_size != state_size:
        expected_hh = [gates * hidden_size, hidden_size]
        raise ValueError(f"{name}: weight_hh should be {expected_hh}, got {list(weights[1].shape)}")
    shapes = shapes_of(gates, input.size(-1), hidden_size, state_size)
    for index, weight in enumerate(weights):
        layer, kind = index // (each * directions), kinds[index % each]
        if index == each * directions:
            shapes = shapes_of(gates, directions * state_size, hidden_size, state_size)
        if weight.shape != shapes[kind]:
            expected, got = list(shapes[kind]), list(weight.shape)
            raise ValueError(f"{name}: weights[{index}], {kind} of layer {layer}, should be {expected}, got {got}")
        if weight.dtype != weights[0].dtype:
            raise ValueError(f"{name}: weights[{index}] should be {weights[0].dtype} as weights[0], got {weight.dtype}")
        if weight.device != input.device:
            raise ValueError(f"{name}: weights[{index}] is on {weight.device}, input on {input.device}")
    return bias, hidden_size, state_size


def _check_type(name: str, label: str, tensor: Tensor) -> None:
    if tensor.dtype not in COMPUTED_TYPES:
        raise ValueError(
            f"{name}: {label} should be of a floating type (float32, float64, bfloat16, float16), got {tensor.dtype}"
        )


def _check_input(name: str, input: Tensor, weights: Tensors, dropout: float, batch_sizes: Tensor | None) -> None:
    _check_type(name, "input", input)
    if weights and input.dtype != weights[0].dtype and not _autocast_active():
        raise ValueError(f"{name}: input is {input.dtype}, the weights are {weights[0].dtype}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{name}: dropout should be in [0, 1], got {dropout}")
    if batch_sizes is not None and input.dim() != 2:
        raise ValueError(f"{name}: with batch_sizes input should be packed rows, 2-D, got {input.dim()}-D")
    if batch_sizes is None and input.dim() != 3:
        raise ValueError(f"{name}: input should be 3-D, (T, B, I) or with batch_first (B, T, I), got {input.dim()}-D")


def _check_state(
    name: str,
    label: str,
    state: Tensor | None,
    count: int,
    features: int,
    input: Tensor,
    sequences: Sequences,
) -> None:
    if state is None:
        return
    batch = input.size(0 if sequences.batch_first else 1) if sequences.batch_sizes is None else None
    if (
        state.dim() != 3
        or state.size(0) != count
        or state.size(2) != features
        or (batch is not None and state.size(1) != batch)
    ):
        expected = f"[{count}, {'B' if batch is None else batch}, {features}]"
        raise ValueError(f"{name}: {label} should be {expected}, got {list(state.shape)}")
    if state.dtype != input.dtype:
        _check_type(name, label, state)
        if not _autocast_active():
            raise ValueError(f"{name}: {label} is {state.dtype}, input is {input.dtype}")
    if state.device != input.device:
        raise ValueError(f"{name}: {label} is on {state.device}, input on {input.device}")

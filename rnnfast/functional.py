"""Layers, directions, dropout between layers, packed rows and autocast: what torch.nn's modules do, without the module.

`lstm`, `gru` and `rnn` are the public functions; the modules call `run_layers` after their own checks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import ops, reference
from .autograd import Layer, apply_layer, layer_in_graph, mark_layer_in_graph
from .backends import select, torch_runs_layers
from .signatures import place_weights

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
    *,
    bias: bool,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None = None,
    lengths: Tensor | None = None,
    resets: Tensor | None = None,
    return_cell_states: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Runs stacked layers. The caller has checked the arguments.

    Args:
        mode: LSTM, GRU, RNN_TANH, RNN_RELU or RNN_IDENTITY.
        input: (T, B, I), with batch_first (B, T, I), or packed rows (N, I) with batch_sizes.
        hx, cx: (L*D, B, P or H), (L*D, B, H), None for zeros; cx for the LSTM only.
        weights: every parameter, in the order of torch.nn's `_flat_weights`.
        dropout: probability, between layers and in training only.
        batch_sizes, lengths, resets: see docs/design.md.
        return_cell_states: whether every c_t of the last layer is wanted (LSTM).

    Returns:
        output (rows, D*P or D*H); h_n (L*D, B, P or H); c_n (L*D, B, H), None but for the LSTM; cell_states (rows, D*H),
        every c_t of the last layer, None unless asked for.
    """
    if _autocast_active():
        device = input.device.type
        if _autocast_available(device) and torch.is_autocast_enabled(device):
            input, hx, cx, weights = _autocast(mode, device, input, hx, cx, weights)
            # From here on the types are what they should be; autocast must not touch the products inside.
            with torch.autocast(device, enabled=False):
                return run_layers(
                    mode, input, hx, cx, weights, bias=bias, num_layers=num_layers, bidirectional=bidirectional,
                    batch_first=batch_first, dropout=dropout, training=training, batch_sizes=batch_sizes,
                    lengths=lengths, resets=resets, return_cell_states=return_cell_states,
                )  # fmt: skip

    graph = _needs_graph(input, hx, cx, weights)
    if num_layers == 1 and not graph and not return_cell_states and not bidirectional:
        # The shortest way, for calls of one step: no loop, no slices.
        output, h_n, c_n = ops.kernels[select(input)].layer(
            mode, batch_first, input, hx, cx, batch_sizes, lengths, resets, weights[0], None, weights[1], None,
            weights[2] if bias else None, None, weights[3] if bias else None, None,
            weights[-1] if len(weights) % 2 else None,
        )  # fmt: skip
        return output, h_n, (c_n if mode == "LSTM" else None), None

    # One step in plain training, where torch's own op is faster.
    one_step = input.dim() == 3 and batch_sizes is None and lengths is None and resets is None
    if one_step and _grad_enabled() and torch_runs_layers(mode, batch_first, input, hx, weights):
        count, batch = num_layers * (2 if bidirectional else 1), input.shape[0 if batch_first else 1]
        torchs_op: Callable[..., Any] = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[mode]
        state = input.new_zeros(count, batch, weights[1].shape[1]) if hx is None else hx
        output, h_n = torchs_op(
            input, state, list(weights), bias, num_layers, dropout, training, bidirectional, batch_first
        )  # fmt: skip
        return output, h_n, None, None

    backend = select(input)
    dual = forward_ad._current_level >= 0
    run: Callable[..., Any]
    if dual:
        run = reference.layer_forward
    elif _captures() and not _functorch_active():
        # The op itself, whether or not gradients are wanted now: it carries its derivative.
        run = ops.differentiable(backend).layer_forward if return_cell_states else ops.differentiable(backend).layer
    elif graph:
        apply = apply_layer
        if torch.compiler.is_compiling() or _functorch_active():
            apply = Layer.apply
            if torch.compiler.is_compiling() and _functorch_active() and mark_layer_in_graph():
                apply = layer_in_graph

        def run(*arguments: Any) -> Any:
            return apply(backend, *arguments)
    else:
        run = ops.kernels[backend].layer_forward if return_cell_states else ops.kernels[backend].layer

    # torch.nn draws its dropout masks on time-major outputs, also with batch_first: so do we, for the same masks. The
    # last layer turns back, so that the result is laid out as it always is.
    drops = dropout > 0 and training and num_layers > 1
    transposed = drops and batch_first and batch_sizes is None
    layer_resets = resets
    if transposed:
        input, batch_first = input.transpose(0, 1), False
        layer_resets = None if resets is None else resets.transpose(0, 1).contiguous()

    directions = 2 if bidirectional else 1
    each = len(weights) // num_layers
    output, cell_states = input, None
    states_h, states_c = [], []
    for layer in range(num_layers):
        last = layer == num_layers - 1
        if transposed and last:
            output, batch_first, layer_resets = output.transpose(0, 1), True, resets
        layer_weights = weights[layer * each : (layer + 1) * each]
        if num_layers == 1:
            layer_hx, layer_cx = hx, cx
        else:
            layer_hx = None if hx is None else hx.narrow(0, layer * directions, directions)
            layer_cx = None if cx is None else cx.narrow(0, layer * directions, directions)
        output, h_n, c_n, *saved = run(
            mode, batch_first, output, layer_hx, layer_cx, batch_sizes, lengths, layer_resets,
            *place_weights(layer_weights, directions, bias),
        )  # fmt: skip
        states_h.append(h_n)
        states_c.append(c_n)
        if last and return_cell_states and mode == "LSTM":
            cell_states = saved[0]
        if drops and not last:
            output = torch.dropout(output, dropout, True)

    all_h = states_h[0] if num_layers == 1 else torch.cat(states_h)
    all_c = None
    if mode == "LSTM":
        all_c = states_c[0] if num_layers == 1 else torch.cat(states_c)
    return output, all_h, all_c, cell_states


def _captures() -> bool:
    """Whether a program is being made of this call that runs without us: by torch.jit.trace or torch.export."""
    return torch._C._get_tracing_state() is not None or torch.compiler.is_exporting()


def _autocast_available(device: str) -> bool:
    """Whether autocast knows this type of device. About the others, meta among them, it must not be asked."""
    return torch.amp.is_autocast_available(device)


# The effect of torch.compiler.assume_constant_result, which would import Dynamo: 2.11's cannot trace the question.
_autocast_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _needs_graph(input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Tensors) -> bool:
    """Whether anybody may differentiate or transform this call."""
    if _functorch_active() or forward_ad._current_level >= 0:
        return True
    if not _grad_enabled():
        return False
    if input.requires_grad or (hx is not None and hx.requires_grad) or (cx is not None and cx.requires_grad):
        return True
    for weight in weights:  # noqa: SIM110 (a generator would cost more than the loop)
        if weight.requires_grad:
            return True
    return False


def _autocast(
    mode: str, device: str, input: Tensor, hx: Tensor | None, cx: Tensor | None, weights: Tensors
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensors]:
    """Casts to the types that torch.nn's modules compute in under autocast; float64 is left alone, as autocast does.

    LSTM and RNN take the autocast type everywhere, the GRU on accelerators only: on the CPU the type of its results is
    promoted from autocast's and its state's, which has the input's type where none is given. (One thing is not copied:
    on CUDA PyTorch casts to float16 for cuDNN also where autocast says bfloat16.)
    """
    dtype = torch.get_autocast_dtype(device)
    if mode == "GRU" and device == "cpu":
        dtype = torch.promote_types(dtype, (input if hx is None else hx).dtype)

    def cast(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.to(dtype)

    return (
        cast(input),
        None if hx is None else cast(hx),
        None if cx is None else cast(cx),
        [cast(weight) for weight in weights],
    )


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

    Returns:
        output (rows, D*(P or H)), (h_n (L*D, B, P or H), c_n (L*D, B, H)), and with return_cell_states the cell_states
        (rows, D*H).

    Raises:
        ValueError: an argument has the wrong shape, type or device.
    """
    _check_input("lstm", input, weights, batch_first, dropout, batch_sizes, lengths, resets)
    bias, hidden_size, out_size = _check_weights("lstm", "LSTM", input, weights, num_layers, bidirectional)
    h_0, c_0 = (None, None) if hx is None else hx
    directions = 2 if bidirectional else 1
    _check_state("lstm", "hx[0]", h_0, num_layers * directions, out_size, input, batch_first, batch_sizes)
    _check_state("lstm", "hx[1]", c_0, num_layers * directions, hidden_size, input, batch_first, batch_sizes)
    output, h_n, c_n, cell_states = run_layers(
        "LSTM", input, h_0, c_0, weights, bias=bias, num_layers=num_layers, bidirectional=bidirectional,
        batch_first=batch_first, dropout=dropout, training=training, batch_sizes=batch_sizes,
        lengths=_beside(input, lengths), resets=_beside(input, resets), return_cell_states=return_cell_states,
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
        ValueError: an argument has the wrong shape, type or device.
    """
    return _without_cells(
        "gru", "GRU", input, weights, hx, num_layers, bidirectional, batch_first, dropout, training, batch_sizes,
        lengths, resets,
    )  # fmt: skip


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
) -> tuple[Tensor, Tensor]:
    """Stacked Elman RNN layers: `h_t = f(W_ih x_t + b_ih + W_hh h_{t-1} + b_hh)`.

    Equations: https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html (Elman 1990).

    Args:
        input: (T, B, I), with batch_first (B, T, I), or packed rows (N, I) with batch_sizes.
        weights: the parameters in torch.nn's order: for each layer, for each direction weight_ih (H, I; above the
            first layer D*H instead of I), weight_hh (H, H), then bias_ih and bias_hh (H,) each, or neither.
        hx: (L*D, B, H); zeros if None.
        nonlinearity: f, one of "tanh", "relu" and "identity".
        others: as for `lstm`.

    Returns:
        output (rows, D*H), h_n (L*D, B, H).

    Raises:
        ValueError: an argument has the wrong shape, type or device, or nonlinearity is unknown.
    """
    if nonlinearity not in ("tanh", "relu", "identity"):
        raise ValueError(f"rnn: nonlinearity should be 'tanh', 'relu' or 'identity', got {nonlinearity!r}")
    return _without_cells(
        "rnn", f"RNN_{nonlinearity.upper()}", input, weights, hx, num_layers, bidirectional, batch_first, dropout,
        training, batch_sizes, lengths, resets,
    )  # fmt: skip


def _without_cells(
    name: str,
    mode: str,
    input: Tensor,
    weights: Tensors,
    hx: Tensor | None,
    num_layers: int,
    bidirectional: bool,
    batch_first: bool,
    dropout: float,
    training: bool,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    _check_input(name, input, weights, batch_first, dropout, batch_sizes, lengths, resets)
    bias, hidden_size, _ = _check_weights(name, mode, input, weights, num_layers, bidirectional)
    directions = 2 if bidirectional else 1
    _check_state(name, "hx", hx, num_layers * directions, hidden_size, input, batch_first, batch_sizes)
    output, h_n, _, _ = run_layers(
        mode, input, hx, None, weights, bias=bias, num_layers=num_layers, bidirectional=bidirectional,
        batch_first=batch_first, dropout=dropout, training=training, batch_sizes=batch_sizes,
        lengths=_beside(input, lengths), resets=_beside(input, resets),
    )  # fmt: skip
    return output, h_n


def _check_weights(
    name: str, mode: str, input: Tensor, weights: Tensors, num_layers: int, bidirectional: bool
) -> tuple[bool, int, int]:
    """Checks every parameter: (whether there are biases, H, and P or H)."""
    directions = 2 if bidirectional else 1
    count = num_layers * directions
    each, rest = divmod(len(weights), count) if num_layers > 0 else (0, 1)
    allowed = (2, 3, 4, 5) if mode == "LSTM" else (2, 4)
    if rest or each not in allowed:
        raise ValueError(
            f"{name}: weights should hold {' or '.join(map(str, allowed))} tensors for each of {num_layers} layer(s) x "
            f"{directions} direction(s), got {len(weights)} tensors"
        )
    bias, projection = each >= 4, each % 2 == 1
    gates = ops.GATES[mode]
    _check_type(name, "weights[0]", weights[0])
    if weights[1].dim() != 2 or weights[1].size(0) % gates:
        raise ValueError(f"{name}: weight_hh should be ({gates}*H, P or H), got {list(weights[1].shape)}")
    hidden_size, out_size = weights[1].size(0) // gates, weights[1].size(1)
    if not projection and hidden_size != out_size:
        expected_hh = [gates * hidden_size, hidden_size]
        raise ValueError(f"{name}: weight_hh should be {expected_hh}, got {list(weights[1].shape)}")
    for index, weight in enumerate(weights):
        layer, kind = index // (each * directions), index % each
        if kind == 0:
            label = "weight_ih"
            expected: tuple[int, ...] = (gates * hidden_size, input.size(-1) if layer == 0 else directions * out_size)
        elif kind == 1:
            label, expected = "weight_hh", (gates * hidden_size, out_size)
        elif bias and kind < 4:
            label, expected = ("bias_ih" if kind == 2 else "bias_hh"), (gates * hidden_size,)
        else:
            label, expected = "weight_hr", (out_size, hidden_size)
        if tuple(weight.shape) != expected:
            raise ValueError(
                f"{name}: weights[{index}], {label} of layer {layer}, should be {list(expected)}, "
                f"got {list(weight.shape)}"
            )
        if weight.dtype != weights[0].dtype:
            raise ValueError(f"{name}: weights[{index}] should be {weights[0].dtype} as weights[0], got {weight.dtype}")
        if weight.device != input.device:
            raise ValueError(f"{name}: weights[{index}] is on {weight.device}, input on {input.device}")
    return bias, hidden_size, out_size


def _check_type(name: str, label: str, tensor: Tensor) -> None:
    if tensor.dtype not in COMPUTED_TYPES:
        raise ValueError(
            f"{name}: {label} should be of a floating type (float32, float64, bfloat16, float16), got {tensor.dtype}"
        )


def _check_input(
    name: str,
    input: Tensor,
    weights: Tensors,
    batch_first: bool,
    dropout: float,
    batch_sizes: Tensor | None,
    lengths: Tensor | None,
    resets: Tensor | None,
) -> None:
    _check_type(name, "input", input)
    if weights and input.dtype != weights[0].dtype and not _autocast_active():
        raise ValueError(f"{name}: input is {input.dtype}, the weights are {weights[0].dtype}")
    if not 0 <= dropout <= 1:
        raise ValueError(f"{name}: dropout should be in [0, 1], got {dropout}")
    if input.dim() > 1 and input.size(1 if batch_first and batch_sizes is None else 0) == 0:
        # torch.nn's words
        raise ValueError(
            f"{name}: Expected sequence length to be larger than 0 in RNN, got input of shape {list(input.shape)}"
        )
    if batch_sizes is not None:
        if input.dim() != 2:
            raise ValueError(f"{name}: with batch_sizes input should be packed rows, 2-D, got {input.dim()}-D")
        if lengths is not None or resets is not None:
            raise ValueError(f"{name}: lengths and resets are for dense input, not for packed rows (batch_sizes)")
        if batch_sizes.dim() != 1 or batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu":
            raise ValueError(
                f"{name}: batch_sizes should be 1-D int64 on the CPU, got {batch_sizes.dim()}-D {batch_sizes.dtype} "
                f"on {batch_sizes.device}"
            )
        return
    if input.dim() != 3:
        raise ValueError(f"{name}: input should be 3-D, (T, B, I) or with batch_first (B, T, I), got {input.dim()}-D")
    steps, batch = (input.size(1), input.size(0)) if batch_first else (input.size(0), input.size(1))
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.dim() != 1 or lengths.size(0) != batch):
        raise ValueError(f"{name}: lengths should be int64 ({batch},), got {lengths.dtype} {list(lengths.shape)}")
    if resets is not None:
        expected = [batch, steps] if batch_first else [steps, batch]
        if resets.dtype != torch.bool or list(resets.shape) != expected:
            raise ValueError(f"{name}: resets should be bool {expected}, got {resets.dtype} {list(resets.shape)}")


def _beside(input: Tensor, tensor: Tensor | None) -> Tensor | None:
    """`tensor` on the input's device. A copy from the host waits for the device: give it there where that matters."""
    return tensor if tensor is None or tensor.device == input.device else tensor.to(input.device)


def _check_state(
    name: str,
    label: str,
    state: Tensor | None,
    count: int,
    features: int,
    input: Tensor,
    batch_first: bool,
    batch_sizes: Tensor | None,
) -> None:
    if state is None:
        return
    batch = input.size(0 if batch_first else 1) if batch_sizes is None else None
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

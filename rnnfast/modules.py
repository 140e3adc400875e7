"""LSTM, GRU and RNN, torch.nn's modules, and MGU, with the time loop in rnnfast's kernels.

The classes derive from torch.nn's, which keep what is stored (parameters, initialisation, pickling, repr); replaced is
what happens in `forward`. Checks and their messages are torch.nn's own, made before anything else runs, and equally for
packed input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .cell_types import CELLS, NONLINEARITIES, CellType
from .functional import COMPUTED_TYPES, run_layers
from .recompute.modules import SavesMemory
from .sequences import EVERY_ROW_COUNTS, RowOptions, Sequences, dense_sequences
from .signatures import kinds_of, suffixes_of
from .tools import as_torch_nn, result_for_tool, tool_watches
from .variants.layers import run_module_layers
from .variants.modules import WithOptions

__all__ = ["GRU", "LSTM", "MGU", "RNN"]

States: TypeAlias = tuple[Tensor, Tensor]


def refuse_type(dtype: torch.dtype, kind: str) -> None:
    """Raises RuntimeError if layers cannot compute in `dtype`; for who has found it outside COMPUTED_TYPES.

    Complex numbers pass to the reference, as torch.nn takes them, but not under autocast, which would take their real
    parts.
    """
    if not dtype.is_complex or torch._C._is_any_autocast_enabled():
        allowed = "float32, float64, bfloat16 or float16"
        raise RuntimeError(f"Expected {kind} tensors of a floating type ({allowed}), found {dtype}")


def check_alike(input: Tensor, tensor: Tensor, kind: str) -> None:
    """Raises RuntimeError unless `tensor` is on the device of `input` and, outside autocast, of its type."""
    # On the path of every call, where this costs half of comparing devices.
    if tensor.dtype is input.dtype and tensor.is_cpu and input.is_cpu:
        return
    if tensor.device != input.device:
        raise RuntimeError(
            f"Input and {kind} tensors are not at the same device, "
            f"found input tensor at {input.device} and {kind} tensor at {tensor.device}"
        )
    if tensor.dtype != input.dtype:
        if not torch._C._is_any_autocast_enabled():
            raise RuntimeError(
                f"Input and {kind} tensors are not the same dtype, "
                f"found input tensor with {input.dtype} and {kind} tensor with {tensor.dtype}"
            )
        if tensor.dtype not in COMPUTED_TYPES:
            refuse_type(tensor.dtype, kind)


def check_weights(input: Tensor, weights: list[Tensor]) -> None:
    """Raises RuntimeError unless each of `weights` is as `check_alike` wants it."""
    dtype, device = input.dtype, input.device
    if input.is_cpu:
        # On the path of every call, where this costs half of comparing devices.
        for weight in weights:
            if not weight.is_cpu or weight.dtype is not dtype:
                check_alike(input, weight, "parameter")
        return
    for weight in weights:
        if weight.device != device or weight.dtype is not dtype:
            check_alike(input, weight, "parameter")


class Recurrent(SavesMemory, WithOptions, nn.RNNBase):
    """What the layers share: weights, checks, and the call of the layers."""

    # How _dynamo_hook.py knows our layers.
    _rnnfast_layer = True
    # What runs each layer, where the weights are such as the backends do not know: quantized.
    _kernel: Any = None

    __prepare_scriptable__ = as_torch_nn

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, by layer and direction."""
        return suffixes_of(self.num_layers, bool(self.bidirectional))

    def _mode(self) -> str:
        return self._own_mode or self.mode

    def _shape_of_weight_hh(self, cell: CellType, state_size: int) -> tuple[int, int]:
        options, hidden_size = self._options, self.hidden_size
        if options is None:
            return cell.gates * hidden_size, state_size
        return options.gates(cell.gates) * hidden_size, state_size // options.num_heads

    def _cell_size(self) -> int:
        """Of c, as it travels."""
        return self.hidden_size

    def _no_cell_state(self, like: Tensor, count: int, batch: int) -> Tensor:
        """What c is where none is given."""
        return like.new_zeros(count, batch, self._cell_size())

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels read each weight where it is, so there is no flat buffer to keep."""

    def _weights(self) -> list[Tensor]:
        """The weights in `_flat_weights` order as they are NOW, whoever replaced them and how.

        Plain parameters are found in one look (functional_call puts its own there too). Those that weight_norm, prune,
        parametrize or DataParallel turned into attributes or properties are asked for by name; a deleted one is served
        by the list, as in torch.nn.
        """
        parameters = self._parameters
        weights: list[Any] = [parameters.get(name) for name in self._flat_weights_names]
        for i, weight in enumerate(weights):
            if weight is None:
                name = self._flat_weights_names[i]
                weight = getattr(self, name, None)
                weights[i] = self._flat_weights[i] if weight is None else weight
                if weights[i] is None:
                    raise RuntimeError(f"{type(self).__name__}: parameter {name} is missing")
        return weights

    _check_weights = staticmethod(check_weights)

    def _check(self, input: Tensor, batch: int, h: Tensor | None, c: Tensor | None) -> tuple[str, list[Tensor]]:
        """torch.nn's checks, in its order and words, for `input` (T, N, I), (N, T, I) or packed rows: mode, weights."""
        weights = self._weights()
        bias: Any = self.bias
        proj_size, hidden_size = self.proj_size, self.hidden_size
        each = 4 if bias is True else 2
        if proj_size > 0:
            each += 1
        # A bias that is no bool fits no number of weights: it is refused where they are counted.
        count = each * self.num_layers if bias is True or bias is False else -1
        if len(weights) != (count * 2 if self.bidirectional else count):
            weights = self._first_weights(weights)
        dtype, weight_dtype = input.dtype, weights[0].dtype
        if dtype != weight_dtype and not torch._C._is_any_autocast_enabled():
            self._refuse_input(dtype, weight_dtype)
        if dtype not in COMPUTED_TYPES:
            refuse_type(dtype, "input")
        if input.shape[-1] != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.shape[-1]}"
            )
        state_size = proj_size if proj_size > 0 else hidden_size
        if h is not None:
            self._check_state(h, batch, state_size, "hidden" if c is None else "hidden[0]")
            check_alike(input, h, "hidden")
        mode = self._own_mode or self.mode
        cell = CELLS.get(mode)
        # What plain layers have: a method less on the path of every call.
        fits = cell is not None and self._options is None and weights[1].shape == (cell.gates * hidden_size, state_size)
        if not fits and (cell is None or weights[1].shape != self._shape_of_weight_hh(cell, state_size)):
            self._refuse_sizes(weights[1], state_size)
        if c is not None:
            self._check_state(c, batch, self._cell_size(), "hidden[1]")
            check_alike(input, c, "hidden")
        self._check_weights(input, weights)
        if self.dropout != 0:
            self._check_dropout()
        return mode, weights

    def _first_weights(self, weights: list[Tensor]) -> list[Tensor]:
        """The weights to use where the attributes ask for another number of them than there is.

        They were changed since the parameters were made. torch.nn's LSTM, without projection, then uses the first of
        its weights, which is right where those have the names that the attributes ask for: so does ours. All else is an
        error there, or wrong.
        """
        self._check_flags()
        layers: Any = self.num_layers
        if not isinstance(layers, int):
            raise TypeError(f"{type(self).__name__}: num_layers should be of type int, got: {type(layers).__name__}")
        kinds = kinds_of(bool(self.bias), self.proj_size > 0)
        names = [kind + suffix for suffix in suffixes_of(layers, bool(self.bidirectional)) for kind in kinds]
        there_are = 0 < len(names) < len(weights) and self._flat_weights_names[: len(names)] == names
        if there_are and self._own_mode == "LSTM" and self.proj_size <= 0:
            return weights[: len(names)]
        attributes = ("num_layers", "bias", "bidirectional", "proj_size")
        raise RuntimeError(
            f"{type(self).__name__}: {', '.join(f'{name}={getattr(self, name)}' for name in attributes)} need "
            f"{len(names)} weights, but the module was made with {len(weights)}: {', '.join(self._flat_weights_names)}"
        )

    def _check_flags(self) -> None:
        for name in ("bias", "batch_first"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise TypeError(f"{type(self).__name__}: {name} should be of type bool, got: {type(value).__name__}")

    def _refuse_input(self, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
        """Raises ValueError, as the input is not of the type of the weights."""
        raise ValueError(
            f"RNN input dtype ({dtype}) does not match weight dtype ({weight_dtype}). "
            f"Convert input: input.to({weight_dtype}), or convert model: model.to({dtype})"
        )

    def _refuse_sizes(self, weight_hh: Tensor, state_size: int) -> None:
        """Raises what fits `mode`, `hidden_size` or `proj_size` that are not those of the weights."""
        mode = self._mode()
        if mode not in CELLS or (self._own_mode is None and mode not in NONLINEARITIES.values()):
            *others, last = NONLINEARITIES.values()
            raise AssertionError(f"mode must be {', '.join(others)} or {last}, got {mode}")
        raise RuntimeError(
            f"{type(self).__name__}: hidden_size={self.hidden_size}, proj_size={self.proj_size} need weight_hh_l0 of "
            f"shape {self._shape_of_weight_hh(CELLS[mode], state_size)}, got {tuple(weight_hh.shape)}"
        )

    def _check_dropout(self) -> None:
        """torch.nn's: the type always, the range where it is used."""
        p: Any = self.dropout
        if not isinstance(p, (float, int, Tensor)) and not hasattr(p, "__float__"):
            raise TypeError(f"{type(self).__name__}: dropout should be a number, got {type(p).__name__}")
        if self.training and self.num_layers > 1 and not 0 <= p <= 1:
            raise RuntimeError(f"dropout probability has to be between 0 and 1, but got {p}")

    def _check_state(self, state: Tensor, batch: int, size: int, name: str) -> None:
        layers = self.num_layers * (2 if self.bidirectional else 1)
        shape = state.shape
        if len(shape) != 3 or shape[0] != layers or shape[1] != batch or shape[2] != size:
            name += " size"
            raise RuntimeError(f"Expected {name} ({layers}, {batch}, {size}), got {list(shape)}")

    def _run(
        self,
        input: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        options: RowOptions | None,
        cell_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Dense input, (T, N, I), (N, T, I) or (T, I): checks, then all layers. Returns output, h_n, c_n, every c_t."""
        batch_first: Any = self.batch_first
        if batch_first is not True and batch_first is not False:
            self._check_flags()
        rank = input.dim()
        if rank == 2:
            return self._run_unbatched(input, h, c, options, cell_states)
        if rank != 3:
            # torch.nn's RNN alone says "tensor".
            name, noun = (self._own_mode, "") if self._own_mode else ("RNN", " tensor")
            raise ValueError(f"{name}: Expected input to be 2D or 3D, got {rank}D{noun} instead")
        steps, batch = (input.shape[1], input.shape[0]) if batch_first else (input.shape[0], input.shape[1])
        mode, weights = self._check(input, batch, h, c)
        if steps == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
        sequences = EVERY_ROW_COUNTS[batch_first] if options is None else dense_sequences(input, batch_first, options)
        run = run_layers if self._options is None else run_module_layers(self, self._options)
        return run(
            mode, input, h, c, weights, sequences, bias=self.bias,
            num_layers=self.num_layers, bidirectional=bool(self.bidirectional), dropout=self.dropout,
            training=self.training, return_cell_states=cell_states, kernel=self._kernel, recompute=self._recompute,
        )  # fmt: skip

    def _run_unbatched(
        self,
        input: Tensor,
        h: Tensor | None,
        c: Tensor | None,
        options: RowOptions | None,
        cell_states: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(T, I) as a batch of one. What comes back has no batch dimension either."""
        axis = 0 if self.batch_first else 1
        output, h_n, c_n, every_c = self._run(
            input.unsqueeze(axis),
            None if h is None else h.unsqueeze(1),
            None if c is None else c.unsqueeze(1),
            None if options is None else options.of_a_batch_of_one(input.shape[0], axis),
            cell_states,
        )
        return (
            output.squeeze(axis),
            h_n.squeeze(1),
            None if c_n is None else c_n.squeeze(1),
            None if every_c is None else every_c.squeeze(axis),
        )

    def _run_packed(
        self,
        packed: PackedSequence,
        h: Tensor | None,
        c: Tensor | None,
        options: RowOptions | None,
        cell_states: bool,
    ) -> tuple[PackedSequence, Tensor, Tensor | None, PackedSequence | None]:
        """Packed rows go to the ops as they are; the states are permuted on the way in and on the way out."""
        if options is not None:
            options.refuse_with("a PackedSequence")
        input, batch_sizes, sorted_indices, unsorted_indices = packed
        if input.dim() != 2:
            raise RuntimeError(f"input must have 2 dimensions, got {input.dim()}")
        # A shape is asked before a value: reading a value breaks a graph that is being traced. There, the op itself
        # compares hx with the first batch size.
        batch = 0
        if sorted_indices is not None:
            batch = sorted_indices.shape[0]
        elif h is not None:
            batch = h.shape[1] if torch.compiler.is_compiling() else int(batch_sizes[0])
        mode, weights = self._check(input, batch, h, c)
        if h is None and sorted_indices is not None and torch.compiler.is_compiling():
            # Without a state the op's results have a size that is a number in batch_sizes, which breaks a graph.
            count = self.num_layers * (2 if self.bidirectional else 1)
            h = input.new_zeros(count, batch, self.proj_size or self.hidden_size)
            c = self._no_cell_state(input, count, batch) if CELLS[mode].has_cell_state else None
        if sorted_indices is not None:
            h = None if h is None else h.index_select(1, sorted_indices)
            c = None if c is None else c.index_select(1, sorted_indices)
        run = run_layers if self._options is None else run_module_layers(self, self._options)
        output, h_n, c_n, every_c = run(
            mode, input, h, c, weights, Sequences(batch_sizes), bias=self.bias, num_layers=self.num_layers,
            bidirectional=bool(self.bidirectional), dropout=self.dropout, training=self.training,
            return_cell_states=cell_states, kernel=self._kernel, recompute=self._recompute,
        )  # fmt: skip
        if unsorted_indices is not None:
            h_n = h_n.index_select(1, unsorted_indices)
            c_n = None if c_n is None else c_n.index_select(1, unsorted_indices)
        return (
            PackedSequence(output, batch_sizes, sorted_indices, unsorted_indices),
            h_n,
            c_n,
            None if every_c is None else PackedSequence(every_c, batch_sizes, sorted_indices, unsorted_indices),
        )

    def _check_ranks(self, input: Tensor, hx: Tensor) -> None:
        """The rank of a lone state against that of a dense input."""
        rank = input.dim()
        if rank in (2, 3) and hx.dim() != rank:
            what = "batched" if rank == 3 else "unbatched"
            raise RuntimeError(f"For {what} {rank}-D input, hx should also be {rank}-D but got {hx.dim()}-D tensor")


class LSTM(Recurrent, nn.LSTM):
    r"""A drop-in for :class:`torch.nn.LSTM`: the same arguments, parameters, results and errors.

    .. math::
        i, f, g, o &= \sigma, \sigma, \tanh, \sigma \text{ of } W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        c_t &= f \odot c_{t-1} + i \odot g, \qquad h_t = o \odot \tanh(c_t)

    with :math:`h_t = W_{hr} (o \odot \tanh(c_t))` where ``proj_size > 0`` (Sak et al., https://arxiv.org/abs/1402.1128).
    Source of the equations: the documentation of :class:`torch.nn.LSTM`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: L layers stacked, each on the output of the one below. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        batch_first: input and output are (N, T, .) instead of (T, N, .); states never. Default: False
        dropout: probability of an element being zeroed between layers, in training. Default: 0
        bidirectional: D = 2 directions, the second reversed in time. Default: False
        proj_size: P > 0 projects h to P features. Default: 0
        device, dtype: of the parameters.
        layer_norm, cell_norm, peephole and so on: by keyword, what torch.nn lacks: :class:`rnnfast.variants.Options`.
        recompute, memory_budget: by keyword, how training saves memory: see their properties.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM does, in its words.
    """

    _own_mode = "LSTM"

    def forward(  # type: ignore[override]
        self,
        input: Tensor | PackedSequence,
        hx: States | Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
        return_cell_states: bool = False,
    ) -> Any:
        """Runs the layers over a sequence.

        Args:
            input: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0) of shapes (D*L, N, P or H) and (D*L, N, H), without N for unbatched input. None means zeros.
            lengths: (N,) integers, 0 <= lengths <= T. Row n ends after lengths[n] steps: the output beyond is zero, the
                final states are those of its last step (with length 0: hx), and the reverse direction starts there.
            resets: bool (T, N), with batch_first (N, T), unbatched (T,). True at t starts a new segment at t: no state
                crosses the boundary before t, in either direction. hx serves the first segment (reverse direction: the
                last).
            return_cell_states: also return every c_t of the last layer.
        Returns:
            output, (h_n, c_n): output (T, N, D*P or D*H) or as the input is laid out; states shaped as hx.
            With return_cell_states: output, (h_n, c_n), cell_states of shape (T, N, D*H), packed if the input is.
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit, in the words of torch.nn.LSTM.
            ValueError, TypeError: lengths or resets that do not fit, or that come with a PackedSequence.
        """
        if (type(input) is not Tensor and type(input) is not PackedSequence) or tool_watches():
            watched = RowOptions(lengths, resets)._asdict() | {"return_cell_states": return_cell_states}
            if (result := result_for_tool(self, input, hx, **watched)) is not None:
                return result[0]
        h: Tensor | None = None
        c: Tensor | None = None
        if hx is not None:
            if len(hx) != 2:
                raise RuntimeError("lstm expects two hidden states")
            h, c = hx[0], hx[1]
            if not isinstance(input, PackedSequence):
                rank = input.dim()
                if rank in (2, 3) and (h.dim() != rank or c.dim() != rank):
                    raise RuntimeError(
                        f"For {'batched' if rank == 3 else 'unbatched'} {rank}-D input, hx and cx should "
                        f"also be {rank}-D but got ({h.dim()}-D, {c.dim()}-D) tensors"
                    )
        options = None if lengths is None and resets is None else RowOptions(lengths, resets)
        output: Any
        cell_states: Any
        if isinstance(input, PackedSequence):
            output, h_n, c_n, cell_states = self._run_packed(input, h, c, options, return_cell_states)
        else:
            output, h_n, c_n, cell_states = self._run(input, h, c, options, return_cell_states)
        if return_cell_states:
            return output, (h_n, c_n), cell_states
        return output, (h_n, c_n)


class _OneState(Recurrent):
    """All but the LSTM: the state is one tensor."""

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: Tensor | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> Any:
        """Runs the layers over a sequence.

        Args:
            input: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or a PackedSequence.
            hx: h_0 of shape (D*L, N, H), without N for unbatched input. None means zeros.
            lengths: (N,) integers, 0 <= lengths <= T. Row n ends after lengths[n] steps: the output beyond is zero, h_n
                is the state of its last step (with length 0: hx), and the reverse direction starts there.
            resets: bool (T, N), with batch_first (N, T), unbatched (T,). True at t starts a new segment at t: no state
                crosses the boundary before t, in either direction. hx serves the first segment (reverse direction: the
                last).
        Returns:
            output, h_n: output (T, N, D*H) or as the input is laid out; h_n shaped as hx.
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit, in the words of torch.nn.
            ValueError, TypeError: lengths or resets that do not fit, or that come with a PackedSequence.
        """
        if (type(input) is not Tensor and type(input) is not PackedSequence) or tool_watches():
            result = result_for_tool(self, input, hx, **RowOptions(lengths, resets)._asdict())
            if result is not None:
                return result[0]
        options = None if lengths is None and resets is None else RowOptions(lengths, resets)
        if isinstance(input, PackedSequence):
            packed, h_n, _, _ = self._run_packed(input, hx, None, options, False)
            return packed, h_n
        if hx is not None:
            self._check_ranks(input, hx)
        output, h_n, _, _ = self._run(input, hx, None, options, False)
        return output, h_n


class GRU(_OneState, nn.GRU):
    r"""A drop-in for :class:`torch.nn.GRU`: the same arguments, parameters, results and errors.

    .. math::
        r, z &= \sigma(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh}) \\
        n &= \tanh(W_{in} x_t + b_{in} + r \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    Source of the equations: the documentation of :class:`torch.nn.GRU`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: L layers stacked, each on the output of the one below. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        batch_first: input and output are (N, T, .) instead of (T, N, .); states never. Default: False
        dropout: probability of an element being zeroed between layers, in training. Default: 0
        bidirectional: D = 2 directions, the second reversed in time. Default: False
        device, dtype: of the parameters.
        layer_norm, zoneout, reset_after and so on: by keyword, what torch.nn lacks: :class:`rnnfast.variants.Options`.
        recompute, memory_budget: by keyword, how training saves memory: see their properties.

    Raises:
        ValueError, TypeError: as torch.nn.GRU does, in its words.
    """

    _own_mode = "GRU"


class MGU(_OneState):
    r"""The minimal gated unit: a GRU with one gate f in place of two, and two thirds of its weights.

    .. math::
        f &= \sigma(W_{if} x_t + b_{if} + W_{hf} h_{t-1} + b_{hf}) \\
        n &= \tanh(W_{in} x_t + b_{in} + f \odot (W_{hn} h_{t-1} + b_{hn})) \\
        h_t &= (1 - f) \odot h_{t-1} + f \odot n

    Source: Zhou, Wu, Zhang, Zhou 2016, https://arxiv.org/abs/1603.09420. As in torch.nn's GRU the gate comes after the
    product, :math:`f \odot (W_{hn} h)`, where the paper has :math:`W_{hn} (f \odot h)`. torch.nn has no such layer;
    arguments, parameters (gates in the order f, n) and their initialisation are as in :class:`torch.nn.GRU`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: L layers stacked, each on the output of the one below. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        batch_first: input and output are (N, T, .) instead of (T, N, .); states never. Default: False
        dropout: probability of an element being zeroed between layers, in training. Default: 0
        bidirectional: D = 2 directions, the second reversed in time. Default: False
        device, dtype: of the parameters.
        recompute, memory_budget: by keyword, how training saves memory: see their properties.

    Raises:
        ValueError, TypeError: as torch.nn.GRU does.
    """

    _own_mode = "MGU"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: str | int | None = None,
        memory_budget: float | str | None = None,
    ) -> None:
        # torch.nn knows the widths of its own cells only: those of one gate, without memory, are put right here.
        super().__init__(
            "RNN_TANH", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device="meta",
            recompute=recompute, memory_budget=memory_budget,
        )  # fmt: skip
        self.mode = self._own_mode
        for name, parameter in list(self._parameters.items()):
            assert parameter is not None
            rows, *others = parameter.shape
            made = torch.empty(CELLS[self.mode].gates * rows, *others, device=device, dtype=dtype)
            setattr(self, name, nn.Parameter(made))
        self.reset_parameters()


class RNN(_OneState, nn.RNN):
    r"""A drop-in for :class:`torch.nn.RNN`: the same arguments, parameters, results and errors.

    Besides torch.nn's nonlinearities there are the logistic function and a linear recurrence.

    .. math:: h_t = \phi(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})

    with :math:`\phi` tanh, relu, sigmoid, or the identity. Source of the equation: the documentation of
    :class:`torch.nn.RNN`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: L layers stacked, each on the output of the one below. Default: 1
        nonlinearity: ``'tanh'``, ``'relu'``, ``'sigmoid'`` or ``'identity'``. Default: ``'tanh'``
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        batch_first: input and output are (N, T, .) instead of (T, N, .); states never. Default: False
        dropout: probability of an element being zeroed between layers, in training. Default: 0
        bidirectional: D = 2 directions, the second reversed in time. Default: False
        device, dtype: of the parameters.
        layer_norm, zoneout, num_heads and so on: by keyword, what torch.nn lacks: :class:`rnnfast.variants.Options`.
        recompute, memory_budget: by keyword, how training saves memory: see their properties.

    Raises:
        ValueError, TypeError: as torch.nn.RNN does, in its words.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Where torch.nn does not know the nonlinearity, it builds a tanh RNN, whose parameters are the same.
        wanted = args[3] if len(args) > 3 else kwargs.get("nonlinearity", "tanh")
        ours = NONLINEARITIES.get(wanted) if isinstance(wanted, str) else None
        if ours is None or CELLS[ours].torch_cell is not None:
            super().__init__(*args, **kwargs)
            return
        if len(args) > 3:
            args = (*args[:3], "tanh", *args[4:])
        else:
            kwargs["nonlinearity"] = "tanh"
        super().__init__(*args, **kwargs)
        self.nonlinearity = wanted
        self.mode = ours

    def extra_repr(self) -> str:
        # torch.nn leaves the nonlinearity out; one that it does not have is worth showing.
        theirs = CELLS[self.mode].torch_cell is not None if self.mode in CELLS else True
        return super().extra_repr() + ("" if theirs else f", nonlinearity={self.nonlinearity}")

"""LSTMCell, GRUCell, RNNCell: torch.nn's cells, one step of the same recurrence that the layers run; and MGUCell.

A cell is one step of a layer, so it has the layers' kernels, vmap rule and double backward; in plain training torch's
own op runs where it is faster (`backends.torch_runs_cell`). Checks and messages are torch.nn's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn

from .backends import is_plain_call, select, torch_runs_cell, torch_runs_plain_cell
from .cell_types import CELLS, NONLINEARITIES
from .functional import COMPUTED_TYPES, run_layers
from .modules import check_alike, check_weights, refuse_type
from .sequences import Sequences
from .signatures import kinds_of
from .steps import run_step
from .tools import as_torch_nn, result_for_tool, tool_watches
from .variants.layers import run_module_step
from .variants.modules import WithOptions

__all__ = ["GRUCell", "LSTMCell", "MGUCell", "RNNCell"]

_ONE_STEP = Sequences()

# Bound once: on the path of every call.
_grad_enabled = torch.is_grad_enabled
_KINDS_WITH_BIAS, _KINDS_WITHOUT = kinds_of(True, False), kinds_of(False, False)


class Cell(WithOptions, nn.RNNCellBase):
    """What the cells share: weights, checks, and the step."""

    __prepare_scriptable__ = as_torch_nn
    _refused: ClassVar[dict[str, str]] = dict.fromkeys(
        ("recurrent_dropout", "dropout_mode", "input_dropout", "weight_dropout"),
        "an option of layers alone: its mask is one for a whole sequence, and a cell sees one step",
    ) | dict.fromkeys(
        ("batch_norm", "batch_norm_momentum", "batch_norm_steps"),
        "an option of layers alone: its statistics are of a whole sequence, and a cell sees one step",
    )

    # What runs the step, and I and H, where the weights are such as the backends do not know: quantized.
    _kernel: Any = None
    _sizes: tuple[int, int] | None = None
    _check_weights = staticmethod(check_weights)

    def _suffixes(self) -> list[str]:
        return [""]

    def _weights(self) -> list[Tensor]:
        """weight_ih, weight_hh and, with bias, bias_ih, bias_hh as they are now, whoever replaced them."""
        parameters = self._parameters
        names = _KINDS_WITH_BIAS if self.bias else _KINDS_WITHOUT
        weights: list[Any] = [parameters.get(name) for name in names]
        for weight in weights:
            if weight is None:
                # weight_norm, prune and parametrize keep some elsewhere.
                return [getattr(self, name) for name in names]
        return weights

    def _check(self, input: Tensor, states: tuple[Tensor, ...], weights: list[Tensor]) -> None:
        """`input` (N, I) and `states` (N, H) against the sizes of the weights, and the attributes too.

        Those may have been changed. As torch.nn, the input is compared with the weights, which need not be what
        `input_size` says; `hidden_size` is what the states of zeros have that stand for those not given.
        """
        if input.dtype not in COMPUTED_TYPES:
            refuse_type(input.dtype, "input")
        if weights[-1] is None or (not self.bias and self._parameters.get("bias_ih", "elsewhere") is not None):
            made = "without" if weights[-1] is None else "with"
            raise RuntimeError(f"{type(self).__name__}: bias={self.bias}, but the cell was made {made} biases")
        batch, features = input.shape
        input_size, hidden_size = self._sizes or (weights[0].shape[1], weights[1].shape[1] * self._heads())
        if features != self.input_size and features != input_size:
            raise RuntimeError(f"input has inconsistent input_size: got {features} expected {input_size}")
        if hidden_size != self.hidden_size and (not states or self.hidden_size == 0):
            raise RuntimeError(f"hidden0 has inconsistent hidden_size: got {self.hidden_size}, expected {hidden_size}")
        for i, state in enumerate(states):
            shape = state.shape
            if shape[0] != batch:
                raise RuntimeError(f"Input batch size {batch} doesn't match hidden{i} batch size {shape[0]}")
            # An unbatched input with a batched state comes here as (1, N, H).
            if len(shape) != 2 or shape[1] != hidden_size:
                size = shape[1] if len(shape) > 1 and shape[1] != hidden_size else list(shape)
                raise RuntimeError(f"hidden{i} has inconsistent hidden_size: got {size}, expected {hidden_size}")
            check_alike(input, state, "hidden")
        self._check_weights(input, weights)

    def _at_once(self, input: Tensor, h: Any, c: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
        """The results of a usual call, whose checks the op makes; None for any other."""
        if not is_plain_call() or self._kernel or self._options or not input.is_cpu or input.dim() != 2:
            return None
        if h is not None and not isinstance(h, Tensor):
            return None
        parameters = self._parameters
        weight_ih, weight_hh = parameters.get("weight_ih"), parameters.get("weight_hh")
        biases: Any = parameters.get("bias_ih", self), parameters.get("bias_hh", self)
        # weight_norm, prune and parametrize keep some elsewhere; a bias may have been taken out or put in.
        if weight_ih is None or weight_hh is None or self is biases[1] or (biases[0] is not None) is not self.bias:
            return None
        if self.hidden_size == 0 or (h is None and weight_hh.shape[1] != self.hidden_size) or select(input) != "cpu":
            return None
        mode, weights = self._mode(), (weight_ih, weight_hh, *biases)
        try:
            if _grad_enabled() and torch_runs_plain_cell(mode, input, h, c, weights):
                return _torchs_step(mode, input, h, c, weights)
            output, _, c_n = run_step(("cpu", mode, False, *weights), input, h, c)
        except RuntimeError:
            # What does not fit, in the words of torch.nn; anything else is not about this call.
            states = () if h is None else (h,) if c is None else (h, c)
            if all(state.dim() == 2 for state in states):
                self._check(input, states, self._weights())
                raise
            return None
        return output, c_n

    def _step(self, input: Tensor, h: Tensor | None, c: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checks, then one step for input (N, I) or (I,). Returns h', c' (c' None without a cell state)."""
        mode = self._mode()
        batched = input.dim() == 2
        if not batched:
            input = input.unsqueeze(0)
            h = None if h is None else h.unsqueeze(0)
            c = None if c is None else c.unsqueeze(0)
        weights = self._weights()
        states = () if h is None else (h,) if c is None else (h, c)
        self._check(input, states, weights)
        if mode in ("LSTM", "GRU") and input.is_cpu and torch.is_autocast_enabled("cpu") and self._kernel is None:
            # On the CPU autocast lowers only the products inside torch.nn's LSTMCell and GRUCell: the result has the
            # wider of the autocast type and the state's type. Here all of the step runs in that type.
            carried = states[-1] if states else input
            wide = torch.promote_types(torch.get_autocast_dtype("cpu"), carried.dtype)
            with torch.autocast("cpu", enabled=False):
                h_n, c_n = self._call(
                    mode,
                    input.to(wide),
                    None if h is None else h.to(wide),
                    None if c is None else c.to(wide),
                    [weight.to(wide) for weight in weights],
                )
        else:
            h_n, c_n = self._call(mode, input, h, c, weights)
        if not batched:
            # Copies: callers write into states, which views would not allow.
            return h_n.squeeze(0).clone(), None if c_n is None else c_n.squeeze(0).clone()
        return h_n, c_n

    def _call(
        self, mode: str, input: Tensor, h: Tensor | None, c: Tensor | None, weights: list[Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """One step as the ops take it: without a time dimension, so that results are no views."""
        if self.hidden_size == 0:
            # Nothing to compute; the product keeps the result attached to the graph, as it is in torch.nn.
            empty = nn.functional.linear(input, weights[0])
            return empty, empty.clone() if CELLS[mode].has_cell_state else None
        kernel = self._kernel
        if self._options is not None:
            return run_module_step(self, self._options, mode, input, h, c, weights)
        if _grad_enabled() and kernel is None and torch_runs_cell(mode, input, h, c, weights):
            return _torchs_step(mode, input, h, c, weights)
        output, _, c_n, _ = run_layers(
            mode, input, h, c, weights, _ONE_STEP, bias=bool(self.bias), training=self.training, kernel=kernel
        )
        return output, c_n

    def _one_state(self, input: Tensor, hx: Tensor | None) -> Tensor:
        """What forward does where the state is one tensor."""
        if type(input) is Tensor and not tool_watches():
            done = self._at_once(input, hx, None)
            if done is not None:
                return done[0]
        elif (result := result_for_tool(self, input, hx)) is not None:
            output: Tensor = result[0]
            return output
        if input.dim() not in (1, 2):
            self._refuse_rank("input", input)
        if hx is not None and hx.dim() not in (1, 2):
            self._refuse_rank("hidden", hx)
        return self._step(input, hx, None)[0]

    def _refuse_rank(self, name: str, tensor: Tensor) -> NoReturn:
        cell = next(cls for cls in type(self).__mro__ if cls.__module__ == __name__).__name__
        raise ValueError(f"{cell}: Expected {name} to be 1D or 2D, got {tensor.dim()}D instead")


def _torchs_step(
    mode: str, input: Tensor, h: Tensor | None, c: Tensor | None, weights: Sequence[Any]
) -> tuple[Tensor, Tensor | None]:
    """One step by torch's own op: `backends.torch_runs_cell` says when."""
    zeros = input.new_zeros(input.shape[0], weights[1].shape[1]) if h is None else h
    weight_ih, weight_hh, *biases = weights
    bias_ih, bias_hh = biases or (None, None)
    step = CELLS[mode].torch_cell
    assert step is not None
    if CELLS[mode].has_cell_state:
        h_n, c_n = step(input, (zeros, zeros if c is None else c), weight_ih, weight_hh, bias_ih, bias_hh)
        return h_n, c_n
    return step(input, zeros, weight_ih, weight_hh, bias_ih, bias_hh), None


class LSTMCell(Cell, nn.LSTMCell):
    r"""A drop-in for :class:`torch.nn.LSTMCell`: the same arguments, parameters, results and errors.

    .. math::
        i, f, g, o = \sigma, \sigma, \tanh, \sigma \text{ of } W_{ih} x + b_{ih} + W_{hh} h + b_{hh}, \quad
        c' = f \odot c + i \odot g, \quad h' = o \odot \tanh(c')

    Source of the equations: the documentation of :class:`torch.nn.LSTMCell`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state; 0 is allowed.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        device, dtype: of the parameters.
        layer_norm, cell_norm, peephole and so on: by keyword, what torch.nn lacks: :class:`rnnfast.variants.Options`.
    """

    _own_mode = "LSTM"

    def _mode(self) -> str:
        return "LSTM"

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | Sequence[Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Args:
            input: (N, I) or (I,).
            hx: (h, c), each (N, H) or (H,). None means zeros.
        Returns:
            (h', c'), each (N, H) or (H,).
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit, in the words of torch.nn.
        """
        h: Tensor | None = None
        c: Tensor | None = None
        if type(input) is Tensor and not tool_watches():
            if hx is not None and len(hx) == 2:
                h, c = hx
            if (hx is None or (h is not None and isinstance(c, Tensor))) and (
                done := self._at_once(input, h, c)
            ) is not None:
                return done  # type: ignore[return-value]
        elif (result := result_for_tool(self, input, hx)) is not None:
            states: tuple[Tensor, Tensor] = result[0]
            return states
        if input.dim() not in (1, 2):
            self._refuse_rank("input", input)
        if hx is not None:
            if len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
            h, c = hx[0], hx[1]
            for name, state in (("hx[0]", h), ("hx[1]", c)):
                if state.dim() not in (1, 2):
                    self._refuse_rank(name, state)
        h_n, c_n = self._step(input, h, c)
        assert c_n is not None
        return h_n, c_n


class GRUCell(Cell, nn.GRUCell):
    r"""A drop-in for :class:`torch.nn.GRUCell`: the same arguments, parameters, results and errors.

    .. math::
        r, z = \sigma(W_{ih} x + b_{ih} + W_{hh} h + b_{hh}), \quad
        n = \tanh(W_{in} x + b_{in} + r \odot (W_{hn} h + b_{hn})), \quad h' = (1 - z) \odot n + z \odot h

    Source of the equations: the documentation of :class:`torch.nn.GRUCell`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state; 0 is allowed.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        device, dtype: of the parameters.
        layer_norm, zoneout, reset_after and so on: by keyword, what torch.nn lacks: :class:`rnnfast.variants.Options`.
    """

    _own_mode = "GRU"

    def _mode(self) -> str:
        return "GRU"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (N, I) or (I,).
            hx: (N, H) or (H,). None means zeros.
        Returns:
            h', (N, H) or (H,).
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit, in the words of torch.nn.
        """
        return self._one_state(input, hx)


class MGUCell(Cell):
    r"""One step of :class:`rnnfast.MGU`, the minimal gated unit; equations and source there.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state; 0 is allowed.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, CELLS["MGU"].gates, device, dtype)

    _own_mode = "MGU"

    def _mode(self) -> str:
        return "MGU"

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (N, I) or (I,).
            hx: (N, H) or (H,). None means zeros.
        Returns:
            h', (N, H) or (H,).
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit, in the words of torch.nn.
        """
        return self._one_state(input, hx)


class RNNCell(Cell, nn.RNNCell):
    r"""A drop-in for :class:`torch.nn.RNNCell`: the same arguments, parameters, results and errors.

    Besides torch.nn's nonlinearities there are the logistic function and a linear cell.

    .. math:: h' = \phi(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})

    with :math:`\phi` tanh, relu, sigmoid, or the identity. Source of the equation: the documentation of
    :class:`torch.nn.RNNCell`.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state; 0 is allowed.
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        nonlinearity: ``'tanh'``, ``'relu'``, ``'sigmoid'`` or ``'identity'``, looked at in forward as torch.nn does.
            Default: ``'tanh'``
        device, dtype: of the parameters.
        layer_norm, zoneout, num_heads and so on: by keyword, what torch.nn lacks: :class:`rnnfast.variants.Options`.
    """

    def _mode(self) -> str:
        mode = NONLINEARITIES.get(self.nonlinearity)
        if mode is None:
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return mode

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Args:
            input: (N, I) or (I,).
            hx: (N, H) or (H,). None means zeros.
        Returns:
            h', (N, H) or (H,).
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit, or a nonlinearity that is not known, in
                the words of torch.nn.
        """
        return self._one_state(input, hx)

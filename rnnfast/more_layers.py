"""Layers that torch.nn lacks and that options make of its layers: LiGRU, and SLSTM, which has states of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .modules import GRU, Recurrent
from .sequences import RowOptions
from .tools import result_for_tool, tool_watches

__all__ = ["SLSTM", "LiGRU"]

FourStates: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]


class LiGRU(GRU):
    r"""The light gated recurrent unit: a GRU without reset gate, with relu, its input's part batch-normalised.

    .. math::
        z &= \sigma(BN(W_{iz} x_t) + W_{hz} h_{t-1}), \qquad n = \mathrm{relu}(BN(W_{in} x_t) + W_{hn} h_{t-1}) \\
        h_t &= (1 - z) \odot n + z \odot h_{t-1}

    and the biases, where there are any. Source: Ravanelli, Brakel, Omologo, Bengio 2018,
    https://arxiv.org/abs/1803.10225. It is ``GRU(..., preset="light_gru")``. As SpeechBrain's, with these differences:
    gates in the order z, n, where SpeechBrain has n, z; two directions have weights of their own, where SpeechBrain's
    share them. There the products have no biases, and the batch norm has: that is ``bias_ih``, with ``bias_hh`` zero.
    Its momentum is ``batch_norm_momentum=0.05``, its dropout ``recurrent_dropout=p, dropout_mode="candidate"``.

    Args:
        input_size, hidden_size, ...: as :class:`GRU`, with its other options.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, preset="light_gru", **kwargs)


class SLSTM(Recurrent):
    r"""xLSTM's sLSTM: exponential input gates, a normaliser, and a stabiliser that keeps them finite.

    .. math::
        i, f, z, o &= \text{the four parts of } W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh} \\
        m_t &= \max(\log \sigma(f) + m_{t-1}, i) \\
        c_t &= \sigma(f) e^{m_{t-1} - m_t} c_{t-1} + e^{i - m_t} \tanh(z), \qquad
        n_t = \sigma(f) e^{m_{t-1} - m_t} n_{t-1} + e^{i - m_t} \\
        h_t &= \sigma(o) \odot c_t / n_t

    Source: Beck et al. 2024, https://arxiv.org/abs/2405.04517, with a sigmoid for f, as in the authors' code. What is
    computed is the same in fewer terms: with :math:`l = \log n + m` and :math:`\alpha = \sigma(\log \sigma(f) + l_{t-1}
    - i)` it is :math:`c_t / n_t = \alpha c_{t-1} / n_{t-1} + (1 - \alpha) \tanh(z)`, where m has dropped out. So of all
    states that stand for the same, those that come back have :math:`n = 1`: c is then :math:`c / n`, and m is l.

    In 16-bit types m, which may be large, is rounded like the other states that come back: a stream cut into calls then
    differs from one call.

    Args:
        input_size: I, the features of the input.
        hidden_size: H, the features of the state.
        num_layers: L layers stacked, each on the output of the one below. Default: 1
        bias: whether there are ``bias_ih`` and ``bias_hh``. Default: True
        batch_first: input and output are (N, T, .) instead of (T, N, .); states never. Default: False
        dropout: probability of an element being zeroed between layers, in training. Default: 0
        bidirectional: D = 2 directions, the second reversed in time. Default: False
        device, dtype: of the parameters.
        num_heads, layer_norm, norm, norm_eps, recurrent_dropout, input_dropout, weight_dropout, forget_bias: as in
            :class:`rnnfast.variants.Options`.

    Raises:
        ValueError, TypeError: as torch.nn.LSTM does; TypeError for the other options.
    """

    _own_mode = "LSTM"
    _fixed: ClassVar[dict[str, Any]] = {"gate_activation": "exponential"}
    _refused: ClassVar[dict[str, str]] = dict.fromkeys(
        (
            "cell_norm", "batch_norm", "batch_norm_momentum", "batch_norm_steps", "zoneout", "dropout_mode", "peephole",
            "coupled", "reset_after", "reset_gate", "candidate_activation", "gate_activation", "preset",
        ),
        "not an option of the sLSTM",
    )  # fmt: skip

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
        **options: Any,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device,
            dtype=dtype, **options,
        )  # fmt: skip

    def _cell_size(self) -> int:
        # c / n, and behind it log n + m.
        return 2 * self.hidden_size

    def _no_cell_state(self, like: Tensor, count: int, batch: int) -> Tensor:
        zeros = like.new_zeros(count, batch, self.hidden_size)
        return torch.cat([zeros, torch.full_like(zeros, -math.inf)], -1)

    def forward(
        self,
        input: Tensor | PackedSequence,
        hx: FourStates | Sequence[Tensor] | None = None,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        resets: Tensor | None = None,
    ) -> tuple[Any, FourStates]:
        """Runs the layers over a sequence.

        Args:
            input: (T, N, I), with batch_first (N, T, I), unbatched (T, I), or a PackedSequence.
            hx: (h_0, c_0, n_0, m_0), each (D*L, N, H), without N for unbatched input, n_0 >= 0. None means zeros.
            lengths: (N,) integers, 0 <= lengths <= T: row n ends after lengths[n] steps.
            resets: bool (T, N), with batch_first (N, T), unbatched (T,). True at t starts a new segment at t.
        Returns:
            output, (h_n, c_n, n_n, m_n): output (T, N, D*H) or as the input is laid out; states shaped as hx. n_n is 1,
            or 0 in a row that has seen nothing.
        Raises:
            ValueError, RuntimeError: shapes, types and devices that do not fit.
            ValueError, TypeError: lengths or resets that do not fit, or that come with a PackedSequence.
        """
        if (type(input) is not Tensor and type(input) is not PackedSequence) or tool_watches():
            result = result_for_tool(self, input, hx, **RowOptions(lengths, resets)._asdict())
            if result is not None:
                watched: tuple[Any, FourStates] = result[0]
                return watched
        h: Tensor | None = None
        both: Tensor | None = None
        if hx is not None:
            if len(hx) != 4:
                raise RuntimeError(f"SLSTM: hx: expected four states, h, c, n and m, got {len(hx)}")
            h, c, n, m = hx
            if not h.shape == c.shape == n.shape == m.shape:
                shapes = ", ".join(str(tuple(state.shape)) for state in hx)
                raise RuntimeError(f"SLSTM: hx: expected four states of one shape, got {shapes}")
            if isinstance(input, Tensor):
                self._check_ranks(input, h)
            seen = n > 0
            divisor = torch.where(seen, n, 1)
            both = torch.cat([torch.where(seen, c / divisor, 0), torch.where(seen, divisor.log() + m, -math.inf)], -1)
        options = None if lengths is None and resets is None else RowOptions(lengths, resets)
        output: Any
        if isinstance(input, PackedSequence):
            output, h_n, both, _ = self._run_packed(input, h, both, options, False)
        else:
            output, h_n, both, _ = self._run(input, h, both, options, False)
        assert both is not None
        c_n, log_n = both.chunk(2, -1)
        seen = log_n > -math.inf
        return output, (h_n, c_n.clone(), seen.to(c_n.dtype), torch.where(seen, log_n, 0))

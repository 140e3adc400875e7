"""Layers with rnnfast's options as people write them who have PyTorch's operations alone: the input's product once for
all steps, then a Python loop over the steps, autograd for the rest.

They are what the suite `variants` compares with, in the place of a layer of torch.nn, which has no such options. One
layer, one direction, rows of full length (T, B, I). The parameters have the names and the order of rnnfast's, and the
masks of dropout and zoneout are drawn in its order: from the same seed both compute the same. What does not change from
step to step is made before the loop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rnnfast.variants.draws import chosen, dropped_weights
from rnnfast.variants.options import Options

# Of one step: (what the input gives the gates, the states) to the new states.
Step = Callable[..., tuple[Tensor, ...]]
State = Tensor | tuple[Tensor, Tensor] | None


def hard_sigmoid(value: Tensor) -> Tensor:
    return (0.2 * value + 0.5).clamp(0, 1)


class Loop(nn.Module):
    """A layer of this kind; the subclasses have the steps.

    Args:
        like: rnnfast's layer with the options, whose parameters it gets copies of.
    """

    states = 1

    def __init__(self, like: nn.RNNBase) -> None:
        super().__init__()
        self.options: Options = like._options  # type: ignore[assignment]
        self.hidden_size = like.hidden_size
        for name, parameter in like.named_parameters():
            self.register_parameter(name.removesuffix("_l0"), nn.Parameter(parameter.detach().clone()))
        self.gates = self.weight_hh.shape[0] // like.hidden_size

    def forward(self, input: Tensor, state: State = None) -> tuple[Tensor, State]:
        """As torch.nn's layers: output (T, B, H), and the last states (1, B, H)."""
        options, training = self.options, self.training
        steps, batch, _ = input.shape
        if state is None:
            states: tuple[Tensor, ...] = (input.new_zeros(batch, self.hidden_size),) * self.states
        else:
            states = tuple(each[0] for each in (state if isinstance(state, tuple) else (state,)))
        if training and options.input_dropout:
            input = input * self.dropped(options.input_dropout, batch, input.shape[2])
        weight = self.weight_hh
        if options.weight_dropout:
            # Its draws, too, are rnnfast's, which are faster than torch's own.
            weight = dropped_weights(weight, options.weight_dropout) if training else weight
        step = self.step(weight, self.recurrent_mask(batch))
        kept = [self.kept(share, steps, batch) for share in options.zoneout[: self.states]]
        outputs = []
        for t, gates in enumerate(self.input_gates(input).unbind()):
            new = step(gates, *states)
            states = tuple(
                self.zoned(old, now, share, mask, t)
                for old, now, share, mask in zip(states, new, options.zoneout, kept, strict=False)
            )
            outputs.append(states[0])
        last = tuple(each.unsqueeze(0) for each in states)
        return torch.stack(outputs), last[0] if self.states == 1 else last  # type: ignore[return-value]

    # --- what is drawn ---

    def dropped(self, p: float, *size: int) -> Tensor:
        return F.dropout(self.weight_ih.new_ones(size), p)

    def recurrent_mask(self, batch: int) -> Tensor | None:
        """One for each sequence, the same in all steps."""
        p = self.options.recurrent_dropout
        return self.dropped(p, batch, self.hidden_size) if self.training and p else None

    def kept(self, share: float, steps: int, batch: int) -> Tensor | None:
        """Where zoneout keeps the old state, of all steps."""
        if not (self.training and share):
            return None
        return chosen((steps, batch, self.hidden_size), share, self.weight_ih)

    @staticmethod
    def zoned(old: Tensor, new: Tensor, share: float, mask: Tensor | None, t: int) -> Tensor:
        if mask is not None:
            return torch.where(mask[t], old, new)
        return share * old + (1 - share) * new if share else new

    # --- parts of a step ---

    def normed(self, value: Tensor, kind: str, bias: Tensor | None = None) -> Tensor:
        weight = getattr(self, f"weight_norm{kind}")
        if self.options.norm == "rms":
            value = F.rms_norm(value, weight.shape, weight, self.options.norm_eps)
            return value if bias is None else value + bias
        return F.layer_norm(value, weight.shape, weight, bias, self.options.norm_eps)

    def folded(self) -> Tensor:
        """The biases that are added to the input's product."""
        return self.bias_ih + self.bias_hh

    def input_gates(self, input: Tensor) -> Tensor:
        """What the input gives the gates, for all steps at once."""
        if self.options.layer_norm == "separate":
            return self.normed(F.linear(input, self.weight_ih), "_ih", self.folded())
        return F.linear(input, self.weight_ih, self.folded())

    def product(self, weight: Tensor, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        """h to W_hh h, where the mask multiplies h."""
        heads = self.options.num_heads
        if heads == 1:
            return lambda h: F.linear(h if mask is None else h * mask, weight)
        size = self.hidden_size // heads
        # (heads, K, G * K), for one batched product.
        blocks = weight.view(-1, heads, size, size).permute(1, 3, 0, 2).reshape(heads, size, -1)

        def of_heads(h: Tensor) -> Tensor:
            h = h if mask is None else h * mask
            product = torch.bmm(h.view(-1, heads, size).transpose(0, 1), blocks)
            return product.view(heads, h.shape[0], -1, size).permute(1, 2, 0, 3).reshape(h.shape[0], -1)

        return of_heads

    def recurrent(self, weight: Tensor, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        """h to what it gives the gates."""
        product = self.product(weight, mask if self.options.dropout_mode == "state" else None)
        if self.options.layer_norm != "separate":
            return product
        return lambda h: self.normed(product(h), "_hh")

    def summed(self) -> Callable[[Tensor, Tensor], Tensor]:
        """The two parts of the gates to their sum."""
        if self.options.layer_norm != "joint":
            return torch.add
        bias = getattr(self, "bias_norm", None)
        return lambda x, recurrent: self.normed(x + recurrent, "", bias)

    def gate(self) -> Callable[[Tensor], Tensor]:
        return hard_sigmoid if self.options.gate_activation == "hard_sigmoid" else torch.sigmoid

    def candidate(self, mask: Tensor | None) -> Callable[[Tensor], Tensor]:
        """tanh, and dropout of what it gives."""
        if mask is None or self.options.dropout_mode == "state":
            return torch.tanh
        return lambda value: value.tanh() * mask

    def step(self, weight: Tensor, mask: Tensor | None) -> Step:
        raise NotImplementedError


class LSTM(Loop):
    states = 2

    def step(self, weight: Tensor, mask: Tensor | None) -> Step:
        options = self.options
        recurrent, summed = self.recurrent(weight, mask), self.summed()
        gate, candidate = self.gate(), self.candidate(mask)
        cell_norm = functools.partial(self.normed, kind="_c", bias=getattr(self, "bias_norm_c", None))
        peep: Sequence[Tensor] = self.weight_peephole.chunk(self.gates - 1) if options.peephole else ()

        def step(x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            i, *f, g, o = summed(x, recurrent(h)).chunk(self.gates, 1)
            if peep:
                i = i + peep[0] * c
            i = gate(i)
            if options.coupled:
                forget = 1 - i
            else:
                forget = gate(f[0] + peep[1] * c if peep else f[0])
            c = forget * c + i * candidate(g)
            if options.cell_norm == "carried":
                c = cell_norm(c)
            o = gate(o + peep[-1] * c if peep else o)
            return o * (cell_norm(c) if options.cell_norm == "output" else c).tanh(), c

        return step


class GRU(Loop):
    def inner_bias(self) -> Tensor | None:
        """b_hh of n, where r multiplies it."""
        if self.options.layer_norm == "joint" or not self.options.reset_after:
            return None
        return self.bias_hh[2 * self.hidden_size :]

    def folded(self) -> Tensor:
        if self.inner_bias() is None:
            return super().folded()
        return self.bias_ih + F.pad(self.bias_hh[: 2 * self.hidden_size], (0, self.hidden_size))

    def step(self, weight: Tensor, mask: Tensor | None) -> Step:
        gate, candidate, size = self.gate(), self.candidate(mask), self.hidden_size
        if not self.options.reset_after:
            in_state = mask if self.options.dropout_mode == "state" else None
            gates_product = self.product(weight[: 2 * size], in_state)
            candidate_product = self.product(weight[2 * size :], in_state)

            def reset_before(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
                x_gates, x_n = x.split([2 * size, size], 1)
                r, z = gate(x_gates + gates_product(h)).chunk(2, 1)
                n = candidate(x_n + candidate_product(r * h))
                return ((1 - z) * n + z * h,)

            return reset_before
        recurrent = self.recurrent(weight, mask)
        if self.options.layer_norm == "joint":
            summed = self.summed()

            def joint(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
                r, z, n = summed(x, recurrent(h)).chunk(3, 1)
                z, n = gate(z), candidate(gate(r) * n)
                return ((1 - z) * n + z * h,)

            return joint
        inner = self.inner_bias()

        def usual(x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
            x_r, x_z, x_n = x.chunk(3, 1)
            h_r, h_z, h_n = recurrent(h).chunk(3, 1)
            r, z = gate(x_r + h_r), gate(x_z + h_z)
            n = candidate(x_n + r * (h_n + inner))
            return ((1 - z) * n + z * h,)

        return usual


class RNN(Loop):
    def step(self, weight: Tensor, mask: Tensor | None) -> Step:
        recurrent, summed = self.recurrent(weight, mask), self.summed()
        return lambda x, h: (summed(x, recurrent(h)).tanh(),)


CELLS: dict[str, type[Loop]] = {"LSTM": LSTM, "GRU": GRU, "RNN": RNN}


def loop_of(layer: Any) -> Loop:
    """The loop that computes what a layer of rnnfast with options does, with copies of its weights."""
    kind: str = layer.mode.split("_")[0]
    return CELLS[kind](layer)

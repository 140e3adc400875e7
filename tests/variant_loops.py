"""The recurrences beyond torch.nn's as their authors published them, and one loop for all options in any combination.

Nothing here knows rnnfast's reference: plain loops over time, each written from the source that it names, with the
author's names and order of gates. Each runs one direction of one layer over x (T, B, I) from h and c (B, H), and
returns every output (T, B, H) and the final states. Below stands `AnyLayers`, which takes every option, and every row
of a batch by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

# A LayerNorm's weight and bias.
Norm = tuple[Tensor, Tensor]


def over_time(step: Callable[..., tuple[Tensor, ...]], x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """step: (t, x_t, *state) to the new state, whose first part is the output."""
    outputs = []
    for t, x_t in enumerate(x):
        state = step(t, x_t, *state)
        outputs.append(state[0])
    return (torch.stack(outputs), *state)


# --- published forms ----------------------------------------------------------------------------------------------


def torchaudio_lstm(
    x2g: Tensor, p2g: Tensor, g_norm: Norm, c_norm: Norm, eps: float, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, ...]:
    """torchaudio.models.rnnt._CustomLSTM with layer_norm=True: of the sum, and of c_t as it is carried."""

    def step(_: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        gates = F.layer_norm(F.linear(x_t, x2g) + F.linear(h, p2g), p2g.shape[:1], *g_norm, eps)
        input_gate, forget_gate, cell_gate, output_gate = gates.chunk(4, 1)
        c = F.layer_norm(forget_gate.sigmoid() * c + input_gate.sigmoid() * cell_gate.tanh(), c.shape[1:], *c_norm, eps)
        return output_gate.sigmoid() * c.tanh(), c

    return over_time(step, x, h, c)


def fastrnns_lstm(
    weight_ih: Tensor, weight_hh: Tensor, layernorm_i: Norm, layernorm_h: Norm, layernorm_c: Norm, x: Tensor, h: Tensor,
    c: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """LayerNormLSTMCell of PyTorch's benchmarks/fastrnns/custom_lstms.py, which NeMo's ln_lstm took over."""

    def step(_: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        igates = F.layer_norm(x_t @ weight_ih.t(), weight_ih.shape[:1], *layernorm_i)
        hgates = F.layer_norm(h @ weight_hh.t(), weight_hh.shape[:1], *layernorm_h)
        ingate, forgetgate, cellgate, outgate = (igates + hgates).chunk(4, 1)
        before = torch.sigmoid(forgetgate) * c + torch.sigmoid(ingate) * torch.tanh(cellgate)
        cy = F.layer_norm(before, c.shape[1:], *layernorm_c)
        return torch.sigmoid(outgate) * torch.tanh(cy), cy

    return over_time(step, x, h, c)


def haste_zoneout(old: Tensor, new: Tensor, zoneout: float, mask: Tensor | None) -> Tensor:
    """mask: 1 where the new value is taken; None in evaluation."""
    return zoneout * old + (1 - zoneout) * new if mask is None else (new - old) * mask + old


def haste_lstm(
    kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor, gamma: Sequence[Tensor], gamma_h: Tensor, beta_h: Tensor,
    zoneout: float, mask: Tensor | None, x: Tensor, h: Tensor, c: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """LMNT's haste, LayerNormLSTM (lib/layer_norm_lstm_forward_gpu.cu.cc): gates i, g, f, o; zoneout of h alone.

    The equations are (20) to (22) of Ba, Kiros, Hinton 2016, https://arxiv.org/abs/1607.06450.
    """

    def step(t: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        wx = F.layer_norm(x_t @ kernel, kernel.shape[1:], gamma[0])
        rh = F.layer_norm(h @ recurrent_kernel, kernel.shape[1:], gamma[1])
        i, g, f, o = (wx + rh + bias).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        new = o.sigmoid() * F.layer_norm(c, c.shape[1:], gamma_h, beta_h).tanh()
        return haste_zoneout(h, new, zoneout, None if mask is None else mask[t]), c

    return over_time(step, x, h, c)


def haste_gru(
    kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor, recurrent_bias: Tensor, gamma: Sequence[Tensor],
    zoneout: float, mask: Tensor | None, x: Tensor, h: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """LMNT's haste, LayerNormGRU (frameworks/pytorch/layer_norm_gru.py): gates z, r, g."""

    def step(t: int, x_t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        vx = F.layer_norm(x_t @ kernel, kernel.shape[1:], gamma[0]) + bias
        vh = F.layer_norm(h @ recurrent_kernel, kernel.shape[1:], gamma[1]) + recurrent_bias
        (zx, rx, gx), (zh, rh, gh) = vx.chunk(3, 1), vh.chunk(3, 1)
        z, r = torch.sigmoid(zx + zh), torch.sigmoid(rx + rh)
        g = torch.tanh(gx + r * gh)
        return (haste_zoneout(h, z * h + (1 - z) * g, zoneout, None if mask is None else mask[t]),)

    return over_time(step, x, h)


def dreamer_gru(linear: Tensor, norm: Norm, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """The GRU of Dreamer (Hafner et al., https://arxiv.org/abs/2301.04104), as NM512/dreamerv3-torch has it.

    One product and one norm, of epsilon 1e-3, for [x, h]: parts reset, cand, update.
    """

    def step(_: int, x_t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        parts = F.layer_norm(torch.cat([x_t, h], -1) @ linear.t(), linear.shape[:1], *norm, 1e-3)
        reset, cand, update = parts.chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        update = torch.sigmoid(update - 1)
        return (update * cand + (1 - update) * h,)

    return over_time(step, x, h)


def ba_rnn(w_xh: Tensor, w_hh: Tensor, gain: Tensor, bias: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Ba, Kiros, Hinton 2016, equation (4): the RNN of the paper that brought layer normalisation."""

    def step(_: int, x_t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        a = h @ w_hh.t() + x_t @ w_xh.t()
        sigma, mu = torch.var_mean(a, -1, correction=0, keepdim=True)
        return (torch.tanh(gain / (sigma + 1e-5).sqrt() * (a - mu) + bias),)

    return over_time(step, x, h)


def zoneout_lstm(
    weights: Sequence[Tensor], d_h: Tensor, d_c: Tensor, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, ...]:
    """Krueger et al. 2016, https://arxiv.org/abs/1606.01305: d of shape (T, B, H), 1 where the old value is kept.

    weights: W_x, W_h, b, of i, f, g, o.
    """

    def step(t: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = torch.addmm(weights[2], torch.cat([x_t, h], 1), torch.cat(list(weights[:2]), 1).t()).chunk(4, 1)
        i, f, o, g = torch.sigmoid(i), torch.sigmoid(f), torch.sigmoid(o), torch.tanh(g)
        of_c = d_c[t] * c + (1 - d_c[t]) * (f * c + i * g)
        of_h = d_h[t] * h + (1 - d_h[t]) * (o * torch.tanh(f * c + i * g))
        return of_h, of_c

    return over_time(step, x, h, c)


def gal_lstm(w: Tensor, b: Tensor, z_x: Tensor, z_h: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Gal and Ghahramani 2015, https://arxiv.org/abs/1512.05287, tied weights: one mask of x and one of h.

    w: (4H, I + H), of i, f, g, o.
    """

    def step(_: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = (torch.cat([x_t * z_x, h * z_h], 1) @ w.t() + b).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c

    return over_time(step, x, h, c)


def semeniuta_lstm(w: Tensor, b: Tensor, d: Tensor, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    """Semeniuta et al. 2016, https://arxiv.org/abs/1603.05118: d(g) in place of g, d one mask for each sequence."""

    def step(_: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = (torch.cat([x_t, h], 1) @ w.t() + b).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * (d * torch.tanh(g))
        return torch.sigmoid(o) * torch.tanh(c), c

    return over_time(step, x, h, c)


def semeniuta_gru(
    w: Sequence[Tensor], u: Sequence[Tensor], b: Sequence[Tensor], b_g: Tensor, d: Tensor, x: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    """The same paper's GRU: h = (1 - z) h + z d(g). Here r multiplies U_g h + b_g, as in torch.nn.

    w, u, b: of z, r, g.
    """

    def step(_: int, x_t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        z, r = (torch.sigmoid(x_t @ w[k].t() + h @ u[k].t() + b[k]) for k in (0, 1))
        g = torch.tanh(x_t @ w[2].t() + b[2] + r * (h @ u[2].t() + b_g))
        return ((1 - z) * h + z * (d * g),)

    return over_time(step, x, h)


def cho_gru(w: Sequence[Tensor], u: Sequence[Tensor], b: Sequence[Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Cho et al. 2014, https://arxiv.org/abs/1406.1078, equations (5) to (8): r multiplies h. w, u, b: of r, z, h~."""

    def step(_: int, x_t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        r, z = (torch.sigmoid(x_t @ w[k].t() + h @ u[k].t() + b[k]) for k in (0, 1))
        return (z * h + (1 - z) * torch.tanh(x_t @ w[2].t() + (r * h) @ u[2].t() + b[2]),)

    return over_time(step, x, h)


def ravanelli_gru(
    w: Sequence[Tensor], u: Sequence[Tensor], b: Sequence[Tensor], x: Tensor, h: Tensor
) -> tuple[Tensor, ...]:
    """Ravanelli et al. 2018, https://arxiv.org/abs/1803.10225: the light GRU, but for its batch norm. Of z, h~."""

    def step(_: int, x_t: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        z, candidate = (x_t @ w[k].t() + h @ u[k].t() + b[k] for k in (0, 1))
        return (torch.sigmoid(z) * h + (1 - torch.sigmoid(z)) * candidate.clamp_min(0),)

    return over_time(step, x, h)


def greff_lstm(
    w: Sequence[Tensor], r: Sequence[Tensor], b: Sequence[Tensor], p: Sequence[Tensor] | None, coupled: bool, x: Tensor,
    y: Tensor, c: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Greff et al. 2017, https://arxiv.org/abs/1503.04069, section II and appendix: vanilla LSTM, NP and CIFG.

    Peepholes are those of Gers and Schmidhuber 2000, coupling as in their variant CIFG. w, r, b: of z, i, f, o; p: of
    i, f, o. Coupled, those of f are not looked at.
    """
    none = torch.zeros_like(c[0])
    p_i, p_f, p_o = p if p is not None else (none, none, none)

    def step(_: int, x_t: Tensor, y: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        def bar(k: int) -> Tensor:
            return x_t @ w[k].t() + y @ r[k].t() + b[k]

        z, i = bar(0).tanh(), (bar(1) + p_i * c).sigmoid()
        f = 1 - i if coupled else (bar(2) + p_f * c).sigmoid()
        c = z * i + c * f
        return c.tanh() * (bar(3) + p_o * c).sigmoid(), c

    return over_time(step, x, y, c)


def keras_lstm(
    kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor, x: Tensor, h: Tensor, c: Tensor
) -> tuple[Tensor, ...]:
    """LSTM of Keras 2 with its recurrent_activation="hard_sigmoid": 0 below -2.5, 1 above 2.5, between 0.2 x + 0.5."""

    def hard_sigmoid(value: Tensor) -> Tensor:
        return torch.where(value < -2.5, 0, torch.where(value > 2.5, 1, 0.2 * value + 0.5))

    def step(_: int, x_t: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = (x_t @ kernel + h @ recurrent_kernel + bias).chunk(4, 1)
        c = hard_sigmoid(f) * c + hard_sigmoid(i) * torch.tanh(g)
        return hard_sigmoid(o) * torch.tanh(c), c

    return over_time(step, x, h, c)


# --- every option at once -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Drawn:
    """What one layer drew, None where nothing was. Lists are by direction, of rows by row of the batch.

    Attributes:
        input: (B, I), what the layer's input is multiplied by.
        weight: of its shape, what W_hh is multiplied by.
        state, candidate: (B, H).
        kept_h, kept_c: bool, (T_n, H) for each row.
        output: (T_n, D*H) for each row: dropout between layers.
    """

    input: Tensor | None = None
    weight: list[Tensor | None] = dataclasses.field(default_factory=list)
    state: list[Tensor | None] = dataclasses.field(default_factory=list)
    candidate: list[Tensor | None] = dataclasses.field(default_factory=list)
    kept_h: list[list[Tensor] | None] = dataclasses.field(default_factory=list)
    kept_c: list[list[Tensor] | None] = dataclasses.field(default_factory=list)
    output: list[Tensor] | None = None

    def to(self, dtype: torch.dtype) -> Drawn:
        """With what is multiplied with in that type."""

        def cast(value: Any) -> Any:
            if isinstance(value, list):
                return [cast(each) for each in value]
            return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

        return Drawn(*(cast(getattr(self, field.name)) for field in dataclasses.fields(self)))


@dataclasses.dataclass
class Layout:
    """How rows of a batch lie in what a layer is given, and how long each is.

    Attributes:
        name: dense, batch_first, unbatched, packed or packed unsorted.
        steps: T.
        ends: for each row of the batch.
    """

    name: str
    steps: int
    ends: list[int]

    @property
    def packed(self) -> bool:
        return self.name.startswith("packed")

    @property
    def order(self) -> list[int]:
        """The rows of the batch as the layer sees them: packed, the longest first."""
        if not self.packed:
            return list(range(len(self.ends)))
        indices = self.given(torch.zeros(self.steps, len(self.ends), 1)).sorted_indices
        return list(range(len(self.ends))) if indices is None else indices.tolist()

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the layer's rows, without their features."""
        batch = len(self.ends)
        dense = (batch, self.steps) if self.name == "batch_first" else (self.steps, batch)
        return (sum(self.ends),) if self.packed else dense

    def given(self, value: Tensor) -> Any:
        """(T, B, ...) as the layer takes it."""
        if self.packed:
            return pack_padded_sequence(value, torch.tensor(self.ends), enforce_sorted=self.name == "packed")
        if self.name == "unbatched":
            return value[:, 0]
        return value.transpose(0, 1) if self.name == "batch_first" else value

    def padded(self, result: Any) -> Tensor:
        """The way back, for what a layer returned."""
        if isinstance(result, PackedSequence):
            return pad_packed_sequence(result, total_length=self.steps)[0]
        return result[:, None] if self.name == "unbatched" else self.given(result)

    def each(self, rows: Tensor) -> list[Tensor]:
        """What was drawn for rows, (*shape, F), by row of the batch, in `order`: (T_n, F)."""
        if not self.packed:
            rows = rows if self.name == "batch_first" else rows.transpose(0, 1)
            return [row[:end] for row, end in zip(rows, self.ends, strict=True)]
        ends = [self.ends[n] for n in self.order]
        places = iter(range(len(rows)))
        at: list[list[int]] = [[] for _ in ends]
        for t in range(self.steps):
            for n, end in enumerate(ends):
                if t < end:
                    at[n].append(next(places))
        return [rows[where] for where in at]

    def dense(self, pieces: Sequence[Tensor]) -> Tensor:
        """(T, B, F), zero beyond a row's end, of what `each` returns."""
        by_row = dict(zip(self.order, pieces, strict=True))
        each = [F.pad(by_row[n], (0, 0, 0, self.steps - end)) for n, end in enumerate(self.ends)]
        return torch.stack(each, 1)


def of_one(values: Sequence[Tensor] | Tensor | None, n: int) -> Tensor | None:
    return None if values is None else values[n]


class AnyCell:
    """One direction of one layer, one row of one step at a time: x (I,), h and c (H,).

    Args:
        kind: LSTM, GRU, or RNN_ and its nonlinearity.
        options: as the layer takes them, missing ones at their default.
        parameters: by name without the suffix of layer and direction.
    """

    def __init__(self, kind: str, options: dict[str, Any], parameters: dict[str, Tensor]) -> None:
        self.kind, self.options, self.parameters = kind, options, parameters
        of_gru = "rzn" if options.get("reset_gate", True) else "zn"
        self.gates = {"LSTM": "igo" if options.get("coupled") else "ifgo", "GRU": of_gru}.get(kind, "h")
        self.hidden_size = len(parameters["weight_ih"]) // len(self.gates)
        zoneout = options.get("zoneout", 0.0)
        self.zoneout = tuple(zoneout) if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout)

    def part(self, vector: Tensor, gate: str) -> Tensor:
        first = self.gates.index(gate) * self.hidden_size
        return vector[first : first + self.hidden_size]

    def vector(self, name: str) -> Tensor | float:
        return self.parameters.get(name, 0.0)

    def norm(self, value: Tensor) -> Tensor:
        """To a variance of one, or with rms to a mean square of one."""
        if self.options.get("norm", "layer") == "layer":
            value = value - value.sum() / len(value)
        return value / torch.sqrt((value * value).sum() / len(value) + self.options.get("norm_eps", 1e-5))

    def gate(self, value: Tensor) -> Tensor:
        if self.options.get("gate_activation") == "hard_sigmoid":
            line = value / 5 + 0.5
            return torch.where(line <= 0, 0, torch.where(line >= 1, 1, line))
        return 1 / (1 + torch.exp(-value))

    def sums(self, x: Tensor, recurrent: Tensor) -> tuple[Tensor, Tensor]:
        """What input and state give the gates, (G*H,) each; with a joint norm all is in the first."""
        from_x = self.parameters["weight_ih"] @ x
        b_ih, b_hh = self.vector("bias_ih"), self.vector("bias_hh")
        if self.options.get("layer_norm") == "joint":
            whole = self.norm(from_x + b_ih + recurrent + b_hh) * self.vector("weight_norm") + self.vector("bias_norm")
            return whole, torch.zeros_like(whole)
        if self.options.get("layer_norm") == "separate":
            from_x = self.norm(from_x) * self.vector("weight_norm_ih")
            recurrent = self.norm(recurrent) * self.vector("weight_norm_hh")
        return from_x + b_ih, recurrent + b_hh

    def cell_norm(self, c: Tensor, which: str) -> Tensor:
        if self.options.get("cell_norm") != which:
            return c
        return self.norm(c) * self.vector("weight_norm_c") + self.vector("bias_norm_c")

    def peephole(self, gate: str, c: Tensor) -> Tensor | float:
        if not self.options.get("peephole"):
            return 0.0
        first = self.gates.replace("g", "").index(gate) * self.hidden_size
        return self.parameters["weight_peephole"][first : first + self.hidden_size] * c

    def lstm(self, sums: Tensor, c: Tensor, dropped: Tensor | float) -> tuple[Tensor, Tensor]:
        i = self.gate(self.part(sums, "i") + self.peephole("i", c))
        f = self.gate(self.part(sums, "f") + self.peephole("f", c)) if "f" in self.gates else 1 - i
        new = self.cell_norm(f * c + i * (dropped * torch.tanh(self.part(sums, "g"))), "carried")
        o = self.gate(self.part(sums, "o") + self.peephole("o", new))
        return o * torch.tanh(self.cell_norm(new, "output")), new

    def gru(self, x: Tensor, recurrent: Tensor, h: Tensor, seen: Tensor, weight: Tensor, dropped: Any) -> Tensor:
        """seen: h as W_hh multiplies it; weight: W_hh."""
        gates = {name: self.gate(self.part(x + recurrent, name)) for name in self.gates.replace("n", "")}
        r, z, of_x = gates.get("r", 1.0), gates["z"], self.part(x, "n")
        if self.options.get("layer_norm") == "joint":
            n = r * of_x
        elif self.options.get("reset_after", True):
            n = of_x + r * self.part(recurrent, "n")
        else:
            n = of_x + self.part(weight, "n") @ (r * seen)
            if "bias_hh" in self.parameters:
                n = n + self.part(self.parameters["bias_hh"], "n")
        n = torch.tanh(n) if self.options.get("candidate_activation", "tanh") == "tanh" else torch.where(n > 0, n, 0)
        return n * dropped - z * (n * dropped) + z * h

    def kept(self, which: int, old: Tensor, new: Tensor, mask: Tensor | None, training: bool) -> Tensor:
        p = self.zoneout[which]
        if training and mask is not None:
            return old * mask + new * ~mask
        return new if p == 0 or training else p * old + (1 - p) * new

    def step(
        self, x: Tensor, h: Tensor, c: Tensor, training: bool, state: Tensor | None, candidate: Tensor | None,
        weight: Tensor | None, kept_h: Tensor | None, kept_c: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        weight_hh = self.parameters["weight_hh"] if weight is None else self.parameters["weight_hh"] * weight
        if (heads := self.options.get("num_heads", 1)) > 1:
            by_gate = weight_hh.split(self.hidden_size)
            weight_hh = torch.cat([torch.block_diag(*of_gate.chunk(heads)) for of_gate in by_gate])
        seen = h if state is None else h * state
        sums_x, sums_h = self.sums(x, weight_hh @ seen)
        dropped = 1.0 if candidate is None else candidate
        new_c = c
        if self.kind == "LSTM":
            new_h, new_c = self.lstm(sums_x + sums_h, c, dropped)
        elif self.kind == "GRU":
            new_h = self.gru(sums_x, sums_h, h, seen, weight_hh, dropped)
        else:
            named = {"TANH": torch.tanh, "RELU": torch.relu, "SIGMOID": torch.sigmoid, "IDENTITY": torch.clone}
            new_h = named[self.kind.removeprefix("RNN_")](sums_x + sums_h)
        return self.kept(0, h, new_h, kept_h, training), self.kept(1, c, new_c, kept_c, training)


def any_layers(
    kind: str,
    options: dict[str, Any],
    parameters: dict[str, Tensor],
    rows: list[Tensor],
    h0: Tensor,
    c0: Tensor,
    resets: list[Tensor],
    drawn: list[Drawn],
    training: bool,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor]]:
    """All layers and directions.

    Args:
        kind, options: as of `AnyCell`.
        parameters: by their whole names; which layers and directions there are is seen by these.
        rows: for each row of the batch (T_n, I).
        h0, c0: (L*D, B, H).
        resets: for each row bool (T_n,): no state crosses the boundary before such a step.
        drawn: by layer.

    Returns:
        (T_n, D*H) for each row; h_n and c_n (L*D, B, H); every c_t of the last layer, (T_n, D*H) for each row.
    """
    ways = ("", "_reverse") if "weight_hh_l0_reverse" in parameters else ("",)
    final_h, final_c, all_c = [], [], rows
    for layer, of_layer in enumerate(drawn):
        if of_layer.input is not None:
            rows = [row * mask for row, mask in zip(rows, of_layer.input, strict=True)]
        by_way_h, by_way_c = [], []
        for d, way in enumerate(ways):
            suffix = f"_l{layer}{way}"
            own = {name.removesuffix(suffix): value for name, value in parameters.items() if name.endswith(suffix)}
            cell = AnyCell(kind, options, own)
            every_h, every_c = [], []
            for n, row in enumerate(rows):
                h, c = h0[layer * len(ways) + d, n], c0[layer * len(ways) + d, n]
                masks = of_one(of_layer.state[d], n), of_one(of_layer.candidate[d], n), of_layer.weight[d]
                at, of_c = [torch.zeros_like(h)] * len(row), [torch.zeros_like(h)] * len(row)
                for t in reversed(range(len(row))) if d else range(len(row)):
                    # The reversed direction crosses the boundary before t + 1 on its way to t.
                    boundary = t + d
                    if boundary < len(row) and resets[n][boundary]:
                        h, c = torch.zeros_like(h), torch.zeros_like(c)
                    kept = of_one(of_one(of_layer.kept_h[d], n), t), of_one(of_one(of_layer.kept_c[d], n), t)
                    h, c = cell.step(row[t], h, c, training, *masks, *kept)
                    at[t], of_c[t] = h, c
                final_h.append(h)
                final_c.append(c)
                every_h.append(torch.stack(at) if at else row.new_zeros(0, len(h)))
                every_c.append(torch.stack(of_c) if of_c else row.new_zeros(0, len(h)))
            by_way_h.append(every_h)
            by_way_c.append(every_c)
        rows = [torch.cat(each, 1) for each in zip(*by_way_h, strict=True)]
        all_c = [torch.cat(each, 1) for each in zip(*by_way_c, strict=True)]
        if of_layer.output is not None:
            rows = [row * mask for row, mask in zip(rows, of_layer.output, strict=True)]
    shape = (-1, *h0.shape[1:])
    return rows, torch.stack(final_h).reshape(shape), torch.stack(final_c).reshape(shape), all_c

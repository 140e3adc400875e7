"""Batch normalisation of recurrent layers: statistics over the batch, which belong to a layer's buffers.

``"sequence"``: of the input's part of the gates, over all rows of all steps that count (Laurent et al. 2016,
https://arxiv.org/abs/1510.01378, as in Deep Speech 2, https://arxiv.org/abs/1512.02595). ``"recurrent"``: of that, of
W_hh h and of what the tanh sees of c, with statistics of each step (Cooijmans et al. 2017,
https://arxiv.org/abs/1603.09025).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..sequences import DenseRows, Sequences
from ..signatures import compute_dtype


class Statistics(NamedTuple):
    """Running ones, (F,) or of each step (S, F), which `normalise` brings up to date in training."""

    mean: Tensor
    variance: Tensor

    def of_step(self, step: int) -> Statistics:
        """Of one step; beyond the last of those that are kept, its."""
        i = min(step, self.mean.shape[0] - 1)
        return Statistics(self.mean[i], self.variance[i])


def _keep(running: Statistics, mean: Tensor, variance: Tensor) -> None:
    with torch.no_grad():
        running.mean.copy_(mean)
        running.variance.copy_(variance)


class BatchNorm(NamedTuple):
    """What one direction of one layer has of it.

    Attributes:
        training: whether a batch's own statistics are used, and taken into the running ones.
        momentum: of the running ones: the part that a batch has in them.
        eps: added to the variance.
        input: of W_ih x.
        recurrent, cell: of W_hh h and of c, with ``"recurrent"``.
        weights: gamma of these three.
        bias_cell: beta of the last.
    """

    training: bool
    momentum: float
    eps: float
    input: Statistics
    recurrent: Statistics | None
    cell: Statistics | None
    weights: tuple[Tensor, Tensor | None, Tensor | None]
    bias_cell: Tensor | None

    @property
    def of_each_step(self) -> bool:
        return self.recurrent is not None

    def normalise(
        self, value: Tensor, running: Statistics, weight: Tensor, bias: Tensor | None, counts: Tensor | None
    ) -> Tensor:
        """(R, F) normalised over the rows that count.

        counts: bool (R, 1), None where all do.

        Raises:
            ValueError: in training, there are fewer than two rows, of which all count.
        """
        given, compute = value.dtype, compute_dtype(value.dtype)
        value, weight = value.to(compute), weight.to(compute)
        bias = None if bias is None else bias.to(compute)
        # Copies: what a derivative has saved must not change with the next call.
        mean, variance = running.mean.to(compute, copy=True), running.variance.to(compute, copy=True)
        if not self.training or counts is None:
            normed = F.batch_norm(value, mean, variance, weight, bias, self.training, self.momentum, self.eps)
            if self.training:
                _keep(running, mean, variance)
            return normed.to(given)
        # Where no row counts their mean is of no use, and must not be no number.
        number = counts.sum().clamp_min(1).to(compute)
        batch_mean = torch.where(counts, value, 0).sum(0) / number
        off = torch.where(counts, value - batch_mean, 0)
        batch_variance = (off * off).sum(0) / number
        # Of one row there is no variance: what was there stays.
        part = torch.where(number > 1, torch.full_like(number, self.momentum), 0)
        unbiased = batch_variance * (number / (number - 1).clamp_min(1))
        _keep(running, mean + part * (batch_mean - mean), variance + part * (unbiased - variance))
        normed = off * torch.rsqrt(batch_variance + self.eps) * weight
        return (normed if bias is None else normed + bias).to(given)

    def of_input(self, value: Tensor, sequences: Sequences) -> Tensor:
        """W_ih x (rows, G*H), with ``"sequence"``, in its own layout."""
        counts = None
        if sequences.lengths is not None:
            lengths, time = sequences.lengths.unsqueeze(0), value.shape[1 if sequences.batch_first else 0]
            counts = torch.arange(time, device=value.device).unsqueeze(1) < lengths
            counts = (counts.t() if sequences.batch_first else counts).reshape(-1, 1)
        flat = self.normalise(value.flatten(0, -2), self.input, self.weights[0], None, counts)
        return flat.view(value.shape)

    def steps_of_input(self, value: Tensor, rows: DenseRows, numbers: dict[int, int]) -> list[Tensor]:
        """W_ih x (T, B, G*H), with ``"recurrent"``: each step by itself.

        numbers: of the steps, from 0 on, by their time.
        """
        found = list(value.unbind())
        for t, number in numbers.items():
            counts = None if rows.active is None else rows.active[t]
            found[t] = self.normalise(value[t], self.input.of_step(number), self.weights[0], None, counts)
        return found

    def of_recurrent(self, value: Tensor, step: int, counts: Tensor | None) -> Tensor:
        """W_hh h (B, G*H) of the step of that number."""
        assert self.recurrent is not None
        assert self.weights[1] is not None
        return self.normalise(value, self.recurrent.of_step(step), self.weights[1], None, counts)

    def of_cell(self, value: Tensor, step: int, counts: Tensor | None) -> Tensor:
        """What the tanh sees of c (B, H)."""
        if self.cell is None or self.weights[2] is None:
            return value
        return self.normalise(value, self.cell.of_step(step), self.weights[2], self.bias_cell, counts)

"""Cards that predictions are made for, and what a library's matrix product should take on them. Nothing is measured.

The constants are those of the CUDA kernels' cost model (`rnnfast.cuda_plan.constants`) and the data sheets of
limits.py; what is added here is marked as estimated.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from limits import GPUS, Gpu
from rnnfast import cuda_plan

SIZES = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Card:
    """A device that a plan is asked about.

    Args:
        name: for people.
        sm: 10 * major + minor.
        sms: its SMs; 0: those of the well known card of its architecture.
        sheet: its line in `limits.GPUS`.
    """

    name: str
    sm: int
    sms: int
    sheet: str

    @property
    def data(self) -> Gpu:
        return GPUS[self.sheet]

    @property
    def all_sms(self) -> int:
        return self.sms or self.data.sms

    @property
    def part(self) -> float:
        """Of the paths to L2 and to memory, as csrc/cuda/plan/costs.h has it."""
        return min(1.0, self.all_sms / _known_sms(self.sm))

    def constant(self, name: str) -> float:
        """Of the cost model, as csrc/cuda/plan/costs.h calls it."""
        return _constants(self.sm)[name]

    def plan(self, mode: str, arithmetic: str, hidden: int, batch: int, **options: Any) -> cuda_plan.Plan:
        """The plan of a layer on this card."""
        return cuda_plan.plan(mode, arithmetic, hidden, batch, sm=self.sm, sms=self.sms, **options)

    def memory_us(self, size: float) -> float:
        """Microseconds that so many bytes take from memory."""
        return size / (1e6 * self.part * self.constant("memory bandwidth"))


# The SMs of an H100's slices are those that `nvidia-smi mig -lgip` lists for 1g.10gb, 2g.20gb and 3g.40gb (from
# memory). The plan takes for a slice the part of L2 and memory that it has of the SMs. The model has no RTX 4090: its
# plans are an L40S's with fewer SMs, whose memory is slower and whose L2 is larger.
CARDS = {
    "a100": Card("A100", 80, 0, "A100"),
    "h100": Card("H100", 90, 0, "H100"),
    "h100-1g": Card("H100, slice 1g", 90, 16, "H100"),
    "h100-2g": Card("H100, slice 2g", 90, 32, "H100"),
    "h100-3g": Card("H100, slice 3g", 90, 60, "H100"),
    "rtx-4090": Card("RTX 4090", 89, 128, "RTX 4090"),
    "b200": Card("B200", 100, 0, "B200"),
}


@functools.cache
def _constants(sm: int) -> dict[str, float]:
    return {each.name: each.value for each in cuda_plan.constants(sm)}


@functools.cache
def _known_sms(sm: int) -> int:
    sms: int = cuda_plan.plan("LSTM", "bfloat16", 8, 1, sm=sm).device["sms"]
    return sms


def sm_flops(card: Card, arithmetic: str) -> float:
    """Operations a microsecond of one SM, at its peak."""
    data = card.data
    tera = {"bfloat16": data.half, "float16": data.half, "tf32": data.tf32, "float32": data.float32}
    return 1e6 * (tera | {"float64": data.float64})[arithmetic] / data.sms


def large_product_us(card: Card, flops: float, arithmetic: str, sms: int = 0) -> float:
    """Microseconds of a product large enough to fill so many SMs (0: the card's), operands from wherever they are."""
    reached = card.constant("what a library reaches of its peak")
    return flops / (reached * sm_flops(card, arithmetic) * (sms or card.all_sms))

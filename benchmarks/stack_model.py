"""What overlap would give stacks of layers and large input products: on paper, from what csrc/cuda/plan.h predicts.

    python benchmarks/stack_model.py               # the tables of docs/predicted.md
    python benchmarks/stack_model.py --card a100

Today a call is a chain: of each layer the input product, then the recurrence; backward the recurrence, then the
products of its gradients. Three ways to let parts of it run at the same time are modelled:

* `wavefront`: a stream for each layer; layer l + 1 works on a chunk of steps while layer l works on the next. The
  layers, or as many of them as is best, share the SMs, so each runs on what fits beside the others.
* `beside`: one layer at a time, its products in chunks on a second stream, on the SMs that the recurrence leaves, or
  that it is made to leave.
* `aside`: backward, no chunks: the weights' gradients of a layer on a second stream while the layer below runs.

All of it is predicted. What is optimistic: that a product slows a recurrence only by the SMs that it takes, not by L2
and memory, which they share. What is pessimistic: a recurrence that gets a part of the SMs gets that part of L2's
bandwidth, as a slice of a card does. Chunks are launches of their own, with all that a launch costs.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from card_model import CARDS, SIZES, Card, large_product_us
from rnnfast.benchmark.case import GATES, Case
from rnnfast.cuda_plan import Illegal
from shapes import MODELS

MODES = {"LSTM": "LSTM", "GRU": "GRU", "RNN": "RNN_TANH"}
CHUNKS = (16, 32, 64, 128, 256)
# Estimated: what a product or a recurrence of a chunk takes the host, with the event that orders it, microseconds.
HOST = 6.0
# The least gain that is worth building.
WORTH = 0.15
TYPE = "bfloat16"

OWN = "a usual size, no source"
# Beside the layers of shapes.MODELS, which are shapes of a second or less.
STACKS = (
    Case("LSTM", 16, 1024, 500, 240, layers=5, model="speech, causal", source=OWN),
    Case("LSTM", 8, 1024, 500, layers=5, directions=2, model="speech, both directions", source=OWN),
    Case("LSTM", 64, 512, 1000, 80, layers=4, model="speech, large batch", source=OWN),
    Case("LSTM", 1, 512, 1000, 80, layers=4, model="speech, one utterance", source=OWN),
    Case("LSTM", 16, 512, 750, layers=2, model="audio codec, 10 s", source=OWN),
    Case("LSTM", 4, 768, 2000, layers=2, model="denoiser, 32 s", source=OWN),
    Case("LSTM", 64, 128, 336, 16, layers=2, model="time series", source=OWN),
    Case("GRU", 64, 256, 720, 32, layers=3, model="time series, GRU", source=OWN),
    Case("LSTM", 80, 1152, 70, 400, layers=3, model="language model", source=OWN),
    Case("LSTM", 64, 512, 128, 3136, model="RL, wide features", source=OWN),
    Case("LSTM", 32, 256, 256, 4096, directions=2, model="tagger, wide features", source=OWN),
)


@dataclass(frozen=True)
class Layer:
    """A layer's parts, each as if it had the card for itself.

    Args:
        case: the stack that it is one of.
        card: where.
        inputs: I.
    """

    case: Case
    card: Card
    inputs: int

    def _product(self, wide: int) -> float:
        """Microseconds of a product over all rows, of gates and so many others: forward, or as a gradient."""
        case = self.case
        rows, gates = case.steps * case.batch, case.directions * GATES[case.cell] * case.hidden_size
        moved = (rows * (gates + wide) + gates * wide) * SIZES[TYPE]
        work = large_product_us(self.card, 2.0 * rows * gates * wide, TYPE)
        return max(work, self.card.memory_us(moved)) + self.card.constant("launch")

    @property
    def input_product(self) -> float:
        """W_ih x; the gradient of x, and that of W_ih, take as long."""
        return self._product(self.inputs)

    @property
    def weight_products(self) -> float:
        """The gradients of W_ih and W_hh."""
        # A direction's states with its own gates alone.
        return self._product(self.inputs) + self._product(self.case.outputs) / self.case.directions


class Part(NamedTuple):
    """A recurrence of some steps in one call: microseconds, and the SMs that it takes."""

    us: float
    sms: int


@functools.lru_cache(maxsize=1 << 16)
def recurrence(
    layer: Layer, steps: int, backward: bool, training: bool, most_sms: int = 0, cooperative: bool = True
) -> Part:
    """The best plan's.

    Launches step by step take the card as they find it: all of it.

    Args:
        most_sms: the SMs that it may take; 0: the card's.
        cooperative: whether it may be a plan that is launched cooperatively.
    """
    case, card = layer.case, replace(layer.card, sms=most_sms) if most_sms else layer.card
    found = []
    for name in ("auto",) if cooperative else ("step", "block", "cluster"):
        with contextlib.suppress(Illegal):
            plan = card.plan(
                MODES[case.cell], TYPE, case.hidden_size, case.batch, steps=steps, directions=case.directions,
                projection=case.proj_size, training=training, backward=backward, name=name,
            )  # fmt: skip
            sms = layer.card.all_sms
            if plan.persistent:
                sms = plan.layout["group"] * min(plan.layout["groups"], plan.layout["groups_at_once"])
            found.append(Part(plan.predicted_us * steps, sms))
    return min(found)


def layers_of(case: Case, card: Card) -> list[Layer]:
    return [Layer(case, card, inputs) for inputs in case.layer_inputs]


# ---- the ways -------------------------------------------------------------------------------------------------------


class Times(NamedTuple):
    """Microseconds of a call."""

    forward: float
    backward: float


def today(case: Case, card: Card, training: bool = True) -> Times:
    forward = backward = 0.0
    for layer in layers_of(case, card):
        forward += layer.input_product + recurrence(layer, case.steps, False, training).us
        backward += recurrence(layer, case.steps, True, True).us + layer.input_product + layer.weight_products
    return Times(forward, backward)


def counts(case: Case) -> list[int]:
    """Into how many chunks the steps may be cut."""
    return sorted({math.ceil(case.steps / chunk) for chunk in CHUNKS if chunk < case.steps})


def wavefront(
    case: Case, card: Card, training: bool = True, slowed: float = 1.0, cooperative: bool = True
) -> Times | None:
    """As many layers at a time as is best, the next ones after them. None where no two can overlap: a layer of both
    directions needs all of the one below, and launches step by step take the whole card.

    Args:
        slowed: how many times as long a recurrence takes beside others, with which it shares L2 and memory.
        cooperative: whether recurrences that run at a time may be launched cooperatively.
    """
    layers = layers_of(case, card)
    if case.directions == 2:
        return None
    best, found = list(today(case, card, training)), False
    for deep, backward in itertools.product(range(2, case.layers + 1), (False, True)):
        groups = [layers[first : first + deep] for first in range(0, case.layers, deep)]
        times = [_at_once(group, backward, training, slowed, cooperative) for group in groups]
        found |= any(len(group) > 1 and us < math.inf for group, us in zip(groups, times, strict=True))
        best[backward] = min(best[backward], sum(times))
    return Times(*best) if found else None


def _at_once(layers: Sequence[Layer], backward: bool, training: bool, slowed: float, cooperative: bool) -> float:
    """Microseconds of some layers at a time, each a chunk behind the one below."""
    case, card, deep = layers[0].case, layers[0].card, len(layers)
    products = sum(layer.weight_products for layer in layers) if backward else 0.0
    if deep == 1:
        return recurrence(layers[0], case.steps, backward, training).us + layers[0].input_product + products
    best = math.inf
    for count, sms in itertools.product(counts(case), (0, card.all_sms // deep)):
        parts = [
            recurrence(layer, math.ceil(case.steps / count), backward, training, sms, cooperative) for layer in layers
        ]
        taken = sum(sms for _, sms in parts)
        if taken > card.all_sms:
            continue
        # While a layer's product runs, its SMs and its share of those that are free are the product's.
        pairs = zip(parts, layers, strict=True)
        stages = [slowed * us + deep * layer.input_product / count for (us, _), layer in pairs]
        total = sum(stages) + (count - 1) * max(stages)
        # The weights' gradients take what is free, and the rest of their time afterwards.
        total += max(0.0, products - total * (1 - taken / card.all_sms))
        best = min(best, max(total, HOST * 2 * count * deep))
    return best


def beside(case: Case, card: Card, training: bool = True) -> Times | None:
    """None where there are too few steps for chunks; no more than today, where that is as fast."""
    forward = backward = 0.0
    if not counts(case):
        return None
    for layer in layers_of(case, card):
        options = list(itertools.product(counts(case), (0, *(card.all_sms * part // 4 for part in (1, 2, 3)))))
        forward += min(_product_beside(layer, *option, training) for option in options)
        backward += min(_gradients_beside(layer, *option) for option in options)
    before = today(case, card, training)
    return Times(min(forward, before.forward), min(backward, before.backward))


def _product_beside(layer: Layer, count: int, most_sms: int, training: bool) -> float:
    """Forward: some chunks of the product first, with the whole card; then the others beside the recurrence."""
    part, sms = recurrence(layer, math.ceil(layer.case.steps / count), False, training, most_sms)
    free = layer.card.all_sms - sms
    if free < 1:
        return math.inf
    alone = layer.input_product / count
    shared = alone * layer.card.all_sms / free
    best = math.inf
    for ahead in (2**power for power in range(count.bit_length())):
        # The chunk that is ready at `made`, and when the recurrence is through with the one before.
        made = end = ahead * alone
        for number in range(count):
            if number >= ahead:
                made += shared
            end = max(end, made) + part
        best = min(best, end)
    return max(best, HOST * 2 * count)


def _gradients_beside(layer: Layer, count: int, most_sms: int) -> float:
    """Backward: products of a chunk's gates' gradients beside the recurrence of the next, the rest after it."""
    part, sms = recurrence(layer, math.ceil(layer.case.steps / count), True, True, most_sms)
    products = layer.input_product + layer.weight_products
    free = 1 - sms / layer.card.all_sms
    left = max(products / count, products - free * (count - 1) * part)
    return max(count * part + left, HOST * 4 * count)


def aside(case: Case, card: Card, training: bool = True) -> Times | None:
    """None for one layer."""
    if case.layers < 2:
        return None
    waiting = backward = 0.0
    for layer in reversed(layers_of(case, card)):
        us, sms = recurrence(layer, case.steps, True, True)
        waiting = max(0.0, waiting - us * (1 - sms / card.all_sms))
        backward += us + layer.input_product
        waiting += layer.weight_products
    before = today(case, card, training)
    return Times(before.forward, backward + waiting) if backward + waiting < before.backward else None


Way = Callable[[Case, Card, bool], Times | None]
WAYS: dict[str, Way] = {"wavefront": wavefront, "beside": beside, "aside": aside}
# A wavefront, less well off.
SLOWED = 1.25
DOUBTS: dict[str, Way] = {
    f"wavefront where recurrences take {SLOWED:g} times as long": functools.partial(wavefront, slowed=SLOWED),
    "wavefront without cooperative launches": functools.partial(wavefront, cooperative=False),
}


class Gains(NamedTuple):
    """Of the time of a call what is saved: below zero where it would take longer, None where it cannot be."""

    inference: float | None
    training: float | None


def gains(case: Case, card: Card, way: Way) -> Gains:
    found: list[float | None] = []
    for training in (False, True):
        before, after = today(case, card, training), way(case, card, training)
        if after is None:
            found.append(None)
        elif training:
            found.append(1 - sum(after) / sum(before))
        else:
            found.append(1 - after.forward / before.forward)
    return Gains(*found)


# ---- tables ---------------------------------------------------------------------------------------------------------


def percent(gain: float | None) -> str:
    if gain is None:
        return "-"
    text = f"{100 * gain:+.0f} %" if abs(gain) >= 0.005 else "0"
    return f"**{text}**" if gain > WORTH else text


def realistic() -> list[Case]:
    return [*MODELS, *STACKS]


def share_of_products(case: Case, card: Card) -> float:
    """Of a training call's time what products over all rows take."""
    products = sum(2 * layer.input_product + layer.weight_products for layer in layers_of(case, card))
    return products / sum(today(case, card))


@functools.cache
def table(card: str = "h100") -> str:
    """Markdown: realistic shapes, what each way saves of inference and of training."""
    device = CARDS[card]
    lines = [f"| {TYPE}, {device.name}: layer or stack | T, B, I, H, layers | ms: inference | training | products |"]
    lines[0] += "".join(f" {way}: inference | training |" for way in WAYS)
    lines.append("| --- | --- | ---: | ---: | ---: |" + " ---: | ---: |" * len(WAYS))
    for case in realistic():
        shape = f"{case.cell} {case.steps}, {case.batch}, {case.inputs}, {case.hidden_size}, {case.layers}"
        shape += ", both directions" * (case.directions == 2) + f", P={case.proj_size}" * bool(case.proj_size)
        times = (1e-3 * today(case, device, False).forward, 1e-3 * sum(today(case, device)))
        line = f"| {case.model} | {shape} | {times[0]:.2f} | {times[1]:.2f} | {share_of_products(case, device):.0%} |"
        for way in WAYS.values():
            line += "".join(f" {percent(gain)} |" for gain in gains(case, device, way))
        lines.append(line)
    return "\n".join(lines)


def swept(layers: Sequence[int] = (2, 3, 4, 5)) -> list[Case]:
    sizes = itertools.product((256, 512, 768, 1024), (1, 16, 64), (100, 500, 2000), layers)
    return [Case("LSTM", batch, hidden, steps, layers=count) for hidden, batch, steps, count in sizes]


@functools.cache
def sweep(card: str = "h100") -> str:
    """Markdown: stacks of one direction with as many inputs as hidden units, over H and B: the wavefront's gain."""
    device = CARDS[card]
    lines = [f"| {TYPE}, {device.name}: H | B | 2 layers, T = 100 | 500 | 2000 | 4 layers, T = 100 | 500 | 2000 |"]
    lines.append("| ---: | ---: |" + " ---: |" * 6)
    for hidden, batch in itertools.product((256, 512, 768, 1024), (1, 16, 64)):
        line = f"| {hidden} | {batch} |"
        for layers, steps in itertools.product((2, 4), (100, 500, 2000)):
            case = Case("LSTM", batch, hidden, steps, layers=layers)
            inference, training = gains(case, device, wavefront)
            line += f" {percent(inference)}, {percent(training)} |"
        lines.append(line)
    return "\n".join(lines)


@functools.cache
def verdict(card: str = "h100") -> str:
    """Markdown: for how many shapes each way is worth building, and the most that it gives."""
    device = CARDS[card]
    groups = {"shapes above": realistic(), "stacks of 2 to 5 layers": swept()}
    lines = [f"| {device.name}: more than {WORTH:.0%} saved |"]
    lines[0] += "".join(f" of {len(cases)} {name}: inference | training |" for name, cases in groups.items())
    lines.append("| --- |" + " --- | --- |" * len(groups))
    for name, way in {**WAYS, **DOUBTS}.items():
        line = f"| {name} |"
        for cases in groups.values():
            found = [gains(case, device, way) for case in cases]
            for which in range(2):
                values = [pair[which] or 0.0 for pair in found]
                line += f" {sum(value > WORTH for value in values)}, at most {max(values):.0%} |"
        lines.append(line)
    return "\n".join(lines)


@functools.cache
def all_tables() -> str:
    """Markdown: what docs/predicted.md has."""
    return f"{table()}\n\n{sweep()}\n\n{verdict()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=CARDS, default="h100")
    options = parser.parse_args()
    print(f"predicted, not measured\n\n{table(options.card)}\n\n{sweep(options.card)}\n\n{verdict(options.card)}")


if __name__ == "__main__":
    main()

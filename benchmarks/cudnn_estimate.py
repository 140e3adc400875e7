"""What cuDNN should take for a step of a layer, through torch.nn: the one place where predictions get that from.

Two figures are known; all else is estimated from them, and from how cuDNN's paths are built. Microseconds a step,
outside of a CUDA graph, the recurrence alone: the input product and the gradients' products are subtracted from what is
known. A comparison with these is a prediction and claims no speed.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from card_model import CARDS, Card, large_product_us
from rnnfast.cell_types import CELLS
from rnnfast.cuda_plan import Illegal


class Known(NamedTuple):
    """What others measured of cuDNN through torch.nn on an H100, microseconds a step, the input projection included."""

    forward: float
    backward: float
    what: str


# By (H, B), at T = 1024, LSTM: cuDNN's persistent kernel, its best path. Of other shapes nobody's figure was found.
KNOWN = {(768, 16): Known(1.96, 3.1, "float16")}


class SmallHidden(NamedTuple):
    """What cuDNN's kernel for small hidden sizes takes in one place, against its standard path there: it is chosen by H
    alone, however large the batch is. Told by others, the card not named."""

    hidden: int = 168
    batch: int = 62
    us: float = 76.0
    standard_us: float = 14.5


SMALL_HIDDEN = SmallHidden()
# Estimated: below this no step of that kernel is.
SMALL_HIDDEN_FLOOR = 2.0
# Up to which H torch takes that kernel (LSTM and GRU, RNN), forward and backward; then where it takes the persistent
# one. Source: pytorch, aten/src/ATen/native/cudnn/RNN.cpp, use_rnn_persist_small_h and use_persist_*_heuristics.
SMALL_HIDDEN_MOST = {False: {"gated": 192, "plain": 384}, True: {"gated": 128, "plain": 256}}
PERSISTENT_HIDDEN, PERSISTENT_MULTIPLE, PERSISTENT_BATCH, PERSISTENT_SMS = 1024, 128, 128, 98


class Estimate(NamedTuple):
    """cuDNN's time.

    Args:
        us: microseconds a step, the recurrence alone.
        path: "persistent", "small H" or "standard".
        known: whether it is a measured figure, its products subtracted, and not an estimate.
    """

    us: float
    path: str
    known: bool


def path_of(card: Card, mode: str, arithmetic: str, hidden: int, batch: int, backward: bool) -> str:
    """Which way torch has cuDNN go, for one dense layer of one direction with as many inputs as hidden units. Packed
    rows and projections go the standard way, more layers or directions never the persistent one."""
    plain = mode.startswith("RNN")
    if arithmetic == "float64":
        return "standard"
    if hidden <= SMALL_HIDDEN_MOST[backward]["plain" if plain else "gated"]:
        return "small H"
    fits = hidden <= PERSISTENT_HIDDEN and hidden % PERSISTENT_MULTIPLE == 0 and card.all_sms >= PERSISTENT_SMS
    fits = fits and batch % 8 == 0 and batch <= PERSISTENT_BATCH and not (plain and batch >= 96 and hidden >= 896)
    return "persistent" if arithmetic == "float16" and fits and mode != "GRU" and card.sm % 10 != 6 else "standard"


def standard_us(card: Card, mode: str, arithmetic: str, hidden: int, batch: int, backward: bool) -> float:
    """A product of the library and a pointwise kernel a step: what the plan `split` does
    (csrc/cuda/plan/split_model.h), launched from within cuDNN, whose host takes no more than the launches' own time.

    Estimated, all of it.
    """
    options = {"training": True, "backward": backward, "name": "split", "in_graph": True}
    device = card.plan(mode, arithmetic, hidden, batch, **options).predicted_us
    return max(2 * card.constant("launch"), device)


def small_hidden_us(card: Card, mode: str, arithmetic: str, hidden: int, batch: int, backward: bool) -> float:
    """Estimated from the one place that is known: it grows with B and with the weights, but is never further behind the
    standard path than there."""
    at = SMALL_HIDDEN
    scaled = at.us * batch / at.batch * (hidden / at.hidden) ** 2 * CELLS[mode].gates / CELLS["LSTM"].gates
    most = at.us / at.standard_us * standard_us(card, mode, arithmetic, hidden, batch, backward)
    return max(SMALL_HIDDEN_FLOOR, min(scaled, most))


@functools.cache
def known_recurrence_us(backward: bool) -> float:
    """The known figure without its products: one forward (the input's), three with backward (of input and weights)."""
    ((hidden, batch), known), card = next(iter(KNOWN.items())), CARDS["h100"]
    product = large_product_us(card, 2.0 * batch * hidden * CELLS["LSTM"].gates * hidden, known.what)
    return known.backward - 3 * product if backward else known.forward - product


def persistent_us(card: Card, mode: str, arithmetic: str, hidden: int, batch: int, backward: bool) -> float | None:
    """The known figure, scaled as our own kernel with a barrier of the grid is predicted to grow: estimated but for the
    known place. None where that kernel has no layout."""

    def ours(card: Card, mode: str, hidden: int, batch: int) -> float:
        options = {"steps": 1024, "training": True, "backward": backward, "name": "grid-barrier"}
        return card.plan(mode, arithmetic, hidden, batch, **options).predicted_us

    try:
        scale = ours(card, mode, hidden, batch) / ours(CARDS["h100"], "LSTM", *next(iter(KNOWN)))
    except Illegal:
        return None
    return known_recurrence_us(backward) * scale


def estimate(card: Card, mode: str, arithmetic: str, hidden: int, batch: int, backward: bool = False) -> Estimate:
    """cuDNN's time for a step of one layer, one direction, dense rows, as many inputs as hidden units."""
    shape = (card, mode, arithmetic, hidden, batch, backward)
    path = path_of(*shape)
    if path == "small H":
        return Estimate(small_hidden_us(*shape), path, False)
    if path == "persistent" and (us := persistent_us(*shape)) is not None:
        known = KNOWN.get((hidden, batch))
        is_known = known is not None and (card, mode, arithmetic) == (CARDS["h100"], "LSTM", known.what)
        return Estimate(us, path, is_known)
    return Estimate(standard_us(*shape), "standard", False)

"""Where the plan's predicted time jumps between neighbouring shapes, and why: of the model of csrc/cuda/plan.h, not
measured.

    python benchmarks/plan_cliffs.py            # what docs/predicted.md has: LSTM on an A100, an H100 and its seventh
    python benchmarks/plan_cliffs.py --all      # every card of card_model.py, GRU too

A cliff is a pair of shapes next to each other on the grid, in H or in B, of which the larger takes more than 1.5 times
as long although it has less than 10 % more to multiply; where it has more than that, more than 1.5 times what the work
grows by. `reason` says what the plans have that explains it; None is a flaw of the plan or of its model. `falls` are
pairs of which the larger shape takes less.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from card_model import CARDS, Card
from rnnfast.cuda_plan import Illegal, Plan

# Pairs one apart, where tiles of units or of the batch are full and where they have just overflowed, among them odd
# numbers and what is no multiple of 8; from one pair to the next a quarter to a half more.
_FULL = (
    16, 24, 32, 48, 64, 96, 128, 160, 192, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536, 2048, 2560, 3072,
    3584,
)  # fmt: skip
HIDDEN_SIZES = tuple(sorted({*_FULL, *(size + 1 for size in _FULL), 100, 200, 300, 500, 1000, 4096}))
BATCHES = (
    1, 2, 4, 7, 8, 9, 12, 15, 16, 17, 20, 24, 25, 31, 32, 33, 40, 48, 49, 63, 64, 65, 80, 96, 97, 112, 128, 129, 160,
    192, 193, 224, 256, 257, 384, 512, 513, 768, 1023, 1024,
)  # fmt: skip
TYPES = ("bfloat16", "tf32", "float32")
STEPS = 1024
JUMP, ALIKE = 1.5, 1.1
# A jump is explained by what grew as much, but for this.
TOLERANCE = 1.06
PERSISTENT = ("block", "cluster", "grid")
# Of `turns`: the least gain, and the most launches.
WORTH, MOST_TURNS = 1.15, 4
# Of what the page and its test look at.
SHOWN_CARDS, SHOWN_MODES = ("a100", "h100", "h100-1g"), ("LSTM",)

NO_LAYOUT = "no persistent layout fits any more: W_hh in as many groups as the batch needs"
SLOWER = "persistent layouts still fit, with so much for a block to do that a launch a step is faster"
SHARE = "a block has more to do: whole octets of units, batch tiles, warps or waves"
EXCHANGE = "the exchange of the smaller shape has no layout any more, and another one is taken"
ROWS = "a launch has one more row of blocks over the batch, or more blocks than SMs"
MEMORY = "the weights no longer fit L2 and come from memory each step"
LAUNCHES = "another way of launches takes over"
REASONS = (NO_LAYOUT, SLOWER, SHARE, EXCHANGE, ROWS, MEMORY, LAUNCHES)


class Case(NamedTuple):
    """What a map is of."""

    card: Card
    mode: str
    arithmetic: str
    backward: bool

    def __str__(self) -> str:
        return f"{self.card.name}, {self.mode}, {self.arithmetic}, {'backward' if self.backward else 'forward'}"

    def plan(self, hidden: int, batch: int, name: str = "auto") -> Plan:
        options = {"steps": STEPS, "training": True, "backward": self.backward, "name": name}
        return self.card.plan(self.mode, self.arithmetic, hidden, batch, **options)


Shape = tuple[int, int]
Plans = dict[Shape, Plan]


class Pair(NamedTuple):
    """Two shapes, (H, B), and their plans; `after` is the larger."""

    case: Case
    shape: Shape
    larger: Shape
    before: Plan
    after: Plan

    @property
    def jump(self) -> float:
        return self.after.predicted_us / self.before.predicted_us

    @property
    def work(self) -> float:
        """How much more the larger has to multiply."""
        return (self.larger[0] / self.shape[0]) ** 2 * self.larger[1] / self.shape[1]

    @property
    def is_cliff(self) -> bool:
        return self.jump > JUMP * (self.work if self.work >= ALIKE else 1.0)

    def __str__(self) -> str:
        (hidden, batch), (more_hidden, more_batch) = self.shape, self.larger
        sizes = f"H={hidden}, B={batch}" + (f" to {more_batch}" if more_batch != batch else "")
        if more_hidden != hidden:
            sizes = f"H={hidden} to {more_hidden}, B={batch}"
        before, after = self.before, self.after
        return f"{sizes}: {before.name} {before.predicted_us:.2f} us to {after.name} {after.predicted_us:.2f} us"


@functools.lru_cache(maxsize=128)
def plans(case: Case) -> Plans:
    """Over the whole grid."""
    return {(hidden, batch): case.plan(hidden, batch) for hidden in HIDDEN_SIZES for batch in BATCHES}


def pairs(case: Case) -> Iterator[Pair]:
    """All neighbours, each once."""
    found = plans(case)
    for sizes, axis in ((HIDDEN_SIZES, 0), (BATCHES, 1)):
        following = dict(itertools.pairwise(sizes))
        for shape, plan in found.items():
            if (more := following.get(shape[axis])) is not None:
                larger = (more, shape[1]) if axis == 0 else (shape[0], more)
                yield Pair(case, shape, larger, plan, found[larger])


def cliffs(case: Case) -> list[Pair]:
    return [pair for pair in pairs(case) if pair.is_cliff]


def falls(case: Case, least: float = 0.98) -> list[Pair]:
    """Where more work is predicted to take less time, by more than rounding."""
    return [pair for pair in pairs(case) if pair.jump < least]


def _loads(plan: Plan) -> list[float]:
    """What an SM has to do in a step of persistent kernels, counted in layouts alone: waves, turns of warps, cells,
    products of warps, fragments of weights read from shared memory, values received."""
    at = plan.layout
    waves, warps, rows = at["waves"], -(-at["warps"] // 4), 8 * at["batch_tiles"]
    active = at["row_warps"] * at["sum_warps"]
    return [
        waves,
        waves * warps,
        waves * warps * -(-at["units"] * rows // (32 * at["warps"])),
        waves * -(-active // 4) * at["passes"] * at["chunks"] * at["batch_tiles"],
        waves * active * (at["fragments_in_shared_memory"] + at["passes"] * at["chunks"] * at["batch_tiles"]),
        waves * at["group"] * at["units"] * rows,
    ]


def _by_name(pair: Pair, name: str) -> Plan | None:
    """The larger shape's plan of that name; None where there is none."""
    try:
        return pair.case.plan(*pair.larger, name=name)
    except Illegal:
        return None


def _alike(pair: Pair) -> Plan | None:
    """The larger shape's plan of the smaller one's name."""
    return pair.after if pair.before.name == pair.after.name else _by_name(pair, pair.before.name)


def reason(pair: Pair) -> str | None:
    """What explains a cliff: of `REASONS`, or None.

    A jump is explained by what grew at least as much: time that does not depend on it only makes the jump smaller.
    """
    before, after = pair.before, pair.after
    if before.persistent and not after.persistent:
        others = [name for name in PERSISTENT if _by_name(pair, name) is not None]
        return SLOWER if others else NO_LAYOUT
    if (alike := _alike(pair)) is None:
        return EXCHANGE if after.persistent else LAUNCHES
    # Whatever is taken in place of this is no slower.
    if before.persistent:
        grew = max(more / less for less, more in zip(_loads(before), _loads(alike), strict=True))
        return SHARE if pair.jump <= TOLERANCE * grew else None
    if alike.limited_by == "HBM" and alike.limits_us["HBM"] > JUMP * before.limits_us["HBM"]:
        return MEMORY
    busiest = _on_busiest(alike, pair) / _on_busiest(before, pair)
    return ROWS if pair.jump <= TOLERANCE * max(busiest, _l2(alike) / _l2(before), pair.work) else None


def _on_busiest(plan: Plan, pair: Pair) -> float:
    """Blocks on the busiest SM; those of a library's product by how much they multiply."""
    at = plan.layout
    blocks = -(-max(1, at.get("blocks", 1)) // pair.case.card.all_sms)
    return blocks * at.get("tile_rows", 1) * at.get("tile_columns", 1) / at.get("parts", 1)


def _l2(plan: Plan) -> int:
    return max(1, plan.layout.get("l2_bytes", 1))


# ---- what is told of them -------------------------------------------------------------------------------------------


def cases(cards: Sequence[str] = SHOWN_CARDS, modes: Sequence[str] = SHOWN_MODES) -> list[Case]:
    every = itertools.product(cards, modes, TYPES, (False, True))
    return [Case(CARDS[card], mode, arithmetic, backward) for card, mode, arithmetic, backward in every]


class Found(NamedTuple):
    """Of one way from a plan to another, for one reason: how often, and the largest jump."""

    pairs: int
    worst: Pair


def sorted_out(chosen: Iterable[Case]) -> dict[tuple[str | None, str], Found]:
    """By (reason, "grid to step"), the commonest reason first."""
    groups: dict[tuple[str | None, str], list[Pair]] = {}
    for case in chosen:
        for pair in cliffs(case):
            way = f"{pair.before.name} to {pair.after.name}"
            groups.setdefault((reason(pair), way), []).append(pair)
    of_reason = Counter[str | None]()
    for (why, _), group in groups.items():
        of_reason[why] += len(group)
    order = sorted(groups, key=lambda key: (-of_reason[key[0]], -len(groups[key])))
    return {key: Found(len(groups[key]), max(groups[key], key=lambda pair: pair.jump)) for key in order}


@functools.cache
def table(cards: Sequence[str] = SHOWN_CARDS, modes: Sequence[str] = SHOWN_MODES) -> str:
    """Markdown: every kind of cliff."""
    chosen = cases(cards, modes)
    found = sorted_out(chosen)
    count = len(chosen) * sum(1 for _ in pairs(chosen[0]))
    total = sum(each.pairs for each in found.values())
    lines = [f"{total:,} of {count:,} pairs of neighbours are cliffs:", ""]
    lines += ["| reason | from to | pairs | the largest jump |", "| --- | --- | ---: | --- |"]
    for (why, way), (number, worst) in found.items():
        lines.append(f"| {why or '**unexplained**'} | {way} | {number:,} | {worst.jump:.1f}: {worst.case}: {worst} |")
    lowest = min((pair for case in chosen for pair in falls(case, 1.0)), key=lambda pair: pair.jump, default=None)
    if lowest is not None:
        lines += ["", f"The largest fall (more work, less time): {lowest.case}: {lowest}."]
    return "\n".join(lines)


def turns(case: Case) -> list[tuple[Shape, int, float]]:
    """Where the batch in several launches of persistent kernels, one after the other, would take less time than the
    plan by more than `WORTH`: (H, B), the number of launches, how many times as fast."""
    found = []
    for (hidden, batch), plan in plans(case).items():
        best, launches = plan.predicted_us / WORTH, 0
        for count in range(2, min(batch, MOST_TURNS) + 1):
            part = case.plan(hidden, -(-batch // count))
            if part.persistent and count * part.predicted_us < best:
                best, launches = count * part.predicted_us, count
        if launches:
            found.append(((hidden, batch), launches, plan.predicted_us / best))
    return found


def main() -> int:
    from tqdm import tqdm  # for the command alone

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every card, LSTM and GRU (half a minute)")
    options = parser.parse_args()
    chosen = (tuple(CARDS), ("LSTM", "GRU")) if options.all else (SHOWN_CARDS, SHOWN_MODES)
    for case in tqdm(cases(*chosen), unit="map", disable=None):
        plans(case)
    print(f"predicted, not measured\n\n{table(*chosen)}\n")
    unexplained = [pair for case in cases(*chosen) for pair in cliffs(case) if reason(pair) is None]
    for pair in unexplained:
        print(f"unexplained: {pair.jump:.2f}: {pair.case}: {pair}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main())

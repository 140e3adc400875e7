"""Layers with options beyond torch.nn's, in any combination, with every gradient: 200 at random, against the loop for
all options together of variant_loops.py.

What a layer drew in training is drawn here once more, from the same seed, in the order that `layers.run_layers`
documents.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnfast
import variant_loops as loops
from rnnfast.variants.options import NAMES, Options
from tolerances import error, floor
from variant_cases import GATES, SEED, dropped, kept, randomise, same, weight_mask

# --- any combination ----------------------------------------------------------------------------------------------

CHOICES: dict[str, list[Any]] = {
    "layer_norm": [None, "separate", "joint"],
    "norm": ["layer", "rms"],
    "norm_eps": [1e-5, 1e-3, 0.1],
    "recurrent_dropout": [0.0, 0.3, 0.7],
    "dropout_mode": ["state", "candidate"],
    "input_dropout": [0.0, 0.0, 0.4],
    "weight_dropout": [0.0, 0.0, 0.5],
    "gate_activation": ["sigmoid", "sigmoid", "hard_sigmoid"],
    "zoneout": [0.0, 0.1, 0.6],
}
OF_GRU: dict[str, list[Any]] = {
    "reset_after": [True, False],
    "reset_gate": [True, True, False],
    "candidate_activation": ["tanh", "tanh", "relu"],
}
OF_LSTM: dict[str, list[Any]] = {
    "cell_norm": [None, "output", "carried"],
    "peephole": [False, True],
    "coupled": [False, False, True],
    "forget_bias": [None, None, 1.0],
    "zoneout": [0.0, 0.2, (0.4, 0.0), [0.0, 0.3], (0.1, 0.7)],
}
KINDS = [*["LSTM"] * 8, *["GRU"] * 5, "RNN_TANH", "RNN_RELU", "RNN_SIGMOID", "RNN_IDENTITY"]


def random_options(rng: random.Random, kind: str, hidden_size: int, bias: bool) -> dict[str, Any]:
    """Such as go together, and at least one that is not the default."""
    heads = [1, 1, 1, *(n for n in range(2, hidden_size + 1) if hidden_size % n == 0)]
    of_kind: dict[str, list[Any]] = {"LSTM": OF_LSTM, "GRU": OF_GRU}.get(kind, {}) | {"num_heads": heads}
    while True:
        options = {name: rng.choice(values) for name, values in (CHOICES | of_kind).items()}
        # A joint norm that has no bias takes the gate's off again.
        joint_rms = options["layer_norm"] == "joint" and options["norm"] == "rms"
        if options.get("coupled") or not bias or joint_rms:
            options.pop("forget_bias", None)
        if not options["recurrent_dropout"] or kind.startswith("RNN"):
            del options["dropout_mode"]
        if kind.startswith("RNN"):
            del options["gate_activation"]
        if not options.get("reset_gate", True):
            options["reset_after"] = True
        if not options.get("reset_after", True):
            options["layer_norm"] = None
        if options["layer_norm"] is None and options.get("cell_norm") is None:
            del options["norm"], options["norm_eps"]
        changed = {name: value for name, value in options.items() if value != getattr(Options(), name)}
        if changed:
            return changed


class Case:
    """A random call of a random layer; the same for the same number."""

    def __init__(self, number: int) -> None:
        self.seed, rng = number, random.Random(number)
        self.kind = rng.choice(KINDS)
        self.has_cell = self.kind == "LSTM"
        self.bias = rng.random() < 0.7
        self.hidden_size = rng.choice([1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 19])
        self.options = random_options(rng, self.kind, self.hidden_size, self.bias)
        self.layers, self.directions = rng.choice([1, 1, 2]), rng.choice([1, 2])
        layout = rng.choice([*["dense", "batch_first", "packed", "packed unsorted"] * 2, "unbatched"])
        self.training, self.given_state = rng.random() < 0.65, rng.random() < 0.6
        self.dropout = 0.3 if self.layers == 2 and rng.random() < 0.5 else 0.0
        self.steps, self.batch = (
            rng.choice([1, 3, 4, 5, 6, 7]),
            1 if layout == "unbatched" else rng.choice([1, 2, 2, 3, 3, 4, 9]),
        )
        self.input_size = rng.randint(1, 8)
        ends = [self.steps, *(rng.randint("packed" in layout, self.steps) for _ in range(self.batch - 1))]
        if layout == "packed":
            ends.sort(reverse=True)
        self.lengths, self.resets = None, torch.zeros(self.steps, self.batch, dtype=torch.bool)
        if "packed" not in layout:
            if rng.random() < 0.5:
                self.lengths = torch.tensor(ends)
            else:
                ends = [self.steps] * self.batch
            if rng.random() < 0.4:
                self.resets = torch.tensor([[rng.random() < 0.3 for _ in ends] for _ in range(self.steps)])
        self.layout = loops.Layout(layout, self.steps, ends)
        # Which results the loss looks at, and how many of the leaves get no gradient.
        self.looked_at = rng.sample(["output", "h_n", "c_n", "cell_states"], rng.choice([1, 2, 4, 4]))
        self.frozen = rng.choice([0.0, 0.0, 0.4])

    def module(self, dtype: torch.dtype) -> Any:
        kind, _, nonlinearity = self.kind.partition("_")
        arguments = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        module = getattr(rnnfast, kind)(
            self.input_size, self.hidden_size, self.layers, bias=self.bias, dropout=self.dropout, dtype=dtype,
            batch_first=self.layout.name == "batch_first", bidirectional=self.directions == 2, **arguments,
            **self.options,
        )  # fmt: skip
        randomise(module)
        return module.train(self.training)

    def leaves(self, module: nn.Module, dtype: torch.dtype) -> dict[str, Tensor]:
        """Every parameter, the input (T, B, I), and the states (L*D, B, H) where they are given."""
        count, rng = self.layers * self.directions, random.Random(self.seed)
        found: dict[str, Tensor] = dict(module.named_parameters())
        found["x"] = torch.randn(self.steps, self.batch, self.input_size, dtype=torch.float64).to(dtype)
        for name in ("h", "c")[: (1 + self.has_cell) * self.given_state]:
            found[name] = torch.randn(count, self.batch, self.hidden_size, dtype=torch.float64).to(dtype)
        return {name: leaf.requires_grad_(rng.random() >= self.frozen) for name, leaf in found.items()}

    def draw(self, like: Tensor) -> list[loops.Drawn]:
        """In the order that `layers.run_layers` and `layers.draw_masks` document."""
        every: list[loops.Drawn] = []
        batch, hidden_size, options = self.batch, self.hidden_size, self.options if self.training else {}
        rows, zoneout, each = self.layout.shape, options.get("zoneout", 0.0), self.layout.each
        of_h, of_c = zoneout if isinstance(zoneout, (tuple, list)) else (zoneout, zoneout * self.has_cell)
        for layer in range(self.layers):
            of = loops.Drawn()
            if p := options.get("input_dropout"):
                of.input = dropped(p, batch, self.directions * hidden_size if layer else self.input_size, like=like)
            for _ in range(self.directions):
                fewer = options.get("coupled", False) or not options.get("reset_gate", True)
                width = (GATES[self.kind.partition("_")[0]] - fewer) * hidden_size
                p = options.get("weight_dropout")
                columns = hidden_size // options.get("num_heads", 1)
                of.weight.append(weight_mask(p, width, columns, like=like) if p else None)
                p = options.get("recurrent_dropout")
                mask = dropped(p, batch, hidden_size, like=like) if p else None
                of_candidate = options.get("dropout_mode") == "candidate"
                of.state.append(None if of_candidate else mask)
                of.candidate.append(mask if of_candidate else None)
                of.kept_h.append(each(kept(of_h, *rows, hidden_size)) if of_h else None)
                of.kept_c.append(each(kept(of_c, *rows, hidden_size)) if of_c else None)
            if self.dropout and self.training and layer + 1 < self.layers:
                features = self.directions * hidden_size
                if self.layout.name == "batch_first":
                    # Time-major all the same, as torch.nn draws it.
                    drawn = dropped(self.dropout, self.steps, batch, features, like=like)
                    of.output = [drawn[:end, row] for row, end in enumerate(self.layout.ends)]
                else:
                    of.output = each(dropped(self.dropout, *rows, features, like=like))
            every.append(of)
        return every

    def by_module(self, module: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
        """output and cell_states (T, B, D*H), zero beyond a row's end; h_n, c_n (L*D, B, H)."""
        unbatched = self.layout.name == "unbatched"
        states = [leaves[name][:, 0] if unbatched else leaves[name] for name in ("h", "c") if name in leaves]
        options: dict[str, Any] = {"return_cell_states": True} if self.has_cell else {}
        x = leaves["x"]
        if self.lengths is not None:
            options["lengths"] = self.lengths
            # What stands beyond a row's end is nobody's business.
            x = torch.where((torch.arange(self.steps)[:, None] < self.lengths)[..., None], x, torch.nan)
        if self.resets.any():
            options["resets"] = self.layout.given(self.resets)
        hx = None if not states else tuple(states) if self.has_cell else states[0]
        output, final, *others = module(self.layout.given(x), hx, **options)
        found = {"output": self.layout.padded(output)}
        for name, state in zip(("h_n", "c_n"), final if self.has_cell else (final,), strict=False):
            found[name] = state[:, None] if unbatched else state
        return found | ({"cell_states": self.layout.padded(others[0])} if others else {})

    def by_loop(self, leaves: dict[str, Tensor], drawn: list[loops.Drawn]) -> dict[str, Tensor]:
        """The same by variant_loops.py."""
        order = self.layout.order
        parameters = {name: value for name, value in leaves.items() if name not in ("x", "h", "c")}
        zeros = leaves["x"].new_zeros(self.layers * self.directions, self.batch, self.hidden_size)
        h, c = (leaves.get(name, zeros)[:, order] for name in ("h", "c"))
        rows = [leaves["x"][: self.layout.ends[n], n] for n in order]
        resets = [self.resets[:, n] for n in order]
        output, h_n, c_n, every_c = loops.any_layers(
            self.kind, self.options, parameters, rows, h, c, resets, drawn, self.training
        )
        back = [order.index(n) for n in range(self.batch)]
        found = {"output": self.layout.dense(output), "h_n": h_n[:, back]}
        return found | ({"c_n": c_n[:, back], "cell_states": self.layout.dense(every_c)} if self.has_cell else {})

    def run(self, dtype: torch.dtype = torch.float64) -> list[dict[str, Tensor]]:
        """Results and gradients: the module's, and the loop's in float64; in another type also the loop's in that, and
        the reference's."""
        torch.manual_seed(self.seed)
        module = self.module(dtype)
        leaves = self.leaves(module, dtype)
        torch.manual_seed(SEED)
        drawn = self.draw(leaves["x"])
        after = torch.get_rng_state()
        torch.manual_seed(SEED)
        results = self.by_module(module, leaves)
        assert torch.equal(torch.get_rng_state(), after), "the layer drew something else"
        cotangents = {
            name: torch.randn_like(value, dtype=torch.float64) / value[..., 0].numel() ** 0.5
            for name, value in results.items()
            if name in self.looked_at or (name == "output" and not results.keys() & set(self.looked_at))
        }
        cotangents = {name: value.to(dtype) for name, value in cotangents.items()}
        runs = [with_gradients(results, leaves, cotangents)]
        for of in (torch.float64, dtype)[: 1 + (dtype != torch.float64)]:
            cast = {name: leaf.detach().to(of).requires_grad_(leaf.requires_grad) for name, leaf in leaves.items()}
            runs.append(with_gradients(self.by_loop(cast, [each.to(of) for each in drawn]), cast, cotangents))
        if dtype != torch.float64:
            torch.manual_seed(SEED)
            with rnnfast.backend("reference"):
                runs.append(with_gradients(self.by_module(module, leaves), leaves, cotangents))
        return runs

    def __str__(self) -> str:
        return str({name: value for name, value in vars(self).items() if not isinstance(value, Tensor)})


def with_gradients(
    results: dict[str, Tensor], leaves: dict[str, Tensor], cotangents: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The results, and the gradients of all leaves that want one: zero where nothing depends on it."""
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    seen = [name for name in cotangents if results[name].requires_grad]
    grads: Sequence[Tensor | None] = [None] * len(wanted)
    if seen and wanted:
        outputs, given = [results[name] for name in seen], [cotangents[name].to(results[name]) for name in seen]
        grads = torch.autograd.grad(outputs, list(wanted.values()), given, allow_unused=True)
    return {name: value.detach() for name, value in results.items()} | {
        f"gradient of {name}": torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(wanted.items(), grads, strict=True)
    }


def check_exactly(number: int) -> None:
    case = Case(number)
    actual, expected = case.run()
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        same(value, expected[name], f"{case}\n{name}")


@pytest.mark.parametrize("first", range(0, 200, 10))
def test_any_combination(first: int) -> None:
    for number in range(first, first + 10):
        check_exactly(number)


def test_any_combination_by_the_reference() -> None:
    with rnnfast.backend("reference"):
        for number in range(20):
            check_exactly(number)


# A norm of two features has nearly no variance to divide by, and at a kink the last bit decides about a gradient.
def is_smooth(case: Case) -> bool:
    with_kinks = {"RNN_RELU", "relu", "hard_sigmoid"} & {case.kind, *map(str, case.options.values())}
    return case.hidden_size > 2 and not with_kinks


SMOOTH = [number for number in range(100) if is_smooth(Case(number))]


@pytest.mark.parametrize(
    ("dtype", "number"),
    [(torch.float32, number) for number in SMOOTH[:20]] + [(torch.bfloat16, number) for number in SMOOTH[20:28]],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_any_combination_in_another_type(dtype: torch.dtype, number: int) -> None:
    """The rule of tolerances.py, but that its floor for float32 is meant for values near 1: here it grows with them.

    The yardstick is the worse of the loop and the reference, as a norm enlarges what chance there is. The reference
    shares code with what is tested, so that it counts up to ten times the loop's error only.
    """
    actual, expected, loop, reference = Case(number).run(dtype)
    for name, value in actual.items():
        truth = expected[name]
        assert value.dtype == dtype
        of_loop, least = error(loop[name], truth), floor(dtype, truth)
        theirs = max(of_loop, min(error(reference[name], truth), 10 * of_loop + least))
        largest = max(1.0, error(truth, torch.zeros_like(truth))) if dtype == torch.float32 else 1.0
        own, bound = error(value, truth), 2 * theirs + least * largest
        assert own <= bound, f"{name}: error {own:.3g}, PyTorch's own {theirs:.3g}, allowed {bound:.3g}"


def test_the_combinations_have_every_option() -> None:
    """Each value in training and in evaluation, and every way in which rows lie."""
    seen: Counter[tuple[Any, ...]] = Counter()
    for case in map(Case, range(200)):
        seen.update((name, str(value), case.training) for name, value in case.options.items() if name != "num_heads")
        seen.update([("num_heads", case.options.get("num_heads", 1) > 1, case.training)])
        seen.update([("kind", case.kind), ("layout", case.layout.name), ("ways", case.layers, case.directions)])
        seen.update([("lengths", case.lengths is not None), ("resets", bool(case.resets.any()))])
    # A preset stands for other options, and a batch norm is not of each row by itself.
    elsewhere = {"preset", "batch_norm", "batch_norm_momentum", "batch_norm_steps"}
    assert set(NAMES) - elsewhere < {name for name, *_ in seen}
    assert min(seen.values()) >= 2, seen

"""What quantized weights (`rnnfast.quantize_weights`) cost in exactness: errors of single layers, and of a character
model that is trained here first, beside torch's own `quantize_dynamic`. Writes `cpu-quantization.json`; of it, and of
the suite `quantized`, makes the tables of docs/performance.md.

    python benchmarks/quantization.py            # three minutes
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import rnnfast
from records import QUANTIZED, RESULTS, Record, Row, is_peer
from rnnfast.benchmark.case import CELLS
from rnnfast.benchmark.timing import environment
from rnnfast.quantization import TYPES

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
NAME = "cpu-quantization.json"
# Of the layers: T, B, and as many inputs as hidden units.
STEPS, BATCH, SIZES = 100, 8, (128, 512, 1024)
TORCHS = "torch quantize_dynamic, int8"
PLAIN = "not quantized"


def quantized_by_rnnfast(model: nn.Module, kind: str) -> nn.Module:
    """A copy."""
    result = copy.deepcopy(model)
    rnnfast.quantize_weights(result, kind)
    return result


def quantized_by_torch(model: nn.Module) -> nn.Module:
    """A copy of a model of torch.nn: int8 weights, and activations in 8 bits."""
    with warnings.catch_warnings():
        # It is to go, and torchao, which is to follow it, has no recurrent layers.
        warnings.simplefilter("ignore")
        # It looks at the layers inside of what it is given.
        result = torch.ao.quantization.quantize_dynamic(nn.Sequential(model), {nn.LSTM, nn.GRU}, dtype=torch.qint8)
    found: nn.Module = result[0]
    return found


def variants(model: nn.Module) -> dict[str, Callable[[], nn.Module]]:
    """What a model of torch.nn is compared with, by name."""
    made: dict[str, Callable[[], nn.Module]] = {PLAIN: lambda: model}
    made |= {kind: lambda kind=kind: quantized_by_rnnfast(model, kind) for kind in TYPES}  # type: ignore[misc]
    if any(isinstance(module, (nn.LSTM, nn.GRU)) for module in model.modules()):
        made[TORCHS] = lambda: quantized_by_torch(model)
    return made


@torch.no_grad()
def layer_errors(cell: str, hidden_size: int) -> list[Row]:
    """How far each variant's output is from float64: the root of the mean square, of that of the output; the most."""
    torch.manual_seed(0)
    layer = getattr(nn, cell)(hidden_size, hidden_size)
    rows = torch.randn(STEPS, BATCH, hidden_size)
    truth: Tensor = copy.deepcopy(layer).double()(rows.double())[0]
    found = []
    for name, make in variants(layer).items():
        error = make()(rows)[0].double() - truth
        relative = (error.square().mean() / truth.square().mean()).sqrt()
        row = {"cell": cell, "H": hidden_size, "T": STEPS, "B": BATCH, "weights": name}
        found.append(row | {"rms_error": relative.item(), "max_error": error.abs().max().item()})
    return found


def character_model(steps: int) -> list[Row]:
    """The held-out bits a character of the demo's model, trained for so many steps."""
    sys.path.append(str(EXAMPLES))
    # Here, because who makes tables needs none of it.
    from train_charlm import CharacterModel, bits_per_character, read_corpus, streams, trainer

    numbers, alphabet = read_corpus(seed=0, limit=4_000_000)
    held_out = len(numbers) // 20
    training, validation = streams(numbers[:-held_out], 32), streams(numbers[-held_out:], 32)
    torch.manual_seed(0)
    model = CharacterModel(rnnfast, "LSTM", len(alphabet), 256, 2)
    step = trainer(model, training, 100, steps, 4e-3)
    for number in tqdm(range(steps), desc="character model", mininterval=0.5):
        step(number)
    rnnfast.restore(model)
    return [
        {"weights": name, "steps": steps, "bits_per_character": bits_per_character(make(), validation, 100)}
        for name, make in variants(model).items()
    ]


# --- tables -----------------------------------------------------------------------------------------------------------


def errors_table(results: Path) -> str:
    """The errors of the layers, and what they come to in a trained model."""
    path = results / NAME
    if not path.exists():
        return "There is no result file of `benchmarks/quantization.py` yet."
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    names = list(dict.fromkeys(row["weights"] for row in data["layers"]))
    lines = [f"| layer | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for cell, size in dict.fromkeys((row["cell"], row["H"]) for row in data["layers"]):
        own = {row["weights"]: row for row in data["layers"] if (row["cell"], row["H"]) == (cell, size)}
        cells = [
            f"{own[name]['rms_error']:.1e} ({own[name]['max_error']:.1e})" if name in own else "" for name in names
        ]
        lines.append(f"| {cell} H={size} | {' | '.join(cells)} |")
    scores = {row["weights"]: row["bits_per_character"] for row in data["character_model"]}
    cells = [f"{scores[name]:.5f}" for name in names]
    lines.append(f"| character model, bits a character | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed_table(records: Sequence[Record]) -> str:
    """For each type of weights and number of rows: the time of the layer as it was, and of other libraries, over that
    of the quantized one. Medians of each, of the cases their geometric mean and the least."""
    rows = [row for record in records for row in record.rows if row.get("quantized")]
    if not rows:
        return "There is no result file of the suite `quantized` yet."
    times = {(row["case"], row["backend"]): row["us_per_step"] for row in rows}
    ours = {row["case"]: row for row in rows if row["backend"].endswith(QUANTIZED)}
    peers = [name for name in dict.fromkeys(row["backend"] for row in rows) if is_peer(name)]
    head = ["weights", "pause", "B", "layers and H", "not quantized / quantized"]
    head += [f"{name} / quantized" for name in peers]
    lines = [f"| {' | '.join(head)} |", f"| --- | ---: | ---: | --- |{' ---: |' * (len(peers) + 1)}"]

    def part(row: Row) -> tuple[Any, ...]:
        # Weights of one thread fit its L2 cache in most cases with the smaller sizes, and in few with the larger.
        return row["quantized"], row["pause_ms"], row["B"], row["H"] > 256

    for key in dict.fromkeys(map(part, ours.values())):
        own = [row for row in ours.values() if part(row) == key]
        layers = "; ".join(
            f"{cell} {', '.join(str(row['H']) for row in own if row['cell'] == cell)}"
            for cell in CELLS
            if any(row["cell"] == cell for row in own)
        )
        kind, pause, batch, _ = key
        line = [kind, f"{pause:g} ms" if pause else "", str(batch), layers]
        for name in ("cpu", *peers):
            each = [times[row["case"], name] / row["us_per_step"] for row in own if (row["case"], name) in times]
            line.append(f"{statistics.geometric_mean(each):.2f} ({min(each):.2f})" if each else "")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result file")
    parser.add_argument("--steps", type=int, default=600, help="training steps of the character model (default 600)")
    options = parser.parse_args()
    layers = [row for cell, size in product(CELLS, SIZES) for row in layer_errors(cell, size)]
    found = {"layers": layers, "character_model": character_model(options.steps)}
    path = options.out / NAME
    path.write_text(json.dumps(environment(torch.device("cpu")) | found, indent=1) + "\n", encoding="utf-8")
    print(errors_table(options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Train a character language model on the source of Python's standard library, with torch.nn and with rnnfast.

Embedding, a stack of LSTM or GRU layers, softmax tied to the embedding; truncated backpropagation through time with the
state carried from chunk to chunk. The same seed and data for both; Ctrl-C ends it with what was measured so far.
"""

from __future__ import annotations

import itertools
import math
import random
import sysconfig
from pathlib import Path
from types import ModuleType

import torch
from torch.nn import functional as F

import rnnfast
from side_by_side import Side, Step, arguments, pick_device, race, report, run

State = torch.Tensor | tuple[torch.Tensor, torch.Tensor] | None


class CharacterModel(torch.nn.Module):
    """Predicts the next character.

    Args:
        home: ``torch.nn`` or ``rnnfast``: where the recurrent layer comes from, the only difference between the two.
        cell: "LSTM" or "GRU".
        characters: V, the size of the alphabet.
        hidden_size: H, of the embedding and of every layer.
        num_layers: L.
    """

    def __init__(self, home: ModuleType, cell: str, characters: int, hidden_size: int, num_layers: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(characters, hidden_size)
        self.rnn = getattr(home, cell)(hidden_size, hidden_size, num_layers)
        self.decoder = torch.nn.Linear(hidden_size, characters)
        torch.nn.init.uniform_(self.embedding.weight, -0.1, 0.1)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor, state: State = None) -> tuple[torch.Tensor, State]:
        """Logits (T, B, V) of the characters that follow ``tokens`` (T, B), and the state to go on from."""
        output, state = self.rnn(self.embedding(tokens), state)
        return self.decoder(output), state


def read_corpus(seed: int, limit: int) -> tuple[torch.Tensor, str]:
    """The standard library's .py files, shuffled, as numbers into an alphabet: (N,) int64, and the alphabet."""
    library = Path(sysconfig.get_path("stdlib"))
    left_out = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
    files = sorted(p for p in library.rglob("*.py") if not left_out & set(p.relative_to(library).parts))
    random.Random(seed).shuffle(files)
    texts, size = [], 0
    for path in files:
        # A few files hold other alphabets; a question mark stands for each such character.
        texts.append(path.read_text(encoding="utf-8", errors="replace").encode("ascii", "replace"))
        size += len(texts[-1])
        if size >= limit:
            break
    codes = torch.frombuffer(bytearray(b"".join(texts)[:limit]), dtype=torch.uint8)
    alphabet, numbers = torch.unique(codes, return_inverse=True)
    print(f"{len(texts)} files from {library}: {len(codes):,} characters, {len(alphabet)} different")
    return numbers, bytes(alphabet.tolist()).decode("ascii")


def streams(numbers: torch.Tensor, batch: int) -> torch.Tensor:
    """(N,) -> (N // batch, batch): column b is the b-th stretch of the text."""
    steps = len(numbers) // batch
    return numbers[: steps * batch].view(batch, steps).t().contiguous()


def inputs_and_targets(text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every character but the last, and of each the one that follows: a stream for `rnnfast.tbptt`."""
    return text[:-1], text[1:]


def trainer(model: CharacterModel, text: torch.Tensor, chunk: int, steps: int, rate: float) -> Step:
    """A training step for `side_by_side.Side`: the next chunk of all streams, the state carried on."""
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    # Warm up over 20 steps, then go down in a line to a tenth.
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / 20, 1 - 0.9 * i / steps))
    # At the text's end the streams start again, from a fresh state.
    chunks = itertools.chain.from_iterable(
        rnnfast.tbptt(model, inputs_and_targets(text), chunk) for _ in itertools.count()
    )

    def step(_: int) -> tuple[torch.Tensor, int]:
        part = next(chunks)
        loss = F.cross_entropy(part.output.flatten(0, 1), part.target.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        return loss, part.target.numel()

    return step


@torch.no_grad()
def bits_per_character(model: CharacterModel, text: torch.Tensor, chunk: int) -> float:
    """On text that was not trained on, the state carried through."""
    model.eval()
    total, count = 0.0, 0
    for part in rnnfast.tbptt(model, inputs_and_targets(text[: 10 * chunk + 1]), chunk):
        total += F.cross_entropy(part.output.flatten(0, 1), part.target.flatten(), reduction="sum").item()
        count += part.target.numel()
    return total / count / math.log(2)


@torch.no_grad()
def sample(model: CharacterModel, alphabet: str, prompt: str, length: int, seed: int, device: torch.device) -> str:
    """``length`` characters that follow ``prompt``, drawn one at a time (T = 1, B = 1)."""
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    text, state = prompt, None
    tokens = torch.tensor([[alphabet.index(c)] for c in prompt], device=device)
    for _ in range(length):
        logits, state = model(tokens, state)
        # Temperature 0.7: a little more careful than the model's own distribution.
        drawn = torch.multinomial((logits[-1, 0] / 0.7).softmax(0).cpu(), 1, generator=generator)
        text += alphabet[int(drawn)]
        tokens = drawn.view(1, 1).to(device)
    return text


def main() -> int:
    parser = arguments(__doc__, steps=800)
    parser.add_argument("--cell", choices=("lstm", "gru"), default="lstm")
    parser.add_argument("--hidden", type=int, default=256, help="hidden size (default 256)")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=32, help="streams of text side by side (default 32)")
    parser.add_argument("--chunk", type=int, default=100, help="steps of backpropagation through time (default 100)")
    parser.add_argument("--rate", type=float, default=4e-3, help="learning rate (default 0.004)")
    parser.add_argument("--characters", type=int, default=8_000_000, help="read at most this much text")
    parser.add_argument("--sample", type=int, default=400, help="characters of text to generate at the end")
    options = parser.parse_args()
    device = pick_device(options.device)
    numbers, alphabet = read_corpus(options.seed, options.characters)
    held_out = len(numbers) // 20
    training = streams(numbers[:-held_out], options.batch).to(device)
    validation = streams(numbers[-held_out:], options.batch).to(device)
    sides = []
    for name, home in (("torch.nn", torch.nn), ("rnnfast", rnnfast)):
        torch.manual_seed(options.seed)
        model = CharacterModel(home, options.cell.upper(), len(alphabet), options.hidden, options.layers).to(device)
        sides.append(Side(name, model, trainer(model, training, options.chunk, options.steps, options.rate)))
    title = (
        f"Character model, {options.layers} x {options.cell.upper()} of {options.hidden}, "
        f"batch {options.batch}, {options.chunk} steps a chunk"
    )
    print(f"{title}, {sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    interrupted = race(sides, options.steps, "tokens", 60 * options.minutes, device)

    def scores() -> dict[str, list[float]]:
        return {"held-out bits/character": [bits_per_character(s.model, validation, options.chunk) for s in sides]}

    name = f"charlm-{options.cell}"
    agree = report(name, title, sides, "tokens", "nats per character", device, options.out, interrupted, scores)
    if not interrupted:
        print(f"\nA sample from rnnfast's model:\n{'-' * 80}")
        print(sample(sides[1].model, alphabet, "def ", options.sample, options.seed, device))
        print("-" * 80)
    return 0 if agree else 1


if __name__ == "__main__":
    run(main)

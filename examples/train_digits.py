"""Classify handwritten digits, read as sequences of rows of different lengths, with torch.nn and with rnnfast.

scikit-learn's 1797 digits of 8 x 8 pixels lie on their side, so that a digit is read from left to right, as it was
written; blank rows at both ends are cut off, which leaves 2 to 8. A bidirectional GRU reads them: torch.nn takes a
PackedSequence, rnnfast the padded batch and ``lengths``. The same seed and data for both; Ctrl-C ends it with what was
measured so far.
"""

from __future__ import annotations

from types import ModuleType

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_sequence

import rnnfast
from side_by_side import Side, Step, arguments, pick_device, race, report, run


class DigitReader(torch.nn.Module):
    """A bidirectional GRU over the rows, and a classifier on both directions' last states.

    Args:
        home: ``torch.nn`` or ``rnnfast``.
        hidden_size: H.
    """

    def __init__(self, home: ModuleType, hidden_size: int) -> None:
        super().__init__()
        self.home = home
        self.gru = home.GRU(8, hidden_size, bidirectional=True)
        self.classifier = torch.nn.Linear(2 * hidden_size, 10)

    def forward(self, rows: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Logits (B, 10) for ``rows`` (T, B, 8), of which ``lengths`` (B,) count."""
        if self.home is rnnfast:
            _, h_n = self.gru(rows, lengths=lengths)
        else:
            # torch.nn wants the lengths on the CPU.
            _, h_n = self.gru(pack_padded_sequence(rows, lengths.cpu(), enforce_sorted=False))
        return self.classifier(torch.cat([h_n[0], h_n[1]], 1))


def read_digits() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows (T, N, 8) in [0, 1], lengths (N,) and labels (N,)."""
    images, labels = load_digits(return_X_y=True)
    on_their_side = torch.from_numpy(images).float().div(16).view(-1, 8, 8).transpose(1, 2)
    sequences = []
    for image in on_their_side:
        inked = image.sum(1).nonzero()
        sequences.append(image[inked.min() : inked.max() + 1])
    return pad_sequence(sequences), torch.tensor([len(s) for s in sequences]), torch.from_numpy(labels).long()


def trainer(
    model: DigitReader, rows: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor, batch: int, seed: int
) -> Step:
    """A training step for `side_by_side.Side`: batch number i of an order that the seed alone decides."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    generator = torch.Generator().manual_seed(seed)
    batches = len(labels) // batch
    order = torch.empty(0, dtype=torch.long)

    def step(number: int) -> tuple[torch.Tensor, int]:
        nonlocal order
        at = number % batches
        if at == 0:
            order = torch.randperm(len(labels), generator=generator).to(labels.device)
        chosen = order[at * batch : (at + 1) * batch]
        loss = F.cross_entropy(model(rows[:, chosen], lengths[chosen]), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss, len(chosen)

    return step


@torch.no_grad()
def accuracy(model: DigitReader, rows: torch.Tensor, lengths: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    return (model(rows, lengths).argmax(1) == labels).float().mean().item()


def main() -> int:
    parser = arguments(__doc__, steps=440)
    parser.add_argument("--hidden", type=int, default=64, help="hidden size (default 64)")
    parser.add_argument("--batch", type=int, default=64, help="images a step (default 64)")
    options = parser.parse_args()
    device = pick_device(options.device)
    rows, lengths, labels = (x.to(device) for x in read_digits())
    # Every fifth image is kept for the accuracy.
    test = torch.arange(len(labels), device=device) % 5 == 0
    sides = []
    for name, home in (("torch.nn", torch.nn), ("rnnfast", rnnfast)):
        torch.manual_seed(options.seed)
        model = DigitReader(home, options.hidden).to(device)
        data = (rows[:, ~test], lengths[~test], labels[~test])
        sides.append(Side(name, model, trainer(model, *data, options.batch, options.seed)))
    title = f"Digits as 2 to 8 rows, bidirectional GRU of {options.hidden}, batch {options.batch}"
    print(f"{title}: {int((~test).sum())} images to train on, {int(test.sum())} to test", flush=True)
    interrupted = race(sides, options.steps, "images", 60 * options.minutes, device)

    def accuracies() -> dict[str, list[float]]:
        return {"test accuracy": [accuracy(side.model, rows[:, test], lengths[test], labels[test]) for side in sides]}

    agree = report("digits-gru", title, sides, "images", "nats", device, options.out, interrupted, accuracies)
    return 0 if agree else 1


if __name__ == "__main__":
    run(main)

"""The textbook's recurrent network, called a step at a time, and its fast form: the same outputs and gradients.

    python examples/textbook.py

checks the one against the other and prints how much faster the fast form is. The class is the one of PyTorch's tutorial
on classifying names ("NLP From Scratch"): two linear maps of the input and the hidden state, no nonlinearity. Its
output of step t reads the hidden state from before that step, h_{t-1}.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch
from torch.nn.functional import log_softmax

import rnnfast
from rnnfast.benchmark.timing import Ratio, environment, interleave


class TextbookRNN(torch.nn.Module):
    """One step a call: ``hidden = i2h(cat(x, h))``, ``out = log_softmax(i2o(cat(x, h)))``."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.i2h = torch.nn.Linear(input_size + hidden_size, hidden_size)
        self.i2o = torch.nn.Linear(input_size + hidden_size, output_size)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, I), h (B, H) -> log-probabilities (B, O), the next hidden state (B, H)."""
        combined = torch.cat((x, h), 1)
        return log_softmax(self.i2o(combined), dim=1), self.i2h(combined)


class FastTextbookRNN(torch.nn.Module):
    """All steps in one call: the hidden states from one recurrent layer, all outputs from one product.

    Args:
        textbook: the network whose weights are taken over: ``i2h`` splits into the layer's two matrices, ``i2o`` stays.
    """

    def __init__(self, textbook: TextbookRNN) -> None:
        super().__init__()
        weight, bias = textbook.i2h.weight.detach(), textbook.i2h.bias.detach()
        inputs = weight.size(1) - textbook.hidden_size
        self.rnn = rnnfast.RNN(inputs, textbook.hidden_size, nonlinearity="identity").to(weight)
        with torch.no_grad():
            self.rnn.weight_ih_l0.copy_(weight[:, :inputs])
            self.rnn.weight_hh_l0.copy_(weight[:, inputs:])
            self.rnn.bias_ih_l0.copy_(bias)
            # The textbook has one bias where the layer has two: the second stays zero and is not trained.
            self.rnn.bias_hh_l0.zero_().requires_grad_(False)
        self.i2o = torch.nn.Linear(textbook.i2o.in_features, textbook.i2o.out_features).to(weight)
        self.i2o.load_state_dict(textbook.i2o.state_dict())

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x (T, B, I), h (B, H) -> log-probabilities of every step (T, B, O), the last hidden state (B, H)."""
        states, h_n = self.rnn(x, h.unsqueeze(0))
        # The output of step t reads h_{t-1}.
        before = torch.cat((h.unsqueeze(0), states[:-1]))
        return log_softmax(self.i2o(torch.cat((x, before), 2)), dim=2), h_n[0]


def by_steps(textbook: TextbookRNN, x: torch.Tensor, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop around the textbook's network: the same arguments and results as `FastTextbookRNN`."""
    outputs = []
    for x_t in x:
        output, h = textbook(x_t, h)
        outputs.append(output)
    return torch.stack(outputs), h


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="measuring time of inference and of training (default 4)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--out", type=Path, help="write the result to this JSON file too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # The tutorial's sizes: 57 letters, 18 languages.
    textbook = TextbookRNN(57, options.hidden, 18)
    fast = FastTextbookRNN(textbook)
    x, h = torch.randn(options.steps, options.batch, 57), torch.zeros(options.batch, options.hidden)
    difference = (by_steps(textbook, x, h)[0] - fast(x, h)[0]).abs().max().item()
    print(f"T={options.steps} B={options.batch} I=57 H={options.hidden} O=18: largest difference {difference:.1e}")

    def train(model: torch.nn.Module, outputs: torch.Tensor) -> None:
        torch.autograd.grad(outputs.square().mean(), [p for p in model.parameters() if p.requires_grad])

    @torch.no_grad()
    def infer(form: str) -> None:
        by_steps(textbook, x, h) if form == "textbook" else fast(x, h)

    workloads = {
        "inference": (lambda: infer("textbook"), lambda: infer("fast")),
        "training": (lambda: train(textbook, by_steps(textbook, x, h)[0]), lambda: train(fast, fast(x, h)[0])),
    }
    record = {**environment(x.device), "T": options.steps, "B": options.batch, "I": 57, "H": options.hidden, "O": 18}
    for workload, calls in workloads.items():
        slow, quick = interleave(calls, options.seconds, x.device)
        times = [statistics.median(s) * 1e3 for s in (slow, quick)]
        print(f"{workload}: {times[0]:.2f} ms a step at a time, {times[1]:.2f} ms in one call: {Ratio.of(slow, quick)}")
        record[workload] = {"textbook_ms": times[0], "fast_ms": times[1], "ratio": Ratio.of(slow, quick).median}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

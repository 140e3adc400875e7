"""Checks an installed rnnfast without pytest and outside the source tree: `python tests/smoke.py`.

For trying one built wheel in several environments: every layer and a loop of every cell against torch.nn,
outputs and gradients.
"""

from __future__ import annotations

import sys

import torch

import rnnfast


def main() -> int:
    print(f"rnnfast {rnnfast.__version__} from {rnnfast.__file__}, torch {torch.__version__}")
    cpu = rnnfast.backends()["cpu"]
    print(f"cpu: {cpu.reason}")
    torch.manual_seed(0)
    worst = 0.0
    for name in ("LSTM", "GRU", "RNN"):
        theirs = getattr(torch.nn, name)(24, 40, num_layers=2, bidirectional=True)
        ours = getattr(rnnfast, name)(24, 40, num_layers=2, bidirectional=True)
        ours.load_state_dict(theirs.state_dict())
        values = []
        for module in (theirs, ours):
            x = torch.linspace(-1, 1, 9 * 5 * 24).view(9, 5, 24).requires_grad_()
            output, _ = module(x)
            output.square().sum().backward()
            values.append([output.detach(), x.grad, *(p.grad for p in module.parameters())])
        worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*values, strict=True)))
        # A loop of cells, whose gradients of weights are put off.
        values = []
        for home in (torch.nn, rnnfast):
            torch.manual_seed(1)
            cell, state = getattr(home, f"{name}Cell")(24, 40), None
            rows = torch.linspace(-1, 1, 4 * 5 * 24).view(4, 5, 24).requires_grad_()
            for row in rows:
                state = cell(row, state)
            output = state[0] if name == "LSTM" else state
            output.square().sum().backward()
            values.append([output.detach(), rows.grad, *(p.grad for p in cell.parameters())])
        worst = max(worst, *(float((a - b).abs().max() / a.abs().max()) for a, b in zip(*values, strict=True)))
    print(f"largest difference from torch.nn, outputs and gradients: {worst:.1e} of the largest value")
    ok = cpu.available and worst < 1e-5
    print("passed" if ok else "FAILED")
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())

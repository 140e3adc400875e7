"""The textbook's network, called a step at a time, and its fast form give the same outputs and gradients."""

import pytest
import torch

from textbook import FastTextbookRNN, TextbookRNN, by_steps


@pytest.mark.parametrize(("steps", "batch", "inputs", "hidden", "outputs"), [(1, 1, 3, 1, 2), (23, 3, 7, 11, 5)])
def test_fast_form_gives_the_textbooks_outputs_and_gradients(steps, batch, inputs, hidden, outputs):
    torch.manual_seed(steps)
    textbook = TextbookRNN(inputs, hidden, outputs).double()
    fast = FastTextbookRNN(textbook)
    x = torch.randn(steps, batch, inputs, dtype=torch.float64)
    h = torch.randn(batch, hidden, dtype=torch.float64)
    weights = torch.randn(steps, batch, outputs, dtype=torch.float64)
    last_weights = torch.randn(batch, hidden, dtype=torch.float64)

    results = []
    for form in (lambda x, h: by_steps(textbook, x, h), fast):
        leaves = x.clone().requires_grad_(), h.clone().requires_grad_()
        output, last = form(*leaves)
        ((output * weights).sum() + (last * last_weights).sum()).backward()
        results.append([output.detach(), last.detach(), *(leaf.grad for leaf in leaves)])
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)

    rnn, grad = fast.rnn, textbook.i2h.weight.grad
    pairs = [
        (rnn.weight_ih_l0.grad, grad[:, :inputs]),
        (rnn.weight_hh_l0.grad, grad[:, inputs:]),
        (rnn.bias_ih_l0.grad, textbook.i2h.bias.grad),
        (fast.i2o.weight.grad, textbook.i2o.weight.grad),
        (fast.i2o.bias.grad, textbook.i2o.bias.grad),
    ]
    for actual, expected in pairs:
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    assert rnn.bias_hh_l0.grad is None


def test_training_keeps_the_two_forms_equal():
    torch.manual_seed(0)
    textbook = TextbookRNN(4, 6, 3).double()
    fast = FastTextbookRNN(textbook)
    # The step of a plain gradient descent is small enough to leave the linear recurrence stable.
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05) for m in (textbook, fast)]
    targets = torch.randint(3, (9, 2))
    for _ in range(5):
        x, h = torch.randn(9, 2, 4, dtype=torch.float64), torch.zeros(2, 6, dtype=torch.float64)
        losses = []
        for outputs, optimizer in zip((by_steps(textbook, x, h)[0], fast(x, h)[0]), optimizers, strict=True):
            loss = torch.nn.functional.nll_loss(outputs.flatten(0, 1), targets.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-12)

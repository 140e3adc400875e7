"""What the tests of rnnfast.convert share: sizes, numpy's part of a loop, and the comparison with a layer."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

Array = Any
# Steps, rows, features of the input, and of the state.
T, N, F, H = 7, 3, 5, 4


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def hard_sigmoid(alpha: float, beta: float) -> Callable[[Array], Array]:
    return lambda x: np.clip(alpha * x + beta, 0, 1)


def over_time(step: Callable[..., tuple[Array, ...]], x: Array, *state: Array, reverse: bool = False) -> list[Array]:
    """step: (x_t, *state) to the new state, whose first part is the output. Every output, and the final states."""
    outputs = [np.zeros(0)] * len(x)
    for t in range(len(x))[:: -1 if reverse else 1]:
        state = step(x[t], *state)
        outputs[t] = state[0]
    return [np.stack(outputs), *state]


def check(found: torch.Tensor, expected: Array, tolerance: float = 1e-12) -> None:
    expected = torch.as_tensor(np.ascontiguousarray(expected))
    assert found.shape == expected.shape
    assert (found - expected).abs().max().item() <= tolerance * max(1, expected.abs().max().item())


def check_layer(module: Any, x: Array, expected: list[list[Array]], hx: Any = None, tolerance: float = 1e-12) -> None:
    """A layer on x (T, N, F) against each direction's outputs and final states."""
    assert not module.training
    given = torch.as_tensor(x)
    with torch.no_grad():
        output, states = module(given.transpose(0, 1) if module.batch_first else given, hx)
    check(
        output.transpose(0, 1) if module.batch_first else output,
        np.concatenate([d[0] for d in expected], -1),
        tolerance,
    )
    for n, state in enumerate(states if isinstance(states, tuple) else (states,)):
        check(state, np.stack([d[n + 1] for d in expected]), tolerance)


def keras_arrays(rng: np.random.Generator, cell: str, bias: bool, reset_after: bool) -> list[Array]:
    width = {"LSTM": 4, "GRU": 3, "SimpleRNN": 1}[cell] * H
    arrays = [rng.normal(size=(F, width)), rng.normal(size=(H, width))]
    return [*arrays, rng.normal(size=(2, width) if cell == "GRU" and reset_after else width)] if bias else arrays


def keras_loop(
    cell: str,
    arrays: list[Array],
    x: Array,
    activation: Callable[[Array], Array] = np.tanh,
    recurrent_activation: Callable[[Array], Array] = sigmoid,
    reset_after: bool = True,
    reverse: bool = False,
) -> list[Array]:
    """`call` of LSTMCell, GRUCell and SimpleRNNCell in keras/src/layers/rnn."""
    kernel, recurrent_kernel, bias = (*arrays, np.zeros_like(arrays[0][0]))[:3]
    units = recurrent_kernel.shape[0]

    def lstm(inputs: Array, h_tm1: Array, c_tm1: Array) -> tuple[Array, Array]:
        z0, z1, z2, z3 = np.split(inputs @ kernel + h_tm1 @ recurrent_kernel + bias, 4, axis=1)
        i, f = recurrent_activation(z0), recurrent_activation(z1)
        c = f * c_tm1 + i * activation(z2)
        return recurrent_activation(z3) * activation(c), c

    def gru(inputs: Array, h_tm1: Array) -> tuple[Array]:
        input_bias, recurrent_bias = bias if bias.ndim == 2 else (bias, np.zeros_like(bias))
        x_z, x_r, x_h = np.split(inputs @ kernel + input_bias, 3, axis=1)
        inner_z, inner_r, inner_h = np.split(h_tm1 @ recurrent_kernel + recurrent_bias, 3, axis=1)
        z, r = recurrent_activation(x_z + inner_z), recurrent_activation(x_r + inner_r)
        recurrent_h = r * inner_h if reset_after else (r * h_tm1) @ recurrent_kernel[:, 2 * units :]
        return (z * h_tm1 + (1 - z) * activation(x_h + recurrent_h),)

    def simple(inputs: Array, h_tm1: Array) -> tuple[Array]:
        return (activation(inputs @ kernel + bias + h_tm1 @ recurrent_kernel),)

    states = [np.zeros((x.shape[1], units))] * (2 if cell == "LSTM" else 1)
    return over_time({"LSTM": lstm, "GRU": gru, "SimpleRNN": simple}[cell], x, *states, reverse=reverse)

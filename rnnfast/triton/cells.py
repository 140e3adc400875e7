"""The cells' equations and their derivatives, for both families of kernels. Those of reference.py, where sources are.

Unused results repeat another one; what is not used costs nothing.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

# The values of MODE in kernels.
MODES = {"LSTM": 0, "GRU": 1, "RNN_TANH": 2, "RNN_RELU": 3, "RNN_IDENTITY": 4}
LSTM = tl.constexpr(0)
GRU = tl.constexpr(1)
RNN_TANH = tl.constexpr(2)
RNN_RELU = tl.constexpr(3)


@triton.jit
def sigmoid(x):
    """No overflow in exp, and no loss of small values."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(x):
    """From exp, and near zero, where that cancels, the series."""
    magnitude = tl.abs(x)
    e = tl.exp(-2.0 * magnitude)
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    # Where the first term left out is below the type's precision.
    limit: tl.constexpr = 0.01 if x.dtype == tl.float64 else 0.25
    return tl.where(magnitude < limit, near, tl.where(x < 0, -far, far))


@triton.jit
def forward(MODE: tl.constexpr, x0, x1, x2, x3, r0, r1, r2, r3, h, c):
    """One step of a cell, before the projection.

    Args: x, the gates from the input; r, those of `W_hh h`, for the GRU's n gate `W_hn h + b_hn`; h and c, the state.
    Returns: h_t or before a projection `o tanh(c)`; c_t; and the reserve's four values.
    """
    if MODE == LSTM:
        i, f, g, o = sigmoid(x0 + r0), sigmoid(x1 + r1), tanh(x2 + r2), sigmoid(x3 + r3)
        c_new = f * c + i * g
        return o * tanh(c_new), c_new, i, f, g, o
    elif MODE == GRU:
        r, z = sigmoid(x0 + r0), sigmoid(x1 + r1)
        n = tanh(x2 + r * r2)
        return n + z * (h - n), c, r, z, n, r2
    else:
        a = x0 + r0
        if MODE == RNN_TANH:
            h_new = tanh(a)
        elif MODE == RNN_RELU:
            # Not maximum(a, 0): a NaN stays one.
            h_new = tl.where(a < 0, 0.0, a)
        else:
            h_new = a
        return h_new, c, h_new, h_new, h_new, h_new


@triton.jit
def backward(MODE: tl.constexpr, s0, s1, s2, s3, h, c, h_new, c_new, dh, dc):
    """The derivative of `forward`.

    Args: s, the reserve; h and c before the step, h_new and c_new after it; dh and dc, their gradients.
    Returns: the gates' four gradients; for the GRU that of `W_hn h + b_hn`; what reaches the earlier state past the
        gates: the LSTM's gradient of c, for the GRU a part of that of h.
    """
    if MODE == LSTM:
        tanh_c = tanh(c_new)
        d = dc + dh * s3 * (1 - tanh_c * tanh_c)
        d0 = d * s2 * s0 * (1 - s0)
        d1 = d * c * s1 * (1 - s1)
        d2 = d * s0 * (1 - s2 * s2)
        d3 = dh * tanh_c * s3 * (1 - s3)
        return d0, d1, d2, d3, d2, d * s1
    elif MODE == GRU:
        d2 = dh * (1 - s1) * (1 - s2 * s2)
        d1 = dh * (h - s2) * s1 * (1 - s1)
        d0 = d2 * s3 * s0 * (1 - s0)
        return d0, d1, d2, d2, d2 * s0, dh * s1
    else:
        if MODE == RNN_TANH:
            d0 = dh * (1 - h_new * h_new)
        elif MODE == RNN_RELU:
            d0 = tl.where(h_new <= 0, 0.0, dh)
        else:
            d0 = dh
        return d0, d0, d0, d0, d0, d0

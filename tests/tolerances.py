"""How near a result must be, said once.

The truth is a float64 computation on the same numbers up-cast. The measure is the largest absolute error, and the
yardstick is the error that PyTorch makes in the same dtype: torch.nn's, or for single ops the reference's, which is
composed of torch's own operations. A result may be twice as far off, since the order of a sum is not promised,
plus a floor, since both errors are draws of chance and the yardstick's may be zero by luck:

* float32: 1e-6.
* 16-bit types: one eps of the largest value (or of 1). What is right but for the rounding to its storage type, and one
  rounding of what it was computed from, is half an eps off each time.
* float64: 1e-12 times the largest value (or 1), as the truth itself is computed in float64.
"""

import torch
from torch import Tensor


def error(actual: Tensor, expected: Tensor) -> float:
    """The largest absolute difference, in float64; NaN and inf must stand in the same places."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = torch.where(same, 0, actual - expected).abs()
    return difference.max().item() if difference.numel() else 0.0


def floor(dtype: torch.dtype, expected: Tensor) -> float:
    finite = expected.detach().double().abs().nan_to_num(0, 0, 0)
    scale = max(1.0, finite.max().item() if finite.numel() else 0.0)
    if dtype == torch.float32:
        return 1e-6
    return 1e-12 * scale if dtype == torch.float64 else torch.finfo(dtype).eps * scale


def check(name: str, actual: Tensor, expected: Tensor, yardstick: Tensor, grows: bool = False) -> None:
    """Holds actual to the rule above.

    Args:
        name: what is compared, for the message.
        actual: the result, in the dtype under test.
        expected: the same in float64.
        yardstick: the same as PyTorch computes it in that dtype.
        grows: whether the floor of float32 grows with the largest value, as the others do: of sums over many rows.
    """
    assert actual.dtype == yardstick.dtype, f"{name}: {actual.dtype}, expected {yardstick.dtype}"
    own, theirs = error(actual, expected), error(yardstick, expected)
    least = floor(actual.dtype, expected)
    if grows and actual.dtype == torch.float32:
        least *= max(1.0, error(expected, torch.zeros_like(expected)))
    bound = 2 * theirs + least
    # written so that a NaN fails
    assert own <= bound, f"{name}: error {own:.3g}, PyTorch's own {theirs:.3g}, allowed {bound:.3g}"


def check_equal(name: str, actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    """For float64 against float64."""
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    own = error(actual, expected)
    assert own <= tolerance, f"{name}: error {own:.3g}, allowed {tolerance:.3g}"

"""The tests of the derivatives (../test_autograd.py) on the card: its calls are made there."""

from typing import Any

import pytest

import test_autograd
from cases import Call, make_call
from test_autograd import (  # noqa: F401
    test_checkpoint,
    test_degenerate_sizes,
    test_first_and_second_derivatives,
    test_forward_mode,
    test_func_grad_and_grad_of_grad,
    test_gradcheck_and_gradgradcheck,
    test_gradient_beyond_the_end_of_a_row_is_ignored,
    test_gradients_of_the_two_biases_do_not_share_memory,
    test_no_grad_gives_the_same_results,
    test_one_gradient_alone_is_the_same,
    test_one_result_alone,
    test_opcheck,
    test_per_sample_gradients,
    test_saved_tensors_are_few_and_never_written,
    test_second_backward_is_bitwise_the_first,
    test_third_derivative,
    test_vmap,
    test_vmap_over_lengths_and_resets,
    test_vmap_over_the_ops,
    test_writing_to_a_saved_result_is_an_error,
)


@pytest.fixture(autouse=True)
def _calls_on_the_device(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    def make(*arguments: Any, **options: Any) -> Call:
        return make_call(*arguments, **options).on(device)

    monkeypatch.setattr(test_autograd, "make_call", make)

"""The tests of the ops (../test_ops.py) on the card: these names run with this folder's `backend` and `device`."""

from test_ops import (  # noqa: F401
    test_against_float64,
    test_expanded_inputs,
    test_forward_of_one_backend_and_backward_of_another,
    test_gates_of_any_size_saturate,
    test_gradients_that_are_none,
    test_matmul,
    test_matmul_keeps_nan_and_inf,
    test_nan_and_inf_stand_where_the_reference_has_them,
    test_runs_repeat_bit_for_bit_and_arguments_stay_as_they_are,
    test_seventy_thousand_steps,
    test_strides_do_not_matter,
    test_what_lies_beyond_a_row_is_never_read,
)

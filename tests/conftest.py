"""What each test begins with, and the fixtures `backend`, `device` and `one_thread`.

Tests marked `exhaustive` are deselected by default (pyproject.toml): `pytest -m exhaustive` runs them.
"""

import os
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Switches Triton's interpreter on: before the others, which may import Triton.
from triton_interpreter import triton_problem  # isort: skip
from emulated_library import emulated_problem
from isas import WITH_PAIRS
from rnnfast import backend as use_backend
from rnnfast import ops

# a backend, and for the C++ kernels the instruction set; Triton's kernels as they are chosen, and those of one step
BACKENDS = ["reference", "cpu-avx512", "cpu-avx2", "cpu-portable", "emulated", "triton", "triton-step"]
# Instruction sets whose kernels of other types are another's; tests without a type are not for them.
OF_ONE_TYPE = {f"cpu-{isa}": torch.bfloat16 for isa in WITH_PAIRS}
BACKENDS += list(OF_ONE_TYPE)

# Every instruction set has the same source: by default the widest runs all cases, the others every third.
SAME_SOURCE = {"cpu-avx2": (3, 1), "cpu-portable": (3, 1), "cpu-avx512_bf16": (3, 1)}
# The emulator and Triton's interpreter take some thousand times as long as a processor's kernels. By backend and file:
# every how many of a test's cases are run by default, and in the exhaustive run.
SHARE = {
    "emulated": {"test_ops": (6, 1), "test_parity": (12, 2), "test_autograd": (30, 2)},
    "triton": {"test_ops": (28, 4), "test_parity": (168, 24)},
    "triton-step": {"test_ops": (28, 4)},
}
# What says nothing about such kernels, or would run for hours.
TOO_SLOW = {"test_any_number_of_threads", "test_seventy_thousand_steps"}
# What takes longest: of how many cases of a test one, by its name, is run by default, the others in the exhaustive run.
FEWER = {
    "test_autograd": {
        "test_every_entry_of_the_jacobians": 3,
        "test_gradcheck_and_gradgradcheck": 4,
        "test_opcheck": 4,
    },
    "test_compile": {"test_torch_func_inside_a_compiled_function": 4, "test_forward_and_backward": 4},
    "test_cpu_numbers": {"test_the_team_works_in_the_callers_mode": 6},
    "test_emulated": {
        "test_forward_here_and_backward_by_the_cpu_kernels": 2,
        "test_twenty_schedules_agree_bit_for_bit": 6,
    },
    "test_emulator": {"test_passes_without_a_report": 10},
    "test_layer_backward": {"test_16_bit_types_in_chunks": 3},
    "test_op_derivatives": {"test_opcheck_with_gradients": 2},
    "test_ops": {
        "test_against_float64": 2,
        "test_forward_of_one_backend_and_backward_of_another": 2,
        "test_nan_and_inf_stand_where_the_reference_has_them": 2,
        "test_runs_repeat_bit_for_bit_and_arguments_stay_as_they_are": 4,
        "test_strides_do_not_matter": 2,
    },
    "test_pairs": {"test_layers_against_float64": 2},
    "test_panels": {"test_every_number_of_rows": 2},
    "test_recompute": {"test_first_and_second_derivatives_and_several_at_once": 3, "test_other_backends": 2},
    "test_recompute_programs": {"test_with_default_arguments": 2},
    "test_steps": {
        "test_gradients_are_torchs": 6,
        "test_the_other_types": 2,
        "test_weights_changed_before_the_pass": 4,
        "test_what_is_frozen_gets_none": 6,
    },
    "test_triton": {"test_forward_here_and_backward_by_the_cpu_kernels": 4, "test_opcheck": 2},
    "test_variants_backends": {
        "test_any_combination": 2,
        "test_explain_and_ops_say_what_runs": 4,
        "test_what_forward_keeps_is_what_the_cpu_keeps": 2,
        "test_wrong_arguments": 4,
    },
    "test_variants_forms": {"test_first_and_second_derivatives": 2},
}
# There Triton's kernels are compiled and run on a card: none of its tests is too slow.
ON_A_CARD = Path(__file__).parent / "gpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    kept, seen = [], Counter[tuple[str, str]]()
    for item in items:
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        backend = parameters.get("backend")
        if backend in OF_ONE_TYPE and OF_ONE_TYPE[backend] not in (
            parameters.get("dtype"),
            getattr(parameters.get("case"), "dtype", None),
        ):
            continue
        here = isinstance(item, pytest.Function) and not item.path.is_relative_to(ON_A_CARD)
        if here and part_of(item, FEWER.get(item.path.stem, {}).get(item.originalname, 1)):
            item.add_marker(pytest.mark.exhaustive)
        if here and (backend in SHARE or backend in SAME_SOURCE):
            name = item.originalname
            if backend in SHARE and (item.path.stem not in SHARE[backend] or name in TOO_SLOW):
                continue
            usual, exhaustive = SAME_SOURCE.get(backend) or SHARE[backend][item.path.stem]
            seen[backend, name] += 1
            if seen[backend, name] % exhaustive != 1 % exhaustive:
                continue
            if seen[backend, name] % usual != 1 % usual:
                item.add_marker(pytest.mark.exhaustive)
        kept.append(item)
    part, parts = part_of_exhaustive(os.environ.get("RNNFAST_TEST_PART", ""))
    left_out = {i for i in kept if i.get_closest_marker("exhaustive") is not None and part_of(i, parts) != part}
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in kept if item not in left_out]


def part_of(item: pytest.Item, parts: int) -> int:
    return zlib.crc32(item.nodeid.encode()) % parts


def part_of_exhaustive(text: str) -> tuple[int, int]:
    """RNNFAST_TEST_PART, part/parts: which of the exhaustive tests are taken, by their names; "" takes all."""
    if not text:
        return 0, 1
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 0 <= int(part) < int(parts)):
        raise pytest.UsageError(f"RNNFAST_TEST_PART: expected part/parts with part from 0 on, as in 0/4, got {text!r}")
    return int(part), int(parts)


_THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _same_beginning() -> None:
    """The same draws in each test, and as many threads, whatever one before left behind."""
    torch.manual_seed(1234)
    if torch.get_num_threads() != _THREADS:
        torch.set_num_threads(_THREADS)


@pytest.fixture
def device() -> str:
    """Where the tensors of a test are; tests/gpu has its own."""
    return "cpu"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once on each backend that the machine has; its name."""
    name, _, isa = request.param.partition("-")
    if name == "emulated" and (why := emulated_problem()) is not None:
        pytest.skip(why)
    if name == "triton":
        if (why := triton_problem()) is not None:
            pytest.skip(why)
        from rnnfast.triton import plan

        with use_backend(name), plan.only(isa or None):
            yield request.param
        return
    if not isa:
        with use_backend(name):
            yield request.param
        return
    if ops.library_error is not None:
        pytest.skip(ops.library_error)
    before = ops.use_cpu_isa("")
    try:
        ops.use_cpu_isa(isa)
    except RuntimeError as error:
        pytest.skip(f"{isa}: {str(error).splitlines()[0]}")
    try:
        with use_backend(name):
            yield request.param
    finally:
        ops.use_cpu_isa(before)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tiny shapes beside other tests, and for what sets the number itself: it is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

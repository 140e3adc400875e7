"""The C++ test programs of tests/cpp, each case as one test, plain, under ASan + UBSan and under TSan; and mutations: a
kernel with one synchronisation left out must be noticed. build_emulated.py builds the programs.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

import build_emulated
from build_emulated import fixed_addresses
from kernel_test import SANITIZER_OPTIONS, SKIP_NOT_NOTICED, SKIP_NOT_REACHED
from sanitizer_report import readable
from setup import CUDA_FAMILIES

SECONDS = 600
# The exit code and the words with which a sanitizer reports what a case does wrong on purpose.
FINDINGS = {"asan": (65, "ERROR: AddressSanitizer"), "tsan": (66, "WARNING: ThreadSanitizer: data race")}
# By the beginning of such a case's name: the variant that must report it.
ON_PURPOSE = {"overrun-": "asan", "race-": "tsan"}

# (program, case): its kernels are run once for each of their synchronisations, with that one left out.
MUTATED = [pytest.param("test_exchange", case) for case in ["block", "cluster", "grid"]]
MUTATED += [pytest.param("test_step", case, marks=pytest.mark.exhaustive) for case in ["lstm-float16", "lstm-float32"]]
MUTATED += [pytest.param("test_persistent", case) for case in ["lstm-block-bfloat16", "lstm-grid-bfloat16"]]
MUTATED += [pytest.param("test_split", "lstm-bfloat16"), pytest.param("test_variant", "lstm-float32")]
MUTATED += [
    pytest.param("test_persistent", case, marks=pytest.mark.exhaustive)
    for case in ["lstm-cluster-bfloat16", "gru-grid-barrier-float32"]
]
# Only an earlier start of the next grid: without it everything is as right, and later.
HARMLESS = {"allow_next_grid"}


def run(variant: str, program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    target = build_emulated.program_of(variant, program, arguments[0] if arguments else "")
    if program in build_emulated.BY_INSTANCE and variant != "plain":
        assert build_emulated.build([target], quiet=True), f"{target} does not compile"
    return subprocess.run(
        [*fixed_addresses(), str(build_emulated.BUILD / target), *arguments],
        env={**os.environ, **SANITIZER_OPTIONS, **environment},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS,
        check=False,
    )


def report(done: subprocess.CompletedProcess[str]) -> str:
    text = done.stdout + readable(done.stderr, Path(done.args[len(fixed_addresses())]))
    return f"exit code {done.returncode}\n" + (text if len(text) < 12_000 else f"{text[:8_000]}\n...\n{text[-4_000:]}")


@pytest.fixture(scope="module")
def programs() -> None:
    """Brings everything up to date; after `make test` has built it there is nothing to do."""
    try:
        built = build_emulated.build(list(build_emulated.TESTED), quiet=True)
    except SystemExit as error:  # no compiler, or no ninja
        pytest.skip(str(error))
    if not built:
        pytest.fail("a C++ test program does not compile: see `python tests/build_emulated.py`")


def sanitized_by_default(program: str, cases: list[str]) -> set[str]:
    """What `make test` runs of a program under a sanitizer: of test_step one cell of each family, in a type multiplied
    by scalars and in one on tensor cores; of test_persistent one cell and type of each exchange; of test_split and
    test_variant two. The rest, and most of their mutations, belong to the exhaustive run. The plain programs run every
    case by default, those that are built one instance at a time one type of each cell and exchange.
    """
    if program == "test_persistent":
        # Of two instances, which have to be compiled.
        return {"gru-block-float32", "lstm-cluster-bfloat16", "lstm-grid-bfloat16", "gru-grid-barrier-float32"}
    if program == "test_split":
        return {"lstm-bfloat16", "gru-float64"}
    if program == "test_variant":
        return {"lstm-float32", "gru-bfloat16"}
    if program != "test_step" or cases == [""]:
        return set(cases)
    return {
        next(case for case in cases if case.startswith(f"{family}-") and case.endswith(f"-{dtype}"))
        for family in CUDA_FAMILIES
        for dtype in ("float32", "bfloat16")
    }


def one_type_of_each(cases: list[str]) -> set[str]:
    """Of cases that are listed type by type: of each cell and exchange one type, each in turn."""
    types = len({case.rpartition("-")[2] for case in cases})
    return {case for i, case in enumerate(cases) if i % types == i // types % types}


def listed_cases() -> tuple[list[object], list[object]]:
    """(variant, program, case) of the cases that must pass, and of those that a sanitizer must report. Where a program
    is not built yet, the case "" stands for all that must pass.
    """
    passing, reported = [], []
    for variant in build_emulated.TESTED:
        for program in build_emulated.programs():
            names = [""]
            # Which cases there are is the same in all variants of such a program.
            listing = "plain" if program in build_emulated.BY_INSTANCE else variant
            if (build_emulated.BUILD / listing / program).exists():
                names = run(listing, program, "--list").stdout.splitlines() or [""]
            cases = [name.partition(" ")[0] for name in names]
            usual = sanitized_by_default(program, cases)
            if variant == "plain" and program in build_emulated.BY_INSTANCE:
                usual = one_type_of_each(cases)
            for name in names:
                case, _, by_name_only = name.partition(" ")
                every = variant == "plain" and program not in build_emulated.BY_INSTANCE
                marks = [] if every or case in usual else [pytest.mark.exhaustive]
                entry = pytest.param(variant, program, case, id=f"{variant}-{program}-{case or 'all'}", marks=marks)
                if not by_name_only:
                    passing.append(entry)
                elif any(case.startswith(prefix) and variant == of for prefix, of in ON_PURPOSE.items()):
                    reported.append(entry)
    return passing, reported


PASSING, REPORTED = listed_cases()


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("variant", "program", "case"), PASSING)
def test_passes_without_a_report(variant: str, program: str, case: str) -> None:
    done = run(variant, program, *([case] if case else []))
    assert done.returncode == 0, report(done)
    assert "Sanitizer" not in done.stderr, report(done)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("variant", "program", "case"), REPORTED)
def test_wrong_on_purpose_is_reported(variant: str, program: str, case: str) -> None:
    done = run(variant, program, case)
    code, words = FINDINGS[variant]
    assert done.returncode == code, report(done)
    assert words in done.stderr, report(done)


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize(("program", "case"), MUTATED)
def test_a_synchronisation_left_out_is_noticed(program: str, case: str) -> None:
    """By TSan, by the emulator itself or by a wrong result."""
    listing = run("plain", program, case, RNNFAST_EMULATOR_LIST_SITES="1")
    assert listing.returncode == 0, report(listing)
    sites = re.findall(r"^site (\S+:\d+) (\w+)$", listing.stderr, re.MULTILINE)
    assert sites
    unnoticed = []
    for site, what in sites:
        if what in HARMLESS:
            continue
        done = run("tsan", program, case, RNNFAST_EMULATOR_SKIP=site)
        # The plain program runs the larger shapes, and more schedules.
        if done.returncode in (SKIP_NOT_NOTICED, SKIP_NOT_REACHED):
            done = run("plain", program, case, RNNFAST_EMULATOR_SKIP=site)
        assert done.returncode in (1, 66, SKIP_NOT_NOTICED), f"{what} at {site}: {report(done)}"
        if done.returncode == SKIP_NOT_NOTICED:
            unnoticed.append(f"{what} at {site}")
    assert not unnoticed

"""The tables that say the same for several languages agree, and an option stays as cheap as docs/design.md says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import rnnfast
from option_cost import OPTIONS, cost
from rnnfast import functional
from rnnfast.cell_types import CELLS, NONLINEARITIES
from rnnfast.signatures import KINDS, PLACES
from setup import CUDA_FAMILIES

ROOT = Path(__file__).resolve().parent.parent
CELLS_H = (ROOT / "csrc/cells.h").read_text()


def test_the_tables_of_cells_agree() -> None:
    rows = re.findall(r"\{Mode::(\w+), \"(\w+)\", Family::(\w+), (.*?)\},", CELLS_H)
    assert [name for _, name, _, _ in rows] == list(CELLS)
    for enumerator, name, _, facts in rows:
        cell = CELLS[name]
        split = "kNoGate" if cell.split_gate is None else str(cell.split_gate)
        truth = [str(fact).lower() for fact in (cell.has_cell_state, cell.reads_previous_h)]
        wanted = [str(cell.gates), str(cell.reserve), *truth, split, str(cell.may_project).lower()]
        assert enumerator.upper() == name
        assert facts.split(", ") == wanted, name


def test_the_cuda_library_is_built_for_every_family() -> None:
    families = re.search(r"enum class Family \{ (.*?) \};", CELLS_H)
    assert families is not None
    assert families[1].split(", ") == CUDA_FAMILIES
    assert {family for _, family in re.findall(r"Mode::(\w+), \"\w+\", Family::(\w+)", CELLS_H)} == set(CUDA_FAMILIES)


def test_every_cell_has_a_layer_a_cell_and_a_function() -> None:
    for mode in CELLS:
        kind, _, nonlinearity = mode.partition("_")
        options = {"nonlinearity": nonlinearity.lower()} if nonlinearity else {}
        assert getattr(rnnfast, kind)(2, 3, **options)._mode() == mode
        assert getattr(rnnfast, f"{kind}Cell")(2, 3, **options)._mode() == mode
        assert callable(getattr(functional, kind.lower()))
    assert {f"RNN_{name.upper()}" for name in NONLINEARITIES} == set(NONLINEARITIES.values()) <= set(CELLS)


def test_every_kind_of_parameter_has_its_places() -> None:
    assert tuple(f"{kind}{direction}" for kind in KINDS for direction in ("", "_reverse")) == PLACES


def test_the_tables_of_parameters_agree() -> None:
    table = (ROOT / "csrc/parameters.h").read_text()
    rows = re.findall(r"\{Kind::(\w+), \"(\w+)\", Option::(\w+), Size::(\w+)(?:, Size::(\w+))?\},", table)
    assert [name for _, name, *_ in rows] == list(KINDS)
    for enumerator, name, option, *shape in rows:
        assert enumerator == name
        assert (option.replace("always", ""), tuple(filter(None, shape))) == (KINDS[name].option, KINDS[name].shape)


def test_triton_numbers_every_cell() -> None:
    cells = pytest.importorskip("rnnfast.triton.cells", reason="Triton is not installed")
    for number, mode in enumerate(CELLS):
        assert cells.cell(mode).mode == number


@pytest.mark.parametrize("name", OPTIONS)
def test_an_option_touches_few_files(name: str) -> None:
    found = cost(OPTIONS[name])
    assert 0 < len(found) <= OPTIONS[name].most, found


def test_imports_go_one_way() -> None:
    """What a module imports when it is imported: no circle, also none that only the order of imports hides."""
    package = ROOT / "rnnfast"
    modules = {
        path.relative_to(package).with_suffix("").as_posix().replace("/", "."): path for path in package.rglob("*.py")
    }
    imports: dict[str, set[str]] = {}
    for name, path in modules.items():
        parents = name.split(".")[:-1]
        imports[name] = set()
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
                whole = ".".join(part for part in base if part)
                named = {f"{whole}.{alias.name}".strip(".") for alias in node.names}
                imports[name] |= ({whole} | named) & set(modules)
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " imports ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in imports[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in modules:
        visit(name, ())
    assert "backends" in imports["autograd"]

"""The pages: their code blocks run in order, their lines are short, their links lead somewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDTH = 120


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


each_page = pytest.mark.parametrize("page", PAGES, ids=name)


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if code_blocks(p.read_text(encoding="utf-8"))], ids=name)
def test_code_blocks_run_in_order(page: Path) -> None:
    """All of a page in a new Python, in the repository's root."""
    program = "\n".join(code_blocks(page.read_text(encoding="utf-8")))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", "-c", program],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def prose(text: str) -> list[tuple[int, str]]:
    """Numbered lines, without those of tables and code blocks, and without what links lead to."""
    lines = []
    fenced = in_paragraph = False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            fenced = not fenced
        # Indented by four and not the rest of a paragraph: code.
        elif not fenced and not line.startswith("|") and (in_paragraph or not line.startswith("    ")):
            lines.append((number, re.sub(r"https?://\S+", "", re.sub(r"\]\([^)]*\)", "]", line))))
            in_paragraph = bool(line.strip())
    return lines


@each_page
def test_prose_fits_the_width(page: Path) -> None:
    long = [f"{page.name}:{number}" for number, line in prose(page.read_text(encoding="utf-8")) if len(line) > WIDTH]
    assert not long


def test_long_prose_is_noticed() -> None:
    long = "word " * 30
    text = f"| {long} |\n\n    {long}\n\n```\n{long}\n```\n[{'x' * 40}](http://{'y' * 100})\n\n- {long}\n  {long}\n"
    assert [number for number, line in prose(text) if len(line) > WIDTH] == [10, 11]


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\(((?!https?:)[^)\s]+)\)", text):
        place, _, anchor = target.partition("#")
        there = page.parent / place if place else page
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def quoted_places() -> list[tuple[str, str, int, str]]:
    """(page, file, line, what stands there) of each source line that a page quotes."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("test_mine.cpp", "template.cpp")
        # "sync_threads at csrc/a.cuh:60", "tests/cpp/a.cpp:7: output: 3 of", and what the race report quotes below.
        named = re.findall(r"(\w+) at ([\w/]+\.\w+):(\d+)\b", text)
        # The emulator's any() is a ballot.
        quotes = [(file, line, f"{word.replace('ballot', 'any')}(") for word, file, line in named]
        quotes += [
            (file, line, f'"{word}"')
            for file, line, word in re.findall(r"([\w/]+\.(?:cpp|h)):(\d+): (\w+): \d+ of", text)
        ]
        quotes += re.findall(r"#\d+ \S+ ([\w/]+\.\w+):(\d+)\n +(.+)$", text, re.MULTILINE)
        # Left out or stopped at, by the last parts of its path.
        quotes += [(file, line, "sync") for file, line in re.findall(r"(?:SKIP=|break )([\w/]+\.cuh):(\d+)\b", text)]
        found += [(name(page), file, int(line), what) for file, line, what in quotes]
    return found


def test_quoted_lines_of_sources_are_there() -> None:
    places = quoted_places()
    assert len(places) >= 8
    wrong = []
    for page, file, line, what in places:
        files = [
            path
            for folder in ("csrc", "tests/cpp")
            for path in (ROOT / folder).rglob(Path(file).name)
            if path.as_posix().endswith(f"/{file}")
        ]
        assert len(files) == 1, f"{page}: {file}"
        if what not in files[0].read_text(encoding="utf-8").splitlines()[line - 1]:
            wrong.append(f"{page}: {what} is not at {file}:{line}")
    assert not wrong

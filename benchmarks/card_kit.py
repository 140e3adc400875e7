"""What a machine with a GPU needs besides this tree: the libraries and the programs, built beforehand.

    python benchmarks/card_kit.py    # the end of `make card`: writes build/card/manifest.json, says what to bring

The manifest says of which sources everything was built. A check on a card refuses libraries of other sources: what
they show would be taken for what the sources do. (Alone, without `make card`, this script stamps what is there.)
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "card"
LIBRARIES = (ROOT / "rnnfast" / "_C_cpu.so", ROOT / "rnnfast" / "_C_cuda.so")
PROGRAMS = ("card_tests", "microbench")
# What the libraries are built of, what else the programs are, and what is not built.
LIBRARY_SOURCES = ("setup.py", "csrc/**/*.h", "csrc/**/*.cpp", "csrc/**/*.cu", "csrc/**/*.cuh")
PROGRAM_SOURCES = ("tests/cpp/*.h", "tests/cpp/*.cpp", "benchmarks/microbench/*.cu*")
PACKAGE = ("rnnfast/**/*.py",)
SCRIPTS = ("benchmarks/*.py", "benchmarks/peers/*.py")


def digest(path: Path) -> str:
    """Of a file's contents."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def sources(*patterns: str) -> dict[str, str]:
    """The digest of each source, by its path in the tree."""
    files = {path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()}
    return {path.relative_to(ROOT).as_posix(): digest(path) for path in sorted(files)}


def kernels() -> str:
    """Stands for all that a test of the kernels tests: who has the same has the same outcomes."""
    return hashlib.sha256(json.dumps(sources(*LIBRARY_SOURCES, *PACKAGE)).encode()).hexdigest()[:16]


class Kit:
    """The programs in a folder, and its manifest.

    Args:
        folder: `build/card`, or where it was brought to.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder.resolve()
        self.file = self.folder / "manifest.json"
        self.manifest: dict[str, Any] = {}
        # What cannot be read is as good as not there; `stale` says so.
        with contextlib.suppress(OSError, ValueError):
            self.manifest = json.loads(self.file.read_text(encoding="utf-8"))

    def commit(self) -> str:
        """The commit of `make card`; where the tree's Python differs from that, "-changed" behind it."""
        commit = str(self.manifest.get("commit", "unknown"))
        return commit + "-changed" * bool(self.manifest and self.manifest["python"] != sources(*PACKAGE, *SCRIPTS))

    def program(self, name: str, capability: str = "") -> Path:
        """Where a program is; its name there ends with the compute capability that it is built for, as in "90a"."""
        pattern = f"{name}-{capability.replace('.', '')}*"
        return next(iter(sorted(self.folder.glob(pattern))), self.folder / pattern)

    def missing(self, name: str, capability: str) -> str | None:
        """Why there is no such program for a card, None where there is."""
        if self.program(name, capability).exists():
            return None
        return f"{self.folder} has no {name} for compute capability {capability}: run `make card`"

    def built(self) -> list[Path]:
        return [*LIBRARIES, *(path for name in PROGRAMS for path in sorted(self.folder.glob(f"{name}-*")))]

    def write(self, commit: str, archs: str) -> None:
        """Describes what is there now."""
        self.manifest = {
            "commit": commit,
            "archs": archs,
            "compiled": sources(*LIBRARY_SOURCES, *PROGRAM_SOURCES),
            "python": sources(*PACKAGE, *SCRIPTS),
            "files": {path.name: digest(path) for path in self.built() if path.exists()},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.manifest, indent=1) + "\n", encoding="utf-8")

    def stale(self) -> str | None:
        """Why the libraries and programs are not those of this tree, None where they are."""
        if not self.manifest:
            how = "cannot be read" if self.file.exists() else "is not there"
            return f"{self.file} {how}: bring it along from where `make card` ran"
        then, now = self.manifest["compiled"], sources(*LIBRARY_SOURCES, *PROGRAM_SOURCES)
        if other := sorted(name for name in {*then, *now} if then.get(name) != now.get(name)):
            names = ", ".join(other[:4]) + (f" and {len(other) - 4} more" if len(other) > 4 else "")
            return (
                f"the libraries are of other sources than this tree's (commit {self.manifest['commit']}; "
                f"differs: {names}): run `make card` again and bring along what it lists, or that commit's tree"
            )
        files = self.manifest["files"]
        places = {path.name: path for path in LIBRARIES}
        if unnamed := [name for name in (*places, *PROGRAMS) if not any(file.startswith(name) for file in files)]:
            return f"{self.file} does not have {', '.join(unnamed)}: run `make card` again"
        for name, known in files.items():
            path = places.get(name, self.folder / name)
            if not path.exists():
                return f"{path} is not there: bring it along from where `make card` ran"
            if digest(path) != known:
                return f"{path} is not the one of `make card` (cut off while copying?): bring it along again"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="", help="the compute capabilities that were built for, for the manifest")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rnnfast.benchmark.timing import commit

    kit = Kit()
    if missing := [path for path in (*LIBRARIES, *map(kit.program, PROGRAMS)) if not path.exists()]:
        kit.file.unlink(missing_ok=True)
        print(f"card_kit: not built: {', '.join(map(str, missing))}", file=sys.stderr)
        return 1
    kit.write(commit(), options.archs)
    along = [*kit.built(), kit.file]
    print("To a machine with a card, beside this tree:")
    for path in along:
        print(f"  {path.stat().st_size / 2**20:6.1f} MiB  {path.relative_to(ROOT)}")
    print(f"  {sum(path.stat().st_size for path in along) / 2**20:6.1f} MiB  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""What a machine with a GPU needs besides this tree: the libraries and the programs, built beforehand.

    python benchmarks/card_kit.py    # the end of `make card`: writes build/card/manifest.json, says what to bring

The manifest says of which sources everything was built. A check on a card refuses libraries of other sources: what
they show would be taken for what the sources do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "card"
LIBRARIES = (ROOT / "rnnfast" / "_C_cpu.so", ROOT / "rnnfast" / "_C_cuda.so")
PROGRAMS = ("card_tests", "microbench")
# What the libraries and the programs are built of.
SOURCES = ("setup.py", "csrc/**/*", "tests/cpp/*", "benchmarks/microbench/*.cu*")


def digest(paths: Iterable[Path], root: Path = ROOT) -> str:
    """Of the names and the contents of files."""
    result = hashlib.sha256()
    for path in sorted(paths):
        result.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode())
        result.update(path.read_bytes())
    return result.hexdigest()


def sources() -> list[Path]:
    return [path for pattern in SOURCES for path in ROOT.glob(pattern) if path.is_file()]


class Kit:
    """The programs in a folder, and its manifest.

    Args:
        folder: `build/card`, or where it was brought to.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder.resolve()
        self.file = self.folder / "manifest.json"
        self.manifest: dict[str, Any] = {}
        if self.file.exists():
            self.manifest = json.loads(self.file.read_text(encoding="utf-8"))

    def commit(self) -> str:
        return str(self.manifest.get("commit", "unknown"))

    def program(self, name: str) -> Path:
        """Where a program is; its name there ends with what it is built for."""
        return next(iter(sorted(self.folder.glob(f"{name}-*"))), self.folder / name)

    def missing(self, name: str) -> str | None:
        """Why there is no such program, None where there is."""
        return None if self.program(name).exists() else f"{self.folder} has no {name}: run `make card`"

    def write(self, commit: str, archs: str) -> None:
        """Describes what is there now."""
        files = [path for path in (*LIBRARIES, *map(self.program, PROGRAMS)) if path.exists()]
        self.manifest = {
            "commit": commit,
            "archs": archs,
            "sources": digest(sources()),
            "files": {path.name: digest([path], path.parent) for path in files},
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.manifest, indent=1) + "\n", encoding="utf-8")

    def stale(self) -> str | None:
        """Why the libraries and programs are not those of this tree, None where they are."""
        if not self.manifest:
            return f"{self.file} is not there: run `make card`, and bring along what it lists"
        if self.manifest["sources"] != digest(sources()):
            return f"{self.file} is of other sources than these: run `make card`"
        for path in (*LIBRARIES, *map(self.program, PROGRAMS)):
            known = self.manifest["files"].get(path.name)
            if known is not None and (not path.exists() or digest([path], path.parent) != known):
                return f"{path} is missing, or not the one that `make card` built: run it again"
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--archs", default="", help="the compute capabilities that were built for, for the manifest")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from rnnfast.benchmark.timing import commit

    kit = Kit()
    kit.write(commit(), options.archs)
    files = [*LIBRARIES, *map(kit.program, PROGRAMS), kit.file]
    if missing := [str(path) for path in files if not path.exists()]:
        print(f"card_kit: not built: {', '.join(missing)}", file=sys.stderr)
        return 1
    print("To a machine with a card, beside this tree:")
    for path in files:
        print(f"  {path.stat().st_size / 2**20:6.1f} MiB  {path.relative_to(ROOT)}")
    print(f"  {sum(path.stat().st_size for path in files) / 2**20:6.1f} MiB  in all")
    return 0


if __name__ == "__main__":
    sys.exit(main())

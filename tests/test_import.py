"""The libraries are loaded once in a process, however often the package is imported; other files do not hide them."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rnnfast
from rnnfast import libraries, ops

PACKAGE = Path(rnnfast.__file__).parent

USE = """
import torch
from torch import nn

def use(package):
    x = torch.randn(6, 3, 4)
    for kind in ("LSTM", "GRU", "RNN"):
        theirs = getattr(nn, kind)(4, 5)
        model = nn.Sequential(getattr(package, kind)(4, 5))
        model[0].load_state_dict(theirs.state_dict())
        output = model(x)[0]
        torch.testing.assert_close(output, theirs(x)[0])
        output.sum().backward()
        torch.func.vmap(lambda v: model(v)[0])(torch.randn(2, 6, 3, 4))
        # Dynamo refuses torch.nn's layers, and takes ours whichever import made them.
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)[0]
        torch.testing.assert_close(compiled, output)
    layer = nn.GRU(4, 5)
    package.accelerate(layer)
    assert type(layer) is package.GRU

def forget():
    import sys
    for name in [name for name in sys.modules if name.split(".")[0] == "rnnfast"]:
        del sys.modules[name]
"""


def run(code, *folders):
    """Runs `code` in a process of its own: (exit code, what it said). A warning is an error there."""
    paths = [str(folder) for folder in (*folders, PACKAGE.parent)]
    code = f"import sys\nsys.path[:0] = {paths!r}\n{USE}\n{code}"
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def copy_of_the_package(folder):
    shutil.copytree(PACKAGE, folder / "rnnfast", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "rnnfast"


def test_reload_and_import_again():
    code, text = run("""
import importlib, rnnfast
importlib.reload(rnnfast)
use(rnnfast)
for _ in range(2):
    first = rnnfast
    forget()
    import rnnfast
    assert rnnfast is not first
    assert rnnfast.backends()["cpu"] == first.backends()["cpu"]
    use(rnnfast)
    use(first)
""")
    assert code == 0, text


@pytest.mark.skipif(ops.library_error is not None, reason="the C++ library is not built")
def test_a_copy_in_another_folder(tmp_path):
    copy_of_the_package(tmp_path)
    code, text = run(
        f"""
import rnnfast as first
forget()
sys.path.insert(0, {str(PACKAGE.parent)!r})
import rnnfast as second
assert first.__file__ != second.__file__
use(first), use(second)
""",
        tmp_path,
    )
    assert code == 0, text


@pytest.mark.skipif(ops.library_error is not None, reason="the C++ library is not built")
def test_files_that_are_no_library(tmp_path):
    """Another file of such a name does not hide the library; where none loads, each is named with its reason."""
    folder = copy_of_the_package(tmp_path)
    for name in ("_C_cpu.000.so", "_C_cpu.zzz.so"):
        (folder / name).write_text("junk")
    code, text = run('import rnnfast\nassert rnnfast.backends()["cpu"].available\nuse(rnnfast)', tmp_path)
    assert code == 0, text
    for library in folder.glob("_C_cpu*.so"):
        if library.read_bytes() != b"junk":
            library.unlink()
    code, text = run('import rnnfast\nprint(rnnfast.backends()["cpu"].reason)', tmp_path)
    assert code == 0, text
    assert "the C++ library _C_cpu.000.so does not load: " in text
    assert "; the library _C_cpu.zzz.so does not load: " in text


def test_registered_once():
    made = []
    for _ in range(3):
        assert libraries.registered_once("test_import", lambda: made.append(1) or "kept") == "kept"
    assert made == [1]

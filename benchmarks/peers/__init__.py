"""Other libraries' recurrent layers, for comparison, and one's own: a peer is one file.

A peer's file has a function ``peer(layer, case, workload, data)``: from torch.nn's layer, the case, the workload and
the data it builds the call that `rnnfast.benchmark.measure` checks, as it checks rnnfast's own, and then times
(`rnnfast.benchmark.Peer`). It raises `Impossible`, which says why, where the library is not installed or does not have
what the case needs; nothing is timed then. The files in this folder are asked for by name, any other by its path, which
ends in .py (docs/benchmarks.md); its name is that of the file.

A file whose library keeps its threads running behind a call says ``THREADS_STAY_AWAKE = True``: the candidates of a
case then have a process each (`service.needs_turns`).

What several files need stands here.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from records import ONE_THREAD, QUANTIZED
from rnnfast.backends import NAMES as BACKENDS
from rnnfast.benchmark import Call, Case, Data, Impossible, Peer
from rnnfast.benchmark.comparison import GRAPH

FOLDER = Path(__file__).resolve().parent
# Of the peers in this folder.
NAMES = sorted(path.stem for path in FOLDER.glob("[!_]*.py"))


# --- finding them ----------------------------------------------------------------------------------------------------


def name_of(which: str) -> str:
    """What a result file calls the peer that a name or a path stands for."""
    return Path(which).stem if which.endswith(".py") else which


def threads_stay_awake(which: str) -> bool:
    """Whether a peer's file says that its threads go on running behind a call: ``THREADS_STAY_AWAKE = True``."""
    return bool(getattr(_module(which), "THREADS_STAY_AWAKE", False))


def load(which: str) -> Peer:
    """The function of a peer.

    Args:
        which: a name of `NAMES`, or a path.

    Raises:
        ValueError: there is no such file, it does not import, or it has no function ``peer``.
    """
    function = getattr(_module(which), "peer", None)
    if not callable(function):
        raise ValueError(f"{which}: expected a function peer(layer, case, workload, data), found none")
    found: Peer = function
    return found


def _module(which: str) -> ModuleType:
    path = Path(which) if which.endswith(".py") else FOLDER / f"{which}.py"
    module_name = f"peer {path.resolve()}"
    if module_name not in sys.modules:
        if not path.is_file():
            raise ValueError(f"{path}: there is no such file")
        specification = importlib.util.spec_from_file_location(module_name, path)
        assert specification is not None
        assert specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        sys.modules[module_name] = module
        try:
            specification.loader.exec_module(module)
        # Whatever stands in another's file; it may end the program too.
        except (Exception, SystemExit) as error:
            del sys.modules[module_name]
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ValueError(f"{path} does not import: {why}") from error
    return sys.modules[module_name]


def named(which: Iterable[str]) -> dict[str, Peer]:
    """The peers by their names. Each is loaded when it is first called: what goes wrong then is the row's failure."""

    def later(each: str) -> Peer:
        return lambda layer, case, workload, data: load(each)(layer, case, workload, data)

    return {name_of(each): later(each) for each in which}


def chosen(text: str) -> list[str]:
    """For argparse: "all", or names and paths with commas; as `named` takes them, paths from the root.

    Raises:
        argparse.ArgumentTypeError: one that is not there or cannot be loaded, or a name that another one has.
    """
    words = NAMES if text == "all" else [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise argparse.ArgumentTypeError(
            f"expected all, a path that ends in .py, or of {', '.join(NAMES)}; got nothing"
        )
    found: dict[str, str] = {}
    for word in words:
        name = name_of(word)
        if not word.endswith(".py"):
            if word not in NAMES:
                expected = f"expected all, a path that ends in .py, or of {', '.join(NAMES)}"
                raise argparse.ArgumentTypeError(f"{expected}; got {word!r}")
            found[name] = word
            continue
        if name in NAMES or name in (*BACKENDS, "torch", "emulated") or name.endswith((GRAPH, ONE_THREAD, QUANTIZED)):
            raise argparse.ArgumentTypeError(f"{word}: {name!r} is taken; expected a file of another name")
        if name in found and found[name] != str(Path(word).resolve()):
            raise argparse.ArgumentTypeError(f"{word}: {name!r} is given twice; expected files of different names")
        found[name] = str(Path(word).resolve())
        try:
            load(found[name])
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
    return list(found.values())


# --- what several need -----------------------------------------------------------------------------------------------


def library(name: str) -> Any:
    """The library's module.

    Raises:
        Impossible: it is not installed, or does not load here.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        # The name alone where the library itself is missing; its own error where it is there and something else is not.
        missing = isinstance(error, ModuleNotFoundError) and error.name == name.split(".")[0]
        raise Impossible(f"{name} is not installed" if missing else f"{name} does not load: {error}") from error
    except (OSError, RuntimeError) as error:
        raise Impossible(f"{name} does not load: {str(error).splitlines()[0]}") from error


def need(condition: bool, reason: str) -> None:
    """Raises `Impossible` unless the condition holds."""
    if not condition:
        raise Impossible(reason)


def weights(layer: torch.nn.RNNBase, number: int, direction: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """weight_ih (G*H, in), weight_hh (G*H, H), bias_ih (G*H,), bias_hh (G*H,) of a layer and direction."""
    suffix = f"_l{number}" + "_reverse" * direction
    w_ih, w_hh, b_ih, b_hh = (
        getattr(layer, name + suffix) for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    )
    return w_ih, w_hh, b_ih, b_hh


def need_plain_layer(case: Case, data: Data, name: str) -> None:
    """Raises `Impossible` unless the case is one layer, one direction, dense rows, on a CUDA device."""
    need(data.values.device.type == "cuda", f"{name} needs a CUDA device")
    need(case.layers == 1 and case.directions == 1, f"{name} has one layer and one direction")
    need(not case.ragged, f"{name} takes dense rows only")
    need(not case.proj_size, f"{name} has no projection")


def trained(forward: Callable[[Tensor], Tensor], workload: str, data: Data, leaves: list[Tensor], mine: int) -> Call:
    """The call of a library whose layer is differentiable.

    Args:
        forward: input (T, B, I) -> output (T, B, H).
        workload: "inference" or "training".
        data: the input.
        leaves: the weights, whose gradients are computed too.
        mine: how many of these are laid out as torch.nn's, and so are handed back to be checked.
    """
    need(workload != "streaming", "compared over whole sequences only")
    if workload == "inference":

        def inference() -> list[Tensor]:
            with torch.no_grad():
                return [forward(data.values)]

        return inference
    leaf = data.values.detach().requires_grad_()
    with torch.no_grad():
        shape = forward(leaf).shape
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(leaf)

    def training() -> list[Tensor]:
        output = forward(leaf)
        return [output, *torch.autograd.grad(output, [leaf, *leaves], grad)[: 1 + mine]]

    return training

"""Swaps torch.nn's recurrent modules inside a model for ours, in place, and back.

Only the class of a module object changes. The object stays, and with it its parameters, hooks, buffers, its place in
the model and whatever refers to it: optimizer state, DDP buckets, tied weights.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from torch import jit, nn
from torch.nn.utils import parametrize

from . import cells, modules
from .backends import has_kernels
from .cell_types import CELLS
from .tools import why_not_torch_nn

__all__ = ["Report", "accelerate", "exporting", "restore"]

_Model = TypeVar("_Model", bound=nn.Module)

OURS: dict[type[nn.Module], type[nn.Module]] = {
    nn.LSTM: modules.LSTM,
    nn.GRU: modules.GRU,
    nn.RNN: modules.RNN,
    nn.LSTMCell: cells.LSTMCell,
    nn.GRUCell: cells.GRUCell,
    nn.RNNCell: cells.RNNCell,
}
_THEIRS = {ours: theirs for theirs, ours in OURS.items()}
FORWARD_REPLACED = "its forward was replaced"
_NAMES = frozenset(theirs.__name__ for theirs in OURS)


@dataclass
class Report:
    """What `accelerate` or `restore` did. `str()` of it is a readable list.

    Attributes:
        swapped: from a module's name in the model ("" for the model itself) to what became of it, "torch.nn.LSTM ->
            rnnfast.LSTM".
        left: from the name of a recurrent module that was left alone to the reason.
    """

    swapped: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"recurrent modules swapped: {len(self.swapped)}, left alone: {len(self.left)}"]
        lines += [f"  {name or '(the model)'}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name or '(the model)'}: left alone: {reason}" for name, reason in self.left.items()]
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Makes every torch.nn.LSTM, GRU, RNN, LSTMCell, GRUCell and RNNCell inside `model` one of rnnfast's, in place.

    Parameters are shared: an optimizer made before goes on with its state, and the state dict is the same. Calling it
    again changes nothing more.

    Args:
        model: any module, or such a layer itself.
    Returns:
        Report: what was swapped, and which recurrent modules were left alone and why. Left alone are subclasses (they
            may rely on what torch.nn does inside), quantized and scripted modules, those whose `forward` was replaced,
            and those on a device for which there are no kernels here.
    """
    return swap(model, OURS, why_not_ours, become)


def restore(model: nn.Module) -> Report:
    """Undoes `accelerate`: every rnnfast layer and cell inside `model` becomes torch.nn's, in place.

    Args:
        model: any module, or such a layer itself.
    Returns:
        Report: what was swapped, and what was left alone and why: torch.nn has no MGU, no RNN with a nonlinearity of
            ours and no quantized weights, and subclasses of ours rely on ours.
    """
    return swap(model, _THEIRS, _why_not_theirs, become)


@contextlib.contextmanager
def exporting(model: _Model) -> Iterator[_Model]:
    """Puts torch.nn's own layers into `model` for as long as the block runs: for tools that know only those.

        with rnnfast.exporting(model):
            program = torch.onnx.export(model, (input,), dynamo=True)

    Exporters, quantization and the like go by the class of a layer, and ours are subclasses, which they refuse or pass
    over. Inside the block `model` is as `restore` leaves it, with the same parameters. At its end, by an exception too,
    the layers and cells that it swapped are ours again, unless they are no longer in the model or were swapped since.

    Args:
        model: any module, or such a layer itself.
    Returns:
        A context manager that gives `model`.
    Warns:
        UserWarning: layers of rnnfast are left, because torch.nn has none such; it names them and says why.
    """
    report = restore(model)
    if report.left:
        warnings.warn(f"rnnfast.exporting: not all layers became torch.nn's: {report}", stacklevel=3)
    swapped = [model.get_submodule(name) for name in report.swapped]
    try:
        yield model
    finally:
        inside = set(model.modules())
        for module in swapped:
            if module in inside and _class_before_parametrization(module) in OURS:
                become(module, OURS)


def swap(
    model: nn.Module,
    table: dict[type[nn.Module], type[nn.Module]],
    why_not: Callable[[nn.Module, bool], str | None],
    change: Callable[[nn.Module, dict[type[nn.Module], type[nn.Module]]], str],
) -> Report:
    """Swaps classes by `table`, unless `why_not(module, whether its class is in the table)` gives a reason.

    change: gives a module the class that stands in the table for its own, and says what became of it.
    """
    report = Report()
    for name, module in model.named_modules():
        old = _class_before_parametrization(module)
        reason = why_not(module, old in table)
        if reason is not None:
            report.left[name] = reason
        elif old in table:
            report.swapped[name] = change(module, table)
    return report


def become(module: nn.Module, table: dict[type[nn.Module], type[nn.Module]]) -> str:
    """Gives `module` the class that stands in `table` for its own: "torch.nn.LSTM -> rnnfast.LSTM"."""
    old = _class_before_parametrization(module)
    new = table[old]
    if type(module) is not old:
        # A parametrized module has a class of its own, made by torch from the original one: so it gets another.
        new = type(type(module).__name__, (new,), dict(vars(type(module))))
    module.__class__ = new
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()
    return f"{title(old)} -> {title(table[old])}"


def _class_before_parametrization(module: nn.Module) -> type[nn.Module]:
    """The module's class; of a parametrized module the class that it was made from."""
    cls = type(module)
    return cls.__bases__[0] if parametrize.is_parametrized(module) and len(cls.__bases__) == 1 else cls


def title(cls: type) -> str:
    """The class as users know it: "torch.nn.LSTM"."""
    package = cls.__module__.partition(".")[0]
    return f"{'torch.nn' if package == 'torch' else package}.{cls.__name__}"


def why_not_ours(module: nn.Module, exact: bool) -> str | None:
    """Why `accelerate` leaves this module alone, None where it does not, or has nothing to do with it.

    exact: whether its class is one of torch.nn's that have their like here.
    """
    cls = type(module)
    if isinstance(module, (modules.Recurrent, cells.Cell)):
        return None
    if isinstance(module, jit.ScriptModule):
        return "a ScriptModule" if getattr(module, "original_name", "") in _NAMES else None
    if cls.__module__.startswith("torch.ao."):
        return "quantized" if cls.__name__ in _NAMES else None
    if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return None
    if not exact:
        return f"{cls.__module__}.{cls.__qualname__} is a subclass, which may rely on what torch.nn does inside"
    if "forward" in vars(module):
        return FORWARD_REPLACED
    if isinstance(module, nn.RNNBase) and (module.mode not in CELLS or CELLS[module.mode].torch_cell is None):
        return f"unknown mode {module.mode!r}"
    weight = next(module.parameters(), None)
    device = "cpu" if weight is None else weight.device.type
    # On the CPU a module is swapped even where only the reference is there.
    if device not in ("cpu", "meta") and not has_kernels(device):
        return f"there are no kernels for {device!r} devices here"
    return None


def _why_not_theirs(module: nn.Module, exact: bool) -> str | None:
    if not isinstance(module, (modules.Recurrent, cells.Cell)):
        return None
    return why_not_torch_nn(module) or (None if exact else subclass_in_words(module))


def subclass_in_words(module: nn.Module) -> str:
    """The reason for leaving a module alone whose class was made from one of ours."""
    return f"{type(module).__module__}.{type(module).__qualname__} is a subclass of rnnfast's class"

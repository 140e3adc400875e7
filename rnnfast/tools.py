"""What tools that know only torch.nn's layers get from ours: FX a leaf, TorchScript and its ONNX exporter torch.nn's.

`exporting` in patch.py is the way out for all others.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.fx import Proxy
from torch.nn.utils import parametrize

from .cell_types import CELLS, NONLINEARITIES

# Not None while torch.jit.trace, and with it torch.onnx.export(dynamo=False), runs a model.
tracing_state: Callable[[], Any] = torch._C._get_tracing_state

_fx_traces: Callable[[], bool] = torch.fx._symbolic_trace.is_fx_symbolic_tracing


def tool_watches() -> bool:
    """Whether a tool that `result_for_tool` serves may be at work, whatever the type of the input."""
    return tracing_state() is not None or _fx_traces()


_WAY_OUT = "`with rnnfast.exporting(model):` puts torch.nn's layers into a model for as long as a tool needs them"


def _torch_nn_ancestor(module: nn.Module) -> type[nn.Module]:
    """The class of torch.nn that the class of `module` stands for."""
    return next(cls for cls in type(module).__mro__ if cls.__module__ == nn.RNNBase.__module__)


def why_not_torch_nn(module: nn.Module) -> str | None:
    """Why torch.nn has no module that computes what one of ours does, in words; None where it has."""
    kernel: Any = module._kernel
    if kernel is not None:
        return "its weights are quantized"
    options: Any = module._options
    if options is not None:
        return f"torch.nn has nothing like {options}"
    nonlinearity: Any = getattr(module, "nonlinearity", None)
    # One that is unknown is refused by forward.
    mode = module._mode() if nonlinearity is None else NONLINEARITIES.get(nonlinearity)  # type: ignore[operator]
    cell = CELLS.get(str(mode))
    if cell is None or cell.torch_cell is not None:
        return None
    return f"torch.nn has no {cell.mode if nonlinearity is None else f'nonlinearity {nonlinearity!r}'}"


def _proxy(argument: Any) -> Proxy | None:
    """The FX proxy that `argument` is, or has in it if it is a tuple or a list."""
    if isinstance(argument, Proxy):
        return argument
    if isinstance(argument, (tuple, list)):
        return next((proxy for proxy in map(_proxy, argument) if proxy is not None), None)
    return None


def result_for_tool(module: nn.Module, input: Any, hx: Any, **options: Any) -> tuple[Any] | None:
    """The result of `module`'s forward for a tool that does not know our ops.

    FX takes a module for a leaf if its class is torch.nn's, and traces into ours: here they record themselves. The ONNX
    exporter that builds on TorchScript is given torch.nn's op. To be called where the input is no plain Tensor, or
    while `tool_watches`.

    Args:
        module: one of our layers or cells.
        input, hx: what it was called with.
        options: its other arguments, by name; one that was not given is None or False.
    Returns:
        The result, in a tuple; None where there is no such tool, and `module` is to run itself.
    Raises:
        RuntimeError: an ONNX model would know nothing of an option, of the nonlinearity, or of quantized weights.
    """
    given = {name: value for name, value in options.items() if value is not None and value is not False}
    proxy = _proxy((input, hx, *given.values()))
    if proxy is not None:
        tracer: Any = proxy.tracer
        arguments = (input,) if hx is None else (input, hx)
        return (tracer.create_proxy("call_module", tracer.path_of_module(module), arguments, given),)
    onnx = sys.modules.get("torch.onnx")
    if tracing_state() is None or onnx is None or not onnx.is_in_onnx_export():
        return None
    why_not = f"torch.nn has no argument {' or '.join(given)}" if given else why_not_torch_nn(module)
    if why_not is not None:
        raise RuntimeError(f"torch.onnx.export: rnnfast.{type(module).__name__}: {why_not}")
    forward: Callable[..., Any] = _torch_nn_ancestor(module).forward
    return (forward(module, input) if hx is None else forward(module, input, hx),)


def as_torch_nn(module: nn.Module) -> nn.Module:
    """What torch.jit.script gets for `module` (`__prepare_scriptable__`): torch.nn's, with the same parameters.

    torch.jit.script leaves what it gets in the model: that must not happen without a word.

    Raises:
        RuntimeError: torch.nn has no such module.
    """
    cls, theirs = type(module), _torch_nn_ancestor(module)
    if parametrize.is_parametrized(module):
        return module  # torch refuses it
    why_not = why_not_torch_nn(module)
    if why_not is not None:
        raise RuntimeError(f"torch.jit.script: rnnfast.{cls.__name__}: {why_not}")
    if cls.__module__.partition(".")[0] != __name__.partition(".")[0]:
        raise RuntimeError(
            f"torch.jit.script: {cls.__module__}.{cls.__qualname__} is a subclass of rnnfast.{theirs.__name__}, which "
            f"cannot be scripted; one of torch.nn.{theirs.__name__} can. For rnnfast's own layers {_WAY_OUT}"
        )
    warnings.warn(
        f"torch.jit.script: torch.nn.{theirs.__name__} takes the place of rnnfast.{cls.__name__}, in the model too; "
        f"rnnfast.accelerate(model) undoes that. {_WAY_OUT}",
        stacklevel=2,
    )
    twin = theirs.__new__(theirs)
    # The same dictionary: what is set or moved later is set and moved for both.
    twin.__dict__ = module.__dict__
    return twin

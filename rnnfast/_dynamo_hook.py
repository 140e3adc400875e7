"""Lets torch.compile trace our layers, which Dynamo would refuse for being torch.nn.LSTM, GRU or RNN.

`isinstance(m, torch.nn.LSTM)` must stay true, and a model that holds our module must compile with `fullgraph=True`.
Dynamo refuses every instance of torch.nn.RNN, GRU and LSTM unless `torch._dynamo.config.allow_rnn`; it looks only in
`VariableBuilder.wrap_module`, once for each module it meets. So the flag is true exactly while that function looks at
one of OUR modules. What the user has set, and how the user's own torch.nn modules are treated, stays as it was. Where a
later torch has no such function, nothing is changed.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .modules import Recurrent

_BUILDER = "torch._dynamo.variables.builder"


def _wrap(builder: ModuleType) -> None:
    """Puts the guarded wrapper round `VariableBuilder.wrap_module`, if there is one."""
    owner = getattr(builder, "VariableBuilder", None)
    original = getattr(owner, "wrap_module", None)
    config: Any = getattr(builder, "config", None)
    if owner is None or original is None or not hasattr(config, "allow_rnn") or hasattr(original, "_rnnfast"):
        return

    @functools.wraps(original)
    def wrap_module(self: Any, value: Any) -> Any:
        if not isinstance(value, Recurrent) or config.allow_rnn:
            return original(self, value)
        config.allow_rnn = True
        try:
            return original(self, value)
        finally:
            config.allow_rnn = False

    wrap_module._rnnfast = True  # type: ignore[attr-defined]
    owner.wrap_module = wrap_module


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds Dynamo's builder the usual way, once, and has `_wrap` run right after it is executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _BUILDER:
            return None
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _wrap(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Arranges it, without importing Dynamo where nobody has yet."""
    if _BUILDER in sys.modules:
        _wrap(sys.modules[_BUILDER])
    elif not any(type(finder).__name__ == _AfterImport.__name__ for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())

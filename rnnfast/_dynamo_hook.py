"""Lets torch.compile trace our layers, which Dynamo would refuse for being torch.nn.LSTM, GRU or RNN.

`isinstance(m, torch.nn.LSTM)` must stay true, and a model that holds our module must compile with `fullgraph=True`.
Dynamo refuses every instance of torch.nn.RNN, GRU and LSTM unless `torch._dynamo.config.allow_rnn`; it looks only in
`VariableBuilder.wrap_module`, once for each module it meets. So the flag is true exactly while that function looks at
one of OUR modules. What the user has set, and how the user's own torch.nn modules are treated, stays as it was. Where a
later torch has no such function, nothing is changed.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from ._after_import import after_import

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
        # Not isinstance: the class may have been imported anew since.
        if config.allow_rnn or not getattr(type(value), "_rnnfast_layer", False):
            return original(self, value)
        config.allow_rnn = True
        try:
            return original(self, value)
        finally:
            config.allow_rnn = False

    wrap_module._rnnfast = True  # type: ignore[attr-defined]
    owner.wrap_module = wrap_module


def install() -> None:
    """Arranges it, without importing Dynamo where nobody has yet."""
    after_import(_BUILDER, _wrap)

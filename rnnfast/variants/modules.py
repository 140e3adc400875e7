"""What layers and cells share that have options: taking them from the constructor, and the parameters they bring."""

from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any, ClassVar

from torch import nn

from ..cell_types import CELLS
from ..signatures import kinds_of
from .options import NAMES, Options, taken_from


class WithOptions(nn.Module):
    """A layer or a cell; its class comes before torch.nn's among the bases."""

    # All but the RNN: their mode whatever the attribute says, which torch.nn does not ask there either.
    _own_mode: str | None = None
    # What it does beside torch.nn's equations.
    _options: Options | None = None
    # Options that its calls have no use for, and why.
    _refused: ClassVar[dict[str, str]] = {}
    # Arguments by keyword that change no result: see `_set`.
    _settings: ClassVar[tuple[str, ...]] = ()
    # Those that make it what it is.
    _fixed: ClassVar[dict[str, Any]] = {}

    hidden_size: int
    bias: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name, cell = type(self).__name__, CELLS[self._own_mode or "RNN_TANH"]
        options = taken_from(name, kwargs, cell.has_cell_state, cell.gates, self._refused)
        if self._fixed:
            options = dataclasses.replace(options or Options(), **self._fixed)
        settings = {name: kwargs.pop(name) for name in self._settings if name in kwargs}
        super().__init__(*args, **kwargs)
        if options is not None:
            self._take(options)
        if settings:
            self._set(**settings)

    def _set(self, **settings: Any) -> None:
        """Gives a module that was just made its settings, which `_settings` names."""
        raise NotImplementedError

    def _mode(self) -> str:
        raise NotImplementedError

    def _suffixes(self) -> list[str]:
        """Of the parameters' names, one for each layer and direction."""
        raise NotImplementedError

    def _take(self, options: Options) -> None:
        """Gives a module that was just made its options, and the parameters that come with them."""
        options.check_module(self)
        self._options = options
        cell, gates = CELLS[self._mode()], self._gates()
        # As torch.nn fills its own.
        bound = 1 / math.sqrt(self.hidden_size) if self.hidden_size > 0 else 0

        def made(like: Any, *size: int) -> nn.Parameter:
            return nn.Parameter(nn.init.uniform_(like.detach().new_empty(size), -bound, bound))

        for suffix in self._suffixes():
            like: Any = getattr(self, f"weight_hh{suffix}")
            for kind in kinds_of(bool(self.bias), False):
                rows, *columns = getattr(self, kind + suffix).shape
                if kind == "weight_hh" and options.num_heads > 1:
                    columns = [self.hidden_size // options.num_heads]
                size = (rows // cell.gates * gates, *columns)
                # What keeps its size keeps the values that torch.nn gave it.
                if size != getattr(self, kind + suffix).shape:
                    setattr(self, kind + suffix, made(like, *size))
            for kind, (width, _) in options.parameters(gates, self.hidden_size, cell.has_cell_state).items():
                self.register_parameter(kind + suffix, made(like, width))
            for kind, shape in options.statistics(gates, self.hidden_size, cell.has_cell_state).items():
                for statistic in ("mean", "var"):
                    self.register_buffer(f"running_{statistic}_{kind}{suffix}", like.detach().new_empty(shape))
        options.initialize(self, gates, cell.has_cell_state, self._suffixes())

    def _gates(self) -> int:
        """G."""
        gates = CELLS[self._mode()].gates
        return gates if self._options is None else self._options.gates(gates)

    def _heads(self) -> int:
        """Blocks of W_hh."""
        return 1 if self._options is None else self._options.num_heads

    def reset_parameters(self) -> None:
        super().reset_parameters()  # type: ignore[misc]
        if self._options is not None:
            has_cell_state = CELLS[self._mode()].has_cell_state
            self._options.initialize(self, self._gates(), has_cell_state, self._suffixes())

    def extra_repr(self) -> str:
        options = self._options
        if options is not None and self._fixed:
            options = dataclasses.replace(options, **{name: getattr(Options(), name) for name in self._fixed})
        return super().extra_repr() + (f", {options}" if options not in (None, Options()) else "")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Where torch.nn's constructor says what it takes, so does ours, which takes more."""
        super().__init_subclass__(**kwargs)
        theirs = next((base for base in cls.__mro__ if base.__module__.startswith("torch.nn")), None)
        if theirs is None or any("__init__" in vars(base) for base in cls.__mro__[: cls.__mro__.index(WithOptions)]):
            return
        parameters = list(inspect.signature(theirs).parameters.values())
        if all(parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for parameter in parameters):
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=getattr(Options(), name))
                for name in NAMES
                if name not in cls._refused
            ]
            parameters += [
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in cls._settings
            ]
            cls.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]

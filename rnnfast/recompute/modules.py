"""The settings of layers by which training saves memory."""

from __future__ import annotations

from typing import Any, ClassVar

from .settings import Recompute, bytes_of, recompute_of


class SavesMemory:
    """What a layer is told of memory; its class comes first among the bases."""

    _settings: ClassVar[tuple[str, ...]] = ("recompute", "memory_budget")

    # Of both settings, and as they were given.
    _recompute: Recompute | None = None
    _memory_budget: int | None = None

    _options: Any

    def _set(self, **settings: Any) -> None:
        recompute, memory_budget = (settings.get(name) for name in self._settings)
        self._recompute = self._checked(recompute, memory_budget)
        if memory_budget is not None:
            self.memory_budget = memory_budget

    def _checked(self, recompute: Any, memory_budget: Any) -> Recompute | None:
        has_batch_norm = self._options is not None and self._options.batch_norm is not None
        return recompute_of(type(self).__name__, recompute, memory_budget, has_batch_norm)

    @property
    def recompute(self) -> str | int | None:
        """What backward makes again in place of reading what forward saved.

        None: nothing. "gates": of the states h_t and c_t, which are kept, everything else. "chunks", or their number:
        the states inside of each, from those that were kept between them. "auto": the fastest of these whose memory is
        within `memory_budget`; rnnfast.recompute.memory has the formula. Outputs and gradients are the same but for
        rounding.
        """
        if self._recompute is None:
            return None
        return self._recompute.pieces or self._recompute.how

    @recompute.setter
    def recompute(self, value: Any) -> None:
        # An array is compared with a text in an array's way.
        self._recompute = self._checked(
            value, self._memory_budget if isinstance(value, str) and value == "auto" else None
        )

    @property
    def memory_budget(self) -> int | None:
        """With recompute="auto": how many bytes a call may take in training, as `python -m rnnfast memory` counts."""
        return self._memory_budget

    @memory_budget.setter
    def memory_budget(self, value: Any) -> None:
        budget = None if value is None else bytes_of(type(self).__name__, value)
        if self._recompute is not None and self._recompute.how == "auto":
            self._recompute = self._checked("auto", budget)
        self._memory_budget = budget

    def extra_repr(self) -> str:
        told = {"recompute": self.recompute, "memory_budget": self._memory_budget}
        given = "".join(f", {name}={value!r}" for name, value in told.items() if value is not None)
        return super().extra_repr() + given  # type: ignore[misc, no-any-return]

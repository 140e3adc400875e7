"""Normalised, regularised and structured recurrences: what the layers' keyword arguments beyond torch.nn's do.

`options.py` says what there is, `reference.py` what it means, `ops.py` runs one direction of one layer, `layers.py`
stacks them.
"""

from .options import Options

__all__ = ["Options"]

"""Times rnnfast against torch.nn, honestly: the same weights, the results checked first, taken in turn.

`python -m rnnfast bench` is the command line for one case; `measure` is what it and `benchmarks/run.py` are made of.
"""

from .case import Call, Case, Data, Impossible
from .comparison import Peer, Row, default_backends, failed_rows, measure

__all__ = ["Call", "Case", "Data", "Impossible", "Peer", "Row", "default_backends", "failed_rows", "measure"]

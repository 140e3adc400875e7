"""rnnfast: drop-in LSTM, GRU and RNN layers for PyTorch, with the time loop in fused kernels.

lstm = rnnfast.LSTM(128, 256, num_layers=2)     # instead of torch.nn.LSTM
print(rnnfast.accelerate(model))                # or: swap them all inside a model, in place
"""

from . import _dynamo_hook, convert, functional, init, registration

# This hides the submodule of the same name: `from rnnfast.backends import ...` still reaches it.
from .backends import backend, backends
from .cells import GRUCell, LSTMCell, MGUCell, RNNCell
from .explanation import explain
from .modules import GRU, LSTM, MGU, RNN
from .more_layers import SLSTM, LiGRU
from .patch import accelerate, exporting, restore
from .quantized_modules import quantize_weights
from .truncated import tbptt

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "RNN",
    "SLSTM",
    "GRUCell",
    "LSTMCell",
    "LiGRU",
    "MGUCell",
    "RNNCell",
    "__version__",
    "accelerate",
    "backend",
    "backends",
    "convert",
    "explain",
    "exporting",
    "functional",
    "init",
    "quantize_weights",
    "restore",
    "tbptt",
]

registration.register_all()
_dynamo_hook.install()

"""Weights of other libraries, loaded into our layers.

    gru = rnnfast.convert.from_keras(keras_layer)
    lstm, hx = rnnfast.convert.from_onnx(model, name="/encoder/LSTM")
    lstm = rnnfast.convert.from_haste(haste_layer)
    lstm = rnnfast.convert.from_flashrnn(R, b, linear.weight, linear.bias)

None of these libraries is needed to import this. What comes back is a layer of its own, in evaluation mode, that
computes what the other does; its memory is not shared with what it was made from.
"""

from .flashrnn import from_flashrnn
from .haste import from_haste
from .keras import from_keras
from .onnx import from_onnx

__all__ = ["from_flashrnn", "from_haste", "from_keras", "from_onnx"]

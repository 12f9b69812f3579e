"""Models that exist only as ``model.onnx``: our own reading of the standard operators (docs/onnx-import.md).

`load` makes a `torch.nn.Module` of a file, whose `save` writes the trained file back. Of the package ``onnx`` only the
file format is used, and only when a file is read.
"""

from __future__ import annotations

from . import (
    classical,
    convolution,
    elementwise,
    indexing,
    linear,
    normalisation,
    quantised,
    recurrent,
    reductions,
    resize,
    shapes,
)
from .model import OnnxModel, load
from .node import OPERATORS, Node, Operator

FAMILIES = (
    linear, convolution, normalisation, recurrent, elementwise, reductions, shapes, indexing, resize, quantised,
    classical,
)  # fmt: skip
"""The modules that fill `OPERATORS`."""

__all__ = ["FAMILIES", "OPERATORS", "Node", "OnnxModel", "Operator", "load"]

"""Trains what `onward export` has written, on ONNX Runtime: NumPy and onnxruntime are all that it imports.

``python -m onward.runtime.onnx train FOLDER --data x.npz`` is the command; `Trainer` is what it calls.
"""

from __future__ import annotations

from .folder import Folder, read_folder
from .trainer import Record, Settings, Trainer

__all__ = ["Folder", "Record", "Settings", "Trainer", "read_folder"]

"""Trains what `onward export` has written, on ONNX Runtime: NumPy and onnxruntime are all that it imports.

``python -m onward.runtime.onnx train FOLDER --data x.npz`` is the command. The same in Python::

    folder = read_folder("exported")
    train, test = read_splits("x.npz", folder)
    trainer = Trainer(folder, Settings(epochs=15, batch_size=32, lr=2e-3), Device.find("auto"))
    trainer.fit(train, test)
    write_trained(folder, trainer.state, Path("trained.onnx"))
"""

from __future__ import annotations

from .data import Split, read_splits
from .folder import Folder, read_folder
from .session import Device
from .trainer import Record, Settings, Trainer
from .write import write_trained

__all__ = ["Device", "Folder", "Record", "Settings", "Split", "Trainer", "read_folder", "read_splits", "write_trained"]

"""The trained model as an ONNX file of its own."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from ...compiler.files import check_writable, replacing
from ...passes.errors import FolderError, OptionError, OutputError
from .folder import Folder
from .session import Value

LIMIT = 2**31 - 2**20
"""Bytes beyond which a model's tensors go into a file beside it: protobuf's limit, less what else is in a model."""


def beyond(model: Any, limit: int) -> bool:
    """Whether a model (an ``onnx.ModelProto``) has more bytes."""
    try:
        return bool(model.ByteSize() > limit)
    except Exception:  # protobuf's own error: its size is more than protobuf can say
        return True


def check_onnx() -> None:
    """Raise OptionError if the package onnx, which `write_trained` needs, is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise OptionError("writing a model needs the package onnx: pip install 'onward[onnx]'") from error


def write_trained(folder: Folder, state: dict[str, Value], path: Path, limit: int = LIMIT) -> None:
    """Write ``inference.onnx`` with the state's weights to `path`, in one rename.

    One of more than `limit` bytes keeps its tensors in ``<name>.data`` beside it.

    Raises:
        OptionError: the package onnx is not installed.
        FolderError: ``inference.onnx`` is damaged.
        OutputError: `path` cannot be written.
    """
    check_onnx()
    import onnx
    from onnx import numpy_helper

    source = folder.file("inference.onnx")
    try:
        model = onnx.load(str(source))
    except Exception as error:  # protobuf and onnx have classes of their own
        raise FolderError(f"{source} cannot be read: {error}") from error
    for tensor in model.graph.initializer:
        if tensor.name in state:
            tensor.CopyFrom(numpy_helper.from_array(state[tensor.name].numpy(), tensor.name))
    held = {tensor.name for tensor in model.graph.initializer}
    kept = [value for value in model.graph.input if value.name not in held]
    del model.graph.input[:]
    model.graph.input.extend(kept)
    if not beyond(model, limit):
        with replacing(path) as file:
            file.write(model.SerializeToString())
        return
    check_writable(path)
    data = f"{path.name}.data"
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as temporary:
        try:
            onnx.save(model, f"{temporary}/{path.name}", save_as_external_data=True, location=data)
            for name in (data, path.name):  # a model is never there without its tensors
                os.replace(f"{temporary}/{name}", path.with_name(name))
        except OSError as error:
            raise OutputError(f"cannot write {path}: {error}") from error

"""The trained model as an ONNX file of its own."""

from __future__ import annotations

from pathlib import Path

from ...compiler.files import replacing
from ...passes.errors import FolderError, OptionError
from .folder import Folder
from .session import Value


def check_onnx() -> None:
    """Raise OptionError if the package onnx, which `write_trained` needs, is not installed."""
    try:
        import onnx  # noqa: F401
    except ImportError as error:
        raise OptionError("writing a model needs the package onnx: pip install 'onward[onnx]'") from error


def write_trained(folder: Folder, state: dict[str, Value], path: Path) -> None:
    """Write ``inference.onnx`` with the state's weights to `path`, in one rename.

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
    with replacing(path) as file:
        file.write(model.SerializeToString())
